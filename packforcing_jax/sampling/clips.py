"""Long video of clips, each of which goes on from the end of the one before (CausVid's restart).

A clip is as long as the memory's window. The next one begins with its last `cache.overlap` latent frames, committed as
given blocks behind nothing at all. Where a codec's first latent is that of an image, the first of them is the image
latent of the pixel frame at that place, since the frames before it are no longer there. What overlaps is shown once,
as the later clip decodes it.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Int

from packforcing_jax.config import CacheConfig, Experiment
from packforcing_jax.memory import cache
from packforcing_jax.memory.cache import Memory
from packforcing_jax.networks import codec
from packforcing_jax.types import Latent, Video


@struct.dataclass
class Seam:
    """What the next clip needs of this one beside its latents."""

    given: Int[Array, ""]  # blocks that were given to clips, which are no blocks of the video
    frame: Video | tuple[()]  # [b, 1, height, width, 3]  the first pixel frame that overlaps


def start(exp: Experiment, batch: int) -> Seam:
    """The seam before the first block."""
    factor = exp.codec.space_factor
    size = (side * factor for side in exp.latent)
    frame = jnp.zeros((batch, 1, *size, 3)) if _opens_with_an_image(exp) else ()
    return Seam(given=jnp.int32(0), frame=frame)


def blocks(cfg: CacheConfig) -> int:
    """Blocks of a clip, those that are given to it among them."""
    return cfg.full_frames // cfg.block


def shown(exp: Experiment, block: int) -> int:
    """How many of the pixel frames of a block of a clip, by its number there, do not overlap with the next clip."""
    first, end = _frames(exp, block)
    return min(max(_kept(exp) - first, 0), end - first)


def keep_frame(exp: Experiment, seam: Seam, block: int, frames: Video) -> Seam:
    """The seam with the first frame that overlaps, if it is one of these `frames` of a block of a clip."""
    first, end = _frames(exp, block)
    if not (_opens_with_an_image(exp) and first <= _kept(exp) < end):
        return seam
    at = _kept(exp) - first
    return Seam(given=seam.given, frame=frames[:, at : at + 1])


@functools.partial(jax.jit, static_argnames="exp")
def beginning(
    exp: Experiment, vae: codec.Codec, memory: Memory, frame: Video | tuple[()]
) -> Latent:
    """The latents [b, overlap, y, x, c] that the next clip begins with."""
    count = exp.cache.overlap
    end = memory.num_blocks * exp.cache.block
    newest = cache.latents_of(exp.memory, memory, end - count + jnp.arange(count))
    if isinstance(frame, tuple):
        return newest
    image = codec.encode(vae, frame).astype(newest.dtype)
    return jnp.concatenate([image, newest[:, 1:]], axis=1)


def _opens_with_an_image(exp: Experiment) -> bool:
    return exp.cache.overlap > 0 and exp.codec.time_factor > 1


def _frames(exp: Experiment, block: int) -> tuple[int, int]:
    """Pixel frames of a block of a clip: the first one, and the one behind its last."""
    size = exp.cache.block
    first, end = (codec.frames_of(exp.codec, at * size) for at in (block, block + 1))
    return first, end


def _kept(exp: Experiment) -> int:
    """Pixel frames of a clip that do not overlap with the next one."""
    cfg = exp.cache
    return codec.frames_of(exp.codec, cfg.full_frames) - codec.frames_of(exp.codec, cfg.overlap)
