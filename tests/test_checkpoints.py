"""Checkpoints come back bit for bit, survive every interruption, or say in one sentence why not."""

import contextlib
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx, struct
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from packforcing_jax import config, interrupts
from packforcing_jax.errors import InputError, MachineError
from packforcing_jax.io import checkpoints, model_folder

# What a training keeps


class Layer(nnx.Module):
    """Two nested parameters."""

    def __init__(self, rngs, width=5):
        self.inner = nnx.Linear(3, width, rngs=rngs)
        self.scale = nnx.Param(jnp.ones((1, width)))

    def __call__(self, x):
        return self.inner(x) * self.scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a trainer keeps."""

    model: Layer
    averaged: Layer
    optimiser: Any
    key: jax.Array
    step: jax.Array
    epoch: int


OPTIMISER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))


def start(seed=0, width=5):
    model = Layer(nnx.Rngs(seed), width)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    return TrainState(model, half, OPTIMISER.init(model), jax.random.key(seed + 5), jnp.int32(0), 3)


@jax.jit
def advance(state):
    key, draw = jax.random.split(state.key)
    x = jax.random.normal(draw, (7, 3))
    grads = jax.grad(lambda model: (model(x) ** 2).mean())(state.model)
    updates, optimiser = OPTIMISER.update(grads, state.optimiser)
    model = optax.apply_updates(state.model, updates)
    return dataclasses.replace(
        state, model=model, optimiser=optimiser, key=key, step=state.step + 1
    )


def advanced(count, state=None):
    state = start() if state is None else state
    for _ in range(count):
        state = dataclasses.replace(advance(state), epoch=state.epoch)
    return state


def assert_same(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
        if jnp.issubdtype(jnp.result_type(a), jax.dtypes.prng_key):
            assert a.dtype == b.dtype
            a = jax.random.key_data(a)
            b = jax.random.key_data(b)
        assert type(a) is type(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True)


@pytest.fixture
def store(tmp_path):
    store = checkpoints.Checkpoints(tmp_path / "new" / "run", keep=2)
    yield store
    store.close()


def test_resumed_training_is_bit_equal_to_training_straight_through(store):
    state = advanced(2)
    assert np.abs(jax.tree.leaves(state.optimiser)[1]).max() > 0
    store.save(2, state, {"position": 14})
    store.close()
    again = checkpoints.Checkpoints(store.folder)
    back, data = again.restore(start(seed=9))
    again.close()
    assert_same(back, state)
    assert data == {"position": 14}
    assert_same(advanced(3, back), advanced(5))


def test_state_is_restored_from_shapes_alone_and_where_it_is_wanted(store):
    state = advanced(1)
    store.save(1, state, {"next": 5})
    abstract = dataclasses.replace(jax.eval_shape(start), epoch=0)
    back, data = store.restore(abstract)
    assert_same(back, state)
    assert data == {"next": 5}

    mesh = jax.make_mesh(
        (2,), ("data",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,)
    )
    spread = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread), abstract.model
    )
    back, _ = store.restore(dataclasses.replace(abstract, model=placed))
    assert {leaf.sharding for leaf in jax.tree.leaves(back.model)} == {spread}
    np.testing.assert_array_equal(back.model.inner.kernel[...], state.model.inner.kernel[...])


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
def test_keys_of_every_kind_and_shape_come_back(store, kind):
    keys = {
        "one": jax.random.key(4, impl=kind),
        "many": jax.random.split(jax.random.key(5, impl=kind), (2, 3)),
    }
    store.save(0, keys)
    back, data = store.restore(jax.eval_shape(lambda: keys))
    assert_same(back, keys)
    assert data is None
    np.testing.assert_array_equal(
        jax.random.normal(back["many"][1, 2], 5), jax.random.normal(keys["many"][1, 2], 5)
    )


def test_newest_steps_are_kept_and_any_of_them_restored(store):
    assert store.latest() is None
    with pytest.raises(InputError, match="holds no complete step"):
        store.restore({"a": jnp.zeros(3)})
    for step in (5, 10, 200):
        store.save(step, {"a": jnp.full(3, step)}, {"step": step})
    assert store.latest() == 200
    assert sorted(int(p.name) for p in store.folder.iterdir()) == [10, 200]
    assert store.restore({"a": jnp.zeros(3, int)})[1] == {"step": 200}
    back, data = store.restore({"a": jnp.zeros(3, int)}, step=10)
    assert (back["a"].tolist(), data) == ([10, 10, 10], {"step": 10})


def test_interrupted_save_is_ignored(tmp_path, monkeypatch):
    store = checkpoints.Checkpoints(tmp_path)  # never closed
    store.save(1, {"a": jnp.arange(3)})
    store.wait()

    def killed(*_, **__):
        raise SystemExit

    with monkeypatch.context() as patch:  # the last act of a save is to rename its temporary folder
        for name in ("rename", "replace"):
            patch.setattr(os, name, killed)
        store.save(2, {"a": jnp.arange(3) + 1})
        with pytest.raises(SystemExit):
            store.wait()
    left = [p.name for p in store.folder.iterdir()]
    assert len(left) == 2
    assert any(checkpoints.TEMPORARY in name for name in left)
    again = checkpoints.Checkpoints(store.folder)
    assert again.latest() == 1
    assert again.restore({"a": jnp.zeros(3, int)})[0]["a"].tolist() == [0, 1, 2]
    again.save(2, {"a": jnp.arange(3) + 7})
    assert again.restore({"a": jnp.zeros(3, int)})[0]["a"].tolist() == [7, 8, 9]
    again.close()
    assert sorted(p.name for p in store.folder.iterdir()) == ["1", "2"]


def test_what_a_kill_left_is_gone_when_a_run_ends_that_had_nothing_to_save(tmp_path):
    first = checkpoints.Checkpoints(tmp_path)
    first.save(1, {"a": jnp.arange(3)})
    first.close()
    for left in (checkpoints.DISCARDED, f"2{checkpoints.TEMPORARY}"):
        (tmp_path / left / "state").mkdir(parents=True)
    again = checkpoints.Checkpoints(tmp_path)
    assert again.restore({"a": jnp.zeros(3, int)})[0]["a"].tolist() == [0, 1, 2]
    assert len([*tmp_path.iterdir()]) == 3  # reading changes nothing
    again.close()
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


@pytest.mark.parametrize(
    "ask",
    [
        lambda store, state: store.save(3, state),
        lambda store, _: store.latest(),
        lambda store, _: store.close(),
    ],
    ids=["save", "latest", "close"],
)
def test_full_disk_is_told_by_the_next_call_and_keeps_the_earlier_steps(store, ask, capfd):
    store.save(1, {"a": jnp.arange(3)})
    store.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = {"a": jax.random.normal(jax.random.key(0), (90_000,))}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        store.save(2, noise)
        with pytest.raises(
            MachineError, match="(?s)^Saving step 2 below [^\n]* earlier steps are kept.$"
        ):
            ask(store, noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.latest() == 1
    assert store.restore({"a": jnp.zeros(3, int)})[0]["a"].tolist() == [0, 1, 2]
    store.save(2, noise)  # room again
    assert_same(store.restore(noise)[0], noise)
    assert capfd.readouterr().err == ""


def test_what_is_saved_may_be_used_up_at_once(store):
    use_up = jax.jit(lambda state: jax.tree.map(lambda leaf: 0 * leaf - 7, state), donate_argnums=0)
    for step in (1, 2):
        given = {"a": jnp.arange(900_000.0) + step, "b": jnp.full((700, 300), 3.0 * step)}
        kept = jax.tree.map(np.array, given)
        store.save(step, given)
        used = use_up(use_up(given))
        assert_same(jax.tree.map(np.asarray, store.restore(used)[0]), kept)


def test_what_is_saved_may_be_written_in_place_at_once(store):
    """NumPy arrays, and views of arrays of JAX that are then used up."""
    use_up = jax.jit(lambda leaf: 0 * leaf - 7, donate_argnums=0)
    given = {"a": np.arange(900_000.0), "b": jnp.arange(700_000.0)}
    kept = jax.tree.map(np.array, given)
    store.save(1, jax.device_get(given))
    given["a"][:] = -7
    use_up(use_up(given.pop("b")))
    assert_same(store.restore(kept)[0], kept)


def test_a_state_of_another_training_is_refused_by_what_differs(tmp_path):
    about = {
        "seed": 3,
        "experiment": {"dit": {"dim": 24}, "train": {"steps": 9, "batch": 2, "mesh": {"fsdp": 1}}},
    }
    free = ("experiment.train.steps", "experiment.train.mesh")

    def opened(seed=3, dim=24, steps=9, fsdp=1, batch=2):
        train = {"steps": steps, "batch": batch, "mesh": {"fsdp": fsdp}}
        return checkpoints.Checkpoints(
            tmp_path,
            free=free,
            about={"seed": seed, "experiment": {"dit": {"dim": dim}, "train": train}},
        )

    first = opened()
    assert first.about == about
    first.check()  # nothing there yet
    first.save(4, {"a": jnp.arange(3)})
    first.close()
    for same in (opened(), opened(steps=20, fsdp=2)):
        same.check()
        assert same.restore({"a": jnp.zeros(3, int)})[0]["a"].tolist() == [0, 1, 2]
        same.close()
    for other, said in (
        (opened(seed=4), "seed: 3 saved, 4 wanted"),
        (opened(dim=36), "dit.dim: 24 saved, 36 wanted"),
        (opened(batch=5), "train.batch: 2 saved, 5 wanted"),
    ):
        for ask in (other.check, lambda other=other: other.restore({"a": jnp.zeros(3, int)})):
            with pytest.raises(InputError, match=f"belongs to another run .*{said}"):
                ask()
        other.close()


def test_positions_are_kept_by_process(store, monkeypatch):
    """As several processes would: their positions in order, one for all only if they agree."""
    told = ['{"next": 5}', '{"next": 6}']
    monkeypatch.setattr(checkpoints, "_everyones", lambda _: told)
    store.save(1, {"a": jnp.zeros(3)})
    with pytest.raises(
        InputError, match="saved by 2 processes .* continue with 2 processes instead of 1"
    ):
        store.restore({"a": jnp.zeros(3)})
    told[1] = told[0]
    store.save(2, {"a": jnp.zeros(3)})
    assert store.restore({"a": jnp.zeros(3)})[1] == {"next": 5}


def test_other_states_are_refused_leaf_by_leaf(store):
    store.save(1, start())
    with pytest.raises(
        InputError, match=r"model/inner/bias/value: float32\[5\] saved, float32\[4\] wanted"
    ):
        store.restore(start(width=4))
    with pytest.raises(
        InputError, match=r"averaged/scale/value: bfloat16\[1, 5\] saved, float32\[1, 5\] wanted"
    ):
        store.restore(dataclasses.replace(start(), averaged=start().model))
    with pytest.raises(
        InputError, match=r"averaged/inner/bias/value: bfloat16\[5\] saved, absent wanted"
    ):
        store.restore({"model": start().model})


def test_damaged_step_is_refused_with_the_way_out(store):
    store.save(1, {"a": jnp.arange(3)})
    store.wait()
    for path in (store.folder / "1" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(InputError, match="is damaged .*delete it to start anew"):
        store.restore({"a": jnp.zeros(3, int)})


def test_unusable_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match=f"{place} is not usable"):
            checkpoints.Checkpoints(place)
    for ask in (lambda store: store.check(), lambda store: store.save(1, {"a": jnp.zeros(3)})):
        with pytest.raises(InputError, match="/proc/new/new is not writable"):
            ask(checkpoints.Checkpoints("/proc/new"))


# What a sampler keeps: arrays of JAX and of NumPy, hashed


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


def later(state, count):
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


def hashing(folder, **changed):
    """The store as samplers use it."""
    return checkpoints.Checkpoints(folder, digests=True, **changed)


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
    rng = np.random.default_rng(seed)
    is_leaf = lambda node: isinstance(node, tuple)
    state = {
        "count": jnp.int32(4),
        "tree": jax.tree.map(lambda leaf: made(leaf, rng), tree, is_leaf=is_leaf),
    }
    store = hashing(tmp_path_factory.mktemp("saves"))
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
    store.close()
    back, notes = hashing(store.folder).restore(empty)
    same_bits(back, state)
    assert notes == {"seed": seed}


def test_continuing_equals_never_having_stopped(tmp_path):
    store = hashing(tmp_path / "new" / "saves")
    halfway = later(sampler(), 4)
    assert not store.folder.parent.exists()
    store.save(4, halfway, {"written": {"bytes": 2**40, "frames": 7}, "prompts": [[0, "é"]]})
    store.wait()
    back, notes = hashing(store.folder).restore(sampler())
    same_bits(back, halfway)
    same_bits(later(back, 5), later(sampler(), 9))
    assert (
        notes == store.notes() == {"written": {"bytes": 2**40, "frames": 7}, "prompts": [[0, "é"]]}
    )


def test_restored_arrays_can_be_given_away_and_written(tmp_path):
    store = hashing(tmp_path)
    state = later(sampler(), 2)
    store.save(2, state, {})
    back, _ = store.restore(state)
    k = back.layers[2]["k"]
    after = jax.jit(lambda k: k + 1, donate_argnums=0)(k)
    np.testing.assert_array_equal(after, state.layers[2]["k"] + 1)
    back.archive[...] = 9
    same_bits(store.restore(state)[0], state)


def test_arrays_go_where_they_are_wanted(tmp_path):
    store = hashing(tmp_path)
    state = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.arange(5)}
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


def test_steps_only_rise_and_nothing_is_there_before_the_first(tmp_path):
    store = hashing(tmp_path / "saves")
    assert store.latest() is None
    refused(
        lambda: store.restore({"a": jnp.zeros(3)}),
        "saves holds no complete step; check the path or start anew",
    )
    store.check()
    assert list(tmp_path.iterdir()) == []
    for step in (8, 9, 10, 200):
        store.save(step, {"a": jnp.full(3, step)})
        assert store.latest() == hashing(store.folder).latest() == step
    assert sorted(path.name for path in store.folder.iterdir()) == ["10", "200"]
    assert store.restore({"a": jnp.zeros(3, int)})[0]["a"].tolist() == 3 * [200]
    for step in (9, 200):
        refused(
            lambda step=step: store.save(step, {"a": jnp.zeros(3)}),
            f"holds step 200, so step {step} cannot follow",
        )
    assert store.latest() == 200


def test_other_settings_are_refused_by_name_and_values(tmp_path):
    def told(exp):
        return {"experiment": json.loads(model_folder.experiment_to_json(exp)), "seed": 7}

    exp = config.Experiment("wan")
    store = hashing(tmp_path, about=told(exp))
    state = sampler()
    store.save(3, state, {"written": 5})
    same_bits(store.restore(state)[0], state)
    other = dataclasses.replace(
        exp, cache=dataclasses.replace(exp.cache, top=exp.cache.top - 1), fps=exp.fps + 1
    )
    reason = (
        f"experiment[.]cache[.]top: {exp.cache.top} saved, {other.cache.top} wanted; "
        f"experiment[.]fps: {exp.fps} saved, {other.fps} wanted"
    )
    for ask in (
        lambda store: store.restore(state),
        lambda store: store.notes(),
        lambda store: store.check(),
        lambda store: store.save(4, state),
    ):
        refused(
            lambda ask=ask: ask(hashing(tmp_path, about=told(other))),
            f"/3 belongs to another run [(]{reason}[)]; continue with",
        )
    refused(
        lambda: hashing(tmp_path, about=told(exp) | {"weights": "ab"}).restore(state),
        'weights: absent saved, "ab" wanted',
    )
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_what_a_state_belongs_to_is_compared_as_json_gives_it_back(tmp_path):
    about = {"pair": (1, 2), 5: "five"}
    store = hashing(tmp_path, about=about)
    store.save(1, {"a": jnp.zeros(3)})
    store.wait()
    hashing(tmp_path, about=about).check()


def test_other_samplers_are_refused_leaf_by_leaf(tmp_path):
    store = hashing(tmp_path)
    state = sampler()
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
    store = hashing(tmp_path / "saves")
    state = sampler()
    store.save(3, state, {"block": 3})
    store.save(4, later(state, 1), {"block": 4})
    store.wait()
    files = [path for path in (store.folder / "4").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) > sum(
        leaf.nbytes for leaf in jax.tree.leaves(state)
    )
    markers = [path for path in files if path.parent == store.folder / "4"]
    markers = {path for path in markers if path.name != checkpoints.DIGESTS}
    assert len(markers) < len(files) / 2
    for path in set(files) - markers:
        whole = path.read_bytes()
        for damaged in damages(path):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            refused(
                lambda: store.restore(state),
                "/4 is damaged .*; delete it to continue from the one before",
            )
            path.write_bytes(whole)
    for path in markers:  # Orbax's own, which hold nothing of what was saved
        whole = path.read_bytes()
        for damaged in damages(path):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with contextlib.suppress(InputError):
                same_bits(store.restore(state)[0], later(sampler(), 1))
            path.write_bytes(whole)
    same_bits(store.restore(state)[0], later(sampler(), 1))
    shutil.rmtree(store.folder / "4" / "state")
    refused(store.notes, "/4 is damaged")
    shutil.rmtree(store.folder / "4")
    assert store.restore(state)[1] == {"block": 3}
    shutil.rmtree(store.folder / "3" / "notes")
    refused(lambda: store.restore(state), "/3 is damaged .*; delete it to start anew")


def test_digests_are_a_choice(tmp_path):
    plain = checkpoints.Checkpoints(tmp_path)
    plain.save(1, {"a": jnp.arange(3)})
    plain.wait()
    assert not (tmp_path / "1" / checkpoints.DIGESTS).exists()
    refused(lambda: hashing(tmp_path).restore({"a": jnp.zeros(3, int)}), "/1 is damaged")


def test_a_step_that_is_not_kept_is_whole_or_gone(store, monkeypatch):
    """It leaves its name before the first of its files: killed in between, it does not look like a step."""
    for step in (1, 2):
        store.save(step, {"a": jnp.arange(3)})
    store.wait()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        store.save(3, {"a": jnp.arange(3)})
        store.wait()
    assert [path.name for path in (store.folder / checkpoints.DISCARDED).iterdir()] == ["1"]
    again = checkpoints.Checkpoints(store.folder)
    assert again.latest() == 3
    refused(lambda: again.restore({"a": jnp.zeros(3, int)}, 1), "/1 is damaged")
    again.save(4, {"a": jnp.arange(3)})
    again.close()
    assert sorted(path.name for path in store.folder.iterdir()) == ["3", "4"]


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_a_save_is_begun(store, monkeypatch, stop):
    """Orbax cannot be interrupted while it begins; the step is complete and the signal is heard behind it."""
    begin = orbax.checkpoint.CheckpointManager.save

    def signalled(manager, *args, **kwargs):
        signal.raise_signal(stop)
        return begin(manager, *args, **kwargs)

    with monkeypatch.context() as patch, interrupts.raised():
        patch.setattr(orbax.checkpoint.CheckpointManager, "save", signalled)
        with pytest.raises(KeyboardInterrupt):
            store.save(1, {"a": jnp.arange(3)})
    assert store.latest() == 1
    assert store.restore({"a": jnp.zeros(3, int)})[0]["a"].tolist() == [0, 1, 2]


def test_folders_of_others_are_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years")
    before = sorted(tmp_path.rglob("*"))
    refused(
        lambda: hashing(tmp_path / "thesis"),
        "thesis holds chapter.txt, which no run saved; choose another",
    )
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".DS_Store").touch()
    assert hashing(tmp_path / "new").latest() is None


def test_folders_of_earlier_versions_are_refused_with_what_to_do(tmp_path):
    """A sampler's had `block_8`; a training's had the same names as today and other notes."""
    (tmp_path / "sampler" / "block_8").mkdir(parents=True)
    refused(
        lambda: hashing(tmp_path / "sampler"),
        "sampler holds block_8, saved by an earlier version; finish that run with that version, or delete",
    )
    notes = tmp_path / "training" / "7" / "notes"
    notes.mkdir(parents=True)
    (notes / "metadata").write_text('{"leaves": {}, "keys": {}, "data": ["{}"], "about": {}}')
    for name in ("", "notes"):
        (notes.parent / name / "commit_success.txt").touch()
    store = checkpoints.Checkpoints(tmp_path / "training")
    for ask in (store.check, lambda: store.restore({"a": jnp.zeros(3)}), store.notes):
        refused(ask, "/7 was saved by another version; finish that run with that version, or")


CHILD = """
import sys
import jax.numpy as jnp
import numpy as np
from packforcing_jax.io import checkpoints

store = checkpoints.Checkpoints(sys.argv[1], digests=True)
block = store.latest() or 0
while True:
    block += 1
    kinds = (jnp.float32, jnp.bfloat16, jnp.uint32)
    state = [jnp.full((50, 31 + i), block, kinds[i % 3]) for i in range(12)] + [np.full((7, 900), block, np.int32)]
    store.save(block, state, {"block": block})
    store.wait()
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
        reported = killed(tmp_path, delay)
        store = hashing(tmp_path)
        state, about = store.restore(like)
        assert about == {"block": store.latest()}
        assert reported <= store.latest() <= reported + 1, f"killed after {delay} s"
        assert {
            float(value) for leaf in state for value in np.unique(np.asarray(leaf, np.float32))
        } == {about["block"]}
        assert len(list(tmp_path.iterdir())) <= 4  # one unfinished, one not yet removed
