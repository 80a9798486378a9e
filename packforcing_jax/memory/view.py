"""What a layer sees when it looks back: which packed blocks it chooses, and every key turned to its place in time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Float

from packforcing_jax.config import Experiment
from packforcing_jax.memory import cache
from packforcing_jax.memory.cache import Layer, Looked, Plan
from packforcing_jax.networks import rope
from packforcing_jax.policies import selection
from packforcing_jax.types import KV, Heads, Length


@struct.dataclass
class Asked:
    """What a block's queries ask of packed blocks, small enough to keep for every layer."""

    pooled: Array  # [b, q, n, h]  averages over windows, rotated at the windows' centres
    total: Array  # [b, n, h]     sum of all queries, rotated at their own places, frames counted from the block's first


@struct.dataclass
class Picked:
    """Packed blocks taken out of the archive, their keys as stored."""

    kv: KV  # [b, chosen, p, n, h]
    at: Array  # [b, chosen] place in time that the stored keys are turned to


def recall(
    exp: Experiment, seen: Plan, layer: Layer, q: Heads, lots: Array, scratch: KV | None = None
) -> tuple[KV, Looked]:
    """One layer's view and what it looked at, chosen by its own un-rotated queries `q`.

    The view holds [b, room, n, h], valid keys first, laid into `scratch` (whatever that held stays behind them).
    `lots` [b, slot] are the layer's random draws.
    """
    empty = jnp.zeros((q.shape[0], 0))
    scores = score(exp, seen, layer, ask(exp, seen, q), lots) if exp.cache.attended else empty
    looked = look(exp, seen, scores)
    return lay(exp, seen, layer, take(layer, looked), looked, scratch), looked


def scratch(exp: Experiment, batch: int, dtype=jnp.float32) -> list[KV]:
    """Room for the view of every layer; each buffer is its own, so that all can be donated."""
    shape = (batch, cache.room(exp), exp.dit.heads, exp.dit.head_dim)
    return [KV(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype)) for _ in range(exp.dit.layers)]


# Choosing


def ask(exp: Experiment, seen: Plan, q: Heads) -> Asked:
    """The current block's question, from its queries [b, block*s, n, h] without positions."""
    frames = np.repeat(np.arange(exp.cache.block), exp.tokens_per_frame).astype(np.float32)
    places = rope.grid(*(np.arange(size) for size in exp.grid), frames=exp.cache.block)
    own = rope.time_angles(jnp.asarray(frames), exp.dit) + rope.space_angles(
        jnp.asarray(places), exp.dit
    )
    pooled = selection.pool(q, exp.grid, exp.cache.score_pool)
    return Asked(
        pooled=rope.rotate(pooled, _pool_angles(exp, seen)),
        total=rope.rotate(q.astype(jnp.float32), own).sum(axis=1),
    )


def _pool_angles(exp: Experiment, seen: Plan) -> Array:
    """Rotary angles at the centres of the windows that queries are pooled over."""
    frames, rows, columns = (
        np.arange(size // step) * step + (step - 1) / 2
        for size, step in zip((exp.cache.block, *exp.grid), exp.cache.score_pool, strict=True)
    )
    times = np.repeat(frames, len(rows) * len(columns)).astype(np.float32)
    places = rope.grid(rows, columns, len(frames))
    return rope.time_angles(seen.current_at + jnp.asarray(times), exp.dit) + rope.space_angles(
        jnp.asarray(places), exp.dit
    )


def question(
    exp: Experiment, seen: Plan, layer: Layer, asked: Asked, lots: Array
) -> selection.Question:
    """What one layer's packed blocks are scored by.

    All lie at one common distance, the middle of the row they will form, so that age does not decide. The paper's
    sum alone sees them at their true frames, counted from the current block's first.
    """
    cfg, packed = exp.cache, layer.mid.k
    offsets = jnp.asarray(cache.packed_places(exp)[0])[None, None]
    lies = (
        layer.at[..., None] + offsets
        if cfg.rope_adjustment == "incremental"
        else jnp.zeros((1, 1, 1))
    )
    common = seen.mid_at + seen.chosen * seen.step / 2 + offsets * seen.step / cfg.block
    true = (seen.ids * cfg.block - seen.start)[None, :, None] + offsets
    sizes = [(cfg.sink, seen.sink), (cfg.recent, seen.recent)]
    return selection.Question(
        pooled=asked.pooled,
        archive=_turn(exp, packed, common - lies),
        ids=seen.ids,
        lots=lots,
        sharp=tuple(part.k for part in sharp(exp, seen, layer)),
        sharp_valid=tuple(
            jnp.arange(size * exp.tokens_per_frame) < count * exp.tokens_per_frame
            for size, count in sizes
        ),
        query_sum=asked.total,
        key_sum=_turn(exp, packed.astype(jnp.float32), true - lies).sum(axis=2),
    )


def score(
    exp: Experiment, seen: Plan, layer: Layer, asked: Asked, lots: Array
) -> Float[Array, "b slot"]:
    """How much one layer wants each packed block; what it says of invisible ones means nothing.

    One head at a time: the turned keys of all heads, and their logits, would be the largest arrays of a whole block's
    step at full size.
    """
    name = exp.cache.selection
    if name not in selection.ACROSS_HEADS:
        return selection.POLICIES[name](question(exp, seen, layer, asked, lots))

    def of(head: Array) -> Float[Array, "b slot"]:
        its_layer, its_asked = _head((layer, asked), head)
        return selection.POLICIES[name](question(exp, seen, its_layer, its_asked, lots))

    return selection.ACROSS_HEADS[name](jax.lax.map(of, jnp.arange(exp.dit.heads)), axis=0)


def _head(tree: Any, head: Array) -> Any:
    """Everything [..., n, h] in `tree` with one head alone; the places of keys stay as they are."""
    return jax.tree.map(
        lambda x: jax.lax.dynamic_slice_in_dim(x, head, 1, axis=-2) if x.ndim > 2 else x, tree
    )


def look(exp: Experiment, seen: Plan, scores: Float[Array, "b slot"]) -> Looked:
    """The best packed blocks in time order, and their places: in a row behind the sink, or at their true frames."""
    cfg = exp.cache
    slots, ids, best = selection.choose(scores, seen.ids, cfg.attended)
    in_row = seen.mid_at + jnp.arange(cfg.attended) * seen.step
    at = in_row[None] if cfg.rope_adjustment in ("sink", "incremental") else ids * cfg.block
    at = jnp.broadcast_to(at, ids.shape).astype(jnp.float32)
    return Looked(slots=slots, ids=ids, scores=best, at=at, sink_at=seen.sink_at)


def newest(exp: Experiment, seen: Plan, batch: int) -> Looked:
    """What a layer looks at before it has asked anything."""
    return look(
        exp, seen, jnp.broadcast_to(seen.ids.astype(jnp.float32)[None], (batch, exp.cache.slots))
    )


def take(layer: Layer, looked: Looked) -> Picked:
    """The packed blocks that were looked at."""
    slots = looked.slots[:, :, None, None, None]
    stored = (
        jnp.take_along_axis(layer.at, looked.slots, axis=1)
        if layer.at.shape[1]
        else jnp.zeros(looked.ids.shape)
    )
    return Picked(
        kv=KV(*(jnp.take_along_axis(x, slots, axis=1) for x in (layer.mid.k, layer.mid.v))),
        at=stored,
    )


# Laying out


def lay(
    exp: Experiment, seen: Plan, layer: Layer, picked: Picked, looked: Looked, scratch: KV | None
) -> KV:
    """One layer's view [b, room, n, h]: sink, picked and recent keys turned to their places.

    Parts are laid down at the running length, so that each covers the empty tail of the one before and the order
    needs no mask.
    """
    cfg = exp.cache
    sink, recent = sharp(exp, seen, layer)
    parts = [(sink, seen.sink * exp.tokens_per_frame)]
    if cfg.attended:
        parts.append(
            (_packed(exp, seen, picked, looked), seen.chosen * exp.tokens_per_packed_block)
        )
    parts.append((recent, seen.recent * exp.tokens_per_frame))
    if scratch is None:
        shape = (sink.k.shape[0], cache.room(exp), *sink.k.shape[2:])
        scratch = KV(k=jnp.zeros(shape, sink.k.dtype), v=jnp.zeros(shape, sink.v.dtype))
    view, at = scratch, jnp.int32(0)
    for part, count in parts:
        view, at = extend(view, part, at), at + count
    return view


def extend(view: KV, own: KV, at: Length) -> KV:
    """`view` with the keys and values `own` laid down from key `at` on."""
    return KV(
        *(
            jax.lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), at, axis=1)
            for x, new in ((view.k, own.k), (view.v, own.v))
        )
    )


def sharp(exp: Experiment, seen: Plan, layer: Layer) -> tuple[KV, KV]:
    """One layer's sink and visible recent tokens [b, k, n, h], each with its valid ones first, keys in their places."""
    cfg, moves = exp.cache, exp.cache.rope_adjustment == "incremental"
    first = (
        jnp.full(cfg.sink, seen.sink_at - layer.sink_at)
        if moves
        else seen.sink_at + jnp.arange(cfg.sink)
    )
    last = jnp.zeros(cfg.recent) if moves else seen.recent_at + jnp.arange(cfg.recent)
    newest = KV(*(cache.visible_recent(cfg, seen, x) for x in (layer.recent.k, layer.recent.v)))
    return _placed(exp, layer.sink, first), _placed(exp, newest, last)


def _placed(exp: Experiment, store: KV, frames: Float[Array, " frame"]) -> KV:
    """Tokens [b, frame*s, n, h] of whole frames, the keys turned by `frames`."""
    b, _, s, n, h = store.k.shape
    k, v = (x.reshape(b, -1, n, h) for x in (store.k, store.v))
    return KV(k=rope.rotate(k, rope.time_angles(jnp.repeat(frames, s), exp.dit)), v=v)


def _packed(exp: Experiment, seen: Plan, picked: Picked, looked: Looked) -> KV:
    """The picked packed blocks [b, chosen*p, n, h], keys turned from where they lie to their places."""
    cfg, (b, _, _, n, h) = exp.cache, picked.kv.k.shape
    scale = seen.step / cfg.block if cfg.rope_adjustment == "sink" else 1.0
    inside = jnp.asarray(cache.packed_places(exp)[0])[None, None] * scale
    inside = 0.0 if cfg.rope_adjustment == "incremental" else inside
    times = jnp.broadcast_to((looked.at - picked.at)[..., None] + inside, picked.kv.k.shape[:3])
    return KV(
        k=_turn(exp, picked.kv.k, times).reshape(b, -1, n, h), v=picked.kv.v.reshape(b, -1, n, h)
    )


def _turn(exp: Experiment, keys: Array, times: Float[Array, "#b #slot p"]) -> Array:
    """Keys [b, slot, p, n, h] of packed blocks turned in time by `times`."""
    b, slots, p, n, h = keys.shape
    times = jnp.broadcast_to(times, (times.shape[0], slots, p))
    angles = rope.time_angles(times.reshape(times.shape[0], slots * p), exp.dit)
    return rope.rotate(keys.reshape(b, slots * p, n, h), angles).reshape(keys.shape)
