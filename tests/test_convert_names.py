"""Whatever names and wrappings people's files have, the tensors that come of them are those of the plain file."""

import functools
import json
import re

import convert_layouts
import ml_dtypes
import numpy as np
import pytest
import torchfiles
from convert_layouts import DIFFUSERS_DIT, dit, prefixed, put, put_json, umt5, vae
from packforcing_jax.convert import folders, names, wan_dit
from safetensors.numpy import load_file, save_file

from packforcing_jax.cli import main
from packforcing_jax.errors import InputError

SETS = ("dit.heads=3",)


def converted(out, *sources, **request):
    """(what was said, the arrays of every part by file) of a conversion."""
    done = folders.convert(
        folders.Request(sources=sources, out=out, **{"overrides": SETS, **request})
    )
    return done.notes, {path.name: load_file(path) for path in sorted(out.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The arrays that the plain files of all three networks become."""
    tmp = tmp_path_factory.mktemp("plain")
    files = [
        put(tmp / f"{name}.safetensors", held)
        for name, held in (("dit", dit()), ("vae", vae()), ("t5", umt5()))
    ]
    return converted(tmp / "model", *files)[1]


def assert_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape), name
        assert ours[name].tobytes() == value.tobytes(), name


def refused(capsys, *words):
    """The one sentence with which `packforcing convert WORDS` ends."""
    assert main.main(["convert", *map(str, words), "--set", SETS[0]]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("packforcing")]
    assert len(said) == 1
    return said[0]


def served(tensors):
    """Names as serving engines' own classes of the network have them."""
    module = re.compile(r"(.+)(\.weight|\.bias)")
    rows = dict(wan_dit.SERVED)

    def renamed(name):
        hit = module.fullmatch(name)
        stem, leaf = (hit[1], hit[2]) if hit else (name, "")
        layer = re.match(r"blocks\.(\d+)\.", stem)
        known = re.sub(r"^blocks\.\d+\.", "blocks.{}.", stem)
        return rows[known].format(layer[1] if layer else "") + leaf

    return {renamed(name): value for name, value in tensors.items()}


# Transformers


def nested(*words):
    """A file of torch.save whose tables lie inside each other."""
    return lambda tensors: functools.reduce(lambda inner, word: {word: inner}, words[::-1], tensors)


WRAPPED = {
    "generator.model.": "m.safetensors",
    "generator_ema.": "m.safetensors",
    "generator_ema.model._fsdp_wrapped_module.": "m.safetensors",
    "net.": "m.safetensors",
    "dit.": "m.safetensors",
    "student.": "m.safetensors",
    "student.net.": "m.safetensors",
    "_forward_module.": "m.safetensors",
    "_forward_module.module.model.": "m.bin",
    "module.generator.model.": "m.safetensors",
    "model.diffusion_model.": "m.safetensors",
    "pipe.dit.": "m.safetensors",
    "ema.": "m.safetensors",
    "net_ema.": "m.safetensors",
    "state_dict.generator.": "m.ckpt",
}


@pytest.mark.parametrize("front", WRAPPED)
def test_what_stands_in_front_of_names_is_taken_away(front, tmp_path, plain):
    *words, last = front.split(".")[:-1] if front.startswith("state_dict") else [front]
    held = prefixed("" if words else last, dit())
    file = put(tmp_path / WRAPPED[front], nested(*words, *([last] if words else []))(held))
    _, made = converted(tmp_path / "model", file)
    assert_bits(made["dit.safetensors"], plain["dit.safetensors"])


@pytest.mark.parametrize("suffix", ["ckpt", "pt", "bin"])
def test_a_checkpoint_of_a_training_framework_is_read(suffix, tmp_path, plain):
    content = {
        "epoch": 3,
        "global_step": 12,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": prefixed("model.", dit()),
        "optimizer_states": [{"state": {0: {"exp_avg": np.ones(3, np.float32)}}}],
    }
    notes, made = converted(tmp_path / "model", put(tmp_path / f"last.{suffix}", content))
    assert_bits(made["dit.safetensors"], plain["dit.safetensors"])


@pytest.mark.parametrize("front", ["", "transformer.", "generator_ema."])
@pytest.mark.parametrize("rename", [served, convert_layouts.as_diffusers])
def test_causal_students_in_the_layouts_of_serving_engines(rename, front, tmp_path, plain):
    folder = tmp_path / "Student-Diffusers"
    put(
        folder / "transformer" / "diffusion_pytorch_model.safetensors",
        prefixed(front, rename(dit())),
    )
    settings = {"_class_name": "CausalWanTransformer3DModel", "num_frames_per_block": 3}
    put_json(folder / "transformer" / "config.json", DIFFUSERS_DIT | settings)
    _, made = converted(tmp_path / "model", folder, overrides=())
    assert_bits(made["dit.safetensors"], plain["dit.safetensors"])


def test_served_names_are_those_of_every_tensor():
    assert len(set(served(dit()))) == len(dit())
    assert "blocks.2.self_attn_residual_norm.norm.bias" in served(dit())


def test_a_prefix_of_ones_own_is_taken_away_when_it_is_told(tmp_path, plain, capsys):
    held = prefixed("policy.denoiser7.", dit()) | prefixed("policy.value.", dit(seed=1))
    file = put(tmp_path / "m.safetensors", held)
    said = refused(capsys, file, "--out", tmp_path / "a")
    assert "say with --prefix one of policy.denoiser7., policy.value." in said
    _, made = converted(tmp_path / "model", file, prefix="policy.denoiser7.")
    assert_bits(made["dit.safetensors"], plain["dit.safetensors"])
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    left = [each for each in manifest["ignored"] if "not behind --prefix" in each["reason"]]
    assert len(left) == len(dit())
    nothing = refused(capsys, file, "--prefix", "nope.", "--out", tmp_path / "b")
    assert "begins with --prefix nope.; their names begin with policy" in nothing


def test_a_prefix_reaches_into_tables_and_leaves_other_files_alone(tmp_path, plain):
    student = put(tmp_path / "m.pt", {"policy": {"denoiser7": dit()}, "step": 3})
    codec = put(tmp_path / "vae.safetensors", vae())
    _, made = converted(tmp_path / "model", student, codec, prefix="policy.denoiser7.")
    assert_bits(made["dit.safetensors"], plain["dit.safetensors"])
    assert_bits(made["codec.safetensors"], plain["codec.safetensors"])


# Several networks in one flat file


@pytest.mark.parametrize("network", ["generator", "generator_ema", "critic"])
def test_a_network_of_a_flat_file_is_chosen_and_the_others_are_named(network, tmp_path, plain):
    others = [each for each in ("critic", "generator", "generator_ema") if each != network]
    held = prefixed(f"{network}.model.", dit())
    for seed, other in enumerate(others):
        held |= prefixed(f"{other}.model.", dit(seed=seed + 1))
    file = put(tmp_path / "m.safetensors", held)
    notes, made = converted(tmp_path / "model", file, network=network)
    assert_bits(made["dit.safetensors"], plain["dit.safetensors"])
    assert f"network {network} is taken, as --network says; left out: {', '.join(others)}" in notes
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert manifest["network"] == network
    assert len(manifest["ignored"]) == 2 * len(dit())


def test_a_card_chooses_in_a_flat_file_as_in_a_nested_one(tmp_path, plain):
    held = prefixed("generator.model.", dit()) | prefixed("generator_ema.", dit(seed=1))
    file = put(tmp_path / "causal_forcing.safetensors", held)
    notes, made = converted(tmp_path / "model", file, card="causal-forcing-chunkwise")
    assert_bits(made["dit.safetensors"], plain["dit.safetensors"])
    assert any("generator is taken" in note and "generator_ema" in note for note in notes)


def test_raw_and_average_of_a_flat_file_are_asked_about(tmp_path, capsys):
    for raw, average in (("generator", "generator_ema"), ("student", "student_ema")):
        held = prefixed(f"{raw}.", dit()) | prefixed(f"{average}.", dit(seed=1))
        file = put(tmp_path / f"{raw}.safetensors", held)
        said = refused(capsys, file, "--out", tmp_path / "model")
        assert f"holds both {raw} and {average}" in said
        assert "--card NAME" in said
        assert "--network NAME" in said


def test_the_only_generator_is_taken_aloud(tmp_path, plain):
    held = prefixed("generator.", dit()) | prefixed("fake_score.", dit(seed=1))
    notes, made = converted(tmp_path / "model", put(tmp_path / "m.safetensors", held))
    assert_bits(made["dit.safetensors"], plain["dit.safetensors"])
    assert "network generator is taken; left out: fake_score" in notes


# Other parts


@pytest.mark.parametrize(
    "front", ["vae.", "first_stage_model.", "vae.model.", "first_stage_model.model.", "model."]
)
def test_a_codec_is_found_behind_its_prefix(front, tmp_path, plain):
    _, made = converted(tmp_path / "model", put(tmp_path / "v.safetensors", prefixed(front, vae())))
    assert_bits(made["codec.safetensors"], plain["codec.safetensors"])


TOKENS = {"spiece_model": np.arange(26, dtype=np.uint8)}


def test_a_text_encoder_with_the_bytes_of_its_tokenizer(tmp_path, plain):
    held = convert_layouts.as_transformers(umt5()) | TOKENS
    notes, made = converted(tmp_path / "model", put(tmp_path / "umt5.safetensors", held))
    assert_bits(made["text.safetensors"], plain["text.safetensors"])
    assert any(note.startswith("spiece_model left out") for note in notes)
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert [each["name"] for each in manifest["ignored"]] == ["spiece_model"]


@pytest.mark.parametrize("codec", ["vae.", "first_stage_model."])
@pytest.mark.parametrize("vae_names", [dict, convert_layouts.vae_as_diffusers])
def test_all_parts_in_one_file(codec, vae_names, tmp_path, plain):
    held = {
        **prefixed("model.diffusion_model.", dit()),
        **prefixed(codec, vae_names(vae())),
        **prefixed(
            "text_encoders.umt5xxl.transformer.", convert_layouts.as_transformers(umt5()) | TOKENS
        ),
        "text_encoders.umt5xxl.logit_scale": np.ones((), np.float32),
    }
    _, made = converted(tmp_path / "model", put(tmp_path / "all.safetensors", held))
    assert made.keys() == plain.keys()
    for file, arrays in plain.items():
        assert_bits(made[file], arrays)


def test_all_parts_in_the_tables_of_one_file(tmp_path, plain):
    held = {
        "generator_ema": prefixed("model.", dit()),
        "critic": dit(seed=2),
        "vae": prefixed("model.", vae()),
        "text_encoder": convert_layouts.as_transformers(umt5()),
        "step": 100,
    }
    _, made = converted(tmp_path / "model", put(tmp_path / "all.pt", held))
    for file, arrays in plain.items():
        assert_bits(made[file], arrays)


# Folders


STATE_OF_TRAINERS = (
    "optimizer.bin",
    "optimizer_1.bin",
    "optimizer.pt",
    "scheduler.bin",
    "scheduler.pt",
    "training_args.bin",
    "scaler.pt",
    "rng_state.pth",
    "rng_state_0.pth",
    "random_states_0.pkl",
)


def test_the_state_of_a_trainer_beside_the_model_is_named_and_left_alone(tmp_path, plain):
    folder = tmp_path / "checkpoint-500"
    put(folder / "model.safetensors", dit())
    for name in STATE_OF_TRAINERS:
        (folder / name).write_bytes(b"\x80\x04not a network")
    put_json(folder / "trainer_state.json", {"global_step": 500})
    notes, made = converted(tmp_path / "model", folder)
    assert_bits(made["dit.safetensors"], plain["dit.safetensors"])
    assert any("the state of a trainer" in note for note in notes)
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert {each["file"] for each in manifest["passed_over"]} == {
        f"checkpoint-500/{name}" for name in (*STATE_OF_TRAINERS, "trainer_state.json")
    }


def test_notes_of_macos_are_left_alone_wherever_they_lie(tmp_path, plain):
    folder = tmp_path / "Wan"
    held, _ = convert_layouts.wan_folder(folder, "float32")
    for file in [*folder.rglob("*.*")]:
        if file.is_file():
            (file.parent / f"._{file.name}").write_bytes(b"\0\x05\x16\x07\0\x02\0\0Mac OS X")
    (folder / "._model.safetensors.index.json").write_bytes(b"\0\x05\x16\x07")
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "._x.safetensors").write_bytes(b"\0")
    _, made = converted(tmp_path / "model", folder)
    assert_bits(made["dit.safetensors"], plain["dit.safetensors"])
    assert_bits(made["codec.safetensors"], plain["codec.safetensors"])


def test_a_note_of_macos_that_is_named_itself_is_refused(tmp_path, capsys):
    file = tmp_path / "._m.safetensors"
    file.write_bytes(b"\0\x05\x16\x07\0\x02\0\0Mac OS X")
    said = refused(capsys, file, "--out", tmp_path / "model")
    assert "is a note of macOS" in said
    assert "give m.safetensors" in said


def test_every_file_of_a_folder_is_read_or_named(tmp_path):
    folder = tmp_path / "Wan"
    convert_layouts.wan_folder(folder, "float32")
    put(folder / "image_encoder" / "model.safetensors", {"a": np.ones(3, np.float32)})
    put(folder / "text_encoder_2" / "model.safetensors", {"a": np.ones(3, np.float32)})
    (folder / "wan-Q4_K_M.gguf").write_bytes(b"GGUF")
    (folder / "assets").mkdir()
    (folder / "assets" / "logo.png").write_bytes(b"png")
    notes, _ = converted(tmp_path / "model", folder)
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    told = {each["file"] for each in manifest["sources"]} | {"Wan/config.json", "tokenizer.json"}
    told |= {each["file"] for each in manifest["passed_over"]}
    there = {str(file.relative_to(tmp_path)) for file in folder.rglob("*") if file.is_file()}
    assert there <= told | {"Wan/google/umt5-xxl/tokenizer.json"}
    assert any("image_encoder/model.safetensors" in note for note in notes)
    assert any("wan-Q4_K_M.gguf is passed over: it is GGUF" in note for note in notes)
    assert not any("logo.png" in note for note in notes)


@pytest.mark.parametrize(
    "pair", [("transformer", "transformer_2"), ("high_noise_model", "low_noise_model")]
)
def test_two_transformers_are_not_silently_one(pair, tmp_path, capsys):
    for seed, name in enumerate(pair):
        put(tmp_path / "W" / name / "diffusion_pytorch_model.safetensors", dit(seed=seed))
    put(tmp_path / "W" / "vae" / "v.safetensors", vae())
    said = refused(capsys, tmp_path / "W", "--out", tmp_path / "model")
    assert f"holds 2 transformers ({', '.join(pair)})" in said
    assert str(tmp_path / "W" / pair[0]) in said
    assert not (tmp_path / "model").exists()
    _, made = converted(tmp_path / "model", tmp_path / "W" / pair[0])
    assert "dit.safetensors" in made


def test_weights_that_lie_deeper_are_pointed_at(tmp_path, capsys):
    put(tmp_path / "W" / "checkpoints" / "dmd" / "model.safetensors", dit())
    said = refused(capsys, tmp_path / "W", "--out", tmp_path / "model")
    assert f"{tmp_path / 'W' / 'checkpoints' / 'dmd'}" in said


def test_a_root_of_the_hubs_cache_is_pointed_into(tmp_path, capsys):
    repository = tmp_path / "hub" / "models--Wan-AI--Wan2.1-T2V-1.3B"
    put(repository / "snapshots" / "0a1b" / "m.safetensors", dit())
    (repository / "blobs").mkdir()
    for given in (repository, repository.parent):
        said = refused(capsys, given, "--out", tmp_path / "model")
        assert "look" in said or "snapshots/" in said
        assert str(repository / "snapshots" / "0a1b") in said
    _, made = converted(tmp_path / "model", repository / "snapshots" / "0a1b")
    assert "dit.safetensors" in made


# Numbers of 8 bits


E4M3 = ml_dtypes.float8_e4m3fn
E5M2 = ml_dtypes.float8_e5m2
SAFE = {np.dtype(E4M3): "F8_E4M3", np.dtype(E5M2): "F8_E5M2"}


def put_fp8(path, tensors):
    """A safetensors file that may hold fp8, written byte by byte."""
    header = {}
    body = b""
    for name, value in tensors.items():
        value = np.ascontiguousarray(value)
        code = SAFE.get(value.dtype, "F32" if value.dtype == np.float32 else "U8")
        header[name] = {
            "dtype": code,
            "shape": list(value.shape),
            "data_offsets": [len(body), len(body) + value.nbytes],
        }
        body += value.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def quantised(tensors, dtype, scale, suffix):
    """(the file's tensors, what they stand for in float64) with every linear weight of a block in fp8."""
    file = {}
    exact = {}
    for name, value in tensors.items():
        linear = name.startswith("blocks.") and name.endswith(".weight") and value.ndim == 2
        if not linear:
            file[name] = exact[name] = value
            continue
        factor = scale(value)
        wide = np.asarray(1.0 if factor is None else factor, np.float32)
        by_row = wide.reshape(-1, 1) if wide.size > 1 else wide.reshape(())
        file[name] = (value / by_row).astype(dtype)
        exact[name] = file[name].astype(np.float64) * by_row.astype(np.float64)
        if factor is not None:
            file[name.removesuffix("weight") + suffix] = np.asarray(factor, np.float32)
    return file, exact


def one(value):
    return np.abs(value).max() / 440


def alone(value):
    return np.asarray([np.abs(value).max() / 440])


def by_row(value):
    return np.abs(value).max(1, keepdims=True) / 440


def by_row_flat(value):
    return np.abs(value).max(1) / 440


def without(value):
    return None


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("scale", [one, alone, by_row, by_row_flat, without])
@pytest.mark.parametrize("front", ["", "model.diffusion_model."])
def test_fp8_weights_are_the_numbers_that_they_stand_for(front, scale, suffix, dtype, tmp_path):
    held, exact = quantised(dit(), dtype, scale, suffix)
    held["scaled_fp8"] = np.zeros((0,), dtype)
    held["blocks.0.self_attn.q.scale_input"] = np.ones((), np.float32)
    file = put_fp8(tmp_path / "m.safetensors", prefixed(front, held))
    notes, made = converted(tmp_path / "model", file)
    for name in ("self_attn.q", "ffn.0"):
        path = {"self_attn.q": "attn/q", "ffn.0": "ffn_in"}[name]
        stored = made["dit.safetensors"][f"blocks/{path}/kernel"]
        theirs = np.stack([exact[f"blocks.{layer}.{name}.weight"].T for layer in range(3)])
        error = np.abs(stored.astype(np.float64) - theirs).max()
        assert error <= (0 if scale is without else 1e-6 * np.abs(theirs).max())
        assert stored.dtype == (ml_dtypes.bfloat16 if scale is without else np.float32)
    assert any("are fp8" in note for note in notes)
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    rows = [each["name"] for each in manifest["tensors"] + manifest["ignored"]]
    assert sorted(rows) == sorted(prefixed(front, held))


def test_fp8_of_torch_is_read_too(tmp_path):
    held, exact = quantised(dit(), E4M3, one, "scale_weight")
    bare = {name: value for name, value in held.items() if value.dtype != E4M3}
    eight = {
        name: torchfiles.View(
            torchfiles.Storage(
                value.view(np.uint8).reshape(-1),
                kind=torchfiles.Named("torch.storage", "UntypedStorage"),
            ),
            0,
            value.shape,
            (value.shape[1], 1),
            function="_rebuild_tensor_v3",
            more=(False, {}, torchfiles.Named("torch", "float8_e4m3fn")),
        )
        for name, value in held.items()
        if value.dtype == E4M3
    }
    torchfiles.save(tmp_path / "m.pt", bare | eight)
    _, made = converted(tmp_path / "model", tmp_path / "m.pt")
    stored = made["dit.safetensors"]["blocks/attn/q/kernel"][1].T
    theirs = exact["blocks.1.self_attn.q.weight"]
    np.testing.assert_allclose(stored, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


def test_fp8_is_stored_as_asked(tmp_path):
    held, exact = quantised(dit(), E4M3, one, "scale_weight")
    file = put_fp8(tmp_path / "m.safetensors", held)
    _, made = converted(tmp_path / "model", file, dtype="bfloat16")
    stored = made["dit.safetensors"]["blocks/attn/q/kernel"][0].T
    theirs = exact["blocks.0.self_attn.q.weight"].astype(np.float32).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(stored.astype(np.float32), theirs.astype(np.float32))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"blocks.0.self_attn.q.scale_weight": np.ones((7,), np.float32)},
            "scales of another shape",
        ),
        ({"blocks.9.self_attn.q.scale_weight": np.ones((), np.float32)}, "scales without a weight"),
        (
            {"blocks.0.self_attn.q.weight_scale_inv": np.ones((1, 1), np.float32)},
            "scales of blocks",
        ),
        (
            {"blocks.0.self_attn.q.comfy_quant": np.frombuffer(b'{"format": "nvfp4"}', np.uint8)},
            r"packed in an unknown way: .*nvfp4",
        ),
    ],
)
def test_scales_that_are_not_understood_are_refused(change, sentence, tmp_path, capsys):
    held, _ = quantised(dit(), E4M3, one, "scale_weight")
    file = put_fp8(tmp_path / "m.safetensors", held | change)
    said = refused(capsys, file, "--out", tmp_path / "model")
    assert re.search(sentence, said)
    assert "fetch the checkpoint in bfloat16" in said


# Blocks of two formats


def test_blocks_of_two_formats_are_converted_where_a_format_is_asked_for(tmp_path, capsys):
    held = {
        name: value.astype(ml_dtypes.bfloat16) if name.startswith("blocks.1.") else value
        for name, value in dit().items()
    }
    file = put(tmp_path / "m.safetensors", held)
    for dtype in ("bfloat16", "float32"):
        _, made = converted(tmp_path / dtype, file, dtype=dtype)
        stored = made["dit.safetensors"]["blocks/attn/q/kernel"]
        for layer in range(3):
            theirs = held[f"blocks.{layer}.self_attn.q.weight"].T.astype(stored.dtype)
            np.testing.assert_array_equal(stored[layer].astype(float), theirs.astype(float))
    assert "say with --dtype" in refused(capsys, file, "--out", tmp_path / "model")


# Zeros


def test_tensors_of_zeros_alone_are_named(tmp_path, capsys):
    held = dit() | {
        name: np.zeros_like(dit()[name]) for name in ("head.head.weight", "blocks.2.norm3.bias")
    }
    file = put(tmp_path / "m.safetensors", held)
    assert main.main(["convert", str(file), "--out", str(tmp_path / "m"), "--set", SETS[0]]) == 0
    said = capsys.readouterr().err
    assert "2 of 96 tensors are all zero (" in said
    manifest = json.loads((tmp_path / "m" / "manifest.json").read_text())
    assert {each["name"] for each in manifest["zero"]} == {
        "head.head.weight",
        "blocks.2.norm3.bias",
    }
    assert any("all zero" in note for note in manifest["assumptions"])
    notes, _ = converted(tmp_path / "again", tmp_path / "m")
    assert any("all zero" in note for note in notes)


def test_nothing_is_said_of_zeros_where_there_are_none(tmp_path):
    notes, _ = converted(tmp_path / "m", put(tmp_path / "m.safetensors", dit()))
    assert not any("zero" in note for note in notes)


# Files of another kind


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 5676070424\n"
OTHERS = {
    "a pointer": ("m.safetensors", POINTER, "is a pointer of git LFS"),
    "a page": ("m.safetensors", b"<!DOCTYPE html><html>", "is a web page"),
    "a page behind a blank line": ("m.safetensors", b"\n\n <html>", "is a web page"),
    "a message": ("m.safetensors", b"Entry not found", "is a text ('Entry not found')"),
    "a pickle": ("m.safetensors", b"PK\x03\x04" + bytes(100), "is what torch.save writes"),
    "gguf": ("m.gguf", b"GGUF\x03\0\0\0" + bytes(100), "is GGUF"),
    "gguf by another name": ("m.safetensors", b"GGUF\x03\0\0\0" + bytes(100), "is GGUF"),
    "safetensors by another name": (
        "m.pt",
        b"\x02\0\0\0\0\0\0\0{}",
        "no checkpoint of torch.save but safetensors",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_of_another_kind_is_called_by_its_name(name, tmp_path, capsys):
    file, content, sentence = OTHERS[name]
    (tmp_path / file).write_bytes(content)
    assert sentence in refused(capsys, tmp_path / file, "--out", tmp_path / "model")


def test_an_average_beside_a_bare_network_is_asked_about(tmp_path, plain, capsys):
    for front, average in (("", "ema."), ("net.", "net_ema."), ("model.", "ema_model.")):
        held = prefixed(front, dit()) | prefixed(average, dit(seed=1))
        file = put(tmp_path / f"m{average}safetensors", held)
        said = refused(capsys, file, "--out", tmp_path / "model")
        assert f"holds both a network without a name and {average[:-1]}" in said
        _, made = converted(tmp_path / "model", file, network="model")
        assert_bits(made["dit.safetensors"], plain["dit.safetensors"])
        _, made = converted(tmp_path / "model", file, network=average[:-1])
        assert (
            made["dit.safetensors"]["patch/bias"].tobytes()
            == dit(seed=1)["patch_embedding.bias"].tobytes()
        )


@pytest.mark.parametrize("average", ["ema_state_dict", "model_ema", "ema", "ema_weights"])
def test_an_average_in_a_table_beside_a_bare_one_is_asked_about(average, tmp_path, capsys):
    file = put(tmp_path / "m.pt", {"state_dict": dit(), average: dit(seed=1)})
    assert f"holds both a network without a name and {average}" in refused(
        capsys, file, "--out", tmp_path / "model"
    )


@pytest.mark.parametrize(
    ("network", "raw"),
    [
        ("generator_ema", "generator"),
        ("student_ema", "student"),
        ("ema", ""),
        ("model_ema", ""),
        ("ema_model", ""),
        ("ema_state_dict", ""),
        ("generator", None),
        ("critic", None),
        ("schema", None),
    ],
)
def test_an_average_is_known_by_its_name(network, raw):
    assert names.raw_of(network) == raw


def test_the_decoder_of_a_text_model_is_left_out_aloud(tmp_path, plain):
    held = convert_layouts.as_transformers(umt5()) | {
        "decoder.block.0.layer.0.SelfAttention.q.weight": np.ones((3, 3), np.float32),
        "decoder.final_layer_norm.weight": np.ones(3, np.float32),
        "lm_head.weight": np.ones((3, 3), np.float32),
    }
    notes, made = converted(tmp_path / "model", put(tmp_path / "t5.safetensors", held))
    assert_bits(made["text.safetensors"], plain["text.safetensors"])
    assert any("left out (3 in all): of the text model's decoder" in note for note in notes)


@pytest.mark.parametrize("front", ["policy.", "my.own.wrapper.", "wan_backbone.model."])
@pytest.mark.parametrize("part", ["dit", "codec", "text"])
def test_an_unknown_word_in_front_of_all_names_is_taken_away(part, front, tmp_path, plain):
    held = {"dit": dit(), "codec": vae(), "text": convert_layouts.as_transformers(umt5())}[part]
    notes, made = converted(tmp_path / "m", put(tmp_path / "m.safetensors", prefixed(front, held)))
    assert_bits(made[f"{part}.safetensors"], plain[f"{part}.safetensors"])
    stated = any("nothing says which published checkpoint" in note for note in notes)
    assert stated == (part == "dit")


def test_pieces_beside_a_whole_model_are_passed_over(tmp_path, plain):
    put(tmp_path / "W" / "model.safetensors", dit())
    (tmp_path / "W" / "global_step5").mkdir()
    for name in ("mp_rank_00_model_states.pt", "__0_0.distcp"):
        (tmp_path / "W" / "global_step5" / name).write_bytes(b"x")
        (tmp_path / "W" / name).write_bytes(b"x")
    notes, made = converted(tmp_path / "m", tmp_path / "W")
    assert_bits(made["dit.safetensors"], plain["dit.safetensors"])
    assert any("zero_to_fp32.py" in note for note in notes)
    assert any("dcp_to_torch" in note for note in notes)


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors.index.json"])
def test_a_pointer_in_the_place_of_settings_is_called_by_its_name(name, tmp_path, capsys):
    folder = tmp_path / "W"
    convert_layouts.put_shards(folder, "diffusion_pytorch_model", dit())
    put_json(folder / "config.json", convert_layouts.SIZES)
    (folder / name).write_bytes(POINTER)
    said = refused(capsys, folder, "--out", tmp_path / "m")
    assert f"{name} is a pointer of git LFS" in said


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("__0_0.distcp", "dcp_to_torch"),
        ("global_step10/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "zero_to_fp32.py"),
        ("m-Q8_0.gguf", "is GGUF"),
    ],
)
def test_folders_of_pieces_are_refused_with_what_joins_them(file, sentence, tmp_path, capsys):
    (tmp_path / "W" / file).parent.mkdir(parents=True)
    (tmp_path / "W" / file).write_bytes(b"x")
    assert sentence in refused(capsys, tmp_path / "W", "--out", tmp_path / "model")


@pytest.mark.parametrize("sizes", [{"channels": 36, "out": 16}, {"channels": 48, "out": 16}])
def test_a_network_that_takes_an_image_is_refused(sizes, tmp_path, capsys):
    file = put(tmp_path / "m.safetensors", dit(**sizes))
    said = refused(capsys, file, "--out", tmp_path / "model")
    assert f"takes {sizes['channels']} channels and gives 16" in said
    assert "text-to-video" in said
    assert not (tmp_path / "model").exists()


# What `names` promises


@pytest.mark.parametrize(
    ("name", "words", "rest"),
    [
        ("generator.model.blocks.0.x", ("generator",), "model.blocks.0.x"),
        ("module.generator_ema.blocks.0.x", ("generator_ema",), "blocks.0.x"),
        (
            "text_encoders.umt5xxl.transformer.shared.weight",
            ("text_encoder",),
            "transformer.shared.weight",
        ),
        ("first_stage_model.encoder.conv1.weight", ("vae",), "encoder.conv1.weight"),
        ("model.diffusion_model.blocks.0.x", (), "model.diffusion_model.blocks.0.x"),
        ("blocks.0.generator.x", (), "blocks.0.generator.x"),
        ("generator", (), "generator"),
    ],
)
def test_words_in_front_say_which_network(name, words, rest):
    assert names.split(name) == (words, rest)


def test_long_names_end():
    assert names.plain("model." * 50_000 + "x") == "x"
    assert names.split("model." * 5_000 + "x") == ((), "model." * 5_000 + "x")


def test_two_spellings_of_one_tensor_are_refused(tmp_path, capsys):
    held = prefixed("generator.", dit()) | {
        "module.generator.head.head.bias": np.ones(24, np.float32)
    }
    file = put(tmp_path / "m.safetensors", held)
    assert "name the same tensor" in refused(capsys, file, "--out", tmp_path / "model")


@pytest.mark.parametrize("given", ["m.safetensors", "Wan2.1-T2V-1.3B", "hub", "pipeline"])
def test_weights_that_have_to_be_converted_first_are_told_so(given, tmp_path):
    from packforcing_jax.io import model_folder

    put(tmp_path / "m.safetensors", dit())
    put_json(tmp_path / "Wan2.1-T2V-1.3B" / "config.json", {"_class_name": "WanModel", "dim": 30})
    put_json(tmp_path / "pipeline" / "model_index.json", {"_class_name": "WanPipeline"})
    (tmp_path / "hub" / "models--a--b" / "snapshots" / "01").mkdir(parents=True)
    with pytest.raises(
        InputError, match=r"convert (it|one) first: `packforcing convert .* --out DIR`"
    ):
        model_folder.opened(tmp_path / given)


def test_a_pointer_in_a_model_folder_is_called_by_its_name(tmp_path):
    from packforcing_jax.io import model_folder

    converted(tmp_path / "m", put(tmp_path / "m.safetensors", dit()))
    (tmp_path / "m" / "dit.safetensors").write_bytes(POINTER)
    with pytest.raises(InputError, match="is a pointer of git LFS"):
        model_folder.opened(tmp_path / "m")
    save_file({}, tmp_path / "m" / "dit.safetensors")


def test_blocks_that_the_settings_contradict_are_told(tmp_path):
    folder = tmp_path / "transformer"
    put(folder / "diffusion_pytorch_model.safetensors", convert_layouts.as_diffusers(dit()))
    for blocks in (1, 3):
        put_json(folder / "config.json", DIFFUSERS_DIT | {"num_frames_per_block": blocks})
        notes, _ = converted(tmp_path / str(blocks), folder, overrides=())
        assert any("num_frames_per_block=1" in note for note in notes) == (blocks == 1)


def test_a_download_that_did_not_end_is_named(tmp_path):
    put(tmp_path / "W" / "m.safetensors", dit())
    (tmp_path / "W" / "vae.safetensors.incomplete").write_bytes(b"x")
    notes, _ = converted(tmp_path / "model", tmp_path / "W")
    assert any("vae.safetensors.incomplete is passed over" in note for note in notes)


def test_whatever_was_not_chosen_is_told(tmp_path, plain):
    held = {
        "student": dit(),
        "pack_compressor": {"net.0.weight": np.ones((3, 3), np.float32)},
        "optimizer": {"state": [{"exp_avg": np.ones(3, np.float32)}]},
    }
    notes, made = converted(tmp_path / "m", put(tmp_path / "m.pt", held), network="student")
    assert_bits(made["dit.safetensors"], plain["dit.safetensors"])
    left = "pack_compressor (1 tensors), optimizer (1 tensors)"
    assert f"left out, as not of the network that is taken: {left}" in notes


def test_a_lora_of_the_text_encoder_beside_one_of_the_transformer_is_told(tmp_path):
    pairs = convert_layouts.lora()
    held = convert_layouts.peft(pairs, "transformer.{}.lora_{}.weight")
    held["text_encoder.encoder.block.0.lora_A.weight"] = np.ones((2, 48), np.float32)
    base = put(tmp_path / "base.safetensors", dit())
    notes, _ = converted(tmp_path / "m", base, put(tmp_path / "lora.safetensors", held))
    assert any("text_encoder (1 tensors)" in note for note in notes)


@pytest.mark.parametrize(("key", "part"), [("student", "dit"), ("autoencoder", "codec")])
def test_the_state_of_an_optimizer_is_no_other_network(key, part, tmp_path, plain):
    held = {"dit": dit(), "codec": vae()}[part]
    state = {"state": {0: {"exp_avg": np.ones(3, np.float32)}}, "param_groups": []}
    file = put(tmp_path / "m.pt", {key: held, "optimizer": state})
    notes, made = converted(tmp_path / "m", file)
    assert_bits(made[f"{part}.safetensors"], plain[f"{part}.safetensors"])
    assert any("optimizer (1 tensors)" in note for note in notes)
