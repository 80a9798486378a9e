"""What reference files of the transformer ask for: whole clips, all blocks at once, and block after block."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from packforcing_jax import pytrees
from packforcing_jax.config import (
    CacheConfig,
    DiTConfig,
    Experiment,
    SampleConfig,
    VAEConfig,
)
from packforcing_jax.convert import rules, wan_dit
from packforcing_jax.errors import require
from packforcing_jax.memory import cache
from packforcing_jax.memory import layout as layouts
from packforcing_jax.memory.cache import Memory
from packforcing_jax.networks import dit
from packforcing_jax.sampling import block_step
from packforcing_jax.sampling.block_step import Denoiser
from packforcing_jax.sampling.schedules import NoiseLevel
from packforcing_jax.types import KV, Latent
from packforcing_jax.verify import parts
from packforcing_jax.verify.parts import Fixture, Outputs

FIRST_FRAME_TIMESTEP = (
    250.0  # of the lone first frame in the block-mask files, whose metadata leave it out
)


def transformer(cfg: DiTConfig, tensors: Mapping[str, np.ndarray]) -> dit.WanDiT:
    return parts.load(dit.WanDiT, cfg, tensors, wan_dit.WAN_DIT)


def _context(fixture: Fixture, cfg: DiTConfig) -> jax.Array:
    """Text states [b, text_len, text_dim], given in one tensor or ragged as context_0, context_1, ..."""
    ragged = sorted(
        (int(name.split("_")[1]), value)
        for name, value in fixture.inputs.items()
        if re.fullmatch(r"context_\d+", name)
    )
    if not ragged:
        return jnp.asarray(fixture.inputs.get("context", fixture.inputs.get("context_padded")))
    rows = [np.pad(value, ((0, cfg.text_len - len(value)), (0, 0))) for _, value in ragged]
    return jnp.asarray(np.stack(rows))


def _bidirectional(fixture: Fixture, cfg: DiTConfig, tensors: Mapping[str, np.ndarray]) -> Outputs:
    model = transformer(cfg, tensors)
    latent = parts.ours(fixture.inputs["x"])
    times = einops.repeat(jnp.asarray(fixture.inputs["t"]), "b -> b t", t=latent.shape[1])
    return {
        "flow": parts.theirs(
            jax.jit(dit.bidirectional)(model, latent, times, _context(fixture, cfg))
        )
    }


def wan_dit_original(fixture: Fixture) -> Outputs:
    """The bidirectional network, weights under original names."""
    return _bidirectional(fixture, wan_dit.config_from_original(fixture.config), fixture.weights)


def wan_dit_diffusers(fixture: Fixture) -> Outputs:
    """The same network, weights and config in diffusers' names."""
    cfg = wan_dit.config_from_diffusers(
        fixture.config, text_len=fixture.inputs["context_padded"].shape[1]
    )
    return _bidirectional(fixture, cfg, rules.rename(fixture.weights, wan_dit.DIFFUSERS))


def causal_dit_blockmask(fixture: Fixture) -> Outputs:
    """The causal network over all blocks at once: block-causal, after a lone first frame, and teacher-forced."""
    cfg = wan_dit.config_from_original(fixture.config)
    size = fixture.config["frames_per_block"]
    model = transformer(cfg, fixture.weights)
    context = _context(fixture, cfg)
    noisy, clean = (parts.ours(fixture.inputs[name]) for name in ("noisy", "clean"))
    times = jnp.asarray(fixture.inputs["t"])
    parallel = jax.jit(dit.parallel, static_argnames="block_ends")
    ends = _block_ends(noisy.shape[1], size)
    out = {
        "flow_block_causal": parallel(model, noisy, times, context, block_ends=ends),
        "flow_teacher_forcing": parallel(
            model, noisy, times, context, block_ends=ends, clean=clean
        ),
    }
    if fixture.config.get("independent_first_frame_case"):
        first = jnp.full_like(times[:, :1], FIRST_FRAME_TIMESTEP)
        out["flow_block_causal_independent_first_frame"] = parallel(
            model,
            jnp.concatenate([clean[:, :1], noisy], axis=1),
            jnp.concatenate([first, times], axis=1),
            context,
            block_ends=(1, *(1 + end for end in ends)),
        )
    return {name: parts.theirs(flow) for name, flow in out.items()}


def _block_ends(frames: int, size: int) -> tuple[int, ...]:
    """Where blocks of `size` frames end; the last may be shorter."""
    return (*range(size, frames, size), frames)


# block after block ----------------------------------------------------------------------------------------------------


def _cache_config(config: Mapping[str, Any], frames: int) -> CacheConfig:
    """Self-Forcing's cache for clips of `frames`: all of it recent, or a sink and a window that rolls behind it.

    The window counts the current block; the oldest frames go when the next block needs their room.
    """
    block = config["frames_per_block"]
    window = config.get("local_attn_size", -1)
    plain = CacheConfig(
        block=block,
        sink=0,
        recent=frames,
        top=0,
        capacity=0,
        rope_adjustment="none",
        key_multiple=1,
    )
    if window == -1:
        return plain
    sink = config["sink_size"]
    return dataclasses.replace(plain, sink=sink, recent=window - sink - block)


def experiment(
    config: Mapping[str, Any],
    *,
    frames: int,
    latent: tuple[int, int],
    sample: SampleConfig = SampleConfig(),
) -> Experiment:
    """The causal network with Self-Forcing's cache, on latents of (rows, columns)."""
    cfg = wan_dit.config_from_original(config)
    plain = VAEConfig(
        z_dim=cfg.in_channels, mean=(0.0,) * cfg.in_channels, std=(1.0,) * cfg.in_channels
    )
    return Experiment(
        name="reference",
        dit=cfg,
        codec=plain,
        cache=_cache_config(config, frames),
        sample=sample,
        latent=latent,
    )


def nets_of(fixture: Fixture, exp: Experiment) -> block_step.Nets:
    """The file's network; the reference has no compressor."""
    packs_nothing: Any = None
    return block_step.Nets(
        dit=transformer(exp.dit, fixture.weights).unrolled(), compressor=packs_nothing
    )


def _by_layer(prefix: str, per_layer: list[KV]) -> Outputs:
    """Keys and values of each layer under the reference's names."""
    return {
        f"{prefix}.{layer}.{name}": getattr(kv, name)
        for name in "kv"
        for layer, kv in enumerate(per_layer)
    }


@struct.dataclass
class RecordedBlock:
    """A block of the reference, noisy and clean."""

    noisy: jax.Array  # [b, t, y, x, c]
    timesteps: jax.Array  # [b, t]  of `noisy`
    clean: jax.Array  # [b, t, y, x, c]


@jax.jit
def _noisy_then_clean(
    denoiser: Denoiser, memory: Memory, block: RecordedBlock
) -> tuple[Latent, Latent, Memory]:
    """The network's output for a noisy block and for the clean one at timestep 0, and the memory after the latter."""
    clean = block.clean
    flow = raw_output(denoiser, memory, block.noisy, block.timesteps)
    flow_clean = raw_output(denoiser, memory, clean, jnp.zeros_like(block.timesteps))
    memory, _ = block_step.commit_block(denoiser, memory, clean, clean, None)
    return flow, flow_clean, memory


def raw_output(denoiser: Denoiser, memory: Memory, latent: Latent, times: jax.Array) -> Latent:
    """The network's output for the next block at a timestep per frame [b, t], whatever it predicts."""
    raw = dataclasses.replace(denoiser.cfg, sample=SampleConfig(prediction="clean"))
    layout = layouts.layout(raw.cache, memory.progress)
    level = NoiseLevel(timestep=times, sigma=times / 1000)
    denoiser = dataclasses.replace(denoiser, cfg=raw)
    return block_step.predict_x0(denoiser, layout, latent, level, block_step.views_of(memory))[0]


def causal_dit_kvcache(fixture: Fixture) -> Outputs:
    """Known blocks one after the other: outputs noisy and clean, and what the memory holds after each."""
    noisy = fixture.inputs["noisy"]
    clean = fixture.inputs["clean"]
    blocks, batch, _, size, *_ = noisy.shape
    raw = SampleConfig(prediction="clean")  # what the network returns is what the file holds
    exp = experiment(fixture.config, frames=blocks * size, latent=noisy.shape[-2:], sample=raw)
    nets = nets_of(fixture, exp)
    text = jax.jit(dit.WanDiT.text_kv)(nets.dit, _context(fixture, exp.dit))
    denoiser = Denoiser(nets, exp.step, text)
    memory = cache.init(exp.memory, batch)
    out = _by_layer("crossattn", text)
    for block, times in enumerate(fixture.inputs["t"]):
        recorded = RecordedBlock(
            noisy=parts.ours(noisy[block]),
            timesteps=jnp.asarray(np.tile(times, (batch, 1))),
            clean=parts.ours(clean[block]),
        )
        flow, flow_clean, memory = _noisy_then_clean(denoiser, memory, recorded)
        out[f"block{block}.flow_noisy"] = parts.theirs(flow)
        out[f"block{block}.flow_clean_t0"] = parts.theirs(flow_clean)
        out |= _by_layer(
            f"block{block}.after_clean.kv",
            pytrees.unstack(cache.export(exp.memory, memory), exp.dit.layers),
        )
        ends = cache.end_indices(exp.memory, memory)
        out |= {
            f"block{block}.after_clean.kv.{layer}.end_index_global_local": ends
            for layer in range(exp.dit.layers)
        }
    return out


def recorded_noise(denoiser: Denoiser, noise: Latent, renoise: jax.Array) -> block_step.Noise:
    """The noise that a file gives for a block; no file has random scores."""
    no_scores = jnp.zeros((denoiser.cfg.memory.layers, len(noise), 0))
    return block_step.Noise(noise=noise, renoise=renoise, random=no_scores)


@jax.jit
def _next_block(
    denoiser: Denoiser, memory: Memory, noise: Latent, renoise: jax.Array
) -> tuple[Latent, Memory]:
    """The next block and the memory that holds it."""
    block_noise = recorded_noise(denoiser, noise, renoise)
    memory, denoised = block_step.denoise_block(denoiser, memory, block_noise)
    latent = denoised.latent
    memory, _ = block_step.commit_block(denoiser, memory, latent, latent, denoised.selection)
    return latent, memory


def causal_rollout(fixture: Fixture) -> Outputs:
    """A clip drawn block after block in a few steps from given noise, and what the memory holds at its end."""
    config = fixture.config
    renoise = fixture.inputs["renoise"]
    require(
        config.get("warp_denoising_step", True),
        "warp_denoising_step=False is not built; its step list is warped.",
    )
    require(
        config.get("context_noise", 0) == 0,
        "context_noise must be 0: the memory is written at timestep 0.",
    )
    sample = SampleConfig(
        steps=tuple(config["denoising_step_list"]), shift=float(config["timestep_shift"])
    )
    noise = jnp.asarray(einops.rearrange(fixture.inputs["noise"], "b t c y x -> b t y x c"))
    renoise = jnp.asarray(einops.rearrange(renoise, "block step b t c y x -> block step b t y x c"))
    exp = experiment(
        config, frames=noise.shape[1], latent=(noise.shape[2], noise.shape[3]), sample=sample
    )
    nets = nets_of(fixture, exp)
    memory = cache.init(exp.memory, len(noise))
    latents = []
    text = jax.jit(dit.WanDiT.text_kv)(nets.dit, _context(fixture, exp.dit))
    denoiser = Denoiser(nets, exp.step, text)
    for block, fresh in enumerate(renoise):
        start = block * exp.cache.block
        latent, memory = _next_block(
            denoiser, memory, noise[:, start : start + exp.cache.block], fresh
        )
        latents.append(latent)
    return {
        "denoising_step_list_warped": block_step.step_table(sample)[0],
        "latents": einops.rearrange(jnp.concatenate(latents, axis=1), "b t y x c -> b t c y x"),
        **_by_layer("final_kv", pytrees.unstack(cache.export(exp.memory, memory), exp.dit.layers)),
    }
