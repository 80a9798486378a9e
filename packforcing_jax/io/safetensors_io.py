"""Tensors in files, one at a time: safetensors opened as memory maps, and written in any order, whole or by slices."""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np

from packforcing_jax.errors import InputError, require
from packforcing_jax.io import beginnings

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "U16": np.uint16,
    "U32": np.uint32,
    "U64": np.uint64,
    "BOOL": np.bool_,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
METADATA = "__metadata__"  # the entry of a header that holds texts
LONGEST_HEADER = 100_000_000  # bytes, as the format's own library allows
ALIGNMENT = 64  # bytes; the header is padded so that every memory map starts on a whole vector

Form = tuple[tuple[int, ...], np.dtype]  # shape and dtype


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file that is read when asked for; `read` gives an array that need not be in memory yet."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    origin: str  # the file it lies in

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def floating(dtype: np.dtype) -> bool:
    """Whether `dtype` holds fractions, bfloat16 included."""
    return np.issubdtype(dtype, np.floating) or np.dtype(dtype) == ml_dtypes.bfloat16


def mapped(path: Path, form: Form, offset: int) -> np.ndarray:
    """The array of `form` that lies in `path` behind `offset` bytes, as a read-only memory map."""
    shape, dtype = form
    if 0 in shape:
        return np.zeros(shape, dtype)
    flat = np.memmap(path, np.uint8, "r", offset, (math.prod(shape) * dtype.itemsize,))
    return flat.view(dtype).reshape(shape)


def opened(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name; raises `InputError` where its header cannot be true."""
    path = Path(path)
    header, start, size = _header(path)
    return {
        name: _tensor(path, name, entry, start, size)
        for name, entry in header.items()
        if name != METADATA
    }


def metadata(path: str | Path) -> dict[str, str]:
    """The texts that the header of a safetensors file holds beside its tensors; others are left out."""
    texts = _header(Path(path))[0].get(METADATA)
    return (
        {name: text for name, text in texts.items() if isinstance(text, str)}
        if isinstance(texts, dict)
        else {}
    )


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """(the header of a safetensors file, where its numbers begin, its bytes); what else it is gets its own sentence."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            fits = 8 <= length + 8 <= size and length <= LONGEST_HEADER
            other = None if fits else beginnings.complaint(path, "safetensors")
            require(other is None, f"{path} {other}")
            require(
                fits,
                f"{path} is damaged or no safetensors file "
                f"({size} bytes cannot hold a header of {length}); fetch it again.",
            )
            header = json.loads(file.read(length), object_pairs_hook=_each_once)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged or no safetensors file ({error}); fetch it again."
        ) from error
    require(
        isinstance(header, dict), f"{path} is damaged (its header is no table); fetch it again."
    )
    return header, 8 + length, size


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(name for name in names if names.count(name) > 1)} twice")
    return entries


def _tensor(path: Path, name: str, entry: object, start: int, size: int) -> Tensor:
    """The tensor that a header entry describes, if it lies inside the file and fills what it claims."""
    broken = f"{path} is damaged (tensor {name}: {entry}); fetch it again."
    fields: dict[str, Any] = dict(entry) if isinstance(entry, dict) else {}
    require(isinstance(fields.get("dtype"), str), broken)
    require(
        fields["dtype"] in DTYPES,
        f"{path}: tensor {name} is of {fields['dtype']}; convert it to one of "
        f"{', '.join(DTYPES)} first.",
    )
    shape = _counts(fields.get("shape"), broken)
    offsets = _counts(fields.get("data_offsets"), broken)
    dtype = np.dtype(DTYPES[fields["dtype"]])
    last = size - start
    require(len(offsets) == 2 and offsets[0] <= offsets[1] <= last, broken)
    require(math.prod(shape) * dtype.itemsize == offsets[1] - offsets[0], broken)
    return Tensor(
        name, shape, dtype, lambda: mapped(path, (shape, dtype), start + offsets[0]), str(path)
    )


def _counts(value: object, broken: str) -> tuple[int, ...]:
    """A list of numbers from 0 on, as a header holds them."""
    require(isinstance(value, list) and all(type(n) is int and n >= 0 for n in value), broken)
    return tuple(value)  # type: ignore[arg-type]


class Writer:
    """A safetensors file of known `forms`, filled in any order; only what is being put is in memory."""

    def __init__(self, path: str | Path, forms: Mapping[str, Form], metadata: Mapping[str, str]):
        entries: dict[str, object] = {METADATA: dict(metadata)}
        self._offsets: dict[str, tuple[int, Form]] = {}
        end = 0
        for name, (shape, dtype) in sorted(
            forms.items(), key=lambda item: -item[1][1].itemsize
        ):  # keeps alignment
            nbytes = math.prod(shape) * dtype.itemsize
            entries[name] = {
                "dtype": NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [end, end + nbytes],
            }
            self._offsets[name] = end, (tuple(shape), dtype)
            end += nbytes
        header = json.dumps(entries).encode()
        header += b" " * (-(8 + len(header)) % ALIGNMENT)
        self._start = 8 + len(header)
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115  closed by __exit__
        try:
            self._write(0, len(header).to_bytes(8, "little") + header)
            self._file.truncate(self._start + end)
        except BaseException:
            self._file.close()
            raise

    def _write(self, offset: int, content: bytes | memoryview) -> None:
        """All of `content` from `offset` on: one call may write less, as when the disk fills up."""
        left = memoryview(content)
        while left:
            done = os.pwrite(self._file.fileno(), left, offset)
            left = left[done:]
            offset = offset + done

    def put(self, name: str, value: np.ndarray, layer: int | None = None) -> None:
        """Writes tensor `name`, or the slice at index `layer` of its first axis."""
        offset, (shape, dtype) = self._offsets[name]
        wanted = shape if layer is None else shape[1:]
        if value.shape != wanted or value.dtype != dtype:
            raise ValueError(f"{name}: {value.dtype}{value.shape} does not fit {dtype}{wanted}")
        solid = np.ascontiguousarray(value)
        self._write(
            self._start + offset + (layer or 0) * solid.nbytes,
            solid.reshape(-1).view(np.uint8).data,
        )

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
