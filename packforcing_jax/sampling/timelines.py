"""Which prompt holds when: one prompt throughout, or a file that says from which block each one starts."""

import re
from pathlib import Path

from packforcing_jax.errors import InputError, require

LINE = re.compile(r"\s*(\d+)\s*:\s*(.+?)\s*")


def read(path: str | Path) -> list[tuple[int, str]]:
    """(first block, prompt) of each line `BLOCK: prompt` of a file, in order; `#` opens a comment line."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"timeline {path} cannot be read ({error}); give lines `BLOCK: prompt`."
        ) from error
    return parse(lines, str(path))


def parse(lines: list[str], source: str) -> list[tuple[int, str]]:
    """The entries of a timeline's lines; the first starts at block 0 and starts only rise."""
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = LINE.fullmatch(line)
        if found is None:
            raise InputError(
                f"{source}, line {number}: {line.strip()!r} is not `BLOCK: prompt`, as in `12: a disc`."
            )
        entries.append((int(found[1]), found[2]))
    require(
        len(entries) > 0, f"{source} names no prompt; add a line such as `0: a red disc walks`."
    )
    starts = [start for start, _ in entries]
    require(
        starts[0] == 0, f"{source} starts at block {starts[0]}; its first line must be for block 0."
    )
    require(
        all(a < b for a, b in zip(starts, starts[1:], strict=False)),
        f"{source} has starts {starts} that do not rise; sort its lines and keep one per block.",
    )
    return entries


def spread(entries: list[tuple[int, str]], blocks: int) -> list[str]:
    """One prompt per block: each entry holds until the next one starts; the last until the end."""
    require(blocks > 0, f"blocks={blocks} is not a length; give 1 or more.")
    starts = [start for start, _ in entries if start < blocks] + [blocks]
    runs = zip(entries, starts, starts[1:], strict=False)
    return [prompt for (_, prompt), start, end in runs for _ in range(start, end)]
