"""`packforcing bench`: how long the parts of a block take, beside what the device can do, and beside a baseline."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packforcing_jax import configs
from packforcing_jax.cli import common, places, plan
from packforcing_jax.cli.places import Place
from packforcing_jax.errors import InputError, require
from packforcing_jax.io import atomic

DEFAULT = "stage"
PARTS = ("forward", "denoise", "selection", "decode", "compression", "store", "commit", "second")
BASELINE = Path(next(iter(configs.__path__))).parent / "benchmarks" / "baseline.json"
ALIKE = ("config", "set", "dtype", "device")  # what two runs must share to be compared
LEAST = 0.15
WIDE = 0.5
SPREADS = 4
ENOUGH = 4
RULE = (
    f"value: median over runs; tolerance: {SPREADS} times the interquartile range over runs, relative to the "
    f"value, at least {LEAST}, and {WIDE} with fewer than {ENOUGH} runs; bench --write FILE adds a run"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `bench`."""
    common.add_experiment_arguments(parser)
    parser.add_argument(
        "--weights",
        metavar="DIR",
        help=f"model folder (default: the config {DEFAULT} with random weights)",
    )
    parser.add_argument(
        "--repeats", type=int, default=20, metavar="N", help="rounds that count (default: 20)"
    )
    parser.add_argument(
        "--warmup", type=int, default=3, metavar="N", help="rounds before them (default: 3)"
    )
    parser.add_argument(
        "--part",
        metavar="NAME",
        action="append",
        default=[],
        dest="parts",
        help=f"only this one of {', '.join(PARTS)}; may be repeated",
    )
    after = parser.add_mutually_exclusive_group()
    after.add_argument(
        "--gate",
        metavar="FILE",
        nargs="?",
        const=str(BASELINE),
        help="compare with a baseline (default: benchmarks/baseline.json); exit code 1 if worse",
    )
    after.add_argument(
        "--write", metavar="FILE", help="add this run to a baseline, which is made if there is none"
    )


def run(args: argparse.Namespace) -> int:
    """Prints every figure; 1 if one is worse than the baseline allows."""
    _check(args)
    with places.held([Place("--write", args.write, "file")]):
        return _measured(args)


def _measured(args: argparse.Namespace) -> int:
    import jax.numpy as jnp

    from packforcing_jax.plan import bench, timing
    from packforcing_jax.policies import attention

    pipe = _model(args)
    exp = pipe.experiment
    machine = timing.machine()
    own = {
        "config": exp.name,
        "set": sorted(args.overrides),
        "dtype": exp.dtypes.compute,
        "device": machine["device"],
        "machine": machine,
    }
    before = _before(args, own)
    backend, why = attention.resolve(exp.attention, jnp.dtype(exp.dtypes.cache))
    common.start_line("bench", experiment=exp, dtype=exp.dtypes.compute, attention=backend, why=why)
    figures = bench.report(
        bench.measure(
            pipe,
            args.parts,
            warmup=args.warmup,
            repeats=args.repeats,
            show=lambda items, unit: common.progress(items, name="bench", unit=unit),
        )
    )
    figures = own | figures
    verdicts = compare(before, figures["metrics"], args.gate) if args.gate and before else []
    if args.write:
        write(args.write, merged(before, figures))
    print(
        json.dumps(figures | {"gate": [asdict(one) | {"ok": one.ok} for one in verdicts]})
        if args.json
        else "\n\n".join([table(figures), *([gate_table(verdicts)] if args.gate else [])])
    )
    return 1 if any(not one.ok for one in verdicts) else 0


def _check(args: argparse.Namespace) -> None:
    """Refuses what can be refused before anything is loaded."""
    common.require_model_folder(args.weights)
    require(
        args.config is None or args.weights is None,
        "--config and --weights exclude each other; give one.",
    )
    common.require_count("--repeats", args.repeats)
    common.require_count("--warmup", args.warmup, least=0)


def _model(args: argparse.Namespace):
    """The model that the flags name, with random weights if they name a config."""
    from packforcing_jax import methods
    from packforcing_jax.io import model_folder
    from packforcing_jax.methods.method import require_blocks
    from packforcing_jax.plan import bench
    from packforcing_jax.sampling.pipeline import Pipeline

    if args.weights is not None:
        require_blocks(methods.named(model_folder.opened(args.weights).experiment.method), "bench")
        return Pipeline.from_pretrained(args.weights, overrides=args.overrides)
    exp = common.load_experiment(args.config or DEFAULT, args.overrides)
    bench.parts_of(exp, args.parts)
    return bench.random_model(exp)


# The baseline


@dataclass(frozen=True)
class Verdict:
    """One metric beside its baseline; `worse` is by what factor, less one."""

    metric: str
    direction: str
    baseline: float
    now: float
    tolerance: float

    @property
    def worse(self) -> float:
        return (
            self.now / self.baseline if self.direction == "lower" else self.baseline / self.now
        ) - 1

    @property
    def ok(self) -> bool:
        return self.worse <= self.tolerance


def _before(args: argparse.Namespace, own: Mapping[str, Any]) -> dict[str, Any] | None:
    """The baseline to compare with or to add to; `InputError` if it is of something else than this run, `own`."""
    path = Path(args.gate or args.write or "")
    if not args.gate and not (args.write and path.exists()):
        return None
    baseline = read(path)
    for key in ALIKE:
        theirs, ours = (
            value if isinstance(value, str) else json.dumps(value)
            for value in (baseline[key], own[key])
        )
        require(
            theirs == ours,
            f"{path} is a baseline of {key} {theirs}, this run of {ours}; give another file, or "
            "--write a new one.",
        )
    theirs = baseline["machine"]
    ours = own["machine"]
    other = [
        f"{key} {theirs.get(key)}" for key in ours if key != "date" and theirs.get(key) != ours[key]
    ]
    require(
        not (args.write and other),
        f"{path} holds runs on another machine ({', '.join(other)}); name another.",
    )
    return baseline


def read(path: Path) -> dict[str, Any]:
    """The baseline in a file; `InputError` unless it has all that a baseline has."""
    require(
        path.is_file(),
        f"Baseline {path} does not exist; make it with packforcing bench --write {path}.",
    )
    try:
        baseline = json.loads(path.read_text(encoding="utf-8"))
        for name, metric in baseline["metrics"].items():
            for number in (metric["value"], metric["tolerance"], *metric["runs"]):
                require(
                    float(number) >= 0, f"Baseline {path} has {number} in {name}; write it anew."
                )
            require(
                metric["direction"] in ("lower", "higher") and metric["value"] > 0,
                f"Baseline {path} says of {name} neither what is better nor how much; write it anew.",
            )
        baseline |= {"device": baseline["machine"]["device"]} | {
            key: baseline[key] for key in ALIKE if key != "device"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"Baseline {path} cannot be read ({type(error).__name__}: {error}); write it anew."
        ) from error
    return baseline


def compare(baseline: Mapping[str, Any], metrics: Mapping[str, Any], path: str) -> list[Verdict]:
    """Every metric beside the baseline; `InputError` if one side lacks any."""
    known = baseline["metrics"]
    for where, missing in (
        ("this run", known.keys() - metrics.keys()),
        (path, metrics.keys() - known.keys()),
    ):
        require(
            not missing,
            f"{where} lacks {', '.join(sorted(missing))}; compare runs of the same parts, or --write "
            "a new baseline.",
        )
    return [
        Verdict(
            name,
            metric["direction"],
            float(metric["value"]),
            metrics[name]["value"],
            float(metric["tolerance"]),
        )
        for name, metric in known.items()
    ]


def merged(before: Mapping[str, Any] | None, figures: Mapping[str, Any]) -> dict[str, Any]:
    """A baseline of one more run."""

    def metric(name: str, now: Mapping[str, Any]) -> dict[str, Any]:
        earlier = before["metrics"][name]["runs"] if before else []
        runs = [*earlier, float(f"{now['value']:.4g}")]
        return {
            "value": statistics.median(runs),
            "direction": now["direction"],
            "tolerance": tolerance(runs),
            "runs": runs,
        }

    if before:
        compare(before, figures["metrics"], "the baseline")
    return {
        "rule": RULE,
        "machine": figures["machine"],
        **{key: figures[key] for key in ALIKE if key != "device"},
        "rounds": figures["rounds"],
        "metrics": {name: metric(name, now) for name, now in figures["metrics"].items()},
    }


def tolerance(runs: list[float]) -> float:
    """How much worse a run may be, relative to the median of `runs`."""
    if len(runs) < ENOUGH:
        return WIDE
    low, middle, high = statistics.quantiles(runs, n=4, method="inclusive")
    return max(LEAST, round(SPREADS * (high - low) / middle, 2))


def write(path: str | Path, baseline: Mapping[str, Any]) -> None:
    """The baseline as a file, complete or not at all."""
    atomic.write(path, f"{json.dumps(baseline, indent=2)}\n".encode())


# Output


def table(figures: Mapping[str, Any]) -> str:
    """All figures as aligned text."""
    machine = figures["machine"]
    ceiling = figures["ceiling"]
    where = f"{machine['device']} ({machine['processor']}, {machine['cores']} cores), jax {machine['jax']}"
    lines = [
        f"{figures['config']}, {figures['dtype']}, on {where}: medians of {figures['rounds']} rounds",
        "",
        f"{'part':<13}{'first call':>11}{'median':>13}{'quartiles':>22}{'work':>17}{'rate':>17}{'of ceiling':>12}",
    ]
    lines += [line(name, row) for name, row in figures["parts"].items()]
    rate = plan.spell(ceiling["operations_per_second"], "operations")
    lines += ["", f"ceiling: {rate}/s, a product of {ceiling['product']} in {figures['dtype']}"]
    if "frames_per_second" in figures:
        lines.append(
            f"second: {figures['frames_per_second']:.1f} frames of video a second, which plays {figures['fps']}"
        )
    return "\n".join(lines)


def line(name: str, row: Mapping[str, float]) -> str:
    """One part: bytes stand where a part has no operations."""
    unit = "operations" if "operations" in row else "bytes"
    spread = f"{1e3 * row['low']:.3f} - {1e3 * row['high']:.3f}"
    share = f"{100 * row['share']:.1f} %" if "share" in row else "-"
    rate = f"{plan.spell(row[unit + '_per_second'], unit)}/s"
    return (
        f"{name:<13}{row['first_call']:>9.2f} s{1e3 * row['median']:>10.3f} ms{spread:>22}"
        f"{plan.spell(row[unit], unit):>17}{rate:>17}{share:>12}"
    )


def gate_table(verdicts: list[Verdict]) -> str:
    """Every metric beside its baseline."""
    lines = [
        f"{'metric':<28}{'better':>8}{'baseline':>12}{'now':>12}{'worse by':>11}{'allowed':>9}  verdict"
    ]
    lines += [
        f"{one.metric:<28}{one.direction:>8}{one.baseline:>12.4g}{one.now:>12.4g}{one.worse:>+11.1%}"
        f"{one.tolerance:>9.0%}  {'ok' if one.ok else 'WORSE'}"
        for one in verdicts
    ]
    return "\n".join(
        [*lines, f"{len(verdicts)} metrics, {sum(not one.ok for one in verdicts)} worse"]
    )
