"""Model folders and training checkpoints come back as they were, or say in one sentence why not."""

import dataclasses
import json
import os
import resource
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from packforcing_jax import checkpoints, config, trees
from packforcing_jax.errors import InputError, MachineError

WAN = config.Experiment("wan")
STAGE = config.Experiment(
    "stage é",
    dit=config.DiTConfig(dim=36, heads=3, layers=2, in_channels=27, out_channels=27, rope_pairs=(2, 3, 1), eps=1e-5),
    codec=config.SpaceToDepthConfig(factor=3),
    cache=config.PROFILES["published"],
    compressor=config.CompressorConfig(channels=(5, 7), strides=((2, 1, 1), (1, 2, 2)), branches="hr"),
    sample=config.SampleConfig(steps=(900, 300), shift=3.5, prediction="clean"),
    latent=(10, 18),
)


def weights():
    """Some of every part, with values that bfloat16 rounds, an integer and a scalar."""
    rng = np.random.default_rng(0)
    return {
        "dit/blocks/attn/q/kernel": rng.normal(size=(2, 5, 3)).astype(np.float32),
        "dit/head/bias": jnp.arange(7, dtype=jnp.float32) / 3,
        "compressor/scale": np.float32(1.25),
        "text/table": rng.normal(size=(11, 3)).astype(np.float32).T,  # not contiguous
        "text/buckets": np.arange(4, dtype=np.int32),
    }


def saved(folder, **changes):
    checkpoints.save_model(folder, STAGE, weights(), **({"tokenizer_json": '{"é": 1}', "dtype": "float32"} | changes))
    return folder


@pytest.mark.parametrize("experiment", [WAN, STAGE], ids=lambda e: e.name)
def test_experiment_survives_json(experiment):
    text = checkpoints.experiment_to_json(experiment)
    back = checkpoints.experiment_from_json(text)
    assert back == experiment
    assert hash(back) == hash(experiment)  # tuples all the way down
    assert json.loads(text)["codec"]["kind"] == {"wan": "vae", "stage é": "space_to_depth"}[experiment.name]


@pytest.mark.parametrize("profile", config.PROFILES)
def test_every_cache_profile_survives_json(profile):
    experiment = dataclasses.replace(STAGE, cache=config.PROFILES[profile])
    assert checkpoints.experiment_from_json(checkpoints.experiment_to_json(experiment)) == experiment


def test_left_out_settings_take_their_defaults():
    assert checkpoints.experiment_from_json('{"name": "wan", "dit": {}, "codec": {"kind": "vae"}}') == WAN


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("dit", "head"), 3, r"dit\.head is unknown; did you mean heads"),
        (("dit", "heads"), "3", r"dit\.heads='3' is not of type int"),
        (("dit", "heads"), True, r"dit\.heads=True is not of type int"),
        (("dit", "heads"), 5, "dit.dim=36 is not divisible"),
        (("dit", "patch"), [1, 2], r"dit\.patch=\[1, 2\] needs 3 entries"),
        (("compressor", "strides"), [[2, 1, 1], [1, "2", 2]], r"compressor\.strides\[1\]\[1\]='2'"),
        (("sample", "steps"), 4, r"sample\.steps=4 is not a list"),
        (("codec", "kind"), "jpeg", r"codec\.kind='jpeg' is unknown; choose one of vae, space_to_depth"),
        (("codec",), None, r"codec\.kind=None"),
        (("cache",), [], r"cache=\[\] is not a table"),
        (("name",), ..., "name is missing"),
    ],
)
def test_wrong_configs_are_refused_by_place_and_value(place, value, reason):
    table = json.loads(checkpoints.experiment_to_json(STAGE))
    inner = table
    for key in place[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    with pytest.raises(InputError, match=f"here.json: .*{reason}"):
        checkpoints.experiment_from_json(json.dumps(table), "here.json")


def test_texts_that_are_no_config_are_refused():
    for text in ("", "{", "[]", "7"):
        with pytest.raises(InputError, match="here.json"):
            checkpoints.experiment_from_json(text, "here.json")


def test_model_folder_comes_back_as_it_was(tmp_path):
    folder = saved(tmp_path / "new" / "model", card="# A model\n")
    experiment, flat = checkpoints.load_model(folder)
    assert experiment == STAGE
    assert flat.keys() == weights().keys()
    for name, leaf in weights().items():
        np.testing.assert_array_equal(flat[name], leaf, err_msg=name, strict=True)
    assert (folder / "tokenizer.json").read_text(encoding="utf-8") == '{"é": 1}'
    assert (folder / "README.md").read_text() == "# A model\n"
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_bfloat16_folder_is_rounded_half_the_size_and_read_as_float32(tmp_path):
    folder = saved(tmp_path / "model", dtype="bfloat16", tokenizer_json=None)
    _, flat = checkpoints.load_model(folder)
    for name, leaf in weights().items():
        rounded = jnp.asarray(leaf)
        rounded = rounded.astype(jnp.bfloat16).astype(jnp.float32) if rounded.dtype == jnp.float32 else rounded
        np.testing.assert_array_equal(flat[name], rounded, err_msg=name, strict=True)
    assert not (flat["dit/head/bias"] == weights()["dit/head/bias"]).all()
    with safetensors.safe_open(folder / "model.safetensors", framework="np") as file:
        assert file.get_slice("dit/head/bias").get_dtype() == "BF16"
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


class Layer(nnx.Module):
    """Two nested parameters."""

    def __init__(self, rngs, width=5):
        self.inner = nnx.Linear(3, width, rngs=rngs)
        self.scale = nnx.Param(jnp.ones((1, width)))

    def __call__(self, x):
        return self.inner(x) * self.scale


def test_modules_go_through_a_folder(tmp_path):
    dit, text = Layer(nnx.Rngs(0)), Layer(nnx.Rngs(1), width=2)
    flat = checkpoints.joined(dit=trees.flatten(dit), text=trees.flatten(text))
    checkpoints.save_model(tmp_path / "m", STAGE, flat, dtype="float32")
    _, back = checkpoints.load_model(tmp_path / "m")
    assert checkpoints.part(back, "codec") == {}
    for name, module, blank in (("dit", dit, Layer(nnx.Rngs(7))), ("text", text, Layer(nnx.Rngs(8), width=2))):
        filled = trees.fill(blank, checkpoints.part(back, name))
        np.testing.assert_array_equal(filled(jnp.ones((1, 3))), module(jnp.ones((1, 3))))


def test_saving_again_replaces_the_whole_folder(tmp_path):
    folder = saved(tmp_path / "model", card="old")
    checkpoints.save_model(folder, WAN, {"dit/a": np.zeros(3, np.float32)})
    experiment, flat = checkpoints.load_model(folder)
    assert (experiment, list(flat)) == (WAN, ["dit/a"])
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert list(tmp_path.iterdir()) == [folder]


def test_folders_of_others_are_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years")
    (tmp_path / "file").write_text("a")
    for name in ("thesis", "file"):
        with pytest.raises(InputError, match="not a model folder"):
            saved(tmp_path / name)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years"


def test_wrong_requests_write_nothing(tmp_path):
    with pytest.raises(InputError, match="dtype='float16'"):
        saved(tmp_path / "model", dtype="float16")
    with pytest.raises(InputError, match="'critic/a'"):
        checkpoints.save_model(tmp_path / "model", STAGE, {"critic/a": np.zeros(3)})
    assert list(tmp_path.iterdir()) == []


def test_full_disk_keeps_the_old_folder(tmp_path):
    folder = saved(tmp_path / "model", card="old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(MachineError, match="nothing was changed"):
            checkpoints.save_model(folder, WAN, {"dit/a": np.zeros(9000, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.load_model(folder)[0] == STAGE
    assert list(tmp_path.iterdir()) == [folder]


def test_failed_swap_puts_the_old_folder_back(tmp_path, monkeypatch):
    folder, rename = saved(tmp_path / "model"), os.rename

    def refuse(source, target):
        if os.path.basename(source) == "new":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(MachineError, match="Input/output error"):
        checkpoints.save_model(folder, WAN, {})
    assert checkpoints.load_model(folder)[0] == STAGE
    assert list(tmp_path.iterdir()) == [folder]


def test_broken_folders_are_refused_by_file_and_remedy(tmp_path):
    def refused(reason):
        with pytest.raises(InputError, match=f"(?s)^[^\n]*{reason}[^\n]*$"):
            checkpoints.load_model(folder)

    folder = tmp_path / "model"
    refused("model does not exist; check the path")
    saved(folder)
    whole = (folder / "model.safetensors").read_bytes()
    for torn in (whole[:-5], whole[:20], b"", b"\xff" * 64):
        (folder / "model.safetensors").write_bytes(torn)
        refused("model.safetensors is damaged .* convert the model again")
    (folder / "model.safetensors").unlink()
    refused("has no model.safetensors")
    (folder / "config.json").write_bytes(b"\xff{")
    refused("has no model.safetensors")
    (folder / "model.safetensors").write_bytes(whole)
    refused("config.json is not JSON")
    (folder / "config.json").unlink()
    refused("has no config.json")


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (np.inf, "bfloat16")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value, dtype):
    flat = weights()
    flat["dit/blocks/attn/q/kernel"][1, 4, 2] = value
    checkpoints.save_model(tmp_path / "m", STAGE, flat, dtype=dtype)
    with pytest.raises(InputError, match=r"not finite in 1 tensors \(dit/blocks/attn/q/kernel\)"):
        checkpoints.load_model(tmp_path / "m")


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
    return dataclasses.replace(state, model=model, optimiser=optimiser, key=key, step=state.step + 1)


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

    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread), abstract.model)
    back, _ = store.restore(dataclasses.replace(abstract, model=placed))
    assert {leaf.sharding for leaf in jax.tree.leaves(back.model)} == {spread}
    np.testing.assert_array_equal(back.model.inner.kernel[...], state.model.inner.kernel[...])


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
def test_keys_of_every_kind_and_shape_come_back(store, kind):
    keys = {"one": jax.random.key(4, impl=kind), "many": jax.random.split(jax.random.key(5, impl=kind), (2, 3))}
    store.save(0, keys)
    back, data = store.restore(jax.eval_shape(lambda: keys))
    assert_same(back, keys)
    assert data is None
    np.testing.assert_array_equal(jax.random.normal(back["many"][1, 2], 5), jax.random.normal(keys["many"][1, 2], 5))


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


def test_interrupted_save_is_ignored(store, monkeypatch):
    store.save(1, {"a": jnp.arange(3)})

    def killed(*_, **__):
        raise SystemExit

    with monkeypatch.context() as patch:  # the last act of a save is to rename its temporary folder
        for name in ("rename", "replace"):
            patch.setattr(os, name, killed)
        with pytest.raises(SystemExit):
            store.save(2, {"a": jnp.arange(3) + 1})
    left = [p.name for p in store.folder.iterdir()]
    assert len(left) == 2
    again = checkpoints.Checkpoints(store.folder)
    assert again.latest() == 1
    assert again.restore({"a": jnp.zeros(3, int)})[0]["a"].tolist() == [0, 1, 2]
    again.save(2, {"a": jnp.arange(3) + 7})
    assert again.restore({"a": jnp.zeros(3, int)})[0]["a"].tolist() == [7, 8, 9]
    again.close()


def test_full_disk_keeps_the_earlier_steps(store):
    store.save(1, {"a": jnp.arange(3)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = {"a": jax.random.normal(jax.random.key(0), (90_000,))}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(MachineError, match="(?s)^Saving step 2 below [^\n]* earlier steps are kept.$"):
            store.save(2, noise)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.latest() == 1
    assert store.restore({"a": jnp.zeros(3, int)})[0]["a"].tolist() == [0, 1, 2]
    store.save(2, noise)  # room again
    assert_same(store.restore(noise)[0], noise)


def test_other_states_are_refused_leaf_by_leaf(store):
    store.save(1, start())
    with pytest.raises(InputError, match=r"model/inner/bias/value: float32\[5\] saved, float32\[4\] wanted"):
        store.restore(start(width=4))
    with pytest.raises(InputError, match=r"averaged/scale/value: bfloat16\[1, 5\] saved, float32\[1, 5\] wanted"):
        store.restore(dataclasses.replace(start(), averaged=start().model))
    with pytest.raises(InputError, match=r"averaged/inner/bias/value: bfloat16\[5\] saved, absent wanted"):
        store.restore({"model": start().model})


def test_damaged_step_is_refused_with_the_way_out(store):
    store.save(1, {"a": jnp.arange(3)})
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
