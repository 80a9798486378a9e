"""Every public layout becomes a model folder, and goes back to the same numbers under original names."""

import hashlib
import json
import math

import convert_layouts
import numpy as np
import pytest
from convert_layouts import LAYOUTS
from packforcing_jax.convert import exporting, folders, networks, writing
from safetensors.numpy import load_file, save_file

from packforcing_jax.io import model_folder
from packforcing_jax.networks import tokenizer

MERGED = ("longlive", "bare_lora", "lora_that_says_how_strong", "lora_of_diffusers_with_alphas")
CASES = [(name, "float32") for name in LAYOUTS] + [
    (name, dtype)
    for name, dtype in [
        ("original_folder", "bfloat16"),
        ("diffusers_pipeline", "bfloat16"),
        ("self_forcing", "bfloat16"),
        ("longlive", "bfloat16"),
        ("bare_lora", "bfloat16"),
        ("self_forcing_raw_run", "float16"),
        ("original_file", "float16"),
        ("original_vae", "bfloat16"),
        ("original_text", "float16"),
        ("flat", "float64"),
    ]
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def case(request, tmp_path_factory):
    """(name of the layout, the layout, the folder made of it, what the conversion said)."""
    name, dtype = request.param
    tmp = tmp_path_factory.mktemp(name)
    made = LAYOUTS[name](tmp, dtype)
    done = folders.convert(
        folders.Request(sources=tuple(made.sources), out=tmp / "out" / "model", **made.request)
    )
    return name, made, tmp / "out" / "model", done


def bits(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def assert_same(ours, theirs, names=None):
    assert ours.keys() == theirs.keys()
    for name in names or ours:
        assert (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape), (
            name
        )
        assert np.array_equal(bits(ours[name]), bits(theirs[name])), name


def test_there_and_back_is_the_identity(case, tmp_path):
    name, made, folder, _ = case
    exporting.to_torch(folder, tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    if name not in MERGED:
        assert_same(back, made.expected)
        return
    changed = {
        key
        for key, value in made.expected.items()
        if not np.array_equal(value, convert_layouts.dit()[key])
    }
    assert_same(back, dict(made.expected) | {key: back[key] for key in changed})
    for key in changed:
        theirs = made.expected[key]
        assert back[key].dtype == theirs.dtype
        np.testing.assert_allclose(
            back[key].astype(np.float64),
            theirs.astype(np.float64),
            rtol=1e-5,
            atol=1e-5 if theirs.dtype == np.float32 else 0.04,
        )


def test_the_manifest_has_every_tensor_once(case):
    _, made, folder, done = case
    manifest = json.loads((folder / "manifest.json").read_text())
    rows = manifest["tensors"] + [row for row in manifest["ignored"] if "shape" in row]
    assert len({(row["file"], row["name"]) for row in rows}) == len(rows)
    assert {(row["file"], row["name"]) for row in rows} == made.stored.keys()
    for row in rows:
        value = made.stored[row["file"], row["name"]]
        assert (row["dtype"], row["shape"]) == (value.dtype.name, list(value.shape))
        assert row.get("reason") or row["sha256"] == hashlib.sha256(bits(value)).hexdigest()
    assert str(folder.parent) not in (folder / "manifest.json").read_text()
    sizes = {row["file"]: row["bytes"] for row in manifest["sources"]}
    assert {row["file"] for row in rows} <= sizes.keys()
    assert all(size > 0 for size in sizes.values())
    assert manifest["assumptions"] == list(done.notes)


def test_targets_in_the_manifest_are_those_of_the_folder(case):
    _, _, folder, _ = case
    rows = json.loads((folder / "manifest.json").read_text())["tensors"]
    filled = [
        (row["part"], row["path"], row["layer"])
        for row in rows
        if "up @ down" not in row["transform"]
    ]
    held = model_folder.opened(folder)
    wanted = [
        (part, path, layer)
        for part, tensors in held.parts.items()
        for path, tensor in tensors.items()
        for layer in (range(tensor.shape[0]) if path.startswith("blocks/") else [None])
    ]
    assert sorted(filled, key=str) == sorted(wanted, key=str)


def test_the_folder_is_a_model_that_fits_its_settings(case):
    _, made, folder, done = case
    held = model_folder.opened(folder)
    assert tuple(held.parts) == made.parts
    for part, tensors in held.parts.items():
        shapes = networks.wanted(part, held.experiment)
        assert {path: tensor.shape for path, tensor in tensors.items()} == shapes
    assert held.experiment.name == "model"
    assert held.experiment.compressor.branches == "lr"
    assert [row.part for row in done.rows] == list(made.parts)
    assert sum(row.parameters for row in done.rows) == sum(
        math.prod(v.shape) for v in made.expected.values()
    )
    if "dit" in held.parts:
        cfg = held.experiment.dit
        assert (cfg.dim, cfg.heads, cfg.layers, cfg.ffn_dim, cfg.text_dim) == (30, 3, 3, 44, 14)
        assert (cfg.freq_dim, cfg.in_channels, cfg.out_channels, cfg.patch) == (10, 4, 6, (1, 2, 2))


def test_a_folder_read_again_is_taken_over_bit_by_bit(case, tmp_path):
    _, made, folder, _ = case
    folders.convert(folders.Request(sources=(folder,), out=tmp_path / "again"))
    for part in made.parts:
        name = model_folder.weights_file(part)
        assert (tmp_path / "again" / name).samefile(folder / name)
    assert (
        model_folder.opened(tmp_path / "again").experiment.dit
        == model_folder.opened(folder).experiment.dit
    )


def test_the_tokenizer_comes_along_or_is_missed(case):
    name, _, folder, done = case
    has = (folder / "tokenizer.json").is_file()
    assert has == (
        name in ("original_folder", "diffusers_pipeline", "original_folder_and_a_student")
    )
    assert has != any("--tokenizer FILE" in note for note in done.notes)
    if has:
        words = tokenizer.Tokenizer.from_file(folder / "tokenizer.json", 8)
        assert words.inner.token_to_id("green") == 4


# What the settings say


def converted(tmp_path, name, stored="float32", **request):
    made = LAYOUTS[name](tmp_path, stored)
    request = {**made.request, **request}
    done = folders.convert(
        folders.Request(sources=tuple(made.sources), out=tmp_path / "out", **request)
    )
    return done, model_folder.opened(tmp_path / "out")


def test_latents_are_normalised_as_the_settings_say(tmp_path):
    _, held = converted(tmp_path, "diffusers_vae")
    assert held.experiment.codec.mean == (0.5, -0.25, 0.125, 1.5)
    assert held.experiment.codec.std == (2.0, 1.5, 0.75, 3.0)


def test_a_codec_that_does_not_fit_is_replaced_by_a_plain_one(tmp_path):
    done, held = converted(tmp_path, "original_file")
    assert (held.experiment.codec.z_dim, set(held.experiment.codec.std)) == (4, {1.0})
    assert any("not normalised" in note for note in done.notes)


def test_how_weights_are_stored_is_not_how_they_are_held(tmp_path):
    _, held = converted(tmp_path, "original_folder", "float16")
    assert {tensor.dtype.name for tensor in held.part("dit").values()} == {"float16"}
    formats = held.experiment.dtypes
    assert (formats.params, formats.compute, formats.vae, formats.text) == ("bfloat16",) * 4


def test_heads_that_no_file_tells_are_assumed_aloud(tmp_path):
    done, held = converted(tmp_path, "original_file", overrides=())
    assert held.experiment.dit.heads == 1
    assert [
        note
        for note in done.notes
        if "dit.heads=1 is assumed" in note and "--set dit.heads=N" in note
    ]
    assert (
        done.notes[0] in json.loads((tmp_path / "out" / "manifest.json").read_text())["assumptions"]
    )


@pytest.mark.parametrize(("dim", "heads"), [(256, 2), (1536, 12), (384, 3), (260, 5), (194, 97)])
def test_heads_are_as_wide_as_in_released_models(dim, heads):
    from packforcing_jax.convert import wan_dit

    from packforcing_jax.config import DiTConfig

    other = DiTConfig(dim=64, heads=2)
    cfg = wan_dit.config_from_shapes(convert_layouts.shapes_of_dit(layers=1, dim=dim), other)
    assert (cfg.dim, cfg.heads) == (dim, heads)
    assert (wan_dit.assumption(cfg, other) is None) == (dim % 128 == 0)


def test_the_users_settings_have_the_last_word(tmp_path):
    overrides = ("dit.heads=5", "cache.top=2", "name=mine")
    _, held = converted(
        tmp_path, "original_folder", overrides=overrides, config="wan_t2v_1_3b_paper"
    )
    assert (held.experiment.dit.heads, held.experiment.cache.top, held.experiment.name) == (
        5,
        2,
        "mine",
    )
    assert held.experiment.cache.block == 4


# One network of several


def test_what_was_not_chosen_is_listed(tmp_path):
    done, _ = converted(tmp_path, "self_forcing")
    reasons = {each.reason for each in done.ignored}
    assert reasons == {
        "of generator, which was not chosen",
        "of critic, which was not chosen",
        "no tensor",
    }
    assert [each.name for each in done.ignored if each.reason == "no tensor"] == ["step"]
    assert done.rows[0].ignored == 2 * done.rows[0].tensors


def test_heads_of_a_gan_critic_are_left_out_by_name(tmp_path):
    done, _ = converted(tmp_path, "self_forcing_gan")
    names = sorted(each.name.rpartition("model.")[2].partition(".")[0] for each in done.ignored)
    assert names == ["_cls_pred_branch", "_gan_ca_blocks", "_register_tokens"]


def test_a_named_file_comes_before_what_a_folder_has(tmp_path):
    done, _ = converted(tmp_path, "original_folder_and_a_student")
    assert {each.reason for each in done.ignored} == {"this network is taken from student.pt"}
    assert len(done.ignored) == len(convert_layouts.dit())


def test_a_pickled_copy_beside_safetensors_is_passed_over(tmp_path):
    made = LAYOUTS["diffusers_transformer"](tmp_path, "float32")
    convert_layouts.put(
        made.sources[0] / "diffusion_pytorch_model.bin", convert_layouts.dit(seed=3)
    )
    done = folders.convert(folders.Request(sources=tuple(made.sources), out=tmp_path / "out"))
    assert (
        done.notes[0]
        == "transformer/diffusion_pytorch_model.bin is passed over: the folder has safetensors"
    )
    exporting.to_torch(tmp_path / "out", tmp_path / "back.safetensors")
    assert_same(load_file(tmp_path / "back.safetensors"), made.expected)


@pytest.mark.parametrize(("kind", "part"), [("dit", "dit"), ("vae", "codec"), ("text", "text")])
def test_a_kind_can_be_asked_for(tmp_path, kind, part):
    _, held = converted(tmp_path, "several_networks_in_one_file", kind=kind)
    assert list(held.parts) == [part]


def test_a_student_shares_the_text_encoder_of_a_model_folder(tmp_path):
    _, base = converted(tmp_path / "a", "original_folder")
    student = (
        LAYOUTS["self_forcing"](tmp_path / "b", "bfloat16")
        if (tmp_path / "b").mkdir() is None
        else None
    )
    folders.convert(
        folders.Request(sources=(base.folder, *student.sources), out=tmp_path / "student")
    )
    held = model_folder.opened(tmp_path / "student")
    assert (held.folder / "text.safetensors").samefile(base.folder / "text.safetensors")
    assert not (held.folder / "dit.safetensors").samefile(base.folder / "dit.safetensors")
    assert (held.folder / "tokenizer.json").is_file()
    assert held.parts["dit"]["blocks/attn/q/kernel"].dtype.name == "bfloat16"
    assert held.experiment.codec == base.experiment.codec


# Number formats


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_part_is_cast_when_asked(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(writing, "LARGE", 0)
    done, held = converted(tmp_path, "original_folder", dtype=dtype)
    assert {row.dtype for row in done.rows} == {dtype}
    exporting.to_torch(held.folder, tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    theirs = LAYOUTS["original_folder"](tmp_path, "float32").expected
    assert_same(
        back, {name: value.astype(convert_layouts.DTYPES[dtype]) for name, value in theirs.items()}
    )


def test_a_model_folder_is_cast_when_asked(tmp_path):
    _, base = converted(tmp_path / "a", "original_file")
    folders.convert(
        folders.Request(sources=(base.folder,), out=tmp_path / "half", dtype="bfloat16")
    )
    held = model_folder.opened(tmp_path / "half")
    assert {tensor.dtype.name for tensor in held.part("dit").values()} == {"bfloat16"}


# LoRA


def test_a_lora_is_merged_into_a_model_folder(tmp_path):
    _, base = converted(tmp_path / "a", "original_file")
    pairs = convert_layouts.lora()
    save_file(convert_layouts.peft(pairs), tmp_path / "lora.safetensors")
    folders.convert(
        folders.Request(sources=(base.folder, tmp_path / "lora.safetensors"), out=tmp_path / "more")
    )
    exporting.to_torch(tmp_path / "more", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    theirs = convert_layouts.merged(convert_layouts.dit(), pairs, 1.0)
    assert back.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(back[name], value, rtol=1e-5, atol=1e-5)


def test_a_strength_that_is_not_used_is_told(tmp_path):
    done, _ = converted(tmp_path, "lora_that_says_how_strong", lora_alpha=5.0)
    assert any("--lora-alpha 5.0 is not used" in note for note in done.notes)


# The part that has no original


def test_the_shipped_model_goes_there_and_back(tmp_path):
    from packforcing_jax.sampling import pipeline

    parts = exporting.to_torch(pipeline.SHIPPED, tmp_path / "stage.safetensors")
    assert (
        parts["compressor"]["compressor.convs.1.weight"].shape[0]
        == model_folder.opened(pipeline.SHIPPED).experiment.compressor.channels[1]
    )
    folders.convert(
        folders.Request(
            sources=(tmp_path / "stage.safetensors",),
            out=tmp_path / "stage",
            config="stage",
            tokenizer=pipeline.SHIPPED / "tokenizer.json",
        )
    )
    ours = model_folder.opened(tmp_path / "stage")
    theirs = model_folder.opened(pipeline.SHIPPED)
    assert ours.parts.keys() == theirs.parts.keys()
    for part, held in theirs.parts.items():
        assert ours.part(part).keys() == held.keys()
        for path, tensor in held.items():
            assert np.array_equal(bits(tensor.read()), bits(ours.part(part)[path].read())), path
    assert ours.experiment.dit == theirs.experiment.dit
    assert ours.experiment.compressor == theirs.experiment.compressor


@pytest.mark.parametrize("part", ["dit", "compressor", "text"])
def test_one_part_can_be_written_alone(tmp_path, part):
    from packforcing_jax.sampling import pipeline

    parts = exporting.to_torch(pipeline.SHIPPED, tmp_path / "one.safetensors", part)
    assert list(parts) == [part]
    assert load_file(tmp_path / "one.safetensors").keys() == parts[part].keys()
