"""What reference files of training ask for: distribution matching, and rollouts with a gradient."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from packforcing_jax import pytrees
from packforcing_jax.config import DistilConfig, Experiment, SampleConfig, TrainConfig
from packforcing_jax.convert import rules, wan_dit
from packforcing_jax.errors import require
from packforcing_jax.networks import dit
from packforcing_jax.sampling import block_step, schedules
from packforcing_jax.training import batches, distillation, optimisers, rollout
from packforcing_jax.types import Latent
from packforcing_jax.verify import transformer
from packforcing_jax.verify.parts import Fixture, Outputs

TIMESTEP_BOUNDS = (
    0.02,
    0.98,
)  # of the shifted timestep, in parts of all (Self-Forcing `model/dmd.py`)


@struct.dataclass
class NoisedClip:
    """A clip, and the noise and the timestep at which scores see it."""

    clean: jax.Array  # [b, frame, y, x, c]
    noise: jax.Array  # the same shape
    raw_timestep: jax.Array  # [b]  before the shift


def _ours(latent: np.ndarray) -> jax.Array:
    """[..., t, c, y, x] as the reference has it -> [..., t, y, x, c]."""
    return jnp.asarray(np.moveaxis(latent, -3, -1))


def _theirs(latent: jax.Array) -> jax.Array:
    return jnp.moveaxis(latent, -1, -3)


def _named(
    prefix: str, fixture: Fixture, weights: Mapping[str, np.ndarray], grads: dit.WanDiT
) -> Outputs:
    """Gradients under the names of the checkpoint's weights, those of them that the file holds."""
    shapes = {name: value.shape for name, value in weights.items()}
    flat = {path: np.asarray(leaf) for path, leaf in pytrees.flatten(grads).items()}
    named = {
        f"{prefix}.grad.{name}": value
        for name, value in rules.invert(flat, wan_dit.WAN_DIT, shapes).items()
    }
    return {name: value for name, value in named.items() if name in fixture.wanted} | {
        f"{prefix}.grad_global_norm": optimisers.norm(grads)
    }


# distribution matching ------------------------------------------------------------------------------------------------


def dmd_math(fixture: Fixture) -> Outputs:
    """The pull on given clips, its loss and gradient, and the critic's loss with the gradients of its weights."""
    config = fixture.config
    x = _ours(fixture.inputs["fake_latent"])
    require(
        config.get("denoising_loss_type", "flow") == "flow", "denoising_loss_type must be flow."
    )
    require(
        not config.get("ts_schedule", False),
        "ts_schedule must be False: timesteps come from the whole range.",
    )
    count = config.get("num_train_timestep", schedules.TIMESTEPS)
    min_timestep, max_timestep = (count * bound for bound in TIMESTEP_BOUNDS)
    exp = transformer.experiment(config, frames=x.shape[1], latent=(x.shape[2], x.shape[3]))
    train = TrainConfig(
        shift=float(config["generator_timestep_shift"]),
        distil=DistilConfig(
            guidance=float(config["guidance_scale"]),
            score_shift=float(config["score_timestep_shift"]),
            min_timestep=min_timestep,
            max_timestep=max_timestep,
        ),
    )
    weights = {
        net: {
            name.removeprefix(f"{net}/"): value
            for name, value in fixture.weights.items()
            if name.startswith(f"{net}/")
        }
        for net in ("real", "fake")
    }
    real, fake = (transformer.transformer(exp.dit, weights[net]) for net in ("real", "fake"))
    pulled, trained_on = (
        NoisedClip(x, _ours(fixture.inputs[noise]), jnp.asarray(config[timestep]))
        for noise, timestep in (
            ("dmd_noise", "raw_timestep"),
            ("critic_noise", "critic_raw_timestep"),
        )
    )
    texts = [jnp.asarray(fixture.inputs[name])[None] for name in ("context", "context_uncond")]
    out = jax.jit(_pulled, static_argnames=("exp", "train"))(exp, train, real, fake, pulled, texts)
    criticised, grads = jax.jit(_criticised, static_argnames=("exp", "train"))(
        exp, train, fake, trained_on, texts[0]
    )
    return out | criticised | _named("critic", fixture, weights["fake"], grads)


def _timestep(train: TrainConfig, raw: jax.Array) -> jax.Array:
    return schedules.shift_uniform(
        raw, train.shift, train.distil.min_timestep, train.distil.max_timestep
    )


def _pulled(
    exp: Experiment,
    train: TrainConfig,
    real: dit.WanDiT,
    fake: dit.WanDiT,
    clip: NoisedClip,
    texts: list[jax.Array],
) -> Outputs:
    """Both scores of a clip, and the loss they make, over all frames and without the first block."""
    x = clip.clean
    timestep = _timestep(train, clip.raw_timestep)
    noisy = distillation.noised(train, x, clip.noise, timestep)
    scores = {
        "real_cond": distillation.score(real, exp, train.distil, noisy, timestep, texts[0]),
        "real_uncond": distillation.score(real, exp, train.distil, noisy, timestep, texts[1]),
        "fake": distillation.score(fake, exp, train.distil, noisy, timestep, texts[0]),
    }
    pull = distillation.pull(
        x,
        scores["fake"],
        distillation.guided(train.distil, scores["real_cond"], scores["real_uncond"]),
    )
    counts = jnp.broadcast_to(jnp.arange(x.shape[1]) >= exp.cache.block, x.shape[:2])
    graded = jax.value_and_grad(distillation.matching_loss)
    loss, gradient = graded(x, pull)
    loss_without, gradient_without = graded(x, pull, counts)
    return {f"dmd.pred_x0_{name}": _theirs(value) for name, value in scores.items()} | {
        "dmd.timestep_warped_clamped": jnp.broadcast_to(timestep[:, None], x.shape[:2]),
        "dmd.noisy_latent": _theirs(noisy),
        "dmd.loss": loss,
        "dmd.grad_wrt_fake_latent": _theirs(gradient),
        "dmd.log_gradient_norm": jnp.abs(pull).mean(),
        "dmd_masked_first_block.loss": loss_without,
        "dmd_masked_first_block.grad_wrt_fake_latent": _theirs(gradient_without),
    }


def _criticised(
    exp: Experiment,
    train: TrainConfig,
    fake: dit.WanDiT,
    clip: NoisedClip,
    text: jax.Array,
) -> tuple[Outputs, dit.WanDiT]:
    """The critic's loss on a clip, and the gradients of its weights."""
    timestep = _timestep(train, clip.raw_timestep)
    noisy = distillation.noised(train, clip.clean, clip.noise, timestep)
    sigma = schedules.sigma_at(schedules.table(train.shift), timestep)

    def loss(fake: dit.WanDiT) -> tuple[jax.Array, Latent]:
        clean = distillation.score(fake, exp, train.distil, noisy, timestep, text)
        return distillation.flow_loss(clip.clean, clean, clip.noise, noisy, sigma), clean

    (value, clean), grads = jax.value_and_grad(loss, has_aux=True)(fake)
    return {
        "critic.timestep_warped_clamped": jnp.broadcast_to(timestep[:, None], noisy.shape[:2]),
        "critic.loss": value,
        "critic.noisy_latent": _theirs(noisy),
        "critic.pred_x0": _theirs(clean),
    }, grads


# rollouts with a gradient ---------------------------------------------------------------------------------------------

GRADIENTS = {
    "as_released": "leak",
    "kv_cache_detached": "none",
}  # the file's names for `train.distil.gradient`


def self_forcing_train_rollout(fixture: Fixture) -> Outputs:
    """A clip drawn up to one step of each block, and the gradients of its weighted sum, by both semantics."""
    config = fixture.config
    inputs = fixture.inputs
    require(
        config.get("context_noise", 0) == 0,
        "context_noise must be 0: blocks are stored at timestep 0.",
    )
    sample = SampleConfig(
        steps=tuple(config["denoising_step_list"]), shift=float(config["timestep_shift"])
    )
    noise = _ours(inputs["noise"])
    exp = transformer.experiment(
        config, frames=noise.shape[1], latent=(noise.shape[2], noise.shape[3]), sample=sample
    )
    model = transformer.transformer(exp.dit, fixture.weights)
    size = exp.cache.block
    blocks = batches.by_block(noise, size)
    draws = rollout.Draws(
        noise=blocks,
        renoise=_ours(inputs["renoise"]),
        context=_ours(inputs["context_pass_noise"]),
        random=jnp.zeros((blocks.shape[0], exp.dit.layers, blocks.shape[1], 0)),
        gap=jnp.float32(0),
        exit=jnp.int32(config["exit_index"]),
    )
    context = jnp.asarray(inputs["context"])[None]
    weights = _ours(inputs["loss_weights"])
    graded = jax.jit(_graded, static_argnames=("exp", "distil"))
    out: Outputs = {"denoised_timestep_from_to": bounds(sample, config["exit_index"])}
    for name, gradient in GRADIENTS.items():
        distil = DistilConfig(gradient=gradient, noised_context=True, finished=False)
        loss, latents, (grads, _) = graded(exp, distil, model, draws, context, weights)
        out |= {"loss": loss, "latents": _theirs(latents)} | _named(
            name, fixture, fixture.weights, grads
        )
        first = dataclasses.replace(draws, exit=jnp.int32(0))
        by_noise = graded(exp, distil, model, first, context, weights)[2][1]
        out[f"exit0_{name}.grad_wrt_noise"] = _theirs(batches.by_clip(by_noise))
    return out


def _graded(
    exp: Experiment,
    distil: DistilConfig,
    model: dit.WanDiT,
    draws: rollout.Draws,
    context: jax.Array,
    weights: Latent,
) -> tuple[jax.Array, Latent, tuple[dit.WanDiT, jax.Array]]:
    """(the weighted sum of a clip, the clip, the sum's gradients in the weights and in what the exit steps read)."""
    packs_nothing: Any = None  # the reference has no compressor

    def nets(model: dit.WanDiT) -> block_step.Nets:
        return block_step.Nets(dit=model, compressor=packs_nothing)

    clip = rollout.draw(nets(model), exp, distil, None, draws, batches.text_kv(model, context))

    def total(model: dit.WanDiT, noisy: jax.Array) -> tuple[jax.Array, Latent]:
        text = batches.text_kv(model, context)
        again = rollout.again(
            nets(model), exp, distil, dataclasses.replace(clip, noisy=noisy), text
        )
        return (batches.by_clip(again) * weights).sum(), batches.by_clip(again)

    (loss, latents), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
        model, clip.noisy
    )
    return loss, latents, grads


def bounds(sample: SampleConfig, last: int) -> np.ndarray:
    """[from, to]: listed timesteps of the exit step and the one after it, 0 behind the last."""
    table = schedules.table(sample.shift)
    times = schedules.shifted_timesteps(sample.steps, sample.shift)[last : last + 2]
    nearest = schedules.TIMESTEPS - np.asarray(schedules.nearest_id(table, times))
    return np.append(nearest, 0)[:2]
