"""Video files to measure: which ones, by which names, with which prompts."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from packforcing_jax.errors import InputError, brief, nearest, require, shown
from packforcing_jax.io import lines

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
KEYS = ("file", "prompt", "extended")
RULES = ("short", "extended")
REMEDY = 'give a .jsonl with a table per line: {"file": "a.mp4", "prompt": "..."}'


class VideoFile(NamedTuple):
    """A video by its name in the results and its path."""

    name: str
    path: Path


class Prompt(NamedTuple):
    """What a video was made from: the prompt, and its longer form where there is one."""

    prompt: str
    extended: str | None = None

    def text(self, rule: str) -> str | None:
        """The prompt that counts under a rule."""
        return {"short": self.prompt, "extended": self.extended}[rule]


def find(places: Sequence[str | Path]) -> list[VideoFile]:
    """The video files among `places` and in the folders among them, in the order of their names, each once.

    A name is the path from the deepest folder that holds all places. Hidden files and folders are passed over. Raises
    `InputError` for a place that does not exist or is neither file nor folder, and for a folder without videos.
    """
    found: dict[Path, Path] = {}
    roots = []
    for place in map(Path, places):
        require(place.exists(), f"{place} does not exist; check the path.")
        require(
            place.is_file() or place.is_dir(), f"{place} is neither a file nor a folder; give one."
        )
        absolute = Path(os.path.abspath(place))
        roots.append(absolute if place.is_dir() else absolute.parent)
        inside = _inside(absolute) if place.is_dir() else [absolute]
        require(
            len(inside) > 0,
            f"{place} holds no video ({', '.join(SUFFIXES)}); check the folder.",
        )
        for path in inside:
            found.setdefault(path.resolve(), path)
    root = os.path.commonpath(roots)
    return sorted(VideoFile(path.relative_to(root).as_posix(), path) for path in found.values())


def _inside(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def sha256(path: Path) -> str:
    """The hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_prompts(path: str | Path, videos: Sequence[VideoFile]) -> dict[str, Prompt]:
    """The prompts of `videos` by name, from a file with one JSON table a line.

    Raises `InputError` for a line that is no such table, names a file that is not among the videos, or one twice.
    """
    prompts: dict[str, Prompt] = {}
    for number, line in enumerate(lines.read(path, f"prompt file {path}", REMEDY), start=1):
        if line.strip():
            at = f"{path}, line {number}"
            table = _table(line, at)
            name = _match(table["file"], videos, at)
            require(name not in prompts, f"{at}: {name} has a prompt above; give one for each.")
            prompts[name] = Prompt(table["prompt"], table.get("extended"))
    require(len(prompts) > 0, f"{path} holds no prompt; {REMEDY}.")
    return prompts


def _table(line: str, at: str) -> dict[str, str]:
    """One line, whose entries are known and are text that is not empty."""
    try:
        table = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{at} is not JSON ({brief(error)}); {REMEDY}.") from error
    require(isinstance(table, dict), f"{at} is not a table; {REMEDY}.")
    for key, value in table.items():
        require(key in KEYS, f"{at}: {key!r} is unknown; {nearest(key, KEYS)}")
        require(
            isinstance(value, str) and bool(value.strip()),
            f"{at}: {key}={shown(value)} is not a text; {REMEDY}.",
        )
    missing = [key for key in KEYS[:2] if key not in table]
    require(not missing, f"{at} lacks {' and '.join(missing)}; {REMEDY}.")
    return table


def _match(file: str, videos: Sequence[VideoFile], at: str) -> str:
    """The name of the one video that `file` means: its name, or how the name ends."""
    names = [video.name for video in videos]
    close = [name for name in names if name == file] or [
        name for name in names if name.endswith(f"/{file}")
    ]
    require(
        len(close) > 0, f"{at}: file={shown(file)} is not among the videos; {nearest(file, names)}"
    )
    require(
        len(close) == 1,
        f"{at}: file={shown(file)} may be {' or '.join(close[:2])}; give the whole name.",
    )
    return close[0]
