"""PackForcing-Unofficial: rollouts, what every pass chose and each layer saw, and its compressor and score alone."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from packforcing_jax import methods, pytrees
from packforcing_jax.config import (
    CacheConfig,
    CompressorConfig,
    DistilConfig,
    DiTConfig,
    Experiment,
    MemorySpec,
)
from packforcing_jax.config.memory import asking
from packforcing_jax.config.networks import UNOFFICIAL_COMPRESSOR
from packforcing_jax.convert import packing, rules, wan_dit
from packforcing_jax.convert.rules import Rule
from packforcing_jax.memory import cache
from packforcing_jax.memory import layout as layouts
from packforcing_jax.memory.cache import Memory, Selection
from packforcing_jax.memory.layout import Layout
from packforcing_jax.methods.method import Method, memory_of
from packforcing_jax.networks import compressor, dit, rope
from packforcing_jax.policies import selection as policy
from packforcing_jax.sampling import block_step, reselection, schedules
from packforcing_jax.sampling.block_step import Access, Denoised, Denoiser
from packforcing_jax.sampling.reselection import Choice
from packforcing_jax.training import batches
from packforcing_jax.training import rollout as clips
from packforcing_jax.types import Heads, Latent
from packforcing_jax.verify import methods as rollout
from packforcing_jax.verify import parts, transformer
from packforcing_jax.verify import training as reference
from packforcing_jax.verify.parts import Fixture, Outputs

NETWORK = "pack_compressor."  # its names begin so
ASKING = 8, 32  # one query in so many, at least so many
REBUILT = 1000  # is added to the number of a pass in which packed keys are computed again
SCALES = {"hr_spatial": "hr", "identity": "own", "token_avg_pool": "own"}


def rollouts(fixture: Fixture) -> Outputs:
    """The run of a file and its variants."""
    sample = rollout.sample_of(fixture.config)
    out = _rollout(fixture, {}) | rollout.step_lists("", out_of=sample)
    for name, changes in fixture.variants.items():
        out |= {f"{name}.{output}": value for output, value in _rollout(fixture, changes).items()}
    return out


# As a file describes it


def method_of(kwargs: Mapping[str, Any], block: int, *, shared: bool) -> Method:
    """The method at the file's sizes."""
    own = methods.PACKFORCING_UNOFFICIAL
    sink, recent = (block * kwargs[f"pack_{name}_blocks"] for name in ("sink", "recent"))
    settings = {
        "capacity": kwargs["pack_mid_bank_capacity_blocks"],
        "top": min(kwargs["pack_mid_select_topk_blocks"], kwargs["pack_mid_bank_capacity_blocks"]),
        "selection": kwargs["pack_mid_selection_mode"],
        "rope_adjustment": "sink" if kwargs["pack_enable_rope_adjustment"] else "none",
        "registry": "shared" if shared else "per_layer",
    }
    window = sink + recent + block
    return dataclasses.replace(own, sink=sink, window=window, settings={**own.settings, **settings})


def compressor_of(kwargs: Mapping[str, Any], config: Mapping[str, Any]) -> CompressorConfig:
    """The compressor at the file's sizes; where a block keeps its own keys and values, identity keeps all of them."""
    block = config["num_frame_per_block"]
    if SCALES[kwargs["pack_compress_mode"]] == "own":
        every = block * config["tokens_per_frame"]
        tokens = kwargs.get("pack_compressed_tokens_per_block", every)
        return CompressorConfig(branches="own", tokens=tokens, frames=block)
    channels = tuple(config["compressor_stage_channels"])
    return dataclasses.replace(UNOFFICIAL_COMPRESSOR, channels=channels, frames=block)


def experiment_of(fixture: Fixture, kwargs: Mapping[str, Any]) -> Experiment:
    """The file's network with the memory and the compressor that it describes."""
    config = fixture.config
    block, (rows, columns) = config["num_frame_per_block"], config["latent_hw"]
    own = transformer.experiment(
        {**config, "frames_per_block": block},
        frames=block,
        latent=(rows, columns),
        sample=rollout.sample_of({"warp_denoising_step": True, **config}),
    )
    shared = not config.get("own_registry_per_layer", False)
    unpooled = dataclasses.replace(own.cache, score_pool=(1, 1, 1))
    memory = memory_of(method_of(kwargs, block, shared=shared), unpooled, len(own.sample.steps))
    packs = compressor_of(kwargs, config)
    return dataclasses.replace(own, cache=memory, compressor=packs, clip=block)


def nets_of(fixture: Fixture, exp: Experiment) -> block_step.Nets:
    """The file's networks."""
    tensors = {name: x for name, x in fixture.weights.items() if not name.startswith(NETWORK)}
    packs: Any = compressor.build(exp.step, nnx.Rngs(0))
    if exp.compressor.branches == "hr":
        own = {name: fixture.weights[name] for name in fixture.weights.keys() - tensors.keys()}
        packs = parts.load(compressor.build, exp.step, own, packing.UNOFFICIAL)
    network = transformer.transformer(exp.dit, tensors)
    return block_step.Nets(dit=network.unrolled(), compressor=packs)


# Rollouts


@struct.dataclass
class Passes:
    """What the passes of one block chose, and what was made of it."""

    denoised: Denoised
    choices: list[list[Choice]]  # of each denoising step and of the commit, of each layer
    packed: (
        jax.Array
    )  # [b, p, d] that the block was compressed to; where it keeps its own keys, nothing


def _rollout(fixture: Fixture, changes: Mapping[str, Any]) -> Outputs:
    """Latents, predictions, choices and whom each layer sees."""
    config = fixture.config
    kwargs = config["model_kwargs"] | changes
    exp = experiment_of(fixture, kwargs)
    nets = nets_of(fixture, exp)
    text = jax.jit(dit.WanDiT.text_kv)(nets.dit, jnp.asarray(fixture.inputs["context"]))
    denoiser, spec = Denoiser(nets, exp.step, text), exp.memory
    memory = cache.init(spec, config["batch"])
    out: Outputs = {}
    latents, made = [], []
    for block, index in enumerate(fixture.inputs["noise_index"]):
        noise = rollout.frames_last(fixture.inputs["noise_pool"][index])
        fresh = fixture.inputs["renoise_pool"][fixture.inputs["renoise_index"][block]]
        renoise = einops.rearrange(fresh, "step b t c y x -> step b t y x c")
        progress = memory.progress
        memory, passes = _block(denoiser, memory, jnp.asarray(noise), jnp.asarray(renoise))
        out |= {
            f"block{block}.step{i}.x0": rollout.theirs(x0)
            for i, x0 in enumerate(passes.denoised.predictions)  # type: ignore[arg-type]
        }
        out[f"block{block}.compressed_hidden"] = passes.packed
        latents.append(passes.denoised.latent)
        made.append((layouts.layout(spec.cache, progress), passes.choices))
    out["latents"] = rollout.theirs(jnp.concatenate(latents, axis=1))
    return out | _sights(spec, made) | _choices(spec, made) | _left(spec, memory)


@jax.jit
def _block(
    denoiser: Denoiser, memory: Memory, noise: Latent, renoise: jax.Array
) -> tuple[Memory, Passes]:
    """The memory after the next block, and its passes; each step is looked at once more for what it chose."""
    cfg = denoiser.cfg
    layout = layouts.layout(cfg.cache, memory.progress)
    start = transformer.recorded_noise(denoiser, noise, renoise)
    before = memory
    memory, denoised = reselection.denoise_block(denoiser, memory, start)
    predictions = denoised.predictions
    assert predictions is not None
    levels = block_step.noise_levels(cfg.sample)
    noisy = [noise] + [
        schedules.add_noise(predictions[i], fresh, levels.sigma[i + 1])
        for i, fresh in enumerate(renoise)
    ]
    choices = [
        _chosen(denoiser, layout, before, latent, levels[i]) for i, latent in enumerate(noisy)
    ]
    latent = denoised.latent
    memory, commit = reselection.committed(denoiser, memory, latent, latent[:, :0])
    packed = latent[:, :0]
    if cfg.compressor.branches != "own":
        packed = denoiser.nets.compressor.pack(denoiser.nets.dit, cfg, latent, packed)
    assert isinstance(commit, list)  # layers run one by one, as in sampling
    return memory, Passes(denoised, [*choices, commit], packed)


def _chosen(
    denoiser: Denoiser,
    layout: Layout,
    memory: Memory,
    noisy: Latent,
    level: schedules.NoiseLevel,
) -> list[Choice]:
    """What each layer chooses in a denoising step."""
    unmade = reselection.before_choosing(denoiser.cfg.memory, layout, memory, len(noisy))
    past = pytrees.zipped(memory.layers, unmade)
    access = Access(attends=reselection.choosing)
    _, after = block_step.predict_x0(denoiser, layout, noisy, level, past, access)
    return [choice for _, choice in after]


Made = Sequence[tuple[Layout, list[list[Choice]]]]


def _sights(spec: MemorySpec, made: Made) -> Outputs:
    """Whom each layer sees in the first step and in the commit of each block, in blocks at true positions."""
    out: Outputs = {}
    for name, at in (("first_step", 0), ("commit", -1)):
        rows = []
        for layout, choices in made:
            alike = [layout] * spec.layers
            seen = layouts.first_to_write(spec.cache, layout, spec.layers) if at else alike
            chosen = [choice.selection for choice in choices[at]]
            rows.append([sight(spec, *one) for one in zip(seen, chosen, strict=True)])
        out |= {f"layout.{name}.{key}": value for key, value in table(rows).items()}
        frames = np.array([int(layout.start) for layout, _ in made])[:, None]
        frames = frames + np.arange(spec.cache.block)
        out[f"layout.{name}.query_frame"] = frames
        out[f"layout.{name}.query_pos"] = frames.astype(np.float32)
    return out


Sight: TypeAlias = list[tuple[float, ...]]


def sight(spec: MemorySpec, seen: Layout, selection: Selection) -> Sight:
    """(block, whether it is compressed, its tokens, position of its first frame) of all that one layer attends to."""
    block, start = spec.cache.block, int(seen.start)
    to_true = start - float(seen.current_position)
    whole, packed = block * spec.tokens_per_frame, spec.tokens_per_packed_block
    ids = np.asarray(selection.ids[0])
    places = np.asarray(selection.positions[0])[ids >= 0] + to_true
    scene = int(seen.scene)
    sink = range(scene, scene + int(seen.sink), block)
    recent = range(start - int(seen.recent), start, block)

    def at(position: Any, frame: int, first: int) -> float:
        return float(position) + to_true + frame - first

    return [
        *((f // block, 0, whole, at(seen.sink_position, f, scene)) for f in sink),
        *(
            (int(i), int(packed < whole), packed, float(place))
            for i, place in zip(ids[ids >= 0], places, strict=True)
        ),
        *((f // block, 0, whole, at(seen.recent_position, f, recent[0])) for f in recent),
        (start // block, 0, whole, float(start)),
    ]


def table(rows: Sequence[Sequence[Sight]]) -> dict[str, np.ndarray]:
    """Sights [row, layer] as a file lists them, padded with -1; of keys that say it, the pass that wrote them."""
    widest = max(len(sight) for row in rows for sight in row)
    columns = max(len(key) for row in rows for sight in row for key in sight)
    blank = [(-1.0,) * columns]
    whole = np.array([[one + blank * (widest - len(one)) for one in row] for row in rows])
    names = "key_block_id", "key_is_compressed", "key_tokens", "", "key_written_by_pass"
    integers = {name: whole[..., i].astype(int) for i, name in enumerate(names[:columns]) if name}
    return {**integers, "key_pos_first_frame": whole[..., 3].astype(np.float32)}


def _choices(spec: MemorySpec, made: Made) -> Outputs:
    """The choices of every pass, and from what with which scores."""
    top, capacity = spec.cache.top, spec.cache.capacity
    ids, candidates, scores = [], [], []
    for layout, choices in made:
        commit = layouts.first_to_write(spec.cache, layout, spec.layers)
        ids.append([[np.asarray(one.selection.ids[0]) for one in each] for each in choices])
        seen = [[layout] * spec.layers] * (len(choices) - 1) + [commit]
        among = [
            [_candidates(spec, *one) for one in zip(each, of, strict=True)]
            for each, of in zip(seen, choices, strict=True)
        ]
        candidates.append([[one[0] for one in each] for each in (among[0], among[-1])])
        scores.append([[one[1] for one in each] for each in among])

    def padded(rows: Any, width: int, fill: float) -> np.ndarray:
        if isinstance(rows, list):
            return np.stack([padded(row, width, fill) for row in rows])
        return np.pad(rows, (0, width - len(rows)), constant_values=fill)

    return {
        "select.block_ids": padded(ids, top, -1),
        "select.candidate_block_ids": padded(candidates, capacity, -1),
        "select.scores": padded(scores, capacity, 0),
    }


def _candidates(spec: MemorySpec, seen: Layout, choice: Choice) -> tuple[np.ndarray, np.ndarray]:
    """(ids, scores) of the packed blocks that a layer chooses from, in time order; a file counts them for `recency`."""
    ids = np.asarray(seen.ids)
    slots = [slot for slot in np.argsort(ids) if ids[slot] >= 0]
    counted = spec.cache.score.name == "recency"
    found = np.arange(len(slots)) if counted else np.asarray(choice.scores[0, slots])
    return ids[slots], found


def _left(spec: MemorySpec, memory: Memory) -> Outputs:
    """Which blocks the memory holds at the end, and the newest packed one as it was made, at its true position."""
    cfg, block = spec.cache, spec.cache.block
    layout = layouts.layout(cfg, memory.progress)
    start, scene = int(layout.start), int(layout.scene)
    visible = np.sort(np.asarray(layout.ids)[np.asarray(layout.ids) >= 0])
    out: Outputs = {
        "final.sink_block_ids": np.arange(scene, scene + int(layout.sink), block) // block,
        "final.recent_block_ids": np.arange(start - int(layout.recent), start, block) // block,
        "final.mid_block_ids": visible,
    }
    if len(visible) == 0:
        return out
    slot = int(np.argmax(np.asarray(layout.ids) == visible[-1]))
    times = visible[-1] * block + jnp.asarray(layouts.packed_positions(spec)[0])
    layers: Any = memory.layers  # one by one, as in sampling
    for i, layer in enumerate(layers):
        keys = rope.rotate(layer.packed.k[:, slot], rope.time_angles(times, spec))
        out |= {f"final.newest_mid.{i}.k": keys, f"final.newest_mid.{i}.v": layer.packed.v[:, slot]}
    return out


# Its training


def training(fixture: Fixture) -> Outputs:
    """Clips drawn up to each exit step, whom each layer sees in every pass, and the gradients of their weighted sum."""
    config, inputs = fixture.config, fixture.inputs
    own = experiment_of(fixture, config["model_kwargs"])
    blocks = config["num_blocks"]
    exp = dataclasses.replace(own, clip=blocks * own.cache.block)
    model = _in_training(fixture, exp)
    clip = jnp.asarray(rollout.frames_last(inputs["noise"]))
    noise = batches.by_block(clip, exp.cache.block)
    context = rollout.renoise_of(inputs["context_pass_noise"][:, None])[:, 0]
    draws = clips.Draws(
        noise=noise,
        renoise=jnp.asarray(rollout.renoise_of(inputs["renoise"])),
        context=jnp.concatenate([context, jnp.zeros_like(noise[:1])]),
        random=jnp.zeros((blocks, exp.dit.layers, noise.shape[1], 0)),
        gap=jnp.float32(0),
        exit=jnp.int32(0),
    )
    text = jnp.asarray(inputs["context"])[None]
    weights = jnp.asarray(rollout.frames_last(inputs["loss_weights"]))
    out: Outputs = {}
    for exit in config["exit_indices"]:
        now = dataclasses.replace(draws, exit=jnp.int32(exit))
        loss, clip, latents, grads = _graded(exp, model, now, text, weights)
        made = {
            "loss": loss,
            "latents": rollout.theirs(latents),
            "denoised_timestep_from_to": reference.bounds(exp.sample, exit),
            **_passes(exp, model, now, text, clip),
        }
        out |= {f"exit{exit}.{name}": value for name, value in made.items()}
        out |= _gradients(f"exit{exit}", fixture, grads)
    return out


DISTIL = DistilConfig(gradient="packed", noised_context=True, finished=False)


def _in_training(fixture: Fixture, exp: Experiment) -> block_step.Nets:
    """The file's networks, layers stacked."""
    nets = nets_of(fixture, exp)
    tensors = {name: x for name, x in fixture.weights.items() if not name.startswith(NETWORK)}
    return dataclasses.replace(nets, dit=transformer.transformer(exp.dit, tensors))


@functools.partial(jax.jit, static_argnames="exp")
def _graded(
    exp: Experiment, model: block_step.Nets, draws: clips.Draws, text: jax.Array, weights: Latent
) -> tuple[jax.Array, clips.Clip, Latent, block_step.Nets]:
    """(the weighted sum of a clip, what was drawn, the clip, the sum's gradients)."""
    clip = clips.draw(model, exp, DISTIL, None, draws, batches.text_kv(_wan(model), text))

    def total(model: block_step.Nets) -> tuple[jax.Array, Latent]:
        text_kv = batches.text_kv(_wan(model), text)
        latents = batches.by_clip(clips.again(model, exp, DISTIL, clip, text_kv))
        return (latents * weights).sum(), latents

    (loss, latents), grads = jax.value_and_grad(total, has_aux=True)(model)
    return loss, clip, latents, grads


def _wan(model: block_step.Nets) -> dit.WanDiT:
    assert isinstance(model.dit, dit.WanDiT)
    return model.dit


def _gradients(prefix: str, fixture: Fixture, grads: block_step.Nets) -> Outputs:
    """Gradients under the names of the checkpoint's weights, those of them that the file holds."""
    shapes = {name: value.shape for name, value in fixture.weights.items()}
    out: Outputs = {}
    for part, names in ((grads.dit, wan_dit.WAN_DIT), (grads.compressor, packing.UNOFFICIAL)):
        flat = {path: np.asarray(leaf) for path, leaf in pytrees.flatten(part).items()}
        own = {name for name in shapes if any(rule.match(name) for rule in names)}
        inverted = rules.invert(flat, names, {name: shapes[name] for name in own})
        out |= {f"{prefix}.grad.{name}": value for name, value in inverted.items()}
    return {name: value for name, value in out.items() if name in fixture.wanted}


def _passes(
    exp: Experiment, model: block_step.Nets, draws: clips.Draws, text: jax.Array, clip: clips.Clip
) -> Outputs:
    """What every pass of every block chose, and whom each layer saw in it; the last block has no commit."""
    exit, spec = int(draws.exit), exp.memory
    text_kv = batches.text_kv(_wan(model), text)
    blocks = len(draws.noise)
    rows, chosen = [], []
    for n in range(blocks):
        now = layouts.layout(exp.cache, layouts.begin(n), draws.gap)
        condition = clips.Condition(now, clip.stored, batches.of_block(text_kv, jnp.int32(n)))
        noisy, made = draws.noise[n], []
        for step in range(exit + 1):
            clean, selection = _predicted(exp, model, condition, noisy, jnp.int32(step), draws.exit)
            made.append((step, False, selection))
            if step < exit:
                sigma = block_step.noise_levels(exp.sample).sigma[step + 1]
                noisy = schedules.add_noise(clean, draws.renoise[n, step], sigma)
        if n + 1 < blocks:
            made.append((exit + 1, True, _read(exp, model, condition, clip.latent[n], draws.exit)))
        of_block, ids = [], []
        for number, commits, selection in made:
            step = jnp.int32(0 if commits else number)
            each = clips.seen(exp, now, step, draws.exit, commits=commits)
            layers = zip(*(pytrees.unstack(x, spec.layers) for x in (each, selection)), strict=True)
            seen = [(sight(spec, *one), one[1]) for one in layers]
            of_block.append([_written(one, number, exit) for one, _ in seen])
            ids.append([np.asarray(selected.ids[0]) for _, selected in seen])
        missing = exit + 2 - len(made)
        rows += of_block + [[[]] * spec.layers] * missing
        chosen.append(ids + [[np.full(spec.cache.top, -1)] * spec.layers] * missing)
    out = {f"layout.{name}": value for name, value in table(rows).items()}
    by_block = {
        name: value.reshape(blocks, exit + 2, *value.shape[1:]) for name, value in out.items()
    }
    return by_block | {"select.block_ids": np.array(chosen)}


_predicted = jax.jit(
    lambda exp, model, *rest: clips.predict_anew(model, exp, *rest), static_argnums=0
)
_read = jax.jit(lambda exp, model, *rest: clips.read_anew(model, exp, *rest)[0], static_argnums=0)


def _written(seen: Sight, number: int, exit: int) -> Sight:
    """`seen` in pass `number` of a block, with the pass in which each key was written; packed ones anew at the exit."""
    *past, current = seen
    anew = REBUILT + number
    committed = exit + 1
    return [
        *((*key, anew if key[1] and number == exit else committed) for key in past),
        (*current, number),
    ]


# The compressor and the score alone

ATTENTION = (
    Rule(r"blocks\.0\.self_attn\.([qkvo])\.weight", r"\1/kernel", rules.linear),
    Rule(r"blocks\.0\.self_attn\.([qkvo])\.bias", r"\1/bias"),
    Rule(r"blocks\.0\.self_attn\.(norm_[qk])\.weight", r"\1/scale"),
)


def compressed(fixture: Fixture) -> Outputs:
    """Latents of several sizes compressed, and their keys and values in one layer, as stored and as read."""
    config = fixture.config
    model = DiTConfig(dim=config["dim"], heads=config["num_heads"], eps=config["eps"])
    own = {name: x for name, x in fixture.weights.items() if not name.startswith(NETWORK)}
    packer = {name: fixture.weights[name] for name in fixture.weights.keys() - own.keys()}
    attention = parts.load(dit.Attention, model, own, ATTENTION)
    out: Outputs = {}
    for case, (frames, rows, columns) in enumerate(config["latents_fhw"]):
        packs = dataclasses.replace(
            UNOFFICIAL_COMPRESSOR, channels=tuple(config["stage_channels"]), frames=frames
        )
        cache_cfg = CacheConfig(block=frames, sink=0, recent=0, top=0, capacity=0)
        step = Experiment(
            "file", dit=model, cache=cache_cfg, compressor=packs, latent=(rows, columns)
        ).step
        net: Any = parts.load(compressor.build, step, packer, packing.UNOFFICIAL)
        latent = parts.ours(fixture.inputs[f"latent.{case}"])
        unused: Any = None
        hidden = net.pack(unused, step, latent, latent[:, :0])
        kv = attention.keys_values(hidden)
        inside, grid = layouts.packed_positions(step.memory)
        start, shift = (
            int(fixture.inputs[name][case]) for name in ("start_frames", "packed_shift")
        )

        def turned(keys: Heads, times: np.ndarray | jax.Array, spec=step.memory) -> Heads:
            return rope.rotate(keys, rope.time_angles(jnp.asarray(times, jnp.float32), spec))

        in_space = rope.rotate(kv.k, rope.space_angles(jnp.asarray(grid), step.memory))
        out |= {
            f"hidden.{case}": hidden,
            f"grid.{case}": np.array(step.packed_grid),
            f"key.{case}": turned(in_space, start + inside),
            f"key_packed.{case}": turned(in_space, start + shift + inside),
            f"value.{case}": kv.v,
        }
    return out


def scores(fixture: Fixture) -> Outputs:
    """Scores of given queries and keys, what they choose, and which queries ask."""
    out: Outputs = {
        f"subsample.{count}": asking(int(count), *ASKING)
        for count in fixture.inputs["subsample_lengths"]
    }
    for case in range(int(fixture.inputs["num_cases"])):
        q, k = (jnp.asarray(fixture.inputs[f"{name}.{case}"]) for name in ("q", "mid_k"))
        blocks, keep = k.shape[1], int(fixture.inputs["topk"][case])
        tokens = asking(q.shape[1], *ASKING)
        ids = jnp.arange(blocks)
        inputs = policy.ScoreInputs(
            queries=q,
            packed=k,
            full_res=(),
            full_res_valid=(),
            ids=ids,
            query_sum=q[:, tokens].sum(axis=1),
            asked=jnp.int32(len(tokens)),
            key_sum=k.sum(axis=2),
            random=jnp.zeros(k.shape[:2]),
        )
        heads = range(max(q.shape[2] // 2, 1))
        for name, label in (("query_score", ""), ("recency", "recency_")):
            rule = policy.SCORES[name]
            if rule.across_heads is None:
                found = rule.fn(inputs)
            else:
                each = [rule.fn(_one_head(inputs, head)) for head in heads]
                found = rule.across_heads(jnp.stack(each), axis=0)
            out[f"{label}scores.{case}"] = found
            suffix = "_recency" if label else ""
            out[f"selected{suffix}.{case}"] = policy.choose(found, ids, keep)[1]
    return out


def _one_head(inputs: policy.ScoreInputs, head: int) -> policy.ScoreInputs:
    return dataclasses.replace(
        inputs,
        queries=inputs.queries[:, :, head : head + 1],
        packed=inputs.packed[..., head : head + 1, :],
        query_sum=inputs.query_sum[:, head : head + 1],
        key_sum=inputs.key_sum[:, :, head : head + 1],
    )
