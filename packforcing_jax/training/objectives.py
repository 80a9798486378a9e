"""What training minimises on known clips. One objective, one function, on the very parts that sampling runs.

A loss takes (networks, batch, key, experiment, train) and gives (loss, what to log). Sources: Wan2.1 and
Causal-Forcing for flow matching and teacher forcing, CausVid and Self-Forcing for trajectories, Causal-Forcing for
consistency. `OBJECTIVES` is the one table of their names; an `Objective` of one's own goes into `TrainConfig` as a
value.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int

from packforcing_jax.config import Experiment, Objective, TrainConfig
from packforcing_jax.errors import nearest, require
from packforcing_jax.memory import cache
from packforcing_jax.memory import layout as layouts
from packforcing_jax.networks import dit
from packforcing_jax.sampling import block_step, schedules
from packforcing_jax.sampling.block_step import Denoiser
from packforcing_jax.sampling.schedules import NoiseLevel
from packforcing_jax.training import batches, distillation, rollout
from packforcing_jax.training.batches import Batch, Model, Networks

Metrics = dict[str, Array]


@struct.dataclass
class NoisyBlocks:
    """What a causal network denoises: blocks at noise levels of their own, and the states of their text."""

    sample: Array  # [block, b, t, y, x, c]
    sigma: Array  # [block, b]
    states: Array  # [block or 1, b, words, d]


@struct.dataclass
class Prediction:
    """What a causal network makes of noisy blocks, and, behind a memory, which packed blocks its last layer wants."""

    clean: Array  # [block, b, t, y, x, c]
    scores: Any = None  # [block, b, slot]
    ids: Any = None  # [block, slot]


def noise_levels(key: Array, shape: tuple[int, ...], shift: float) -> Float[Array, "..."]:
    """Sigmas of uniform draws warped towards noise: s u / (1 + (s - 1) u)."""
    u = jax.random.uniform(key, shape)
    return shift * u / (1 + (shift - 1) * u)


def denoising_loss(
    exp: Experiment,
    train: TrainConfig,
    predicted: Array,
    clean: Array,
    sigma: Array,
    weight: Array | None,
) -> Float[Array, " block"]:
    """The error of each block [block, b, t, ...]: of the clean sample, or of the velocity with Wan's weights."""
    error = (predicted - clean) ** 2
    if exp.sample.prediction == "velocity":
        grid = schedules.table(train.shift)
        bell = jnp.asarray(schedules.training_weights(grid))[
            schedules.nearest_id(grid, schedules.TIMESTEPS * sigma)
        ]
        error = error * schedules.over(bell / jnp.maximum(sigma, 1e-6) ** 2, error)
    return jnp.mean(error if weight is None else weight * error, axis=range(1, error.ndim))


def _text(
    nets: Model, batch: Batch, key: Array, train: TrainConfig, null_text: Array | None
) -> Array:
    """The states of the text, some clips' hidden so that guidance has something to lean on."""
    states = batches.text_states(nets, batch.text)
    if train.drop_text == 0:
        return states
    return batches.without_text(
        states, null_text, jax.random.bernoulli(key, train.drop_text, (states.shape[1],))
    )


# Causal networks over known clips


def causal(
    model: Model,
    exp: Experiment,
    train: TrainConfig,
    batch: Batch,
    noisy: NoisyBlocks,
    gap: Array | float = 0.0,
) -> Prediction:
    """The prediction of every noisy block behind the history that `train.history` names."""
    if train.history == "memory":
        return behind_memory(model, exp, train, batch, noisy, gap)
    blocks = noisy.sample.shape[0]
    size = exp.cache.block
    times = jnp.repeat(schedules.TIMESTEPS * noisy.sigma.T, size, axis=1)
    clean = batches.by_clip(batch.latent) if train.history == "clean" else None
    output = dit.parallel(
        model.dit,
        batches.by_clip(noisy.sample),
        times,
        jnp.moveaxis(noisy.states, 0, 1),
        clean=clean,
        block_ends=tuple(range(size, size * blocks + 1, size)),
    )
    output = batches.by_block(output, size)
    if exp.sample.prediction == "velocity":
        output = schedules.clean_from_velocity(noisy.sample, output, noisy.sigma)
    return Prediction(clean=output)


def behind_memory(
    model: Model,
    exp: Experiment,
    train: TrainConfig,
    batch: Batch,
    noisy: NoisyBlocks,
    gap: Array | float,
) -> Prediction:
    """The prediction of every noisy block behind a memory of the true ones.

    The memory is filled as sampling fills it: a clean pass and a packing pass per block, then `commit`. Gradients
    flow through what is stored, so the compressor learns from the blocks that come later.
    """
    nets = model.nets
    text = batches.text_kv(model.dit, noisy.states)
    count = noisy.sample.shape[1]
    random = jnp.zeros((exp.dit.layers, count, exp.cache.slots))
    asks = train.cover.matching > 0 and exp.cache.top > 0
    asks_first = block_step.Access(attends=block_step.watching if asks else block_step.choosing)
    keep_both = block_step.Access(keep=lambda own, view, past: (own, view))
    keep_own = block_step.Access(keep=lambda own, view, past: own)

    def one_block(memory: cache.Memory, inputs):
        latent, low_res, noised, level = inputs
        layout = layouts.layout(exp.cache, memory.progress, gap)
        denoiser = Denoiser(nets, exp.step, batches.of_block(text, memory.num_blocks))
        past = (memory.layers, random)
        noise_level = NoiseLevel(timestep=schedules.TIMESTEPS * level, sigma=level)
        clean, (views, selection, *scores) = block_step.predict_x0(
            denoiser, layout, noised, noise_level, past, asks_first
        )
        full, views = block_step.read_clean(denoiser, layout, latent, views, keep_both)
        packed = None
        if exp.cache.top:
            packed = block_step.read_packed(denoiser, layout, latent, low_res, views, keep_own)
        memory = cache.commit(exp.memory, memory, latent, full, packed, selection, gap)
        return memory, (clean, scores[0][-1] if asks else None, layout.ids)

    low_res = batch.latent[:, :, :0] if batch.low_res is None else batch.low_res
    require(
        batch.low_res is not None or not exp.packs_pixels,
        "the data hold no low-resolution latents, which packing reads; prepare them again with the VAE, or set "
        "compressor.branches=hr.",
    )
    body = jax.checkpoint(one_block) if train.remat == "blocks" else one_block
    xs = (batch.latent, low_res, noisy.sample, noisy.sigma)
    _, (clean, scores, ids) = jax.lax.scan(
        body, cache.init(exp.memory, count, noisy.sample.dtype, stacked=True, scratch=False), xs
    )
    return Prediction(clean=clean, scores=scores, ids=ids)


def forcing(
    nets: Networks, batch: Batch, key: Array, exp: Experiment, train: TrainConfig
) -> tuple[Array, Metrics]:
    """Blocks are predicted from noise behind true ones (teacher forcing) or noisy ones (diffusion forcing)."""
    keys = jax.random.split(key, 4)
    sigma = noise_levels(keys[0], batch.latent.shape[:2], train.shift)
    noise = jax.random.normal(keys[1], batch.latent.shape)
    states = _text(nets.generator, batch, keys[2], train, nets.null_text)
    noisy = NoisyBlocks(
        sample=schedules.add_noise(batch.latent, noise, sigma), sigma=sigma, states=states
    )
    prediction = causal(nets.generator, exp, train, batch, noisy, rollout.gap(train.cover, keys[3]))
    by_block = denoising_loss(exp, train, prediction.clean, batch.latent, sigma, batch.weight)
    missed = _missed(prediction, batch)
    return by_block.mean() + train.cover.matching * missed, {
        "loss_by_block": by_block,
        "matching": missed,
    }


def _missed(prediction: Prediction, batch: Batch) -> Array:
    """`matching` over all blocks, 0 where no block is called back."""
    if prediction.scores is None or batch.called is None:
        return jnp.float32(0)
    return jax.vmap(matching)(prediction.scores, prediction.ids, batch.called).mean()


def matching(
    scores: Float[Array, "b slot"], ids: Int[Array, " slot"], called: Bool[Array, "b kind block"]
) -> Array:
    """-log(share of the affinity that the called-back blocks get), 0 where none is packed: mean over videos and kinds.

    Hard selection gives a score no gradient; this does. `ids` says which block is in which slot.
    """
    there = ids >= 0
    right = called[:, :, jnp.maximum(ids, 0)] & there[None, None]
    share = jnp.where(there[None], scores, 0.0) + 1e-12  # the logarithm of a share of 0 is -inf
    called_share = jnp.where(right, share[:, None], 0.0).sum(-1)
    has_called = right.any(-1)
    surprise = -jnp.log(
        jnp.where(has_called, called_share, 1.0)
        / jnp.where(has_called, share.sum(-1)[:, None], 1.0)
    )
    return surprise.mean()


# The bidirectional teacher


def flow_matching(
    nets: Networks, batch: Batch, key: Array, exp: Experiment, train: TrainConfig
) -> tuple[Array, Metrics]:
    """Whole clips are predicted from noise, one level per clip: the bidirectional teacher."""
    keys = jax.random.split(key, 3)
    sigma = noise_levels(keys[0], batch.latent.shape[1:2], train.shift)
    noise = jax.random.normal(keys[1], batch.latent.shape)
    states = _text(nets.generator, batch, keys[2], train, nets.null_text)
    levels = jnp.broadcast_to(sigma, batch.latent.shape[:2])
    noisy = schedules.add_noise(batch.latent, noise, levels)
    clean = distillation.score(
        nets.generator.dit,
        exp,
        train.distil,
        batches.by_clip(noisy),
        schedules.TIMESTEPS * sigma,
        states,
    )
    by_block = denoising_loss(
        exp, train, batches.by_block(clean, exp.cache.block), batch.latent, levels, batch.weight
    )
    return by_block.mean(), {"loss_by_block": by_block}


# Fewer steps: beginnings for distribution matching


def trajectory(
    nets: Networks, batch: Batch, key: Array, exp: Experiment, train: TrainConfig
) -> tuple[Array, Metrics]:
    """From a state of a teacher's trajectory, at a step of its own for each block, to its end (CausVid)."""
    keys = jax.random.split(key, 3)
    times, sigmas = (jnp.asarray(x) for x in block_step.step_table(exp.sample))
    require(
        batch.trajectory.shape[0] == len(times) + 1,
        f"the data hold {batch.trajectory.shape[0]} states a clip, but sample.steps={exp.sample.steps} needs "
        f"{len(times) + 1}, the last one clean; prepare trajectories with these steps.",
    )
    states = _text(nets.generator, batch, keys[0], train, nets.null_text)
    index = jax.random.randint(keys[1], batch.trajectory.shape[1:3], 0, len(times))
    noisy = jnp.take_along_axis(
        batch.trajectory, jnp.expand_dims(index, (0, *range(3, 7))), axis=0
    )[0]
    target = batch.trajectory[-1]
    true = batch if batch.latent is not None else dataclasses.replace(batch, latent=target)
    blocks = NoisyBlocks(sample=noisy, sigma=sigmas[index], states=states)
    prediction = causal(nets.generator, exp, train, true, blocks, rollout.gap(train.cover, keys[2]))
    by_block = jnp.mean((prediction.clean - target) ** 2, axis=range(1, target.ndim))
    return by_block.mean(), {"loss_by_block": by_block}


def consistency(
    nets: Networks, batch: Batch, key: Array, exp: Experiment, train: TrainConfig
) -> tuple[Array, Metrics]:
    """Neighbours on the teacher's trajectory have one end: the target is the average's prediction after a teacher step.

    Each block has a step of its own. Predicted clean samples lack what predicted velocities have built in, that
    a clean sample is its own end: the last step's target is therefore where it leads (Causal-Forcing stops before).
    """
    keys = jax.random.split(key, 4)
    count = batch.latent.shape[:2]
    sigmas_to_zero = jnp.asarray(
        schedules.sigmas_to_zero(schedules.table(train.shift, steps=train.grid))
    )
    at = jax.random.randint(keys[0], count, 0, train.grid)
    here = sigmas_to_zero[at]
    there = sigmas_to_zero[at + 1]
    noisy = schedules.add_noise(batch.latent, jax.random.normal(keys[1], batch.latent.shape), here)
    gap = rollout.gap(train.cover, keys[3])
    states = batches.text_states(nets.generator, batch.text)

    def predict(model: Model, sample: Array, sigma: Array, text: Array) -> Array:
        blocks = NoisyBlocks(sample=sample, sigma=sigma, states=text)
        return causal(model, exp, train, batch, blocks, gap).clean

    teacher, average = jax.lax.stop_gradient((nets.teacher, nets.average))
    clean = distillation.steered(
        lambda text: predict(teacher, noisy, here, text),
        states,
        nets.null_text,
        train.distil.guidance,
    )
    nearer = noisy + schedules.over(there - here, noisy) * schedules.velocity_from_clean(
        noisy, clean, here
    )
    target = jnp.where(
        schedules.over(there, noisy) == 0, nearer, predict(average, nearer, there, states)
    )
    error = (predict(nets.generator, noisy, here, states) - jax.lax.stop_gradient(target)) ** 2
    by_block = error.mean(axis=range(1, error.ndim))
    return by_block.mean(), {"loss_by_block": by_block}


# All of them

OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective("flow_matching", flow_matching, histories=()),
        Objective("forcing", forcing),
        Objective("trajectory", trajectory, needs=("trajectory",)),
        Objective("consistency", consistency, teacher=("dit", "compressor"), average=True),
        Objective(
            "dmd",
            distillation.dmd_loss,
            critic=distillation.critic_loss,
            own_clips=True,
            needs=(),
            teacher=("dit",),
            histories=("memory",),
        ),
        Objective(
            "sid",
            distillation.sid_loss,
            critic=distillation.critic_loss,
            own_clips=True,
            needs=(),
            teacher=("dit",),
            histories=("memory",),
        ),
    )
}


def of(train: TrainConfig) -> Objective:
    """The objective that `train` gives, or the one whose name it gives."""
    if isinstance(train.objective, Objective):
        return train.objective
    name = train.objective
    require(
        name in OBJECTIVES, f"train.objective={name!r} is unknown; {nearest(str(name), OBJECTIVES)}"
    )
    return OBJECTIVES[name]


def check(train: TrainConfig) -> None:
    """Raises `InputError` unless the objective exists and can be trained as `train` says."""
    objective = of(train)
    require(
        not objective.histories or train.history in objective.histories,
        f"train.history={train.history!r} is none that the objective {objective.name!r} is trained behind; "
        f"choose one of {', '.join(objective.histories)}.",
    )
    require(
        bool(train.teacher_from) or not objective.teacher,
        f"train.objective={objective.name!r} asks a teacher; name a model folder in train.teacher_from.",
    )


def remembers(train: TrainConfig) -> bool:
    """Whether blocks are trained behind the packed memory."""
    return train.history == "memory" and train.history in of(train).histories
