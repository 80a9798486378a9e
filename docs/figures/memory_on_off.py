"""A Stage video with its packed memory and without, side by side: `memory_on_off.gif`.

    python -m docs.figures.memory_on_off

The model that ships draws the default story of `packforcing sample` twice, from the same seed and prompts: as it is,
and with the profile `no-mid`, which keeps the sink and the recent block and nothing in between. Shown are the blocks
around a guest's first visit and around its return, the time between in fast motion. The row below collects what the
guest wore on each visit; whether that is its first mark is read from the frames by the oracle.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from packforcing_jax.sampling.pipeline import Pipeline
from packforcing_jax.stage import captions, metrics, oracle, stories, world

OUT = Path(__file__).with_suffix(".gif")
# Of seeds 0, 1 and 2, in all of which every guest keeps its mark with packed memory, the one whose subject is whole
# in every frame. The length is the default of `packforcing sample`.
SEED, BLOCKS = 2, 120
GUEST = "plum"
VISITS = (8, 108, 112, 114)  # blocks of this story that call the guest, counted from 0
SIDES = (("packed memory", None), ("no packed memory", "no-mid"))

SCALE, TILE = 7, 5  # pixels of the picture for one of a frame, and of the row below
PAD, TITLE, FOOT = 14, 30, 62
SLOW, NORMAL, FAST, LAST = 280, 160, 60, 3000  # milliseconds a frame is shown
PAPER, INK, FAINT = (20, 22, 28), (240, 240, 240), (150, 155, 165)
SAME, OTHER = (90, 200, 130), (240, 110, 100)
COLOURS = 128


@dataclass(frozen=True)
class Side:
    """One of the two videos, and the mark its guest wears on each visit."""

    title: str
    frames: np.ndarray  # [frames, 32, 32, 3], uint8
    marks: dict[int, int]  # by block


def sample(title: str, memory: str | None, prompts: list[str]) -> Side:
    """Draws one side and reads the guest's marks from it."""
    video = Pipeline.from_pretrained(memory=memory).generate(prompts, seed=SEED)
    reading, who = oracle.read(video), world.GUESTS.index(GUEST)
    marks = np.where(reading.guest == who, reading.guest_mark, -1)
    worn = {block: metrics.majority(marks[_frames(block)]) for block in VISITS}
    return Side(title, np.rint((video.clip(-1, 1) + 1) * 127.5).astype(np.uint8), worn)


def check(prompts: list[str], with_memory: Side, without: Side) -> None:
    """Refuses to draw what the picture would not show: the guest's return, kept on one side and lost on the other."""
    who, called = world.GUESTS.index(GUEST), [captions.parse(prompt).guest for prompt in prompts]
    asked = [block for block in range(VISITS[-1] + 1) if called[block] == who]
    if asked != list(VISITS):
        raise SystemExit(f"the story calls {GUEST} in blocks {asked}, not in {list(VISITS)}.")
    first, *later = (with_memory.marks[block] for block in VISITS)
    if set(later) != {first} or without.marks[VISITS[1]] == without.marks[VISITS[0]]:
        raise SystemExit(f"marks: {with_memory.marks} with memory, {without.marks} without.")


def schedule() -> list[tuple[int, int, bool]]:
    """(frame, milliseconds, whether in fast motion) of all that is shown."""
    first, back, last = VISITS[0], VISITS[1], VISITS[-1]
    shown = []
    for block in (*range(first - 2, first + 2), *range(back - 1, last + 1)):
        pace = SLOW if block in VISITS[:2] else NORMAL
        shown += [(frame, pace, False) for frame in range(*_frames(block).indices(10**9))]
    skipped = range((first + 2) * world.BLOCK, (back - 1) * world.BLOCK, 2 * world.BLOCK)
    shown = sorted([*shown, *((frame, FAST, True) for frame in skipped)])
    return [*shown[:-1], (shown[-1][0], LAST, False)]


def _frames(block: int) -> slice:
    return slice(block * world.BLOCK, (block + 1) * world.BLOCK)


def compose(sides: list[Side], frame: int, fast: bool) -> Image.Image:
    """The whole picture at one frame."""
    panel, tile = world.SIZE * SCALE, world.CELL * TILE
    size = 3 * PAD + 2 * panel, TITLE + panel + PAD + tile + FOOT
    image = Image.new("RGB", size, PAPER)
    draw, block = ImageDraw.Draw(image), frame // world.BLOCK
    for number, side in enumerate(sides):
        left = PAD + number * (panel + PAD)
        draw.text((left, TITLE / 2), side.title, INK, _font(15), anchor="lm")
        _paste(image, side.frames[frame], SCALE, (left, TITLE))
        _visits(image, side, frame, (left, TITLE + panel + PAD))
    text = f"block {block}, frame {frame + 1} of {BLOCKS * world.BLOCK}"
    draw.text((PAD, size[1] - 13), text, FAINT, _font(12), anchor="lm")
    draw.text((size[0] - PAD, size[1] - 13), _event(block, fast), INK, _font(12), anchor="rm")
    return image


def _event(block: int, fast: bool) -> str:
    """What happens in a block, in words."""
    if fast:
        return "fast motion"
    if block == VISITS[0]:
        return f"guest {GUEST} comes for the first time"
    if block in VISITS:
        gap = block - VISITS[VISITS.index(block) - 1]
        return f"guest {GUEST} is called back after {gap} blocks"
    return ""


def _visits(image: Image.Image, side: Side, frame: int, corner: tuple[int, int]) -> None:
    """The guest as it looked on each visit so far, and whether it wore the mark of its first visit."""
    draw, tile = ImageDraw.Draw(image), world.CELL * TILE
    left, top = corner
    step = (world.SIZE * SCALE - tile) // (len(VISITS) - 1)
    for number, block in enumerate(VISITS):
        x = left + number * step
        box = (x, top, x + tile - 1, top + tile - 1)
        if frame < block * world.BLOCK:
            draw.rectangle(box, outline=(60, 64, 72))
            continue
        last = min(frame, (block + 1) * world.BLOCK - 1)
        seen = side.frames[last][world.cell(*world.GUEST_CELL)]
        _paste(image, seen, TILE, (x, top))
        same = side.marks[block] == side.marks[VISITS[0]]
        word, colour = (
            ("first", INK) if number == 0 else ("same", SAME) if same else ("other", OTHER)
        )
        middle = x + tile / 2
        draw.text((middle, top + tile + 9), word, colour, _font(12), anchor="mm")
        draw.text((middle, top + tile + 23), f"block {block}", FAINT, _font(10), anchor="mm")


def _paste(image: Image.Image, pixels: np.ndarray, scale: int, corner: tuple[int, int]) -> None:
    """Puts pixels into the picture, each enlarged to a square."""
    image.paste(Image.fromarray(pixels.repeat(scale, 0).repeat(scale, 1)), corner)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def main() -> None:
    """Samples both videos, checks that they show what the picture is about, and writes it."""
    prompts = stories.default_timeline(SEED, BLOCKS)
    sides = [sample(title, memory, prompts) for title, memory in SIDES]
    check(prompts, *sides)
    plan = schedule()
    images = [compose(sides, frame, fast) for frame, _, fast in plan]
    # One palette for all frames, so that what stands still is stored once.
    # It covers the range of colours rather than their frequency: a mark is few pixels and must look right.
    every = Image.fromarray(np.concatenate([np.asarray(image) for image in images]))
    palette = every.quantize(COLOURS, method=Image.Quantize.MAXCOVERAGE)
    first, *rest = (image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images)
    first.save(
        OUT,
        save_all=True,
        append_images=rest,
        duration=[milliseconds for _, milliseconds, _ in plan],
        loop=0,
        optimize=True,
    )
    seconds = sum(milliseconds for _, milliseconds, _ in plan) / 1000
    print(f"{OUT.name}: {len(plan)} frames, {seconds:.1f} s, {OUT.stat().st_size} bytes")
    for side in sides:
        print(f"  {side.title}: marks of {GUEST} by block {side.marks}")


if __name__ == "__main__":
    main()
