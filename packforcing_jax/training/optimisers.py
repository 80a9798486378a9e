"""What moves parameters: one optimiser per group, AdamW, or Muon on matrices and Adam on everything else."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax import Array
from jaxtyping import PyTree

from packforcing_jax.config import OptimiserConfig, TrainConfig
from packforcing_jax.training import objectives
from packforcing_jax.training.batches import Flat


def rates(cfg: OptimiserConfig, peak: float, updates: int) -> optax.Schedule:
    """Nothing for `delay` updates, warm-up, constant, then a straight line to 2 % over the last `cooldown` of them."""
    last = round(updates * cfg.cooldown)
    start = cfg.delay + cfg.warmup
    return optax.join_schedules(
        [
            optax.constant_schedule(0.0),
            optax.linear_schedule(0.0 if cfg.warmup else peak, peak, max(cfg.warmup, 1)),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.02 * peak, max(last, 1)),
        ],
        [cfg.delay, start, max(updates - last, start) if last else updates + start + 1],
    )


def matrix_axes(path: str, leaf: Array) -> optax.contrib.MuonDimensionNumbers | None:
    """How Muon reads a parameter: (inputs, outputs) of every matrix, stacked ones layer by layer; None for Adam."""
    if not path.endswith("kernel") or leaf.ndim < 2:
        return None
    first = 1 if "/blocks/" in path else 0
    return optax.contrib.MuonDimensionNumbers(tuple(range(first, leaf.ndim - 1)), leaf.ndim - 1)


def optimiser(cfg: OptimiserConfig, updates: int) -> optax.GradientTransformation:
    """The optimiser of a group of parameters that is updated `updates` times in a run."""
    beta1, beta2 = cfg.betas

    def axes(params: PyTree) -> PyTree:  # optax's types know no None for Adam
        return {path: matrix_axes(path, leaf) for path, leaf in params.items()}

    moves = {
        "adamw": lambda: optax.adamw(
            rates(cfg, cfg.rate, updates), b1=beta1, b2=beta2, weight_decay=cfg.decay
        ),
        "muon": lambda: optax.contrib.muon(
            rates(cfg, cfg.matrix_rate, updates),
            consistent_rms=0.2,
            weight_decay=cfg.decay,
            adam_b1=beta1,
            adam_b2=beta2,
            adam_learning_rate=rates(cfg, cfg.rate, updates),
            muon_weight_dimension_numbers=axes,
        ),
    }[cfg.kind]()
    return optax.chain(optax.clip_by_global_norm(cfg.clip), moves) if cfg.clip else moves


def updates_of(cfg: TrainConfig, group: str) -> int:
    """How often a group is updated in a whole run."""
    alternates = objectives.of(cfg).critic is not None and group != "critic"
    return -(-cfg.steps // cfg.distil.critic_updates) if alternates else cfg.steps


def of_group(cfg: TrainConfig, group: str) -> optax.GradientTransformation:
    """The optimiser of "generator", "compressor" or "critic"."""
    return optimiser(getattr(cfg, group), updates_of(cfg, group))


def groups(cfg: TrainConfig, params: Mapping[str, Flat]) -> dict[str, Flat]:
    """The parameters that move, by optimiser; `params` by network."""
    own = {
        path: leaf
        for path, leaf in params["generator"].items()
        if path.split("/")[0] in cfg.trainable
    }
    split = {
        "generator": {
            path: leaf for path, leaf in own.items() if not path.startswith("compressor/")
        },
        "compressor": {path: leaf for path, leaf in own.items() if path.startswith("compressor/")},
        "critic": params.get("critic", {}),
    }
    return {group: leaves for group, leaves in split.items() if leaves}


def norm(tree: PyTree) -> Array:
    """The global norm, in float32."""
    return optax.tree.norm(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree))
