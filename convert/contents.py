"""What the sources hold for which network: trainers' tables and prefixes, known extras, and other models refused."""

import hashlib
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from packforcing_jax.convert import networks, rules, umt5, wan_dit
from packforcing_jax.convert.sources import Content, Group, Inputs

from packforcing_jax.errors import InputError, require
from packforcing_jax.io.safetensors_io import Tensor

WHOLE = ("state_dict", "model_state_dict", "model", "module")  # tables that name no network
PREFERRED = ("generator_ema", "generator", *WHOLE)  # tables of trainers
FIRST = "patch_embedding.weight"  # a tensor of every transformer, called so in both layouts
LORA = "lora"  # the kind of a source that holds additions to a network
LORA_NAME = re.compile(r"(^|.*\.)lora_.*")
ALPHA = re.compile(r"(^|.*\.)alpha")
ALPHAS = ("lora_alpha", "alpha")  # how the strength of a LoRA is called beside it
WRAPPERS = re.compile(  # what tools for training and fine-tuning put into names, anywhere
    r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod|base_model|base_layer|"
    r"diffusion_model|transformer|module|model)\."
)


@dataclass(frozen=True)
class Ignored:
    """What is left out and why; `part` is the network it would have belonged to, if that is known."""

    name: str
    origin: str
    reason: str
    part: str = ""
    tensor: Tensor | None = None


@dataclass
class Contents:
    """Tensors by part and original name, additions by plain name, and whatever else there was."""

    networks: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    groups: dict[str, list[Group]] = field(default_factory=dict)
    adapters: dict[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None
    ignored: list[Ignored] = field(default_factory=list)
    wrong: rules.Mismatches = field(default_factory=rules.no_mismatches)


@dataclass(frozen=True)
class Offer:
    """The tensors of one network, by original name, in one group."""

    group: Group
    tensors: Mapping[str, Tensor]


def sort(inputs: Inputs, network: str | None = None, kind: str | None = None) -> Contents:
    """The tensors of all groups by network; `network` and `kind` are what the user wants of them."""
    contents = Contents()
    offers = defaultdict(list)
    tables = {group.origin: _tables(group.content) for group in inputs.groups}
    known = {key for per_group in tables.values() for path in per_group for key in path}
    require(
        network is None or not known.isdisjoint({network, f"{network}_{LORA}"}),
        f"no source has a network called {network!r}; they have {', '.join(sorted(known)[:8]) or 'one each'}.",
    )
    for group in inputs.groups:
        named = _plain(_chosen(tables[group.origin], group, network, contents), group, contents)
        for part, tensors in _by_part(named, group, kind, contents).items():
            offers[part].append(Offer(group, tensors))
        _note_alpha(group, contents)
    for part, each in offers.items():
        _settle(part, each, contents)
    return contents


# Tables inside each other


def transformers(group: Group) -> tuple[str, ...]:
    """The entries of a file that hold a transformer, such as `generator`; "" is a table that names no network."""
    paths = [
        path
        for path, table in _tables(group.content).items()
        if any(WRAPPERS.sub("", name) == FIRST for name in table)
    ]
    return tuple(next((key for key in path if key not in WHOLE), "") for path in paths)


def _tables(
    content: Content, path: tuple[str, ...] = ()
) -> dict[tuple[str, ...], dict[str, Tensor]]:
    """Every table that has tensors itself, by the keys that lead to it."""
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if _listed(content)
        else ()
    )
    own = {}
    inner = {}
    named = {str(key): value for key, value in items}
    require(
        not named or len(named) == len(content),
        f"{'.'.join(path) or 'the file'} has a number and a text as keys that read alike; re-save it.",
    )
    for key, value in named.items():
        if isinstance(value, Tensor):
            own[key] = value
        else:
            inner |= _tables(value, (*path, key))
    return ({path: own} if own else {}) | inner


def _listed(content: Content) -> bool:
    return isinstance(content, list | tuple)


def _chosen(
    tables: Mapping[tuple[str, ...], Mapping[str, Tensor]],
    group: Group,
    network: str | None,
    contents: Contents,
) -> dict[str, Tensor]:
    """The tensors of the tables that are meant, of a network and of a LoRA; the others are noted as ignored."""
    loras = [
        path
        for path, table in tables.items()
        if all(LORA_NAME.match(n) or ALPHA.match(n) for n in table)
    ]
    others = [path for path in tables if path not in loras]
    preferred = (network, *PREFERRED) if network else PREFERRED
    paths = [
        *_pick(others, preferred, group),
        *_pick(loras, [f"{name}_{LORA}" for name in preferred], group),
    ]
    for path, table in tables.items():
        if path not in paths:
            reason = f"of {'.'.join(path) or 'no network'}, which was not chosen"
            contents.ignored += [
                Ignored(t.name, t.origin, reason, "dit", t) for t in table.values()
            ]
    contents.ignored += [
        Ignored(name, group.origin, "no tensor") for name in _numbers(group.content)
    ]
    return {name: tensor for path in paths for name, tensor in tables[path].items()}


def _pick(
    paths: Sequence[tuple[str, ...]], preferred: Sequence[str], group: Group
) -> list[tuple[str, ...]]:
    """The one table that is meant of those at `paths`, if there are any."""
    for matches in (
        *([path for path in paths if key in path] for key in preferred),
        [path for path in paths if not path],
        paths,
    ):
        if len(matches) == 1:
            return list(matches)
        names = ", ".join(sorted({path[0] for path in matches if path})[:8])
        require(
            not matches,
            f"{group.origin} holds several networks ({names}); choose one with --network NAME.",
        )
    return []


def _numbers(content: Content) -> Iterator[str]:
    """What a trainer's file holds beside tensors, such as step counters."""
    if isinstance(content, dict):
        yield from (
            str(key)
            for key, value in content.items()
            if not isinstance(value, Tensor) and not _tables(value)
        )


def _note_alpha(group: Group, contents: Contents) -> None:
    """Notes how strong the LoRA of a group is, if something beside its tensors says so."""
    beside = group.content if isinstance(group.content, dict) else {}
    values = [table.get(key) for table in (beside, group.adapter) for key in ALPHAS]
    contents.alpha = next(
        (float(value) for value in values if isinstance(value, int | float)), contents.alpha
    )
    require(
        math.isfinite(contents.alpha or 0),
        f"{group.origin}: the LoRA's alpha is no number; correct it.",
    )
    for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
        require(
            not group.adapter.get(key),
            f"{group.origin}: {key} of the LoRA is not supported; merge it first.",
        )


# Names


def _plain(named: Mapping[str, Tensor], group: Group, contents: Contents) -> dict[str, Tensor]:
    """Tensors by name without what trainers put into it, less known extras; other models are refused."""
    out: dict[str, Tensor] = {}
    for name, tensor in named.items():
        name = WRAPPERS.sub("", name)
        _refuse_others(name, tensor, group)
        reasons = [why for pattern, why in wan_dit.EXTRAS.items() if re.fullmatch(pattern, name)]
        if reasons:
            contents.ignored.append(Ignored(tensor.name, tensor.origin, reasons[0], "dit", tensor))
        else:
            _put(out, name, tensor, contents.wrong)
    return out


def _refuse_others(name: str, tensor: Tensor, group: Group) -> None:
    for pattern, model in wan_dit.OTHERS.items():
        if re.fullmatch(pattern, name):
            raise InputError(
                f"{group.origin} is {model} (it has {tensor.name}), not Wan2.1's text-to-video network; "
                "convert a text-to-video checkpoint."
            )


def _by_part(
    named: dict[str, Tensor], group: Group, kind: str | None, contents: Contents
) -> dict[str, dict[str, Tensor]]:
    """Tensors by part and original name; what no network knows is noted, or refused if that is all there is."""
    added = {name for name in named if kind == LORA or LORA_NAME.match(name)}
    added |= {name for name in named if added and ALPHA.match(name)}
    for name in added:
        _put(contents.adapters, name, named[name], contents.wrong)
    rest = {name: tensor for name, tensor in named.items() if name not in added}
    known = networks.original_names(rest)
    meant = (
        networks.original_names(rest, [networks.KINDS[kind]]) if kind in networks.KINDS else known
    )
    require(
        bool(known or added),
        f"{group.origin} holds no network of Wan2.1 (its tensors are called "
        f"{', '.join(list(named)[:4])}); {_hint(named)}.",
    )
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in rest.items():
        if name == umt5.EMBEDDING_COPY and name in meant and "shared.weight" in rest:
            _check_copy(tensor, rest["shared.weight"], contents)
        elif name in meant:
            part, original = meant[name]
            _put(parts[part], original, tensor, contents.wrong)
        elif name in known:
            contents.ignored.append(
                Ignored(tensor.name, tensor.origin, f"--kind {kind}", known[name][0], tensor)
            )
        else:
            contents.wrong["unknown to the table"].append(tensor.name)
    return parts


def _hint(named: Mapping[str, Tensor]) -> str:
    ours = any("/" in name for name in named)
    return (
        "give the model folder that it belongs to"
        if ours
        else "convert a checkpoint of Wan2.1 text-to-video"
    )


def _put(table: dict[str, Tensor], name: str, tensor: Tensor, wrong: rules.Mismatches) -> None:
    if name in table:
        wrong["named twice"].append(
            " and ".join(
                f"{each.name} of {Path(each.origin).name}" for each in (tensor, table[name])
            )
        )
    table.setdefault(name, tensor)


def _settle(part: str, offers: Sequence[Offer], contents: Contents) -> None:
    """Takes a network from the files that the user named, else from those that were found in folders."""
    best = [offer for offer in offers if offer.group.named] or list(offers)
    contents.groups[part] = [offer.group for offer in best]
    contents.networks[part] = {}
    for offer in best:
        for name, tensor in offer.tensors.items():
            _put(contents.networks[part], name, tensor, contents.wrong)
    taken = ", ".join(offer.group.origin for offer in best)
    contents.ignored += [
        Ignored(tensor.name, tensor.origin, f"this network is taken from {taken}", part, tensor)
        for offer in offers
        if offer not in best
        for tensor in offer.tensors.values()
    ]


# Copies


def plain_bytes(array: np.ndarray) -> np.ndarray:
    """The bytes of an array in the order of its axes, without a copy where they lie so."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def digest(array: np.ndarray) -> str:
    """The SHA-256 of an array's bytes, in the order of its axes."""
    return hashlib.sha256(plain_bytes(array).data).hexdigest()


def _check_copy(copy: Tensor, shared: Tensor, contents: Contents) -> None:
    """Leaves out the second copy of the embedding, which must be one."""
    same = (copy.shape, copy.dtype) == (shared.shape, shared.dtype) and digest(
        copy.read()
    ) == digest(shared.read())
    if not same:
        contents.wrong[f"unlike {shared.name}"].append(copy.name)
    contents.ignored.append(
        Ignored(copy.name, copy.origin, f"the same as {shared.name}", "text", copy)
    )
