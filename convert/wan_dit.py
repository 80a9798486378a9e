"""Wan2.1's diffusion transformer: original names to ours, diffusers names to original ones, sizes from both configs."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from convert import rules
from convert.rules import Rule
from packforcing_jax.config import DiTConfig
from packforcing_jax.errors import InputError

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")  # left in names by training tools


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
    ("blocks.{}.norm3", "blocks.{}.norm2"),  # the affine norm before cross-attention has another number there
    *((f"blocks.{{}}.cross_attn.{x}", f"blocks.{{}}.attn2.to_{x}") for x in "qkv"),
    ("blocks.{}.cross_attn.o", "blocks.{}.attn2.to_out.0"),
    *((f"blocks.{{}}.cross_attn.norm_{x}", f"blocks.{{}}.attn2.norm_{x}") for x in "qk"),
    ("blocks.{}.ffn.0", "blocks.{}.ffn.net.0.proj"),
    ("blocks.{}.ffn.2", "blocks.{}.ffn.net.2"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
)


def plain_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`tensors` without the prefixes that trainers leave in the names (backbone: Self-Forcing checkpoints)."""
    out = {}
    for name, tensor in tensors.items():
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")
        out[name.removeprefix("model.")] = tensor
    if len(out) != len(tensors):
        raise InputError(f"{len(tensors) - len(out)} tensors have the same name once trainer prefixes are removed; "
                         "give a file with one network.")  # fmt: skip
    return out


def _refuse_variants(config: Mapping[str, Any]) -> None:
    for key, built in (("cross_attn_norm", (True,)), ("qk_norm", (True, "rms_norm_across_heads"))):
        if config.get(key, built[0]) not in built:
            raise InputError(f"{key}={config[key]!r} is not Wan2.1's text-to-video network; use {built[-1]!r}.")


def config_from_original(config: Mapping[str, Any]) -> DiTConfig:
    """The network that an original `config.json` describes; what it leaves out has Wan2.1's value."""
    _refuse_variants(config)
    return DiTConfig(
        dim=config["dim"],
        ffn_dim=config["ffn_dim"],
        heads=config["num_heads"],
        layers=config["num_layers"],
        text_dim=config.get("text_dim", 4096),
        text_len=config.get("text_len", 512),
        freq_dim=config.get("freq_dim", 256),
        in_channels=config.get("in_dim", 16),
        out_channels=config.get("out_dim", 16),
        patch=tuple(config.get("patch_size", (1, 2, 2))),
        eps=config.get("eps", 1e-6),
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
