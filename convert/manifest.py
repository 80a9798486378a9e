"""What a conversion did, told in full: every tensor of every source once, and a line for each part."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from packforcing_jax.convert.contents import Ignored
from packforcing_jax.convert.sources import Inputs
from packforcing_jax.convert.writing import Entry

from packforcing_jax.io.safetensors_io import Form, Tensor

FORMAT = "packforcing-jax manifest 2"


@dataclass(frozen=True)
class Row:
    """One part: how many tensors of the sources it took and left out, and what it holds."""

    part: str
    tensors: int
    ignored: int
    parameters: int
    dtype: str
    bytes: int


def row(part: str, forms: Iterable[Form], *, tensors: int, ignored: int = 0) -> Row:
    """The line of a part that holds arrays of these forms."""
    counts = [(int(np.prod(shape, dtype=np.int64)), dtype) for shape, dtype in forms]
    dtypes = sorted({dtype.name for _, dtype in counts})
    return Row(
        part,
        tensors,
        ignored,
        sum(count for count, _ in counts),
        ", ".join(dtypes),
        sum(count * dtype.itemsize for count, dtype in counts),
    )


def text(
    inputs: Inputs,
    entries: Sequence[Entry],
    ignored: Sequence[Ignored],
    *,
    origin: Mapping[str, str | None],
    notes: Sequence[str],
    record: Mapping[str, Any],
) -> str:
    """The manifest as JSON; it names files as the user does, and nothing else of this machine.

    `origin`: the checkpoint that the transformer comes from, by which method it is sampled, and its network's entry.
    `record`: what was written, as `io.identity` keeps it.
    """
    return (
        json.dumps(
            {
                "format": FORMAT,
                **origin,
                **record,
                "sources": [
                    {"file": name, "bytes": path.stat().st_size}
                    for name, path in inputs.files.items()
                ],
                "tensors": [_taken(entry, inputs) for entry in entries],
                "ignored": [_left(each, inputs) for each in ignored],
                "passed_over": [
                    {"file": each.file, "bytes": each.bytes, "reason": each.reason}
                    for each in inputs.left
                ],
                "zero": [
                    {"file": inputs.label(entry.tensor.origin), "name": entry.tensor.name}
                    for entry in entries
                    if entry.zero
                ],
                "assumptions": list(notes),
            },
            indent=1,
        )
        + "\n"
    )


def _form(tensor: Tensor) -> Mapping[str, Any]:
    return {"dtype": tensor.dtype.name, "shape": list(tensor.shape)}


def _taken(entry: Entry, inputs: Inputs) -> Mapping[str, Any]:
    return {
        "file": inputs.label(entry.tensor.origin),
        "name": entry.tensor.name,
        "original": entry.original,
        "sha256": entry.sha256,
        **_form(entry.tensor),
        "part": entry.part,
        "path": entry.path,
        "layer": entry.layer,
        "transform": entry.transform,
    }


def _left(each: Ignored, inputs: Inputs) -> Mapping[str, Any]:
    form = {} if each.tensor is None else _form(each.tensor)
    return {"file": inputs.label(each.origin), "name": each.name, **form, "reason": each.reason}
