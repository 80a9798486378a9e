"""The suites `vbench` and `clip`: what the bridge to official code finds, in the form that all suites share."""

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from packforcing_jax.errors import require
from packforcing_jax.evaluation import bridge, vbench_process
from packforcing_jax.evaluation.suite import Meaning, Measured, Options, Plain, Results, Suite
from packforcing_jax.evaluation.vbench_metrics import SUITES
from packforcing_jax.evaluation.video_files import Prompt, VideoFile

DECLINE = "decline"  # of a figure with windows: its first one less its last
NOTE = "STAND-IN WEIGHTS: these numbers say nothing about the videos"
OFFICIAL = frozenset(
    "rule protocol environment metrics weights_cache allow_network time_limit device seed".split()
)


def options_of(suite: str, options: Options) -> bridge.Options:
    """The bridge's options; raises `InputError` for such as cannot be, or without an environment."""
    require(
        options.environment is not None,
        f"--suite {suite} needs --environment PATH, a Python that has vbench; make one with "
        f"{vbench_process.MAKE} PATH.",
    )
    fields = {each.name for each in dataclasses.fields(bridge.Options)}
    given = {name: value for name, value in vars(options).items() if name in fields}
    return bridge.Options(**given, suite=suite)


def check(suite: str, options: Options) -> None:
    """Raises `InputError` unless there is an environment, and Matplotlib, which draws the curves."""
    chosen = options_of(suite, options)
    vbench_process.interpreter(chosen.environment)
    require(
        importlib.util.find_spec("matplotlib") is not None,
        "Matplotlib, which draws the curves, is not installed; run: pip install 'packforcing-jax[eval]'.",
    )


def measure(
    suite: str,
    videos: Sequence[VideoFile],
    prompts: Mapping[str, Prompt],
    options: Options,
    out: Path,
) -> Results:
    """The figures of all videos by official code; what an earlier run found in `out` is taken from there."""
    chosen = options_of(suite, options)
    found = bridge.evaluate(videos, prompts, chosen, out, _say)
    figures = meanings(suite, chosen.metrics)
    note = {"note": NOTE} if found.protocol["stand_in_weights"] else {}
    others = [
        name for name, each in found.protocol["weights"].items() if each["published"] is False
    ]
    if others:
        note["not_the_published_weights"] = ", ".join(others)
    protocol: dict[str, Plain] = {**found.protocol, **note}
    protocol.pop("suite")
    return Results(
        suite,
        protocol | {"failed": found.failed},
        figures,
        {name: measured(about, found.absent.get(name, {})) for name, about in found.videos.items()},
        found.skipped,
        list(bridge.reasons(found)),
    )


def meanings(suite: str, metrics: Sequence[str] = ()) -> dict[str, Meaning]:
    """What the figures of a suite say: those of some metrics, or of all."""
    asked = {name: each for name, each in SUITES[suite].items() if name in (metrics or [name])}
    figures = {name: Meaning(each.unit, "higher", each.what) for name, each in asked.items()}
    if suite == "clip":
        decline = Meaning(figures["clip"].unit, "lower", "the first window less the last one")
        figures[f"clip_{DECLINE}"] = decline
    return figures


def measured(about: Mapping, absent: Mapping[str, str]) -> Measured:
    """One video of the bridge's results."""
    told = {key: value for key, value in about.items() if key not in ("figures", "windows")}
    windows: Mapping[str, Sequence[float | None]] = about["windows"]
    first = {name: values[0] for name, values in windows.items()}
    last = {name: values[-1] for name, values in windows.items()}
    declines = {
        f"{name}_{DECLINE}": start - end
        for name, start in first.items()
        if len(windows[name]) > 1 and start is not None and (end := last[name]) is not None
    }
    figures = {**about["figures"], **declines}
    return Measured(figures, windows, first, last, about={**told, "absent": dict(absent)})


def _say(line: str) -> None:
    print(f"evaluate: {line}", file=sys.stderr, flush=True)


def suite_of(name: str, help_: str, flags: frozenset[str], **defaults: float) -> Suite:
    """The row of one of the two suites."""
    return Suite(
        help_, flags, functools.partial(check, name), functools.partial(measure, name), defaults
    )


VBENCH = suite_of("vbench", "the seven metrics of VBench, by its own code", OFFICIAL)
CLIP = suite_of("clip", "windows of CLIP score", OFFICIAL | {"window", "rate"}, window=10.0)
