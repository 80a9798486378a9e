"""The memory: sharp first frames, packed middle blocks, sharp last frames. Fixed shapes, one counter (paper sec. 3.2).

A finished block is written once, at full size into `sink` or `recent` and packed into `mid`. Its packed twin lies in
`mid` from that moment and becomes visible when the sharp block leaves `recent`: leaving moves no data. Keys are kept
rotated in space only; `view` gives each key its place in time when a block looks back.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Float, Int

from packforcing_jax import pytrees
from packforcing_jax.config import CacheConfig, Experiment
from packforcing_jax.networks import rope
from packforcing_jax.types import KV, Length


@struct.dataclass
class Layer:
    """What one layer remembers.

    Under `rope_adjustment="incremental"` keys lie rotated in time: recent ones at their true frames, the others where
    `sink_at` and `at` say. Otherwise these two are empty.
    """

    sink: KV  # [b, frame, s, n, h]   first frames, written once
    mid: KV  # [b, slot, p, n, h]    packed blocks, a ring
    recent: KV  # [b, frame, s, n, h]   last frames, a ring
    sink_at: Array  # []       place in time that the sink's first frame is turned to
    at: Array  # [b, slot]     and each packed block's first frame


@struct.dataclass
class Memory:
    """Everything the model remembers: one `Layer` per layer, as a list or stacked along a leading axis."""

    layers: Any  # list[Layer] | Layer
    num_blocks: Int[Array, ""]


@struct.dataclass
class Looked:
    """Which packed blocks a layer looks back at, in time order, behind the last valid one -1."""

    slots: Array  # [b, chosen] where they lie in the ring
    ids: Array  # [b, chosen]
    scores: Array  # [b, chosen]
    at: Array  # [b, chosen] place in time of each block's first frame
    sink_at: Array  # []


@struct.dataclass
class Plan:
    """Counts and places in time of what the next block sees; a function of the block counter alone."""

    num_blocks: Array
    start: Array  # true number of the current block's first frame
    sink: Array  # valid sink frames
    recent: Array  # visible recent frames
    chosen: Array  # attended packed blocks
    ids: Array  # [slot] id of the packed block in each ring slot, -1 where none is visible
    step: Array  # places in time that one packed block takes
    sink_at: Array  # place of the sink's first frame
    mid_at: Array  # where a row of packed blocks that ends before `recent` begins
    recent_at: Array
    current_at: Array


def init(exp: Experiment, batch: int, dtype=jnp.float32, *, stacked: bool = False) -> Memory:
    """An empty memory for `batch` videos. Every store is its own buffer, so that all can be donated."""
    cfg, dit = exp.cache, exp.dit
    kept = cfg.slots if cfg.archive == "device" else 0
    turned = cfg.slots if cfg.rope_adjustment == "incremental" else 0

    def layer(_) -> Layer:
        def store(slots: int, tokens: int) -> KV:
            shape = (batch, slots, tokens, dit.heads, dit.head_dim)
            return KV(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))

        return Layer(
            sink=store(cfg.sink, exp.tokens_per_frame),
            recent=store(cfg.ring, exp.tokens_per_frame),
            mid=store(kept, exp.tokens_per_packed_block),
            sink_at=jnp.zeros(()),
            at=jnp.zeros((batch, turned)),
        )

    layers = (
        jax.vmap(layer)(jnp.arange(dit.layers))
        if stacked
        else [layer(i) for i in range(dit.layers)]
    )
    return Memory(layers=layers, num_blocks=jnp.int32(0))


def ring_ids(size: int, oldest: Array, newest: Array, written: Array) -> Int[Array, " slot"]:
    """Id in each slot of a ring into which ids 0..written-1 went in turn; -1 unless oldest <= id < newest."""
    ids = written - 1 - (written - 1 - jnp.arange(size)) % max(size, 1)
    return jnp.where((ids >= jnp.maximum(oldest, 0)) & (ids < newest), ids, -1)


def plan(cfg: CacheConfig, num_blocks: Array, gap: Array | float = 0.0) -> Plan:
    """Who is seen and where in time, `gap` frames further back for everything before `recent` (training jitter).

    Laid out behind the sink, or moved so that the current block lies at its true frame: attention is the same
    (paper fig. 2c adds to each position what was dropped behind it). `none` leaves the sink where it was.
    """
    start = num_blocks * cfg.block
    sink = jnp.minimum(start, cfg.sink)
    recent = jnp.minimum(start - sink, cfg.recent)
    sink_blocks, recent_blocks = cfg.sink // cfg.block, cfg.recent // cfg.block
    newest = num_blocks - sink_blocks - recent_blocks  # counted from the first block after the sink
    ids = ring_ids(cfg.slots, newest - cfg.capacity, newest, num_blocks - sink_blocks)
    chosen = jnp.clip(newest, 0, min(cfg.capacity, cfg.attended))
    room = float(max(cfg.trained - cfg.sink - cfg.recent - cfg.block, 1))
    step = (
        jnp.minimum(cfg.block, room / jnp.maximum(chosen, 1))
        if cfg.span == "fit"
        else jnp.float32(cfg.block)
    )
    packed = chosen * step
    moved = 0.0 if cfg.rope_adjustment == "sink" else start - (sink + packed + gap + recent)
    current_at = moved + sink + packed + gap + recent
    places = {
        "sink_at": 0.0 if cfg.rope_adjustment == "none" else moved,
        "mid_at": moved + sink,
        "recent_at": current_at - recent,
        "current_at": current_at,
    }
    return Plan(
        num_blocks=num_blocks,
        start=start,
        sink=sink,
        recent=recent,
        chosen=chosen,
        step=step,
        ids=jnp.where(ids >= 0, ids + sink_blocks, -1),
        **{name: jnp.asarray(place, jnp.float32) for name, place in places.items()},
    )


def length(exp: Experiment, seen: Plan) -> Length:
    """Valid keys in front of the current block's own."""
    return (
        seen.sink + seen.recent
    ) * exp.tokens_per_frame + seen.chosen * exp.tokens_per_packed_block


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
    frames = (
        np.ma.masked_greater_equal(frames, exp.cache.block).mean(axis=1).filled(exp.cache.block - 1)
    )
    down, across = np.arange(rows), np.arange(columns)
    if exp.compressor.places == "stretched":
        down, across = (
            (np.arange(size) + 0.5) * stride(axis) / patch[axis] - 0.5
            for axis, size in ((1, rows), (2, columns))
        )
    return np.repeat(frames, rows * columns).astype(np.float32), rope.grid(down, across, slots)


def current_places(exp: Experiment, seen: Plan) -> Float[Array, " q"]:
    """Place in time of each token of the current block."""
    frames = np.repeat(np.arange(exp.cache.block), exp.tokens_per_frame).astype(np.float32)
    return seen.current_at + jnp.asarray(frames)


def packed_times(exp: Experiment, seen: Plan) -> Float[Array, " p"]:
    """Place in time of each token of the current block's packed twin."""
    return seen.current_at + jnp.asarray(packed_places(exp)[0])


def visible_recent(cfg: CacheConfig, seen: Plan, ring: Array) -> Array:
    """The visible frames of the recent ring [b, frame, s, n, h] in time order (garbage behind the last valid one)."""
    if cfg.ring == cfg.recent == math.gcd(cfg.block, cfg.sink):
        return ring  # one block, always in order
    first = seen.start - seen.recent - cfg.sink
    return jnp.take(ring, (first + jnp.arange(cfg.recent)) % max(cfg.ring, 1), axis=1)


def commit(
    exp: Experiment,
    memory: Memory,
    full: list[KV] | KV,
    packed: list[KV] | KV | None,
    looked: list[Looked] | Looked | None = None,
) -> Memory:
    """The memory after one more finished block; shapes never change. The only writer.

    Per layer, `full` holds [b, block*s, n, h], `packed` [b, p, n, h] (None when none is kept here), keys rotated in
    space only, and `looked` what the block looked back at, which `incremental` needs.
    """
    n = memory.num_blocks
    layers = pytrees.over(lambda *one: commit_sharp(exp, n, *one), memory.layers, full, looked)
    if packed is not None:
        layers = pytrees.over(lambda *one: commit_packed(exp, n, *one), layers, packed)
    return Memory(layers=layers, num_blocks=n + 1)


def commit_sharp(
    exp: Experiment, n: Array, layer: Layer, full: KV, looked: Looked | None = None
) -> Layer:
    """One layer with block `n` at full size in its places."""
    cfg = exp.cache
    if cfg.rope_adjustment == "incremental":
        layer, frames = _settle(exp, layer, looked), _true_frames(exp, n)
        full = _turned(exp, full, frames + jnp.where(frames < cfg.sink, layer.sink_at, 0.0))
    frames = KV(*(x.reshape(x.shape[0], cfg.block, -1, *x.shape[2:]) for x in (full.k, full.v)))
    sink, recent = layer.sink, layer.recent
    chunk = math.gcd(cfg.block, cfg.sink, cfg.ring)  # whole blocks where sizes allow
    for f in range(0, cfg.block, chunk):
        frame = n * cfg.block + f
        new = KV(*(x[:, f : f + chunk] for x in (frames.k, frames.v)))
        sink = _put(sink, new, slot=frame, when=frame < cfg.sink)
        recent = _put(
            recent, new, slot=(frame - cfg.sink) % max(cfg.ring, 1), when=frame >= cfg.sink
        )
    return dataclasses.replace(layer, sink=sink, recent=recent)


def commit_packed(exp: Experiment, n: Array, layer: Layer, packed: KV) -> Layer:
    """One layer with the packed twin of block `n` in its slot."""
    cfg = exp.cache
    if cfg.rope_adjustment == "incremental":
        packed = _turned(exp, packed, n * cfg.block + jnp.asarray(packed_places(exp)[0]))
    past = n - cfg.sink // cfg.block
    there = {"slot": past % cfg.slots, "when": past >= 0}
    mid = _put(layer.mid, KV(*(x[:, None] for x in (packed.k, packed.v))), **there)
    if layer.at.shape[1] == 0:
        return dataclasses.replace(layer, mid=mid)
    first = jnp.broadcast_to(jnp.float32(n * cfg.block), (layer.at.shape[0], 1))
    return dataclasses.replace(layer, mid=mid, at=_overwrite(layer.at, first, **there))


def _put(store: KV, new: KV, *, slot: Array, when: Array) -> KV:
    """`store` with `new` at `slot` if `when`; otherwise what was there is written back, in place."""
    return KV(
        k=_overwrite(store.k, new.k, slot=slot, when=when),
        v=_overwrite(store.v, new.v, slot=slot, when=when),
    )


def _overwrite(x: Array, values: Array, *, slot: Array, when: Array) -> Array:
    if x.shape[1] == 0:
        return x
    old = jax.lax.dynamic_slice_in_dim(x, slot, values.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(
        x, jnp.where(when, values.astype(x.dtype), old), slot, axis=1
    )


def _settle(exp: Experiment, layer: Layer, looked: Any) -> Layer:
    """`layer` with every key that was looked at left where it was turned to."""
    b, slots, p, n, h = layer.mid.k.shape
    valid = (looked.ids >= 0)[..., None] & (
        looked.slots[..., None] == jnp.arange(slots)[None, None]
    )
    target = jnp.where(valid, looked.at[..., None], 0.0).sum(axis=1)
    at = jnp.where(valid.any(axis=1), target, layer.at)
    turn = rope.time_angles(jnp.repeat(at - layer.at, p, axis=1), exp.dit)
    mid = rope.rotate(layer.mid.k.reshape(b, slots * p, n, h), turn).reshape(layer.mid.k.shape)
    frames = layer.sink.k.shape
    moved = jnp.full((frames[1] * frames[2],), looked.sink_at - layer.sink_at)
    sink = rope.rotate(layer.sink.k.reshape(b, -1, n, h), rope.time_angles(moved, exp.dit)).reshape(
        frames
    )
    turned = {"sink": KV(k=sink, v=layer.sink.v), "mid": KV(k=mid, v=layer.mid.v)}
    return dataclasses.replace(layer, **turned, at=at, sink_at=looked.sink_at)


def _true_frames(exp: Experiment, n: Array) -> Float[Array, " q"]:
    frames = np.repeat(np.arange(exp.cache.block), exp.tokens_per_frame)
    return (n * exp.cache.block + jnp.asarray(frames)).astype(jnp.float32)


def _turned(exp: Experiment, tokens: KV, times: Float[Array, " k"]) -> KV:
    return dataclasses.replace(tokens, k=rope.rotate(tokens.k, rope.time_angles(times, exp.dit)))


def export(exp: Experiment, memory: Memory) -> KV:
    """The sharp frames [layer, b, k, n, h] in time order, keys rotated at true frames (Self-Forcing's cache)."""
    cfg, frames = exp.cache, int(memory.num_blocks) * exp.cache.block
    kept = min(frames, cfg.sink)
    recent = np.arange(max(cfg.sink, frames - cfg.ring), frames)
    slots = (recent - cfg.sink) % max(cfg.ring, 1)
    true = np.concatenate([np.arange(kept), recent]).astype(np.float32)

    def one(layer: Layer) -> KV:
        turned = np.zeros_like(true)
        if cfg.rope_adjustment == "incremental":
            turned = jnp.where(np.arange(len(true)) < kept, layer.sink_at + true, true)
        both = [
            jnp.concatenate([sink[:, :kept], ring[:, slots]], axis=1)
            for sink, ring in ((layer.sink.k, layer.recent.k), (layer.sink.v, layer.recent.v))
        ]
        flat = KV(*(x.reshape(x.shape[0], -1, *x.shape[3:]) for x in both))
        return _turned(exp, flat, jnp.repeat(jnp.asarray(true - turned), exp.tokens_per_frame))

    return pytrees.stack(pytrees.over(one, memory.layers))


def end_indices(exp: Experiment, memory: Memory) -> np.ndarray:
    """[tokens ever committed, tokens still held at full size], as Self-Forcing counts them."""
    frames = int(memory.num_blocks) * exp.cache.block
    return np.asarray([frames, min(frames, exp.cache.sink + exp.cache.ring)]) * exp.tokens_per_frame
