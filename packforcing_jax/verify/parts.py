"""What reference files of schedules, text encoder and video codec ask for, run at the file's own sizes."""

import functools
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from packforcing_jax import pytrees
from packforcing_jax.convert import rules, umt5, wan_vae
from packforcing_jax.networks import text, vae
from packforcing_jax.sampling import schedules, unipc

Outputs: TypeAlias = dict[str, Any]  # arrays by the name that the file gives them
Module = TypeVar("Module", bound=nnx.Module)


@dataclass(frozen=True)
class Fixture:
    """One file without its answers: kind, sizes, weights by original name, inputs, and the names to compute."""

    kind: str
    config: Mapping[str, Any]
    weights: Mapping[str, np.ndarray]
    inputs: Mapping[str, np.ndarray]
    wanted: tuple[str, ...]
    variants: Mapping[str, Any] = field(default_factory=dict)  # other settings by name


@functools.lru_cache(maxsize=32)
def _shapes(network: Callable[[Any, nnx.Rngs], Module], cfg: Hashable) -> Module:
    """The network with shapes in the place of parameters."""
    return jax.eval_shape(lambda: network(cfg, nnx.Rngs(0)))


def below(tensors: Mapping[str, Any], prefix: str) -> dict[str, np.ndarray]:
    """The tensors whose names begin with `prefix`, named without it."""
    return {
        name.removeprefix(prefix): np.asarray(value)
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def load(
    network: Callable[[Any, nnx.Rngs], Module],
    cfg: Hashable,
    tensors: Mapping[str, np.ndarray],
    table: Sequence[rules.Rule],
) -> Module:
    """The network of config `cfg` with its parameters taken from checkpoint `tensors` through `table`."""
    shapes = _shapes(network, cfg)
    wanted = {path: leaf.shape for path, leaf in pytrees.flatten(shapes).items()}
    flat = {
        path: jnp.asarray(value) for path, value in rules.convert(tensors, table, wanted).items()
    }
    return pytrees.fill(shapes, flat)


def ours(latent: np.ndarray) -> jax.Array:
    """[b, c, t, y, x] as the reference has it -> [b, t, y, x, c]."""
    return jnp.asarray(einops.rearrange(latent, "b c t y x -> b t y x c"))


def theirs(latent: jax.Array) -> jax.Array:
    """[b, t, y, x, c] -> [b, c, t, y, x] as the reference has it."""
    return einops.rearrange(latent, "b t y x c -> b c t y x")


# schedules ------------------------------------------------------------------------------------------------------------


def scheduler(fixture: Fixture) -> Outputs:
    """Noise tables and the conversions between noisy, clean, noise and velocity, for each shift."""
    out = _grid(
        "defaults100",
        schedules.table(3.0, steps=100, sigma_min=0.003 / 1.002, extra_one_step=False),
    )
    for shift in fixture.config["shifts"]:
        prefix = f"shift{shift:g}."
        table = schedules.table(float(shift))
        for name, value in (
            _tables(fixture, prefix, shift) | _conversions(fixture, prefix, table)
        ).items():
            out[prefix + name] = value
    return out


def _grid(name: str, table: schedules.Table | unipc.UniPC) -> Outputs:
    return {f"{name}.sigmas": table.sigmas, f"{name}.timesteps": table.timesteps}


def _named(fixture: Fixture, pattern: str) -> list[tuple[str, tuple[int, ...]]]:
    """The wanted outputs that `pattern` matches, as (what the name adds to the prefix, the numbers in group 1)."""
    matches = [re.fullmatch(pattern, name) for name in fixture.wanted]
    return [
        (hit.group("name"), tuple(int(n) for n in hit.group("numbers").split("_")))
        for hit in matches
        if hit
    ]


def _tables(fixture: Fixture, prefix: str, shift: float) -> Outputs:
    """What depends on the shift alone; step counts and step lists stand in the outputs' names."""
    table = schedules.table(float(shift))
    out = {
        "sigmas": table.sigmas,
        "timesteps": table.timesteps,
        "linear_timesteps_weights": schedules.training_weights(table),
        "raw_timestep_warped_clamped": schedules.shift_uniform(
            fixture.inputs["raw_timestep_int"], shift
        ),
    }
    for name, (steps,) in _named(
        fixture, re.escape(prefix) + r"(?P<name>inference(?P<numbers>\d+))\.sigmas"
    ):
        out |= _grid(name, schedules.table(float(shift), steps=steps))
    for name, steps in _named(
        fixture, re.escape(prefix) + r"(?P<name>denoising_step_list_(?P<numbers>[\d_]+)_warped)"
    ):
        out[name] = schedules.shifted_timesteps(steps, float(shift))
    return out


def _conversions(fixture: Fixture, prefix: str, table: schedules.Table) -> Outputs:
    """What depends on samples at the given timesteps."""
    x = {name: jnp.asarray(value) for name, value in fixture.inputs.items()}
    sigma = schedules.sigma_at(table, x["timestep"])
    ids = schedules.nearest_id(table, x["timestep"])
    out = {
        "nearest_id": ids,
        "add_noise": schedules.add_noise(x["clean"], x["noise"], sigma),
        "x0_from_flow": schedules.clean_from_velocity(x["xt"], x["flow_pred"], sigma),
        "flow_from_x0": schedules.velocity_from_clean(x["xt"], x["x0_pred"], sigma),
        "training_target": schedules.training_target(x["clean"], x["noise"]),
        "training_weight": jnp.asarray(schedules.training_weights(table))[ids],
    }
    pattern = re.escape(prefix) + r"(?P<name>step_of_samples_(?P<numbers>\d+(_\d+)*)(_to_final)?)"
    for name, samples in _named(fixture, pattern):
        flow, time, xt = (x[key][jnp.asarray(samples)] for key in ("flow_pred", "timestep", "xt"))
        out[name] = schedules.euler_step(table, flow, time, xt, to_final=name.endswith("_to_final"))
    return out


def unipc_solver(fixture: Fixture) -> Outputs:
    """The tables of several solvers, and runs along given velocities."""
    out: Outputs = {}
    config = fixture.config
    for steps, shift in (*config["runs"], *config["tables"]):
        solver = unipc.UniPC(steps=int(steps), shift=float(shift))
        out |= _grid(f"steps{steps}_shift{shift:g}", solver)
    for steps, shift in config["runs"]:
        name = f"steps{steps}_shift{shift:g}"
        solver = unipc.UniPC(steps=int(steps), shift=float(shift))
        latent, velocities = (
            jnp.asarray(fixture.inputs[f"{name}.{part}"])
            for part in ("latent", "velocity_per_step")
        )
        _, latents = unipc.solve(solver, latent, functools.partial(_given, velocities))
        out[f"{name}.latent_after_each_step"] = latents
    return out


def _given(velocities: jax.Array, latent: jax.Array, index: jax.Array) -> jax.Array:
    """The velocity that the file gives for a step, whatever the latent."""
    return velocities[index]


# text and video codec -------------------------------------------------------------------------------------------------


def umt5_tiny(fixture: Fixture) -> Outputs:
    """The text encoder on padded prompts, as Wan2.1 and as Self-Forcing use it, and on one long prompt."""
    cfg = umt5.config_from_original(fixture.config)
    model = load(text.UMT5, cfg, fixture.weights, umt5.UMT5)
    encode = jax.jit(text.encode, static_argnames="zero_padding")
    ids, mask, long_ids = (
        jnp.asarray(fixture.inputs[name]) for name in ("ids", "mask", "long_ids")
    )
    return {
        "hidden": encode(model, ids, mask, zero_padding=False),
        "hidden_padding_zeroed": encode(model, ids, mask, zero_padding=True),
        "long_hidden": encode(model, long_ids, jnp.ones_like(long_ids)),
    }


def _streamed_decode(model: vae.WanVAE, latent: jax.Array, groups: Sequence[int]) -> jax.Array:
    """The pixels of `latent`, decoded in successive groups of latent frames."""
    step = jax.jit(vae.decode_chunk, static_argnames="first")
    state = vae.init_decoder(model, latent.shape[0], *latent.shape[2:4])
    chunks = []
    start = 0
    for size in groups:
        video, state = step(model, state, latent[:, start : start + size], first=start == 0)
        chunks.append(video)
        start += size
    return jnp.concatenate(chunks, axis=1)


def _streamed_encode(model: vae.WanVAE, video: jax.Array) -> jax.Array:
    """The latents of `video`, encoded in chunks of 1, then `time_factor` frames; an incomplete one is left out."""
    step = jax.jit(vae.encode_chunk, static_argnames="first")
    state = vae.init_encoder(model, video.shape[0], *video.shape[2:4])
    group = model.cfg.time_factor
    latent, state = step(model, state, video[:, :1], first=True)
    chunks = [latent]
    for start in range(1, video.shape[1] - group + 1, group):
        latent, state = step(model, state, video[:, start : start + group], first=False)
        chunks.append(latent)
    return jnp.concatenate(chunks, axis=1)


def vae_original(fixture: Fixture) -> Outputs:
    """The codec with weights under original names: moments and the way back at once, the rest chunk by chunk."""
    cfg = wan_vae.vae_config(fixture.config)
    model = load(vae.WanVAE, cfg, fixture.weights, wan_vae.WAN_VAE)
    video = ours(fixture.inputs["video"])
    latent = ours(fixture.inputs["latent"])
    whole = _streamed_encode(model, video)
    mu, logvar = jax.jit(vae.encode_moments)(model, video)
    out = {
        "encode.latent": whole,
        "encode.mu_unscaled": mu,
        "encode.logvar": logvar,
        "encode_first_frame.latent": _streamed_encode(model, video[:, :1]),
        "decode.video": _streamed_decode(model, latent, fixture.config["stream_groups"]),
        "decode_first_frame.video": _streamed_decode(model, latent[:, :1], (1,)),
        "roundtrip.video": jax.jit(vae.decode)(model, whole),
    }
    return {name: theirs(value) for name, value in out.items()}


def vae_diffusers(fixture: Fixture) -> Outputs:
    """The codec with weights under diffusers names, on latents that are not normalised; pixels are clamped."""
    cfg = wan_vae.unscaled(wan_vae.vae_config(fixture.config))
    tensors = rules.rename(fixture.weights, wan_vae.diffusers_names(cfg).items())
    model = load(vae.WanVAE, cfg, tensors, wan_vae.WAN_VAE)
    mu, logvar = jax.jit(vae.encode_moments)(model, ours(fixture.inputs["video"]))
    decoded = jnp.clip(jax.jit(vae.decode)(model, ours(fixture.inputs["latent"])), -1, 1)
    return {
        name: theirs(value)
        for name, value in (("mu", mu), ("logvar", logvar), ("decode_clamped", decoded))
    }
