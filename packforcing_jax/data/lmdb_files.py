"""LMDB folders, looked at before they are mapped: a file that is too short ends the process that maps it."""

import struct
from pathlib import Path

from packforcing_jax.errors import require

FILE = "data.mdb"
MAGIC = 0xBEEFC0DE
HEAD = 16  # bytes of a page before what it holds
META = struct.Struct(
    "<IIQQI44x48xQQ"
)  # magic, version, address, room, page size, two tables, last page, transaction


def require_whole(folder: Path) -> None:
    """Raises `InputError` unless the file of an LMDB folder is as long as its newest meta page says."""
    path = folder / FILE
    size = path.stat().st_size
    with path.open("rb") as file:
        first = _meta(file.read(HEAD + META.size))
        require(first is not None, f"{path} ({size} bytes) is no LMDB file; fetch it again.")
        page = first[0]  # type: ignore[index]
        file.seek(page)
        second = _meta(file.read(HEAD + META.size))
    _, last, _ = max(filter(None, (first, second)), key=lambda meta: meta[2])
    needed = (last + 1) * page
    require(
        size >= needed,
        f"{path} has {size} bytes, but {needed} belong to it; fetch it again, it was cut off.",
    )


def _meta(page: bytes) -> tuple[int, int, int] | None:
    """(page size, last page, transaction) of a meta page, None if it is none."""
    if len(page) < HEAD + META.size:
        return None
    magic, _, _, _, size, last, transaction = META.unpack_from(page, HEAD)
    return (size, last, transaction) if magic == MAGIC and size >= 256 else None
