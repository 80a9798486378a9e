"""Distribution matching: pulls, losses and their gradients are the formulas, and only the right network feels them."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from packforcing_jax import pytrees
from packforcing_jax.config import DistilConfig, TrainConfig
from packforcing_jax.networks import codec
from packforcing_jax.sampling import block_step, schedules
from packforcing_jax.training import batches, distillation, rollout
from packforcing_jax.training.batches import Batch, Model, Networks

BLOCKS = 4
BASE = dataclasses.replace(
    tiny.EXP, dit=dataclasses.replace(tiny.EXP.dit, layers=1), clip=3 * BLOCKS
)
X, FAKE, REAL = tiny.normal(1, 3, 2, 12, 8, 4, 12)
TEACHER, CRITIC = (tiny.filled(tiny.nets(BASE).dit, seed) for seed in (1, 2))
STATES = tiny.normal(4, BLOCKS, 2, 9, BASE.dit.text_dim)
HIDDEN = tiny.normal(5, 6, BASE.dit.text_dim)
KEY = jax.random.key(8)
score = tiny.jit(distillation.score, static_argnames=("exp", "distil"))
PLAIN = TrainConfig()


def training(**distil):
    return TrainConfig(distil=DistilConfig(**distil))


CLEAN = dataclasses.replace(BASE, sample=dataclasses.replace(BASE.sample, prediction="clean"))


# formulas -------------------------------------------------------------------------------------------------------------


def test_the_gradient_of_the_matching_loss_is_the_pull_over_the_count():
    pull = FAKE - REAL
    loss, gradient = jax.value_and_grad(distillation.matching_loss)(X, pull)
    np.testing.assert_allclose(loss, 0.5 * (np.asarray(pull) ** 2).mean(), rtol=1e-5)
    np.testing.assert_allclose(gradient * X.size, pull, atol=1e-5)


def test_masked_frames_feel_no_pull_and_do_not_count():
    pull = FAKE - REAL
    mask = jnp.asarray(np.random.default_rng(1).random((2, 12)) < 0.4)
    gradient = (
        np.asarray(jax.grad(distillation.matching_loss)(X, pull, mask))
        * int(mask.sum())
        * X[0, 0].size
    )
    np.testing.assert_allclose(gradient[mask], np.asarray(pull)[mask], atol=1e-5)
    assert not gradient[~mask].any()


def test_a_pull_is_normalised_by_how_far_each_clips_teacher_is():
    x, fake, real = (np.asarray(each, np.float64) for each in (X, FAKE, REAL))
    expected = [(fake[i] - real[i]) / np.abs(x[i] - real[i]).mean() for i in range(2)]
    np.testing.assert_allclose(distillation.pull(X, FAKE, REAL), expected, rtol=1e-4, atol=1e-6)


def test_a_pull_is_a_constant_and_nothing_where_all_agree():
    gradients = jax.grad(lambda *given: distillation.pull(*given).sum(), argnums=(0, 1, 2))(
        X, FAKE, REAL
    )
    assert not any(np.asarray(leaf).any() for leaf in gradients)
    assert not np.asarray(distillation.pull(X, X, X)).any()


def test_both_forms_of_guidance_are_one_at_guidance_one_apart():
    extra, plain = (
        distillation.guided(DistilConfig(form=form, guidance=guidance), FAKE, REAL)
        for form, guidance in (("extra", 2.5), ("plain", 3.5))
    )
    np.testing.assert_allclose(extra, plain, atol=1e-5)
    np.testing.assert_allclose(
        extra, np.asarray(REAL) + 3.5 * (np.asarray(FAKE) - np.asarray(REAL)), atol=1e-5
    )


def test_timesteps_are_shifted_whole_numbers_within_their_bounds():
    drawn = np.asarray(
        distillation.timesteps(KEY, training(min_timestep=50.0, max_timestep=960.0), 20_000)
    )
    assert (drawn.min(), drawn.max()) == (50.0, 960.0)
    inner = drawn[(drawn > 50) & (drawn < 960)] / 1000
    raw = 1000 * inner / (5 - 4 * inner)
    np.testing.assert_allclose(raw, np.round(raw), atol=0.02)
    every = 5 * np.arange(1000) / (1000 + 4 * np.arange(1000))
    assert np.clip(1000 * every, 20, 980).mean() == pytest.approx(746, abs=1)
    usual = np.asarray(distillation.timesteps(KEY, training(), 20_000))
    assert usual.mean() == pytest.approx(746, abs=6)  # its error is 1.5


def test_the_score_identity_loss_is_its_formula():
    x, fake, real = (np.asarray(each, np.float64) for each in (X, FAKE, REAL))
    for alpha in (1.0, 0.7):
        terms = [
            (real[i] - fake[i])
            * ((real[i] - x[i]) - alpha * (real[i] - fake[i]))
            / np.abs(x[i] - real[i]).mean()
            for i in range(2)
        ]
        np.testing.assert_allclose(
            distillation.identity_loss(X, FAKE, REAL, alpha), np.mean(terms), rtol=1e-4
        )


def test_the_critics_loss_is_nothing_when_it_is_right_and_else_the_error_of_the_velocity():
    sigma = jnp.asarray([0.35, 0.92])
    noise = tiny.normal(3, *X.shape)
    noisy = schedules.add_noise(X, noise, sigma)
    assert distillation.flow_loss(X, X, noise, noisy, sigma) < 1e-10
    error = ((np.asarray(FAKE) - np.asarray(X)) ** 2).mean(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(
        distillation.flow_loss(X, FAKE, noise, noisy, sigma),
        (error / np.asarray([0.35, 0.92]) ** 2).mean(),
        rtol=1e-4,
    )


# scores ---------------------------------------------------------------------------------------------------------------

TIMES = jnp.asarray([417.3, 940.0])


def test_each_block_reads_its_own_prompt():
    """In one layer words are read after frames have looked at each other, so that nothing is passed on."""
    plain = np.asarray(score(TEACHER, BASE, PLAIN.distil, X, TIMES, STATES))
    for block in range(BLOCKS):
        told = np.asarray(score(TEACHER, BASE, PLAIN.distil, X, TIMES, STATES.at[block].add(0.5)))
        moves = np.abs(told - plain).max(axis=(0, 2, 3, 4))
        own = np.arange(3 * BLOCKS) // 3 == block
        assert moves[own].min() > 1e-3
        assert moves[~own].max() < 1e-6


def test_one_prompt_is_every_blocks():
    same = jnp.repeat(STATES[:1], BLOCKS, axis=0)
    np.testing.assert_allclose(
        score(TEACHER, BASE, PLAIN.distil, X, TIMES, STATES[:1]),
        score(TEACHER, BASE, PLAIN.distil, X, TIMES, same),
        atol=1e-5,
    )


def test_velocities_are_read_by_the_table_that_is_asked_for():
    straight = DistilConfig()
    tabled = DistilConfig(score_shift=8.0)
    np.testing.assert_allclose(distillation.score_sigma(straight, TIMES), TIMES / 1000, rtol=1e-6)
    line = np.arange(1000, 0, -1) / 1000
    table = 8 * line / (1 + 7 * line)
    nearest = [table[np.abs(1000 * table - time).argmin()] for time in np.asarray(TIMES)]
    sigma = distillation.score_sigma(tabled, TIMES)
    np.testing.assert_allclose(sigma, nearest, rtol=1e-5)
    assert (np.abs(sigma - TIMES / 1000) > 1e-6).all()
    one, other = (X - score(TEACHER, BASE, cfg, X, TIMES, STATES) for cfg in (straight, tabled))
    np.testing.assert_allclose(
        other, one * (1000 * sigma / TIMES)[:, None, None, None, None], atol=1e-5
    )


def test_a_network_may_name_the_clean_clip_itself():
    velocity = (X - score(TEACHER, BASE, PLAIN.distil, X, TIMES, STATES)) * (1000 / TIMES)[
        :, None, None, None, None
    ]
    np.testing.assert_allclose(
        score(TEACHER, CLEAN, PLAIN.distil, X, TIMES, STATES), velocity, atol=1e-4
    )


# objectives -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def given_clips(monkeypatch):
    """Objectives read the generator as the clip itself, so that gradients in the clip can be looked at."""

    def given(nets, batch, key, exp, train, *, graded=True):
        return nets.generator, batch.text, {}

    monkeypatch.setattr(distillation, "clip_again", given)


def loss_of(objective, train, exp=BASE):
    """The compiled loss and its gradients in the student's clips, the teacher and the critic."""

    @tiny.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
    def graded(x, teacher, critic):
        networks = Networks(
            generator=x,
            teacher=Model(dit=teacher, compressor=None),
            critic=critic,
            null_text=HIDDEN,
        )
        return objective(networks, Batch(text=STATES), KEY, exp, train)[0]

    return graded(X, TEACHER, CRITIC)


def chance(train):
    """The timestep and the noise that an objective draws from the key."""
    keys = jax.random.split(KEY, 3)
    return distillation.timesteps(keys[1], train, 2), jax.random.normal(keys[2], X.shape)


def seen(train, x_critic, x_teacher, timestep, noise):
    """What the critic and the guided teacher make of a clip under noise."""
    noised = [distillation.noised(train, x, noise, timestep) for x in (x_critic, x_teacher)]
    fake = distillation.score(CRITIC, BASE, train.distil, noised[0], timestep, STATES)
    told, untold = (
        distillation.score(TEACHER, BASE, train.distil, noised[1], timestep, states)
        for states in (STATES, batches.without_text(STATES, HIDDEN))
    )
    return fake, told + train.distil.guidance * (told - untold)


def still(tree):
    return not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(tree))


def test_matching_pulls_the_clip_and_nothing_else(given_clips):
    train = training(guidance=2.5)
    loss, (gradient, teacher, critic) = loss_of(distillation.dmd_loss, train)
    pull = tiny.jit(lambda x: distillation.pull(x, *seen(train, x, x, *chance(train))))(X)
    np.testing.assert_allclose(gradient * X.size, pull, atol=1e-4)
    np.testing.assert_allclose(loss, 0.5 * (np.asarray(pull) ** 2).mean(), rtol=1e-4)
    assert still(teacher)
    assert still(critic)


def test_the_score_identity_also_learns_through_what_both_scores_read(given_clips):
    train = training(alpha=0.8)

    def by_hand(x, x_critic, x_teacher):
        fake, real = seen(train, x_critic, x_teacher, *chance(train))
        far = jax.lax.stop_gradient(jnp.abs(x - real).mean(axis=(1, 2, 3, 4), keepdims=True))
        return ((real - fake) * ((real - x) - 0.8 * (real - fake)) / far).mean()

    expected, parts = tiny.jit(jax.value_and_grad(by_hand, argnums=(0, 1, 2)))(X, X, X)
    loss, (gradient, teacher, critic) = loss_of(distillation.sid_loss, train)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    scale = np.abs(gradient).max()
    np.testing.assert_allclose(gradient / scale, sum(parts) / scale, atol=1e-4)
    assert all(np.abs(part).max() > 1e-2 * scale for part in parts)
    assert still(teacher)
    assert still(critic)


def expected_of_the_critic(train, exp=BASE):
    """The critic's loss by hand: the error of its guess, of the velocity or of the clean clip."""
    timestep, noise = chance(train)
    fake = score(
        CRITIC, exp, train.distil, distillation.noised(train, X, noise, timestep), timestep, STATES
    )
    error = ((np.asarray(fake) - np.asarray(X)) ** 2).mean(axis=(1, 2, 3, 4))
    sigma = np.asarray(schedules.sigma_at(schedules.table(train.shift), timestep))
    return (error / sigma**2).mean() if exp.sample.prediction == "velocity" else error.mean()


def test_the_critic_alone_learns_from_its_loss(given_clips):
    loss, (gradient, teacher, critic) = loss_of(distillation.critic_loss, PLAIN)
    np.testing.assert_allclose(loss, expected_of_the_critic(PLAIN), rtol=1e-3)
    assert still(gradient)
    assert still(teacher)
    assert all(np.asarray(leaf).any() for leaf in pytrees.flatten(critic).values())


def test_a_critic_that_names_the_clean_clip_learns_it_at_every_level_alike(given_clips):
    networks = Networks(generator=X, critic=CRITIC)
    loss = tiny.jit(
        lambda key: distillation.critic_loss(networks, Batch(text=STATES), key, CLEAN, PLAIN)[0]
    )(KEY)
    np.testing.assert_allclose(loss, expected_of_the_critic(PLAIN, CLEAN), rtol=1e-3)


@pytest.mark.parametrize("scored", [0, 1, 3])
def test_only_the_last_blocks_are_scored_with_their_prompts_where_that_is_asked(
    scored, monkeypatch
):
    latent = tiny.latents(BLOCKS)
    networks = Networks(generator=Model(dit=TEACHER, compressor=None))
    clip = types.SimpleNamespace(latent=latent)
    monkeypatch.setattr(rollout, "draw", lambda nets, exp, distil, vae, draws, text: clip)
    monkeypatch.setattr(
        rollout, "again", lambda nets, exp, distil, clip, text, first: 2 * clip.latent[first:]
    )
    monkeypatch.setattr(rollout, "covered", lambda exp, clip: {})
    x, states, _ = distillation.clip_again(
        networks, Batch(text=STATES), KEY, BASE, training(scored=scored)
    )
    count = scored or BLOCKS
    np.testing.assert_array_equal(x, batches.by_clip(latent[-count:]))
    np.testing.assert_array_equal(states, STATES[-count:])


@pytest.mark.parametrize("finished", [True, False])
def test_a_clip_is_what_is_remembered_and_has_the_gradient_of_its_exit_step(finished):
    """The critic reads the same clip; where blocks stop at the exit step, that step's guess is the clip."""
    exp = rollout.for_training(BASE, BLOCKS, 3)
    train = training(finished=finished, gradient="none")
    pixels = codec.make(exp.codec, nnx.Rngs(0))
    weights = tiny.normal(6, *X.shape)
    packing = tiny.nets(exp).compressor

    def clip_again(model, **how):
        networks = Networks(generator=Model(dit=model, compressor=packing), vae=pixels)
        return distillation.clip_again(networks, Batch(text=STATES), KEY, exp, train, **how)[0]

    def by_hand(model):
        nets = block_step.Nets(dit=model, compressor=packing)
        text = batches.text_kv(model, STATES)
        drawn = rollout.sample_draws(exp, train.cover, KEY, BLOCKS, 2)
        clip = rollout.draw(nets, exp, train.distil, pixels, drawn, text)
        guess = batches.by_clip(rollout.again(nets, exp, train.distil, clip, text))
        return (guess * weights).sum(), (batches.by_clip(clip.latent), guess)

    (_, (remembered, guess)), expected = tiny.jit(jax.value_and_grad(by_hand, has_aux=True))(
        TEACHER
    )
    found = tiny.jit(jax.grad(lambda model: (clip_again(model) * weights).sum()))(TEACHER)
    seen = tiny.jit(lambda model: (clip_again(model), clip_again(model, graded=False)))(TEACHER)
    for each in seen:
        np.testing.assert_allclose(each, remembered, atol=2e-5)
    assert (
        np.abs(np.asarray(guess - remembered)).max() > 1e-3
    ) == finished  # the key's exit is not the last step
    for name, leaf in pytrees.flatten(expected).items():
        np.testing.assert_allclose(
            pytrees.flatten(found)[name], leaf, atol=1e-4 * np.abs(leaf).max(), err_msg=name
        )
