"""Prepared data on disk: a folder of numbered files of examples, read when complete, continued when not."""

import bisect
import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import grain
import numpy as np
import safetensors
import safetensors.numpy
from array_record.python import array_record_module  # type: ignore[reportAttributeAccessIssue]  compiled

from packforcing_jax.errors import InputError, MachineError, brief, require, shown
from packforcing_jax.io import append_file, atomic, safetensors_io

FORMAT = "packforcing-jax data 2"
COMPLETE = "dataset.json"
UNFINISHED = "unfinished.json"
SHARD = re.compile(r"part-\d{5}\.array_record")
OPTIONS = "group_size:1,uncompressed"  # every record can be read alone; latents hardly compress
EXAMPLES = 1000
SIZE = 2**30  # of one shard, at most: what a kill can cost
LENGTHS_DIFFER = ("prompt", "states")  # fields whose first axis is as long as the example's text
Example: TypeAlias = dict[str, np.ndarray]


@dataclass(frozen=True)
class Field:
    """Dtype by name and shape of an array that every example has; None where lengths differ."""

    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Shard:
    """A finished file of examples; raises `ValueError` for what none has."""

    file: str
    examples: int
    bytes: int

    def __post_init__(self):
        counts = (self.examples, self.bytes)
        if not isinstance(self.file, str) or SHARD.fullmatch(self.file) is None:
            raise ValueError(f"{shown(self.file)} is no name of a file of examples")
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"{self.file} has counts {shown(counts)}")


@dataclass(frozen=True)
class Notes:
    """What a data set says about itself; `taken` counts the source's items that are done or were left out."""

    kind: str
    about: Mapping[str, Any]
    fields: Mapping[str, Field] = dataclasses.field(default_factory=dict)
    shards: tuple[Shard, ...] = ()
    taken: int = 0

    @property
    def examples(self) -> int:
        return sum(shard.examples for shard in self.shards)


def to_json(notes: Notes) -> str:
    """`notes` as the text of a file."""
    return (
        json.dumps(
            {"format": FORMAT, "examples": notes.examples} | dataclasses.asdict(notes), indent=1
        )
        + "\n"
    )


def read_notes(source: Path) -> Notes:
    """The notes in a file of `to_json`."""
    try:
        table = json.loads(source.read_text(encoding="utf-8"))
        require(
            table["format"] == FORMAT,
            f"{source} is of format {table['format']!r}, not {FORMAT!r}; prepare the data again.",
        )
        fields = {
            name: Field(one["dtype"], tuple(one["shape"])) for name, one in table["fields"].items()
        }
        shards = tuple(Shard(**one) for one in table["shards"])
        return Notes(str(table["kind"]), dict(table["about"]), fields, shards, int(table["taken"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{source} is damaged ({brief(error)}); prepare the data again in another folder."
        ) from error


def packed(example: Mapping[str, np.ndarray]) -> bytes:
    """An example as the bytes of a safetensors file."""
    return safetensors.numpy.save(
        {name: np.asarray(value, order="C") for name, value in example.items()}
    )


def unpacked(record: bytes) -> Example:
    """The arrays of `packed`."""
    entries = safetensors.deserialize(record)
    return {
        name: np.frombuffer(one["data"], safetensors_io.DTYPES[one["dtype"]]).reshape(one["shape"])
        for name, one in entries
    }


def fields_of(example: Mapping[str, np.ndarray]) -> dict[str, Field]:
    """The form that all examples share with this one."""
    return {
        name: Field(
            value.dtype.name, (None, *value.shape[1:]) if name in LENGTHS_DIFFER else value.shape
        )
        for name, value in sorted(example.items())
    }


def spell(fields: Mapping[str, Field]) -> str:
    """`latent float16[20, 60, 104, 16], prompt uint8[*]`."""
    return ", ".join(
        f"{name} {one.dtype}[{', '.join('*' if n is None else str(n) for n in one.shape)}]"
        for name, one in fields.items()
    )


# Writing


@dataclass(frozen=True)
class _At:
    """How far a writer is. Replaced whole, so that an interruption finds it as it was or as it will be."""

    notes: Notes  # finished shards only
    file: Any = None  # the open shard, with what was put since the last one: items, examples among them, their bytes
    items: int = 0
    examples: int = 0
    size: int = 0


class Writer:
    """Appends examples to the data set in `folder`, or goes on where an earlier writer of the same data stopped.

    Whatever ends the block, the examples put before are kept; only a kill costs those of the shard that was open.
    `taken` says how many items of the source need not be read again. The folder can be read once the block ended well.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        kind: str,
        about: Mapping[str, Any],
        examples: int = EXAMPLES,
        size: int = SIZE,
    ):
        self.folder = Path(folder)
        self._examples = examples
        self._size = size
        append_file.check_writable(self.folder / COMPLETE, "Data set")
        self._at = _At(_continued(self.folder, Notes(kind, json.loads(json.dumps(about)))))
        self.complete = (self.folder / COMPLETE).exists()

    @property
    def notes(self) -> Notes:
        """What is finished."""
        return self._at.notes

    @property
    def taken(self) -> int:
        return self._at.notes.taken + self._at.items

    @property
    def examples(self) -> int:
        return self._at.notes.examples + self._at.examples

    def __enter__(self) -> "Writer":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.folder)
        if not self.complete:
            self._note(self.notes)
            finished = {shard.file for shard in self.notes.shards}
            for path in self.folder.iterdir():
                if SHARD.fullmatch(path.name) and path.name not in finished:
                    path.unlink()
        return self

    def put(self, example: Mapping[str, np.ndarray] | None) -> None:
        """Appends what the source's next item became; None if it was left out."""
        if example is None:
            self._at = dataclasses.replace(self._at, items=self._at.items + 1)
            return
        self._check(example)
        record = packed(example)
        self._append(record)
        at = self._at
        self._at = dataclasses.replace(
            at, items=at.items + 1, examples=at.examples + 1, size=at.size + len(record)
        )
        if self._at.examples >= self._examples or self._at.size >= self._size:
            self._finish_shard()

    def _check(self, example: Mapping[str, np.ndarray]) -> None:
        fields = fields_of(example)
        known = self.notes.fields
        if not known:
            self._at = dataclasses.replace(
                self._at, notes=dataclasses.replace(self.notes, fields=fields)
            )
        require(
            not known or fields == known,
            f"item {self.taken + 1} gives {spell(fields)}, but those before it "
            f"{spell(known)}; prepare them apart.",
        )

    @property
    def _path(self) -> Path:
        return self.folder / f"part-{len(self.notes.shards):05d}.array_record"

    def _append(self, record: bytes) -> None:
        with self._disk():
            if self._at.file is None:
                writer = array_record_module.ArrayRecordWriter(str(self._path), OPTIONS)
                self._at = dataclasses.replace(self._at, file=writer)
            self._at.file.write(record)

    def _finish_shard(self) -> None:
        """Closes the open shard and notes what it holds: one more than was counted, if an interruption fell between."""
        at = self._at
        with self._disk():
            if at.file.is_open():
                at.file.close()
            atomic.sync(self._path)
            shard = Shard(self._path.name, _count(self._path), self._path.stat().st_size)
        taken = at.notes.taken + at.items + shard.examples - at.examples
        self._note(dataclasses.replace(at.notes, shards=(*at.notes.shards, shard), taken=taken))

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        """While inside, a failure to write lets go of the open shard and is a `MachineError`."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            self._at = _At(self.notes)
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
            raise MachineError(
                f"Writing {self._path} failed ({brief(error)}); {self.notes.examples} examples in other "
                "files are kept: free space and run the same command again."
            ) from error

    def _note(self, notes: Notes) -> None:
        """Writes down what is finished, whole or not at all."""
        with self._disk():
            atomic.write(self.folder / UNFINISHED, to_json(notes).encode())
        self._at = _At(notes)

    def _keep(self) -> None:
        """Finishes what is open."""
        if self._at.examples or self._at.file is not None:
            self._finish_shard()
        self._note(dataclasses.replace(self.notes, taken=self.taken))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if not self.complete:
                self._keep()
                if kind is None:
                    atomic.move(self.folder / UNFINISHED, self.folder / COMPLETE)
                    self.complete = True
                elif (
                    isinstance(error, InputError) and not self.notes.examples
                ):  # nothing to go on from
                    (self.folder / UNFINISHED).unlink()
                    with contextlib.suppress(OSError):
                        self.folder.rmdir()
        finally:
            os.close(self._lock)


def _continued(folder: Path, wanted: Notes) -> Notes:
    """What `folder` already holds of the data set that is `wanted`."""
    for path in (folder / COMPLETE, folder / UNFINISHED):
        if path.exists():
            existing = read_notes(path)
            differs = _differences(existing, wanted)
            require(
                not (differs and existing.shards),
                f"{folder} holds data made otherwise ({'; '.join(differs[:2])}); "
                "choose another folder, or delete that one.",
            )
            return existing if existing.shards else wanted
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    strangers = {name for name in names if not atomic.is_leftover(name)}
    require(
        not strangers,
        f"{folder} holds other files ({', '.join(sorted(strangers)[:3])}); choose another folder.",
    )
    return wanted


def _differences(existing: Notes, wanted: Notes) -> list[str]:
    """In what two data sets differ."""
    old, new = ({"kind": notes.kind, **notes.about} for notes in (existing, wanted))
    return [
        f"{name}={old.get(name)}, not {new.get(name)}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    ]


def _locked(folder: Path) -> int:
    """An open handle of `folder` that no other writer has."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise InputError(
            f"{folder} is being written by another process; wait for it or choose another."
        ) from error
    except OSError:  # a file system without locks
        pass
    return handle


# Reading


class Records:
    """The examples of a complete data set, in any order."""

    def __init__(self, folder: Path, notes: Notes):
        self.folder = folder
        self.notes = notes
        self.starts = [0, *itertools.accumulate(shard.examples for shard in notes.shards)]
        self._source = grain.sources.ArrayRecordDataSource(
            [f"{folder / shard.file}[0:{shard.examples}]" for shard in notes.shards]
        )

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            example = unpacked(self._source[index])
        except (RuntimeError, ValueError, KeyError, safetensors.SafetensorError) as error:
            raise InputError(
                f"{self._where(index)} is damaged ({brief(error)}); prepare the data again."
            ) from error
        fields = fields_of(example)
        require(
            fields == self.notes.fields,
            f"{self._where(index)} holds {spell(fields)}, but {COMPLETE} says "
            f"{spell(self.notes.fields)}; prepare the data again.",
        )
        return example

    def _where(self, index: int) -> str:
        shard = bisect.bisect_right(self.starts, index) - 1
        return (
            f"{self.folder / self.notes.shards[shard].file}, record {index - self.starts[shard]},"
        )


def opened(folder: str | Path) -> Records:
    """The data set in `folder`, once every file is there and whole and its first record can be read."""
    folder = Path(folder)
    if (folder / UNFINISHED).exists():
        raise InputError(
            f"{folder} is unfinished; run the `prepare` command that began it once more."
        )
    require(
        (folder / COMPLETE).is_file(),
        f"{folder} is no prepared data set (it has no {COMPLETE}); "
        "give the folder that `packforcing prepare --out` wrote.",
    )
    notes = read_notes(folder / COMPLETE)
    require(notes.examples > 0, f"{folder} holds no example; prepare the data again.")
    for shard in notes.shards:
        _check_shard(folder / shard.file, shard)
    records = Records(folder, notes)
    for start in sorted({*records.starts} - {len(records)}):
        records[start]
    return records


def _check_shard(path: Path, shard: Shard) -> None:
    require(path.is_file(), f"{path} is missing; put it back or prepare the data again.")
    size = path.stat().st_size
    require(
        size == shard.bytes,
        f"{path} has {size} bytes instead of {shard.bytes}; copy it again or prepare the "
        "data again.",
    )
    try:
        count = _count(path)
    except RuntimeError as error:
        raise InputError(
            f"{path} is damaged ({brief(error)}); copy it again or prepare the data again."
        ) from error
    require(
        count == shard.examples,
        f"{path} holds {count} examples instead of {shard.examples}; copy it again or "
        "prepare the data again.",
    )


def _count(path: Path) -> int:
    """Records in a file; raises `RuntimeError` where it is none."""
    reader = array_record_module.ArrayRecordReader(str(path))
    count = reader.num_records()
    reader.close()  # this is what tells of a damaged file
    return count
