"""Which packed blocks a block looks back at: every policy scores the archive, the best are attended in time order."""

from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Float, Int

from packforcing_jax.types import Heads


@struct.dataclass
class Question:
    """What a layer may score by: pooled rotated queries, and rotated keys with the mask of the valid ones."""

    q: Array  # [b, q, n, h]
    archive: Array  # [b, slot, p, n, h]
    ids: Array  # [slot] block id, -1 where empty or not yet visible
    sharp: Array  # [b, k, n, h]  sink and recent keys
    sharp_valid: Array  # [k]


def affinity(asked: Question) -> Float[Array, "b slot"]:
    """Sum over queries and heads of (attention mass a block gets)^4, softmax over archive, sink and recent.

    The paper's sum of raw products averages away the few queries that ask; a softmax with a high
    power keeps them: its limit is the largest mass any query of any head gives the block.
    """
    scale = asked.q.shape[-1] ** -0.5
    packed = jnp.einsum("bqnh,bmpnh->bnqmp", asked.q, asked.archive, preferred_element_type=jnp.float32) * scale
    sharp = jnp.einsum("bqnh,bknh->bnqk", asked.q, asked.sharp, preferred_element_type=jnp.float32) * scale
    lowest = jnp.finfo(jnp.float32).min
    packed = jnp.where((asked.ids >= 0)[None, None, None, :, None], packed, lowest)
    sharp = jnp.where(asked.sharp_valid[None, None, None], sharp, lowest)
    logits = jnp.concatenate([einops.rearrange(packed, "b n q m p -> b n q (m p)"), sharp], axis=-1)
    weights = jax.nn.softmax(logits, axis=-1)[..., : packed.shape[3] * packed.shape[4]]
    mass = einops.reduce(weights, "b n q (m p) -> b n q m", "sum", p=packed.shape[4])
    return einops.reduce(mass**4, "b n q m -> b m", "sum")


def recency(asked: Question) -> Float[Array, "b slot"]:
    """The block's age alone: newer is better (first in, first out)."""
    return jnp.broadcast_to(asked.ids.astype(jnp.float32)[None], (asked.q.shape[0], asked.ids.shape[0]))


POLICIES: dict[str, Callable[[Question], Array]] = {"affinity": affinity, "recency": recency, "all": recency}


def choose(scores: Float[Array, "b slot"], ids: Int[Array, " slot"], keep: int) -> tuple[Array, Array]:
    """The best `keep` blocks per video in time order: (slots, ids) each [b, keep], id -1 behind the last valid one."""
    ranked = jnp.where((ids >= 0)[None], scores, -jnp.inf)
    best = jax.lax.top_k(ranked, keep)[1]
    last = jnp.iinfo(jnp.int32).max
    when = jnp.where(ids[best] >= 0, ids[best], last)
    order = jnp.argsort(when, axis=-1)
    slots, when = (jnp.take_along_axis(x, order, axis=-1) for x in (best, when))
    return slots, jnp.where(when == last, -1, when)


def pool(q: Heads, grid: tuple[int, int], window: tuple[int, int, int]) -> Heads:
    """Queries averaged over windows of (frames, rows, columns); tokens that do not fill a window are left out."""
    rows, columns = grid
    by_place = einops.rearrange(q, "b (t y x) n h -> b t y x n h", y=rows, x=columns)
    t, y, x = (size // step * step for size, step in zip(by_place.shape[1:4], window, strict=True))
    return einops.reduce(by_place[:, :t, :y, :x], "b (t pt) (y py) (x px) n h -> b (t y x) n h", "mean",
                         pt=window[0], py=window[1], px=window[2])  # fmt: skip


