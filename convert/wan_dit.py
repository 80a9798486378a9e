"""Wan2.1's diffusion transformer: original names to ours, diffusers names to original ones, sizes from both configs."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from packforcing_jax.convert import rules
from packforcing_jax.convert.rules import Rule

from packforcing_jax.config import DiTConfig
from packforcing_jax.errors import InputError, require


def _dense(pattern: str, target: str) -> tuple[Rule, Rule]:
    """The two rules of a linear layer with bias."""
    return (
        Rule(pattern + r"\.weight", target + "/kernel", rules.linear),
        Rule(pattern + r"\.bias", target + "/bias"),
    )


def _attention(source: str, target: str) -> tuple[Rule, ...]:
    """The rules of one attention: four projections, and the norms of queries and keys over the full width."""
    return (
        *_dense(rf"blocks\.(\d+)\.{source}\.([qkvo])", rf"blocks/{target}/\2"),
        Rule(rf"blocks\.(\d+)\.{source}\.norm_([qk])\.weight", rf"blocks/{target}/norm_\2/scale"),
    )


WAN_DIT = (
    Rule(r"patch_embedding\.weight", "patch/kernel", rules.patch),
    Rule(r"patch_embedding\.bias", "patch/bias"),
    *_dense(r"text_embedding\.0", "text_in"),
    *_dense(r"text_embedding\.2", "text_out"),
    *_dense(r"time_embedding\.0", "time_in"),
    *_dense(r"time_embedding\.2", "time_out"),
    *_dense(r"time_projection\.1", "time_proj"),
    Rule(r"blocks\.(\d+)\.modulation", "blocks/modulation", rules.drop0),
    *_attention("self_attn", "attn"),
    *_attention("cross_attn", "cross"),
    Rule(r"blocks\.(\d+)\.norm3\.weight", "blocks/norm3/scale"),
    Rule(r"blocks\.(\d+)\.norm3\.bias", "blocks/norm3/bias"),
    *_dense(r"blocks\.(\d+)\.ffn\.0", "blocks/ffn_in"),
    *_dense(r"blocks\.(\d+)\.ffn\.2", "blocks/ffn_out"),
    Rule(r"head\.modulation", "head_modulation", rules.drop0),
    *_dense(r"head\.head", "head"),
)

DIFFUSERS = (
    ("patch_embedding", "patch_embedding"),
    ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
    ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
    ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
    ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
    ("time_projection.1", "condition_embedder.time_proj"),
    ("blocks.{}.modulation", "blocks.{}.scale_shift_table"),
    *((f"blocks.{{}}.self_attn.{x}", f"blocks.{{}}.attn1.to_{x}") for x in "qkv"),
    ("blocks.{}.self_attn.o", "blocks.{}.attn1.to_out.0"),
    *((f"blocks.{{}}.self_attn.norm_{x}", f"blocks.{{}}.attn1.norm_{x}") for x in "qk"),
    (
        "blocks.{}.norm3",
        "blocks.{}.norm2",
    ),  # the affine norm before cross-attention has another number there
    *((f"blocks.{{}}.cross_attn.{x}", f"blocks.{{}}.attn2.to_{x}") for x in "qkv"),
    ("blocks.{}.cross_attn.o", "blocks.{}.attn2.to_out.0"),
    *((f"blocks.{{}}.cross_attn.norm_{x}", f"blocks.{{}}.attn2.norm_{x}") for x in "qk"),
    ("blocks.{}.ffn.0", "blocks.{}.ffn.net.0.proj"),
    ("blocks.{}.ffn.2", "blocks.{}.ffn.net.2"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
)

SERVED = (  # SGLang and FastVideo, as their own classes of the network have it
    ("patch_embedding", "patch_embedding.proj"),
    ("text_embedding.0", "condition_embedder.text_embedder.fc_in"),
    ("text_embedding.2", "condition_embedder.text_embedder.fc_out"),
    ("time_embedding.0", "condition_embedder.time_embedder.mlp.fc_in"),
    ("time_embedding.2", "condition_embedder.time_embedder.mlp.fc_out"),
    ("time_projection.1", "condition_embedder.time_modulation.linear"),
    ("blocks.{}.modulation", "blocks.{}.scale_shift_table"),
    *((f"blocks.{{}}.self_attn.{x}", f"blocks.{{}}.to_{x}") for x in "qkv"),
    ("blocks.{}.self_attn.o", "blocks.{}.to_out"),
    *((f"blocks.{{}}.self_attn.norm_{x}", f"blocks.{{}}.norm_{x}") for x in "qk"),
    ("blocks.{}.norm3", "blocks.{}.self_attn_residual_norm.norm"),
    *((f"blocks.{{}}.cross_attn.{x}", f"blocks.{{}}.attn2.to_{x}") for x in "qkv"),
    ("blocks.{}.cross_attn.o", "blocks.{}.attn2.to_out"),
    *((f"blocks.{{}}.cross_attn.norm_{x}", f"blocks.{{}}.attn2.norm_{x}") for x in "qk"),
    ("blocks.{}.ffn.0", "blocks.{}.ffn.fc_in"),
    ("blocks.{}.ffn.2", "blocks.{}.ffn.fc_out"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
)
LAYOUTS = (DIFFUSERS, SERVED)  # of names, beside the original one
FIRST = (
    "patch_embedding.weight",
    "patch_embedding.proj.weight",
)  # one of them is in every transformer


OTHERS = {  # names that only other models of the family have -> which
    r"img_emb\..*|.*\.(k_img|v_img|norm_k_img)\..*": "an image-to-video model",
    r"condition_embedder\.image_embedder\..*|.*\.(add_[kv]_proj|norm_added_k)\..*": "an image-to-video model",
    r"vace_.*": "a VACE model",
    r"control_adapter\..*|ref_conv\..*": "a model that follows a control signal",
}
EXTRAS = {  # names of what stands beside the network in trainers' files -> why it is left out
    r"_(cls_pred_branch|register_tokens|gan_ca_blocks)(\..*)?": "head of a GAN critic, not of the network",
}
VARIANTS = {  # setting -> the values that this architecture has
    "model_type": ("t2v",),
    "cross_attn_norm": (True,),
    "qk_norm": (True, "rms_norm_across_heads"),
    "image_dim": (None,),
    "added_kv_proj_dim": (None,),
}
IMAGE_CHANNELS = (
    36  # that Wan2.1 takes with an image: a latent, its mask, and the latent of the image
)
WIDEST_HEAD = 128  # of every released model


def _refuse_variants(config: Mapping[str, Any]) -> None:
    for key, built in VARIANTS.items():
        if config.get(key, built[0]) not in built:
            raise InputError(
                f"{key}={config[key]!r} is not Wan2.1's text-to-video network; use {built[-1]!r}."
            )


def config_from_shapes(shapes: Mapping[str, rules.Shape], template: DiTConfig) -> DiTConfig:
    """The network that tensors of these shapes, by original name, belong to; what they do not say is the template's.

    They do not say how many heads there are: see `heads_of`.
    """
    size = functools.partial(rules.axis, shapes)
    dim = size(
        r"(patch_embedding|text_embedding\.2|time_embedding\.2|blocks\.0\.norm3)\.bias",
        0,
        template.dim,
    )
    patch = r"patch_embedding\.weight"
    cell = tuple(size(patch, axis, template.patch[axis - 2]) for axis in (2, 3, 4))
    return dataclasses.replace(
        template,
        dim=dim,
        ffn_dim=size(r"blocks\..*\.ffn\.0\.(weight|bias)", 0, template.ffn_dim),
        heads=heads_of(dim, template),
        layers=rules.layers(shapes) or template.layers,
        text_dim=size(r"text_embedding\.0\.weight", 1, template.text_dim),
        freq_dim=size(r"time_embedding\.0\.weight", 1, template.freq_dim),
        in_channels=size(patch, 1, template.in_channels),
        out_channels=size(r"head\.head\.(weight|bias)", 0, 0) // math.prod(cell)
        or template.out_channels,
        patch=cell,
    )


def require_text_alone(cfg: DiTConfig, where: str) -> None:
    """Raises `InputError` for a network that takes more channels than it gives: those of an image or of a control."""
    kind = (
        "an image-to-video model"
        if cfg.in_channels == IMAGE_CHANNELS
        else "a model of images or controls"
    )
    require(
        cfg.in_channels <= cfg.out_channels,
        f"{where} is {kind} (it takes {cfg.in_channels} channels and gives {cfg.out_channels}), not Wan2.1's "
        "text-to-video network; convert a text-to-video checkpoint.",
    )


def heads_of(dim: int, template: DiTConfig) -> int:
    """The template's heads at its width, else the fewest that are of even size and at most `WIDEST_HEAD` wide."""
    if dim == template.dim:
        return template.heads
    widths = (width for width in range(WIDEST_HEAD, 0, -2) if dim % width == 0)
    return dim // next(widths, dim)


def assumption(cfg: DiTConfig, template: DiTConfig) -> str | None:
    """What was assumed about the heads of `cfg`, of which only the shapes are known."""
    if cfg.dim == template.dim or cfg.dim % WIDEST_HEAD == 0:
        return None
    return (
        f"dit.heads={cfg.heads} is assumed (heads of {cfg.head_dim} channels): the tensors do not say how many "
        "heads there are; give --set dit.heads=N if the network has others"
    )


def config_from_original(config: Mapping[str, Any], other: DiTConfig = DiTConfig()) -> DiTConfig:
    """The network that an original `config.json` describes; what it leaves out is as in `other`."""
    _refuse_variants(config)
    return dataclasses.replace(
        other,
        dim=config["dim"],
        ffn_dim=config["ffn_dim"],
        heads=config["num_heads"],
        layers=config["num_layers"],
        text_dim=config.get("text_dim", other.text_dim),
        text_len=config.get("text_len", other.text_len),
        freq_dim=config.get("freq_dim", other.freq_dim),
        in_channels=config.get("in_dim", other.in_channels),
        out_channels=config.get("out_dim", other.out_channels),
        patch=tuple(config.get("patch_size", other.patch)),
        eps=config.get("eps", other.eps),
    )


def config_from_diffusers(config: Mapping[str, Any], text_len: int = 512) -> DiTConfig:
    """The network that a diffusers `config.json` describes, which does not say how long the text is."""
    _refuse_variants(config)
    return DiTConfig(
        dim=config["num_attention_heads"] * config["attention_head_dim"],
        ffn_dim=config["ffn_dim"],
        heads=config["num_attention_heads"],
        layers=config["num_layers"],
        text_dim=config["text_dim"],
        text_len=text_len,
        freq_dim=config["freq_dim"],
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
        patch=tuple(config["patch_size"]),
        eps=config["eps"],
    )
