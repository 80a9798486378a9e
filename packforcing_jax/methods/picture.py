"""A picture of a method: a row per block, a cell per key at its position in time, coloured by what it is."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from packforcing_jax.methods.calls import Call

COLOURS = {
    "sink": (0, 114, 178),
    "mid": (230, 159, 0),
    "recent": (0, 158, 115),
    "current": (213, 94, 0),
}
CELL, LEFT, TOP, BOTTOM, WIDEST = 10, 64, 30, 46, 2000
PAPER, INK = (255, 255, 255), (40, 40, 40)


def of(steps: Sequence[Call]) -> Image.Image:
    """One row per block; across, positions in time. Keys whose positions depend on data are left out."""
    placed = [key.position for call in steps for key in call.keys if key.position is not None]
    least, most = min(placed), max(placed) + 1
    scale = min(CELL, (WIDEST - 2 * LEFT) / (most - least))
    width = max(int(LEFT + scale * (most - least) + 20), 420)
    image = Image.new("RGB", (width, TOP + CELL * len(steps) + BOTTOM), PAPER)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(12)
    for row, call in enumerate(steps):
        y = TOP + CELL * row
        for key in call.keys:
            if key.position is None:
                continue
            x = LEFT + scale * (key.position - least)
            draw.rectangle((x, y, x + max(scale - 1, 1), y + CELL - 2), COLOURS[key.kind])
        if row % max(1, len(steps) // 12) == 0:
            draw.text((LEFT - 6, y + CELL / 2), str(call.block), INK, font, anchor="rm")
    bottom = TOP + CELL * len(steps)
    step = max(1, round((most - least) / 10))
    for position in range(int(least), int(most) + 1, step):
        x = LEFT + scale * (position - least)
        draw.text((x, bottom + 6), str(position), INK, font, anchor="mt")
    draw.text((LEFT, bottom + 24), "position in time (frames)", INK, font)
    draw.text((4, 8), "block", INK, font)
    x = LEFT
    for kind, colour in COLOURS.items():
        draw.rectangle((x, 9, x + 11, 20), colour)
        draw.text((x + 16, 8), kind, INK, font)
        x += 84
    return image
