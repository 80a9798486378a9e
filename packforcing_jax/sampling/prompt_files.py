"""Files of prompts: one video per line, as plain text or as JSON with settings of its own, and what is finished."""

import hashlib
import itertools
import json
import os
import re
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from packforcing_jax.errors import InputError, MachineError, brief, nearest, require, shown
from packforcing_jax.io import append_file, lines
from packforcing_jax.sampling import timelines

FINISHED = "finished.jsonl"
LONGEST = 48  # characters of a prompt in a file name
NAME_BYTES = 200  # of a name; file systems have room for 255 with what is put before and behind it
SUFFIXES = (".txt", ".jsonl")
REMEDY = "give a .txt with a prompt per line, or a .jsonl with a JSON table per line"
Entries = tuple[timelines.Entry, ...]


@dataclass(frozen=True)
class Job:
    """One video to make. What is None or empty is what the whole file's request says."""

    entries: Entries
    name: str | None = None
    blocks: int | None = None
    seconds: float | None = None
    seed: int | None = None
    memory: str | None = None
    overrides: tuple[str, ...] = ()
    source: str = "--prompts"

    def __post_init__(self):
        at = self.source
        require(
            self.blocks is None or self.seconds is None,
            f"{at}: blocks and seconds exclude each other; give one.",
        )
        require(
            self.blocks is None or 0 < self.blocks <= timelines.MOST_BLOCKS,
            f"{at}: blocks={shown(self.blocks)} is not a length; give 1 to {timelines.MOST_BLOCKS:,}.",
        )
        require(
            self.seconds is None or 0 < self.seconds <= timelines.MOST_SECONDS,
            f"{at}: seconds={shown(self.seconds)} is not a length; give a number above 0, "
            f"{timelines.MOST_SECONDS:,} at most.",
        )
        require(
            self.seed is None or 0 <= self.seed < 2**32,
            f"{at}: seed={shown(self.seed)} is not in 0 to {2**32 - 1}.",
        )
        from packforcing_jax.config import PROFILES  # loads jax

        require(
            self.memory in (None, *PROFILES),
            f"{at}: memory={shown(self.memory)} is unknown; choose one of {', '.join(PROFILES)}.",
        )
        require(
            self.name is None or re.fullmatch(r"[\w][\w. -]*", self.name) is not None,
            f"{at}: name={shown(self.name)} is no file name; use letters, digits, spaces, dots and dashes.",
        )
        size = len((self.name or "").encode())
        require(
            size <= NAME_BYTES,
            f"{at}: name={shown(self.name)} has {size} bytes; give a name of at most {NAME_BYTES}.",
        )


KINDS: dict[str, type | tuple] = {
    "prompt": str,
    "timeline": list,
    "name": str,
    "blocks": int,
    "seconds": (int, float),
    "seed": int,
    "memory": str,
    "set": list,
}


def read(path: str | Path) -> list[Job]:
    """The jobs of a file: `.jsonl` holds one JSON table per line, `.txt` one prompt per line (`#` comments)."""
    path = Path(path)
    suffix = path.suffix.lower()
    written = lines.read(path, f"prompt file {path}", REMEDY)
    require(
        suffix in SUFFIXES,
        f"prompt file {path} ends in {path.suffix or 'nothing'}, so it may be of any format; {REMEDY}.",
    )
    as_json = suffix == ".jsonl"
    parse = _from_json if as_json else _from_text
    jobs = [
        parse(line.strip(), f"{path}, line {number}")
        for number, line in enumerate(written, start=1)
        if line.strip() and (as_json or not line.lstrip().startswith("#"))
    ]
    require(len(jobs) > 0, f"{path} holds no prompt; write one per line.")
    return jobs


def _from_text(line: str, source: str) -> Job:
    return Job(entries=(timelines.Entry(0, line),), source=source)


def _from_json(line: str, source: str) -> Job:
    try:
        table = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{source} is not JSON ({brief(error)}); write one table per line."
        ) from error
    require(isinstance(table, dict), f'{source} is not a table; write it as {{"prompt": "..."}}.')
    for key, value in table.items():
        require(key in KINDS, f"{source}: {key!r} is unknown; {nearest(key, KINDS)}")
        fits = isinstance(value, KINDS[key]) and not isinstance(value, bool)
        require(fits, f"{source}: {key}={shown(value)} is of the wrong kind; correct it.")
    settings = {
        key: table[key] for key in ("name", "blocks", "seconds", "seed", "memory") if key in table
    }
    overrides = table.get("set", [])
    require(
        all(isinstance(each, str) for each in overrides),
        f'{source}: set={shown(overrides)} must be a list of "a.b=value".',
    )
    return Job(
        entries=_entries(table, source), overrides=tuple(overrides), source=source, **settings
    )


def _entries(table: dict[str, Any], source: str) -> Entries:
    """The prompt, or the timeline's [block, prompt] pairs."""
    require(
        ("prompt" in table) != ("timeline" in table), f"{source}: give either prompt or timeline."
    )
    if "prompt" in table:
        require(
            bool(table["prompt"].strip()),
            f"{source}: prompt is empty; say what the video should show.",
        )
        return (timelines.Entry(0, table["prompt"]),)
    pairs = table["timeline"]
    fits = all(
        isinstance(pair, list)
        and len(pair) == 2
        and type(pair[0]) is int
        and isinstance(pair[1], str)
        for pair in pairs
    )
    require(fits, f"{source}: timeline={shown(pairs)} must be a list of [block, prompt].")
    entries = [timelines.Entry(block, prompt.strip()) for block, prompt in pairs]
    require(
        all(entry.prompt for entry in entries),
        f"{source}: a prompt of timeline={shown(pairs)} is empty; say what the video should show.",
    )
    return tuple(timelines.checked(entries, source))


def named(jobs: Sequence[Job]) -> list[Job]:
    """The jobs with a file name each, no two the same: their own, or one made of the first prompt's beginning.

    Names that lines give stand; those that are made get a number where another line has them. Names that differ by
    case alone count as the same, as some file systems have it.
    """
    given: dict[str, str] = {}
    for job in jobs:
        if job.name is not None:
            above = given.setdefault(_folded(job.name), job.source)
            require(
                above is job.source,
                f"{job.source}: name={shown(job.name)} was used above ({above}); choose another.",
            )
    taken = set(given)
    out = []
    for job in jobs:
        name = job.name or _free(_stem(job.entries[0].prompt), taken)
        taken.add(_folded(name))
        out.append(replace(job, name=name))
    return out


def _folded(name: str) -> str:
    """What two names share that some file system takes for one."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _stem(prompt: str) -> str:
    """The beginning of a prompt as a file name."""
    words = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:LONGEST].strip("-")
    return words.encode()[:NAME_BYTES].decode(errors="ignore") or "video"


def _free(stem: str, taken: Collection[str]) -> str:
    """`stem`, or with the first number that makes it new."""
    names = (stem if number == 1 else f"{stem}-{number}" for number in itertools.count(1))
    return next(name for name in names if _folded(name) not in taken)


class Ledger:
    """What a folder of videos holds complete: a line of JSON for each, written behind its last block."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder, FINISHED)
        append_file.check_writable(self.path, "List of finished videos")
        self._done = dict(self._read()) if self.path.is_file() else {}

    def _read(self):
        for line in self.path.read_bytes().split(b"\n"):
            try:
                entry = json.loads(line)
                key, file, size = str(entry["key"]), entry["file"], entry["bytes"]
            except (ValueError, KeyError, TypeError, RecursionError):  # a line cut off by a kill
                continue
            if isinstance(file, str) and isinstance(size, int) and Path(file).name == file:
                yield key, (file, size)

    def holds(self, key: str) -> bool:
        """Whether the video of `key` was finished and its file is still what it was then."""
        file, size = self._done.get(key, ("", -1))
        path = self.path.parent / file
        try:
            return size >= 0 and path.is_file() and path.stat().st_size == size
        except (OSError, ValueError):  # no name that a file can have
            return False

    def add(self, key: str, file: Path) -> None:
        """Notes a finished video."""
        entry = {"key": key, "file": file.name, "bytes": file.stat().st_size}
        try:
            with self.path.open("ab") as out:
                out.write(
                    f"\n{json.dumps(entry)}\n".encode()
                )  # the line before may have been cut off
                out.flush()
                os.fsync(out.fileno())
        except OSError as error:
            raise MachineError(
                f"{self.path} cannot be written ({error.strerror}); free space. "
                "The video itself is finished."
            ) from error
        self._done[key] = entry["file"], entry["bytes"]


def key(**request: Any) -> str:
    """What tells one request from another: a hash of everything that decides the video."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:32]
