"""What may be asked of a model: how long a video, whose noise, and what a new prompt does to its memory."""

import hashlib
import numbers
from collections.abc import Mapping

import jax
import numpy as np

from packforcing_jax.config import Experiment
from packforcing_jax.config.choices import AT_PROMPT_CHANGE, KEEPS_TOKENS
from packforcing_jax.errors import require, shown
from packforcing_jax.methods.method import Method
from packforcing_jax.networks import codec, tokenizer
from packforcing_jax.sampling import timelines
from packforcing_jax.sampling.player import State

SHOWN_HEIGHT = 384  # small videos are enlarged to about this many pixels


def video_id(prompt: str) -> int:
    """The id that decides a video's noise unless one is given: a hash of its first prompt."""
    return int.from_bytes(hashlib.sha256(tokenizer.clean(prompt).encode()).digest()[:4], "big")


def blocks_of(exp: Experiment, seconds: float) -> int:
    """Blocks that make a video of `seconds`; frames that do not fill a last latent are not asked for."""
    _require_seconds(seconds)
    latents = codec.latents_of(exp.codec, int(np.ceil(seconds * exp.fps)))
    blocks = max(1, -(-latents // exp.cache.block))
    require_blocks(blocks, f"seconds={seconds} is {blocks:,} blocks")
    return blocks


def _require_seconds(seconds: float) -> None:
    require(
        0 < seconds <= timelines.MOST_SECONDS,
        f"seconds={shown(seconds)} is not a length; give a number above 0, {timelines.MOST_SECONDS:,} at most.",
    )


def shown_size(exp: Experiment) -> tuple[tuple[int, int], int]:
    """(width, height) of a video's frames in pixels, and how many times as large they are shown."""
    factor = exp.codec.space_factor
    width, height = exp.latent[1] * factor, exp.latent[0] * factor
    return (width, height), max(1, SHOWN_HEIGHT // height)


def require_blocks(blocks: int, said: str) -> None:
    """Raises `InputError` unless `blocks` is a length; `said` is what the user gave for it."""
    require(
        0 < blocks <= timelines.MOST_BLOCKS,
        f"{said}, which is not a length; give 1 to {timelines.MOST_BLOCKS:,} blocks.",
    )


def require_number(what: str, value: object) -> None:
    """Raises `InputError` unless `value` is a whole number of 32 bits, as noise is drawn from."""
    fits = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    require(
        fits and 0 <= int(value) < 2**32,  # type: ignore[arg-type]
        f"{what}={shown(value)} must be a whole number from 0 to {2**32 - 1}; give such a one.",
    )


def require_length(method: Method, exp: Experiment, blocks: int) -> None:
    """Raises `InputError` for more blocks than a method of one clip makes, or fewer than its window has."""
    window = exp.clip if method.whole_clip else exp.cache.full_frames
    together = exp.cache.window // exp.cache.block
    require(
        not exp.cache.joint or blocks >= together,
        f"method {method.name} denoises {together} blocks together, one for each step, and {blocks} were asked for; "
        f"ask for at least {together}.",
    )
    require(
        not (method.one_clip or method.whole_clip) or blocks * exp.cache.block <= window,
        f"method {method.name} makes one clip of {window} frames, and {blocks} blocks of {exp.cache.block} were asked "
        f"for; ask for at most {window // exp.cache.block}, or take a method and weights for longer videos, such as "
        "self-forcing.",
    )


def require_room(method: Method, exp: Experiment, blocks: int) -> None:
    """Raises `InputError` if a video of so many blocks is longer than the window of a method that never leaves it."""
    room = exp.cache.full_frames // exp.cache.block
    remedy = (
        f"make the session with room for it: pipeline.for_length({blocks}).session(...)"
        if method.unbounded
        else "take a method and weights for longer videos, such as self-forcing"
    )
    require(
        not (method.one_clip or method.unbounded) or blocks <= room,
        f"method {method.name} has room for {room} blocks here, and block {blocks - 1} is behind them; {remedy}.",
    )


def require_not_used_up(state: State) -> None:
    """Raises `InputError` for a state that a block was drawn behind."""
    require(
        not any(
            isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(state)
        ),
        "this state was used up by the block that was drawn behind it; go on from the newest block's, or keep a "
        "copy: jax.tree.map(np.array, block.state).",
    )


def further_blocks(exp: Experiment, seconds: float, position: int) -> int:
    """Blocks that make a video `seconds` longer that has `position` of them."""
    if position == 0:
        return blocks_of(exp, seconds)
    frames = exp.cache.block * exp.codec.time_factor
    _require_seconds(seconds)
    return max(1, -(-int(np.ceil(seconds * exp.fps)) // frames))


def check_changes(exp: Experiment, changes: Mapping[int, str]) -> None:
    """Raises `InputError` for something that a new prompt cannot do to the memory."""
    for block, how in changes.items():
        require(
            how in AT_PROMPT_CHANGE,
            f"block {block}: {how!r} is nothing a new prompt can do to the memory; choose one of "
            f"{', '.join(AT_PROMPT_CHANGE)}.",
        )
        require(
            exp.cache.budget == 0 or how in KEEPS_TOKENS,
            f"block {block}: {how!r} takes whole frames out of the memory, and method {exp.method} has kept single "
            f"tokens of them; choose one of {', '.join(KEEPS_TOKENS)}.",
        )
