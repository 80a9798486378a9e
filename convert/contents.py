"""What the sources hold for which network: trainers' tables and prefixes, known extras, and other models refused."""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from packforcing_jax.convert import lora, names, networks, quantised, rules, strength, umt5, wan_dit
from packforcing_jax.convert.sources import Content, Group, Inputs

from packforcing_jax.errors import InputError, require
from packforcing_jax.io.safetensors_io import Tensor

WHOLE = ("state_dict", "model_state_dict", "model", "module")  # tables that name no network
PREFERRED = ("generator_ema", "generator", *WHOLE)  # tables of trainers
SHOWN = 4  # names in a sentence
LORA = "lora"  # the kind of a source that holds additions to a network
EXTRAS = {  # names of what is left out -> (part, why)
    **{pattern: ("dit", why) for pattern, why in wan_dit.EXTRAS.items()},
    **{pattern: ("text", why) for pattern, why in umt5.EXTRAS.items()},
}


@dataclass(frozen=True)
class Ignored:
    """What is left out and why; `part` is the network it would have belonged to, if that is known.

    `table`: the entry of its file that was not chosen.
    """

    name: str
    origin: str
    reason: str
    part: str = ""
    tensor: Tensor | None = None
    table: str = ""


@dataclass
class Contents:
    """Tensors by part and original name, additions by file, and whatever else there was."""

    networks: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    groups: dict[str, list[Group]] = field(default_factory=dict)
    adapters: list[lora.Lora] = field(default_factory=list)
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
    tables = {group.origin: _tables(group.content, (), group.origin) for group in inputs.groups}
    known = {key for per_group in tables.values() for path in per_group for key in path}
    if any(path == () for per_group in tables.values() for path in per_group):
        known |= {*WHOLE} if network in WHOLE else set()
    require(
        network is None or not known.isdisjoint({network, f"{network}_{LORA}"}),
        f"no source has a network called {network!r}; they have {', '.join(sorted(known)[:8]) or 'one each'}.",
    )
    for group in inputs.groups:
        chosen = _chosen(tables[group.origin], group, network, contents)
        for part, tensors in _by_part(chosen, group, kind, contents).items():
            offers[part].append(Offer(group, tensors))
    for part, each in offers.items():
        _settle(part, each, contents)
    return contents


# Tables inside each other


def transformers(group: Group) -> tuple[str, ...]:
    """The entries of a file that hold a transformer, such as `generator`; "" is a table that names no network."""
    paths = [
        path
        for path, table in _tables(group.content).items()
        if any(names.plain(name) in wan_dit.FIRST for name in table)
    ]
    return tuple(next((key for key in path if key not in WHOLE), "") for path in paths)


def _tables(
    content: Content, path: tuple[str, ...] = (), origin: str = ""
) -> dict[tuple[str, ...], dict[str, Tensor]]:
    """Every table that has tensors itself, by the keys that lead to it; words in front of names are keys as well."""
    items = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if _listed(content)
        else ()
    )
    named = {str(key): value for key, value in items}
    require(
        not named or len(named) == len(content),
        f"{'.'.join(path) or 'the file'} has a number and a text as keys that read alike; re-save it.",
    )
    tables: dict[tuple[str, ...], dict[str, Tensor]] = {}
    for key, value in (named | _strengths(named, path, origin)).items():
        if isinstance(value, Tensor):
            words, name = names.split(key)
            own = tables.setdefault((*path, *words), {})
            require(
                name not in own,
                f"{value.origin} has {value.name} and {own[name].name if name in own else ''}, which name the same "
                "tensor; re-save it with one of them.",
            )
            own[name] = value
    for words, own in tables.items():
        front = names.fronts(own)
        if len(front) == 1 and all(name.startswith(front[0]) for name in own):
            tables[words] = {name.removeprefix(front[0]): each for name, each in own.items()}
    for key, value in named.items():
        if not isinstance(value, Tensor):
            _merge(tables, _tables(value, (*path, key), origin))
    return tables


def _strengths(
    table: Mapping[str, Content], path: tuple[str, ...], origin: str
) -> dict[str, Tensor]:
    """The bare numbers of a table that say how strong a LoRA is at one of its modules, as tensors."""
    tensors = [key for key, value in table.items() if isinstance(value, Tensor)]
    alphas = {(hit[0], "alpha") for key in tensors if (hit := names.addition(key))}
    return {
        key: _number(float(value), ".".join((*path, key)), origin)
        for key, value in table.items()
        if type(value) in (int, float) and names.addition(key) in alphas
    }


def _number(value: float, name: str, origin: str) -> Tensor:
    held = np.asarray(value, np.float64)
    return Tensor(name, (), held.dtype, lambda: held, origin)


def _merge(
    tables: dict[tuple[str, ...], dict[str, Tensor]],
    more: Mapping[tuple[str, ...], Mapping[str, Tensor]],
) -> None:
    """Adds tables to others; a name that stands in both is refused."""
    for path, table in more.items():
        own = tables.setdefault(path, {})
        twice = sorted(own.keys() & table.keys())
        require(
            not twice, f"{'.'.join(path)} holds {', '.join(twice[:4])} twice; re-save the file."
        )
        own |= table


def _listed(content: Content) -> bool:
    return isinstance(content, list | tuple)


def _chosen(
    tables: Mapping[tuple[str, ...], dict[str, Tensor]],
    group: Group,
    network: str | None,
    contents: Contents,
) -> list[dict[str, Tensor]]:
    """The tables that are meant: of a network, of a LoRA, and of each other part; the rest is noted as ignored."""
    loras = [
        path
        for path, table in tables.items()
        if all(names.adds(n) or names.addition(n) for n in map(names.plain, table))
    ]
    parts = [path for path in tables if path not in loras and names.part_of(path)]
    aside = [path for path in tables if path and _extra(names.plain(".".join((*path, "x"))))]
    others = [path for path in tables if path not in (*loras, *parts, *aside)]
    if network is None:  # a trainer's own state is no choice
        others = [path for path in others if names.marked(tables[path])] or others
    preferred = (network, *PREFERRED) if network else PREFERRED
    paths = [
        *_pick(others, preferred, group),
        *_pick(loras, [f"{name}_{LORA}" for name in preferred], group),
        *parts,
    ]
    for path, table in tables.items():
        if path not in paths:
            contents.ignored += [_left(path, name, tensor) for name, tensor in table.items()]
    contents.ignored += [
        Ignored(name, group.origin, "no tensor") for name in _numbers(group.content)
    ]
    return [tables[path] for path in paths]


def _left(path: tuple[str, ...], name: str, tensor: Tensor) -> Ignored:
    """Why a tensor of a table that was not chosen is left out."""
    extra = _extra(names.plain(".".join((*path, name)))) or _extra(names.plain(name))
    reason = extra[1] if extra else f"of {'.'.join(path) or 'no network'}, which was not chosen"
    table = "" if extra else path[0] if path else "names without a network"
    return Ignored(tensor.name, tensor.origin, reason, "dit", tensor, table)


def _extra(name: str) -> tuple[str, str] | None:
    """(part, why) of a tensor that is left out wherever it stands."""
    return next((why for pattern, why in EXTRAS.items() if re.fullmatch(pattern, name)), None)


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
        keys = sorted({path[0] if path else "one without a name" for path in matches})
        require(
            not matches,
            f"{group.origin} holds several networks ({', '.join(keys[:8])}); choose one with --network NAME.",
        )
    return []


def _numbers(content: Content) -> Iterator[str]:
    """What a trainer's file holds beside tensors, such as step counters."""
    if isinstance(content, dict):
        named = {str(key): value for key, value in content.items()}
        strengths = _strengths(named, (), "")
        yield from (
            key
            for key, value in named.items()
            if not isinstance(value, Tensor) and not _tables(value) and key not in strengths
        )


# Names


def _plain(named: Mapping[str, Tensor], group: Group, contents: Contents) -> dict[str, Tensor]:
    """Tensors by name without what tools put into it, less known extras; other models are refused."""
    out: dict[str, Tensor] = {}
    for long, tensor in named.items():
        name = names.plain(long)
        _refuse_others(name, tensor, group)
        extra = _extra(name)
        if extra:
            contents.ignored.append(Ignored(tensor.name, tensor.origin, extra[1], extra[0], tensor))
        else:
            _put(out, name, tensor, contents.wrong)
    read, left = quantised.read(out, contents.wrong)
    contents.ignored += [
        Ignored(out[name].name, out[name].origin, reason, "", out[name])
        for name, reason in left.items()
    ]
    return read


def _refuse_others(name: str, tensor: Tensor, group: Group) -> None:
    for pattern, model in wan_dit.OTHERS.items():
        if re.fullmatch(pattern, name):
            raise InputError(
                f"{group.origin} is {model} (it has {tensor.name}), not Wan2.1's text-to-video network; "
                "convert a text-to-video checkpoint."
            )
    for pattern, kind in names.OTHER_ADDITIONS.items():
        if re.fullmatch(pattern, name):
            raise InputError(f"{group.origin} is {kind} (it has {tensor.name}); {strength.MERGE}.")


def _by_part(
    tables: Sequence[Mapping[str, Tensor]], group: Group, kind: str | None, contents: Contents
) -> dict[str, dict[str, Tensor]]:
    """Tensors by part and original name; what no network knows is noted, or refused if that is all there is."""
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)
    unknown: list[str] = []
    added: dict[str, Tensor] = {}
    for table in tables:
        named = _plain(table, group, contents)
        own = _additions(named, kind)
        for name in own:
            _put(added, name, named[name], contents.wrong)
        rest = {name: tensor for name, tensor in named.items() if name not in own}
        unknown += _sort_names(rest, kind, parts, contents)
    require(
        bool(parts or added) or not unknown,
        f"{group.origin} holds no network of Wan2.1 (its tensors are called "
        f"{', '.join(unknown[:4])}); {_hint(unknown)}.",
    )
    contents.wrong["unknown to the table"] += unknown
    if added:
        strong = strength.read(group.content, group.adapter, group.header, group.origin)
        contents.adapters.append(lora.Lora(group.origin, added, strong))
    return parts


def _additions(named: Mapping[str, Tensor], kind: str | None) -> set[str]:
    """The names that add to a network instead of being one."""
    all_of_it = kind == LORA and not names.marked(named)
    own = {name for name in named if all_of_it or names.adds(name)}
    return own | {name for name in named if own and names.addition(name)}


def _sort_names(
    rest: Mapping[str, Tensor],
    kind: str | None,
    parts: dict[str, dict[str, Tensor]],
    contents: Contents,
) -> list[str]:
    """Puts the tensors of one table to their parts by original name; returns the names that no network knows."""
    known = networks.original_names(rest)
    meant = (
        networks.original_names(rest, [networks.KINDS[kind]]) if kind in networks.KINDS else known
    )
    unknown = []
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
            unknown.append(tensor.name)
    return unknown


def _hint(unknown: Sequence[str]) -> str:
    """What to do about names that no network knows."""
    if any("/" in name for name in unknown):
        return "give the model folder that it belongs to"
    fronts = names.fronts(unknown)
    found = f"one of {', '.join(fronts[:SHOWN])}" if fronts else "what stands in front of its names"
    return f"convert a checkpoint of Wan2.1 text-to-video, or say with --prefix {found}"


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
