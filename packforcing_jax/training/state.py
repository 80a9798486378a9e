"""What a run carries from step to step, and the step: networks by name, one optimiser per group, one average."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, cast

import einops
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array

from packforcing_jax import pytrees
from packforcing_jax.config import DiTConfig, Experiment, TrainConfig
from packforcing_jax.data import sources
from packforcing_jax.errors import require
from packforcing_jax.networks import dit
from packforcing_jax.training import batches, objectives, optimisers, rollout, teachers
from packforcing_jax.training.batches import Batch, Flat, Networks

Metrics: TypeAlias = dict[str, Array]
# What steps only read: "teacher" and "codec" are parameters by path, "null_text" the states of a text
Frozen: TypeAlias = Mapping[str, Any]
Loss: TypeAlias = Callable[[dict[str, Flat], Batch, Array], tuple[Array, Metrics]]  # of what moves


@struct.dataclass
class TrainState:
    """Everything that changes; parameters by path, so that any tool can read them."""

    params: dict[str, Flat]  # "generator": dit/..., compressor/..., text/...; "critic": dit/...
    ema: Flat  # of the generator
    opt: dict[str, optax.OptState]  # by group: "generator", "compressor", "critic"
    step: Array  # []  updates done
    skipped: Array  # []  updates in a row that were left out because they were not finite


def movers(train: TrainConfig, step: int) -> tuple[str, ...]:
    """The networks that move in a step: the critic in every one, the generator in one out of `critic_updates`."""
    objective = objectives.of(train)
    if objective.critic is None or step % train.distil.critic_updates == 0:
        return objective.networks
    return ("critic",)


def variant(exp: Experiment, train: TrainConfig, seed: int, step: int) -> Experiment:
    """`exp` as one step trains it: with sizes of sink, recent and clip drawn from `train.cover`."""
    if not objectives.remembers(train):
        return exp
    cover = train.cover
    whole = exp.blocks
    rng = np.random.default_rng((seed, step))
    sink, recent = (
        int(rng.choice(sizes))
        for sizes in (cover.sinks or (exp.cache.sink,), cover.recents or (exp.cache.recent,))
    )
    blocks = whole
    if objectives.of(train).own_clips:
        blocks = int(rng.integers(cover.shortest or whole, (cover.longest or whole) + 1))
    longer = dataclasses.replace(exp, clip=blocks * exp.cache.block)
    return rollout.for_training(longer, blocks, sink, recent, top=cover.top)


def init(
    exp: Experiment, train: TrainConfig, key: Array, pretrained: Mapping[str, Flat]
) -> TrainState:
    """The state before the first step: `pretrained` networks, new ones, and the teacher as the critic."""
    fresh = pytrees.flatten(batches.new_model(exp, key, reads=sources.of(train.source).tokenized))
    params = {"generator": completed(train, pretrained.get("generator", {}), fresh)}
    if objectives.of(train).critic is not None:
        own = pretrained.get("critic", pretrained.get("teacher", params["generator"]))
        params["critic"] = {
            path: jnp.copy(leaf) for path, leaf in own.items() if path.startswith("dit/")
        }
    params = pytrees.cast(params, "float32")
    opt = {
        group: optimisers.of_group(train, group).init(leaves)
        for group, leaves in optimisers.groups(train, params).items()
    }
    return TrainState(
        params=params,
        ema=jax.tree.map(jnp.copy, params["generator"]),
        opt=opt,
        step=jnp.int32(0),
        skipped=jnp.int32(0),
    )


def completed(train: TrainConfig, pretrained: Flat, fresh: Flat) -> Flat:
    """The generator: `pretrained` leaves where there are any, a new compressor where only that is missing."""
    missing = sorted(
        {path.split("/")[0] for path in fresh if path not in pretrained} - {"compressor"}
    )
    require(
        not pretrained or not missing,
        f"train.generator_from={train.generator_from} lacks {', '.join(missing)}; "
        "give a model folder that holds them.",
    )
    return {
        path: jnp.copy(pretrained[path]) if path in pretrained else leaf
        for path, leaf in fresh.items()
    }


def update(
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    key: Array,
    exp: Experiment,
    train: TrainConfig,
    *,
    moves: tuple[str, ...],
) -> tuple[TrainState, Metrics]:
    """The state after one step in which the networks `moves` are updated, one after the other, and what to log.

    An update that is not finite is left out: everything stays as it was but the count of such in a row.
    """
    new = state
    metrics = {}
    for network, own in zip(moves, jax.random.split(key, len(moves))):
        loss = loss_of(exp, train, new, frozen, network)
        new, scalars = _updated(new, loss, batch, own, train, network)
        metrics |= (
            {f"{network}/{name}": value for name, value in scalars.items()}
            if len(objectives.of(train).networks) > 1
            else scalars
        )
    fine = jnp.stack(
        [
            jnp.isfinite(value).all()
            for name, value in metrics.items()
            if name.rsplit("/", 1)[-1] in ("loss", "gradient")
        ]
    ).all()
    guarded = jax.tree.map(lambda after, before: jnp.where(fine, after, before), new, state)
    return dataclasses.replace(
        guarded, step=state.step + 1, skipped=jnp.where(fine, 0, state.skipped + 1)
    ), metrics


def _updated(
    state: TrainState, loss: Loss, batch: Batch, key: Array, train: TrainConfig, network: str
) -> tuple[TrainState, Metrics]:
    """One network's update."""
    moving = {
        group: leaves
        for group, leaves in optimisers.groups(train, state.params).items()
        if (group == "critic") == (network == "critic")
    }
    (value, metrics), grads = gradients(loss, moving, batch, key, train.accumulate)
    metrics |= {"loss": value, "gradient": optimisers.norm(grads)}
    opt = dict(state.opt)
    params = dict(state.params[network])
    for group, leaves in moving.items():
        updates, opt[group] = optimisers.of_group(train, group).update(
            grads[group], state.opt[group], leaves
        )
        params |= cast(Flat, optax.apply_updates(leaves, updates))
        if len(moving) > 1:
            metrics |= {
                f"gradient/{group}": optimisers.norm(grads[group]),
                f"update/{group}": optimisers.norm(updates),
            }
    ema = state.ema if network == "critic" else averaged(train, state, params)
    return dataclasses.replace(
        state, params={**state.params, network: params}, opt=opt, ema=ema
    ), metrics


def loss_of(
    exp: Experiment, train: TrainConfig, state: TrainState, frozen: Frozen, network: str
) -> Loss:
    """The objective of one network, as a function of the parameters that move."""
    objective: Callable[..., tuple[Array, Metrics]] = getattr(objectives.of(train), network)

    def loss(moving: dict[str, Flat], part: Batch, key: Array) -> tuple[Array, Metrics]:
        networks = assembled(exp, train, state, frozen, moving, network)
        return objective(networks, part, key, exp, train)

    return loss


def gradients(
    loss: Loss, moving: dict[str, Flat], batch: Batch, key: Array, parts: int
) -> tuple[tuple[Array, Metrics], dict[str, Flat]]:
    """((loss, metrics), gradients) of the whole batch, computed in `parts` and averaged."""
    graded = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        return graded(moving, batch, key)
    each = jax.tree.map(
        lambda x: einops.rearrange(x, "n (b part) ... -> part n b ...", part=parts),
        dataclasses.replace(batch, trajectory=None),
    )
    if batch.trajectory is not None:  # its clips are on the third axis
        trajectories = einops.rearrange(
            batch.trajectory, "k n (b part) ... -> part k n b ...", part=parts
        )
        each = dataclasses.replace(each, trajectory=trajectories)
    value, grads = jax.lax.map(
        lambda one: graded(moving, *one), (each, jax.random.split(key, parts))
    )
    return jax.tree.map(lambda x: x.mean(axis=0), (value, grads))


def assembled(
    exp: Experiment,
    train: TrainConfig,
    state: TrainState,
    frozen: Frozen,
    moving: Mapping[str, Flat],
    network: str,
) -> Networks:
    """The modules that take part, in the dtype of computing; `moving` replaces the parameters under the gradient."""
    flat = {name: dict(leaves) for name, leaves in state.params.items()}
    for leaves in moving.values():
        flat[network] |= leaves
    half = exp.dtypes.compute

    def model(leaves: Flat) -> batches.Model:
        return pytrees.cast(batches.as_model(exp, leaves), half)

    teacher = frozen.get("teacher")
    objective = objectives.of(train)
    return Networks(
        generator=model(flat["generator"]),
        teacher=None if teacher is None else _teacher(exp, train, teacher),
        critic=_transformer(exp.dit, flat["critic"], half) if "critic" in flat else None,
        average=model(state.ema) if objective.average else None,
        null_text=frozen.get("null_text"),
        vae=batches.as_codec(exp, frozen.get("codec")),
    )


def _transformer(cfg: DiTConfig, leaves: Flat, dtype: str) -> dit.WanDiT:
    return pytrees.cast(batches.as_transformer(cfg, leaves), dtype)


def _teacher(exp: Experiment, train: TrainConfig, leaves: Flat) -> batches.Model:
    """The teacher: whole where it looks back through a memory of its own, else its transformer."""
    half = exp.dtypes.compute
    if "compressor" in objectives.of(train).teacher:
        return pytrees.cast(batches.as_model(exp, leaves), half)
    nothing: Any = None
    return batches.Model(
        dit=_transformer(teachers.sizes(exp, train), leaves, half), compressor=nothing
    )


def averaged(train: TrainConfig, state: TrainState, params: Flat) -> Flat:
    """The running average after one more update: a copy until it begins, then of a memory that may grow."""
    alternates = train.distil.critic_updates if objectives.of(train).critic is not None else 1
    since = state.step // alternates + 1 - train.ema_from
    # 1/10, 2/11, 3/12, ...: a young average forgets the weights it began with, whatever `train.ema` is
    most = since / (since + 9) if train.ema_grows else 1.0
    keep = jnp.where(since > 0, jnp.minimum(train.ema, most), 0.0)
    return jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, state.ema, dict(params))
