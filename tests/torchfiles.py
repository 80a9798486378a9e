"""Writes what torch.save writes, without torch and without scruples, and hears what the reader says to it."""

import collections
import io
import pickle
import re
import zipfile
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from packforcing_jax.convert import pickles

from packforcing_jax.errors import InputError

KINDS = {
    np.float64: "DoubleStorage",
    np.float32: "FloatStorage",
    np.float16: "HalfStorage",
    ml_dtypes.bfloat16: "BFloat16Storage",
    np.int64: "LongStorage",
    np.int32: "IntStorage",
    np.int16: "ShortStorage",
    np.int8: "CharStorage",
    np.uint8: "ByteStorage",
    np.bool_: "BoolStorage",
}
ALIGNMENT = 64
NUMBERS = np.random.default_rng(0).integers(0, 100, 4096)


def numbers(*shape, dtype=np.float32):
    return NUMBERS[: int(np.prod(shape))].astype(dtype).reshape(shape)


def complaint(path):
    """The error of opening `path`, which must be one sentence with a remedy."""
    with pytest.raises(InputError) as caught:
        pickles.opened(path)
    message = str(caught.value)
    assert message.startswith(f"{path} ")
    said = message.removeprefix(f"{path} ")
    assert said.isprintable()
    assert said.endswith(".")
    assert ". " not in said
    assert len(said) < 350
    assert re.search(r"; .*(re-save|fetch|check the path)", said), said
    return said


@dataclass(frozen=True)
class Named:
    """Pickled as a mere name, which need not exist here."""

    module: str
    name: str

    def __call__(self):
        """Never called; pickle asks that what it reduces to could be."""


@dataclass(eq=False)
class Storage:
    """Numbers in a row; the fields after the array are what the file claims of them."""

    array: np.ndarray
    key: str | None = None
    numel: Any = None
    kind: Any = None
    location: str = "cpu"
    what: str = "storage"


@dataclass(eq=False)
class View:
    """A tensor in a storage, by any function; `more` are the function's arguments behind the stride."""

    storage: Any
    offset: Any
    shape: Any
    stride: Any
    function: str = "_rebuild_tensor_v2"
    more: tuple = field(default_factory=lambda: (False, collections.OrderedDict()))

    def __reduce_ex__(self, protocol):
        view = self.storage, self.offset, self.shape, self.stride
        return torch_name("torch._utils", self.function), (*view, *self.more)


def torch_name(module, name, known={}):  # noqa: B006  one object per name, so that a pickle names it once
    return known.setdefault((module, name), Named(module, name))


def whole(array):
    """The contiguous tensor of an array, as it is saved."""
    steps = tuple(step // array.itemsize for step in np.empty(array.shape, array.dtype).strides)
    return View(Storage(np.ascontiguousarray(array).reshape(-1)), 0, array.shape, steps)


def state_dict(tensors):
    """The ordered dictionary that `Module.state_dict()` gives, with its attribute `_metadata`."""
    given = collections.OrderedDict(tensors)
    modules = ["", *sorted({name.rpartition(".")[0] for name in given} - {""})]
    given._metadata = collections.OrderedDict((module, {"version": 1}) for module in modules)
    return given


class Pickler(pickle._Pickler):
    """Gathers storages in the order in which the pickle meets them, named by number unless they say otherwise."""

    def __init__(self, file, protocol=2):
        super().__init__(file, protocol)
        self.storages = {}
        self.arrays = {}

    def persistent_id(self, value):
        if not isinstance(value, Storage):
            return None
        key = self.storages.setdefault(
            value, str(len(self.storages)) if value.key is None else value.key
        )
        kind = (
            torch_name("torch", KINDS[value.array.dtype.type]) if value.kind is None else value.kind
        )
        return (
            value.what,
            kind,
            key,
            value.location,
            value.array.size if value.numel is None else value.numel,
        )

    def reducer_override(self, value):
        if not isinstance(value, np.ndarray):
            return NotImplemented
        return self.arrays.setdefault(id(value), whole(value)).__reduce_ex__(self.proto)

    def save_named(self, value):
        if self.proto >= 4:
            self.save(value.module)
            self.save(value.name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{value.module}\n{value.name}\n".encode())
        self.memoize(value)

    dispatch = {**pickle._Pickler.dispatch, Named: save_named}


def entries(value, *, protocol=2, name="archive"):
    """What a checkpoint of `value` consists of: names and bytes. NumPy arrays become tensors."""
    code = io.BytesIO()
    pickler = Pickler(code, protocol)
    pickler.dump(value)
    held = {
        f"{name}/data/{key}": storage.array.tobytes() for storage, key in pickler.storages.items()
    }
    return {
        f"{name}/data.pkl": code.getvalue(),
        f"{name}/byteorder": b"little",
        **held,
        f"{name}/version": b"3\n",
    }


class Stream:
    """A file that cannot be sought in, so that sizes follow the entries, as torch writes them."""

    def __init__(self, file):
        self.write = file.write
        self.flush = file.flush


def write(path, parts, compression=zipfile.ZIP_STORED):
    """A zip archive of names and bytes (a mapping, or pairs where names repeat), every entry's bytes aligned."""
    with open(path, "wb") as file, zipfile.ZipFile(Stream(file), "w", compression) as archive:
        for name, content in parts.items() if hasattr(parts, "items") else parts:
            info = zipfile.ZipInfo(name)
            info.compress_type = compression
            pad = -(archive.fp.tell() + 30 + len(name.encode()) + 4) % ALIGNMENT
            info.extra = b"FB" + pad.to_bytes(2, "little") + b"Z" * pad
            archive.writestr(info, content)
    return path


def save(path, value, *, protocol=2, name="archive"):
    """What `torch.save(value, path)` writes."""
    return write(path, entries(value, protocol=protocol, name=name))
