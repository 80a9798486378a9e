"""Rollouts of the methods that are compared: their values through the block step, and whom each call sees."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np

from packforcing_jax import methods
from packforcing_jax.config import Experiment, MemorySpec, SampleConfig
from packforcing_jax.convert import wan_vae
from packforcing_jax.memory import cache, tokens
from packforcing_jax.memory import layout as layouts
from packforcing_jax.memory.cache import Memory
from packforcing_jax.methods import calls
from packforcing_jax.methods.method import Method, memory_of
from packforcing_jax.networks import dit, vae
from packforcing_jax.pytrees import PerLayer
from packforcing_jax.sampling import block_step, participative, player, rolling_window, schedules
from packforcing_jax.sampling.block_step import Denoiser
from packforcing_jax.sampling.rolling_window import Window
from packforcing_jax.types import KV, Latent
from packforcing_jax.verify import parts, transformer
from packforcing_jax.verify.parts import Fixture, Outputs

KINDS = {calls.DENOISE: 0, calls.COMMIT: 1, calls.RECACHE: 2, calls.GIVEN: 3}
COMPRESSING = {  # what files call the settings of a compression
    "budget": "budget",
    "recent": "budget_recent",
    "pc_fusion": "fusion",
    "pc_topc_max_reuse": "reuse_limit",
    "pc_mid_rope_mode": "token_positions",
}
PER_FRAME = "block step b t c y x -> (block t) step b c y x"


@dataclass(frozen=True)
class Run:
    """One rollout of a file: the method at the file's sizes, its model, and what it starts from."""

    prefix: str
    method: Method
    experiment: Experiment
    noise: np.ndarray  # [b, frame, y, x, c]
    renoise: np.ndarray  # [block, step, b, t, y, x, c]
    prompts: tuple[int, ...]  # of each generated block
    given: np.ndarray  # [b, frame, y, x, c]  committed before the first block


def sink_and_window(method: Method, fixture: Fixture) -> Outputs:
    """The runs of a file about a sink and a window: LongLive, Infinite-Forcing, Self-Forcing, Reward Forcing."""
    out: Outputs = {}
    for changes in fixture.config["runs"]:
        config = {**fixture.config, **changes}
        name = config["name"]
        run = _windowed_run(fixture, method, config, "" if name == "main" else f"{name}.")
        out |= _rollout(fixture, run)
    return out | step_lists("", out_of=sample_of(fixture.config))


def causal_forcing(fixture: Fixture) -> Outputs:
    """The cases of a Causal-Forcing file: chunk-wise or frame-wise, some behind given latents."""
    out: Outputs = {}
    for name, changes in fixture.config["cases"].items():
        config = {**fixture.config, **changes}
        block = config["frames_per_block"]
        window = config.get("local_attn_size", config["max_frames"])
        sizes = {"sink": config.get("sink_size", 0), "window": window}
        given = fixture.inputs.get(f"{name}.initial_latent")
        noise = frames_last(fixture.inputs[f"{name}.noise"])
        run = Run(
            prefix=f"{name}.",
            method=dataclasses.replace(methods.CAUSAL_FORCING, **sizes),
            experiment=_model(config, block, noise.shape[2:4], sample_of(config)),
            noise=noise,
            renoise=renoise_of(fixture.inputs[f"{name}.renoise"]),
            prompts=(0,) * config["num_blocks"],
            given=noise[:, :0] if given is None else frames_last(given),
        )
        out |= _rollout(fixture, run, contexts=("context",))
        out |= step_lists(run.prefix, out_of=run.experiment.sample)
    return out


def rolling_forcing(fixture: Fixture) -> Outputs:
    """The run of a file about a rolling window of blocks."""
    config = fixture.config
    sample = sample_of(config)
    noise = frames_last(fixture.inputs["noise"])
    run = Run(
        prefix="",
        method=dataclasses.replace(
            methods.ROLLING_FORCING,
            sink=config["sink_frames"],
            window=config["max_attention_frames"],
        ),
        experiment=_model(config, config["frames_per_block"], noise.shape[2:4], sample),
        noise=noise,
        renoise=renoise_of(fixture.inputs["renoise"]),
        prompts=(0,) * config["num_blocks"],
        given=noise[:, :0],
    )
    exp, nets, (text,) = _begun(fixture, run, ("context",))
    denoiser = Denoiser(nets, exp.step, text)
    recorded = _by_block(run.noise, exp.cache.block), jnp.asarray(run.renoise)
    out = step_lists("", out_of=sample)
    latents = []

    def one_pass(
        memory: Memory, window: Window, blocks: jax.Array | np.int32
    ) -> tuple[Latent, Window]:
        clean, following = _window(denoiser, memory, window, recorded, blocks)
        for i, x0 in enumerate(_by_block(clean, exp.cache.block)[: int(blocks)]):
            name = f"block{int(memory.num_blocks) + i}.step{int(window.step) - i}.x0"
            out[name] = theirs(x0)
        return clean, following

    memory = cache.init(exp.memory, len(run.noise))
    window = rolling_window.start(exp.step, _recorded(*recorded))
    for block, left in enumerate(range(len(run.prompts), 0, -1)):
        latent, window = rolling_window.denoise(exp.step, memory, window, one_pass, left)
        memory, flow = _given(denoiser, memory, latent)
        out[f"block{block}.context_pass.flow"] = theirs(flow)
        latents.append(latent)
    out["latents"] = theirs(jnp.concatenate(latents, axis=1))
    return out | {f"layout.{name}": rows for name, rows in _rows(exp.memory, run).items()}


def _by_block(latent: Latent | np.ndarray, block: int) -> jax.Array:
    return einops.rearrange(jnp.asarray(latent), "b (block t) y x c -> block b t y x c", t=block)


def deep_forcing(fixture: Fixture) -> Outputs:
    """The run of a file about single tokens of the past, and its variants."""
    out = _compressing_run(fixture, {}) | step_lists("", out_of=sample_of(fixture.config))
    for name, changes in fixture.variants.items():
        made = _compressing_run(fixture, changes)
        out |= {f"{name}.{output}": value for output, value in made.items()}
    return out


def _compressing_run(fixture: Fixture, changes: Mapping[str, Any]) -> Outputs:
    """Latents, predictions, choices and whom each pass sees, as the layers remember it."""
    config = fixture.config
    size, sample = config["num_frame_per_block"], sample_of(config)
    noise = frames_last(fixture.inputs["noise"])
    renoise = renoise_of(fixture.inputs["renoise"])
    run = Run(
        prefix="",
        method=_compressing(config["model_kwargs"] | changes),
        experiment=_model(config, size, noise.shape[2:4], sample),
        noise=noise,
        renoise=renoise,
        prompts=(0,) * config["num_blocks"],
        given=noise[:, :0],
    )
    exp, nets, (text,) = _begun(fixture, run, ("context",))
    denoiser, spec = Denoiser(nets, exp.step, text), exp.memory
    memory = cache.init(spec, len(noise))
    out: Outputs = {}
    latents, seen, choices = [], [], []
    for block in range(config["num_blocks"]):
        before = memory
        memory, denoised, left = _compressing_block(
            denoiser,
            memory,
            jnp.asarray(noise[:, block * size : (block + 1) * size]),
            jnp.asarray(renoise[block]),
        )
        out |= {
            f"block{block}.step{i}.x0": theirs(x0)
            for i, x0 in enumerate(denoised.predictions)  # type: ignore[arg-type]
        }
        latents.append(denoised.latent)
        seen.append(_tokens_seen(spec, left, memory))
        now = layouts.compression(spec.cache, before.progress)
        if now.due and spec.cache.chosen:
            choices.append((block, int(now.held), before, denoised.selection))
    out["latents"] = theirs(jnp.concatenate(latents, axis=1))
    for name in seen[0]:
        rows = padded_rows([row[name] for row in seen])
        out |= {f"layout.first_step.{name}": rows, f"layout.commit.{name}": rows}
    return out | _choices(spec, choices) | _window_left(spec, before, memory)


def _compressing(kwargs: Mapping[str, Any]) -> Method:
    """Deep Forcing as a file describes it; without compression, its sink alone."""
    sizes = {"sink": kwargs["sink_size"], "window": kwargs["local_attn_size"]}
    own = {"budget": sizes["window"], "budget_recent": sizes["window"] - sizes["sink"]}
    if kwargs.get("pc_enable", True):
        own = {ours: kwargs[theirs] for theirs, ours in COMPRESSING.items() if theirs in kwargs}
    settings = {**methods.DEEP_FORCING.settings, **own}
    return dataclasses.replace(methods.DEEP_FORCING, **sizes, settings=settings)


@jax.jit
def _compressing_block(
    denoiser: Denoiser, memory: Memory, noise: Latent, renoise: jax.Array
) -> tuple[Memory, block_step.Denoised, Memory]:
    """(the memory after the next block, that block, the memory that its steps saw)."""
    start = transformer.recorded_noise(denoiser, noise, renoise)
    seen, denoised = participative.denoise_block(denoiser, memory, start)
    after, _ = participative.commit_block(denoiser, seen, denoised.latent)
    return after, denoised, seen


def _tokens_seen(spec: MemorySpec, left: Memory, committed: Memory) -> dict[str, np.ndarray]:
    """The tokens that every pass of a block sees: those `left` to it, and its own as they are `committed`."""
    layout = layouts.layout(spec.cache, left.progress)
    past, end = int(tokens.end(spec, layout)), int(layouts.length(spec, layout))

    def rows(name: str) -> np.ndarray:
        behind, after = ([getattr(one, name)[0] for one in _known(x)] for x in (left, committed))
        return np.concatenate([np.stack(behind)[:, :past], np.stack(after)[:, past:end]], axis=1)

    frames = np.arange(spec.cache.block)
    return {
        "key_index": rows("ids"),
        "key_pos": rows("positions"),
        "query_frame": int(layout.start) + frames,
        "query_pos": float(layout.current_position) + frames,
    }


def _known(memory: Memory) -> list[tokens.Tokens]:
    """What each layer knows of its tokens."""
    layers: Any = memory.layers  # one by one, as in sampling
    return [tokens.record(layer) for layer in layers]


def padded_rows(arrays: Sequence[np.ndarray], fill: int = -1) -> np.ndarray:
    widest = max(array.shape[-1] for array in arrays)
    edges = [((0, 0),) * (a.ndim - 1) + ((0, widest - a.shape[-1]),) for a in arrays]
    return np.stack(
        [np.pad(a, edge, constant_values=fill) for a, edge in zip(arrays, edges, strict=True)]
    )


def _choices(
    spec: MemorySpec, choices: Sequence[tuple[int, int, Memory, list[tokens.Chosen]]]
) -> Outputs:
    """What each layer chose from and what it chose, at every compression, slots counted with those of the block."""
    if not choices:
        return {}
    s, cfg = spec.tokens_per_frame, spec.cache
    rows = []
    for _, held, before, selection in choices:
        first, whole = cfg.sink * s, (held + cfg.block - cfg.budget_recent) * s
        scores, counts, ids = [], [], []
        for known, chosen in zip(_known(before), selection, strict=True):
            among = np.asarray(chosen.scores[0, : whole - first])
            scores.append(np.pad(among, (first, cfg.budget_recent * s)))
            counts.append(np.pad(known.counts[0, : held * s], (0, cfg.block * s)))
            ids.append(np.asarray(known.ids[0, chosen.slots[0]]))
        slots = np.stack([one.slots[0] for one in selection])
        rows.append((np.stack(scores), np.stack(counts), slots, np.stack(ids)))
    scores, counts, slots, ids = ([row[i] for row in rows] for i in range(4))
    return {
        "pc.trigger_blocks": np.array([block for block, *_ in choices]),
        "pc.scores": padded_rows(scores, fill=0),
        "pc.reuse_counts_before": padded_rows(counts),
        "pc.selected_slot": np.stack(slots),
        "pc.selected_key_index": np.stack(ids),
    }


def _window_left(spec: MemorySpec, before: Memory, memory: Memory) -> Outputs:
    """The window that the last block saw, itself among it: keys as it saw them, values, how often each was chosen."""
    layout = layouts.layout(spec.cache, before.progress)
    count = int(layouts.length(spec, layout))
    layers: Any = memory.layers  # one by one, as in sampling
    out: Outputs = {}
    for i, layer in enumerate(layers):
        layer = cache.reposition(spec, layout, layer)
        out[f"final_kv.{i}.k"] = layer.view.k[:, :count]
        out[f"final_kv.{i}.v"] = layer.view.v[:, :count]
        out[f"final_kv.{i}.reuse_counts"] = np.asarray(tokens.record(layer).counts[0, :count])
    return out


@dataclass(frozen=True)
class Model:
    """What the player needs of a model."""

    experiment: Experiment
    nets: block_step.Nets
    vae: vae.WanVAE


def causvid(fixture: Fixture) -> Outputs:
    """The cases of a file about clips that go on from one another: latents, and the pixels between two clips."""
    scale = {"z_dim": fixture.config["in_dim"], "scale": fixture.config["vae_scale"]}
    cfg = wan_vae.vae_config({**fixture.config["vae"], **scale})
    tensors = parts.below(fixture.weights, "vae/")
    codec = parts.load(vae.WanVAE, cfg, tensors, wan_vae.WAN_VAE)
    network = {name: x for name, x in fixture.weights.items() if not name.startswith("vae/")}
    fixture = dataclasses.replace(fixture, weights=network)
    out: Outputs = {}
    for name, changes in fixture.config["cases"].items():
        config = {**fixture.config, **changes}
        out |= _clips(fixture, config, f"{name}.", codec)
    return out


def _clips(fixture: Fixture, config: Mapping[str, Any], prefix: str, codec: vae.WanVAE) -> Outputs:
    """Latents, predictions, pixels and calls of one case, its blocks finished by the player."""
    steps = [step for step in config["denoising_step_list"] if step]  # 0 stands for the clean end
    sample = sample_of({**config, "denoising_step_list": steps})
    block, count, overlap = (
        config[name] for name in ("frames_per_block", "num_rollout", "num_overlap_frames")
    )
    noise = [_by_block(frames_last(each), block) for each in fixture.inputs[f"{prefix}noise"]]
    renoise = [renoise_of(each) for each in fixture.inputs[f"{prefix}renoise"]]
    own = _model(config, block, noise[0].shape[3:5], sample)
    total = count * len(noise[0]) - (count - 1) * overlap // block
    run = Run(
        prefix=prefix,
        method=dataclasses.replace(
            methods.CAUSVID, window=config["episode_frames"], overlap=overlap
        ),
        experiment=dataclasses.replace(own, codec=codec.cfg),
        noise=np.zeros(0),
        renoise=np.zeros(0),
        prompts=(0,) * total,
        given=np.zeros((0, 0)),
    )
    exp, nets, (text,) = _begun(fixture, run, ("context",))
    model = Model(exp, nets, codec)
    denoiser = Denoiser(nets, exp.step, text)
    state = player.start(model, seeds=0, videos=[0] * noise[0].shape[1])
    times, sigmas = block_step.step_table(sample)
    out: Outputs = {f"{prefix}denoising_step_list_used": times, f"{prefix}sigma_of_steps": sigmas}
    rollouts: list[list[Latent]] = [[]]
    pixels, seams = [], []
    for left in range(total, 0, -1):
        progress = state.memory.progress
        place = int(progress.num_blocks) - int(progress.scene_start) // block
        clip = len(rollouts) - 1
        memory, denoised, flow = _denoised(
            denoiser, state.memory, noise[clip][place], jnp.asarray(renoise[clip][place])
        )
        at = f"{prefix}rollout{clip}.block{place}"
        out[f"{at}.context_pass.flow"] = theirs(flow)
        for step, x0 in enumerate(denoised.predictions):  # type: ignore[arg-type]
            out[f"{at}.step{step}.x0"] = theirs(x0)
        state = dataclasses.replace(state, memory=memory)
        state, shown = player.finish(model, state, denoised, text, left=left)
        rollouts[-1].append(denoised.latent)
        pixels.append(shown.frames)
        if int(state.memory.progress.scene_start) > int(progress.scene_start):
            newest = int(state.memory.num_blocks) * block - overlap + jnp.arange(overlap)
            rollouts.append([cache.latents_of(exp.memory, state.memory, newest)])
            seams.append(np.asarray(state.seam.frame[0, 0]))  # type: ignore[union-attr]
    video = (np.concatenate(pixels, axis=1)[0] + 1) / 2
    each = len(video) // count
    shown_ids = np.array([0, each - 1, each, len(video) - 1])
    rows = _rows(exp.memory, run)
    made = {
        "latents": np.stack([theirs(jnp.concatenate(one, axis=1)) for one in rollouts]),
        "start_latents": np.stack([theirs(one[0]) for one in rollouts[1:]]),
        "overlap_pixel_frame": (einops.rearrange(np.stack(seams), "n y x c -> n c y x") + 1) / 2,
        "video_total_frames": np.array([len(video)]),
        "video_frame_ids": shown_ids,
        "video_frames": video[shown_ids],
        **{f"layout.{name}": value for name, value in rows.items()},
    }
    return out | {f"{prefix}{name}": value for name, value in made.items()}


def _recorded(noise: jax.Array, renoise: jax.Array) -> rolling_window.Fresh:
    """The noise of a file for blocks [n] that go into steps [n]; of blocks behind the last one, anything."""

    def fresh(blocks: jax.Array, steps: jax.Array) -> jax.Array:
        block = jnp.minimum(blocks, len(noise) - 1)
        later = renoise[block, jnp.maximum(steps - 1, 0)]
        return jnp.where(schedules.over(steps == 0, later), noise[block], later)

    return fresh


@jax.jit
def _window(
    denoiser: Denoiser,
    memory: Memory,
    window: Window,
    recorded: tuple[jax.Array, jax.Array],
    blocks: jax.Array | np.int32,
) -> tuple[Latent, Window]:
    return rolling_window.advance(denoiser, memory, window, _recorded(*recorded), blocks)


def _windowed_run(fixture: Fixture, method: Method, config: Mapping[str, Any], prefix: str) -> Run:
    block, frames = config["frames_per_block"], config["num_frames"]
    noise = frames_last(fixture.inputs["noise"])[:, :frames]
    by_frame = einops.rearrange(fixture.inputs["renoise"], PER_FRAME)[:frames]
    renoise = einops.rearrange(by_frame, "(block t) step b c y x -> block step b t c y x", t=block)
    method = dataclasses.replace(
        method,
        sink=config["sink_size"],
        window=config["local_attn_size"],
        keeps_sink=config.get("global_sink", True),
        settings={**method.settings, **_average(method, config)},
    )
    return Run(
        prefix=prefix,
        method=method,
        experiment=_model(config, block, noise.shape[2:4], sample_of(config)),
        noise=noise,
        renoise=renoise_of(renoise),
        prompts=_prompts(config, frames // block),
        given=noise[:, :0],
    )


def _average(method: Method, config: Mapping[str, Any]) -> dict[str, float]:
    alpha = config.get("compression_alpha")
    return {} if alpha is None else {"sink_average": alpha}


def _prompts(config: Mapping[str, Any], blocks: int) -> tuple[int, ...]:
    """The prompt of each block: a switch acts at the first block that starts at or behind its frame."""
    segments = config.get("prompts", [0])
    starts = np.arange(blocks) * config["frames_per_block"]
    passed = [(starts >= frame).astype(int) for frame in config.get("switch", [])]
    return tuple(segments[i] for i in np.sum(passed, axis=0, dtype=int) * np.ones(blocks, int))


def sample_of(config: Mapping[str, Any]) -> SampleConfig:
    return SampleConfig(
        steps=tuple(config["denoising_step_list"]),
        first_steps=tuple(config.get("denoising_step_list_first_chunk", ())),
        shift=float(config["timestep_shift"]),
        warp=config["warp_denoising_step"],
    )


def step_lists(prefix: str, out_of: SampleConfig) -> Outputs:
    first = dataclasses.replace(out_of, steps=out_of.first_steps or out_of.steps)
    return {
        f"{prefix}denoising_step_list_warped": block_step.step_table(out_of)[0],
        f"{prefix}denoising_step_list_first_chunk_warped": block_step.step_table(first)[0],
    }


def _model(
    config: Mapping[str, Any], block: int, latent: tuple[int, ...], sample: SampleConfig
) -> Experiment:
    """The file's network; its memory is the method's, put in when the run starts."""
    rows, columns = latent
    plain = {key: value for key, value in config.items() if key != "local_attn_size"}
    exp = transformer.experiment(
        {**plain, "frames_per_block": block}, frames=block, latent=(rows, columns), sample=sample
    )
    return dataclasses.replace(exp, clip=block)


def frames_last(latent: np.ndarray) -> np.ndarray:
    return einops.rearrange(latent, "b t c y x -> b t y x c")


def renoise_of(noise: np.ndarray) -> np.ndarray:
    return einops.rearrange(noise, "block step b t c y x -> block step b t y x c")


@jax.jit
def _block(
    denoiser: Denoiser, memory: Memory, noise: Latent, renoise: jax.Array
) -> tuple[Memory, jax.Array, Latent]:
    """(the memory after the next block, what each step predicted, what the network returns of it clean)."""
    memory, denoised, _ = _denoised(denoiser, memory, noise, renoise)
    memory, flow = _given(denoiser, memory, denoised.latent)
    return memory, denoised.predictions, flow  # type: ignore[return-value]


@jax.jit
def _denoised(
    denoiser: Denoiser, memory: Memory, noise: Latent, renoise: jax.Array
) -> tuple[Memory, block_step.Denoised, Latent]:
    """(the memory with other scratch, the next block, what the network returns of it clean)."""
    start = transformer.recorded_noise(denoiser, noise, renoise)
    memory, denoised = block_step.denoise_block(denoiser, memory, start)
    clean = jnp.zeros(denoised.latent.shape[:2])
    return memory, denoised, transformer.raw_output(denoiser, memory, denoised.latent, clean)


@jax.jit
def _given(denoiser: Denoiser, memory: Memory, latent: Latent) -> tuple[Memory, Latent]:
    """(the memory after a block that is given, what the network returns of it at timestep 0)."""
    flow = transformer.raw_output(denoiser, memory, latent, jnp.zeros(latent.shape[:2]))
    memory, _ = block_step.commit_block(denoiser, memory, latent, latent, None)
    return memory, flow


_recache = jax.jit(block_step.recache, static_argnames="keep_sink")


def _begun(
    fixture: Fixture, run: Run, contexts: Sequence[str]
) -> tuple[Experiment, block_step.Nets, list[PerLayer[KV]]]:
    """(the model with the memory of the method, its networks, what they read of each prompt)."""
    own = run.experiment
    exp = dataclasses.replace(own, cache=memory_of(run.method, own.cache, len(own.sample.steps)))
    nets = transformer.nets_of(fixture, exp)
    text_kv = jax.jit(dit.WanDiT.text_kv)
    return exp, nets, [text_kv(nets.dit, jnp.asarray(fixture.inputs[name])) for name in contexts]


def _rollout(fixture: Fixture, run: Run, contexts: Sequence[str] | None = None) -> Outputs:
    """Latents, predictions and calls of one run."""
    names = contexts or [f"context_{i}" for i in range(fixture.config["num_prompts"])]
    exp, nets, texts = _begun(fixture, run, names)
    cfg, spec, size = exp.step, exp.memory, exp.cache.block
    memory = cache.init(spec, len(run.noise))
    latents = [jnp.asarray(run.given)]
    for start in range(0, run.given.shape[1], size):
        block = jnp.asarray(run.given[:, start : start + size])
        memory, _ = _given(Denoiser(nets, cfg, texts[run.prompts[0]]), memory, block)
    out: Outputs = {}
    for block, prompt in enumerate(run.prompts):
        denoiser = Denoiser(nets, cfg, texts[prompt])
        if block and prompt != run.prompts[block - 1]:
            memory, flow = _recache(denoiser, memory, keep_sink=run.method.keeps_sink)
            there = min(spec.cache.full_frames, block * size)
            out[f"{run.prefix}recache_before_block{block}.flow"] = theirs(flow[:, -there:])
        of_block = player.first_block(cfg) if block == 0 else cfg
        steps = len(of_block.sample.steps)
        noise = run.noise[:, block * size : (block + 1) * size]
        renoise = run.renoise[block, : steps - 1]
        denoiser = dataclasses.replace(denoiser, cfg=of_block)
        memory, predictions, flow = _block(
            denoiser, memory, jnp.asarray(noise), jnp.asarray(renoise)
        )
        out |= {
            f"{run.prefix}block{block}.step{step}.x0": theirs(x0)
            for step, x0 in enumerate(predictions)
        }
        out[f"{run.prefix}block{block}.context_pass.flow"] = theirs(flow)
        latents.append(predictions[-1])
    out[f"{run.prefix}latents"] = theirs(jnp.concatenate(latents, axis=1))
    return out | {f"{run.prefix}layout.{name}": rows for name, rows in _rows(spec, run).items()}


def theirs(latent: Latent) -> np.ndarray:
    return np.asarray(einops.rearrange(latent, "b t y x c -> b t c y x"))


def _number(call: calls.Call, block: int) -> int:
    """The number of a call as a file has it: of a block in its rollout; -1 for one that was given to the first."""
    if call.clip:
        return call.queries[0][0] // block
    return -1 if call.call == calls.GIVEN else call.block


def _rows(spec: Any, run: Run) -> dict[str, np.ndarray]:
    """The calls of a run as a file lists them, padded with -1."""
    times = block_step.step_table(player.first_block(run.experiment.step).sample)[0].tolist()
    made = list(
        calls.calls(spec, run.method, run.prompts, given=run.given.shape[1] // spec.cache.block)
    )
    widest = max(len(call.keys) for call in made)
    most = max(len(call.queries) for call in made)
    frames = spec.cache.block * (len(run.prompts) + 1) + run.given.shape[1]

    def padded(values: Sequence[Any], width: int) -> list[Any]:
        return [*values, *[-1] * (width - len(values))]

    def queried(call: calls.Call) -> list[float]:
        if call.call != calls.DENOISE:
            return [0.0] * len(call.queries)
        return [times[step] for step in call.steps or [0] * len(call.queries)]

    def made_at(call: calls.Call) -> list[float]:
        now = dict(zip([frame for frame, _ in call.queries], queried(call), strict=True))
        return [now[k.frames[0]] if k.kind == "current" else 0.0 for k in call.keys]  # type: ignore[index]

    def shares(call: calls.Call) -> np.ndarray:
        mix = np.zeros((widest, frames), np.float32)
        for slot, key in enumerate(call.keys):
            for frame, share in key.mix or ((key.frames[0], 1.0),):  # type: ignore[index]
                mix[slot, frame] = share
        return mix

    return {
        "call": np.array(
            [
                [
                    _number(call, spec.cache.block),
                    KINDS[call.call],
                    call.queries[0][0],
                    len(call.queries),
                    len(call.keys),
                    call.prompt,
                ]
                for call in made
            ]
        ),
        "rollout": np.array([call.clip for call in made]),
        "query_frame": np.array([padded([q[0] for q in c.queries], most) for c in made]),
        "query_pos": np.array([padded([q[1] for q in c.queries], most) for c in made]),
        "query_timestep": np.array([padded(queried(c), most) for c in made]),
        "key_frame": np.array([padded([k.frames[0] for k in c.keys], widest) for c in made]),  # type: ignore[index]
        "key_pos": np.array([padded([k.position for k in c.keys], widest) for c in made]),
        "key_prompt": np.array([padded([k.prompt for k in c.keys], widest) for c in made]),
        "key_timestep": np.array([padded(made_at(c), widest) for c in made]),
        "key_mix": np.stack([shares(call) for call in made]),
    }
