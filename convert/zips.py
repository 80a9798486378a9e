"""The zip archives that torch.save writes: where in the file the bytes of each entry lie."""

import io
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from packforcing_jax.errors import InputError, require
from packforcing_jax.io import beginnings

ZIP = b"PK\x03\x04"
NO_ZIP = "is no checkpoint of torch.save (it does not start as a zip archive); check the path or fetch it again."
LOCAL_HEADER = struct.Struct(
    "<4s2x2H16x2H"
)  # signature, flags, compression, lengths of the name and of the extras
ENCRYPTED = 0x1 | 0x40 | 0x2000
UTF8 = 0x800

DAMAGE = (
    ValueError,
    IndexError,
    OverflowError,
    NotImplementedError,
    struct.error,
    zipfile.BadZipFile,
)  # while reading


class Refused(Exception):
    """The file may be whole, but asks for more than plain values and dense tensors."""


def check(condition: bool, reason: str) -> None:
    """Raises `ValueError(reason)`, which is among `DAMAGE`, unless `condition` holds."""
    if not condition:
        raise ValueError(reason)


def allow(condition: bool, otherwise: str) -> None:
    """Raises `Refused(otherwise)`, which says what the file does, unless `condition` holds."""
    if not condition:
        raise Refused(otherwise)


def printable(text: str, most: int = 80) -> str:
    """Text of a file on one line of an error, and not too long."""
    text = text.encode("unicode_escape").decode()
    return text if len(text) <= most else f"{text[:most]}..."


@dataclass(frozen=True)
class Archive:
    """An open zip archive with its entries that lie under `prefix`."""

    path: Path
    file: BinaryIO
    prefix: str
    entries: dict[str, zipfile.ZipInfo]

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.entries

    def span(self, name: str) -> tuple[int, int]:
        """Where in the file entry `name` starts, and its bytes; both are sure to lie inside."""
        check(name in self, f"it lacks the entry {name}")
        entry = self.entries[self.prefix + name]
        check(entry.header_offset >= 0, f"entry {name} lies before it starts")
        self.file.seek(entry.header_offset)
        signature, flags, method, *lengths = LOCAL_HEADER.unpack(self.file.read(LOCAL_HEADER.size))
        check(signature == ZIP, f"entry {name} has no header")
        allow(not (flags | entry.flag_bits) & ENCRYPTED, f"encrypts {name}")
        allow(method == entry.compress_type == zipfile.ZIP_STORED, f"compresses {name}")
        local = self.file.read(lengths[0]).decode("utf-8" if entry.flag_bits & UTF8 else "cp437")
        start = entry.header_offset + LOCAL_HEADER.size + sum(lengths)
        inside = start + entry.file_size <= self.file.seek(0, io.SEEK_END)
        check(local == entry.filename and inside, f"entry {name} is not where it should be")
        return start, entry.file_size

    def read(self, name: str, most: int) -> bytes:
        """The bytes of entry `name`, if they are not more than `most`."""
        start, nbytes = self.span(name)
        allow(nbytes <= most, f"holds a {name} of {nbytes} bytes (at most {most} are read)")
        self.file.seek(start)
        return self.file.read(nbytes)


def opened(path: Path, file: BinaryIO) -> Archive:
    """The archive in an open file, which must hold every entry once, one data.pkl, and little-endian numbers."""
    if file.read(len(ZIP)) != ZIP:
        raise InputError(f"{path} {beginnings.complaint(path, 'zip') or NO_ZIP}")
    with zipfile.ZipFile(file) as whole:
        infos = whole.infolist()
    entries = {entry.filename: entry for entry in infos}
    check(len(entries) == len(infos), "it names an entry twice")
    programs = [name for name in entries if re.fullmatch(r"([^/]+/)?data\.pkl", name)]
    require(
        len(programs) == 1,
        f"{path} is a zip archive with {len(programs)} entries data.pkl where torch.save "
        "writes one; check the path or fetch it again.",
    )
    archive = Archive(path, file, programs[0].removesuffix("data.pkl"), entries)
    order = archive.read("byteorder", 16) if "byteorder" in archive else b"little"
    allow(
        order == b"little", f"holds numbers in the byte order {printable(order.decode('latin-1'))}"
    )
    return archive
