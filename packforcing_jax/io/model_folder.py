"""Model folders: the experiment as JSON, one safetensors file per part, read tensor by tensor into place."""

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from packforcing_jax import config, pytrees
from packforcing_jax.config import decode
from packforcing_jax.errors import MachineError, brief, require
from packforcing_jax.io import atomic, identity, safetensors_io
from packforcing_jax.io.safetensors_io import Tensor

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
CARD = "README.md"
MANIFEST = identity.MANIFEST
FORMAT = "packforcing-jax 2"
PIPELINE = "model_index.json"  # of a folder of diffusers
THEIRS = (
    "_class_name",
    "_diffusers_version",
    "architectures",
    "model_type",
)  # in published settings
SNAPSHOTS = "snapshots"  # in a repository of the hub's cache
PARTS = identity.PARTS
GONE = {
    "train": "the table `train` has no place in a model folder any more; delete it from the file."
}  # of earlier versions
SHIPPED = Path(__file__).parents[1] / "weights" / "stage"  # the small model of the package
LAYER = re.compile(r"(.+?)/(\d+)/(.+)")  # a path inside one of the layers that files stack
Module = TypeVar("Module")


# The experiment as JSON


def experiment_to_json(experiment: config.Experiment) -> str:
    """The experiment as JSON text."""
    return decode.to_json(experiment)


def experiment_from_json(
    text: str, source: str = CONFIG, known: Sequence[type] = ()
) -> config.Experiment:
    """The experiment of `experiment_to_json`; `source` names the text in `InputError`s.

    `known` are classes of settings beside the package's own.
    """
    return decode.from_json(config.Experiment, text, source, known=known, gone=GONE)


# Writing


def weights_file(part: str) -> str:
    """The name of the file that holds a part."""
    return f"{part}.safetensors"


def save(
    folder: str | Path,
    experiment: config.Experiment,
    parts: Mapping[str, Any],
    *,
    dtype: str = "bfloat16",
    texts: Mapping[str, str | None] | None = None,
) -> None:
    """Writes a model folder, complete or not at all: modules by part, floating ones as `dtype`, and files of text."""
    require(
        dtype in config.DTYPES,
        f"dtype={dtype!r} is unknown; choose one of {', '.join(config.DTYPES)}.",
    )
    strangers = sorted(set(parts) - set(PARTS))
    require(not strangers, f"{strangers} are no parts of a model; choose from {', '.join(PARTS)}.")
    with replacing(folder) as fresh:
        for part, module in parts.items():
            flat = pytrees.flatten(module)
            forms = {path: (leaf.shape, _stored(leaf.dtype, dtype)) for path, leaf in flat.items()}
            with safetensors_io.Writer(
                fresh / weights_file(part), forms, {"format": FORMAT}
            ) as file:
                for path, leaf in flat.items():
                    file.put(path, np.asarray(leaf).astype(forms[path][1]))
        for name, content in {CONFIG: experiment_to_json(experiment), **(texts or {})}.items():
            if content is not None:
                (fresh / name).write_text(content, encoding="utf-8")
        write_record(fresh)


def write_record(folder: Path) -> None:
    """Writes the manifest of a folder that nothing was converted for: which files it has, and their hashes."""
    manifest = json.dumps({"format": FORMAT, **identity.record(folder)}, indent=1)
    (folder / MANIFEST).write_text(manifest + "\n", encoding="utf-8")


def _stored(dtype: jax.typing.DTypeLike, floating: str) -> np.dtype:
    return np.dtype(jnp.dtype(floating) if safetensors_io.floating(np.dtype(dtype)) else dtype)


@contextlib.contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """An empty sibling that takes the place of `folder` when the body succeeds, and vanishes when it fails."""
    folder = Path(folder)
    ours = not folder.exists() or (
        folder.is_dir() and ((folder / CONFIG).exists() or not any(folder.iterdir()))
    )
    require(ours, f"{folder} exists and is not a model folder; choose another one.")
    try:
        with atomic.folder(folder) as fresh:
            yield fresh
    except OSError as error:
        raise MachineError(
            f"Writing the model folder {folder} failed ({brief(error)}); nothing was changed."
        ) from error


# Reading


@dataclass(frozen=True)
class Opened:
    """A model folder whose weights have not been read yet: tensors by path for every part it holds."""

    folder: Path
    parts: Mapping[str, Mapping[str, Tensor]]
    known: Sequence[type] = ()

    @functools.cached_property
    def experiment(self) -> config.Experiment:
        """The folder's own settings, decoded where they are asked for: a caller may bring others."""
        text = (self.folder / CONFIG).read_text(encoding="utf-8", errors="replace")
        return experiment_from_json(text, str(self.folder / CONFIG), self.known)

    @functools.cached_property
    def identity(self) -> str:
        """What tells this model from others: a hash of every tensor of every part, and of the tokenizer."""
        return identity.of_folder(self.folder)

    def part(self, name: str) -> Mapping[str, Tensor]:
        """The tensors of a part; raises `InputError` if the folder lacks it."""
        require(
            name in self.parts,
            f"Model folder {self.folder} has no {weights_file(name)}; fetch the model again, "
            f"or convert that part into it.",
        )
        return self.parts[name]


def opened(folder: str | Path, known: Sequence[type] = ()) -> Opened:
    """The model in `folder`; `known` are classes of its settings beside the package's own."""
    folder = Path(folder)
    _require_ours(folder)
    files = {part: folder / weights_file(part) for part in PARTS}
    return Opened(
        folder,
        {part: safetensors_io.opened(path) for part, path in files.items() if path.is_file()},
        known,
    )


def _require_ours(folder: Path) -> None:
    """Raises `InputError` unless `folder` is a model folder, with what to do about what it is instead."""
    convert = f"convert it first: `packforcing convert {folder} --out DIR`, and give DIR"
    require(not folder.is_file(), f"{folder} is a file and no model folder; {convert}.")
    require(
        folder.is_dir(),
        f"Model folder {folder} does not exist; check the path or convert a checkpoint into it.",
    )
    cached = snapshots(folder)
    require(
        not cached,
        f"{folder} is a folder of the hub's cache, whose files lie in snapshots/; convert one first: "
        f"`packforcing convert {cached[0] if cached else ''} --out DIR`, and give DIR.",
    )
    published = f"{folder} is a published checkpoint and no model folder; {convert}."
    require((folder / CONFIG).is_file() or not (folder / PIPELINE).is_file(), published)
    require(
        (folder / CONFIG).is_file(),
        f"Model folder {folder} has no {CONFIG}; fetch or convert the model again.",
    )
    require(not _is_published(folder / CONFIG), published)


def _is_published(path: Path) -> bool:
    """Whether settings are those of somebody else's network."""
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(settings, dict) and not settings.keys().isdisjoint(THEIRS)


def snapshots(folder: Path) -> list[str]:
    """The folders with the files of each commit, if `folder` is a repository in the hub's cache, or holds several."""
    own = [folder] if (folder / SNAPSHOTS).is_dir() else folder.glob("models--*")
    found = [commit for each in own for commit in (each / SNAPSHOTS).glob("*") if commit.is_dir()]
    return [str(each) for each in sorted(found)]


def in_memory(module: nnx.Module) -> dict[str, Tensor]:
    """The leaves of a module as tensors like those of a file."""
    return {
        path: Tensor(
            path, leaf.shape, np.dtype(leaf.dtype), lambda leaf=leaf: np.asarray(leaf), "memory"
        )
        for path, leaf in pytrees.flatten(module).items()
    }


def fill(
    shapes: Module,
    tensors: Mapping[str, Tensor],
    *,
    dtype: str,
    source: str,
    inside: str = "",
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> Module:
    """The module of `shapes` with its leaves from `tensors`, floating ones as `dtype`, each read to where it stays.

    A module with its layers apart takes each layer's slice of what files stack. `inside` is the path in `tensors` at
    which the module begins, such as `blocks/3/`. Raises `InputError` naming every mismatch.
    """
    filled = placed(shapes, tensors, dtype=dtype, source=source, inside=inside, shardings=shardings)
    _require_finite(pytrees.flatten(filled), source)
    return filled


def placed(
    shapes: Module,
    tensors: Mapping[str, Tensor],
    *,
    dtype: str,
    source: str,
    inside: str = "",
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> Module:
    """`fill` without a look at the values."""
    leaves = {path: _leaf(tensors, inside + path) for path in pytrees.flatten(shapes)}
    flat = {path: value for path, (_, value) in leaves.items() if value is not None}
    if not inside:
        used = {name for name, _ in leaves.values()}
        flat |= {name: tensor.read() for name, tensor in tensors.items() if name not in used}
    placement = shardings or {}

    def put(path: str, value: np.ndarray) -> jax.Array:
        form = jnp.dtype(dtype) if safetensors_io.floating(value.dtype) else value.dtype
        return jax.make_array_from_callback(
            value.shape, placement.get(path, _here()), lambda at: value[at].astype(form)
        )

    return pytrees.fill(shapes, flat, source, put)


def _here() -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _leaf(tensors: Mapping[str, Tensor], path: str) -> tuple[str, np.ndarray | None]:
    """(name of the tensor that holds the leaf at `path`, its value as yet unread)."""
    if path in tensors:
        return path, tensors[path].read()
    layer = LAYER.fullmatch(path)
    stacked = tensors.get(f"{layer[1]}/{layer[3]}") if layer else None
    if layer is None or stacked is None or int(layer[2]) >= (*stacked.shape, 0)[0]:
        return path, None
    return stacked.name, stacked.read()[int(layer[2])]


@jax.jit
def _finite(leaves: Sequence[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


def _require_finite(flat: Mapping[str, jax.Array], source: str) -> None:
    finite = jax.device_get(_finite(list(flat.values())))  # one program a part, not one a shape
    broken = [path for path, whole in zip(flat, finite, strict=True) if not whole]
    require(
        not broken,
        f"{source} hold values that are not finite in {len(broken)} tensors ({', '.join(broken[:3])}); "
        "fetch or convert the model again.",
    )
