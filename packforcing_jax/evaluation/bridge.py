"""Measures videos with official VBench code, which lives in an environment of its own: one process a metric.

Here, without torch: which weights are there, which videos a metric can judge, the processes with their time limit, what
their answers mean, and the results. `vbench_driver.py` is what runs on the other side. Also a program until the verb
`evaluate` has the suites: `python -m packforcing_jax.evaluation.bridge VIDEOS... --environment PATH --out DIR`.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple, NotRequired, TypedDict

from packforcing_jax.errors import InputError, MachineError, require, sentence, shown
from packforcing_jax.evaluation import vbench_metrics
from packforcing_jax.evaluation.vbench_metrics import (
    SUITES,
    Caches,
    Film,
    Metric,
    Prompt,
    Rule,
    Weight,
)
from packforcing_jax.io import atomic, identity, lines

DRIVER = Path(__file__).with_name("vbench_driver.py")
VERSIONS = Path(__file__).with_name("vbench.txt")
FILMS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
TOGETHER = 16  # videos that one process measures
INSPECTION = 600.0  # seconds for the versions and the sizes of all videos
CLOSED = "http://127.0.0.1:9"  # where no proxy listens: wget, git and urllib fail at once
PROXIES = ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
PROTOCOLS = {
    "vbench": "whole: VBench's custom input, each metric on the whole video",
    "clip": "windows: CLIP ViT-B/32, frames at a fixed rate, mean over windows of the mean cosine",
}
TAIL = 4000  # bytes of a log that are searched for its last line


@dataclasses.dataclass(frozen=True)
class Options:
    """How to measure. `environment`: a Python, or the folder of a virtual environment, that has vbench.

    `weights_cache` holds `vbench/` and `torch/`; None: VBENCH_CACHE_DIR and TORCH_HOME, or ~/.cache. `time_limit`:
    seconds for one process. `rate` (frames a second) and `window` (seconds) are those of the CLIP score.
    """

    environment: Path
    suite: str = "vbench"
    rule: Rule = "short"
    protocol: str = "whole"
    weights_cache: Path | None = None
    allow_network: bool = False
    time_limit: float = 3600.0
    device: str = "cpu"
    rate: float = 2.0
    window: float = 10.0
    driver: Path = DRIVER

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

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return SUITES[self.suite]


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

    def to_json(self) -> str:
        return json.dumps(self._asdict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


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
    videos: Sequence[Path],
    prompts: Mapping[str, Prompt],
    options: Options,
    out: Path,
    say: Say = lambda line: print(line, file=sys.stderr, flush=True),
) -> Results:
    """Measures `videos` and writes `out/results.json`; values found earlier under the same settings are kept.

    `prompts` by file name. A metric that lacks a weight, or whose process fails, is named in the results, and the
    others go on. Raises `InputError` where nothing can be measured at all.
    """
    named = _named(videos)
    python = interpreter(options.environment)
    with tempfile.TemporaryDirectory(prefix="vbench-") as folder:
        room = Path(folder).resolve()
        staged = _staged_videos(named, room)
        run = _Run(options, python, room, out, say)
        seen = run.inspect(list(staged.values()))
        films, skipped = _films(staged, seen)
        caches = _caches(options, seen)
        ready, failed = _plan(options, caches, say)
        require(len(films) > 0, f"no video can be read: {_first(skipped)}.")
        texts = {
            name: prompts[name].under(options.rule) if name in prompts else None for name in films
        }
        weights = _hashes(ready, caches)
        results = Results(
            _protocol(options, seen, weights, caches),
            {name: _about(films[name], texts[name]) for name in films},
            skipped,
            {},
            failed,
        )
        _stage_weights(ready, caches, room)
        for name, metric in ready.items():
            subjects = _Subjects(films, staged, texts, {each: named[each] for each in films})
            _measure(run, name, metric, subjects, results)
    atomic.write(out / "results.json", results.to_json().encode())
    return results


# What is asked


def _named(videos: Sequence[Path]) -> dict[str, Path]:
    """Videos by file name, which tells them apart in prompts and results."""
    require(len(videos) > 0, "no video is given; name files or a folder that holds some.")
    named: dict[str, Path] = {}
    for path in videos:
        require(path.is_file(), f"{path} is not a file; check the path.")
        require(
            path.name not in named,
            f"two videos are called {path.name} ({named.get(path.name)} and {path}); give them different names.",
        )
        named[path.name] = path.resolve()
    return named


def interpreter(environment: Path) -> Path:
    """The Python of an environment, which is given as that file or as its folder."""
    python = environment / "bin" / "python" if environment.is_dir() else environment
    require(
        os.access(python, os.X_OK) and python.is_file(),
        f"--environment {environment} has no Python that starts; make one with "
        f"python -m packforcing_jax.evaluation.bridge --make-environment {environment}.",
    )
    return python.absolute()  # not resolved: a link is what makes it the Python of its environment


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
            skipped[name] = f"cannot be read ({sentence(found['error'])})"
        elif not (found["frames"] > 0 and found["fps"] > 0):
            skipped[name] = f"has {found['frames']} frames at {found['fps']:g} a second"
        else:
            films[name] = Film(**{key: found[key] for key in Film._fields})
    return films, skipped


def _plan(options: Options, caches: Caches, say: Say) -> tuple[dict[str, Metric], dict[str, str]]:
    """The metrics that can start, and what each other one lacks; says which files that are."""
    lacking: dict[Weight, list[str]] = {}
    for name, metric in options.metrics.items():
        for weight in metric.weights:
            if caches.found(weight) is None:
                lacking.setdefault(weight, []).append(name)
    told = vbench_metrics.listing(lacking.items(), caches)
    for line in told:
        say(f"weights: {line}")
    if options.allow_network:
        say("weights: VBench may fetch what is missing.") if told else None
        return dict(options.metrics), {}
    failed = {
        name: "weights missing: "
        + ", ".join(each.name for each in lacking if name in lacking[each])
        for name in options.metrics
        if any(name in names for names in lacking.values())
    }
    ready = {name: each for name, each in options.metrics.items() if name not in failed}
    places = "; ".join(told)
    require(
        len(ready) > 0,
        f"no metric can start, weights are missing: {places}. Put them there, or give --weights-cache or "
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


def _protocol(options: Options, seen: Mapping, weights: Mapping[str, dict], caches: Caches) -> dict:
    """All that a figure depends on."""
    return {
        "suite": options.suite,
        "protocol": PROTOCOLS[options.suite],
        "prompt_rule": options.rule,
        "device": options.device,
        "python": seen["python"],
        "versions": seen["versions"],
        "weights": dict(weights),
        "stand_in_weights": caches.stand_ins,
        "figures": {
            name: {"what": each.what, "unit": each.unit, "direction": "higher"}
            for name, each in options.metrics.items()
        },
        "settings": {"rate": options.rate, "window": options.window}
        if options.suite == "clip"
        else {},
        "dataset": {},
        "mean": {},
        "seconds": {},
    }


def _about(film: Film, text: str | None) -> dict:
    return {"figures": {}, "windows": {}, "film": film._asdict(), "prompt": text}


def _first(reasons: Mapping[str, str]) -> str:
    name, reason = next(iter(reasons.items()))
    return f"{name} {reason}"


# Processes


@dataclasses.dataclass(frozen=True)
class _Run:
    """Starts processes of the other environment in `room`; what they print goes into `out/logs`."""

    options: Options
    python: Path
    room: Path
    out: Path
    say: Say

    def inspect(self, videos: Sequence[Path]) -> dict:
        """What `vbench_driver.inspect` answers; `InputError` if the environment cannot."""
        request = {"action": "inspect", "videos": [str(path) for path in videos]}
        answer = self.ask("inspect", request, INSPECTION)
        environment = self.options.environment
        if isinstance(answer, str):
            raise InputError(f"--environment {environment} cannot be used: {answer}.")
        require(
            answer["versions"].get("vbench") is not None,
            f"--environment {environment} has no vbench; make one with "
            "python -m packforcing_jax.evaluation.bridge --make-environment PATH.",
        )
        return answer

    def ask(self, name: str, request: Mapping, limit: float) -> dict | str:
        """The answer of one process, or a sentence saying why there is none."""
        asked = self.room / "request.json"
        answer = self.room / "answer.json"
        answer.unlink(missing_ok=True)
        asked.write_text(json.dumps(request), encoding="utf-8")
        path = self.out / "logs" / f"{name}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [str(self.python), "-I", str(self.options.driver), str(asked), str(answer)]
        with path.open("ab") as log:
            status = _finished(command, self.room, environment(self.options, self.room), log, limit)
        if status is None:
            return f"no answer within {limit:g} seconds (--time-limit); its log is {path}"
        try:
            said = json.loads(answer.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return f"it ended with {_ending(status)} and no answer ({_last_line(path)}); its log is {path}"
        return f"{sentence(str(said['error']))}; its log is {path}" if "error" in said else said


def environment(options: Options, room: Path) -> dict[str, str]:
    """The variables of a process: nothing of ours on its path, caches in `room`, and no way out unless it is allowed.

    Where the network is allowed, the user's own caches are used, so that what is fetched is kept.
    """
    mine = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    if options.allow_network:
        home = options.weights_cache
        own = {} if home is None else {"vbench": home / "vbench", "torch": home / "torch"}
        chosen = {"VBENCH_CACHE_DIR": own.get("vbench"), "TORCH_HOME": own.get("torch")}
        return mine | {key: str(path.resolve()) for key, path in chosen.items() if path is not None}
    closed = {each: CLOSED for name in PROXIES for each in (name, name.upper())}
    for name in ("no_proxy", "NO_PROXY"):
        mine.pop(name, None)
    places = {"HOME": "home", "XDG_CACHE_HOME": "home/.cache", "TMPDIR": "tmp"}
    places |= {"VBENCH_CACHE_DIR": "cache/vbench", "TORCH_HOME": "cache/torch"}
    for place in places.values():
        (room / place).mkdir(parents=True, exist_ok=True)
    return mine | closed | OFFLINE | {key: str(room / place) for key, place in places.items()}


def _finished(
    command: Sequence[str], room: Path, variables: Mapping[str, str], log: IO[bytes], limit: float
) -> int | None:
    """The exit status of a process, None if it did not end in time; whatever it started ends with it."""
    try:
        process = subprocess.Popen(
            command,
            cwd=room,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise MachineError(f"{command[0]} does not start ({error.strerror}).") from error
    status = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(limit)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return status


def _ending(status: int) -> str:
    """An exit status in words; a process that was ended by SIGKILL has often run out of memory."""
    if status >= 0:
        return f"exit code {status}"
    often = ", as when memory runs out" if -status == signal.SIGKILL else ""
    return f"{signal.Signals(-status).name}{often}"


def _last_line(path: Path) -> str:
    """The last thing that a log says."""
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - TAIL))
        said = log.read().decode(errors="replace").replace("\r", "\n").split("\n")
    return sentence(next((line for line in reversed(said) if line.strip()), "it said nothing"))


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
        for path in () if source is None else map(staged.path, weight.places):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(source.resolve())  # type: ignore[union-attr]


# Values


class _Subjects(NamedTuple):
    """The videos of a run by name: what is known of them, where their links lie, their texts, the files themselves."""

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
    keys = {each: _key(name, metric, subjects, each, results.protocol) for each in fit}
    store = run.out / "metrics" / f"{name}.json"
    kept = _kept(store)
    todo = [each for each in fit if keys[each] not in kept]
    start = time.monotonic()
    for first in range(0, len(todo), TOGETHER):
        some = todo[first : first + TOGETHER]
        run.say(f"{name}: videos {first + 1} to {first + len(some)} of {len(todo)}")
        answer = run.ask(name, _request(run.options, name, some, subjects), run.options.time_limit)
        values = _values(answer, some, subjects.staged)
        if isinstance(values, str):
            results.failed[name] = values
            run.say(f"{name}: {values}")
            break
        kept |= {keys[each]: value for each, value in values.items()}
        atomic.write(store, json.dumps(kept, indent=1).encode())
    if todo and name not in results.failed:
        spent = time.monotonic() - start
        results.protocol["seconds"][name] = round(spent, 1)
        run.say(f"{name}: done in {spent:.1f} s")
    _add(name, metric, {each: kept[keys[each]] for each in fit if keys[each] in kept}, results)


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
    answer: dict | str, some: Sequence[str], staged: Mapping[str, Path]
) -> dict[str, Value] | str:
    """The values in an answer by video, or a sentence saying why there are none."""
    if isinstance(answer, str):
        return answer
    values: dict[str, Value] = {}
    for video in some:
        path = str(staged[video])
        found = answer.get("videos", {}).get(path)
        if not isinstance(found, int | float):
            return f"the official code gave no value for {video}"
        value: Value = {"value": _finite(found)}
        if path in answer.get("windows", {}):
            windows = answer["windows"][path]
            value["windows"] = [_finite(each) for each in windows["values"]]
            value["frames"] = windows["frames"]
        if answer.get("tokens"):
            value["tokens"] = answer["tokens"]["counts"][path]
            value["read"] = answer["tokens"]["read"]
        values[video] = value
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
            results.absent.setdefault(video, {})[name] = "the official code returned not a number"
            continue
        numbers[video] = about["figures"][name] = value
        if "windows" in found and "frames" in found:
            about["windows"][name] = found["windows"]
            about.setdefault("frames", {})[name] = found["frames"]
            about["figures"] |= _drift(name, found["windows"])
    if numbers:
        results.protocol["dataset"][name] = vbench_metrics.dataset_value(metric, numbers, films)
        results.protocol["mean"][name] = sum(numbers.values()) / len(numbers)


def _drift(name: str, windows: Sequence[float | None]) -> dict[str, float]:
    """First and last window and the decline between them, where both have a value."""
    first, last = windows[0], windows[-1]
    if first is None or last is None:
        return {}
    return {f"{name}_first": first, f"{name}_last": last, f"{name}_decline": first - last}


def table(results: Results) -> str:
    """The values as lines of text; a dash where there is none."""
    names = [*results.protocol["figures"]]
    head = ["video", *names]
    rows = [
        [video, *(_written(about["figures"].get(name)) for name in names)]
        for video, about in results.videos.items()
    ]
    rows.append(
        ["mean of videos", *(_written(results.protocol["mean"].get(name)) for name in names)]
    )
    rows.append(["data set", *(_written(results.protocol["dataset"].get(name)) for name in names)])
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines_ = [
        "  ".join(word.rjust(width) for word, width in zip(row, widths)) for row in [head, *rows]
    ]
    if results.protocol["stand_in_weights"]:
        lines_.append("STAND-IN WEIGHTS: these numbers say nothing about the videos.")
    return "\n".join(lines_)


def _written(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def reasons(results: Results) -> Iterator[str]:
    """A sentence for each video and metric without a value."""
    for video, reason in results.skipped.items():
        yield f"{video} is skipped: it {reason}."
    for video, each in results.absent.items():
        for name, reason in each.items():
            yield f"{name} of {video}: {reason}."
    for name, reason in results.failed.items():
        yield f"{name} failed: {reason}."


# The environment


def make_environment(path: Path, python: str = "python3.11") -> None:
    """Makes a virtual environment with the versions in `vbench.txt`; raises `MachineError` if that fails."""
    require(
        not path.exists() or (path.is_dir() and not any(path.iterdir())),
        f"{path} is there already; remove it or choose another folder.",
    )
    found = shutil.which(python)
    require(
        found is not None,
        f"{python} is not here; VBench's environment needs Python 3.11.",
    )
    pip = [
        str(path / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "-q",
    ]
    pinned = VERSIONS.read_text(encoding="utf-8").split("\n")
    base = [line for line in pinned if line.startswith(("setuptools=", "torch=", "torchvision="))]
    steps = [
        [str(found), "-m", "venv", str(path)],
        [*pip, "-c", str(VERSIONS), *base],  # with what a build of torch for GPUs depends on
        [*pip, "--no-deps", "-r", str(VERSIONS)],  # complete: vbench asks for more than is used
    ]
    try:
        for step in steps:
            done = subprocess.run(step, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
            if done.returncode:
                said = done.stderr.decode(errors="replace").strip().splitlines() or [
                    "no reason given"
                ]
                raise MachineError(f"{path} could not be made ({sentence(said[-1])}).")
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


# The program


def read_prompts(path: Path) -> dict[str, Prompt]:
    """Prompts by file name, of lines `{"file": ..., "prompt": ..., "extended"?: ...}`."""
    example = '{"file": "a.mp4", "prompt": "a red square", "extended": "..."}'
    found: dict[str, Prompt] = {}
    for number, line in enumerate(lines.read(path, f"--prompts {path}", "check the path"), 1):
        if not line.strip():
            continue
        with contextlib.suppress(ValueError):
            told = json.loads(line)
            known = isinstance(told, dict) and {"file", "prompt"} <= told.keys() <= {
                "file",
                "prompt",
                "extended",
            }
            if known and all(isinstance(each, str) for each in told.values()):
                name = Path(told["file"]).name
                require(
                    name not in found,
                    f"{path}, line {number}: {name} has a prompt already; remove one.",
                )
                found[name] = Prompt(told["prompt"], told.get("extended"))
                continue
        raise InputError(f"{path}, line {number}: {shown(line)} is not a prompt; write {example}.")
    return found


def films_in(paths: Sequence[Path]) -> list[Path]:
    """Files as given, and of folders the videos in them, in order of their names."""
    found: list[Path] = []
    for path in paths:
        require(path.exists(), f"{path} does not exist; check the path.")
        inside = (
            sorted(each for each in path.iterdir() if each.suffix.lower() in FILMS)
            if path.is_dir()
            else [path]
        )
        require(len(inside) > 0, f"{path} holds no video ({', '.join(FILMS)}); check the path.")
        found += inside
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of the suites `vbench` and `clip`."""
    default = Options(Path())
    parser.add_argument("--suite", default=default.suite, metavar="NAME", help=" or ".join(SUITES))
    parser.add_argument(
        "--rule",
        default=default.rule,
        metavar="NAME",
        help="prompts that are scored: short or extended",
    )
    parser.add_argument(
        "--protocol",
        default=default.protocol,
        metavar="NAME",
        help="whole, the only one that packages can run",
    )
    parser.add_argument(
        "--environment",
        type=Path,
        metavar="PATH",
        help="a Python, or its environment's folder, that has vbench",
    )
    parser.add_argument(
        "--weights-cache",
        type=Path,
        metavar="DIR",
        help="folder with vbench/ and torch/ in it (default: ~/.cache)",
    )
    parser.add_argument(
        "--allow-network", action="store_true", help="let VBench fetch weights that are missing"
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        default=default.time_limit,
        metavar="SECONDS",
        help=f"for one process, which measures {TOGETHER} videos at most (default: 3600)",
    )
    parser.add_argument(
        "--device", default=default.device, metavar="NAME", help="cpu or cuda (default: cpu)"
    )
    parser.add_argument(
        "--rate",
        type=float,
        default=default.rate,
        metavar="FPS",
        help="frames a second of the CLIP score (default: 2)",
    )
    parser.add_argument(
        "--window",
        type=float,
        default=default.window,
        metavar="SECONDS",
        help="of the CLIP score (default: 10)",
    )


def options_of(args: argparse.Namespace) -> Options:
    """The options that the flags name."""
    require(
        args.environment is not None,
        f"--suite {args.suite} needs --environment PATH, a Python that has vbench; make one with "
        "python -m packforcing_jax.evaluation.bridge --make-environment PATH.",
    )
    names = [field.name for field in dataclasses.fields(Options) if hasattr(args, field.name)]
    return Options(**{name: getattr(args, name) for name in names})


def run(args: argparse.Namespace) -> int:
    """Measures what the flags name and prints it; 1 if a video or a metric was left out."""
    options = options_of(args)
    prompts = {} if args.prompts is None else read_prompts(args.prompts)
    results = evaluate(films_in(args.videos), prompts, options, args.out)
    print(table(results))
    for reason in reasons(results):
        print(reason, file=sys.stderr)
    return 0 if results.complete else 1


def main(words: Sequence[str] | None = None) -> int:
    """The program; bad input and failures are one sentence and a code."""
    parser = argparse.ArgumentParser(
        prog="python -m packforcing_jax.evaluation.bridge", description=__doc__
    )
    parser.add_argument(
        "videos", nargs="*", type=Path, metavar="VIDEO", help="files, or folders of files"
    )
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help='lines {"file", "prompt", "extended"?}'
    )
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("out/vbench"))
    parser.add_argument(
        "--make-environment",
        type=Path,
        metavar="PATH",
        help="install VBench's environment there, and end",
    )
    add_arguments(parser)
    args = parser.parse_args(words)
    try:
        if args.make_environment is not None:
            make_environment(args.make_environment)
            return 0
        return run(args)
    except (InputError, MachineError) as error:
        print(sentence(str(error)), file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
