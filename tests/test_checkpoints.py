"""Training checkpoints come back as they were, or say in one sentence why not."""

import dataclasses
import os
import resource
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from packforcing_jax.errors import InputError, MachineError
from packforcing_jax.io import checkpoints


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
            a, b = jax.random.key_data(a), jax.random.key_data(b)
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
    store.save(1, state, b"\x00\xffgrain")
    abstract = dataclasses.replace(jax.eval_shape(start), epoch=0)
    back, data = store.restore(abstract)
    assert_same(back, state)
    assert data == b"\x00\xffgrain"

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
    again = checkpoints.Checkpoints(store.folder)
    assert again.latest() == 1
    assert again.restore({"a": jnp.zeros(3, int)})[0]["a"].tolist() == [0, 1, 2]
    again.save(2, {"a": jnp.arange(3) + 7})
    assert again.restore({"a": jnp.zeros(3, int)})[0]["a"].tolist() == [7, 8, 9]
    again.close()
    assert sorted(p.name for p in store.folder.iterdir()) == ["1", "2"]


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
            with pytest.raises(InputError, match=f"belongs to another training .*{said}"):
                ask()
        other.close()


def test_positions_are_kept_by_process(store, monkeypatch):
    """As several processes would: their positions in order, one for all only if they agree."""
    told = ['{"json": {"next": 5}}', '{"json": {"next": 6}}']
    monkeypatch.setattr(checkpoints, "_everyones", lambda _: told)
    store.save(1, {"a": jnp.zeros(3)})
    with pytest.raises(
        InputError, match="saved by 2 processes .* resume with 2 processes instead of 1"
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
    with pytest.raises(InputError, match="is damaged .*delete it to resume"):
        store.restore({"a": jnp.zeros(3, int)})


def test_unusable_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "run", "/proc/new"):
        with pytest.raises(InputError, match=f"{place} is not usable"):
            checkpoints.Checkpoints(place)
