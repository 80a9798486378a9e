"""The memory: what it holds, where it puts it and what it costs; who sees what is also told by `test_histories`."""

import dataclasses
import functools
import itertools

import histories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow_memory
from hypothesis import given, settings
from hypothesis import strategies as st

from packforcing_jax import pytrees
from packforcing_jax.config import PROFILES, CacheConfig, DiTConfig, Experiment
from packforcing_jax.memory import cache, view
from packforcing_jax.networks import rope
from packforcing_jax.types import KV

VIDEOS = 3
FRAME = 6
PACKING = CacheConfig(block=2, sink=4, recent=2, top=3, capacity=5, spare=2, score_pool=(2, 1, 1))
ODD = CacheConfig(block=2, sink=1, recent=5, top=0, capacity=0, spare=1, rope_adjustment="none")
EXACT = CacheConfig(block=3, sink=6, recent=3, top=2, capacity=4, score_pool=(3, 1, 1))
FITTED = CacheConfig(
    block=4,
    sink=4,
    recent=4,
    top=3,
    capacity=3,
    span="fit",
    trained=17,
    selection="all",
    score_pool=(2, 1, 1),
)
MOVED = dataclasses.replace(PACKING, rope_adjustment="incremental", selection="random")


def told(exp, seed=0, blocks=9, videos=VIDEOS):
    return slow_memory.tell(
        exp, np.random.default_rng(seed), blocks=blocks, layers=2, videos=videos
    )


def walk(exp, story, step=None, *, stacked=False):
    """What every block of a story sees, the memory before it and the memory after it."""
    step, videos = step or histories.compiled(exp, stacked), story.q.shape[2]
    memory, scratch = cache.init(exp, videos, stacked=stacked), view.scratch(exp, videos)
    scratch = histories.stack(scratch) if stacked else scratch
    for number in range(len(story.q)):
        shown, after = step(memory, scratch, histories.block_of(story, number), 0.0)
        yield shown, memory, after
        memory, scratch = after, shown["views"]


# What a block sees


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("cfg", [ODD, EXACT, FITTED], ids=["odd", "exact", "fitted"])
def test_every_block_sees_what_the_slow_memory_shows(cfg, stacked):
    exp = histories.experiment(cfg)
    step = histories.stepper(exp, stacked=stacked)
    for gap in (0.0, 2.75):
        histories.check_history(exp, told(exp, blocks=12), step, gap, stacked=stacked)
    assert step._cache_size() == 1


def hide_with_noise(layer, seen, rng):
    """`layer` with noise wherever no value lies that the next block may see."""
    block = seen.start // max(seen.blocks, 1)
    numbers = {1 + 1000 * (f // block) + f % block * FRAME for f in (*seen.sink, *seen.recent)}
    numbers |= {501 + 1000 * b for b in seen.archive}

    def cover(store):
        hidden = ~np.isin(np.floor(store.v[:1, :, 0, 0, 0]), list(numbers))[..., None, None, None]
        return KV(
            *(
                np.where(hidden, 50 * rng.normal(size=x.shape).astype(np.float32), x)
                for x in (store.k, store.v)
            )
        )

    return layer.replace(sink=cover(layer.sink), mid=cover(layer.mid), recent=cover(layer.recent))


@pytest.mark.parametrize("cfg", [ODD, EXACT, MOVED], ids=["odd", "exact", "moved"])
def test_what_is_out_of_sight_does_not_count(cfg):
    """What was never written, was dropped or is still sharp may hold anything."""
    exp, rng = histories.experiment(cfg), np.random.default_rng(8)
    step, story = histories.compiled(exp), told(exp, blocks=11)
    for number, (shown, memory, _) in enumerate(walk(exp, story, step)):
        seen, count = slow_memory.visible(cfg, number), int(shown["length"])
        noisy = memory.replace(
            layers=[hide_with_noise(layer, seen, rng) for layer in memory.layers]
        )
        scratch = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), shown["views"])
        again, _ = step(noisy, scratch, histories.block_of(story, number), 0.0)
        jax.tree.map(np.testing.assert_array_equal, again["looked"], shown["looked"])
        for ours, theirs in zip(jax.tree.leaves(again["views"]), jax.tree.leaves(shown["views"])):
            np.testing.assert_array_equal(ours[:, :count], theirs[:, :count])


def test_layers_apart_and_stacked_remember_the_same():
    exp = histories.experiment(MOVED)
    for apart, together in zip(walk(exp, told(exp)), walk(exp, told(exp), stacked=True)):
        for one, other in zip(
            (apart[0]["looked"], apart[2].layers), (together[0]["looked"], together[2].layers)
        ):
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, atol=1e-6),
                histories.stack(one),
                other,
            )


def test_only_differences_of_places_matter():
    exp = histories.experiment(dataclasses.replace(PACKING, span="fit", trained=11))
    story, look = told(exp, blocks=10), histories.looker(exp)
    story.full, story.packed = ((k, np.sin(7 * v)) for k, v in (story.full, story.packed))
    *_, (shown, memory, _) = walk(exp, story)

    block = jax.tree.map(jnp.asarray, histories.block_of(story, 9))

    @histories.jit
    def recall(seen):
        each = zip(memory.layers, *(pytrees.unstack(x, 2) for x in block[2:]))
        views, looked = pytrees.unzip([view.recall(exp, seen, *one) for one in each])
        return pytrees.stack(views), pytrees.stack(looked).ids

    def moved(by, ahead=0.0):
        names = ("sink_at", "mid_at", "recent_at", "current_at")
        seen = shown["plan"].replace(**{name: getattr(shown["plan"], name) + by for name in names})
        seen = seen.replace(current_at=seen.current_at + ahead)
        views, ids = recall(seen)
        return look({"plan": seen, "views": views, "length": shown["length"]}, block), ids

    expected, ids = moved(0.0)
    for by in (1.0, -13.0, 41.625):
        out, again = moved(by)
        np.testing.assert_array_equal(again, ids)
        np.testing.assert_allclose(out, expected, atol=1e-5)
    assert np.abs(moved(0.0, ahead=1.0)[0] - expected).max() > 1e-2


@pytest.mark.parametrize(
    ("sink", "recent", "adjustment"),
    [(0, 0, "sink"), (3, 0, "none"), (0, 6, "sink"), (6, 3, "incremental"), (3, 6, "sink_only")],
)
def test_packing_nothing_and_seeing_all_is_full_causal_attention(sink, recent, adjustment):
    cfg = CacheConfig(
        block=3,
        sink=sink,
        recent=recent,
        top=9,
        capacity=9,
        selection="all",
        rope_adjustment=adjustment,
        score_pool=(1, 1, 1),
    )
    exp = histories.experiment(cfg, channels=(2,), strides=((1, 1, 2),), frames=3)
    story, frames = told(exp, blocks=7), 3 * 7
    story.full = story.packed = story.full[0], np.sin(7 * story.full[1])
    *_, (shown, _, _) = walk(exp, story)
    rows, columns = np.tile(slow_memory.frame_grid(exp), frames)
    angles = slow_memory.angles_of(exp, np.repeat(np.arange(frames), FRAME), rows, columns)
    q, k, v = (np.concatenate(list(x), axis=2) for x in (story.q, *story.full))
    expected = slow_memory.attend(slow_memory.turn(q, angles), slow_memory.turn(k, angles), v)[
        :, :, -3 * FRAME :
    ]
    shown = {name: histories.stack(part) for name, part in shown.items()}
    np.testing.assert_allclose(
        histories.looker(exp)(shown, histories.block_of(story, 6)), expected, atol=2e-5
    )


# Places


@given(st.sampled_from([PACKING, EXACT, FITTED]), st.integers(4, 30), st.integers(0, 400))
@settings(max_examples=25, derandomize=True, deadline=None)
def test_a_fitted_span_stays_within_the_trained_range(cfg, trained, blocks):
    fixed = cfg.sink + cfg.recent + cfg.block
    cfg = dataclasses.replace(
        cfg, span="fit", rope_adjustment="sink", trained=max(trained, fixed + 1)
    )
    seen = cache.plan(cfg, np.int32(blocks))
    assert seen.current_at + cfg.block <= cfg.trained + 1e-4
    assert seen.recent_at - seen.sink <= seen.chosen * cfg.block  # squeezed, never stretched


@pytest.mark.parametrize(
    ("adjustment", "current", "sink"),
    [
        ("sink", [0, 3, 6, 9, 12, 12, 12], [0] * 7),
        ("none", [0, 3, 6, 9, 12, 15, 270], [0] * 7),
        ("incremental", [0, 3, 6, 9, 12, 15, 270], [0, 0, 0, 0, 0, 3, 258]),
        ("sink_only", [0, 3, 6, 9, 12, 15, 270], [0, 0, 0, 0, 0, 3, 258]),
    ],
)
def test_places_stay_or_follow_the_true_frames(adjustment, current, sink):
    cfg = CacheConfig(
        block=3,
        sink=3,
        recent=3,
        top=2,
        capacity=5,
        score_pool=(1, 1, 1),
        rope_adjustment=adjustment,
    )
    plans = [cache.plan(cfg, np.int32(n)) for n in (0, 1, 2, 3, 4, 5, 90)]
    assert [float(seen.current_at) for seen in plans] == current
    assert [float(seen.sink_at) for seen in plans] == sink
    assert [int(seen.start) for seen in plans] == [0, 3, 6, 9, 12, 15, 270]


@pytest.mark.parametrize(
    ("block", "frames"), [(4, (0.5, 2.5)), (3, (0.5, 2.0)), (2, (0.5, 1.0)), (1, (0.0, 0.0))]
)
def test_packed_tokens_sit_in_the_middle_of_what_they_stand_for(block, frames):
    cfg = dataclasses.replace(
        PROFILES["paper"], block=block, sink=2 * block, recent=block, score_pool=(1, 4, 4)
    )
    exp = Experiment(name="full", cache=cfg)
    times, places = cache.packed_places(exp)
    np.testing.assert_array_equal(times, np.repeat(frames, 7 * 13))
    rows, columns = (
        np.mgrid[:7, :13] * 4 + 1.5
    )  # 8 latent cells are 4 tokens, counted from the middle of the first
    np.testing.assert_array_equal(
        places, np.tile(np.stack([rows, columns], axis=-1).reshape(-1, 2), (2, 1))
    )
    native = dataclasses.replace(
        exp, compressor=dataclasses.replace(exp.compressor, places="native")
    )
    np.testing.assert_array_equal(cache.packed_places(native)[1], (places - 1.5) / 4)
    np.testing.assert_array_equal(cache.packed_places(native)[0], times)


@pytest.mark.parametrize("patch", [(0, 0), (3, 8), (6, 12)])
def test_a_packed_token_agrees_most_with_the_patches_it_stands_for(patch):
    """Rotary agreement of equal contents over all places of a frame; those nearest (4r+1.5, 4c+1.5) win."""
    exp = Experiment(name="full", dit=DiTConfig(rope_pairs=(0, 32, 32)))
    places = cache.packed_places(exp)[1].reshape(2, 7, 13, 2)[0]
    own = rope.space_angles(jnp.asarray(places[patch][None]), exp.dit)
    there = rope.space_angles(jnp.asarray(rope.grid(np.arange(30), np.arange(52), 1)), exp.dit)
    agreement = np.cos(there - own).sum(-1).reshape(30, 52)
    best = np.argwhere(agreement >= np.sort(agreement.ravel())[-4] - 1e-3)
    middle = 4 * np.asarray(patch) + 1.5
    assert sorted(map(tuple, best.tolist())) == sorted(
        itertools.product(*((int(x), int(x) + 1) for x in middle))
    )


def test_the_current_block_and_its_twin_share_their_place():
    exp = histories.experiment(EXACT)
    seen = cache.plan(exp.cache, np.int32(11))
    np.testing.assert_array_equal(cache.current_places(exp, seen), np.repeat([15, 16, 17], FRAME))
    np.testing.assert_array_equal(cache.packed_times(exp, seen), [15.5, 17])


# What is held


def shortened(story, blocks):
    """The first blocks of a story."""
    return type(story)(
        **{name: jax.tree.map(lambda x: x[:blocks], part) for name, part in vars(story).items()}
    )


def commits(exp, story, commit, memory):
    """`memory` after all blocks of a story, and before the last; keys are taken as they are."""
    before = memory
    for number in range(len(story.q)):
        before, (full, packed, *_) = memory, histories.block_of(story, number)
        memory = commit(
            memory, *(pytrees.unstack(jax.tree.map(jnp.asarray, kv), 2) for kv in (full, packed))
        )
    return before, memory


def held_blocks(store, layer=0):
    """Numbers that the values of a store's slots begin with."""
    return np.floor(np.asarray(store[layer].v[0, :, 0, 0, 0]))


def test_thirty_commits_compile_once_and_keep_shape_and_sink():
    exp = histories.experiment(PACKING)
    commit = histories.jit(lambda memory, full, packed: cache.commit(exp, memory, full, packed))
    story = told(exp, blocks=30)
    _, early = commits(exp, shortened(story, 2), commit, cache.init(exp, VIDEOS))
    _, late = commits(exp, story, commit, cache.init(exp, VIDEOS))
    assert commit._cache_size() == 1
    jax.tree.map(
        np.testing.assert_array_equal, [x.sink for x in late.layers], [x.sink for x in early.layers]
    )
    assert held_blocks([x.sink for x in late.layers]).tolist() == [1, 7, 1001, 1007]
    ids = np.asarray(cache.plan(PACKING, late.num_blocks).ids)
    assert sorted(ids) == [
        -1,
        24,
        25,
        26,
        27,
        28,
    ]  # past capacity the oldest went; 29 is still sharp
    held = held_blocks([x.mid for x in late.layers])
    np.testing.assert_array_equal(held[ids >= 0], 501 + 1000 * ids[ids >= 0])
    assert sorted(held_blocks([x.recent for x in late.layers])) == [28001, 28007, 29001, 29007]


def test_a_donated_memory_is_written_in_place():
    exp = histories.experiment(PACKING)
    function = lambda memory, full, packed: cache.commit(exp, memory, full, packed)  # noqa: E731
    plain, given_away = jax.jit(function), jax.jit(function, donate_argnums=0)
    story = told(exp, blocks=6)
    _, expected = commits(exp, story, plain, cache.init(exp, VIDEOS))
    stores = lambda memory: jax.tree.leaves([(x.sink, x.mid, x.recent) for x in memory.layers])  # noqa: E731
    memory = cache.init(exp, VIDEOS)
    assert len({leaf.unsafe_buffer_pointer() for leaf in stores(memory)}) == 2 * 6
    before, memory = commits(exp, story, given_away, memory)
    jax.tree.map(np.testing.assert_array_equal, memory, expected)
    assert all(leaf.is_deleted() for leaf in stores(before))
    full, packed, *_ = (
        pytrees.unstack(jax.tree.map(jnp.asarray, x), 2) for x in histories.block_of(story, 0)
    )
    saved = given_away.lower(memory, full, packed).compile().memory_analysis().alias_size_in_bytes
    assert saved >= sum(leaf.nbytes for leaf in stores(memory))


@pytest.mark.parametrize("cfg", [PACKING, MOVED], ids=["once", "moved"])
def test_looking_keeps_the_memory_and_committing_twice_is_committing_once(cfg):
    exp = histories.experiment(cfg)
    story = told(exp, blocks=9)
    *_, (_, memory, after) = walk(exp, story)
    held, step = jax.tree.map(np.array, memory), histories.compiled(exp)
    shown, again = step(memory, view.scratch(exp, VIDEOS), histories.block_of(story, 8), 0.0)
    for one in shown["views"]:
        view.extend(one, jax.tree.map(lambda x: jnp.ones_like(x[:, :1]), one), jnp.int32(1))
    jax.tree.map(np.testing.assert_array_equal, memory, held)
    jax.tree.map(np.testing.assert_array_equal, again, after)


@pytest.mark.parametrize("adjustment", ["sink", "none", "incremental"])
def test_five_hundred_blocks_take_the_room_of_ten(adjustment):
    """One compilation, one size, and true contents in true places past frame 1024."""
    cfg = CacheConfig(
        block=3,
        sink=3,
        recent=3,
        top=2,
        capacity=4,
        selection="random",
        rope_adjustment=adjustment,
        score_pool=(3, 1, 1),
    )
    exp = histories.experiment(cfg)
    step, story = histories.stepper(exp), told(exp, blocks=10, videos=2)
    memory, scratch, sizes = cache.init(exp, 2), view.scratch(exp, 2), set()
    for number in range(500):  # the same ten blocks again and again
        shown, memory = step(memory, scratch, histories.block_of(story, number % 10), 0.0)
        scratch = shown["views"]
        sizes.add(sum(leaf.nbytes for leaf in jax.tree.leaves((memory, shown))))
    assert step._cache_size() == len(sizes) == 1
    repeated = type(story)(
        **{
            name: jax.tree.map(lambda x: np.tile(x, (50,) + (1,) * (x.ndim - 1)), part)
            for name, part in vars(story).items()
        }
    )
    shown = {name: histories.stack(jax.tree.map(np.asarray, part)) for name, part in shown.items()}
    seen = slow_memory.visible(cfg, 499)
    k, v = slow_memory.view(exp, repeated, seen, shown["looked"].ids)
    np.testing.assert_array_equal(shown["views"].v[:, :, : v.shape[2]], v)
    np.testing.assert_allclose(
        shown["views"].k[:, :, : k.shape[2]], k, atol=2e-5 if adjustment == "sink" else 2e-3
    )


@pytest.mark.parametrize(("cfg", "stacked"), [(ODD, False), (EXACT, True), (MOVED, False)])
def test_export_is_every_sharp_frame_at_its_true_place(cfg, stacked):
    exp = histories.experiment(cfg)
    story = told(exp, blocks=8)
    for number, (_, _, memory) in enumerate(walk(exp, story, stacked=stacked), start=1):
        if number not in (2, 8):
            continue
        total = number * cfg.block
        late = range(max(cfg.sink, total - cfg.ring), max(cfg.sink, total))
        k, v = (
            np.concatenate(pair, axis=2)
            for pair in zip(
                slow_memory.sharp(exp, story, range(total)[: cfg.sink], 0),
                slow_memory.sharp(exp, story, late, late.start),
            )
        )
        held = cache.export(exp, memory)
        np.testing.assert_allclose(held.k, k, atol=1e-4)
        np.testing.assert_array_equal(held.v, v)
        np.testing.assert_array_equal(
            cache.end_indices(exp, memory), [total * FRAME, held.k.shape[2]]
        )


def test_extending_a_view_writes_only_behind_what_is_valid():
    kv = KV(k=jnp.arange(24.0).reshape(1, 6, 2, 2), v=jnp.arange(24.0).reshape(1, 6, 2, 2) + 100)
    own = KV(k=-jnp.ones((1, 2, 2, 2)), v=-2 * jnp.ones((1, 2, 2, 2)))
    longer = view.extend(kv, own, jnp.int32(3))
    for x, value in (("k", -1), ("v", -2)):
        old, new = np.asarray(getattr(kv, x)), np.asarray(getattr(longer, x))
        assert (new[:, 3:5] == value).all()
        np.testing.assert_array_equal(
            np.delete(new, [3, 4], axis=1), np.delete(old, [3, 4], axis=1)
        )


@pytest.mark.parametrize(
    ("profile", "held", "attended"), [("paper", 21_632, 27_872), ("published", 21_632, 26_312)]
)
def test_the_sizes_of_the_paper(profile, held, attended):
    exp = Experiment(name="full", cache=PROFILES[profile])
    seen = cache.plan(exp.cache, np.int32(500))
    assert int(cache.length(exp, seen)) == held
    assert int(cache.length(exp, seen)) + exp.cache.block * exp.tokens_per_frame == attended
    assert exp.tokens_per_packed_block == 182
    assert cache.room(Experiment(name="full", cache=PROFILES["paper"])) == 28_160
