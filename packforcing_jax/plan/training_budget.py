"""What training takes before anything of it is allocated: bytes on each device, operations of one step."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from packforcing_jax import pytrees
from packforcing_jax.config import DiTConfig, Experiment, Stage, TrainConfig
from packforcing_jax.data import sources
from packforcing_jax.errors import require
from packforcing_jax.networks import codec, dit, mesh
from packforcing_jax.plan import formulas, jaxpr_cost
from packforcing_jax.plan.budget import Row
from packforcing_jax.sharding import AXES
from packforcing_jax.training import (
    batches,
    distillation,
    objectives,
    rollout,
    runs,
    state,
    teachers,
)
from packforcing_jax.training.batches import Batch
from packforcing_jax.training.state import TrainState

BYTES, OPERATIONS = "training", "step"  # what names of figures begin with
TERMS = {
    "training/devices": "data fsdp tensor context",
    "training/critic": "share 4: vectors whole, matrices / (fsdp tensor)",
    "training/teacher": "share bytes, likewise",
    "training/moments of the generator": "two float32 for each number that moves",
    "training/moments of the critic": "the same",
    "training/codec": "whole on each device",
    "training/negative prompt": "words d bytes at most, whole on each device",
    "training/held": "all of it, between two steps",
    "training/gradients": "of the network that moves, the larger of two",
    "step/one score by the teacher": "2 b (L q (6 d d + 2 W d + 2 d f + 2 q d) + ends)",
    "step/one score by the critic": "the same with its sizes",
    "step/the teacher's scores": "with text, and without where guidance weighs it",
    "step/update of the generator": "rollout, exit steps with gradient, scores",
    "step/update of the critic": "rollout, a score with gradient",
    "step/on average": "the generator's in one step out of critic_updates",
    "step/on average, each device": "that / devices",
    "step/share of the teacher's scores": "of a step on average",
}


@dataclass(frozen=True)
class Setup:
    """What a step is traced or compiled for: its settings, and shapes and places of all that it works on."""

    exp: Experiment
    train: TrainConfig
    state: TrainState
    frozen: Mapping[str, Any]  # what a step reads and leaves alone
    grid: mesh.Grid


def described(train: TrainConfig, devices: int) -> AbstractMesh:
    """The mesh of `train` over devices that need not be there."""
    return AbstractMesh(mesh.sizes(train.mesh, devices), AXES)


def setup(exp: Experiment, train: TrainConfig, grid: mesh.Grid) -> Setup:
    """The shapes of a run on `grid`, its memory sized for a clip of training."""
    mesh.check(exp, train, grid)
    teachers.require_fits(exp, train)
    if objectives.remembers(train):
        exp = rollout.for_training(exp, exp.blocks, exp.cache.sink, top=train.cover.top)
    form = runs.abstract(exp, train, runs.Program(), 0, grid)
    return Setup(exp, train, form, frozen(exp, train, grid), grid)


def frozen(exp: Experiment, train: TrainConfig, grid: mesh.Grid) -> dict[str, Any]:
    """Shapes and places of what a step reads and leaves alone, as `runs.others` reads it."""
    teacher = teachers.shapes(exp, train)
    everywhere = NamedSharding(grid, PartitionSpec())
    found: dict[str, Any] = {
        "codec": {
            path: jax.ShapeDtypeStruct(leaf.shape, exp.dtypes.vae, sharding=everywhere)
            for path, leaf in pytrees.flatten(codec.shapes(exp.codec)).items()
        }
    }
    if teacher:
        places = mesh.shardings(teacher, grid)
        found["teacher"] = {
            path: jax.ShapeDtypeStruct(leaf.shape, exp.dtypes.compute, sharding=places[path])
            for path, leaf in teacher.items()
        }
    if train.negative_prompt:
        words = exp.text.max_words, exp.text.dim
        found["null_text"] = jax.ShapeDtypeStruct(words, exp.dtypes.text, sharding=everywhere)
    return found


def device_bytes(tree: jaxpr_cost.Tree) -> int:
    """Bytes of a tree of placed shapes on each device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def rows(stage: Stage, devices: int) -> dict[str, Row]:
    """Every figure of training `stage` on so many devices, by name."""
    require(0 < devices <= 2**20, f"devices={devices} is out of range; give 1 to {2**20:,}.")
    made = setup(stage.experiment, stage.train, described(stage.train, devices))
    counted = held(made) | operations(made)
    want = closed(made)
    units = {BYTES: "bytes", OPERATIONS: "operations"}
    special = {"training/devices": "count", "step/share of the teacher's scores": "share"}
    return {
        name: Row(
            name,
            figure,
            want.get(name),
            special.get(name, units[name.partition("/")[0]]),
            TERMS.get(name, ""),
        )
        for name, figure in counted.items()
    }


# Bytes


def held(made: Setup) -> dict[str, float]:
    """What each device holds between two steps, by part, and the gradients beside it in one."""
    form = made.state
    gradients = [form.params[name] for name in objectives.of(made.train).networks]
    trees: dict[str, Any] = {
        "generator": form.params["generator"],
        "average of the generator": form.ema,
        "moments of the generator": [opt for group, opt in form.opt.items() if group != "critic"],
    }
    if "critic" in form.params:
        trees |= {"critic": form.params["critic"], "moments of the critic": form.opt["critic"]}
    trees |= {
        name: made.frozen[key]
        for name, key in (
            ("teacher", "teacher"),
            ("codec", "codec"),
            ("negative prompt", "null_text"),
        )
        if key in made.frozen
    }
    sizes = {f"{BYTES}/{name}": device_bytes(tree) for name, tree in trees.items()}
    return {
        f"{BYTES}/devices": made.grid.size,
        **sizes,
        f"{BYTES}/held": device_bytes((form, dict(made.frozen))),
        f"{BYTES}/gradients": max(map(device_bytes, gradients)),
    }


# Operations


def operations(made: Setup) -> dict[str, float]:
    """Operations of one step of the whole batch, by update."""
    counts: dict[str, float] = {}
    updates = {name: _update(made, name) for name in objectives.of(made.train).networks}
    rare = made.train.distil.critic_updates if "critic" in updates else 1
    average = updates["generator"] / rare + updates.get("critic", 0)
    scores = 0.0
    if scored_by_teacher(made.train):
        one = _score(made, teachers.sizes(made.exp, made.train))
        scores = (1 + distillation.guides(made.train.distil)) * one
        counts |= {
            f"{OPERATIONS}/one score by the teacher": one,
            f"{OPERATIONS}/one score by the critic": _score(made, made.exp.dit),
            f"{OPERATIONS}/the teacher's scores": scores,
        }
    counts |= {f"{OPERATIONS}/update of the {name}": count for name, count in updates.items()}
    counts |= {
        f"{OPERATIONS}/on average": average,
        f"{OPERATIONS}/on average, each device": average / made.grid.size,
    }
    if scored_by_teacher(made.train):
        counts[f"{OPERATIONS}/share of the teacher's scores"] = scores / rare / average
    return counts


def scored_by_teacher(train: TrainConfig) -> bool:
    """Whether a teacher scores whole clips beside a critic."""
    objective = objectives.of(train)
    return objective.critic is not None and tuple(objective.teacher) == ("dit",)


def _plain(made: Setup) -> Experiment:
    """The experiment as it is traced: attention written out, since fused kernels hide their products."""
    return dataclasses.replace(made.exp, attention="reference")


def _unplaced(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _update(made: Setup, network: str) -> float:
    """Operations of one network's update."""

    def update(now: TrainState, frozen: Mapping[str, Any], batch: Batch) -> TrainState:
        key = jax.random.key(0)
        return state.update(now, frozen, batch, key, _plain(made), made.train, moves=(network,))[0]

    given = _unplaced((made.state, dict(made.frozen))), batch_of(made.exp, made.train)
    return jaxpr_cost.operations(jaxpr_cost.trace(update, *given[0], given[1]))


def batch_of(exp: Experiment, train: TrainConfig) -> Batch:
    """Shapes of a batch of what the objective reads, all clips, a prompt for each block where words are read."""
    blocks = exp.blocks
    clips = (blocks, train.batch, exp.cache.block, *exp.latent, exp.dit.in_channels)

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    if sources.of(train.source).tokenized:
        words = jax.ShapeDtypeStruct((blocks, train.batch, exp.text.max_words), jnp.int32)
        text: batches.Text = batches.TokenizedText(ids=words, mask=words)  # type: ignore[arg-type]
    else:
        text = floats(1, train.batch, exp.text.max_words, exp.text.dim)  # type: ignore[assignment]
    every = {
        "latent": lambda: floats(*clips),
        "low_res": lambda: floats(blocks, train.batch, *sources.low_res_shape(exp)),
        "trajectory": lambda: floats(len(exp.sample.steps) + 1, *clips),
    }
    read = {name: every[name]() for name in runs.needs(exp, train)}
    return Batch(text=text, **read)


def _score(made: Setup, cfg: DiTConfig) -> float:
    """Operations of one score of a batch of clips by a transformer of these sizes."""
    exp = _plain(made)
    frames, prompts = _scored(made)
    words = exp.text.max_words
    states = jax.ShapeDtypeStruct((prompts, made.train.batch, words, cfg.text_dim), jnp.float32)
    clip = jax.ShapeDtypeStruct(
        (made.train.batch, frames, *exp.latent, cfg.in_channels), jnp.float32
    )
    model = jax.eval_shape(lambda: pytrees.cast(dit.WanDiT(cfg, nnx.Rngs(0)), exp.dtypes.compute))

    def score(model: dit.WanDiT, clip: jax.Array, states: jax.Array) -> jax.Array:
        times = jnp.zeros(clip.shape[0])
        return distillation.score(model, exp, made.train.distil, clip, times, states)

    return jaxpr_cost.operations(jaxpr_cost.trace(score, model, clip, states))


def _scored(made: Setup) -> tuple[int, int]:
    """Latent frames of a clip that are scored, and prompts that they read."""
    blocks = made.train.distil.scored or made.exp.blocks
    tokenized = sources.of(made.train.source).tokenized
    return blocks * made.exp.cache.block, blocks if tokenized else 1


# By closed formula


def closed(made: Setup) -> formulas.Figures:
    """Every figure of training that has a closed formula, by name."""
    exp, train = made.exp, made.train
    shape = made.grid.shape
    figures: formulas.Figures = {f"{BYTES}/devices": math.prod(shape[name] for name in AXES)}
    if scored_by_teacher(train):
        size = formulas.BYTES[exp.dtypes.compute]
        teacher = teachers.sizes(exp, train)
        parts = shape["fsdp"], shape["tensor"]
        frames, prompts = _scored(made)
        score = {
            name: train.batch * formulas.score(cfg, frames * exp.tokens_per_frame, frames, prompts)
            for name, cfg in (("teacher", teacher), ("critic", exp.dit))
        }
        figures |= {
            f"{BYTES}/teacher": size * formulas.transformer_share(teacher, *parts),
            f"{BYTES}/critic": 4 * formulas.transformer_share(exp.dit, *parts),
            f"{OPERATIONS}/one score by the teacher": score["teacher"],
            f"{OPERATIONS}/one score by the critic": score["critic"],
            f"{OPERATIONS}/the teacher's scores": (1 + distillation.guides(train.distil))
            * score["teacher"],
        }
    return figures
