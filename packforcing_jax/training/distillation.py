"""Distribution matching: a clip is pulled from where the critic sees it to where the teacher does (DMD; SiD).

Self-Forcing `model/dmd.py`, `model/sid.py`. Everything is in clean samples; a score network is a function from a noisy
clip to its guess of the clean one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from packforcing_jax.config import Experiment
from packforcing_jax.networks import dit
from packforcing_jax.policies import attention
from packforcing_jax.sampling import schedules
from packforcing_jax.training import batches, rollout
from packforcing_jax.training.batches import Batch, Networks
from packforcing_jax.types import Latent

Metrics = dict[str, Array]


def score(
    model: dit.WanDiT, exp: Experiment, noisy: Latent, timestep: Float[Array, " b"], states: Array
) -> Latent:
    """The clean clip that a bidirectional network sees in `noisy` [b, frames, y, x, c] at one timestep per clip.

    `states` [block or 1, b, words, d]. With `train.distil.score_shift` velocities are read by that table's sigmas.
    """
    times = jnp.broadcast_to(timestep[:, None], noisy.shape[:2])
    context, backend = (
        jnp.moveaxis(states, 0, 1),
        attention.backend(exp.attention, model.patch.kernel.dtype),
    )
    output = dit.bidirectional(model, noisy, times, context, attend=backend)
    if exp.sample.prediction == "clean":
        return output
    return schedules.clean_from_velocity(noisy, output, score_sigma(exp, timestep))


def score_sigma(exp: Experiment, timestep: Array) -> Array:
    """The noise level by which a score network's velocity is read."""
    shift = exp.train.distil.score_shift
    return (
        schedules.sigma_at(schedules.table(shift), timestep)
        if shift
        else timestep / schedules.TIMESTEPS
    )


def guided(conditional: Latent, unconditional: Latent, exp: Experiment) -> Latent:
    """The teacher's guess moved away from the one without text."""
    cfg = exp.train.distil
    base = {"extra": conditional, "plain": unconditional}[cfg.form]
    return base + cfg.guidance * (conditional - unconditional)


def steered(guess: Callable[[Array], Latent], states: Array, hidden: Any, scale: float) -> Latent:
    """`guess(states)` under guidance in its usual form; without text it is asked only where that has a weight."""
    conditional = guess(states)
    if scale == 1:
        return conditional
    unconditional = guess(batches.hide(states, hidden))
    return unconditional + scale * (conditional - unconditional)


def timesteps(key: Array, exp: Experiment, batch: int) -> Float[Array, " b"]:
    """One timestep per clip: a whole number uniform in 0..999, shifted towards noise, within the bounds."""
    raw = jax.random.randint(key, (batch,), 0, schedules.TIMESTEPS)
    return schedules.warp_uniform(raw, exp.train.shift, exp.train.distil.low, exp.train.distil.high)


def noised(exp: Experiment, clean: Latent, noise: Latent, timestep: Float[Array, " b"]) -> Latent:
    """`clean` at a timestep, by the table of `train.shift`."""
    return schedules.add_noise(
        clean, noise, schedules.sigma_at(schedules.table(exp.train.shift), timestep)
    )


def distance(x: Latent, real: Latent) -> Array:
    """mean|x - real| of each clip, with unit axes."""
    return jnp.abs(x - real).mean(axis=tuple(range(1, x.ndim)), keepdims=True)


def pull(x: Latent, fake: Latent, real: Latent) -> Latent:
    """DMD's gradient: from where the critic sees `x` to where the teacher does, over how far the teacher is."""
    return jax.lax.stop_gradient(jnp.nan_to_num((fake - real) / distance(x, real)))


def matching_loss(x: Latent, gradient: Latent, mask: Array | None = None) -> Array:
    """0.5 mean (x - stop(x - g))^2, whose gradient in x is g over the count; `mask` [b, frames] says what counts."""
    target = jax.lax.stop_gradient(x - gradient)
    error = 0.5 * (x.astype(jnp.float32) - target) ** 2
    if mask is None:
        return error.mean()
    counts = jnp.broadcast_to(mask[..., None, None, None], x.shape)
    return jnp.where(counts, error, 0.0).sum() / counts.sum()


def identity_loss(x: Latent, fake: Latent, real: Latent, alpha: float) -> Array:
    """SiD's loss, whose gradient also flows through both scores: (r - f)((r - x) - alpha (r - f)) / mean|x - r|."""
    terms = (
        (real - fake)
        * ((real - x) - alpha * (real - fake))
        / jax.lax.stop_gradient(distance(x, real))
    )
    return jnp.nan_to_num(terms).mean()


def flow_loss(x: Latent, fake: Latent, noise: Latent, noisy: Latent, sigma: Array) -> Array:
    """The critic's: mean ((x_t - fake) / sigma - (noise - x))^2."""
    return jnp.mean(
        (schedules.velocity_from_clean(noisy, fake, sigma) - schedules.training_target(x, noise))
        ** 2
    )


# Objectives


def clip_again(
    nets: Networks, batch: Batch, key: Array, exp: Experiment, *, graded: bool = True
) -> tuple[Latent, Array, Metrics]:
    """The student's clip [b, frames, y, x, c], its text, and what the rollout covered.

    The clip is what its history remembers. Where it is `graded`, every block has the gradient of its exit step, drawn
    again: straight through the steps behind that one.
    """
    states = batches.text_states(nets.generator, batch.words)
    text, count = batches.text_kv(nets.generator.dit, states), exp.blocks
    drawn = rollout.draws(exp, key, count, states.shape[1])
    clip = rollout.draw(nets.generator.nets, exp, nets.pixels, drawn, text)
    first = count - (exp.train.distil.scored or count)
    latent = clip.latent[first:]
    if graded:
        guess = rollout.again(nets.generator.nets, exp, clip, drawn, text, first=first)
        latent = latent + (guess - jax.lax.stop_gradient(guess))
    return batches.by_clip(latent), states[-latent.shape[0] :], rollout.covered(exp, clip, drawn)


def generator_loss(
    nets: Networks, batch: Batch, key: Array, exp: Experiment
) -> tuple[Array, Metrics]:
    """Distribution matching of the student's own clips (`dmd`), or the score identity's (`sid`)."""
    keys = jax.random.split(key, 3)
    x, states, metrics = clip_again(nets, batch, keys[0], exp)
    states = jax.lax.stop_gradient(states)
    timestep, noise = timesteps(keys[1], exp, x.shape[0]), jax.random.normal(keys[2], x.shape)
    through = exp.train.objective == "sid"
    noisy = noised(exp, x if through else jax.lax.stop_gradient(x), noise, timestep)
    teacher, critic = jax.lax.stop_gradient((nets.teacher.dit, nets.critic))
    real = score(teacher, exp, noisy, timestep, states)
    if (exp.train.distil.form, exp.train.distil.guidance) != (
        "extra",
        0,
    ):  # else the unconditional guess has no weight
        real = guided(
            real, score(teacher, exp, noisy, timestep, batches.hide(states, nets.hidden)), exp
        )
    fake = score(critic, exp, noisy, timestep, states)
    gradient = pull(x, fake, real)
    loss = (
        identity_loss(x, fake, real, exp.train.distil.alpha)
        if through
        else matching_loss(x, gradient)
    )
    return loss, metrics | {"pull": jnp.abs(gradient).mean()}


def critic_loss(nets: Networks, batch: Batch, key: Array, exp: Experiment) -> tuple[Array, Metrics]:
    """The critic learns what the student's clips look like under noise: flow matching on a rollout of its own."""
    keys = jax.random.split(key, 3)
    x, states, metrics = jax.lax.stop_gradient(clip_again(nets, batch, keys[0], exp, graded=False))
    timestep, noise = timesteps(keys[1], exp, x.shape[0]), jax.random.normal(keys[2], x.shape)
    noisy = noised(exp, x, noise, timestep)
    fake = score(nets.critic, exp, noisy, timestep, states)
    sigma = schedules.sigma_at(schedules.table(exp.train.shift), timestep)
    if (
        exp.sample.prediction == "clean"
    ):  # a network that names the clean clip learns it as such, at every level alike
        return jnp.mean((fake - x) ** 2), metrics
    return flow_loss(x, fake, noise, noisy, sigma), metrics
