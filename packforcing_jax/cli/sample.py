"""`packforcing sample`: a video from a prompt, a timeline, or nothing at all."""

import argparse
import contextlib
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packforcing_jax.cli import common, compiling, places
from packforcing_jax.cli.places import Place
from packforcing_jax.cli.told import check_length
from packforcing_jax.config import evenly_spaced
from packforcing_jax.errors import InputError, require, shown
from packforcing_jax.sampling import prompt_files, timelines

if TYPE_CHECKING:
    from collections.abc import Iterator

    from packforcing_jax.sampling.finished import Finished
    from packforcing_jax.sampling.opening import Opening
    from packforcing_jax.sampling.player import State
    from packforcing_jax.sampling.session import Told
    from packforcing_jax.sampling.state_folder import Notes

TIMES_CLIP = 24  # length of the default video in training clips
SHEET_HEIGHT = 96  # and the frames of a contact sheet to this many
SHEET_FRAMES = 40
SHEET_BLOCKS = 20  # at most about so many frames, from so many blocks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `sample`."""
    parser.add_argument("--prompt", metavar="TEXT", help="one prompt for the whole video")
    parser.add_argument(
        "--timeline",
        metavar="FILE",
        help="prompts by block, lines `BLOCK: prompt` or, to say what the memory does, `BLOCK recache: prompt`",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="many videos: a prompt per line, or JSON lines with settings; finished ones are skipped",
    )
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="length; default 24 training clips"
    )
    parser.add_argument("--blocks", type=int, metavar="N", help="length in blocks")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    parser.add_argument(
        "--memory", metavar="PROFILE", help="another memory than the model's own, such as no-mid"
    )
    parser.add_argument(
        "--method",
        metavar="NAME",
        help="how the past is kept and shown, such as longlive (default: what the model was made for)",
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="denoising steps, evenly spaced (sample.steps)"
    )
    parser.add_argument(
        "--guidance-scale",
        type=float,
        metavar="W",
        help="how far method bidirectional moves away from the negative prompt, 1: not (sample.guidance)",
    )
    parser.add_argument(
        "--negative-prompt",
        metavar="TEXT",
        help="what it moves away from; empty: from no text (sample.negative_prompt)",
    )
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="video file (default: out/video.mp4); with --prompts a folder (default: out/videos)",
    )
    parser.add_argument(
        "--oracle",
        action="store_true",
        help="also print what the Stage world's oracle reads in the video, beside chance",
    )
    parser.add_argument("--sheet", metavar="FILE", help="also write a contact sheet, a PNG")
    parser.add_argument(
        "--trace", metavar="FILE", help="also record what each layer looked back at, for `inspect`"
    )
    parser.add_argument(
        "--state",
        metavar="DIR",
        help="keep the sampler's state here; the same command goes on from it, even after a kill",
    )
    parser.add_argument(
        "--every", type=int, metavar="N", default=8, help="blocks between two saves (default: 8)"
    )
    parser.add_argument(
        "--keep",
        type=int,
        metavar="N",
        default=2,
        help="newest saves that --state keeps, for `fork --at` (default: 2)",
    )
    parser.add_argument(
        "--start",
        metavar="FILE",
        help="begin with a picture (png, jpg) or a clip (mp4) of the model's size",
    )
    parser.add_argument(
        "--anyway",
        action="store_true",
        help="try even what seems to need more memory than there is",
    )
    parser.add_argument(
        "--weights", metavar="DIR", help="model folder (default: the Stage model that ships)"
    )
    common.add_experiment_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Makes the videos and prints where each is and, if asked, what the Stage world's oracle reads in it."""
    _check(args)
    args.overrides = [*_settings_of_flags(args), *args.overrides]
    wanted = prompt_files.named(prompt_files.read(args.prompts)) if args.prompts else []
    story = timelines.read(args.timeline) if args.timeline else []
    with places.held(
        [
            Place("--out", args.out, "videos" if args.prompts else "video"),
            Place("--state", args.state, "folder"),
            Place("--sheet", args.sheet, "picture"),
            Place("--trace", args.trace, "file"),
        ]
    ):
        _require_fits(args)
        return _load_and_make(args, wanted, story)


def _load_and_make(
    args: argparse.Namespace, wanted: list[prompt_files.Job], story: list[timelines.Entry]
) -> int:
    """Loads the model, checks every video, and makes them: those that are `wanted`, else one that tells `story`."""
    from packforcing_jax.sampling.pipeline import Pipeline
    from packforcing_jax.stage import captions

    pipeline = Pipeline.from_pretrained(
        args.weights,
        experiment=_config(args),
        memory=args.memory,
        overrides=args.overrides,
        method=args.method,
    )
    exp = pipeline.experiment
    if not wanted:
        told = _prompts(args, pipeline, story, stage=captions.tells(exp))
        return _make(_film(args, pipeline, *told))
    return _make_all([(job, _of_job(args, pipeline, job)) for job in wanted], Path(args.out))


def _settings_of_flags(args: argparse.Namespace) -> list[str]:
    """What flags of their own say of `sample.*`, as --set says it."""
    steps = None if args.steps is None else evenly_spaced(args.steps)
    settings = {
        "steps": steps,
        "guidance": args.guidance_scale,
        "negative_prompt": args.negative_prompt,
    }
    return [f"sample.{key}={value!r}" for key, value in settings.items() if value is not None]


def _require_fits(args: argparse.Namespace) -> None:
    """Refuses what this machine has no memory for, before any of it is taken."""
    from packforcing_jax.io import model_folder
    from packforcing_jax.plan import memory_fit
    from packforcing_jax.sampling import pipeline

    exp = _config(args) or model_folder.opened(args.weights or pipeline.SHIPPED).experiment
    if not args.anyway:
        memory_fit.require_fits(
            pipeline.with_overrides(exp, args.memory, args.overrides, args.method)
        )


def _config(args: argparse.Namespace):
    """The experiment that takes the place of the model's own settings, if one is given."""
    return common.load_experiment(args.config) if args.config else None


@dataclass(frozen=True)
class Film:
    """One video to make, checked: nothing of it has been drawn."""

    pipeline: Any
    prompts: list[str]
    changes: dict[int, str]  # what a new prompt does to the memory, by block, where it is said
    seed: int
    start: "Opening | None"  # what it begins with
    args: argparse.Namespace  # where files go, and what the settings inside the video say

    @property
    def timeline(self) -> list[str]:
        """One prompt per block, marked where it is said what it does to the memory."""
        marks = {block: f"[{change}] " for block, change in self.changes.items()}
        return [marks.get(block, "") + prompt for block, prompt in enumerate(self.prompts)]

    @property
    def blocks(self) -> int:
        return len(self.prompts)

    @property
    def notes(self) -> "Notes":
        """What is noted beside its states."""
        from packforcing_jax.sampling import state_folder

        return state_folder.Notes(
            self.prompts,
            self.changes,
            start=self.start and self.start.hash,
            end=self.blocks,
            video=str(Path(self.args.out).resolve()),
            folder=str(Path(self.args.state).resolve()),
            weights=state_folder.weights_of(self.pipeline),
        )

    @property
    def settings(self) -> dict:
        """What stands inside the video file."""
        from packforcing_jax.sampling import video_notes

        args = self.args
        start = self.start and self.start.hash
        return {
            "experiment": self.pipeline.experiment.name,
            "seed": self.seed,
            "memory": args.memory,
            "blocks": self.blocks,
            "set": args.overrides,
            "config": args.config,
            "weights": args.weights,
            "method": self.pipeline.method.name,
            "prompts": _runs(self.timeline),
            "made": video_notes.header(self.pipeline, seed=self.seed, start=start),
        }


def _film(args: argparse.Namespace, pipeline, prompts: list[str], changes: dict[int, str]) -> Film:
    from packforcing_jax.io import video
    from packforcing_jax.sampling.requests import shown_size
    from packforcing_jax.stage import captions

    video.check_writable(args.out)
    pipeline.check(prompts)
    pipeline = pipeline.for_length(len(prompts))
    video.check_size(*shown_size(pipeline.experiment))
    require(
        not args.oracle or captions.tells(pipeline.experiment),
        f"--oracle reads videos of the Stage world, and {pipeline.experiment.name} makes others; leave it out.",
    )
    cache = pipeline.experiment.cache
    whole_clip = pipeline.method.whole_clip
    require(
        args.state is None or not whole_clip,
        f"--state {args.state} saves between blocks, and method {pipeline.method.name} denoises all frames of a clip "
        "together; leave it out.",
    )
    require(
        args.trace is None or not (cache.joint or cache.overlap or cache.budget or whole_clip),
        f"--trace {args.trace} records blocks that are made one by one in one memory of whole frames and packed "
        f"blocks, and method {pipeline.method.name} makes or keeps them otherwise; leave it out.",
    )
    require(
        args.trace is None or not {"flush", "cut"} & {*changes.values()},
        f"--trace {args.trace} records a memory that only grows; leave it out where a prompt flushes or cuts it.",
    )
    start = None if args.start is None else _opening(args, pipeline, len(prompts))
    return Film(pipeline, prompts, changes, args.seed, start, args)


def _opening(args: argparse.Namespace, pipeline, blocks: int) -> "Opening":
    """What the video begins with, said on stderr."""
    from packforcing_jax.sampling import opening

    require(
        not pipeline.method.whole_clip,
        f"--start {args.start} is committed as the first blocks, and method {pipeline.method.name} denoises all "
        "frames of a clip together; leave it out.",
    )
    given = opening.read(args.start, pipeline.experiment)
    require(
        given.blocks < blocks,
        f"--start {args.start} fills {given.blocks} blocks and the video has {blocks}; ask for a longer one.",
    )
    print(f"sample: begins with {given.said}; {opening.UNTRAINED}", file=sys.stderr, flush=True)
    return given


def _of_job(args: argparse.Namespace, pipeline, job: prompt_files.Job) -> Film:
    """The film of one line of --prompts: what it does not say comes from the flags."""
    own = argparse.Namespace(
        **vars(args)
        | {
            "out": str(Path(args.out, f"{job.name}.mp4")),
            "seed": args.seed if job.seed is None else job.seed,
            "state": args.state and str(Path(args.state, str(job.name))),
            "overrides": [*args.overrides, *job.overrides],
            "memory": job.memory or args.memory,
        }
    )
    if job.blocks or job.seconds:
        own.blocks = job.blocks
        own.seconds = job.seconds
    try:
        if job.memory is not None:
            pipeline = pipeline.with_memory(job.memory).with_settings(args.overrides)
        if job.overrides:
            pipeline = pipeline.with_settings(job.overrides)
        blocks = _blocks(own, pipeline)
        entries = list(job.entries)
        return _film(
            own,
            pipeline,
            timelines.spread(entries, blocks),
            timelines.changes(entries, blocks),
        )
    except InputError as error:
        raise InputError(f"{job.source}: {error}") from error


def _make_all(films: list[tuple[prompt_files.Job, Film]], folder: Path) -> int:
    """Makes the videos that `folder` does not hold finished yet."""
    from packforcing_jax.io import model_folder
    from packforcing_jax.sampling import state_folder

    ledger = prompt_files.Ledger(folder)
    for number, (job, film) in enumerate(films, start=1):
        key = prompt_files.key(
            experiment=model_folder.experiment_to_json(film.pipeline.experiment),
            seed=film.seed,
            weights=state_folder.digest(film.pipeline),
            start=film.start and film.start.hash,
            prompts=_runs(film.timeline),
            blocks=film.blocks,
            name=job.name,
        )
        if ledger.holds(key):
            print(f"sample: {number} of {len(films)}, {film.args.out} is finished", file=sys.stderr)
            continue
        print(f"sample: {number} of {len(films)}, {film.args.out}", file=sys.stderr)
        _make(film)
        ledger.add(key, Path(film.args.out))
    return 0


def _make(film: Film) -> int:
    """Draws and writes one video."""
    from packforcing_jax.io import video
    from packforcing_jax.methods.method import sizes_told
    from packforcing_jax.policies import attention
    from packforcing_jax.sampling import trace, video_notes
    from packforcing_jax.sampling.requests import shown_size

    args = film.args
    pipeline = film.pipeline
    exp = film.pipeline.experiment
    began = time.monotonic()
    keeper, at = _resumed(film)
    backend, why = attention.resolve(exp.attention, exp.dtypes.cache)
    common.start_line(
        "sample", experiment=exp, dtype=exp.dtypes.compute, attention=backend, why=why
    )
    if not pipeline.method.own_memory:
        print(f"sample: {sizes_told(pipeline.method, exp)}", file=sys.stderr, flush=True)
    made_for = pipeline.origin.model.experiment.method if pipeline.origin else exp.method
    if pipeline.method.whole_clip and made_for != exp.method:
        print(
            f"sample: these weights were made for method {made_for} and not trained for this one: the clip shows that "
            "the network runs, not how good the method is",
            file=sys.stderr,
            flush=True,
        )
    size, scale = shown_size(exp)
    retained = _Retained(all=args.oracle, total=film.blocks if args.sheet else 0)
    with contextlib.ExitStack() as files:
        if keeper is not None:
            files.callback(keeper.close)
        writer = files.enter_context(
            video.Writer(
                args.out,
                fps=exp.fps,
                size=size,
                settings=film.settings,
                scale=scale,
                resume=at.written,
            )
        )
        header = trace.header(exp, seed=film.seed, prompts=_runs(film.prompts))
        tracer = (
            files.enter_context(trace.Writer(args.trace, header, position=at.traced))
            if args.trace
            else None
        )
        first = 0 if at.state is None else at.state.position
        stream = _drawn(film, at.state)
        files.enter_context(compiling.told(lambda: compiling.line("sample", "the block step")))
        for block, told in common.progress(
            stream, name="sample", unit="blocks", total=film.blocks, first=first
        ):
            writer.write(block.frames, video_notes.note(block, told))
            if tracer is not None:
                tracer.write(block)
            if keeper is not None:
                keeper.keep(block, writer, tracer)
            retained.add(block)
    if args.sheet is not None and retained.sheet:
        _sheet(retained.sheet, args.sheet)
    _report(film, first, retained, time.monotonic() - began)
    return 0


def _drawn(film: Film, state: "State | None") -> "Iterator[tuple[Finished, Told]]":
    """The blocks of the video, behind `state` if there is one, each with what was asked for in it."""
    from packforcing_jax.sampling.session import Session, Told

    pipeline, prompts = film.pipeline, film.prompts
    if pipeline.method.whole_clip:
        for block in pipeline.stream(prompts, seed=film.seed):
            yield block, Told((block.prompt,), left=film.blocks - block.index)
        return
    if state is None:
        session = pipeline.session(seed=film.seed, keep=0)
    else:
        session = Session.behind(pipeline, state, prompts[: state.position])
    if film.start is not None and state is None:
        for block in session.begun(film.start, prompts[: film.start.blocks]):
            yield block, session.told[-1]
    rest = prompts[session.position :]
    changes = {at: how for at, how in film.changes.items() if at >= session.position}
    for block in session.run(rest, changes=changes, ends=True) if rest else ():
        yield block, session.told[-1]


@dataclass
class _Retained:
    """Frames that are still needed when the video is finished: all of a Stage video, some for a contact sheet."""

    all: bool
    total: int  # blocks of the video, 0 without a sheet
    count: int = 0
    frames: list = field(default_factory=list)
    sheet: list = field(default_factory=list)

    def add(self, block) -> None:
        self.count += len(block.frames)
        if self.all:
            self.frames.append(block.frames)
        if self.total and block.index % max(1, self.total // SHEET_BLOCKS) == 0:
            self.sheet.append(
                block.frames[:: max(1, len(block.frames) * SHEET_BLOCKS // SHEET_FRAMES)]
            )


def _resumed(film: Film):
    """(what saves the run's state, where it goes on); (None, the start) without --state."""
    args = film.args
    from packforcing_jax.sampling import resume

    if args.state is None:
        return None, resume.Resumed()
    keeper = resume.Keeper(
        args.state, film.pipeline, film.notes, seed=film.seed, every=args.every, keep=args.keep
    )
    at = keeper.resume()
    require(
        args.trace is None or at.state is None or at.traced > 0,
        f"--trace {args.trace}: the run kept in {args.state} was not traced from its start; leave --trace out.",
    )
    if at.state is not None:
        print(
            f"sample: goes on behind block {at.state.position}, as kept in {args.state}",
            file=sys.stderr,
        )
    return keeper, at


def _sheet(frames: list, path: str) -> None:
    """One picture of frames spread over the video, each enlarged to about SHEET_HEIGHT pixels."""
    import numpy as np

    from packforcing_jax.io import video

    whole = np.concatenate(frames)
    scale = max(1, SHEET_HEIGHT // whole.shape[1])
    enlarged = (
        whole[:: max(1, len(whole) // SHEET_FRAMES)].repeat(scale, axis=1).repeat(scale, axis=2)
    )
    video.contact_sheet(enlarged, path)


def _check(args: argparse.Namespace) -> None:
    """Refuses what can be refused before anything is loaded."""
    common.require_model_folder(args.weights)
    sources = [
        flag
        for flag, value in (
            ("--prompt", args.prompt),
            ("--timeline", args.timeline),
            ("--prompts", args.prompts),
        )
        if value is not None
    ]
    require(len(sources) < 2, f"{' and '.join(sources)} exclude each other; give one.")
    for flag, value in (("--trace", args.trace), ("--sheet", args.sheet)):
        require(
            args.prompts is None or value is None,
            f"{flag} {value} is of one video, but --prompts may make many; leave it out.",
        )
    args.out = args.out or ("out/videos" if args.prompts else "out/video.mp4")
    require(
        args.seconds is None or args.blocks is None,
        "--seconds and --blocks exclude each other; give one.",
    )
    check_length(args)
    require(
        0 <= args.seed < 2**32, f"--seed {shown(args.seed)} is out of range; give 0 to {2**32 - 1}."
    )
    common.require_count("--keep", args.keep)
    require(
        args.every > 0, f"--every {shown(args.every)} must be at least 1; give a number of blocks."
    )
    resolved = lambda path: path and Path(path).resolve()  # noqa: E731
    for flag, file in (("--out", args.out), ("--sheet", args.sheet), ("--trace", args.trace)):
        require(
            None in (args.state, file) or resolved(args.state) != resolved(file).parent,
            f"{flag} {file} lies in --state {args.state}, which is for saves alone; choose another folder.",
        )
    require(
        resolved(args.trace) != resolved(args.out),
        f"--trace {args.trace} is also the video (--out {args.out}); give them two names.",
    )
    if args.prompt is not None and not args.prompt.strip():
        raise InputError("--prompt is empty; say what the video should show.")


def _blocks(args: argparse.Namespace, pipeline) -> int:
    """How many blocks make the video."""
    from packforcing_jax.sampling.requests import blocks_of, require_length

    exp = pipeline.experiment
    clips = 1 if pipeline.method.whole_clip else TIMES_CLIP
    blocks = args.blocks or clips * exp.clip // exp.cache.block
    if args.seconds is not None:
        blocks = blocks_of(exp, args.seconds)
    require_length(pipeline.method, exp, blocks)
    return blocks


def _prompts(
    args: argparse.Namespace, pipeline, story: list[timelines.Entry], *, stage: bool
) -> tuple[list[str], dict[int, str]]:
    """One prompt per block, and what new prompts do to the memory where the timeline says so."""
    blocks = _blocks(args, pipeline)
    if story:
        return timelines.spread(story, blocks), timelines.changes(story, blocks)
    if args.prompt is not None:
        return [args.prompt] * blocks, {}
    require(stage, "this model has no default story; give --prompt or --timeline.")
    from packforcing_jax.stage import stories

    default = stories.default_timeline(args.seed, blocks)
    return default[:1] * blocks if pipeline.method.whole_clip else default, {}


def _runs(prompts: list[str]) -> list[tuple[int, str]]:
    """The timeline again: (first block, prompt) wherever the prompt changes."""
    return [(i, prompt) for i, prompt in enumerate(prompts) if i == 0 or prompt != prompts[i - 1]]


def _report(film: Film, first: int, retained: _Retained, seconds: float) -> None:
    """What was made; in the Stage world with the oracle's reading beside chance, if all was drawn in this run."""
    args = film.args
    exp = film.pipeline.experiment
    prompts = film.prompts
    made = {
        "out": str(Path(args.out)),
        "blocks": len(prompts),
        "frames": retained.count or None,
        "seconds": round(seconds, 1),
    }
    if first:
        made |= {"resumed_at": first}
    if not retained.all or first:
        if retained.all:
            print(
                "sample: the oracle reads whole videos, and this run made the rest of one; make it again to read it",
                file=sys.stderr,
            )
        length = len(prompts) * exp.cache.block / exp.clip
        times = "" if first else f", {length:.3g} times the training clip"
        line = f"{made['out']}: {made['blocks']} blocks{times}, in {made['seconds']} s"
        print(json.dumps(made) if args.json else line)
        return
    import numpy as np

    from packforcing_jax.stage import captions, metrics, oracle

    read = metrics.report(
        [oracle.read(np.concatenate(retained.frames))],
        [[captions.parse(prompt) for prompt in prompts]],
    )
    if args.json:
        print(json.dumps(made | {"oracle": read}))
        return
    print(
        f"{made['out']}: {made['frames']} frames, {made['frames'] / exp.clip:.0f} times the training clip, "
        f"in {made['seconds']} s"
    )
    print(f"what the oracle reads in it:\n{metrics.table(read)}", file=sys.stdout)
