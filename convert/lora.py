"""Additions to a network: low-rank ones (LoRA) as W + (alpha / rank) * B @ A, and plain differences, in float32."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from packforcing_jax.convert import names, rules, wan_dit
from packforcing_jax.convert.strength import Strength

from packforcing_jax.io import safetensors_io
from packforcing_jax.io.safetensors_io import Tensor

LOW_RANK = ("down", "up", "alpha", "up_bias")  # what belongs to two factors
NO_WEIGHT = "added to no weight"
HALF = "without the other half of the addition"
OTHER_SHAPE = "added to a weight of another shape"


@dataclass(frozen=True)
class Lora:
    """The additions of one file, by name without what tools put around it."""

    origin: str
    tensors: Mapping[str, Tensor]
    strength: Strength


@dataclass(frozen=True)
class LowRank:
    """`scale` * `up` @ `down`, in the shape of the weight."""

    down: Tensor
    up: Tensor
    scale: float
    used: Mapping[str, Tensor]  # the tensors that say so, by what they are

    def delta(self, shape: rules.Shape) -> np.ndarray:
        up, down = (np.asarray(side.read(), np.float32) for side in (self.up, self.down))
        rank = self.down.shape[0]
        made = up.reshape(-1, rank) @ down.reshape(rank, -1)
        made *= np.float32(self.scale)
        return made.reshape(shape)

    def told(self, what: str) -> str:
        """What becomes of one of the tensors used."""
        return f"{what} of + {self.scale:g} * up @ down"


@dataclass(frozen=True)
class Difference:
    """`scale` * a tensor of the weight's own shape."""

    tensor: Tensor
    scale: float
    used: Mapping[str, Tensor]

    def delta(self, shape: rules.Shape) -> np.ndarray:
        return (np.float32(self.scale) * np.asarray(self.tensor.read(), np.float32)).reshape(shape)

    def told(self, what: str) -> str:
        """What becomes of the tensor used."""
        return f"{what} of + {self.scale:g} * {what}"


Term: TypeAlias = LowRank | Difference


@dataclass(frozen=True)
class Addition:
    """All that is added to one weight."""

    terms: tuple[Term, ...]

    @property
    def count(self) -> int:
        """Tensors that it is read from."""
        return sum(len(term.used) for term in self.terms)

    def onto(self, weight: np.ndarray) -> np.ndarray:
        """The sum, computed in float32, in the dtype of `weight`."""
        total = self.terms[0].delta(weight.shape)
        for term in self.terms[1:]:
            total = total + term.delta(weight.shape)
        return (total + weight).astype(weight.dtype)


# Which weight

Module: TypeAlias = dict[
    str, Tensor
]  # what adds to a module, by what it is: a value of `names.SIDES`
TARGETS = {  # what is added -> the weights of a module that it may be added to
    "diff": (".weight", ""),
    "diff_b": (".bias",),
    "diff_m": (".modulation",),
    "up_bias": (".bias",),
}


def modules(lora: Lora, base: Mapping[str, Tensor], wrong: rules.Mismatches) -> dict[str, Module]:
    """What the file adds, by the original name of the module; what has no place in `base` is noted."""
    known = _modules(base)
    found: dict[str, Module] = defaultdict(dict)
    for name, tensor in lora.tensors.items():
        hit = names.addition(name)
        module = names.found(hit[0], known) if hit else None
        if hit is None or module is None:
            kind = "unknown to the table" if hit is None else NO_WEIGHT
            wrong[kind].append(tensor.name)
        elif hit[1] in found[module]:
            wrong["named twice"].append(f"{tensor.name} and {found[module][hit[1]].name}")
        else:
            found[module][hit[1]] = tensor
    return {module: sides for module, sides in found.items() if sides}


def _modules(base: Mapping[str, Tensor]) -> dict[str, str]:
    """Every module of a network by its name joined with underscores, as the original has it and as others do."""
    own = dict.fromkeys(each for name in base for each in (name.rpartition(".")[0], name))
    known = {names.joined(module): module for module in own}
    for layout in wan_dit.LAYOUTS:
        theirs = rules.renamings(own, [(new, original) for original, new in layout])
        for module, others in theirs.items():
            for other in others:
                known.setdefault(names.joined(other), module)
    return known


def terms(
    sides_of: Mapping[str, Module],
    base: Mapping[str, Tensor],
    otherwise: Callable[[int], float],
    wrong: rules.Mismatches,
) -> dict[str, list[Term]]:
    """What is added to each weight of `base`; `otherwise(rank)` is the scale where no alpha is beside the factors."""
    out: dict[str, list[Term]] = defaultdict(list)
    for module, sides in sides_of.items():
        for weight, term in _terms_of(module, sides, base, otherwise, wrong):
            out[weight].append(term)
    return out


def _terms_of(
    module: str,
    sides: Module,
    base: Mapping[str, Tensor],
    otherwise: Callable[[int], float],
    wrong: rules.Mismatches,
) -> Iterator[tuple[str, Term]]:
    """(weight, what is added to it) of one module."""
    scale = 1.0
    if sides.keys() & LOW_RANK:
        weight = f"{module}.weight"
        if not _fits(sides, base.get(weight), wrong):
            return
        rank = sides["down"].shape[0]
        own = float(sides["alpha"].read().reshape(())) if "alpha" in sides else None
        scale = otherwise(rank) if own is None else own / rank
        used = {what: sides[what] for what in ("down", "up", "alpha") if what in sides}
        yield weight, LowRank(sides["down"], sides["up"], scale, used)
    for what, endings in TARGETS.items():
        if what not in sides:
            continue
        tensor = sides[what]
        weight = next((module + each for each in endings if module + each in base), "")
        if not weight:
            wrong[NO_WEIGHT].append(tensor.name)
        elif tensor.shape != base[weight].shape or not safetensors_io.floating(tensor.dtype):
            wrong[OTHER_SHAPE].append(
                f"{tensor.name} {tensor.shape}, expected {base[weight].shape}"
            )
        else:
            yield weight, Difference(tensor, scale if what == "up_bias" else 1.0, {what: tensor})


def _fits(sides: Module, weight: Tensor | None, wrong: rules.Mismatches) -> bool:
    """Whether a low-rank addition is whole and has the shape of its weight."""
    given = [sides[what] for what in LOW_RANK if what in sides]
    if weight is None:
        wrong[NO_WEIGHT] += [tensor.name for tensor in given]
        return False
    if not {"down", "up"} <= sides.keys():
        wrong[HALF] += [tensor.name for tensor in given]
        return False
    down, up = sides["down"], sides["up"]
    numbers = all(safetensors_io.floating(side.dtype) for side in (down, up))
    scalar = "alpha" not in sides or sides["alpha"].shape in ((), (1,))
    whole = len(down.shape) > 1 < len(up.shape) and down.shape[0] == math.prod(up.shape[1:]) > 0
    if not (whole and numbers and scalar and (up.shape[0], *down.shape[1:]) == weight.shape):
        wrong[OTHER_SHAPE].append(f"{up.name} {up.shape} @ {down.shape}, expected {weight.shape}")
        return False
    return True
