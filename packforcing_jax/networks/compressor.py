"""The packing of one block into about 32 times fewer tokens: what HR convolutions see plus what LR pixels keep.

Paper section 3.3. HR: strided 3-D convolutions over the clean latent, the last one zero-initialised so that an
untrained model starts from LR alone. LR: the block's pixels, pooled and encoded again by the frozen codec
(`codec.low_resolution`), embedded by the transformer's own patch embedding. The two are added.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from packforcing_jax.config import Experiment
from packforcing_jax.networks import dit
from packforcing_jax.types import Latent, Tokens


class Compressor(nnx.Module):
    """The HR branch: one convolution per row of the config, SiLU between, then a 1x1x1 to the model's width.

    It has no parameters where LR works alone.
    """

    def __init__(self, exp: Experiment, rngs: nnx.Rngs):
        cfg, channels = exp.compressor, (exp.dit.in_channels, *exp.compressor.channels)
        if cfg.branches == "lr":
            return
        self.convs = nnx.List(
            [
                _conv(inner, outer, stride, rngs)
                for inner, outer, stride in zip(channels, channels[1:], cfg.strides, strict=False)
            ]
        )
        self.out = nnx.Linear(
            channels[-1], exp.dit.dim, kernel_init=nnx.initializers.zeros, rngs=rngs
        )

    def __call__(self, latent: Latent) -> Tokens:
        x = latent.astype(self.out.kernel.dtype)
        for conv in self.convs:
            x = jax.nn.silu(conv(x))
        return self.out(x).reshape(x.shape[0], -1, self.out.out_features)


def _conv(inner: int, outer: int, stride: tuple[int, int, int], rngs: nnx.Rngs) -> nnx.Conv:
    """Kernel 4, padding 1 where space is halved (30x52 -> 15x26 -> 7x13), else kernel 3; in time only where strided."""
    kernel = (3 if stride[0] > 1 else 1, *(4 if step > 1 else 3 for step in stride[1:]))
    return nnx.Conv(
        inner,
        outer,
        kernel,
        strides=stride,
        padding=[(size > 1, size > 1) for size in kernel],
        rngs=rngs,
    )


def pack(
    compressor: Compressor, model: dit.WanDiT, exp: Experiment, latent: Latent, low: Latent
) -> Tokens:
    """Packed tokens [b, p, d] of one clean block `latent` and its low-resolution twin `low`."""
    slots, rows, columns = exp.packed_grid
    missing = exp.compressor.frames - latent.shape[1]
    padded = jnp.pad(latent, ((0, 0), (0, missing), (0, 0), (0, 0), (0, 0)), mode="edge")
    small = low[:, :slots, : rows * exp.dit.patch[1], : columns * exp.dit.patch[2]]
    branches = {"hr": lambda: compressor(padded), "lr": lambda: dit.embed_latent(model, small)}
    if exp.compressor.branches == "both":
        return branches["hr"]() + branches["lr"]()
    return branches[exp.compressor.branches]()
