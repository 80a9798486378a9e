"""Drawing only reads the memory, remembering writes it once, and noise depends on nothing but its four numbers."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from packforcing_jax import pytrees
from packforcing_jax.config import SampleConfig
from packforcing_jax.memory import cache, view
from packforcing_jax.networks import compressor, dit, rope
from packforcing_jax.sampling import block_step, schedules

EXP = tiny.EXP
NETS, STACKED = tiny.apart(), tiny.nets()
ONE_STEP = dataclasses.replace(EXP, sample=dataclasses.replace(EXP.sample, steps=(1000,)))
BLOCKS = 30
CHANGE = 17  # from this block on, another prompt


@pytest.fixture(scope="module")
def text():
    return tiny.words()


@pytest.fixture(scope="module")
def filled(text):
    """What was drawn, and a memory in which sink, packed blocks and recent are all in use."""
    return tiny.rollout(EXP, 5, lambda block: text)


def drawn(memory, text, chance, exp=EXP):
    return tiny.draw(NETS, exp, memory, chance=chance, text=text)


# noise ----------------------------------------------------------------------------------------------------------------


def test_noise_has_a_block_for_the_start_and_one_for_each_later_step():
    chance = tiny.chances(EXP, 0)
    assert (chance.noise.shape, chance.renoise.shape) == ((2, 3, 8, 4, 12), (2, 2, 3, 8, 4, 12))
    everything = np.concatenate([np.ravel(chance.noise), np.ravel(chance.renoise)])
    assert abs(everything.mean()) < 0.05
    assert abs(everything.std() - 1) < 0.05


def test_lots_are_uniform_one_for_each_layer_video_and_slot():
    chance = tiny.chances(tiny.with_cache(capacity=900), 0)
    assert chance.lots.shape == (
        2,
        2,
        901,
    )  # capacity, and the twin of the block that is still sharp
    quarters = np.quantile(chance.lots, [0, 0.25, 0.5, 0.75, 1], axis=2)
    np.testing.assert_allclose(
        quarters, np.broadcast_to([[[0]], [[0.25]], [[0.5]], [[0.75]], [[1]]], (5, 2, 2)), atol=0.06
    )
    alike = np.corrcoef(np.reshape(chance.lots, (4, -1)))
    assert np.abs(alike - np.eye(4)).max() < 0.15


def test_chance_knows_neither_the_batch_nor_its_order():
    three = tiny.chances(EXP, 4, [70, 5, 2**31 - 1])
    alone, turned = tiny.chances(EXP, 4, [5]), tiny.chances(EXP, 4, [5, 2**31 - 1, 70])
    for name, axis in (("noise", 0), ("renoise", 1), ("lots", 1)):  # where the videos are
        whole = getattr(three, name)
        np.testing.assert_array_equal(whole.take(jnp.asarray([1]), axis), getattr(alone, name))
        np.testing.assert_array_equal(
            whole.take(jnp.asarray([1, 2, 0]), axis), getattr(turned, name)
        )


def test_every_number_that_names_a_noise_changes_it():
    first = tiny.chances(EXP, 0)
    named = [tiny.chances(EXP, 1), tiny.chances(EXP, 0, seed=12), tiny.chances(EXP, 0, [1, 0])]
    for other in [*(each.noise for each in named), *first.renoise]:
        assert abs(np.corrcoef(np.ravel(first.noise), np.ravel(other))[0, 1]) < 0.1
    for each in named:
        assert (first.lots != each.lots).all()


def test_more_steps_leave_the_noise_of_the_first_ones_and_the_lots_alone():
    more = dataclasses.replace(EXP, sample=SampleConfig(steps=(1000, 800, 600, 400, 200)))
    short, long = tiny.chances(EXP, 3), tiny.chances(more, 3)
    np.testing.assert_array_equal(short.noise, long.noise)
    np.testing.assert_array_equal(short.renoise, long.renoise[:2])
    np.testing.assert_array_equal(short.lots, long.lots)


# one block ------------------------------------------------------------------------------------------------------------


ADJUSTMENTS = ("sink", "incremental", "sink_only", "none")


def moved(memory):
    """The memory as if `incremental` had turned its keys to various places."""
    return memory.replace(
        layers=[
            layer.replace(at=tiny.normal(i, *layer.mid.k.shape[:2]) + 5, sink_at=jnp.float32(2 + i))
            for i, layer in enumerate(memory.layers)
        ]
    )


@pytest.mark.parametrize("rope_adjustment", ADJUSTMENTS)
def test_drawing_again_gives_the_same_bits_and_leaves_the_memory_alone(
    filled, text, rope_adjustment
):
    exp, chance = (
        tiny.with_cache(ONE_STEP, rope_adjustment=rope_adjustment),
        tiny.chances(ONE_STEP, 5),
    )
    memory = moved(filled[1]) if rope_adjustment == "incremental" else filled[1]
    before = [np.array(leaf) for leaf in jax.tree.leaves(memory)]
    once, again = (drawn(memory, text, chance, exp) for _ in range(2))
    for one, other in zip(jax.tree.leaves(once), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    for old, leaf in zip(before, jax.tree.leaves(memory), strict=True):
        np.testing.assert_array_equal(old, leaf)


def recalled(memory, chance):
    """What `first_look` takes for each layer."""
    return pytrees.zipped(memory.layers, list(chance.lots))


def rest_by_hand(exp, seen, chance, text, clean, views):
    """The steps behind the first one after the other."""
    times, sigmas = block_step.step_table(exp.sample)
    for step in range(1, len(times)):
        noisy = (1 - sigmas[step]) * clean + sigmas[step] * chance.renoise[step - 1]
        clean, _ = block_step.guess(
            NETS, exp, seen, noisy, jnp.asarray(times[step]), sigmas[step], text, views
        )
    return clean


def first_by_hand(exp, seen, chance, text, past, look):
    times, sigmas = block_step.step_table(exp.sample)
    return block_step.guess(
        NETS, exp, seen, chance.noise, jnp.asarray(times[0]), sigmas[0], text, past, look=look
    )


def by_hand(exp, memory, text, chance):
    """The steps of a block one after the other."""
    seen = cache.plan(exp.cache, memory.num_blocks)
    clean, kept = first_by_hand(
        exp, seen, chance, text, recalled(memory, chance), block_step.first_look
    )
    views, _ = pytrees.unzip(kept)
    return rest_by_hand(exp, seen, chance, text, clean, views), views


def test_the_scan_over_steps_is_a_loop(filled, text):
    memory, chance = filled[1], tiny.chances(EXP, 5)
    latent, views = tiny.jit(by_hand, static_argnums=0)(EXP, memory, text, chance)
    scanned = drawn(memory, text, chance)
    np.testing.assert_allclose(scanned.latent, latent, atol=2e-5)
    committed = tiny.views(EXP, 5, scanned)
    np.testing.assert_allclose(
        committed.k, pytrees.stack(views).k[:, :, : committed.k.shape[2]], atol=2e-5
    )
    assert committed.k.shape[2] == (3 + 3) * 8 + 2 * 8


def test_the_first_step_alone_decides_what_is_looked_at(filled, text):
    memory, chance = filled[1], tiny.chances(EXP, 5)
    plain, other = (
        drawn(memory, text, chance.replace(renoise=chance.renoise + more)) for more in (0, 1)
    )
    np.testing.assert_array_equal(tiny.ids(plain), tiny.ids(other))
    np.testing.assert_array_equal(tiny.views(EXP, 5, plain).k, tiny.views(EXP, 5, other).k)
    assert (plain.latent != other.latent).any()


def test_a_single_step_needs_no_renoise(filled, text):
    chance = tiny.chances(ONE_STEP, 5)
    assert chance.renoise.shape[0] == 0
    assert drawn(filled[1], text, chance, ONE_STEP).latent.shape == chance.noise.shape


@partial(tiny.jit, static_argnums=0)
def guess(prediction, memory, chance, text, timestep, sigma):
    """The clean block that a network returning `prediction` sees behind noise."""
    exp = dataclasses.replace(EXP, sample=dataclasses.replace(EXP.sample, prediction=prediction))
    seen, past = cache.plan(exp.cache, memory.num_blocks), recalled(memory, chance)
    return block_step.guess(
        NETS, exp, seen, chance.noise, timestep, sigma, text, past, look=block_step.first_look
    )[0]


def test_levels_may_be_given_per_block_per_video_or_per_frame(filled, text):
    given = ("velocity", filled[1], tiny.chances(EXP, 5), text)
    whole = guess(*given, jnp.float32(600), jnp.float32(0.6))
    np.testing.assert_allclose(
        guess(*given, jnp.full((2, 3), 600.0), jnp.full((2, 3), 0.6)), whole, atol=1e-5
    )
    mixed = guess(*given, jnp.asarray([600.0, 10.0]), jnp.asarray([0.6, 0.01]))
    np.testing.assert_allclose(mixed[0], whole[0], atol=1e-5)
    assert np.abs(mixed[1] - whole[1]).max() > 1e-2


def test_a_velocity_is_turned_into_the_clean_block_it_points_at(filled, text):
    chance, level = tiny.chances(EXP, 5), (jnp.float32(600), jnp.float32(0.6))
    clean, returned = (
        guess(name, filled[1], chance, text, *level) for name in ("velocity", "clean")
    )
    np.testing.assert_allclose(clean, chance.noise - 0.6 * returned, atol=1e-5)


def test_steps_are_warped_by_the_shift_and_sigma_follows():
    times, sigmas = block_step.step_table(EXP.sample)
    np.testing.assert_allclose(
        times, [1000, 3000 * 0.6 / (1 + 2 * 0.6), 3000 * 0.25 / (1 + 2 * 0.25)], rtol=1e-5
    )
    np.testing.assert_allclose(sigmas, times / 1000, rtol=1e-5)
    np.testing.assert_array_equal(sigmas, schedules.sigma_at(schedules.table(3.0), times))


# remembering ----------------------------------------------------------------------------------------------------------


def sums(memory):
    """One number each for what sink, packed blocks and recent hold, in which nothing cancels."""
    layers = pytrees.stack(memory.layers)
    return jnp.stack(
        [
            sum((x * tiny.normal(i, *x.shape)).sum() for i, x in enumerate((part.k, part.v)))
            for part in (layers.sink, layers.mid, layers.recent)
        ]
    )


def test_the_block_never_sees_its_packed_twin_and_the_twin_sees_the_block(filled, text):
    lr = dataclasses.replace(EXP, compressor=dataclasses.replace(EXP.compressor, branches="lr"))
    latent, low, memory = tiny.latents(1)[0], tiny.lows(1)[0], filled[1]
    done = drawn(memory, text, tiny.chances(EXP, 5))

    def stored(latent, low, views):
        return sums(
            block_step.remember(
                NETS, lr, memory, latent=latent, low=low, drawn=done.replace(views=views), text=text
            )[0]
        )

    by_latent, by_low, by_views = tiny.jit(jax.jacrev(stored, argnums=(0, 1, 2)))(
        latent, low, done.views
    )
    np.testing.assert_array_equal(
        jnp.abs(by_latent).max(axis=(1, 2, 3, 4, 5)) > 0, [False, True, True]
    )
    np.testing.assert_array_equal(
        jnp.abs(by_low).max(axis=(1, 2, 3, 4, 5)) > 0, [False, True, False]
    )
    committed = int(cache.length(EXP, cache.plan(EXP.cache, memory.num_blocks)))
    for layer, by_view in enumerate(by_views):
        reached = jnp.abs(by_view.v)[:, :, :committed].max(axis=range(1, 5)) > 0
        np.testing.assert_array_equal(
            reached, [False, layer < 1, layer < 1]
        )  # keys of layer 1 come before it looks
        assert (by_view.v[:, :, committed:] == 0).all()  # what lies behind is scratch


def after(memory, text, exp=EXP):
    """The memory once random latents are remembered with the views that were drawn behind it."""
    done = drawn(memory, text, tiny.chances(EXP, 5))
    return tiny.remember(
        NETS, exp, memory, latent=tiny.latents(1)[0], low=tiny.lows(1)[0], drawn=done, text=text
    )[0]


def test_remembering_counts_and_writes_one_block_only(filled, text):
    memory, later = filled[1], after(filled[1], text)
    assert int(later.num_blocks) == int(memory.num_blocks) + 1 == 6
    for old, new in zip(memory.layers, later.layers, strict=True):
        np.testing.assert_array_equal(new.sink.k, old.sink.k)
        changed = (np.asarray(new.mid.v) != np.asarray(old.mid.v)).any(axis=(0, 2, 3, 4))
        assert changed.sum() == 1
        assert (np.asarray(new.recent.v) != np.asarray(old.recent.v)).all(axis=(0, 2, 3, 4)).all()


SLOT = 4  # block 5 is the fifth behind one sink block, in a ring of five


def with_packing(**changes):
    return dataclasses.replace(EXP, compressor=dataclasses.replace(EXP.compressor, **changes))


@tiny.jit
def projected_by_hand(latent, low):
    """Keys without positions and values [layer, b, p, n, h] that each layer makes of the packed tokens at timestep 0,
    from the raw weights."""
    model = STACKED.dit
    states = dit.embed_time(model, jnp.zeros((2, 1))).rows[:, 0]
    tokens = compressor.pack(STACKED.compressor, model, EXP, latent, low)
    exact = tokens - tokens.mean(-1, keepdims=True)
    normed = exact / jnp.sqrt((exact**2).mean(-1, keepdims=True) + EXP.dit.eps)
    keys, values = [], []
    for layer in range(EXP.dit.layers):
        block = jax.tree.map(lambda leaf: leaf[layer], model.blocks)  # noqa: B023
        shift, scale = (block.modulation[...][None, i] + states[:, i] for i in (0, 1))
        x = normed * (1 + scale[:, None]) + shift[:, None]
        k, v = (
            x @ one.kernel[...] + one.bias[...][None, None] for one in (block.attn.k, block.attn.v)
        )
        k = (
            k
            / jnp.sqrt((k**2).mean(-1, keepdims=True) + EXP.dit.eps)
            * block.attn.norm_k.scale[...][None, None]
        )
        keys.append(k.reshape(2, -1, 3, 12))
        values.append(v.reshape(2, -1, 3, 12))
    return jnp.stack(keys), jnp.stack(values)


def turned(keys, exp):
    """Keys [layer, b, p, n, h] at the places of their tokens on the grid."""
    angles = rope.space_angles(jnp.asarray(cache.packed_places(exp)[1]), exp.dit)
    return jnp.stack([rope.rotate(k, angles) for k in keys])


def packed_in(memory):
    """Packed keys and values of block 5, [layer, b, p, n, h]."""
    return jax.tree.map(lambda x: np.asarray(x)[:, :, SLOT], pytrees.stack(memory.layers).mid)


def test_a_packed_twin_is_stored_as_clean_at_its_place_on_the_grid(filled, text):
    """Its first layer's keys, worked out from its tokens at timestep 0."""
    stored, (k, v) = (
        packed_in(after(filled[1], text)),
        projected_by_hand(tiny.latents(1)[0], tiny.lows(1)[0]),
    )
    np.testing.assert_allclose(stored.k[0], turned(k, EXP)[0], atol=1e-5)
    np.testing.assert_allclose(stored.v[0], v[0], atol=1e-5)
    assert np.abs(stored.v[1] - v[1]).max() > 0.1  # behind a layer, the twin has listened


def test_projected_twins_are_what_each_layer_makes_of_the_same_packed_tokens(filled, text):
    exp = with_packing(keys="projected")
    stored, (k, v) = (
        packed_in(after(filled[1], text, exp)),
        projected_by_hand(tiny.latents(1)[0], tiny.lows(1)[0]),
    )
    np.testing.assert_allclose(stored.k, turned(k, EXP), atol=1e-5)
    np.testing.assert_allclose(stored.v, v, atol=1e-5)


def test_where_packed_tokens_stand_changes_the_rotation_of_their_keys_only(filled, text):
    stretched, native = (
        with_packing(keys="projected", places=places) for places in ("stretched", "native")
    )
    places = [cache.packed_places(exp)[1] for exp in (stretched, native)]
    np.testing.assert_array_equal(places[1], [[0, 0], [0, 1], [1, 0], [1, 1]] * 2)
    ours, theirs = (after(filled[1], text, exp) for exp in (stretched, native))
    mine, yours = packed_in(ours), packed_in(theirs)
    np.testing.assert_array_equal(mine.v, yours.v)
    angles = rope.space_angles(jnp.asarray(places[1] - places[0]), EXP.dit)
    np.testing.assert_allclose(
        yours.k, jnp.stack([rope.rotate(k, angles) for k in mine.k]), atol=1e-5
    )
    assert np.abs(mine.k - yours.k).max() > 0.1
    for name in ("sink", "recent"):
        for layers in zip(ours.layers, theirs.layers, strict=True):
            jax.tree.map(np.testing.assert_array_equal, *(getattr(layer, name) for layer in layers))


# layers one by one, or scanned ----------------------------------------------------------------------------------------

FULL = 7  # blocks, after which as many packed ones show as the archive holds


@pytest.fixture(scope="module")
def full(text):
    """A memory whose archive shows more packed blocks than are attended, and other text for the next block."""
    return tiny.rollout(EXP, FULL, lambda block: text)[1], tiny.words(seed=71)


@pytest.mark.parametrize(
    "exp",
    [
        EXP,
        tiny.with_cache(ONE_STEP, scope="shared", timing="late", rope_adjustment="incremental"),
    ],
    ids=["plain", "shared-late-incremental"],
)
def test_scanned_layers_draw_and_remember_what_layers_one_by_one_do(full, exp):
    (memory, text), chance = full, tiny.chances(exp, FULL)
    memory = memory if exp is EXP else moved(memory)
    stacked = memory.replace(layers=pytrees.stack(memory.layers))
    found = []
    for nets, before, words in ((NETS, memory, text), (STACKED, stacked, pytrees.stack(text))):
        done = tiny.draw(nets, exp, before, chance=chance, text=words)
        later, packed, _ = tiny.remember(
            nets, exp, before, latent=done.latent, low=tiny.lows(1)[0], drawn=done, text=words
        )
        views = tiny.views(exp, FULL, done)
        found.append(
            (
                done.latent,
                pytrees.stack(done.looked),
                views,
                pytrees.stack(packed),
                pytrees.stack(later.layers),
            )
        )
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), *found)


# when and by whom it is chosen ----------------------------------------------------------------------------------------


def asking(exp, seen, mix):
    """Looks back as `first_look` does, and keeps the layer's queries."""

    def look(q, k, v, past):
        mixed, (view, _) = block_step.first_look(exp, seen, mix)(q, k, v, past)
        return mixed, (view, q)

    return look


@partial(tiny.jit, static_argnums=0)
def behind_the_newest(exp, memory, text, chance):
    """(the first guess, the scores [layer, b, slot] that its queries give by the policy of `exp`)."""
    newest = dataclasses.replace(exp, cache=dataclasses.replace(exp.cache, selection="recency"))
    seen = cache.plan(exp.cache, memory.num_blocks)
    clean, kept = first_by_hand(newest, seen, chance, text, recalled(memory, chance), asking)
    queries = [q for _, q in kept]
    scores = [
        view.score(exp, seen, layer, view.ask(exp, seen, q), lots)
        for layer, q, lots in zip(memory.layers, queries, chance.lots, strict=True)
    ]
    return clean, jnp.stack(scores)


def best(scores, ids, keep):
    """Ids [..., keep] of the best visible blocks in time order."""
    slots = np.argsort(np.where(ids >= 0, scores, -np.inf), axis=-1)[..., -keep:]
    return np.sort(np.asarray(ids)[slots], axis=-1)


@partial(tiny.jit, static_argnums=0)
def behind_the_chosen(exp, memory, text, chance, chosen, clean):
    """The block once every layer looks at blocks `chosen` [layer, b, top]; a first step of its own unless `clean`."""
    seen = cache.plan(exp.cache, memory.num_blocks)
    views = []
    for layer, ids in zip(memory.layers, chosen, strict=True):
        wanted = (seen.ids[None, None] == ids[..., None]).any(axis=1).astype(jnp.float32)
        looked = view.look(exp, seen, wanted)
        views.append(view.lay(exp, seen, layer, view.take(layer, looked), looked, None))
    if clean is None:
        clean, views = first_by_hand(exp, seen, chance, text, views, None)
    return rest_by_hand(exp, seen, chance, text, clean, views)


@pytest.mark.parametrize(
    ("scope", "timing", "selection"),
    [
        ("shared", "first", "affinity"),
        ("layer", "late", "random"),
        ("shared", "late", "affinity"),
    ],
)
def test_a_choice_is_made_by_what_the_first_step_asks_behind_the_newest_blocks(
    full, scope, timing, selection
):
    exp = tiny.with_cache(scope=scope, timing=timing, selection=selection)
    (memory, text), chance = full, tiny.chances(exp, FULL)
    done = drawn(memory, text, chance, exp)
    clean, scores = behind_the_newest(tiny.with_cache(selection=selection), memory, text, chance)
    ids = cache.plan(exp.cache, memory.num_blocks).ids
    own = best(np.asarray(scores), ids, exp.cache.top)
    shared = np.broadcast_to(best(np.asarray(scores).sum(axis=0), ids, exp.cache.top), own.shape)
    assert (own[0] != own[1]).any()
    assert (own != [FULL - 3, FULL - 2]).any()
    wanted = shared if scope == "shared" else own
    np.testing.assert_array_equal(tiny.ids(done), wanted)
    latent = behind_the_chosen(
        EXP, memory, text, chance, jnp.asarray(wanted), clean if timing == "late" else None
    )
    np.testing.assert_allclose(done.latent, latent, atol=2e-5)


# thirty blocks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long(text):
    """(blocks drawn with one prompt, blocks drawn with another prompt from CHANGE on, programs compiled for it all)."""
    before = [function._cache_size() for function in (tiny.draw, tiny.remember)]
    other = tiny.words(seed=70)
    plain, _ = tiny.rollout(EXP, BLOCKS, lambda block: text)
    changed, _ = tiny.rollout(EXP, BLOCKS, lambda block: text if block < CHANGE else other)
    return (
        plain,
        changed,
        [
            function._cache_size() - size
            for function, size in zip((tiny.draw, tiny.remember), before)
        ],
    )


def test_warm_up_saturation_and_a_new_prompt_need_no_new_program(long, filled):
    assert long[2] == [0, 0]  # the fixture `filled` has compiled both
    assert len(long[0]) == BLOCKS


def test_latents_stay_finite(long):
    assert all(np.isfinite(each.latent).all() for each in long[0] + long[1])


def test_a_later_prompt_leaves_earlier_blocks_alone(long):
    plain, changed, _ = long
    for block in range(BLOCKS):
        same = (np.asarray(plain[block].latent) == np.asarray(changed[block].latent)).all()
        assert same == (block < CHANGE)


def test_a_longer_video_starts_with_the_shorter_one(long, filled):
    for one, other in zip(filled[0], long[0]):
        np.testing.assert_array_equal(one.latent, other.latent)


def test_chosen_blocks_are_visible_ones_in_time_order(long):
    cfg, orders = EXP.cache, set()
    for block, each in enumerate(long[0]):
        newest = block - cfg.recent // cfg.block  # this one is still sharp
        visible = set(range(max(cfg.sink // cfg.block, newest - cfg.capacity), newest))
        for ids in tiny.ids(each).reshape(-1, cfg.top):
            real = ids[ids >= 0]
            assert set(real.tolist()) <= visible
            assert len(real) == min(cfg.top, len(visible))
            np.testing.assert_array_equal(real, np.unique(real))
            np.testing.assert_array_equal(ids[len(real) :], -1)
            orders.add(tuple((real - newest).tolist()))
    assert len(orders) > 3  # it is a choice


def test_layers_and_videos_choose_for_themselves(long):
    chosen = np.stack([tiny.ids(each) for each in long[0]])  # [block, layer, b, top]
    assert (chosen[:, 0] != chosen[:, 1]).any()
    assert (chosen[:, :, 0] != chosen[:, :, 1]).any()


def test_a_memory_without_packed_blocks_runs_without_a_compressor(text):
    exp = tiny.with_cache(top=0, capacity=0)
    bare = block_step.Nets(dit=NETS.dit, compressor=None)
    memory, latent = cache.init(exp, 2), tiny.latents(1)[0]
    done = drawn(memory, text, tiny.chances(exp, 0), exp)
    later, packed, _ = tiny.remember(
        bare, exp, memory, latent=latent, low=latent, drawn=done, text=text
    )
    assert int(later.num_blocks) == 1
    assert packed is None
    assert all(layer.mid.k.size == 0 for layer in later.layers)
