"""Which prompt holds when: one prompt throughout, or a file that says from which block each one starts.

A line may also say what the new prompt does to the memory: `12 recache: a new prompt`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from packforcing_jax.config.choices import AT_PROMPT_CHANGE
from packforcing_jax.errors import InputError, require, shown
from packforcing_jax.io import lines

MOST_BLOCKS = 10**7  # of a video
MOST_SECONDS = 10**8  # three years
LINE = re.compile(r"\s*(\d{1,9})(?:\s+([a-z]+))?\s*:\s*(.+?)\s*")


class Entry(NamedTuple):
    """From which block on a prompt holds, and what it does to the memory there, if the line says so."""

    block: int
    prompt: str
    change: str = ""


def read(path: str | Path) -> list[Entry]:
    """The lines `BLOCK: prompt` or `BLOCK CHANGE: prompt` of a file, in order; `#` opens a comment line."""
    return parse(lines.read(path, f"timeline {path}", "give lines `BLOCK: prompt`"), str(path))


def parse(written: list[str], source: str) -> list[Entry]:
    """The entries of a timeline's lines; the first starts at block 0 and starts only rise."""
    entries = []
    for number, line in enumerate(written, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = LINE.fullmatch(line)
        if match is None:
            raise InputError(
                f"{source}, line {number}: {shown(line.strip())} is not `BLOCK: prompt`, as in `12: a disc`."
            )
        entries.append(Entry(int(match[1]), match[3], match[2] or ""))
        change = entries[-1].change
        require(
            not change or change in AT_PROMPT_CHANGE,
            f"{source}, line {number}: {change!r} is nothing a new prompt can do to the memory; choose one of "
            f"{', '.join(AT_PROMPT_CHANGE)}.",
        )
        require(
            not change or entries[-1].block > 0,
            f"{source}, line {number}: block 0 has no memory to {change}; write `0: {entries[-1].prompt}`.",
        )
    return checked(entries, source)


def checked(entries: list[Entry], source: str) -> list[Entry]:
    """Entries of which the first starts at block 0, and whose starts rise; `InputError` otherwise."""
    require(
        len(entries) > 0, f"{source} names no prompt; add a line such as `0: a red disc walks`."
    )
    starts = [entry.block for entry in entries]
    require(
        starts[0] == 0, f"{source} starts at block {starts[0]}; its first line must be for block 0."
    )
    require(
        all(a < b for a, b in zip(starts, starts[1:], strict=False)),
        f"{source} has starts {shown(starts)} that do not rise; sort its lines and keep one per block.",
    )
    return entries


def changes(entries: Sequence[Sequence[Any]], blocks: int) -> dict[int, str]:
    """What new prompts do to the memory, by block, where the lines say so."""
    named = [Entry(*entry) for entry in entries]
    return {entry.block: entry.change for entry in named if entry.change and entry.block < blocks}


def spread(entries: Sequence[Sequence[Any]], blocks: int) -> list[str]:
    """One prompt per block: each entry holds until the next one starts; the last until the end."""
    require(
        0 < blocks <= MOST_BLOCKS,
        f"blocks={shown(blocks)} is not a length; give 1 to {MOST_BLOCKS:,}.",
    )
    starts = [entry[0] for entry in entries if entry[0] < blocks] + [blocks]
    runs = zip(entries, starts, starts[1:], strict=False)
    return [entry[1] for entry, start, end in runs for _ in range(start, end)]
