"""What a layer sees when it looks back: which packed blocks it chooses, and their keys turned to their positions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int

from packforcing_jax.config import MemorySpec
from packforcing_jax.memory import cache
from packforcing_jax.memory import layout as layouts
from packforcing_jax.memory.cache import LayerCache, Selection
from packforcing_jax.memory.layout import Layout
from packforcing_jax.networks import rope
from packforcing_jax.policies import selection as policy
from packforcing_jax.policies.eviction import FIFO
from packforcing_jax.types import KV, Heads


@struct.dataclass
class PooledQueries:
    """What a block's queries ask of packed blocks, small enough to keep for every layer."""

    pooled: Array  # [b, q, n, h]  averages over windows, rotated at the windows' centres
    total: Array  # [b, n, h]     the sum of `sum_queries`


@struct.dataclass
class Gathered:
    """Packed blocks taken out of the archive, their keys as stored."""

    kv: KV  # [b, selected, p, n, h]
    positions: Array  # [b, selected] that the stored keys are turned to


def recall(
    spec: MemorySpec, layout: Layout, layer: LayerCache, q: Heads, random: Array
) -> tuple[KV, Selection]:
    """One layer's view with the packed blocks that its un-rotated queries `q` choose, and that choice.

    `random` [b, slot] are the layer's uniform draws.
    """
    scores = jnp.zeros((q.shape[0], 0))
    if spec.cache.attended:
        scores = score(spec, layout, layer, pool_queries(spec, layout, q), random)
    return recall_best(spec, layout, layer, scores)


def recall_best(
    spec: MemorySpec, layout: Layout, layer: LayerCache, scores: Float[Array, "b slot"]
) -> tuple[KV, Selection]:
    """One layer's view with the packed blocks of the best scores, and that choice."""
    selection = select(spec, layout, scores)
    return lay(spec, layout, layer, gather(layer, selection), selection), selection


# Choosing


def pool_queries(spec: MemorySpec, layout: Layout, q: Heads) -> PooledQueries:
    """What the current block asks, from its queries [b, block*s, n, h] without positions."""
    pooled = policy.pool(q, spec.grid, spec.cache.score_pool)
    return PooledQueries(
        pooled=rope.rotate(pooled, _pool_angles(spec, layout)), total=sum_queries(spec, q)
    )


def sum_queries(spec: MemorySpec, q: Heads) -> Float[Array, "b n h"]:
    """The sum of the queries of a block's `asking_tokens`, from [b, block*s, n, h] without positions.

    Each is rotated at its own position, frames counted from the block's first.
    """
    block, asking = spec.cache.block, spec.asking_tokens
    frames = np.repeat(np.arange(block), spec.tokens_per_frame).astype(np.float32)[asking]
    grid = rope.grid(*(np.arange(size) for size in spec.grid), frames=block)[asking]
    own = rope.time_angles(jnp.asarray(frames), spec) + rope.space_angles(jnp.asarray(grid), spec)
    return rope.rotate(q[:, asking].astype(jnp.float32), own).sum(axis=1)


def _recent_queries(spec: MemorySpec, layout: Layout, layer: LayerCache) -> Float[Array, "b n h"]:
    """The sum of what recent blocks keep of their queries, frames counted from the current block's first."""
    first = _first_frames(spec, layout)
    angles = rope.time_angles((first - layout.start).astype(jnp.float32), spec)
    visible = _asking_blocks(spec, layout)[None, :, None, None]
    kept = layer.queries[:, : spec.cache.asking_blocks]
    return jnp.where(visible, rope.rotate(kept, angles), 0).sum(axis=1)


def _first_frames(spec: MemorySpec, layout: Layout) -> Int[Array, " block"]:
    """The first frame of each block whose queries are kept, negative where there is none yet."""
    return FIFO.ids_in(layout.num_blocks, spec.cache.asking_blocks) * spec.cache.block


def _asking_blocks(spec: MemorySpec, layout: Layout) -> Bool[Array, " block"]:
    """Which of these are recent ones."""
    return _first_frames(spec, layout) >= layout.start - layout.recent


def _pool_angles(spec: MemorySpec, layout: Layout) -> Array:
    """Rotary angles at the centres of the windows that queries are pooled over."""
    sizes = zip((spec.cache.block, *spec.grid), spec.cache.score_pool, strict=True)
    frames, rows, columns = (
        np.arange(size // step) * step + (step - 1) / 2 for size, step in sizes
    )
    times = np.repeat(frames, len(rows) * len(columns)).astype(np.float32)
    grid = rope.grid(rows, columns, len(frames))
    in_time = rope.time_angles(layout.current_position + jnp.asarray(times), spec)
    return in_time + rope.space_angles(jnp.asarray(grid), spec)


def score_inputs(
    spec: MemorySpec, layout: Layout, layer: LayerCache, queries: PooledQueries, random: Array
) -> policy.ScoreInputs:
    """What one layer's packed blocks are scored by.

    All lie at one common distance, the middle of the row they will form, so that age does not decide. The paper's
    sums alone see them at their true frames, counted from the current block's first.
    """
    cfg = spec.cache
    packed = layer.packed.k
    s = spec.tokens_per_frame
    offsets = jnp.asarray(layouts.packed_positions(spec)[0])[None, None]
    lies = jnp.zeros((1, 1, 1))
    if cfg.rope_adjustment == "incremental":
        lies = layer.packed_positions[..., None] + offsets
    common = (
        layout.mid_position
        + layout.num_selected * layout.step / 2
        + offsets * layout.step / cfg.block
    )
    true = (layout.ids * cfg.block - layout.start)[None, :, None] + offsets
    sizes = [(cfg.sink, layout.sink), (cfg.recent, layout.recent)]
    return policy.ScoreInputs(
        queries=queries.pooled,
        packed=_turn(spec, packed, common - lies),
        ids=layout.ids,
        random=random,
        full_res=(layer.view.k[:, : cfg.sink * s], _recent_keys(spec, layout, layer.view.k)),
        full_res_valid=tuple(jnp.arange(size * s) < count * s for size, count in sizes),
        query_sum=queries.total + _recent_queries(spec, layout, layer),
        asked=len(spec.asking_tokens) * (1 + jnp.sum(_asking_blocks(spec, layout))),
        key_sum=_turn(spec, packed.astype(jnp.float32), true - lies).sum(axis=2),
    )


def _recent_keys(spec: MemorySpec, layout: Layout, keys: Heads) -> Heads:
    """Keys of the recent frames in time order, the visible ones first."""
    cfg = spec.cache
    return _in_order(spec, layout, keys, cfg.recent)


def _in_order(spec: MemorySpec, layout: Layout, store: Array, count: int) -> Array:
    """Of a view's keys or values, those of `count` recent frames in time order, the visible ones first."""
    cfg, s = spec.cache, spec.tokens_per_frame
    first = layouts.recent_frames(layout, count)[:: cfg.chunk]
    slots = layouts.frame_slots(cfg, layout, first) * s
    size = cfg.chunk * s
    parts = [jax.lax.dynamic_slice_in_dim(store, slots[i], size, axis=1) for i in range(len(first))]
    return jnp.concatenate([store[:, :0], *parts], axis=1)


# Several blocks together


def joint(spec: MemorySpec, layout: Layout, layer: LayerCache) -> KV:
    """The view [b, ahead_room, n, h] in which several blocks are denoised together: sink, recent frames, and room.

    The sink's keys are turned to where it stands before the recent frames.
    """
    cfg, s = spec.cache, spec.tokens_per_frame
    count = cfg.held - cfg.sink
    at = layout.sink_position + jnp.arange(cfg.sink)
    sink = KV(k=cache.rotated(spec, layer.sink, at), v=cache.sink_of(spec, layer.view).v)
    behind = jax.tree.map(lambda store: _in_order(spec, layout, store, count), layer.view)
    seen = layout.sink * s
    view = jax.tree.map(
        lambda one: jnp.pad(one, ((0, 0), (0, spec.ahead_room - cfg.sink * s), (0, 0), (0, 0))),
        sink,
    )
    return cache.extend(view, behind, seen)


def alone(spec: MemorySpec, layout: Layout, view: KV) -> KV:
    """The part of a view in which a block is committed that was denoised with others: valid keys come first."""
    hides_sink = (layout.sink == 0) & (layout.start > layout.scene)
    hidden = jnp.where(hides_sink, spec.cache.sink * spec.tokens_per_frame, 0)
    return jax.tree.map(
        lambda store: jax.lax.dynamic_slice_in_dim(store, hidden, spec.ring_room, axis=1), view
    )


def with_sink_turned(spec: MemorySpec, layout: Layout, view: KV) -> KV:
    """`view` with the sink's keys at their position in `layout`, which differs from layer to layer."""
    sink = cache.sink_of(spec, view).k
    angles = rope.time_angles(jnp.full(sink.shape[1], layout.sink_turn, jnp.float32), spec)
    keys = jax.lax.dynamic_update_slice_in_dim(view.k, rope.rotate(sink, angles), 0, axis=1)
    return KV(k=keys, v=view.v)


def score(
    spec: MemorySpec, layout: Layout, layer: LayerCache, queries: PooledQueries, random: Array
) -> Float[Array, "b slot"]:
    """How much one layer wants each packed block; what it says of invisible ones means nothing."""
    rule = spec.cache.score
    if rule.across_heads is None:
        return rule.fn(score_inputs(spec, layout, layer, queries, random))

    def of(head: Array) -> Float[Array, "b slot"]:
        one_layer, one_queries = _head((layer, queries), head)
        return rule.fn(score_inputs(spec, layout, one_layer, one_queries, random))

    return rule.across_heads(jax.lax.map(of, jnp.arange(spec.scored_heads)), axis=0)


def _head(tree: Any, head: Array) -> Any:
    """Everything [..., n, h] in `tree` with one head alone; the positions of keys stay as they are."""

    def one(x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, head, 1, axis=-2) if x.ndim > 2 else x

    return jax.tree.map(one, tree)


def select(spec: MemorySpec, layout: Layout, scores: Float[Array, "b slot"]) -> Selection:
    """The best packed blocks in time order, and their positions: in a row behind the sink, or at their true frames."""
    cfg = spec.cache
    slots, ids, best = policy.choose(scores, layout.ids, cfg.attended)
    in_row = layout.mid_position + jnp.arange(cfg.attended) * layout.step
    positions = in_row[None] if cfg.rope_adjustment in ("sink", "incremental") else ids * cfg.block
    positions = jnp.broadcast_to(positions, ids.shape).astype(jnp.float32)
    return Selection(slots=slots, ids=ids, scores=best, positions=positions)


def newest(spec: MemorySpec, layout: Layout, batch: int) -> Selection:
    """What a layer attends to before it has asked anything."""
    ages = layout.ids.astype(jnp.float32)[None]
    return select(spec, layout, jnp.broadcast_to(ages, (batch, spec.cache.slots)))


def gather(layer: LayerCache, selection: Selection) -> Gathered:
    """The chosen packed blocks."""
    slots = selection.slots[:, :, None, None, None]
    stored = jnp.zeros(selection.ids.shape)
    if layer.packed_positions.shape[1]:
        stored = jnp.take_along_axis(layer.packed_positions, selection.slots, axis=1)
    kv = KV(*(jnp.take_along_axis(x, slots, axis=1) for x in (layer.packed.k, layer.packed.v)))
    return Gathered(kv=kv, positions=stored)


# Laying down


def lay(
    spec: MemorySpec, layout: Layout, layer: LayerCache, gathered: Gathered, selection: Selection
) -> KV:
    """One layer's view [b, room, n, h], the gathered packed blocks behind sink, recent frames and the current block.

    Valid keys come first and order is free, since positions live in the rotation: no mask is needed. What lies behind
    the last valid key is scratch.
    """
    view = cache.with_room(spec, layer.view)
    if spec.cache.attended == 0:
        return view
    packed = _positioned(spec, layout, gathered, selection)
    behind = layouts.length(spec, layout) - layout.num_selected * spec.tokens_per_packed_block
    return cache.extend(view, packed, behind)


def _positioned(spec: MemorySpec, layout: Layout, gathered: Gathered, selection: Selection) -> KV:
    """The gathered packed blocks [b, selected*p, n, h], keys turned from where they lie to their positions."""
    cfg = spec.cache
    b, _, _, n, h = gathered.kv.k.shape
    scale = layout.step / cfg.block if cfg.rope_adjustment == "sink" else 1.0
    inside = jnp.asarray(layouts.packed_positions(spec)[0])[None, None] * scale
    inside = 0.0 if cfg.rope_adjustment == "incremental" else inside
    times = jnp.broadcast_to(
        (selection.positions - gathered.positions)[..., None] + inside, gathered.kv.k.shape[:3]
    )
    keys = _turn(spec, gathered.kv.k, times)
    return KV(k=keys.reshape(b, -1, n, h), v=gathered.kv.v.reshape(b, -1, n, h))


def _turn(spec: MemorySpec, keys: Array, times: Float[Array, "#b #slot p"]) -> Array:
    """Keys [b, slot, p, n, h] of packed blocks turned in time by `times`."""
    b, slots, p, n, h = keys.shape
    times = jnp.broadcast_to(times, (times.shape[0], slots, p))
    angles = rope.time_angles(times.reshape(times.shape[0], slots * p), spec)
    return rope.rotate(keys.reshape(b, slots * p, n, h), angles).reshape(keys.shape)
