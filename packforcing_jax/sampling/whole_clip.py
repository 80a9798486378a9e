"""A clip whose frames are denoised together and see one another, without a memory: Wan2.1 as published.

UniPC runs from noise to the clean clip. With guidance, each step asks the network twice and moves its prediction away
from the one under the negative prompt.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct
from jax import Array
from jaxtyping import Float, Int

from packforcing_jax import pytrees
from packforcing_jax.config import SampleConfig, StepConfig
from packforcing_jax.networks import codec, dit
from packforcing_jax.policies import attention
from packforcing_jax.policies.attention import Backend
from packforcing_jax.sampling import block_step, player, schedules, unipc
from packforcing_jax.types import Latent, TextStates, Video


@struct.dataclass
class Text:
    """Encoder states of a clip's prompt, and those that guidance moves away from; None: no guidance."""

    states: TextStates
    negative: TextStates | None
    guidance: Float[Array, ""]


@dataclass(frozen=True)
class ClipConfig:
    """What decides about the program that denoises a clip, and nothing else."""

    solver: unipc.UniPC
    prediction: str
    attention: str | Backend
    compute: str


def config_of(cfg: StepConfig) -> ClipConfig:
    """The part of a model's settings that decides about the program."""
    sample = cfg.sample
    solver = unipc.UniPC(len(sample.steps), sample.shift)
    return ClipConfig(solver, sample.prediction, cfg.attention, cfg.compute)


def text_of(sample: SampleConfig, states: TextStates, encode: Callable[[str], TextStates]) -> Text:
    """The text of a clip under the guidance of `sample`; `encode` reads the negative prompt, where there is one."""
    negative = None
    if sample.guidance != 1:
        prompt = sample.negative_prompt
        negative = encode(prompt) if prompt else jnp.zeros_like(states)
    return Text(states=states, negative=negative, guidance=jnp.float32(sample.guidance))


@functools.partial(jax.jit, static_argnames=("cfg", "blocks"))
def noise_program(
    cfg: StepConfig, seeds: Int[Array, " b"], videos: Int[Array, " b"], *, blocks: int
) -> Latent:
    """The noise of a clip [b, t, y, x, c]: that from which the same blocks would be denoised one by one."""
    first = jnp.zeros(blocks, jnp.int32)
    noise = block_step.noise_of_blocks(cfg, seeds, videos, jnp.arange(blocks), first)
    return rearrange(noise, "block b t y x c -> b (block t) y x c")


@functools.partial(jax.jit, static_argnames="cfg", donate_argnames="noise")
def denoise_program(model: dit.WanDiT, cfg: ClipConfig, noise: Latent, text: Text) -> Latent:
    """The clean clip behind `noise`."""
    model = pytrees.cast(model, cfg.compute)
    return unipc.solve(cfg.solver, noise, functools.partial(velocity, model, cfg, text))[0]


def velocity(model: dit.WanDiT, cfg: ClipConfig, text: Text, noisy: Latent, index: Array) -> Latent:
    """The velocity at a step of the solver, under guidance."""
    timesteps = jnp.asarray(cfg.solver.timesteps, jnp.float32)[index]
    times = jnp.broadcast_to(timesteps, noisy.shape[:2])
    sigma = jnp.asarray(cfg.solver.sigmas)[index]
    backend = attention.backend(cfg.attention, cfg.compute)

    def predict(states: TextStates) -> Latent:
        output = dit.bidirectional(model, noisy, times, states, attention_fn=backend)
        if cfg.prediction == "clean":
            return schedules.velocity_from_clean(noisy, output, sigma)
        return output

    conditional = predict(text.states)
    if text.negative is None:
        return conditional
    unconditional = predict(text.negative)
    return unconditional + text.guidance * (conditional - unconditional)


def shown(model: player.Model, latent: Latent) -> Iterator[Video]:
    """The frames of a clip, decoded as one video, a block at a time: that needs less room than the whole at once."""
    exp = model.experiment
    decoder = codec.init_decoder(model.vae, len(latent), *exp.latent)
    decoder = jax.device_put(decoder, player.beside(model.nets))
    for start in range(0, latent.shape[1], exp.cache.block):
        block = latent[:, start : start + exp.cache.block]
        first = exp.codec.time_factor > 1 and start == 0
        frames, decoder = show_program(model.vae, decoder, block, first=first)
        yield frames


show_program = jax.jit(codec.decode_chunk, static_argnames="first")
