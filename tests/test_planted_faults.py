"""Faults planted in the memory, one at a time: the check that every history passes must catch each of them."""

import dataclasses
from collections.abc import Callable

import histories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow_memory

from packforcing_jax.config import CacheConfig, MemorySpec
from packforcing_jax.memory import cache, view
from packforcing_jax.memory import layout as layouts
from packforcing_jax.networks import rope
from packforcing_jax.policies import selection
from packforcing_jax.policies.eviction import FIFO, Eviction

BASE = {"block": 2, "sink": 4, "recent": 2, "top": 2, "capacity": 4, "score_pool": (2, 1, 2)}
KINDS = {
    "affinity": CacheConfig(**BASE),
    "true frames": CacheConfig(**BASE, selection="paper_sum", rope_adjustment="none"),
    "squeezed": CacheConfig(**BASE, selection="random", span="fit", max_position=11),
    "long ring": CacheConfig(**{**BASE, "recent": 4}, selection="recency"),
    "incremental": CacheConfig(
        **{**BASE, "top": 4, "capacity": 9}, selection="random", rope_adjustment="incremental"
    ),
    "sink alone": CacheConfig(**BASE, selection="random", rope_adjustment="sink_only"),
    "asking": CacheConfig(**{**BASE, "recent": 4}, selection="paper", query_stride=5),
}
FAULTS: dict[str, tuple[str, Callable]] = {}  # what is wrong: the kind of memory it shows in, how


def fault(name, kind):
    """Registers a function that plants fault `name` by `monkeypatch`."""

    def register(plant):
        FAULTS[name] = kind, plant
        return plant

    return register


def wrap(patch, module, name, changed):
    """Replaces `module.name` by `changed(original, *args)`."""
    original = getattr(module, name)
    patch.setattr(module, name, lambda *args, **kw: changed(original, *args, **kw))


def wrap_layout(patch, changed):
    """What is laid out, changed by `changed(cfg, layout) -> fields`."""

    def wrong(original, cfg, progress, gap=0.0):
        found = original(cfg, progress, gap)
        return found.replace(**changed(cfg, found))

    wrap(patch, layouts, "layout", wrong)


# Where things stand in time


@fault("packed blocks one frame late", "affinity")
def _(patch):
    wrap(
        patch,
        view,
        "select",
        lambda original, spec, layout, scores: original(
            spec, layout.replace(mid_position=layout.mid_position + 1), scores
        ),
    )


@fault("the current block's position ignores recent", "affinity")
def _(patch):
    wrap_layout(
        patch, lambda cfg, found: {"current_position": found.current_position - found.recent}
    )


@fault("a sink that stays behind", "sink alone")
def _(patch):
    wrap_layout(patch, lambda cfg, found: {"sink_position": jnp.zeros_like(found.sink_position)})


@fault("the sink's keys not turned along", "sink alone")
def _(patch):
    patch.setattr(MemorySpec, "sink_moves", property(lambda spec: False))


@fault("recent keys left where they were first", "long ring")
def _(patch):
    patch.setattr(MemorySpec, "recent_moves", property(lambda spec: False))


@fault("keys of recent frames one frame late", "affinity")
def _(patch):
    def wrong(original, cfg, layout, frames):
        return original(cfg, layout, frames) + (frames >= layout.origin)

    wrap(patch, layouts, "frame_positions", wrong)


@fault("the span not fitted", "squeezed")
def _(patch):
    wrap(
        patch,
        layouts,
        "layout",
        lambda original, cfg, *args: original(dataclasses.replace(cfg, span="true"), *args),
    )


@fault("a squeezed block whose frames are not", "squeezed")
def _(patch):
    def wrong(original, spec, layout, gathered, chosen):
        return original(spec, layout.replace(step=jnp.float32(spec.cache.block)), gathered, chosen)

    wrap(patch, view, "_positioned", wrong)


@fault("packed tokens on a grid of their own", "affinity")
def _(patch):
    def wrong(original, spec):
        native = dataclasses.replace(spec, packed_position_rule="native")
        return original(native)

    wrap(patch, layouts, "packed_positions", wrong)


# Which slot holds what


def _late_slot(item, size):
    return FIFO.slot_of(item + 1, size)


@fault("packed blocks in the wrong slot", "affinity")
def _(patch):
    wrap(
        patch,
        layouts,
        "packed_slot",
        lambda original, cfg, layout: _late_slot(original(cfg, layout), cfg.slots),
    )


@fault("the recent ring read from the wrong frame", "long ring")
def _(patch):
    wrap(patch, layouts, "recent_frames", lambda original, cfg, layout: original(cfg, layout) + 1)


@fault("a ring that is not filled from its first slot on", "long ring")
def _(patch):
    def wrong(item, size):
        return (item + 2) % size if size == 6 else item % size

    for module in (cache, layouts):
        patch.setattr(module, "FIFO", Eviction("fifo", wrong, FIFO.ids_in))


@fault("the sink overwritten late", "affinity")
def _(patch):
    def wrong(original, cfg, layout, frames):
        late = (layout.start >= 4) & (layout.start < 6)
        return jnp.where(late, frames - layout.start, original(cfg, layout, frames))

    wrap(patch, layouts, "frame_slots", wrong)


@fault("a packed block visible one block early", "affinity")
def _(patch):
    def wrong(cfg, origin, written, recent):
        held = cfg.evicts.ids_in(written, cfg.slots)
        early = written - recent // cfg.block + 1
        visible = (held >= 0) & (held < early)
        return jnp.where(visible, held + origin, -1), visible.sum()

    patch.setattr(layouts, "_visible", wrong)


@fault("the oldest block dropped one too soon", "long ring")
def _(patch):
    def wrong(original, cfg, origin, written, recent):
        ids, _ = original(cfg, origin, written, recent)
        ids = jnp.where(ids - origin < written - cfg.slots + 1, -1, ids)
        return ids, (ids >= 0).sum()

    wrap(patch, layouts, "_visible", wrong)


@fault("the archive counted from the video's first block", "affinity")
def _(patch):
    wrap(
        patch,
        layouts,
        "_visible",
        lambda original, cfg, origin, *rest: original(cfg, 0 * origin, *rest),
    )


@fault("frames before a flush still seen", "affinity")
def _(patch):
    def wrong(original, cfg, progress, gap=0.0):
        return original(cfg, progress.replace(first_visible=progress.scene_start), gap)

    wrap(patch, layouts, "layout", wrong)


@fault("a cut that keeps the sink", "affinity")
def _(patch):
    patch.setattr(cache, "cut", cache.flush)


@fault("keys and values of the block swapped", "affinity")
def _(patch):
    wrap(
        patch,
        cache,
        "write_block",
        lambda original, spec, layout, whole, own: original(
            spec, layout, whole, own.replace(k=own.v, v=own.k)
        ),
    )


@fault("latents of recent frames one block old", "affinity")
def _(patch):
    wrap(
        patch,
        cache,
        "advanced",
        lambda original, spec, memory, latent: original(spec, memory, latent - spec.cache.block),
    )


# What is chosen


@fault("a selection that is one block old", "affinity")
def _(patch):
    wrap(
        patch,
        selection,
        "choose",
        lambda original, scores, ids, keep: original(
            scores, jnp.where(ids < ids.max(), ids, -1), keep
        ),
    )


@fault("a selection that never asked", "affinity")
def _(patch):
    wrap(
        patch,
        view,
        "select",
        lambda original, spec, layout, scores: original(
            spec, layout, jnp.broadcast_to(layout.ids.astype(jnp.float32)[None], scores.shape)
        ),
    )


@fault("blocks chosen that are not visible", "sink alone")
def _(patch):
    def wrong(original, scores, ids, keep):
        slots, chosen, best = original(scores, jnp.maximum(ids, 0), keep)
        return slots, ids[slots], best

    wrap(patch, selection, "choose", wrong)


@fault("attended blocks not in time order", "affinity")
def _(patch):
    def wrong(original, scores, ids, keep):
        found = original(scores, ids, keep)
        order = jnp.argsort(-found[2], axis=-1)
        return tuple(jnp.take_along_axis(x, order, axis=-1) for x in found)

    wrap(patch, selection, "choose", wrong)


@fault("packed keys not turned", "affinity")
def _(patch):
    wrap(
        patch,
        view,
        "_positioned",
        lambda original, spec, layout, gathered, chosen: jax.tree.map(
            lambda x: x.reshape(x.shape[0], -1, *x.shape[-2:]), gathered.kv
        ),
    )


@fault("packed keys scored in another place", "affinity")
def _(patch):
    def wrong(original, spec, layout, *args):
        return original(spec, layout.replace(mid_position=layout.mid_position + layout.step), *args)

    wrap(patch, view, "score_inputs", wrong)


@fault("packed keys summed at other frames", "true frames")
def _(patch):
    def wrong(original, spec, layout, *args):
        return original(spec, layout.replace(start=layout.recent), *args)

    wrap(patch, view, "score_inputs", wrong)


@fault("queries pooled off their windows' centres", "affinity")
def _(patch):
    wrap(
        patch,
        view,
        "_pool_angles",
        lambda original, spec, layout: original(
            spec, layout.replace(current_position=layout.current_position + 0.5)
        ),
    )


@fault("scores that count the wrong keys", "affinity")
def _(patch):
    def wrong(original, *args):
        found = original(*args)
        return found.replace(full_res_valid=tuple(~valid for valid in found.full_res_valid))

    wrap(patch, view, "score_inputs", wrong)


@fault("the keys of recent frames left out of the scores", "affinity")
def _(patch):
    wrap(
        patch,
        view,
        "_recent_keys",
        lambda original, spec, layout, keys: jnp.zeros_like(original(spec, layout, keys)),
    )


@fault("the first head asked for all", "affinity")
def _(patch):
    wrap(patch, view, "_head", lambda original, tree, head: original(tree, 0 * head))


@fault("heads added up that should be compared", "affinity")
def _(patch):
    wrong = dataclasses.replace(selection.SCORES["affinity"], across_heads=jnp.max)
    patch.setitem(selection.SCORES, "affinity", wrong)


# Rotation


@fault("the wrong sign of rotation", "affinity")
def _(patch):
    wrap(patch, rope, "rotate", lambda original, x, angles: original(x, -angles))


@fault("rows turned as columns", "affinity")
def _(patch):
    wrap(patch, rope, "space_angles", lambda original, grid, cfg: original(grid[:, ::-1], cfg))


@fault("a turned key remembered where it was", "incremental")
def _(patch):
    wrap(
        patch,
        cache,
        "_settle",
        lambda original, spec, layer, chosen: original(spec, layer, chosen).replace(
            packed_positions=layer.packed_positions
        ),
    )


@fault("keys never turned back", "incremental")
def _(patch):
    def wrong(original, spec, layer, chosen):
        stored = jnp.take_along_axis(layer.packed_positions, chosen.slots, axis=1)
        return original(
            spec, layer, chosen.replace(positions=jnp.maximum(chosen.positions, stored))
        ).replace(packed_positions=original(spec, layer, chosen).packed_positions)

    wrap(patch, cache, "_settle", wrong)


@fault("the sink's keys turned twice", "incremental")
def _(patch):
    def wrong(original, spec, layout, layer):
        return original(spec, layout, layer).replace(sink_position=layer.sink_position)

    wrap(patch, cache, "reposition", wrong)


# Who asks


@fault("recent blocks ask at the current block's frames", "asking")
def _(patch):
    wrap(
        patch,
        view,
        "_recent_queries",
        lambda original, spec, layout, layer: jnp.where(
            layout.recent > 0, layer.queries.sum(axis=1), 0
        ),
    )


@fault("the newest block's queries are kept in the slot of the one before", "asking")
def _(patch):
    wrap(
        patch,
        cache,
        "keep_queries",
        lambda original, layout, layer, total: original(
            layout.replace(num_blocks=layout.num_blocks - 1), layer, total
        ),
    )


@fault("recent blocks ask with every token", "asking")
def _(patch):
    def whole(original, spec, q):
        every = dataclasses.replace(spec, cache=dataclasses.replace(spec.cache, query_stride=1))
        return original(every, q)

    wrap(patch, view, "sum_queries", whole)


EVENTS = {15: "flush", 18: "cut"}


@pytest.fixture(autouse=True)
def traced_anew():
    """Programs that several tests share must not have a fault of another one in them."""
    histories.forgetter.cache_clear()
    yield
    histories.forgetter.cache_clear()


def check(kind):
    """The history check on a few videos of 22 blocks, with a flush and a cut."""
    exp = histories.experiment(KINDS[kind])
    story = slow_memory.tell(exp, np.random.default_rng(5), blocks=22, layers=2, videos=6)
    step = histories.stepper(exp, stacked=True)
    histories.check_history(exp, story, step, stacked=True, events=EVENTS)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_fault_every_kind_of_memory_passes(kind):
    check(kind)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name, monkeypatch):
    kind, plant = FAULTS[name]
    with monkeypatch.context() as patch:
        plant(patch)
        with pytest.raises(AssertionError):
            check(kind)


def test_there_are_enough_faults_and_all_kinds_of_memory_have_some():
    assert len(FAULTS) >= 26
    assert {kind for kind, _ in FAULTS.values()} == set(KINDS)
