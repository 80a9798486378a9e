"""Scores stage videos from the oracle's readings, and gives beside every score the level that guessing reaches."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from packforcing_jax.errors import require
from packforcing_jax.stage import captions, oracle, world

WINDOW = 20  # frames: the length of a training clip
REFERENCE = 8  # frames whose majority fixes the subject's mark
ATTRIBUTES = ("colour", "shape", "speed", "backdrop", "scene", "guest")
CELLS_PER_FRAME = 1 / np.array(world.STEP_FRAMES)  # by speed
SPEED_TOLERANCE = (
    0.25  # half the way between two legal paces (0, 1/2, 1); a block on the border has no pace
)
Interval = tuple[float, float, float]  # value, and its 95 % interval
Prompts = Sequence[captions.Prompt]  # one per block


def windows(frames: int, size: int = WINDOW) -> tuple[slice, ...]:
    """Consecutive windows of `size` frames; the last one ends at the last frame."""
    starts = [*range(0, frames - size, size), max(frames - size, 0)]
    return tuple(slice(start, min(start + size, frames)) for start in starts)


def prompted(prompts: Prompts, name: str, frames: int) -> Int[np.ndarray, " t"]:
    """What the text of each frame asks for; -1 where it asks for nothing."""
    require(
        len(prompts) * world.BLOCK >= frames,
        f"{len(prompts)} prompts do not cover {frames} frames; give one for every {world.BLOCK}.",
    )
    values = [getattr(prompt, name) for prompt in prompts]
    return np.repeat([-1 if value is None else value for value in values], world.BLOCK)[:frames]


def majority(values: Int[np.ndarray, " n"]) -> int:
    """The most frequent number from -1 up; the smallest of equals; -1 of none."""
    return int(np.bincount(values + 1).argmax()) - 1 if len(values) else -1


def _share(hits: np.ndarray) -> float:
    return float(np.mean(hits)) if np.size(hits) else math.nan


# What the text asks for


def valid_share(reading: oracle.Reading, window: slice) -> float:
    """Share of frames that are legal up to little noise."""
    return _share(reading.valid[window])


def speed_of(columns: Int[np.ndarray, " t"]) -> Int[np.ndarray, " t"]:
    """The speed of each frame's block, from the steps into its frames; -1 where it stands, jumps or keeps no pace."""
    speeds = np.full(len(columns), -1)
    for start in range(0, len(columns), world.BLOCK):
        steps = abs(np.diff(columns[max(start - 1, 0) : start + world.BLOCK]))
        near = abs(_share(steps) - CELLS_PER_FRAME) < SPEED_TOLERANCE
        if near.any() and steps.max() <= 1:
            speeds[start : start + world.BLOCK] = near.argmax()
    return speeds


def text_alignment(reading: oracle.Reading, prompts: Prompts, window: slice) -> dict[str, float]:
    """Share of frames that show what their text asks for, by attribute; `mean` is over all (frame, attribute) pairs.

    A text without a guest asks for an empty place; without anything else it asks for nothing.
    """
    hits = {}
    for name in ATTRIBUTES:
        want = prompted(prompts, name, len(reading))[window]
        values = (speed_of(reading.column) if name == "speed" else getattr(reading, name))[window]
        hits[name] = (values == want)[(want >= 0) | (name == "guest")]
    return {name: _share(hit) for name, hit in hits.items()} | {
        "mean": _share(np.concatenate([*hits.values()]))
    }


# What must stay as it first appeared


def mark_agreement(reading: oracle.Reading, window: slice) -> dict[str, float]:
    """Share of frames with the mark of the first `REFERENCE` frames, and the poster of their scene's first block."""
    unchanged = reading.mark == majority(reading.mark[:REFERENCE])
    first = [
        majority(reading.poster[reading.scene == scene][: world.BLOCK])
        for scene in range(len(world.SCENES))
    ]
    return {
        "mark": _share(unchanged[window]),
        "poster": _share((reading.poster == np.array(first)[reading.scene])[window]),
    }


def hue_drift(reading: oracle.Reading, window: slice) -> float:
    """RMS of the subject's hue offset against its median in the first window, in degrees."""
    return _drift(reading.hue, window)


def gain_drift(reading: oracle.Reading, window: slice) -> float:
    """RMS of the light's gain against its median in the first window."""
    return _drift(reading.gain, window)


def _drift(values: Float[np.ndarray, " t"], window: slice) -> float:
    start = np.median(values[windows(len(values))[0]])
    return float(np.sqrt(np.mean(np.square(values[window] - start))))


def diversity(marks: Int[np.ndarray, " videos"]) -> float:
    """Entropy of first-appearance marks over videos, as a share of its maximum; 0 for a model that draws one mark."""
    share = np.bincount(marks, minlength=world.MARKS) / len(marks)
    # + 0.0, so that one mark alone gives 0 and not -0
    return (
        float(-(share * np.log(np.where(share > 0, share, 1))).sum() / math.log(world.MARKS)) + 0.0
    )


def fair_diversity(videos: int) -> float:
    """What `diversity` is on average when every mark is drawn fairly."""
    total = 0.0
    probability = 1 / world.MARKS
    for count in range(1, videos + 1):
        weight = (
            math.comb(videos, count) * probability**count * (1 - probability) ** (videos - count)
        )
        total -= world.MARKS * weight * count / videos * math.log(count / videos)
    return total / math.log(world.MARKS)


# What must come back


class Revisit(NamedTuple):
    """A guest or scene that is called again `gap` blocks after the last block that called it."""

    kind: str
    gap: int
    correct: bool  # the majority mark is the one of the first visit


def visits(reading: oracle.Reading, prompts: Prompts, kind: str) -> list[list[tuple[int, int]]]:
    """For each guest or scene called: (gap, majority mark) of its visits; a first visit has gap 0, not shown is -1."""
    identity, marks = (
        (reading.guest, reading.guest_mark) if kind == "guest" else (reading.scene, reading.poster)
    )
    called = prompted(prompts, kind, len(reading))
    block = np.arange(len(reading)) // world.BLOCK
    visited = []
    for who in np.unique(called[called >= 0]):
        blocks = np.unique(block[called == who])
        runs = np.split(blocks, np.flatnonzero(np.diff(blocks) > 1) + 1)
        gaps = [0] + [int(run[0] - before[-1]) for before, run in zip(runs, runs[1:], strict=False)]
        own_marks = np.where(identity == who, marks, -1)
        judged = [runs[0]] + [
            run[:1] for run in runs[1:]
        ]  # the whole first visit, the first block of a revisit
        visited.append(
            [
                (gap, majority(own_marks[np.isin(block, span)]))
                for gap, span in zip(gaps, judged, strict=True)
            ]
        )
    return visited


def recall(reading: oracle.Reading, prompts: Prompts) -> list[Revisit]:
    """Every call-back of a guest or scene; one that was not shown, then or now, counts as wrong."""
    return [
        Revisit(kind, gap, mark == first >= 0)
        for kind in ("guest", "scene")
        for (_, first), *again in visits(reading, prompts, kind)
        for gap, mark in again
    ]


def distinct_marks(reading: oracle.Reading, prompts: Prompts) -> tuple[int, float]:
    """How many marks the guests of a video wear on their first visits, and how many fair draws would give.

    Recall is free for a model that gives every guest the same mark; this shows it.
    """
    first = [guest[0][1] for guest in visits(reading, prompts, "guest")]
    return len(set(first) - {-1}), world.MARKS * (1 - (1 - 1 / world.MARKS) ** len(first))


# How it moves


def motion(reading: oracle.Reading, prompts: Prompts, window: slice) -> dict[str, float]:
    """How the subject walks, over pairs of steps, since a slow walker moves on every second one.

    `pace`: share of pairs that cover the commanded cells. `speed`: cells covered over cells commanded. `dynamic`: 1 if
    at least a quarter of the steps cover half the command. `jumps`: share of steps over more than one cell.
    """
    steps = abs(np.diff(reading.column[window]))
    speed = prompted(prompts, "speed", len(reading))[window][1:]
    wanted = np.where(speed >= 0, CELLS_PER_FRAME[speed], np.nan)
    pairs = steps[:-1] + steps[1:]
    due = wanted[:-1] + wanted[1:]
    judged = wanted[:-1] == wanted[1:]
    return {
        "pace": _share((pairs == due)[judged]),
        "speed": float(pairs[judged].sum() / due[judged].sum()) if judged.any() else math.nan,
        "dynamic": float(_share((steps >= wanted / 2)[wanted > 0]) >= 0.25)
        if (wanted > 0).any()
        else math.nan,
        "jumps": _share(steps > 1),
    }


# Intervals

NORMAL_95 = 1.959964


def wilson(successes: int, n: int) -> Interval:
    """A share and its 95 % Wilson interval; of nothing, everything is possible."""
    if n == 0:
        return math.nan, 0.0, 1.0
    share = successes / n
    z2 = NORMAL_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * share * (1 - share) / n + (z2 / (2 * n)) ** 2) / (1 + z2 / n)
    return share, max(centre - half, 0.0), min(centre + half, 1.0)


def bootstrap(values: Sequence[float], seed: int = 0, repeats: int = 2000) -> Interval:
    """The mean of one value per video and its 95 % bootstrap interval over videos; values that are nan do not count."""
    known = np.asarray(values, float)
    known = known[~np.isnan(known)]
    if not len(known):
        return math.nan, math.nan, math.nan
    means = known[
        np.random.default_rng(seed).integers(len(known), size=(repeats, len(known)))
    ].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(known.mean()), float(low), float(high)


def jackknife(marks: Int[np.ndarray, " videos"]) -> Interval:
    """`diversity` and its 95 % jackknife interval (a bootstrap would repeat marks and so come out below the value)."""
    whole = diversity(marks)
    videos = len(marks)
    if videos < 2:
        return whole, 0.0, 1.0
    without = [diversity(np.delete(marks, video)) for video in range(videos)]
    half = NORMAL_95 * math.sqrt((videos - 1) * np.var(without))
    return whole, max(whole - half, 0.0), min(whole + half, 1.0)


# The report


def _random_columns() -> dict[str, float]:
    """What `motion` gives on average when every column is drawn anew."""
    before, now, after = np.indices((world.LANES,) * 3).reshape(3, -1)
    steps = abs(now - before)
    pairs = steps + abs(after - now)
    due = 2 * CELLS_PER_FRAME[:, None]
    return {
        "pace": float((pairs == due).mean()),
        "speed": float((pairs / due).mean()),
        "dynamic": 1.0,
        "jumps": float((steps > 1).mean()),
    }


CHOICES = {
    "colour": len(world.COLOURS),
    "shape": len(world.SHAPES),
    "speed": len(world.SPEEDS),
    "backdrop": len(world.BACKDROPS),
    "scene": len(world.SCENES),
    "guest": len(world.GUESTS) + 1,
}
CHANCE = (
    {"valid": 0.0}
    | {f"text {name}": 1 / count for name, count in CHOICES.items()}
    | {"text mean": sum(1 / count for count in CHOICES.values()) / len(CHOICES)}
    | {"kept mark": 1 / world.MARKS, "kept poster": 1 / world.MARKS}
    | {f"motion {name}": value for name, value in _random_columns().items()}
    | {
        "hue drift": 2 * world.HUE_SPREAD / math.sqrt(6),
        "gain drift": float(np.ptp(world.GAIN_RANGE)) / math.sqrt(6),
    }
)
"""Each score when attributes are drawn uniformly; two draws from a range of width w differ by w / sqrt(6) RMS."""

ROOT_MEAN_SQUARE = ("hue drift", "gain drift")  # averaged over videos as squares
GAPS = (2, 4, 8, 16, 32, 64)  # blocks; recall is pooled from each to just below the next


def window_scores(reading: oracle.Reading, prompts: Prompts, window: slice) -> dict[str, float]:
    """All scores of one window of one video, by the names in `CHANCE`."""
    groups = {
        "text": text_alignment(reading, prompts, window),
        "kept": mark_agreement(reading, window),
        "motion": motion(reading, prompts, window),
        "hue": {"drift": hue_drift(reading, window)},
        "gain": {"drift": gain_drift(reading, window)},
    }
    named = {
        f"{group} {name}": value
        for group, scores in groups.items()
        for name, value in scores.items()
    }
    return {"valid": valid_share(reading, window)} | named


def report(readings: Sequence[oracle.Reading], prompts: Sequence[Prompts]) -> dict:
    """Every score over videos, ready for JSON: value, low and high of the 95 % interval, beside the chance level."""
    require(
        len(readings) == len(prompts) > 0,
        f"{len(readings)} readings and {len(prompts)} lists of prompts: give one of each per video.",
    )
    videos = list(zip(readings, prompts, strict=True))
    ends = {
        part: [
            window_scores(reading, texts, windows(len(reading))[index]) for reading, texts in videos
        ]
        for part, index in (("first", 0), ("last", -1))
    }
    rows = {
        name: {"chance": chance}
        | {part: _pooled(name, [score[name] for score in scores]) for part, scores in ends.items()}
        for name, chance in CHANCE.items()
    }
    return {
        "videos": len(readings),
        "frames": max(map(len, readings)),
        "windows": rows,
        "whole": _whole(videos),
    }


def _pooled(name: str, values: list[float]) -> list[float | None]:
    if name in ROOT_MEAN_SQUARE:
        return _plain([math.sqrt(square) for square in bootstrap([value**2 for value in values])])
    return _plain(bootstrap(values))


def _plain(interval: Sequence[float]) -> list[float | None]:
    return [None if math.isnan(value) else float(value) for value in interval]


def _whole(videos: list[tuple[oracle.Reading, Prompts]]) -> dict[str, dict]:
    """The scores that belong to no window: diversity of marks, and recall by kind and gap; `n` things were counted."""
    first = np.array([majority(reading.mark[:REFERENCE]) for reading, _ in videos])
    distinct, fair = zip(*(distinct_marks(*video) for video in videos), strict=True)
    rows = {
        "first-mark entropy": _row(fair_diversity(len(first)), jackknife(first), len(first)),
        "distinct guest marks": _row(float(np.mean(fair)), bootstrap(distinct), len(distinct)),
    }
    revisits = [revisit for video in videos for revisit in recall(*video)]
    for kind in ("guest", "scene"):
        for low, high in zip(GAPS, (*GAPS[1:], math.inf), strict=True):
            hits = [
                revisit.correct
                for revisit in revisits
                if revisit.kind == kind and low <= revisit.gap < high
            ]
            if hits:
                name = f"recall {kind}, gap {low}" + (f"-{high - 1}" if high < math.inf else "+")
                rows[name] = _row(1 / world.MARKS, wilson(sum(hits), len(hits)), len(hits))
    return rows


def _row(chance: float, interval: Interval, n: int) -> dict:
    return {"chance": chance, "value": _plain(interval), "n": n}


def table(result: dict) -> str:
    """A report as aligned text."""
    several = result["videos"] > 1  # one video says nothing of the spread over videos
    window = _interval if several else lambda interval: _number(interval[0])
    lines = [
        f"{result['videos']} video{'s' * several} of {result['frames']} frames; brackets hold 95 % intervals",
        _line("", "chance", "first window", "last window"),
    ]
    lines += [
        _line(name, _number(row["chance"]), window(row["first"]), window(row["last"]))
        for name, row in result["windows"].items()
    ]
    lines += ["", _line("", "chance", "whole video", "counted")]
    lines += [
        _line(name, _number(row["chance"]), _interval(row["value"]), str(row["n"]))
        for name, row in result["whole"].items()
    ]
    return "\n".join(lines)


def _line(name: str, chance: str, *values: str) -> str:
    return (f"{name:<24}{chance:>8}" + "".join(f"{value:>24}" for value in values)).rstrip()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _interval(interval: Sequence[float | None]) -> str:
    value, low, high = map(_number, interval)
    return f"{value} [{low}, {high}]"
