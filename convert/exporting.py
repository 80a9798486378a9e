"""Model folders back to one file under original names and in the layouts of torch, tensor by tensor."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

import numpy as np
from packforcing_jax.convert import networks, rules, sources

from packforcing_jax.errors import InputError, require
from packforcing_jax.io import atomic, model_folder, safetensors_io
from packforcing_jax.io.safetensors_io import Tensor

SUFFIX = ".safetensors"
AGAIN = "fetch or convert the model again"
Watch: TypeAlias = Callable[
    [Iterable, int], Iterable
]  # (steps, how many) -> the same steps, shown to the user


def originals(model: model_folder.Opened, part: str, wrong: rules.Mismatches) -> dict[str, Tensor]:
    """The tensors of a part by original name, as checkpoints have them; the part must be whole."""
    tensors = model.part(part)
    rules.fit(
        tensors,
        {path: rules.Target(path) for path in tensors},
        networks.wanted(part, model.experiment),
        wrong,
        rules.Fit(f"{part}/"),
    )
    shapes = {path: tensor.shape for path, tensor in tensors.items()}
    sizes = networks.merged_axes(model.experiment)
    targets = rules.sources(shapes, networks.NETWORKS[part].table, wrong, f"{part}/")
    return {
        name: _original(name, tensors[target.path], target, sizes)
        for name, target in targets.items()
    }


def _original(name: str, tensor: Tensor, target: rules.Target, sizes: dict[str, int]) -> Tensor:
    """What a checkpoint calls `name`, as a view of the array that holds it."""

    def view(array: np.ndarray) -> np.ndarray:
        return target.inverse(array if target.layer is None else array[target.layer], sizes)

    return Tensor(
        name,
        view(rules.hollow(tensor.shape)).shape,
        tensor.dtype,
        lambda: view(tensor.read()),
        tensor.origin,
    )


def to_torch(
    folder: Path, out: Path, part: str | None = None, watch: Watch = lambda steps, count: steps
) -> dict[str, dict[str, Tensor]]:
    """Writes the parts of a model folder, or one of them, to the file `out`; returns its tensors by part."""
    model = sources.opened_model(folder)
    wrong = rules.no_mismatches()
    _check_target(out, folder)
    require(
        bool(model.parts),
        f"Model folder {folder} has no weights; fetch or convert the model again.",
    )
    parts = {each: originals(model, each, wrong) for each in ([part] if part else model.parts)}
    rules.raise_all(wrong, f"Model folder {folder} does not fit its {model_folder.CONFIG}", AGAIN)
    tensors = {name: tensor for tensors_of in parts.values() for name, tensor in tensors_of.items()}
    with atomic.file(out) as fresh:
        forms = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        with safetensors_io.Writer(fresh, forms, {"format": "pt"}) as file:
            for name, tensor in watch(tensors.items(), len(tensors)):
                array = np.asarray(tensor.read(), order="C")
                if not rules.finite(array):
                    wrong[rules.NOT_FINITE].append(name)
                file.put(name, array)
        rules.raise_all(wrong, f"Model folder {folder} is damaged", AGAIN)
    return parts


def _check_target(out: Path, folder: Path) -> None:
    """Raises `InputError` unless a file may be written at `out`, in the place of at most another of its kind."""
    require(out.suffix == SUFFIX, f"{out} must end in {SUFFIX}; choose such a name.")
    require(
        out.parent.is_dir(), f"the folder of {out} does not exist; make it or choose another one."
    )
    inside = out.resolve().is_relative_to(folder.resolve())
    require(not inside, f"{out} lies in the model folder {folder}; choose a place outside of it.")
    require(not out.is_dir(), f"{out} is a folder; choose the name of a file.")
    if out.exists():
        try:
            safetensors_io.opened(out)
        except InputError as error:
            raise InputError(
                f"{out} exists and is no safetensors file; choose another name."
            ) from error
