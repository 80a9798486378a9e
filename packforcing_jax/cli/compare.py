"""`packforcing compare`: the same prompts and noise under several methods, and one page of what differs."""

import argparse
import functools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from packforcing_jax.cli import common, places
from packforcing_jax.errors import InputError

if TYPE_CHECKING:
    from packforcing_jax.evaluation.comparison import Arm, Comparison, Job, Planned

ASSUMED = 0.4  # share of a GPU's peak that a block is assumed to reach
PEAK = 989e12  # operations a second of an H200, dense bfloat16 (its data sheet)
BITS = 0.1  # of a pixel of a video, about: what QP 14 takes for pictures of a film


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `compare`."""
    parser.add_argument("file", metavar="FILE", type=Path, help="what is compared, as JSON")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("out/compare"), help="default: out/compare"
    )
    parser.add_argument(
        "--shard",
        metavar="K/N",
        type=shard,
        help="only part K of N; copy the folders of all parts together and run it once more without",
    )
    parser.add_argument(
        "--plan", action="store_true", help="only say what it takes: videos, GPU-hours, bytes"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")


def shard(text: str) -> tuple[int, int]:
    """`3/16` as numbers."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and len(text) < 12):
        raise InputError(f"--shard {text} is not a part; write it as 3/16.")
    return int(number), int(count)


def run(args: argparse.Namespace) -> int:
    """Draws what is not finished, measures it, and writes the page once all is there."""
    from packforcing_jax.evaluation import comparison as comparing
    from packforcing_jax.evaluation import comparison_figures

    asked = comparing.read(args.file)
    every = comparing.jobs(asked)
    todo = every if args.shard is None else comparing.shard(every, *args.shard)
    plans = {arm: comparing.planned(asked, arm) for arm in asked.arms}
    if args.plan:
        return _plan(args, todo, plans)
    for suite in asked.suites:
        comparison_figures.SUITES[suite].check()
    own = args.out if args.shard is None else args.out / "part-{}-of-{}".format(*args.shard)
    with places.held([places.Place("--out", own, "videos")]):
        return _draw(args, asked, todo)


def _draw(args: argparse.Namespace, asked: "Comparison", todo: Sequence["Job"]) -> int:
    """Draws and measures `todo`; the page, once nothing is missing."""
    from packforcing_jax.evaluation import comparison as comparing
    from packforcing_jax.evaluation import comparison_page

    args.out.mkdir(parents=True, exist_ok=True)
    every, ways = comparing.jobs(asked), asked.arms
    print(
        f"compare: {len(todo)} of {len(every)} videos, {len(ways)} ways, on {common.device_line()}",
        file=sys.stderr,
    )
    watch = functools.partial(common.progress, name="compare", unit="videos")
    comparing.draw_all(asked, todo, args.out, watch)
    left = comparing.missing(asked, args.out)
    if left:
        said = f"{len(left)} of {len(every)} videos are not finished, such as {left[0].arm.name} {left[0].name}"
        print(f"compare: {said}; the page follows once they are in {args.out}", file=sys.stderr)
        return 0
    page = comparison_page.write(asked, args.out)
    found = json.loads((args.out / "results.json").read_text())
    print(json.dumps(found) if args.json else comparison_page.markdown(found))
    print(f"compare: {page}", file=sys.stderr)
    return 0


def _plan(
    args: argparse.Namespace, every: Sequence["Job"], plans: Mapping["Arm", "Planned"]
) -> int:
    """Prints what the videos take, by arm and in all."""
    from packforcing_jax.networks import codec
    from packforcing_jax.plan import budget
    from packforcing_jax.sampling import requests

    rows = []
    for arm, plan in plans.items():
        exp = plan.experiment
        count = sum(job.arm == arm for job in every)
        frames = codec.frames_of(exp.codec, plan.blocks * exp.cache.block)
        size, scale = requests.shown_size(exp)
        hours = None
        if not plan.method.whole_clip:  # which `plan` does not count
            found = budget.of(exp, plan.blocks).rows
            each = [found[f"operations/{part}"].counted for part in ("whole block", "decoding")]
            hours = count * plan.blocks * sum(each) / (PEAK * ASSUMED) / 3600
        rows.append(
            {
                "arm": arm.name,
                "videos": count,
                "blocks": plan.blocks,
                "frames": frames,
                "hours": hours,
                "bytes": int(count * frames * math.prod(size) * scale**2 * BITS / 8),
            }
        )
    total = {name: sum(row[name] or 0 for row in rows) for name in ("videos", "hours", "bytes")}
    if args.json:
        print(json.dumps({"arms": rows, "total": total}))
        return 0
    for row in [*rows, {"arm": "in all", "blocks": "", "frames": "", **total}]:
        print(
            f"{row['arm']:<40}{row['videos']:>6} videos{row['blocks']:>7} blocks{row['frames']:>7} frames"
            f"{_number(row['hours']):>12} GPU-hours{row['bytes'] / 1e9:>10.3g} GB"
        )
    print(
        f"GPU-hours: operations by `packforcing plan` at {ASSUMED:.0%} of {PEAK / 1e12:.0f} TFLOP/s, the dense "
        f"bfloat16 peak of an H200; GB: {BITS} bit a pixel. Both are assumptions. "
        "Clips that are denoised as a whole are not counted in hours (-)."
    )
    return 0


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
