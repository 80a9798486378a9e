"""Checkpoints of `torch.save`, read without torch and without running anything that they name.

Such a file is a zip archive: NAME/data.pkl is a pickle in which every storage is an entry NAME/data/KEY, stored as it
is. A pickle is a program; the machine here knows the few steps that build plain values and dense tensors.
"""

import collections
import dataclasses
import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from packforcing_jax.convert import zips
from packforcing_jax.convert.zips import Refused, allow, check, printable

from packforcing_jax.errors import InputError
from packforcing_jax.io import safetensors_io

LONGEST_PICKLE = 64_000_000  # bytes
MOST_OPCODES = 2_000_000  # a tensor takes about 50
LARGEST_TREE = (
    16_000_000  # bytes of places, and PRICE per value: what shared or endless containers unfold to
)
PRICE = 64
DEEPEST = 64  # containers inside each other
HIGHEST_RANK = 16
MOST_ELEMENTS = 2**48

DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "bool": np.bool_,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
UNTYPED = (
    "UntypedStorage",
    "_UntypedStorage",
    "TypedStorage",
)  # bytes; the tensor brings its dtype along
UNREAD = {
    "_rebuild_qtensor": "a quantized tensor", "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor", "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_meta_tensor_no_storage": "a meta tensor, which holds no numbers",
}  # fmt: skip

OPCODES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
DAMAGE = (
    *zips.DAMAGE,
    EOFError,
    pickle.UnpicklingError,
)  # what a broken file makes the readers raise


def opened(path: str | Path) -> Any:
    """What torch.save wrote to `path`: dictionaries, lists, tuples, numbers, text, and lazy tensors named by place."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _Unfolding().plain(_built(zips.opened(path, file)), "", 0)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path.") from error
    except Refused as error:
        raise InputError(
            f"{path} {error}; re-save it as safetensors, or as a plain state dict."
        ) from error
    except DAMAGE as error:
        reason = printable(str(error) or "it ends too early", 200)
        raise InputError(f"{path} is damaged ({reason}); fetch it again.") from error


def _built(archive: zips.Archive) -> object:
    """What the archive's pickle builds."""
    return _Machine(archive, archive.read("data.pkl", LONGEST_PICKLE)).load()


# What the pickle may name


@dataclass(frozen=True)
class _Function:
    """Ours, in place of the one that the file names."""

    call: Callable[..., Any]
    least: int  # arguments
    most: int


@dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype | None


@dataclass(frozen=True)
class _Storage:
    """Consecutive bytes of a file, and what they are."""

    path: Path
    key: str
    start: int
    nbytes: int
    dtype: np.dtype | None

    def array(
        self, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], dtype: np.dtype
    ) -> np.ndarray:
        """A view of the memory-mapped bytes; `offset` and `stride` count elements."""
        if 0 in shape:
            return np.zeros(shape, dtype)
        nbytes = (1 + _reach(shape, stride)) * dtype.itemsize
        mapped = safetensors_io.mapped(
            self.path, ((nbytes,), np.dtype(np.uint8)), self.start + offset * dtype.itemsize
        )
        steps = [
            step * dtype.itemsize if axis > 1 else 0
            for axis, step in zip(shape, stride, strict=True)
        ]
        return np.ndarray(shape, dtype, mapped, strides=steps)


def _reach(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first one of a non-empty view to its last."""
    return sum((axis - 1) * step for axis, step in zip(shape, stride, strict=True))


def _counts(value: object, what: str) -> tuple[int, ...]:
    """The tuple of integers from zero up that `value` must be."""
    if (
        type(value) is tuple
        and len(value) <= HIGHEST_RANK
        and all(type(n) is int and n >= 0 for n in value)
    ):
        return value
    raise ValueError(f"a tensor's {what} is no short tuple of whole numbers from zero up")


def _tensor(
    storage: object,
    offset: object,
    shape: object,
    stride: object,
    *more: object,
) -> safetensors_io.Tensor:
    """A view of a storage that is sure to lie inside.

    `more` is what torch writes behind it: whether it has a gradient, hooks, metadata, and a dtype for a storage of
    bytes.
    """
    _, hooks, metadata, dtype = (*more, *(None,) * (4 - len(more)))
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor has no storage")
    kind = dtype if storage.dtype is None else storage.dtype
    if not isinstance(kind, np.dtype):
        raise ValueError(f"the tensor in storage {storage.key} has no dtype")
    allow(
        not hooks and not metadata,
        "holds a tensor with hooks, or one that is conjugated or negated",
    )
    (first,) = _counts((offset,), "offset")
    shape = _counts(shape, "shape")
    stride = _counts(stride, "stride")
    check(len(shape) == len(stride), f"a tensor has {len(shape)} axes and {len(stride)} steps")
    available = storage.nbytes // kind.itemsize
    if 0 in shape:
        check(
            math.prod(axis for axis in shape if axis) < MOST_ELEMENTS,
            "an empty tensor has an endless axis",
        )
    else:
        check(
            first + _reach(shape, stride) < available,
            f"a tensor reaches beyond its storage {storage.key}",
        )
        allow(
            math.prod(shape) <= available,
            f"has a tensor with more elements than its storage {storage.key}",
        )
    return safetensors_io.Tensor(
        "", shape, kind, lambda: storage.array(first, shape, stride, kind), str(storage.path)
    )


def _tensor_of(
    storage: object,
    offset: object,
    shape: object,
    stride: object,
    *more: object,
) -> safetensors_io.Tensor:
    """The same in torch's third form, where the dtype stands before the metadata."""
    gradient, hooks, dtype, metadata = (*more, *(None,) * (4 - len(more)))
    return _tensor(storage, offset, shape, stride, gradient, hooks, metadata, dtype)


def _parameter(
    data: object, requires_grad: object, hooks: object, state: object = None
) -> safetensors_io.Tensor:
    if not isinstance(data, safetensors_io.Tensor):
        raise ValueError("a parameter is no tensor")
    return data


def _device(kind: object, index: object = None) -> str:
    """Such as "cuda:0"."""
    check(
        type(kind) is str and type(index) in (int, type(None)), "a device is no name with a number"
    )
    return f"{kind}" if index is None else f"{kind}:{index}"


GLOBALS: dict[tuple[str, str], _Function | _StorageType | np.dtype] = {
    ("collections", "OrderedDict"): _Function(collections.OrderedDict, 0, 0),
    ("torch", "Size"): _Function(lambda axes: _counts(axes, "size"), 1, 1),
    ("torch", "device"): _Function(_device, 1, 2),
    ("torch._utils", "_rebuild_tensor"): _Function(_tensor, 4, 4),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_tensor, 6, 7),
    ("torch._utils", "_rebuild_tensor_v3"): _Function(_tensor_of, 7, 8),
    ("torch._utils", "_rebuild_parameter"): _Function(_parameter, 3, 3),
    ("torch._utils", "_rebuild_parameter_with_state"): _Function(_parameter, 4, 4),
    **{("torch", name): _StorageType(np.dtype(DTYPES[dtype])) for name, dtype in STORAGES.items()},
    **{("torch.storage", name): _StorageType(None) for name in UNTYPED},
    **{("torch", name): np.dtype(dtype) for name, dtype in DTYPES.items()},
}


# The machine


class _Machine(
    pickle._Unpickler
):  # the one in Python: its memo is a dictionary, so that no index is too large
    """Runs a pickle; all that it can name, call and do stands in `GLOBALS` and `HANDLERS`."""

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, archive: zips.Archive, code: bytes):
        super().__init__(io.BytesIO(code))
        self.archive = archive
        self.dispatch = _Handlers(HANDLERS)  # type: ignore[misc]  not the class's

    def find_class(self, module: str, name: str) -> Any:
        """Our stand-in for what the file names; nothing is imported."""
        if (module, name) in GLOBALS:
            return GLOBALS[module, name]
        known = f" ({UNREAD[name]})" if module == "torch._utils" and name in UNREAD else ""
        raise Refused(
            f"names {printable(f'{module}.{name}')}{known}, which makes no plain value or dense tensor"
        )

    def persistent_load(self, pid: object) -> _Storage:
        """The storage that a persistent id describes, once its bytes are found."""
        if type(pid) is not tuple or tuple(map(type, pid)) != (str, _StorageType, str, str, int):
            raise ValueError("a persistent id describes no storage")
        what, kind, key, location, numel = pid
        plain = what == "storage" and re.fullmatch("[0-9A-Za-z_]+", key) is not None
        check(plain, f"a storage is called {printable(key)}")
        allow(location != "meta", f"holds storage {key} on the device meta, which holds no numbers")
        start, nbytes = self.archive.span(f"data/{key}")
        claimed = numel * (1 if kind.dtype is None else kind.dtype.itemsize)
        check(claimed == nbytes, f"storage {key} should have {claimed} bytes and has {nbytes}")
        return _Storage(self.archive.path, key, start, nbytes, kind.dtype)


class _Handlers(dict):
    """What each opcode does, by its code; refuses other opcodes, and more than `MOST_OPCODES` steps."""

    left = MOST_OPCODES

    def __getitem__(self, code: int) -> Callable[[_Machine], None]:
        self.left -= 1
        allow(self.left >= 0, f"takes more than {MOST_OPCODES} steps to build")
        return super().__getitem__(code)

    def __missing__(self, code: int) -> Callable[[_Machine], None]:
        known = OPCODES.get(code)
        raise (
            Refused(f"uses the pickle opcode {known}")
            if known
            else ValueError(f"{code} is no pickle opcode")
        )


def _reduce(machine: _Machine) -> None:
    arguments = machine.stack.pop()
    function = machine.stack[-1]
    allow(type(function) is _Function and type(arguments) is tuple, "calls what is no function")
    check(
        function.least <= len(arguments) <= function.most,
        f"it calls a function with {len(arguments)} arguments",
    )
    machine.stack[-1] = function.call(*arguments)


def _build(machine: _Machine) -> None:
    """An ordered dictionary's attributes (`_metadata`) are left out."""
    machine.stack.pop()
    allow(type(machine.stack[-1]) is collections.OrderedDict, "sets the state of an object")


def _extend(target: object, items: list) -> None:
    if type(target) is not list:
        raise ValueError("it appends to what is no list")
    target.extend(items)


def _update(target: object, items: list) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError("it sets items of what is no dictionary")
    keys = items[::2]
    for key in keys:
        plain = type(key) is str or type(key) is int and abs(key) < 2**63
        allow(plain, f"has a dictionary key of type {type(key).__name__}")
    target.update(zip(keys, items[1::2]))


def _onto(
    change: Callable[[object, list], None], count: int | None = None
) -> Callable[[_Machine], None]:
    """The opcode that applies `change` to a value and the `count` ones after it, or all behind the last mark."""

    def opcode(machine: _Machine) -> None:
        items = [machine.stack.pop() for _ in range(count)][::-1] if count else machine.pop_mark()
        change(machine.stack[-1], items)

    return opcode


INHERITED = """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE
    SHORT_BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST EMPTY_DICT BINPUT LONG_BINPUT MEMOIZE BINGET
    LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID"""
OWN = {
    "REDUCE": _reduce, "BUILD": _build, "APPEND": _onto(_extend, 1), "APPENDS": _onto(_extend),
    "SETITEM": _onto(_update, 2), "SETITEMS": _onto(_update),
}  # fmt: skip
HANDLERS = {
    **{
        code: pickle._Unpickler.dispatch[code]
        for code in (getattr(pickle, name)[0] for name in INHERITED.split())
    },
    **{getattr(pickle, name)[0]: handler for name, handler in OWN.items()},
}


# The result


@dataclass
class _Unfolding:
    """Copies what the machine built into a tree, as long as it stays of a sensible size."""

    left: int = LARGEST_TREE

    def plain(self, value: object, path: str, depth: int) -> Any:
        """`value` with its tensors named by their `path`; refuses what is neither a plain value nor a tensor."""
        self.left -= PRICE + len(path.encode())
        allow(self.left >= 0 and depth <= DEEPEST, f"unfolds without end at {printable(path)}")
        inside = f"{path}." if path else ""
        if isinstance(value, safetensors_io.Tensor):
            return dataclasses.replace(value, name=path)
        if isinstance(value, dict):
            return {
                key: self.plain(part, f"{inside}{key}", depth + 1) for key, part in value.items()
            }
        if isinstance(value, list | tuple):
            return type(value)(
                self.plain(part, f"{inside}{i}", depth + 1) for i, part in enumerate(value)
            )
        known = value is None or isinstance(value, bool | int | float | str | np.dtype)
        allow(
            known, f"holds a bare {type(value).__name__.strip('_').lower()} at {printable(path)!r}"
        )
        return value
