"""Drawing only reads the memory, remembering writes it once, and noise depends on nothing but its four numbers."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from packforcing_jax import cache, compressor, dit, layers, rope, sampler, schedules
from packforcing_jax.config import SampleConfig

EXP = tiny.EXP
BLOCKS = 30
CHANGE = 17  # from this block on, another prompt


@pytest.fixture(scope="module")
def text():
    return tiny.words()


@pytest.fixture(scope="module")
def filled(text):
    """What was drawn, and a memory in which sink, packed blocks and recent are all in use."""
    return tiny.rollout(EXP, 5, lambda block: text)


def drawn(memory, text, noise, renoise, exp=EXP):
    return tiny.draw(tiny.nets(), exp, memory, noise=noise, renoise=renoise, text=text)


# noise ----------------------------------------------------------------------------------------------------------------


def test_noise_has_a_block_for_the_start_and_one_for_each_later_step():
    noise, renoise = tiny.noises(EXP, 0)
    assert (noise.shape, renoise.shape) == ((2, 3, 8, 4, 12), (2, 2, 3, 8, 4, 12))
    everything = np.concatenate([np.ravel(noise), np.ravel(renoise)])
    assert abs(everything.mean()) < 0.05
    assert abs(everything.std() - 1) < 0.05


def test_noise_knows_neither_the_batch_nor_its_order():
    three = tiny.noises(EXP, 4, [70, 5, 2**31 - 1])
    alone, turned = tiny.noises(EXP, 4, [5]), tiny.noises(EXP, 4, [5, 2**31 - 1, 70])
    for axis, part in enumerate((0, 1)):  # videos are the leading axis of the noise, the second of the renoise
        np.testing.assert_array_equal(three[part].take(jnp.asarray([1]), axis), alone[part])
        np.testing.assert_array_equal(three[part].take(jnp.asarray([1, 2, 0]), axis), turned[part])


def test_every_number_that_names_a_noise_changes_it():
    first = tiny.noises(EXP, 0)
    others = [tiny.noises(EXP, 1)[0], tiny.noises(EXP, 0, seed=12)[0], tiny.noises(EXP, 0, [1, 0])[0], *first[1]]
    for other in others:
        assert abs(np.corrcoef(np.ravel(first[0]), np.ravel(other))[0, 1]) < 0.1


def test_more_steps_leave_the_noise_of_the_first_ones_alone():
    more = dataclasses.replace(EXP, sample=SampleConfig(steps=(1000, 800, 600, 400, 200)))
    (noise, renoise), (longer, rest) = tiny.noises(EXP, 3), tiny.noises(more, 3)
    np.testing.assert_array_equal(noise, longer)
    np.testing.assert_array_equal(renoise, rest[:2])


# one block ------------------------------------------------------------------------------------------------------------


def test_drawing_again_gives_the_same_bits_and_leaves_the_memory_alone(filled, text):
    memory, noises = filled[1], tiny.noises(EXP, 5)
    before = [np.array(leaf) for leaf in jax.tree.leaves(memory)]
    once, again = (drawn(memory, text, *noises) for _ in range(2))
    for one, other in zip(jax.tree.leaves(once), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    for old, leaf in zip(before, jax.tree.leaves(memory), strict=True):
        np.testing.assert_array_equal(old, leaf)


def by_hand(exp, memory, text, noise, renoise):
    """The steps of a block one after the other."""
    seen = cache.plan(exp.cache, memory.num_blocks)
    times, sigmas = sampler.step_table(exp.sample)
    past = (memory.sink, memory.mid, memory.recent)
    clean, (view, _) = sampler.guess(tiny.nets(), exp, seen, noise, jnp.asarray(times[0]), sigmas[0], text, past,
                                     look=sampler.first_look)  # fmt: skip
    for step in range(1, len(times)):
        noisy = (1 - sigmas[step]) * clean + sigmas[step] * renoise[step - 1]
        clean, _ = sampler.guess(tiny.nets(), exp, seen, noisy, jnp.asarray(times[step]), sigmas[step], text, view)
    return clean, view


def test_the_scan_over_steps_is_a_loop(filled, text):
    memory, noises = filled[1], tiny.noises(EXP, 5)
    latent, view = tiny.jit(by_hand, static_argnums=0)(EXP, memory, text, *noises)
    scanned = drawn(memory, text, *noises)
    np.testing.assert_allclose(scanned.latent, latent, atol=2e-5)
    np.testing.assert_allclose(scanned.view.k, view.k, atol=2e-5)


def test_the_first_step_alone_decides_what_is_looked_at(filled, text):
    memory, (noise, renoise) = filled[1], tiny.noises(EXP, 5)
    plain, other = (drawn(memory, text, noise, fresh) for fresh in (renoise, renoise + 1))
    np.testing.assert_array_equal(plain.chosen, other.chosen)
    np.testing.assert_array_equal(plain.view.k, other.view.k)
    assert (plain.latent != other.latent).any()


def test_a_single_step_needs_no_renoise(filled, text):
    exp = dataclasses.replace(EXP, sample=dataclasses.replace(EXP.sample, steps=(1000,)))
    noise, renoise = tiny.noises(exp, 5)
    assert renoise.shape[0] == 0
    assert drawn(filled[1], text, noise, renoise, exp).latent.shape == noise.shape


@partial(tiny.jit, static_argnums=0)
def guess(prediction, memory, noisy, text, timestep, sigma):
    """The clean block that a network returning `prediction` sees behind `noisy`."""
    exp = dataclasses.replace(EXP, sample=dataclasses.replace(EXP.sample, prediction=prediction))
    seen, past = cache.plan(exp.cache, memory.num_blocks), (memory.sink, memory.mid, memory.recent)
    return sampler.guess(tiny.nets(), exp, seen, noisy, timestep, sigma, text, past, look=sampler.first_look)[0]


def test_levels_may_be_given_per_block_per_video_or_per_frame(filled, text):
    given = ("velocity", filled[1], tiny.noises(EXP, 5)[0], text)
    whole = guess(*given, jnp.float32(600), jnp.float32(0.6))
    np.testing.assert_allclose(guess(*given, jnp.full((2, 3), 600.0), jnp.full((2, 3), 0.6)), whole, atol=1e-5)
    mixed = guess(*given, jnp.asarray([600.0, 10.0]), jnp.asarray([0.6, 0.01]))
    np.testing.assert_allclose(mixed[0], whole[0], atol=1e-5)
    assert np.abs(mixed[1] - whole[1]).max() > 1e-2


def test_a_velocity_is_turned_into_the_clean_block_it_points_at(filled, text):
    noisy, level = tiny.noises(EXP, 5)[0], (jnp.float32(600), jnp.float32(0.6))
    clean, returned = (guess(name, filled[1], noisy, text, *level) for name in ("velocity", "clean"))
    np.testing.assert_allclose(clean, noisy - 0.6 * returned, atol=1e-5)


def test_steps_are_warped_by_the_shift_and_sigma_follows():
    times, sigmas = sampler.step_table(EXP.sample)
    np.testing.assert_allclose(times, [1000, 3000 * 0.6 / (1 + 2 * 0.6), 3000 * 0.25 / (1 + 2 * 0.25)], rtol=1e-5)
    np.testing.assert_allclose(sigmas, times / 1000, rtol=1e-5)
    np.testing.assert_array_equal(sigmas, schedules.sigma_at(schedules.table(3.0), times))


# remembering ----------------------------------------------------------------------------------------------------------


def sums(memory):
    """One number each for what sink, packed blocks and recent hold, in which nothing cancels."""
    return jnp.stack([sum((x * tiny.normal(i, *x.shape)).sum() for i, x in enumerate((part.k, part.v)))
                      for part in (memory.sink, memory.mid, memory.recent)])  # fmt: skip


def test_the_block_never_sees_its_packed_twin_and_the_twin_sees_the_block(filled, text):
    lr = dataclasses.replace(EXP, compressor=dataclasses.replace(EXP.compressor, branches="lr"))
    latent, low, memory = tiny.latents(1)[0], tiny.lows(1)[0], filled[1]
    view = drawn(memory, text, *tiny.noises(EXP, 5)).view

    def stored(latent, low, view):
        return sums(sampler.remember(tiny.nets(), lr, memory, latent=latent, low=low, view=view, text=text))

    by_latent, by_low, by_view = tiny.jit(jax.jacrev(stored, argnums=(0, 1, 2)))(latent, low, view)
    np.testing.assert_array_equal(jnp.abs(by_latent).max(axis=(1, 2, 3, 4, 5)) > 0, [False, True, True])
    np.testing.assert_array_equal(jnp.abs(by_low).max(axis=(1, 2, 3, 4, 5)) > 0, [False, True, False])
    np.testing.assert_array_equal(jnp.abs(by_view.v).max(axis=range(1, 6)) > 0, [False, True, True])


def test_remembering_counts_and_writes_one_block_only(filled, text):
    memory = filled[1]
    view = drawn(memory, text, *tiny.noises(EXP, 5)).view
    latent, low = tiny.latents(1)[0], tiny.lows(1)[0]
    after = tiny.remember(tiny.nets(), EXP, memory, latent=latent, low=low, view=view, text=text)
    assert int(after.num_blocks) == int(memory.num_blocks) + 1 == 6
    np.testing.assert_array_equal(after.sink.k, memory.sink.k)
    changed = (np.asarray(after.mid.v) != np.asarray(memory.mid.v)).any(axis=(0, 1, 3, 4, 5))
    assert changed.sum() == 1
    assert (np.asarray(after.recent.v) != np.asarray(memory.recent.v)).all(axis=(0, 1, 3, 4, 5)).all()


def test_a_packed_twin_is_stored_as_clean_at_its_place_on_the_grid(filled, text):
    """Its first layer's keys, worked out from its tokens at timestep 0."""
    latent, low, memory = tiny.latents(1)[0], tiny.lows(1)[0], filled[1]
    view = drawn(memory, text, *tiny.noises(EXP, 5)).view
    after = tiny.remember(tiny.nets(), EXP, memory, latent=latent, low=low, view=view, text=text)

    @tiny.jit
    def by_hand():
        model = tiny.nets().dit
        block = jax.tree.map(lambda leaf: leaf[0], model.blocks)
        rows = block.modulation[...][None, None] + dit.embed_time(model, jnp.zeros((2, 1))).rows
        tokens = compressor.pack(tiny.nets().compressor, model, EXP, latent, low)
        own = block.attn.keys_values(layers.modulate(layers.standardize(tokens, 1e-6), rows[:, :, 0], rows[:, :, 1]))
        return rope.rotate(own.k, rope.space_angles(jnp.asarray(cache.packed_places(EXP)[1]), EXP.dit)), own.v

    slot = 4  # block 5 is the fifth behind one sink block, in a ring of five
    k, v = by_hand()
    np.testing.assert_allclose(after.mid.k[0, :, slot], k, atol=1e-5)
    np.testing.assert_allclose(after.mid.v[0, :, slot], v, atol=1e-5)


# thirty blocks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long(text):
    """(blocks drawn with one prompt, blocks drawn with another prompt from CHANGE on, programs compiled for it all)."""
    before = [function._cache_size() for function in (tiny.draw, tiny.remember)]
    other = tiny.words(seed=70)
    plain, _ = tiny.rollout(EXP, BLOCKS, lambda block: text)
    changed, _ = tiny.rollout(EXP, BLOCKS, lambda block: text if block < CHANGE else other)
    return plain, changed, [function._cache_size() - size for function, size in zip((tiny.draw, tiny.remember), before)]


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
        for ids in np.asarray(each.chosen).reshape(-1, cfg.top):
            real = ids[ids >= 0]
            assert set(real.tolist()) <= visible
            assert len(real) == min(cfg.top, len(visible))
            np.testing.assert_array_equal(real, np.unique(real))
            np.testing.assert_array_equal(ids[len(real) :], -1)
            orders.add(tuple((real - newest).tolist()))
    assert len(orders) > 3  # it is a choice


def test_layers_and_videos_choose_for_themselves(long):
    chosen = np.stack([each.chosen for each in long[0]])  # [block, layer, b, top]
    assert (chosen[:, 0] != chosen[:, 1]).any()
    assert (chosen[:, :, 0] != chosen[:, :, 1]).any()


def test_a_memory_without_packed_blocks_runs_without_a_compressor(text):
    exp = tiny.with_cache(top=0, capacity=0)
    bare = sampler.Nets(dit=tiny.nets().dit, compressor=None)
    memory, latent = cache.init(exp, 2), tiny.latents(1)[0]
    view = drawn(memory, text, *tiny.noises(exp, 0), exp).view
    after = tiny.remember(bare, exp, memory, latent=latent, low=latent, view=view, text=text)
    assert int(after.num_blocks) == 1
    assert after.mid.k.size == 0
