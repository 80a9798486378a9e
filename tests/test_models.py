"""Model folders come back as they were, read where they belong, or say in one sentence why not."""

import dataclasses
import json
import os
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import tiny
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from packforcing_jax import config, pytrees
from packforcing_jax.errors import InputError, MachineError
from packforcing_jax.io import model_folder
from packforcing_jax.networks import dit

WAN = config.Experiment("wan")
STAGE = config.Experiment(
    "stage é",
    dit=config.DiTConfig(
        dim=36, heads=3, layers=2, in_channels=27, out_channels=27, rope_pairs=(2, 3, 1), eps=1e-5
    ),
    codec=config.SpaceToDepthConfig(factor=3),
    cache=config.PROFILES["published"],
    compressor=config.CompressorConfig(
        channels=(5, 7), strides=((2, 1, 1), (1, 2, 2)), branches="hr"
    ),
    sample=config.SampleConfig(steps=(900, 300), shift=3.5, prediction="clean"),
    dtypes=config.DtypeConfig(cache="float16", text="bfloat16"),
    latent=(10, 18),
)


def parts():
    """Some of three parts, with values that bfloat16 rounds, an integer and a scalar."""
    rng = np.random.default_rng(0)
    return {
        "dit": {
            "blocks/attn/q/kernel": rng.normal(size=(2, 5, 3)).astype(np.float32),
            "head/bias": jnp.arange(7, dtype=jnp.float32) / 3,
        },
        "compressor": {"scale": np.float32(1.25)},
        "text": {
            "table": rng.normal(size=(11, 3)).astype(np.float32).T,  # not contiguous
            "buckets": np.arange(4, dtype=np.int32),
        },
    }


def saved(folder, *, dtype="float32", **texts):
    model_folder.save(
        folder, STAGE, parts(), dtype=dtype, texts={model_folder.TOKENIZER: '{"é": 1}'} | texts
    )
    return folder


def read(folder):
    """(experiment, arrays by part and path)."""
    model = model_folder.opened(folder)
    return model.experiment, {
        part: {path: tensor.read() for path, tensor in held.items()}
        for part, held in model.parts.items()
    }


@pytest.mark.parametrize("experiment", [WAN, STAGE], ids=lambda e: e.name)
def test_experiment_survives_json(experiment):
    text = model_folder.experiment_to_json(experiment)
    back = model_folder.experiment_from_json(text)
    assert back == experiment
    assert hash(back) == hash(experiment)  # tuples all the way down
    assert (
        json.loads(text)["codec"]["kind"]
        == {"wan": "vae", "stage é": "space_to_depth"}[experiment.name]
    )


@pytest.mark.parametrize("profile", config.PROFILES)
def test_every_cache_profile_survives_json(profile):
    experiment = dataclasses.replace(STAGE, cache=config.PROFILES[profile])
    assert (
        model_folder.experiment_from_json(model_folder.experiment_to_json(experiment)) == experiment
    )


def test_left_out_settings_take_their_defaults():
    assert (
        model_folder.experiment_from_json('{"name": "wan", "dit": {}, "codec": {"kind": "vae"}}')
        == WAN
    )


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("dit", "head"), 3, r"dit\.head: unknown key; did you mean dit\.heads"),
        (("dit", "heads"), "3", r"dit\.heads='3': dit\.heads must be int"),
        (("dit", "heads"), True, r"dit\.heads=True: dit\.heads must be int"),
        (("dit", "heads"), 5, "dit.dim=36 is not divisible"),
        (
            ("dit", "patch"),
            [1, 2],
            r"dit\.patch=\[1, 2\]: dit\.patch must be tuple\[int, int, int\]",
        ),
        (
            ("compressor", "strides"),
            [[2, 1, 1], [1, "2", 2]],
            r"compressor\.strides=.*'2'.*: compressor\.strides must be tuple\[tuple\[int",
        ),
        (("sample", "steps"), 4, r"sample\.steps=4: sample\.steps must be tuple\[int, \.\.\.\]"),
        (
            ("codec", "kind"),
            "jpeg",
            r"codec\.kind='jpeg' is unknown; choose one of vae, space_to_depth",
        ),
        (("codec",), None, r"codec\.kind=None"),
        (("cache",), [], r"cache=\[\] is not a table"),
        (("name",), ..., "name is missing"),
    ],
)
def test_wrong_configs_are_refused_by_place_and_value(place, value, reason):
    table = json.loads(model_folder.experiment_to_json(STAGE))
    inner = table
    for key in place[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    with pytest.raises(InputError, match=f"here.json: .*{reason}"):
        model_folder.experiment_from_json(json.dumps(table), "here.json")


def test_texts_that_are_no_config_are_refused():
    for text in ("", "{", "[]", "7"):
        with pytest.raises(InputError, match="here.json"):
            model_folder.experiment_from_json(text, "here.json")


def test_a_folder_comes_back_as_it_was(tmp_path):
    folder = saved(tmp_path / "new" / "model", **{model_folder.CARD: "# A model\n"})
    experiment, back = read(folder)
    assert experiment == STAGE
    assert back.keys() == parts().keys()
    for part, flat in parts().items():
        assert back[part].keys() == flat.keys()
        for path, leaf in flat.items():
            np.testing.assert_array_equal(back[part][path], leaf, err_msg=path, strict=True)
    assert (folder / "tokenizer.json").read_text(encoding="utf-8") == '{"é": 1}'
    assert (folder / "README.md").read_text() == "# A model\n"
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_folders_are_rounded_and_leave_integers_alone(tmp_path, dtype):
    folder = saved(tmp_path / "model", dtype=dtype)
    for part, flat in read(folder)[1].items():
        for path, leaf in flat.items():
            given = np.asarray(parts()[part][path])
            rounded = given.astype(jnp.dtype(dtype)) if given.dtype == np.float32 else given
            np.testing.assert_array_equal(leaf, rounded, err_msg=path, strict=True)
    names = [
        "compressor.safetensors",
        "config.json",
        "dit.safetensors",
        "manifest.json",
        "text.safetensors",
        "tokenizer.json",
    ]
    assert sorted(p.name for p in folder.iterdir()) == names


def test_the_files_are_read_by_the_formats_own_library(tmp_path):
    with safetensors.safe_open(saved(tmp_path / "m") / "dit.safetensors", framework="np") as file:
        for path, leaf in parts()["dit"].items():
            np.testing.assert_array_equal(file.get_tensor(path), leaf, strict=True)


def shapes(cfg=tiny.EXP.dit):
    return jax.eval_shape(lambda: dit.WanDiT(cfg, nnx.Rngs(0)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a transformer."""
    path = tmp_path_factory.mktemp("models") / "m"
    model_folder.save(path, tiny.EXP, {"dit": tiny.nets().dit}, dtype="float32")
    return path


def test_layers_are_read_stacked_or_each_for_itself(folder):
    held = model_folder.opened(folder).part("dit")
    whole = tiny.nets().dit
    stacked = model_folder.fill(shapes(), held, dtype="float32", source="weights")
    apart = model_folder.fill(
        jax.eval_shape(lambda: dit.WanDiT(tiny.EXP.dit, nnx.Rngs(0)).unrolled()),
        held,
        dtype="float32",
        source="weights",
    )
    for form, wanted in ((stacked, whole), (apart, whole.unrolled())):
        flat = pytrees.flatten(form)
        assert flat.keys() == pytrees.flatten(wanted).keys()
        for path, leaf in pytrees.flatten(wanted).items():
            np.testing.assert_array_equal(flat[path], leaf, err_msg=path)


def test_one_layer_is_read_alone_and_in_another_dtype(folder):
    held = model_folder.opened(folder).part("dit")
    one = jax.eval_shape(lambda: dit.Block(tiny.EXP.dit, nnx.Rngs(0)))
    block = model_folder.fill(one, held, dtype="bfloat16", source="weights", inside="blocks/1/")
    wanted = tiny.nets().dit.unrolled().blocks[1]
    for path, leaf in pytrees.flatten(wanted).items():
        np.testing.assert_array_equal(
            pytrees.flatten(block)[path], leaf.astype(jnp.bfloat16), err_msg=path, strict=True
        )
    with pytest.raises(InputError, match="attn/q/kernel: missing"):
        model_folder.fill(
            one, held, dtype="float32", source="weights", inside=f"blocks/{tiny.EXP.dit.layers}/"
        )


def test_leaves_go_straight_into_their_shards(folder):
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))
    filled = model_folder.fill(
        shapes(),
        model_folder.opened(folder).part("dit"),
        dtype="float32",
        source="weights",
        shardings={"blocks/ffn_in/kernel": place},
    )
    flat = pytrees.flatten(filled)
    assert flat["blocks/ffn_in/kernel"].sharding == place
    np.testing.assert_array_equal(
        flat["blocks/ffn_in/kernel"], pytrees.flatten(tiny.nets().dit)["blocks/ffn_in/kernel"]
    )


def test_every_mismatch_is_named_at_once(folder):
    held = dict(model_folder.opened(folder).part("dit"))
    del held["head/bias"]
    held["stranger"] = held["patch/bias"]
    held["text_in/bias"] = held["blocks/attn/q/bias"]
    with pytest.raises(InputError, match="3 tensors") as raised:
        model_folder.fill(shapes(), held, dtype="float32", source="the weights")
    for piece in ("head/bias: missing", "stranger: not part of the model", "text_in/bias: shape"):
        assert piece in str(raised.value)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value):
    flat = {path: np.array(leaf) for path, leaf in pytrees.flatten(tiny.nets().dit).items()}
    flat["time_proj/kernel"][2, 5] = value
    model_folder.save(tmp_path / "m", tiny.EXP, {"dit": flat}, dtype="float32")
    with pytest.raises(InputError, match=r"not finite in 1 tensors \(time_proj/kernel\)"):
        model_folder.fill(
            shapes(),
            model_folder.opened(tmp_path / "m").part("dit"),
            dtype="bfloat16",
            source="weights",
        )


def test_saving_again_replaces_the_whole_folder(tmp_path):
    folder = saved(tmp_path / "model", **{model_folder.CARD: "old"})
    model_folder.save(folder, WAN, {"dit": {"a": np.zeros(3, np.float32)}})
    experiment, back = read(folder)
    assert experiment == WAN
    assert {part: list(flat) for part, flat in back.items()} == {"dit": ["a"]}
    names = ["config.json", "dit.safetensors", "manifest.json"]
    assert sorted(p.name for p in folder.iterdir()) == names
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
    with pytest.raises(InputError, match="dtype='float8'"):
        saved(tmp_path / "model", dtype="float8")
    with pytest.raises(InputError, match="'critic'"):
        model_folder.save(tmp_path / "model", STAGE, {"critic": {"a": np.zeros(3)}})
    assert list(tmp_path.iterdir()) == []


def test_full_disk_keeps_the_old_folder(tmp_path):
    folder = saved(tmp_path / "model", **{model_folder.CARD: "old"})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(MachineError, match="nothing was changed"):
            model_folder.save(folder, WAN, {"dit": {"a": np.zeros(9000, np.float32)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert model_folder.opened(folder).experiment == STAGE
    assert list(tmp_path.iterdir()) == [folder]


def test_failed_swap_puts_the_old_folder_back(tmp_path, monkeypatch):
    folder = saved(tmp_path / "model")
    rename = os.rename

    def refuse(source, target):
        if os.path.basename(source) == "new":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(MachineError, match="Input/output error"):
        model_folder.save(folder, WAN, {})
    assert model_folder.opened(folder).experiment == STAGE
    assert list(tmp_path.iterdir()) == [folder]


def test_broken_folders_are_refused_by_file_and_remedy(tmp_path):
    def refused(reason):
        with pytest.raises(InputError, match=f"(?s)^[^\n]*{reason}[^\n]*$"):
            model_folder.opened(folder).part("dit")

    folder = tmp_path / "model"
    refused("model does not exist; check the path")
    saved(folder)
    whole = (folder / "dit.safetensors").read_bytes()
    for torn in (whole[:-5], whole[:20], b"", b"\xff" * 64):
        (folder / "dit.safetensors").write_bytes(torn)
        refused("dit.safetensors is damaged .* fetch it again")
    (folder / "dit.safetensors").unlink()
    refused("has no dit.safetensors; fetch the model again, or convert that part")
    (folder / "config.json").write_bytes(b"\xff{")
    with pytest.raises(InputError, match="config.json is not JSON"):
        _ = model_folder.opened(folder).experiment
    (folder / "config.json").unlink()
    refused("has no config.json")
