"""Safetensors files, read lazily and written in slices, against the format's own library."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from packforcing_jax.errors import InputError
from packforcing_jax.io import safetensors_io

DTYPES = [
    np.float32,
    ml_dtypes.bfloat16,
    np.float16,
    np.float64,
    np.int64,
    np.int32,
    np.uint8,
    np.bool_,
]


def values():
    rng = np.random.default_rng(3)
    shapes = [(3, 5), (7,), (), (2, 0, 3), (1, 4, 3), (11,), (5, 1), (3, 2, 2)]
    return {
        f"t{i}.x": np.asarray(rng.normal(size=shape) * 3).astype(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, DTYPES, strict=True))
    }


def written(path, given):
    with safetensors_io.Writer(
        path, {name: (value.shape, value.dtype) for name, value in given.items()}, {"a": "b"}
    ) as file:
        for name, value in reversed(given.items()):
            file.put(name, value)
    return path


def test_what_is_written_is_what_the_library_reads(tmp_path):
    path = written(tmp_path / "x.safetensors", values())
    back = safetensors.numpy.load_file(path)
    assert back.keys() == values().keys()
    for name, value in values().items():
        np.testing.assert_array_equal(back[name], value, strict=True)
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata() == {"a": "b"}


def test_what_the_library_writes_is_what_is_read(tmp_path):
    safetensors.numpy.save_file(values(), tmp_path / "x")
    found = safetensors_io.opened(tmp_path / "x")
    assert found.keys() == values().keys()
    for name, value in values().items():
        assert (found[name].shape, found[name].dtype, found[name].nbytes) == (
            value.shape,
            value.dtype,
            value.nbytes,
        )
        np.testing.assert_array_equal(found[name].read(), value, strict=True)
        assert not found[name].read().flags.writeable or value.size == 0


def test_layers_are_put_in_any_order(tmp_path):
    whole = np.random.default_rng(0).normal(size=(3, 5, 2)).astype(np.float32)
    with safetensors_io.Writer(tmp_path / "x", {"w": (whole.shape, whole.dtype)}, {}) as file:
        for layer in (2, 0, 1):
            file.put("w", whole[layer][::1], layer=layer)
    np.testing.assert_array_equal(safetensors_io.opened(tmp_path / "x")["w"].read(), whole)


def test_what_does_not_fit_its_place_is_a_mistake_of_the_caller(tmp_path):
    with safetensors_io.Writer(tmp_path / "x", {"w": ((3, 5), np.dtype(np.float32))}, {}) as file:
        for wrong in (
            np.zeros((5, 3), np.float32),
            np.zeros((3, 5), np.float16),
            np.zeros(5, np.float32),
        ):
            with pytest.raises(ValueError, match="does not fit"):
                file.put("w", wrong)
        file.put("w", np.zeros(5, np.float32), layer=1)


def header(entries, body=b"", pad=0):
    text = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    return (len(text) + pad).to_bytes(8, "little") + text + body


GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
BROKEN = {
    "empty": b"",
    "seven bytes": b"1234567",
    "header beyond the file": header({}, pad=1),
    "huge header": (2**63).to_bytes(8, "little") + b"{}",
    "not JSON": header(b"{,}"),
    "not a table": header([]),
    "not text": header(b"\xff\xfe{}"),
    "deep": header(b"[" * 50_000),
    "entry is a number": header({"w": 3}),
    "no dtype": header({"w": {"shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "unknown dtype": header({"w": GOOD | {"dtype": "F8_E4M3"}}, bytes(24)),
    "dtype is a list": header({"w": GOOD | {"dtype": ["F32"]}}, bytes(24)),
    "shape of text": header({"w": GOOD | {"shape": "23"}}, bytes(24)),
    "negative shape": header({"w": GOOD | {"shape": [-2, -3]}}, bytes(24)),
    "fractional shape": header({"w": GOOD | {"shape": [2.0, 3]}}, bytes(24)),
    "shape of true": header({"w": GOOD | {"shape": [True, 6]}}, bytes(24)),
    "product wraps around": header({"w": GOOD | {"shape": [2**33, 2**31, 6]}}, bytes(24)),
    "too few bytes": header({"w": GOOD}, bytes(23)),
    "offsets fall": header({"w": GOOD | {"data_offsets": [24, 0]}}, bytes(24)),
    "three offsets": header({"w": GOOD | {"data_offsets": [0, 24, 24]}}, bytes(24)),
    "shape and bytes differ": header({"w": GOOD | {"shape": [2, 2]}}, bytes(24)),
    "named twice": header(
        b'{"w": ' + json.dumps(GOOD).encode() + b', "w": ' + json.dumps(GOOD).encode() + b"}",
        bytes(24),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_in_one_sentence(tmp_path, name):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(BROKEN[name])
    with pytest.raises(
        InputError, match=r"weights\.safetensors.*(fetch it again|convert it to one of)"
    ) as raised:
        safetensors_io.opened(path)
    assert "\n" not in str(raised.value)


def test_missing_files_and_folders_are_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="cannot be read"):
            safetensors_io.opened(path)


@settings(max_examples=150, deadline=None)
@given(cut=st.integers(0, 900), at=st.integers(0, 700), byte=st.integers(0, 255))
def test_no_damage_makes_anything_but_a_sentence(tmp_path_factory, cut, at, byte):
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    safetensors.numpy.save_file(values(), path)
    content = bytearray(path.read_bytes())
    content[at % len(content)] = byte
    path.write_bytes(content[: len(content) - cut % len(content)])
    try:
        found = safetensors_io.opened(path)
    except InputError:
        return
    assert all(tensor.read().nbytes == tensor.nbytes for tensor in found.values())


def test_a_full_disk_is_the_callers_to_report(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        written(tmp_path / "x", values())
