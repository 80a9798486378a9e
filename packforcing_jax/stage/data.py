"""Endless training clips of the stage, as a Grain data set whose every clip is a function of (seed, index)."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

from packforcing_jax.errors import require
from packforcing_jax.stage import captions, world

CLIPS = 2**40  # more than any training run reads
QUIET = 0.4  # chance that a block without a planned call-back has no guest

Encode = Callable[
    [list[str]], tuple[np.ndarray, np.ndarray]
]  # sentences -> ids and mask, [sentences, MAX_WORDS]


def draw_clip(
    rng: np.random.Generator,
    *,
    blocks: int = 5,
    callback: float = 0.87,
    distractor: float = 0.8,
    scene_change: float = 0.85,
) -> world.Story:
    """A story whose last block mostly calls back a guest, and often a scene, that other blocks have since hidden."""
    require(blocks >= 3, f"blocks={blocks} leaves no room for a call-back; use 3 or more.")
    called = rng.random() < callback
    changed = rng.random() < scene_change
    return world.draw_story(
        rng,
        blocks,
        guests=_call_back(rng, blocks, len(world.GUESTS), distractor)
        if called
        else _passers_by(rng, blocks),
        scenes=_call_back(rng, blocks, len(world.SCENES)) if changed else _constant(rng, blocks),
    )


def _call_back(
    rng: np.random.Generator, blocks: int, kinds: int, others: float = 1.0
) -> Int[np.ndarray, " blocks"]:
    """One kind early and again in the last block; in between another kind with chance `others`, else -1."""
    kind = rng.integers(kinds)
    another = (kind + rng.integers(1, kinds, size=blocks)) % kinds
    timeline = np.where(rng.random(blocks) < others, another, -1)
    timeline[[rng.integers(blocks - 2), -1]] = kind
    return timeline


def _passers_by(rng: np.random.Generator, blocks: int) -> Int[np.ndarray, " blocks"]:
    """Guests without a plan."""
    return np.where(rng.random(blocks) < QUIET, -1, rng.integers(len(world.GUESTS), size=blocks))


def _constant(rng: np.random.Generator, blocks: int) -> Int[np.ndarray, " blocks"]:
    """One scene throughout."""
    return np.full(blocks, rng.integers(len(world.SCENES)))


def appeared_before(guests: Int[np.ndarray, " blocks"]) -> Bool[np.ndarray, " blocks"]:
    """Whether the guest of each block was on stage in an earlier one."""
    earlier = np.tril(guests[:, None] == guests, k=-1).any(axis=1)
    return earlier & (guests >= 0)


def entering(timeline: Int[np.ndarray, " blocks"]) -> Bool[np.ndarray, " blocks"]:
    """Whether each block shows a guest or scene that the block before did not; -1 stands for nobody."""
    return (timeline >= 0) & (timeline != np.append(-1, timeline[:-1]))


def loss_weight(story: world.Story) -> Float[np.ndarray, "blocks block 32 32"]:
    """How much each pixel counts in training: 4 where a guest or scene is called back, 1/4 where it is first seen.

    A first appearance cannot be foretold, a call-back can; all else counts 1.
    """
    weight = np.ones((len(story.guests), world.BLOCK, world.SIZE, world.SIZE), np.float32)
    for timeline, cell in ((story.guests, world.GUEST_CELL), (story.scenes, world.POSTER_CELL)):
        value = np.where(entering(timeline), np.where(appeared_before(timeline), 4.0, 0.25), 1.0)
        weight[:, :, *world.cell(*cell)] = value[:, None, None, None]
    return weight


def called_back(story: world.Story) -> Bool[np.ndarray, "blocks 2 blocks"]:
    """For each block, the earlier ones that show the guest (kind 0) or scene (kind 1) it calls onto the stage again."""
    kinds = (story.guests, story.scenes)
    return np.stack(
        [
            np.tril(timeline[:, None] == timeline, k=-1) & entering(timeline)[:, None]
            for timeline in kinds
        ],
        axis=1,
    )


def clip(seed: int, index: int, encode: Encode) -> dict[str, np.ndarray]:
    """One training clip: pixels, text, and what the scores of training need to know."""
    story = draw_clip(np.random.default_rng((seed, index)))
    ids, mask = encode([captions.caption(story, block) for block in range(len(story.guests))])
    return {
        "video": world.render(story),
        "ids": np.asarray(ids, np.int32),
        "mask": np.asarray(mask, np.int32),
        "guests": story.guests.astype(np.int32),
        "scenes": story.scenes.astype(np.int32),
        "recalled": appeared_before(story.guests),
        "columns": story.columns.astype(np.int32),
        "weight": loss_weight(story),
        "called": called_back(story),
    }


def remembering(encode: Encode) -> Encode:
    """The same encoder, asked only once for every sentence."""
    known: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def lookup(sentences: list[str]) -> tuple[np.ndarray, np.ndarray]:
        new = [sentence for sentence in dict.fromkeys(sentences) if sentence not in known]
        if new:
            known.update(zip(new, zip(*map(np.asarray, encode(new)), strict=True), strict=True))
        ids, mask = zip(*(known[sentence] for sentence in sentences), strict=True)
        return np.stack(ids), np.stack(mask)

    return lookup
