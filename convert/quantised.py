"""Weights in 8 bits with a scale beside them (fp8): read as the numbers that they stand for, nothing rounded away.

A weight of 8 bits is a number of 4 (e4m3) or 3 (e5m2) significant bits. Without a scale bfloat16 holds it exactly.
With one, W = weight * scale is computed in float32, scale being one number, or one for each row of the weight.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from packforcing_jax.convert import rules

from packforcing_jax.io.safetensors_io import Tensor

EIGHT_BITS = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
SCALES = (".scale_weight", ".weight_scale")  # how the scale of `.weight` is called
BLOCKS = (".weight_scale_inv",)  # scales of square blocks, which are not read
ACTIVATIONS = (".scale_input", ".input_scale")  # for multiplying in 8 bits, which is not done here
MARK = "scaled_fp8"  # an empty tensor that says that scales follow
RECIPE = ".comfy_quant"  # JSON as bytes: how the weight beside it is packed
LONGEST_RECIPE = 4096  # bytes
WITHOUT_WEIGHT = "scales without a weight of 8 bits"
BY_BLOCK = "scales of blocks, which are not read"
UNKNOWN = "packed in an unknown way"
OTHER_SHAPE = "scales of another shape"
COMPLAINTS = (WITHOUT_WEIGHT, BY_BLOCK, UNKNOWN, OTHER_SHAPE)
REMEDY = "fetch the checkpoint in bfloat16 or float16, or in fp8 with one scale a tensor or a row"


@dataclass(frozen=True)
class Quantised(Tensor):
    """A tensor that stands for `stored` times `scale` (None: for `stored` alone); `dtype` is what it is read as."""

    stored: Tensor
    scale: Tensor | None


def is_quantised(tensor: Tensor) -> bool:
    """Whether a tensor's numbers have 8 bits and a fraction."""
    return tensor.dtype in EIGHT_BITS


def read(
    named: Mapping[str, Tensor], wrong: rules.Mismatches
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(the tensors of `named` with every fp8 weight joined to its scale, why others of them are left out).

    A scale that fits no weight is noted in `wrong`.
    """
    scales: dict[str, Tensor] = {}
    left: dict[str, str] = {}
    for name, tensor in named.items():
        scaled = next((name.removesuffix(each) for each in SCALES if name.endswith(each)), None)
        if scaled is not None:
            scales[f"{scaled}.weight"] = tensor
            left[name] = ""
        elif name.rpartition(".")[2] == MARK:
            left[name] = "says that the weights are fp8"
        elif name.endswith(ACTIVATIONS):
            left[name] = "scale of activations, which are not kept in 8 bits here"
        elif name.endswith(RECIPE):
            left[name] = "says how the weight beside it is packed"
            _check_recipe(tensor, wrong)
        elif name.endswith(BLOCKS):
            left[name] = ""
            wrong[BY_BLOCK].append(tensor.name)
    out = {
        name: _read_as(tensor, scales.pop(name, None), wrong) if is_quantised(tensor) else tensor
        for name, tensor in named.items()
        if name not in left
    }
    wrong[WITHOUT_WEIGHT] += [scale.name for scale in scales.values()]
    return out, {name: reason for name, reason in left.items() if reason}


def _check_recipe(tensor: Tensor, wrong: rules.Mismatches) -> None:
    """Notes a packing that is not plain fp8."""
    if tensor.nbytes > LONGEST_RECIPE:
        wrong[UNKNOWN].append(tensor.name)
        return
    try:
        recipe = json.loads(
            np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8).tobytes()
        )
        form = recipe["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        form = "unknown"
    if form not in ("float8_e4m3fn", "float8_e5m2"):
        wrong[UNKNOWN].append(f"{tensor.name} ({str(form)[:40]})")


def _read_as(stored: Tensor, scale: Tensor | None, wrong: rules.Mismatches) -> Tensor:
    """The tensor that fp8 numbers stand for."""
    if scale is None:
        exact = np.dtype(ml_dtypes.bfloat16)
        return Quantised(
            stored.name,
            stored.shape,
            exact,
            lambda: stored.read().astype(exact),
            stored.origin,
            stored,
            None,
        )
    rows = (stored.shape or (1,))[0]
    numbers = int(np.prod(scale.shape, dtype=np.int64))
    fits = numbers == 1 or scale.shape in ((rows,), (rows, *(1,) * (len(stored.shape) - 1)))
    if not fits or is_quantised(scale):
        wrong[OTHER_SHAPE].append(f"{scale.name} {scale.shape} of {stored.shape}")
        return stored

    def value() -> np.ndarray:
        factors = np.asarray(scale.read(), np.float32)
        by_row = factors.reshape(() if numbers == 1 else (rows, *(1,) * (len(stored.shape) - 1)))
        return stored.read().astype(np.float32) * by_row

    return Quantised(
        stored.name, stored.shape, np.dtype(np.float32), value, stored.origin, stored, scale
    )
