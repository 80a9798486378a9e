"""Files and folders that are there whole or not at all, whatever ends the writing: an error, Ctrl-C, a kill.

What is being written lies in a hidden folder beside its place, on the same disk. An exception removes that folder;
what a `kill -9` leaves is removed by the next writer of the same path.
"""

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

UNFINISHED = ".unfinished"  # how the names of those hidden folders end
LOCK = "lock"
NEW = "new"
OLD = "old"  # inside such a folder


def is_leftover(name: str) -> bool:
    """Whether a name is that of something half-written, such as a kill leaves."""
    return name.startswith(".") and name.endswith(UNFINISHED)


@contextlib.contextmanager
def file(path: str | Path) -> Iterator[Path]:
    """A path at which nothing is yet; the file written there takes the place of `path` when the body succeeds."""
    path = Path(path).resolve()  # behind a link: the link stays
    with _room(path) as room:
        fresh = room / path.name
        yield fresh
        move(fresh, path)


def write(path: str | Path, content: bytes) -> None:
    """Writes one file."""
    with file(path) as fresh:
        fresh.write_bytes(content)


@contextlib.contextmanager
def folder(path: str | Path) -> Iterator[Path]:
    """An empty folder that takes the place of `path` when the body succeeds; if that fails, `path` stays as it was."""
    path = Path(path).resolve()
    with _room(path) as room:
        fresh = room / NEW
        old = room / OLD
        fresh.mkdir()
        yield fresh
        sync(fresh)
        occupied = path.exists()
        if occupied:
            os.rename(path, old)
        try:
            os.rename(fresh, path)
        except BaseException:
            if occupied:
                os.rename(old, path)
            raise
        sync_entry(path)


def move(source: str | Path, target: str | Path) -> None:
    """Gives a finished file the name `target`; the disk itself has it there when this returns."""
    sync(source)
    os.replace(source, target)
    sync_entry(target)


def sync(path: str | Path) -> None:
    """Returns when the disk itself has a file, or a folder with all that is in it."""
    path = Path(path)
    for inner in path.iterdir() if path.is_dir() else ():
        sync(inner)
    _fsync(path)


def sync_entry(path: str | Path) -> None:
    """Returns when the disk itself has the name of `path` in its folder."""
    _fsync(Path(path).parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some disks cannot sync folders
            raise
    finally:
        os.close(handle)


def clear(path: str | Path) -> None:
    """Removes what a `kill -9` left beside `path`, as the next writer does; what is being written stays."""
    path = Path(path).resolve()
    for left in path.parent.glob(f".{glob.escape(path.name)}-*{UNFINISHED}"):
        _clear(left, path)


@contextlib.contextmanager
def _room(path: Path) -> Iterator[Path]:
    """A folder beside `path` for this writer alone; it vanishes with whatever is still in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clear(path)
    room, lock = _claimed(path)
    try:
        yield room
    finally:
        shutil.rmtree(room, ignore_errors=True)
        os.close(lock)


def _claimed(path: Path) -> tuple[Path, int]:
    """A new room, and the open lock by which other writers see that it is in use."""
    while True:
        room = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=UNFINISHED, dir=path.parent))
        with contextlib.suppress(FileNotFoundError):  # taken for a leftover just now: once more
            lock = os.open(room / LOCK, os.O_RDWR | os.O_CREAT)
            with contextlib.suppress(OSError):  # a disk without locks, where leftovers stay
                fcntl.flock(lock, fcntl.LOCK_EX)
            if (room / LOCK).exists():
                return room, lock
            os.close(lock)


def _clear(left: Path, path: Path) -> None:
    """Removes a room whose writer was killed; a folder on its way out of the place of `path` goes back there first."""
    try:
        lock = os.open(left / LOCK, os.O_RDWR | os.O_CREAT)
    except OSError:  # gone meanwhile, or not ours to touch
        return
    with contextlib.suppress(OSError):  # its writer is alive, or the disk has no locks
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (left / OLD).exists() and not path.exists():
            os.rename(left / OLD, path)
        shutil.rmtree(left, ignore_errors=True)
    os.close(lock)
