"""Recall after a true history: guests shown once are called back, and packed blocks are chosen by every known variant.

One history serves all gaps and all variants, so that they are compared on the same videos: four guests are shown once,
each at its own distance from the end, and the last block is drawn once for each of them and each variant.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from packforcing_jax import pytrees
from packforcing_jax.config import CacheConfig, Experiment, MemorySpec
from packforcing_jax.errors import nearest, require
from packforcing_jax.evaluation import stage_figures
from packforcing_jax.evaluation.stage_figures import Row, Sampling
from packforcing_jax.memory import cache
from packforcing_jax.memory import layout as layouts
from packforcing_jax.memory.cache import Memory
from packforcing_jax.networks import codec
from packforcing_jax.policies import selection
from packforcing_jax.sampling import player
from packforcing_jax.sampling.pipeline import Pipeline
from packforcing_jax.sampling.player import State
from packforcing_jax.stage import captions, metrics, oracle, world
from packforcing_jax.types import KV

OPENING = 2  # blocks before the first guest: the shipped sink
CALLED = 4  # guests that are called back; the others pass by
Variant: TypeAlias = dict[str, str]  # how packed blocks are chosen: fields of `CacheConfig`
VARIANTS: dict[str, Variant] = {
    **{
        name: {"selection": name}
        for name, score in selection.SCORES.items()
        if not score.attends_all
    },
    **{
        f"{name}-shared": {"selection": name, "scope": "shared"}
        for name in ("affinity", "paper_sum", "paper")
    },
    "affinity-late": {"selection": "affinity", "timing": "late"},
    "affinity-shared-late": {"selection": "affinity", "scope": "shared", "timing": "late"},
    "all-true": {"selection": "all", "span": "true"},
    "all-fit": {"selection": "all", "span": "fit"},
}


def variants_of(listed: str) -> dict[str, Variant]:
    """The rows of `VARIANTS` that `A,B` names, or every one."""
    names = list(VARIANTS) if listed == "every" else listed.split(",")
    for name in names:
        require(
            name in VARIANTS,
            f"--ways {name}: no such way to choose; {nearest(name, [*VARIANTS, 'every'])}",
        )
    return {name: VARIANTS[name] for name in names}


def changed(exp: Experiment, variant: Variant) -> Experiment:
    """`exp` with packed blocks chosen by this variant."""
    cfg = exp.cache
    return dataclasses.replace(
        exp, cache=dataclasses.replace(cfg, **({"max_position": fitted_range(cfg)} | variant))
    )


def fitted_range(cfg: CacheConfig) -> int:
    """Positions that a fitted span squeezes all packed blocks into: its own, or as many as the best `top` take."""
    return (
        cfg.max_position if cfg.span == "fit" else cfg.sink + (cfg.top + 1) * cfg.block + cfg.recent
    )


def with_variant(model: Pipeline, variant: Variant) -> Pipeline:
    """The same model with packed blocks chosen by this variant."""
    return dataclasses.replace(model, experiment=changed(model.experiment, variant))


def forced(
    model: Pipeline,
    variants: dict[str, Variant],
    *,
    gaps: Sequence[int] = (8, 32, 64, 110),
    videos: int = 96,
    sampling: Sampling = Sampling(batch=32),
) -> dict:
    """For each gap and variant: is the called guest's block among the chosen ones, and is its mark back?

    The history is committed behind the newest blocks, so that no variant has a hand in it.
    """
    stage_figures.require_stage(model.experiment)
    require(
        0 < len(set(gaps)) == len(gaps) <= CALLED and min(gaps) > 1,
        f"gaps={tuple(gaps)} must be one to {CALLED} different numbers above 1.",
    )
    cfg = model.experiment.cache
    require(
        cfg.top > 0,
        f"cache.top={cfg.top} attends to no packed block, so that no way to choose them differs; set it to 1 or more.",
    )
    seed = sampling.seed
    stories = [forced_story(np.random.default_rng((seed, i)), gaps) for i in range(videos)]
    outcomes = {(gap, variant): [] for gap in gaps for variant in variants}
    filled = _asking(model, variants.values())
    for part in sampling.chunks(videos):
        group = [stories[i] for i in part]
        state = history(filled, group, seed=seed, videos=part)
        for gap, variant in outcomes:
            outcomes[gap, variant].append(answers(model, variants[variant], state, group, gap))
    last = len(stories[0].guests) - 1
    archived = int(np.count_nonzero(layouts.layout(cfg, layouts.begin(last)).ids >= 0))
    sections = {
        f"gap of {gap} blocks, {archived} in the archive": {
            f"{variant}: {what}": row
            for variant in variants
            for what, row in figures(
                changed(model.experiment, variants[variant]), archived, outcomes[gap, variant]
            ).items()
        }
        for gap in gaps
    }
    return {"mode": "forced", "videos": videos, "seed": seed, "sections": sections}


def _asking(model: Pipeline, variants: Iterable[Variant]) -> Pipeline:
    """The same model with the score of a variant that asks recent blocks, if one does."""
    models = [with_variant(model, {"selection": variant["selection"]}) for variant in variants]
    return next((one for one in models if one.experiment.cache.asking_blocks), model)


def forced_story(rng: np.random.Generator, gaps: Sequence[int]) -> world.Story:
    """One guest for each gap, shown once, that many blocks before the last; others pass by in half of the blocks.

    The guests called back are the first of `order`, which the story's `guests` begin with.
    """
    blocks = OPENING + max(gaps) + 1
    order = rng.permutation(len(world.GUESTS))
    guests = np.where(rng.random(blocks) < 0.5, rng.choice(order[CALLED:], size=blocks), -1)
    guests[:OPENING] = -1
    for guest, gap in zip(order, gaps):
        guests[blocks - 1 - gap] = guest
    return world.draw_story(
        rng, blocks, guests=guests, scenes=np.full(blocks, rng.integers(len(world.SCENES)))
    )


def history(
    model: Pipeline, stories: Sequence[world.Story], *, seed: int, videos: Sequence[int]
) -> State:
    """The state before the last block, its memory filled with the stories' own frames.

    With the queries of recent blocks where the model's own selection asks them.
    """
    newest = with_variant(model, VARIANTS["recency"])
    if model.experiment.cache.asking_blocks:
        newest = _keeping_queries(newest)
    looking = stage_figures.one_step(newest)
    prompts = [
        [captions.caption(story, block) for block in range(len(story.guests) - 1)]
        for story in stories
    ]
    texts, which = stage_figures.read_texts(model, prompts)
    truth = np.stack([world.render(story) for story in stories])
    state = player.start(looking, seeds=seed, videos=videos)
    for block, sentences in enumerate(which.T):
        text = stage_figures.text_of(texts, sentences)
        committed = stage_figures.true_block(model, truth, block)
        state, _ = player.next_block(looking, state, text, given=committed)
    return state


def _keeping_queries(model: Pipeline) -> Pipeline:
    """The same model with the queries of recent blocks kept, whatever it selects by."""
    cfg = model.experiment.cache
    asks = dataclasses.replace(cfg, selection=dataclasses.replace(cfg.score, subset=True))
    return dataclasses.replace(model, experiment=dataclasses.replace(model.experiment, cache=asks))


def answers(
    model: Pipeline,
    variant: Variant,
    state: State,
    stories: Sequence[world.Story],
    gap: int,
) -> tuple[np.ndarray, np.ndarray]:
    """(whether its block was looked up [layer, video], whether the called guest wears its mark [video])."""
    model = with_variant(model, variant)
    last = len(stories[0].guests) - 1
    called = [int(story.guests[last - gap]) for story in stories]
    prompts = [
        [
            captions.caption(
                dataclasses.replace(story, guests=np.full_like(story.guests, guest)), last
            )
        ]
        for story, guest in zip(stories, called, strict=True)
    ]
    texts, which = stage_figures.read_texts(model, prompts)
    frames, ids = last_block(model, state, stage_figures.text_of(texts, which[:, 0]))
    marks = []
    for video, guest in zip(frames, called, strict=True):
        reading = oracle.read(video)
        marks.append(metrics.majority(np.where(reading.guest == guest, reading.guest_mark, -1)))
    right = [
        mark == story.guest_marks[guest]
        for mark, story, guest in zip(marks, stories, called, strict=True)
    ]
    return (ids == last - gap).any(axis=-1), np.asarray(right)


def last_block(model: Pipeline, state: State, text: list[KV]) -> tuple[np.ndarray, np.ndarray]:
    """Frames of the next block, and the packed blocks that it chose [layer, video, top].

    `state` is only read: what denoising uses up is a copy of its memory, laid out for this model.
    """
    own = dataclasses.replace(state, memory=copied(model.experiment.memory, state.memory))
    _, denoised = player.denoise(model, own, text)
    frames, _ = codec.decode_chunk(model.vae, state.decoder, denoised.latent, first=False)
    return np.asarray(frames), np.asarray(pytrees.stack(denoised.selection).ids)


@functools.partial(jax.jit, static_argnames="spec")
def copied(spec: MemorySpec, memory: Memory) -> Memory:
    """A copy of `memory` with room for all that is seen under `spec`, its keys at the positions that they have there.

    A spec that attends to another number of packed blocks has the recent frames elsewhere.
    """
    memory = cache.strip_scratch(spec, jax.tree.map(jnp.copy, memory))
    layout = layouts.layout(spec.cache, memory.progress)
    layers = pytrees.over(lambda layer: cache.reposition(spec, layout, layer), memory.layers)
    return cache.with_scratch(spec, dataclasses.replace(memory, layers=layers))


def figures(
    exp: Experiment,
    archived: int,
    outcomes: Sequence[tuple[Bool[np.ndarray, "layer video"], Float[np.ndarray, "v"]]],
) -> dict[str, Row]:
    """Shares of videos, beside what a blind choice among `archived` blocks and a blind mark would reach."""
    recalled, right = (np.concatenate(parts, axis=-1) for parts in zip(*outcomes, strict=True))
    level = min(1.0, exp.cache.attended / archived)
    rows = {
        "block found, last layer": (level, recalled[-1]),
        "mark recalled": (1 / world.MARKS, right),
    }
    return {
        name: stage_figures.share(chance, int(hit.sum()), hit.size)
        for name, (chance, hit) in rows.items()
    }
