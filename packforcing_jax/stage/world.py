"""The puppet stage: a world of hidden marks and called-back guests, drawn exactly, pixel by pixel.

A frame is 4 x 4 cells of 8 x 8 pixels. The subject walks along row 2 above a wooden floor (row 3); the poster of the
scene hangs at (row 0, column 1); a guest, when called, stands at (row 1, column 2) for the whole block.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from packforcing_jax.errors import require

SIZE, CELL, LANES, BLOCK = 32, 8, 4, 4  # pixels, pixels, columns, frames
COLOURS = ("red", "amber", "lime", "green", "cyan", "blue", "violet", "pink")
SHAPES = ("square", "disc", "diamond", "figure")
SPEEDS = ("slowly", "quickly")
STEP_FRAMES = (2, 1)  # frames per cell, by speed
BACKDROPS = ("brick", "straw", "moss", "pine", "water", "night", "velvet", "wine")
GUESTS = ("coral", "lemon", "fern", "jade", "sky", "indigo", "plum", "rose")
SCENES = ("one", "two", "three", "four")
MARKS = 16  # mark m: left half m // 4, right half m % 4
MARK_COLOURS = np.array(
    [[1, 1, 1], [0.05, 0.05, 0.05], [0.15, 0.25, 1], [1, 0.85, 0.1]], np.float32
)

HUE_SPREAD = 18.0  # degrees either way, so that neighbouring colours, 45 degrees apart, never meet
GAIN_RANGE = (0.75, 1.25)
LIGHT = 0.76  # scales what the gain lights, so that nothing clips at the highest gain
TURN = 0.3  # chance that the subject turns round at the start of a block
SUBJECT_ROW, FLOOR_ROW, POSTER_CELL, GUEST_CELL = 2, 3, (0, 1), (1, 2)
MARK_SPAN = slice(2, 6)  # rows and columns of the subject's mark inside its cell
INNER_SPAN = slice(1, 7)  # rows and columns of a poster's or guest's mark inside its border


def hsv(hue, saturation, value) -> Float[np.ndarray, "*n 3"]:
    """Red, green, blue in [0, 1] of a hue in degrees."""
    turn = (np.array([5, 3, 1]) + np.asarray(hue)[..., None] / 60) % 6
    drop = np.clip(np.minimum(turn, 4 - turn), 0, 1)
    return (value * (1 - saturation * drop)).astype(np.float32)


def body_colour(colour, hue) -> Float[np.ndarray, "*n 3"]:
    """The subject's body for a colour number and a hidden hue offset in degrees."""
    return hsv(45 * np.asarray(colour) + hue, 0.85, 0.95)


def cell(row: int, column: int) -> tuple[slice, slice]:
    """The pixel rows and columns of one cell."""
    return slice(row * CELL, (row + 1) * CELL), slice(column * CELL, (column + 1) * CELL)


def _sprites() -> Bool[np.ndarray, "shape 8 8"]:
    """The four silhouettes; each covers the whole mark."""
    y, x = np.indices((CELL, CELL)) - (CELL - 1) / 2
    head = (y < -2) & (abs(x) < 1)
    trunk = (abs(y) < 2) & (abs(x) < 3)
    legs = (y > 2) & (abs(x) > 1) & (abs(x) < 2)
    return np.stack([y == y, x**2 + y**2 <= 16.6, abs(x) + abs(y) <= 4, head | trunk | legs])


def _backgrounds() -> Float[np.ndarray, "backdrop 32 32 3"]:
    """Every curtain above the floor, before gain and LIGHT: four patterns at a weak and at a strong contrast."""
    y, x = np.indices((SIZE, SIZE)) // 2
    patterns = np.stack([y, x, x + y, (x + y) // 2])[:, :, :, None] % 2 * 2 - 1
    waves = np.concatenate([1 + contrast * patterns for contrast in (0.15, 0.4)])
    curtains = waves * hsv(45 * np.arange(8) + 10, 0.55, 0.30)[:, None, None]
    planks = 1 - 0.35 * ((2 * y + x // 2 * 4) % 8 == 0)
    curtains[:, FLOOR_ROW * CELL :] = (planks[..., None] * np.array([0.42, 0.27, 0.14]))[
        FLOOR_ROW * CELL :
    ]
    return curtains.astype(np.float32)


SPRITES = _sprites()
BACKGROUNDS = _backgrounds()
GUEST_COLOURS = hsv(45 * np.arange(8) + 20, 0.6, 0.75)
SCENE_COLOURS = hsv(90 * np.arange(4) + 65, 0.9, 0.9)


@dataclass(frozen=True, eq=False)
class Story:
    """Everything that decides a video: what the text says, what stays hidden, and who is where when."""

    colour: int
    shape: int
    speed: int
    backdrop: int
    mark: int
    hue: float  # degrees added to the subject's colour
    gain: float  # light on backdrop, floor and poster
    guest_marks: Int[np.ndarray, " guest"]
    posters: Int[np.ndarray, " scene"]
    guests: Int[np.ndarray, " blocks"]  # -1: nobody
    scenes: Int[np.ndarray, " blocks"]
    columns: Int[np.ndarray, " frames"]


def walk(
    rng: np.random.Generator, frames: int, speed: int, start: int | None = None
) -> Int[np.ndarray, " frames"]:
    """Columns of a walk that reflects at the walls and turns round at some block starts; its direction is hidden."""
    column = rng.integers(LANES) if start is None else start
    ahead = rng.choice((-1, 1))
    time = np.arange(frames)
    turns = (rng.random(frames) < TURN) & (time % BLOCK == 0)
    moves = (time > 0) & (time % STEP_FRAMES[speed] == 0)
    unfolded = column + np.cumsum(ahead * np.cumprod(np.where(turns, -1, 1)) * moves)
    wall = LANES - 1
    return wall - abs(unfolded % (2 * wall) - wall)


def draw_story(
    rng: np.random.Generator,
    blocks: int,
    *,
    guests=None,
    scenes=None,
    colour=None,
    shape=None,
    speed=None,
    backdrop=None,
) -> Story:
    """A story of `blocks` blocks: what is not given is drawn, but guests stay away and the scene stays the first."""
    given = {"colour": colour, "shape": shape, "speed": speed, "backdrop": backdrop}
    sizes = {
        "colour": len(COLOURS),
        "shape": len(SHAPES),
        "speed": len(SPEEDS),
        "backdrop": len(BACKDROPS),
    }
    drawn = {
        name: int(rng.integers(size)) for name, size in sizes.items()
    }  # always, so the hidden draws stay the same
    prompt = drawn | {
        name: _index(name, value, sizes[name]) for name, value in given.items() if value is not None
    }
    hidden = {
        "mark": int(rng.integers(MARKS)),
        "hue": float(rng.uniform(-HUE_SPREAD, HUE_SPREAD)),
        "gain": float(rng.uniform(*GAIN_RANGE)),
        "guest_marks": rng.integers(MARKS, size=len(GUESTS)),
        "posters": rng.integers(MARKS, size=len(SCENES)),
    }
    return Story(
        **prompt,
        **hidden,
        guests=_per_block("guests", guests, blocks, lowest=-1, highest=len(GUESTS) - 1),
        scenes=_per_block("scenes", scenes, blocks, lowest=0, highest=len(SCENES) - 1),
        columns=walk(rng, blocks * BLOCK, prompt["speed"]),
    )


def _index(name: str, value: int, size: int) -> int:
    require(
        0 <= value < size,
        f"{name}={value} is not on the stage; give a number from 0 to {size - 1}.",
    )
    return int(value)


def _per_block(
    name: str, values, blocks: int, *, lowest: int, highest: int
) -> Int[np.ndarray, " blocks"]:
    """`values` as an array, or the lowest one throughout."""
    found = np.full(blocks, lowest) if values is None else np.asarray(values)
    require(
        found.shape == (blocks,),
        f"{name} has shape {found.shape}; give one number for each of {blocks} blocks.",
    )
    require(
        blocks == 0 or lowest <= found.min() <= found.max() <= highest,
        f"{name}={found.tolist()} is not on the stage; give numbers from {lowest} to {highest}.",
    )
    return found


def two_tone(marks, width: int) -> Float[np.ndarray, "*n width 3"]:
    """One pixel row of each mark: its left colour, then its right colour."""
    marks = np.asarray(marks)[..., None]
    return MARK_COLOURS[np.where(np.arange(width) < width // 2, marks // 4, marks % 4)]


def tiles(
    borders: Float[np.ndarray, "n 3"], marks: Int[np.ndarray, " n"]
) -> Float[np.ndarray, "n 8 8 3"]:
    """Posters or guests: a one-pixel border that says which, around a mark."""
    pixels = np.broadcast_to(borders[:, None, None], (len(marks), CELL, CELL, 3)).copy()
    pixels[:, INNER_SPAN, INNER_SPAN] = two_tone(marks, CELL - 2)[:, None]
    return pixels


def puppet(story: Story) -> Float[np.ndarray, "8 8 3"]:
    """The subject's cell; only the pixels in its sprite are drawn."""
    pixels = np.tile(body_colour(story.colour, story.hue), (CELL, CELL, 1))
    pixels[MARK_SPAN, MARK_SPAN] = two_tone(story.mark, 4)
    return pixels


def render(story: Story) -> Float[np.ndarray, "frames 32 32 3"]:
    """The video in [-1, 1]."""
    light = np.float32(story.gain * LIGHT)
    lanes = np.repeat(BACKGROUNDS[story.backdrop][None] * light, LANES, axis=0)
    body, sprite = puppet(story), SPRITES[story.shape][..., None]
    for lane in range(LANES):
        np.copyto(lanes[lane][cell(SUBJECT_ROW, lane)], body, where=sprite)
    frames = lanes[story.columns]
    blocks = np.arange(len(frames)) // BLOCK
    called = story.guests[blocks] >= 0
    frames[:, *cell(*POSTER_CELL)] = (tiles(SCENE_COLOURS, story.posters) * light)[
        story.scenes[blocks]
    ]
    frames[called, *cell(*GUEST_CELL)] = tiles(GUEST_COLOURS, story.guest_marks)[
        story.guests[blocks][called]
    ]
    return 2 * frames - 1
