"""What a layer asks, what its packed blocks are scored by, and the view that is laid out of what it chose."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from packforcing_jax.config import overrides
from packforcing_jax.memory import cache, view
from packforcing_jax.plan import jaxpr_cost, programs
from packforcing_jax.policies import selection
from packforcing_jax.types import KV

EXP = tiny.EXP
NUMBER = 7  # of the next block: sink, archive and recent are full
ADJUSTMENTS = ("sink", "incremental", "sink_only", "none")
Q = tiny.normal(1, tiny.BATCH, 3 * 8, 3, 12)
recall = tiny.jit(view.recall, static_argnums=0)
question = tiny.jit(view.question, static_argnums=0)
newest = tiny.jit(view.newest, static_argnums=(0, 2))


_plan = tiny.jit(cache.plan, static_argnums=0)


def plan(exp, number):
    return _plan(exp.cache, jnp.int32(number))


@functools.cache
def situation(rope_adjustment="sink", **changes):
    """An experiment, its plan, a layer of random keys and values, and lots."""
    exp = tiny.with_cache(rope_adjustment=rope_adjustment, **changes)
    empty = cache.init(exp, tiny.BATCH).layers[0]
    rng = np.random.default_rng(3)
    lots = jnp.asarray(rng.uniform(size=(tiny.BATCH, exp.cache.slots)), jnp.float32)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)  # noqa: E731
    stores = [KV(k=draw(part.k), v=draw(part.v)) for part in (empty.sink, empty.mid, empty.recent)]
    layer = cache.Layer(
        *stores, sink_at=jnp.float32(rope_adjustment == "incremental"), at=3 * draw(empty.at)
    )
    return types.SimpleNamespace(exp=exp, seen=plan(exp, NUMBER), layer=layer, lots=lots)


def turned(x, time, row=0.0, column=0.0):
    """Tokens [..., h] rotated to one time and place, as complex numbers."""
    rates = [100.0 ** (-np.arange(3) / 3), 20.0 ** (-np.arange(2) / 2), np.ones(1)]
    angles = np.concatenate(
        [place * rate for place, rate in zip((time, row, column), rates, strict=True)]
    )
    pairs = np.asarray(x, np.float64).reshape(*np.shape(x)[:-1], 6, 2)
    spun = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
    return np.stack([spun.real, spun.imag], axis=-1).reshape(np.shape(x))


def turned_each(x, times):
    """Tokens [..., k, n, h] rotated to their own times [k]."""
    return np.stack(
        [turned(np.asarray(x)[..., i, :, :], float(time)) for i, time in enumerate(times)], axis=-3
    )


# asking


def test_a_block_asks_with_all_its_queries_and_with_their_averages_over_windows():
    """Against single queries, turned one by one."""
    here = situation()
    asked = tiny.jit(view.ask, static_argnums=0)(here.exp, here.seen, Q)
    grid = np.asarray(Q).reshape(2, 3, 4, 2, 3, 12)  # frames, rows, columns
    total = 0
    for t, y, x in np.ndindex(3, 4, 2):
        total = total + turned(grid[:, t, y, x], t, y, x)
    np.testing.assert_allclose(asked.total, total, atol=1e-4)
    now, windows = (
        float(here.seen.current_at),
        [],
    )  # windows of 2 frames and 2 rows; the third frame fills none
    for y, x in np.ndindex(2, 2):
        centre = grid[:, :2, 2 * y : 2 * y + 2, x].mean(axis=(1, 2))
        windows.append(turned(centre, now + 0.5, 2 * y + 0.5, x))
    np.testing.assert_allclose(asked.pooled, np.stack(windows, axis=1), atol=1e-5)
    assert now == 3 + 2 * 3 + 3


def asked(here):
    return view.Asked(pooled=tiny.normal(2, 2, 4, 3, 12), total=tiny.normal(3, 2, 3, 12))


@pytest.mark.parametrize("rope_adjustment", ADJUSTMENTS)
def test_packed_blocks_of_one_content_are_scored_alike_whatever_their_age(rope_adjustment):
    """Keys that are equal but for where they lie: at one distance for all scores but the paper's sum."""
    here = situation(rope_adjustment)
    slots, offsets = here.exp.cache.slots, cache.packed_places(here.exp)[0]
    same = np.random.default_rng(4).normal(size=(2, 8, 3, 12))
    keys = np.stack([same] * slots, axis=1)
    if rope_adjustment == "incremental":
        for video, slot in np.ndindex(2, slots):
            keys[video, slot] = turned_each(same[video], here.layer.at[video, slot] + offsets)
    layer = here.layer.replace(mid=here.layer.mid.replace(k=jnp.asarray(keys, jnp.float32)))
    found = question(here.exp, here.seen, layer, asked(here), here.lots)
    middle = float(here.seen.mid_at + here.seen.chosen * here.seen.step / 2)
    expected = turned_each(same, middle + offsets)
    np.testing.assert_allclose(found.archive, np.stack([expected] * slots, axis=1), atol=1e-5)
    for slot, number in enumerate(np.asarray(here.seen.ids)):
        if number >= 0:
            true = turned_each(same, 3.0 * (number - NUMBER) + offsets).sum(axis=1)
            np.testing.assert_allclose(found.key_sum[:, slot], true, atol=1e-4)


@pytest.mark.parametrize("rope_adjustment", ["sink", "incremental"])
def test_heads_that_are_scored_one_by_one_give_the_score_of_all(rope_adjustment):
    here = situation(rope_adjustment)
    visible = np.asarray(here.seen.ids) >= 0

    def both(seen, layer, asked, lots):
        exps = {name: tiny.with_cache(here.exp, selection=name) for name in selection.POLICIES}
        ours = {name: view.score(exp, seen, layer, asked, lots) for name, exp in exps.items()}
        return ours, {
            name: policy(view.question(here.exp, seen, layer, asked, lots))
            for name, policy in selection.POLICIES.items()
        }

    ours, whole = tiny.jit(both)(here.seen, here.layer, asked(here), here.lots)
    for name, scores in whole.items():
        np.testing.assert_allclose(
            ours[name][:, visible], scores[:, visible], rtol=1e-5, atol=1e-5, err_msg=name
        )


def test_scoring_at_full_size_makes_no_array_as_large_as_the_keys_of_the_sink():
    """What is turned to be scored belongs to one head: traced, so that nothing is allocated."""
    exp = overrides.load_experiment("wan_t2v_1_3b_paper", ["dit.layers=1"])
    shapes = programs.shapes_of(exp)
    q = jax.ShapeDtypeStruct((1, exp.cache.block * exp.tokens_per_frame, 12, 128), jnp.bfloat16)
    lots = jax.ShapeDtypeStruct((1, exp.cache.slots), jnp.float32)
    layer, seen = shapes.layers[0], plan(exp, NUMBER)
    asked = jax.eval_shape(lambda seen, q: view.ask(exp, seen, q), seen, q)
    program = jaxpr_cost.trace(lambda *args: view.score(exp, *args), seen, layer, asked, lots)
    largest = max(
        jaxpr_cost.nbytes(out.aval) for eqn, _ in jaxpr_cost.walk(program) for out in eqn.outvars
    )
    assert largest < jaxpr_cost.nbytes(layer.sink.k) < jaxpr_cost.nbytes(layer.mid.k)


# looking


def test_before_anything_is_asked_the_newest_blocks_are_looked_at():
    here = situation()
    looked = newest(here.exp, here.seen, 3)
    np.testing.assert_array_equal(looked.ids, np.broadcast_to([4, 5], (3, 2)))
    np.testing.assert_array_equal(np.asarray(here.seen.ids)[looked.slots], looked.ids)
    early = newest(here.exp, plan(here.exp, 3), 2)
    np.testing.assert_array_equal(early.ids, [[1, -1]] * 2)


@pytest.mark.parametrize(
    ("rope_adjustment", "places"),
    [
        ("sink", [3, 6]),
        ("incremental", [12, 15]),
        ("sink_only", [6, 15]),
        ("none", [6, 15]),
    ],
)
def test_chosen_blocks_stand_in_a_row_or_where_they_truly_were(rope_adjustment, places):
    """Blocks 2 and 5 before block 7, which lies at 12 behind sink 3, two packed blocks and recent 3, or truly at 21."""
    here = situation(rope_adjustment)
    wanted = jnp.where(here.seen.ids == 2, 9.0, here.seen.ids.astype(jnp.float32))
    looked = tiny.jit(view.look, static_argnums=0)(here.exp, here.seen, jnp.stack([wanted, wanted]))
    np.testing.assert_array_equal(looked.ids, [[2, 5]] * 2)
    np.testing.assert_array_equal(looked.scores, [[9, 5]] * 2)
    np.testing.assert_array_equal(looked.at, [places] * 2)
    np.testing.assert_array_equal(looked.sink_at, {"sink": 0, "none": 0}.get(rope_adjustment, 9))


def test_what_is_picked_is_as_it_was_stored():
    here = situation("incremental")
    looked = newest(here.exp, here.seen, 2)
    picked = tiny.jit(view.take)(here.layer, looked)
    for video, rank in np.ndindex(2, 2):
        slot = int(looked.slots[video, rank])
        np.testing.assert_array_equal(picked.kv.k[video, rank], here.layer.mid.k[video, slot])
        np.testing.assert_array_equal(picked.kv.v[video, rank], here.layer.mid.v[video, slot])
        np.testing.assert_array_equal(picked.at[video, rank], here.layer.at[video, slot])


# laying out


@pytest.mark.parametrize("number", [0, 1, 2, 3, 5, 9])
def test_what_the_scratch_held_is_never_seen(number):
    """From the first block on, when most of the room is empty: valid keys are the same over any scratch."""
    here = situation()
    seen = plan(here.exp, number)
    length, room = int(cache.length(here.exp, seen)), cache.room(here.exp)
    garbage = KV(*np.random.default_rng(50).normal(size=(2, 2, room, 3, 12)).astype(np.float32))
    plain, _ = recall(here.exp, seen, here.layer, Q, here.lots)
    over, _ = recall(here.exp, seen, here.layer, Q, here.lots, garbage)
    for name in ("k", "v"):
        ours, theirs = getattr(plain, name), getattr(over, name)
        assert ours.shape == theirs.shape == (2, room, 3, 12)
        np.testing.assert_array_equal(ours[:, :length], theirs[:, :length])
    assert room - length >= (3 + 1) * 8  # the block and its packed twin


def test_a_block_is_laid_down_behind_the_valid_keys():
    rng = np.random.default_rng(6)
    whole, own = (KV(*rng.normal(size=(2, 2, keys, 3, 4)).astype(np.float32)) for keys in (9, 2))
    longer = tiny.jit(view.extend)(whole, own, jnp.int32(5))
    for name in ("k", "v"):
        old, new, now = (getattr(kv, name) for kv in (whole, own, longer))
        np.testing.assert_array_equal(now, np.concatenate([old[:, :5], new, old[:, 7:]], axis=1))


@pytest.mark.parametrize("rope_adjustment", ADJUSTMENTS)
def test_keys_stand_at_their_places_and_values_as_they_were(rope_adjustment):
    """Every key of the view against its stored one, turned by hand; `incremental` turns by what is missing."""
    here = situation(rope_adjustment, selection="random")
    exp, seen, layer = here.exp, here.seen, jax.tree.map(np.asarray, here.layer)
    whole, looked = recall(exp, seen, layer, Q, here.lots)
    moves = rope_adjustment == "incremental"
    offsets = np.asarray(cache.packed_places(exp)[0])
    assert (looked.ids[0] != looked.ids[1]).any()
    assert (looked.ids >= 0).all()
    for video in range(2):
        k, v, by = [], [], []
        for frame in range(3):
            k.append(layer.sink.k[video, frame])
            v.append(layer.sink.v[video, frame])
            by += [float(seen.sink_at) + (-float(layer.sink_at) if moves else frame)] * 8
        for rank, number in enumerate(np.asarray(looked.ids[video])):
            slot = int(np.flatnonzero(np.asarray(seen.ids) == number)[0])
            k.append(layer.mid.k[video, slot])
            v.append(layer.mid.v[video, slot])
            begin = {"sink": 3 + 3 * rank, "incremental": 12 + 3 * rank}.get(
                rope_adjustment, 3 * number
            )
            by += list(begin + (-float(layer.at[video, slot]) if moves else offsets) + 0 * offsets)
        for frame in range(3):
            k.append(layer.recent.k[video, frame])
            v.append(layer.recent.v[video, frame])
            by += [0.0 if moves else (9 if rope_adjustment == "sink" else 18) + frame] * 8
        np.testing.assert_allclose(
            whole.k[video, : len(by)], turned_each(np.concatenate(k), by), atol=1e-4
        )
        np.testing.assert_array_equal(whole.v[video, : len(by)], np.concatenate(v))
