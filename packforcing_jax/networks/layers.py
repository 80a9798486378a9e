"""The small parts networks share: norms, modulation and the time embedding."""

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float


class RMSNorm(nnx.Module):
    """x / rms(x) in float32, cast back to the input's dtype, then scaled (Wan2.1 `WanRMSNorm`, UMT5 `T5LayerNorm`)."""

    def __init__(self, dim: int, eps: float):
        self.scale = nnx.Param(jnp.ones(dim))
        self.eps = eps

    def __call__(self, x: Float[Array, "*axes d"]) -> Float[Array, "*axes d"]:
        exact = x.astype(jnp.float32)
        normed = exact * jax.lax.rsqrt(jnp.mean(exact**2, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * _like(self.scale[...], x)


class LayerNorm(nnx.Module):
    """LayerNorm with weight and bias, statistics in float32 (Wan2.1 `norm3`, before cross-attention)."""

    def __init__(self, dim: int, eps: float):
        self.scale = nnx.Param(jnp.ones(dim))
        self.bias = nnx.Param(jnp.zeros(dim))
        self.eps = eps

    def __call__(self, x: Float[Array, "*axes d"]) -> Float[Array, "*axes d"]:
        return standardize(x, self.eps) * _like(self.scale[...], x) + _like(self.bias[...], x)


def _like(vector: Array, x: Array) -> Array:
    """`vector` in the dtype of `x` with leading axes of size one, so that nothing broadcasts by accident."""
    return vector.astype(x.dtype).reshape((1,) * (x.ndim - 1) + vector.shape)


def standardize(x: Float[Array, "*axes d"], eps: float) -> Float[Array, "*axes d"]:
    """`x` with mean 0 and variance 1 over its last axis, statistics in float32."""
    exact = x.astype(jnp.float32)
    centred = exact - exact.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + eps)
    return jax.lax.optimization_barrier(normed.astype(x.dtype))


def per_frame(x: Float[Array, "b q d"], rows: Float[Array, "b t d"]) -> Float[Array, "b q d"]:
    """`rows` repeated over the tokens of their frames, so that row f meets tokens f*s .. (f+1)*s-1 of `x`."""
    return einops.repeat(rows, "b t d -> b (t s) d", s=x.shape[1] // rows.shape[1]).astype(x.dtype)


def modulate(x: Array, shift: Float[Array, "b t d"], scale: Float[Array, "b t d"]) -> Array:
    """`x * (1 + scale) + shift` with one shift and scale per frame.

    The barrier keeps XLA from repeating the chain of norm and modulation inside every weight gradient that reads it.
    """
    return jax.lax.optimization_barrier(x * (1 + per_frame(x, scale)) + per_frame(x, shift))


def sinusoid(timestep: Float[Array, "b t"], dim: int) -> Float[Array, "b t dim"]:
    """[cos, sin] of timestep * 10000^(-i/(dim/2)), exact to float32 for timesteps in 0..1000.

    The original works in float64. Here the whole part of the timestep turns a fixed-point angle, whose overflow is
    the reduction to one turn; the fraction and what the fixed point rounded off are multiplied in float32.
    """
    turns = 10000.0 ** (-np.arange(dim // 2) / (dim // 2)) / (2 * np.pi)
    fixed = np.round(turns * 2.0**32)
    units, rounded, exact = (
        jnp.asarray(x).reshape(1, 1, -1)
        for x in (
            fixed.astype(np.uint32),
            (turns - fixed / 2.0**32).astype(np.float32),
            turns.astype(np.float32),
        )
    )
    whole = jnp.floor(timestep)[..., None]
    wrapped = (whole.astype(jnp.uint32) * units).astype(jnp.int32).astype(jnp.float32) * 2.0**-32
    angle = 2 * np.pi * (wrapped + (timestep[..., None] - whole) * exact + whole * rounded)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
