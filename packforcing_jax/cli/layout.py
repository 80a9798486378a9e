"""`packforcing layout`: whom each block sees under a method, as what, and at which positions in time."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from packforcing_jax.cli import common, places
from packforcing_jax.errors import require, shown

MARKS = {"sink": "S", "mid": "m", "recent": "R", "current": "C"}
MOST = 10_000  # blocks
BLOCKS = 12
SHOWN = 24  # rows of the table; --json holds all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `layout`."""
    parser.add_argument("--method", metavar="NAME", help="method (default: the experiment's own)")
    parser.add_argument(
        "--blocks",
        type=int,
        metavar="N",
        help=f"default: {BLOCKS}, or a clip where all of its frames are denoised together",
    )
    parser.add_argument(
        "--switch",
        type=int,
        action="append",
        default=[],
        metavar="BLOCK",
        help="a new prompt starts here; may be repeated",
    )
    parser.add_argument("--picture", metavar="PNG", help="also draw it")
    common.add_experiment_arguments(parser, default="wan_t2v_1_3b")


def run(args: argparse.Namespace) -> int:
    """Prints one row per block, or JSON with every key."""
    require(
        args.blocks is None or 0 < args.blocks <= MOST,
        f"--blocks {shown(args.blocks)} is not a length that can be laid out; give 1 to {MOST:,}.",
    )
    from packforcing_jax import methods
    from packforcing_jax.methods import calls
    from packforcing_jax.methods.method import lengthened, require_one_prompt
    from packforcing_jax.sampling import pipeline

    own = common.load_experiment(args.config)
    exp = pipeline.with_overrides(own, None, args.overrides, args.method)
    method = methods.named(own.method if args.method is None else args.method)
    blocks = args.blocks or (exp.blocks if method.whole_clip else BLOCKS)
    for block in args.switch:
        require(
            0 < block < blocks,
            f"--switch {shown(block)} is no block behind the first of {blocks}; give 1 to {blocks - 1}.",
        )
    pipeline.require_length(method, exp, blocks)
    exp = lengthened(method, exp, blocks)
    prompts = [sum(start <= block for start in args.switch) for block in range(blocks)]
    require_one_prompt(method, prompts)
    every = list(calls.calls(exp.memory, method, prompts))
    steps = [call for call in every if call.call == calls.DENOISE]
    with places.held([places.Place("--picture", args.picture, "picture")]):
        if args.picture:
            _draw(steps, Path(args.picture))
    if args.json:
        table = {
            "method": method.name,
            "config": exp.name,
            "sizes": {
                "sink": exp.cache.sink,
                "recent": exp.cache.recent,
                "block": exp.cache.block,
                "selected": exp.cache.attended,
                "chosen_tokens": exp.cache.chosen * exp.tokens_per_frame,
                "tokens_per_frame": exp.tokens_per_frame,
            },
            "steps": [_as_json(call) for call in steps],
            "other": [_as_json(call) for call in every if call.call != calls.DENOISE],
        }
        print(json.dumps(table))
        return 0
    print("\n".join(_table(method.name, exp, steps)))
    return 0


def _as_json(call) -> dict:
    """A call as plain data."""
    told = {} if call.call == "denoise" else {"call": call.call}
    if call.clip:
        told |= {"clip": call.clip}
    return told | {
        "block": call.block,
        "queries": [list(query) for query in call.queries],
        "keys": [
            {
                "frames": None if key.frames is None else list(key.frames),
                "kind": key.kind,
                "position": key.position,
                "tokens": key.tokens,
            }
            for key in call.keys
        ],
        "tokens": call.tokens,
    }


def _table(method: str, exp, steps: list) -> Iterable[str]:
    cache = exp.cache
    yield (
        f"{method} on {exp.name}: sink {cache.sink}, recent {cache.recent}, block {cache.block} frames, "
        f"{_between(exp)}; {exp.tokens_per_frame} tokens a frame"
    )
    mid = "chosen" if cache.budget else "packed"
    yield f"{'block':>6}  {'sink':>12}  {mid:>22}  {'recent':>14}  {'current':>14}  {'tokens':>8}"
    chosen = steps if len(steps) <= SHOWN else [*steps[: SHOWN - 2], None, steps[-1]]
    for call in chosen:
        if call is None:
            yield f"{'...':>6}"
            continue
        parts = {kind: [key for key in call.keys if key.kind == kind] for kind in MARKS}
        yield (
            f"{call.block:>6}  {_span(parts['sink']):>12}  {_packed(parts['mid']):>22}  "
            f"{_span(parts['recent']):>14}  {_span(parts['current']):>14}  {call.tokens:>8,}"
        )
    yield "frames @ positions in time; of blocks or tokens that the data choose, their number"


def _between(exp) -> str:
    cache = exp.cache
    if cache.budget:
        tokens = cache.chosen * exp.tokens_per_frame
        return f"a full window compressed to {cache.budget}, {tokens:,} single tokens among them"
    return f"{cache.attended} packed blocks at most"


def _span(keys: list) -> str:
    if not keys:
        return "-"
    return f"{keys[0].frames[0]}-{keys[-1].frames[1]} @ {keys[0].position:g}"


def _packed(keys: list) -> str:
    if not keys:
        return "-"
    if keys[0].position is None:
        return f"{sum(key.tokens for key in keys):,} tokens"
    free = any(key.frames is None for key in keys)
    which = f"{len(keys)} chosen" if free else f"{keys[0].frames[0]}-{keys[-1].frames[1]}"
    return f"{which} @ {keys[0].position:g}-{keys[-1].position:g}"


def _draw(steps: list, path: Path) -> None:
    from packforcing_jax.io import atomic
    from packforcing_jax.methods import picture

    with atomic.file(path) as fresh:
        picture.of(steps).save(fresh, format="PNG")
