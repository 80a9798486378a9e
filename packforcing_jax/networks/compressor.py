"""The packing of one block into about 32 times fewer tokens: what HR convolutions see plus what LR pixels keep.

Paper section 3.3. HR: strided 3-D convolutions over the clean latent, the last one zero-initialised so that an
untrained model starts from LR alone. LR: the block's pixels, pooled and encoded again by the frozen codec
(`codec.low_resolution`), embedded by the transformer's own patch embedding. The two are added.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from packforcing_jax.config import CompressorConfig, StepConfig
from packforcing_jax.networks.base_model import BaseModel
from packforcing_jax.types import KV, Latent, Tokens


class Compressor(nnx.Module):
    """The HR branch: one convolution per row of the config, SiLU between, then a 1x1x1 to the model's width.

    It has no parameters where LR works alone, or blocks keep averages of their own keys.
    """

    def __init__(self, step: StepConfig, rngs: nnx.Rngs):
        cfg = step.compressor
        channels = (step.dit.in_channels, *step.compressor.channels)
        if cfg.branches not in ("both", "hr"):
            return
        self.convs = nnx.List(
            [
                _conv(inner, outer, stride, cfg.kernel(stride), rngs)
                for inner, outer, stride in zip(channels, channels[1:], cfg.strides, strict=False)
            ]
        )
        self.out = nnx.Linear(
            channels[-1], step.dit.dim, kernel_init=nnx.initializers.zeros, rngs=rngs
        )

    def __call__(self, latent: Latent, grid: tuple[int, int] | None = None) -> Tokens:
        """Tokens of `latent`, averaged to a `grid` of (rows, columns) if one is given."""
        x = latent.astype(self.out.kernel.dtype)
        for conv in self.convs:
            x = jax.nn.silu(conv(x))
        x = self.out(x)
        if grid is not None:
            x = adaptive_average(adaptive_average(x, 2, grid[0]), 3, grid[1])
        return x.reshape(x.shape[0], -1, self.out.out_features)

    def pack(self, model: BaseModel, step: StepConfig, latent: Latent, low_res: Latent) -> Tokens:
        """Packed tokens [b, p, d] of one clean block `latent` and its low-resolution twin `low`."""
        slots, rows, columns = step.packed_grid
        missing = step.compressor.frames - latent.shape[1]
        padded = jnp.pad(latent, ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0)), mode="edge")
        small = low_res[:, :slots, : rows * step.dit.patch[1], : columns * step.dit.patch[2]]
        if step.compressor.branches == "lr":
            return model.embed(small)
        convolved = self(padded, (rows, columns) if step.compressor.adaptive_pool else None)
        return convolved + model.embed(small) if step.compressor.branches == "both" else convolved


def averaged(step: StepConfig, own: KV) -> KV:
    """The averages [b, p, n, h] of a block's own keys and values [b, q, n, h] that `branches="own"` keeps.

    Keys come and go rotated at their own positions, frames counted from the block's first.
    """
    return jax.tree.map(lambda x: adaptive_average(x, 1, step.tokens_per_packed_block), own)


def adaptive_average(x: Array, axis: int, size: int) -> Array:
    """`x` averaged along `axis`, of n entries, to `size`: each over i n / size to (i+1) n / size, rounded outwards."""
    count = x.shape[axis]
    if count == size:
        return x
    first, end = np.arange(size) * count // size, -(-np.arange(1, size + 1) * count // size)
    within = (np.arange(count) >= first[:, None]) & (np.arange(count) < end[:, None])
    shares = jnp.asarray(within / within.sum(axis=1, keepdims=True), x.dtype)
    return jnp.moveaxis(jnp.tensordot(shares, x, axes=(1, axis)), 0, axis)


def _conv(
    inner: int,
    outer: int,
    stride: tuple[int, int, int],
    kernel: tuple[int, int, int],
    rngs: nnx.Rngs,
) -> nnx.Conv:
    return nnx.Conv(
        inner,
        outer,
        kernel,
        strides=stride,
        padding=[(size > 1, size > 1) for size in kernel],
        rngs=rngs,
    )


COMPRESSORS = {CompressorConfig: Compressor}


def build(step: StepConfig, rngs: nnx.Rngs) -> Any:
    """The compressor that `step.compressor` describes: a class of `COMPRESSORS`, or what the value itself builds.

    A value of one's own has the fields of `CompressorConfig` that say what a packed block looks like (`frames`,
    `pool`, `branches`, `places`, `keys`, `stride`) and `build(step, rngs)`; what that returns has `pack`, as above.
    """
    cfg: Any = step.compressor
    make = COMPRESSORS.get(type(cfg))
    return cfg.build(step, rngs) if make is None else make(step, rngs)
