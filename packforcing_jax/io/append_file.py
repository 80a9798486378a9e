"""A file that only grows: replaced by its first piece and not before, pieces whole or absent, cut back to go on."""

import contextlib
import os
import tempfile
from pathlib import Path

from packforcing_jax.errors import InputError, require
from packforcing_jax.io import locks


def check_writable(path, what: str) -> None:
    """Raises `InputError` about `what` unless a file can be written at `path`; leaves nothing behind."""
    path = Path(path)
    locks.check_name(path, what)
    require(not path.is_dir(), f"{what} {path} is a folder; name a file inside it.")
    require(
        not path.exists() or path.is_file(),
        f"{what} {path} is a pipe or a device, which cannot be gone back in; name a file.",
    )
    _check_takes_files(path.absolute().parent, f"{what} {path}", path if path.exists() else None)


def check_folder(path, what: str) -> None:
    """Raises `InputError` about `what` unless files can be written into the folder `path`; leaves nothing behind."""
    path = Path(path)
    locks.check_name(path, what)
    require(
        not path.exists() or path.is_dir(),
        f"{what} {path} is no folder; choose another place.",
    )
    require(
        path.resolve().name != "",
        f"{what} {path} is the root of all folders; choose one inside it.",
    )
    _check_takes_files(path.absolute(), f"{what} {path}")


def _check_takes_files(folder: Path, said: str, file: Path | None = None) -> None:
    """Raises `InputError` about what `said` names unless `folder` can be made and written, and `file` is writable."""
    folder = next(each for each in (folder, *folder.parents) if each.exists())
    require(folder.is_dir(), f"{said} lies below {folder}, which is a file; choose another folder.")
    try:
        if file is not None:
            file.open("ab").close()
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"{said} is not writable ({error.strerror}); choose another folder."
        ) from error


class File:
    """The file at `path`, cut back to the `size` bytes that an earlier run had written; errors are `OSError`."""

    def __init__(self, path: Path, size: int = 0):
        self.path = path
        self.size = size
        self.handle = None
        if size > 0:
            self.handle = self._opened()

    def append(self, piece: bytes, cover: bytes = b"") -> None:
        """Adds `piece`, which is in the file when this returns; a failure leaves the file as it was.

        `cover` stands in place of the first bytes until all others are in the file.
        """
        if self.handle is None:
            self.handle = self._opened()
        try:
            view = memoryview(cover + piece[len(cover) :])
            while view:
                view = view[self.handle.write(view) :]
            if cover:
                os.pwrite(self.handle.fileno(), piece[: len(cover)], self.size)
        except BaseException:
            with contextlib.suppress(OSError):
                self.handle.truncate(self.size)
                self.handle.seek(self.size)
            raise
        self.size += len(piece)

    def _opened(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = self.path.open("r+b" if self.size else "wb", buffering=0)
        handle.truncate(self.size)
        handle.seek(self.size)
        return handle

    def sync(self) -> None:
        """Returns when the disk itself has what was written, so that a crash of the machine leaves it there."""
        if self.handle is not None:
            os.fsync(self.handle.fileno())

    def close(self) -> None:
        """Ends the file; without a single piece written there is none."""
        if self.handle is not None:
            with contextlib.suppress(OSError):
                self.sync()
            self.handle.close()
            self.handle = None
            if self.size == 0:
                self.path.unlink(missing_ok=True)
