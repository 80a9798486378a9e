"""`packforcing evaluate VIDEOS...`: measures video files with a suite of figures, into a folder of results."""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from packforcing_jax.cli import common, places
from packforcing_jax.errors import require, sentence

if TYPE_CHECKING:
    from packforcing_jax.evaluation.video_files import VideoFile

OFFICIAL = (  # flags of the suites that official code measures
    "environment",
    "metrics",
    "protocol",
    "weights_cache",
    "allow_network",
    "time_limit",
    "device",
    "rate",
)
FIELDS = ("window", "block", "rule", "seed", *OFFICIAL)  # of the options, by the flags' names
FLAGS = ("out", "prompts", "rule", "window", "block", *OFFICIAL)
RULES = ("short", "extended")
WINDOWS = (0.1, 3600.0)  # seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `evaluate` about video files; None where one was not given."""
    group = parser.add_argument_group("video files")
    group.add_argument(
        "video_files",
        nargs="*",
        metavar="VIDEOS",
        help="files or folders of videos, whoever made them",
    )
    group.add_argument(
        "--out", metavar="DIR", help="folder for results.json, CSV, Markdown and curves; resumable"
    )
    group.add_argument(
        "--prompts",
        metavar="FILE",
        help='prompts of the videos, a JSON table a line: {"file", "prompt", "extended"}',
    )
    group.add_argument(
        "--rule", choices=RULES, help="which of a video's prompts counts (default: short)"
    )
    group.add_argument(
        "--window",
        type=float,
        metavar="SECONDS",
        help="length of a window (default: 5, suite clip: 10)",
    )
    group.add_argument(
        "--block",
        type=int,
        metavar="N",
        help="frames between block borders, where jumps are expected (default: found)",
    )
    official = parser.add_argument_group("suites vbench and clip (docs/vbench.md)")
    official.add_argument(
        "--environment", type=Path, metavar="PATH", help="a Python or its folder, that has vbench"
    )
    official.add_argument(
        "--metrics",
        type=lambda listed: tuple(listed.split(",")),
        metavar="A,B,...",
        help="some metrics of the suite (default: all)",
    )
    official.add_argument(
        "--protocol", metavar="NAME", help="whole, the only one that packages can run"
    )
    official.add_argument(
        "--weights-cache",
        type=Path,
        metavar="DIR",
        help="folder with vbench/ and torch/ in it (default: ~/.cache)",
    )
    official.add_argument(
        "--allow-network",
        action="store_true",
        default=None,
        help="let official code fetch the weights that are missing",
    )
    official.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="for a process of a metric and at most 16 videos (default: 3600)",
    )
    official.add_argument("--device", metavar="NAME", help="cpu or cuda (default: cpu)")
    official.add_argument(
        "--rate", type=float, metavar="FPS", help="frames a second of suite clip (default: 2)"
    )


def run(args: argparse.Namespace) -> int:
    """Measures the files; 1 if any of them was skipped or lacks a figure. `args` has None for what was not given."""
    from packforcing_jax.evaluation import results, suites, video_files
    from packforcing_jax.evaluation.suite import Options

    name = args.suite or "native"
    suite = suites.named(name)
    _require_flags(args, name, suite.flags)
    given = {field: getattr(args, field) for field in FIELDS if getattr(args, field) is not None}
    options = Options(**{**suite.defaults, **given}, watch=_watched)
    suite.check(options)
    videos = video_files.find(args.video_files)
    prompts = video_files.read_prompts(args.prompts, videos) if args.prompts else {}
    out = Path(args.out)
    with places.held([places.Place("--out", out, "folder")]):
        results.check_suite(out, name)
        found = suite.measure(videos, prompts, options, out)
        table = results.write(out, found, options.seed)
    print(json.dumps(table) if args.json else results.page(found, options.seed))
    for skipped, reason in found.skipped.items():
        print(f"evaluate: skipped {sentence(f'{skipped}: {reason}')}", file=sys.stderr)
    for reason in found.lacking:
        print(f"evaluate: {sentence(reason)}", file=sys.stderr)
    return 1 if found.skipped or found.lacking else 0


def _watched(work: Iterable["VideoFile"], total: int, unit: str) -> Iterable["VideoFile"]:
    return common.progress(
        work, name="evaluate", unit=unit, total=total, note=lambda video: video.name
    )


def _require_flags(args: argparse.Namespace, name: str, known: frozenset[str]) -> None:
    """Raises `InputError` unless the flags fit each other and the suite."""
    require(all(args.video_files), "One of VIDEOS is empty; give it a path or leave it out.")
    require(args.out is not None, "--out is missing; give the folder for the results.")
    for field in FIELDS:
        require(
            getattr(args, field) is None or field in known,
            f"--{field.replace('_', '-')} is nothing that suite {name} reads; leave it out.",
        )
    require(
        args.rule is None or args.prompts is not None,
        "--rule chooses among prompts; give them with --prompts.",
    )
    low, high = WINDOWS
    require(
        args.window is None or low <= args.window <= high,
        f"--window {args.window} is out of range; give seconds from {low:g} to {high:g}.",
    )
    common.require_count("--block", args.block, least=2)
