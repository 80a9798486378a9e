"""Measures videos with official VBench code, which lives in an environment of its own: one process a metric.

Here, without torch: which weights are there, which videos a metric can judge, what is asked, and the results of the
answers. `vbench_process.py` starts the processes and `vbench_driver.py` is what runs in them.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

from packforcing_jax.errors import nearest, require, sentence, shown
from packforcing_jax.evaluation import vbench_metrics, vbench_process
from packforcing_jax.evaluation.vbench_metrics import (
    SUITES,
    Caches,
    Film,
    Metric,
    Weight,
)
from packforcing_jax.evaluation.vbench_process import Failure, Host
from packforcing_jax.evaluation.video_files import Prompt, VideoFile
from packforcing_jax.io import atomic, identity

TOGETHER = 16  # videos that one process measures
PROTOCOLS = {
    "vbench": "whole: VBench's custom input, each metric on the whole video",
    "clip": "windows: CLIP ViT-B/32, frames at a fixed rate, mean over windows of the mean cosine",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure. `environment`: a Python, or the folder of a virtual environment, that has vbench. `metrics`: some
    of the suite, none for all.

    `weights_cache` holds `vbench/` and `torch/`; None: VBENCH_CACHE_DIR and TORCH_HOME, or ~/.cache. `time_limit`:
    seconds for one process. `rate` (frames a second) and `window` (seconds) are those of the CLIP score.
    """

    environment: Path
    suite: str = "vbench"
    metrics: Sequence[str] = ()
    rule: str = "short"
    protocol: str = "whole"
    weights_cache: Path | None = None
    allow_network: bool = False
    time_limit: float = 3600.0
    device: str = "cpu"
    rate: float = 2.0
    window: float = 10.0

    def __post_init__(self) -> None:
        require(
            self.suite in SUITES,
            f"suite {shown(self.suite)} is unknown; choose one of {', '.join(SUITES)}.",
        )
        require(
            self.rule in ("short", "extended"),
            f"rule {shown(self.rule)} is unknown; choose short or extended.",
        )
        require(self.protocol != "long", vbench_metrics.NO_LONG)
        require(
            self.protocol == "whole",
            f"protocol {shown(self.protocol)} is unknown; choose whole.",
        )
        require(
            self.device in ("cpu", "cuda"),
            f"device {shown(self.device)} is unknown; choose cpu or cuda, and a GPU by CUDA_VISIBLE_DEVICES: VBench "
            "compares the name itself.",
        )
        for name in ("time_limit", "rate", "window"):
            value = getattr(self, name)
            require(
                0 < value < math.inf, f"{name.replace('_', ' ')} {shown(value)} is not above 0."
            )

        for name in self.metrics:
            require(
                name in SUITES[self.suite],
                f"suite {self.suite} has no metric {shown(name)}; {nearest(name, SUITES[self.suite])}",
            )

    @property
    def asked(self) -> Mapping[str, Metric]:
        """The metrics that are asked for, in the order of the suite."""
        suite = SUITES[self.suite]
        return {name: each for name, each in suite.items() if name in (self.metrics or suite)}


class Results(NamedTuple):
    """What was measured. `absent`: why a video has no value of a figure; `failed`: metrics that did not finish."""

    protocol: dict
    videos: dict[str, dict]
    skipped: dict[str, str]
    absent: dict[str, dict[str, str]]
    failed: dict[str, str]

    @property
    def complete(self) -> bool:
        """Whether every metric has a value for every video."""
        return not (self.skipped or self.absent or self.failed)


class Value(TypedDict):
    """What a process answered for one video; `value` None: not a number.

    `windows` of the CLIP score with the `frames` of each; `tokens` of a prompt and how many of them are `read`.
    """

    value: float | None
    windows: NotRequired[list[float | None]]
    frames: NotRequired[list[list[int]]]
    tokens: NotRequired[int]
    read: NotRequired[int]


Say = Callable[[str], None]


def evaluate(
    videos: Sequence[VideoFile],
    prompts: Mapping[str, Prompt],
    options: Options,
    out: Path,
    say: Say,
) -> Results:
    """Measures `videos`; values are kept in `out`, and those found there under the same settings are taken.

    `prompts` by the videos' names; `say` is given a line for each step. A metric that lacks a weight, or whose process
    fails, is named in the results, and the others go on. Raises `InputError` where nothing can be measured at all.
    """
    named = {video.name: video.path.resolve() for video in videos}
    python = vbench_process.interpreter(options.environment)
    with tempfile.TemporaryDirectory(prefix="vbench-") as folder:
        room = Path(folder).resolve()
        staged = _staged_videos(named, room)
        host = Host(python, room, out / "logs", options.allow_network)
        seen = host.inspect(list(staged.values()))
        caches = _caches(options, seen)
        ready, failed = _plan(options, caches, say)
        films, skipped = _films(staged, seen)
        require(len(films) > 0, f"no video can be read: {_few(skipped)}.")
        scored = {name: each.text(options.rule) for name, each in prompts.items()}
        texts = {name: scored.get(name) for name in films}
        protocol = _protocol(options, seen, caches) | {"weights": _hashes(ready, caches)}
        about = {name: _about(films[name], texts[name]) for name in films}
        results = Results(protocol, about, skipped, {}, failed)
        _stage_weights(ready, caches, room)
        host = dataclasses.replace(host, caches=caches.variables())
        run = _Run(options, host, caches, out, say)
        subjects = _Subjects(films, staged, texts, named)
        for name, metric in ready.items():
            _measure(run, name, metric, subjects, results)
    return results


# What is asked


def _caches(options: Options, seen: Mapping) -> Caches:
    """Where weights lie: in the folder that is given, else where VBench and torch themselves look."""
    home = options.weights_cache
    if home is not None:
        require(home.is_dir(), f"--weights-cache {home} is not a folder; check the path.")
    own = {} if home is not None else os.environ
    base = home.resolve() if home is not None else Path("~/.cache").expanduser()
    vbench = Path(own.get("VBENCH_CACHE_DIR") or base / "vbench")
    vocabulary = seen["vocabulary"]
    clip = Path(vocabulary).parent if vocabulary else vbench / "ViCLIP"
    return Caches(vbench, Path(own.get("TORCH_HOME") or base / "torch"), clip)


def _films(staged: Mapping[str, Path], seen: Mapping) -> tuple[dict[str, Film], dict[str, str]]:
    """Videos that VBench's readers can read, and why the others are skipped."""
    films: dict[str, Film] = {}
    skipped: dict[str, str] = {}
    for name, path in staged.items():
        found = seen["videos"][str(path)]
        if "error" in found:
            said = found["error"].replace(str(path), name)
            skipped[name] = f"cannot be read ({sentence(said)})"
        elif not (found["frames"] > 0 and found["fps"] > 0):
            skipped[name] = f"has {found['frames']} frames at {found['fps']:g} a second"
        else:
            films[name] = Film(**{key: found[key] for key in Film._fields})
    return films, skipped


def _plan(options: Options, caches: Caches, say: Say) -> tuple[dict[str, Metric], dict[str, str]]:
    """The metrics that can start, and what each other one lacks; says which files are not there whole.

    Where the network is allowed official code fetches what is missing; what is there and broken it would only read.
    """
    lacking: dict[Weight, list[str]] = {}
    for name, metric in options.asked.items():
        for weight in metric.weights:
            if caches.found(weight) is None:
                lacking.setdefault(weight, []).append(name)
    told = vbench_metrics.listing(lacking.items(), caches)
    for line in told:
        say(f"weights: {line}")
    fetched = {each for each in lacking if options.allow_network and not caches.broken(each)}
    for weight in fetched:
        say(f"weights: VBench may fetch {weight.name} itself.")
    failed = {
        name: f"weights missing: {', '.join(files)}"
        for name in options.asked
        if (files := [x.name for x in lacking if x not in fetched and name in lacking[x]])
    }
    ready = {name: each for name, each in options.asked.items() if name not in failed}
    require(
        len(ready) > 0,
        f"no metric can start; weights that are missing: {'; '.join(told)}. Put them there, or give --weights-cache or "
        "--allow-network.",
    )
    return ready, failed


def _hashes(ready: Mapping[str, Metric], caches: Caches) -> dict[str, dict]:
    """Of every file that will be read: SHA-256, bytes, and whether it is the published one, None where unknown."""
    weights = {weight for metric in ready.values() for weight in metric.weights}
    found: dict[str, dict] = {}
    for weight in sorted(weights, key=lambda each: each.places):
        path = caches.found(weight)
        for file in () if path is None else [path / name for name in weight.members] or [path]:
            digest = identity.of_file(file)
            found[str(Path(weight.name, file.name) if weight.members else weight.name)] = {
                "sha256": digest,
                "bytes": file.stat().st_size,
                "published": digest.startswith(weight.sha256) if weight.sha256 else None,
            }
    return found


def _protocol(options: Options, seen: Mapping, caches: Caches) -> dict:
    """All that a figure depends on."""
    return {
        "suite": options.suite,
        "protocol": PROTOCOLS[options.suite],
        "rule": options.rule,
        "device": options.device,
        "python": seen["python"],
        "versions": seen["versions"],
        "weights": {},
        "stand_in_weights": caches.stand_ins,
        "settings": {"rate": options.rate, "window": options.window}
        if options.suite == "clip"
        else {},
        "dataset": {},
        "seconds": {},
    }


def _about(film: Film, text: str | None) -> dict:
    return {"figures": {}, "windows": {}, "film": film._asdict(), "prompt": text}


def _few(reasons: Mapping[str, str]) -> str:
    """The first of the reasons that a run names."""
    return "; ".join(f"{name} {reason}" for name, reason in list(reasons.items())[:3])


# Staging


def _staged_videos(named: Mapping[str, Path], room: Path) -> dict[str, Path]:
    """Links with the plain names and lower-case `.mp4` that VBench wants, by the videos' own names."""
    folder = room / "videos"
    folder.mkdir()
    links = {name: folder / f"{number:06d}.mp4" for number, name in enumerate(named)}
    for name, link in links.items():
        link.symlink_to(named[name])
    return links


def _stage_weights(ready: Mapping[str, Metric], caches: Caches, room: Path) -> None:
    """Links to the weights in all places where official code looks, so that no cache of the user is written to."""
    staged = Caches(room / "cache" / "vbench", room / "cache" / "torch", room / "cache" / "clip")
    for weight in {weight for metric in ready.values() for weight in metric.weights}:
        source = caches.found(weight)
        if source is None:
            continue
        for path in map(staged.path, weight.places):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(source)


# Values


class _Run(NamedTuple):
    """What all metrics of a run share."""

    options: Options
    host: Host
    caches: Caches
    out: Path
    say: Say


class _Subjects(NamedTuple):
    """The videos of a run by name: what is known of them, links to them, their texts, the files themselves."""

    films: Mapping[str, Film]
    staged: Mapping[str, Path]
    texts: Mapping[str, str | None]
    files: Mapping[str, Path]


def _measure(run: _Run, name: str, metric: Metric, subjects: _Subjects, results: Results) -> None:
    """Adds the values of one metric to the results, those of earlier runs included."""
    fit: list[str] = []
    for video, film in subjects.films.items():
        reason = vbench_metrics.unfit(name, metric, film, subjects.texts[video])
        if reason is None:
            fit.append(video)
        else:
            results.absent.setdefault(video, {})[name] = reason
    store = run.out / "metrics" / f"{name}.json"
    kept = _kept(store)
    keys = {each: _key(name, metric, subjects, each, results.protocol) for each in fit}
    todo = [each for each in fit if keys[each] not in kept]
    start = time.monotonic()
    for first in range(0, len(todo), TOGETHER):
        some = todo[first : first + TOGETHER]
        run.say(f"{name}: videos {first + 1} to {first + len(some)} of {len(todo)}")
        values, reasons = _asked(run, name, metric, some, subjects)
        if not values:
            results.failed[name] = next(iter(reasons.values()))
            run.say(f"{name}: {results.failed[name]}")
            break
        for video, reason in reasons.items():
            results.absent.setdefault(video, {})[name] = f"has no {name}: {reason}"
        results.protocol["weights"] |= _hashes({name: metric}, run.caches)  # fetched ones too
        keys |= {each: _key(name, metric, subjects, each, results.protocol) for each in some}
        kept |= {keys[each]: value for each, value in values.items()}
        atomic.write(store, json.dumps(kept, indent=1).encode())
    if todo and name not in results.failed:
        spent = time.monotonic() - start
        results.protocol["seconds"][name] = round(spent, 1)
        run.say(f"{name}: done in {spent:.1f} s")
    _add(name, metric, {each: kept[keys[each]] for each in fit if keys[each] in kept}, results)


def _asked(
    run: _Run, name: str, metric: Metric, some: Sequence[str], subjects: _Subjects
) -> tuple[dict[str, Value], dict[str, str]]:
    """Values by video, and why others have none. Where a process of several videos fails, each is tried by itself."""
    request = _request(run.options, name, some, subjects)
    answer = run.host.ask(name, request, run.options.time_limit)
    found = answer if isinstance(answer, Failure) else _values(answer, metric, some, subjects)
    if not isinstance(found, Failure):
        return found, {}
    if found.late or len(some) == 1:
        return {}, dict.fromkeys(some, found.reason)
    run.say(f"{name}: {found.reason}; now each video by itself")
    alone = [_asked(run, name, metric, [each], subjects) for each in some]
    values = {video: value for each, _ in alone for video, value in each.items()}
    return values, {video: reason for _, each in alone for video, reason in each.items()}


def _request(options: Options, name: str, some: Sequence[str], subjects: _Subjects) -> dict:
    return {
        "action": "measure",
        "metric": name,
        "videos": {str(subjects.staged[each]): subjects.texts[each] or "" for each in some},
        "device": options.device,
        "allow_network": options.allow_network,
        "rate": options.rate,
        "window": options.window,
    }


def _key(name: str, metric: Metric, subjects: _Subjects, video: str, protocol: Mapping) -> str:
    """What a value depends on, as one hash."""
    read = {weight.name for weight in metric.weights}
    told = {
        "metric": name,
        "video": identity.of_file(subjects.files[video]),
        "prompt": subjects.texts[video] if metric.text else None,
        "weights": {
            file: each["sha256"]
            for file, each in protocol["weights"].items()
            if file.partition("/")[0] in read
        },
        **{key: protocol[key] for key in ("versions", "python", "device", "settings")},
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _kept(store: Path) -> dict[str, Value]:
    """Values of earlier runs by key; none where the file is not what was written."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(store.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return {}


def _values(
    answer: Mapping, metric: Metric, some: Sequence[str], subjects: _Subjects
) -> dict[str, Value] | Failure:
    """The values in an answer by video, or why they cannot be used."""
    values: dict[str, Value] = {}
    for video in some:
        path = str(subjects.staged[video])
        found = answer.get("videos", {}).get(path)
        if not isinstance(found, int | float):
            return Failure(f"the official code gave no value for {video}")
        value: Value = {"value": _finite(found)}
        if path in answer.get("windows", {}):
            windows = answer["windows"][path]
            value["windows"] = [_finite(each) for each in windows["values"]]
            value["frames"] = windows["frames"]
        if answer.get("tokens"):
            value["tokens"] = answer["tokens"]["counts"][path]
            value["read"] = answer["tokens"]["read"]
        values[video] = value
    numbers = {video: each["value"] for video, each in values.items() if each["value"] is not None}
    if len(numbers) == len(values):
        ours = vbench_metrics.dataset_value(metric, numbers, subjects.films)
        if not math.isclose(ours, answer["dataset"], rel_tol=1e-4, abs_tol=1e-6):
            official = f"the official code's value of all videos is {answer['dataset']:g}"
            return Failure(f"{official}, formed here it is {ours:g}")
    return values


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _add(name: str, metric: Metric, values: Mapping[str, Value], results: Results) -> None:
    """Puts values where they belong, not-a-numbers under `absent`, and the data set's value into the protocol."""
    numbers: dict[str, float] = {}
    films = {video: Film(**each["film"]) for video, each in results.videos.items()}
    for video, found in values.items():
        about = results.videos[video]
        if "tokens" in found and "read" in found:
            about.setdefault("tokens", {})[name] = {
                "prompt": found["tokens"],
                "read": found["read"],
            }
        value = found["value"]
        if value is None:
            reason = f"has no {name}: the official code returned not a number"
            results.absent.setdefault(video, {})[name] = reason
            continue
        numbers[video] = about["figures"][name] = value
        if "windows" in found and "frames" in found:
            about["windows"][name] = found["windows"]
            about.setdefault("frames", {})[name] = found["frames"]
    if numbers:
        results.protocol["dataset"][name] = vbench_metrics.dataset_value(metric, numbers, films)


def reasons(results: Results) -> Iterator[str]:
    """A sentence for each metric that failed, and for each other figure that a measured video lacks."""
    for video, each in results.absent.items():
        for reason in each.values():
            yield f"{video} {reason}."
    for name, reason in results.failed.items():
        yield f"{name} failed: {reason}."
