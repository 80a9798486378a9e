"""Checkpoints open bit for bit without torch; whatever is hostile or broken is refused in one sentence, and not run."""

import collections
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torchfiles
from packforcing_jax.convert import pickles
from torchfiles import Storage, View, complaint, numbers, torch_name

from packforcing_jax.errors import InputError
from packforcing_jax.io import safetensors_io

DTYPES = [np.dtype(dtype) for dtype in torchfiles.KINDS]


def checkpoint():
    """As Self-Forcing's: networks and optimiser beside plain values."""
    weights = {
        "blocks.0.q.weight": numbers(5, 3),
        "blocks.0.q.bias": numbers(5),
        "scale": numbers(),
    }
    return {
        "generator": torchfiles.state_dict(weights),
        "critic": torchfiles.state_dict({"norm.weight": numbers(7, dtype=ml_dtypes.bfloat16)}),
        "optimizer": {
            "state": {0: {"step": numbers(dtype=np.int64)}},
            "betas": (0.0, 0.999),
            "params": [0, 1],
        },
        "step": 3,
        "lr": 2e-6,
        "large": 2**40,
        "ema": None,
        "resumed": True,
        "name": "Größe",
    }


def leaves(value):
    """Every tensor in what was opened."""
    if isinstance(value, safetensors_io.Tensor):
        return [value]
    parts = (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, list | tuple)
        else ()
    )
    return [leaf for part in parts for leaf in leaves(part)]


# What opens


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_training_checkpoint_opens_bit_for_bit(tmp_path, protocol):
    written = checkpoint()
    got = pickles.opened(torchfiles.save(tmp_path / "model.pt", written, protocol=protocol))
    assert list(got) == list(written)
    assert {key: got[key] for key in list(got)[3:]} == {
        key: written[key] for key in list(written)[3:]
    }
    assert got["optimizer"]["betas"] == (0.0, 0.999)
    assert got["optimizer"]["params"] == [0, 1]
    for part in ("generator", "critic"):
        assert list(got[part]) == list(written[part])
        for name, array in written[part].items():
            tensor = got[part][name]
            assert (tensor.name, tensor.origin) == (f"{part}.{name}", str(tmp_path / "model.pt"))
            assert (tensor.shape, tensor.dtype) == (array.shape, array.dtype)
            assert tensor.read().tobytes() == array.tobytes()
    assert got["optimizer"]["state"][0]["step"].name == "optimizer.state.0.step"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_keeps_its_bits(tmp_path, dtype):
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2 if dtype.kind == "b" else 256, 3 * 5 * dtype.itemsize).astype(np.uint8)
    written = bits.view(dtype).reshape(3, 5)  # any bits, not-a-numbers included
    read = pickles.opened(torchfiles.save(tmp_path / "a.pt", {"x": written}))["x"].read()
    assert (read.dtype, read.shape, read.tobytes()) == (dtype, (3, 5), written.tobytes())


def test_views_of_one_storage_share_it(tmp_path):
    base = numbers(3, 4, 5)
    storage = Storage(base.reshape(-1))
    views = {
        "whole": (View(storage, 0, (3, 4, 5), (20, 5, 1)), base),
        "turned": (View(storage, 0, (5, 3, 4), (1, 20, 5)), base.transpose(2, 0, 1)),
        "sliced": (View(storage, 21, (2, 2, 3), (20, 10, 1)), base[1:, ::2, 1:4]),
        "last": (View(storage, 59, (), ()), base[-1, -1, -1]),
        "row": (View(storage, 55, (1, 5), (2**70, 1)), base[2, 3:]),
        "repeated": (View(storage, 2, (4, 3), (0, 1)), np.broadcast_to(base[0, 0, 2:], (4, 3))),
        "empty": (View(storage, 60, (0, 5), (5, 1)), base[:0, 0]),
    }
    path = torchfiles.save(tmp_path / "a.pt", {name: view for name, (view, _) in views.items()})
    with zipfile.ZipFile(path) as archive:
        assert sum("/data/" in name for name in archive.namelist()) == 1
    for name, tensor in pickles.opened(path).items():
        wanted = views[name][1]
        assert tensor.shape == tensor.read().shape == wanted.shape, name
        np.testing.assert_array_equal(tensor.read(), wanted, strict=True, err_msg=name)


def test_reading_maps_the_file(tmp_path):
    read = pickles.opened(torchfiles.save(tmp_path / "a.pt", {"x": numbers(5, 3)}))["x"].read()
    assert not read.flags.writeable
    assert not read.flags.owndata
    bases = []
    while isinstance(read, np.ndarray):
        read = read.base
        bases.append(type(read).__name__)
    assert "mmap" in bases


@pytest.mark.parametrize(
    ("function", "more"), [("_rebuild_tensor", ()), ("_rebuild_tensor_v2", (True, None, {}))]
)
def test_older_ways_to_save_a_tensor_open(tmp_path, function, more):
    view = View(Storage(numbers(6)), 1, (5,), (1,), function=function, more=more)
    path = torchfiles.save(tmp_path / "a.pt", [view])
    np.testing.assert_array_equal(pickles.opened(path)[0].read(), numbers(6)[1:])


@pytest.mark.parametrize("storage", ["UntypedStorage", "_UntypedStorage"])
def test_a_storage_of_bytes_takes_the_dtype_of_its_tensor(tmp_path, storage):
    written = numbers(4, 3, dtype=np.uint16)
    held = Storage(written.reshape(-1).view(np.uint8), kind=torch_name("torch.storage", storage))
    more = (False, collections.OrderedDict(), torch_name("torch", "uint16"))
    path = torchfiles.save(
        tmp_path / "a.pt", View(held, 0, (4, 3), (3, 1), function="_rebuild_tensor_v3", more=more)
    )
    tensor = pickles.opened(path)
    assert tensor.name == ""
    np.testing.assert_array_equal(tensor.read(), written, strict=True)


class Called:
    """Saved as the call of a function of torch."""

    def __init__(self, module, name, *arguments):
        self.call = torch_name(module, name), arguments

    def __reduce_ex__(self, protocol):
        return self.call


def test_sizes_devices_dtypes_and_parameters_are_values(tmp_path):
    hooks = collections.OrderedDict()
    value = {
        "size": Called("torch", "Size", (2, 3)),
        "device": Called("torch", "device", "cuda", 1),
        "host": Called("torch", "device", "cpu"),
        "dtype": torch_name("torch", "bfloat16"),
        "parameter": Called(
            "torch._utils", "_rebuild_parameter", torchfiles.whole(numbers(3)), True, hooks
        ),
        "other": Called(
            "torch._utils",
            "_rebuild_parameter_with_state",
            torchfiles.whole(numbers(2)),
            True,
            hooks,
            {},
        ),
    }
    got = pickles.opened(torchfiles.save(tmp_path / "a.pt", value))
    plain = {
        "size": (2, 3),
        "device": "cuda:1",
        "host": "cpu",
        "dtype": np.dtype(ml_dtypes.bfloat16),
    }
    assert {name: got[name] for name in plain} == plain
    np.testing.assert_array_equal(got["parameter"].read(), numbers(3))
    assert got["other"].name == "other"


def test_a_checkpoint_beyond_four_gigabytes_opens(tmp_path):
    parts = list(torchfiles.entries({"x": numbers(5, 3)}).items())
    with open(tmp_path / "a.pt", "wb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, content in parts:
            archive.writestr(name, content)
            archive.start_dir = max(archive.start_dir, 5 << 30)  # what follows lies behind a hole
    assert (tmp_path / "a.pt").stat().st_size > 5 << 30
    np.testing.assert_array_equal(pickles.opened(tmp_path / "a.pt")["x"].read(), numbers(5, 3))


@pytest.mark.parametrize("name", ["archive", "Gewichte ä", "a b"])
def test_the_folder_inside_may_have_any_name(tmp_path, name):
    assert pickles.opened(torchfiles.save(tmp_path / "a.pt", {"step": 5}, name=name)) == {"step": 5}


def test_a_huge_memo_index_costs_nothing(tmp_path):
    code = b"\x80\x02" + b"}r\xff\xff\xff\xff" + b"j\xff\xff\xff\xff" + b"\x86."
    assert pickles.opened(torchfiles.write(tmp_path / "a.pt", {"a/data.pkl": code})) == ({}, {})


# What is hostile


def call(module, name, *arguments):
    """The pickle that calls a function by its name."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + pickle.dumps(arguments, 2)[2:-1] + b"R."


def stacked(module, name, *arguments):
    """The same with names from the stack, which may have dots."""
    texts = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    return b"\x80\x04" + texts + b"\x93" + pickle.dumps(arguments, 2)[2:-1] + b"R."


def nested(levels):
    """Tuples each of which holds the one before twice."""
    return b"\x80\x02)" + b"q\x00h\x00\x86" * levels + b"."


TOUCH = "open({!r}, 'w').close()"
HOSTILE = {  # a pickle, given the file that it would create; and what the refusal names
    "os.system": (lambda at: call("os", "system", f"touch {at}"), "os.system"),
    "posix.system": (lambda at: call("posix", "system", f"touch {at}"), "posix.system"),
    "os.system by dots": (lambda at: stacked("os", "system", f"touch {at}"), "os.system"),
    "eval": (lambda at: call("builtins", "eval", TOUCH.format(at)), "builtins.eval"),
    "exec": (lambda at: call("builtins", "exec", TOUCH.format(at)), "builtins.exec"),
    "exec of Python 2": (
        lambda at: call("__builtin__", "exec", TOUCH.format(at)),
        "__builtin__.exec",
    ),
    "open": (lambda at: call("builtins", "open", at, "w"), "builtins.open"),
    "io.open": (lambda at: call("io", "open", at, "w"), "io.open"),
    "getattr": (lambda at: call("builtins", "getattr", {}, "keys"), "builtins.getattr"),
    "__import__": (lambda at: call("builtins", "__import__", "os"), "builtins.__import__"),
    "subprocess": (lambda at: call("subprocess", "Popen", ["touch", at]), "subprocess.Popen"),
    "runpy": (lambda at: call("runpy", "run_path", at), "runpy.run_path"),
    "numpy array": (
        lambda at: call("numpy.core.multiarray", "_reconstruct", (0,), b"b"),
        "numpy.core.multiarray",
    ),
    "numpy.load": (lambda at: call("numpy", "load", at, None, True), "numpy.load"),
    "torch.load": (lambda at: call("torch", "load", at), "torch.load"),
    "torch.hub": (
        lambda at: call("torch.hub", "load", "someone/something", "model"),
        "torch.hub.load",
    ),
    "torch.serialization": (
        lambda at: call("torch.serialization", "load", at),
        "torch.serialization.load",
    ),
    "storage from file": (
        lambda at: stacked("torch", "FloatStorage.from_file", at, True, 4),
        "FloatStorage.from_file",
    ),
    "codecs.decode": (lambda at: call("_codecs", "decode", b"x", "rot13"), "_codecs.decode"),
    "codecs.encode": (lambda at: call("_codecs", "encode", "x", "latin1"), "_codecs.encode"),
    "attrgetter": (lambda at: call("operator", "attrgetter", "system"), "operator.attrgetter"),
    "partial": (lambda at: call("functools", "partial", len), "functools.partial"),
    "FunctionType": (lambda at: call("types", "FunctionType", None, {}), "types.FunctionType"),
    "namedtuple": (
        lambda at: call("collections", "namedtuple", "A", "b"),
        "collections.namedtuple",
    ),
    "Namespace": (lambda at: call("argparse", "Namespace"), "argparse.Namespace"),
    "pickle.loads": (
        lambda at: call("pickle", "loads", call("os", "system", f"touch {at}")),
        "pickle.loads",
    ),
    "a method by dots": (
        lambda at: stacked("collections", "OrderedDict.fromkeys", "ab"),
        "OrderedDict.fromkeys",
    ),
    "dunder by dots": (
        lambda at: stacked("collections", "OrderedDict.__init__.__globals__", 1),
        "__globals__",
    ),
    "a name with lines": (
        lambda at: stacked("os\n\n.", "system\x1b[2J", 1),
        r"os\n\n..system\x1b[2J",
    ),
    "a long name": (lambda at: stacked("m" * 250, "n" * 250), "mmm..."),
    "quantized": (lambda at: call("torch._utils", "_rebuild_qtensor", 1), "a quantized tensor"),
    "sparse": (lambda at: call("torch._utils", "_rebuild_sparse_tensor", 1), "a sparse tensor"),
    "meta": (
        lambda at: call("torch._utils", "_rebuild_meta_tensor_no_storage", 1),
        "a meta tensor",
    ),
    "complex": (lambda at: call("torch", "ComplexFloatStorage", 1), "torch.ComplexFloatStorage"),
    "INST": (lambda at: b"(S'touch'\nios\nsystem\n.", "opcode STRING"),
    "INST alone": (lambda at: b"(ios\nsystem\n.", "opcode INST"),
    "OBJ": (lambda at: b"\x80\x02(" + b"ccollections\nOrderedDict\n" + b"o.", "opcode OBJ"),
    "NEWOBJ": (lambda at: b"\x80\x02ccollections\nOrderedDict\n)\x81.", "opcode NEWOBJ"),
    "NEWOBJ_EX": (lambda at: b"\x80\x04ccollections\nOrderedDict\n)}\x92.", "opcode NEWOBJ_EX"),
    "EXT1": (lambda at: b"\x80\x02\x82\x01.", "opcode EXT1"),
    "EXT2": (lambda at: b"\x80\x02\x83\x01\x00.", "opcode EXT2"),
    "EXT4": (lambda at: b"\x80\x02\x84\x01\x00\x00\x00.", "opcode EXT4"),
    "LONG4": (lambda at: b"\x80\x02\x8b\xff\xff\xff\x7f\x01.", "opcode LONG4"),
    "BINBYTES8": (lambda at: b"\x80\x04\x8e" + b"\xff" * 7 + b"\x00.", "opcode BINBYTES8"),
    "BYTEARRAY8": (
        lambda at: b"\x80\x05\x96" + b"\xff" * 5 + b"\x00" * 3 + b".",
        "opcode BYTEARRAY8",
    ),
    "NEXT_BUFFER": (lambda at: b"\x80\x05\x97.", "opcode NEXT_BUFFER"),
    "PERSID": (lambda at: b"\x80\x02Pstorage\n.", "opcode PERSID"),
    "BUILD on a dictionary": (lambda at: b"\x80\x02}}b.", "sets the state"),
    "BUILD on a storage type": (lambda at: b"\x80\x02ctorch\nFloatStorage\n}b.", "sets the state"),
    "BUILD on a function": (
        lambda at: b"\x80\x02ctorch._utils\n_rebuild_tensor\n}b.",
        "sets the state",
    ),
    "a call of a dtype": (lambda at: call("torch", "float32", "f4"), "calls what is no function"),
    "a call of a storage type": (
        lambda at: call("torch", "FloatStorage", 2**40),
        "calls what is no function",
    ),
    "a call of text": (lambda at: b"\x80\x02X\x02\x00\x00\x00os)R.", "calls what is no function"),
    "a call without a tuple": (
        lambda at: b"\x80\x02ccollections\nOrderedDict\n]R.",
        "calls what is no function",
    ),
    "an ordered dictionary of pairs": (
        lambda at: call("collections", "OrderedDict", [("a", 1)]),
        "1 arguments",
    ),
    "a bare function": (lambda at: b"\x80\x02ctorch._utils\n_rebuild_tensor\n.", "a bare function"),
    "a bare storage type": (lambda at: b"\x80\x02ctorch\nFloatStorage\n.", "a bare storagetype"),
    "a key that is a tuple": (lambda at: b"\x80\x02})Ns.", "key of type tuple"),
    "a key that is a list": (lambda at: b"\x80\x02}]Ns.", "key of type list"),
    "a key that is an endless number": (
        lambda at: b"\x80\x02}\x8a\xff" + b"\x01" * 255 + b"Ns.",
        "key of type int",
    ),
    "a list in itself": (lambda at: b"\x80\x02]q\x00h\x00a.", "unfolds without end"),
    "a dictionary in itself": (
        lambda at: b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",
        "unfolds without end",
    ),
    "deep nesting": (lambda at: b"\x80\x02)" + b"\x85" * 50_000 + b".", "unfolds without end"),
    "doubling": (lambda at: nested(40), "unfolds without end"),
    "a key that grows": (
        lambda at: b"\x80\x02" + pickle.dumps({"k" * 10**6: list(range(100))}, 2)[2:],
        "without end",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles_are_refused_and_not_run(tmp_path, case):
    make, named = HOSTILE[case]
    canary = tmp_path / "canary"
    path = torchfiles.write(
        tmp_path / "a.pt", {"a/data.pkl": make(str(canary)), "a/byteorder": b"little"}
    )
    assert named in complaint(path)
    assert not canary.exists()


@pytest.mark.parametrize(
    "case", ["os.system", "posix.system", "os.system by dots", "exec", "pickle.loads"]
)
def test_the_hostile_pickles_are_live(tmp_path, case):
    canary = tmp_path / "canary"
    pickle.loads(HOSTILE[case][0](str(canary)))
    assert canary.exists()


def test_a_payload_among_weights_is_refused(tmp_path):
    value = {**checkpoint(), "zz": Called("os", "system", f"touch {tmp_path / 'canary'}")}
    assert "os.system" in complaint(torchfiles.save(tmp_path / "a.pt", value))
    assert not (tmp_path / "canary").exists()


def test_a_program_may_not_take_forever(tmp_path, monkeypatch):
    monkeypatch.setattr(pickles._Handlers, "left", 1000)
    assert (
        pickles.opened(torchfiles.write(tmp_path / "a.pt", {"a/data.pkl": b"}" * 999 + b"."})) == {}
    )
    assert "steps to build" in complaint(
        torchfiles.write(tmp_path / "a.pt", {"a/data.pkl": b"}" * 1000 + b"."})
    )


# What is broken


def six(**claims):
    return Storage(numbers(6), **claims)


def view(storage=None, offset=0, shape=(2, 3), stride=(3, 1), **fields):
    return View(six() if storage is None else storage, offset, shape, stride, **fields)


HOOK = collections.OrderedDict(a=1)
TENSORS = {  # what is saved, and what the refusal names
    "a negative offset": (view(offset=-1), "offset"),
    "a negative stride": (view(stride=(-3, 1)), "stride"),
    "a negative axis": (view(shape=(-2, 3)), "shape"),
    "an offset beyond": (view(offset=1), "beyond its storage 0"),
    "an offset far beyond": (view(offset=2**70), "beyond its storage 0"),
    "a shape beyond": (view(shape=(3, 3)), "beyond its storage 0"),
    "a shape that wraps around": (
        view(shape=(2**33, 2**33), stride=(2**33, 1)),
        "beyond its storage 0",
    ),
    "a stride beyond": (view(stride=(4, 1)), "beyond its storage 0"),
    "more elements than the storage": (
        view(shape=(2**40,), stride=(0,)),
        "more elements than its storage 0",
    ),
    "an endless empty tensor": (view(shape=(0, 2**62, 2**62), stride=(1, 1, 1)), "an empty tensor"),
    "too many axes": (view(shape=(1,) * 17, stride=(1,) * 17), "shape"),
    "more axes than strides": (view(shape=(2, 3, 1)), "3 axes and 2 steps"),
    "an axis that is a fraction": (view(shape=(2.0, 3)), "shape"),
    "an axis that is a truth": (view(shape=(True, 3)), "shape"),
    "a shape that is a list": (view(shape=[2, 3]), "shape"),
    "an offset that is text": (view(offset="0"), "offset"),
    "a storage that is text": (view(storage="0"), "no storage"),
    "no storage at all": (View(None, 0, (), ()), "no storage"),
    "too few arguments": (Called("torch._utils", "_rebuild_tensor_v2", six()), "1 arguments"),
    "too many arguments": (view(more=(False, None, None, None, None)), "9 arguments"),
    "a hook": (view(more=(False, HOOK)), "hooks"),
    "a conjugated tensor": (view(more=(False, None, {"conj": True})), "conjugated"),
    "a tensor without a dtype": (
        view(six(kind=torch_name("torch.storage", "UntypedStorage"), numel=24)),
        "no dtype",
    ),
    "a parameter of nothing": (
        Called("torch._utils", "_rebuild_parameter", 1, True, None),
        "no tensor",
    ),
    "a size of text": (Called("torch", "Size", "ab"), "size"),
    "a device that is a number": (Called("torch", "device", 3), "device"),
    "a bare storage": ({"x": six()}, "a bare storage at 'x'"),
    "a key with dots": (view(six(key="../../x")), "called ../../x"),
    "a key with a slash": (view(six(key="0/1")), "called 0/1"),
    "an empty key": (view(six(key="")), "called"),
    "a key that is a number": (view(six(key=5)), "describes no storage"),
    "too many elements": (view(six(numel=7)), "28 bytes and has 24"),
    "too few elements": (view(six(numel=5)), "20 bytes and has 24"),
    "endless elements": (view(six(numel=2**62)), "and has 24"),
    "a negative number of elements": (view(six(numel=-6)), "-24 bytes"),
    "elements that are text": (view(six(numel="6")), "describes no storage"),
    "another dtype": (view(six(kind=torch_name("torch", "DoubleStorage"))), "48 bytes and has 24"),
    "a dtype as the type of a storage": (
        view(six(kind=torch_name("torch", "float32"))),
        "describes no storage",
    ),
    "text as the type of a storage": (view(six(kind="FloatStorage")), "describes no storage"),
    "a module instead of a storage": (view(six(what="module")), "a storage is called"),
    "a storage on meta": (view(six(location="meta")), "meta"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_cannot_be_are_refused(tmp_path, case):
    saved, named = TENSORS[case]
    assert named in complaint(torchfiles.save(tmp_path / "a.pt", saved))


def test_the_tensor_that_the_broken_ones_vary_is_sound(tmp_path):
    tensor = pickles.opened(torchfiles.save(tmp_path / "a.pt", view()))
    np.testing.assert_array_equal(tensor.read(), numbers(2, 3))


PICKLES = {  # damaged programs
    "nothing": b"",
    "no end": b"\x80\x02}",
    "no value": b"\x80\x02.",
    "no such opcode": b"\x80\x02\xff.",
    "a future protocol": b"\x80\x63}.",
    "an unknown memo": b"\x80\x02h\x05.",
    "a mark too few": b"\x80\x02t.",
    "a stack too short": b"\x80\x02N\x86.",
    "text cut off": b"\x80\x02X\xff\x00\x00\x00ab",
    "half a number": b"\x80\x02J\x01",
    "text that is none": b"\x80\x02X\x02\x00\x00\x00\xff\xfe.",
    "items of a list": b"\x80\x02]NNs.",
    "a key that is half a letter": b"\x80\x02}X\x03\x00\x00\x00\xed\xa0\x80Ns.",
    "an odd item": b"\x80\x02}(Nu.",
    "an item onto a number": b"\x80\x02K\x01Na.",
    "items onto text": b"\x80\x02X\x01\x00\x00\x00a(NNe.",
    "a frame cut off": b"\x80\x04\x95\xff\x00\x00\x00\x00\x00\x00\x00}",
    "half a frame": b"\x80\x04\x95\xff",
    "an endless frame": b"\x80\x04\x95" + b"\xff" * 8 + b"}.",
    "a persistent id that is a number": b"\x80\x02K\x05Q.",
    "names that are numbers": b"\x80\x04K\x01K\x02\x93.",
    "a name cut off": b"\x80\x02ccollections\nOrdered",
}


@pytest.mark.parametrize("case", PICKLES)
def test_damaged_pickles_are_refused(tmp_path, case):
    complaint(torchfiles.write(tmp_path / "a.pt", {"a/data.pkl": PICKLES[case]}))


# Chance


def damaged(content, rng):
    """Some bytes changed, left out, put in or cut off."""
    content = bytearray(content)
    at = int(rng.integers(len(content)))
    match rng.integers(5):
        case 0:
            del content[at:]
        case 1:
            del content[at : at + int(rng.integers(1, 9))]
        case 2:
            content[at:at] = rng.bytes(int(rng.integers(1, 9)))
        case _:
            for place in rng.integers(len(content), size=rng.integers(1, 7)):
                content[place] = rng.integers(256)
    return bytes(content)


def outcome(path):
    """Whether the file opens; if so, every tensor can be read."""
    try:
        found = leaves(pickles.opened(path))
    except InputError:
        return False
    for tensor in found:
        assert tensor.read().shape == tensor.shape
        assert tensor.read().dtype == tensor.dtype
    return True


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("protocol", [2, 4])
def test_damage_by_chance_is_refused_or_harmless(tmp_path, seed, protocol):
    rng = np.random.default_rng(seed)
    path = tmp_path / "a.pt"
    held = torchfiles.entries(checkpoint(), protocol=protocol)
    content = torchfiles.write(tmp_path / "sound.pt", held).read_bytes()
    opened = 0
    for _ in range(60):
        path.write_bytes(damaged(content, rng))
        opened += outcome(path)
        opened += outcome(
            torchfiles.write(
                path, held | {"archive/data.pkl": damaged(held["archive/data.pkl"], rng)}
            )
        )
    assert 0 < opened < 110  # some damage hits padding or values; most of it is found
