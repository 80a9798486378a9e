"""The attention study that motivates a choice of packed blocks (paper sec. 3.6, fig. 3c and 3d), on any causal model.

Videos run freely under the memory of a method. Two questions. Importance: at the first denoising step of late blocks,
how much attention does each block of the whole history get? Selection: how much does the choice of packed blocks change
from one block to the next? Each figure stands beside what flat attention, or a choice at random, would give.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from packforcing_jax import pytrees
from packforcing_jax.config import CacheConfig
from packforcing_jax.errors import require
from packforcing_jax.evaluation import attention_mass, recall, stage_figures
from packforcing_jax.evaluation.attention_mass import Mass
from packforcing_jax.evaluation.recall import Variant
from packforcing_jax.evaluation.stage_figures import Row, Sampling
from packforcing_jax.memory import layout as layouts
from packforcing_jax.sampling import inspect_trace, pipeline, player
from packforcing_jax.sampling.pipeline import Pipeline

LATE = 4  # the last of so many parts of a video is late
PLACES = {
    "true": "true distances",
    "fit": "squeezed",
}  # of the packed blocks, when all are attended
DIGITS = 5  # of the curves in a result
Figure = Float[np.ndarray, "layer video"]  # the last layer is the mean of all others


@dataclass(frozen=True)
class Recorded:
    """What was recorded of some videos: masses of late blocks, and the packed blocks that every block chose."""

    mass: dict[str, Mass]  # by `cache.span`, each leaf [late, layer, video, ...]
    packed: Bool[np.ndarray, "late age"]  # which ages are those of packed blocks
    chosen: Int[np.ndarray, "block layer video top"]  # -1 where fewer exist


# Videos


def study(
    model: Pipeline,
    prompts: Sequence[Sequence[str]],
    ways: dict[str, Variant],
    *,
    sampling: Sampling = Sampling(),
) -> dict:
    """The figures of `model` under each way of choosing packed blocks, each on videos of its own.

    `prompts` holds a sentence for each block of each video; video i has the seed `sampling.seed + i` and the noise that
    `Pipeline.stream` gives it. Raises `InputError` for a memory that cannot be measured.
    """
    blocks = len(prompts[0])
    require(
        all(len(each) == blocks for each in prompts) and blocks > 1,
        f"videos of {sorted({len(each) for each in prompts})} blocks have no common history; give all one length of 2 "
        "or more.",
    )
    cfg = model.experiment.cache
    require(
        cfg.top > 0 or not any(ways.values()),
        f"cache.top={cfg.top} attends to no packed block, so that no way to choose them differs; leave --ways out.",
    )
    arms = {name: recall.with_variant(model, way) if way else model for name, way in ways.items()}
    arms = {name: arm.for_length(blocks) for name, arm in arms.items()}
    for arm in arms.values():
        attention_mass.require_measured(arm.experiment, blocks)
        pipeline.require_length(arm.method, arm.experiment, blocks)
        for each in prompts:
            arm.check(each)
    late = late_blocks(blocks)
    result: dict = {
        "mode": "attention",
        "experiment": model.experiment.name,
        "method": model.experiment.method,
        "videos": len(prompts),
        "blocks": blocks,
        "late": [late.start, late.stop - 1],
        "seed": sampling.seed,
        "sections": {},
        "curves": {},
    }
    if model.method.at_prompt_change != "keep":  # it happens to a whole batch, and videos differ
        sampling = dataclasses.replace(sampling, batch=1)
    for name, arm in arms.items():
        parts = [
            recorded(arm, [prompts[i] for i in part], seeds=[sampling.seed + i for i in part])
            for part in sampling.chunks(len(prompts))
        ]
        whole = together(parts)
        cfg = arm.experiment.cache
        found = importance(whole) | choices(cfg, whole, late)
        result["sections"] |= sections(name, found)
        result["curves"][name] = curves(cfg, whole)
    return result


def own(model: Pipeline) -> str:
    """What the model's own way of keeping the past is called: its selection score, or its method."""
    cfg = model.experiment.cache
    return cfg.score.name if cfg.top else model.experiment.method


def late_blocks(blocks: int) -> range:
    """The last quarter of a video's blocks."""
    return range(blocks - max(blocks // LATE, 1), blocks)


def recorded(
    model: Pipeline, prompts: Sequence[Sequence[str]], *, seeds: Sequence[int]
) -> Recorded:
    """Videos made together, and what is recorded of them."""
    cfg = model.experiment.cache
    texts, which = stage_figures.read_texts(model, prompts)
    blocks = which.shape[1]
    count = attention_mass.ages(cfg, blocks)
    late = late_blocks(blocks)
    ids = [pipeline.video_id(each[0]) for each in prompts]
    state = player.start(model, seeds=seeds, videos=ids)
    mass: dict[str, list[Mass]] = {span: [] for span in attention_mass.spans(cfg)}
    packed, chosen = [], []
    for block, sentences in enumerate(which.T):
        text = stage_figures.text_of(texts, sentences)
        if block and (sentences != which[:, block - 1]).any():
            how, keep = model.method.at_prompt_change, model.method.keeps_sink
            state = player.change_prompt(model, state, text, how=how, keep_sink=keep)
        if block in late:
            for span, masses in mass.items():
                found = attention_mass.masses(model, state, text, span, count)
                masses.append(jax.device_get(found))
            at = layouts.layout(cfg, state.memory.progress)
            old = int(at.num_blocks) - np.asarray(at.ids)[np.asarray(at.ids) >= 0]
            packed.append(np.isin(np.arange(count), old))
        state, made = player.next_block(model, state, text, left=blocks - block)
        chosen.append(np.asarray(pytrees.stack(made.selection).ids))
    return Recorded(
        mass={span: jax.tree.map(lambda *x: np.stack(x), *each) for span, each in mass.items()},
        packed=np.stack(packed),
        chosen=np.stack(chosen),
    )


def together(parts: Sequence[Recorded]) -> Recorded:
    """What was recorded of several groups of videos as of one."""
    return Recorded(
        mass={
            span: jax.tree.map(
                lambda *x: np.concatenate(x, axis=2), *(part.mass[span] for part in parts)
            )
            for span in parts[0].mass
        },
        packed=parts[0].packed,
        chosen=np.concatenate([part.chosen for part in parts], axis=2),
    )


# Importance (figure 3c)


def importance(whole: Recorded) -> dict[str, tuple[Figure | float, Figure]]:
    """(level of flat attention, value) of every figure about where attention goes, by name."""
    found = {}
    for span, mass in whole.mass.items():
        mass = jax.tree.map(with_mean, mass)
        where = f", {PLACES[span]}" if len(whole.mass) > 1 else ""
        for number, part in enumerate(attention_mass.PARTS):
            values = mass.flat_by_part[..., number].mean(0), mass.by_part[..., number].mean(0)
            if values[0].any():
                found[f"mass on {part}{where}"] = values
        for what, profile in profiles(whole, mass).items():
            shape = figures_of(profile)
            for name, (level, value) in shape.items():
                found[f"{what}: {name}{where}"] = level, of_late(value)
        if whole.packed.any() and whole.chosen.shape[-1]:
            found[f"packed mass on the selected blocks{where}"] = captured(whole, mass)
    return found


def with_mean(by_layer: np.ndarray) -> np.ndarray:
    """[late, layer, video, ...] with the mean over layers behind the last one."""
    return np.concatenate([by_layer, by_layer.mean(axis=1, keepdims=True)], axis=1)


def profiles(whole: Recorded, mass: Mass) -> dict[str, Float[np.ndarray, "late layer video age"]]:
    """The mass of each block of the past by age, nan where there is none.

    Of packed blocks alone, which have the same number of keys; of the whole history per key, since a block at full size
    has many times as many.
    """
    keys = mass.flat_by_age.copy()
    keys[..., 0] = 0  # the current block is no history
    per_key = np.divide(mass.by_age, keys, out=np.full(keys.shape, np.nan), where=keys > 0)
    found = {"whole history per key": per_key}
    if whole.packed.any():
        packed = whole.packed[:, None, None]
        found = {"packed blocks": np.where(packed, mass.by_age, np.nan)} | found
    return found


def figures_of(
    profile: Float[np.ndarray, "... age"],
) -> dict[str, tuple[float, Float[np.ndarray, "..."]]]:
    """(what flat attention gives, value) of the figures of profiles; nan for fewer than three blocks.

    The mean of the normalised profile is the paper's. It does not depend on the order of the blocks: any profile with
    as much above the middle of its range as below has 0.5. Entropy and correlations tell flat from symmetric.
    """
    known = ~np.isnan(profile)
    n = known.sum(-1)
    safe = np.where(known, profile, 0)
    many = n > 2
    with np.errstate(divide="ignore", invalid="ignore"):
        share = safe / safe.sum(-1, keepdims=True)
        entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(-1) / np.log(n)
        middle = np.where(known, normalised(profile), 0).sum(-1) / n
    ranks = np.where(known, np.argsort(np.argsort(np.where(known, profile, np.inf))), np.nan)
    age = np.broadcast_to(np.arange(profile.shape[-1]), profile.shape)
    age_ranks = known.cumsum(-1)
    found = {
        "min-max mean": (0.5, middle),
        "entropy / log n": (1.0, entropy),
        "correlation with age": (0.0, correlation(profile, age)),
        "rank correlation with age": (0.0, correlation(ranks, age_ranks)),
    }
    return {name: (flat, np.where(many, value, np.nan)) for name, (flat, value) in found.items()}


def normalised(profile: Float[np.ndarray, "... age"]) -> Float[np.ndarray, "... age"]:
    """Each profile moved and scaled to 0 to 1; nan where it is the same everywhere."""
    known = ~np.isnan(profile)
    lowest = np.where(known, profile, np.inf).min(-1, keepdims=True)
    highest = np.where(known, profile, -np.inf).max(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (profile - lowest) / (highest - lowest)


def correlation(values: Float[np.ndarray, "... n"], others: np.ndarray) -> Float[np.ndarray, "..."]:
    """Pearson's, over where `values` are no nan; nan where they are all alike."""
    known = ~np.isnan(values)
    n = np.maximum(known.sum(-1, keepdims=True), 1)

    def centred(x: np.ndarray) -> np.ndarray:
        x = np.where(known, x, 0)
        return np.where(known, x - x.sum(-1, keepdims=True) / n, 0)

    one, other = centred(values), centred(others)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (one * other).sum(-1) / np.sqrt((one**2).sum(-1) * (other**2).sum(-1))


def of_late(values: Float[np.ndarray, "late layer video"]) -> Figure:
    """The mean over late blocks, of those that have the figure."""
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(0) / known.sum(0)


def captured(whole: Recorded, mass: Mass) -> tuple[Figure, Figure]:
    """(the share of packed blocks that is selected, the share of their mass that these get)."""
    late = len(whole.packed)
    blocks = np.arange(len(whole.chosen))[-late:, None, None, None]
    chosen = whole.chosen[-late:]
    count = whole.packed.shape[1]
    selected = np.zeros((*chosen.shape[:3], count), bool)
    valid = chosen >= 0
    at = [axis[valid] for axis in np.indices(chosen.shape)[:3]]
    selected[(*at, (blocks - chosen)[valid])] = True
    packed = whole.packed[:, None, None]
    of_packed = np.where(packed, mass.by_age, 0)
    # Each layer's own choice; behind the last layer their mean.
    share = (of_packed[:, :-1] * selected).sum(-1) / of_packed[:, :-1].sum(-1)
    level = (selected & packed).sum(-1) / np.maximum(packed.sum(-1), 1)
    return with_mean(level).mean(0), with_mean(share).mean(0)


# Selection (figure 3d)


def choices(
    cfg: CacheConfig, whole: Recorded, late: range
) -> dict[str, tuple[Figure | float, Figure]]:
    """(level of a choice at random, value) of every figure about the choice of packed blocks, by name."""
    pairs = free(cfg, len(whole.chosen))
    found = {}
    for when, some in (("all", pairs), ("late", [one for one in pairs if one in late])):
        if some:
            distance, excess = zip(*(changes(cfg, whole, block) for block in some), strict=True)
            level = np.mean([inspect_trace.jaccard_at_random(cfg, i - 1, i) for i in some])
            found[f"Jaccard distance, {when} blocks"] = float(level), np.mean(distance, axis=0)
            found[f"overlap excess, {when} blocks"] = 0.0, np.mean(excess, axis=0)
    if pairs:
        found["position diversity"] = diversity(cfg, whole)
    return found


def free(cfg: CacheConfig, blocks: int) -> list[int]:
    """The blocks that had a choice, as had the one before: more packed blocks were visible than are attended."""
    may = [
        len(inspect_trace.visible(cfg, block)) > inspect_trace.due(cfg, block) > 0
        for block in range(blocks)
    ]
    return [block for block, (before, now) in enumerate(itertools.pairwise(may), 1) if before & now]


def changes(cfg: CacheConfig, whole: Recorded, block: int) -> tuple[Figure, Figure]:
    """(Jaccard distance, overlap above chance as a share of the choice) of a block's choice and the one before."""
    before, now = whole.chosen[block - 1], whole.chosen[block]
    count = inspect_trace.due(cfg, block)
    common = (before[..., None] == now[..., None, :]).any(-1).sum(-1)
    union = inspect_trace.due(cfg, block - 1) + count - common
    chance = inspect_trace.in_common_at_random(cfg, block - 1, block)
    expected = sum(number * share for number, share in enumerate(chance))
    both = 1 - common / union, (common - expected) / count
    return mean_behind(both[0]), mean_behind(both[1])


def mean_behind(by_layer: Float[np.ndarray, "layer video"]) -> Figure:
    return np.concatenate([by_layer, by_layer.mean(axis=0, keepdims=True)])


def diversity(cfg: CacheConfig, whole: Recorded) -> tuple[float, Figure]:
    """The share of all packed blocks ever visible that were selected at least once: (at random, here)."""
    never: dict[int, float] = {}
    for block in range(len(whole.chosen)):
        ids = inspect_trace.visible(cfg, block)
        for id in ids:
            never[id] = never.get(id, 1.0) * (1 - inspect_trace.due(cfg, block) / len(ids))
    ever = np.array(sorted(never))
    found = (whole.chosen[..., None] == ever).any(axis=(0, 3)).mean(-1)
    return 1 - float(np.mean(list(never.values()))), mean_behind(found)


# The result


def sections(
    name: str, found: dict[str, tuple[Figure | float, Figure]]
) -> dict[str, dict[str, Row]]:
    """The rows of every layer and of their mean, with intervals over videos."""
    count = len(next(iter(found.values()))[1])
    names = [f"{name}, layer {layer}" for layer in range(count - 1)] + [f"{name}, mean over layers"]
    return {
        title: {
            what: stage_figures.mean_row(
                float(np.mean(np.broadcast_to(level, value.shape)[layer])), value[layer]
            )
            for what, (level, value) in found.items()
        }
        for layer, title in enumerate(names)
    }


def curves(cfg: CacheConfig, whole: Recorded) -> dict:
    """What the figure is drawn from: importance by age, and Jaccard distances by block, each layer and their mean.

    Importance is normalised to 0 to 1 for each late block and video, as in the paper's figure, and then averaged;
    `share` is the mass over that of an equal share, and "min-max mean of the average" that of the averaged curve.
    """
    found: dict = {"importance": {}, "jaccard": {}}
    for span, mass in whole.mass.items():
        for what, profile in profiles(whole, jax.tree.map(with_mean, mass)).items():
            known = ~np.isnan(profile)
            with np.errstate(divide="ignore", invalid="ignore"):
                level = np.where(known, profile, 0).sum(-1, keepdims=True) / known.sum(
                    -1, keepdims=True
                )
                share = profile / level
            ages = np.flatnonzero(known.any(axis=(0, 1, 2)))
            found["importance"].setdefault(span, {})[what] = {
                "age": ages.tolist(),
                "normalised": by_layer(normalised(profile), ages),
                "share": by_layer(share, ages),
                "min-max mean of the average": middles(by_layer(share, ages)),
            }
    pairs = free(cfg, len(whole.chosen))
    if pairs:
        distances = np.stack([changes(cfg, whole, block)[0].mean(-1) for block in pairs], axis=-1)
        found["jaccard"] = {
            "block": pairs,
            "chance": [
                round(inspect_trace.jaccard_at_random(cfg, block - 1, block), DIGITS)
                for block in pairs
            ],
            "layers": distances.round(DIGITS).tolist(),
        }
    return found


def middles(curves: Sequence[Sequence[float]]) -> list[float]:
    """The min-max mean of each of several curves, one for each layer."""
    return figures_of(np.array(curves))["min-max mean"][1].round(DIGITS).tolist()


def by_layer(values: Float[np.ndarray, "late layer video age"], ages: np.ndarray) -> list:
    """The mean over late blocks and videos, [layer, age]."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0).sum(axis=(0, 2))[:, ages]
    count = known.sum(axis=(0, 2))[:, ages]
    return (total / np.maximum(count, 1)).round(DIGITS).tolist()
