"""How much attention a block pays to each part of its past, computed by the model's own attention.

Values are what attention averages. Where each key's value says which block the key belongs to, what comes out is the
attention mass of every block: the same layout, keys, rotation and backend as in sampling, and nothing computed beside
them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Float, Int

from packforcing_jax import pytrees
from packforcing_jax.config import CacheConfig, Experiment, MemorySpec, StepConfig
from packforcing_jax.errors import require
from packforcing_jax.evaluation import recall
from packforcing_jax.memory import layout as layouts
from packforcing_jax.memory import tokens
from packforcing_jax.memory.cache import LayerCache, Memory
from packforcing_jax.memory.layout import Layout
from packforcing_jax.networks.dit import SelfAttention
from packforcing_jax.policies.eviction import FIFO
from packforcing_jax.sampling import block_step, inspect_trace, participative
from packforcing_jax.sampling.block_step import Access, Denoiser
from packforcing_jax.sampling.pipeline import Pipeline
from packforcing_jax.sampling.player import State
from packforcing_jax.types import KV, Heads

PARTS = ("sink", "mid", "recent", "current")  # mid: packed blocks, or chosen tokens
SINK, MID, RECENT, CURRENT = range(len(PARTS))


@struct.dataclass
class Mass:
    """What the first denoising step of a block attends to, averaged over queries and heads; everything adds up to 1.

    `flat_*` is what keys get that all agree with the queries alike: their share of all keys.
    """

    by_age: Array  # [layer, b, age]   of the block that is so many blocks old; 0 is the current one
    by_part: Array  # [layer, b, part]  of each of `PARTS`
    flat_by_age: Array  # [layer, b, age]
    flat_by_part: Array  # [layer, b, part]


# What is measured


def spans(cfg: CacheConfig) -> tuple[str, ...]:
    """The settings of `cache.span` at which a whole history is attended: both, where packed blocks stand in a row."""
    return ("true", "fit") if cfg.top and cfg.rope_adjustment == "sink" else (cfg.span,)


def unrestricted(exp: Experiment, span: str) -> Experiment:
    """`exp` attending to every packed block that it holds, each layer in its first step."""
    if exp.cache.top == 0:
        return exp
    everything = {"selection": "all", "scope": "layer", "timing": "first", "registry": "per_layer"}
    return recall.changed(exp, everything | {"span": span})


def require_measured(exp: Experiment, blocks: int) -> None:
    """Raises `InputError` unless every block of a video has a first step of its own and sees what there is to see."""
    cfg = exp.cache
    require(
        not cfg.joint,
        f"method {exp.method} denoises {cfg.window // cfg.block} blocks together, so that no block has a first step of "
        "its own; give another --method.",
    )
    require(
        cfg.archive == "device",
        f"cache.archive={cfg.archive!r} keeps packed blocks where attention does not reach them; set "
        "cache.archive=device.",
    )
    unbounded = dataclasses.replace(cfg, capacity=max(blocks, cfg.capacity))
    packed = len(inspect_trace.visible(unbounded, blocks - 1))
    require(
        cfg.top == 0 or packed <= cfg.capacity,
        f"cache.capacity={cfg.capacity} does not hold the {packed} packed blocks of a history of {blocks} blocks; set "
        f"cache.capacity={packed} or more, or ask for fewer blocks.",
    )


def ages(cfg: CacheConfig, blocks: int) -> int:
    """How many ages a block of a video can have that another one sees: 0 to this minus 1."""
    return max(blocks, cfg.full_frames // cfg.block + 1)


def masses(model: Pipeline, state: State, text: list[KV], span: str, count: int) -> Mass:
    """What the next block attends to while everything is visible; `state` is only read.

    `count` is the number of ages. The noise is that of the block's own first step.
    """
    exp = unrestricted(model.experiment, span)
    memory = recall.copied(exp.memory, state.memory)
    denoiser = Denoiser(model.nets, exp.step, text)
    return _program(denoiser, memory, (state.seeds, state.videos), count=count)


@functools.partial(jax.jit, static_argnames="count")
def _program(denoiser: Denoiser, memory: Memory, who: tuple[Array, Array], *, count: int) -> Mass:
    cfg = denoiser.cfg
    layout = layouts.layout(cfg.cache, memory.progress)
    noise = block_step.draw_noise(cfg, *who, memory.num_blocks)
    computed = denoiser.computed()
    if cfg.cache.budget:
        past: Any = memory.layers
        access = participative.opening(computed, layout, memory.progress)
    else:
        past = pytrees.zipped(memory.layers, block_step.random_scores(memory, noise))
        access = Access(attends=block_step.choosing)
    measured = dataclasses.replace(access, attends=measuring(access, count))
    _, found = block_step.first_step(computed, layout, noise, past, measured)
    mass, flat = jnp.moveaxis(pytrees.stack(found), 1, 0)  # [layer, b, column] each
    return Mass(mass[..., :count], mass[..., count:], flat[..., :count], flat[..., count:])


# Attention to values that say whose they are


def measuring(
    access: Access, count: int
) -> Callable[[StepConfig, Layout, SelfAttention], SelfAttention]:
    """What a layer does under `access`; in place of what that keeps, masses and shares of keys [2, b, column].

    Columns are `count` ages, then `PARTS`. As many go through attention at a time as a head's values have channels, so
    that every backend takes them.
    """

    def attends(cfg: StepConfig, layout: Layout, attention_fn: SelfAttention) -> SelfAttention:
        spec = cfg.memory

        def indifferent(q: Heads, k: Heads, v: Heads, past: Any) -> tuple[Heads, Any]:
            return attention_fn(jnp.zeros_like(q), k, v, past)

        attend = access.attends(cfg, layout, attention_fn)
        both = attend, access.attends(cfg, layout, indifferent)

        def self_attention(q: Heads, k: Heads, v: Heads, past: Any) -> tuple[Heads, Any]:
            mixed, _ = attend(q, k, v, past)

            def found(columns: range) -> Float[Array, "2 b column"]:
                own = jnp.broadcast_to(_own(layout, columns, count), v.shape)
                told = _with_memory(lambda one: _named(spec, layout, one, columns, count), past)
                return jnp.stack([_mean(fn(q, k, own, told)[0]) for fn in both])

            size = spec.head_dim
            starts = range(0, count + len(PARTS), size)
            together = [found(range(first, first + size)) for first in starts]
            return mixed, jnp.concatenate(together, axis=-1)[..., : count + len(PARTS)]

        return self_attention

    return attends


def _mean(attended: Heads) -> Float[Array, "b column"]:
    """The mean over queries and heads."""
    return attended.astype(jnp.float32).mean(axis=(1, 2))


def _with_memory(function: Callable[[LayerCache], LayerCache], past: Any) -> Any:
    """`past` of one layer with `function` of the memory in it."""
    return jax.tree.map(
        lambda one: function(one) if isinstance(one, LayerCache) else one,
        past,
        is_leaf=lambda one: isinstance(one, LayerCache),
    )


def _columns(
    age: Array, part: Array | int, columns: range, count: int
) -> Float[Array, "*k column"]:
    """One in the columns of an age and of a part, zero elsewhere."""
    part = jnp.broadcast_to(jnp.asarray(part), age.shape)
    size = len(columns)
    by_age = jax.nn.one_hot(age - columns.start, size)
    return by_age + jax.nn.one_hot(count + part - columns.start, size)


def _own(layout: Layout, columns: range, count: int) -> Float[Array, " column"]:
    return _columns(jnp.zeros_like(layout.num_blocks), CURRENT, columns, count)


def _named(
    spec: MemorySpec, layout: Layout, layer: LayerCache, columns: range, count: int
) -> LayerCache:
    """`layer` with values that say of each key how old its block is, and which part of the memory it lies in."""
    frames = _frames(spec, layout, layer)
    in_sink = frames < layout.scene + spec.cache.sink
    part = jnp.where(in_sink, SINK, jnp.where(frames < layout.start - layout.recent, MID, RECENT))
    full_res = _columns(layout.num_blocks - frames // spec.cache.block, part, columns, count)
    packed = _columns(layout.num_blocks - layout.ids, MID, columns, count)
    stored = layer.view.v
    values = jnp.broadcast_to(full_res[:, :, None], (*full_res.shape[:2], *stored.shape[2:]))
    view = jax.lax.dynamic_update_slice_in_dim(stored, values.astype(stored.dtype), 0, axis=1)
    twins = jnp.broadcast_to(packed[None, :, None, None], layer.packed.v.shape)
    return dataclasses.replace(
        layer,
        view=KV(k=layer.view.k, v=view),
        packed=KV(k=layer.packed.k, v=twins.astype(stored.dtype)),
    )


def _frames(spec: MemorySpec, layout: Layout, layer: LayerCache) -> Int[Array, "b k"]:
    """The true number of the frame of each key at full size, as the memory holds them before the block is made."""
    cfg, s = spec.cache, spec.tokens_per_frame
    if cfg.budget:
        return tokens.record(layer).ids // s
    written = jnp.maximum(layout.start - layout.origin, 0)
    frames = jnp.concatenate(
        [layout.scene + np.arange(cfg.sink), layout.origin + FIFO.ids_in(written, cfg.ring)]
    )
    return jnp.broadcast_to(jnp.repeat(frames, s), (len(layer.view.v), spec.full_res))
