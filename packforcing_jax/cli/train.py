"""`packforcing train`: a stage of training or a recipe of several, on one device or many, each to a model folder."""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packforcing_jax import interrupts
from packforcing_jax.cli import common, compiling, peers, places
from packforcing_jax.errors import require, shown

if TYPE_CHECKING:
    from packforcing_jax.config import Stage
    from packforcing_jax.config.loading import Recipe
    from packforcing_jax.training import runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `train`."""
    common.add_experiment_arguments(parser, default="stage")
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="runs/stage",
        help="run folder, continued if it holds a run; a folder per stage of a recipe",
    )
    parser.add_argument(
        "--stage",
        metavar="NAME",
        help="only this stage of a recipe (--set NAME:A.B=VALUE changes one stage)",
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="train for N steps instead of the config's"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights, data and noise (default: 0)"
    )
    several = parser.add_argument_group("several processes, each started with the same command")
    several.add_argument(
        "--distributed",
        action="store_true",
        help="find the others by what SLURM, Kubernetes, Open MPI or a TPU pod says",
    )
    several.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address of process 0, where nothing says it"
    )
    several.add_argument("--processes", type=int, metavar="N", help="how many there are")
    several.add_argument("--process", type=int, metavar="I", help="which of them this is, from 0")
    several.add_argument(
        "--heartbeat-timeout",
        type=int,
        default=peers.HEARTBEAT,
        metavar="SECONDS",
        help="after how much silence of one process the others end (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Trains or continues stage by stage, and exports the averaged weights of each to the folder `model` in its own."""
    require(
        0 <= args.seed < 2**32,
        f"--seed {shown(args.seed)} does not fit into 32 bits; give 0 to {2**32 - 1}.",
    )
    overrides = args.overrides + ([f"train.steps={args.steps}"] if args.steps is not None else [])
    from packforcing_jax.config import loading

    recipe = loading.load_recipe(args.config, overrides)
    with together(args):
        return _run_stages(args, recipe)


def _run_stages(args: argparse.Namespace, recipe: "Recipe") -> int:
    from packforcing_jax.training import runs

    summary: dict[str, Any] = {}
    mine = [places.Place("--out", args.out, "folder")] if first() else []
    with places.held(mine), interrupts.noted() as stopping:
        for folder, stage in runs.planned(recipe, Path(args.out), args.stage):
            summary = train(stage, folder, args.seed, stopping)
            if summary["stopped"]:
                break
    if first():
        print(
            json.dumps(summary)
            if args.json
            else f"model written to {summary['model']}"
            if summary["model"]
            else f"stopped behind step {summary['step']}; the same command goes on from there"
        )
    return 0


def together(args: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """While inside, this process is one of several, if it was started so."""
    group = peers.Group(
        args.coordinator, args.processes, args.process, args.heartbeat_timeout, args.json
    )
    common.require_count("--heartbeat-timeout", group.heartbeat, most=86_400)
    alone = not args.distributed and group[:3] == (None, None, None)
    return contextlib.nullcontext() if alone else peers.joined(group)


def first() -> bool:
    """Whether this is the process that speaks."""
    import jax

    return jax.process_index() == 0


def train(stage: "Stage", folder: Path, seed: int, stopping: Callable[[], bool]) -> dict[str, Any]:
    """Trains one stage in `folder` until it is done or asked to stop; what came of it, with its last metrics."""
    from packforcing_jax.policies import attention
    from packforcing_jax.training import logs, runs

    exp = stage.experiment
    settings = stage.train
    summary: dict[str, Any] = {
        "step": settings.steps,
        "model": str(folder / runs.MODEL),
        "stopped": False,
    }
    if runs.finished(exp, settings, folder, seed=seed):
        say(f"train: {summary['model']} is there already")
        return summary
    backend, why = attention.resolve(exp.attention)
    if first():
        common.start_line(
            "train", experiment=exp, dtype=exp.dtypes.compute, attention=backend, why=why
        )
    job = interrupts.interruptible(lambda: runs.start(exp, settings, folder, seed=seed), stopping)
    if job.step:
        say(f"train: goes on behind step {job.step} in {folder}")
    programs = runs.to_compile(job)
    if programs:
        several = "1 program" if programs == 1 else f"{programs} programs"
        say(f"train: {several} to compile, or to read where an earlier run kept them")
    made = runs.steps(job, stopping)
    metrics = {}
    left_out = 0
    if first():
        made = common.progress(
            made,
            name=folder.name,
            unit="steps",
            total=settings.steps,
            first=job.step,
            note=logs.losses,
        )
    told = compiling.told(lambda: _compiling(job)) if first() else contextlib.nullcontext()
    try:
        with told:
            for each in made:
                metrics = each
                left_out += metrics["skipped"] > 0
    finally:
        if left_out:
            say(
                f"train: {left_out} updates were left out, as they were not finite; look at the data or lower the rates"
            )
    runs.finish(job)
    summary |= {
        "step": job.step,
        "model": summary["model"] if job.done else None,
        "stopped": job.stopped,
        "left_out": left_out,
    }
    return {
        name: logs.plain(value) if name not in summary else value for name, value in metrics.items()
    } | summary


def _compiling(job: "runs.Run") -> str:
    from packforcing_jax.training import runs

    compiled = len(job.programs)
    return compiling.line("train", f"program {compiled + 1} of {compiled + runs.to_compile(job)}")


def say(sentence: str) -> None:
    """A line on stderr, from one of the processes."""
    if first():
        print(sentence, file=sys.stderr, flush=True)
