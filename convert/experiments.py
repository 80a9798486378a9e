"""The experiment that belongs to converted weights: sizes from their settings or shapes, the rest from a template."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from packforcing_jax.convert import networks, wan_dit, wan_vae
from packforcing_jax.convert.contents import Contents
from packforcing_jax.convert.networks import PartConfig

from packforcing_jax.config import DiTConfig, Experiment, VAEConfig, loading
from packforcing_jax.io import model_folder
from packforcing_jax.networks.codec import Config


def describe(
    contents: Contents,
    taken: Mapping[str, model_folder.Opened],
    template: Experiment,
    *,
    overrides: Sequence[str],
    notes: list[str],
) -> Experiment:
    """The template with the sizes of what was found, then with the user's `sets`.

    Parts `taken` from model folders bring their settings; what was assumed goes to `notes`.
    """
    parts = {part: _from_weights(part, contents, template) for part in contents.networks}
    parts |= {part: getattr(model.experiment, part) for part, model in taken.items()}
    dit = parts.get("dit", template.dit)
    if "codec" not in parts:
        parts["codec"] = _codec_for(dit.in_channels, template.codec, notes)
    if "dit" in contents.networks and "dit" not in taken:
        _note_heads(contents, dit, template, overrides, notes)
    parts.setdefault("compressor", dataclasses.replace(template.compressor, branches="lr"))
    codec = parts.pop("codec")
    start = dataclasses.replace(
        template, codec=codec, dit=dataclasses.replace(template.dit, in_channels=codec.z_dim)
    )
    sizes = [
        f"{part}.{field.name}={getattr(cfg, field.name)!r}"
        for part, cfg in parts.items()
        for field in dataclasses.fields(cfg)
    ]
    exp = loading.override(start, [*sizes, *overrides])
    _note_block(contents, exp, notes)
    return exp


def _from_weights(part: str, contents: Contents, template: Experiment) -> Any:
    """The config of a part, from the settings beside its weights if they are about it, else from shapes."""
    other = getattr(template, part)
    if part == "codec" and not isinstance(other, VAEConfig):
        other = VAEConfig()
    shapes = {name: tensor.shape for name, tensor in contents.networks[part].items()}
    cfg = networks.NETWORKS[part].from_shapes(shapes, other)
    settings = _settings(part, contents, cfg)
    return settings[0] if settings else cfg


def _settings(part: str, contents: Contents, cfg: PartConfig) -> list[PartConfig]:
    """What the settings beside the weights of a part say, where they are about it."""
    candidates = (
        networks.described(part, group.settings, cfg, group.origin)
        for group in contents.groups[part]
    )
    return [each for each in candidates if each is not None]


BLOCKS = ("num_frames_per_block", "num_frame_per_block")  # what causal students call `cache.block`


def _note_block(contents: Contents, exp: Experiment, notes: list[str]) -> None:
    """Notes where the settings beside a transformer ask for other blocks than are taken."""
    for group in contents.groups.get("dit", ()):
        for key in BLOCKS:
            said = group.settings.get(key)
            if said not in (None, exp.cache.block):
                notes.append(
                    f"the settings beside {group.origin} say {key}={str(said)[:20]} and blocks of {exp.cache.block} "
                    "are taken; give the --card that it is, or --set cache.block=N"
                )


def _codec_for(channels: int, codec: Config, notes: list[str]) -> Config:
    """The template's codec if its latents have this many channels, else one of that many that are not normalised."""
    if codec.z_dim == channels:
        return codec
    notes.append(
        f"no codec was given and the template's has {codec.z_dim} channels, not {channels}: latents are "
        "taken as not normalised; give --set codec.mean=(...) and codec.std=(...) if they are"
    )
    return wan_vae.plain(channels)


def _note_heads(
    contents: Contents,
    dit: DiTConfig,
    template: Experiment,
    overrides: Sequence[str],
    notes: list[str],
) -> None:
    stated = any(each.partition("=")[0].strip() == "dit.heads" for each in overrides)
    assumed = (
        None if stated or _settings("dit", contents, dit) else wan_dit.assumption(dit, template.dit)
    )
    notes += [assumed] if assumed else []
