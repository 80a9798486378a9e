"""A guard that watches a video while it is made: colour, sharpness and standstill of each window against the first.

What it knows is a small frozen value, so that it is kept and goes on with a session. Frames of a window are never held:
each becomes eight numbers. A new prompt shows something else by right, so the first window behind it is compared with
from then on.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from packforcing_jax.errors import require

LUMINANCE = np.array([0.2126, 0.7152, 0.0722], np.float32)  # ITU-R BT.709
STILL = 0.5  # grey levels: a pair of frames is frozen if no cell changes by more on average
CELLS = 16  # parts of each side in which change is averaged
FAINT = 1.0  # grey levels of contrast below which a picture has no sharpness
BLOCKS = 5  # of a window: 20 frames on Stage, five seconds of models whose blocks last one

Frames = UInt8[np.ndarray, "t height width 3"]


@dataclass(frozen=True)
class Bounds:
    """What a window may differ from the first one by before it counts as drifted.

    `colour`: the distance of means and deviations of the colours, in 8-bit levels. `sharpness`: the factor by which it
    may rise or fall. `freeze`: the share of the pairs of frames that moved in the first window and stand still now.

    The default is half as much again as the most that undrifting runs reached (docs/live.md says which).
    """

    colour: float = 13.5
    sharpness: float = 1.25
    freeze: float = 0.5


class Figures(NamedTuple):
    """What is compared of a window: means over its frames and pairs; NaN where there is none."""

    colour: tuple[float, ...]  # mean and deviation of red, green, blue, in 8-bit levels
    sharpness: float
    freeze: float


@dataclass(frozen=True)
class Guard:
    """Where a guard stands: sums over the window at hand, and the figures of the first one."""

    window: int  # frames
    prompt: str = ""
    frames: int = 0
    colour: tuple[float, ...] = (0.0,) * 6
    sharpness: float = 0.0
    sharp_frames: int = 0
    frozen: int = 0
    pairs: int = 0
    first: Figures | None = None

    def to_json(self) -> dict[str, Any]:
        """As `guard_of` reads it."""
        return dataclasses.asdict(self)


class Drift(NamedTuple):
    """A window that differs from the first: in what, by how much, and what would have been allowed."""

    what: str
    value: float
    allowed: float

    @property
    def sentence(self) -> str:
        """What is said of it."""
        return f"drift: {self.what} differs by {self.value:.3g} from the first window, and {self.allowed:.3g} is usual"


def guard_of(table: Mapping[str, Any] | None, window: int) -> Guard:
    """The guard that `to_json` gave, or one that has seen nothing."""
    if table is None:
        return Guard(window)
    first = table["first"]
    return Guard(
        **{
            **table,
            "colour": tuple(table["colour"]),
            "first": None if first is None else Figures(tuple(first[0]), *first[1:]),
        }
    )


def watch(
    guard: Guard, frames: Frames, prompt: str, bounds: Bounds = Bounds()
) -> tuple[Guard, list[Drift]]:
    """(the guard behind a block's frames under `prompt`, what of a window that ends in it has drifted).

    Pairs are those inside blocks. The window ends with the block in which it has become long enough.
    """
    require(frames.dtype == np.uint8, f"frames are {frames.dtype}; give them as uint8.")
    if prompt != guard.prompt:
        guard = Guard(guard.window, prompt)
    guard = _added(guard, frames)
    if guard.frames < guard.window:
        return guard, []
    figures = _figures(guard)
    first = guard.first or figures
    return Guard(guard.window, prompt, first=first), compare(first, figures, bounds)


def _added(guard: Guard, frames: Frames) -> Guard:
    colours = np.stack([colour(frame) for frame in frames])
    greys = frames.astype(np.float32) @ LUMINANCE
    sharp = [value for value in map(sharpness, greys) if not math.isnan(value)]
    frozen = sum(change(a, b) <= STILL for a, b in zip(greys, greys[1:]))
    sums = np.add(guard.colour, colours.sum(axis=0))
    return dataclasses.replace(
        guard,
        frames=guard.frames + len(frames),
        colour=tuple(map(float, sums)),
        sharpness=guard.sharpness + sum(sharp),
        sharp_frames=guard.sharp_frames + len(sharp),
        frozen=guard.frozen + frozen,
        pairs=guard.pairs + len(frames) - 1,
    )


def _figures(guard: Guard) -> Figures:
    return Figures(
        tuple(value / guard.frames for value in guard.colour),
        guard.sharpness / guard.sharp_frames if guard.sharp_frames else math.nan,
        guard.frozen / guard.pairs if guard.pairs else math.nan,
    )


def differences(first: Figures, window: Figures) -> dict[str, float]:
    """By how much a window differs from the first one, under the names of `Bounds`; 0 where that cannot be said.

    A picture that has lost all contrast has lost its sharpness too.
    """
    lost = math.isnan(window.sharpness) and not math.isnan(first.sharpness)
    ratio = (
        math.inf
        if lost
        else max(window.sharpness / first.sharpness, first.sharpness / window.sharpness)
    )
    values = {
        "colour": float(np.linalg.norm(np.subtract(window.colour, first.colour))),
        "sharpness": ratio,
        "freeze": 1 - (1 - window.freeze) / (1 - first.freeze) if first.freeze < 1 else 0.0,
    }
    return {name: 0.0 if math.isnan(value) else value for name, value in values.items()}


def compare(first: Figures, window: Figures, bounds: Bounds = Bounds()) -> list[Drift]:
    """What of a window has drifted from the first one."""
    return [
        Drift(name, value, getattr(bounds, name))
        for name, value in differences(first, window).items()
        if value > getattr(bounds, name)
    ]


def colour(frame: UInt8[np.ndarray, "height width 3"]) -> Float[np.ndarray, " 6"]:
    """Mean and standard deviation of red, green and blue over a frame, in 8-bit levels."""
    pixels = frame.reshape(-1, 3).astype(np.float32)
    return np.concatenate([pixels.mean(axis=0, dtype=float), pixels.std(axis=0, dtype=float)])


def sharpness(grey: Float[np.ndarray, "height width"]) -> float:
    """Deviation of the Laplacian over that of the luminance, so that fading leaves it as it is; NaN of a flat frame."""
    spread = float(grey.std())
    if spread < FAINT or min(grey.shape) < 3:
        return math.nan
    inner = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner
    return float(laplacian.std()) / spread


def change(
    first: Float[np.ndarray, "height width"], second: Float[np.ndarray, "height width"]
) -> float:
    """The largest mean absolute change of a cell from one frame to the next, in grey levels."""
    moved = np.abs(second - first)
    height, width = moved.shape
    rows = np.add.reduceat(moved, _starts(height), axis=0)
    cells = np.add.reduceat(rows, _starts(width), axis=1)
    sizes = np.outer(*(np.diff([*_starts(side), side]) for side in (height, width)))
    return float((cells / sizes).max())


def _starts(side: int) -> np.ndarray:
    """Where the cells along a side begin."""
    count = min(CELLS, side)
    return np.arange(count) * side // count
