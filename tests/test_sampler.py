"""Denoising writes scratch alone, committing writes the memory once, and noise depends on its four numbers alone."""

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
from packforcing_jax.memory import layout as layouts
from packforcing_jax.networks import rope
from packforcing_jax.sampling import block_step, schedules
from packforcing_jax.sampling.block_step import Access, Denoiser
from packforcing_jax.sampling.schedules import NoiseLevel

EXP = tiny.EXP
NETS = tiny.apart()
STACKED = tiny.nets()
ONE_STEP = dataclasses.replace(EXP, sample=dataclasses.replace(EXP.sample, steps=(1000,)))
BLOCKS = 30
CHANGE = 17  # from this block on, another prompt


@pytest.fixture(scope="module")
def text():
    return tiny.text()


@pytest.fixture(scope="module")
def filled(text):
    """What was denoised, and a memory in which sink, packed blocks and recent are all in use."""
    return tiny.rollout(EXP, 5, lambda block: text)


def denoised(memory, text, noise, exp=EXP):
    """(the memory with other scratch, the block)"""
    return tiny.denoise(NETS, exp.step, memory, noise=noise, text=text)


# noise ----------------------------------------------------------------------------------------------------------------


def test_noise_has_a_block_for_the_start_and_one_for_each_later_step():
    noise = tiny.noise(EXP, 0)
    assert (noise.noise.shape, noise.renoise.shape) == ((2, 3, 8, 4, 12), (2, 2, 3, 8, 4, 12))
    everything = np.concatenate([np.ravel(noise.noise), np.ravel(noise.renoise)])
    assert abs(everything.mean()) < 0.05
    assert abs(everything.std() - 1) < 0.05


def test_random_scores_are_uniform_one_for_each_layer_video_and_slot():
    noise = tiny.noise(tiny.with_cache(capacity=900), 0)
    assert noise.random.shape == (
        2,
        2,
        901,
    )  # capacity, and the twin of the block that is still recent
    quarters = np.quantile(noise.random, [0, 0.25, 0.5, 0.75, 1], axis=2)
    np.testing.assert_allclose(
        quarters, np.broadcast_to([[[0]], [[0.25]], [[0.5]], [[0.75]], [[1]]], (5, 2, 2)), atol=0.06
    )
    alike = np.corrcoef(np.reshape(noise.random, (4, -1)))
    assert np.abs(alike - np.eye(4)).max() < 0.15


def test_noise_knows_neither_the_batch_nor_its_order():
    three = tiny.noise(EXP, 4, [70, 5, 2**31 - 1])
    alone = tiny.noise(EXP, 4, [5])
    turned = tiny.noise(EXP, 4, [5, 2**31 - 1, 70])
    for name, axis in (("noise", 0), ("renoise", 1), ("random", 1)):  # where the videos are
        whole = getattr(three, name)
        np.testing.assert_array_equal(whole.take(jnp.asarray([1]), axis), getattr(alone, name))
        np.testing.assert_array_equal(
            whole.take(jnp.asarray([1, 2, 0]), axis), getattr(turned, name)
        )


def test_every_number_that_names_a_noise_changes_it():
    first = tiny.noise(EXP, 0)
    named = [tiny.noise(EXP, 1), tiny.noise(EXP, 0, seed=12), tiny.noise(EXP, 0, [1, 0])]
    for other in [*(each.noise for each in named), *first.renoise]:
        assert abs(np.corrcoef(np.ravel(first.noise), np.ravel(other))[0, 1]) < 0.1
    for each in named:
        assert (first.random != each.random).all()


def test_more_steps_leave_the_noise_of_the_first_ones_and_the_random_scores_alone():
    more = dataclasses.replace(EXP, sample=SampleConfig(steps=(1000, 800, 600, 400, 200)))
    short = tiny.noise(EXP, 3)
    long = tiny.noise(more, 3)
    np.testing.assert_array_equal(short.noise, long.noise)
    np.testing.assert_array_equal(short.renoise, long.renoise[:2])
    np.testing.assert_array_equal(short.random, long.random)


# one block ------------------------------------------------------------------------------------------------------------


ADJUSTMENTS = ("sink", "incremental", "sink_only", "none")


def moved(memory):
    """The memory as if `incremental` had turned its keys to various positions."""
    return memory.replace(
        layers=[
            layer.replace(
                packed_positions=tiny.normal(i, *layer.packed.k.shape[:2]) + 5,
                sink_position=jnp.float32(2 + i),
            )
            for i, layer in enumerate(memory.layers)
        ]
    )


def remembered(exp, memory):
    """All of a memory but its scratch: what the next block may see of the views, and every other store as it is."""
    layers = [
        (x.packed, x.sink, x.recent, x.sink_position, x.packed_positions) for x in memory.layers
    ]
    return tiny.committed(exp, memory), layers, memory.latents, memory.progress


@pytest.mark.parametrize("blocks", [0, 2, 5])
@pytest.mark.parametrize("rope_adjustment", ADJUSTMENTS)
def test_denoising_again_gives_the_same_bits_and_writes_scratch_alone(
    filled, text, rope_adjustment, blocks
):
    exp = tiny.with_cache(ONE_STEP, rope_adjustment=rope_adjustment)
    memory = filled[1] if blocks == 5 else tiny.rollout(exp, blocks)[1]
    noise = tiny.noise(exp, 5)
    memory = moved(memory) if rope_adjustment == "incremental" and blocks == 5 else memory
    before = [np.array(leaf) for leaf in jax.tree.leaves(memory)]
    once, again = (denoised(memory, text, noise, exp) for _ in range(2))
    for one, other in zip(jax.tree.leaves(once), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    for old, leaf in zip(before, jax.tree.leaves(memory), strict=True):
        np.testing.assert_array_equal(old, leaf)
    kept, after = (remembered(exp, x) for x in (memory, once[0]))
    jax.tree.map(np.testing.assert_array_equal, kept, after)
    assert kept[0].k.shape[2] == 3 * min(blocks, 2)


@pytest.mark.parametrize("exp", [EXP, tiny.with_cache(scope="shared", timing="late")])
def test_of_a_view_the_slots_of_the_block_and_of_packed_blocks_are_written_and_no_others(
    filled, text, exp
):
    """In particular not the room behind them, which is the packed twin's."""
    memory = filled[1]
    s = EXP.tokens_per_frame
    after, _ = denoised(memory, text, tiny.noise(exp, 5), exp)
    views, others = (block_step.views_of(x) for x in (memory, after))
    written = np.arange(EXP.memory.room) // s
    block = 3 + (np.arange(15, 18) - 3) % 6  # frames 15 to 17 in a ring of six behind three
    for one, other in zip(views, others, strict=True):
        for name in ("k", "v"):
            same = np.asarray(getattr(one, name) == getattr(other, name)).all(axis=(0, 2, 3))
            assert not same[np.isin(written, block)].any()
            assert same[(written < 9) & ~np.isin(written, block)].all()
            assert same[9 * s + 2 * EXP.tokens_per_packed_block :].all()


def recalled(memory, noise):
    """What `choosing` takes for each layer."""
    return pytrees.zipped(memory.layers, list(noise.random))


def rest_by_hand(exp, layout, noise, text, clean, views):
    """The steps behind the first one after the other."""
    times, sigmas = block_step.step_table(exp.sample)
    denoiser = Denoiser(NETS, exp.step, text)
    for step in range(1, len(times)):
        noisy = (1 - sigmas[step]) * clean + sigmas[step] * noise.renoise[step - 1]
        level = NoiseLevel(timestep=jnp.asarray(times[step]), sigma=sigmas[step])
        clean, views = block_step.predict_x0(denoiser, layout, noisy, level, views)
    return clean, views


def first_by_hand(exp, layout, noise, text, past, access=block_step.READS):
    times, sigmas = block_step.step_table(exp.sample)
    level = NoiseLevel(timestep=jnp.asarray(times[0]), sigma=sigmas[0])
    denoiser = Denoiser(NETS, exp.step, text)
    return block_step.predict_x0(denoiser, layout, noise.noise, level, past, access)


def by_hand(exp, memory, text, noise):
    """The steps of a block one after the other."""
    layout = layouts.layout(exp.cache, memory.progress)
    clean, kept = first_by_hand(
        exp, layout, noise, text, recalled(memory, noise), Access(attends=block_step.choosing)
    )
    views, _ = pytrees.unzip(kept)
    return rest_by_hand(exp, layout, noise, text, clean, views)


def packed_of(exp, memory):
    """The attended packed blocks in the views of a full memory, [layer, b, k, n, h]."""
    views = pytrees.stack(block_step.views_of(memory))
    tokens = slice(exp.memory.full_res, exp.memory.full_res + 2 * exp.tokens_per_packed_block)
    return jax.tree.map(lambda x: np.asarray(x)[:, :, tokens], views)


def test_the_scan_over_steps_is_a_loop(filled, text):
    memory = filled[1]
    noise = tiny.noise(EXP, 5)
    latent, views = tiny.jit(by_hand, static_argnums=0)(EXP, memory, text, noise)
    after, scanned = denoised(memory, text, noise)
    np.testing.assert_allclose(scanned.latent, latent, atol=2e-5)
    looped = block_step.with_views(memory, views)
    for part in (tiny.committed, packed_of):
        one, other = (part(EXP, x) for x in (after, looped))
        np.testing.assert_allclose(one.k, other.k, atol=2e-5)
    assert tiny.committed(EXP, after).k.shape[2] == 3 + 3
    assert packed_of(EXP, after).k.shape[2] == 2 * 8


def test_the_first_step_alone_decides_what_is_attended_to(filled, text):
    memory = filled[1]
    noise = tiny.noise(EXP, 5)
    (one, plain), (two, other) = (
        denoised(memory, text, noise.replace(renoise=noise.renoise + more)) for more in (0, 1)
    )
    np.testing.assert_array_equal(tiny.ids(plain), tiny.ids(other))
    np.testing.assert_array_equal(packed_of(EXP, one).k, packed_of(EXP, two).k)
    assert (plain.latent != other.latent).any()


def test_a_single_step_needs_no_renoise(filled, text):
    noise = tiny.noise(ONE_STEP, 5)
    assert noise.renoise.shape[0] == 0
    assert denoised(filled[1], text, noise, ONE_STEP)[1].latent.shape == noise.noise.shape


@partial(tiny.jit, static_argnums=0)
def predict(prediction, memory, noise, text, timestep, sigma):
    """The clean block that a network returning `prediction` sees behind noise."""
    exp = dataclasses.replace(EXP, sample=dataclasses.replace(EXP.sample, prediction=prediction))
    layout = layouts.layout(exp.cache, memory.progress)
    past = recalled(memory, noise)
    level = NoiseLevel(timestep=timestep, sigma=sigma)
    denoiser = Denoiser(NETS, exp.step, text)
    choosing = Access(attends=block_step.choosing)
    return block_step.predict_x0(denoiser, layout, noise.noise, level, past, choosing)[0]


def test_levels_may_be_given_per_block_per_video_or_per_frame(filled, text):
    given = ("velocity", filled[1], tiny.noise(EXP, 5), text)
    whole = predict(*given, jnp.float32(600), jnp.float32(0.6))
    np.testing.assert_allclose(
        predict(*given, jnp.full((2, 3), 600.0), jnp.full((2, 3), 0.6)), whole, atol=1e-5
    )
    mixed = predict(*given, jnp.asarray([600.0, 10.0]), jnp.asarray([0.6, 0.01]))
    np.testing.assert_allclose(mixed[0], whole[0], atol=1e-5)
    assert np.abs(mixed[1] - whole[1]).max() > 1e-2


def test_a_velocity_is_turned_into_the_clean_block_it_points_at(filled, text):
    noise = tiny.noise(EXP, 5)
    level = (jnp.float32(600), jnp.float32(0.6))
    clean, returned = (
        predict(name, filled[1], noise, text, *level) for name in ("velocity", "clean")
    )
    np.testing.assert_allclose(clean, noise.noise - 0.6 * returned, atol=1e-5)


def test_steps_are_warped_by_the_shift_and_sigma_follows():
    times, sigmas = block_step.step_table(EXP.sample)
    np.testing.assert_allclose(
        times, [1000, 3000 * 0.6 / (1 + 2 * 0.6), 3000 * 0.25 / (1 + 2 * 0.25)], rtol=1e-5
    )
    np.testing.assert_allclose(sigmas, times / 1000, rtol=1e-5)
    np.testing.assert_array_equal(sigmas, schedules.sigma_at(schedules.table(3.0), times))


# committing -----------------------------------------------------------------------------------------------------------


def sums(exp, memory):
    """One number each for what sink, packed blocks and recent hold, in which nothing cancels."""
    layers = pytrees.stack(memory.layers)
    frames = exp.cache.sink * exp.tokens_per_frame
    sink = jax.tree.map(lambda x: x[:, :, :frames], layers.view)
    recent = jax.tree.map(lambda x: x[:, :, frames : exp.memory.full_res], layers.view)
    return jnp.stack(
        [
            sum((x * tiny.normal(i, *x.shape)).sum() for i, x in enumerate((part.k, part.v)))
            for part in (sink, layers.packed, recent)
        ]
    )


def test_the_block_never_sees_its_packed_twin_and_the_twin_sees_the_block(filled, text):
    lr = dataclasses.replace(EXP, compressor=dataclasses.replace(EXP.compressor, branches="lr"))
    latent = tiny.latents(1)[0]
    low_res = tiny.low_res(1)[0]
    memory, done = denoised(filled[1], text, tiny.noise(EXP, 5))

    def stored(latent, low_res, views):
        behind = block_step.with_views(memory, views)
        denoiser = Denoiser(NETS, lr.step, text)
        after, _ = block_step.commit_block(denoiser, behind, latent, low_res, done.selection)
        return sums(lr, after)

    views = block_step.views_of(memory)
    by_latent, by_low, by_views = tiny.jit(jax.jacrev(stored, argnums=(0, 1, 2)))(
        latent, low_res, views
    )
    np.testing.assert_array_equal(
        jnp.abs(by_latent).max(axis=(1, 2, 3, 4, 5)) > 0, [False, True, True]
    )
    np.testing.assert_array_equal(
        jnp.abs(by_low).max(axis=(1, 2, 3, 4, 5)) > 0, [False, True, False]
    )
    s = EXP.tokens_per_frame
    valid = EXP.memory.full_res + 2 * EXP.tokens_per_packed_block
    block = np.isin(np.arange(EXP.memory.room) // s, 3 + (np.arange(15, 18) - 3) % 6)
    seen = (np.arange(EXP.memory.room) < valid) & ~block
    packed = np.arange(EXP.memory.room) >= EXP.memory.full_res
    for layer, by_view in enumerate(by_views):
        by_value = jnp.abs(by_view.v)
        reached = by_value[:, :, packed & seen].max(axis=range(1, 5)) > 0
        np.testing.assert_array_equal(
            reached, [False, layer < 1, layer < 1]
        )  # keys of layer 1 come before it attends
        reached = by_value[:, :, ~packed & seen].max(axis=range(1, 5)) > 0
        assert reached[1] == (layer < 1)
        assert (by_view.v[:, :, ~seen] == 0).all()  # what else lies there is scratch
        assert (by_view.k[:, :, ~seen] == 0).all()


def after(memory, text, exp=EXP):
    """The memory once random latents are committed with the views that a block was denoised behind."""
    memory, done = denoised(memory, text, tiny.noise(EXP, 5))
    latent = tiny.latents(1)[0]
    low_res = tiny.low_res(1)[0]
    return tiny.commit(
        NETS, exp.step, memory, latent=latent, low_res=low_res, selection=done.selection, text=text
    )[0]


def test_committing_counts_and_writes_one_block_only(filled, text):
    memory = filled[1]
    later = after(filled[1], text)
    assert int(later.num_blocks) == int(memory.num_blocks) + 1 == 6
    before = tiny.committed(EXP, memory)
    now = tiny.committed(EXP, later)
    np.testing.assert_array_equal(now.k[:, :, :3], before.k[:, :, :3])
    np.testing.assert_array_equal(now.v[:, :, :3], before.v[:, :, :3])
    assert (now.v[:, :, 3:] != before.v[:, :, 3:]).all(axis=(0, 1, 3, 4, 5)).all()
    for old, new in zip(memory.layers, later.layers, strict=True):
        changed = (np.asarray(new.packed.v) != np.asarray(old.packed.v)).any(axis=(0, 2, 3, 4))
        assert changed.sum() == 1
        assert changed[SLOT]
    size = EXP.cache.block
    newest = int(later.num_blocks) * size - size + jnp.arange(size)
    stored = cache.latents_of(EXP.memory, later, newest)
    np.testing.assert_array_equal(stored, tiny.latents(1)[0])


SLOT = 4  # block 5 is the fifth behind one sink block, in a ring of five


def with_packing(**changes):
    return dataclasses.replace(EXP, compressor=dataclasses.replace(EXP.compressor, **changes))


@tiny.jit
def projected_by_hand(latent, low_res):
    """Keys without positions and values [layer, b, p, n, h] that each layer makes of the packed tokens at timestep 0,
    from the raw weights."""
    model = STACKED.dit
    states = model.embed_time(jnp.zeros((2, 1))).rows[:, 0]
    tokens = STACKED.compressor.pack(model, EXP.step, latent, low_res)
    exact = tokens - tokens.mean(-1, keepdims=True)
    normed = exact / jnp.sqrt((exact**2).mean(-1, keepdims=True) + EXP.dit.eps)
    keys = []
    values = []
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
    """Keys [layer, b, p, n, h] at the positions of their tokens on the grid."""
    angles = rope.space_angles(jnp.asarray(layouts.packed_positions(exp.memory)[1]), exp.dit)
    return jnp.stack([rope.rotate(k, angles) for k in keys])


def packed_in(memory):
    """Packed keys and values of block 5, [layer, b, p, n, h]."""
    return jax.tree.map(lambda x: np.asarray(x)[:, :, SLOT], pytrees.stack(memory.layers).packed)


def test_a_packed_twin_is_stored_as_clean_at_its_position_on_the_grid(filled, text):
    """Its first layer's keys, worked out from its tokens at timestep 0."""
    stored = packed_in(after(filled[1], text))
    k, v = projected_by_hand(tiny.latents(1)[0], tiny.low_res(1)[0])
    np.testing.assert_allclose(stored.k[0], turned(k, EXP)[0], atol=1e-5)
    np.testing.assert_allclose(stored.v[0], v[0], atol=1e-5)
    assert np.abs(stored.v[1] - v[1]).max() > 0.1  # behind a layer, the twin has listened


def test_projected_twins_are_what_each_layer_makes_of_the_same_packed_tokens(filled, text):
    exp = with_packing(keys="projected")
    stored = packed_in(after(filled[1], text, exp))
    k, v = projected_by_hand(tiny.latents(1)[0], tiny.low_res(1)[0])
    np.testing.assert_allclose(stored.k, turned(k, EXP), atol=1e-5)
    np.testing.assert_allclose(stored.v, v, atol=1e-5)


def test_where_packed_tokens_stand_changes_the_rotation_of_their_keys_only(filled, text):
    stretched, native = (
        with_packing(keys="projected", positions=places) for places in ("stretched", "native")
    )
    grids = [layouts.packed_positions(exp.memory)[1] for exp in (stretched, native)]
    np.testing.assert_array_equal(grids[1], [[0, 0], [0, 1], [1, 0], [1, 1]] * 2)
    ours, theirs = (after(filled[1], text, exp) for exp in (stretched, native))
    mine = packed_in(ours)
    yours = packed_in(theirs)
    np.testing.assert_array_equal(mine.v, yours.v)
    angles = rope.space_angles(jnp.asarray(grids[1] - grids[0]), EXP.dit)
    np.testing.assert_allclose(
        yours.k, jnp.stack([rope.rotate(k, angles) for k in mine.k]), atol=1e-5
    )
    assert np.abs(mine.k - yours.k).max() > 0.1
    jax.tree.map(
        np.testing.assert_array_equal, *(tiny.committed(EXP, memory) for memory in (ours, theirs))
    )


# layers one by one, or scanned ----------------------------------------------------------------------------------------

FULL = 7  # blocks, after which as many packed ones show as the archive holds


@pytest.fixture(scope="module")
def full(text):
    """A memory whose archive shows more packed blocks than are attended, and other text for the next block."""
    return tiny.rollout(EXP, FULL, lambda block: text)[1], tiny.text(seed=71)


@pytest.mark.parametrize(
    "exp",
    [
        EXP,
        tiny.with_cache(ONE_STEP, scope="shared", timing="late", rope_adjustment="incremental"),
    ],
    ids=["plain", "shared-late-incremental"],
)
def test_scanned_layers_denoise_and_commit_what_layers_one_by_one_do(full, exp):
    memory, text = full
    noise = tiny.noise(exp, FULL)
    memory = memory if exp is EXP else moved(memory)
    stacked = memory.replace(layers=pytrees.stack(memory.layers))
    found = []
    for nets, before, words in ((NETS, memory, text), (STACKED, stacked, pytrees.stack(text))):
        middle, done = tiny.denoise(nets, exp.step, before, noise=noise, text=words)
        later, packed = tiny.commit(
            nets,
            exp.step,
            middle,
            latent=done.latent,
            low_res=tiny.low_res(1)[0],
            selection=done.selection,
            text=words,
        )
        assert packed is None
        found.append(
            (
                done.latent,
                pytrees.stack(done.selection),
                packed_of(exp, middle),
                tiny.committed(exp, later),
                pytrees.stack(later.layers),
                later.latents,
            )
        )
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), *found)


# when and by whom it is chosen ----------------------------------------------------------------------------------------


def asking(cfg, layout, attention_fn):
    """Chooses as `choosing` does, and keeps the layer's queries."""

    def self_attention(q, k, v, past):
        mixed, (view, _) = block_step.choosing(cfg, layout, attention_fn)(q, k, v, past)
        return mixed, (view, q)

    return self_attention


@partial(tiny.jit, static_argnums=0)
def behind_the_newest(exp, memory, text, noise):
    """(the first prediction, the scores [layer, b, slot] that its queries give by the selection of `exp`)."""
    newest = dataclasses.replace(exp, cache=dataclasses.replace(exp.cache, selection="recency"))
    layout = layouts.layout(exp.cache, memory.progress)
    clean, kept = first_by_hand(
        newest, layout, noise, text, recalled(memory, noise), Access(attends=asking)
    )
    spec = exp.memory
    scores = [
        view.score(spec, layout, layer, view.pool_queries(spec, layout, q), random)
        for layer, (_, q), random in zip(memory.layers, kept, noise.random, strict=True)
    ]
    return clean, jnp.stack(scores)


def best(scores, ids, keep):
    """Ids [..., keep] of the best visible blocks in time order."""
    slots = np.argsort(np.where(ids >= 0, scores, -np.inf), axis=-1)[..., -keep:]
    return np.sort(np.asarray(ids)[slots], axis=-1)


@partial(tiny.jit, static_argnums=0)
def behind_the_chosen(exp, memory, text, noise, chosen, clean):
    """The block once every layer attends to blocks `chosen` [layer, b, top]; a first step of its own unless `clean`."""
    layout = layouts.layout(exp.cache, memory.progress)
    views = []
    for layer, ids in zip(memory.layers, chosen, strict=True):
        wanted = (layout.ids[None, None] == ids[..., None]).any(axis=1).astype(jnp.float32)
        selected = view.select(exp.memory, layout, wanted)
        gathered = view.gather(layer, selected)
        views.append(view.lay(exp.memory, layout, layer, gathered, selected))
    if clean is None:
        clean, views = first_by_hand(exp, layout, noise, text, views)
    return rest_by_hand(exp, layout, noise, text, clean, views)[0]


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
    memory, text = full
    noise = tiny.noise(exp, FULL)
    _, done = denoised(memory, text, noise, exp)
    clean, scores = behind_the_newest(tiny.with_cache(selection=selection), memory, text, noise)
    ids = layouts.layout(exp.cache, memory.progress).ids
    own = best(np.asarray(scores), ids, exp.cache.top)
    shared = np.broadcast_to(best(np.asarray(scores).sum(axis=0), ids, exp.cache.top), own.shape)
    assert (own[0] != own[1]).any()
    assert (own != [FULL - 3, FULL - 2]).any()
    wanted = shared if scope == "shared" else own
    np.testing.assert_array_equal(tiny.ids(done), wanted)
    latent = behind_the_chosen(
        EXP, memory, text, noise, jnp.asarray(wanted), clean if timing == "late" else None
    )
    np.testing.assert_allclose(done.latent, latent, atol=2e-5)


# thirty blocks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long(text):
    """(blocks of one prompt, blocks of another prompt from CHANGE on, programs compiled for it all)."""
    before = [function._cache_size() for function in (tiny.denoise, tiny.commit)]
    other = tiny.text(seed=70)
    plain, _ = tiny.rollout(EXP, BLOCKS, lambda block: text)
    changed, _ = tiny.rollout(EXP, BLOCKS, lambda block: text if block < CHANGE else other)
    return (
        plain,
        changed,
        [
            function._cache_size() - size
            for function, size in zip((tiny.denoise, tiny.commit), before)
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
    cfg = EXP.cache
    orders = set()
    for block, each in enumerate(long[0]):
        newest = block - cfg.recent // cfg.block  # this one is still recent
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
    memory = cache.init(exp.memory, 2)
    latent = tiny.latents(1)[0]
    memory, done = denoised(memory, text, tiny.noise(exp, 0), exp)
    later, packed = tiny.commit(
        bare, exp.step, memory, latent=latent, low_res=latent, selection=done.selection, text=text
    )
    assert int(later.num_blocks) == 1
    assert packed is None
    assert all(layer.packed.k.size == 0 for layer in later.layers)
