"""`packforcing train`: trains the small model on clips drawn by the Stage world, and writes a model folder."""

import argparse
import json
from pathlib import Path

from packforcing_jax.cli import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `train`."""
    common.add_experiment_arguments(parser, default="stage")
    parser.add_argument("--out", metavar="DIR", default="runs/stage", help="run folder; continued if it holds a run")
    parser.add_argument("--steps", type=int, metavar="N", help="train for N steps instead of the config's")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and noise (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Trains, or continues a run, and exports the averaged weights to DIR/model."""
    from packforcing_jax import attention, train

    sets = args.sets + ([f"train.steps={args.steps}"] if args.steps is not None else [])
    exp = common.load_experiment(args.config, sets)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    backend, why = attention.chosen(exp.attention)
    common.start_line("train", experiment=exp, dtype="float32", attention=backend, why=why)
    job = train.start(exp, folder, args.seed)
    metrics: dict = {"step": job.step}
    with (folder / "metrics.jsonl").open("a") as log:
        shown = common.progress(train.steps(job), name="train", unit="steps", total=exp.train.steps - job.step)
        for metrics in shown:
            train.log_line(log, metrics)
    train.export(job, folder / "model")
    job.saved.close()
    print(json.dumps(metrics) if args.json else f"model written to {folder / 'model'}")
    return 0
