"""Additions to a network are merged as float64 arithmetic says, whatever their names, and their strength is told."""

import json
import re

import convert_layouts
import numpy as np
import pytest
from convert_layouts import dit, prefixed, put, put_json
from packforcing_jax.convert import folders
from safetensors.numpy import save_file

from packforcing_jax.cli import main

SETS = ("dit.heads=3",)
MODULES = (
    "blocks.0.self_attn.q",
    "blocks.1.cross_attn.o",
    "blocks.2.ffn.0",
    "blocks.1.ffn.2",
    "text_embedding.2",
    "time_projection.1",
    "head.head",
)
DIFFUSERS = {
    "self_attn.q": "attn1.to_q",
    "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}
SERVED = {
    "self_attn.q": "to_q",
    "cross_attn.o": "attn2.to_out",
    "ffn.0": "ffn.fc_in",
    "ffn.2": "ffn.fc_out",
    "text_embedding.2": "condition_embedder.text_embedder.fc_out",
    "time_projection.1": "condition_embedder.time_modulation.linear",
    "head.head": "proj_out",
}
PAIRS = convert_layouts.lora(modules=MODULES, rank=3)


def own(module):
    return module


def renamed(table):
    """Modules as another layout calls them."""

    def rename(module):
        front, end = re.fullmatch(r"(blocks\.\d+\.)?(.+)", module).groups()
        return (front or "") + table[end]

    return rename


def under(module):
    return module.replace(".", "_")


def half(module):
    """Dots up to the layer, underscores behind."""
    return re.sub(r"^(blocks\.\d+\.)?(.*)$", lambda hit: (hit[1] or "") + under(hit[2]), module)


PEFT = ("lora_A.weight", "lora_B.weight")
NAMED = ("lora_A.default.weight", "lora_B.default.weight")
KOHYA = ("lora_down.weight", "lora_up.weight")
OLD = ("lora.down.weight", "lora.up.weight")
FORMS = {  # what stands in front, how modules are called, how the two sides are
    "of the original": ("", own, PEFT),
    "of peft": ("base_model.model.", own, NAMED),
    "of ComfyUI": ("diffusion_model.", own, PEFT),
    "of ComfyUI, down and up": ("diffusion_model.", own, KOHYA),
    "of diffusers": ("transformer.", renamed(DIFFUSERS), PEFT),
    "of a serving engine": ("", renamed(SERVED), PEFT),
    "of kohya": ("lora_unet_", under, KOHYA),
    "of kohya, two underscores": ("lora_unet__", under, KOHYA),
    "of kohya, diffusers' modules": ("lora_unet_", lambda m: under(renamed(DIFFUSERS)(m)), KOHYA),
    "of kohya for a transformer": ("lora_transformer_", under, KOHYA),
    "of lycoris": ("lycoris_", under, KOHYA),
    "half dotted": ("lora_unet_", half, KOHYA),
    "half dotted behind a prefix": ("diffusion_model.", half, PEFT),
    "half dotted, all dots": ("lora_unet_", own, KOHYA),
    "of a pipeline": ("pipe.dit.", own, NAMED),
    "of a pipeline, bare": ("pipe.dit.", own, PEFT),
    "of a network": ("net.", own, PEFT),
    "of a student": ("student.", own, PEFT),
    "of a generator": ("generator.model.", own, NAMED),
    "of an old diffusers": ("transformer.", renamed(DIFFUSERS), OLD),
    "without weight": ("", own, ("lora_A", "lora_B")),
}


def named(form, pairs=None):
    """The tensors of a LoRA in one of the forms."""
    front, rename, sides = FORMS[form]
    return {
        f"{front}{rename(module)}.{sides[at]}": pair[at]
        for module, pair in (pairs or PAIRS).items()
        for at in (0, 1)
    }


def alphas(form, value):
    front, rename, _ = FORMS[form]
    return {f"{front}{rename(module)}.alpha": np.asarray(value, np.float32) for module in PAIRS}


def merge(tmp_path, *loras, **request):
    """(what was said, the network by original name) after merging files of additions into the plain network."""
    base = put(tmp_path / "base.safetensors", dit())
    done = folders.convert(
        folders.Request(sources=(base, *loras), out=tmp_path / "model", overrides=SETS, **request)
    )
    from packforcing_jax.convert import exporting
    from safetensors.numpy import load_file

    exporting.to_torch(tmp_path / "model", tmp_path / "back.safetensors")
    return done.notes, load_file(tmp_path / "back.safetensors")


def assert_sum(ours, added):
    """`ours` is the plain network plus `added`, by float64 arithmetic, to 1e-6 of the largest number."""
    assert ours.keys() == dit().keys()
    for name, weight in dit().items():
        if name not in added:
            assert ours[name].tobytes() == weight.tobytes(), name
            continue
        theirs = weight.astype(np.float64) + added[name]
        assert np.abs(added[name]).max() > 0.01
        error = np.abs(ours[name].astype(np.float64) - theirs).max()
        assert error <= 1e-6 * np.abs(theirs).max(), name


def products(scale, pairs=None):
    return {
        f"{module}.weight": scale * (up.astype(np.float64) @ down.astype(np.float64))
        for module, (down, up) in (pairs or PAIRS).items()
    }


def refused(capsys, *words):
    assert main.main(["convert", *map(str, words), "--set", SETS[0]]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("packforcing")]
    assert len(said) == 1
    return said[0]


# Names


@pytest.mark.parametrize("form", FORMS)
def test_a_lora_is_merged_under_the_names_of_any_tool(form, tmp_path):
    lora = put(tmp_path / "lora.safetensors", named(form) | alphas(form, 1.5))
    notes, made = merge(tmp_path, lora)
    assert_sum(made, products(0.5))
    assert any("adds to 7 weights at 0.5: alpha / rank" in note for note in notes)


def test_a_lora_of_the_patches_is_a_convolution(tmp_path):
    rng = np.random.default_rng(3)
    down, up = rng.normal(size=(2, 4, 1, 2, 2)), rng.normal(size=(30, 2, 1, 1, 1))
    held = {
        "patch_embedding.lora_A.weight": down.astype(np.float32),
        "patch_embedding.lora_B.weight": up.astype(np.float32),
    }
    _, made = merge(tmp_path, put(tmp_path / "lora.safetensors", held), lora_alpha=2.0)
    product = np.einsum(
        "or,rctyx->octyx", up[..., 0, 0, 0].astype(np.float32), down.astype(np.float32)
    )
    assert_sum(made, {"patch_embedding.weight": product.astype(np.float64)})


# Plain differences


@pytest.mark.parametrize("front", ["diffusion_model.", "", "pipe.dit."])
def test_differences_are_added_as_they_are(front, tmp_path):
    rng = np.random.default_rng(4)
    shapes = convert_layouts.shapes_of_dit()
    wanted = {
        "blocks.0.self_attn.norm_q.diff": "blocks.0.self_attn.norm_q.weight",
        "blocks.1.norm3.diff": "blocks.1.norm3.weight",
        "blocks.1.norm3.diff_b": "blocks.1.norm3.bias",
        "blocks.2.ffn.0.diff_b": "blocks.2.ffn.0.bias",
        "blocks.2.diff_m": "blocks.2.modulation",
        "head.diff_m": "head.modulation",
        "head.head.diff": "head.head.weight",
        "patch_embedding.diff": "patch_embedding.weight",
        "patch_embedding.diff_b": "patch_embedding.bias",
        "time_embedding.0.diff_b": "time_embedding.0.bias",
    }
    held = {
        name: rng.normal(size=shapes[weight]).astype(np.float32) for name, weight in wanted.items()
    }
    pairs = convert_layouts.lora(modules=("blocks.0.ffn.0", "blocks.2.ffn.0"))
    lora = prefixed(front, held | convert_layouts.peft(pairs, "{}.lora_{}.weight"))
    notes, made = merge(tmp_path, put(tmp_path / "lora.safetensors", lora))
    assert_sum(made, products(1.0, pairs) | {wanted[name]: value for name, value in held.items()})
    assert any("alpha = rank is assumed" in note for note in notes)


def test_a_bias_of_the_second_factor_is_scaled_as_the_product(tmp_path):
    bias = np.random.default_rng(5).normal(size=30).astype(np.float32)
    pairs = convert_layouts.lora(modules=("blocks.0.self_attn.q",))
    held = convert_layouts.peft(pairs, "{}.lora_{}.weight")
    held["blocks.0.self_attn.q.lora_B.bias"] = bias
    _, made = merge(tmp_path, put(tmp_path / "lora.safetensors", held), lora_alpha=6.0)
    theirs = {"blocks.0.self_attn.q.bias": 3.0 * bias.astype(np.float64)}
    assert_sum(made, products(3.0, pairs) | theirs)


def test_a_file_of_differences_alone_needs_no_strength(tmp_path):
    held = {"diffusion_model.blocks.0.norm3.diff": np.ones(30, np.float32)}
    notes, _ = merge(tmp_path, put(tmp_path / "lora.safetensors", held))
    assert "LoRA lora.safetensors adds to 1 weights at 1" in notes


# How strong


def header(**texts):
    return {"format": "pt"} | {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in texts.items()
    }


HEADERS = {
    "of diffusers": header(
        lora_adapter_metadata={"transformer.lora_alpha": 24, "transformer.r": 3}
    ),
    "of diffusers, half": header(
        lora_adapter_metadata={
            "transformer.lora_alpha": 1.5,
            "transformer.r": 3,
            "text_encoder.lora_alpha": 99,
        }
    ),
    "of one network": header(lora_adapter_metadata={"lora_alpha": 12, "r": 3}),
    "of kohya": header(ss_network_alpha="6.0", ss_network_dim="3"),
    "of others": header(lora_alpha="9"),
    "network_alpha": header(network_alpha="9"),
    "both": header(
        lora_adapter_metadata={"transformer.lora_alpha": 24, "transformer.r": 3},
        ss_network_alpha="16",
    ),
}
SCALES = {
    "of diffusers": 8,
    "of diffusers, half": 0.5,
    "of one network": 4,
    "of kohya": 2,
    "of others": 3,
    "network_alpha": 3,
    "both": 8,
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_strength_in_the_header_is_read(kind, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(named("of diffusers"), path, HEADERS[kind])
    notes, made = merge(tmp_path, path)
    assert_sum(made, products(SCALES[kind]))
    assert any("as the header of lora.safetensors says" in note for note in notes)
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert manifest["assumptions"] == list(notes)


@pytest.mark.parametrize(
    "texts",
    [
        header(),
        header(lora_adapter_metadata="{broken", ss_network_alpha="None"),
        header(lora_adapter_metadata=[3], lora_alpha="strong"),
        header(lora_adapter_metadata="[" * 100_000),
    ],
)
def test_a_strength_that_no_file_says_is_assumed_aloud(texts, tmp_path, capsys):
    path = tmp_path / "lora.safetensors"
    save_file(named("of ComfyUI"), path, texts)
    base = put(tmp_path / "base.safetensors", dit())
    words = ["convert", base, path, "--out", tmp_path / "model", "--set", SETS[0]]
    assert main.main([str(word) for word in words]) == 0
    said = capsys.readouterr().err
    sentence = (
        "no file says how strong it is, so alpha = rank is assumed; give --lora-alpha A if not"
    )
    assert f"LoRA lora.safetensors adds to 7 weights at 1: {sentence}" in said
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert any(sentence in note for note in manifest["assumptions"])


def test_what_stands_beside_the_factors_comes_before_the_header(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(
        named("of kohya") | alphas("of kohya", 6), path, HEADERS["of kohya"] | HEADERS["both"]
    )
    _, made = merge(tmp_path, path)
    assert_sum(made, products(2))


def test_settings_beside_the_file_come_before_its_header(tmp_path):
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    path.parent.mkdir()
    save_file(named("of peft"), path, HEADERS["both"])
    put_json(path.parent / "adapter_config.json", {"lora_alpha": 6, "r": 3, "peft_type": "LORA"})
    notes, made = merge(tmp_path, path)
    assert_sum(made, products(2))
    assert any("as adapter_config.json says" in note for note in notes)


def test_the_users_strength_counts_where_the_file_says_none(tmp_path):
    silent = put(tmp_path / "silent.safetensors", named("of ComfyUI"))
    notes, made = merge(tmp_path, silent, lora_alpha=6.0)
    assert_sum(made, products(2))
    assert any("alpha 6, as --lora-alpha says" in note for note in notes)


def test_each_lora_has_its_own_strength(tmp_path):
    save_file(named("of ComfyUI"), tmp_path / "a.safetensors", HEADERS["of kohya"])
    other = put(tmp_path / "b.safetensors", named("of kohya") | alphas("of kohya", 12))
    silent = put(tmp_path / "c.safetensors", named("of peft"))
    notes, made = merge(tmp_path, tmp_path / "a.safetensors", other, silent)
    assert_sum(made, products(2 + 4 + 1))
    assert sum(note.startswith("LoRA ") for note in notes) == 3


@pytest.mark.parametrize("where", ["header", "tensors", "flag"])
def test_a_strength_of_zero_is_told(where, tmp_path):
    path = tmp_path / "lora.safetensors"
    texts = header(ss_network_alpha="0") if where == "header" else header()
    save_file(
        named("of kohya") | (alphas("of kohya", 0) if where == "tensors" else {}), path, texts
    )
    notes, made = merge(tmp_path, path, lora_alpha=0.0 if where == "flag" else None)
    assert_sum(made, {})
    assert any("nothing is added there" in note for note in notes)


def test_a_rank_that_is_not_that_of_the_tensors_is_told(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(named("of diffusers"), path, header(ss_network_alpha="6", ss_network_dim="32"))
    notes, made = merge(tmp_path, path)
    assert_sum(made, products(2))
    assert any("says rank 32 and the tensors of lora.safetensors have 3" in note for note in notes)


# What is refused


OTHER_KINDS = {
    "DoRA": "blocks.0.self_attn.q.dora_scale",
    "DoRA of peft": "base_model.model.blocks.0.self_attn.q.lora_magnitude_vector.default.weight",
    "LoHa": "lora_unet_blocks_0_self_attn_q.hada_w1_a",
    "LoKr": "lora_unet_blocks_0_self_attn_q.lokr_w1",
    "OFT": "lora_unet_blocks_0_self_attn_q.oft_blocks",
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
@pytest.mark.parametrize("beside", [True, False])
def test_other_kinds_of_additions_are_refused_by_name(kind, beside, tmp_path, capsys):
    held = named("of the original") if beside else {}
    lora = put(tmp_path / "lora.safetensors", held | {OTHER_KINDS[kind]: np.ones(30, np.float32)})
    base = put(tmp_path / "base.safetensors", dit())
    said = refused(capsys, base, lora, "--out", tmp_path / "model")
    assert f"lora.safetensors is {kind.split()[0]} " in said
    assert "merge it into its base" in said
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("key", ["use_dora", "use_rslora", "rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("where", ["header", "beside"])
def test_settings_that_change_the_sum_are_refused(key, where, tmp_path, capsys):
    value = {"q": 3} if "pattern" in key else True
    table = {f"transformer.{key}": value, "transformer.lora_alpha": 3}
    path = tmp_path / "adapter.safetensors"
    texts = header(lora_adapter_metadata=table) if where == "header" else header()
    save_file(named("of peft"), path, texts)
    if where == "beside":
        put_json(tmp_path / "adapter_config.json", {key: value})
    base = put(tmp_path / "base" / "base.safetensors", dit())
    said = refused(capsys, base, path, "--out", tmp_path / "model")
    assert f"{key} of the LoRA is not supported; merge it into its base" in said


@pytest.mark.parametrize("form", ["of kohya", "of diffusers", "of a pipeline", "half dotted"])
def test_a_lora_alone_asks_for_its_base(form, tmp_path, capsys):
    lora = put(tmp_path / "lora.safetensors", named(form) | alphas(form, 1))
    said = refused(capsys, lora, "--out", tmp_path / "model")
    assert "a LoRA (lora.safetensors) was given without the network it adds to" in said
    assert "give the base checkpoint" in said


@pytest.mark.parametrize("form", ["of kohya", "of diffusers"])
def test_a_lora_of_another_network_gets_its_own_remedy(form, tmp_path, capsys):
    front, rename, sides = FORMS[form]
    held = {
        f"{front}{'transformer_blocks_0_attn_to_q'}.{sides[at]}": np.ones((2, 2), np.float32)
        for at in (0, 1)
    }
    lora = put(tmp_path / "lora.safetensors", held)
    said = refused(capsys, put(tmp_path / "b.safetensors", dit()), lora, "--out", tmp_path / "m")
    assert "added to no weight" in said
    assert "give a LoRA that was trained on this network" in said
    assert "once, whole and of one size" not in said


def test_the_manifest_has_every_tensor_of_a_lora_once(tmp_path):
    held = named("of kohya") | alphas("of kohya", 1)
    held["lora_unet_blocks_0_norm3.diff_b"] = np.ones(30, np.float32)
    merge(tmp_path, put(tmp_path / "lora.safetensors", held))
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    rows = [each["name"] for each in manifest["tensors"] if each["file"] == "lora.safetensors"]
    assert sorted(rows) == sorted(held)


@pytest.mark.parametrize(
    "content",
    [
        lambda held: {"lora_alpha": 6, "step": 3, "lora": held},
        lambda held: {"config": {"train": {"lora_alpha": 6, "alpha": 99}}, "lora": held},
        lambda held: held | {f"diffusion_model.{module}.alpha": 6.0 for module in PAIRS},
    ],
    ids=["beside", "inside", "a number for each"],
)
def test_a_strength_in_a_file_of_torch_is_read(content, tmp_path):
    _, made = merge(tmp_path, put(tmp_path / "lora.pt", content(named("of ComfyUI"))))
    assert_sum(made, products(2))


@pytest.mark.parametrize("shape", [(), (2,), (0, 30)])
def test_a_factor_that_is_no_matrix_is_refused(shape, tmp_path, capsys):
    held = named("of kohya") | {"lora_unet_head_head.lora_down.weight": np.ones(shape, np.float32)}
    lora = put(tmp_path / "lora.safetensors", held)
    said = refused(capsys, put(tmp_path / "b.safetensors", dit()), lora, "--out", tmp_path / "m")
    assert "added to a weight of another shape" in said


def test_a_kind_that_is_asked_for_leaves_the_base_what_it_is(tmp_path):
    lora = put(tmp_path / "lora.safetensors", named("of kohya") | alphas("of kohya", 6))
    _, made = merge(tmp_path, lora, kind="lora")
    assert_sum(made, products(2))


def test_two_strengths_in_one_header_are_told(tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(named("of diffusers"), path, HEADERS["both"])
    notes, _ = merge(tmp_path, path)
    assert "lora.safetensors also says alpha 16, which is not used" in notes


@pytest.mark.parametrize("alpha", [10**400, 1e400, float("nan"), -(10**400)])
def test_a_strength_that_cannot_be_is_refused(alpha, tmp_path, capsys):
    path = tmp_path / "lora.safetensors"
    table = {"transformer.lora_alpha": alpha}
    save_file(named("of diffusers"), path, header(lora_adapter_metadata=table))
    said = refused(capsys, put(tmp_path / "b.safetensors", dit()), path, "--out", tmp_path / "m")
    assert "lora_alpha of the LoRA is no number that can be" in said
