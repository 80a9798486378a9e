"""Distribution matching: a clip is pulled from where the critic sees it to where the teacher does (DMD; SiD).

Self-Forcing `model/dmd.py`, `model/sid.py`. Everything is in clean samples; a score network is a function from a noisy
clip to its prediction of the clean one.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from packforcing_jax.config import DistilConfig, Experiment, TrainConfig
from packforcing_jax.networks import dit
from packforcing_jax.policies import attention
from packforcing_jax.sampling import schedules
from packforcing_jax.training import batches, rollout
from packforcing_jax.training.batches import Batch, Networks
from packforcing_jax.types import Latent

Metrics = dict[str, Array]


def score(
    model: dit.WanDiT,
    exp: Experiment,
    distil: DistilConfig,
    noisy: Latent,
    timestep: Float[Array, " b"],
    states: Array,
) -> Latent:
    """The clean clip that a bidirectional network sees in `noisy` [b, frames, y, x, c] at one timestep per clip.

    `states` [block or 1, b, words, d]. With `train.distil.score_shift` velocities are read by that table's sigmas.
    """
    times = jnp.broadcast_to(timestep[:, None], noisy.shape[:2])
    context = jnp.moveaxis(states, 0, 1)
    backend = attention.backend(exp.attention, model.patch.kernel.dtype)
    output = dit.bidirectional(model, noisy, times, context, attention_fn=backend)
    if exp.sample.prediction == "clean":
        return output
    return schedules.clean_from_velocity(noisy, output, score_sigma(distil, timestep))


def score_sigma(distil: DistilConfig, timestep: Array) -> Array:
    """The noise level by which a score network's velocity is read."""
    shift = distil.score_shift
    return (
        schedules.sigma_at(schedules.table(shift), timestep)
        if shift
        else timestep / schedules.TIMESTEPS
    )


def guided(distil: DistilConfig, conditional: Latent, unconditional: Latent) -> Latent:
    """The teacher's prediction moved away from the one without text."""
    base = {"extra": conditional, "plain": unconditional}[distil.form]
    return base + distil.guidance * (conditional - unconditional)


def guides(distil: DistilConfig) -> bool:
    """Whether the unconditional prediction of `guided` has a weight, and is computed."""
    return (distil.form, distil.guidance) != ("extra", 0)


def steered(
    predict: Callable[[Array], Latent], states: Array, null_text: Array | None, scale: float
) -> Latent:
    """`predict(states)` under guidance in its usual form; without text only where that has a weight."""
    conditional = predict(states)
    if scale == 1:
        return conditional
    unconditional = predict(batches.without_text(states, null_text))
    return unconditional + scale * (conditional - unconditional)


def timesteps(key: Array, train: TrainConfig, batch: int) -> Float[Array, " b"]:
    """One timestep per clip: a whole number uniform in 0..999, shifted towards noise, within the bounds."""
    raw = jax.random.randint(key, (batch,), 0, schedules.TIMESTEPS)
    return schedules.shift_uniform(
        raw, train.shift, train.distil.min_timestep, train.distil.max_timestep
    )


def noised(
    train: TrainConfig, clean: Latent, noise: Latent, timestep: Float[Array, " b"]
) -> Latent:
    """`clean` at a timestep, by the table of `train.shift`."""
    return schedules.add_noise(
        clean, noise, schedules.sigma_at(schedules.table(train.shift), timestep)
    )


def distance(x: Latent, real: Latent) -> Array:
    """mean|x - real| of each clip, with unit axes."""
    return jnp.abs(x - real).mean(axis=tuple(range(1, x.ndim)), keepdims=True)


def pull(x: Latent, fake: Latent, real: Latent) -> Latent:
    """DMD's gradient: from where the critic sees `x` to where the teacher does, over how far the teacher is."""
    # 0/0 where a clip is exactly the teacher's: nothing pulls it then
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
    nets: Networks,
    batch: Batch,
    key: Array,
    exp: Experiment,
    train: TrainConfig,
    *,
    graded: bool = True,
) -> tuple[Latent, Array, Metrics]:
    """The student's clip [b, frames, y, x, c], its text, and what the rollout covered.

    The clip is what its history remembers. Where it is `graded`, every block has the gradient of its exit step, drawn
    again: straight through the steps behind that one.
    """
    states = batches.text_states(nets.generator, batch.text)
    text = batches.text_kv(nets.generator.dit, states)
    count = exp.blocks
    draws = rollout.sample_draws(exp, train.cover, key, count, states.shape[1])
    clip = rollout.draw(nets.generator.nets, exp, train.distil, nets.vae, draws, text)
    first = count - (train.distil.scored or count)
    latent = clip.latent[first:]
    if graded:
        again = rollout.again(nets.generator.nets, exp, train.distil, clip, text, first=first)
        latent = latent + (again - jax.lax.stop_gradient(again))
    return batches.by_clip(latent), states[-latent.shape[0] :], rollout.covered(exp, clip)


def dmd_loss(
    nets: Networks, batch: Batch, key: Array, exp: Experiment, train: TrainConfig
) -> tuple[Array, Metrics]:
    """Distribution matching of the student's own clips."""
    return _student_loss(nets, batch, key, exp, train, through=False)


def sid_loss(
    nets: Networks, batch: Batch, key: Array, exp: Experiment, train: TrainConfig
) -> tuple[Array, Metrics]:
    """The score identity on the student's own clips; its gradient also flows through both scores."""
    return _student_loss(nets, batch, key, exp, train, through=True)


def _student_loss(
    nets: Networks,
    batch: Batch,
    key: Array,
    exp: Experiment,
    train: TrainConfig,
    *,
    through: bool,
) -> tuple[Array, Metrics]:
    keys = jax.random.split(key, 3)
    distil = train.distil
    x, states, metrics = clip_again(nets, batch, keys[0], exp, train)
    states = jax.lax.stop_gradient(states)
    timestep = timesteps(keys[1], train, x.shape[0])
    noise = jax.random.normal(keys[2], x.shape)
    noisy = noised(train, x if through else jax.lax.stop_gradient(x), noise, timestep)
    teacher, critic = jax.lax.stop_gradient((nets.teacher.dit, nets.critic))
    real = score(teacher, exp, distil, noisy, timestep, states)
    if guides(distil):
        null_text = batches.without_text(states, nets.null_text)
        real = guided(distil, real, score(teacher, exp, distil, noisy, timestep, null_text))
    fake = score(critic, exp, distil, noisy, timestep, states)
    gradient = pull(x, fake, real)
    loss = identity_loss(x, fake, real, distil.alpha) if through else matching_loss(x, gradient)
    return loss, metrics | {"pull": jnp.abs(gradient).mean()}


def critic_loss(
    nets: Networks, batch: Batch, key: Array, exp: Experiment, train: TrainConfig
) -> tuple[Array, Metrics]:
    """The critic learns what the student's clips look like under noise: flow matching on a rollout of its own."""
    keys = jax.random.split(key, 3)
    x, states, metrics = jax.lax.stop_gradient(
        clip_again(nets, batch, keys[0], exp, train, graded=False)
    )
    timestep = timesteps(keys[1], train, x.shape[0])
    noise = jax.random.normal(keys[2], x.shape)
    noisy = noised(train, x, noise, timestep)
    fake = score(nets.critic, exp, train.distil, noisy, timestep, states)
    sigma = schedules.sigma_at(schedules.table(train.shift), timestep)
    if exp.sample.prediction == "clean":
        # A network that predicts the clean clip is trained on it as such, with one weight at every level.
        return jnp.mean((fake - x) ** 2), metrics
    return flow_loss(x, fake, noise, noisy, sigma), metrics
