"""Two models are one only if every byte of their weights is, whatever their files are called and how old they are."""

import dataclasses
import json
import os
import shutil

import convert_layouts
import jax
import numpy as np
import pytest
from convert_layouts import put
from packforcing_jax.convert import folders
from safetensors.numpy import load_file, save_file

from packforcing_jax.io import identity, model_folder, text_encoder
from packforcing_jax.sampling import state_folder
from packforcing_jax.sampling.pipeline import Pipeline

SETS = ("dit.heads=3",)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def converted(folder, tensors, *others):
    path = put(folder / "wan.safetensors", tensors)
    request = folders.Request(sources=(path, *others), out=folder / "model", overrides=SETS)
    folders.convert(request)
    return folder / "model"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("model"), convert_layouts.dit())


def changed(folder, part, path, at=0):
    """The folder with one number of one array replaced."""
    file = folder / model_folder.weights_file(part)
    held = load_file(file)
    value = held[path].copy()
    value.reshape(-1)[at] += 1
    save_file(held | {path: value}, file)


def test_the_manifest_has_the_identity_of_the_folder(model):
    manifest = json.loads((model / "manifest.json").read_text())
    assert manifest["identity"] == identity.of_folder(model) == model_folder.opened(model).identity
    assert [each["file"] for each in manifest["files"]] == ["dit.safetensors"]


def test_every_array_counts(model, tmp_path):
    seen = {identity.of_folder(model)}
    paths = list(load_file(model / "dit.safetensors"))
    for number, path in enumerate(paths):
        folder = shutil.copytree(model, tmp_path / str(number))
        changed(folder, "dit", path, at=-1)
        seen.add(identity.of_folder(folder))
    assert len(seen) == len(paths) + 1


def test_a_merged_lora_is_another_model(model, tmp_path):
    pairs = convert_layouts.lora(modules=("blocks.1.self_attn.q",))
    lora = put(tmp_path / "lora.safetensors", convert_layouts.peft(pairs))
    merged = converted(tmp_path, convert_layouts.dit(), lora)
    assert identity.of_folder(merged) != identity.of_folder(model)


def test_a_copy_is_the_same_model(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "copy", copy_function=shutil.copyfile)
    assert identity.of_folder(folder) == identity.of_folder(model)
    (folder / "manifest.json").unlink()
    assert identity.of_folder(folder) == identity.of_folder(model)


def test_the_same_weights_converted_twice_are_the_same_model(model, tmp_path):
    again = converted(tmp_path, convert_layouts.dit())
    assert identity.of_folder(again) == identity.of_folder(model)


def test_another_tokenizer_is_another_model(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "copy")
    convert_layouts.put_tokenizer(folder / "tokenizer.json")
    assert identity.of_folder(folder) != identity.of_folder(model)


def test_a_large_file_is_taken_at_its_record_until_size_or_time_differ(
    model, tmp_path, monkeypatch
):
    monkeypatch.setattr(identity, "SMALL", 0)
    identity._read.cache_clear()
    folder = shutil.copytree(model, tmp_path / "copy")
    monkeypatch.setattr(identity, "_sha256", lambda path: pytest.fail(f"{path} was read"))
    assert identity.of_folder(folder) == identity.of_folder(model)
    read = []
    monkeypatch.setattr(identity, "_sha256", lambda path: read.append(path.name) or "0" * 64)
    os.utime(folder / "dit.safetensors", ns=(0, 10**18))
    assert identity.of_folder(folder) != identity.of_folder(model)
    assert read == ["dit.safetensors"]


def record_of_another_hash(manifest):
    manifest["files"][0]["sha256"] = "0" * 64


def record_that_is_none(manifest):
    manifest["files"] = 3


def record_of_a_path(manifest):
    manifest["files"][0]["sha256"] = ["../x"]


@pytest.mark.parametrize(
    "change",
    [record_of_another_hash, record_that_is_none, record_of_a_path],
    ids=lambda f: f.__name__,
)
def test_a_record_that_contradicts_itself_is_not_believed(change, model, tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "SMALL", 0)
    folder = shutil.copytree(model, tmp_path / "copy")
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert identity.of_folder(folder) == identity.of_folder(model)


def test_saving_keeps_the_identity_too(tmp_path):
    exp = model_folder.opened(model_folder_of(tmp_path)).experiment
    model_folder.save(tmp_path / "a", exp, {"dit": {"x": np.zeros(9000, np.float32)}})
    model_folder.save(tmp_path / "b", exp, {"dit": {"x": np.eye(1, 9000, 8999, np.float32)[0]}})
    for name in "ab":
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        assert manifest["identity"] == identity.of_folder(tmp_path / name)
    assert identity.of_folder(tmp_path / "a") != identity.of_folder(tmp_path / "b")


def model_folder_of(tmp_path):
    return converted(tmp_path / "wan", convert_layouts.dit())


def test_text_states_of_encoders_that_differ_in_one_number_are_kept_apart(tmp_path):
    path = put(tmp_path / "t5.safetensors", convert_layouts.umt5())
    folders.convert(folders.Request(sources=(path,), out=tmp_path / "model"))
    other = shutil.copytree(tmp_path / "model", tmp_path / "other")
    changed(other, "text", "embedding/embedding", at=-1)
    models = [model_folder.opened(folder) for folder in (tmp_path / "model", other)]
    encoders = [
        text_encoder.of_folder(each, each.experiment.text, each.experiment.dtypes)
        for each in models
    ]
    assert text_encoder.identity(encoders[0]) != text_encoder.identity(encoders[1])


# What a run keeps of the model that made it


@pytest.mark.parametrize("part", ["dit", "compressor", "text"])
def test_a_run_tells_models_apart_by_any_array_of_any_part(part, folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    path = sorted(load_file(other / model_folder.weights_file(part)))[1]
    changed(other, part, path)
    digests = [state_folder.digest(Pipeline.from_pretrained(each)) for each in (folder, other)]
    assert digests[0] != digests[1]
    assert digests[0] == state_folder.digest(
        Pipeline.from_pretrained(folder, overrides=["cache.top=1"])
    )


def test_a_run_knows_networks_in_memory_by_every_array(folder):
    pipe = Pipeline.from_pretrained(folder)
    leaves, form = jax.tree.flatten(pipe.nets)
    held = dataclasses.replace(pipe, origin=None)
    seen = {state_folder.digest(held)}
    for at in (0, len(leaves) // 2, len(leaves) - 1):
        nets = jax.tree.unflatten(
            form, [leaf + (number == at) for number, leaf in enumerate(leaves)]
        )
        seen |= {state_folder.digest(dataclasses.replace(each, nets=nets)) for each in (pipe, held)}
    assert len(seen) == 4


def test_settings_keep_the_model(folder):
    pipe = Pipeline.from_pretrained(folder)
    assert state_folder.digest(pipe.with_settings(["cache.top=1"])) == state_folder.digest(pipe)


@pytest.fixture
def large(model, tmp_path, monkeypatch):
    """A copy of the folder without a record, all of whose files count as large, beside an empty cache."""
    monkeypatch.setattr(identity, "SMALL", 0)
    folder = shutil.copytree(model, tmp_path / "copy")
    (folder / "manifest.json").unlink()
    identity._read.cache_clear()
    return folder


def test_a_large_file_without_a_record_is_read_once(large, model, monkeypatch):
    first = identity.of_folder(large)
    assert first == identity.of_folder(model)
    identity._read.cache_clear()
    monkeypatch.setattr(identity, "_sha256", lambda path: pytest.fail(f"{path} was read again"))
    assert identity.of_folder(large) == first


def test_a_cache_that_is_damaged_or_cannot_be_written_is_done_without(large, tmp_path, model):
    first = identity.of_folder(large)
    for file in (tmp_path / "cache").rglob("*.txt"):
        file.write_bytes(b"\xff not a hash")
    identity._read.cache_clear()
    assert identity.of_folder(large) == first
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("no folder")
    identity._read.cache_clear()
    assert identity.of_folder(large) == first
