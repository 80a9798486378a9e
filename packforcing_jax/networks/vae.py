"""The causal video autoencoder (Wan2.1 `vae.py`): pixels to latents and back, whole or chunk by chunk.

Latents are normalised, z = (mu - mean) / std. The first frame of a video is a latent of its own; after it every
`time_factor` frames share one. Decoded pixels are not clamped here.
"""

import itertools
from typing import TypeAlias

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from packforcing_jax.config import VAEConfig
from packforcing_jax.errors import require
from packforcing_jax.networks import vae_layers as layers
from packforcing_jax.types import Latent, Video

State: TypeAlias = tuple[layers.Past, ...]  # what every layer remembers of the frames before


class Encoder(nnx.Module):
    """Pixels to the features of the moments: stages of residual blocks, each but the last ending in a downsample."""

    def __init__(self, cfg: VAEConfig, rngs: nnx.Rngs):
        widths = [cfg.dim * mult for mult in (1, *cfg.dim_mult)]
        stages = zip(itertools.pairwise(widths), (*cfg.temporal_downsample, None), strict=True)
        self.stem = layers.Stem(3, widths[0], rngs)
        self.down = layers.Chain(
            layer
            for (narrow, wide), temporal in stages
            for layer in (
                *_blocks(narrow, wide, cfg.num_res_blocks, rngs),
                *(
                    []
                    if temporal is None
                    else [layers.Downsample(wide, temporal=temporal, rngs=rngs)]
                ),
            )
        )
        self.middle = _middle(widths[-1], rngs)
        self.head = layers.Head(widths[-1], 2 * cfg.z_dim, rngs)

    @property
    def parts(self) -> tuple[layers.Layer, ...]:
        return self.stem, self.down, self.middle, self.head


class Decoder(nnx.Module):
    """Latents to pixels: the encoder's stages backwards with one more block each; an upsample halves the width."""

    def __init__(self, cfg: VAEConfig, rngs: nnx.Rngs):
        widths = [cfg.dim * mult for mult in reversed(cfg.dim_mult)]
        entering = [widths[0], *(width // 2 for width in widths[:-1])]
        stages = zip(entering, widths, (*reversed(cfg.temporal_downsample), None), strict=True)
        self.stem = layers.Stem(cfg.z_dim, widths[0], rngs)
        self.middle = _middle(widths[0], rngs)
        self.up = layers.Chain(
            layer
            for incoming, width, temporal in stages
            for layer in (
                *_blocks(incoming, width, cfg.num_res_blocks + 1, rngs),
                *(
                    []
                    if temporal is None
                    else [layers.Upsample(width, temporal=temporal, rngs=rngs)]
                ),
            )
        )
        self.head = layers.Head(widths[-1], 3, rngs)

    @property
    def parts(self) -> tuple[layers.Layer, ...]:
        return self.stem, self.middle, self.up, self.head


def _blocks(incoming: int, width: int, count: int, rngs: nnx.Rngs) -> list[layers.ResidualBlock]:
    """`count` residual blocks, the first of which changes the width."""
    return [
        layers.ResidualBlock(incoming if number == 0 else width, width, rngs)
        for number in range(count)
    ]


def _middle(width: int, rngs: nnx.Rngs) -> layers.Chain:
    """Attention between two residual blocks."""
    first, last = _blocks(width, width, 2, rngs)
    return layers.Chain((first, layers.Attention(width, rngs), last))


class WanVAE(nnx.Module):
    """Both halves, with the pointwise convolutions between them and the latents."""

    def __init__(self, cfg: VAEConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        self.encoder = Encoder(cfg, rngs)
        self.quant = layers.pointwise(2 * cfg.z_dim, 2 * cfg.z_dim, rngs)
        self.post_quant = layers.pointwise(cfg.z_dim, cfg.z_dim, rngs)
        self.decoder = Decoder(cfg, rngs)

    @property
    def dtype(self) -> jnp.dtype:
        """What the layers compute in: cast the parameters to change it. Latents and pixels come out in float32."""
        return self.quant.kernel.dtype

    @property
    def scale(self) -> tuple[Float[Array, "1 1 1 1 c"], Float[Array, "1 1 1 1 c"]]:
        """Mean and standard deviation of the latent channels."""
        mean = jnp.asarray(self.cfg.mean, jnp.float32)
        std = jnp.asarray(self.cfg.std, jnp.float32)
        return layers.per_channel(mean, 5), layers.per_channel(std, 5)


def init_encoder(vae: WanVAE, batch: int, height: int, width: int) -> State:
    """The state before the first frame of `height` x `width` pixels."""
    return layers.start(vae.encoder.parts, (batch, height, width))[0]


def init_decoder(vae: WanVAE, batch: int, rows: int, columns: int) -> State:
    """The state before the first latent of `rows` x `columns` cells."""
    return layers.start(vae.decoder.parts, (batch, rows, columns))[0]


def encode_chunk(vae: WanVAE, state: State, frames: Video, *, first: bool) -> tuple[Latent, State]:
    """Latents of the next frames: k * time_factor of them, and one more if `first` of the video (static)."""
    (mu, _), state = _moments_chunk(vae, state, frames, first=first)
    mean, std = vae.scale
    return (mu - mean) / std, state


def decode_chunk(vae: WanVAE, state: State, latents: Latent, *, first: bool) -> tuple[Video, State]:
    """Pixels of the next latents: `time_factor` frames each, but one for the `first` of the video (static)."""
    mean, std = vae.scale
    x = vae.post_quant((latents.astype(jnp.float32) * std + mean).astype(vae.dtype))
    video, state = layers.run(vae.decoder.parts, x, state, first=first)
    return video.astype(jnp.float32), state


def encode(vae: WanVAE, video: Video) -> Latent:
    """The latents of a whole video; frames that do not fill a group of `time_factor` are ignored."""
    state, frames = _opened(vae, video)
    return encode_chunk(vae, state, frames, first=True)[0]


def encode_moments(vae: WanVAE, video: Video) -> tuple[Latent, Latent]:
    """Mean and log-variance of a whole video's latents, not normalised."""
    state, frames = _opened(vae, video)
    return _moments_chunk(vae, state, frames, first=True)[0]


def decode(vae: WanVAE, latent: Latent) -> Video:
    """The pixels of a whole video."""
    batch, _, rows, columns, _ = latent.shape
    return decode_chunk(vae, init_decoder(vae, batch, rows, columns), latent, first=True)[0]


def _opened(vae: WanVAE, video: Video) -> tuple[State, Video]:
    """A fresh state for a whole video, and its frames that make whole latents."""
    batch, count, height, width, _ = video.shape
    return init_encoder(vae, batch, height, width), video[
        :, : count - (count - 1) % vae.cfg.time_factor
    ]


def _moments_chunk(
    vae: WanVAE, state: State, frames: Video, *, first: bool
) -> tuple[tuple[Latent, Latent], State]:
    """Mean and log-variance of the next frames, not normalised, in float32."""
    count = frames.shape[1]
    group = vae.cfg.time_factor
    require(
        count > 0 and count % group == first % group,
        f"{count} frames do not make whole latents; give {'1 + ' * first}a multiple of {group}.",
    )
    features, state = layers.run(vae.encoder.parts, frames.astype(vae.dtype), state, first=first)
    mu, logvar = jnp.split(vae.quant(features).astype(jnp.float32), 2, axis=-1)
    return (mu, logvar), state
