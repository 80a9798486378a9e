"""What does not fit is refused in one sentence with exit code 2, and nothing is left behind."""

import functools
import json
import os
import re
import struct
from collections.abc import Callable

import convert_layouts
import numpy as np
import pytest
import torchfiles
from convert_layouts import dit, put, put_json, put_shards, put_tokenizer, umt5, vae
from packforcing_jax.convert import exporting, folders
from safetensors.numpy import load_file, save_file

from packforcing_jax.cli import main
from packforcing_jax.errors import InputError

Case = tuple[list, str]  # words behind `convert`, what the sentence says
CASES: dict[str, Callable] = {}
FEW = np.ones(2, np.float32)


def case(build):
    CASES[build.__name__] = build
    return build


def changed(tensors, **changes):
    """`tensors` with some values changed; None takes one away. A name has `__` for a dot."""
    out = dict(tensors)
    for name, value in changes.items():
        out[name.replace("__", ".")] = value
    return {name: value for name, value in out.items() if value is not None}


def spoilt(tensors, name, value):
    """`tensors` with one element of one of them replaced."""
    copy = tensors[name].copy()
    copy.reshape(-1)[-1] = value
    return tensors | {name: copy}


def wan(tmp, tensors, *others, name="wan.safetensors"):
    """The words that convert a network, and `others`."""
    return [put(tmp / name, tensors), *others, "--set", "dit.heads=3"]


# Tensors that do not fit


@case
def a_missing_tensor(tmp):
    return wan(tmp, changed(dit(), head__head__bias=None)), "1 missing: dit/head/bias;"


@case
def a_missing_tensor_of_one_layer(tmp):
    return wan(
        tmp, changed(dit(), blocks__1__norm3__weight=None)
    ), r"1 missing: dit/blocks/norm3/scale of layers \[1\]"


@case
def a_missing_layer(tmp):
    held = {name: value for name, value in dit().items() if not name.startswith("blocks.1.")}
    return wan(tmp, held), r"27 missing: .*dit/blocks/\S+ of layers \[1\]"


@case
def an_extra_tensor(tmp):
    return wan(tmp, changed(dit(), blocks__2__gate__weight=FEW)), "1 unknown to the table: blocks.2"


@case
def an_endless_layer(tmp):
    held = changed(dit(), blocks__9999__norm3__bias=np.ones(30, np.float32))
    return wan(tmp, held), "dit.layers=10000 is out of range"


@case
def a_layer_spelt_twice(tmp):
    return wan(
        tmp, changed(dit(), blocks__01__norm3__bias=np.ones(30, np.float32))
    ), "unknown to the table: blocks.01"


@case
def a_tensor_named_twice(tmp):
    held = {"model.head.head.bias": dit()["head.head.bias"]}
    return wan(tmp, dit() | held), "1 named twice: model.head.head.bias of .* and head.head.bias"


@case
def a_tensor_named_twice_behind_prefixes(tmp):
    held = dit() | {"_fsdp_wrapped_module.patch_embedding.bias": np.zeros(30, np.float32)}
    return wan(
        tmp, {"generator": held}, name="raw.pt"
    ), "1 named twice: .*patch_embedding.bias of raw.pt and"


@case
def two_files_with_one_network(tmp):
    words = [put(tmp / "a.safetensors", dit()), put(tmp / "b.safetensors", dit(seed=1))]
    return words, r"96 named twice: \S+ of b.safetensors and \S+ of a.safetensors"


@case
def a_transposed_tensor(tmp):
    held = changed(dit(), blocks__0__ffn__0__weight=np.ones((30, 44), np.float32))
    return wan(
        tmp, held
    ), r"shape: blocks.0.ffn.0.weight \(30, 44\), as \(44, 30\), expected \(30, 44\)"


@case
def a_tensor_of_another_rank(tmp):
    return wan(
        tmp, changed(dit(), head__modulation=np.ones((2, 30), np.float32))
    ), r"another rank or shape: head.modul"


@case
def a_wrong_patch(tmp):
    held = changed(dit(), patch_embedding__weight=np.ones((30, 4, 1, 2), np.float32))
    return wan(tmp, held), "rank or shape: patch_embedding.weight"


@case
def a_value_that_is_no_number(tmp):
    return wan(
        tmp, spoilt(dit(), "blocks.2.ffn.2.weight", np.nan)
    ), "1 not finite: blocks.2.ffn.2.weight; fetch the file again, as its numbers are damaged.$"


@case
def an_infinite_value_in_half_precision(tmp):
    return wan(
        tmp, spoilt(dit("bfloat16"), "head.head.bias", np.inf)
    ), "1 not finite: head.head.bias"


@case
def a_value_too_large_for_the_format(tmp):
    words = wan(tmp, spoilt(dit(), "head.head.bias", 1e6))
    return [*words, "--dtype", "float16"], "1 too large for float16: head.head.bias"


@case
def layers_of_two_formats(tmp):
    held = changed(dit(), blocks__1__norm3__bias=np.ones(30, np.float16))
    return wan(
        tmp, held
    ), r"1 of another dtype than its other layers: blocks.1.norm3.bias \(float16\)"


@case
def whole_numbers(tmp):
    held = changed(dit(), head__head__bias=np.ones(24, np.int32))
    return wan(tmp, held), r"1 of whole numbers: head.head.bias \(int32\)"


@case
def everything_at_once(tmp):
    held = changed(
        spoilt(dit(), "head.head.weight", np.nan),
        text_embedding__0__bias=None,
        novel=FEW,
        blocks__0__modulation=np.ones((6, 30), np.float32),
    )
    broken = spoilt(vae(), "conv1.bias", np.inf)
    others = put(tmp / "vae.pth", broken), put(tmp / "t5.pth", changed(umt5(), norm__weight=None))
    wrong = (
        "unknown to the table: novel",
        "missing: .*text_in/bias",
        "missing: .*text/norm/scale",
        "shape: blocks.0.modulation",
        "not finite: .*head.head.weight",
        "not finite: .*conv1.bias",
    )
    return wan(tmp, held, *others), "".join(f"(?=.*{each})" for each in wrong)


# Other models and other files


@case
def image_to_video(tmp):
    held = dit() | {"img_emb.proj.0.bias": FEW}
    return wan(tmp, held), r"is an image-to-video model \(it has img_emb.proj.0.bias\)"


@case
def image_to_video_by_its_attention(tmp):
    held = dit() | {"blocks.0.cross_attn.k_img.weight": np.ones((30, 30), np.float32)}
    return wan(tmp, {"generator": held}, name="i2v.pt"), "is an image-to-video model"


@case
def image_to_video_by_its_settings(tmp):
    put(tmp / "Wan" / "a.safetensors", dit())
    put_json(tmp / "Wan" / "config.json", convert_layouts.SIZES | {"model_type": "i2v"})
    return [tmp / "Wan"], "model_type='i2v' is not Wan2.1's text-to-video network"


@case
def another_kind_of_model(tmp):
    held = {f"h.{layer}.mlp.weight": np.ones((4, 3), np.float32) for layer in range(20)}
    return [
        put(tmp / "gpt.safetensors", held)
    ], r"holds no network of Wan2.1 \(its tensors are called h.0"


@case
def another_autoencoder(tmp):
    held = {
        f"encoder.down.{i}.block.0.conv1.weight": np.ones((4, 3, 3, 3), np.float32)
        for i in range(4)
    }
    held |= {"encoder.conv_in.weight": np.ones((4, 3, 3, 3), np.float32)}
    return [
        put(tmp / "sd.safetensors", held)
    ], r"(?=.*4 unknown to the table)(?=.*missing: .*codec/)"


@case
def a_part_of_a_model_folder_alone(tmp):
    return [
        put(tmp / "dit.safetensors", {"head/bias": np.ones(3, np.float32)})
    ], "give the model folder"


@case
def a_file_of_an_unknown_type(tmp):
    (tmp / "wan.npz").write_bytes(b"PK")
    return [tmp / "wan.npz"], "wan.npz is of a type that is not known; known are .safetensors"


@case
def a_folder_without_weights(tmp):
    (tmp / "empty").mkdir()
    (tmp / "empty" / "README.md").write_text("soon")
    return [tmp / "empty"], "empty holds no weights; known are"


@case
def a_path_that_is_not_there(tmp):
    return [tmp / "absent"], "absent does not exist"


@case
def a_pipe(tmp):
    os.mkfifo(tmp / "model.pt")
    return [tmp / "model.pt"], "does not exist; give a file or a folder"


@case
def a_pipe_in_a_folder(tmp):
    (tmp / "weights").mkdir()
    os.mkfifo(tmp / "weights" / "model.pt")
    return [tmp / "weights"], "model.pt is no file"


@case
def a_truncated_file(tmp):
    path = put(tmp / "wan.safetensors", dit())
    path.write_bytes(path.read_bytes()[:-40])
    return [path], "is damaged"


@case
def a_program_in_a_pickle(tmp):
    path = torchfiles.save(tmp / "evil.pt", {"generator": torchfiles.Named("os", "system")})
    return [path], "names os.system"


@case
def several_networks_without_a_choice(tmp):
    content = {"teacher": dit(), "student": dit(seed=1)}
    return [
        put(tmp / "two.pt", content)
    ], r"several networks \(student, teacher\); choose one with --network NAME"


@case
def a_network_that_is_not_there(tmp):
    words = [
        put(tmp / "dmd.pt", {"generator": dit(), "critic": dit(seed=1)}),
        "--network",
        "teacher",
    ]
    return words, "no source has a network called 'teacher'; they have critic, generator"


@case
def a_twin_that_is_another(tmp):
    text = convert_layouts.as_transformers(umt5())
    text["encoder.embed_tokens.weight"] = text["shared.weight"] + 1
    return [
        put(tmp / "t5.safetensors", text)
    ], "1 unlike shared.weight: encoder.embed_tokens.weight"


# Settings


@case
def settings_of_another_size(tmp):
    put(tmp / "Wan" / "a.safetensors", dit())
    put_json(tmp / "Wan" / "config.json", convert_layouts.SIZES | {"ffn_dim": 52})
    return [tmp / "Wan"], r"9 of another rank or shape: .*blocks.0.ffn.0.weight \(44, 30\)"


@case
def settings_that_are_no_sizes(tmp):
    put(tmp / "Wan" / "a.safetensors", dit())
    put_json(tmp / "Wan" / "config.json", convert_layouts.SIZES | {"num_layers": 10**9})
    return [tmp / "Wan"], "say num_layers=1000000000, which cannot be"


@case
def settings_that_are_no_json(tmp):
    put(tmp / "Wan" / "a.safetensors", dit())
    (tmp / "Wan" / "config.json").write_text("[" * 100_000)
    return [tmp / "Wan"], "config.json is damaged"


@case
def a_codec_of_other_channels(tmp):
    return wan(
        tmp, dit(channels=5), put(tmp / "vae.pth", vae())
    ), "codec.z_dim=4 differs from dit.in_channels=5"


# LoRA


def _lora(tmp, named):
    return wan(tmp, dit(), put(tmp / "lora.safetensors", named))


@case
def a_lora_alone(tmp):
    return [
        put(tmp / "lora.safetensors", convert_layouts.peft(convert_layouts.lora()))
    ], "give the base checkpoint"


@case
def a_lora_for_a_weight_that_is_not_there(tmp):
    named = {
        "blocks.7.self_attn.q.lora_A.weight": np.ones((2, 30), np.float32),
        "blocks.7.self_attn.q.lora_B.weight": np.ones((30, 2), np.float32),
    }
    return _lora(tmp, named), "2 added to no weight: blocks.7"


@case
def half_a_lora(tmp):
    named = {"blocks.1.self_attn.q.lora_A.weight": np.ones((2, 30), np.float32)}
    return _lora(
        tmp, named
    ), "1 without the other half of the addition: blocks.1.self_attn.q.lora_A.weight"


@case
def a_lora_of_another_width(tmp):
    named = {
        "blocks.1.self_attn.q.lora_A.weight": np.ones((2, 31), np.float32),
        "blocks.1.self_attn.q.lora_B.weight": np.ones((30, 2), np.float32),
    }
    return _lora(tmp, named), r"1 added to a weight of another shape: .*expected \(30, 30\)"


@case
def a_lora_that_is_no_number(tmp):
    named = convert_layouts.peft(convert_layouts.lora())
    return _lora(
        tmp, spoilt(named, next(iter(named)), np.nan)
    ), "not finite: base_model.model.blocks.0.*lora_A"


@case
def a_lora_with_magnitudes(tmp):
    named = convert_layouts.peft(convert_layouts.lora())
    named["base_model.model.blocks.0.self_attn.q.lora_magnitude_vector"] = np.ones(30, np.float32)
    return _lora(
        tmp, named
    ), r"lora.safetensors is DoRA \(it has .*lora_magnitude_vector\); merge it into its base"


# Shards


def _shards(tmp, change):
    put_shards(tmp / "Wan", "model", dit())
    index = tmp / "Wan" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    return [tmp / "Wan"]


@case
def a_shard_that_is_not_there(tmp):
    words = _shards(tmp, lambda names: None)
    (tmp / "Wan" / "model-00002-of-00002.safetensors").unlink()
    return words, "names model-00002-of-00002.safetensors, which is missing"


@case
def a_tensor_in_two_shards(tmp):
    words = _shards(tmp, lambda names: None)
    second = tmp / "Wan" / "model-00002-of-00002.safetensors"
    save_file(load_file(second) | {"blocks.0.cross_attn.k.bias": np.ones(30, np.float32)}, second)
    return words, r"do not agree on 1 tensors \(blocks.0.cross_attn.k.bias\)"


@case
def a_tensor_that_only_the_index_has(tmp):
    words = _shards(tmp, lambda names: names.update(novel="model-00001-of-00002.safetensors"))
    return words, r"do not agree.*\(novel\)"


@case
def a_shard_outside_of_the_folder(tmp):
    put(tmp / "secret.safetensors", dit())
    return _shards(
        tmp, lambda names: names.update(novel="../secret.safetensors")
    ), "no weights file of its own folder"


@case
def a_shard_somewhere_on_the_machine(tmp):
    path = put(tmp / "secret.safetensors", dit())
    return _shards(
        tmp, lambda names: names.update(novel=str(path))
    ), "no weights file of its own folder"


@case
def a_shard_of_another_type(tmp):
    return _shards(
        tmp, lambda names: names.update(novel="config.json")
    ), "names the file 'config.json'"


@case
def an_index_that_lists_nothing(tmp):
    (tmp / "Wan").mkdir()
    put_json(tmp / "Wan" / "model.safetensors.index.json", {"weight_map": {}})
    return [tmp / "Wan"], r"is damaged \(no weight_map"


# Links


@case
def a_link_out_of_the_folder(tmp):
    path = put(tmp / "elsewhere" / "wan.safetensors", dit())
    (tmp / "Wan").mkdir()
    os.symlink(path, tmp / "Wan" / "wan.safetensors")
    return [tmp / "Wan"], "wan.safetensors is a symbolic link that leads out of"


@case
def a_linked_part_of_a_pipeline(tmp):
    put(tmp / "elsewhere" / "wan.safetensors", dit())
    (tmp / "Wan").mkdir()
    os.symlink("../elsewhere", tmp / "Wan" / "transformer")
    return [tmp / "Wan"], "is a symbolic link that leads out of"


@case
def linked_settings(tmp):
    put(tmp / "Wan" / "wan.safetensors", dit())
    os.symlink(put_json(tmp / "config.json", convert_layouts.SIZES), tmp / "Wan" / "config.json")
    return [tmp / "Wan"], "config.json is a symbolic link that leads out of"


@case
def a_linked_tokenizer(tmp):
    put(tmp / "Wan" / "wan.safetensors", dit())
    os.symlink(put_tokenizer(tmp / "elsewhere.json"), tmp / "Wan" / "tokenizer.json")
    return [tmp / "Wan"], "tokenizer.json is a symbolic link that leads out of"


@case
def a_cache_whose_blobs_lead_away(tmp):
    put(tmp / "elsewhere" / "x.safetensors", dit())
    snapshot = tmp / "repository" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    os.symlink(tmp / "elsewhere", tmp / "repository" / "blobs")
    os.symlink("../../blobs/x.safetensors", snapshot / "wan.safetensors")
    return [snapshot], "is a symbolic link that leads out of"


@case
def a_dangling_link(tmp):
    (tmp / "Wan").mkdir()
    os.symlink("absent.safetensors", tmp / "Wan" / "wan.safetensors")
    return [tmp / "Wan"], "wan.safetensors is no file"


# The rest of the request


@case
def a_tokenizer_that_is_none(tmp):
    return [*wan(tmp, dit()), "--tokenizer", put_json(tmp / "tokenizer.json", {})], "tokenizer"


@case
def a_setting_that_is_unknown(tmp):
    return [*wan(tmp, dit()), "--set", "dit.head=3"], "did you mean dit.heads"


@case
def an_unknown_experiment(tmp):
    return [*wan(tmp, dit()), "--config", "wan_t2v_1_3"], "did you mean wan_t2v_1_3b"


@case
def a_part_without_a_file_for_torch(tmp):
    return [*wan(tmp, dit()), "--part", "dit"], "--part goes with --to-torch"


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_in_one_sentence_and_nothing_is_left(name, tmp_path, capsys, monkeypatch):
    sources = tmp_path / "in"
    sources.mkdir()
    words, sentence = CASES[name](sources)
    (tmp_path / "out").mkdir()
    assert main.main(["convert", *map(str, words), "--out", str(tmp_path / "out" / "model")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    told = [line for line in said.err.splitlines() if line.startswith("packforcing: ")]
    assert len(told) == 1
    assert re.search(sentence, told[0]), told[0]
    assert told[0][-1] in ".?"
    assert len(told[0]) < 2500
    assert list((tmp_path / "out").iterdir()) == []


# Where it is written


@pytest.fixture
def model(tmp_path):
    """A model folder."""
    path = put(tmp_path / "wan.safetensors", dit())
    folders.convert(
        folders.Request(sources=(path,), out=tmp_path / "model", overrides=("dit.heads=3",))
    )
    return tmp_path / "model"


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("out", ["model", "model/inner", "."])
def test_a_source_is_never_written_to(model, out):
    before = contents(model)
    with pytest.raises(InputError, match="lie in each other"):
        folders.convert(folders.Request(sources=(model,), out=model.parent / out))
    assert contents(model) == before


def test_a_folder_of_something_else_is_not_replaced(model):
    (model.parent / "photos").mkdir()
    (model.parent / "photos" / "cat.png").write_bytes(b"cat")
    with pytest.raises(InputError, match="is not a model folder"):
        folders.convert(folders.Request(sources=(model,), out=model.parent / "photos"))
    assert contents(model.parent / "photos").keys() == {
        model.joinpath("cat.png").relative_to(model)
    }


def test_a_model_folder_is_replaced_only_when_all_went_well(model, tmp_path):
    before = contents(model)
    path = put(tmp_path / "broken.safetensors", spoilt(dit(seed=1), "head.head.bias", np.nan))
    request = functools.partial(folders.Request, out=model, overrides=("dit.heads=3",))
    with pytest.raises(InputError, match="not finite"):
        folders.convert(request(sources=(path,)))
    assert contents(model) == before
    folders.convert(request(sources=(put(path, dit(seed=1)),)))
    assert contents(model) != before
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "broken.safetensors",
        "model",
        "wan.safetensors",
    ]


def test_two_model_folders_with_one_part_are_refused(model, tmp_path):
    folders.convert(folders.Request(sources=(model,), out=tmp_path / "twin"))
    with pytest.raises(InputError, match="all hold the part dit"):
        folders.convert(folders.Request(sources=(model, tmp_path / "twin"), out=tmp_path / "both"))
    assert not (tmp_path / "both").exists()


def test_a_model_folder_with_a_link_out_of_it_is_refused(model, tmp_path):
    (model / "dit.safetensors").rename(tmp_path / "moved.safetensors")
    os.symlink(tmp_path / "moved.safetensors", model / "dit.safetensors")
    with pytest.raises(InputError, match="leads out of"):
        folders.convert(folders.Request(sources=(model,), out=tmp_path / "more"))
    with pytest.raises(InputError, match="leads out of"):
        exporting.to_torch(model, tmp_path / "back.safetensors")


def test_a_damaged_model_folder_is_not_taken_over(model, tmp_path):
    held = load_file(model / "dit.safetensors")
    save_file(spoilt(held, "head/bias", np.inf), model / "dit.safetensors")
    with pytest.raises(InputError, match="1 not finite: head/bias"):
        folders.convert(folders.Request(sources=(model,), out=tmp_path / "more"))
    with pytest.raises(InputError, match="1 not finite: head.head.bias"):
        exporting.to_torch(model, tmp_path / "back.safetensors")
    save_file(changed(held, **{"head/bias": None}), model / "dit.safetensors")
    with pytest.raises(InputError, match="1 missing: dit/head/bias"):
        exporting.to_torch(model, tmp_path / "back.safetensors")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["model", "wan.safetensors"]


# Back to torch


@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("back.pt", "must end in .safetensors"),
        ("absent/back.safetensors", "does not exist"),
        ("model/dit.safetensors", "lies in the model folder"),
        ("notes.safetensors", "is no safetensors file"),
        ("folder.safetensors", "is a folder"),
    ],
)
def test_nothing_else_is_overwritten(model, tmp_path, out, sentence):
    (tmp_path / "notes.safetensors").write_text("not weights at all")
    (tmp_path / "folder.safetensors").mkdir()
    before = contents(tmp_path)
    with pytest.raises(InputError, match=sentence):
        exporting.to_torch(model, tmp_path / out)
    assert contents(tmp_path) == before


def test_an_earlier_result_is_replaced(model, tmp_path):
    put(tmp_path / "back.safetensors", {"old": np.ones(3, np.float32)})
    exporting.to_torch(model, tmp_path / "back.safetensors")
    assert load_file(tmp_path / "back.safetensors").keys() == dit().keys()


def test_a_part_that_is_not_there_is_refused(model, tmp_path):
    with pytest.raises(InputError, match="has no codec.safetensors"):
        exporting.to_torch(model, tmp_path / "back.safetensors", "codec")
    with pytest.raises(InputError, match="does not exist"):
        exporting.to_torch(tmp_path / "absent", tmp_path / "back.safetensors")


def test_the_headers_of_what_is_written_are_plain(model, tmp_path):
    exporting.to_torch(model, tmp_path / "back.safetensors")
    data = (tmp_path / "back.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert json.loads(data[8 : 8 + length])["__metadata__"] == {"format": "pt"}
