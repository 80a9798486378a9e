"""How single tokens are scored by recent queries: which of these are kept, and how their products make one score.

The score of a token is fused from the products of its key with every recent query, summed over heads (Deep
Forcing).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import einops
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from packforcing_jax.policies.selection import QUERIES_AT_A_TIME
from packforcing_jax.types import Heads


def frame_sums(queries: Float[Array, "b t s n h"]) -> Float[Array, "b t r n h"]:
    """One sum a frame: all that a sum over queries needs of them."""
    return queries.sum(axis=2, keepdims=True)


def every_query(queries: Float[Array, "b t s n h"]) -> Float[Array, "b t s n h"]:
    """Every query of a frame."""
    return queries


def total(queries: Heads, keys: Heads) -> Float[Array, "b k"]:
    """The sum over queries, which is the product with their sum."""
    return _products(queries.sum(axis=1, keepdims=True), keys)[:, 0]


def largest(queries: Heads, keys: Heads) -> Float[Array, "b k"]:
    """The largest product with any query, some queries at a time."""
    together = math.gcd(queries.shape[1], QUERIES_AT_A_TIME)
    parts = einops.rearrange(queries, "b (part q) n h -> part b q n h", q=together)
    return jax.lax.map(lambda few: _products(few, keys).max(axis=1), parts).max(axis=0)


def _products(queries: Heads, keys: Heads) -> Float[Array, "b q k"]:
    return jnp.einsum(
        "bqnh,bknh->bqk",
        queries,
        keys.astype(queries.dtype),
        precision=jax.lax.Precision.HIGHEST,  # tokens differ by little of what they have in common
        preferred_element_type=jnp.float32,
    )


@dataclass(frozen=True)
class Fusion:
    """A rule by which recent queries score single tokens, and all that has to be known of it.

    `keeps(queries)`: what is remembered of each frame's queries [b, t, s, n, h]: [b, t, r, n, h], with any r.
    `score(kept, keys)`: the score [b, k] of keys [b, k, n, h], larger is better, by what is kept of the newest frames.
    `per_frame(tokens)`: r for frames of so many tokens. `reads(kept)`: products that each key takes part in.
    """

    name: str
    keeps: Callable[[Array], Array]
    score: Callable[[Heads, Heads], Array]
    per_frame: Callable[[int], int]
    reads: Callable[[int], int]


FUSIONS = {
    fusion.name: fusion
    for fusion in (
        Fusion("sum", frame_sums, total, per_frame=lambda tokens: 1, reads=lambda kept: 1),
        Fusion(
            "max", every_query, largest, per_frame=lambda tokens: tokens, reads=lambda kept: kept
        ),
    )
}
