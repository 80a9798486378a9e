"""Training sees what sampling sees: losses depend on earlier blocks, and on packed twins when they show."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from packforcing_jax import pytrees
from packforcing_jax.config import CoverConfig, DistilConfig, TrainConfig
from packforcing_jax.errors import InputError
from packforcing_jax.memory import cache
from packforcing_jax.memory import layout as layouts
from packforcing_jax.sampling import block_step, schedules
from packforcing_jax.training import batches, objectives, rollout
from packforcing_jax.training.batches import Batch, Model, Networks
from packforcing_jax.types import KV

BLOCKS = 4
COVER = CoverConfig(gap=9.0, matching=0.02)
BASE = dataclasses.replace(
    tiny.EXP, sample=dataclasses.replace(tiny.EXP.sample, prediction="clean"), clip=3 * BLOCKS
)
TRAIN = TrainConfig(shift=6.0, cover=COVER)
MODEL = Model(dit=tiny.nets().dit, compressor=tiny.nets().compressor)
STATES = tiny.normal(7, BLOCKS, tiny.BATCH, 9, BASE.dit.text_dim)  # another prompt for each block
APART = tiny.apart()  # layers one by one
KEY = jax.random.key(4)
CALLED = np.zeros((BLOCKS, tiny.BATCH, 2, BLOCKS), bool)  # block 3 calls back block 0 or 2
CALLED[3, 0, 1, 0] = CALLED[3, 1, 0, 2] = True


@functools.partial(tiny.jit, static_argnames=("exp", "train", "objective"))
def run(given, key, exp, train=TRAIN, objective="forcing", model=MODEL, teacher=None, average=None):
    """(loss, metrics) of an objective."""
    networks = Networks(generator=model, teacher=teacher, average=average)
    return objectives.OBJECTIVES[objective].generator(networks, given, key, exp, train)


def losses(given, key=KEY, exp=None, train=TRAIN):
    """The denoising loss of each block."""
    return run(given, key, training(0) if exp is None else exp, train)[1]["loss_by_block"]


def clips():
    weight = np.random.default_rng(2).uniform(0.5, 2, (BLOCKS, tiny.BATCH, 3, 8, 4, 1))
    return Batch(
        text=STATES,
        latent=tiny.latents(BLOCKS),
        low_res=tiny.low_res(BLOCKS),
        weight=jnp.asarray(weight, jnp.float32),
        called=jnp.asarray(CALLED),
    )


def training(sink, exp=BASE):
    return rollout.for_training(exp, BLOCKS, sink)


def with_gap(share):
    return with_train(cover=dataclasses.replace(COVER, gap_share=share))


def with_train(**settings):
    return dataclasses.replace(TRAIN, **settings)


def twins_seen(sink):
    """[loss, twin]: whether the packed twin of a block shows when another is guessed."""
    return np.array(
        [
            [twin >= sink // 3 and twin < block - 1 for twin in range(BLOCKS)]
            for block in range(BLOCKS)
        ]
    )


@pytest.fixture(scope="module")
def gradients():
    """What each block's loss depends on behind a sink of one block: latents, low-resolution latents, the compressor."""

    def by_block(latent, low, packer):
        given = dataclasses.replace(clips(), latent=latent, low_res=low)
        networks = Networks(generator=Model(dit=MODEL.dit, compressor=packer))
        return objectives.forcing(networks, given, KEY, training(3), TRAIN)[1]["loss_by_block"]

    given = clips()
    return tiny.jit(jax.jacrev(by_block, argnums=(0, 1, 2)))(
        given.latent, given.low_res, MODEL.compressor
    )


def test_a_loss_depends_on_its_own_block_and_earlier_ones_only(gradients):
    depends = np.abs(gradients[0]).max(axis=tuple(range(2, 7))) > 0
    np.testing.assert_array_equal(depends, np.tri(BLOCKS, dtype=bool))


def test_a_loss_depends_on_the_packed_twins_that_show(gradients):
    depends = np.abs(gradients[1]).max(axis=tuple(range(2, 7))) > 0
    np.testing.assert_array_equal(depends, twins_seen(3))


def test_without_a_sink_the_first_twin_shows_too():
    given = clips()
    depends = []
    for block in range(BLOCKS):
        other = dataclasses.replace(given, low_res=given.low_res.at[block].add(0.5))
        depends.append(losses(other) != losses(given))
    np.testing.assert_array_equal(np.stack(depends, axis=1), twins_seen(0))


def test_the_compressor_learns_from_blocks_that_see_packed_ones(gradients):
    for name, leaf in pytrees.flatten(gradients[2]).items():
        learns = np.abs(leaf).max(axis=tuple(range(1, leaf.ndim))) > 0
        np.testing.assert_array_equal(learns, twins_seen(3).any(axis=1), err_msg=name)


def test_training_guesses_behind_the_memory_that_sampling_fills():
    """Losses recomputed behind a memory filled by the sampler, its layers apart, in views of its own drawing."""
    exp = training(0)
    given = clips()
    memory = cache.init(exp.memory, tiny.BATCH)
    keys = jax.random.split(KEY, 4)
    levels = objectives.noise_levels(keys[0], given.latent.shape[:2], TRAIN.shift)
    noise = jax.random.normal(keys[1], given.latent.shape)
    words = tiny.jit(batches.text_kv)(MODEL.dit, STATES)
    random = [jnp.zeros((tiny.BATCH, exp.cache.slots))] * exp.dit.layers

    @tiny.jit
    def block_loss(memory, latent, noise, sigma, words, weight):
        layout = layouts.layout(exp.cache, memory.progress)
        past = pytrees.zipped(memory.layers, random)
        noisy = schedules.add_noise(latent, noise, sigma)
        clean, kept = block_step.predict_x0(
            block_step.Denoiser(APART, exp.step, words),
            layout,
            noisy,
            schedules.NoiseLevel(timestep=1000 * sigma, sigma=sigma),
            past,
            block_step.Access(attends=block_step.choosing),
        )
        views, selection = pytrees.unzip(kept)
        loss = jnp.mean(weight * (clean - latent) ** 2)
        return loss, block_step.with_views(memory, views), selection

    by_hand = []
    for block in range(BLOCKS):
        prompt = pytrees.unstack(KV(k=words.k[block], v=words.v[block]), exp.dit.layers)
        loss, memory, selection = block_loss(
            memory, given.latent[block], noise[block], levels[block], prompt, given.weight[block]
        )
        by_hand.append(loss)
        memory, _ = tiny.commit(
            APART,
            exp.step,
            memory,
            latent=given.latent[block],
            low_res=given.low_res[block],
            selection=selection,
            text=prompt,
        )
    np.testing.assert_allclose(losses(given), jnp.stack(by_hand), rtol=1e-5)


def test_weights_scale_the_loss_of_their_cells():
    given = clips()
    other = losses(dataclasses.replace(given, weight=given.weight.at[1].mul(2).at[2].set(0)))
    np.testing.assert_allclose(other, losses(given) * jnp.asarray([1, 2, 0, 1]), rtol=1e-6)


def saying(given, block):
    """`given` with another prompt for one block."""
    return dataclasses.replace(given, text=given.text.at[block].add(0.5))


def test_a_block_hears_its_own_prompt():
    given = clips()
    plain = losses(given)
    other = losses(saying(given, 2))
    np.testing.assert_array_equal(plain[:2], other[:2])
    assert (plain[2:] != other[2:]).all()


def test_a_gap_moves_only_what_lies_before_recent():
    plain, moved = (losses(clips(), train=with_gap(share)) for share in (0.0, 1.0))
    np.testing.assert_allclose(
        plain[:2], moved[:2], rtol=1e-6
    )  # nothing, or only recent, lies behind them
    assert (np.abs(plain - moved)[2:] > 1e-4).all()


def test_the_key_decides():
    one, same, other = (losses(clips(), key) for key in (KEY, KEY, jax.random.key(5)))
    np.testing.assert_array_equal(one, same)
    assert (one != other).all()


# the loss that selection finds what is called back --------------------------------------------------------------------


def test_both_losses_count_and_matching_counts_where_a_called_block_is_packed():
    total, told = run(clips(), KEY, training(0))
    np.testing.assert_allclose(
        total, told["loss_by_block"].mean() + 0.02 * told["matching"], rtol=1e-6
    )
    assert told["matching"] > 0
    sharp = dataclasses.replace(
        clips(), called=clips().called.at[3, 0, 1, 0].set(False)
    )  # block 2 is still sharp
    assert run(sharp, KEY, training(0))[1]["matching"] == 0


def test_matching_is_the_surprise_at_the_called_blocks_share():
    scores = jnp.asarray([[3.0, 1.0, 9.0, 4.0], [2.0, 5.0, 9.0, 1.0]])
    ids = jnp.asarray([4, 1, -1, 2])  # block 4 in the first slot; the third is empty
    called = np.zeros((2, 3, 5), bool)
    called[0, 0, [1, 2]] = called[0, 1, 4] = called[1, 0, 3] = True  # block 3 is not packed
    expected = -(np.log(5 / 8) + np.log(3 / 8)) / 6  # over two videos and three kinds
    np.testing.assert_allclose(
        tiny.jit(objectives.matching)(scores, ids, jnp.asarray(called)), expected, rtol=1e-6
    )


def test_matching_raises_the_called_block_and_lowers_the_others():
    scores = jnp.asarray([[1.0, 2.0, 3.0, 4.0]])
    called = jnp.asarray([[[False, True, False]]])
    gradient = tiny.jit(jax.grad(objectives.matching))(scores, jnp.asarray([2, 1, 0, -1]), called)
    np.testing.assert_array_equal(jnp.sign(gradient), [[1, -1, 1, 0]])


def test_nothing_called_or_nothing_packed_is_no_surprise_and_no_gradient():
    scores = jnp.zeros((1, 2))
    called = jnp.ones((1, 2, 3), bool)
    graded = tiny.jit(jax.value_and_grad(objectives.matching))
    for ids, asked in ((jnp.asarray([-1, -1]), called), (jnp.asarray([0, 2]), ~called)):
        value, gradient = graded(scores, ids, asked)
        assert value == 0
        np.testing.assert_array_equal(gradient, scores)


def test_noise_levels_are_uniform_draws_warped_towards_noise():
    plain, shifted = (objectives.noise_levels(KEY, (40, 50), shift) for shift in (1.0, 6.0))
    np.testing.assert_allclose(shifted, 6 * plain / (1 + 5 * plain), rtol=1e-6)
    np.testing.assert_allclose(np.quantile(plain, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.03)
    assert np.median(shifted) == pytest.approx(6 / 7, abs=0.02)
    assert 0 <= shifted.min() <= shifted.max() < 1


# other histories ------------------------------------------------------------------------------------------------------


def seeing_everything(exp):
    """A memory in which every true block stays sharp."""
    return tiny.with_cache(exp, sink=0, recent=3 * BLOCKS, top=0, capacity=0)


def test_teacher_forcing_in_one_pass_is_what_a_memory_of_sharp_blocks_gives():
    masked = with_train(history="clean")
    one, behind = (
        losses(clips(), exp=seeing_everything(BASE), train=each) for each in (masked, TRAIN)
    )
    np.testing.assert_allclose(one, behind, rtol=1e-5)


def test_diffusion_forcing_sees_noise_and_not_the_truth():
    noisy = with_train(history="noisy")
    given = clips()
    far = dataclasses.replace(given, latent=given.latent.at[1].add(1.0), low_res=given.low_res + 1)
    plain, other = (losses(each, exp=BASE, train=noisy) for each in (given, far))
    assert plain[0] == other[0]
    assert (plain[1:] != other[1:]).all()  # the noisy block 1 is seen by those behind it
    assert (plain != losses(given, exp=seeing_everything(BASE)))[1:].all()


def test_a_velocity_is_weighed_by_wans_bell():
    sigma = jnp.asarray([[0.3, 0.9]])
    exp = dataclasses.replace(BASE, sample=tiny.EXP.sample)
    clean, noise, guess = tiny.normal(1, 3, 1, 2, 3, 8, 4, 12)
    ours = tiny.jit(lambda *given: objectives.denoising_loss(exp, TRAIN, *given, None))(
        guess, clean, sigma
    )
    velocity = (schedules.add_noise(clean, noise, sigma) - guess) / jnp.expand_dims(
        sigma, range(2, 6)
    )
    error = ((velocity - (noise - clean)) ** 2).mean(axis=(0, 2, 3, 4, 5))
    grid = schedules.table(6.0)
    bell = schedules.training_weights(grid)[np.asarray(schedules.nearest_id(grid, 1000 * sigma[0]))]
    np.testing.assert_allclose(ours, [(error * bell).mean()], rtol=1e-4)


def test_data_without_low_resolution_latents_are_refused_where_packing_reads_them():
    with pytest.raises(InputError, match="no low-resolution latents"):
        run(dataclasses.replace(clips(), low_res=None), KEY, training(0))


# the teacher ----------------------------------------------------------------------------------------------------------


def test_the_teacher_sees_every_frame_under_one_level_of_noise():
    given = clips()
    plain = run(given, KEY, BASE, objective="flow_matching")[1]["loss_by_block"]
    later = dataclasses.replace(given, latent=given.latent.at[3].add(0.5))
    other = run(later, KEY, BASE, objective="flow_matching")[1]["loss_by_block"]
    assert (plain != other).all()


@pytest.mark.parametrize("drop", [0.0, 1.0])
def test_hidden_text_is_no_text(drop):
    train = with_train(drop_text=drop)
    given = clips()
    one, two = (
        run(each, KEY, BASE, train, objective="flow_matching")[0]
        for each in (given, saying(given, 1))
    )
    assert (one == two) == (drop == 1.0)


# fewer steps ----------------------------------------------------------------------------------------------------------


CLEAN = with_train(history="clean", grid=7)


@tiny.jit
def guess(model, latent, sample, sigma, states):
    """The guess of noisy blocks behind the clean ones before them."""
    noisy = objectives.NoisyBlocks(sample=sample, sigma=sigma, states=states)
    return objectives.causal(model, BASE, CLEAN, Batch(text=None, latent=latent), noisy).clean


def with_trajectory(seed=3):
    """Data without the clip: a way's last state is it."""
    way = jnp.stack(
        [tiny.latents(BLOCKS, seed=seed + i) for i in range(len(BASE.sample.steps) + 1)]
    )
    return Batch(text=STATES, trajectory=way)


def test_a_trajectory_is_followed_from_a_step_of_its_own_for_each_block():
    """Errors recomputed for every step, of which each block has one."""
    given = with_trajectory()
    times, sigmas = block_step.step_table(BASE.sample)
    way = given.trajectory
    end = np.asarray(given.trajectory[-1])
    by_step = [
        guess(MODEL, way[-1], way[i], jnp.full((BLOCKS, tiny.BATCH), sigmas[i]), STATES)
        for i in range(len(times))
    ]
    errors = np.stack(
        [((np.asarray(clean) - end) ** 2).mean(axis=(2, 3, 4, 5)) for clean in by_step]
    )
    told = np.asarray(run(given, KEY, BASE, CLEAN, objective="trajectory")[1]["loss_by_block"])
    pairs = [(i, j) for i in range(3) for j in range(3)]
    means = [
        {pair: errors[list(pair), block, [0, 1]].mean() for pair in pairs}
        for block in range(BLOCKS)
    ]
    found = [
        min(table, key=lambda pair, t=table, e=told[block]: abs(t[pair] - e))
        for block, table in enumerate(means)
    ]
    np.testing.assert_allclose(
        [means[block][pair] for block, pair in enumerate(found)], told, rtol=1e-4
    )
    assert len(set(found)) > 1


def test_a_trajectory_of_other_steps_is_refused():
    given = with_trajectory()
    with pytest.raises(InputError, match="hold 3 states a clip, but sample.steps"):
        run(
            dataclasses.replace(given, trajectory=given.trajectory[1:]),
            KEY,
            BASE,
            CLEAN,
            objective="trajectory",
        )


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_consistency_asks_the_average_behind_one_step_of_the_teacher(guidance):
    """Every block at a step of its own; at the last one the way has ended, and nobody is asked."""
    train = with_train(history="clean", grid=7, distil=DistilConfig(guidance=guidance))
    teacher, average = (
        Model(dit=tiny.filled(MODEL.dit, seed), compressor=MODEL.compressor) for seed in (4, 6)
    )
    given = clips()
    keys = jax.random.split(KEY, 4)
    sigmas = np.append(schedules.table(6.0, steps=7).sigmas, 0.0)
    at = np.asarray(jax.random.randint(keys[0], (BLOCKS, tiny.BATCH), 0, 7))
    assert len(np.unique(at)) > 1
    here, there = (np.float32(sigmas[at + i])[..., None, None, None, None] for i in (0, 1))
    noisy = (1 - here) * given.latent + here * jax.random.normal(keys[1], given.latent.shape)
    with_text, without = (
        guess(teacher, given.latent, noisy, sigmas[at], states) for states in (STATES, 0 * STATES)
    )
    clean = without + guidance * (with_text - without)
    nearer = noisy + (there - here) * (noisy - clean) / here
    target = np.where(
        there == 0, nearer, guess(average, given.latent, nearer, sigmas[at + 1], STATES)
    )
    expected = ((guess(MODEL, given.latent, noisy, sigmas[at], STATES) - target) ** 2).mean()
    loss, _ = run(
        given, KEY, BASE, train, objective="consistency", teacher=teacher, average=average
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_at_the_ways_last_step_consistency_is_the_teachers_clean_guess():
    """With a single step all blocks are pure noise, and one step ends the way: no average is asked."""
    train = with_train(history="clean", grid=1, distil=DistilConfig(guidance=1.0))
    teacher = Model(dit=tiny.filled(MODEL.dit, 4), compressor=MODEL.compressor)
    given = clips()
    noise = jax.random.normal(jax.random.split(KEY, 4)[1], given.latent.shape)
    full = np.ones((BLOCKS, tiny.BATCH))
    target, own = (guess(model, given.latent, noise, full, STATES) for model in (teacher, MODEL))
    for seed in (6, 7):
        average = Model(dit=tiny.filled(MODEL.dit, seed), compressor=MODEL.compressor)
        loss, _ = run(
            given, KEY, BASE, train, objective="consistency", teacher=teacher, average=average
        )
        np.testing.assert_allclose(loss, ((own - target) ** 2).mean(), rtol=1e-4)
