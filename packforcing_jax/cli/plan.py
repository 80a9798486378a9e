"""`packforcing plan`: what a video costs, counted from the real step beside the formulas, nothing allocated."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING

from packforcing_jax.cli import common
from packforcing_jax.config import PROFILES, Experiment, require

if TYPE_CHECKING:
    from packforcing_jax.budget import Budget, Row

DEFAULT = "wan_t2v_1_3b_paper"
TITLES = {
    "keys": "keys that a layer attends to, one video",
    "last block": "the last block",
    "bytes": "keys and values, all layers",
    "held": "held from the first block to the last",
    "workspace": "workspace at its peak, before fusion",
    "parameters": "parameters",
    "operations": "operations of one block",
    "share": "share of a block's operations",
}
PREFIXES = ("", "k", "M", "G", "T", "P", "E")  # decimal: 1 GB is 10^9 bytes
SYMBOLS = {"bytes": "B", "operations": "FLOP"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `plan`."""
    common.add_experiment_arguments(parser, default=DEFAULT)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=120.0, metavar="S", help="length (default: 120)")
    length.add_argument("--blocks", type=int, metavar="N", help="length in blocks")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="videos drawn together (default: 1)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16",
                        help="of weights, keys and values (default: bfloat16)")  # fmt: skip
    parser.add_argument("--memory", metavar="PROFILE", help=f"another memory: {', '.join(PROFILES)}")
    parser.add_argument("--compile", action="store_true",
                        help="also ask the compiler of this machine for its workspace; takes minutes at full size")


def run(args: argparse.Namespace) -> int:
    """Prints every figure; exit code 1 if one is not what its formula says."""
    exp = _experiment(args)
    import jax

    if not args.compile:
        jax.config.update("jax_platforms", "cpu")  # shapes need no accelerator, which another program may be using
    from packforcing_jax import budget, pipeline

    blocks = pipeline.blocks_of(exp, args.seconds) if args.blocks is None else args.blocks
    found = budget.of(exp, blocks, batch=args.batch, dtype=args.dtype, compiled=args.compile)
    print(json.dumps(report(found)) if args.json else table(found, compiled=args.compile))
    return 1 if found.wrong else 0


def _experiment(args: argparse.Namespace) -> Experiment:
    """The experiment that the flags name; `--set` has the last word."""
    require(args.memory in (None, *PROFILES),
            f"--memory {args.memory} is unknown; choose one of {', '.join(PROFILES)}.")  # fmt: skip
    exp = common.load_experiment(args.config)
    if args.memory is not None:
        exp = dataclasses.replace(exp, cache=PROFILES[args.memory])
    return common.override(exp, args.sets)


def spell(figure: float, unit: str) -> str:
    """A figure as a person reads it: `12,480`, `3.987 GB`, `48.585 TFLOP`, `0.291 %`."""
    if unit == "share":
        return f"{100 * figure:.3f} %"
    if unit not in SYMBOLS:
        return f"{figure:,}"
    power = min(max(len(str(int(figure))) - 1, 0) // 3, len(PREFIXES) - 1)
    return f"{figure / 1000**power:.{3 if power else 0}f} {PREFIXES[power]}{SYMBOLS[unit]}"


def line(row: Row) -> str:
    """`name counted formula terms`; figures that differ are printed to the last digit."""
    name = row.name.partition("/")[2]
    if not row.ok:
        return f"  {name:<34}{row.counted:>20,}{row.formula:>20,}  DIFFERS from {row.terms}"
    formula = "" if row.formula is None else spell(row.formula, row.unit)
    return f"  {name:<34}{spell(row.counted, row.unit):>20}{formula:>20}  {row.terms}".rstrip()


def table(found: Budget, *, compiled: bool) -> str:
    """All figures by part as aligned text."""
    exp, lines = found.experiment, []
    for part, title in TITLES.items():
        lines += ["", f"{title:<36}{'counted':>20}{'formula':>20}"]
        lines += [line(row) for row in found.rows.values() if row.name.partition("/")[0] == part]
        if part == "workspace" and not compiled:
            lines.append(f"  {'compiled here':<34}{'not compiled':>20}{'':>20}  --compile asks this machine's compiler")
    sizes = {"B": exp.cache.block, "s": exp.tokens_per_frame, "p": exp.tokens_per_packed_block, "L": exp.dit.layers,
             "d": exp.dit.dim, "f": exp.dit.ffn_dim, "W": exp.dit.text_len, "q": exp.cache.block * exp.tokens_per_frame,
             "S": len(exp.sample.steps), "b": found.batch}  # fmt: skip
    checked = [row for row in found.rows.values() if row.formula is not None]
    return "\n".join([
        f"{exp.name}: {found.blocks} blocks of {exp.cache.block} latent frames, {found.dtype}",
        "with " + ", ".join(f"{letter} = {size:,}" for letter, size in sizes.items()) + ", V = room", *lines, "",
        f"{len(found.rows)} figures, {len(checked)} have a formula, {len(found.wrong)} differ from it",
    ])  # fmt: skip


def report(found: Budget) -> dict:
    """All figures as counted, with their formulas and units, by name."""
    rows = {name: {"counted": row.counted, "formula": row.formula, "unit": row.unit, "ok": row.ok, "terms": row.terms}
            for name, row in found.rows.items()}  # fmt: skip
    return {"experiment": found.experiment.name, "blocks": found.blocks, "batch": found.batch, "dtype": found.dtype,
            "differ": [row.name for row in found.wrong], "figures": rows}  # fmt: skip
