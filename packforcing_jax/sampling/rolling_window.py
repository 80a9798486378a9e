"""Blocks denoised together in a rolling window, each one step cleaner than the one behind it (Rolling Forcing).

A window of as many blocks as there are denoising steps moves over the video block by block (arXiv 2509.25161 sec. 3.3).
Every pass takes each of its blocks one step further and finishes the first. It fills up at the beginning of a video
and runs empty at the end of one.
"""

import functools
from collections.abc import Callable
from typing import TypeAlias

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Int

from packforcing_jax.config import StepConfig
from packforcing_jax.errors import require
from packforcing_jax.memory.cache import Memory
from packforcing_jax.sampling import block_step, schedules
from packforcing_jax.sampling.block_step import Denoiser
from packforcing_jax.types import Latent


@struct.dataclass
class Window:
    """The blocks from the next one on, as they go into the next pass."""

    noisy: Array  # [b, window, y, x, c]
    step: Int[Array, ""]  # that the first block is at; each later one is a step behind
    begun: Int[Array, ""]  # blocks that have been in a pass already


Pass: TypeAlias = Callable[[Memory, Window, Array | np.int32], tuple[Latent, Window]]
Who: TypeAlias = tuple[Array, Array]  # seeds and video ids [b]
Fresh: TypeAlias = Callable[
    [Array, Array], Array
]  # noise [block, b, t, y, x, c] of blocks for their steps


def size(cfg: StepConfig) -> int:
    """Blocks of a window, one for each denoising step."""
    return cfg.cache.window // cfg.cache.block


def start(cfg: StepConfig, fresh: Fresh, first: Array | int = 0) -> Window:
    """The window before the first pass of a video, or of its blocks from `first` on where those before are given."""
    blocks = first + jnp.arange(size(cfg))
    return Window(
        noisy=_together(fresh(blocks, jnp.zeros_like(blocks))),
        step=jnp.int32(0),
        begun=jnp.int32(0),
    )


def denoise(
    cfg: StepConfig, memory: Memory, window: Window, one_pass: Pass, left: int | None
) -> tuple[Latent, Window]:
    """The next block [b, t, y, x, c], and the window behind it.

    `left` counts the blocks from this one to the video's last one, None for a video without an end. Raises
    `InputError` for a video that has ended.
    """
    whole = size(cfg)
    left = whole if left is None else left
    begun = int(window.begun)
    require(
        begun >= min(left, whole) - 1 or int(window.step) < whole - 1,
        f"this video was ended with block {int(memory.num_blocks) + begun - 1}: the last blocks of a rolling window "
        "are made as the last ones; draw a longer video from its beginning.",
    )
    for step in range(int(window.step), whole - 1):
        _, window = one_pass(memory, window, np.int32(min(step + 1, left)))
    clean, window = one_pass(memory, window, np.int32(min(whole, left)))
    return clean[:, : cfg.cache.block], window


@jax.jit
def pass_program(
    denoiser: Denoiser, who: Who, memory: Memory, window: Window, blocks: Array | np.int32
) -> tuple[Latent, Window]:
    """`advance` with the noise of (seed, video, block, step)."""
    return advance(denoiser.computed(), memory, window, drawn(denoiser.cfg, *who), blocks)


def advance(
    denoiser: Denoiser, memory: Memory, window: Window, fresh: Fresh, blocks: Array | np.int32
) -> tuple[Latent, Window]:
    """(the clean predictions [b, window, y, x, c], the window behind them) after one pass over its first `blocks`."""
    cfg = denoiser.cfg
    last = size(cfg) - 1
    levels = block_step.noise_levels(cfg.sample)
    per_frame = jnp.repeat(_steps(cfg, window.step), cfg.cache.block)
    clean = block_step.denoise_jointly(denoiser, memory, window.noisy, levels[per_frame], blocks)

    moves = (window.step == last).astype(jnp.int32)  # its first block is finished
    following = jnp.minimum(window.step + 1, last)
    by_block = einops.rearrange(clean, "b (block t) ... -> block b t ...", t=cfg.cache.block)
    by_block = jnp.where(moves, jnp.roll(by_block, -1, axis=0), by_block)
    steps = _steps(cfg, following)
    noise = fresh(memory.num_blocks + moves + jnp.arange(size(cfg)), steps)
    noisy = schedules.add_noise(by_block, noise, levels.sigma[steps])
    noisy = jnp.where(schedules.over(steps == 0, noise), noise, noisy)
    return clean, Window(noisy=_together(noisy), step=following, begun=blocks - moves)


def _steps(cfg: StepConfig, first: Array) -> Int[Array, " block"]:
    """The step that each block of a window is at, the first at step `first`; 0 for those that have not begun."""
    return jnp.maximum(first - jnp.arange(size(cfg)), 0)


def drawn(cfg: StepConfig, seeds: Array, videos: Array) -> Fresh:
    """The noise of (seed, video, block, step)."""
    return functools.partial(block_step.noise_of_blocks, cfg, seeds, videos)


def _together(by_block: Array) -> Latent:
    return einops.rearrange(by_block, "block b t ... -> b (block t) ...")
