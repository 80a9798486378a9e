"""A block of video whose every pass chooses its packed blocks anew (PackForcing-Unofficial 3f4302e).

Each layer chooses at every denoising step, and again in the commit. With `cache.registry="shared"` the commit is that
of the released code: one list says for all layers where blocks are, and the first layer moves it on before the others
read.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import struct
from jax import Array

from packforcing_jax import pytrees
from packforcing_jax.config import MemorySpec, StepConfig
from packforcing_jax.memory import cache, view
from packforcing_jax.memory import layout as layouts
from packforcing_jax.memory.cache import LayerCache, Memory, Selection
from packforcing_jax.memory.layout import Layout
from packforcing_jax.networks.dit import SelfAttention
from packforcing_jax.pytrees import PerLayer
from packforcing_jax.sampling import block_step
from packforcing_jax.sampling.block_step import Access, Denoised, Denoiser, Noise
from packforcing_jax.types import KV, Heads, Latent


@struct.dataclass
class Choice:
    """What one layer chose in one pass, and its scores of all packed blocks."""

    selection: Selection
    scores: Array  # [b, slot]; what it says of invisible ones means nothing


def denoise_block(denoiser: Denoiser, memory: Memory, noise: Noise) -> tuple[Memory, Denoised]:
    """The next block, denoised in a few steps; of the memory only scratch is written.

    `Denoised.selection` is the choice of the last step.
    """
    spec = denoiser.cfg.memory
    layout = layouts.layout(denoiser.cfg.cache, memory.progress)
    past = pytrees.zipped(memory.layers, before_choosing(spec, layout, memory, len(noise.noise)))
    access = Access(attends=choosing)
    clean, past = block_step.first_step(denoiser, layout, noise, past, access)
    latent, past, predictions = block_step.later_steps(denoiser, layout, noise, clean, past, access)
    layers, choices = pytrees.unzip(past)
    selection = pytrees.over(lambda choice: choice.selection, choices)
    return dataclasses.replace(memory, layers=layers), Denoised(latent, selection, predictions)


def commit_block(
    denoiser: Denoiser,
    memory: Memory,
    latent: Latent,
    low_res: Latent,
    selection: PerLayer[Selection] | None = None,
) -> tuple[Memory, None]:
    """The memory after `latent`, whose clean pass chooses for itself, whatever the `selection` of a step was."""
    memory, _ = committed(denoiser, memory, latent, low_res)
    return memory, None


def committed(
    denoiser: Denoiser, memory: Memory, latent: Latent, low_res: Latent
) -> tuple[Memory, PerLayer[Choice]]:
    """(the memory after `latent`, what each layer chose in its clean pass)."""
    spec = denoiser.cfg.memory
    now = layouts.layout(spec.cache, memory.progress)
    following = layouts.layout(spec.cache, memory.progress.after_block())
    seen: PerLayer[Layout] = layouts.first_to_write(spec.cache, now, spec.layers)
    if not isinstance(memory.layers, list):
        seen = pytrees.stack(seen)

    def keep_full(own: KV, whole: KV, past: Any) -> Any:
        layer, choice, layout = past
        layer = dataclasses.replace(layer, view=whole)
        return cache.keep_unrotated(spec, now, layer, own.k), choice, layout

    def keep_packed(own: KV, whole: KV, past: Any) -> tuple[LayerCache, Choice]:
        layer, choice, _ = past
        layer = dataclasses.replace(layer, view=whole)
        return cache.finish_layer(spec, now, following, layer, own, None), choice

    reads = Access(
        view_of=lambda past: past[0].view,
        keep=keep_full,
        writes=True,
        attends=committing,
        layout_of=(lambda past: past[2]) if spec.cache.registry == "shared" else None,
    )
    unmade = before_choosing(spec, now, memory, len(latent))
    past = pytrees.zipped(memory.layers, unmade, seen)
    past = block_step.read_clean(denoiser, now, latent, past, reads)
    packs = dataclasses.replace(
        reads, keep=keep_packed, attends=lambda cfg, layout, attention_fn: attention_fn
    )
    outputs = block_step.read_packed(denoiser, now, latent, low_res, past, packs)
    layers, choices = pytrees.unzip(outputs)
    memory = dataclasses.replace(memory, layers=layers)
    return cache.advanced(spec, memory, latent), choices


def choosing(cfg: StepConfig, layout: Layout, attention_fn: SelfAttention) -> SelfAttention:
    """`attend` in a view recalled anew; keeps the layer with it, and the choice in the place of the one before."""

    def self_attention(q: Heads, k: Heads, v: Heads, past: Any) -> tuple[Heads, Any]:
        layer, _ = past
        recalled, choice = _recalled(cfg, layout, layer, q)
        mixed, whole = attention_fn(q, k, v, recalled)
        return mixed, (dataclasses.replace(layer, view=whole), choice)

    return self_attention


def committing(cfg: StepConfig, layout: Layout, attention_fn: SelfAttention) -> SelfAttention:
    """`choosing` that leaves to the pass what is kept of (layer, choice, what the layer sees)."""

    def self_attention(q: Heads, k: Heads, v: Heads, past: Any) -> tuple[Heads, Any]:
        layer, _, seen = past
        recalled, choice = _recalled(cfg, layout, layer, q)
        layer = dataclasses.replace(layer, view=recalled)
        mixed, (layer, choice, seen) = attention_fn(q, k, v, (layer, choice, seen))
        total = view.sum_queries(cfg.memory, q)
        return mixed, (cache.keep_queries(layout, layer, total), choice, seen)

    return self_attention


def _recalled(cfg: StepConfig, layout: Layout, layer: LayerCache, q: Heads) -> tuple[KV, Choice]:
    """The layer's view with the packed blocks that its queries choose, and that choice; none is left to chance."""
    spec = cfg.memory
    no_random = jnp.zeros((q.shape[0], cfg.cache.slots))
    queries = view.pool_queries(spec, layout, q)
    scores = view.score(spec, layout, layer, queries, no_random)
    recalled, selection = view.recall_best(spec, layout, layer, scores)
    return recalled, Choice(selection, scores)


def before_choosing(
    spec: MemorySpec, layout: Layout, memory: Memory, batch: int
) -> PerLayer[Choice]:
    """Something of a choice's shape for each layer, before any is made."""
    nothing = Choice(view.newest(spec, layout, batch), jnp.zeros((batch, spec.cache.slots)))
    return pytrees.over(lambda _: nothing, memory.layers)
