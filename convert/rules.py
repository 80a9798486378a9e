"""Conversion as data: a table of rules takes every tensor of a checkpoint to its place in a model, and back.

A rule is (source pattern, target path, transform). Patterns match whole names, `\\1`, `\\2` of the target are the
pattern's groups, and a transform is an einops pattern, so that it can be read in both directions. A rule whose
pattern starts with `blocks\\.(\\d+)\\.` and whose target starts with `blocks/` stacks: group 1 is the index into the
target's leading layer axis.
"""

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import einops
import numpy as np

from packforcing_jax.errors import InputError
from packforcing_jax.io import safetensors_io
from packforcing_jax.io.safetensors_io import Form, Tensor

same = "... -> ..."
linear = "o i -> i o"
conv2d = "o i y x -> y x i o"
conv3d = "o i t y x -> t y x i o"
patch = "o c t y x -> (c t y x) o"  # a convolution whose stride is its kernel, as a dense layer
gamma2d = "c 1 1 -> c"
gamma3d = "c 1 1 1 -> c"
drop0 = "1 ... -> ..."

NUMBER = "(0|[1-9][0-9]{0,3})"  # what `(\d+)` of a pattern matches: names have one spelling, layers an end
MIXED = "of another dtype than its other layers"
NOT_FINITE = "not finite"
SHOWN = 8  # names per kind of mismatch in an error
PIECE = 1 << 22  # elements looked at together

Shape: TypeAlias = tuple[int, ...]
Mismatches: TypeAlias = dict[str, list[str]]  # kind of mismatch -> names


def no_mismatches() -> Mismatches:
    """An empty account of mismatches."""
    return defaultdict(list)


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

    def match(self, name: str) -> "Target | None":
        """Where tensor `name` goes, or None if this rule is not about it."""
        match = re.fullmatch(self.pattern.replace(r"(\d+)", NUMBER), name)
        if match is None:
            return None
        return Target(
            match.expand(self.target), int(match.group(1)) if self.stacks else None, self.transform
        )

    def name(self, path: str) -> str | None:
        """The name of what goes to `path`, with `{}` for the layer; None if this rule fills another path."""
        pieces = re.split(r"\(([^()]*)\)", self.pattern.replace(r"(\d+)", NUMBER))
        literals = [re.sub(r"\\(.)", r"\1", piece) for piece in pieces[::2]]
        groups = pieces[1::2]
        target = re.sub(
            r"\\\\(\d)",
            lambda hit: f"(?P<g{hit[1]}>{groups[int(hit[1]) - 1]})",
            re.escape(self.target),
        )
        match = re.fullmatch(target, path)
        if match is None:
            return None
        filled = [match.groupdict().get(f"g{number}", "{}") for number in range(1, len(groups) + 1)]
        return "".join(
            literal + group for literal, group in zip(literals, [*filled, ""], strict=True)
        )


@dataclass(frozen=True)
class Target:
    """The target path of one tensor, its index along the layer axis (None: it fills the target) and its transform."""

    path: str
    layer: int | None = None
    transform: str = same

    def forward(self, tensor: np.ndarray) -> np.ndarray:
        """The tensor as the model holds it."""
        return einops.rearrange(tensor, self.transform)

    def inverse(self, value: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """The tensor as the checkpoint holds it; `sizes` says how long the axes are that the model holds as one."""
        left, right = self.transform.split(" -> ")
        merged = [axis for group in re.findall(r"\(([^()]*)\)", right) for axis in group.split()]
        return einops.rearrange(
            value, f"{right} -> {left}", **{axis: sizes[axis] for axis in merged}
        )

    def axes(self, shape: Shape) -> dict[str, int]:
        """How long each axis is that the transform names, of a checkpoint's tensor."""
        names = self.transform.split(" -> ")[0].split()
        return {} if "..." in names else dict(zip(names, shape, strict=True))


def hollow(shape: Shape) -> np.ndarray:
    """An array of this shape that takes no memory, to learn what a transform makes of it."""
    return np.broadcast_to(np.int8(0), shape)


def raise_all(
    wrong: Mismatches,
    what: str,
    remedy: str = "use a checkpoint of this architecture and these sizes",
) -> None:
    """Raises one `InputError` that names every kind of mismatch with its count and first examples, if there are any."""
    kinds = []
    for kind, names in wrong.items():
        more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        if names:
            kinds.append(f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{more}")
    if kinds:
        raise InputError(f"{what}: {'; '.join(kinds)}; {remedy}.")


# Which tensor goes where


@dataclass(frozen=True)
class Plan:
    """The place of every tensor that fits, by its original name, and shape and dtype of every target."""

    targets: Mapping[str, Target]
    forms: Mapping[str, Form]


@dataclass(frozen=True)
class Fit:
    """How tensors are held against a model: `where` stands before paths in what is noted of them.

    `any_dtype`: layers may differ in number format, as where all are cast.
    """

    where: str = ""
    any_dtype: bool = False


def plan(
    tensors: Mapping[str, Tensor],
    table: Sequence[Rule],
    wanted: Mapping[str, Shape],
    wrong: Mismatches,
    how: Fit = Fit(),
) -> Plan:
    """Where each tensor goes, seen by name, shape and dtype; notes whatever does not fit."""
    return fit(tensors, _targets(tensors, table, wrong), wanted, wrong, how)


def fit(
    tensors: Mapping[str, Tensor],
    targets: Mapping[str, Target],
    wanted: Mapping[str, Shape],
    wrong: Mismatches,
    how: Fit = Fit(),
) -> Plan:
    """The plan of `targets`, less what does not fit."""
    _check_cover(tensors, targets, wanted, wrong, how.where)
    fitting = {
        name: target
        for name, target in targets.items()
        if target.path in wanted and _fits(tensors[name], target, wanted[target.path], wrong)
    }
    forms: dict[str, Form] = {}
    for name, target in fitting.items():
        _, dtype = forms.setdefault(target.path, (wanted[target.path], tensors[name].dtype))
        if dtype != tensors[name].dtype and not how.any_dtype:
            wrong[MIXED].append(f"{tensors[name].name} ({tensors[name].dtype})")
    return Plan(fitting, forms)


def _targets(
    tensors: Mapping[str, Tensor], table: Sequence[Rule], wrong: Mismatches
) -> dict[str, Target]:
    """The place of each name that exactly one rule matches; the others are noted in `wrong`."""
    targets = {}
    for name, tensor in tensors.items():
        matches = [target for rule in table if (target := rule.match(name)) is not None]
        if len(matches) == 1:
            targets[name] = matches[0]
        else:
            wrong["matched by several rules" if matches else "unknown to the table"].append(
                tensor.name
            )
    return targets


def _check_cover(
    tensors: Mapping[str, Tensor],
    targets: Mapping[str, Target],
    wanted: Mapping[str, Shape],
    wrong: Mismatches,
    where: str,
) -> None:
    """Notes targets that are not wanted, filled twice, not filled at all, or lack a layer."""
    filled: dict[str, list[int | None]] = defaultdict(list)
    for name, target in targets.items():
        if target.path not in wanted:
            wrong["without a place in the model"].append(
                f"{tensors[name].name} -> {where}{target.path}"
            )
        elif target.layer in filled[target.path]:
            wrong["filling a place twice"].append(f"{tensors[name].name} -> {where}{target.path}")
        filled[target.path].append(target.layer)
    for path, shape in wanted.items():
        layers = set(filled.get(path, []))
        needed = range(shape[0]) if layers and None not in layers else [None]
        absent = [layer for layer in needed if layer not in layers]
        if absent:
            listed = ", ".join(map(str, absent[:SHOWN])) + (", ..." if len(absent) > SHOWN else "")
            wrong["missing"].append(
                f"{where}{path} of layers [{listed}]" if layers else f"{where}{path}"
            )
        beyond = [layer for layer in layers if layer not in needed]
        wrong["beyond the model's layers"] += [
            f"{where}{path} of layer {layer}" for layer in beyond
        ]


def _fits(tensor: Tensor, target: Target, shape: Shape, wrong: Mismatches) -> bool:
    """Whether a tensor holds fractions and becomes its share of a target of this shape; the reason is noted if not."""
    expected = tuple(shape if target.layer is None else shape[1:])
    try:
        made = target.forward(hollow(tensor.shape)).shape
    except einops.EinopsError:
        axes = target.transform.split(" -> ")[0]
        wrong["of another rank or shape"].append(
            f"{tensor.name} {tensor.shape}, expected axes '{axes}'"
        )
        return False
    if made != expected:
        wrong["of another rank or shape"].append(
            f"{tensor.name} {tensor.shape}, as {made}, expected {expected}"
        )
    elif not safetensors_io.floating(tensor.dtype):
        wrong["of whole numbers"].append(f"{tensor.name} ({tensor.dtype})")
    return made == expected and safetensors_io.floating(tensor.dtype)


def sources(
    forms: Mapping[str, Shape], table: Sequence[Rule], wrong: Mismatches, where: str = ""
) -> dict[str, Target]:
    """The place of every tensor that the arrays of these shapes are made of, by original name: `plan` backwards."""
    targets = {}
    for path, shape in forms.items():
        matches = [(rule, name) for rule in table if (name := rule.name(path)) is not None]
        if not matches:
            wrong["without a name in the checkpoint"].append(where + path)
            continue
        rule, name = matches[0]  # of several names that a file may have, the first in the table
        for layer in range(shape[0]) if rule.stacks else [None]:
            targets[name if layer is None else name.format(layer)] = Target(
                path, layer, rule.transform
            )
    return targets


# What shapes say


def axis(shapes: Mapping[str, Shape], pattern: str, number: int, default: int) -> int:
    """The length that axis `number` has in most tensors that `pattern` names; the default where there is none."""
    lengths = [
        shape[number]
        for name, shape in shapes.items()
        if len(shape) > number and re.fullmatch(pattern, name)
    ]
    return statistics.mode(lengths) or default if lengths else default


def layers(names: Iterable[str]) -> int:
    """How many layers names such as `blocks.3.norm3.bias` number."""
    matches = (re.match(rf"blocks\.{NUMBER}\.", name) for name in names)
    return max((1 + int(hit[1]) for hit in matches if hit), default=0)


# In memory


def in_memory(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Arrays as tensors like those of a file."""
    return {
        name: Tensor(name, array.shape, array.dtype, lambda array=array: array, "memory")
        for name, array in arrays.items()
    }


def finite(array: np.ndarray) -> bool:
    """Whether no element is infinite or not a number; a piece at a time, for arrays that lie in files."""
    flat = array.reshape(-1)
    return all(
        np.isfinite(flat[start : start + PIECE]).all() for start in range(0, flat.size, PIECE)
    )


def convert(
    arrays: Mapping[str, np.ndarray], table: Sequence[Rule], wanted: Mapping[str, Shape]
) -> dict[str, np.ndarray]:
    """The model's arrays by path; one `InputError` names every mismatch between `arrays` and the `wanted` shapes."""
    wrong = no_mismatches()
    tensors = in_memory(arrays)
    made = plan(tensors, table, wanted, wrong)
    parts: dict[str, dict[int | None, np.ndarray]] = defaultdict(dict)
    for name, target in made.targets.items():
        if not finite(arrays[name]):
            wrong[NOT_FINITE].append(name)
        parts[target.path][target.layer] = target.forward(arrays[name])
    raise_all(wrong, f"{len(arrays)} tensors do not fit the model")
    return {path: _joined(by_layer) for path, by_layer in parts.items()}


def _joined(by_layer: Mapping[int | None, np.ndarray]) -> np.ndarray:
    """One contiguous array: the only part, or all layers stacked in order."""
    if None in by_layer:
        return np.ascontiguousarray(by_layer[None]).reshape(by_layer[None].shape)
    return np.stack([by_layer[layer] for layer in range(len(by_layer))])


def invert(
    flat: Mapping[str, np.ndarray], table: Sequence[Rule], shapes: Mapping[str, Shape]
) -> dict[str, np.ndarray]:
    """The checkpoint tensors named in `shapes` (name -> shape), read back from the model's arrays."""
    wrong = no_mismatches()
    targets = _targets(
        in_memory({name: hollow(shape) for name, shape in shapes.items()}), table, wrong
    )
    filled = {target.path for target in targets.values()}
    wrong["missing"] += sorted(filled - set(flat))
    wrong["without a name in the checkpoint"] += sorted(set(flat) - filled)
    raise_all(wrong, f"{len(flat)} arrays do not fit the table")
    back = {}
    for name, target in targets.items():
        value = flat[target.path] if target.layer is None else flat[target.path][target.layer]
        made = target.inverse(np.asarray(value), target.axes(shapes[name]))
        back[name] = np.ascontiguousarray(made).reshape(shapes[name])
    return back


# Other names for the same tensors


def _renaming(original: str, theirs: str) -> Callable[[str], str | None]:
    """A function from a name under `theirs` to the one under `original`; None if the name is another one."""
    pattern = re.compile(re.escape(theirs).replace(r"\{\}", NUMBER) + r"(\.weight|\.bias|\.gamma)?")

    def renamed(name: str) -> str | None:
        match = pattern.fullmatch(name)
        return (
            None
            if match is None
            else original.format(*match.groups()[:-1]) + (match.groups()[-1] or "")
        )

    return renamed


def renamings(names: Iterable[str], rows: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """What each name is called according to every row that is about it; rows are those of `rename`."""
    known = [_renaming(original, theirs) for original, theirs in rows]
    return {
        name: [new for renaming in known if (new := renaming(name)) is not None] for name in names
    }


def rename(
    arrays: Mapping[str, np.ndarray], rows: Iterable[tuple[str, str]]
) -> dict[str, np.ndarray]:
    """`arrays` under their original names; rows are (original, theirs), of a tensor or of its module.

    `{}` stands for a layer index, the same on both sides, and `.weight`, `.bias`, `.gamma` carry over. Swap the
    columns for the way back.
    """
    wrong = no_mismatches()
    out: dict[str, np.ndarray] = {}
    for name, new in renamings(arrays, rows).items():
        if len(new) != 1:
            wrong["matched by several rows" if new else "unknown to the name map"].append(name)
        elif new[0] in out:
            wrong["given the same name"].append(new[0])
        else:
            out[new[0]] = arrays[name]
    raise_all(wrong, f"{len(arrays)} tensor names do not fit the name map")
    return out
