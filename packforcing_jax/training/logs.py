"""The metrics of a run, step by step: lines of JSON, and TensorBoard or Weights & Biases if `train.log` names them."""

import importlib.util
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from packforcing_jax.errors import nearest, require
from packforcing_jax.io import append_file, atomic

LINES = "metrics.jsonl"
LIBRARIES = {
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
}  # the extra that brings each has the name of the log


Metrics: TypeAlias = Mapping[str, ArrayLike | str]
Plain: TypeAlias = "float | int | bool | None | list[Plain]"  # as JSON has it
About: TypeAlias = Mapping[str, object]  # what a run is, as plain data


class Sink(Protocol):
    """Where metrics go."""

    def write(self, step: int, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


def plain(value: ArrayLike) -> Plain:
    """A number or array as JSON has it: decimals that are the same float32 again, None for what is not finite."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    array = np.asarray(value)
    if array.ndim:
        return [plain(each) for each in array]
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array.item()
    return float(str(np.float32(array))) if np.isfinite(array) else None


def scalars(metrics: Metrics) -> dict[str, float]:
    """The numbers in `metrics`, those of an array as `name/0`, `name/1`, ..."""
    numbers = {}
    for name, value in metrics.items():
        flat = np.asarray(value).reshape(-1)
        if jnp.issubdtype(flat.dtype, jnp.number) or flat.dtype == bool:
            numbers |= {
                f"{name}/{i}" if np.ndim(value) else name: float(each)
                for i, each in enumerate(flat)
            }
    return numbers


def losses(metrics: Metrics) -> str:
    """The losses of a step as a line has them, such as `loss 0.1234`."""
    shown = {
        name: float(np.asarray(value))
        for name, value in metrics.items()
        if name.rsplit("/", 1)[-1] == "loss"
    }
    return ", ".join(f"{name} {value:.4g}" for name, value in shown.items())


# Lines of JSON


def step_of(line: bytes) -> int | None:
    """The step that a line is about; None for one that is no whole line of ours."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError):
        return None
    return step if isinstance(step, int) else None


def whole(path: Path, after: int) -> int:
    """Bytes of the leading lines in `path` that are about steps up to `after`."""
    size = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        step = step_of(line)
        if step is None or step > after:
            break
        size += len(line)
    return size


class Lines:
    """One line of JSON per step; what an earlier run wrote behind step `after` is cut away, so each comes once."""

    def __init__(self, folder: Path, after: int, about: About):
        del about
        self.file = append_file.File(folder / LINES, whole(folder / LINES, after))

    def write(self, step: int, metrics: Metrics) -> None:
        row = {"step": step} | {
            name: value if isinstance(value, str) else plain(value)
            for name, value in metrics.items()
        }
        self.file.append(json.dumps(row).encode() + b"\n")

    def close(self) -> None:
        self.file.close()


# Optional ones


class TensorBoard:
    """Event files below `folder`/tensorboard; events behind step `after` are taken back."""

    def __init__(self, folder: Path, after: int, about: About):
        import tensorboardX  # pyright: ignore[reportMissingImports]

        self.writer = tensorboardX.SummaryWriter(
            str(folder / "tensorboard"), purge_step=after + 1, filename_suffix=f".{after}"
        )
        self.writer.add_text("experiment", f"```\n{json.dumps(about, indent=2)}\n```", after)

    def write(self, step: int, metrics: Metrics) -> None:
        for name, value in scalars(metrics).items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """One W&B run per folder, continued with it: its id lies in `folder`/wandb.id."""

    def __init__(self, folder: Path, after: int, about: About):
        import wandb  # pyright: ignore[reportMissingImports]

        del after  # the service itself keeps the first of two values for a step
        identity = folder / "wandb.id"
        if not identity.exists():
            atomic.write(identity, uuid.uuid4().hex[:12].encode())
        self.run = wandb.init(
            project="packforcing",
            name=folder.name,
            id=identity.read_text(),
            resume="allow",
            dir=str(folder),
            config=dict(about),
        )

    def write(self, step: int, metrics: Metrics) -> None:
        self.run.log(scalars(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


SINKS = {"jsonl": Lines, "tensorboard": TensorBoard, "wandb": WeightsAndBiases}


# All together


def check(names: Sequence[str]) -> None:
    """Raises `InputError` for a log that does not exist, or naming the extra, if its library is missing."""
    for name in names:
        require(name in SINKS, f"train.log names {name!r}, which is no log; {nearest(name, SINKS)}")
    for name, library in LIBRARIES.items():
        require(
            name not in names or importlib.util.find_spec(library) is not None,
            f"train.log names {name!r}, but {library} is not installed; "
            f"install packforcing-jax[{name}] or leave it out.",
        )


class Log:
    """All logs of a run in `folder`, opened to go on behind step `after`; only the first process writes them."""

    def __init__(self, folder: Path, names: Sequence[str], *, after: int, about: About):
        check(names)
        chosen = dict.fromkeys(("jsonl", *names)) if jax.process_index() == 0 else {}
        self.sinks: list[Sink] = [SINKS[name](folder, after, about) for name in chosen]

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def write(self, step: int, metrics: Metrics) -> None:
        """Adds the numbers of one step."""
        for sink in self.sinks:
            sink.write(step, metrics)

    def close(self) -> None:
        """Ends every log."""
        for sink in self.sinks:
            sink.close()
