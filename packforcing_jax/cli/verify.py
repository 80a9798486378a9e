"""`packforcing verify`: compares the networks with files of reference numbers, one line per output."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from packforcing_jax.cli import common

if TYPE_CHECKING:
    from packforcing_jax.verify.kinds import Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `verify` takes to its parser."""
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="safetensors file with weights, inputs and outputs"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of lines"
    )


def line(row: Row) -> str:
    """`file output max-relative-error tolerance ok|FAIL`."""
    return (
        f"{row.file} {row.output} {row.error:.2e} {row.tolerance:.0e} {'ok' if row.ok else 'FAIL'}"
    )


def summary(rows: Sequence[Row]) -> str:
    """`N outputs, M failed`."""
    return f"{len(rows)} outputs, {sum(not row.ok for row in rows)} failed"


def report(rows: Sequence[Row]) -> str:
    """All rows as one JSON object; an infinite error, which JSON cannot hold, is null."""
    outputs = [
        dataclasses.asdict(row) | {"error": row.error if math.isfinite(row.error) else None}
        for row in rows
    ]
    return json.dumps(
        {"outputs": outputs, "count": len(rows), "failed": sum(not row.ok for row in rows)}
    )


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if every output of every file was computed and passed, else 1."""
    from packforcing_jax.verify import kinds

    print(
        f"verify: {len(args.files)} files on {common.device_line()}, float32 with exact matrix products, "
        "attention reference (the numbers are float32 ones)",
        file=sys.stderr,
    )
    rows: list[Row] = []
    for of_file in kinds.verify_each(args.files):
        rows += of_file
        if not args.json:
            print("\n".join(map(line, of_file)), flush=True)
    print(report(rows) if args.json else summary(rows))
    return 0 if all(row.ok for row in rows) else 1
