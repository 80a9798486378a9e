"""Conversion as data: a table of rules takes every tensor of a checkpoint to its place in a model, and back.

A rule is (source pattern, target path, transform). Patterns match whole names, `\\1`, `\\2` of the target are the
pattern's groups, and a transform is an einops pattern, so that it can be read in both directions. A rule whose
pattern starts with `blocks\\.(\\d+)\\.` and whose target starts with `blocks/` stacks: group 1 is the index into the
target's leading layer axis.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import einops
import numpy as np

from packforcing_jax.errors import InputError

same = "... -> ..."
linear = "o i -> i o"
conv2d = "o i y x -> y x i o"
conv3d = "o i t y x -> t y x i o"
patch = "o c t y x -> (c t y x) o"  # a convolution whose stride is its kernel, as a dense layer
gamma2d = "c 1 1 -> c"
gamma3d = "c 1 1 1 -> c"
drop0 = "1 ... -> ..."

SHOWN = 8  # names per kind of mismatch in an error

Mismatches: TypeAlias = dict[str, list[str]]  # kind of mismatch -> names


@dataclass(frozen=True)
class Rule:
    """Where tensors named `pattern` go, and the einops pattern that reshapes each of them."""

    pattern: str
    target: str
    transform: str = same

    @property
    def stacks(self) -> bool:
        """Whether group 1 of the pattern is the index into the target's layer axis."""
        return self.pattern.startswith(r"blocks\.(\d+)\.") and self.target.startswith("blocks/")

    def place(self, name: str) -> "Place | None":
        """Where tensor `name` goes, or None if this rule is not about it."""
        found = re.fullmatch(self.pattern, name)
        if found is None:
            return None
        return Place(found.expand(self.target), int(found.group(1)) if self.stacks else None, self.transform)


@dataclass(frozen=True)
class Place:
    """The target path of one tensor, its index along the layer axis (None: it fills the target) and its transform."""

    path: str
    layer: int | None
    transform: str

    def forward(self, tensor: np.ndarray) -> np.ndarray:
        """The tensor as the model holds it."""
        return einops.rearrange(tensor, self.transform)

    def inverse(self, value: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """The tensor as the checkpoint holds it; `shape` is its shape there."""
        left, right = self.transform.split(" -> ")
        axes = [] if "..." in left else left.split()
        sizes = {axis: size for axis, size in zip(axes, shape, strict=bool(axes)) if axis.isalpha()}
        return einops.rearrange(value, f"{right} -> {left}", **sizes)


def _raise(wrong: Mismatches, what: str) -> None:
    """Raises one `InputError` that names every kind of mismatch with its count and first examples."""
    kinds = []
    for kind, names in wrong.items():
        more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        if names:
            kinds.append(f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{more}")
    if kinds:
        raise InputError(f"{what}: {'; '.join(kinds)}; use a checkpoint of this architecture and these sizes.")


def _places(names: Iterable[str], table: Sequence[Rule], wrong: Mismatches) -> dict[str, Place]:
    """The place of each name that exactly one rule matches; the others are noted in `wrong`."""
    places = {}
    for name in names:
        found = [place for rule in table if (place := rule.place(name)) is not None]
        if len(found) == 1:
            places[name] = found[0]
        else:
            wrong["matched by several rules" if found else "unknown to the table"].append(name)
    return places


def _check_cover(places: Mapping[str, Place], wanted: Mapping[str, tuple[int, ...]], wrong: Mismatches) -> None:
    """Notes targets that are not wanted, filled twice, not filled at all, or lack a layer."""
    filled: dict[str, list[int | None]] = defaultdict(list)
    for name, place in places.items():
        if place.path not in wanted:
            wrong["without a place in the model"].append(f"{name} -> {place.path}")
        elif place.layer in filled[place.path]:
            wrong["filling a place twice"].append(f"{name} -> {place.path}")
        filled[place.path].append(place.layer)
    for path, shape in wanted.items():
        layers = filled.get(path, [])
        needed = list(range(shape[0])) if layers and layers[0] is not None else [None]
        absent = [layer for layer in needed if layer not in layers]
        if absent:
            wrong["missing"].append(f"{path} of layers {absent}" if layers else path)
        wrong["beyond the model's layers"] += [f"{path} of layer {layer}" for layer in layers if layer not in needed]


def _transformed(name: str, tensor: np.ndarray, place: Place, shape: tuple[int, ...], wrong: Mismatches):
    """The tensor as the model holds it, or None with the reason noted."""
    expected = tuple(shape if place.layer is None else shape[1:])
    try:
        value = place.forward(tensor)
    except einops.EinopsError:
        axes = place.transform.split(" -> ")[0]
        wrong["of another rank or shape"].append(f"{name} {tensor.shape}, expected axes '{axes}'")
        return None
    if value.shape != expected:
        wrong["of another rank or shape"].append(f"{name} {tensor.shape}, as {value.shape}, expected {expected}")
    elif not np.isfinite(value).all():
        wrong["not finite"].append(name)
    else:
        return value
    return None


def convert(
    tensors: Mapping[str, np.ndarray], table: Sequence[Rule], wanted: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """The model's arrays by path; one `InputError` names every mismatch between `tensors` and the `wanted` shapes."""
    wrong: Mismatches = defaultdict(list)
    places = _places(tensors, table, wrong)
    _check_cover(places, wanted, wrong)
    parts: dict[str, dict[int | None, np.ndarray]] = defaultdict(dict)
    for name, place in places.items():
        if place.path in wanted:
            value = _transformed(name, tensors[name], place, wanted[place.path], wrong)
            if value is not None:
                parts[place.path][place.layer] = value
    _raise(wrong, f"{len(tensors)} tensors do not fit the model")
    return {path: _joined(by_layer) for path, by_layer in parts.items()}


def _joined(by_layer: Mapping[int | None, np.ndarray]) -> np.ndarray:
    """One contiguous array: the only part, or all layers stacked in order."""
    if None in by_layer:
        return np.ascontiguousarray(by_layer[None]).reshape(by_layer[None].shape)
    return np.stack([by_layer[layer] for layer in range(len(by_layer))])


def invert(
    flat: Mapping[str, np.ndarray], table: Sequence[Rule], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """The checkpoint tensors named in `shapes` (name -> shape), read back from the model's arrays."""
    wrong: Mismatches = defaultdict(list)
    places = _places(shapes, table, wrong)
    wrong["missing"] += sorted({place.path for place in places.values()} - set(flat))
    wrong["without a name in the checkpoint"] += sorted(set(flat) - {place.path for place in places.values()})
    _raise(wrong, f"{len(flat)} arrays do not fit the table")
    back = {}
    for name, place in places.items():
        value = flat[place.path] if place.layer is None else flat[place.path][place.layer]
        back[name] = np.ascontiguousarray(place.inverse(np.asarray(value), shapes[name])).reshape(shapes[name])
    return back


def _renaming(original: str, theirs: str) -> Callable[[str], str | None]:
    """A function from a name under `theirs` to the one under `original`; None if the name is another one."""
    pattern = re.compile(re.escape(theirs).replace(r"\{\}", r"(\d+)") + r"(\.weight|\.bias|\.gamma)?")

    def renamed(name: str) -> str | None:
        found = pattern.fullmatch(name)
        return None if found is None else original.format(*found.groups()[:-1]) + (found.groups()[-1] or "")

    return renamed


def rename(tensors: Mapping[str, np.ndarray], rows: Iterable[tuple[str, str]]) -> dict[str, np.ndarray]:
    """`tensors` under their original names; rows are (original, theirs), of a tensor or of its module.

    `{}` stands for a layer index, the same on both sides, and `.weight`, `.bias`, `.gamma` carry over. Swap the
    columns for the way back.
    """
    renamings = [_renaming(original, theirs) for original, theirs in rows]
    wrong: Mismatches = defaultdict(list)
    out: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        found = [new for renaming in renamings if (new := renaming(name)) is not None]
        if len(found) != 1:
            wrong["matched by several rows" if found else "unknown to the name map"].append(name)
        elif found[0] in out:
            wrong["given the same name"].append(found[0])
        else:
            out[found[0]] = tensor
    _raise(wrong, f"{len(tensors)} tensor names do not fit the name map")
    return out
