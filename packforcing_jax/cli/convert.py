"""`packforcing convert`: public checkpoints to a model folder, and a model folder back to one file for torch."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from packforcing_jax.cli import common
from packforcing_jax.config import DTYPES
from packforcing_jax.errors import require

if TYPE_CHECKING:
    from packforcing_jax.convert.manifest import Row

NETWORKS = ("dit", "vae", "text", "compressor", "lora")
PARTS = ("dit", "compressor", "codec", "text")
TITLES = ("part", "tensors", "ignored", "parameters", "dtype", "bytes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `convert`."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SRC",
        help="checkpoint file or folder: Wan2.1, diffusers, Self-Forcing and its family, a LoRA, or "
        "one of our model folders, whose parts come along",
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", metavar="DIR", help="model folder to write")
    target.add_argument(
        "--to-torch", metavar="FILE", help="write the model folder SRC to this safetensors file"
    )
    parser.add_argument("--part", choices=PARTS, help="with --to-torch, only this part")
    parser.add_argument(
        "--card",
        metavar="NAME",
        help="which published checkpoint it is: its settings, and which network of its file (default: as the file's "
        "name says; `packforcing download --list` shows all)",
    )
    parser.add_argument(
        "--network",
        metavar="NAME",
        help="which network of a trainer's file (default: the card's; without a card the only generator there)",
    )
    parser.add_argument(
        "--prefix",
        metavar="P",
        help="take only tensors whose names begin with P, and take P away (default: known prefixes are found)",
    )
    parser.add_argument(
        "--kind", choices=NETWORKS, help="what the files hold, where names do not tell"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="store every part so (default: as in the file)"
    )
    parser.add_argument(
        "--lora-alpha",
        type=float,
        metavar="A",
        help="strength of a LoRA that does not say it (default: its rank)",
    )
    parser.add_argument("--tokenizer", metavar="FILE", help="the text encoder's tokenizer.json")
    common.add_experiment_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Prints a line for each part and the place of the result; assumptions go to stderr."""
    import jax

    jax.config.update(
        "jax_platforms", "cpu"
    )  # shapes need no accelerator, which another program may be using
    require(
        args.part is None or args.to_torch is not None, "--part goes with --to-torch; leave it out."
    )
    return _to_torch(args) if args.to_torch else _to_folder(args)


def _to_folder(args: argparse.Namespace) -> int:
    from packforcing_jax.convert import folders

    done = folders.convert(
        folders.Request(
            sources=tuple(map(Path, args.sources)),
            out=Path(args.out),
            card=args.card,
            config=args.config,
            overrides=tuple(args.overrides),
            network=args.network,
            prefix=args.prefix,
            kind=args.kind,
            dtype=args.dtype,
            lora_alpha=args.lora_alpha,
            tokenizer=Path(args.tokenizer) if args.tokenizer else None,
        ),
        watch,
    )
    for note in done.notes:
        print(f"convert: {note}", file=sys.stderr)
    return _tell(args, done.rows, args.out, done.notes)


def _to_torch(args: argparse.Namespace) -> int:
    from packforcing_jax.convert import exporting, manifest

    require(len(args.sources) == 1, "--to-torch takes one model folder; give one SRC.")
    parts = exporting.to_torch(Path(args.sources[0]), Path(args.to_torch), args.part, watch)
    rows = [
        manifest.row(
            part, [(each.shape, each.dtype) for each in tensors.values()], tensors=len(tensors)
        )
        for part, tensors in parts.items()
    ]
    return _tell(args, rows, args.to_torch, ())


def watch(steps: Iterable, count: int) -> Iterable:
    """`steps` with progress on stderr."""
    return common.progress(steps, name="convert", unit="tensors", total=count)


def _tell(args: argparse.Namespace, rows: Sequence[Row], target: str, notes: Sequence[str]) -> int:
    """Prints the result; exit code 0."""
    if args.json:
        print(
            json.dumps(
                {
                    "out": target,
                    "parts": [dataclasses.asdict(row) for row in rows],
                    "notes": list(notes),
                }
            )
        )
    else:
        print(f"{table(rows)}\n{target}")
    return 0


def table(rows: Sequence[Row]) -> str:
    """One aligned line for each part."""
    cells = [
        TITLES,
        *(
            (
                row.part,
                f"{row.tensors:,}",
                f"{row.ignored:,}",
                f"{row.parameters:,}",
                row.dtype,
                f"{row.bytes:,}",
            )
            for row in rows
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at in (0, 4) else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )
