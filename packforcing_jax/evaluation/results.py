"""The folder of results that every suite over video files fills: JSON, CSV, Markdown, curves, and what was finished.

`results.json` is all of it; the others are views of it. Each file is there whole or not at all.
"""

import csv
import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from packforcing_jax.errors import InputError, require
from packforcing_jax.evaluation.suite import Measured, Plain, Results, Table
from packforcing_jax.io import atomic
from packforcing_jax.stage import metrics

RESULTS = "results.json"
FIGURES = "figures.csv"
WINDOWS = "windows.csv"
PAGE = "results.md"
CURVES = "curves.png"
STORE = "measured"
THIN_LINES = 20  # videos up to which curves show each


class Average(NamedTuple):
    """The mean of `n` values and its 95 % interval, None where there are too few."""

    mean: float | None
    low: float | None
    high: float | None
    n: int


class Store:
    """Finished videos in a folder: one file for each content and settings, so that a run can be taken up again."""

    def __init__(self, out: Path, settings: Table):
        self.folder = out / STORE
        self.settings = json.dumps(settings, sort_keys=True)

    def _path(self, content: str) -> Path:
        key = hashlib.sha256(f"{content}\0{self.settings}".encode()).hexdigest()
        return self.folder / f"{key[:32]}.json"

    def get(self, content: str) -> Measured | None:
        """What was measured of a content, None if nothing was."""
        try:
            return Measured(**json.loads(self._path(content).read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def put(self, content: str, measured: Measured) -> Measured:
        """Keeps what was measured, and returns it."""
        atomic.write(self._path(content), json.dumps(dataclasses.asdict(measured)).encode())
        return measured


def check_suite(out: Path, suite: str) -> None:
    """Raises `InputError` if the folder holds results of another suite, or something else by that name."""
    path = out / RESULTS
    if not path.exists():
        return
    try:
        found = json.loads(path.read_bytes())["protocol"]["suite"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a file of results; choose another --out.") from error
    require(found == suite, f"{path} holds results of suite {found}; choose another --out.")


def summary(results: Results, seed: int) -> dict[str, Average]:
    """Each figure's mean over videos with a 95 % bootstrap interval."""
    return {
        name: average((each.figures.get(name) for each in results.videos.values()), seed)
        for name in results.figures
    }


def curves(results: Results, seed: int) -> dict[str, list[Average]]:
    """Each figure's mean over videos, window by window, with intervals: over the videos that are that long."""
    out = {}
    for name in results.figures:
        listed = [each.windows.get(name, ()) for each in results.videos.values()]
        count = max(map(len, listed), default=0)
        out[name] = [
            average((one[i] for one in listed if i < len(one)), seed) for i in range(count)
        ]
    return out


def average(values: Iterable[float | None], seed: int) -> Average:
    """The mean of what is there, and its 95 % bootstrap interval."""
    known = [value for value in values if value is not None]
    mean, low, high = metrics.bootstrap(known, seed)
    if len(known) < 2:
        return Average(mean if known else None, None, None, len(known))
    return Average(mean, low, high, len(known))


def as_json(results: Results, seed: int) -> dict[str, Plain]:
    """The content of `results.json`."""
    return {
        "protocol": {
            "suite": results.suite,
            **results.protocol,
            "figures": {name: each._asdict() for name, each in results.figures.items()},
        },
        "summary": {name: each._asdict() for name, each in summary(results, seed).items()},
        "curves": {
            name: [each._asdict() for each in listed]
            for name, listed in curves(results, seed).items()
        },
        "videos": {name: _entry(each) for name, each in results.videos.items()},
        "skipped": results.skipped,
        "lacking": results.lacking,
    }


def _entry(measured: Measured) -> dict[str, Plain]:
    table = dataclasses.asdict(measured)
    about = table.pop("about")
    return {**about, **table}


def write(out: Path, results: Results, seed: int) -> dict[str, Plain]:
    """Writes all files of a folder of results, and returns the content of `results.json`."""
    table = as_json(results, seed)
    atomic.write(out / FIGURES, _csv(_figure_rows(results)))
    atomic.write(out / WINDOWS, _csv(_window_rows(results)))
    atomic.write(out / PAGE, page(results, seed).encode())
    draw(out / CURVES, results, seed)
    atomic.write(out / RESULTS, json.dumps(table, indent=1).encode())
    return table


def _csv(rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _figure_rows(results: Results) -> Iterable[Sequence[object]]:
    yield "video", "figure", "unit", "value", "low", "high", "first", "last"
    for video, each in results.videos.items():
        for name, value in each.figures.items():
            low, high = each.intervals.get(name) or (None, None)
            ends = each.first.get(name), each.last.get(name)
            yield video, name, results.figures[name].unit, value, low, high, *ends


def _window_rows(results: Results) -> Iterable[Sequence[object]]:
    yield "video", "figure", "window", "value"
    for video, each in results.videos.items():
        for name, values in each.windows.items():
            for number, value in enumerate(values):
                yield video, name, number, value


def page(results: Results, seed: int) -> str:
    """The results as Markdown: a summary, a row for each video, what was skipped, what the figures mean."""
    figures = results.figures
    facts = ", ".join(
        f"{name} {value}"
        for name, value in results.protocol.items()
        if isinstance(value, str | int | float)
    )
    over = summary(results, seed)
    parts = [
        f"# Figures of {len(results.videos)} videos",
        f"suite {results.suite}, {facts}",
        markdown_table(
            ("figure", "unit", "better", "mean", "95 % interval", "videos"),
            [
                (
                    name,
                    each.unit,
                    each.better,
                    shown(over[name].mean),
                    _between(over[name]),
                    over[name].n,
                )
                for name, each in figures.items()
            ],
        ),
        markdown_table(
            ("video", *figures),
            [
                (name, *(shown(each.figures.get(figure)) for figure in figures))
                for name, each in results.videos.items()
            ],
        ),
        "\n".join(f"- `{name}`: {each.meaning} ({each.unit})" for name, each in figures.items()),
    ]
    if results.skipped:
        skipped = (f"- `{name}`: {reason}" for name, reason in results.skipped.items())
        parts.append("\n".join(["Skipped:", "", *skipped]))
    if results.lacking:
        parts.append("\n".join(["Lacking:", "", *(f"- {each}" for each in results.lacking)]))
    return "\n\n".join(parts) + "\n"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |"
        for line in lines
    )


def shown(value: float | None) -> str:
    """A number in a table: four digits, `-` for none."""
    return "-" if value is None else f"{value:.4g}"


def _between(over: Average) -> str:
    return "-" if over.low is None else f"[{shown(over.low)}, {shown(over.high)}]"


def draw(path: Path, results: Results, seed: int) -> None:
    """The curves as PNG: a panel for each figure; each video thin, the mean with its band."""
    from matplotlib.figure import Figure  # no other function needs it

    drawn = curves(results, seed)
    columns = min(3, max(1, len(drawn)))
    rows = max(1, math.ceil(len(drawn) / columns))
    sheet = Figure(figsize=(4 * columns, 2.6 * rows), layout="constrained")
    panels = sheet.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(drawn) :]:
        panel.axis("off")
    for panel, (name, over) in zip(panels, drawn.items()):
        panel.set_title(name, fontsize=10)
        panel.set_ylabel(results.figures[name].unit, fontsize=7)
        panel.set_xlabel("window", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.xaxis.get_major_locator().set_params(integer=True)
        if len(results.videos) <= THIN_LINES:
            for each in results.videos.values():
                panel.plot(_gaps(each.windows.get(name, ())), color="0.7", lw=0.8, marker=".", ms=3)
        mean, low, high, _ = map(_gaps, zip(*over)) if over else [[]] * 4
        panel.plot(mean, color="C0", lw=1.8, marker=".", ms=4)
        panel.fill_between(range(len(low)), low, high, color="C0", alpha=0.2, lw=0)
    with atomic.file(path) as fresh:
        sheet.savefig(fresh, dpi=120, metadata={"Software": None})


def _gaps(values: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
