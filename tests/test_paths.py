"""A teacher's way passes through the student's noise levels and ends where its steps lead."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from packforcing_jax.config import DistilConfig, TrainConfig
from packforcing_jax.errors import InputError
from packforcing_jax.sampling import schedules
from packforcing_jax.training import batches, distillation, objectives, paths
from packforcing_jax.training.batches import Batch, Model

BLOCKS = 3
EXP = dataclasses.replace(
    tiny.EXP,
    clip=3 * BLOCKS,
    sample=dataclasses.replace(tiny.EXP.sample, steps=(1000, 600, 200), shift=3.0),
)
TRAIN = TrainConfig(grid=5, history="clean", distil=DistilConfig(guidance=2.0))
TEACHER = Model(dit=tiny.nets().dit, compressor=tiny.nets().compressor)
STATES = tiny.normal(3, 1, tiny.BATCH, 9, EXP.dit.text_dim)
NOISE = tiny.latents(BLOCKS)


def by_hand(guess):
    """Euler's steps one by one, with the states at the student's levels and the end."""
    sigmas = np.append(schedules.table(3.0, steps=5).sigmas, 0.0)
    x = NOISE
    found = []
    for i in range(5):
        found += [x] if i in (0, 2, 4) else []
        with_text, without = (
            guess(x, sigmas[i], text) for text in (STATES, jnp.zeros_like(STATES))
        )
        velocity = (x - (without + 2.0 * (with_text - without))) / sigmas[i]
        x = x + (sigmas[i + 1] - sigmas[i]) * velocity
    return jnp.stack([*found, x])


def test_a_bidirectional_teacher_draws_whole_clips():
    @tiny.jit
    def guess(x, sigma, text):
        clean = distillation.score(
            TEACHER.dit,
            EXP,
            TRAIN.distil,
            batches.by_clip(x),
            jnp.full(tiny.BATCH, 1000 * sigma),
            text,
        )
        return batches.by_block(clean, EXP.cache.block)

    way = tiny.jit(paths.trajectory, static_argnames=("exp", "train"))(
        TEACHER, EXP, TRAIN, NOISE, STATES
    )
    np.testing.assert_allclose(way, by_hand(guess), atol=2e-4)


def test_a_causal_teacher_draws_behind_the_truth():
    true = Batch(text=STATES, latent=tiny.latents(BLOCKS, seed=9))

    @tiny.jit
    def guess(x, sigma, text):
        noisy = objectives.NoisyBlocks(sample=x, sigma=jnp.full(x.shape[:2], sigma), states=text)
        return objectives.causal(TEACHER, EXP, TRAIN, true, noisy).clean

    way = tiny.jit(paths.trajectory, static_argnames=("exp", "train"))(
        TEACHER, EXP, TRAIN, NOISE, STATES, behind=true
    )
    np.testing.assert_allclose(way, by_hand(guess), atol=2e-4)


def test_states_stand_at_the_students_steps():
    assert paths.grid_steps(EXP, 5) == (0, 2, 4, 5)
    sigmas = np.append(schedules.table(3.0, steps=5).sigmas, 0)[list(paths.grid_steps(EXP, 5))]
    np.testing.assert_allclose(paths.timesteps(EXP), 1000 * sigmas, rtol=1e-5)


def test_a_grid_that_misses_a_step_is_refused_with_one_that_does_not():
    with pytest.raises(InputError, match=r"train\.grid=6 .* choose a multiple of 5\."):
        paths.grid_steps(EXP, 6)


def test_the_seed_decides_what_is_drawn():
    one, same, other = (
        paths.noise_to_clip(TEACHER, EXP, TRAIN, jnp.uint32(seed), STATES) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert np.abs(np.asarray(one - other)).max() > 0.1
    assert one.shape == (4, BLOCKS, tiny.BATCH, 3, 8, 4, 12)


def test_a_teacher_draws_away_from_the_states_it_is_given():
    """Those of a negative prompt as long as the text; without any, zeros."""
    seed = jnp.uint32(1)
    away = tiny.normal(8, 9, EXP.dit.text_dim)
    zeros = paths.noise_to_clip(TEACHER, EXP, TRAIN, seed, STATES, jnp.zeros_like(away))
    none = paths.noise_to_clip(TEACHER, EXP, TRAIN, seed, STATES)
    from_it = paths.noise_to_clip(TEACHER, EXP, TRAIN, seed, STATES, away)
    np.testing.assert_allclose(zeros, none, atol=1e-6)
    assert np.abs(np.asarray(from_it - none)[-1]).max() > 1e-3
