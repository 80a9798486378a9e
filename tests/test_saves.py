"""Saved sampler states come back bit for bit, survive every interruption, or say in one sentence why not."""

import dataclasses
import json
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from packforcing_jax import config
from packforcing_jax.errors import InputError, MachineError
from packforcing_jax.io import checkpoints, model_folder
from packforcing_jax.sampling import sampler_checkpoints


@struct.dataclass
class Sampler:
    """What stands for a sampler: one entry per layer, a codec state, seeds, and an archive in host memory."""

    layers: tuple
    decoder: dict
    seed: jax.Array
    blocks: jax.Array
    archive: np.ndarray


def sampler(width=7):
    layers = tuple(
        {"k": jnp.full((1, 3, width, 2), 0.1 * i), "at": jnp.zeros((1, 0))} for i in range(3)
    )
    decoder = {
        "context": (jnp.linspace(0, 1, 5, dtype=jnp.bfloat16), ()),
        "seen": jnp.asarray([True, False]),
    }
    return Sampler(
        layers=layers,
        decoder=decoder,
        seed=jnp.asarray([3, 2**32 - 1], jnp.uint32),
        blocks=jnp.int32(0),
        archive=np.zeros((2, 6, width), np.float32),
    )


@jax.jit
def drawn(layers, blocks):
    key = jax.random.fold_in(jax.random.key(8), blocks)
    return jax.tree.map(lambda k: k * 0.9 + jax.random.normal(key, k.shape), layers), blocks + 1


def advanced(state, count):
    """The state `count` blocks later; its archive is written in place."""
    for _ in range(count):
        state.archive[:, int(state.blocks) % 6] = np.asarray(state.layers[1]["k"])[0, :2, :, 1]
        layers, blocks = drawn(state.layers, state.blocks)
        state = state.replace(layers=layers, blocks=blocks)
    return state


def same_bits(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
        assert type(a) is type(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def refused(action, reason):
    with pytest.raises(InputError, match=f"(?s)^[^\n]*{reason}[^\n]*[.]$"):
        action()


KINDS = (jnp.asarray, np.asarray, lambda array: array.reshape(-1)[0] if array.size else array)
LEAF = st.tuples(
    st.sampled_from(KINDS),
    st.sampled_from(["float32", "bfloat16", "uint32", "int32", "bool", "uint8"]),
    st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=4),
)
TREE = st.recursive(
    LEAF.map(lambda leaf: [leaf]),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), inner) | st.lists(inner, max_size=3),
    max_leaves=8,
)


def made(leaf, rng):
    """An array of any bits at all: not-a-number values of every sort, both zeros, all numbers."""
    kind, dtype, shape = leaf
    if dtype == "bool":
        return kind(rng.integers(0, 2, shape).astype(bool))
    dtype = jnp.dtype(dtype)
    return kind(
        np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)
    )


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(tree=TREE, seed=st.integers(0, 2**32 - 1))
def test_any_state_comes_back_bit_for_bit_in_kind(tmp_path_factory, tree, seed):
    rng, is_leaf = np.random.default_rng(seed), lambda node: isinstance(node, tuple)
    state = {
        "count": jnp.int32(4),
        "tree": jax.tree.map(lambda leaf: made(leaf, rng), tree, is_leaf=is_leaf),
    }
    store = sampler_checkpoints.Saves(tmp_path_factory.mktemp("saves"))
    store.save(3, state, {"seed": seed})
    empty = jax.tree.map(
        lambda leaf: (
            type(leaf)(0)
            if isinstance(leaf, np.generic)
            else np.empty_like(leaf)
            if isinstance(leaf, np.ndarray)
            else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        ),
        state,
    )
    back, about = sampler_checkpoints.Saves(store.folder).restore(empty)
    same_bits(back, state)
    assert about == {"seed": seed}


def test_continuing_equals_never_having_stopped(tmp_path):
    store, halfway = sampler_checkpoints.Saves(tmp_path / "new" / "saves"), advanced(sampler(), 4)
    assert not store.folder.parent.exists()
    store.save(4, halfway, {"written": {"bytes": 2**40, "frames": 7}, "prompts": [[0, "é"]]})
    back, about = sampler_checkpoints.Saves(store.folder).restore(sampler())
    same_bits(back, halfway)
    same_bits(advanced(back, 5), advanced(sampler(), 9))
    assert (
        about == store.about() == {"written": {"bytes": 2**40, "frames": 7}, "prompts": [[0, "é"]]}
    )


def test_restored_arrays_can_be_given_away_and_written(tmp_path):
    store, state = sampler_checkpoints.Saves(tmp_path), advanced(sampler(), 2)
    store.save(2, state, {})
    back, _ = store.restore(state)
    k = back.layers[2]["k"]
    after = jax.jit(lambda k: k + 1, donate_argnums=0)(k)
    np.testing.assert_array_equal(after, state.layers[2]["k"] + 1)
    back.archive[...] = 9
    same_bits(store.restore(state)[0], state)


def test_arrays_go_where_they_are_wanted(tmp_path):
    store, state = (
        sampler_checkpoints.Saves(tmp_path),
        {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.arange(5)},
    )
    store.save(1, state, {})
    mesh = jax.make_mesh(
        (2,), ("batch",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,)
    )
    split = NamedSharding(mesh, PartitionSpec("batch"))
    wanted = {"a": jax.ShapeDtypeStruct((2, 3), jnp.float32, sharding=split), "b": state["b"]}
    back, _ = store.restore(wanted)
    assert back["a"].sharding == split
    assert not back["b"].committed
    store.save(2, back, {})
    same_bits(store.restore(state)[0], state)


def test_newest_two_are_kept_and_the_newest_restored(tmp_path):
    store = sampler_checkpoints.Saves(tmp_path / "saves")
    assert store.latest() is None
    refused(
        lambda: store.restore({"a": jnp.zeros(3)}),
        "saves holds no complete save; check the path or start anew",
    )
    assert list(tmp_path.iterdir()) == []
    for block in (8, 9, 10, 200):
        store.save(block, {"a": jnp.full(3, block)}, {})
        assert store.latest() == sampler_checkpoints.Saves(store.folder).latest() == block
    assert sorted(path.name for path in store.folder.iterdir()) == ["block_10", "block_200"]
    assert store.restore({"a": jnp.zeros(3, int)})[0]["a"].tolist() == 3 * [200]
    for block in (9, 200):
        refused(
            lambda block=block: store.save(block, {"a": jnp.zeros(3)}, {}),
            f"holds block 200, so block {block}",
        )
    assert store.latest() == 200


def test_other_settings_are_refused_by_name_and_values(tmp_path):
    def told(exp):
        return {"experiment": json.loads(model_folder.experiment_to_json(exp)), "seed": 7}

    exp = config.Experiment("wan")
    store, state = sampler_checkpoints.Saves(tmp_path), sampler()
    store.save(3, state, told(exp) | {"written": 5})
    same_bits(store.restore(state, told(exp))[0], state)
    other = dataclasses.replace(
        exp, cache=dataclasses.replace(exp.cache, top=exp.cache.top - 1), fps=exp.fps + 1
    )
    reason = (
        f"experiment[.]cache[.]top: {exp.cache.top} saved, {other.cache.top} wanted; "
        f"experiment[.]fps: {exp.fps} saved, {other.fps} wanted"
    )
    refused(
        lambda: store.restore(state, told(other)),
        f"block_3 does not fit this run [(]{reason}[)]; continue with",
    )
    refused(
        lambda: store.restore(state, {"seed": 7, "weights": "ab"}),
        'weights: absent saved, "ab" wanted',
    )


def test_other_states_are_refused_leaf_by_leaf(tmp_path):
    store, state = sampler_checkpoints.Saves(tmp_path), sampler()
    store.save(3, state, {})
    refused(
        lambda: store.restore(sampler(width=8)),
        r"archive: float32\[2, 6, 7\] saved, float32\[2, 6, 8\] wanted; layers/0/k: .* wanted\)",
    )
    refused(
        lambda: store.restore(state.replace(seed=state.seed.view(jnp.int32))),
        r"seed: uint32\[2\] saved, int32",
    )
    refused(
        lambda: store.restore(state.replace(layers=state.layers[:2])),
        r"layers/2/at: float32\[1, 0\] saved, abs",
    )
    refused(
        lambda: store.restore({"other": state}),
        r"archive: float32\[2, 6, 7\] saved, absent wanted; .*; \.\.\.\)",
    )
    refused(
        lambda: store.restore(state.replace(archive=())),
        r"archive: float32\[2, 6, 7\] saved, absent wanted",
    )


def damages(path):
    """The file deleted, emptied, cut in two places, and with one bit changed."""
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    yield None
    yield from {whole[:0], whole[: len(whole) // 2], whole[:-1], bytes(flipped)} - {whole}


def test_every_damage_of_every_file_is_refused_with_the_way_out(tmp_path):
    store, state = sampler_checkpoints.Saves(tmp_path / "saves"), sampler()
    store.save(3, state, {"block": 3})
    store.save(4, advanced(state, 1), {"block": 4})
    files = [path for path in (store.folder / "block_4").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) > sum(
        leaf.nbytes for leaf in jax.tree.leaves(state)
    )
    for path in files:
        whole = path.read_bytes()
        for damaged in damages(path):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            refused(
                lambda: store.restore(state),
                "block_4 is damaged .*; delete it to continue from the one before",
            )
            path.write_bytes(whole)
    same_bits(store.restore(state)[0], advanced(sampler(), 1))
    shutil.rmtree(store.folder / "block_4" / "state")
    refused(store.about, "block_4 is damaged")
    shutil.rmtree(store.folder / "block_4")
    assert store.restore(state)[1] == {"block": 3}
    (store.folder / "block_3" / "notes.json").unlink()
    refused(lambda: store.restore(state), "block_3 is damaged .*; delete it to start anew")


@pytest.mark.parametrize("moment", ["rename", "write_text"])
def test_interrupted_save_is_ignored_and_leaves_nothing(tmp_path, monkeypatch, moment):
    store = sampler_checkpoints.Saves(tmp_path)
    store.save(1, {"a": jnp.arange(3)}, {})

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, moment, interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.save(2, {"a": jnp.arange(3) + 1}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["block_1"]
    assert store.latest() == 1
    store.save(2, {"a": jnp.arange(3) + 7}, {})
    assert store.restore({"a": jnp.zeros(3, int)})[0]["a"].tolist() == [7, 8, 9]


def test_full_disk_keeps_the_earlier_saves(tmp_path):
    store, noise = (
        sampler_checkpoints.Saves(tmp_path),
        {"a": jax.random.normal(jax.random.key(0), (90_000,))},
    )
    store.save(1, {"a": jnp.arange(3)}, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(
            MachineError, match="(?s)^Saving block 2 below [^\n]* earlier saves are kept[.]$"
        ):
            store.save(2, noise, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["block_1"]
    assert store.restore({"a": jnp.zeros(3, int)})[0]["a"].tolist() == [0, 1, 2]
    store.save(2, noise, {})  # room again
    same_bits(store.restore(noise)[0], noise)


def test_folders_of_others_are_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years")
    training = checkpoints.Checkpoints(tmp_path / "training")
    training.save(7, {"a": jnp.arange(3)})
    training.close()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    refused(
        lambda: sampler_checkpoints.Saves(tmp_path / "thesis"),
        r"holds \['chapter.txt'\], which no run saved; choose another",
    )
    refused(
        lambda: sampler_checkpoints.Saves(tmp_path / "training"),
        r"holds \['7'\], which no run saved",
    )
    for place in (tmp_path / "file", tmp_path / "file" / "saves"):
        refused(lambda place=place: sampler_checkpoints.Saves(place), f"{place} is not usable")
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".DS_Store").touch()
    assert sampler_checkpoints.Saves(tmp_path / "new").latest() is None


CHILD = """
import sys
import jax.numpy as jnp
import numpy as np
from packforcing_jax.sampling import sampler_checkpoints as saves

store = saves.Saves(sys.argv[1])
block = store.latest() or 0
while True:
    block += 1
    kinds = (jnp.float32, jnp.bfloat16, jnp.uint32)
    state = [jnp.full((50, 31 + i), block, kinds[i % 3]) for i in range(12)] + [np.full((7, 900), block, np.int32)]
    store.save(block, state, {"block": block})
    print(block, flush=True)
"""


def killed(folder, delay):
    """The last block that a saving process reported before `kill -9`, `delay` seconds after two of its saves."""
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
    )
    reported = [int(child.stdout.readline()) for _ in range(2)]
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    rest, _ = child.communicate(timeout=30)
    return [*reported, *map(int, rest.split())][-1]


def test_killed_process_leaves_a_consistent_newest_save(tmp_path):
    kinds = (jnp.float32, jnp.bfloat16, jnp.uint32)
    like = [jax.ShapeDtypeStruct((50, 31 + i), kinds[i % 3]) for i in range(12)] + [
        np.zeros((7, 900), np.int32)
    ]
    for delay in (random.uniform(0, 0.2) for _ in range(3)):
        reported, store = killed(tmp_path, delay), sampler_checkpoints.Saves(tmp_path)
        state, about = store.restore(like)
        assert about == {"block": store.latest()}
        assert reported <= store.latest() <= reported + 1, f"killed after {delay} s"
        assert {
            float(value) for leaf in state for value in np.unique(np.asarray(leaf, np.float32))
        } == {about["block"]}
        assert len(list(tmp_path.iterdir())) <= 4  # one unfinished, one not yet removed
