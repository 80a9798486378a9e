"""A teacher's trajectory from noise to a clip, which `trajectory` training starts from (CausVid, Self-Forcing)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from packforcing_jax.config import Experiment, TrainConfig
from packforcing_jax.errors import require
from packforcing_jax.sampling import block_step, schedules
from packforcing_jax.training import batches, distillation, objectives
from packforcing_jax.training.batches import Batch, Model


def grid_steps(exp: Experiment, grid: int) -> tuple[int, ...]:
    """The entries of the teacher's grid at which the student's steps stand, and the end."""
    entries = [
        grid * (schedules.TIMESTEPS - step) / schedules.TIMESTEPS for step in exp.sample.steps
    ]
    least = np.lcm.reduce(
        [schedules.TIMESTEPS // np.gcd(step, schedules.TIMESTEPS) for step in exp.sample.steps]
    )
    require(
        all(entry == int(entry) for entry in entries),
        f"train.grid={grid} steps do not pass through "
        f"sample.steps={exp.sample.steps}; choose a multiple of {least}.",
    )
    return (*map(int, entries), grid)


def trajectory(
    teacher: Model,
    exp: Experiment,
    train: TrainConfig,
    noise: Array,
    states: Array,
    null_text: Array | None = None,
    *,
    behind: Batch | None = None,
) -> Array:
    """The teacher's states [k, block, b, t, y, x, c] at the student's noise levels, the last one clean.

    Euler steps on the table of `sample.shift`, guided in the usual form by `train.distil.guidance`. A bidirectional
    teacher draws whole clips; a causal one draws each block `behind` true clips (Causal-Forcing).
    """
    sigmas = jnp.asarray(
        schedules.sigmas_to_zero(schedules.table(exp.sample.shift, steps=train.grid))
    )

    def predict(noisy: Array, sigma: Array, text: Array) -> Array:
        if behind is not None:
            levels = jnp.broadcast_to(sigma, noisy.shape[:2])
            blocks = objectives.NoisyBlocks(sample=noisy, sigma=levels, states=text)
            return objectives.causal(teacher, exp, train, behind, blocks).clean
        clip = batches.by_clip(noisy)
        times = jnp.broadcast_to(schedules.TIMESTEPS * sigma, noisy.shape[1:2])
        return batches.by_block(
            distillation.score(teacher.dit, exp, train.distil, clip, times, text), exp.cache.block
        )

    def step(noisy: Array, i: Array) -> tuple[Array, Array]:
        clean = distillation.steered(
            lambda text: predict(noisy, sigmas[i], text), states, null_text, train.distil.guidance
        )
        velocity = schedules.velocity_from_clean(noisy, clean, sigmas[i])
        return noisy + (sigmas[i + 1] - sigmas[i]) * velocity, noisy

    end, before = jax.lax.scan(step, noise, jnp.arange(train.grid))
    return jnp.concatenate([before[jnp.asarray(grid_steps(exp, train.grid)[:-1])], end[None]])


def timesteps(exp: Experiment) -> list[float]:
    """The timesteps of these states."""
    return [*block_step.step_table(exp.sample)[0].tolist(), 0.0]


def noise_to_clip(
    teacher: Model,
    exp: Experiment,
    train: TrainConfig,
    seed: Array,
    states: Array,
    null_text: Array | None = None,
) -> Array:
    """A bidirectional teacher's trajectory [k, block, b, t, y, x, c] from the noise of `seed` to its clips.

    `null_text` [words, d] are the states that guidance moves away from; None: zeros.
    """
    drawn = TrainConfig(grid=train.grid, distil=train.distil)  # all that decides about the program
    return _noise_to_clip(teacher, exp, drawn, seed, states, null_text)


@functools.partial(jax.jit, static_argnames=("exp", "train"))
def _noise_to_clip(
    teacher: Model,
    exp: Experiment,
    train: TrainConfig,
    seed: Array,
    states: Array,
    null_text: Array | None,
) -> Array:
    shape = (exp.blocks, states.shape[1], exp.cache.block, *exp.latent, exp.dit.in_channels)
    noise = jax.random.normal(jax.random.key(seed), shape)
    return trajectory(teacher, exp, train, noise, states, null_text)
