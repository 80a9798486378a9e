"""Low-rank additions to a network: found by name, and merged as W + (alpha / rank) * B @ A in float32."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from packforcing_jax.convert import rules, wan_dit

from packforcing_jax.io import safetensors_io
from packforcing_jax.io.safetensors_io import Tensor

NAME = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<side>A|B|down|up)(?:\.[^.]+)?\.weight|(?P<alpha>alpha))"
)
SIDES = {"A": "down", "B": "up"}  # the same two under the names of another tool


@dataclass(frozen=True)
class Addition:
    """What is added to one weight: `scale` * `up` @ `down`; `used` are the tensors that say so, by what they are."""

    down: Tensor
    up: Tensor
    scale: float
    used: Mapping[str, Tensor]

    def onto(self, weight: np.ndarray) -> np.ndarray:
        """The sum, computed in float32, in the dtype of `weight`."""
        up, down = (np.asarray(side.read(), np.float32) for side in (self.up, self.down))
        delta = up @ down
        delta *= np.float32(self.scale)
        delta += weight
        return delta.astype(weight.dtype)


def additions(
    adapters: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    alpha: float | None,
    wrong: rules.Mismatches,
    otherwise: float = 1.0,
) -> dict[str, Addition]:
    """What the tensors `adapters` add, by the original name of the weight; those that add nothing are noted.

    `alpha` holds for weights that have none of their own; without either, `otherwise` is alpha / rank.
    """
    by_weight: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in adapters.items():
        hit = NAME.fullmatch(name)
        weight = _weight(hit["module"], base) if hit else None
        if hit is None or weight is None:
            wrong["unknown to the table" if hit is None else "added to no weight"].append(
                tensor.name
            )
            continue
        side = hit["alpha"] or SIDES.get(hit["side"], hit["side"])
        if side in by_weight[weight]:
            wrong["named twice"].append(f"{tensor.name} and {by_weight[weight][side].name}")
        by_weight[weight][side] = tensor
    return {
        weight: _addition(used, alpha, otherwise)
        for weight, used in by_weight.items()
        if _fits(used, base[weight], wrong)
    }


def _weight(module: str, base: Mapping[str, Tensor]) -> str | None:
    """The original name of the weight of a module, which may be called as in diffusers."""
    name = f"{module}.weight"
    names = [name, *rules.renamings([name], wan_dit.DIFFUSERS)[name]]
    return next((each for each in names if each in base), None)


def _fits(used: Mapping[str, Tensor], weight: Tensor, wrong: rules.Mismatches) -> bool:
    """Whether an addition is whole and has the shape of its weight."""
    if not {"down", "up"} <= used.keys():
        wrong["without the other half of the addition"] += [tensor.name for tensor in used.values()]
        return False
    down, up, *alpha = (used[side] for side in ("down", "up", "alpha") if side in used)
    whole = len(down.shape) == len(up.shape) == 2 and down.shape[0] == up.shape[1] > 0
    numbers = all(safetensors_io.floating(tensor.dtype) for tensor in (down, up)) and all(
        t.shape in ((), (1,)) for t in alpha
    )
    if not whole or not numbers or (up.shape[0], down.shape[1]) != weight.shape:
        wrong["added to a weight of another shape"].append(
            f"{up.name} {up.shape} @ {down.shape}, expected {weight.shape}"
        )
        return False
    return True


def _addition(used: Mapping[str, Tensor], alpha: float | None, otherwise: float) -> Addition:
    rank = used["down"].shape[0]
    own = float(used["alpha"].read().reshape(())) if "alpha" in used else alpha
    return Addition(used["down"], used["up"], otherwise if own is None else own / rank, used)
