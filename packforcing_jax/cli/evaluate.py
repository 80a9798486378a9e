"""`packforcing evaluate`: reads a model's videos with the Stage world's oracle, each figure beside its chance level."""

import argparse
import functools
import json
import sys

from packforcing_jax.cli import common
from packforcing_jax.errors import InputError, require

MODES = {
    "teacher": "each next block of held-out clips, behind the true blocks before it",
    "rollout": "long videos that run freely: first window, last window, call-backs",
    "forced": "guests called back after a true history, by gap and by how packed blocks are chosen",
}
VIDEOS = {"teacher": 48, "rollout": 64, "forced": 32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `evaluate`."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--weights", metavar="DIR", help="model folder (default: the Stage model that ships)"
    )
    source.add_argument(
        "--run", metavar="DIR", help="averaged weights of a training run's newest checkpoint"
    )
    common.add_experiment_arguments(parser)
    modes = "; ".join(f"{name}: {what}" for name, what in MODES.items())
    parser.add_argument(
        "--mode", choices=MODES, default="rollout", help=f"{modes} (default: rollout)"
    )
    parser.add_argument("--videos", type=int, metavar="N", help=f"how many (default: {VIDEOS})")
    parser.add_argument(
        "--blocks", type=int, default=120, metavar="N", help="length of a rollout (default: 120)"
    )
    parser.add_argument(
        "--seed", type=int, metavar="S", help="of stories and noise (default: one not trained on)"
    )
    parser.add_argument(
        "--memory", metavar="PROFILE", help="another memory than the model's own, such as no-mid"
    )
    parser.add_argument(
        "--gaps",
        type=gaps,
        metavar="A,B,...",
        default=(8, 32, 64, 110),
        help="blocks between two visits in mode forced, at most four (default: 8,32,64,110)",
    )
    parser.add_argument(
        "--ways",
        metavar="A,B,...",
        default="affinity,paper_sum,recency",
        help="how packed blocks are chosen in mode forced: settings of cache.selection and more, or "
        "every (default: affinity,paper_sum,recency)",
    )
    parser.add_argument(
        "--batch", type=int, default=16, metavar="N", help="videos drawn together (default: 16)"
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
    require(
        args.seed is None or 0 <= args.seed < 2**31,
        f"--seed {args.seed} is out of range; give 0 to {2**31 - 1}.",
    )
    from packforcing_jax.evaluation import recall, stage_figures
    from packforcing_jax.policies import attention

    variants = recall.variants_of(args.ways)
    model = _model(args)
    exp = model.experiment
    backend, why = attention.resolve(exp.attention, exp.dtypes.cache)
    common.start_line(
        "evaluate", experiment=exp, dtype=exp.dtypes.compute, attention=backend, why=why
    )
    count = VIDEOS[args.mode] if args.videos is None else args.videos
    seed = stage_figures.HELD_OUT if args.seed is None else args.seed
    sampling = stage_figures.Sampling(
        seed, args.batch, functools.partial(common.progress, name="evaluate", unit="batches")
    )
    result = {
        "teacher": lambda: stage_figures.teacher_forced(model, clips=count, sampling=sampling),
        "rollout": lambda: stage_figures.rollout(
            model, videos=count, blocks=args.blocks, sampling=sampling
        ),
        "forced": lambda: recall.forced(
            model, variants, gaps=args.gaps, videos=count, sampling=sampling
        ),
    }[args.mode]()
    print(json.dumps(result) if args.json else stage_figures.table(result))
    return 0


def _model(args: argparse.Namespace):
    """The model that the flags name, with the memory and the settings they ask for."""
    from packforcing_jax import methods
    from packforcing_jax.config import loading
    from packforcing_jax.evaluation import stage_figures
    from packforcing_jax.io import model_folder
    from packforcing_jax.methods.method import require_blocks
    from packforcing_jax.sampling import pipeline

    if args.run is None:
        exp = model_folder.opened(args.weights or pipeline.SHIPPED).experiment
        require_blocks(methods.named(exp.method), "evaluate")
        return pipeline.Pipeline.from_pretrained(
            args.weights, memory=args.memory, overrides=args.overrides
        )
    checkpoint = stage_figures.newest(args.run)
    print(f"evaluate: averaged weights of {checkpoint}", file=sys.stderr)
    training = [each for each in args.overrides if loading.of_training(each)]
    stage = loading.load_stage(args.config or "stage", training)
    overrides = [each for each in args.overrides if each not in training]
    exp = pipeline.with_overrides(stage.experiment, args.memory, overrides)
    require_blocks(methods.named(exp.method), "evaluate")
    return stage_figures.of_checkpoint(exp, stage.train, checkpoint)
