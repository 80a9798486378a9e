"""What the verbs that go on from something saved share: the model that it was made with, and the prompts to tell."""

import argparse
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from packforcing_jax.cli import common
from packforcing_jax.errors import require, shown
from packforcing_jax.sampling import timelines

if TYPE_CHECKING:
    from packforcing_jax.sampling.pipeline import Pipeline


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags about the model."""
    parser.add_argument(
        "--weights", metavar="DIR", help="model folder (default: the one it was made with)"
    )
    parser.add_argument(
        "--anyway",
        action="store_true",
        help="try even what seems to need more memory than there is",
    )


def add_length_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say how many more blocks there are."""
    parser.add_argument("--seconds", type=float, metavar="S", help="how much longer")
    parser.add_argument("--blocks", type=int, metavar="N", help="how many more blocks")


def require_length(args: argparse.Namespace) -> None:
    """Raises `InputError` unless one length is given, and is one."""
    require(
        (args.seconds is None) != (args.blocks is None),
        "give --seconds or --blocks, one of the two, to say how much longer.",
    )
    check_length(args)


def check_length(args: argparse.Namespace) -> None:
    """Raises `InputError` for --seconds or --blocks that are no length."""
    require(
        args.blocks is None or 0 < args.blocks <= timelines.MOST_BLOCKS,
        f"--blocks {shown(args.blocks)} is not a length; give 1 to {timelines.MOST_BLOCKS:,}.",
    )
    require(
        args.seconds is None or 0 < args.seconds <= timelines.MOST_SECONDS,
        f"--seconds {args.seconds} is not a length; give a number above 0, {timelines.MOST_SECONDS:,} at most.",
    )


def load(
    args: argparse.Namespace, settings: Mapping[str, object], weights: str | None, source: str
) -> "Pipeline":
    """The model with the settings that `source` holds, of --weights or of the folder it was made with."""
    from packforcing_jax.io import model_folder
    from packforcing_jax.plan import memory_fit
    from packforcing_jax.sampling.pipeline import Pipeline

    common.require_model_folder(args.weights)
    exp = model_folder.experiment_from_json(json.dumps(settings), source)
    if not args.anyway:
        memory_fit.require_fits(exp)
    loaded = Pipeline.from_pretrained(args.weights or weights, experiment=exp)
    return loaded.with_saved(settings)


def start_line(verb: str, pipeline: "Pipeline") -> None:
    """Says on stderr what is about to run."""
    from packforcing_jax.methods.method import sizes_told
    from packforcing_jax.policies import attention

    exp = pipeline.experiment
    backend, why = attention.resolve(exp.attention, exp.dtypes.cache)
    common.start_line(verb, experiment=exp, dtype=exp.dtypes.compute, attention=backend, why=why)
    if not pipeline.method.own_memory:
        print(f"{verb}: {sizes_told(pipeline.method, exp)}", file=sys.stderr, flush=True)
