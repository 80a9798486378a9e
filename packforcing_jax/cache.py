"""The memory: sharp first frames, packed middle blocks, sharp last frames. Fixed shapes, one counter (paper sec. 3.2).

A finished block is written once, at full size into `sink` or `recent` and packed into `mid`. Its packed twin lies in
`mid` from that moment and becomes visible when the sharp block leaves `recent`: leaving moves no data. Keys are kept
rotated in space only; `recall` gives each key its place in time, anchored at the sink, when a block looks back.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Float, Int

from packforcing_jax import rope, selection
from packforcing_jax.config import CacheConfig, Experiment
from packforcing_jax.types import KV, Heads, Length


@struct.dataclass
class Memory:
    """Everything the model remembers. Keys and values have the leading axes [layer, b]."""

    sink: KV  # [layer, b, frame, s, n, h]   first frames, written once
    mid: KV  # [layer, b, slot, p, n, h]    packed blocks, a ring
    recent: KV  # [layer, b, frame, s, n, h]   last frames, a ring
    num_blocks: Int[Array, ""]


@struct.dataclass
class Plan:
    """Counts and places in time of what the next block sees; a function of the block counter alone."""

    num_blocks: Array
    sink: Array  # valid sink frames
    recent: Array  # visible recent frames
    chosen: Array  # attended packed blocks
    ids: Array  # [slot] id of the packed block in each ring slot, -1 where none is visible
    step: Array  # places in time that one packed block takes
    recent_at: Array  # place of the first recent frame
    current_at: Array  # place of the current block's first frame


def init(exp: Experiment, batch: int, dtype=jnp.float32) -> Memory:
    """An empty memory for `batch` videos. Every store is its own buffer, so that all can be donated."""
    cfg, dit = exp.cache, exp.dit

    def store(slots: int, tokens: int) -> KV:
        shape = (dit.layers, batch, slots, tokens, dit.heads, dit.head_dim)
        return KV(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))

    return Memory(sink=store(cfg.sink, exp.tokens_per_frame), recent=store(cfg.ring, exp.tokens_per_frame),
                  mid=store(cfg.slots, exp.tokens_per_packed_block), num_blocks=jnp.int32(0))  # fmt: skip


def ring_ids(size: int, oldest: Array, newest: Array, written: Array) -> Int[Array, " slot"]:
    """Id in each slot of a ring into which ids 0..written-1 went in turn; -1 unless oldest <= id < newest."""
    ids = written - 1 - (written - 1 - jnp.arange(size)) % max(size, 1)
    return jnp.where((ids >= jnp.maximum(oldest, 0)) & (ids < newest), ids, -1)


def plan(cfg: CacheConfig, num_blocks: Array, gap: Array | float = 0.0) -> Plan:
    """Who is seen and where in time, `gap` frames further back for everything before `recent` (training jitter)."""
    start = num_blocks * cfg.block
    sink = jnp.minimum(start, cfg.sink)
    recent = jnp.minimum(start - sink, cfg.recent)
    sink_blocks, recent_blocks = cfg.sink // cfg.block, cfg.recent // cfg.block
    newest = num_blocks - sink_blocks - recent_blocks  # counted from the first block after the sink
    ids = ring_ids(cfg.slots, newest - cfg.capacity, newest, num_blocks - sink_blocks)
    chosen = jnp.clip(newest, 0, min(cfg.capacity, cfg.attended))
    room = float(max(cfg.trained - cfg.sink - cfg.recent - cfg.block, 1))
    step = jnp.minimum(cfg.block, room / jnp.maximum(chosen, 1)) if cfg.span == "fit" else jnp.float32(cfg.block)
    if cfg.rope_adjustment == "none":
        recent_at, current_at = start - recent, start
    else:
        recent_at = sink + chosen * step + gap
        current_at = recent_at + recent
    return Plan(num_blocks=num_blocks, sink=sink, recent=recent, chosen=chosen, step=step,
                ids=jnp.where(ids >= 0, ids + sink_blocks, -1),
                recent_at=recent_at.astype(jnp.float32), current_at=current_at.astype(jnp.float32))  # fmt: skip


def length(exp: Experiment, seen: Plan) -> Length:
    """Valid keys in front of the current block's own."""
    return (seen.sink + seen.recent) * exp.tokens_per_frame + seen.chosen * exp.tokens_per_packed_block


def room(exp: Experiment) -> int:
    """Keys a view has room for: all that is remembered, the block itself and its packed twin, rounded up."""
    cfg = exp.cache
    keys = (cfg.sink + cfg.recent + cfg.block) * exp.tokens_per_frame
    keys += (cfg.attended + 1) * exp.tokens_per_packed_block if cfg.top else 0
    return -(-keys // cfg.key_multiple) * cfg.key_multiple


def packed_places(exp: Experiment) -> tuple[np.ndarray, np.ndarray]:
    """Places of a packed block's tokens: (frames after the block's first [p], grid places [p, 2]).

    Each token sits at the centre of the cells it stands for; frames that only pad the block do not count.
    """
    slots, rows, columns = exp.packed_grid
    stride, patch = exp.compressor.stride, exp.dit.patch
    frames = np.minimum(np.arange(slots * stride(0)), exp.compressor.frames - 1).reshape(slots, -1)
    frames = np.ma.masked_greater_equal(frames, exp.cache.block).mean(axis=1).filled(exp.cache.block - 1)
    down, across = ((np.arange(size) + 0.5) * stride(axis) / patch[axis] - 0.5
                    for axis, size in ((1, rows), (2, columns)))  # fmt: skip
    return np.repeat(frames, rows * columns).astype(np.float32), rope.grid(down, across, slots)


def current_places(exp: Experiment, seen: Plan) -> Float[Array, " q"]:
    """Place in time of each token of the current block."""
    frames = np.repeat(np.arange(exp.cache.block), exp.tokens_per_frame).astype(np.float32)
    return seen.current_at + jnp.asarray(frames)


def packed_times(exp: Experiment, seen: Plan) -> Float[Array, " p"]:
    """Place in time of each token of the current block's packed twin."""
    return seen.current_at + jnp.asarray(packed_places(exp)[0])


def recall(exp: Experiment, seen: Plan, past: tuple[KV, KV, KV], q: Heads) -> tuple[KV, Int[Array, "b chosen"]]:
    """One layer's view, [b, room, n, h] with rotated keys and valid ones first, and the ids of its packed blocks.

    `past` is that layer's (sink, mid, recent); `q` its un-rotated queries. Parts are laid down at the running
    length, so that each covers the empty tail of the one before and the order needs no mask.
    """
    cfg, mid = exp.cache, past[1]
    sink, recent = sharp(exp, seen, past)
    parts, ids = [(sink, seen.sink * exp.tokens_per_frame)], jnp.zeros((q.shape[0], 0), jnp.int32)
    if cfg.attended:
        scores = selection.POLICIES[cfg.selection](ask(exp, seen, past, q))
        slots, ids = selection.choose(scores, seen.ids, cfg.attended)
        parts.append((_packed(exp, seen, mid, slots, ids), seen.chosen * exp.tokens_per_packed_block))
    parts.append((recent, seen.recent * exp.tokens_per_frame))
    shape = (q.shape[0], room(exp), *q.shape[2:])
    view, at = KV(k=jnp.zeros(shape, mid.k.dtype), v=jnp.zeros(shape, mid.v.dtype)), jnp.int32(0)
    for part, count in parts:
        view, at = extend(view, part, at), at + count
    return view, ids


def extend(view: KV, own: KV, at: Length) -> KV:
    """`view` with the keys and values `own` laid down from key `at` on."""
    return KV(*(jax.lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), at, axis=1)
                for x, new in ((view.k, own.k), (view.v, own.v))))  # fmt: skip


def _newest(store: Array, cfg: CacheConfig, seen: Plan) -> Array:
    """The visible frames of the recent ring [b, frame, s, n, h] in time order (garbage behind the last valid one)."""
    if cfg.ring == cfg.recent == math.gcd(cfg.block, cfg.sink):
        return store  # one block, always in order
    first = seen.num_blocks * cfg.block - seen.recent - cfg.sink
    return jnp.take(store, (first + jnp.arange(cfg.recent)) % max(cfg.ring, 1), axis=1)


def _placed(store: KV, frames: Float[Array, " frame"], exp: Experiment) -> KV:
    """Tokens [b, frame*s, n, h] of whole frames with their keys rotated to `frames`."""
    b, count, s, n, h = store.k.shape
    k, v = (x.reshape(b, count * s, n, h) for x in (store.k, store.v))
    return KV(k=rope.rotate(k, rope.time_angles(jnp.repeat(frames, s), exp.dit)), v=v)


def sharp(exp: Experiment, seen: Plan, past: tuple[KV, KV, KV]) -> tuple[KV, KV]:
    """One layer's sink and visible recent tokens [b, k, n, h], each with its valid ones first, keys in their places."""
    cfg, (sink, _, recent) = exp.cache, past
    newest = KV(*(_newest(x, cfg, seen) for x in (recent.k, recent.v)))
    return (_placed(sink, jnp.arange(cfg.sink, dtype=jnp.float32), exp),
            _placed(newest, seen.recent_at + jnp.arange(cfg.recent), exp))  # fmt: skip


def ask(exp: Experiment, seen: Plan, past: tuple[KV, KV, KV], q: Heads) -> selection.Question:
    """What one layer's packed blocks are scored by: its queries `q` pooled, the archive at one common distance.

    One distance for all, so that age does not decide.
    """
    cfg, packed = exp.cache, past[1].k
    b, slots, p, n, h = packed.shape
    times, _ = packed_places(exp)
    common = seen.sink + (seen.chosen * seen.step) / 2 + jnp.asarray(times) * seen.step / cfg.block
    archive = rope.rotate(packed.reshape(b, slots * p, n, h), jnp.tile(rope.time_angles(common, exp.dit), (slots, 1)))
    sizes = [(cfg.sink, seen.sink), (cfg.recent, seen.recent)]
    return selection.Question(
        q=rope.rotate(selection.pool(q, exp.grid, cfg.score_pool), _pool_angles(exp, seen)),
        archive=archive.reshape(packed.shape), ids=seen.ids,
        sharp=jnp.concatenate([part.k for part in sharp(exp, seen, past)], axis=1),
        sharp_valid=jnp.concatenate([jnp.arange(size * exp.tokens_per_frame) < count * exp.tokens_per_frame
                                     for size, count in sizes]))  # fmt: skip


def _pool_angles(exp: Experiment, seen: Plan) -> Array:
    """Rotary angles at the centres of the windows that queries are pooled over."""
    frames, rows, columns = (
        np.arange(size // step) * step + (step - 1) / 2
        for size, step in zip((exp.cache.block, *exp.grid), exp.cache.score_pool, strict=True))  # fmt: skip
    times = np.repeat(frames, len(rows) * len(columns)).astype(np.float32)
    places = rope.grid(rows, columns, len(frames))
    return rope.time_angles(seen.current_at + jnp.asarray(times), exp.dit) \
        + rope.space_angles(jnp.asarray(places), exp.dit)  # fmt: skip


def _packed(exp: Experiment, seen: Plan, mid: KV, slots: Int[Array, "b chosen"], ids: Int[Array, "b chosen"]) -> KV:
    """The chosen packed blocks [b, chosen*p, n, h] with their keys rotated to their places behind the sink."""
    cfg, (b, count) = exp.cache, slots.shape
    picked = KV(*(jnp.take_along_axis(x, slots[:, :, None, None, None], axis=1) for x in (mid.k, mid.v)))
    offsets = jnp.asarray(packed_places(exp)[0])[None, None]
    if cfg.rope_adjustment == "none":
        times = (ids * cfg.block).astype(jnp.float32)[..., None] + offsets
    else:
        times = (seen.sink + jnp.arange(count) * seen.step)[None, :, None] + offsets * seen.step / cfg.block
    _, _, p, n, h = picked.k.shape
    angles = rope.time_angles(times.reshape(times.shape[0], count * p), exp.dit)
    return KV(k=rope.rotate(picked.k.reshape(b, count * p, n, h), angles), v=picked.v.reshape(b, count * p, n, h))


def commit(exp: Experiment, memory: Memory, full: KV, packed: KV | None) -> Memory:
    """The memory after one more finished block; shapes never change. The only writer.

    `full` holds [layer, b, block*s, n, h], `packed` [layer, b, p, n, h] (None when nothing is packed); keys are
    rotated in space only.
    """
    cfg, n = exp.cache, memory.num_blocks
    frames = KV(*(x.reshape(*x.shape[:2], cfg.block, -1, *x.shape[3:]) for x in (full.k, full.v)))
    sink, recent, mid = memory.sink, memory.recent, memory.mid
    chunk = math.gcd(cfg.block, cfg.sink, cfg.ring)  # whole blocks where sizes allow
    for f in range(0, cfg.block, chunk):
        frame = n * cfg.block + f
        new = KV(*(x[:, :, f : f + chunk] for x in (frames.k, frames.v)))
        sink = _put(sink, new, slot=frame, when=frame < cfg.sink)
        recent = _put(recent, new, slot=(frame - cfg.sink) % max(cfg.ring, 1), when=frame >= cfg.sink)
    if packed is not None:
        past = n - cfg.sink // cfg.block
        mid = _put(mid, KV(*(x[:, :, None] for x in (packed.k, packed.v))), slot=past % cfg.slots, when=past >= 0)
    return Memory(sink=sink, mid=mid, recent=recent, num_blocks=n + 1)


def _put(store: KV, new: KV, *, slot: Array, when: Array) -> KV:
    """`store` with `new` at `slot` of axis 2 if `when`; otherwise what was there is written back, in place."""
    if store.k.shape[2] == 0:
        return store

    def put(x: Array, values: Array) -> Array:
        old = jax.lax.dynamic_slice_in_dim(x, slot, values.shape[2], axis=2)
        return jax.lax.dynamic_update_slice_in_dim(x, jnp.where(when, values.astype(x.dtype), old), slot, axis=2)

    return KV(k=put(store.k, new.k), v=put(store.v, new.v))


def export(exp: Experiment, memory: Memory) -> KV:
    """The sharp frames [layer, b, k, n, h] in time order, keys rotated at true frames (Self-Forcing's cache)."""
    cfg, frames = exp.cache, int(memory.num_blocks) * exp.cache.block
    kept = min(frames, cfg.sink)
    recent = np.arange(max(cfg.sink, frames - cfg.ring), frames)
    slots = (recent - cfg.sink) % max(cfg.ring, 1)
    times = np.repeat(np.concatenate([np.arange(kept), recent]), exp.tokens_per_frame)
    angles = rope.time_angles(jnp.asarray(times, jnp.float32), exp.dit)

    def gather(sink: Array, ring: Array) -> Array:
        both = jnp.concatenate([sink[:, :, :kept], ring[:, :, slots]], axis=2)
        return both.reshape(*both.shape[:2], -1, *both.shape[4:])

    k = jax.vmap(lambda layer: rope.rotate(layer, angles))(gather(memory.sink.k, memory.recent.k))
    return KV(k=k, v=gather(memory.sink.v, memory.recent.v))


def end_indices(exp: Experiment, memory: Memory) -> np.ndarray:
    """[tokens ever committed, tokens still held at full size], as Self-Forcing counts them."""
    frames = int(memory.num_blocks) * exp.cache.block
    return np.asarray([frames, min(frames, exp.cache.sink + exp.cache.ring)]) * exp.tokens_per_frame
