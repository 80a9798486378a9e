"""Small checkpoints in every layout that public weights come in, with what must come of them."""

import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import torchfiles
from safetensors.numpy import load_file, save_file

from packforcing_jax.networks import tokenizer

GOLDEN = pathlib.Path(__file__).parent / "golden"
DTYPES = {
    "float32": np.float32,
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float64": np.float64,
}
SIZES = {
    "dim": 30,
    "ffn_dim": 44,
    "freq_dim": 10,
    "in_dim": 4,
    "out_dim": 6,
    "num_heads": 3,
    "num_layers": 3,
    "text_len": 512,
    "eps": 1e-6,
    "model_type": "t2v",
}
TEXT_DIM = 14
PATCH = (1, 2, 2)
LINEARS = (
    "self_attn.q",
    "self_attn.k",
    "self_attn.v",
    "self_attn.o",
    "cross_attn.q",
    "cross_attn.k",
    "cross_attn.v",
    "cross_attn.o",
    "ffn.0",
    "ffn.2",
)
HEADS = ("dit.heads=3",)


@dataclass
class Layout:
    """Sources on disk, the request that converts them, and what must be found in the end.

    `stored`: every tensor on disk by (file as reports name it, name in the file); `expected`: by original name.
    """

    sources: list[pathlib.Path]
    expected: Mapping[str, np.ndarray]
    stored: dict[tuple[str, str], np.ndarray]
    request: dict[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ("dit",)


# Networks under their original names


def shapes_of_dit(layers=3, dim=30, ffn=44, channels=4, out=6):
    """Name and shape of every tensor, as Wan2.1's own code has them."""
    block = {
        f"{each}.{leaf}": {"weight": (dim, dim), "bias": (dim,)}[leaf]
        for each in LINEARS[:8]
        for leaf in ("weight", "bias")
    }
    block |= {f"{kind}_attn.norm_{x}.weight": (dim,) for kind in ("self", "cross") for x in "qk"}
    block |= {
        "norm3.weight": (dim,),
        "norm3.bias": (dim,),
        "modulation": (1, 6, dim),
        "ffn.0.weight": (ffn, dim),
        "ffn.0.bias": (ffn,),
        "ffn.2.weight": (dim, ffn),
        "ffn.2.bias": (dim,),
    }
    return {
        "patch_embedding.weight": (dim, channels, *PATCH),
        "patch_embedding.bias": (dim,),
        "text_embedding.0.weight": (dim, TEXT_DIM),
        "text_embedding.0.bias": (dim,),
        "text_embedding.2.weight": (dim, dim),
        "text_embedding.2.bias": (dim,),
        "time_embedding.0.weight": (dim, 10),
        "time_embedding.0.bias": (dim,),
        "time_embedding.2.weight": (dim, dim),
        "time_embedding.2.bias": (dim,),
        "time_projection.1.weight": (6 * dim, dim),
        "time_projection.1.bias": (6 * dim,),
        **{
            f"blocks.{layer}.{name}": shape
            for layer in range(layers)
            for name, shape in block.items()
        },
        "head.modulation": (1, 2, dim),
        "head.head.weight": (out * 4, dim),
        "head.head.bias": (out * 4,),
    }


def random(shapes, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(DTYPES[dtype]) for name, shape in shapes.items()}


def dit(dtype="float32", seed=0, **sizes):
    return random(shapes_of_dit(**sizes), dtype, seed)


@functools.cache
def _golden(name):
    held = load_file(GOLDEN / f"{name}.safetensors")
    return {
        key.removeprefix("weights/"): value
        for key, value in held.items()
        if key.startswith("weights/")
    }


@functools.cache
def _meta(name):
    with safetensors.safe_open(GOLDEN / f"{name}.safetensors", "np") as file:
        return json.loads(file.metadata()["meta"])


def vae(dtype="float32"):
    return {name: value.astype(DTYPES[dtype]) for name, value in _golden("vae_tiny").items()}


def umt5(dtype="float32"):
    return {name: value.astype(DTYPES[dtype]) for name, value in _golden("umt5_tiny").items()}


# Under the names of others, after the maps that come with the reference numbers


def as_diffusers(tensors):
    """Names of a transformer as diffusers has them; the map knows two layers."""
    known = _meta("diffusers_wan_dit_tiny")["name_map_original_to_diffusers"]

    def renamed(name):
        if not name.startswith("blocks."):
            return known[name]
        _, layer, rest = name.split(".", 2)
        return known[f"blocks.0.{rest}"].replace("blocks.0.", f"blocks.{layer}.")

    return {renamed(name): value for name, value in tensors.items()}


def vae_as_diffusers(tensors):
    known = _meta("diffusers_vae_tiny")["name_map_original_to_diffusers"]["vae_tiny"]
    return {known[name]: value for name, value in tensors.items()}


def as_transformers(tensors):
    known = _meta("umt5_tiny")["checks"]["name_map_wan_to_transformers"]
    return {known[name]: value for name, value in tensors.items()}


def prefixed(prefix, tensors):
    return {prefix + name: value for name, value in tensors.items()}


def fsdp(tensors):
    """Names as a raw run leaves them: wrapped at the top, and around every block."""
    return {
        "model._fsdp_wrapped_module." + name.replace(".", "._checkpoint_wrapped_module.", 1): value
        for name, value in tensors.items()
    }


DIFFUSERS_DIT = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 3,
    "attention_head_dim": 10,
    "in_channels": 4,
    "out_channels": 6,
    "text_dim": TEXT_DIM,
    "freq_dim": 10,
    "ffn_dim": 44,
    "num_layers": 3,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "patch_size": [1, 2, 2],
}
DIFFUSERS_VAE = {
    "_class_name": "AutoencoderKLWan",
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [True, True],
    "latents_mean": [0.5, -0.25, 0.125, 1.5],
    "latents_std": [2.0, 1.5, 0.75, 3.0],
}
TRANSFORMERS_TEXT = {
    "model_type": "umt5",
    "vocab_size": 97,
    "d_model": 48,
    "d_kv": 16,
    "d_ff": 80,
    "num_heads": 4,
    "num_layers": 3,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "feed_forward_proj": "gated-gelu",
}

# LoRA


def lora(
    dtype="float32",
    rank=2,
    seed=7,
    modules=("blocks.0.self_attn.q", "blocks.2.ffn.0", "blocks.1.ffn.2"),
):
    """(down, up) of each module."""
    rng = np.random.default_rng(seed)
    shapes = shapes_of_dit()
    return {
        name: (
            rng.normal(size=(rank, shapes[f"{name}.weight"][1])).astype(DTYPES[dtype]),
            rng.normal(size=(shapes[f"{name}.weight"][0], rank)).astype(DTYPES[dtype]),
        )
        for name in modules
    }


def peft(pairs, form="base_model.model.{}.lora_{}.default.weight"):
    return {
        form.format(name, side): pair[at]
        for name, pair in pairs.items()
        for at, side in enumerate("AB")
    }


def merged(base, pairs, scale):
    """What the additions make of a network, in float64 up to the last step."""
    out = dict(base)
    for name, (down, up) in pairs.items():
        weight = out[f"{name}.weight"]
        total = weight.astype(np.float64) + scale * (
            up.astype(np.float64) @ down.astype(np.float64)
        )
        out[f"{name}.weight"] = total.astype(weight.dtype)
    return out


# Files


def put(path, tensors):
    """A safetensors file, or what torch.save writes, by the name of `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: np.asarray(value, order="C") for name, value in tensors.items()}, path)
    else:
        torchfiles.save(path, tensors)
    return path


def put_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def put_shards(folder, stem, tensors, count=2):
    """A network over `count` files and their index."""
    names = sorted(tensors)
    files = [f"{stem}-{part + 1:05d}-of-{count:05d}.safetensors" for part in range(count)]
    weight_map = {name: files[at % count] for at, name in enumerate(names)}
    for file in files:
        put(folder / file, {name: tensors[name] for name in names if weight_map[name] == file})
    put_json(folder / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return {(f"{folder.name}/{weight_map[name]}", name): tensors[name] for name in names}


def put_tokenizer(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.word_tokenizer(["red", "green", "blue"]).save(str(path))
    return path


def told(file, tensors):
    return {(file, name): value for name, value in tensors.items()}


def wan_folder(folder, dtype, seed=0):
    """All parts as Wan2.1 was published, and what is stored where."""
    held = dit(dtype, seed)
    put(folder / "diffusion_pytorch_model.safetensors", held)
    put(folder / "Wan2.1_VAE.pth", vae(dtype))
    put(folder / "models_t5_umt5-xxl-enc-bf16.pth", torchfiles.state_dict(umt5("bfloat16")))
    put_json(folder / "config.json", SIZES)
    put_tokenizer(folder / "google" / "umt5-xxl" / "tokenizer.json")
    (folder / "README.md").write_text("weights")
    name = folder.name
    return held | vae(dtype) | umt5("bfloat16"), {
        **told(f"{name}/diffusion_pytorch_model.safetensors", held),
        **told(f"{name}/Wan2.1_VAE.pth", vae(dtype)),
        **told(f"{name}/models_t5_umt5-xxl-enc-bf16.pth", umt5("bfloat16")),
    }


ALL = ("dit", "codec", "text")
Build = Callable[[pathlib.Path, str], Layout]
LAYOUTS: dict[str, Build] = {}


def layout(build):
    LAYOUTS[build.__name__] = build
    return build


@layout
def original_file(tmp, dtype):
    path = put(tmp / "wan.safetensors", dit(dtype))
    return Layout([path], dit(dtype), told(path.name, dit(dtype)), {"overrides": HEADS})


@layout
def original_shards_with_config(tmp, dtype):
    stored = put_shards(tmp / "Wan", "diffusion_pytorch_model", dit(dtype), count=3)
    put_json(tmp / "Wan" / "config.json", SIZES)
    return Layout([tmp / "Wan"], dit(dtype), stored)


@layout
def original_index_named(tmp, dtype):
    stored = put_shards(tmp / "Wan", "diffusion_pytorch_model", dit(dtype))
    return Layout(
        [tmp / "Wan" / "diffusion_pytorch_model.safetensors.index.json"],
        dit(dtype),
        stored,
        {"overrides": HEADS},
    )


@layout
def original_folder(tmp, dtype):
    expected, stored = wan_folder(tmp / "Wan2.1-T2V-tiny", dtype)
    return Layout([tmp / "Wan2.1-T2V-tiny"], expected, stored, parts=ALL)


@layout
def original_vae(tmp, dtype):
    path = put(tmp / "Wan2.1_VAE.pth", torchfiles.state_dict(vae(dtype)))
    return Layout([path], vae(dtype), told(path.name, vae(dtype)), parts=("codec",))


@layout
def original_text(tmp, dtype):
    path = put(tmp / "models_t5_umt5-xxl-enc-bf16.pth", umt5(dtype))
    return Layout([path], umt5(dtype), told(path.name, umt5(dtype)), parts=("text",))


@layout
def diffusers_pipeline(tmp, dtype):
    folder = tmp / "Wan-Diffusers"
    text = as_transformers(umt5(dtype))
    text["encoder.embed_tokens.weight"] = text["shared.weight"]
    put_json(folder / "model_index.json", {"_class_name": "WanPipeline"})
    stored = put_shards(folder / "transformer", "diffusion_pytorch_model", as_diffusers(dit(dtype)))
    stored |= put_shards(folder / "text_encoder", "model", text, count=3)
    put(folder / "vae" / "diffusion_pytorch_model.safetensors", vae_as_diffusers(vae("float32")))
    stored |= told("vae/diffusion_pytorch_model.safetensors", vae_as_diffusers(vae("float32")))
    for name, config in (
        ("transformer", DIFFUSERS_DIT),
        ("vae", DIFFUSERS_VAE),
        ("text_encoder", TRANSFORMERS_TEXT),
    ):
        put_json(folder / name / "config.json", config)
    put_tokenizer(folder / "tokenizer" / "tokenizer.json")
    stored = {(f"{folder.name}/{file}", name): value for (file, name), value in stored.items()}
    return Layout([folder], dit(dtype) | vae("float32") | umt5(dtype), stored, parts=ALL)


@layout
def diffusers_transformer(tmp, dtype):
    put_json(tmp / "transformer" / "config.json", DIFFUSERS_DIT)
    return Layout(
        [tmp / "transformer"],
        dit(dtype),
        put_shards(tmp / "transformer", "diffusion_pytorch_model", as_diffusers(dit(dtype))),
    )


@layout
def diffusers_transformer_without_config(tmp, dtype):
    path = put(tmp / "student.safetensors", as_diffusers(dit(dtype)))
    return Layout(
        [path], dit(dtype), told(path.name, as_diffusers(dit(dtype))), {"overrides": HEADS}
    )


@layout
def diffusers_vae(tmp, dtype):
    path = put(tmp / "vae" / "diffusion_pytorch_model.safetensors", vae_as_diffusers(vae(dtype)))
    put_json(tmp / "vae" / "config.json", DIFFUSERS_VAE)
    return Layout(
        [tmp / "vae"],
        vae(dtype),
        told(f"vae/{path.name}", vae_as_diffusers(vae(dtype))),
        parts=("codec",),
    )


@layout
def transformers_text_with_the_twin_alone(tmp, dtype):
    text = as_transformers(umt5(dtype))
    text["encoder.embed_tokens.weight"] = text.pop("shared.weight")
    path = put(tmp / "text_encoder" / "model.safetensors", text)
    return Layout(
        [tmp / "text_encoder"],
        umt5(dtype),
        told(f"text_encoder/{path.name}", text),
        parts=("text",),
    )


def _trainer(tmp, content, expected, **request):
    path = put(tmp / "self_forcing_dmd.pt", content)
    stored = {}
    for key, table in content.items():
        named = prefixed(f"{key}.", table) if isinstance(table, dict) else {}
        stored |= told(
            path.name,
            {name: value for name, value in named.items() if isinstance(value, np.ndarray)},
        )
    return Layout([path], expected, stored, {"overrides": HEADS} | request)


@layout
def self_forcing(tmp, dtype):
    content = {
        "generator": prefixed("model.", dit(dtype, 1)),
        "critic": prefixed("model.", dit(dtype, 2)),
        "generator_ema": prefixed("model.", dit(dtype)),
        "step": 600,
    }
    return _trainer(tmp, content, dit(dtype))


@layout
def self_forcing_raw_run(tmp, dtype):
    return _trainer(
        tmp,
        {"generator_ema": fsdp(dit(dtype)), "critic": prefixed("model.", dit(dtype, 2))},
        dit(dtype),
    )


@layout
def self_forcing_compiled(tmp, dtype):
    return _trainer(
        tmp,
        {"generator": prefixed("_orig_mod.model._fsdp_wrapped_module.", dit(dtype))},
        dit(dtype),
    )


@layout
def self_forcing_forced(tmp, dtype):
    content = {
        "generator": fsdp(dit(dtype, 1)),
        "generator_ema": fsdp(dit(dtype, 2)),
        "critic": prefixed("model.", dit(dtype)),
    }
    return _trainer(tmp, content, dit(dtype), network="critic")


@layout
def self_forcing_gan(tmp, dtype):
    heads = random(
        {
            "_cls_pred_branch.0.weight": (5,),
            "_register_tokens.register_tokens": (1, 3, 6),
            "_gan_ca_blocks.2.cross_attn.q.bias": (4,),
        },
        dtype,
    )
    return _trainer(tmp, {"generator": prefixed("model.", dit(dtype) | heads)}, dit(dtype))


@layout
def causvid(tmp, dtype):
    path = put(
        tmp / "autoregressive_checkpoint" / "model.pt",
        {"generator": prefixed("model.", dit(dtype))},
    )
    return Layout(
        [path.parent],
        dit(dtype),
        told("autoregressive_checkpoint/model.pt", prefixed("generator.model.", dit(dtype))),
        {"overrides": HEADS},
    )


@layout
def flat(tmp, dtype):
    path = put(tmp / "causal_model.pt", torchfiles.state_dict(dit(dtype)))
    return Layout([path], dit(dtype), told(path.name, dit(dtype)), {"overrides": HEADS})


@layout
def flat_bin_in_a_table(tmp, dtype):
    named = prefixed("model.diffusion_model.", dit(dtype))
    path = put(tmp / "pytorch_model.bin", {"state_dict": named, "epoch": 3})
    return Layout(
        [path], dit(dtype), told(path.name, prefixed("state_dict.", named)), {"overrides": HEADS}
    )


@layout
def with_optimizer(tmp, dtype):
    state = {0: {"step": 3.0, "exp_avg": np.ones((2, 3), np.float32)}, 1: {"step": 3.0}}
    content = {
        "generator": dit(dtype),
        "optimizer": {"state": state, "param_groups": [{"lr": 0.1}]},
    }
    made = _trainer(tmp, content, dit(dtype))
    made.stored["self_forcing_dmd.pt", "optimizer.state.0.exp_avg"] = state[0]["exp_avg"]
    return made


@layout
def longlive(tmp, dtype):
    base = dit(dtype)
    pairs = lora(dtype)
    other = peft(lora(dtype, seed=8))
    put(tmp / "models" / "longlive_base.pt", {"generator": prefixed("model.", base)})
    put(
        tmp / "models" / "lora.pt", {"generator_lora": peft(pairs), "critic_lora": other, "step": 3}
    )
    stored = told("models/longlive_base.pt", prefixed("generator.model.", base))
    stored |= told(
        "models/lora.pt", prefixed("generator_lora.", peft(pairs)) | prefixed("critic_lora.", other)
    )
    return Layout([tmp / "models"], merged(base, pairs, 1.0), stored, {"overrides": HEADS})


@layout
def bare_lora(tmp, dtype):
    base = dit(dtype)
    pairs = lora("float32", rank=3)
    named = peft(pairs, "base_model.model.model._fsdp_wrapped_module.{}.lora_{}.weight")
    sources = [put(tmp / "base.safetensors", base), put(tmp / "lora.safetensors", named)]
    return Layout(
        sources,
        merged(base, pairs, 6 / 3),
        told("base.safetensors", base) | told("lora.safetensors", named),
        {"overrides": HEADS, "lora_alpha": 6.0},
    )


@layout
def lora_that_says_how_strong(tmp, dtype):
    base = dit(dtype)
    pairs = lora("float32", rank=3)
    named = peft(pairs, "{}.lora_{}.weight")
    put(tmp / "lora" / "adapter_model.safetensors", named)
    put_json(tmp / "lora" / "adapter_config.json", {"peft_type": "LORA", "r": 3, "lora_alpha": 12})
    sources = [put(tmp / "base.safetensors", base), tmp / "lora"]
    stored = told("base.safetensors", base) | told("lora/adapter_model.safetensors", named)
    return Layout(sources, merged(base, pairs, 12 / 3), stored, {"overrides": HEADS})


@layout
def lora_of_diffusers_with_alphas(tmp, dtype):
    pairs = lora("float32", modules=("blocks.1.self_attn.o", "blocks.2.ffn.0"))
    base = dit(dtype)
    theirs = {
        "blocks.1.self_attn.o": "blocks.1.attn1.to_out.0",
        "blocks.2.ffn.0": "blocks.2.ffn.net.0.proj",
    }
    named = {
        f"transformer.{theirs[name]}.lora_{side}.weight": pair[at]
        for name, pair in pairs.items()
        for at, side in enumerate(("down", "up"))
    }
    named |= {f"transformer.{name}.alpha": np.float32(1.0).reshape(()) for name in theirs.values()}
    sources = [
        put(tmp / "lora.safetensors", named),
        put(tmp / "base.safetensors", as_diffusers(base)),
    ]
    stored = told("lora.safetensors", named) | told("base.safetensors", as_diffusers(base))
    return Layout(sources, merged(base, pairs, 1 / 2), stored, {"overrides": HEADS})


@layout
def several_networks_in_one_file(tmp, dtype):
    held = dit(dtype) | umt5("bfloat16") | vae("float32")
    path = put(tmp / "all.safetensors", held)
    return Layout([path], held, told(path.name, held), {"overrides": HEADS}, ALL)


@layout
def original_folder_and_a_student(tmp, dtype):
    expected, stored = wan_folder(tmp / "Wan2.1-T2V-tiny", dtype, seed=5)
    path = put(tmp / "student.pt", {"generator_ema": prefixed("model.", dit(dtype))})
    stored |= told(path.name, prefixed("generator_ema.model.", dit(dtype)))
    return Layout(
        [tmp / "Wan2.1-T2V-tiny", path], expected | dit(dtype), stored, {"overrides": HEADS}, ALL
    )


@layout
def cache_of_the_hub(tmp, dtype):
    repository = tmp / "models--Wan-AI--tiny"
    blob = put(repository / "blobs" / "1f3a.safetensors", dit(dtype))
    snapshot = repository / "snapshots" / "9737cba"
    snapshot.mkdir(parents=True)
    put_json(repository / "blobs" / "77aa", SIZES)
    os.symlink(f"../../blobs/{blob.name}", snapshot / "diffusion_pytorch_model.safetensors")
    os.symlink("../../blobs/77aa", snapshot / "config.json")
    return Layout(
        [snapshot], dit(dtype), told("9737cba/diffusion_pytorch_model.safetensors", dit(dtype))
    )
