"""What can be read off any video without a model: motion, jumps at block borders, flicker, freeze, colour, sharpness.

A video is gone through once, a few frames at a time; what is kept of it is `Signals`, some numbers per frame. All
figures, of the whole video or of a window, are functions of these (`FIGURES`). Needs OpenCV.
"""

import concurrent.futures
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from packforcing_jax.errors import require

if TYPE_CHECKING:
    from types import ModuleType

Frames = UInt8[np.ndarray, "t height width 3"]
Grey = UInt8[np.ndarray, "height width"]

SMALLEST = 16  # pixels of a side, below which DIS finds no patches
LONGEST_SIDE = 832  # pixels; motion in larger pictures is measured on smaller copies
DETAIL_SIDE = 480  # pixels of the shorter side up to which detail is that of single pixels
COLOUR_SIDE = 320  # pixels of the longer side of the copies whose colours are read
CELLS = 16  # parts of each side in which change and brightness are averaged
STILL = 0.5  # grey levels: a pair of frames is frozen if no cell changes by more on average
FAINT = 1.0  # grey levels of contrast below which a picture counts as flat
THREADS = 2
LINKED = "LD_LIBRARY_PATH"


def opencv() -> "ModuleType":
    """The module cv2, on one thread: how DIS divides a picture among threads changes what it finds.

    Its import puts a folder of its own before what programs started later would link against; that is taken back.
    """
    linked = os.environ.get(LINKED)
    import cv2  # of the extra `eval`

    if linked is None:
        os.environ.pop(LINKED, None)
    else:
        os.environ[LINKED] = linked
    cv2.setNumThreads(1)
    return cv2


# Signals


@dataclasses.dataclass(frozen=True)
class Signals:
    """What is kept of `t` frames: numbers of each frame and of each pair of neighbours.

    `colour`: mean and standard deviation of CIELAB L*, a*, b*. `sharpness`: see `sharpness`. `flow`: mean length of the
    optical flow, in percent of the longer side. `change`: the largest mean absolute change of a cell, in grey levels.
    `brightness`: the change of each cell's brightness that motion does not explain, in grey levels.
    """

    colour: Float[np.ndarray, "t 6"]
    sharpness: Float[np.ndarray, " t"]
    flow: Float[np.ndarray, " t-1"]
    change: Float[np.ndarray, " t-1"]
    brightness: Float[np.ndarray, "t-1 cells"]

    def __len__(self) -> int:
        return len(self.colour)

    def __getitem__(self, span: slice) -> "Signals":
        """The signals of the frames `span`, and of the pairs that lie in it."""
        start, stop, _ = span.indices(len(self))
        pairs = slice(start, max(stop - 1, start))
        return Signals(
            self.colour[span],
            self.sharpness[span],
            self.flow[pairs],
            self.change[pairs],
            self.brightness[pairs],
        )


def parts(blocks: Iterable[Frames]) -> Iterator[Signals]:
    """The signals of each block of a video's frames, with the pair across the border to the block before.

    No more than a block and a frame are held. Raises `InputError` for a side under 16 pixels.
    """
    cv2 = opencv()
    last: Grey | None = None
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        for block in blocks:
            height, width = block.shape[1:3]
            require(
                min(_fitted(block[0], LONGEST_SIDE)) >= SMALLEST,
                f"Frames of {width}x{height} pixels are too small or too narrow for optical flow; "
                f"give sides of {SMALLEST} or more.",
            )
            greys = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in block]
            row = greys if last is None else [last, *greys]
            pairs = list(pool.map(_pair, row[:-1], row[1:]))
            yield Signals(
                np.array(list(pool.map(colour, block))),
                np.array(list(pool.map(sharpness, greys))),
                np.array([flow for flow, _, _ in pairs]),
                np.array([change for _, change, _ in pairs]),
                np.array([brightness for _, _, brightness in pairs]).reshape(-1, CELLS**2),
            )
            last = greys[-1]


def joined(pieces: Sequence[Signals]) -> Signals:
    """The signals of a whole video from those of all of its blocks."""
    return Signals(
        *(
            np.concatenate([getattr(piece, field.name) for piece in pieces])
            for field in dataclasses.fields(Signals)
        )
    )


def colour(frame: UInt8[np.ndarray, "height width 3"]) -> Float[np.ndarray, " 6"]:
    """Mean and standard deviation of L*, a*, b* over a frame."""
    cv2 = opencv()
    small = cv2.resize(frame, _fitted(frame, COLOUR_SIDE), interpolation=cv2.INTER_AREA)
    lab = cv2.cvtColor(small.astype(np.float32) / 255, cv2.COLOR_RGB2LAB).reshape(-1, 3)
    return np.concatenate([lab.mean(0, dtype=float), lab.std(0, dtype=float)])


def sharpness(grey: Grey) -> float:
    """Spread of the Laplacian of a Gaussian over the spread of the luminance, so that fading leaves it as it is.

    The Gaussian is one pixel wide, in larger pictures than 480p one of 480p: the edges of coding blocks and noise of
    single pixels count for little. Its square is a factor, which makes sizes comparable (Lindeberg).
    """
    cv2 = opencv()
    spread = float(grey.std())
    if spread < FAINT:
        return math.nan
    sigma = max(1.0, min(grey.shape) / DETAIL_SIDE)
    smooth = cv2.GaussianBlur(grey.astype(np.float32), (0, 0), sigma)
    return sigma**2 * float(cv2.Laplacian(smooth, cv2.CV_32F).std()) / spread


def flow(first: Grey, second: Grey) -> Float[np.ndarray, "height width 2"]:
    """Motion in pixels by DIS (Kroeger et al. 2016, OpenCV's medium preset).

    The second frame is brought to mean and contrast of the first, so that light that changes is no motion.
    """
    cv2 = opencv()
    gain = float(first.std()) / max(float(second.std()), FAINT) if first.std() >= FAINT else 1.0
    level = float(first.mean()) - gain * float(second.mean())
    equal = np.clip(np.rint(gain * second.astype(np.float32) + level), 0, 255).astype(np.uint8)
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return dis.calc(first, equal, None)


def _pair(first: Grey, second: Grey) -> tuple[float, float, Float[np.ndarray, " cells"]]:
    """`Signals.flow`, `change` and `brightness` of two frames."""
    cv2 = opencv()
    size = _fitted(first, LONGEST_SIDE)
    first, second = (
        cv2.resize(grey, size, interpolation=cv2.INTER_AREA) for grey in (first, second)
    )
    change = _cells(cv2.absdiff(first, second))
    motion = flow(first, second)
    at = np.indices(first.shape, np.float32)[::-1].transpose(1, 2, 0) + motion
    back = cv2.remap(second, at, None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    unexplained = _cells(back.astype(np.float32) - first)
    length = 100 * float(np.linalg.norm(motion, axis=-1).mean()) / max(size)
    return length, float(change.max()), unexplained


def _cells(picture: np.ndarray) -> Float[np.ndarray, " cells"]:
    """The means of a picture's cells."""
    cv2 = opencv()
    small = cv2.resize(picture.astype(np.float32), (CELLS, CELLS), interpolation=cv2.INTER_AREA)
    return small.astype(float).ravel()


def _fitted(picture: np.ndarray, side: int) -> tuple[int, int]:
    """(width, height) of a picture, shrunk until its longer side is at most `side`."""
    height, width = picture.shape[:2]
    scale = min(1.0, side / max(height, width))
    return max(1, round(width * scale)), max(1, round(height * scale))


# Block length


class Block(NamedTuple):
    """The frames between two block borders, and whether that was given, found in the video, or assumed."""

    frames: int
    source: Literal["given", "found", "assumed"]


ASSUMED = 16  # frames: a block of four latent frames in the Wan VAE
SHORTEST = 3  # frames of a block that can be found
BORDERS = 4  # that a block length has to show to be found
CERTAIN = 6.0  # standard errors by which pairs at borders have to exceed the others


def find_block(flow: Float[np.ndarray, " pairs"]) -> Block:
    """The period at which pairs move more than their neighbours, or `ASSUMED` where there is none.

    Each pair's flow is divided by the median of the five around it. Of all periods and offsets with four borders or
    more the one counts whose pairs exceed the rest by most standard errors, if these are six or more; by their median,
    so that a single cut is no rhythm.
    """
    best = (CERTAIN, 0)
    if len(flow) >= BORDERS * SHORTEST and flow.max() > 0:
        padded = np.pad(flow, 2, mode="edge")
        local = np.median(np.lib.stride_tricks.sliding_window_view(padded, 5), axis=1)
        excess = np.log((flow + flow.max() * 1e-3) / (local + flow.max() * 1e-3))
        for period in range(SHORTEST, len(flow) // BORDERS + 1):
            for offset in range(period):
                at = np.arange(len(flow)) % period == offset
                rest = excess[~at]
                error = math.sqrt(float(rest.var()) / at.sum()) + 1e-9
                best = max(best, (float(np.median(excess[at]) - rest.mean()) / error, period))
    return Block(best[1], "found") if best[1] else Block(ASSUMED, "assumed")


# Figures


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure: what it says, its unit, what is better, and how it comes from signals.

    `measure` takes the signals of a span, those of the span to compare it with, and the frames of a block. A figure of
    `drift` compares; the others leave the second argument alone. It is not a number where a span does not define it.
    """

    unit: str
    better: Literal["lower", "higher", "neither", "nearer to 0"]
    meaning: str
    measure: Callable[[Signals, Signals, int], float]
    drift: bool = False


def _moving(span: Signals) -> Float[np.ndarray, " moving"]:
    return span.flow[span.change > STILL]


def discontinuity(span: Signals, _: Signals, block: int) -> float:
    """Mean of the k largest flows over the mean flow; k: the block borders in the span. Frozen pairs do not count."""
    moving = np.sort(_moving(span))
    borders = max(1, len(span.flow) // block)
    return _over(float(moving[-borders:].mean()), float(moving.mean())) if len(moving) else math.nan


def flicker(span: Signals, _: Signals, block: int) -> float:
    """Half the change of the unexplained brightness from pair to pair: its median over pairs of the mean over cells."""
    turns = np.abs(np.diff(span.brightness, axis=0)).mean(axis=1) / 2
    return float(np.median(turns)) if len(turns) else math.nan


def colour_drift(span: Signals, start: Signals, _: int) -> float:
    """Distance of the colours: 2-Wasserstein between the normal distributions with their means and deviations."""
    return float(np.linalg.norm(span.colour.mean(axis=0) - start.colour.mean(axis=0)))


def sharpness_drift(span: Signals, start: Signals, _: int) -> float:
    """Change of the mean sharpness in percent."""
    return 100 * (_over(_mean(span.sharpness), _mean(start.sharpness)) - 1)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _over(value: float, base: float) -> float:
    return value / base if base > 0 else math.nan


FIGURES: Mapping[str, Figure] = {
    "flow": Figure(
        "% of the longer side per frame",
        "neither",
        "typical motion: median over pairs of frames of the mean length of the optical flow",
        lambda span, start, block: float(np.median(span.flow)) if len(span.flow) else math.nan,
    ),
    "discontinuity": Figure(
        "ratio",
        "lower",
        "jumps: mean of the k largest flows over the mean flow, k the number of block borders; without frozen pairs",
        discontinuity,
    ),
    "flicker": Figure(
        "grey levels",
        "lower",
        "brightness that comes and goes: half the change, from pair to pair, of what motion does not explain; median",
        flicker,
    ),
    "freeze": Figure(
        "share of pairs",
        "lower",
        f"pairs of frames in which no cell of {CELLS} x {CELLS} changes by more than {STILL} grey levels",
        lambda span, start, block: _mean(np.asarray(span.change <= STILL, float)),
    ),
    "colour_drift": Figure(
        "CIELAB units",
        "lower",
        "2-Wasserstein distance of colours (mean and deviation of L*, a*, b*)",
        colour_drift,
        drift=True,
    ),
    "sharpness": Figure(
        "ratio",
        "higher",
        "deviation of the Laplacian of a Gaussian over that of the luminance; mean over frames",
        lambda span, start, block: _mean(span.sharpness),
    ),
    "sharpness_drift": Figure(
        "%", "nearer to 0", "change of the mean sharpness", sharpness_drift, drift=True
    ),
}


def windows(frames: int, length: int) -> list[slice]:
    """Runs of `length` frames; a rest shorter than half of that joins the last one, a longer one stands alone."""
    count = max(1, math.floor(frames / length + 0.5))
    starts = [length * number for number in range(count)]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], frames])]


def ends(frames: int, length: int) -> tuple[slice, slice]:
    """The first and the last `length` frames; of a video under twice that, its halves."""
    length = max(1, min(length, frames // 2))
    return slice(0, length), slice(frames - length, frames)
