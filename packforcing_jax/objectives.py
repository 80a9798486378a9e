"""What training minimises. One objective, one function, on the very parts that sampling runs."""

import dataclasses

import einops
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int

from packforcing_jax import cache, dit, sampler, schedules, text
from packforcing_jax.config import Experiment
from packforcing_jax.types import KV


@struct.dataclass
class Model:
    """Everything that is trained: the transformer and its compressor, and the text encoder."""

    nets: sampler.Nets
    text: text.UMT5


@struct.dataclass
class Clips:
    """Encoded clips, `block` latent frames at a time; `weight` scales the loss of each latent cell."""

    latent: Array  # [block, b, t, y, x, c]
    low: Array  # [block, b, t', y', x', c]  low-resolution latents of the same frames
    ids: Array  # [block, b, words]
    mask: Array  # [block, b, words]
    weight: Array  # [block, b, t, y, x, 1]
    called: Array  # [block, b, kind, block]  earlier blocks that show what this one calls back, by kind


def for_training(exp: Experiment, blocks: int, sink: int) -> Experiment:
    """`exp` with a memory for clips of `blocks` blocks: `sink` frames, every packed block attended."""
    held = max(blocks - (sink + exp.cache.recent) // exp.cache.block, 1)
    smaller = dataclasses.replace(exp.cache, sink=sink, top=held, capacity=held, selection="all", span="true",
                                  scope="layer", timing="first", archive="device")  # fmt: skip
    return dataclasses.replace(exp, cache=smaller)


def text_states(model: Model, clips: Clips) -> KV:
    """Cross-attention keys and values of every block's prompt, [block, layer, b, words, n, h]."""
    flat = [einops.rearrange(x, "block b words -> (block b) words") for x in (clips.ids, clips.mask)]
    kv = dit.text_kv(model.nets.dit, text.encode(model.text, *flat))
    split = [einops.rearrange(x, "layer (block b) words n h -> block layer b words n h", b=clips.ids.shape[1])
             for x in (kv.k, kv.v)]  # fmt: skip
    return KV(*split)


def noise_levels(key: Array, shape: tuple[int, ...], shift: float) -> Float[Array, "block b"]:
    """Sigmas of uniform draws warped towards noise: s u / (1 + (s - 1) u)."""
    u = jax.random.uniform(key, shape)
    return shift * u / (1 + (shift - 1) * u)


def teacher_forcing(model: Model, clips: Clips, key: Array, exp: Experiment) -> tuple[Array, tuple[Array, Array]]:
    """(loss, (denoising, matching) loss of each block): blocks are guessed from noise behind the true ones before.

    The memory is filled as sampling fills it: a clean pass and a packing pass per block, then `commit`. Gradients
    flow through what is stored, so the compressor learns from the blocks that come later.
    """
    keys = jax.random.split(key, 4)
    levels = noise_levels(keys[0], clips.latent.shape[:2], exp.train.shift)
    noise = jax.random.normal(keys[1], clips.latent.shape)
    jitter = jax.random.uniform(keys[2], maxval=exp.train.gap)
    gap = jnp.where(jax.random.uniform(keys[3]) < exp.train.gap_share, jitter, 0.0)
    nets, batch = model.nets, clips.latent.shape[1]
    lots = jnp.zeros((exp.dit.layers, batch, exp.cache.slots))  # every packed block is attended

    def one_block(memory: cache.Memory, inputs) -> tuple[cache.Memory, tuple[Array, Array]]:
        latent, low, weight, called, fresh, sigma, words = inputs
        seen = cache.plan(exp.cache, memory.num_blocks, gap)
        noisy = schedules.add_noise(latent, fresh, sigma)
        clean, (views, looked, scores) = sampler.guess(nets, exp, seen, noisy, 1000 * sigma, sigma, words,
                                                       (memory.layers, lots), look=sampler.watching_look)  # fmt: skip
        loss = jnp.mean(weight * (clean - latent) ** 2)
        full, views = sampler.read_clean(nets, exp, seen, latent, words, views)
        packed, _ = sampler.read_packed(nets, exp, seen, latent, low, words, views)
        return cache.commit(exp, memory, full, packed, looked), (loss, matching(scores[-1], seen.ids, called))

    xs = (clips.latent, clips.low, clips.weight, clips.called, noise, levels, text_states(model, clips))
    _, (losses, missed) = jax.lax.scan(one_block, cache.init(exp, batch, stacked=True), xs)
    return losses.mean() + exp.train.matching * missed.mean(), (losses, missed)


def matching(scores: Float[Array, "b slot"], ids: Int[Array, " slot"],
             called: Bool[Array, "b kind block"]) -> Array:  # fmt: skip
    """-log(share of the affinity that the called-back blocks get), 0 where none is packed: mean over videos and kinds.

    Hard selection gives a score no gradient; this does. `ids` says which block is in which slot.
    """
    there = ids >= 0
    right = called[:, :, jnp.maximum(ids, 0)] & there[None, None]
    share = jnp.where(there[None], scores, 0.0) + 1e-12
    found = jnp.where(right, share[:, None], 0.0).sum(-1)
    asked = right.any(-1)
    surprise = -jnp.log(jnp.where(asked, found, 1.0) / jnp.where(asked, share.sum(-1)[:, None], 1.0))
    return surprise.mean()
