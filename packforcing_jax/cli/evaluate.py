"""`packforcing evaluate`: measures video files, or a model while it makes videos.

With VIDEOS a suite of figures is read off files (`evaluate_files`). Without, the suite is `stage`: videos that a model
makes, each figure beside its chance level. Its modes read a Stage model's videos with the oracle of its world; one is
about attention, and takes any causal model.
"""

import argparse
import functools
import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from packforcing_jax.cli import common, evaluate_files
from packforcing_jax.errors import InputError, nearest, require

if TYPE_CHECKING:
    from packforcing_jax.config import Experiment
    from packforcing_jax.evaluation.stage_figures import Sampling
    from packforcing_jax.sampling.pipeline import Pipeline

MODES = {
    "teacher": "each next block of held-out clips, behind the true blocks before it",
    "rollout": "long videos that run freely: first window, last window, call-backs",
    "forced": "guests called back after a true history, by gap and by how packed blocks are chosen",
    "attention": "any model: attention that late blocks pay the whole history, and how the choice of blocks changes",
}
VIDEOS = {"teacher": 48, "rollout": 64, "forced": 32, "attention": 32}
ATTENTION = ("prompts", "method")  # flags that mode attention alone has, without VIDEOS
FORCED_WAYS = "affinity,paper_sum,recency"
STAGE = "stage"  # the suite without VIDEOS
DEFAULTS = {  # of the flags of suite stage
    "weights": None,
    "run": None,
    "config": None,
    "overrides": [],
    "mode": "rollout",
    "videos": None,
    "blocks": 120,
    "memory": None,
    "gaps": (8, 32, 64, 110),
    "ways": None,
    "batch": 16,
    "method": None,
}
SPELLED = {"overrides": "set"}  # flags that are called otherwise than their value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `evaluate`."""
    parser.add_argument(
        "--suite",
        metavar="NAME",
        help="which figures: stage without VIDEOS; with them native, vbench or clip (default: stage, native)",
    )
    evaluate_files.add_arguments(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--weights", metavar="DIR", help="model folder (default: the Stage model that ships)"
    )
    source.add_argument(
        "--run", metavar="DIR", help="averaged weights of a training run's newest checkpoint"
    )
    common.add_experiment_arguments(parser)
    modes = "; ".join(f"{name}: {what}" for name, what in MODES.items())
    parser.add_argument("--mode", choices=MODES, help=f"{modes} (default: {DEFAULTS['mode']})")
    parser.add_argument("--videos", type=int, metavar="N", help=f"how many (default: {VIDEOS})")
    parser.add_argument(
        "--blocks",
        type=int,
        metavar="N",
        help=f"length of a video in modes rollout and attention (default: {DEFAULTS['blocks']})",
    )
    parser.add_argument(
        "--seed",
        type=int,
        metavar="S",
        help="of stories and noise (default: one not trained on); with VIDEOS, of the intervals",
    )
    parser.add_argument(
        "--memory", metavar="PROFILE", help="another memory than the model's own, such as no-mid"
    )
    parser.add_argument(
        "--gaps",
        type=gaps,
        metavar="A,B,...",
        help="blocks between two visits in mode forced, at most four (default: 8,32,64,110)",
    )
    parser.add_argument(
        "--ways",
        metavar="A,B,...",
        help="how packed blocks are chosen: settings of cache.selection and more, or every (default: "
        f"{FORCED_WAYS} in mode forced, the model's own in mode attention)",
    )
    parser.add_argument(
        "--method",
        metavar="NAME",
        help="how the past is kept and shown in mode attention (default: what the model was made for)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help=f"videos drawn together (default: {DEFAULTS['batch']})",
    )


def gaps(listed: str) -> tuple[int, ...]:
    """`2,64` as numbers."""
    try:
        return tuple(int(word) for word in listed.split(","))
    except ValueError as error:
        raise InputError(
            f"--gaps {listed} is not a list of whole numbers; write it as 2,8,64."
        ) from error


def run(args: argparse.Namespace) -> int:
    """Measures the files that are given, or else evaluates a Stage model."""
    from packforcing_jax.evaluation.suites import SUITES

    known = (STAGE, *SUITES)
    require(
        args.suite in (None, *known),
        f"--suite {args.suite} is unknown; {nearest(str(args.suite), known)}",
    )
    require(
        args.seed is None or 0 <= args.seed < 2**31,
        f"--seed {args.seed} is out of range; give 0 to {2**31 - 1}.",
    )
    if args.video_files:
        require(
            args.suite != STAGE,
            f"--suite {STAGE} makes its own videos; leave VIDEOS out, or choose another suite.",
        )
        _refuse(args, DEFAULTS, "is about a Stage model; leave it out, or leave VIDEOS out")
        return evaluate_files.run(args)
    require(
        args.suite in (None, STAGE), f"--suite {args.suite} needs VIDEOS; give files or folders."
    )
    attention = args.mode == "attention"
    own = ATTENTION if attention else ()
    files = [flag for flag in evaluate_files.FLAGS if flag not in own]
    _refuse(args, files, "is about video files; give VIDEOS")
    if not attention:
        _refuse(
            args, ("method",), "belongs to mode attention; leave it out, or give --mode attention"
        )
    given = {flag: getattr(args, flag) for flag in DEFAULTS if getattr(args, flag) is not None}
    return _stage(argparse.Namespace(**{**vars(args), **DEFAULTS, **given}))


def _refuse(args: argparse.Namespace, flags: Iterable[str], why: str) -> None:
    """Raises `InputError` if one of some flags was given."""
    for flag in flags:
        require(
            getattr(args, flag) in (None, []),
            f"--{SPELLED.get(flag, flag).replace('_', '-')} {why}.",
        )


def _stage(args: argparse.Namespace) -> int:
    """Prints the figures of one mode."""
    require(
        args.config is None or args.run is not None,
        "--config goes with --run; a model folder has its own config.",
    )
    common.require_model_folder(args.weights)
    common.require_count("--videos", args.videos)
    common.require_count("--batch", args.batch)
    common.require_count("--blocks", args.blocks)
    for gap in args.gaps:
        common.require_count("--gaps", gap)
    from packforcing_jax.config import PROFILES

    require(
        args.memory in (None, *PROFILES),
        f"--memory {args.memory} is unknown; choose one of {', '.join(PROFILES)}.",
    )
    from packforcing_jax.evaluation import recall, stage_figures
    from packforcing_jax.policies import attention

    if args.ways is not None:
        recall.variants_of(args.ways)  # an unknown one is refused before anything is loaded
    model = _model(args)
    exp = model.experiment
    backend, why = attention.resolve(exp.attention, exp.dtypes.cache)
    common.start_line(
        "evaluate", experiment=exp, dtype=exp.dtypes.compute, attention=backend, why=why
    )
    seed = stage_figures.HELD_OUT if args.seed is None else args.seed
    sampling = stage_figures.Sampling(
        seed, args.batch, functools.partial(common.progress, name="evaluate", unit="batches")
    )
    result = _measured(args, model, sampling)
    print(json.dumps(result) if args.json else stage_figures.table(result))
    return 0


def _measured(args: argparse.Namespace, model: "Pipeline", sampling: "Sampling") -> dict:
    """The figures of one mode."""
    from packforcing_jax.evaluation import attention_study, recall, stage_figures

    count = VIDEOS[args.mode] if args.videos is None else args.videos
    if args.mode == "teacher":
        return stage_figures.teacher_forced(model, clips=count, sampling=sampling)
    if args.mode == "rollout":
        return stage_figures.rollout(model, videos=count, blocks=args.blocks, sampling=sampling)
    if args.mode == "forced":
        variants = recall.variants_of(args.ways or FORCED_WAYS)
        return recall.forced(model, variants, gaps=args.gaps, videos=count, sampling=sampling)
    prompts = _told(args, model.experiment, sampling.seed)
    ways = recall.variants_of(args.ways) if args.ways else {attention_study.own(model): {}}
    return attention_study.study(model, prompts, ways, sampling=sampling)


def _told(args: argparse.Namespace, exp: "Experiment", seed: int) -> list[list[str]]:
    """A prompt for each block of each video: the lines of --prompts, or the stories of the Stage world."""
    from packforcing_jax.sampling import prompt_files, timelines
    from packforcing_jax.stage import captions
    from packforcing_jax.stage.stories import default_timeline

    if args.prompts is None:
        require(
            captions.tells(exp),
            f"experiment {exp.name!r} draws no stage videos, whose stories are known; give --prompts FILE.",
        )
        count = VIDEOS[args.mode] if args.videos is None else args.videos
        return [default_timeline(seed + i, args.blocks) for i in range(count)]
    jobs = prompt_files.read(args.prompts)
    for job in jobs:
        own = (job.blocks, job.seconds, job.seed, job.memory, *job.overrides)
        require(
            not any(value is not None for value in own),
            f"{job.source} has settings of its own, but all videos are measured alike; leave all but the prompt or "
            "timeline out.",
        )
    count = len(jobs) if args.videos is None else args.videos
    require(
        count <= len(jobs),
        f"--videos {count} exceeds the {len(jobs)} lines of {args.prompts}; give fewer, or write more.",
    )
    return [timelines.spread(job.entries, args.blocks) for job in jobs[:count]]


def _model(args: argparse.Namespace) -> "Pipeline":
    """The model that the flags name, with the memory and the settings they ask for."""
    from packforcing_jax import methods
    from packforcing_jax.config import loading
    from packforcing_jax.evaluation import stage_figures
    from packforcing_jax.io import model_folder
    from packforcing_jax.methods.method import require_blocks
    from packforcing_jax.sampling import pipeline

    if args.run is None:
        exp = model_folder.opened(args.weights or pipeline.SHIPPED).experiment
        require_blocks(methods.named(args.method or exp.method), "evaluate")
        return pipeline.Pipeline.from_pretrained(
            args.weights, memory=args.memory, overrides=args.overrides, method=args.method
        )
    checkpoint = stage_figures.newest(args.run)
    print(f"evaluate: averaged weights of {checkpoint}", file=sys.stderr)
    training = [each for each in args.overrides if loading.of_training(each)]
    stage = loading.load_stage(args.config or "stage", training)
    overrides = [each for each in args.overrides if each not in training]
    exp = pipeline.with_overrides(stage.experiment, args.memory, overrides)
    require_blocks(methods.named(args.method or exp.method), "evaluate")
    model = stage_figures.of_checkpoint(exp, stage.train, checkpoint)
    return model if args.method is None else model.with_method(args.method)
