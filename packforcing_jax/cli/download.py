"""`packforcing download`: fetches public weights, after saying what they may be used for."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from packforcing_jax.cli import common, plan
from packforcing_jax.errors import require
from packforcing_jax.io import hub

WIDTH = 118
INDENT = "    "  # of the list


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `download`."""
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="which card; without it, all are listed"
    )
    parser.add_argument(
        "--list", action="store_true", help="list all: repository, size, licence, what for"
    )
    parser.add_argument("--out", metavar="DIR", help="folder for the files (default: weights/NAME)")
    parser.add_argument(
        "--part",
        metavar="PART",
        action="append",
        default=[],
        dest="parts",
        help="only this part: dit, codec or text; may be repeated",
    )
    parser.add_argument("--yes", action="store_true", help="accept the licence without being asked")


def run(args: argparse.Namespace) -> int:
    """Prints the table, or fetches what is missing and prints every file with its SHA-256."""
    if args.list or args.name is None:
        print(
            json.dumps({"sources": [row(*each) for each in hub.sources().items()]})
            if args.json
            else table()
        )
        return 0
    source = hub.find(args.name)
    folder = Path(args.out or Path("weights", args.name))
    listed = hub.listing(source, args.parts)
    consent(source, listed.declared, args.yes)
    total = plan.spell(sum(file.size for file in listed.files), "bytes")
    print(
        f"download: {len(listed.files)} files of {total} into {folder}", file=sys.stderr, flush=True
    )
    hub.require_room(listed.files, folder)
    received = []
    for file in listed.files:
        received.append(hub.fetch(listed, file, folder, watch=watch))
        if not args.json:
            print(line(received[-1]), flush=True)
    command = following(args.name, folder, args.parts)
    print(
        json.dumps(report(args.name, listed, received, folder) | {"next": command})
        if args.json
        else f"{len(received)} files in {folder}\nnext: {command}"
    )
    return 0


def consent(source: hub.Source, declared: str | None, yes: bool) -> None:
    """Says what the weights may be used for; returns if nobody has to accept that, or if somebody does."""
    terms = hub.terms(source, declared)
    print(f"download: {terms}", file=sys.stderr, flush=True)
    if yes or not hub.needs_consent(source, declared):
        return
    require(sys.stdin.isatty(), f"{terms}; give --yes if you accept its licence.")
    print("Do you accept that licence? [y/N] ", end="", file=sys.stderr, flush=True)
    require(
        sys.stdin.readline().strip().lower() in ("y", "yes"),
        "nothing was fetched: the licence was not accepted.",
    )


def watch(pieces: Iterable[bytes], what: str, size: int) -> Iterable[bytes]:
    """`pieces` with progress on stderr."""
    return common.progress(pieces, name=what, unit="MiB", total=math.ceil(size / hub.PIECE))


def following(name: str, folder: Path, parts: Sequence[str] = ()) -> str:
    """The command that makes a model folder out of what was fetched."""
    source = hub.sources()[name]
    files = " ".join(
        str(folder / each)
        for part in source.files
        if not parts or part.part in parts
        for each in part.names
    )
    card = f" --card {source.card}" if source.card and (not parts or "dit" in parts) else ""
    filled = source.convert.format(folder=folder, name=name, files=files)
    return f"packforcing convert {filled}{card}"


def line(received: hub.Received) -> str:
    """`SHA-256  size  name`, and whether it was there."""
    there = "" if received.fetched else ", was there"
    return f"{received.sha256}  {plan.spell(received.size, 'bytes'):>10}  {received.name}{there}"


def table() -> str:
    """All sources as text, a few lines each."""
    return "\n".join(entry(name, source) for name, source in hub.sources().items())


def entry(name: str, source: hub.Source) -> str:
    """One source: its name; where it is, how large and under which licence; what it is; what has to be known of it."""
    from packforcing_jax.config import cards

    size = "size not recorded" if source.size is None else f"about {source.size / 1e9:.1f} GB"
    unknown = "licence unsettled" if source.unsettled else "licence not recorded here"
    card = cards.find(source.card)
    lines = [
        f"{source.repository}, {size}, {source.licence or unknown}",
        f"licence unsettled: {source.unsettled}" if source.unsettled else "",
        f"{source.what} ({', '.join(source.parts)})",
        f"method {card.method}"
        + (f"; cannot be sampled block by block: {card.samples}" if card.samples else ""),
        f"not confirmed: {'; '.join(card.unconfirmed)}" if card.unconfirmed else "",
    ]
    wrapped = [
        textwrap.fill(each, WIDTH, initial_indent=INDENT, subsequent_indent=2 * INDENT)
        for each in lines
        if each
    ]
    return "\n".join([name, *wrapped])


def row(name: str, source: hub.Source) -> dict:
    """The same as data."""
    from packforcing_jax.config import cards

    card = cards.find(source.card)
    return {
        "name": name,
        "repository": source.repository,
        "what": source.what,
        "licence": source.licence,
        "unsettled": source.unsettled,
        "bytes": source.size,
        "parts": source.parts,
        "card": card.name,
        "method": card.method,
        "network": card.network,
        "samples": card.samples,
        "unconfirmed": card.unconfirmed,
    }


def report(name: str, listed: hub.Listing, received: list[hub.Received], folder: Path) -> dict:
    """What was fetched, from where and under which licence."""
    return {
        "name": name,
        "repository": listed.repository,
        "commit": listed.commit,
        "licence": hub.sources()[name].licence,
        "declared_licence": listed.declared,
        "folder": str(folder),
        "files": [dataclasses.asdict(each) for each in received],
    }
