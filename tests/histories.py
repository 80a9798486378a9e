"""The memory taken through a history step by step, beside the slow one that says what each step must show."""

import collections
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import slow_memory

from packforcing_jax import pytrees
from packforcing_jax.config import CompressorConfig, DiTConfig, Experiment, SpaceToDepthConfig
from packforcing_jax.memory import cache, view
from packforcing_jax.memory import layout as layouts
from packforcing_jax.networks import rope
from packforcing_jax.policies import attention
from packforcing_jax.sampling import block_step
from packforcing_jax.types import KV

jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)  # compiling is what takes time


def experiment(cfg, **packing):
    """2 x 3 tokens a frame, 2 x 1 x 1 a packed block, no two rotary frequencies alike."""
    heads = 2
    pairs = (3, 1, 2)
    packing = {
        "channels": (2, 2),
        "strides": ((2, 2, 1), (1, 1, 4)),
        "pool": (8, 1, 1),
        "branches": "lr",
        **packing,
    }
    return Experiment(
        name="numbered",
        latent=(2, 6),
        cache=cfg,
        codec=SpaceToDepthConfig(factor=1),
        dit=DiTConfig(
            dim=heads * 2 * sum(pairs),
            heads=heads,
            layers=2,
            in_channels=3,
            out_channels=3,
            patch=(1, 1, 2),
            rope_pairs=pairs,
            rope_theta=(100.0, 20.0, 7.0),
        ),
        compressor=CompressorConfig(**packing),
    )


def shares(x, *, stacked):
    """[layer, ...] as the memory holds what there is per layer."""
    return x if stacked else pytrees.unstack(x, len(jax.tree.leaves(x)[0]))


def stack(layers):
    """What there is per layer with a leading layer axis, on the host."""
    return (
        jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
        if isinstance(layers, list)
        else layers
    )


def empty(exp, videos, dtype=jnp.float32, *, stacked=False):
    """An empty memory, not a number wherever nothing was written into a view."""
    memory = cache.init(exp.memory, videos, dtype, stacked=stacked)
    nothing = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), block_step.views_of(memory))
    return block_step.with_views(memory, nothing)


def block_grid(exp):
    """Grid positions of a block's tokens at full size."""
    return rope.grid(*(np.arange(size) for size in exp.grid), frames=exp.cache.block)


def in_space(exp, kv, grid):
    """Keys turned to positions on the grid alone, as the memory takes them."""
    return kv.replace(k=rope.rotate(kv.k, rope.space_angles(jnp.asarray(grid), exp.dit)))


def stepper(exp, *, stacked=False):
    """Jitted `step(memory, block of a story, gap) -> (what was seen, memory after)`; what is seen holds the block."""
    spec = exp.memory

    def step(memory, block, gap):
        *per_layer, latent = block
        full, packed, q, random = (shares(x, stacked=stacked) for x in per_layer)
        layout = layouts.layout(exp.cache, memory.progress, gap)
        now = rope.time_angles(layouts.current_times(spec, layout, exp.cache.block), spec)

        def look_back(layer, q, random, own):
            recalled, selection = view.recall(spec, layout, layer, q, random)
            own = own.replace(k=rope.rotate(own.k, now))
            return cache.write_block(spec, layout, recalled, own), selection

        def keep_asked(layer, q):
            total = view.sum_queries(spec, slow_memory.clean_queries(q))
            return cache.keep_queries(layout, layer, total)

        full = pytrees.over(lambda kv: in_space(exp, kv, block_grid(exp)), full)
        packed = pytrees.over(
            lambda kv: in_space(exp, kv, layouts.packed_positions(spec)[1]), packed
        )
        views, selection = pytrees.unzip(pytrees.over(look_back, memory.layers, q, random, full))
        after = cache.commit(
            spec,
            block_step.with_views(memory, views),
            latent,
            full,
            packed if exp.cache.top else None,
            selection,
            gap,
        )
        after = after.replace(layers=pytrees.over(keep_asked, after.layers, q))
        shown = types.SimpleNamespace(
            views=views, selection=selection, layout=layout, length=layouts.length(spec, layout)
        )
        return vars(shown), after

    return jit(step)


@functools.cache
def compiled(exp, stacked=False):
    """The one stepper that tests of the same memory share."""
    return stepper(exp, stacked=stacked)


@functools.cache
def forgetter(exp, event):
    """Jitted `cut` or `flush` of a memory."""
    return jit(lambda memory: getattr(cache, event)(exp.memory, memory))


@functools.cache
def looker(exp):
    """Jitted `look(what was seen, block of a story) -> [layer, b, q, n, h]`: what a block's queries see, in 32 bit."""

    def look(shown, block):
        angles = rope.time_angles(
            layouts.current_times(exp.memory, shown["layout"], exp.cache.block), exp.dit
        ) + rope.space_angles(jnp.asarray(block_grid(exp)), exp.dit)

        def one(view, q):
            return attention.reference(rope.rotate(q, angles), view.k, view.v, shown["length"])

        return jax.vmap(one)(shown["views"], block[2])

    return jit(look)


def block_of(story, number):
    """What one step gets: full and packed keys and values, queries, random scores, latents."""
    full, packed = (KV(k=k[number], v=v[number]) for k, v in (story.full, story.packed))
    return full, packed, story.q[number], story.random[number], story.latent[number]


def check_layout(seen, layout):
    for name in ("sink_position", "mid_position", "recent_position", "current_position", "step"):
        np.testing.assert_allclose(layout[name], vars(seen)[name], atol=1e-4, err_msg=name)
    sizes = {
        "sink": len(seen.sink),
        "recent": len(seen.recent),
        "num_selected": seen.count,
        "start": seen.start,
    }
    assert {name: int(layout[name]) for name in sizes} == sizes
    assert sorted(i for i in layout["ids"].tolist() if i >= 0) == seen.archive
    assert layout["ids"][seen.slots].tolist() == seen.archive


def check_choice(exp, seen, selection, points):
    """The best blocks by the slow memory's `points` in time order, up to what 32 bit cannot tell apart."""
    ids = selection.ids
    count = seen.count
    assert (ids[..., count:] == -1).all()
    assert (np.diff(ids[..., :count], axis=-1) > 0).all()
    assert np.isin(ids[..., :count], seen.archive).all()
    if not count:
        return
    taken = (np.asarray(seen.archive) == ids[..., :count, None]).any(axis=2)
    slack = 1e-4 * np.abs(points).max()
    worst = np.where(taken, points, np.inf).min(-1)
    passed = np.where(taken, -np.inf, points).max(-1)
    assert (worst >= passed - slack).all()
    ranks = np.searchsorted(seen.archive, ids[..., :count])
    np.testing.assert_allclose(
        selection.scores[..., :count], np.take_along_axis(points, ranks, -1), atol=slack, rtol=1e-3
    )
    begin = slow_memory.begins(exp.cache, seen, ids[..., :count])
    np.testing.assert_allclose(selection.positions[..., :count], begin, atol=1e-4)


def in_order_of(v, shown):
    """The keys and values [layer, b, k, n, h] that are seen, in the order in which their values stand in `v`."""
    count = int(shown["length"])
    ours = [np.asarray(getattr(shown["views"], x)[:, :, :count], np.float64) for x in "kv"]
    assert ours[1].shape == v.shape
    by_value = lambda v: np.lexsort(np.moveaxis(v.reshape(*v.shape[:3], -1), -1, 0), axis=-1)  # noqa: E731
    theirs, mine = (order[..., None, None] for order in (by_value(v), by_value(ours[1])))
    found = [np.empty_like(x) for x in ours]
    for x, there in zip(ours, found, strict=True):
        np.put_along_axis(there, theirs, np.take_along_axis(x, mine, axis=2), axis=2)
    return found


def valid(shown):
    """The keys and values of a view that are seen, as they lie."""
    count = int(shown["length"])
    return shown["views"].k[:, :, :count], shown["views"].v[:, :, :count]


def check_view(exp, story, seen, shown, atol=1e-4):
    """Which contents are seen at which positions, the block's own among them; they come first, in any order."""
    k, v = slow_memory.view(exp, story, seen, shown["selection"].ids[..., : seen.count])
    ours, values = in_order_of(v, shown)
    np.testing.assert_array_equal(values, v)
    np.testing.assert_allclose(ours, k, atol=atol)
    room = shown["views"].k.shape[2]
    assert room >= k.shape[2] + (exp.tokens_per_packed_block if exp.cache.top else 0)
    assert room % exp.cache.key_multiple == 0


def changed(old, new, *, axis):
    """How many entries along `axis` of [layer, b, ...] differ; not a number is like itself."""
    assert old.shape == new.shape
    same = (old == new) | (np.isnan(old) & np.isnan(new))
    return int((~same).any(axis=tuple(i for i in range(old.ndim) if i != axis)).sum())


def check_commit(exp, story, seen, before, after):
    """Only the block's frames and its packed twin were written, into as many slots, and what is behind what is seen."""
    cfg = exp.cache
    spec = exp.memory
    rule = exp.cache.rope_adjustment
    late = sum(frame >= seen.behind for frame in range(seen.start, seen.start + cfg.block))
    item = (seen.start - seen.behind) // cfg.block
    kept = int(cfg.top > 0 and item >= 0 and cfg.evicts.slot_of(item, cfg.slots) >= 0)
    old = before.layers
    new = after.layers
    counts = {
        "packed values": (old.packed.v, new.packed.v, kept),
        "sink": (old.sink, new.sink, cfg.block - late if spec.sink_moves else 0),
        "recent": (old.recent, new.recent, min(late, cfg.recent) if spec.recent_moves else 0),
    }
    if rule != "incremental":
        counts["packed keys"] = (old.packed.k, new.packed.k, kept)
    for name, (was, now, count) in counts.items():
        assert changed(was, now, axis=2) == count, name
    assert changed(before.latents, after.latents, axis=1) == cfg.block
    sink, recent = (v for _, v in slow_memory.both_ends(exp, story, seen))
    stay = {"none": (sink, recent), "sink": (sink,)}.get(rule, ())
    for store, kept in (("v", (sink, recent)), ("k", stay)):
        numbers = np.concatenate([np.zeros((*sink.shape[:2], 0)), *(v[..., 0, 0] for v in kept)], 2)
        where = (old.view.v[..., 0, 0][..., None] == numbers[:, :, None]).any(-1)
        assert where.sum() == numbers.size
        was, now = (getattr(part.view, store) for part in (old, new))
        np.testing.assert_array_equal(was[where], now[where], err_msg=store)
    assert after.num_blocks == before.num_blocks + 1


def check_latents(exp, story, memory):
    """The latents of the newest frames, as many as are at full size, are those committed."""
    size = exp.cache.block
    blocks = int(memory.num_blocks)
    for block in range(max(0, blocks - exp.cache.full_frames // size), blocks):
        frames = block * size + np.arange(size)
        latent = cache.latents_of(exp.memory, memory, jnp.asarray(frames))
        np.testing.assert_array_equal(latent, story.latent[block])


def happened(cfg, seen, ids, before):
    """What makes this step hard: drops inside the row, blocks seen again, squeezed rows, a full archive, a gap."""
    ids = ids[..., : seen.count]
    tally = collections.Counter(
        {"gap": seen.gap > 0, "past capacity": len(seen.middle) > len(seen.archive)}
    )
    if seen.count:
        tally["squeezed"] = seen.step < cfg.block
        tally["dropped inside"] = int((ids[..., -1] - ids[..., 0] >= seen.count).sum())
        unseen = (ids[..., None] != before[..., None, :]).all(-1)
        tally["seen again"] = int((unseen & (ids < seen.archive[-1])).sum())
    return tally


def check_history(exp, story, step, gap=0.0, *, stacked=False, events=None):
    """Runs a story of many videos and checks every step against the slow memory; what happened, counted.

    `events` says before which blocks there is a "cut" or a "flush".
    """
    blocks = len(story.q)
    videos = story.q.shape[2]
    tally = collections.Counter()
    memory = empty(exp, videos, stacked=stacked)
    before = None
    scene = first = 0
    on_host = lambda memory: jax.tree.map(np.asarray, memory.replace(layers=stack(memory.layers)))  # noqa: E731
    for number in range(blocks):
        if event := (events or {}).get(number):
            memory = forgetter(exp, event)(memory)
            scene = number if event == "cut" else scene
            first = number
            tally[event] += videos
        old = on_host(memory)
        shown, memory = step(memory, block_of(story, number), gap)
        shown = jax.tree.map(np.asarray, {name: stack(part) for name, part in shown.items()})
        seen = slow_memory.visible(exp.cache, number, gap, scene, first)
        ids = shown["selection"].ids
        check_layout(seen, vars(shown["layout"]))
        points = slow_memory.scores(exp, story, seen, story.q[number], story.random[number])
        check_choice(exp, seen, shown["selection"], points)
        check_view(exp, story, seen, shown)
        check_commit(exp, story, seen, old, on_host(memory))
        check_latents(exp, story, memory)
        tally.update(happened(exp.cache, seen, ids, before))
        before = ids
    return tally
