"""The training program: clips in, a model folder out; progress, checkpoints and resume on the way."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import nnx, struct
from jax import Array

from packforcing_jax import checkpoints, codec, compressor, dit, models, objectives, sampler, text, tokenizer, trees
from packforcing_jax.config import Experiment, TrainConfig, require
from packforcing_jax.stage import captions, data

Flat = dict[str, Array]


@struct.dataclass
class TrainState:
    """Everything a run carries from step to step; parameters by path, so that any tool can read them."""

    params: Flat
    ema: Flat
    opt: Any
    step: Array


def new_model(exp: Experiment, key: Array) -> objectives.Model:
    """A model from scratch. Keys start equal to queries: matching by content is then there to be refined."""
    keys = jax.random.split(key, 3)
    model = objectives.Model(
        nets=sampler.Nets(dit=dit.WanDiT(exp.dit, nnx.Rngs(keys[0])),
                          compressor=compressor.Compressor(exp, nnx.Rngs(keys[1]))),
        text=text.UMT5(exp.text, nnx.Rngs(keys[2])))  # fmt: skip
    attn = model.nets.dit.blocks.attn
    attn.k.kernel = nnx.Param(jnp.copy(attn.q.kernel[...]))
    return model


def rates(cfg: TrainConfig, peak: float) -> optax.Schedule:
    """Warm-up, constant, then a straight line to 2 % over the last `cooldown` of the steps."""
    last = round(cfg.steps * cfg.cooldown)
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, cfg.warmup), optax.constant_schedule(peak),
         optax.linear_schedule(peak, 0.02 * peak, max(last, 1))],
        [cfg.warmup, max(cfg.steps - last, cfg.warmup)])  # fmt: skip


def matrix_axes(path: str, leaf: Array) -> optax.contrib.MuonDimensionNumbers | None:
    """How Muon reads a parameter: (inputs, outputs) of every matrix, stacked ones layer by layer; None for Adam."""
    if not path.endswith("kernel") or leaf.ndim < 2:
        return None
    first = 1 if "/blocks/" in path else 0
    return optax.contrib.MuonDimensionNumbers(tuple(range(first, leaf.ndim - 1)), leaf.ndim - 1)


def optimiser(cfg: TrainConfig) -> optax.GradientTransformation:
    """Muon on matrices, Adam on everything else."""

    def axes(params: Any) -> Any:
        return {path: matrix_axes(path, leaf) for path, leaf in params.items()}

    return optax.contrib.muon(
        rates(cfg, cfg.matrix_rate), consistent_rms=0.2, weight_decay=cfg.decay, adam_b2=0.98,
        adam_learning_rate=rates(cfg, cfg.rate), muon_weight_dimension_numbers=axes)  # fmt: skip


def init(exp: Experiment, seed: int) -> TrainState:
    """The state before the first step."""

    def build(key: Array) -> TrainState:
        params = trees.flatten(new_model(exp, key))
        return TrainState(params=params, ema=jax.tree.map(jnp.copy, params), opt=optimiser(exp.train).init(params),
                          step=jnp.int32(0))  # fmt: skip

    return jax.jit(build)(jax.random.key(seed))


def as_model(exp: Experiment, params: Flat) -> objectives.Model:
    """The modules that hold `params`."""
    return trees.fill(jax.eval_shape(lambda: new_model(exp, jax.random.key(0))), params)


def train_step(state: TrainState, clips: objectives.Clips, key: Array, exp: Experiment) -> tuple[TrainState, dict]:
    """One update of parameters, their average and the optimiser."""

    def loss(params: Flat) -> tuple[Array, tuple[Array, Array]]:
        return objectives.teacher_forcing(as_model(exp, params), clips, key, exp)

    (value, (by_block, missed)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    updates, opt = optimiser(exp.train).update(grads, state.opt, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    keep = jnp.minimum(exp.train.ema, (state.step + 1) / (state.step + 10))  # short memory while all is new
    ema = jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, state.ema, params)
    metrics = {"loss": value, "gradient": optax.tree.norm(grads),
               "loss_by_block": by_block, "matching": missed.mean()}  # fmt: skip
    return TrainState(params=params, ema=ema, opt=opt, step=state.step + 1), metrics


def stage_tokenizer() -> tokenizer.Tokenizer:
    """The closed vocabulary of the Stage world."""
    return tokenizer.Tokenizer(tokenizer.word_tokenizer(captions.VOCABULARY), captions.MAX_WORDS)


def as_clips(exp: Experiment, pixels: codec.Codec, batch: dict[str, np.ndarray]) -> objectives.Clips:
    """A batch of pixels and text as what the objective reads, block by block."""
    video = jnp.asarray(batch["video"])
    latent = codec.encode(pixels, video)
    blocks = einops.rearrange(video, "b (block t) y x c -> (block b) t y x c", t=exp.cache.block)
    low = codec.low_resolution(pixels, blocks, latents=exp.packed_grid[0], pool=exp.compressor.pool)
    ids, mask = (jnp.moveaxis(jnp.asarray(batch[name]), 1, 0) for name in ("ids", "mask"))
    weight = einops.reduce(jnp.asarray(batch["weight"]), "b block t (y i) (x j) -> block b t y x 1", "mean",
                           i=exp.codec.space_factor, j=exp.codec.space_factor)  # fmt: skip
    return objectives.Clips(
        latent=einops.rearrange(latent, "b (block t) y x c -> block b t y x c", t=exp.cache.block),
        low=einops.rearrange(low, "(block b) t y x c -> block b t y x c", b=video.shape[0]),
        ids=ids, mask=mask, weight=weight, called=jnp.moveaxis(jnp.asarray(batch["called"]), 1, 0))  # fmt: skip


@dataclass
class Run:
    """A training run in a folder: what it has reached so far and where it writes."""

    exp: Experiment
    folder: Path
    seed: int
    state: TrainState
    batches: Any
    saved: checkpoints.Checkpoints
    started: float

    @property
    def step(self) -> int:
        return int(self.state.step)

    def save(self) -> None:
        """A checkpoint of everything, the data position included."""
        if self.saved.latest() != self.step:
            self.saved.save(self.step, self.state, self.batches.get_state())


def start(exp: Experiment, folder: Path, seed: int) -> Run:
    """A new run, or the one that `folder` holds, continued after its last checkpoint."""
    require(exp.clip % exp.cache.block == 0,
            f"clip={exp.clip} is not a whole number of blocks of {exp.cache.block}; change one.")  # fmt: skip
    batches = iter(data.dataset(seed, exp.train.batch, encode=stage_tokenizer().encode))
    saved = checkpoints.Checkpoints(folder / "checkpoints")
    if saved.latest() is None:
        state = init(exp, seed)
    else:
        state, position = saved.restore(jax.eval_shape(lambda: init(exp, seed)))
        batches.set_state(position)
    return Run(exp=exp, folder=folder, seed=seed, state=state, batches=batches, saved=saved, started=time.monotonic())


def steps(run: Run) -> Iterator[dict[str, Any]]:
    """Trains to the end, yielding the metrics of each step; saves every so often, and when it is stopped."""
    exp, cfg = run.exp, run.exp.train
    pixels = codec.make(exp.codec, nnx.Rngs(0))
    encode = jax.jit(lambda batch: as_clips(exp, pixels, batch))
    by_sink = {sink: objectives.for_training(exp, exp.clip // exp.cache.block, sink) for sink in set(cfg.sinks)}
    step = jax.jit(train_step, static_argnames="exp", donate_argnums=0)
    try:
        while run.step < cfg.steps:
            key = jax.random.fold_in(jax.random.key(run.seed), run.step)
            sink = cfg.sinks[int(jax.random.randint(jax.random.fold_in(key, 1), (), 0, len(cfg.sinks)))]
            batch = next(run.batches)
            clips = encode({name: batch[name] for name in ("video", "ids", "mask", "weight", "called")})
            run.state, metrics = step(run.state, clips, key, by_sink[sink])
            yield {"step": run.step, "seconds": time.monotonic() - run.started, "sink": sink,
                   **{name: np.asarray(value).round(5).tolist() for name, value in metrics.items()}}  # fmt: skip
            if run.step % cfg.save_every == 0:
                run.save()
    finally:
        run.save()


def export(run: Run, folder: Path, card: str | None = None) -> None:
    """The averaged weights as a model folder that `sample --weights` takes."""
    model = as_model(run.exp, run.state.ema)
    parts = {"dit": model.nets.dit, "compressor": model.nets.compressor, "text": model.text}
    texts = {models.TOKENIZER: stage_tokenizer().inner.to_str(pretty=True), models.CARD: card}
    models.save(folder, run.exp, parts, texts=texts)


def log_line(file, metrics: dict[str, Any]) -> None:
    """One step as a line of JSON."""
    file.write(json.dumps(metrics) + "\n")
    file.flush()
