"""Parts are written one tensor at a time: each is read once, and let go before the next one."""

import gc
import weakref

import convert_layouts
import numpy as np
import pytest
from packforcing_jax.convert import folders, lora, networks, rules, strength, writing

from packforcing_jax.config import loading
from packforcing_jax.io import model_folder, safetensors_io
from packforcing_jax.io.safetensors_io import Tensor

SETS = (
    "dit.dim=30",
    "dit.heads=3",
    "dit.layers=3",
    "dit.ffn_dim=44",
    "dit.text_dim=14",
    "dit.freq_dim=10",
    "dit.in_channels=4",
    "dit.out_channels=6",
    "codec.z_dim=4",
    "codec.mean=(0,0,0,0)",
    "codec.std=(1,1,1,1)",
)


@pytest.fixture(scope="module")
def exp():
    return loading.load_experiment("wan_t2v_1_3b", SETS)


class Watched(np.ndarray):
    """An array that can be watched."""


class Reads:
    """Tensors that remember how often they were read and how many of their arrays are in use."""

    def __init__(self, arrays):
        self.arrays = arrays
        self.count = dict.fromkeys(arrays, 0)
        self.most = 0
        self.given = []

    def read(self, name):
        self.count[name] += 1
        array = self.arrays[name].copy().view(Watched)
        self.given.append(weakref.ref(array))
        self.most = max(self.most, self.alive)
        return array

    @property
    def alive(self):
        return sum(each() is not None for each in self.given)

    def tensors(self):
        return {
            name: Tensor(
                name, array.shape, array.dtype, lambda name=name: self.read(name), "watched"
            )
            for name, array in self.arrays.items()
        }


def carried_out(held, exp, folder, **options):
    wrong = rules.no_mismatches()
    job = writing.job("dit", held, exp, wrong, **({"added": {}, "dtype": None} | options))
    assert not any(wrong.values())
    gc.disable()
    try:
        entries = list(writing.carry_out([job], folder, wrong))
    finally:
        gc.enable()
    return entries, wrong


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_no_two_tensors_are_in_memory_together(exp, tmp_path, dtype):
    reads = Reads(convert_layouts.dit())
    entries, wrong = carried_out(reads.tensors(), exp, tmp_path, dtype=dtype)
    assert not any(wrong.values())
    assert [entry.original for entry in entries] == list(reads.arrays)
    assert set(reads.count.values()) == {1}
    assert reads.most <= 2  # the one before is let go when the next one has been read
    assert reads.alive == 0


def test_what_is_wrong_with_values_is_noted_while_writing(exp, tmp_path):
    arrays = convert_layouts.dit()
    arrays["blocks.1.ffn.2.bias"][3] = np.nan
    entries, wrong = carried_out(Reads(arrays).tensors(), exp, tmp_path)
    assert wrong["not finite"] == ["blocks.1.ffn.2.bias"]
    assert [entry.original for entry in entries if not entry.sha256] == ["blocks.1.ffn.2.bias"]


def test_arrays_that_do_not_lie_in_order_are_written_in_order(exp, tmp_path):
    arrays = {name: np.asfortranarray(value) for name, value in convert_layouts.dit().items()}
    entries, _ = carried_out(Reads(arrays).tensors(), exp, tmp_path)
    plain = {name: np.ascontiguousarray(value) for name, value in arrays.items()}
    again, _ = carried_out(
        Reads(plain).tensors(), exp, (tmp_path / "again").mkdir() or tmp_path / "again"
    )
    assert [entry.sha256 for entry in entries] == [entry.sha256 for entry in again]
    assert (tmp_path / "dit.safetensors").read_bytes() == (
        tmp_path / "again" / "dit.safetensors"
    ).read_bytes()


def test_large_tables_are_cast_row_by_row(monkeypatch, tmp_path):
    table = convert_layouts.umt5("bfloat16")
    sizes = {"vocab": 97, "dim": 48, "dim_attn": 64, "dim_ffn": 80, "heads": 4, "layers": 3}
    exp = loading.load_experiment(
        "wan_t2v_1_3b", [f"text.{name}={size}" for name, size in sizes.items()]
    )
    puts = []
    put = safetensors_io.Writer.put
    monkeypatch.setattr(writing, "LARGE", 96 * 48 * 2)
    monkeypatch.setattr(
        safetensors_io.Writer,
        "put",
        lambda self, name, value, layer=None: (
            puts.append((name, layer, value.shape)),
            put(self, name, value, layer),
        ),
    )
    wrong = rules.no_mismatches()
    job = writing.job("text", rules.in_memory(table), exp, wrong, added={}, dtype="float32")
    list(writing.carry_out([job], tmp_path, wrong))
    assert [each for each in puts if each[0] == "embedding/embedding"] == [
        ("embedding/embedding", row, (48,)) for row in range(97)
    ]
    back = safetensors_io.opened(tmp_path / "text.safetensors")["embedding/embedding"].read()
    np.testing.assert_array_equal(back, table["token_embedding.weight"].astype(np.float32))


def test_a_sum_is_made_in_float32_and_stored_as_the_weight_was(exp):
    pairs = convert_layouts.lora("bfloat16", modules=("blocks.1.cross_attn.v",))
    held = rules.in_memory(convert_layouts.dit("bfloat16"))
    wrong = rules.no_mismatches()
    given = rules.in_memory(convert_layouts.peft(pairs, "{}.lora_{}.weight"))
    modules = lora.modules(lora.Lora("lora", given, strength.Strength()), held, wrong)
    found = lora.terms(modules, held, lambda rank: 3.0 / rank, wrong)
    assert list(found) == ["blocks.1.cross_attn.v.weight"]
    weight = held["blocks.1.cross_attn.v.weight"].read()
    down, up = pairs["blocks.1.cross_attn.v"]
    exact = weight.astype(np.float32) + np.float32(1.5) * (
        up.astype(np.float32) @ down.astype(np.float32)
    )
    made = lora.Addition(tuple(found["blocks.1.cross_attn.v.weight"])).onto(weight)
    assert made.dtype == weight.dtype
    np.testing.assert_array_equal(
        made.astype(np.float32), exact.astype(weight.dtype).astype(np.float32)
    )
    assert not any(wrong.values())


def test_the_planned_parts_are_those_of_the_networks(exp):
    assert set(networks.NETWORKS) == set(model_folder.PARTS)
    assert set(folders.KINDS) == {"dit", "vae", "text", "compressor", "lora"}
    assert networks.wanted("compressor", loading.override(exp, ["compressor.branches=lr"])) == {}
