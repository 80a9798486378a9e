"""Pixels to latents and back through one interface, whatever the codec: whole videos, chunks, and packing's view."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from flax import nnx
from jax import Array

from packforcing_jax.config import SpaceToDepthConfig, VAEConfig
from packforcing_jax.errors import require
from packforcing_jax.networks import vae
from packforcing_jax.types import Latent, Video

Config: TypeAlias = VAEConfig | SpaceToDepthConfig


class SpaceToDepth(nnx.Module):
    """The exact codec: the pixels of a square cell are the channels of one latent place. It has no parameters."""

    def __init__(self, cfg: SpaceToDepthConfig, rngs: nnx.Rngs | None = None):
        self.cfg = cfg


Codec: TypeAlias = vae.WanVAE | SpaceToDepth


def _fold(codec: SpaceToDepth, video: Video) -> Latent:
    """Cells of pixels as channels, (row, column, colour) with colour fastest."""
    size = codec.cfg.factor
    return rearrange(
        video, "b t (y row) (x column) c -> b t y x (row column c)", row=size, column=size
    )


def _unfold_chunk(
    codec: SpaceToDepth, state: tuple[()], latents: Latent, *, first: bool
) -> tuple[Video, tuple[()]]:
    """Channels as cells of pixels; nothing is remembered and no frame is special."""
    size = codec.cfg.factor
    return rearrange(
        latents, "b t y x (row column c) -> b t (y row) (x column) c", row=size, column=size
    ), state


def _remember_nothing(codec: SpaceToDepth, batch: int, rows: int, columns: int) -> tuple[()]:
    return ()


@dataclass(frozen=True)
class Kind:
    """What a codec has to offer; the config of one's own carries it as its class attribute `kind`."""

    module: Callable[[Any, nnx.Rngs], Any]
    encode: Callable[..., Latent]
    init_decoder: Callable[..., Any]
    decode_chunk: Callable[..., tuple[Video, Any]]


KINDS = {
    VAEConfig: Kind(vae.WanVAE, vae.encode, vae.init_decoder, vae.decode_chunk),
    SpaceToDepthConfig: Kind(SpaceToDepth, _fold, _remember_nothing, _unfold_chunk),
}


def kind_of(cfg: Any) -> Kind:
    """What the codec that `cfg` describes offers: a row of `KINDS`, or what the config itself says."""
    return KINDS.get(type(cfg)) or cfg.kind


def make(cfg: Config, rngs: nnx.Rngs) -> Codec:
    """The codec that `cfg` describes, freshly initialised."""
    return kind_of(cfg).module(cfg, rngs)


@functools.cache
def shapes(cfg: Config) -> Codec:
    """The codec that `cfg` describes, with shapes in place of its parameters."""
    return jax.eval_shape(lambda: make(cfg, nnx.Rngs(0)))


def encode(codec: Codec, video: Video) -> Latent:
    """The latents of a whole video; rows and columns must be multiples of the space factor."""
    height, width, factor = *video.shape[2:4], codec.cfg.space_factor
    require(
        height % factor == 0 and width % factor == 0,
        f"a video of {height}x{width} pixels does not fill cells of {factor}x{factor}; crop it.",
    )
    return kind_of(codec.cfg).encode(codec, video)


def decode(codec: Codec, latent: Latent) -> Video:
    """The pixels of a whole video, in [-1, 1]."""
    batch, _, rows, columns, _ = latent.shape
    return decode_chunk(codec, init_decoder(codec, batch, rows, columns), latent, first=True)[0]


def init_decoder(codec: Codec, batch: int, rows: int, columns: int) -> Any:
    """The decoder's state before the first latent of a video; `rows` and `columns` count latent cells."""
    return kind_of(codec.cfg).init_decoder(codec, batch, rows, columns)


def decode_chunk(codec: Codec, state: Any, latents: Latent, *, first: bool) -> tuple[Video, Any]:
    """Pixels of the next latents, in [-1, 1], and the state after them; `first` (static) opens a video."""
    video, state = kind_of(codec.cfg).decode_chunk(codec, state, latents, first=first)
    return jnp.clip(video, -1.0, 1.0), state


def frames_of(cfg: Config, latents: int) -> int:
    """Pixel frames of a video of `latents` latent frames: one, then `time_factor` for each that follows."""
    return 1 + cfg.time_factor * (latents - 1) if latents else 0


def latents_of(cfg: Config, frames: int) -> int:
    """Latent frames of a video of `frames` pixel frames; those that do not fill a group are not counted."""
    return 1 + (frames - 1) // cfg.time_factor if frames else 0


def low_res_latents(
    codec: Codec, video: Video, *, latents: int, pool: tuple[int, int, int] = (2, 4, 4)
) -> Latent:
    """`latents` latents of a block's pixels averaged over `pool` (t, y, x), seen through the frozen codec.

    Missing frames are filled on the left with the first one. A codec that groups frames encodes one latent more,
    which is dropped: its single frame opens the clip, and the groups kept cover the block.
    """
    group = codec.cfg.time_factor
    needed = latents if group == 1 else 1 + group * latents
    small = pooled(video, pool)
    require(
        small.shape[1] <= needed,
        f"{video.shape[1]} frames pooled by {pool[0]} exceed the {needed} that {latents} latents hold; "
        "pack fewer frames or raise the pool.",
    )
    factor = codec.cfg.space_factor
    height, width = (size - size % factor for size in small.shape[2:4])
    require(
        height > 0 and width > 0,
        f"{video.shape[2]}x{video.shape[3]} pixels pooled by {pool[1]}x{pool[2]} do not fill one cell of "
        f"{factor}x{factor}; use a smaller pool.",
    )
    small = _fill_left(small[:, :, :height, :width], needed)
    return encode(jax.lax.stop_gradient(codec), small)[:, -latents:]


def pooled(video: Video, pool: tuple[int, int, int]) -> Video:
    """Averages over `pool` (t, y, x): rows and columns that do not fill a pool are cut off, every frame counts."""
    frames, height, width = video.shape[1:4]
    whole = _fill_left(video, frames + -frames % pool[0])[
        :, :, : height - height % pool[1], : width - width % pool[2]
    ]
    return reduce(
        whole, "b (t i) (y j) (x k) c -> b t y x c", "mean", i=pool[0], j=pool[1], k=pool[2]
    )


def _fill_left(video: Array, frames: int) -> Array:
    """`video` with its first frame repeated in front until there are `frames`."""
    missing = frames - video.shape[1]
    return jnp.concatenate([jnp.repeat(video[:, :1], missing, axis=1), video], axis=1)
