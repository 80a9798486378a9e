"""Where a verb will write: looked at before anything is loaded, then held against other processes."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from packforcing_jax.errors import require
from packforcing_jax.io import append_file, ffmpeg, locks


class Place(NamedTuple):
    """A flag, the path it names (None: it was not given), and what will lie there."""

    flag: str
    path: str | Path | None
    kind: str


def _file(flag: str, path: Path) -> None:
    append_file.check_writable(path, flag)


def _suffixed(suffix: str) -> Callable[[str, Path], None]:
    def check(flag: str, path: Path) -> None:
        require(
            path.suffix.lower() == suffix,
            f"{flag} {path} does not end in {suffix}; give it that suffix.",
        )
        _file(flag, path)

    return check


def _folder(flag: str, path: Path) -> None:
    append_file.check_folder(path, flag)


KINDS: Mapping[str, Callable[[str, Path], None]] = {
    "video": _suffixed(".mp4"),
    "picture": _suffixed(".png"),
    "videos": _folder,
    "file": _file,
    "folder": _folder,
}
ENCODED = ("video", "videos")  # what ffmpeg makes


@contextlib.contextmanager
def held(places: Sequence[Place]) -> Iterator[None]:
    """While inside, the places are this process's own; what cannot be written is refused at once and left as it was."""
    given = [place for place in places if place.path is not None]
    for flag, path, kind in given:
        KINDS[kind](flag, Path(path))  # type: ignore[arg-type]
    if any(place.kind in ENCODED for place in given):
        ffmpeg.require_encoder()
    with locks.held((place.flag, place.path) for place in given):
        yield
