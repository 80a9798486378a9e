"""The life of a run: born on the mesh or restored to it, then batch by batch until it is done, stopped or broken.

Everything random is a function of (seed, step), and the position of the data is in the checkpoint: a run killed
anywhere and started again does what the unbroken one would have done.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import grain
import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from packforcing_jax import interrupts
from packforcing_jax.config import Experiment, Stage, TrainConfig, decode, loading
from packforcing_jax.data import sources
from packforcing_jax.errors import MachineError, nearest, require
from packforcing_jax.io import append_file, atomic, checkpoints, model_folder
from packforcing_jax.networks import mesh
from packforcing_jax.training import batches, exports, logs, objectives, state, teachers
from packforcing_jax.training.state import Frozen, TrainState

FREE = (
    *(f"experiment.{name}" for name in ("name", "attention", "fps")),
    *(
        f"train.{name}"
        for name in (
            "steps",
            "save_every",
            "keep",
            "log_every",
            "log",
            "preview_every",
            "patience",
            "profile",
            "mesh",
            "accumulate",
            "remat",
            "source.path",
            "blend",
            *exports.BEGINNINGS,
        )
    ),
)
WRITTEN = ("train.steps", "train.blend")  # free too, but the model that is written depends on them
TRAINING = "training.json"  # inside a model folder: the training that made it
TIMES = (
    "seconds",
    "waited",
    "clips_per_second",
    "tokens_per_second",
)  # metrics that no two runs have in common
MODEL = "model"
CHECKPOINTS = "checkpoints"
PREVIEWS = "previews"
PROFILE = "profile"  # inside the folder of a run
LOOK_AHEAD = 1000  # steps in which the programs that are still to be compiled are counted
Metrics: TypeAlias = dict[str, Any]  # of one step, by name: NumPy arrays, numbers, texts


@dataclass(frozen=True)
class Program:
    """What a run does at its steps, as pure functions, and what it reads."""

    init: Callable = state.init
    update: Callable = state.update
    movers: Callable = state.movers
    variant: Callable = state.variant
    encode: Callable = batches.encode
    batches: Callable = sources.batches


@dataclass
class Run:
    """A training run in a folder: what it has reached so far, and what it works with."""

    exp: Experiment
    train: TrainConfig
    folder: Path
    seed: int
    mesh: Mesh
    state: TrainState
    frozen: Frozen
    batches: grain.DatasetIterator
    update: Callable
    program: Program
    saved: checkpoints.Checkpoints
    step: int
    stopped: bool = False
    programs: dict[Hashable, jax.stages.Compiled] = field(default_factory=dict)  # by `kind`

    @property
    def done(self) -> bool:
        return self.step >= self.train.steps


# The beginning


def about(exp: Experiment, train: TrainConfig, seed: int) -> dict[str, Any]:
    """What a checkpoint belongs to."""
    return {"seed": seed, "experiment": decode.encode(exp), "train": decode.encode(train)}


def store(exp: Experiment, train: TrainConfig, folder: Path, seed: int) -> checkpoints.Checkpoints:
    """The checkpoints of a run."""
    return checkpoints.Checkpoints(
        folder / CHECKPOINTS,
        keep=train.keep,
        about=about(exp, train, seed),
        free=FREE,
        digests=True,
    )


def check_folder(folder: Path) -> None:
    """Raises `InputError` unless a run can be begun or continued in `folder`; leaves nothing behind."""
    append_file.check_writable(folder / logs.LINES, "Run file")
    require(
        not (folder / model_folder.CONFIG).exists(),
        f"Run folder {folder} is a model folder; choose another one.",
    )
    require(
        (folder / CHECKPOINTS).is_dir() or not (folder / MODEL).exists(),
        f"Run folder {folder} holds a finished "
        "model, but no checkpoints to go on from; choose another folder or delete the model.",
    )


def check(train: TrainConfig) -> None:
    """Raises `InputError` for an objective, data or a log that do not exist or do not go together."""
    objectives.check(train)
    sources.of(train.source)
    logs.check(train.log)


def start(
    exp: Experiment,
    train: TrainConfig,
    folder: Path,
    *,
    seed: int = 0,
    program: Program = Program(),
) -> Run:
    """A new run, or the one that `folder` holds, behind its last checkpoint. What is wrong is raised before a step."""
    check(train)
    train = teachers.sized(exp, train)
    require(
        exp.cache.budget == 0,
        f"cache.budget={exp.cache.budget} keeps single tokens in sampling alone; train with cache.budget=0.",
    )
    require(
        exp.cache.registry == "per_layer"
        or not (objectives.of(train).own_clips and train.distil.finished),
        "cache.registry='shared' moves the list of blocks on in the passes before the exit step alone; set "
        "train.distil.finished=false, or cache.registry=per_layer.",
    )
    grid = mesh.make(train.mesh)
    mesh.check(exp, train, grid)
    check_folder(folder)
    read = data(exp, train, seed, program)
    frozen = others(exp, train, grid)  # one device reads the prompt, so not under the whole mesh
    with jax.set_mesh(grid):
        form = abstract(exp, train, program, seed, grid)
        if train.blend:  # what does not fit fails here, not behind the last step
            exports.network(train.blend_from, form.ema, grid)
        saved = store(exp, train, folder, seed)
        if saved.latest() is None:
            now = born(exp, train, program, seed, form, grid)
        else:
            now, position = saved.restore(form)
            read.set_state(position)
    return Run(
        exp=exp,
        train=train,
        folder=folder,
        seed=seed,
        mesh=grid,
        state=now,
        frozen=frozen,
        batches=read,
        update=compiled(exp, train, program, form, grid),
        program=program,
        saved=saved,
        step=int(now.step),
    )


def needs(exp: Experiment, train: TrainConfig) -> tuple[str, ...]:
    """What the objective reads of the data besides text; low-resolution latents where true blocks are packed."""
    objective = objectives.of(train)
    packs = objectives.remembers(train) and not objective.own_clips and exp.packs_pixels
    return (*objective.needs, "low_res") if packs else objective.needs


def data(exp: Experiment, train: TrainConfig, seed: int, program: Program) -> grain.DatasetIterator:
    """This process's rows of endless batches, from the first one on."""
    return program.batches(
        exp,
        train.source,
        sources.Share(train.batch, jax.process_index(), jax.process_count()),
        seed=seed,
        needs=needs(exp, train),
        encode=exports.tokenizer_of(exp, train).encode,
    )


def abstract(
    exp: Experiment, train: TrainConfig, program: Program, seed: int, grid: mesh.Grid
) -> TrainState:
    """Shapes and shardings of everything a run carries."""
    shapes = jax.eval_shape(lambda: program.init(exp, train, jax.random.key(seed), {}))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        mesh.shardings(shapes, grid),
    )


def shardings(form: TrainState) -> TrainState:
    """The sharding of each leaf of an abstract state."""
    return jax.tree.map(lambda leaf: leaf.sharding, form)


def born(
    exp: Experiment, train: TrainConfig, program: Program, seed: int, form: TrainState, grid: Mesh
) -> TrainState:
    """The state before the first step, made where it lies: networks of model folders are read, others initialised."""
    folders = {
        "generator": train.generator_from,
        "critic": teachers.critic_folder(train),
    }
    pretrained = {
        name: exports.network(folder, form.params[name], grid)
        for name, folder in folders.items()
        if folder and name in form.params
    }

    def make(pretrained: Mapping[str, batches.Flat]) -> TrainState:
        return program.init(exp, train, jax.random.key(seed), pretrained)

    return jax.jit(make, out_shardings=shardings(form))(pretrained)


def others(exp: Experiment, train: TrainConfig, grid: Mesh) -> Frozen:
    """What steps read and leave alone: the teacher, the codec, the states of the negative prompt."""
    frozen = {
        "codec": exports.codec_weights(exp, train, grid),
        "null_text": exports.null_text(exp, train),
    }
    shapes = teachers.shapes(exp, train)
    if shapes:
        frozen["teacher"] = exports.network(train.teacher_from, shapes, grid, exp.dtypes.compute)
    return {name: each for name, each in frozen.items() if each is not None}


def compiled(
    exp: Experiment, train: TrainConfig, program: Program, form: TrainState, grid: Mesh
) -> Callable:
    """(state, frozen, raw batch, seed, moves, variant) -> (state, metrics), in place, on the whole mesh.

    `variant` is the experiment of the step: `exp` with sizes that may differ from step to step.
    """

    def step(
        now: TrainState,
        frozen: Frozen,
        raw: Mapping[str, Array],
        seed: Array,
        moves: tuple[str, ...],
        variant: Experiment,
    ) -> tuple[TrainState, state.Metrics]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), now.step)
        batch = program.encode(exp, batches.as_codec(exp, frozen.get("codec")), raw)
        return program.update(now, frozen, batch, key, variant, train, moves=moves)

    everywhere = NamedSharding(grid, PartitionSpec())
    return jax.jit(
        step,
        static_argnames=("moves", "variant"),
        donate_argnums=0,
        out_shardings=(shardings(form), everywhere),
    )


# Step by step


def _never() -> bool:
    return False


def steps(run: Run, stop_requested: Callable[[], bool] = _never) -> Iterator[Metrics]:
    """Trains to the end, or until `stop_requested` behind the step at hand; yields the metrics of each step.

    A stop does not wait for a step that is still being compiled, unless other processes make it too. However it ends, a
    checkpoint that was begun is complete then.
    """
    cfg = run.train
    alone = jax.process_count() == 1
    opened = logs.Log(
        run.folder, cfg.log, after=run.step, about=about(run.exp, run.train, run.seed)
    )
    try:
        with opened as log, Window(run.folder / PROFILE, *cfg.profile) as window:
            while not (run.done or run.stopped):
                window.at(run.step)
                try:
                    metrics = advance(run, stop_requested if alone else _never)
                except interrupts.Stopped:
                    run.stopped = True
                    if run.step:
                        save(run)
                    break
                if run.step % cfg.log_every == 0 or run.done:
                    log.write(run.step, metrics)
                require_finite(run, metrics)
                run.stopped = agreed(stop_requested())
                keep(run)
                yield {"step": run.step, **metrics}
    finally:
        run.saved.wait()


def keep(run: Run) -> None:
    """Saves and previews if it is time to."""
    cfg = run.train
    if run.step % cfg.save_every == 0 or run.done or run.stopped:
        save(run)
    if cfg.preview_every and run.step % cfg.preview_every == 0:
        preview(run)


def kind(run: Run, step: int) -> tuple[tuple[str, ...], Experiment]:
    """(what moves, the experiment) in a step: steps that have both in common are one program."""
    return run.program.movers(run.train, step), run.program.variant(
        run.exp, run.train, run.seed, step
    )


def to_compile(run: Run) -> int:
    """How many programs the coming steps need that are not compiled yet, as far as LOOK_AHEAD steps show."""
    last = min(run.train.steps, run.step + LOOK_AHEAD)
    return len({kind(run, step) for step in range(run.step, last)} - {*run.programs})


def advance(run: Run, stop_requested: Callable[[], bool] = _never) -> Metrics:
    """One update; its metrics, with the seconds it took and those it waited for data.

    Raises `Stopped` for a stop before its program is compiled: then the run stands where it stood.
    """
    began = time.monotonic()
    moves, variant = kind(run, run.step)
    position = None if (moves, variant) in run.programs else run.batches.get_state()
    raw = next(run.batches)
    waited = time.monotonic() - began
    with jax.set_mesh(run.mesh):
        operands = (
            run.state,
            run.frozen,
            sources.global_batch(run.mesh, raw),
            np.uint32(run.seed),
        )
    if position is not None:
        try:
            run.programs[moves, variant] = interrupts.interruptible(
                lambda: ahead(run, *operands, moves, variant), stop_requested
            )
        except KeyboardInterrupt:
            run.batches.set_state(position)
            raise
    with jax.set_mesh(run.mesh):
        run.state, metrics = run.programs[moves, variant](*operands)
    host_metrics = {
        name: np.asarray(value) for name, value in metrics.items()
    }  # waits for the step
    run.step = int(run.state.step)
    seconds = time.monotonic() - began
    clips = run.train.batch
    return {
        "moves": "+".join(moves),
        "sink": variant.cache.sink,
        "recent": variant.cache.recent,
        **host_metrics,
        "skipped": int(run.state.skipped),
        "seconds": seconds,
        "waited": waited,
        "clips_per_second": clips / seconds,
        "tokens_per_second": clips * variant.clip * variant.tokens_per_frame / seconds,
    }


def ahead(run: Run, *operands) -> jax.stages.Compiled:
    """The program of a step, compiled and not run."""
    with jax.set_mesh(run.mesh):  # of this thread
        return run.update.lower(*operands).compile()


def require_finite(run: Run, metrics: Metrics) -> None:
    """Saves what was last good and raises `MachineError` if too many updates in a row were left out."""
    if metrics["skipped"] < run.train.patience:
        return
    broken = [name for name, value in logs.scalars(metrics).items() if not np.isfinite(value)]
    save(run)
    raise MachineError(
        f"Step {run.step} was number {metrics['skipped']} in a row whose update was not finite (not "
        f"finite: {', '.join(broken) or 'the gradient'}); the networks as they were before are saved in "
        f"{run.folder / CHECKPOINTS}; lower the rates or look at the data."
    )


def agreed(wants_stop: bool) -> bool:
    """Whether any process wants to stop: all of them then stop behind the same step."""
    return (
        wants_stop
        if jax.process_count() == 1
        else bool(np.any(multihost_utils.process_allgather(np.bool_(wants_stop))))
    )


def save(run: Run) -> None:
    """Begins to write a checkpoint of everything, the position of the data included."""
    if run.saved.latest() != run.step:
        run.saved.save(run.step, run.state, run.batches.get_state())


def preview(run: Run) -> None:
    """A video of the averaged weights for the first clip that the run ever read."""
    first = next(data(run.exp, run.train, run.seed, run.program))
    exports.preview(
        run.folder / PREVIEWS / f"step-{run.step}.mp4",
        run.exp,
        run.train,
        run.state.ema,
        raw=first,
        seed=run.seed,
    )


class Window:
    """The profiler, on while the steps from `first` up to `last` are made."""

    def __init__(self, folder: Path, first: int, last: int):
        self.folder = folder
        self.first = first
        self.last = last
        self.on = False

    def __enter__(self) -> "Window":
        return self

    def __exit__(self, *_) -> None:
        self._turn(False)

    def at(self, step: int) -> None:
        """Turns it on or off in front of a step."""
        self._turn(self.first <= step < self.last and jax.process_index() == 0)

    def _turn(self, on: bool) -> None:
        if on and not self.on:
            jax.profiler.start_trace(str(self.folder))
        if self.on and not on:
            jax.profiler.stop_trace()
        self.on = on


# The end


def finish(run: Run, *, card: str | None = None) -> None:
    """Waits for the last checkpoint; what is done is exported as a model folder."""
    run.saved.close()
    if run.done:
        exports.save(
            run.folder / MODEL,
            run.exp,
            run.train,
            exports.blended(run.train, run.state.ema, run.mesh),
            texts={
                model_folder.CARD: card,
                TRAINING: json.dumps(about(run.exp, run.train, run.seed), indent=2) + "\n",
            },
        )


def finished(exp: Experiment, train: TrainConfig, folder: Path, *, seed: int = 0) -> bool:
    """Whether `folder` holds the model of this very training, done to its last step; what a kill left is removed."""
    then = trained_as(folder / MODEL / TRAINING)
    if then is None:
        return False
    train = teachers.sized(exp, train)
    was, wanted = (checkpoints.settings(each) for each in (then, about(exp, train, seed)))
    if checkpoints.differences(was, wanted, [name for name in FREE if name not in WRITTEN]):
        return False
    if (folder / CHECKPOINTS).is_dir():
        saved = store(exp, train, folder, seed)
        saved.check()
        saved.close()
    atomic.clear(folder / MODEL)
    return True


def trained_as(path: Path) -> dict[str, Any] | None:
    """What the model folder beside the file says of its training, if it says anything."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return settings if isinstance(settings, dict) else None


# Stage after stage


def planned(
    recipe: loading.Recipe, folder: Path, only: str | None = None
) -> list[tuple[Path, Stage]]:
    """The folder of each stage, and the stage with the models of earlier ones in place of their names.

    Raises `InputError` for what a stage names and nobody knows: an objective, data, a log, or a beginning that is
    neither an earlier stage nor a model folder.
    """
    names = [stage.name for stage in recipe]
    require(
        only is None or only in names,
        f"no stage {only!r} in this recipe; {nearest(str(only), filter(None, names))}",
    )
    plan = [_resolved(stage, names[:at], folder) for at, stage in enumerate(recipe)]
    chosen = [(folder / stage.name, stage) for stage in plan if only in (None, stage.name)]
    coming = {str(run_folder / MODEL) for run_folder, _ in chosen}
    for run_folder, stage in chosen:
        check(stage.train)
        for setting, beginning in exports.beginnings(stage.train).items():
            require(
                beginning in coming or Path(beginning).is_dir(),
                f"{run_folder}: train.{setting} is {beginning}, which "
                "is not there; run the stage that makes it, or name a model folder.",
            )
    return chosen


def _resolved(stage: Stage, earlier: Sequence[str], folder: Path) -> Stage:
    models_of = {
        setting: str(folder / name / MODEL)
        for setting, name in exports.beginnings(stage.train).items()
        if name in earlier
    }
    return dataclasses.replace(stage, train=dataclasses.replace(stage.train, **models_of))
