"""A picture or a clip that a video begins with: read, checked against the model, and cut to whole blocks.

The weights of this family were trained to make video from text. What they are given to begin with is committed like
any finished block, and they go on from there as they would from blocks of their own.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import einops
import jax
import jax.numpy as jnp
import numpy as np

from packforcing_jax.config import Experiment
from packforcing_jax.errors import require, shown
from packforcing_jax.io import video
from packforcing_jax.networks import codec
from packforcing_jax.types import Latent

PICTURES = (".png", ".jpg", ".jpeg")
SUFFIXES = (*PICTURES, ".mp4")
RATE = 0.01  # by which share the rate of a clip may differ
UNTRAINED = (
    "the weights were trained to make video from text, not to go on from a given picture or clip"
)


@dataclass(frozen=True)
class Opening:
    """The frames [t, height, width, 3] in [-1, 1] of whole blocks, and in words how they came from what was given."""

    frames: np.ndarray
    blocks: int
    said: str

    @property
    def hash(self) -> str:
        """The SHA-256 of the frames."""
        return hashlib.sha256(np.ascontiguousarray(self.frames).tobytes()).hexdigest()


def frames_of_blocks(exp: Experiment, blocks: int) -> int:
    """Pixel frames of the first `blocks` blocks of a video."""
    return codec.frames_of(exp.codec, blocks * exp.cache.block)


def read(path: str | Path, exp: Experiment) -> Opening:
    """The opening in a file: a PNG or JPEG, or an MP4 of the model's size and rate.

    Raises `InputError` for another kind of file, size, rate or length. Pictures that `sample` enlarged are taken back
    to their size.
    """
    what = f"--start {path}"
    require(
        Path(path).suffix.lower() in SUFFIXES,
        f"{what} ends in {Path(path).suffix or 'nothing'}; give a file that ends in {', '.join(SUFFIXES)}.",
    )
    found = video.probe(path)
    require(
        found.frames > 0 and min(found.size) > 0,
        f"{what} holds no picture or clip that can be decoded; give a whole file.",
    )
    picture = Path(path).suffix.lower() in PICTURES
    require(
        found.frames == 1 or not picture,
        f"{what} holds {found.frames} pictures; give one, or a clip that ends in .mp4.",
    )
    _require_size(exp, found.size, what)
    require(
        picture or found.frames == 1 or abs(found.fps / exp.fps - 1) < RATE,
        f"{what} has {found.fps:g} frames a second and {exp.name} makes {exp.fps:g}; convert it: "
        f"ffmpeg -i {path} -r {exp.fps:g} OUT.mp4.",
    )
    _require_length(exp, found.frames, what)
    return of_frames(exp, video.read(path), what)


def of_frames(exp: Experiment, frames: np.ndarray, what: str = "start") -> Opening:
    """The opening in frames [t, height, width, 3], uint8 or floats in [-1, 1]; one frame [height, width, 3] alone too.

    A single frame stands still for a whole block. Of a clip the last frames that fill whole blocks are taken.
    """
    frames = np.asarray(frames)
    frames = frames[None] if frames.ndim == 3 else frames
    require(
        frames.ndim == 4 and frames.shape[-1] == 3 and len(frames) > 0,
        f"{what} has the shape {shown(frames.shape)}; give frames [t, height, width, 3].",
    )
    _require_size(exp, (frames.shape[2], frames.shape[1]), what)
    frames = _reduced(exp, _floating(frames, what))
    _require_length(exp, len(frames), what)
    if len(frames) == 1:
        count = frames_of_blocks(exp, 1)
        still = np.repeat(frames, count, axis=0)
        said = f"one picture, which stands still for the {count} frames of the first block"
        return Opening(still, 1, said if count > 1 else "one picture, the first frame")
    blocks = codec.latents_of(exp.codec, len(frames)) // exp.cache.block
    count = frames_of_blocks(exp, blocks)
    part = "" if count == len(frames) else f"the last {count} of "
    said = f"{part}{len(frames)} frames, the first {blocks} block{'s' * (blocks > 1)}"
    return Opening(frames[-count:], blocks, said)


def _floating(frames: np.ndarray, what: str) -> np.ndarray:
    if frames.dtype == np.uint8:
        return frames.astype(np.float32) / 127.5 - 1
    fits = np.issubdtype(frames.dtype, np.floating) and bool((np.abs(frames) <= 1).all())
    require(fits, f"{what} holds {frames.dtype} beyond [-1, 1]; give uint8, or floats in there.")
    return frames.astype(np.float32)


def _size(exp: Experiment) -> tuple[int, int]:
    """(width, height) in pixels."""
    factor = exp.codec.space_factor
    return exp.latent[1] * factor, exp.latent[0] * factor


def _require_size(exp: Experiment, size: tuple[int, int], what: str) -> None:
    """Raises `InputError` unless it is the model's, or a whole number of times that."""
    width, height = _size(exp)
    times = size[0] // width
    require(
        times >= 1 and size == (width * times, height * times),
        f"{what} has {size[0]}x{size[1]} pixels and {exp.name} makes {width}x{height}; scale and crop it: "
        f"ffmpeg -i IN -vf scale={width}:{height}:force_original_aspect_ratio=increase,crop={width}:{height} OUT.",
    )


def _reduced(exp: Experiment, frames: np.ndarray) -> np.ndarray:
    """Frames of the model's size: each square of an enlarged pixel averaged."""
    width, height = _size(exp)
    cells = einops.reduce(frames, "t (y i) (x j) c -> t y x c", "mean", y=height, x=width)
    return np.ascontiguousarray(cells, np.float32)


def _require_length(exp: Experiment, frames: int, what: str) -> None:
    """Raises `InputError` unless it is one picture, or fills a block and no more than a clip of the training."""
    least, most = frames_of_blocks(exp, 1), codec.frames_of(exp.codec, exp.clip)
    require(
        frames == 1 or frames >= least,
        f"{what} has {frames} frames, and a block has {least}; give one picture, or {least} frames or more.",
    )
    require(
        frames <= most,
        f"{what} has {frames} frames, and the model was trained on clips of {most}; give {most} at most.",
    )


def latents(exp: Experiment, vae: codec.Codec, opening: Opening) -> list[np.ndarray]:
    """The latent [1, t, y, x, c] of each block."""
    whole = _encode(vae, jnp.asarray(opening.frames[None]))
    return np.split(np.asarray(whole, np.float32), opening.blocks, axis=1)


@jax.jit
def _encode(vae: codec.Codec, frames: jax.Array) -> Latent:
    return codec.encode(vae, frames)
