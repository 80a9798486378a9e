"""Two kinds of failure a user can meet, and the exit codes they map to (0 done, 1 check failed, 130 interrupted)."""

import difflib
from collections.abc import Iterable

LONGEST = 1000  # characters of a sentence


class InputError(Exception):
    """The request is wrong: one sentence naming the thing, the value and the remedy. Exit code 2."""

    exit_code = 2


class MachineError(Exception):
    """The machine failed (disk full, out of memory, not-a-number latents): finished work is kept. Exit code 3."""

    exit_code = 3


def require(condition: bool, sentence: str) -> None:
    """Raises `InputError(sentence)` unless `condition` holds."""
    if not condition:
        raise InputError(sentence)


def brief(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def shown(value: object, most: int = 100) -> str:
    """A value as Python writes it, in at most about `most` characters, whatever its size."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # digits beyond what Python spells, tables in tables
        return f"a {type(value).__name__} too long to print"
    return shortened(text, most)


def shortened(text: str, most: int = 200) -> str:
    """`text`, with its middle left out if it is longer than about `most` characters."""
    half = most // 2
    return text if len(text) <= most + 20 else f"{text[:half]}[...]{text[-half:]}"


def sentence(text: str) -> str:
    """`text` as one line of printable characters, with its middle left out where it is very long."""
    line = shortened(" ".join(text.split()), LONGEST)
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean X?` for the known word nearest to `word`, or all known words if none is near."""
    known = sorted(known)
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {found[0]}?" if found else f"known: {', '.join(known) or 'none'}."
