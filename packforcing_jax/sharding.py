"""Where arrays lie on the mesh of devices, said inside the networks by the names of its axes."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import jax
from jax import Array
from jax.sharding import PartitionSpec

Axis: TypeAlias = str | tuple[str, ...] | None

AXES = (
    "data",
    "fsdp",
    "tensor",
    "context",
)  # copies of the model, its shards, its heads, the tokens of a video
BATCH = ("data", "fsdp")  # what the videos of a batch are divided over
HEADS = ("tensor", "context")  # and, in attention, the heads: each device reads whole videos


def constrain(x: Array, *axes: Axis) -> Array:
    """`x` divided over the mesh in force (`jax.set_mesh`), axis by axis; `x` itself where none is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, fitting(axes, x.shape, mesh.shape))


def by_batch(x: Array) -> Array:
    """`x` [b, ...] divided over its batch alone."""
    return constrain(x, BATCH, *(None,) * (x.ndim - 1))


def by_tokens(x: Array) -> Array:
    """Tokens [b, q, d] divided over batch and tokens, as the residual stream is."""
    return constrain(x, BATCH, "context", None)


def by_heads(*arrays: Array) -> tuple[Array, ...]:
    """Queries, keys and values [b, k, n, h] divided over batch and heads, all alike, as fused attention wants them."""
    return tuple(constrain(x, BATCH, None, HEADS, None) for x in arrays)


def fitting(axes: Sequence[Axis], shape: Sequence[int], sizes: Mapping[str, int]) -> PartitionSpec:
    """`axes` as a partition of `shape`, without those whose `sizes` do not divide their dimension."""
    return PartitionSpec(
        *(axis if size % divisor(axis, sizes) == 0 else None for axis, size in zip(axes, shape))
    )


def divisor(axis: Axis, sizes: Mapping[str, int]) -> int:
    """Into how many parts a dimension falls."""
    names = (axis,) if isinstance(axis, str) else axis or ()
    return math.prod(sizes[name] for name in names)
