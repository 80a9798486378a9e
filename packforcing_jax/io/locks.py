"""One process at a time for each place that is written: locks that end with the process that holds them, kill or not.

A lock is a hidden, empty file beside the place. What a kill leaves of it is taken over by the next process.
"""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from packforcing_jax.errors import InputError, require

SUFFIX = ".lock"
LONGEST = 255  # bytes of a name, on the file systems in use
BESIDE = len(".-12345678.unfinished")  # what is written beside a file on its way has a longer name


def beside(path: str | Path) -> Path:
    """Where the lock of a file or folder lies."""
    path = Path(path).resolve()
    return path.with_name(f".{path.name}{SUFFIX}")


def check_name(path: str | Path, what: str) -> None:
    """Raises `InputError` about `what` if the name of a file or folder is longer than file systems take."""
    for part in Path(path).parts:
        size = len(os.fsencode(part)) + BESIDE
        require(
            size <= LONGEST,
            f"{what} has a name of {size - BESIDE} bytes ({part[:30]}...); give one of at most {LONGEST - BESIDE}.",
        )


@contextlib.contextmanager
def held(places: Iterable[tuple[str, str | Path | None]]) -> Iterator[None]:
    """While inside, no other process writes to the (what, path) `places`; the second one is refused."""
    with contextlib.ExitStack() as locks:
        wanted = {beside(path): f"{what} {path}" for what, path in places if path is not None}
        for lock, said in wanted.items():
            locks.enter_context(_held(lock, said))
        yield


@contextlib.contextmanager
def _held(lock: Path, said: str) -> Iterator[None]:
    made = [parent for parent in lock.parents if not parent.exists()]
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        handle = _locked(lock, said)
    except OSError as error:
        raise InputError(
            f"{said} is not writable ({error.strerror}); choose another folder."
        ) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()
        os.close(handle)
        for folder in made:  # those in which nothing was written go again
            with contextlib.suppress(OSError):
                folder.rmdir()


def _locked(lock: Path, said: str) -> int:
    """The open lock, once it is ours and still in its place."""
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                os.close(handle)
                raise InputError(
                    f"{said} is being written by another process; wait for it or choose another place."
                ) from error
            return handle  # a file system without locks
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), lock.stat()):
                return handle
        os.close(handle)  # the one before us has just ended and taken its lock away: once more
