"""Rotary positions in time, rows and columns: adjacent channel pairs, time pairs first.

Keys are kept rotated in space only; their place in time is decided when a block looks back at them, so time and
space rotate separately. A rotation is a sum of angles: rotating by space and then by time equals rotating by both.
"""

from collections.abc import Sequence
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float


class Rotary(Protocol):
    """What rotary positions depend on: pairs of a head per axis, and the base of each axis's frequencies."""

    @property
    def pairs(self) -> tuple[int, int, int]: ...
    @property
    def rope_theta(self) -> tuple[float, float, float]: ...


def frequencies(pairs: int, theta: float) -> np.ndarray:
    """theta^(-j/pairs) for j < pairs: one frequency per rotary pair of one axis."""
    return (theta ** (-np.arange(pairs) / max(pairs, 1))).astype(np.float32)


def time_angles(frames: Float[Array, "*b k"], cfg: Rotary) -> Float[Array, "*b k pairs"]:
    """Angles of the time pairs at (possibly fractional) frame positions; zero for the spatial pairs."""
    time, rows, columns = cfg.pairs
    turned = jnp.einsum(
        "...k,p->...kp",
        frames,
        jnp.asarray(frequencies(time, cfg.rope_theta[0])),
        precision="highest",
    )
    return jnp.pad(turned, ((0, 0),) * frames.ndim + ((0, rows + columns),))


def space_angles(positions: Float[Array, "k 2"], cfg: Rotary) -> Float[Array, "k pairs"]:
    """Angles of the row and column pairs at (possibly fractional) grid places; zero for the time pairs."""
    time, rows, columns = cfg.pairs
    along_rows = positions[:, :1] * jnp.asarray(frequencies(rows, cfg.rope_theta[1]))[None]
    along_columns = positions[:, 1:] * jnp.asarray(frequencies(columns, cfg.rope_theta[2]))[None]
    return jnp.pad(jnp.concatenate([along_rows, along_columns], axis=-1), ((0, 0), (time, 0)))


def rotate(
    x: Float[Array, "b k n h"], angles: Float[Array, "*b k pairs"]
) -> Float[Array, "b k n h"]:
    """`x` with channel pairs (2j, 2j+1) of token i turned by angles[i, j]; float32 inside, the input's dtype out."""
    turn = jnp.expand_dims(angles, range(4 - angles.ndim - 1))[
        ..., None, :
    ]  # [1 or b, k, 1, pairs]
    cos = jnp.repeat(jnp.cos(turn), 2, axis=-1)
    sin = jnp.sin(turn)
    signed = jnp.stack([-sin, sin], axis=-1).reshape(cos.shape)
    exact = x.astype(jnp.float32)
    partner = jnp.flip(exact.reshape(*x.shape[:-1], x.shape[-1] // 2, 2), axis=-1).reshape(x.shape)
    return (exact * cos + partner * signed).astype(x.dtype)


def grid(
    rows: Sequence[float] | np.ndarray, columns: Sequence[float] | np.ndarray, frames: int
) -> np.ndarray:
    """Grid places [frames*rows*columns, 2] of a clip's tokens in their order: frame, then row, then column."""
    one = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
    return np.tile(one, (frames, 1)).astype(np.float32)
