"""Packed blocks in host memory: the device holds one layer's keys while they are scored, then the chosen blocks alone.

One choice is shared by all layers and made late, so that each block fetches what it needs once.
"""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from packforcing_jax import pytrees
from packforcing_jax.config import Experiment
from packforcing_jax.memory import cache, view
from packforcing_jax.sampling import block_step
from packforcing_jax.types import KV, Latent

Archive = list[KV]  # per layer, NumPy arrays [b, slot, p, n, h]; keys rotated in space only


def init(exp: Experiment, batch: int, dtype=jnp.float32) -> Archive:
    """An empty archive for `batch` videos; nothing at all unless the config keeps it on the host."""
    if exp.cache.archive == "device":
        return []
    shape = (batch, exp.cache.slots, exp.tokens_per_packed_block, exp.dit.heads, exp.dit.head_dim)
    store = lambda: cast(Array, np.zeros(shape, dtype))  # noqa: E731
    return [KV(k=store(), v=store()) for _ in range(exp.dit.layers)]


def put(exp: Experiment, archive: Archive, block: int, packed: list[KV]) -> None:
    """Writes the packed twin of block number `block` over the oldest one; blocks of the sink are not kept."""
    past = block - exp.cache.sink // exp.cache.block
    if past < 0:
        return
    for store, new in zip(archive, packed, strict=True):
        store.k[:, past % exp.cache.slots], store.v[:, past % exp.cache.slots] = (
            np.asarray(new.k),
            np.asarray(new.v),
        )


def take(archive: Archive, looked: cache.Looked) -> list[view.Picked]:
    """The chosen packed blocks of every layer, on the device."""
    slots = np.asarray(looked.slots)[:, :, None, None, None]
    fetch = lambda x: jnp.asarray(np.take_along_axis(x, slots, axis=1))  # noqa: E731
    return [
        view.Picked(kv=KV(k=fetch(store.k), v=fetch(store.v)), at=jnp.zeros(looked.ids.shape))
        for store in archive
    ]


def draw(
    nets: block_step.Nets,
    exp: Experiment,
    memory: cache.Memory,
    archive: Archive,
    *,
    chance: block_step.Chance,
    text: Any,
    views: list[KV],
) -> block_step.Drawn:
    """`sampler.draw` with the packed blocks fetched from the host between its parts."""
    newest = _newest(exp, memory, batch=chance.noise.shape[0])
    clean, views, asked = _glance(
        nets, exp, memory, chance, text, views, take(archive, newest), newest
    )
    scores = jnp.zeros(())
    for layer, store in enumerate(archive):
        scores = scores + _score(
            exp,
            memory.num_blocks,
            memory.layers[layer],
            jnp.asarray(store.k),
            asked[layer],
            chance.lots[layer],
        )
    looked = _decide(exp, memory, scores)
    return _conclude(nets, exp, memory, chance, text, views, clean, take(archive, looked), looked)


@functools.partial(jax.jit, static_argnames=("exp", "batch"))
def _newest(exp: Experiment, memory: cache.Memory, batch: int) -> cache.Looked:
    return view.newest(exp, cache.plan(exp.cache, memory.num_blocks), batch)


@functools.partial(jax.jit, static_argnames="exp", donate_argnames="views")
def _glance(
    nets: block_step.Nets,
    exp: Experiment,
    memory: cache.Memory,
    chance: block_step.Chance,
    text: Any,
    views: list[KV],
    picked: list[view.Picked],
    looked: cache.Looked,
):
    nets = pytrees.cast(nets, exp.dtypes.compute)
    return block_step.glance(
        nets, exp, memory, chance, text, views, picked, [looked] * exp.dit.layers
    )


@functools.partial(jax.jit, static_argnames="exp")
def _score(
    exp: Experiment,
    num_blocks: Array,
    layer: cache.Layer,
    keys: Array,
    asked: view.Asked,
    lots: Array,
) -> Array:
    held = dataclasses.replace(layer, mid=dataclasses.replace(layer.mid, k=keys))
    return view.score(exp, cache.plan(exp.cache, num_blocks), held, asked, lots)


@functools.partial(jax.jit, static_argnames="exp")
def _decide(exp: Experiment, memory: cache.Memory, scores: Array) -> cache.Looked:
    return view.look(exp, cache.plan(exp.cache, memory.num_blocks), scores)


@functools.partial(jax.jit, static_argnames="exp", donate_argnames=("views",))
def _conclude(
    nets: block_step.Nets,
    exp: Experiment,
    memory: cache.Memory,
    chance: block_step.Chance,
    text: Any,
    views: list[KV],
    clean: Latent,
    picked: list[view.Picked],
    looked: cache.Looked,
) -> block_step.Drawn:
    nets = pytrees.cast(nets, exp.dtypes.compute)
    return block_step.conclude(
        nets, exp, memory, chance, text, views, clean, picked, [looked] * exp.dit.layers
    )
