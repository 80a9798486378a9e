"""Single tokens of the past, which each layer chooses for itself when its window is full (Deep Forcing).

A window holds the sink, what was chosen, and recent frames in this order, valid keys first. One that the next block
would make too long is compressed to a budget of frames: the sink and the newest frames stay whole, and of everything
between them the tokens stay that recent queries score highest. The others are lost.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from packforcing_jax.config import MemorySpec
from packforcing_jax.memory import cache
from packforcing_jax.memory import layout as layouts
from packforcing_jax.memory.cache import LayerCache, Tokens
from packforcing_jax.memory.layout import Compression, Layout
from packforcing_jax.networks import rope
from packforcing_jax.types import KV, Heads, Length


@struct.dataclass
class Chosen:
    """What one layer chose from; zeros where its window was not full."""

    scores: Array  # [b, candidate] of the tokens behind the sink; what it says of recent ones means nothing
    slots: Array  # [b, chosen] where the chosen ones lay in the window, in order


def record(layer: LayerCache) -> Tokens:
    """What the layer knows of its tokens."""
    assert isinstance(layer.tokens, Tokens)
    return layer.tokens


def end(spec: MemorySpec, layout: Layout) -> Length:
    """Where in the window the current block lies: behind all that it sees."""
    return (layout.sink + layout.chosen + layout.recent) * spec.tokens_per_frame


def asked(spec: MemorySpec, layout: Layout, layer: LayerCache, q: Heads) -> LayerCache:
    """`layer` with the current block's queries [b, block*s, n, h], without positions, behind those that it keeps."""
    tokens = record(layer)
    count = tokens.queries.shape[1]
    if count == 0:
        return layer
    frames = q.shape[1] // spec.tokens_per_frame
    grid = rope.grid(*(np.arange(size) for size in spec.grid), frames=frames)
    in_time = rope.time_angles(layouts.current_times(spec, layout, frames), spec)
    rotated = rope.rotate(q, in_time + rope.space_angles(jnp.asarray(grid), spec))
    by_frame = rotated.reshape(len(q), frames, spec.tokens_per_frame, *q.shape[2:])
    kept = spec.cache.fuses.keeps(by_frame.astype(jnp.float32)).reshape(len(q), -1, *q.shape[2:])
    queries = jnp.concatenate([tokens.queries, kept], axis=1)[:, -count:]
    return dataclasses.replace(layer, tokens=dataclasses.replace(tokens, queries=queries))


def compressed(
    spec: MemorySpec, layout: Layout, now: Compression, layer: LayerCache
) -> tuple[LayerCache, Chosen]:
    """`layer` with its window compressed to the budget, if that is due, and what it chose from."""
    batch = len(layer.view.k)
    tokens = spec.cache.chosen * spec.tokens_per_frame
    nothing = Chosen(
        scores=jnp.zeros((batch, spec.candidates)), slots=jnp.zeros((batch, tokens), jnp.int32)
    )
    view, known, chosen = jax.lax.cond(
        now.due,
        lambda: _compress(spec, layout, now, layer.view, record(layer)),
        lambda: (layer.view, record(layer), nothing),
    )
    return dataclasses.replace(layer, view=view, tokens=known), chosen


def _compress(
    spec: MemorySpec, layout: Layout, now: Compression, view: KV, known: Tokens
) -> tuple[KV, Tokens, Chosen]:
    s = spec.tokens_per_frame
    sink, tokens = spec.cache.sink * s, spec.cache.chosen * s
    whole = (spec.cache.budget_recent - spec.cache.block) * s  # besides the current block
    scores, slots = _choose(spec, now.held * s - whole, view.k, known)
    newest = now.held * s - whole + jnp.arange(whole)
    order = jnp.concatenate([slots, jnp.broadcast_to(newest, (len(slots), whole))], axis=1)

    def packed(store: Array) -> Array:
        places = order.reshape(*order.shape, *(1,) * (store.ndim - 2))
        taken = jnp.take_along_axis(store, places, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(store, taken, sink, axis=1)

    between = slice(sink, sink + tokens)
    known = Tokens(
        ids=packed(known.ids),
        positions=packed(known.positions),
        counts=packed(known.counts).at[:, between].add(1),
        queries=known.queries,
    )
    view = jax.tree.map(packed, view)
    before = known.positions[:, between]
    positions = _positions(spec, layout, now, before)
    keys = rope.rotate(view.k[:, between], rope.time_angles(positions - before, spec))
    view = KV(k=view.k.at[:, between].set(keys), v=view.v)
    known = dataclasses.replace(known, positions=known.positions.at[:, between].set(positions))
    return view, known, Chosen(scores=scores, slots=slots)


def _choose(spec: MemorySpec, until: Length, keys: Heads, known: Tokens) -> tuple[Array, Array]:
    """(scores [b, candidate] of what follows the sink, slots [b, chosen] of the best before slot `until`, in order).

    Tokens that were chosen as often as they may be come last.
    """
    cfg = spec.cache
    if cfg.chosen == 0:
        return jnp.zeros((len(keys), 0)), jnp.zeros((len(keys), 0), jnp.int32)
    first = cfg.sink * spec.tokens_per_frame
    slots = first + jnp.arange(spec.candidates)
    candidates = slice(first, first + spec.candidates)
    scale = spec.head_dim**-0.5 / spec.heads
    scores = cfg.fuses.score(known.queries, keys[:, candidates]) * scale
    may = known.counts[:, candidates] < cfg.reuse_limit if cfg.reuse_limit else True
    ranked = jnp.where(may, scores, jnp.finfo(scores.dtype).min)
    ranked = jnp.where(slots < until, ranked, -jnp.inf)
    best = jax.lax.top_k(ranked, cfg.chosen * spec.tokens_per_frame)[1]
    return scores, first + jnp.sort(best, axis=1)


def _positions(spec: MemorySpec, layout: Layout, now: Compression, before: Array) -> Array:
    """Where the chosen tokens [b, token] go from the positions `before`: each place that they may go to by name."""
    cfg = spec.cache
    row = jnp.arange(before.shape[1]) // spec.tokens_per_frame
    first = layout.start - cfg.budget_recent - cfg.chosen
    to = {
        "none": before,
        "token": jnp.broadcast_to(first + row, before.shape),
        "segment": before + now.mid_moves,
    }
    return to[cfg.token_positions].astype(before.dtype)


def committed(
    spec: MemorySpec, now: Layout, following: Layout, layer: LayerCache, keys: Heads
) -> LayerCache:
    """`layer`, in whose view the current block lies, with these tokens known and all at their next positions.

    `keys` [b, block*s, n, h] are those of the block, rotated in space only.
    """
    layer = cache.keep_unrotated(spec, now, layer, keys)
    layer = cache.reposition(spec, following, layer)
    s, known = spec.tokens_per_frame, record(layer)
    at, count = end(spec, now), keys.shape[1]

    def laid(store: Array, new: Array, slot: Length | int) -> Array:
        new = jnp.broadcast_to(new, (len(store), len(new))).astype(store.dtype)
        return jax.lax.dynamic_update_slice_in_dim(store, new, slot, axis=1)

    positions = laid(known.positions, layouts.current_times(spec, now, count // s), at)
    sink = following.sink_position + jnp.arange(spec.cache.sink * s) // s
    known = dataclasses.replace(
        known,
        ids=laid(known.ids, now.start * s + jnp.arange(count), at),
        positions=laid(positions, sink, 0),
        counts=laid(known.counts, jnp.zeros(count), at),
    )
    return dataclasses.replace(layer, tokens=known)
