"""A block of video behind single tokens of the past (Deep Forcing's participative compression, arXiv 2512.05081).

The queries of its first step, and those of the passes before, decide which tokens of a full window stay. The later
steps and the commit see what is left.
"""

import dataclasses
from typing import Any

from packforcing_jax.config import StepConfig
from packforcing_jax.memory import cache, tokens
from packforcing_jax.memory import layout as layouts
from packforcing_jax.memory.cache import LayerCache, Memory
from packforcing_jax.memory.layout import Layout, Progress
from packforcing_jax.networks.dit import SelfAttention
from packforcing_jax.sampling import block_step
from packforcing_jax.sampling.block_step import Access, Denoised, Denoiser, Noise
from packforcing_jax.types import KV, Heads, Latent


def denoise_block(denoiser: Denoiser, memory: Memory, noise: Noise) -> tuple[Memory, Denoised]:
    """The next block, denoised in a few steps, and the memory with the tokens that it left.

    `Denoised.selection` says what each layer chose from (`tokens.Chosen`).
    """
    layout = layouts.layout(denoiser.cfg.cache, memory.progress)
    first = opening(denoiser, layout, memory.progress)
    clean, outputs = block_step.first_step(denoiser, layout, noise, memory.layers, first)
    layers = [layer for layer, _ in outputs]
    latent, layers, predictions = block_step.later_steps(
        denoiser, layout, noise, clean, layers, _behind(denoiser, layout)
    )
    memory = dataclasses.replace(memory, layers=layers)
    return memory, Denoised(latent, [chosen for _, chosen in outputs], predictions)


def opening(denoiser: Denoiser, layout: Layout, progress: Progress) -> Access:
    """The first pass of a block, whose queries compress the window if that is due; keeps (layer, what it chose)."""
    now = layouts.compression(denoiser.cfg.cache, progress)

    def choosing(cfg: StepConfig, layout: Layout, attention_fn: SelfAttention) -> SelfAttention:
        def self_attention(q: Heads, k: Heads, v: Heads, past: LayerCache) -> tuple[Heads, Any]:
            asked = tokens.asked(cfg.memory, layout, past, q)
            layer, chosen = tokens.compressed(cfg.memory, layout, now, asked)
            mixed, layer = attention_fn(q, k, v, layer)
            return mixed, (layer, chosen)

        return self_attention

    return dataclasses.replace(_behind(denoiser, layout), attends=choosing)


def commit_block(
    denoiser: Denoiser, memory: Memory, latent: Latent, low_res: Any = None, selection: Any = None
) -> tuple[Memory, None]:
    """The memory after `latent`, which was denoised, or is given in its place; nothing is packed."""
    spec = denoiser.cfg.memory
    now = layouts.layout(spec.cache, memory.progress)
    following = layouts.layout(spec.cache, memory.progress.after_block())

    def keep(own: KV, whole: KV, layer: LayerCache) -> LayerCache:
        layer = dataclasses.replace(layer, view=whole)
        return tokens.committed(spec, now, following, layer, own.k)

    writes = dataclasses.replace(_behind(denoiser, now), keep=keep, writes=True)
    layers = block_step.read_clean(denoiser, now, latent, memory.layers, writes)
    return cache.advanced(spec, dataclasses.replace(memory, layers=layers), latent), None


def _behind(denoiser: Denoiser, layout: Layout) -> Access:
    """A pass of a block that lies behind all tokens it sees, and whose queries are kept."""
    at = tokens.end(denoiser.cfg.memory, layout)
    return Access(
        view_of=lambda layer: layer.view,
        keep=lambda own, whole, layer: dataclasses.replace(layer, view=whole),
        write=lambda view, own: cache.extend(view, own, at),
        attends=asking,
    )


def asking(cfg: StepConfig, layout: Layout, attention_fn: SelfAttention) -> SelfAttention:
    """`attend` that also keeps the block's queries."""

    def self_attention(q: Heads, k: Heads, v: Heads, past: LayerCache) -> tuple[Heads, Any]:
        return attention_fn(q, k, v, tokens.asked(cfg.memory, layout, past, q))

    return self_attention
