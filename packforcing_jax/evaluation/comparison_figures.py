"""Figures of the videos of a comparison, by suite: read off their files, knowing what each block was told."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from packforcing_jax.evaluation import native, native_suite, vbench_suite
from packforcing_jax.evaluation.native_suite import known
from packforcing_jax.evaluation.suite import Meaning, Measured, Numbers, Options, Table
from packforcing_jax.evaluation.video_files import Prompt, VideoFile
from packforcing_jax.io import video
from packforcing_jax.stage import captions, metrics, oracle, world

DECIDE = frozenset(  # of the protocol of official code
    "protocol python versions device settings weights note not_the_published_weights".split()
)
Curves: TypeAlias = Mapping[str, Sequence[float | None]]  # of each figure, window by window


class Film(NamedTuple):
    """A video of a comparison: its file, what each of its blocks was told, and the prompt that it is scored against."""

    path: Path
    prompts: Sequence[str]
    scored: str


class Found(NamedTuple):
    """What a suite finds in a video, None where a figure is not defined.

    `absent`: why it lacks some; `protocol`: what else decides the numbers.
    """

    figures: Numbers
    windows: Curves
    absent: Mapping[str, str]
    protocol: Table


@dataclass(frozen=True)
class Reader:
    """One suite: what it finds in films by name, and what its figures mean.

    `check` raises `InputError` where something is missing that the suite needs. `read` may keep what it finished in
    the folder it is given. `together`: it is given all films at once, since to begin takes it long.
    """

    check: Callable[[Options], None]
    read: Callable[[Mapping[str, Film], Options, Path], Mapping[str, Found]]
    figures: Mapping[str, Meaning]
    together: bool = False


def one_by_one(
    read: Callable[[Path, Sequence[str]], tuple[Numbers, Curves]],
    protocol: Callable[[], Table],
) -> Callable[[Mapping[str, Film], Options, Path], Mapping[str, Found]]:
    """`Reader.read` of a function that reads one file."""

    def every(films: Mapping[str, Film], options: Options, room: Path) -> Mapping[str, Found]:
        decides = protocol()
        return {
            name: Found(*read(film.path, film.prompts), {}, decides) for name, film in films.items()
        }

    return every


STAGE_FIGURES: Mapping[str, Meaning] = {
    name: Meaning(unit, better, meaning)
    for name, unit, better, meaning in (
        ("valid", "share of frames", "higher", "legal up to little noise, in the last window"),
        (
            "text mean",
            "share of frames",
            "higher",
            "attributes as the text asks, in the last window",
        ),
        (
            "kept mark",
            "share of frames",
            "higher",
            "with the subject's first mark, in the last window",
        ),
        (
            "motion pace",
            "share of frame pairs",
            "higher",
            "at the pace of the text, in the last window",
        ),
        ("motion dynamic", "share of videos", "higher", "whose subject moves in the last window"),
        ("motion jumps", "share of frame pairs", "lower", "that skip a lane, in the last window"),
        ("hue drift", "degrees", "lower", "from the first frames' hue, RMS, in the last window"),
        (
            "gain drift",
            "share",
            "lower",
            "from the first frames' brightness, RMS, in the last window",
        ),
        ("recall guest", "share of visits", "higher", "with the mark of the guest's first visit"),
        ("recall scene", "share of visits", "higher", "with the poster of the scene's first visit"),
    )
}


def stage(path: Path, prompts: Sequence[str]) -> tuple[Numbers, Curves]:
    """What the Stage world's oracle reads off a video: figures of the last window, call-backs of the whole of it."""
    frames = video.read(path)
    side = frames.shape[1] // world.SIZE
    shape = len(frames), world.SIZE, side, world.SIZE, side, 3
    small = frames.reshape(shape).mean(axis=(2, 4), dtype=np.float32) / 127.5 - 1
    reading = oracle.read(small)
    parsed = [captions.parse(sentence) for sentence in prompts]
    windows = metrics.windows(len(reading))
    curves = [metrics.window_scores(reading, parsed, window) for window in windows]
    visits = metrics.recall(reading, parsed)
    called = {
        f"recall {kind}": _mean([visit.correct for visit in visits if visit.kind == kind])
        for kind in ("guest", "scene")
    }
    names = [name for name in STAGE_FIGURES if name in curves[-1]]
    figures = {name: known(curves[-1][name]) for name in names} | called
    return figures, {name: [known(window[name]) for window in curves] for name in names}


def _mean(values: Sequence[bool]) -> float | None:
    return float(np.mean(values)) if values else None


def native_figures(path: Path, prompts: Sequence[str]) -> tuple[Numbers, Curves]:
    """What the suite `native` measures, with the length of the video's blocks."""
    found = video.probe(path)
    signals = native.joined([*native.parts(video.stream(path))])
    block = max(len(signals) // len(prompts), 1)
    measured = native_suite.of_signals(signals, found.fps, Options(block=block))
    return measured.figures, measured.windows


def native_protocol() -> Table:
    """What decides those figures."""
    return {**native_suite.settings(Options()), "block": "of the model"}


def official(suite: str) -> Reader:
    """A suite that official code measures, in the environment that the options name."""

    def read(films: Mapping[str, Film], options: Options, room: Path) -> Mapping[str, Found]:
        videos = [VideoFile(name, film.path) for name, film in films.items()]
        prompts = {name: Prompt(film.scored) for name, film in films.items()}
        results = vbench_suite.measure(suite, videos, prompts, options, room)
        decides = {name: each for name, each in results.protocol.items() if name in DECIDE}
        return {
            name: _found(results.videos.get(name), results.skipped.get(name), decides)
            for name in films
        }

    def _found(measured: Measured | None, skipped: str | None, decides: Table) -> Found:
        if measured is None:
            return Found({}, {}, dict.fromkeys(figures, f"the video {skipped}"), decides)
        reasons: Any = measured.about["absent"]  # texts by figure
        absent = {
            name: reasons.get(name, "its metric failed")
            for name in figures
            if name not in measured.figures
        }
        return Found(measured.figures, measured.windows, absent, decides)

    figures = vbench_suite.meanings(suite)
    return Reader(lambda options: vbench_suite.check(suite, options), read, figures, together=True)


SUITES: dict[str, Reader] = {
    "stage": Reader(
        lambda options: None,
        one_by_one(stage, lambda: {"window_frames": metrics.WINDOW}),
        STAGE_FIGURES,
    ),
    "native": Reader(
        lambda options: native_suite.check(Options()),
        one_by_one(native_figures, native_protocol),
        {
            name: Meaning(each.unit, each.better, each.meaning)
            for name, each in native.FIGURES.items()
        },
    ),
    "vbench": official("vbench"),
    "clip": official("clip"),
}
