"""Converted parts written tensor by tensor: each is read, checked, hashed and put in its place, then let go."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from packforcing_jax.convert import networks, rules
from packforcing_jax.convert.contents import digest
from packforcing_jax.convert.lora import Addition
from packforcing_jax.convert.quantised import Quantised

from packforcing_jax.config import Experiment
from packforcing_jax.io import model_folder, safetensors_io
from packforcing_jax.io.safetensors_io import Form, Tensor

LARGE = (
    1 << 26
)  # bytes beyond which a tensor that only changes its number format is written row by row
SCALE = "scale that an fp8 weight is multiplied with"


@dataclass(frozen=True)
class Job:
    """One part to be written: its tensors by original name, where they go, and what is added to them.

    `link`: the file that already is what is wanted.
    """

    part: str
    tensors: Mapping[str, Tensor]
    plan: rules.Plan
    added: Mapping[str, Addition] = field(default_factory=dict)
    dtype: str | None = None
    link: Path | None = None

    @property
    def count(self) -> int:
        """Tensors of the sources that are read for it."""
        scales = sum(scale_of(tensor) is not None for tensor in self.tensors.values())
        return len(self.tensors) + scales + sum(each.count for each in self.added.values())

    @property
    def forms(self) -> dict[str, Form]:
        """Shape and dtype of every array as stored."""
        return {
            path: (shape, np.dtype(_named(self.dtype) if self.dtype else dtype))
            for path, (shape, dtype) in self.plan.forms.items()
        }


@dataclass(frozen=True)
class Entry:
    """What became of one tensor of the sources; `zero`: all its numbers are 0."""

    tensor: Tensor
    original: str
    sha256: str
    part: str
    path: str
    layer: int | None
    transform: str
    zero: bool = False


def scale_of(tensor: Tensor) -> Tensor | None:
    """The scale that an fp8 tensor is multiplied with."""
    return tensor.scale if isinstance(tensor, Quantised) else None


def _named(dtype: str) -> type:
    return next(known for known in safetensors_io.DTYPES.values() if np.dtype(known).name == dtype)


def job(
    part: str,
    tensors: Mapping[str, Tensor],
    exp: Experiment,
    wrong: rules.Mismatches,
    *,
    added: Mapping[str, Addition],
    dtype: str | None,
) -> Job:
    """How tensors under original names become a part of a model of this experiment."""
    wanted = networks.wanted(part, exp)
    table = networks.NETWORKS[part].table
    plan = rules.plan(
        tensors, table, wanted, wrong, rules.Fit(f"{part}/", any_dtype=dtype is not None)
    )
    return Job(part, tensors, plan, added, dtype)


def taking(
    part: str,
    model: model_folder.Opened,
    exp: Experiment,
    wrong: rules.Mismatches,
    dtype: str | None,
) -> Job:
    """How a part of a model folder is taken over: as it is, unless its number format is to change."""
    tensors = model.part(part)
    targets = {path: rules.Target(path) for path in tensors}
    plan = rules.fit(tensors, targets, networks.wanted(part, exp), wrong, rules.Fit(f"{part}/"))
    stays = all(dtype in (None, tensor.dtype.name) for tensor in tensors.values())
    return Job(
        part,
        tensors,
        plan,
        {},
        dtype,
        model.folder / model_folder.weights_file(part) if stays else None,
    )


def check(job: Job, wrong: rules.Mismatches) -> Iterator[str]:
    """Notes the tensors of a part that are not finite; yields the name of each that was read."""
    for tensor in [
        *job.tensors.values(),
        *(
            used
            for each in job.added.values()
            for term in each.terms
            for used in term.used.values()
        ),
    ]:
        _read(tensor, wrong)
        yield tensor.name


def carry_out(jobs: Sequence[Job], folder: Path, wrong: rules.Mismatches) -> Iterator[Entry]:
    """Writes every part into `folder`; yields what became of each tensor, notes those whose values are no numbers."""
    for job in jobs:
        path = folder / model_folder.weights_file(job.part)
        if job.link is not None:
            _link(job.link, path)
            for name, target in job.plan.targets.items():
                yield from _entries(job, name, target, _read(job.tensors[name], wrong))
            continue
        with safetensors_io.Writer(path, job.forms, {"format": model_folder.FORMAT}) as file:
            for name, target in job.plan.targets.items():
                array = _read(job.tensors[name], wrong)
                if array is not None:
                    _put(file, job, name, array, wrong)
                yield from _entries(job, name, target, array)
                yield from _additions(job, name, target, wrong)


def _link(path: Path, target: Path) -> None:
    """The same file under another name, or a copy where that is not possible."""
    try:
        os.link(path.resolve(), target)
    except OSError:
        shutil.copyfile(path, target)


def _read(tensor: Tensor, wrong: rules.Mismatches) -> np.ndarray | None:
    """The values of a tensor, if all are numbers."""
    array = np.asarray(tensor.read(), order="C")
    if rules.finite(array):
        return array
    wrong[rules.NOT_FINITE].append(tensor.name)
    return None


def _entries(
    job: Job, name: str, target: rules.Target, array: np.ndarray | None
) -> Iterator[Entry]:
    """What became of tensor `name`, and of its scale if it has one."""
    tensor = job.tensors[name]
    stored = tensor.stored if isinstance(tensor, Quantised) else tensor
    scale = scale_of(tensor)
    held = array if stored is tensor or array is None else np.asarray(stored.read(), order="C")
    yield _entry(stored, held, job, target, (name, target.transform))
    if scale is not None:
        yield _entry(scale, np.asarray(scale.read(), order="C"), job, target, (name, SCALE))


def _entry(
    tensor: Tensor,
    array: np.ndarray | None,
    job: Job,
    target: rules.Target,
    became: tuple[str, str],
) -> Entry:
    """What became of `tensor`, whose values are `array` (None: some are no numbers): (original name, transform)."""
    sha256 = "" if array is None else digest(array)
    zero = array is not None and array.size > 0 and not array.any()
    original, transform = became
    return Entry(tensor, original, sha256, job.part, target.path, target.layer, transform, zero)


def _additions(
    job: Job, name: str, target: rules.Target, wrong: rules.Mismatches
) -> Iterator[Entry]:
    """What became of the tensors that are added to weight `name`."""
    for term in job.added[name].terms if name in job.added else ():
        for what, tensor in term.used.items():
            array = _read(tensor, wrong)
            if isinstance(tensor, Quantised) and array is not None:
                tensor = tensor.stored
                array = np.asarray(tensor.read(), order="C")
            yield _entry(tensor, array, job, target, (name, term.told(what)))


def _put(
    file: safetensors_io.Writer, job: Job, name: str, array: np.ndarray, wrong: rules.Mismatches
) -> None:
    """Writes one tensor into its place, with what is added to it and in its new number format."""
    target = job.plan.targets[name]
    _, dtype = job.forms[job.plan.targets[name].path]
    if name in job.added:
        array = job.added[name].onto(array)
    changed = name in job.added or array.dtype != dtype
    rows = (
        changed
        and target.transform == rules.same
        and target.layer is None
        and array.ndim > 1
        and array.nbytes > LARGE
    )
    for row, values in enumerate(array) if rows else [(target.layer, array)]:
        with np.errstate(over="ignore", invalid="ignore"):
            value = target.forward(values).astype(dtype, copy=False)
        if changed and not rules.finite(value):
            wrong[f"too large for {dtype}"].append(job.tensors[name].name)
            return
        file.put(target.path, value, layer=row)
