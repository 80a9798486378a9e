"""Finished blocks, as they are handed out: what was asked for, what came out, and what it looked back at."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from packforcing_jax.memory.layout import Progress
from packforcing_jax.sampling import player
from packforcing_jax.sampling.player import State

COUNTS = (
    "sink",
    "recent",
    "num_selected",
    "step",
    "sink_position",
    "mid_position",
    "recent_position",
    "current_position",
)


@dataclass(frozen=True)
class Finished:
    """One finished block of one video: its place, what was asked for, what came out, and what it looked back at.

    A block of a clip that was denoised as a whole looked back at nothing and leaves no state.
    """

    index: int
    prompt: str
    frames: np.ndarray  # [t, height, width, 3] in [-1, 1]
    latent: np.ndarray  # [t, y, x, c]
    block_ids: (
        np.ndarray
    )  # [layer, top] packed blocks each layer attended to, in time order, -1 where fewer exist
    scores: np.ndarray  # [layer, top] by which it chose them
    positions: np.ndarray  # [layer, top] position in time of the first frame of each
    layout: Mapping[
        str, float
    ]  # counts and positions of the other partitions: fields of `Layout`, and `block`
    sink_sum: int  # checksum of the sink; its keys do not count when they move
    state: State | None  # after this block; used up when the next one is made

    @property
    def latent_hash(self) -> str:
        """The SHA-256 of the bytes of the latent."""
        return hashlib.sha256(np.ascontiguousarray(self.latent).tobytes()).hexdigest()


def of_batch(
    model: player.Model,
    index: int,
    prompts: tuple[str, ...],
    block: player.Block,
    moment: tuple[Progress, State],
) -> tuple[Finished, ...]:
    """The block of every video of a batch; `moment` is where the memory stood before it, and the state after it."""
    before, state = moment
    exp = model.experiment
    layout = player.layout_program(exp.cache, before)
    names = (*COUNTS, "chosen") if exp.cache.budget else COUNTS
    counts = {name: np.asarray(getattr(layout, name)).item() for name in names}
    selections: Any = block.selection  # layers one by one
    chosen = {
        name: np.stack([np.asarray(getattr(one, name)) for one in selections], axis=1)
        for name in ("ids", "scores", "positions")
    }
    sums = np.asarray(player.sink_sums(exp.memory, state.memory))
    frames = np.asarray(block.frames)
    latent = np.asarray(block.latent)
    return tuple(
        Finished(
            index=index,
            prompt=prompt,
            frames=frames[video],
            latent=latent[video],
            block_ids=chosen["ids"][video],
            scores=chosen["scores"][video],
            positions=chosen["positions"][video],
            state=state,
            layout={"block": exp.cache.block} | counts,
            sink_sum=int(sums[video]),
        )
        for video, prompt in enumerate(prompts)
    )
