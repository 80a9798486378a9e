"""The names of the video autoencoder's weights: original checkpoint, ours and diffusers, in one table."""

import dataclasses
import functools
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
from flax import nnx
from packforcing_jax.convert import rules
from packforcing_jax.convert.rules import Rule, conv2d, conv3d, gamma2d, gamma3d, same

from packforcing_jax import pytrees
from packforcing_jax.config import WAN_MEAN, WAN_STD, VAEConfig
from packforcing_jax.errors import require
from packforcing_jax.networks import vae

KINDS = {  # kind of layer -> (original and diffusers leaf, our leaf, transform)
    "conv3d": (("weight", "kernel", conv3d), ("bias", "bias", same)),
    "conv2d": (("weight", "kernel", conv2d), ("bias", "bias", same)),
    "norm3d": (("gamma", "gamma", gamma3d),),
    "norm2d": (("gamma", "gamma", gamma2d),),
}

RESIDUAL = (  # original, ours, diffusers, kind
    ("residual.0", "norm1", "norm1", "norm3d"),
    ("residual.2", "conv1", "conv1", "conv3d"),
    ("residual.3", "norm2", "norm2", "norm3d"),
    ("residual.6", "conv2", "conv2", "conv3d"),
    ("shortcut", "shortcut", "conv_shortcut", "conv3d"),
)
RESAMPLE = (
    ("resample.1", "conv", "resample.1", "conv2d"),
    ("time_conv", "time_conv", "time_conv", "conv3d"),
)
ATTENTION = (
    ("norm", "norm", "norm", "norm2d"),
    ("to_qkv", "to_qkv", "to_qkv", "conv2d"),
    ("proj", "proj", "proj", "conv2d"),
)
HALF = (
    ("conv1", "stem/conv", "conv_in", "conv3d"),
    ("head.0", "head/norm", "norm_out", "norm3d"),
    ("head.2", "head/conv", "conv_out", "conv3d"),
)
WHOLE = (
    ("conv1", "quant", "quant_conv", "conv3d"),
    ("conv2", "post_quant", "post_quant_conv", "conv3d"),
)
MIDDLE = ((0, "resnets.0", RESIDUAL), (1, "attentions.0", ATTENTION), (2, "resnets.1", RESIDUAL))

# {layer} is the number in a flat list; diffusers nests its decoder's as {stage} and {part}
PLACES = (  # original, ours, diffusers, what is there
    ("", "", "", WHOLE),
    *((f"{half}.", f"{half}/", f"{half}.", HALF) for half in ("encoder", "decoder")),
    *(
        (f"{half}.middle.{here}.", f"{half}/middle/{here}/", f"{half}.mid_block.{there}.", what)
        for half in ("encoder", "decoder")
        for here, there, what in MIDDLE
    ),
    *(
        (
            "encoder.downsamples.{layer}.",
            "encoder/down/{layer}/",
            "encoder.down_blocks.{layer}.",
            what,
        )
        for what in (RESIDUAL, RESAMPLE)
    ),
    *(
        (
            "decoder.upsamples.{layer}.",
            "decoder/up/{layer}/",
            "decoder.up_blocks.{stage}.{part}.",
            what,
        )
        for what in (RESIDUAL, RESAMPLE)
    ),
)

DOWN = r"encoder\.downsamples\.{}"  # pattern

NAMES = tuple(  # original, ours, diffusers, transform: one row per tensor, with {layer} left open
    (f"{original}{a}.{leaf}", f"{ours}{b}/{our_leaf}", f"{diffusers}{c}.{leaf}", transform)
    for original, ours, diffusers, what in PLACES
    for a, b, c, kind in what
    for leaf, our_leaf, transform in KINDS[kind]
)

WAN_VAE = tuple(
    Rule(
        re.escape(original).replace(r"\{layer\}", r"(\d+)"),
        ours.replace("{layer}", r"\1"),
        transform,
    )
    for original, ours, _, transform in NAMES
)


def diffusers_names(cfg: VAEConfig) -> dict[str, str]:
    """Original name -> diffusers name of every tensor of this size."""
    paths = pytrees.flatten(jax.eval_shape(lambda: vae.WanVAE(cfg, nnx.Rngs(0))))
    return dict(_names_of(path, cfg.num_res_blocks) for path in paths)


def _names_of(path: str, num_res_blocks: int) -> tuple[str, str]:
    """The original and the diffusers name of our tensor at `path`."""
    for original, ours, diffusers, _ in NAMES:
        match = re.fullmatch(re.escape(ours).replace(r"\{layer\}", r"(?P<layer>\d+)"), path)
        if match is not None:
            layer = int(match.groupdict().get("layer", 0))
            stage, index = divmod(
                layer, num_res_blocks + 2
            )  # each but the last stage: blocks, then one upsampler
            part = f"resnets.{index}" if index <= num_res_blocks else "upsamplers.0"
            return original.format(layer=layer), diffusers.format(
                layer=layer, stage=stage, part=part
            )
    raise KeyError(path)


def renamings(names: Collection[str]) -> dict[str, list[str]]:
    """What each name of a diffusers checkpoint may be called originally."""
    numbers = (
        re.match(rf"decoder\.up_blocks\.0\.resnets\.{rules.NUMBER}\.", name) for name in names
    )
    stage = 2 + max(
        (int(hit[1]) for hit in numbers if hit), default=0
    )  # residual blocks, then one upsampler
    rows = [(original, _pattern(diffusers)) for original, _, diffusers, _ in NAMES]
    return {
        name: [
            _flat(original, hit, stage) for original, row in rows if (hit := row.fullmatch(name))
        ]
        for name in names
    }


def _pattern(diffusers: str) -> re.Pattern[str]:
    """What matches a diffusers name with its numbers open."""
    opened = {
        "layer": f"(?P<layer>{rules.NUMBER})",
        "stage": f"(?P<stage>{rules.NUMBER})",
        "part": rf"(resnets\.(?P<resnet>{rules.NUMBER})|upsamplers\.0)",
    }
    return re.compile(
        functools.reduce(
            lambda text, key: text.replace(rf"\{{{key}\}}", opened[key]),
            opened,
            re.escape(diffusers),
        )
    )


def _flat(original: str, hit: re.Match[str], stage: int) -> str:
    """The original name, whose layers are numbered through, of a name that matched."""
    groups = hit.groupdict()
    if "stage" not in groups:
        return original.format(**groups)
    index = stage - 1 if groups["resnet"] is None else int(groups["resnet"])
    return original.format(layer=int(groups["stage"]) * stage + index)


def config_from_shapes(shapes: Mapping[str, rules.Shape], template: VAEConfig) -> VAEConfig:
    """The codec that tensors of these shapes, by original name, belong to.

    They do not say how latents are normalised: that is the template's if it has as many channels, else nothing.
    """
    size = functools.partial(rules.axis, shapes)
    dim = size(r"encoder\.conv1\..*|encoder\.downsamples\.0\.residual\.0\.gamma", 0, template.dim)
    z_dim = size(r"conv2\.(weight|bias)", 0, template.z_dim)
    matches = (
        re.fullmatch(DOWN.format(rules.NUMBER) + r"\.resample\.1\.weight", name) for name in shapes
    )
    indices = sorted(int(hit[1]) for hit in matches if hit)
    if not indices or indices[0] * len(indices) > len(
        shapes
    ):  # too few tensors to be that many layers
        indices = [
            template.num_res_blocks + stage * (template.num_res_blocks + 1)
            for stage in range(len(template.temporal_downsample))
        ]
    widths = [size(DOWN.format(index) + r"\.resample\.1\..*", 0, dim) for index in indices]
    widths.append(size(r"encoder\.head\.0\.gamma|encoder\.middle\..*\.gamma", 0, dim))
    scale = template if template.z_dim == z_dim else plain(z_dim)
    return dataclasses.replace(
        scale,
        dim=dim,
        dim_mult=tuple(width // dim or 1 for width in widths),
        num_res_blocks=indices[0],
        temporal_downsample=tuple(
            f"encoder.downsamples.{index}.time_conv.weight" in shapes for index in indices
        ),
    )


ONLY = {  # setting of the original or of diffusers -> the values that this architecture has
    "attn_scales": ([],),
    "is_residual": (False,),
    "patch_size": (None,),
    "in_channels": (3,),
    "out_channels": (3,),
}


def vae_config(meta: Mapping[str, Any]) -> VAEConfig:
    """Our config from an original one (`dim`, `scale` in words) or one of diffusers (`base_dim`, `latents_mean`)."""
    for name, allowed in ONLY.items():
        value = meta.get(name, allowed[0])
        require(
            value in allowed,
            f"VAE setting {name}={value!r} is not supported; convert one with {allowed[0]!r}.",
        )
    dim = meta["dim"] if "dim" in meta else meta["base_dim"]
    require(
        meta.get("decoder_base_dim") in (None, dim),
        f"decoder_base_dim must be None or {dim}, as in Wan2.1.",
    )
    mean, std = _scale(meta)
    return VAEConfig(
        dim=dim,
        z_dim=meta["z_dim"],
        dim_mult=tuple(meta["dim_mult"]),
        num_res_blocks=meta["num_res_blocks"],
        temporal_downsample=tuple(meta["temperal_downsample"]),
        mean=mean,
        std=std,
    )


def config_from_diffusers(meta: Mapping[str, Any], other: VAEConfig) -> VAEConfig:
    """The codec that a diffusers `config.json` describes, its latents normalised as in `other` if it does not say."""
    cfg = vae_config(meta)
    stated = len(meta.get("latents_mean") or ()) == len(meta.get("latents_std") or ()) == cfg.z_dim
    return (
        cfg
        if stated or other.z_dim != cfg.z_dim
        else dataclasses.replace(cfg, mean=other.mean, std=other.std)
    )


def _scale(meta: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Latent means and deviations; a list of another length than z_dim is one that was never used."""
    mean = tuple(meta.get("latents_mean") or ())
    std = tuple(meta.get("latents_std") or ())
    if "wan2.1" in meta.get("scale", "").lower():
        mean = WAN_MEAN
        std = WAN_STD
    unused = plain(meta["z_dim"])
    return (mean, std) if len(mean) == len(std) == meta["z_dim"] else (unused.mean, unused.std)


def plain(z_dim: int) -> VAEConfig:
    """A codec of Wan2.1's form whose latents, of `z_dim` channels, are not normalised."""
    return VAEConfig(z_dim=z_dim, mean=(0.0,) * z_dim, std=(1.0,) * z_dim)


def unscaled(cfg: VAEConfig) -> VAEConfig:
    """`cfg` for latents that are not normalised, as the autoencoder of diffusers takes and gives them."""
    return dataclasses.replace(cfg, mean=plain(cfg.z_dim).mean, std=plain(cfg.z_dim).std)
