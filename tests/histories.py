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
from packforcing_jax.networks import rope
from packforcing_jax.policies import attention, selection
from packforcing_jax.types import KV

MEMORY = types.SimpleNamespace(cache=cache, rope=rope, selection=selection, view=view)
jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)  # compiling is what takes time


def experiment(cfg, **packing):
    """2 x 3 tokens a frame, 2 x 1 x 1 a packed block, no two rotary frequencies alike."""
    heads, pairs = 2, (3, 1, 2)
    packing = {"channels": (2, 2), "strides": ((2, 2, 1), (1, 1, 4)), **packing}
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


def stepper(exp, parts=MEMORY, *, stacked=False):
    """Jitted `step(memory, scratch, block of a story, gap) -> (what was seen, memory after)`."""
    frames = rope.grid(*(np.arange(size) for size in exp.grid), frames=exp.cache.block)

    def in_space(kv, places):
        return kv.replace(
            k=parts.rope.rotate(kv.k, parts.rope.space_angles(jnp.asarray(places), exp.dit))
        )

    def step(memory, scratch, block, gap):
        full, packed, q, lots = (shares(x, stacked=stacked) for x in block)
        seen = parts.cache.plan(exp.cache, memory.num_blocks, gap)
        recall = lambda *one: parts.view.recall(exp, seen, *one)  # noqa: E731
        views, looked = pytrees.unzip(pytrees.over(recall, memory.layers, q, lots, scratch))
        full = pytrees.over(lambda kv: in_space(kv, frames), full)
        packed = pytrees.over(lambda kv: in_space(kv, parts.cache.packed_places(exp)[1]), packed)
        after = parts.cache.commit(exp, memory, full, packed if exp.cache.top else None, looked)
        shown = types.SimpleNamespace(
            views=views, looked=looked, plan=seen, length=parts.cache.length(exp, seen)
        )
        return vars(shown), after

    return jit(step)


@functools.cache
def compiled(exp, stacked=False):
    """The one stepper that tests of the same memory share."""
    return stepper(exp, stacked=stacked)


@functools.cache
def looker(exp):
    """Jitted `look(what was seen, block of a story) -> [layer, b, q, n, h]`: what a block's queries see, in 32 bit."""
    frames = rope.grid(*(np.arange(size) for size in exp.grid), frames=exp.cache.block)

    def look(shown, block):
        full, _, q, _ = block
        angles = rope.time_angles(
            cache.current_places(exp, shown["plan"]), exp.dit
        ) + rope.space_angles(jnp.asarray(frames), exp.dit)

        def one(past, full, q):
            longer = view.extend(past, full.replace(k=rope.rotate(full.k, angles)), shown["length"])
            return attention.reference(
                rope.rotate(q, angles), longer.k, longer.v, shown["length"] + q.shape[1]
            )

        return jax.vmap(one)(shown["views"], full, q)

    return jit(look)


def block_of(story, number):
    """What one step gets: full and packed keys and values, queries, lots."""
    full, packed = (KV(k=k[number], v=v[number]) for k, v in (story.full, story.packed))
    return full, packed, story.q[number], story.lots[number]


def check_places(exp, seen, plan):
    for name in ("sink_at", "mid_at", "recent_at", "current_at", "step"):
        np.testing.assert_allclose(plan[name], vars(seen)[name], atol=1e-4, err_msg=name)
    sizes = {
        "sink": len(seen.sink),
        "recent": len(seen.recent),
        "chosen": seen.count,
        "start": seen.start,
    }
    assert {name: int(plan[name]) for name in sizes} == sizes
    assert sorted(i for i in plan["ids"].tolist() if i >= 0) == seen.archive


def check_choice(exp, seen, looked, points):
    """The best blocks by the slow memory's `points` in time order, up to what 32 bit cannot tell apart."""
    ids, count = looked.ids, seen.count
    assert (ids[..., count:] == -1).all()
    assert (np.diff(ids[..., :count], axis=-1) > 0).all()
    assert np.isin(ids[..., :count], seen.archive).all()
    if not count:
        return
    taken = (np.asarray(seen.archive) == ids[..., :count, None]).any(axis=2)
    slack = 1e-4 * np.abs(points).max()
    worst, passed = (
        np.where(taken, points, np.inf).min(-1),
        np.where(taken, -np.inf, points).max(-1),
    )
    assert (worst >= passed - slack).all()
    ranks = np.searchsorted(seen.archive, ids[..., :count])
    np.testing.assert_allclose(
        looked.scores[..., :count], np.take_along_axis(points, ranks, -1), atol=slack, rtol=1e-3
    )
    begin = slow_memory.begins(exp.cache, seen, ids[..., :count])
    np.testing.assert_allclose(looked.at[..., :count], begin, atol=1e-4)


def check_view(exp, story, seen, shown):
    """Which contents are seen at which places; the valid ones first, with room for the block and its twin."""
    k, v = slow_memory.view(exp, story, seen, shown["looked"].ids[..., : seen.count])
    length, room = int(shown["length"]), shown["views"].k.shape[2]
    own = exp.cache.block * exp.tokens_per_frame + (
        exp.tokens_per_packed_block if exp.cache.top else 0
    )
    assert length == k.shape[2]
    np.testing.assert_array_equal(shown["views"].v[:, :, :length], v)
    np.testing.assert_allclose(shown["views"].k[:, :, :length], k, atol=1e-4)
    assert room >= length + own
    assert room % exp.cache.key_multiple == 0


def check_commit(cfg, number, before, after):
    """Only the block's own frames and its packed twin were written, into as many places."""
    late = (np.arange(number * cfg.block, (number + 1) * cfg.block) >= cfg.sink).sum()
    packed = int(cfg.top > 0 and number * cfg.block >= cfg.sink)
    written = {"sink": cfg.block - late, "recent": min(late, cfg.ring), "mid": packed}
    for store, count in written.items():
        for x in "v" if cfg.rope_adjustment == "incremental" else "kv":
            old, new = (getattr(vars(memory.layers)[store], x) for memory in (before, after))
            assert old.shape == new.shape
            assert (old != new).any(axis=(0, 1, 3, 4, 5)).sum() == count, store
    assert after.num_blocks == number + 1


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


def check_history(exp, story, step, gap=0.0, *, parts=MEMORY, stacked=False):
    """Runs a story of many videos and checks every step against the slow memory; what happened, counted."""
    blocks, videos, tally = len(story.q), story.q.shape[2], collections.Counter()
    memory, old, before = parts.cache.init(exp, videos, stacked=stacked), None, None
    scratch = parts.view.scratch(exp, videos)
    scratch = jax.tree.map(
        lambda x: jnp.asarray(np.full_like(x, np.nan)), stack(scratch) if stacked else scratch
    )
    for number in range(blocks):
        shown, memory = step(memory, scratch, block_of(story, number), gap)
        scratch = shown["views"]
        shown = jax.tree.map(np.asarray, {name: stack(part) for name, part in shown.items()})
        seen, ids = slow_memory.visible(exp.cache, number, gap), shown["looked"].ids
        check_places(exp, seen, vars(shown["plan"]))
        points = slow_memory.scores(exp, story, seen, story.q[number], story.lots[number])
        check_choice(exp, seen, shown["looked"], points)
        check_view(exp, story, seen, shown)
        new = jax.tree.map(np.asarray, memory.replace(layers=stack(memory.layers)))
        if old is not None:
            check_commit(exp.cache, number, old, new)
        tally.update(happened(exp.cache, seen, ids, before))
        old, before = new, ids
    return tally
