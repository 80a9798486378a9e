"""Which model a folder holds: a hash of every byte of its weights and its tokenizer, kept so that it is made once.

Whoever writes a model folder records the size, the time and the SHA-256 of each file in its manifest. A large file
that still has that size and time is taken to be what the record says. Every other file is read, so a copy of a folder,
or one whose tensors were replaced, is known by what it holds; of a large one the user's cache keeps the hash.
"""

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from packforcing_jax.errors import InputError
from packforcing_jax.io import atomic, user_cache

PARTS = ("dit", "compressor", "codec", "text")  # of a model, each in a file of its own
MANIFEST = "manifest.json"
FILES = "files"  # the entry of a manifest that has the record
SMALL = (
    1 << 26
)  # bytes of a file that is read every time: times of files are too coarse for what is written at once
LONGEST_MANIFEST = 1 << 27  # bytes
HASH = re.compile("[0-9a-f]{64}")
CACHE = "identity"  # in the user's cache: hashes of large files without a record
LETTERS = 32  # of a model's name


class File(TypedDict):
    """A file as a manifest records it; `modified` in nanoseconds."""

    file: str
    bytes: int
    modified: int
    sha256: str


def of_folder(folder: str | Path) -> str:
    """What tells one model from another: a hash of its files of weights and of its tokenizer."""
    hashes = {path.name: of_file(path) for path in _files(Path(folder))}
    return _joined(hashes)


def of_file(path: Path) -> str:
    """The SHA-256 of a file of a model folder, from the folder's record where that is certain."""
    found = path.stat()
    kept = _recorded(path.parent).get(path.name)
    same = kept is not None and (kept["bytes"], kept["modified"]) == (
        found.st_size,
        found.st_mtime_ns,
    )
    if kept is not None and same and found.st_size > SMALL:
        return kept["sha256"]
    return _remembered(path) if found.st_size > SMALL else _sha256(path)


def _remembered(path: Path) -> str:
    """The SHA-256 of a large file, from the user's cache where that has it for this place, size and time.

    The cache is a convenience: where it cannot be read or written, the file is read again next time.
    """
    found = path.stat()
    place = f"{path.resolve()}\0{found.st_size}\0{found.st_mtime_ns}"
    name = f"{hashlib.sha256(place.encode(errors='surrogateescape')).hexdigest()[:LETTERS]}.txt"
    try:
        store = user_cache.folder(CACHE)
        kept = (store / name).read_text(encoding="ascii") if (store / name).is_file() else ""
        if not HASH.fullmatch(kept):
            kept = _hashed(path)
            atomic.write(store / name, kept.encode())
        return kept
    except (OSError, RuntimeError, UnicodeDecodeError):
        return _hashed(path)


def _hashed(path: Path) -> str:
    """The SHA-256 of a file; a large one is read once a run."""
    found = path.stat()
    large = found.st_size > SMALL
    return _read(str(path.resolve()), found.st_size, found.st_mtime_ns) if large else _sha256(path)


def record(folder: Path) -> Mapping[str, list[File] | str]:
    """The entries of a manifest that say what was written to `folder`."""
    files: list[File] = []
    for path in _files(folder):
        found = path.stat()
        sha256 = _hashed(path)
        files.append(
            {
                "file": path.name,
                "bytes": found.st_size,
                "modified": found.st_mtime_ns,
                "sha256": sha256,
            }
        )
    return {"identity": _joined({each["file"]: each["sha256"] for each in files}), FILES: files}


def of_arrays(arrays: Mapping[str, tuple[str, tuple[int, ...], bytes | memoryview]]) -> str:
    """What tells networks in memory from others: a hash of every array's (dtype, shape, bytes), by name."""
    state = hashlib.sha256()
    for name, (dtype, shape, content) in sorted(arrays.items()):
        state.update(f"{name} {dtype} {shape}\0".encode())
        state.update(content)
    return state.hexdigest()[:LETTERS]


def _files(folder: Path) -> list[Path]:
    """The files that make a model what it is, by name."""
    known = [f"{part}.safetensors" for part in PARTS] + ["tokenizer.json"]
    return sorted(path for name in known if (path := folder / name).is_file())


def _joined(hashes: Mapping[str, str]) -> str:
    lines = "".join(f"{sha256}  {name}\n" for name, sha256 in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:LETTERS]


def _recorded(folder: Path) -> Mapping[str, File]:
    """The record of a folder by file; empty where there is none, or one that contradicts itself."""
    path = folder / MANIFEST
    try:
        found = path.stat()
    except OSError:
        return {}
    return _parsed(str(path.resolve()), found.st_size, found.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _parsed(path: str, size: int, modified: int) -> Mapping[str, File]:
    """The record in a manifest of this size and time."""
    if size > LONGEST_MANIFEST or not Path(path).is_file():
        return {}
    try:
        manifest = json.loads(Path(path).read_bytes())
        files = {each["file"]: _file(each) for each in manifest[FILES]}
        whole = manifest["identity"] == _joined(
            {name: each["sha256"] for name, each in files.items()}
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return files if whole else {}


def _file(entry: Mapping[str, object]) -> File:
    """One entry of a record; raises `ValueError` unless it has the form of one."""
    file, size, modified, sha256 = (entry[key] for key in ("file", "bytes", "modified", "sha256"))
    if (
        isinstance(file, str)
        and isinstance(size, int)
        and isinstance(modified, int)
        and isinstance(sha256, str)
        and HASH.fullmatch(sha256)
    ):
        return {"file": file, "bytes": size, "modified": modified, "sha256": sha256}
    raise ValueError("no record of a file")


@functools.lru_cache(maxsize=64)
def _read(path: str, size: int, modified: int) -> str:
    """The SHA-256 of the file at `path`, as long as size and time stay."""
    return _sha256(Path(path))


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path.") from error
