"""Reads a stage frame back: the legal frame nearest to it, factor by factor, and how far away that one is.

The search is exhaustive over every discrete factor. It stays small because a frame's factors meet only through the
light: the cells that always show backdrop and floor give a light for each backdrop, and under it poster, guest and
subject are found cell by cell. Gain and hue are solved in closed form inside each hypothesis: a frame is linear in the
gain, and a body colour is piecewise linear in the hue.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float, Int

from packforcing_jax.errors import require
from packforcing_jax.stage import world

TAU = 0.005
"""A frame is valid below this residual. Fixed once, on calibration frames, and never on a model's output.

It separates legal frames with noise of sigma .05 (residual at most .0028; all valid) from frames whose subject is
torn, halved, doubled or missing, or whose poster is missing (residual at least .006; none valid). Noise of sigma .1
and .2 leaves .01 and .04: invalid. It cannot see one wall cell drawn as floor, nor every guest drawn as a poster.
"""

CHUNK = 512  # frames searched at a time, to bound memory
HALF = world.MARK_COLOURS.shape[0]  # colours of one half of a mark
LIT_CELLS = [
    [
        (row, column) not in (world.POSTER_CELL, world.GUEST_CELL) and row != world.SUBJECT_ROW
        for column in range(world.LANES)
    ]
    for row in range(world.SIZE // world.CELL)
]

Numbers: TypeAlias = Int[np.ndarray, " t"]
Values: TypeAlias = Float[np.ndarray, " t"]
Cells: TypeAlias = Float[np.ndarray, "t row column y x 3"]  # in [0, 1]


@dataclass(frozen=True, eq=False)
class Reading:
    """What each frame shows; a guest of -1 is nobody. `residual` is the mean squared error per value in [-1, 1]."""

    column: Numbers
    colour: Numbers
    shape: Numbers
    mark: Numbers
    hue: Values  # degrees
    backdrop: Numbers
    gain: Values
    scene: Numbers
    poster: Numbers
    guest: Numbers
    guest_mark: Numbers
    residual: Values

    @property
    def valid(self) -> Bool[np.ndarray, " t"]:
        return self.residual < TAU

    def __len__(self) -> int:
        return len(self.column)


def read(frames: Float[np.ndarray, "t 32 32 3"]) -> Reading:
    """The nearest legal state of each frame in [-1, 1]; frames that are not finite are invalid."""
    shape = np.shape(frames)
    require(
        shape[1:] == (world.SIZE, world.SIZE, 3),
        f"frames of shape {shape} are not of the stage; give [frames, {world.SIZE}, {world.SIZE}, 3].",
    )
    chunks = [
        _read(np.asarray(frames[start : start + CHUNK]))
        for start in range(0, max(len(frames), 1), CHUNK)
    ]
    fields = [field.name for field in dataclasses.fields(Reading)]
    return Reading(
        **{name: np.concatenate([getattr(chunk, name) for chunk in chunks]) for name in fields}
    )


def _read(frames: Float[np.ndarray, "t 32 32 3"]) -> Reading:
    """The best state over backdrops; one whose own cells alone fit worse than the best so far needs no search."""
    finite = np.isfinite(frames).all(axis=(1, 2, 3), keepdims=True)
    cells = _cells((np.where(finite, frames, 0).astype(np.float32) + 1) / 2)
    bounds, lights = _backdrops(cells)
    order, frame = bounds.argsort(axis=1), np.arange(len(cells))
    best = _given(cells, order[:, 0].copy(), lights[frame, order[:, 0]])
    for backdrop in order.T[1:]:
        unsure = np.flatnonzero(bounds[frame, backdrop] < best["residual"])
        if not len(unsure):
            break
        other = _given(cells[unsure], backdrop[unsure], lights[unsure, backdrop[unsure]])
        better = other["residual"] < best["residual"][unsure]
        for name, values in best.items():
            values[unsure[better]] = other[name][better]
    return Reading(**best | {"residual": np.where(finite.ravel(), best["residual"], np.inf)})


def _given(cells: Cells, backdrop: Numbers, light: Values) -> dict[str, np.ndarray]:
    """The best state with this backdrop, searched under this light; the gain that suits it best, and its residual."""
    curtain = cells_of_backdrops()[backdrop] * light[:, None, None, None, None, None]
    state = {
        "backdrop": backdrop,
        **_poster(cells[:, *world.POSTER_CELL], light),
        **_guest(cells[:, *world.GUEST_CELL], curtain[:, *world.GUEST_CELL]),
        **_subject(cells[:, world.SUBJECT_ROW], curtain[:, world.SUBJECT_ROW]),
    }
    gain, residual = refit(cells, **state)
    return state | {"gain": gain, "residual": residual}


def _cells(frames: Float[np.ndarray, "t 32 32 3"]) -> Cells:
    return rearrange(
        frames, "t (row y) (column x) rgb -> t row column y x rgb", y=world.CELL, x=world.CELL
    )


def cells_of_backdrops() -> Float[np.ndarray, "backdrop row column y x 3"]:
    """Every curtain and the floor at light 1, cut into cells."""
    return _cells(world.BACKGROUNDS)


def _errors(
    pixels: Float[np.ndarray, "*t n 3"], palette: Float[np.ndarray, "*t k 3"]
) -> Float[np.ndarray, "*t k"]:
    """Squared error of painting all `pixels` in each colour of the palette."""
    mean = pixels.mean(axis=-2, keepdims=True)
    spread = np.square(pixels - mean).sum(axis=(-2, -1))
    return spread[..., None] + pixels.shape[-2] * np.square(mean - palette).sum(axis=-1)


def _mark(
    pixels: Float[np.ndarray, "*t y x 3"], palette: Float[np.ndarray, "*t half 3"]
) -> tuple[np.ndarray, ...]:
    """The nearest mark and its squared error; its halves are independent."""
    middle = pixels.shape[-2] // 2
    halves = pixels[..., :middle, :], pixels[..., middle:, :]
    left, right = (
        _errors(rearrange(half, "... y x rgb -> ... (y x) rgb"), palette) for half in halves
    )
    return left.argmin(axis=-1) * HALF + right.argmin(axis=-1), left.min(axis=-1) + right.min(
        axis=-1
    )


def _border(tile: Float[np.ndarray, "t y x 3"]) -> Float[np.ndarray, "t n 3"]:
    edge = np.ones((world.CELL, world.CELL), bool)
    edge[world.INNER_SPAN, world.INNER_SPAN] = False
    return tile[:, edge]


def _tile(
    tile: Float[np.ndarray, "t y x 3"],
    borders: Float[np.ndarray, "*t k 3"],
    halves: Float[np.ndarray, "*t half 3"],
) -> tuple[np.ndarray, ...]:
    """The nearest poster or guest: which, its mark, its squared error."""
    which = _errors(_border(tile), borders)
    mark, error = _mark(tile[:, world.INNER_SPAN, world.INNER_SPAN], halves)
    return which.argmin(axis=-1), mark, which.min(axis=-1) + error


def _backdrops(
    cells: Cells,
) -> tuple[Float[np.ndarray, "t backdrop"], Float[np.ndarray, "t backdrop"]]:
    """For each backdrop, from the cells that nothing else ever covers: a bound below its residual, and its light."""
    seen = rearrange(cells[:, LIT_CELLS], "t cell y x rgb -> t (cell y x rgb)")
    known = rearrange(cells_of_backdrops()[:, LIT_CELLS], "k cell y x rgb -> k (cell y x rgb)")
    product, power = seen @ known.T, np.square(known).sum(axis=1)
    light = _legal_light(product / power)
    error = np.square(seen).sum(axis=1, keepdims=True) + light * (light * power - 2 * product)
    return 4 * error / math.prod(cells.shape[1:]), light


def _legal_light(light: np.ndarray) -> np.ndarray:
    low, high = world.GAIN_RANGE
    return np.clip(light, low * world.LIGHT, high * world.LIGHT)


def _poster(tile: Float[np.ndarray, "t y x 3"], light: Values) -> dict[str, Numbers]:
    """The scene and its poster's mark, both lit."""
    lit = light[:, None, None]
    scene, poster, _ = _tile(tile, lit * world.SCENE_COLOURS, lit * world.MARK_COLOURS)
    return {"scene": scene, "poster": poster}


def _guest(
    tile: Float[np.ndarray, "t y x 3"], curtain: Float[np.ndarray, "t y x 3"]
) -> dict[str, Numbers]:
    """The guest and its mark, both -1 where the empty curtain is nearer."""
    guest, mark, error = _tile(tile, world.GUEST_COLOURS, world.MARK_COLOURS)
    absent = np.square(tile - curtain).sum(axis=(1, 2, 3)) < error
    return {"guest": np.where(absent, -1, guest), "guest_mark": np.where(absent, -1, mark)}


def body_segments() -> tuple[Int[np.ndarray, " k"], Float[np.ndarray, "k 2"]]:
    """The legal hues as pieces on which the body's colour is a straight line: colour number, first and last offset."""
    bends = [60 * np.arange(-1, 8) - 45 * colour for colour in range(len(world.COLOURS))]
    ends = [np.unique(np.clip(bend, -world.HUE_SPREAD, world.HUE_SPREAD)) for bend in bends]
    pieces = [
        (colour, pair)
        for colour, knots in enumerate(ends)
        for pair in zip(knots, knots[1:], strict=False)
    ]
    colours, offsets = zip(*pieces, strict=True)
    return np.array(colours), np.array(offsets, np.float32)


def _body(
    mean: Float[np.ndarray, "*t 3"],
) -> tuple[Float[np.ndarray, "*t k"], Float[np.ndarray, "*t k"]]:
    """Squared distance to the point of each segment nearest to a mean colour, and that point's hue."""
    colours, offsets = body_segments()
    start, stop = world.body_colour(colours[:, None], offsets).swapaxes(0, 1)
    along, seen = stop - start, mean[..., None, :] - start
    share = np.clip((seen * along).sum(axis=-1) / np.square(along).sum(axis=-1), 0, 1)
    distance = np.square(seen - share[..., None] * along).sum(axis=-1)
    return distance, offsets[:, 0] + share * (offsets[:, 1] - offsets[:, 0])


def _subject(
    row: Float[np.ndarray, "t lane y x 3"], curtain: Float[np.ndarray, "t lane y x 3"]
) -> dict:
    """Where the subject stands and what it is: every lane, shape, colour and mark against the bare curtain."""
    bare = np.square(row - curtain).sum(axis=-1)
    mark, mark_error = _mark(row[..., world.MARK_SPAN, world.MARK_SPAN, :], world.MARK_COLOURS)
    body = world.SPRITES.astype(np.float32)
    body[:, world.MARK_SPAN, world.MARK_SPAN] = 0
    size = body.sum(axis=(1, 2))
    mean = np.einsum("tlyxc,syx->tlsc", row, body, optimize=True) / size[:, None]
    power = np.einsum("tlyx,syx->tls", np.square(row).sum(axis=-1), body, optimize=True)
    spread = power - size * np.square(mean).sum(axis=-1)
    behind = np.einsum("tlyx,syx->tls", bare, world.SPRITES.astype(np.float32), optimize=True)
    distance, hue = _body(mean)
    error = (spread + mark_error[..., None] - behind)[..., None] + size[:, None] * distance
    best = rearrange(error, "t lane shape piece -> t (lane shape piece)").argmin(axis=1)
    lane, shape, segment = np.unravel_index(best, error.shape[1:])
    frame = np.arange(len(row))
    return {
        "column": lane,
        "shape": shape,
        "colour": body_segments()[0][segment],
        "hue": hue[frame, lane, shape, segment],
        "mark": mark[frame, lane],
    }


def compose(
    *, column, colour, shape, mark, hue, backdrop, scene, poster, guest, guest_mark
) -> tuple[Cells, Cells]:
    """The cells of legal frames in two parts: what the light multiplies, at light 1, and what it leaves alone."""
    lit = cells_of_backdrops()[backdrop]
    plain = np.zeros_like(lit)
    lit[:, *world.POSTER_CELL] = world.tiles(world.SCENE_COLOURS[scene], poster)
    there = np.flatnonzero(guest >= 0)
    lit[there, *world.GUEST_CELL] = 0
    plain[there, *world.GUEST_CELL] = world.tiles(
        world.GUEST_COLOURS[guest[there]], guest_mark[there]
    )
    subject = np.tile(world.body_colour(colour, hue)[:, None, None], (1, world.CELL, world.CELL, 1))
    subject[:, world.MARK_SPAN, world.MARK_SPAN] = world.two_tone(mark, 4)[:, None]
    sprite = world.SPRITES[shape][..., None]
    place = np.arange(len(lit)), world.SUBJECT_ROW, column
    lit[place] *= ~sprite
    plain[place] = subject * sprite
    return lit, plain


def refit(cells: Cells, **state) -> tuple[Values, Values]:
    """The gain that suits all lit pixels of a state best, and the residual it leaves, in [-1, 1] units."""
    lit, plain = compose(**state)
    axes = tuple(range(1, cells.ndim))
    light = _legal_light(((cells - plain) * lit).sum(axis=axes) / np.square(lit).sum(axis=axes))
    misfit = cells - plain - light.reshape(-1, *[1] * len(axes)) * lit
    return light / world.LIGHT, 4 * np.square(misfit).mean(axis=axes)
