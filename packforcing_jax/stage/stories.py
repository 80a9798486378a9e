"""The story of a default stage video: one subject throughout, guests and scenes that leave and are called back."""

import numpy as np
from jaxtyping import Int

from packforcing_jax.errors import require
from packforcing_jax.stage import captions, world

GAPS = (
    100,
    64,
    32,
    16,
    8,
    4,
    2,
)  # blocks between two visits of a guest; each leads the visits of one guest
OPENING = 2  # blocks before the first guest, so that a memory's first frames show none
CHAPTER = 120  # blocks planned together, so that what follows never changes what was
SCENE_BLOCKS = (6, 13)  # a scene lasts from 6 to 12 blocks


def default_timeline(seed: int, blocks: int) -> list[str]:
    """One caption per block: a longer story begins with the shorter one; about 40 % of blocks have a guest."""
    require(blocks > 0, f"blocks={blocks} is not a length; give 1 or more.")
    chapters = [np.random.default_rng((seed, chapter)) for chapter in range(-(-blocks // CHAPTER))]
    cast = {
        "guests": np.concatenate([guests(rng, CHAPTER) for rng in chapters])[:blocks],
        "scenes": np.concatenate([scenes(rng, CHAPTER) for rng in chapters])[:blocks],
    }
    story = world.draw_story(np.random.default_rng(seed), blocks, **cast)
    return [captions.caption(story, block) for block in range(blocks)]


def guests(rng: np.random.Generator, blocks: int) -> Int[np.ndarray, " blocks"]:
    """Who visits each block, -1 for nobody: every guest comes back after a mix of gaps, one of them its leading gap."""
    timeline = np.full(blocks, -1)
    for guest, lead in zip(rng.permutation(len(world.GUESTS)), (*GAPS, GAPS[1]), strict=True):
        start = _free(
            timeline, OPENING + int(rng.integers(max(1, min(blocks // 6, blocks - lead - OPENING))))
        )
        others = rng.permutation([gap for gap in GAPS if gap != lead])
        visits = [start, *_returns(timeline, start, [lead, *others])]
        if len(visits) > 1:
            timeline[visits] = guest
    return timeline


def _returns(timeline: Int[np.ndarray, " blocks"], last: int, gaps: list[int]) -> list[int]:
    """Later visits, each a gap after the one before where that block exists, or the next one without a guest."""
    returns = []
    for gap in gaps:
        block = _free(timeline, last + gap)
        if block < len(timeline):
            returns.append(block)
            last = block
    return returns


def _free(timeline: Int[np.ndarray, " blocks"], block: int) -> int:
    """The first block from `block` on without a guest; possibly one behind the end."""
    taken = np.flatnonzero(timeline >= 0)
    while block in taken:
        block += 1
    return block


def scenes(rng: np.random.Generator, blocks: int) -> Int[np.ndarray, " blocks"]:
    """The scene of each block: every scene once in every round of a new order, never twice in a row."""
    timeline: list[int] = []
    order: list[int] = []
    while len(timeline) < blocks:
        if not order:
            order = rng.permutation(len(world.SCENES)).tolist()
            if timeline and order[0] == timeline[-1]:
                order.reverse()
        timeline += [order.pop(0)] * int(rng.integers(*SCENE_BLOCKS))
    return np.array(timeline[:blocks])
