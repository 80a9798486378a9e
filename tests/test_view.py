"""What a layer asks, what its packed blocks are scored by, and the view that is laid out of what it chose."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from packforcing_jax.config import loading
from packforcing_jax.errors import InputError
from packforcing_jax.memory import cache, view
from packforcing_jax.memory import layout as layouts
from packforcing_jax.plan import jaxpr_cost
from packforcing_jax.policies import selection
from packforcing_jax.policies.selection import Score
from packforcing_jax.types import KV

EXP = tiny.EXP
NUMBER = 7  # of the next block: sink, archive and recent are full
ADJUSTMENTS = ("sink", "incremental", "sink_only", "none")
Q = tiny.normal(1, tiny.BATCH, 3 * 8, 3, 12)
_recall = tiny.jit(view.recall, static_argnums=0)
_score_inputs = tiny.jit(view.score_inputs, static_argnums=0)
_newest = tiny.jit(view.newest, static_argnums=(0, 2))
_layout = tiny.jit(layouts.layout, static_argnums=0)


def recall(exp, *args):
    return _recall(exp.memory, *args)


def layout_of(exp, number):
    return _layout(exp.cache, layouts.begin(number))


def newest(exp, layout, batch):
    return _newest(exp.memory, layout, batch)


@functools.cache
def situation(rope_adjustment="sink", **changes):
    """An experiment, its layout, a layer of random keys and values, and random scores."""
    exp = tiny.with_cache(rope_adjustment=rope_adjustment, **changes)
    empty = cache.init(exp.memory, tiny.BATCH).layers[0]
    rng = np.random.default_rng(3)
    random = jnp.asarray(rng.uniform(size=(tiny.BATCH, exp.cache.slots)), jnp.float32)
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32)  # noqa: E731
    layer = cache.LayerCache(
        view=KV(k=draw(empty.view.k), v=draw(empty.view.v)),
        packed=KV(k=draw(empty.packed.k), v=draw(empty.packed.v)),
        sink=draw(empty.sink),
        recent=draw(empty.recent),
        sink_position=jnp.float32(rope_adjustment == "incremental"),
        packed_positions=3 * draw(empty.packed_positions),
        queries=draw(empty.queries),
    )
    return types.SimpleNamespace(exp=exp, layout=layout_of(exp, NUMBER), layer=layer, random=random)


def slots_of(frames):
    """Tokens [k] of a view at the frames of it."""
    return (np.asarray(frames, int)[:, None] * 8 + np.arange(8)).ravel()


def turned(x, time, row=0.0, column=0.0):
    """Tokens [..., h] rotated to one time and place, as complex numbers."""
    rates = [100.0 ** (-np.arange(3) / 3), 20.0 ** (-np.arange(2) / 2), np.ones(1)]
    angles = np.concatenate(
        [position * rate for position, rate in zip((time, row, column), rates, strict=True)]
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
    asked = tiny.jit(view.pool_queries, static_argnums=0)(here.exp.memory, here.layout, Q)
    grid = np.asarray(Q).reshape(2, 3, 4, 2, 3, 12)  # frames, rows, columns
    total = 0
    for t, y, x in np.ndindex(3, 4, 2):
        total = total + turned(grid[:, t, y, x], t, y, x)
    np.testing.assert_allclose(asked.total, total, atol=1e-4)
    now = float(here.layout.current_position)
    windows = []  # windows of 2 frames and 2 rows; the third frame fills none
    for y, x in np.ndindex(2, 2):
        centre = grid[:, :2, 2 * y : 2 * y + 2, x].mean(axis=(1, 2))
        windows.append(turned(centre, now + 0.5, 2 * y + 0.5, x))
    np.testing.assert_allclose(asked.pooled, np.stack(windows, axis=1), atol=1e-5)
    assert now == 3 + 2 * 3 + 3


QUERIES = view.PooledQueries(pooled=tiny.normal(2, 2, 4, 3, 12), total=tiny.normal(3, 2, 3, 12))


@pytest.mark.parametrize("rope_adjustment", ADJUSTMENTS)
def test_packed_blocks_of_one_content_are_scored_alike_whatever_their_age(rope_adjustment):
    """Keys that are equal but for where they lie: at one distance for all scores but the paper's sum."""
    here = situation(rope_adjustment)
    slots = here.exp.cache.slots
    offsets = layouts.packed_positions(here.exp.memory)[0]
    same = np.random.default_rng(4).normal(size=(2, 8, 3, 12))
    keys = np.stack([same] * slots, axis=1)
    if rope_adjustment == "incremental":
        for video, slot in np.ndindex(2, slots):
            keys[video, slot] = turned_each(
                same[video], here.layer.packed_positions[video, slot] + offsets
            )
    packed = here.layer.packed.replace(k=jnp.asarray(keys, jnp.float32))
    layer = here.layer.replace(packed=packed)
    found = _score_inputs(here.exp.memory, here.layout, layer, QUERIES, here.random)
    middle = float(here.layout.mid_position + here.layout.num_selected * here.layout.step / 2)
    expected = turned_each(same, middle + offsets)
    np.testing.assert_allclose(found.packed, np.stack([expected] * slots, axis=1), atol=1e-5)
    for slot, number in enumerate(np.asarray(here.layout.ids)):
        if number >= 0:
            true = turned_each(same, 3.0 * (number - NUMBER) + offsets).sum(axis=1)
            np.testing.assert_allclose(found.key_sum[:, slot], true, atol=1e-4)


@pytest.mark.parametrize(("number", "recent"), [(7, (18, 19, 20)), (1, ()), (2, (3, 4, 5))])
def test_scores_see_the_keys_of_the_sink_and_of_recent_frames_in_time_order(number, recent):
    """Against the view: the sink in its first three frames, frame f in slot 3 + (f - 3) % 6 of a ring of six."""
    here = situation()
    layout = layout_of(here.exp, number)
    found = _score_inputs(here.exp.memory, layout, here.layer, QUERIES, here.random)
    sink, last = (
        np.asarray(keys)[:, np.asarray(valid)]
        for keys, valid in zip(found.full_res, found.full_res_valid, strict=True)
    )
    keys = np.asarray(here.layer.view.k)
    np.testing.assert_array_equal(sink, keys[:, slots_of(range(3))])
    np.testing.assert_array_equal(last, keys[:, slots_of([3 + (f - 3) % 6 for f in recent])])


ALL_ASK = {"score_heads": 1.0, "query_stride": 1, "recent_queries": False}


@pytest.mark.parametrize("rope_adjustment", ["sink", "incremental"])
def test_heads_that_are_scored_one_by_one_give_the_score_of_all(rope_adjustment):
    here = situation(rope_adjustment)
    visible = np.asarray(here.layout.ids) >= 0

    def both(layout, layer, queries, random):
        exps = {
            name: tiny.with_cache(here.exp, selection=name, **ALL_ASK) for name in selection.SCORES
        }
        ours = {
            name: view.score(exp.memory, layout, layer, queries, random)
            for name, exp in exps.items()
        }
        inputs = view.score_inputs(here.exp.memory, layout, layer, queries, random)
        return ours, {name: score.fn(inputs) for name, score in selection.SCORES.items()}

    ours, whole = tiny.jit(both)(here.layout, here.layer, QUERIES, here.random)
    for name, scores in whole.items():
        np.testing.assert_allclose(
            ours[name][:, visible], scores[:, visible], rtol=1e-5, atol=1e-5, err_msg=name
        )


def largest_logit_of_the_first_key(inputs):
    """A score of one's own: the best product of any query with a block's first key, summed over the heads it sees."""
    products = jnp.einsum("bqnh,bmnh->bnqm", inputs.queries, inputs.packed[:, :, 0])
    return products.max(axis=2).sum(axis=1)


HEADS_SEEN = []  # by the score below, each time that it is traced


def counting_heads(inputs):
    HEADS_SEEN.append(inputs.queries.shape[2])
    return largest_logit_of_the_first_key(inputs)


@pytest.mark.parametrize(
    ("across_heads", "seen"), [(None, 3), (jnp.sum, 1), (jnp.max, 1)], ids=["whole", "sum", "max"]
)
@pytest.mark.parametrize("rope_adjustment", ["sink", "incremental"])
def test_a_score_of_ones_own_is_computed_per_head_where_it_says_so(
    across_heads, seen, rope_adjustment
):
    """Against products of single queries with single keys, turned one by one."""
    score = Score("first key", counting_heads, across_heads, selection.packed_keys)
    here = situation(rope_adjustment, selection=score)
    HEADS_SEEN.clear()
    whole, chosen = recall(here.exp, here.layout, here.layer, Q, here.random)
    assert set(HEADS_SEEN) == {seen}
    asked = view.pool_queries(here.exp.memory, here.layout, Q).pooled
    offset = float(layouts.packed_positions(here.exp.memory)[0][0])
    position = (
        float(here.layout.mid_position + here.layout.num_selected * here.layout.step / 2) + offset
    )
    over_heads = np.max if across_heads is jnp.max else np.sum
    for video in range(2):
        scores = {}
        for slot, block in enumerate(np.asarray(here.layout.ids)):
            key = np.asarray(here.layer.packed.k[video, slot, 0])
            lies = (
                float(here.layer.packed_positions[video, slot]) + offset
                if here.layer.packed_positions.size
                else 0.0
            )
            key = turned(key, position - lies)
            products = [
                max(float(np.asarray(q[head]) @ key[head]) for q in asked[video])
                for head in range(3)
            ]
            scores[int(block)] = over_heads(products)
        scores.pop(-1, None)
        best = sorted(sorted(scores, key=lambda block: -scores[block])[:2])
        np.testing.assert_array_equal(chosen.ids[video], best)
        np.testing.assert_allclose(
            chosen.scores[video], [scores[block] for block in best], atol=1e-4
        )


def test_an_unknown_score_is_refused_with_the_nearest_one():
    with pytest.raises(
        InputError, match=r"cache\.selection='affinty' is unknown; did you mean affinity\?"
    ):
        tiny.with_cache(selection="affinty")


def test_scoring_at_full_size_makes_no_array_as_large_as_the_keys_of_the_sink():
    """What is turned to be scored belongs to one head: traced, so that nothing is allocated."""
    exp = loading.load_experiment("wan_t2v_1_3b_paper", ["dit.layers=1"])
    spec = exp.memory
    s = exp.tokens_per_frame
    layer = jax.eval_shape(lambda: cache.init(spec, 1, jnp.bfloat16)).layers[0]
    q = jax.ShapeDtypeStruct((1, exp.cache.block * s, 12, 128), jnp.bfloat16)
    random = jax.ShapeDtypeStruct((1, exp.cache.slots), jnp.float32)
    layout = layout_of(exp, NUMBER)
    queries = jax.eval_shape(lambda layout, q: view.pool_queries(spec, layout, q), layout, q)
    program = jaxpr_cost.trace(
        lambda *args: view.score(spec, *args), layout, layer, queries, random
    )
    largest = max(
        jaxpr_cost.nbytes(out.aval) for eqn, _ in jaxpr_cost.walk(program) for out in eqn.outvars
    )
    sink = exp.cache.sink * s * 12 * 128 * 2
    assert largest < sink < layer.packed.k.size * 2


# choosing


def test_before_anything_is_asked_the_newest_blocks_are_attended_to():
    here = situation()
    chosen = newest(here.exp, here.layout, 3)
    np.testing.assert_array_equal(chosen.ids, np.broadcast_to([4, 5], (3, 2)))
    np.testing.assert_array_equal(np.asarray(here.layout.ids)[chosen.slots], chosen.ids)
    early = newest(here.exp, layout_of(here.exp, 3), 2)
    np.testing.assert_array_equal(early.ids, [[1, -1]] * 2)


@pytest.mark.parametrize(
    ("rope_adjustment", "positions"),
    [
        ("sink", [3, 6]),
        ("incremental", [12, 15]),
        ("sink_only", [6, 15]),
        ("none", [6, 15]),
    ],
)
def test_chosen_blocks_stand_in_a_row_or_where_they_truly_were(rope_adjustment, positions):
    """Blocks 2 and 5 before block 7, which lies at 12 behind sink 3, two packed blocks and recent 3, or truly at 21."""
    here = situation(rope_adjustment)
    wanted = jnp.where(here.layout.ids == 2, 9.0, here.layout.ids.astype(jnp.float32))
    select = tiny.jit(view.select, static_argnums=0)
    chosen = select(here.exp.memory, here.layout, jnp.stack([wanted, wanted]))
    np.testing.assert_array_equal(chosen.ids, [[2, 5]] * 2)
    np.testing.assert_array_equal(chosen.scores, [[9, 5]] * 2)
    np.testing.assert_array_equal(chosen.positions, [positions] * 2)
    np.testing.assert_array_equal(
        here.layout.sink_position, {"sink": 0, "none": 0}.get(rope_adjustment, 9)
    )


def test_what_is_gathered_is_as_it_was_stored():
    here = situation("incremental")
    chosen = newest(here.exp, here.layout, 2)
    gathered = tiny.jit(view.gather)(here.layer, chosen)
    for video, rank in np.ndindex(2, 2):
        slot = int(chosen.slots[video, rank])
        for name in ("k", "v"):
            stored = getattr(here.layer.packed, name)[video, slot]
            np.testing.assert_array_equal(getattr(gathered.kv, name)[video, rank], stored)
        np.testing.assert_array_equal(
            gathered.positions[video, rank], here.layer.packed_positions[video, slot]
        )


# laying down


@pytest.mark.parametrize("number", [0, 1, 2, 3, 5, 9])
def test_what_the_scratch_held_is_never_seen(number):
    """From the first block on, when most of the room is empty: valid keys are the same over any scratch."""
    here = situation()
    layout = layout_of(here.exp, number)
    spec = here.exp.memory
    length = int(layouts.length(spec, layout))
    frames = [*range(min(3 * number, 3)), *range(max(3, 3 * number - 3), 3 * number)]
    committed = slots_of([f if f < 3 else 3 + (f - 3) % 6 for f in frames])
    current = slots_of([f if f < 3 else 3 + (f - 3) % 6 for f in range(3 * number, 3 * number + 3)])
    scratch = np.setdiff1d(np.arange(spec.room), committed)
    seen = np.setdiff1d(np.arange(length), current)
    noise = 50 * np.random.default_rng(50).normal(size=(2, 2, len(scratch), 3, 12))
    covered = KV(
        k=here.layer.view.k.at[:, scratch].set(noise[0].astype(np.float32)),
        v=here.layer.view.v.at[:, scratch].set(noise[1].astype(np.float32)),
    )
    plain, chosen = recall(here.exp, layout, here.layer, Q, here.random)
    over, again = recall(here.exp, layout, here.layer.replace(view=covered), Q, here.random)
    jax.tree.map(np.testing.assert_array_equal, again, chosen)
    for name in ("k", "v"):
        ours, theirs = (np.asarray(getattr(one, name)) for one in (plain, over))
        assert ours.shape == theirs.shape == (2, spec.room, 3, 12)
        np.testing.assert_array_equal(ours[:, seen], theirs[:, seen])
        np.testing.assert_array_equal(theirs[:, committed], getattr(covered, name)[:, committed])
    assert spec.room - length >= 8  # the packed twin
    assert len(seen) == 8 * len(frames) + 8 * int(layout.num_selected)


def test_a_block_is_laid_down_where_it_is_told_to_be():
    rng = np.random.default_rng(6)
    whole, own = (KV(*rng.normal(size=(2, 2, keys, 3, 4)).astype(np.float32)) for keys in (9, 2))
    longer = tiny.jit(cache.extend)(whole, own, jnp.int32(5))
    for name in ("k", "v"):
        old, new, now = (getattr(kv, name) for kv in (whole, own, longer))
        np.testing.assert_array_equal(now, np.concatenate([old[:, :5], new, old[:, 7:]], axis=1))


@pytest.mark.parametrize("number", [0, 1, 2, 3, NUMBER])
def test_a_block_lies_in_the_slots_of_its_frames_and_all_valid_keys_come_first(number):
    here = situation()
    layout = layout_of(here.exp, number)
    own = KV(*np.random.default_rng(7).normal(size=(2, 2, 24, 3, 12)).astype(np.float32))
    write = tiny.jit(cache.write_block, static_argnums=0)
    view_before = jax.tree.map(np.asarray, here.layer.view)
    after = jax.tree.map(np.asarray, write(here.exp.memory, layout, here.layer.view, own))
    frames = [f if f < 3 else 3 + (f - 3) % 6 for f in range(3 * number, 3 * number + 3)]
    for name in ("k", "v"):
        old = getattr(view_before, name)
        new = getattr(after, name)
        np.testing.assert_array_equal(new[:, slots_of(frames)], getattr(own, name))
        others = np.setdiff1d(np.arange(old.shape[1]), slots_of(frames))
        np.testing.assert_array_equal(new[:, others], old[:, others])
    full_res = int(layout.sink + layout.recent) + 3
    assert max(frames) < full_res == min(3 * number + 3, 9)


@pytest.mark.parametrize("rope_adjustment", ADJUSTMENTS)
def test_keys_stand_at_their_positions_and_values_as_they_were(rope_adjustment):
    """Every key of the view against its stored one, turned by hand; `incremental` turns by what is missing."""
    here = situation(rope_adjustment, selection="random")
    exp = here.exp
    layout = here.layout
    layer = jax.tree.map(np.asarray, here.layer)
    put = tiny.jit(cache.reposition, static_argnums=0)(exp.memory, layout, here.layer)
    whole, chosen = recall(exp, layout, put, Q, here.random)
    moves = rope_adjustment == "incremental"
    offsets = np.asarray(layouts.packed_positions(exp.memory)[0])
    assert (chosen.ids[0] != chosen.ids[1]).any()
    assert (chosen.ids >= 0).all()
    assert float(put.sink_position) == float(layout.sink_position)
    for video in range(2):
        k = []
        v = []
        by = []
        at = []
        for frame in range(3):  # of the sink
            slots = slots_of([frame])
            stored = layer.view.k[video, slots]
            k.append(layer.sink[video, frame] if rope_adjustment == "sink_only" else stored)
            v.append(layer.view.v[video, slots])
            turn = {"sink_only": 9 + frame, "incremental": 9 - 1}.get(rope_adjustment, 0)
            by += [float(turn)] * 8
            at.append(slots)
        for frame in range(18, 21):  # recent
            slots = slots_of([3 + (frame - 3) % 6])
            stored = layer.view.k[video, slots]
            moved = rope_adjustment == "sink"
            k.append(layer.recent[video, (frame - 3) % 3] if moved else stored)
            v.append(layer.view.v[video, slots])
            by += [float(frame - 9 if moved else 0)] * 8
            at.append(slots)
        for rank, number in enumerate(np.asarray(chosen.ids[video])):
            slot = int(np.flatnonzero(np.asarray(layout.ids) == number)[0])
            k.append(layer.packed.k[video, slot])
            v.append(layer.packed.v[video, slot])
            begin = {"sink": 3 + 3 * rank, "incremental": 12 + 3 * rank}.get(
                rope_adjustment, 3 * number
            )
            by += list(
                begin
                + (-float(layer.packed_positions[video, slot]) if moves else offsets)
                + 0 * offsets
            )
            at.append(9 * 8 + 8 * rank + np.arange(8))
        at = np.concatenate(at)
        np.testing.assert_allclose(
            np.asarray(whole.k)[video, at], turned_each(np.concatenate(k), by), atol=1e-4
        )
        np.testing.assert_array_equal(np.asarray(whole.v)[video, at], np.concatenate(v))
    assert int(layouts.length(exp.memory, layout)) == 9 * 8 + 2 * 8
