"""The suite `native`: the figures of `native.py` for each video file, of the whole, of windows and of both ends."""

import contextlib
import dataclasses
import importlib.util
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from packforcing_jax import __version__
from packforcing_jax.errors import InputError, require
from packforcing_jax.evaluation import native, results, video_files
from packforcing_jax.evaluation.suite import Meaning, Measured, Options, Results, Suite, Table
from packforcing_jax.evaluation.video_files import Prompt, VideoFile
from packforcing_jax.io import video
from packforcing_jax.stage import metrics

VERSION = 1  # of what a figure means; another one is measured anew
ENDS = 5.0  # seconds at the start and at the end that drift compares
INTERVALS = "95 %, bootstrap: of a video over its windows, of a summary over videos"
LIBRARIES = {"cv2": "OpenCV", "matplotlib": "Matplotlib"}


def check(_: Options) -> None:
    """Raises `InputError` unless the libraries of the extra `eval` are here."""
    for library, name in LIBRARIES.items():
        require(
            importlib.util.find_spec(library) is not None,
            f"{name}, which measures videos, is not installed; run: pip install 'packforcing-jax[eval]'.",
        )


def settings(options: Options) -> Table:
    """All that decides the numbers of one video, apart from its content."""
    return {
        "version": VERSION,
        "packforcing": __version__,
        "opencv": native.opencv().__version__,
        "window_seconds": options.window,
        "ends_seconds": ENDS,
        "block": options.block,
        "seed": options.seed,
    }


class Job(NamedTuple):
    """A video that can be opened: its file, the hash of its content, and what it says about its frames."""

    file: VideoFile
    content: str
    probe: video.Probe


def measure(
    videos: Sequence[VideoFile], prompts: Mapping[str, Prompt], options: Options, out: Path
) -> Results:
    """The figures of all videos; what an earlier run measured of the same content is taken from `out`."""
    store = results.Store(out, settings(options))
    jobs: list[Job] = []
    skipped: dict[str, str] = {}
    for each in videos:
        with _noted(skipped, each):
            jobs.append(_opened(each))
    new = {job.content: job for job in jobs if store.get(job.content) is None}
    frames = sum(job.probe.frames for job in new.values())
    for _ in options.watch(_measured(new.values(), options, store, skipped), frames, "frames"):
        pass
    measured: dict[str, Measured] = {}
    for each, content, _ in jobs:
        found = store.get(content)
        if found is not None:
            prompt = prompts[each.name].text(options.rule) if each.name in prompts else None
            about = {"sha256": content, "prompt": prompt, **found.about}
            measured[each.name] = dataclasses.replace(found, about=about)
        else:
            skipped.setdefault(each.name, skipped[new[content].file.name])
    told = {**settings(options), "rule": options.rule, "intervals": INTERVALS}
    meanings = {
        name: Meaning(each.unit, each.better, each.meaning) for name, each in native.FIGURES.items()
    }
    return Results("native", told, meanings, measured, dict(sorted(skipped.items())))


@contextlib.contextmanager
def _noted(skipped: dict[str, str], each: VideoFile) -> Iterator[None]:
    """What makes a video unreadable is noted, and the next one has its turn."""
    try:
        yield
    except (InputError, OSError) as error:
        skipped[each.name] = str(error)


def _opened(each: VideoFile) -> Job:
    """Raises `InputError` for a file without two frames."""
    path = each.path
    require(path.stat().st_size > 0, f"Video {path} is empty; give a complete video file.")
    found = video.probe(path)
    require(
        found.frames > 1,
        f"Video {path} holds {found.frames} frame; give one of two frames or more.",
    )
    return Job(each, video_files.sha256(path), found)


def _measured(
    jobs: Iterable[Job], options: Options, store: results.Store, skipped: dict[str, str]
) -> Iterator[VideoFile]:
    """Measures videos into the store; gives a video once for each of its frames."""
    for each, content, probe in jobs:
        found = None
        with _noted(skipped, each):
            pieces: list[native.Signals] = []
            for piece in native.parts(video.stream(each.path)):
                pieces.append(piece)
                yield from itertools.repeat(each, len(piece))
            signals = native.joined(pieces)
            require(
                len(signals) > 1, f"Video {each.path} decodes to one frame; give a complete one."
            )
            found = of_signals(signals, probe.fps, options)
        if found is not None:
            about = {"size": list(probe.size), **found.about}
            store.put(content, dataclasses.replace(found, about=about))


def of_signals(signals: native.Signals, fps: float, options: Options) -> Measured:
    """The figures of a video's signals: of the whole, of each window, of the first and last seconds."""
    block = (
        native.Block(options.block, "given") if options.block else native.find_block(signals.flow)
    )
    spans = native.windows(len(signals), max(2, round(options.window * fps)))
    first, last = native.ends(len(signals), max(2, round(ENDS * fps)))

    def value(figure: native.Figure, span: slice, start: slice = first) -> float:
        return figure.measure(signals[span], signals[start], block.frames)

    windows = {
        name: [value(figure, span, spans[0]) for span in spans]
        for name, figure in native.FIGURES.items()
    }
    return Measured(
        figures={
            name: known(value(figure, last if figure.drift else slice(None)))
            for name, figure in native.FIGURES.items()
        },
        windows={name: list(map(known, values)) for name, values in windows.items()},
        first={name: known(value(figure, first)) for name, figure in native.FIGURES.items()},
        last={name: known(value(figure, last)) for name, figure in native.FIGURES.items()},
        intervals={
            name: None if figure.drift else interval(windows[name], options.seed)
            for name, figure in native.FIGURES.items()
        },
        about={
            "frames": len(signals),
            "fps": fps,
            "block": block._asdict(),
            "window_frames": [[span.start, span.stop] for span in spans],
        },
    )


def known(value: float) -> float | None:
    """None for what is not a number, which JSON lacks."""
    return value if math.isfinite(value) else None


def interval(values: Sequence[float], seed: int) -> list[float] | None:
    """The 95 % bootstrap interval of the mean; None of fewer than two values."""
    finite = [each for each in values if math.isfinite(each)]
    return list(metrics.bootstrap(finite, seed)[1:]) if len(finite) > 1 else None


SUITE = Suite(
    "motion, jumps, flicker, freeze, drift of colour and sharpness; needs no weights",
    frozenset({"window", "block", "seed", "rule"}),
    check,
    measure,
)
