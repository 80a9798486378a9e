"""Methods side by side: the same prompts and noise under each, every video drawn once, figures read from the videos.

A comparison is a JSON file: weights, methods and settings make the arms, prompts and seeds the videos of each. Videos
and their figures are files of their own, so work can be stopped, divided over machines and put together again:
what is finished, and still what the file asks for, is kept.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from packforcing_jax import methods
from packforcing_jax.config import Experiment, loading
from packforcing_jax.errors import InputError, nearest, require
from packforcing_jax.evaluation.comparison_figures import SUITES, Film, Found
from packforcing_jax.evaluation.results import average
from packforcing_jax.evaluation.suite import Options, Plain
from packforcing_jax.io import atomic, identity, lines, model_folder, video
from packforcing_jax.methods.method import Method, lengthened
from packforcing_jax.sampling import pipeline, prompt_files, requests
from packforcing_jax.sampling.pipeline import SHIPPED, Pipeline
from packforcing_jax.stage import captions
from packforcing_jax.stage.stories import default_timeline

STORIES = "stories"  # in the place of prompts: of each seed the story that `sample --seed` draws
ALL = "all"
VIDEOS, FIGURES = "videos", "figures"
SEED = 0  # of the bootstrap
PLAIN = "as is"  # the settings of a model that are not changed


@dataclass(frozen=True)
class Comparison:
    """What is compared: `weights` and `settings` by label, the arms that they make with methods, `frames` a video.

    Weights are model folders; for a plan a name in `configs/` will do. `prompts` are sentences, one per video and the
    same in all arms, or `STORIES`; for a plan their number will do. Each is drawn with each of `seeds`. `scored`: in
    their place, in the same order, the prompts that suites read, such as short ones of extended ones. `published`:
    what another source says, by arm or method: `figures`, and `curves` of some window by window, as in the results.
    """

    name: str
    weights: Mapping[str, str | None]  # None: the model that ships
    settings: Mapping[str, tuple[str, ...]]
    arms: tuple["Arm", ...]
    prompts: tuple[str, ...] | int | str
    seeds: tuple[int, ...]
    frames: int
    suites: tuple[str, ...]
    scored: tuple[str, ...]
    published: Mapping[str, Mapping[str, Any]]


class Arm(NamedTuple):
    """One way of making all videos."""

    weights: str
    method: str
    settings: str

    @property
    def name(self) -> str:
        return "-".join(part.replace(" ", "_") for part in self if part != PLAIN)


class Job(NamedTuple):
    """One video of an arm."""

    arm: Arm
    prompt: int | None  # None: the story of the seed
    seed: int

    @property
    def name(self) -> str:
        shown = [] if self.prompt is None else [f"prompt{self.prompt}"]
        return "-".join([*shown, f"seed{self.seed}"])


# Files


DEFAULTS: Mapping[str, Any] = {
    "weights": {"stage": None},
    "settings": {PLAIN: []},
    "prompts": STORIES,
    "suites": ["stage"],
    "scored": [],
    "published": {},
}


def read(path: str | Path) -> Comparison:
    """The comparison of a JSON file; raises `InputError` for what it does not say or says wrongly."""
    text = lines.read(path, f"the comparison {path}", "give a JSON file")
    try:
        found = json.loads("\n".join(text))
    except (ValueError, RecursionError) as reason:
        raise InputError(f"{path} is not JSON ({reason}); write one object.") from reason
    require(isinstance(found, dict), f"{path} is not a JSON object; write its keys and values.")
    names = [*(field.name for field in dataclasses.fields(Comparison)), "methods"]
    for key in found:
        known = key in names
        require(known, f"{path} has the key {key[:60]!r}, which is unknown; {nearest(key, names)}")
    values = {**DEFAULTS, **found}
    missing = [name for name in ("name", "seeds", "frames") if name not in values]
    require(not missing, f"{path} does not say {', '.join(missing)}; add it.")
    require(
        ("arms" in found) != ("methods" in found),
        f"{path} needs either methods, each with all weights and settings, or arms one by one; give one of them.",
    )
    return _checked(Path(path), values)


def _checked(source: Path, values: Mapping[str, Any]) -> Comparison:
    """The comparison that these values say, none of which is of a wrong form."""

    def says(key: str, holds: bool, form: str) -> None:
        require(holds, f"{source}: {key}={str(values[key])[:60]!r} is not {form}; write it so.")

    says("name", isinstance(values["name"], str) and values["name"] != "", "a name")
    weights, settings, published = values["weights"], values["settings"], values["published"]
    folders = isinstance(weights, dict) and all(isinstance(x, str | None) for x in weights.values())
    says("weights", folders and weights != {}, "folders by label")
    changes = isinstance(settings, dict) and all(_texts(each) for each in settings.values())
    says("settings", changes and settings != {}, "lists of changes by label")
    tables = isinstance(published, dict) and all(map(_source, published.values()))
    says("published", tables, "objects with figures (numbers) and curves (lists), by arm or method")
    says("frames", type(values["frames"]) is int and 0 < values["frames"] < 10**7, "a number")
    given = values["seeds"]
    counts = type(given) is int and 0 < given < 2**20
    seeds: list[int] = list(range(given)) if counts else given if isinstance(given, list) else []
    numbers = all(type(x) is int and 0 <= x < 2**31 for x in seeds)
    says("seeds", numbers and 0 < len({*seeds}) == len(seeds), "a count, or a list of seeds")
    prompts = values["prompts"]
    if isinstance(prompts, str) and prompts != STORIES:
        prompts = _sentences(source.parent / prompts)
    number = type(prompts) is int and 0 < prompts < 10**6
    listed = _texts(prompts) and prompts != []
    says("prompts", prompts == STORIES or number or listed, f"a list, a file, or {STORIES!r}")
    scored = values["scored"]
    if isinstance(scored, str):
        scored = _sentences(source.parent / scored)
    pairs = isinstance(prompts, list) and len(prompts) == len(scored) if scored != [] else True
    says("scored", _texts(scored) and pairs, "a list or a file, a prompt for each of the prompts")
    suites = values["suites"]
    says("suites", _texts(suites) and suites != [], f"a list of {', '.join(SUITES)}")
    for suite in suites:
        require(suite in SUITES, f"{source}: suite {suite!r} is unknown; {nearest(suite, SUITES)}")
    arms = _arms(source, values, says)
    named = [*(arm.name for arm in arms), *(arm.method for arm in arms)]
    for name in published:
        require(
            name in named,
            f"{source}: published speaks of {name!r}, which is no arm and no method here; {nearest(name, named)}",
        )
    return Comparison(
        name=values["name"],
        weights=weights,
        settings={label: tuple(each) for label, each in settings.items()},
        arms=arms,
        prompts=tuple(prompts) if isinstance(prompts, list) else prompts,
        seeds=tuple(seeds),
        frames=values["frames"],
        suites=tuple(suites),
        scored=tuple(scored),
        published=published,
    )


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _source(value: object) -> bool:
    """Whether this is what another source may say of an arm."""
    parts: dict[str, Callable[[Any], bool]] = {
        "figures": _number,
        "curves": lambda curve: isinstance(curve, list) and all(map(_number, curve)),
    }
    return isinstance(value, dict) and all(
        name in parts and isinstance(each, dict) and all(map(parts[name], each.values()))
        for name, each in value.items()
    )


def _number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def _arms(
    source: Path, values: Mapping[str, Any], says: Callable[[str, bool, str], None]
) -> tuple["Arm", ...]:
    """The arms one by one, or all that methods, weights and settings make."""
    weights, settings = values["weights"], values["settings"]
    if "methods" in values:
        named = values["methods"]
        says("methods", named == ALL or (_texts(named) and named != []), f"names, or {ALL!r}")
        chosen = [*methods.METHODS] if named == ALL else named
        ways = [Arm(w, m, s) for w in weights for m in chosen for s in settings]
    else:
        listed = values["arms"]
        objects = isinstance(listed, list) and all(isinstance(x, dict) for x in listed)
        known = objects and all({"method"} <= {*x} <= {*Arm._fields} for x in listed)
        says("arms", known and listed != [], f"a list of objects with {', '.join(Arm._fields)}")
        first = {"weights": next(iter(weights)), "settings": next(iter(settings))}
        ways = [Arm(**(first | each)) for each in listed]
    for arm in ways:
        require(
            arm.weights in weights and arm.settings in settings,
            f"{source}: an arm takes {arm.weights!r} and {arm.settings!r}, but the labels are {', '.join(weights)} and "
            f"{', '.join(settings)}; write one of each.",
        )
        methods.named(arm.method)
    return tuple(dict.fromkeys(ways))


def _sentences(path: Path) -> list[str]:
    """The prompts of a prompt file, in order; what its lines say of seeds and lengths is not taken."""
    return [job.entries[0][1] for job in prompt_files.read(path)]


# Arms and videos


def jobs(comparison: Comparison) -> list[Job]:
    """All videos, arm by arm."""
    asked = comparison.prompts
    count = asked if isinstance(asked, int) else len(asked)
    prompts = [None] if asked == STORIES else range(count)
    return [
        Job(arm, prompt, seed)
        for arm in comparison.arms
        for prompt in prompts
        for seed in comparison.seeds
    ]


def shard(every: Sequence[Job], number: int, count: int) -> list[Job]:
    """Part `number` of `count` (from 1 on): of each arm as many videos as of any other, where they divide."""
    require(
        1 <= number <= count,
        f"shard {number}/{count} is none; give one of 1/{count} to {count}/{count}.",
    )
    return [job for at, job in enumerate(every) if at % count == number - 1]


@dataclass(frozen=True)
class Planned:
    """An arm as it is drawn: its experiment with room for the whole video, and how many blocks that has."""

    experiment: Experiment
    method: Method
    folder: str | None
    model: str  # identity of the weights
    blocks: int
    trained_for: bool  # whether the weights were made for this method and memory


@functools.lru_cache(maxsize=64)
def _opened(folder: str | None) -> tuple[Experiment, str]:
    """(settings, identity) of a model; the name of a config has no weights, and can be planned alone."""
    where = folder or SHIPPED
    if not Path(where).exists() and str(where) in loading.names():
        return loading.load_experiment(str(where)), f"config {where}"
    return model_folder.opened(where).experiment, identity.of_folder(where)


def planned(comparison: Comparison, arm: Arm) -> Planned:
    """What an arm draws; raises `InputError` for what it cannot. Nothing but settings is read of the weights."""
    folder = comparison.weights[arm.weights]
    own, model = _opened(folder)
    method = methods.named(arm.method)
    changes = comparison.settings[arm.settings]
    exp = pipeline.with_overrides(own, None, changes, method)
    blocks = requests.blocks_of(exp, comparison.frames / exp.fps)
    if method.whole_clip:
        blocks = min(blocks, own.clip // exp.cache.block)
    elif method.one_clip:
        blocks = min(blocks, exp.cache.full_frames // exp.cache.block)
    exp = lengthened(method, exp, blocks)
    if "stage" in comparison.suites or comparison.prompts == STORIES:
        require(
            captions.tells(exp),
            f"weights {arm.weights!r} draw no Stage videos, but suites={list(comparison.suites)} and "
            f"prompts={comparison.prompts!r} are about those; give other suites and prompts.",
        )
    return Planned(exp, method, folder, model, blocks, own.method == method.name and not changes)


def told(comparison: Comparison, plan: Planned, job: Job) -> list[str]:
    """The prompt of each block of a video."""
    if job.prompt is None:
        story = default_timeline(job.seed, plan.blocks)
        return story[:1] * plan.blocks if plan.method.whole_clip else story
    prompts = comparison.prompts
    require(
        isinstance(prompts, tuple),
        f"prompts={prompts} says how many there are, which is enough for --plan alone; give the sentences.",
    )
    return [prompts[job.prompt]] * plan.blocks  # type: ignore[index]


def key(comparison: Comparison, plan: Planned, job: Job) -> str:
    """What a finished video has to share with a job to be its video."""
    settings = model_folder.experiment_to_json(plan.experiment)
    prompts = told(comparison, plan, job)
    request = [settings, repr(plan.method), plan.model, prompts, job.seed]
    return hashlib.sha256(json.dumps(request).encode()).hexdigest()


def video_path(out: Path, job: Job) -> Path:
    return out / VIDEOS / job.arm.name / f"{job.name}.mp4"


def figures_path(out: Path, job: Job) -> Path:
    return out / FIGURES / job.arm.name / f"{job.name}.json"


def drawn(comparison: Comparison, plan: Planned, job: Job, out: Path) -> bool:
    """Whether the video of a job is finished."""
    path = video_path(out, job)
    if not path.is_file():
        return False
    return video.settings(path).get("comparison") == key(comparison, plan, job)


def draw(comparison: Comparison, plan: Planned, model: Pipeline, job: Job, out: Path) -> None:
    """The video of a job, whole or not at all."""
    exp = plan.experiment
    path = video_path(out, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    prompts = told(comparison, plan, job)
    settings = {
        "comparison": key(comparison, plan, job),
        "experiment": exp.name,
        "method": plan.method.name,
        "seed": job.seed,
        "prompts": prompts,
    }
    size, scale = requests.shown_size(exp)
    with (
        atomic.file(path) as fresh,
        video.Writer(fresh, fps=exp.fps, size=size, settings=settings, scale=scale) as writer,
    ):
        for block in model.stream(prompts, seed=job.seed):
            writer.write(block.frames)


def draw_all(
    comparison: Comparison,
    todo: Sequence[Job],
    out: Path,
    *,
    options: Options = Options(),
    watch: Callable[[list], Iterator] = iter,
) -> None:
    """All videos of `todo` that are not finished, and the figures of all; one model is loaded at a time.

    Suites that read all videos together do so behind the last one.
    """
    plans = {arm: planned(comparison, arm) for arm in dict.fromkeys(job.arm for job in todo)}
    loaded: tuple[Arm, Pipeline] | None = None
    for job in watch(list(todo)):
        plan = plans[job.arm]
        if not drawn(comparison, plan, job, out):
            if loaded is None or loaded[0] != job.arm:
                loaded = job.arm, _load(comparison, plan, job.arm)
            draw(comparison, plan, loaded[1], job, out)
        measure(comparison, [(plan, job)], out, options, together=False)
    measure(comparison, [(plans[job.arm], job) for job in todo], out, options, together=True)


def _load(comparison: Comparison, plan: Planned, arm: Arm) -> Pipeline:
    changes = comparison.settings[arm.settings]
    model = Pipeline.from_pretrained(plan.folder, overrides=changes, method=plan.method)
    return model.for_length(plan.blocks)


# Figures


def measure(
    comparison: Comparison,
    made: Sequence[tuple[Planned, Job]],
    out: Path,
    options: Options,
    *,
    together: bool,
) -> None:
    """The figures of finished videos, as a file beside each, by the suites that read videos together or one by one.

    What is there of this very video is kept. Where it says why figures are absent, they are tried again.
    """
    for suite in comparison.suites:
        if SUITES[suite].together != together:
            continue
        films: dict[str, Film] = {}
        places: dict[str, tuple[Planned, Job]] = {}
        for plan, job in made:
            before = _stored(comparison, plan, job, out)["suites"].get(suite)
            if before is None or before["absent"]:
                name = f"{job.arm.name}/{job.name}.mp4"
                prompts = told(comparison, plan, job)
                films[name] = Film(video_path(out, job), prompts, _scored(comparison, job, prompts))
                places[name] = plan, job
        if films:
            for name, found in SUITES[suite].read(films, options, out / "official" / suite).items():
                plan, job = places[name]
                _store(comparison, plan, job, out, {suite: found._asdict()})


def _scored(comparison: Comparison, job: Job, prompts: Sequence[str]) -> str:
    """The prompt that a video is scored against: its own of `scored`, or the first that it was told."""
    return comparison.scored[job.prompt or 0] if comparison.scored else prompts[0]


def _identity(comparison: Comparison, plan: Planned, job: Job) -> dict[str, str]:
    """What a file of figures has to say to be about this video, scored so."""
    scored = _scored(comparison, job, told(comparison, plan, job))
    return {"key": key(comparison, plan, job), "scored": scored}


def _stored(comparison: Comparison, plan: Planned, job: Job, out: Path) -> dict[str, Any]:
    """What is known of a video, by suite; nothing where its file is about another one."""
    wanted = _identity(comparison, plan, job)
    try:
        found = json.loads(figures_path(out, job).read_text())
        if all(found[name] == value for name, value in wanted.items()):
            whole = {n: each for n, each in found["suites"].items() if {*each} == {*Found._fields}}
            return found | {"suites": whole}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return wanted | {"suites": {}}


def _store(
    comparison: Comparison, plan: Planned, job: Job, out: Path, new: Mapping[str, Any]
) -> None:
    """Adds what suites found to a video's file."""
    found = _stored(comparison, plan, job, out)
    found["frames"] = video.probe(video_path(out, job)).frames
    found["suites"] |= new
    path = figures_path(out, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, (json.dumps(found, indent=1) + "\n").encode())


# Results


def missing(comparison: Comparison, out: Path) -> list[Job]:
    """The videos that have no figures yet."""
    plans = {arm: planned(comparison, arm) for arm in comparison.arms}
    return [
        job
        for job in jobs(comparison)
        if not {*comparison.suites} <= {*_stored(comparison, plans[job.arm], job, out)["suites"]}
    ]


def results(comparison: Comparison, out: Path) -> dict[str, Any]:
    """Figures of all arms with their 95 % bootstrap intervals over videos, and those of every video.

    The same bytes, once written, whoever drew which video: no time and no machine is in it.
    """
    by_arm: dict[str, Any] = {}
    measured: dict[str, list[Plain]] = {suite: [] for suite in comparison.suites}
    for arm in comparison.arms:
        plan = planned(comparison, arm)
        own = [job for job in jobs(comparison) if job.arm == arm]
        stored = {job.name: _stored(comparison, plan, job, out) for job in own}
        videos = {name: _merged(comparison, each["suites"]) for name, each in stored.items()}
        names = list(dict.fromkeys(name for each in videos.values() for name in each.figures))
        for each in videos.values():
            for suite, known in measured.items():
                if each.protocol[suite] not in known:
                    known.append(each.protocol[suite])
        by_arm[arm.name] = {
            "weights": arm.weights,
            "method": arm.method,
            "settings": list(comparison.settings[arm.settings]),
            "trained for": plan.trained_for,
            "frames": sorted({each["frames"] for each in stored.values()}),
            "figures": {
                name: average((each.figures.get(name) for each in videos.values()), SEED)._asdict()
                for name in names
            },
            "curves": _curves(list(videos.values())),
            "videos": {name: each.figures for name, each in videos.items()},
            "absent": {name: each.absent for name, each in videos.items() if each.absent},
        }
    units = {
        name: figure._asdict()
        for suite in comparison.suites
        for name, figure in SUITES[suite].figures.items()
    }
    protocol = {
        "frames asked for": comparison.frames,
        "prompts": comparison.prompts,
        "scored": comparison.scored or "as drawn",
        "seeds": list(comparison.seeds),
        "suites": list(comparison.suites),
        "interval": f"95 % bootstrap of the mean over videos, 2000 draws, seed {SEED}",
        "measured": measured,
        "figures": units,
        "published": comparison.published,
    }
    return {"name": comparison.name, "protocol": protocol, "arms": by_arm}


def _merged(comparison: Comparison, suites: Mapping[str, Any]) -> Found:
    """What all suites found in a video."""
    figures, windows, absent = (
        {name: value for suite in comparison.suites for name, value in suites[suite][part].items()}
        for part in ("figures", "windows", "absent")
    )
    protocol = {suite: suites[suite]["protocol"] for suite in comparison.suites}
    return Found(figures, windows, absent, protocol)


def _curves(videos: Sequence[Found]) -> dict[str, list[float | None]]:
    """Of each figure its mean over videos in each window; a window that some videos lack counts those that have it."""
    names = dict.fromkeys(name for each in videos for name in each.windows)
    curves: dict[str, list[float | None]] = {}
    for name in names:
        own = [each.windows.get(name, []) for each in videos]
        longest = max(map(len, own), default=0)
        rows = [[y for x in own if i < len(x) and (y := x[i]) is not None] for i in range(longest)]
        curves[name] = [float(np.mean(row)) if row else None for row in rows]
    return curves
