"""Scores by which a block chooses the packed blocks it attends to: the best are attended in time order."""

import dataclasses
import functools
from collections.abc import Callable

import einops
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Float, Int

from packforcing_jax.types import Heads

QUERIES_AT_A_TIME = 256


@struct.dataclass
class ScoreInputs:
    """What one layer may score its packed blocks by; queries and keys are rotated."""

    queries: Array  # [b, q, n, h] queries averaged over windows, at the windows' centres
    packed: Array  # [b, slot, p, n, h] packed keys, every block at one common distance
    full_res: tuple[Array, ...]  # sink and recent keys in their places, each [b, k, n, h]
    full_res_valid: tuple[Array, ...]  # each [k]
    ids: Array  # [slot] block id, -1 where empty or not yet visible
    query_sum: Array  # [b, n, h] over all queries or a `subset`, at their true frames
    key_sum: Array  # [b, slot, n, h] over each block's packed keys, at their true frames
    random: Array  # [b, slot] uniform draws of this layer
    asked: Array = struct.field(default_factory=lambda: jnp.int32(1))  # [] queries in `query_sum`


def logits(inputs: ScoreInputs) -> Float[Array, "b n q slot p"]:
    """How much each pooled query of each head agrees with each packed key."""
    flat = _agreement(inputs.queries, einops.rearrange(inputs.packed, "b m p n h -> b (m p) n h"))
    return einops.rearrange(flat, "b n q (m p) -> b n q m p", p=inputs.packed.shape[2])


def _agreement(queries: Heads, keys: Heads) -> Float[Array, "b n q k"]:
    products = jnp.einsum("bqnh,bknh->bnqk", queries, keys, preferred_element_type=jnp.float32)
    return products * queries.shape[-1] ** -0.5


def mass(inputs: ScoreInputs) -> Float[Array, "b n q slot"]:
    """Attention that each pooled query of each head pays each block: softmax over archive, sink and recent.

    Some queries at a time: without windows, the logits of all would be the largest array of a whole block's step.
    """
    count = inputs.queries.shape[1]
    together = max(size for size in range(1, QUERIES_AT_A_TIME + 1) if count % size == 0)
    parts = einops.rearrange(inputs.queries, "b (part q) n h -> part b q n h", q=together)
    masses = jax.lax.map(lambda few: _masses(dataclasses.replace(inputs, queries=few)), parts)
    return einops.rearrange(masses, "part b n q m -> b n (part q) m")


def _masses(inputs: ScoreInputs) -> Float[Array, "b n q slot"]:
    lowest = jnp.finfo(jnp.float32).min
    packed = jnp.where((inputs.ids >= 0)[None, None, None, :, None], logits(inputs), lowest)
    others = [
        jnp.where(valid[None, None, None], _agreement(inputs.queries, keys), lowest)
        for keys, valid in zip(inputs.full_res, inputs.full_res_valid, strict=True)
    ]
    highest = packed.max((-2, -1), initial=lowest)
    for full_res in others:
        highest = jnp.maximum(highest, full_res.max(-1, initial=lowest))
    highest = jax.lax.stop_gradient(highest)[..., None]
    mine = jnp.exp(packed - highest[..., None]).sum(-1)
    theirs = [jnp.exp(full_res - highest).sum(-1, keepdims=True) for full_res in others]
    return mine / sum(theirs, mine.sum(-1, keepdims=True))


def affinity(inputs: ScoreInputs, power: int = 4) -> Float[Array, "b slot"]:
    """Sum over queries and heads of (attention mass a block gets)^power.

    The paper's sum of raw products averages away the few queries that ask; a softmax with a high
    power keeps them: its limit is the largest mass any query of any head gives the block.
    """
    return einops.reduce(mass(inputs) ** power, "b n q m -> b m", "sum")


def mass_max(inputs: ScoreInputs) -> Float[Array, "b slot"]:
    """The largest attention mass that any query of any head gives the block."""
    return einops.reduce(mass(inputs), "b n q m -> b m", "max")


def logit_max(inputs: ScoreInputs, centred: bool = False) -> Float[Array, "b slot"]:
    """The best logit of any query of any head, averaged over the block's keys.

    `centred` takes each query's mean over the visible blocks away first, so that no query favours every block.
    """
    agreed = einops.reduce(logits(inputs), "b n q m p -> b n q m", "mean")
    if centred:
        visible = (inputs.ids >= 0)[None, None, None]
        total = jnp.where(visible, agreed, 0).sum(axis=-1, keepdims=True)
        agreed = agreed - total / jnp.maximum(visible.sum(), 1)
    return einops.reduce(agreed, "b n q m -> b m", "max")


def log_sum_exp(inputs: ScoreInputs) -> Float[Array, "b slot"]:
    """Sum over queries and heads of the log of the block's summed exponentials."""
    return einops.reduce(jax.nn.logsumexp(logits(inputs), axis=-1), "b n q m -> b m", "sum")


def paper_sum(inputs: ScoreInputs) -> Float[Array, "b slot"]:
    """All raw products of queries and keys, summed over heads: without a softmax, the product of the sums.

    The paper's score (sec. 3.5, Appendix G, eq. 11), as far as `query_sum` and the heads are those that it takes:
    s_m = sum_j sum_{i in S_q} 1/(B N_opt) sum_b sum_{head <= N_opt} Q_{b,head,i} . K_{m,b,head,j} / sqrt(D).
    Each video has a sum of its own (B = 1), and 1/N_opt, one number for all blocks, is left out.
    """
    exact = jax.lax.Precision.HIGHEST  # blocks differ by little of what they have in common
    products = jnp.einsum(
        "bnh,bmnh->bm",
        inputs.query_sum,
        inputs.key_sum,
        precision=exact,
        preferred_element_type=jnp.float32,
    )
    return products * inputs.query_sum.shape[-1] ** -0.5


def query_score(inputs: ScoreInputs) -> Float[Array, "b slot"]:
    """The mean of all products of queries and keys (PackForcing-Unofficial 3f4302e): the paper's sum over their count.

    A block's score is the same as by the sum, since all blocks have as many keys; it stays of one size.
    """
    keys, heads = inputs.packed.shape[2:4]
    return paper_sum(inputs) / (inputs.asked * keys * heads)


def recency(inputs: ScoreInputs) -> Float[Array, "b slot"]:
    """The block's age alone: newer is better (first in, first out)."""
    return jnp.broadcast_to(
        inputs.ids.astype(jnp.float32)[None], (inputs.queries.shape[0], inputs.ids.shape[0])
    )


def random(inputs: ScoreInputs) -> Float[Array, "b slot"]:
    """The uniform draws alone."""
    return inputs.random.astype(jnp.float32)


# How many products of a query with a key a score makes in one layer and video, for `plan` and for what fits.
# Each takes (pooled queries, packed keys, keys at full size, packed blocks).


def all_keys(queries: float, packed: float, full_res: float, blocks: float) -> float:
    """Every pooled query with every key, packed or at full size."""
    return queries * (packed + full_res)


def packed_keys(queries: float, packed: float, full_res: float, blocks: float) -> float:
    """Every pooled query with every packed key."""
    return queries * packed


def block_sums(queries: float, packed: float, full_res: float, blocks: float) -> float:
    """One sum of queries with one sum of keys a block."""
    return blocks


def no_keys(queries: float, packed: float, full_res: float, blocks: float) -> float:
    """None: what was asked does not matter."""
    return 0


@dataclasses.dataclass(frozen=True)
class Score:
    """A rule by which packed blocks are chosen, and all that has to be known of it.

    `fn`: the score [b, slot] from `ScoreInputs`; what it says of blocks that are not visible means nothing.
    `across_heads`: how the scores of single heads, stacked along axis 0, make one (`jnp.sum`, `jnp.max`); `fn` is then
    given one head at a time, since the logits of all would be the largest array of a block. None: `fn` reads no head.
    `reads`: the products that `fn` makes, one of the functions above or one's own. `attends_all`: nothing is left out.
    `subset`: of heads and queries it takes what `cache.score_heads`, `query_stride` and `recent_queries` say, as the
    paper does; otherwise all heads, and `query_sum` is over all queries of the current block and no others.
    """

    name: str
    fn: Callable[[ScoreInputs], Array]
    across_heads: Callable[..., Array] | None = None
    reads: Callable[[float, float, float, float], float] = no_keys
    attends_all: bool = False
    subset: bool = False


SCORES = {
    score.name: score
    for score in (
        Score("affinity", affinity, jnp.sum, all_keys),
        Score("mass_sum", functools.partial(affinity, power=1), jnp.sum, all_keys),
        Score("mass_max", mass_max, jnp.max, all_keys),
        Score("logit_max", logit_max, jnp.max, packed_keys),
        Score(
            "centred_logit_max", functools.partial(logit_max, centred=True), jnp.max, packed_keys
        ),
        Score("log_sum_exp", log_sum_exp, jnp.sum, packed_keys),
        Score("paper_sum", paper_sum, jnp.sum, block_sums),
        Score("paper", paper_sum, jnp.sum, block_sums, subset=True),
        Score("query_score", query_score, jnp.mean, block_sums, subset=True),
        Score("recency", recency),
        Score("random", random),
        Score("all", recency, attends_all=True),
    )
}


def choose(
    scores: Float[Array, "b slot"], ids: Int[Array, " slot"], keep: int
) -> tuple[Array, Array, Array]:
    """The best `keep` blocks per video in time order: (slots, ids, scores), each [b, keep].

    Behind the last visible one ids are -1 and scores -inf.
    """
    ranked = jnp.where((ids >= 0)[None], scores, -jnp.inf)
    height, best = jax.lax.top_k(ranked, keep)
    last = jnp.iinfo(ids.dtype).max
    when = jnp.where(ids[best] >= 0, ids[best], last)
    order = jnp.argsort(when, axis=-1)
    slots, when, height = (jnp.take_along_axis(x, order, axis=-1) for x in (best, when, height))
    return slots, jnp.where(when == last, -1, when), height


def pool(q: Heads, grid: tuple[int, int], window: tuple[int, int, int]) -> Heads:
    """Queries averaged over windows of (frames, rows, columns); tokens that do not fill a window are left out."""
    rows, columns = grid
    by_position = einops.rearrange(q, "b (t y x) n h -> b t y x n h", y=rows, x=columns)
    t, y, x = (
        size // step * step for size, step in zip(by_position.shape[1:4], window, strict=True)
    )
    return einops.reduce(
        by_position[:, :t, :y, :x],
        "b (t pt) (y py) (x px) n h -> b (t y x) n h",
        "mean",
        pt=window[0],
        py=window[1],
        px=window[2],
    )
