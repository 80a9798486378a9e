"""`packforcing inspect`: shows what a traced run recalled as a table and a map, and checks what must hold."""

import argparse
import json
import sys
from pathlib import Path

from packforcing_jax.cli import common
from packforcing_jax.errors import require
from packforcing_jax.io import append_file, atomic

SHOWN = 20  # problems printed in full; --json holds all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `inspect`."""
    parser.add_argument("file", metavar="FILE", help="trace written by sample --trace")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="experiment of the run, needed where it had a score or an eviction rule of its own",
    )
    picture = parser.add_mutually_exclusive_group()
    picture.add_argument(
        "--map", metavar="PNG", help="where the map goes (default: FILE with the suffix .png)"
    )
    picture.add_argument("--no-map", action="store_true", help="write no map")


def run(args: argparse.Namespace) -> int:
    """Prints the table and what is wrong, writes the map; 1 if anything is wrong."""
    target = _target(args)
    from packforcing_jax.sampling import inspect_trace, trace

    known = common.load_experiment(args.config).cache if args.config else None
    recorded = trace.read(args.file, known)
    wrong = inspect_trace.problems(recorded)
    if target is not None:
        _write(inspect_trace.heat_map(recorded), target)
    if args.json:
        print(
            json.dumps(
                {
                    "blocks": len(recorded.blocks),
                    "problems": wrong,
                    "layers": inspect_trace.rows(recorded),
                    "map": target and str(target),
                    "note": recorded.note,
                }
            )
        )
        return 1 if wrong else 0
    print(inspect_trace.table(recorded))
    if target is not None:
        print(
            f"\nmap: {target} (row: block; column: packed block; bright: recalled by many layers)"
        )
    print(f"\n{_verdict(wrong, len(recorded.blocks))}")
    if recorded.note:
        print(f"inspect: {recorded.note}.", file=sys.stderr)
    return 1 if wrong else 0


def _target(args: argparse.Namespace) -> Path | None:
    """Where the map goes, if anywhere; refuses what can be refused before anything is read."""
    require(Path(args.file).is_file(), f"Trace {args.file} is no file; check the path.")
    if args.no_map:
        return None
    target = Path(args.map or Path(args.file).with_suffix(".png"))
    require(
        target.suffix.lower() == ".png", f"Map {target} does not end in .png; give it that suffix."
    )
    require(
        target.resolve() != Path(args.file).resolve(),
        f"Map {target} would replace the trace; give --map another name or --no-map.",
    )
    append_file.check_writable(target, "Map")
    return target


def _write(image, target: Path) -> None:
    """Writes the map; a failure leaves what was there before."""
    import imageio.v3

    atomic.write(target, imageio.v3.imwrite("<bytes>", image, extension=".png"))


def _verdict(wrong: list[str], blocks: int) -> str:
    """What was found wrong, or that all holds."""
    if not wrong:
        return (
            f"{blocks} blocks checked: positions contiguous, sink untouched, nothing twice, "
            "every choice visible and complete"
        )
    left = [f"... and {len(wrong) - SHOWN} more; --json lists all"] if len(wrong) > SHOWN else []
    return "\n".join([*wrong[:SHOWN], *left, f"{blocks} blocks checked, {len(wrong)} problems"])
