"""Files of prompts: one video per line, as plain text or as JSON with settings of its own, and what is finished."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from packforcing_jax.errors import InputError, MachineError, nearest, require
from packforcing_jax.sampling import timelines

FINISHED = "finished.jsonl"
LONGEST = 48  # characters of a prompt in a file name
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
            self.blocks is None or self.blocks > 0,
            f"{at}: blocks={self.blocks} is not a length; give 1 or more.",
        )
        require(
            self.seconds is None or 0 < self.seconds < float("inf"),
            f"{at}: seconds={self.seconds} is not a length; give a number above 0.",
        )
        require(
            self.seed is None or 0 <= self.seed < 2**32,
            f"{at}: seed={self.seed} is not in 0 to {2**32 - 1}.",
        )
        from packforcing_jax.config import PROFILES  # loads jax

        require(
            self.memory in (None, *PROFILES),
            f"{at}: memory={self.memory!r} is unknown; choose one of {', '.join(PROFILES)}.",
        )
        require(
            self.name is None or re.fullmatch(r"[\w][\w. -]*", self.name) is not None,
            f"{at}: name={self.name!r} is no file name; use letters, digits, spaces, dots and dashes.",
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
    """The jobs of a file: `.jsonl` holds one JSON table per line, any other file one prompt per line (`#` comments)."""
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"--prompts {path} cannot be read ({error}); give a text or JSONL file."
        ) from error
    parse = _from_json if path.suffix == ".jsonl" else _from_text
    jobs = [
        parse(line.strip(), f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip() and (path.suffix == ".jsonl" or not line.lstrip().startswith("#"))
    ]
    require(len(jobs) > 0, f"{path} holds no prompt; write one per line.")
    return jobs


def _from_text(line: str, source: str) -> Job:
    return Job(entries=(timelines.Entry(0, line),), source=source)


def _from_json(line: str, source: str) -> Job:
    try:
        table = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} is not JSON ({error}); write one table per line.") from error
    require(isinstance(table, dict), f'{source} is not a table; write it as {{"prompt": "..."}}.')
    for key, value in table.items():
        require(key in KINDS, f"{source}: {key!r} is unknown; {nearest(key, KINDS)}")
        fits = isinstance(value, KINDS[key]) and not isinstance(value, bool)
        require(fits, f"{source}: {key}={value!r} is of the wrong kind; correct it.")
    settings = {
        key: table[key] for key in ("name", "blocks", "seconds", "seed", "memory") if key in table
    }
    overrides = table.get("set", [])
    require(
        all(isinstance(each, str) for each in overrides),
        f'{source}: set={overrides!r} must be a list of "a.b=value".',
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
    require(fits, f"{source}: timeline={pairs!r} must be a list of [block, prompt].")
    return tuple(timelines.parse([f"{block}: {prompt}" for block, prompt in pairs], source))


def named(jobs: Sequence[Job]) -> list[Job]:
    """The jobs with a file name each: their own, or the first prompt's beginning; repeats get a number."""
    taken: dict[str, int] = {}
    out = []
    for job in jobs:
        stem = (
            job.name
            or re.sub(r"\W+", "-", job.entries[0][1].lower()).strip("-")[:LONGEST].strip("-")
            or "video"
        )
        taken[stem] = taken.get(stem, 0) + 1
        repeated = job.name is not None and taken[stem] > 1
        require(not repeated, f"{job.source}: name={job.name!r} was used above; choose another.")
        out.append(replace(job, name=stem if taken[stem] == 1 else f"{stem}-{taken[stem]}"))
    return out


class Ledger:
    """What a folder of videos holds complete: a line of JSON for each, written behind its last block."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder, FINISHED)
        self._done = dict(self._read()) if self.path.is_file() else {}

    def _read(self):
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                yield entry["key"], (entry["file"], entry["bytes"])
            except (ValueError, KeyError, TypeError):  # a line cut off by a kill
                continue

    def holds(self, key: str) -> bool:
        """Whether the video of `key` was finished and its file is still what it was then."""
        file, size = self._done.get(key, ("", -1))
        path = self.path.parent / file
        return size >= 0 and path.is_file() and path.stat().st_size == size

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
