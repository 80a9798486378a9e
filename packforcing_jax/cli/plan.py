"""`packforcing plan`: what a video or training costs, counted beside the formulas, and what a video fits into."""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from packforcing_jax.cli import common
from packforcing_jax.config import DTYPES
from packforcing_jax.errors import require, shown

if TYPE_CHECKING:
    from packforcing_jax.config import Experiment
    from packforcing_jax.plan.budget import Budget, Row
    from packforcing_jax.plan.memory_fit import Verdict

DEFAULT = "wan_t2v_1_3b_paper"
CARDS = ("24GB", "141GB")
SHARE = (
    0.75  # of a GPU's memory is what jax takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
)
WIDTH = 120
TITLES = {
    "keys": "keys that a layer attends to, one video",
    "last block": "the last block",
    "bytes": "keys and values attended, all layers",
    "parameters": "parameters",
    "weights": "weights",
    "held": "held from the first block to the last",
    "snapshots": "copies of states, to go back to",
    "workspace": "workspace",
    "peak": "peak",
    "operations": "operations of one block",
    "share": "share of a block's operations",
    "training": "training, held on each device",
    "step": "operations of one step of training",
}
PREFIXES = ("", "k", "M", "G", "T", "P", "E")  # decimal: 1 GB is 10^9 bytes
SYMBOLS = {"bytes": "B", "operations": "FLOP"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `plan`."""
    common.add_experiment_arguments(parser, default=DEFAULT)
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--seconds", type=float, default=120.0, metavar="S", help="length (default: 120)"
    )
    length.add_argument("--blocks", type=int, metavar="N", help="length in blocks")
    parser.add_argument(
        "--batch", type=int, default=1, metavar="N", help="videos made together (default: 1)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="instead of every one of the experiment's own dtypes.*"
    )
    parser.add_argument(
        "--method",
        metavar="NAME",
        help="how the past is kept and shown (default: the config's own)",
    )
    parser.add_argument(
        "--memory", metavar="PROFILE", help="another memory than the config's own, such as no-mid"
    )
    parser.add_argument(
        "--device-memory",
        metavar="SIZE",
        action="append",
        dest="rooms",
        help=f"to fit into, such as 24GB or 22.5GiB; may be repeated (default: {', '.join(CARDS)})",
    )
    parser.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="also what training by the config takes on so many devices (--set train.mesh.fsdp=N)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="also ask the compiler of this machine what each program takes; minutes at full size",
    )


def run(args: argparse.Namespace) -> int:
    """Prints every figure; exit code 1 if one is not what its formula says."""
    exp = common.load_experiment(args.config)
    common.require_count("--devices", args.devices)
    training, overrides = split(args.overrides)
    require(
        args.devices is not None or not training,
        f"--set {''.join(training[:1])} is about training, which is counted with --devices N alone; give that, or "
        "leave it out.",
    )
    import jax

    if not args.compile:
        jax.config.update(
            "jax_platforms", "cpu"
        )  # shapes need no accelerator, which another program may be using
    from packforcing_jax import methods
    from packforcing_jax.methods.method import lengthened, require_blocks
    from packforcing_jax.plan import budget, memory_fit
    from packforcing_jax.sampling import pipeline

    rooms = [memory_fit.parse(size) for size in args.rooms or CARDS]
    exp = pipeline.with_overrides(exp, args.memory, overrides, args.method)
    trained = trained_rows(args, exp, training)
    require_blocks(methods.named(exp.method), "plan")
    if args.blocks is not None:
        pipeline.require_blocks(args.blocks, f"--blocks {shown(args.blocks)}")
    blocks = pipeline.blocks_of(exp, args.seconds) if args.blocks is None else args.blocks
    common.require_count("--batch", args.batch)
    exp = lengthened(methods.named(exp.method), exp, blocks)
    costs = budget.of(exp, blocks, batch=args.batch, dtype=args.dtype, compiled=args.compile)
    costs = dataclasses.replace(costs, rows=costs.rows | trained)
    known = costs.peaks if args.compile and jax.default_backend() == "gpu" else None
    verdicts = [memory_fit.judge(costs.experiment, room, args.batch, known) for room in rooms]
    print(json.dumps(report(costs, verdicts)) if args.json else table(costs, verdicts))
    return 1 if costs.wrong else 0


def split(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """The settings of training, and the others."""
    from packforcing_jax.config import loading

    training = [each for each in overrides if loading.of_training(each)]
    return training, [each for each in overrides if each not in training]


def trained_rows(
    args: argparse.Namespace, exp: Experiment, overrides: Sequence[str]
) -> dict[str, Row]:
    """The figures of training `exp` as the config says, where they are asked for."""
    if args.devices is None:
        return {}
    from packforcing_jax.config import loading
    from packforcing_jax.plan import training_budget

    stage = dataclasses.replace(loading.load_stage(args.config, overrides), experiment=exp)
    return training_budget.rows(stage, args.devices)


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
        return f"  {name:<35}{row.counted:>14,}{row.formula:>14,}  DIFFERS from {row.terms}"
    formula = "" if row.formula is None else spell(row.formula, row.unit)
    return f"  {name:<35}{spell(row.counted, row.unit):>14}{formula:>14}  {row.terms}".rstrip()


def table(costs: Budget, verdicts: Sequence[Verdict]) -> str:
    """All figures by part as aligned text, and what they fit into."""
    exp = costs.experiment
    lines = []
    for part, title in TITLES.items():
        own = [row for row in costs.rows.values() if row.name.partition("/")[0] == part]
        if not own:
            continue
        lines += ["", f"{title + of_what(part, costs):<37}{'counted':>14}{'formula':>14}"]
        lines += [line(row) for row in own]
        if part == "workspace":
            lines += compiled(costs)
    sizes = {
        "B": exp.cache.block,
        "s": exp.tokens_per_frame,
        "p": exp.tokens_per_packed_block,
        "L": exp.dit.layers,
        "d": exp.dit.dim,
        "f": getattr(exp.dit, "ffn_dim", None),
        "W": exp.dit.text_len,
        "q": exp.cache.block * exp.tokens_per_frame,
        "S": len(exp.sample.steps),
        "b": costs.batch,
    }
    checked = [row for row in costs.rows.values() if row.formula is not None]
    lines += [
        "",
        "what it fits into, on a GPU",
        *(sentence for verdict in verdicts for sentence in fit(verdict)),
    ]
    return "\n".join(
        [
            f"{exp.name}: {costs.blocks} blocks of {exp.cache.block} latent frames, {dtypes(costs)}",
            "with "
            + ", ".join(
                f"{letter} = {size:,}" for letter, size in sizes.items() if size is not None
            )
            + ", V = room",
            *lines,
            "",
            f"{len(costs.rows)} figures, {len(checked)} have a formula, {len(costs.wrong)} differ from it",
        ]
    )


def of_what(part: str, costs: Budget) -> str:
    """Where figures come from that are no plain counts."""
    from packforcing_jax.plan import memory_fit, programs

    kind = programs.FUSED if memory_fit.fused(costs.experiment, "gpu") else programs.WRITTEN
    sources = {
        "workspace": ", estimated before fusion",
        "peak": ", as compiled here" if costs.compiled else f" on a GPU, {kind}",
    }
    return sources.get(part, "")


def dtypes(costs: Budget) -> str:
    """`bfloat16`, or every use with its own."""
    each = vars(costs.experiment.dtypes)
    return (
        ", ".join(sorted(set(each.values())))
        if len(set(each.values())) == 1
        else ", ".join(f"{name} {dtype}" for name, dtype in each.items())
    )


def compiled(costs: Budget) -> Iterator[str]:
    """What the compiler said of each program, one line each."""
    rows = {
        name.partition("/")[2]: row
        for name, row in costs.rows.items()
        if name.startswith("compiled/")
    }
    if not rows:
        yield f"  {'compiled here':<35}{'not compiled':>14}{'':>14}  --compile asks this machine's compiler"
        return
    columns = list(dict.fromkeys(name.rpartition(", ")[2] for name in rows))
    yield from (
        "",
        f"{'programs, compiled here':<37}" + "".join(f"{column:>20}" for column in columns),
    )
    for program in dict.fromkeys(name.rpartition(", ")[0] for name in rows):
        cells = (rows[f"{program}, {column}"] for column in columns)
        yield f"  {program:<35}" + "".join(
            f"{spell(cell.counted, cell.unit):>20}" for cell in cells
        )


def fit(verdict: Verdict) -> Iterator[str]:
    """What there is to say of one memory."""
    from packforcing_jax.plan import memory_fit

    room = verdict.room
    then = verdict.then.on_device
    if verdict.lacks <= 0:
        yield f"  {room.name:<10}fits, {spell(-verdict.lacks, 'bytes')} are left"
    else:
        yield f"  {room.name:<10}does not fit, {spell(verdict.lacks, 'bytes')} are missing"
        most = (
            f"no setting helps enough: {spell(then, 'bytes')} at best"
            if verdict.overrides is None
            else f"needs {spell(then, 'bytes')} with {memory_fit.flags(verdict.overrides)}"
        )
        yield from textwrap.wrap(
            most, WIDTH, initial_indent=" " * 12, subsequent_indent=" " * 12, break_on_hyphens=False
        )
    if SHARE * room.device < then <= room.device:
        share = -(-100 * then // room.device) / 100
        yield f"{'':12}jax takes {SHARE:.0%} of a GPU: set XLA_PYTHON_CLIENT_MEM_FRACTION={share:.2f} or more"


def report(costs: Budget, verdicts: Sequence[Verdict]) -> dict:
    """All figures as counted, with their formulas and units, by name, and what they fit into."""
    rows = {
        name: {
            "counted": row.counted,
            "formula": row.formula,
            "unit": row.unit,
            "ok": row.ok,
            "terms": row.terms,
        }
        for name, row in costs.rows.items()
    }
    fits = [
        {
            "memory": one.room.name,
            "bytes": one.room.device,
            "needs": one.need.on_device,
            "fits": one.lacks <= 0,
            "set": None if one.overrides is None else list(one.overrides),
            "then_needs": one.then.on_device,
        }
        for one in verdicts
    ]
    return {
        "experiment": costs.experiment.name,
        "blocks": costs.blocks,
        "batch": costs.batch,
        "dtypes": vars(costs.experiment.dtypes),
        "compiled": costs.compiled,
        "differ": [row.name for row in costs.wrong],
        "figures": rows,
        "fits": fits,
    }
