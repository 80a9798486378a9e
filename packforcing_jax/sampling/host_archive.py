"""Packed blocks in host memory: the device holds one layer's keys while they are scored, then the chosen blocks alone.

One choice is shared by all layers and made late, so that each block fetches what it needs once.
"""

import dataclasses
import functools
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from packforcing_jax.config import MemorySpec
from packforcing_jax.memory import layout as layouts
from packforcing_jax.memory import view
from packforcing_jax.memory.cache import LayerCache, Memory, Selection
from packforcing_jax.memory.layout import Progress
from packforcing_jax.sampling import block_step
from packforcing_jax.sampling.block_step import Denoised, Denoiser, Noise
from packforcing_jax.types import KV, Latent

Archive: TypeAlias = list[KV]  # per layer, NumPy [b, slot, p, n, h]; keys rotated in space only


def init(spec: MemorySpec, batch: int, dtype=jnp.float32) -> Archive:
    """An empty archive for `batch` videos; nothing at all unless the config keeps it on the host."""
    if spec.cache.archive == "device":
        return []
    tokens = spec.tokens_per_packed_block
    shape = (batch, spec.cache.slots, tokens, spec.heads, spec.head_dim)
    store = lambda: cast(Array, np.zeros(shape, dtype))
    return [KV(k=store(), v=store()) for _ in range(spec.layers)]


def slot(spec: MemorySpec, progress: Progress) -> int:
    """Slot that the packed twin of the block behind `progress` goes to, negative where it is not kept."""
    return int(_slot(spec, progress))


@functools.partial(jax.jit, static_argnames="spec")
def _slot(spec: MemorySpec, progress: Progress) -> Array:
    return layouts.packed_slot(spec.cache, layouts.layout(spec.cache, progress))


def put(archive: Archive, slot: int, packed: list[KV]) -> None:
    """Writes a block's packed twin into its slot, unless that is negative."""
    if slot < 0:
        return
    for store, new in zip(archive, packed, strict=True):
        store.k[:, slot] = np.asarray(new.k)
        store.v[:, slot] = np.asarray(new.v)


def gather(archive: Archive, selection: Selection) -> list[view.Gathered]:
    """The chosen packed blocks of every layer, on the device."""
    slots = np.asarray(selection.slots)[:, :, None, None, None]
    fetch = lambda x: jnp.asarray(np.take_along_axis(x, slots, axis=1))
    at = jnp.zeros(selection.ids.shape)
    return [view.Gathered(kv=KV(k=fetch(one.k), v=fetch(one.v)), positions=at) for one in archive]


def denoise(
    denoiser: Denoiser, memory: Memory, archive: Archive, noise: Noise
) -> tuple[Memory, Denoised]:
    """`block_step.denoise_block` with the packed blocks fetched from the host between its parts."""
    spec = denoiser.cfg.memory
    before = newest(spec, memory.progress, batch=noise.noise.shape[0])
    gathered = gather(archive, before)
    memory, clean, queries = first_pass(denoiser, memory, noise, gathered, before)
    scores = jnp.zeros(())
    layers: Any = memory.layers  # one by one, as in sampling
    for one, layer, pooled, random in zip(archive, layers, queries, noise.random, strict=True):
        keys = jnp.asarray(one.k)
        scores = scores + _score(spec, memory.progress, layer, keys, pooled, random)
    selection = _decide(spec, memory.progress, scores)
    gathered = gather(archive, selection)
    return remaining_passes(denoiser, memory, noise, clean, gathered, selection)


@functools.partial(jax.jit, static_argnames=("spec", "batch"))
def newest(spec: MemorySpec, progress: Progress, batch: int) -> Selection:
    """What a layer attends to before it has asked anything; with nothing packed, nothing."""
    return view.newest(spec, layouts.layout(spec.cache, progress), batch)


@functools.partial(jax.jit, donate_argnames="memory")
def first_pass(
    denoiser: Denoiser,
    memory: Memory,
    noise: Noise,
    gathered: list[view.Gathered],
    selection: Selection,
) -> tuple[Memory, Latent, Any]:
    """`block_step.first_pass` behind one choice for all layers, in place."""
    selections = [selection] * denoiser.cfg.memory.layers
    return block_step.first_pass(denoiser.computed(), memory, noise, gathered, selections)


@functools.partial(jax.jit, static_argnames="spec")
def _score(
    spec: MemorySpec,
    progress: Progress,
    layer: LayerCache,
    keys: Array,
    queries: view.PooledQueries,
    random: Array,
) -> Array:
    layer = dataclasses.replace(layer, packed=dataclasses.replace(layer.packed, k=keys))
    return view.score(spec, layouts.layout(spec.cache, progress), layer, queries, random)


@functools.partial(jax.jit, static_argnames="spec")
def _decide(spec: MemorySpec, progress: Progress, scores: Array) -> Selection:
    return view.select(spec, layouts.layout(spec.cache, progress), scores)


@functools.partial(jax.jit, donate_argnames="memory")
def remaining_passes(
    denoiser: Denoiser,
    memory: Memory,
    noise: Noise,
    clean: Latent,
    gathered: list[view.Gathered],
    selection: Selection,
) -> tuple[Memory, Denoised]:
    """`block_step.remaining_passes` behind one choice for all layers, in place."""
    selections = [selection] * denoiser.cfg.memory.layers
    return block_step.remaining_passes(
        denoiser.computed(), memory, noise, clean, gathered, selections
    )
