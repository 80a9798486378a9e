"""The memory: first frames at full size, packed blocks between, last frames at full size (paper sec. 3.2).

Fixed shapes, and `Progress` alone says what lies where. What attention reads is the store: the keys and values of the
sink and of recent frames are written, at commit, into the view in which every layer attends, at their positions.
Only chosen packed blocks and the current block are laid down for each block. A finished block is also packed; its
packed twin lies in the archive from that moment and becomes visible when the block leaves `recent`: nothing is moved.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Float, Int

from packforcing_jax import pytrees
from packforcing_jax.config import MemorySpec
from packforcing_jax.memory import layout as layouts
from packforcing_jax.memory.layout import Layout, Progress
from packforcing_jax.networks import rope
from packforcing_jax.policies.eviction import FIFO
from packforcing_jax.pytrees import PerLayer
from packforcing_jax.types import KV, Heads, Latent, Length


@struct.dataclass
class Tokens:
    """What one layer knows of the single tokens in its view, where a full window is compressed (Deep Forcing)."""

    ids: Array  # [b, full_res] number of the frame times the tokens of one, plus the place in it
    positions: Array  # [b, full_res] in time, that its key is rotated to
    counts: Array  # [b, full_res] how often it was chosen
    queries: Array  # [b, query, n, h] what is kept of the newest frames' rotated queries


@struct.dataclass
class LayerCache:
    """What one layer remembers.

    The view begins with the sink and a ring of recent frames, keys rotated at their positions for the next block.
    Where positions change from block to block, `sink` or `recent` keep the same keys rotated in space only, so that
    no key is rotated twice; they are empty otherwise. Packed keys are rotated in space only. Under
    `rope_adjustment="incremental"` the sink's keys and the packed ones are turned from where they lie, which `sink_at`
    and `at` say. Where recent blocks are asked too, `queries` keeps the sum of those of each block's clean pass.
    """

    view: KV  # [b, room, n, h]
    packed: KV  # [b, slot, p, n, h]  the archive
    sink: Array  # [b, frame, s, n, h]
    recent: Array  # [b, frame, s, n, h]
    sink_position: Array  # []       position that the sink's first frame is turned to
    packed_positions: Array  # [b, slot]     and each packed block's first frame
    queries: Array  # [b, block, n, h] float32, in a ring; frames counted from each block's first
    tokens: Tokens | tuple[()] = ()  # where single tokens are kept


@struct.dataclass
class Memory:
    """Everything the model remembers of a batch of videos."""

    layers: PerLayer[LayerCache]
    latents: Array  # [b, frame, y, x, c]  of the newest frames, by which their keys can be computed again
    progress: Progress

    @property
    def num_blocks(self) -> Int[Array, ""]:
        """Finished blocks."""
        return self.progress.num_blocks


@struct.dataclass
class Selection:
    """Which packed blocks a layer attends to, in time order; behind the last valid one ids are -1."""

    slots: Array  # [b, selected] where they lie in the archive
    ids: Array  # [b, selected]
    scores: Array  # [b, selected]
    positions: Array  # [b, selected] of each block's first frame


def init(
    spec: MemorySpec, batch: int, dtype=jnp.float32, *, stacked: bool = False, scratch: bool = True
) -> Memory:
    """An empty memory for `batch` videos. Every store is its own buffer, so that all can be donated.

    Without `scratch`, views end with what is remembered: `view.lay` allots the rest.
    """
    cfg = spec.cache
    s = spec.tokens_per_frame

    def layer(_) -> LayerCache:
        def store(*sizes: int) -> Array:
            return jnp.zeros((batch, *sizes, spec.heads, spec.head_dim), dtype)

        keys = spec.room if scratch else spec.full_res
        slots = cfg.slots if cfg.archive == "device" else 0
        turned = cfg.slots if cfg.rope_adjustment == "incremental" else 0
        return LayerCache(
            view=KV(k=store(keys), v=store(keys)),
            packed=KV(*(store(slots, spec.tokens_per_packed_block) for _ in "kv")),
            sink=store(cfg.sink if spec.sink_moves else 0, s),
            recent=store(cfg.recent if spec.recent_moves else 0, s),
            sink_position=jnp.zeros(()),
            packed_positions=jnp.zeros((batch, turned)),
            queries=jnp.zeros((batch, cfg.asking_blocks, spec.heads, spec.head_dim)),
            tokens=_no_tokens(spec, batch) if cfg.budget else (),
        )

    return Memory(
        layers=jax.vmap(layer)(jnp.arange(spec.layers))
        if stacked
        else [layer(i) for i in range(spec.layers)],
        latents=jnp.zeros((batch, cfg.full_frames, *spec.latent)),
        progress=layouts.begin(),
    )


def _no_tokens(spec: MemorySpec, batch: int) -> Tokens:
    def store(dtype) -> Array:
        return jnp.zeros((batch, spec.full_res), dtype)

    queries = jnp.zeros((batch, spec.kept_queries, spec.heads, spec.head_dim))
    return Tokens(store(jnp.int32), store(jnp.float32), store(jnp.int32), queries)


# Writing into a view


def extend(view: KV, own: KV, at: Length) -> KV:
    """`view` with the keys and values `own` laid down from key `at` on."""

    def laid(store: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(store, new.astype(store.dtype), at, axis=1)

    return KV(k=laid(view.k, own.k), v=laid(view.v, own.v))


def write_block(spec: MemorySpec, layout: Layout, view: KV, own: KV) -> KV:
    """`view` with the current block's tokens [b, block*s, n, h] in the slots of its frames."""
    for frames, at in _chunks(spec, layout, own.k.shape[1] // spec.tokens_per_frame):
        tokens = slice(frames.start * spec.tokens_per_frame, frames.stop * spec.tokens_per_frame)
        slot = layouts.frame_slots(spec.cache, layout, at)
        part = KV(k=own.k[:, tokens], v=own.v[:, tokens])
        view = extend(view, part, slot * spec.tokens_per_frame)
    return view


def read_block(spec: MemorySpec, layout: Layout, view: KV) -> KV:
    """The current block's tokens [b, block*s, n, h] in a view, keys turned back to count from its first frame."""
    s = spec.tokens_per_frame

    def taken(store: Array) -> Array:
        chunks = _chunks(spec, layout, spec.cache.block)
        slots = [layouts.frame_slots(spec.cache, layout, at) * s for _, at in chunks]
        size = spec.cache.chunk * s
        parts = [jax.lax.dynamic_slice_in_dim(store, slot, size, axis=1) for slot in slots]
        return jnp.concatenate(parts, axis=1)

    own = jax.tree.map(taken, view)
    back = jnp.full(own.k.shape[1], -layout.current_position, jnp.float32)
    return KV(k=rope.rotate(own.k, rope.time_angles(back, spec)), v=own.v)


def _chunks(spec: MemorySpec, layout: Layout, frames: int) -> Sequence[tuple[slice, Array]]:
    """(frames of the block that lie side by side in every store, true number of the first) for each such run."""
    size = spec.cache.chunk
    return [(slice(f, f + size), layout.start + f) for f in range(0, frames, size)]


def _overwrite(store: Array, values: Array, *, slot: Array, when: Array) -> Array:
    """`store` with `values` from `slot` on if `when`; otherwise what was there is written back, in place."""
    if store.shape[1] == 0:
        return store
    old = jax.lax.dynamic_slice_in_dim(store, slot, values.shape[1], axis=1)
    new = jnp.where(when, values.astype(store.dtype), old)
    return jax.lax.dynamic_update_slice_in_dim(store, new, slot, axis=1)


# Remembering a block


def commit(
    spec: MemorySpec,
    memory: Memory,
    latent: Latent,
    full: PerLayer[KV],
    packed: PerLayer[KV] | None,
    selection: PerLayer[Selection] | None = None,
    gap: Array | float = 0.0,
) -> Memory:
    """The memory after one more finished block; shapes never change.

    Per layer, `full` holds [b, block*s, n, h], `packed` [b, p, n, h] (None when none is kept here), keys rotated in
    space only, and `selection` what the block attended to, which `incremental` needs.
    """
    now = layouts.layout(spec.cache, memory.progress, gap)
    following = layouts.layout(spec.cache, memory.progress.after_block(), gap)
    times = layouts.frame_positions(spec.cache, following, now.start + jnp.arange(spec.cache.block))
    angles = rope.time_angles(jnp.repeat(times, spec.tokens_per_frame), spec)

    def one(
        layer: LayerCache, own: KV, packed_kv: KV | None, selected: Selection | None
    ) -> LayerCache:
        layer = keep_unrotated(spec, now, layer, own.k)
        layer = finish_layer(spec, now, following, layer, packed_kv, selected)
        own = KV(k=rope.rotate(own.k.astype(layer.view.k.dtype), angles), v=own.v)
        return dataclasses.replace(layer, view=write_block(spec, now, layer.view, own))

    layers = pytrees.over(one, memory.layers, full, packed, selection)
    return advanced(spec, dataclasses.replace(memory, layers=layers), latent)


def advanced(spec: MemorySpec, memory: Memory, latent: Latent) -> Memory:
    """`memory` with one block more, `latent`, whose keys and values its layers hold already."""
    now = layouts.layout(spec.cache, memory.progress)
    latents = memory.latents
    for frames, at in _chunks(spec, now, latent.shape[1]):
        slot = FIFO.slot_of(at, spec.cache.full_frames)
        latents = _overwrite(latents, latent[:, frames], slot=slot, when=jnp.bool_(True))
    return Memory(layers=memory.layers, latents=latents, progress=memory.progress.after_block())


def _keep_frames(spec: MemorySpec, layout: Layout, ring: Array, new: Array) -> Array:
    """A ring of `recent` frames with those of the current block [b, t, ...] that go into it."""
    for frames, at in _chunks(spec, layout, new.shape[1]) if ring.shape[1] else ():
        slot = FIFO.slot_of(at - layout.origin, spec.cache.recent)
        ring = _overwrite(ring, new[:, frames], slot=slot, when=at >= layout.origin)
    return ring


def keep_unrotated(spec: MemorySpec, layout: Layout, layer: LayerCache, keys: Heads) -> LayerCache:
    """One layer with the current block's keys, rotated in space only, where positions will change."""
    frames = keys.reshape(keys.shape[0], -1, spec.tokens_per_frame, *keys.shape[2:])
    layer = _average_into_sink(spec, layout, layer)
    sink = layer.sink
    for part, at in _chunks(spec, layout, frames.shape[1]):
        slot = at - layout.scene
        sink = _overwrite(sink, frames[:, part], slot=slot, when=slot < spec.cache.sink)
    recent = _keep_frames(spec, layout, layer.recent, frames)
    return dataclasses.replace(layer, sink=sink, recent=recent)


def keep_queries(layout: Layout, layer: LayerCache, total: Float[Array, "b n h"]) -> LayerCache:
    """One layer with the sum of the current block's queries in the place of the oldest."""
    slot = FIFO.slot_of(layout.num_blocks, layer.queries.shape[1])
    queries = _overwrite(layer.queries, total[:, None], slot=slot, when=jnp.bool_(True))
    return dataclasses.replace(layer, queries=queries)


def _average_into_sink(spec: MemorySpec, layout: Layout, layer: LayerCache) -> LayerCache:
    """One layer whose sink has taken in the frames that leave for the next block, if any do (Reward Forcing sec. 3.2).

    They are the oldest recent ones, as many as the sink has; keys are averaged without their positions.
    """
    cfg, s = spec.cache, spec.tokens_per_frame
    if cfg.sink_average == 0:
        return layer
    oldest = layout.start - layout.recent + jnp.arange(cfg.block)
    leaves = layout.recent == cfg.recent

    def averaged(sink: Array, leaving: Array) -> Array:
        mixed = cfg.sink_average * sink + (1 - cfg.sink_average) * leaving
        return jnp.where(leaves, mixed, sink).astype(sink.dtype)

    def frames_of(store: Array, slots: Array) -> Array:
        b, _, n, h = store.shape
        by_frame = store[:, : spec.full_res].reshape(b, -1, s, n, h)
        return jnp.take(by_frame, slots, axis=1)

    keys = jnp.take(layer.recent, FIFO.slot_of(oldest - layout.origin, cfg.recent), axis=1)
    leaving = frames_of(layer.view.v, layouts.frame_slots(cfg, layout, oldest))
    values = averaged(frames_of(layer.view.v, jnp.arange(cfg.sink)), leaving)
    values = values.reshape(values.shape[0], cfg.sink * s, *values.shape[3:])
    view = KV(
        k=layer.view.k, v=jax.lax.dynamic_update_slice_in_dim(layer.view.v, values, 0, axis=1)
    )
    return dataclasses.replace(layer, sink=averaged(layer.sink, keys), view=view)


def finish_layer(
    spec: MemorySpec,
    now: Layout,
    following: Layout,
    layer: LayerCache,
    packed: KV | None,
    selection: Selection | None,
) -> LayerCache:
    """One layer with the block's packed twin in the archive and every key at its position for the next block."""
    if spec.cache.rope_adjustment == "incremental" and selection is not None:
        layer = _settle(spec, layer, selection)
    if packed is not None:
        layer = _archive(spec, now, layer, packed)
    return reposition(spec, following, layer)


def _archive(spec: MemorySpec, layout: Layout, layer: LayerCache, packed: KV) -> LayerCache:
    """One layer with the current block's packed twin [b, p, n, h] in its slot."""
    first = (layout.num_blocks * spec.cache.block).astype(jnp.float32)
    if spec.cache.rope_adjustment == "incremental":
        times = first + jnp.asarray(layouts.packed_positions(spec)[0])
        packed = KV(k=rope.rotate(packed.k, rope.time_angles(times, spec)), v=packed.v)
    slot = layouts.packed_slot(spec.cache, layout)
    there = {"slot": jnp.maximum(slot, 0), "when": slot >= 0}
    return dataclasses.replace(
        layer,
        packed=KV(
            k=_overwrite(layer.packed.k, packed.k[:, None], **there),
            v=_overwrite(layer.packed.v, packed.v[:, None], **there),
        ),
        packed_positions=_overwrite(
            layer.packed_positions,
            jnp.broadcast_to(first, (layer.packed_positions.shape[0], 1)),
            **there,
        ),
    )


def _settle(spec: MemorySpec, layer: LayerCache, selection: Selection) -> LayerCache:
    """`layer` with every packed key that was attended to left where it was turned to."""
    b, slots, p, n, h = layer.packed.k.shape
    attended = selection.slots[..., None] == jnp.arange(slots)[None, None]
    attended = attended & (selection.ids >= 0)[..., None]
    target = jnp.where(attended, selection.positions[..., None], 0.0).sum(axis=1)
    positions = jnp.where(attended.any(axis=1), target, layer.packed_positions)
    turn = rope.time_angles(jnp.repeat(positions - layer.packed_positions, p, axis=1), spec)
    keys = rope.rotate(layer.packed.k.reshape(b, slots * p, n, h), turn)
    packed = KV(k=keys.reshape(layer.packed.k.shape), v=layer.packed.v)
    return dataclasses.replace(layer, packed=packed, packed_positions=positions)


def reposition(spec: MemorySpec, layout: Layout, layer: LayerCache) -> LayerCache:
    """`layer` with the keys of sink and recent frames at their positions in `layout`."""
    cfg = spec.cache
    s = spec.tokens_per_frame
    keys = layer.view.k
    if cfg.rope_adjustment == "incremental":
        turn = jnp.full(cfg.sink * s, layout.sink_position - layer.sink_position)
        sink = rope.rotate(keys[:, : cfg.sink * s], rope.time_angles(turn, spec))
        keys = jax.lax.dynamic_update_slice_in_dim(keys, sink, 0, axis=1)
    if spec.sink_moves:
        sink = rotated(spec, layer.sink, layout.sink_position + jnp.arange(cfg.sink))
        keys = jax.lax.dynamic_update_slice_in_dim(keys, sink, 0, axis=1)
    if spec.recent_moves:
        frames = layouts.recent_frames(layout, cfg.recent)
        for first in range(0, cfg.recent, cfg.chunk):
            part = frames[first : first + cfg.chunk]
            slot_in_ring = FIFO.slot_of(part[0] - layout.origin, cfg.recent)
            unrotated = jax.lax.dynamic_slice_in_dim(layer.recent, slot_in_ring, cfg.chunk, axis=1)
            new = rotated(spec, unrotated, layouts.frame_positions(cfg, layout, part))
            slot = layouts.frame_slots(cfg, layout, part[0])
            keys = jax.lax.dynamic_update_slice_in_dim(keys, new, slot * s, axis=1)
    view = KV(k=keys, v=layer.view.v)
    return dataclasses.replace(layer, view=view, sink_position=layout.sink_position)


def rotated(spec: MemorySpec, frames: Array, times: Float[Array, " frame"]) -> Heads:
    """Keys of whole frames [b, frame, s, n, h] as tokens, rotated in time."""
    b, _, s, n, h = frames.shape
    angles = rope.time_angles(jnp.repeat(times.astype(jnp.float32), s), spec)
    return rope.rotate(frames.reshape(b, -1, n, h), angles)


# Committing again


def latents_of(spec: MemorySpec, memory: Memory, frames: Array) -> Latent:
    """The latents of some of the newest `full_frames` frames, by their true numbers."""
    return jnp.take(memory.latents, FIFO.slot_of(frames, spec.cache.full_frames), axis=1)


def sink_of(spec: MemorySpec, view: KV) -> KV:
    """The sink's keys and values, as they lie in a view."""
    return jax.tree.map(lambda store: store[:, : spec.cache.sink * spec.tokens_per_frame], view)


def rewritten(spec: MemorySpec, memory: Memory, plan: layouts.Recache, own: PerLayer[KV]) -> Memory:
    """`memory` with the frames of a re-cache written anew, from their `own` keys and values [b, frame*s, n, h].

    Keys are rotated in space only. The other frames stay as they are, and so do the queries of recent blocks.
    """
    cfg = spec.cache
    layout = layouts.layout(cfg, plan.progress)
    behind = jnp.maximum(layout.start - layout.origin, 0)
    sink = layout.scene + jnp.arange(cfg.sink)
    view = jnp.concatenate([sink, layout.origin + FIFO.ids_in(behind, cfg.ring)])
    recent = layout.origin + FIFO.ids_in(behind, cfg.recent) if spec.recent_moves else sink[:0]

    def by_frame(store: Array) -> Array:
        return store.reshape(store.shape[0], -1, spec.tokens_per_frame, *store.shape[2:])

    def anew(store: Array, new: Array, frames: Array) -> Array:
        """`store` [b, slot, s, n, h], whose slots hold `frames`, from `new` where these were written anew."""
        at = frames - plan.frames[0]
        there = (at >= 0) & (at < len(plan.frames)) & jnp.take(plan.written, at, mode="clip")
        fresh = jnp.take(new, at, axis=1, mode="clip").astype(store.dtype)
        return jnp.where(there[None, :, None, None, None], fresh, store)

    def into_view(store: Array, new: Array) -> Array:
        whole = anew(by_frame(store[:, : spec.full_res]), new, view)
        flat = whole.reshape(len(whole), -1, *store.shape[2:])
        return jax.lax.dynamic_update_slice_in_dim(store, flat, 0, axis=1)

    def one(layer: LayerCache, own: KV) -> LayerCache:
        unrotated, values = by_frame(own.k), by_frame(own.v)
        times = layouts.frame_positions(cfg, layout, plan.frames)
        turned = by_frame(rotated(spec, unrotated, times))
        return dataclasses.replace(
            layer,
            view=KV(k=into_view(layer.view.k, turned), v=into_view(layer.view.v, values)),
            sink=anew(layer.sink, unrotated, sink[: layer.sink.shape[1]]),
            recent=anew(layer.recent, unrotated, recent),
        )

    layers = pytrees.over(one, memory.layers, own)
    return dataclasses.replace(memory, layers=layers, progress=plan.progress)


# Forgetting


def flush(spec: MemorySpec, memory: Memory) -> Memory:
    """`memory` with all forgotten but the sink: the next block is the first one behind it."""
    return _moved_on(spec, memory, layouts.flushed(spec.cache, memory.progress))


def cut(spec: MemorySpec, memory: Memory) -> Memory:
    """`memory` with all forgotten: the next block begins a scene and a sink of its own."""
    return _moved_on(spec, memory, layouts.cut(spec.cache, memory.progress))


def _moved_on(spec: MemorySpec, memory: Memory, progress: Progress) -> Memory:
    layout = layouts.layout(spec.cache, progress)
    layers = pytrees.over(lambda layer: reposition(spec, layout, layer), memory.layers)
    return dataclasses.replace(memory, layers=layers, progress=progress)


# Scratch


def strip_scratch(spec: MemorySpec, memory: Memory) -> Memory:
    """`memory` without what is laid down anew for each block: what has to be kept to go on from it."""

    def stripped(layer: LayerCache) -> LayerCache:
        return dataclasses.replace(
            layer, view=jax.tree.map(lambda x: x[:, : spec.full_res], layer.view)
        )

    return dataclasses.replace(memory, layers=pytrees.over(stripped, memory.layers))


def with_scratch(spec: MemorySpec, memory: Memory) -> Memory:
    """`memory` with room for all that a block sees."""

    def whole(layer: LayerCache) -> LayerCache:
        return dataclasses.replace(layer, view=with_room(spec, layer.view))

    return dataclasses.replace(memory, layers=pytrees.over(whole, memory.layers))


def with_room(spec: MemorySpec, view: KV) -> KV:
    """A view with room for all that a block sees."""
    missing = spec.room - view.k.shape[1]
    if missing == 0:
        return view
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))), view)


# Known clips


def layer_at(spec: MemorySpec, layout: Layout, full: KV, packed: KV) -> LayerCache:
    """One layer as commits would have left it, from all frames of a clip [b, frame, s, n, h] and all its packed blocks.

    Keys are rotated in space only; frames and blocks that do not exist yet may hold anything. Only what `view` reads
    is filled in.
    """
    cfg = spec.cache
    in_ring = layout.origin + FIFO.ids_in(jnp.maximum(layout.start - layout.origin, 0), cfg.ring)
    frames = jnp.concatenate([layout.scene + jnp.arange(cfg.sink), in_ring])
    written = jnp.maximum(layout.start - layout.origin, 0) // cfg.block
    blocks = layout.origin // cfg.block + cfg.evicts.ids_in(written, cfg.slots)

    def taken(store: Array, ids: Array) -> Array:
        return jnp.take(store, ids, axis=1, mode="clip")

    keys = rotated(spec, taken(full.k, frames), layouts.frame_positions(cfg, layout, frames))
    values = taken(full.v, frames)
    b, _, s, n, h = values.shape
    nothing = jnp.zeros((b, 0, s, n, h), keys.dtype)
    return LayerCache(
        view=KV(k=keys, v=values.reshape(b, -1, n, h)),
        packed=KV(k=taken(packed.k, blocks), v=taken(packed.v, blocks)),
        sink=nothing,
        recent=nothing,
        sink_position=layout.sink_position,
        packed_positions=jnp.zeros((b, 0)),
        queries=jnp.zeros((b, 0, n, h)),
    )


# As Self-Forcing counts and stores it


def export(spec: MemorySpec, memory: Memory) -> KV:
    """The frames held at full size [layer, b, k, n, h] in time order, keys rotated at true frames.

    Where recent frames move, only those that are seen; else also the oldest block, which is held one block longer.
    """
    cfg = spec.cache
    layout = layouts.layout(cfg, memory.progress)
    start, scene, origin = (int(x) for x in (layout.start, layout.scene, layout.origin))
    stored = cfg.recent if spec.recent_moves else cfg.ring
    sink = np.arange(scene, scene + int(layout.sink))
    frames = np.concatenate([sink, np.arange(max(origin, start - stored), max(origin, start))])
    slots = layouts.frame_slots(cfg, layout, jnp.asarray(frames))
    turn = jnp.asarray(frames) - layouts.frame_positions(cfg, layout, jnp.asarray(frames))
    angles = rope.time_angles(jnp.repeat(turn, spec.tokens_per_frame), spec)

    def one(layer: LayerCache) -> KV:
        def taken(store: Array) -> Heads:
            b, _, n, h = store.shape
            by_frame = store[:, : spec.full_res].reshape(b, -1, spec.tokens_per_frame, n, h)
            return by_frame[:, slots].reshape(b, -1, n, h)

        return KV(k=rope.rotate(taken(layer.view.k), angles), v=taken(layer.view.v))

    return pytrees.stack(pytrees.over(one, memory.layers))


def end_indices(spec: MemorySpec, memory: Memory) -> np.ndarray:
    """[tokens ever committed, tokens still held at full size], as Self-Forcing counts them."""
    frames = int(memory.num_blocks) * spec.cache.block
    return (
        np.asarray([frames, min(frames, spec.cache.sink + spec.cache.ring)]) * spec.tokens_per_frame
    )
