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
from packforcing_jax.memory import layout as layouts
from packforcing_jax.networks import rope
from packforcing_jax.types import KV

VIDEOS = 3
FRAME = 6
PACKING = CacheConfig(block=2, sink=4, recent=2, top=3, capacity=5, score_pool=(2, 1, 1))
ODD = CacheConfig(block=2, sink=1, recent=5, top=0, capacity=0, rope_adjustment="none")
UNEVEN = CacheConfig(block=3, sink=1, recent=4, top=0, capacity=0)
EXACT = CacheConfig(block=3, sink=6, recent=3, top=2, capacity=4, score_pool=(3, 1, 1))
FITTED = CacheConfig(
    block=4,
    sink=4,
    recent=4,
    top=3,
    capacity=3,
    span="fit",
    max_position=17,
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
    step = step or histories.compiled(exp, stacked)
    videos = story.q.shape[2]
    memory = cache.init(exp.memory, videos, stacked=stacked)
    for number in range(len(story.q)):
        shown, after = step(memory, histories.block_of(story, number), 0.0)
        yield shown, memory, after
        memory = after


# What a block sees


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    "cfg", [ODD, UNEVEN, EXACT, FITTED], ids=["odd", "uneven", "exact", "fitted"]
)
def test_every_block_sees_what_the_slow_memory_shows(cfg, stacked):
    exp = histories.experiment(cfg)
    step = histories.stepper(exp, stacked=stacked)
    for gap in (0.0, 2.75):
        histories.check_history(exp, told(exp, blocks=12), step, gap, stacked=stacked)
    assert step._cache_size() == 1


def hide_with_noise(exp, layer, seen, story, rng, number, blocks):
    """Layer `number` with noise wherever nothing lies that is seen, nor one of the packed `blocks`."""
    block = exp.cache.block
    s = exp.tokens_per_frame
    frames = np.asarray([*seen.sink, *seen.recent], int)
    values = {1 + 1000 * (f // block) + f % block * s + i for f in frames for i in range(s)}
    full, packed = (KV(k=k[:, number], v=v[:, number]) for k, v in (story.full, story.packed))
    unrotated = jax.vmap(lambda kv: histories.in_space(exp, kv, histories.block_grid(exp)))(full).k
    keys = [np.asarray(unrotated)[f // block, :, f % block * s] for f in frames]

    def cover(store, visible):
        noise = 50 * rng.normal(size=store.shape).astype(np.float32)
        return np.where(
            visible.reshape(visible.shape + (1,) * (store.ndim - visible.ndim)), store, noise
        )

    def known(store):  # [frame] whether the keys are those of a frame that is seen
        return np.asarray(
            [
                any(np.allclose(store[:, i, 0], k, atol=1e-6) for k in keys)
                for i in range(store.shape[1])
            ],
            bool,
        )[None]

    of_frame = np.isin(np.floor(layer.view.v[:1, :, 0, 0]), list(values))
    of_block = np.isin(np.floor(layer.packed.v[:1, :, 0, 0, 0]), [501 + 1000 * b for b in blocks])
    assert of_frame.sum() == len(values)
    sink, recent = (cover(store, known(store)) for store in (layer.sink, layer.recent))
    return layer.replace(
        view=jax.tree.map(lambda x: cover(x, of_frame), layer.view),
        packed=jax.tree.map(lambda x: cover(x, of_block), layer.packed),
        sink=sink,
        recent=recent,
    )


@pytest.mark.parametrize(
    "cfg", [ODD, UNEVEN, EXACT, MOVED], ids=["odd", "uneven", "exact", "moved"]
)
def test_what_is_out_of_sight_does_not_count(cfg):
    """What was never written, was dropped or is still at full size may hold anything."""
    exp = histories.experiment(cfg)
    rng = np.random.default_rng(8)
    step = histories.compiled(exp)
    story = told(exp, blocks=11)
    for number, (shown, memory, after) in enumerate(walk(exp, story, step)):
        seen = slow_memory.visible(cfg, number)
        block = histories.block_of(story, number)

        def hidden(blocks, memory=memory, seen=seen):
            return memory.replace(
                layers=[
                    hide_with_noise(exp, layer, seen, story, rng, i, blocks)
                    for i, layer in enumerate(memory.layers)
                ]
            )

        again, _ = step(hidden(seen.archive), block, 0.0)
        same_sight(again, shown)
        if number + 1 < len(story.q):  # where packed twins of recent blocks may be seen
            _, later = step(hidden(range(number)), block, 0.0)
            following = histories.block_of(story, number + 1)
            same_sight(step(later, following, 0.0)[0], step(after, following, 0.0)[0])


def same_sight(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours["selection"], theirs["selection"])
    ours, theirs = (
        {name: histories.stack(part) for name, part in one.items()} for one in (ours, theirs)
    )
    for own, expected in zip(histories.valid(ours), histories.valid(theirs), strict=True):
        np.testing.assert_array_equal(own, expected)


def test_layers_apart_and_stacked_remember_the_same():
    exp = histories.experiment(MOVED)
    for apart, together in zip(walk(exp, told(exp)), walk(exp, told(exp), stacked=True)):
        for one, other in zip(
            (apart[0]["selection"], apart[2].layers), (together[0]["selection"], together[2].layers)
        ):
            jax.tree.map(
                functools.partial(np.testing.assert_allclose, atol=1e-6),
                histories.stack(one),
                other,
            )


def test_only_differences_of_positions_matter():
    exp = histories.experiment(dataclasses.replace(PACKING, span="fit", max_position=11))
    spec = exp.memory
    story = told(exp, blocks=10)
    look = histories.looker(exp)
    story.full, story.packed = ((k, np.sin(7 * v)) for k, v in (story.full, story.packed))
    *_, (shown, memory, _) = walk(exp, story)
    block = jax.tree.map(jnp.asarray, histories.block_of(story, 9))
    names = ("sink_position", "mid_position", "recent_position", "current_position")

    def shifted(layout, by, ahead):
        moved = {name: getattr(layout, name) + by for name in names}
        layout = layout.replace(**moved)
        return layout.replace(current_position=layout.current_position + ahead)

    @histories.jit
    def recall(layout, ahead, by):
        """The view with all that is seen at the positions of `layout`, and with the block in it."""
        now = rope.time_angles(layouts.current_times(spec, layout, exp.cache.block), spec)

        def one(layer, q, random, own):
            sink = exp.cache.sink * FRAME
            turn = rope.time_angles(jnp.full(sink, by), spec)
            keys = layer.view.k.at[:, :sink].set(rope.rotate(layer.view.k[:, :sink], turn))
            layer = layer.replace(view=layer.view.replace(k=keys))
            layer = cache.reposition(
                spec, layout.replace(current_position=layout.current_position - ahead), layer
            )
            recalled, selection = view.recall(spec, layout, layer, q, random)
            own = histories.in_space(exp, own, histories.block_grid(exp))
            own = own.replace(k=rope.rotate(own.k, now))
            return cache.write_block(spec, layout, recalled, own), selection.ids

        full, _, q, random, _ = block
        each = zip(memory.layers, *(pytrees.unstack(x, 2) for x in (q, random, full)), strict=True)
        views, ids = pytrees.unzip([one(*args) for args in each])
        return pytrees.stack(views), pytrees.stack(ids)

    def moved(by, ahead=0.0):
        layout = shifted(shown["layout"], by, ahead)
        views, ids = recall(layout, ahead, by)
        return look({"layout": layout, "views": views, "length": shown["length"]}, block), ids

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
    story = told(exp, blocks=7)
    frames = 3 * 7
    story.full = story.packed = story.full[0], np.sin(7 * story.full[1])
    *_, (shown, _, _) = walk(exp, story)
    rows, columns = np.tile(slow_memory.frame_grid(exp), frames)
    angles = slow_memory.angles_of(exp, np.repeat(np.arange(frames), FRAME), rows, columns)
    q, k, v = (np.concatenate(list(x), axis=2) for x in (story.q, *story.full))
    expected = slow_memory.attention_fn(
        slow_memory.turn(q, angles), slow_memory.turn(k, angles), v
    )[:, :, -3 * FRAME :]
    shown = {name: histories.stack(part) for name, part in shown.items()}
    np.testing.assert_allclose(
        histories.looker(exp)(shown, histories.block_of(story, 6)), expected, atol=2e-5
    )


# Positions


@given(st.sampled_from([PACKING, EXACT, FITTED]), st.integers(4, 30), st.integers(0, 400))
@settings(max_examples=25, derandomize=True, deadline=None)
def test_a_fitted_span_stays_within_the_trained_range(cfg, trained, blocks):
    fixed = cfg.sink + cfg.recent + cfg.block
    cfg = dataclasses.replace(
        cfg, span="fit", rope_adjustment="sink", max_position=max(trained, fixed + 1)
    )
    seen = layouts.layout(cfg, layouts.begin(blocks))
    assert seen.current_position + cfg.block <= cfg.max_position + 1e-4
    assert (
        seen.recent_position - seen.sink <= seen.num_selected * cfg.block
    )  # squeezed, never stretched


@pytest.mark.parametrize(
    ("adjustment", "current", "sink"),
    [
        ("sink", [0, 3, 6, 9, 12, 12, 12], [0] * 7),
        ("none", [0, 3, 6, 9, 12, 15, 270], [0] * 7),
        ("incremental", [0, 3, 6, 9, 12, 15, 270], [0, 0, 0, 0, 0, 3, 258]),
        ("sink_only", [0, 3, 6, 9, 12, 15, 270], [0, 0, 0, 0, 0, 3, 258]),
    ],
)
def test_positions_stay_or_follow_the_true_frames(adjustment, current, sink):
    cfg = CacheConfig(
        block=3,
        sink=3,
        recent=3,
        top=2,
        capacity=5,
        score_pool=(1, 1, 1),
        rope_adjustment=adjustment,
    )
    found = [layouts.layout(cfg, layouts.begin(n)) for n in (0, 1, 2, 3, 4, 5, 90)]
    assert [float(seen.current_position) for seen in found] == current
    assert [float(seen.sink_position) for seen in found] == sink
    assert [int(seen.start) for seen in found] == [0, 3, 6, 9, 12, 15, 270]


@pytest.mark.parametrize(
    ("block", "frames"), [(4, (0.5, 2.5)), (3, (0.5, 2.0)), (2, (0.5, 1.0)), (1, (0.0, 0.0))]
)
def test_packed_tokens_sit_in_the_middle_of_what_they_stand_for(block, frames):
    cfg = dataclasses.replace(
        PROFILES["paper"], block=block, sink=2 * block, recent=block, score_pool=(1, 4, 4)
    )
    exp = Experiment(name="full", cache=cfg)
    times, grid = layouts.packed_positions(exp.memory)
    np.testing.assert_array_equal(times, np.repeat(frames, 7 * 13))
    rows, columns = (
        np.mgrid[:7, :13] * 4 + 1.5
    )  # 8 latent cells are 4 tokens, counted from the middle of the first
    np.testing.assert_array_equal(
        grid, np.tile(np.stack([rows, columns], axis=-1).reshape(-1, 2), (2, 1))
    )
    native = dataclasses.replace(
        exp, compressor=dataclasses.replace(exp.compressor, positions="native")
    )
    np.testing.assert_array_equal(layouts.packed_positions(native.memory)[1], (grid - 1.5) / 4)
    np.testing.assert_array_equal(layouts.packed_positions(native.memory)[0], times)


@pytest.mark.parametrize("patch", [(0, 0), (3, 8), (6, 12)])
def test_a_packed_token_agrees_most_with_the_patches_it_stands_for(patch):
    """Rotary agreement of equal contents over all positions in a frame; those nearest (4r+1.5, 4c+1.5) win."""
    exp = Experiment(name="full", dit=DiTConfig(rope_pairs=(0, 32, 32)))
    grid = layouts.packed_positions(exp.memory)[1].reshape(2, 7, 13, 2)[0]
    own = rope.space_angles(jnp.asarray(grid[patch][None]), exp.dit)
    there = rope.space_angles(jnp.asarray(rope.grid(np.arange(30), np.arange(52), 1)), exp.dit)
    agreement = np.cos(there - own).sum(-1).reshape(30, 52)
    best = np.argwhere(agreement >= np.sort(agreement.ravel())[-4] - 1e-3)
    middle = 4 * np.asarray(patch) + 1.5
    assert sorted(map(tuple, best.tolist())) == sorted(
        itertools.product(*((int(x), int(x) + 1) for x in middle))
    )


def test_the_current_block_and_its_twin_share_their_positions():
    exp = histories.experiment(EXACT)
    seen = layouts.layout(exp.cache, layouts.begin(11))
    times = layouts.current_times(exp.memory, seen, exp.cache.block)
    np.testing.assert_array_equal(times, np.repeat([15, 16, 17], FRAME))
    np.testing.assert_array_equal(layouts.packed_times(exp.memory, seen), [15.5, 17])


# What is held


def shortened(story, blocks):
    """The first blocks of a story."""
    return type(story)(
        **{name: jax.tree.map(lambda x: x[:blocks], part) for name, part in vars(story).items()}
    )


def committer(exp, **options):
    """Jitted commit of one block of a story, keys taken as they are."""
    return jax.jit(
        lambda memory, latent, full, packed: cache.commit(exp.memory, memory, latent, full, packed),
        compiler_options={"xla_backend_optimization_level": 0},
        **options,
    )


def commits(story, commit, memory):
    """`memory` after all blocks of a story, and before the last."""
    before = memory
    for number in range(len(story.q)):
        before = memory
        full, packed, _, _, latent = histories.block_of(story, number)
        apart = (pytrees.unstack(jax.tree.map(jnp.asarray, kv), 2) for kv in (full, packed))
        memory = commit(memory, jnp.asarray(latent), *apart)
    return before, memory


def numbers(store):
    """What the values of a store [b, k, n, h] begin with."""
    return np.floor(np.asarray(store[0, ..., 0, 0]))


def test_thirty_commits_compile_once_and_keep_shape_and_sink():
    exp = histories.experiment(PACKING)
    commit = committer(exp)
    story = told(exp, blocks=30)
    _, early = commits(shortened(story, 2), commit, cache.init(exp.memory, VIDEOS))
    _, late = commits(story, commit, cache.init(exp.memory, VIDEOS))
    assert commit._cache_size() == 1
    sink = exp.cache.sink * FRAME
    for one, other in zip(late.layers, early.layers, strict=True):
        np.testing.assert_array_equal(one.view.k[:, :sink], other.view.k[:, :sink])
        np.testing.assert_array_equal(one.view.v[:, :sink], other.view.v[:, :sink])
    frames = numbers(late.layers[0].view.v)[: exp.memory.full_res : FRAME].tolist()
    assert frames[:4] == [1, 7, 1001, 1007]
    assert sorted(frames[4:]) == [28001, 28007, 29001, 29007]
    layout = layouts.layout(PACKING, late.progress)
    ids = np.asarray(layout.ids)
    assert sorted(ids) == [-1, 24, 25, 26, 27, 28]  # past capacity the oldest went; 29 is recent
    held = numbers(late.layers[0].packed.v[:, :, 0])
    np.testing.assert_array_equal(held[ids >= 0], 501 + 1000 * ids[ids >= 0])
    recent = cache.latents_of(exp.memory, late, 29 * 2 + jnp.arange(2))
    np.testing.assert_array_equal(recent, story.latent[29])


def test_a_donated_memory_is_written_in_place():
    exp = histories.experiment(PACKING)
    plain = committer(exp)
    given_away = committer(exp, donate_argnums=0)
    story = told(exp, blocks=6)
    _, expected = commits(story, plain, cache.init(exp.memory, VIDEOS))
    stores = lambda memory: [x for x in jax.tree.leaves(memory.layers) if x.ndim > 2 and x.size]  # noqa: E731
    memory = cache.init(exp.memory, VIDEOS)
    assert len({leaf.unsafe_buffer_pointer() for leaf in stores(memory)}) == 2 * 5
    before, memory = commits(story, given_away, memory)
    jax.tree.map(np.testing.assert_array_equal, memory, expected)
    assert all(leaf.is_deleted() for leaf in stores(before))
    full, packed, _, _, latent = histories.block_of(story, 0)
    apart = (pytrees.unstack(jax.tree.map(jnp.asarray, x), 2) for x in (full, packed))
    program = given_away.lower(memory, jnp.asarray(latent), *apart).compile()
    saved = program.memory_analysis().alias_size_in_bytes
    assert saved >= sum(leaf.nbytes for leaf in stores(memory))


@pytest.mark.parametrize("cfg", [PACKING, MOVED], ids=["once", "moved"])
def test_looking_keeps_the_memory_and_committing_twice_is_committing_once(cfg):
    exp = histories.experiment(cfg)
    story = told(exp, blocks=9)
    *_, (_, memory, after) = walk(exp, story)
    held = jax.tree.map(np.array, memory)
    step = histories.compiled(exp)
    shown, again = step(memory, histories.block_of(story, 8), 0.0)
    for one in shown["views"]:
        cache.extend(one, jax.tree.map(lambda x: jnp.ones_like(x[:, :1]), one), jnp.int32(1))
    jax.tree.map(np.testing.assert_array_equal, memory, held)
    jax.tree.map(np.testing.assert_array_equal, again, after)


@pytest.mark.parametrize("adjustment", ["sink", "none", "incremental"])
def test_five_hundred_blocks_take_the_room_of_ten(adjustment):
    """One compilation, one size, and true contents at true positions past frame 1024."""
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
    step = histories.stepper(exp)
    story = told(exp, blocks=10, videos=2)
    memory = cache.init(exp.memory, 2)
    sizes = set()
    for number in range(500):  # the same ten blocks again and again
        shown, memory = step(memory, histories.block_of(story, number % 10), 0.0)
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
    histories.check_view(exp, repeated, seen, shown, atol=2e-5 if adjustment == "sink" else 2e-3)


@pytest.mark.parametrize(("cfg", "stacked"), [(ODD, False), (EXACT, True), (MOVED, False)])
def test_export_is_every_frame_at_full_size_at_its_true_position(cfg, stacked):
    """Where recent frames move, those that are seen; else the block before them too."""
    exp = histories.experiment(cfg)
    story = told(exp, blocks=8)
    held = cfg.recent + (0 if cfg.rope_adjustment == "sink" else cfg.block)
    for number, (_, _, memory) in enumerate(walk(exp, story, stacked=stacked), start=1):
        if number not in (2, 8):
            continue
        total = number * cfg.block
        late = range(max(cfg.sink, total - held), max(cfg.sink, total))
        k, v = (
            np.concatenate(pair, axis=2)
            for pair in zip(
                slow_memory.full_res(exp, story, range(total)[: cfg.sink], 0),
                slow_memory.full_res(exp, story, late, late.start),
            )
        )
        found = cache.export(exp.memory, memory)
        np.testing.assert_allclose(found.k, k, atol=1e-4)
        np.testing.assert_array_equal(found.v, v)
        frames = min(total, cfg.sink + cfg.recent + cfg.block)
        ends = cache.end_indices(exp.memory, memory)
        np.testing.assert_array_equal(ends, [total * FRAME, frames * FRAME])


def test_extending_a_view_writes_only_behind_what_is_valid():
    kv = KV(k=jnp.arange(24.0).reshape(1, 6, 2, 2), v=jnp.arange(24.0).reshape(1, 6, 2, 2) + 100)
    own = KV(k=-jnp.ones((1, 2, 2, 2)), v=-2 * jnp.ones((1, 2, 2, 2)))
    longer = cache.extend(kv, own, jnp.int32(3))
    for x, value in (("k", -1), ("v", -2)):
        old = np.asarray(getattr(kv, x))
        new = np.asarray(getattr(longer, x))
        assert (new[:, 3:5] == value).all()
        np.testing.assert_array_equal(
            np.delete(new, [3, 4], axis=1), np.delete(old, [3, 4], axis=1)
        )


@pytest.mark.parametrize(
    ("profile", "held", "attended"), [("paper", 21_632, 27_872), ("published", 21_632, 26_312)]
)
def test_the_sizes_of_the_paper(profile, held, attended):
    exp = Experiment(name="full", cache=PROFILES[profile])
    seen = layouts.layout(exp.cache, layouts.begin(500))
    assert int(layouts.length(exp.memory, seen)) == attended
    assert attended - exp.cache.block * exp.tokens_per_frame == held
    assert exp.tokens_per_packed_block == 182
    assert Experiment(name="full", cache=PROFILES["paper"]).memory.room == 28_160
