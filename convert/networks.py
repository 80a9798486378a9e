"""The networks that can be converted, one row each: their rules, other layouts of their names, and their sizes."""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import jax
from flax import nnx
from packforcing_jax.convert import packing, rules, umt5, wan_dit, wan_vae

from packforcing_jax import pytrees
from packforcing_jax.config import (
    CompressorConfig,
    DiTConfig,
    Experiment,
    ModelConfig,
    SpaceToDepthConfig,
    TextConfig,
    VAEConfig,
)
from packforcing_jax.errors import InputError, require
from packforcing_jax.io import beginnings
from packforcing_jax.networks import codec, compressor, dit, text

PartConfig: TypeAlias = (
    DiTConfig | ModelConfig | CompressorConfig | VAEConfig | SpaceToDepthConfig | TextConfig
)
WIDTHS = range(1, 1 << 20)
LAYERS = range(1, 10_000)
LONGEST_SETTINGS = 1 << 20  # bytes of a config.json


@dataclass(frozen=True)
class Network:
    """One part of a model. `foreign`: for each other public layout, what its names are called originally."""

    kind: str  # as people call it
    table: Sequence[rules.Rule]
    build: Callable[[Any], Any]  # out of its settings; the compressor out of all of them
    from_shapes: Callable[[Mapping[str, rules.Shape], Any], Any]
    foreign: Sequence[Callable[[Collection[str]], Mapping[str, Sequence[str]]]] = ()


NETWORKS = {  # by part of a model folder; the same word names the settings in an experiment
    "dit": Network(
        "dit",
        wan_dit.WAN_DIT,
        lambda cfg: dit.WanDiT(cfg, nnx.Rngs(0)),
        wan_dit.config_from_shapes,
        tuple(
            functools.partial(lambda layout, names: rules.renamings(names, layout), layout)
            for layout in wan_dit.LAYOUTS
        ),
    ),
    "compressor": Network(
        "compressor",
        packing.COMPRESSOR,
        lambda exp: compressor.build(exp.step, nnx.Rngs(0)),
        packing.config_from_shapes,
    ),
    "codec": Network(
        "vae",
        wan_vae.WAN_VAE,
        lambda cfg: codec.make(cfg, nnx.Rngs(0)),
        wan_vae.config_from_shapes,
        (wan_vae.renamings,),
    ),
    "text": Network(
        "text",
        umt5.UMT5,
        lambda cfg: text.UMT5(cfg, nnx.Rngs(0)),
        umt5.config_from_shapes,
        (umt5.renamings,),
    ),
}
KINDS = {network.kind: part for part, network in NETWORKS.items()}


def wanted(part: str, exp: Experiment) -> Mapping[str, rules.Shape]:
    """The shape of every array of a part by path; nothing is allocated."""
    return _shapes(part, exp if part == "compressor" else getattr(exp, part))


@functools.lru_cache(maxsize=16)
def _shapes(part: str, settings: PartConfig | Experiment) -> Mapping[str, rules.Shape]:
    shapes = jax.eval_shape(lambda: NETWORKS[part].build(settings))
    return {path: tuple(leaf.shape) for path, leaf in pytrees.flatten(shapes).items()}


def merged_axes(exp: Experiment) -> dict[str, int]:
    """How long the axes are that the model holds as one: channels and cells of a patch."""
    return {"c": exp.dit.in_channels, **dict(zip("tyx", exp.dit.patch, strict=True))}


def original_names(
    names: Collection[str], among: Collection[str] = tuple(NETWORKS)
) -> dict[str, tuple[str, str]]:
    """(part, original name) of every name that the layout knows which knows most of `names`; only parts `among`."""
    layouts = [
        {
            name: (part, name)
            for name in names
            for part in among
            if any(rule.match(name) for rule in NETWORKS[part].table)
        }
    ]
    for part in among:
        for foreign in NETWORKS[part].foreign:
            renamed = foreign(names)
            layouts.append({name: (part, new[0]) for name, new in renamed.items() if len(new) == 1})
    return max(layouts, key=len)


# What a config.json says


@dataclass(frozen=True)
class Form:
    """A form of config.json: it describes `part` where it has all `keys`; `read` completes it from another config."""

    part: str
    keys: frozenset[str]
    read: Callable[[Mapping[str, Any], Any], Any]


FORMS = (
    Form(
        "dit",
        frozenset({"dim", "ffn_dim", "num_heads", "num_layers"}),
        wan_dit.config_from_original,
    ),
    Form(
        "dit",
        frozenset(
            {
                "num_attention_heads",
                "attention_head_dim",
                "ffn_dim",
                "num_layers",
                "text_dim",
                "freq_dim",
                "in_channels",
                "out_channels",
                "patch_size",
                "eps",
            }
        ),
        lambda settings, other: wan_dit.config_from_diffusers(settings, other.text_len),
    ),
    Form(
        "codec",
        frozenset({"base_dim", "z_dim", "dim_mult", "num_res_blocks", "temperal_downsample"}),
        wan_vae.config_from_diffusers,
    ),
    Form(
        "text",
        frozenset(
            {
                "vocab_size",
                "d_model",
                "d_kv",
                "d_ff",
                "num_heads",
                "num_layers",
                "relative_attention_num_buckets",
            }
        ),
        lambda settings, other: dataclasses.replace(
            umt5.config_from_transformers(settings), max_words=other.max_words
        ),
    ),
)
COUNTED = {  # settings that must be whole numbers, and how large they may be
    "num_layers": LAYERS,
    "num_res_blocks": range(1, 20),
    **dict.fromkeys(
        (
            "dim",
            "ffn_dim",
            "num_heads",
            "text_dim",
            "text_len",
            "freq_dim",
            "in_dim",
            "out_dim",
            "num_attention_heads",
            "attention_head_dim",
            "in_channels",
            "out_channels",
            "base_dim",
            "z_dim",
            "vocab_size",
            "d_model",
            "d_kv",
            "d_ff",
            "relative_attention_num_buckets",
            "relative_attention_max_distance",
        ),
        WIDTHS,
    ),
}
LISTED = {  # settings that must be lists: of how many, and what each must be
    "patch_size": (range(3, 4), lambda each: type(each) is int and each in WIDTHS),
    "dim_mult": (range(1, 9), lambda each: type(each) is int and each in WIDTHS),
    "temperal_downsample": (range(0, 8), lambda each: type(each) is bool),
    "latents_mean": (
        range(1, 1000),
        lambda each: type(each) in (int, float) and abs(each) < math.inf,
    ),
    "latents_std": (
        range(1, 1000),
        lambda each: type(each) in (int, float) and 0 < each < math.inf,
    ),
}


def read_settings(path: Path) -> Mapping[str, Any]:
    """The JSON table in `path`, whatever it is about."""
    require(
        path.stat().st_size <= LONGEST_SETTINGS, f"{path} is too long for settings; check the path."
    )
    settings: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        settings = json.loads(path.read_bytes())
    if not isinstance(settings, dict):
        damaged = "is damaged (no table of settings in JSON); fetch it again or remove it."
        raise InputError(f"{path} {beginnings.complaint(path, 'json') or damaged}")
    return settings


def _allowed(key: str, value: object) -> bool:
    if key in COUNTED:
        return type(value) is int and value in COUNTED[key]
    if key in LISTED and value is not None:
        count, fits = LISTED[key]
        return isinstance(value, list) and len(value) in count and all(map(fits, value))
    return key != "eps" or type(value) is float and 0 < value < 1


def described(
    part: str, settings: Mapping[str, Any], other: PartConfig, where: str
) -> PartConfig | None:
    """The config of a part that a config.json describes, completed from `other`; None if it is not about that part."""
    for form in FORMS:
        if form.part == part and form.keys <= settings.keys():
            for key, value in settings.items():
                require(
                    _allowed(key, value),
                    f"the settings beside {where} say {key}={str(value)[:80]}, which cannot "
                    "be; fetch them again.",
                )
            return form.read(settings, other)
    return None
