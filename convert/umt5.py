"""Wan2.1's UMT5 encoder: original names to ours, transformers names to original ones, sizes from both configs."""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

from packforcing_jax.convert import rules
from packforcing_jax.convert.rules import Rule

from packforcing_jax.config import TextConfig
from packforcing_jax.errors import InputError

UMT5 = (
    Rule(r"token_embedding\.weight", "embedding/embedding"),
    Rule(r"blocks\.(\d+)\.norm([12])\.weight", r"blocks/norm\2/scale"),
    Rule(r"blocks\.(\d+)\.attn\.([qkvo])\.weight", r"blocks/attn/\2/kernel", rules.linear),
    Rule(r"blocks\.(\d+)\.pos_embedding\.embedding\.weight", "blocks/position/embedding"),
    Rule(r"blocks\.(\d+)\.ffn\.gate\.0\.weight", "blocks/ffn/gate/kernel", rules.linear),
    Rule(r"blocks\.(\d+)\.ffn\.(fc[12])\.weight", r"blocks/ffn/\2/kernel", rules.linear),
    Rule(r"norm\.weight", "norm/scale"),
)

UMT5_TRANSFORMERS = {
    "token_embedding.weight": "shared.weight",
    "blocks.{}.norm1.weight": "encoder.block.{}.layer.0.layer_norm.weight",
    **{
        f"blocks.{{}}.attn.{x}.weight": f"encoder.block.{{}}.layer.0.SelfAttention.{x}.weight"
        for x in "qkvo"
    },
    "blocks.{}.pos_embedding.embedding.weight": (
        "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    ),
    "blocks.{}.norm2.weight": "encoder.block.{}.layer.1.layer_norm.weight",
    "blocks.{}.ffn.gate.0.weight": "encoder.block.{}.layer.1.DenseReluDense.wi_0.weight",
    "blocks.{}.ffn.fc1.weight": "encoder.block.{}.layer.1.DenseReluDense.wi_1.weight",
    "blocks.{}.ffn.fc2.weight": "encoder.block.{}.layer.1.DenseReluDense.wo.weight",
    "norm.weight": "encoder.final_layer_norm.weight",
}

EMBEDDING_COPY = (
    "encoder.embed_tokens.weight"  # transformers may write the shared embedding a second time
)

EXTRAS = {  # names of what stands beside the encoder in files -> why it is left out
    r"spiece_model|spm_model|tokenizer_model": "the tokenizer's bytes, for which --tokenizer FILE gives tokenizer.json",
    r"decoder\.(block|embed_tokens|final_layer_norm)\..*|lm_head\.weight": "of the text model's decoder",
    r"logit_scale": "number of another text encoder",
}


def renamings(names: Collection[str]) -> dict[str, list[str]]:
    """What each name of a transformers checkpoint is called originally; two of them may be the same tensor."""
    rows = [*UMT5_TRANSFORMERS.items(), ("token_embedding.weight", EMBEDDING_COPY)]
    return rules.renamings(names, rows)


def config_from_shapes(shapes: Mapping[str, rules.Shape], template: TextConfig) -> TextConfig:
    """The encoder that tensors of these shapes, by original name, belong to; what they do not say is the template's."""
    size = functools.partial(rules.axis, shapes)
    return dataclasses.replace(
        template,
        vocab=size(r"token_embedding\.weight", 0, template.vocab),
        dim=size(r"(blocks\..*\.)?norm[12]?\.weight", 0, template.dim),
        dim_attn=size(r"blocks\..*\.attn\.[qkv]\.weight", 0, template.dim_attn),
        dim_ffn=size(r"blocks\..*\.ffn\.(gate\.0|fc1)\.weight", 0, template.dim_ffn),
        heads=size(r"blocks\..*\.pos_embedding\.embedding\.weight", 1, template.heads),
        layers=rules.layers(shapes) or template.layers,
        buckets=size(r"blocks\..*\.pos_embedding\.embedding\.weight", 0, template.buckets),
    )


def config_from_original(config: Mapping[str, Any]) -> TextConfig:
    """The encoder that the arguments of the original `T5Encoder` describe."""
    if config.get("shared_pos", False):
        raise InputError(
            "shared_pos=True is T5, where layers share one position bias; UMT5 needs shared_pos=False."
        )
    return TextConfig(
        vocab=config["vocab"],
        dim=config["dim"],
        dim_attn=config["dim_attn"],
        dim_ffn=config["dim_ffn"],
        heads=config["num_heads"],
        layers=config["num_layers"],
        buckets=config["num_buckets"],
        max_distance=config.get("max_dist", 128),
    )


def config_from_transformers(config: Mapping[str, Any]) -> TextConfig:
    """The encoder that a transformers `config.json` of UMT5 describes."""
    for key, built in (("model_type", "umt5"), ("feed_forward_proj", "gated-gelu")):
        if config.get(key, built) != built:
            raise InputError(
                f"{key}={config[key]!r} is not UMT5; use a checkpoint of {key} {built!r}."
            )
    return TextConfig(
        vocab=config["vocab_size"],
        dim=config["d_model"],
        dim_attn=config["num_heads"] * config["d_kv"],
        dim_ffn=config["d_ff"],
        heads=config["num_heads"],
        layers=config["num_layers"],
        buckets=config["relative_attention_num_buckets"],
        max_distance=config.get("relative_attention_max_distance", 128),
    )
