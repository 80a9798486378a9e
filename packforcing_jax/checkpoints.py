"""Everything that touches weights on disk: model folders to share and use, and training checkpoints to resume from."""

import base64
import contextlib
import dataclasses
import difflib
import json
import os
import tempfile
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from packforcing_jax import config
from packforcing_jax.config import require
from packforcing_jax.errors import InputError, MachineError

CONFIG, WEIGHTS, TOKENIZER, CARD = "config.json", "model.safetensors", "tokenizer.json", "README.md"
FORMAT = "packforcing-jax 1"
PARTS = ("dit", "compressor", "codec", "text")
DTYPES = {"bfloat16": jnp.bfloat16, "float32": np.float32}
KINDS = {"vae": config.VAEConfig, "space_to_depth": config.SpaceToDepthConfig}  # members of the codec union
State = TypeVar("State")


def experiment_to_json(experiment: config.Experiment) -> str:
    """The experiment as JSON text; a member of a union carries its `kind`."""
    return json.dumps(_encoded(experiment), indent=2) + "\n"


def _encoded(value):
    if not dataclasses.is_dataclass(value):
        return value
    tags = [{"kind": kind} for kind, member in KINDS.items() if type(value) is member]
    return (tags or [{}])[0] | {field.name: _encoded(getattr(value, field.name)) for field in dataclasses.fields(value)}


def experiment_from_json(text: str, source: str = CONFIG) -> config.Experiment:
    """The experiment of `experiment_to_json`; `source` names the text in `InputError`s."""
    try:
        return _decoded(config.Experiment, json.loads(text), "")
    except json.JSONDecodeError as error:
        raise InputError(f"{source} is not JSON (line {error.lineno}: {error.msg}); fetch the file again.") from error
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _decoded(hint: Any, value: Any, where: str) -> Any:
    """`value` from JSON as the annotated type `hint`; `where` is its dotted place in the file."""
    if isinstance(hint, types.UnionType):
        return _member(typing.get_args(hint), value, where)
    if typing.get_origin(hint) is tuple:
        return _tuple(typing.get_args(hint), value, where)
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, value, where)
    allowed = (int, float) if hint is float else hint
    fits = isinstance(value, allowed) and (hint is bool or not isinstance(value, bool))
    require(fits, f"{where}={value!r} is not of type {hint.__name__}; correct it.")
    return hint(value)


def _member(hints: tuple, value: Any, where: str) -> Any:
    if type(None) in hints:
        return None if value is None else _decoded(next(h for h in hints if h is not type(None)), value, where)
    kind = value.get("kind") if isinstance(value, dict) else value
    require(str(kind) in KINDS, f"{where}.kind={kind!r} is unknown; choose one of {', '.join(KINDS)}.")
    return _decoded(KINDS[str(kind)], {key: item for key, item in value.items() if key != "kind"}, where)


def _tuple(hints: tuple, value, where: str) -> tuple:
    require(isinstance(value, list), f"{where}={value!r} is not a list; correct it.")
    if hints[-1] is Ellipsis:
        hints = hints[:1] * len(value)
    require(len(hints) == len(value), f"{where}={value!r} needs {len(hints)} entries; correct it.")
    return tuple(_decoded(hint, item, f"{where}[{i}]") for i, (hint, item) in enumerate(zip(hints, value, strict=True)))


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    require(isinstance(value, dict), f"{where or 'the file'}={value!r} is not a table of settings; correct it.")
    for key in value:
        near = difflib.get_close_matches(key, hints, n=1, cutoff=0)
        require(key in hints, f"{_dotted(where, key)} is unknown; did you mean {near[0] if near else None}?")
    needed = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING and f.name not in value]
    require(not needed, f"{_dotted(where, ', '.join(needed))} is missing; add it.")
    return kind(**{key: _decoded(hints[key], item, _dotted(where, key)) for key, item in value.items()})


def _dotted(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def part(flat: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The leaves of one part (`dit`, `compressor`, `codec`, `text`) under their own paths."""
    return {path.removeprefix(f"{name}/"): leaf for path, leaf in flat.items() if path.startswith(f"{name}/")}


def joined(**parts: Mapping[str, Any]) -> dict[str, Any]:
    """One flat dictionary from the flat dictionaries of the parts: the inverse of `part`."""
    return {f"{name}/{path}": leaf for name, flat in parts.items() for path, leaf in flat.items()}


def save_model(folder, experiment: config.Experiment, flat: Mapping[str, Any], *, tokenizer_json: str | None = None,
               card: str | None = None, dtype: str = "bfloat16") -> None:  # fmt: skip
    """Writes a model folder, complete or not at all; floating tensors are stored as `dtype`."""
    require(dtype in DTYPES, f"dtype={dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")
    strangers = sorted(path for path in flat if path.split("/")[0] not in PARTS)
    require(not strangers, f"Weights {strangers[:3]} belong to no part; their paths must begin with one of {PARTS}.")
    arrays = {path: _stored(np.asarray(leaf), DTYPES[dtype]) for path, leaf in flat.items()}
    texts = {CONFIG: experiment_to_json(experiment), TOKENIZER: tokenizer_json, CARD: card}
    with _replacing(Path(folder)) as fresh:
        safetensors.numpy.save_file(arrays, fresh / WEIGHTS, metadata={"format": FORMAT})
        for name, text in texts.items():
            if text is not None:
                (fresh / name).write_text(text, encoding="utf-8")


def _floating(array: np.ndarray) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def _stored(array: np.ndarray, dtype) -> np.ndarray:
    """The array as it goes to disk: contiguous, cast when it is floating."""
    return np.asarray(array, dtype if _floating(array) else None, order="C")


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """An empty sibling that takes the place of `folder` when the body succeeds, and vanishes when it fails."""
    ours = not folder.exists() or (folder.is_dir() and ((folder / CONFIG).exists() or not any(folder.iterdir())))
    require(ours, f"{folder} exists and is not a model folder; choose another one.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as room:
            fresh = Path(room, "new")
            fresh.mkdir()
            yield fresh
            _swap(fresh, folder, Path(room, "old"))
    except (OSError, safetensors.SafetensorError) as error:
        raise MachineError(
            f"Writing the model folder {folder} failed ({brief(error)}); nothing was changed."
        ) from error


def _swap(fresh: Path, folder: Path, old: Path) -> None:
    """Puts `fresh` at `folder` and what was there at `old`; on failure everything stays where it was."""
    occupied = folder.exists()
    if occupied:
        os.rename(folder, old)
    try:
        os.rename(fresh, folder)
    except BaseException:
        if occupied:
            os.rename(old, folder)
        raise


def load_model(folder) -> tuple[config.Experiment, dict[str, np.ndarray]]:
    """The experiment and the flat weights (floating ones as float32) of a model folder."""
    folder = Path(folder)
    require(folder.is_dir(), f"Model folder {folder} does not exist; check the path or convert a checkpoint into it.")
    for name in (CONFIG, WEIGHTS):
        require((folder / name).is_file(), f"Model folder {folder} has no {name}; fetch or convert the model again.")
    text = (folder / CONFIG).read_text(encoding="utf-8", errors="replace")
    return experiment_from_json(text, str(folder / CONFIG)), _weights(folder / WEIGHTS)


def _weights(path: Path) -> dict[str, np.ndarray]:
    flat = {}
    try:
        with safetensors.safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118, not a mapping
                leaf = file.get_tensor(name)
                flat[name] = leaf.astype(np.float32) if _floating(leaf) else leaf
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} is damaged ({brief(error)}); fetch or convert the model again.") from error
    broken = [name for name, leaf in flat.items() if not np.isfinite(leaf).all()]
    require(not broken, f"{path} holds values that are not finite in {len(broken)} tensors ({', '.join(broken[:3])}); "
            "fetch or convert the model again.")  # fmt: skip
    return flat


def brief(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _is_key(leaf) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named(state) -> dict[str, Any]:
    """Every leaf of any pytree under its path."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)}  # fmt: skip


def _plain(leaf):
    """A leaf as an array that Orbax stores: a typed key as its data, a Python number as an array."""
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if hasattr(leaf, "dtype") else np.asarray(leaf)


def _wanted(leaf) -> jax.ShapeDtypeStruct:
    """Shape, dtype and place of the stored form of an abstract or concrete leaf."""
    shape = jax.eval_shape(_plain, leaf) if hasattr(leaf, "dtype") else np.asarray(leaf)
    place = None if _is_key(leaf) else getattr(leaf, "sharding", None)
    place = place or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place)


def _restored(leaf, stored, kind: str | None):
    """The stored array as a leaf of the same sort as `leaf`; `kind` is the generator of a typed key."""
    if _is_key(leaf):
        return jax.random.wrap_key_data(stored, impl=kind)
    return stored if hasattr(leaf, "dtype") else type(leaf)(stored.item())


def _described(state) -> dict[str, str]:
    """What identifies each leaf: its dtype and shape, as text."""
    return {name: f"{np.result_type(leaf) if not hasattr(leaf, 'dtype') else leaf.dtype}{list(np.shape(leaf))}"
            for name, leaf in _named(state).items()}  # fmt: skip


class Checkpoints:
    """The newest `keep` training states below `folder`: pytrees of arrays, keys and numbers, complete or absent."""

    def __init__(self, folder, keep: int = 2):
        import orbax.checkpoint as orbax  # slow to import, and only training needs it

        self._orbax = orbax
        self.folder = Path(folder).absolute()
        options = orbax.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = orbax.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise InputError(
                f"Checkpoint folder {folder} is not usable ({error.strerror}); choose another one."
            ) from error

    def save(self, step: int, state, data_state: bytes | dict | None = None) -> None:
        """Stores `state` and the position of the data; it is complete on disk when this returns."""
        named = _named(state)
        if isinstance(data_state, bytes):
            data_state = {"base64": base64.b64encode(data_state).decode()}
        else:
            data_state = {"json": data_state}
        keys = {name: str(jax.random.key_impl(leaf)) for name, leaf in named.items() if _is_key(leaf)}
        notes = {"leaves": _described(state), "keys": keys, "data": data_state}
        arrays = {name: _plain(leaf) for name, leaf in named.items()}
        arguments = self._orbax.args.Composite(state=self._orbax.args.StandardSave(arrays),
                                               notes=self._orbax.args.JsonSave(notes))  # fmt: skip
        try:
            self._manager.save(step, args=arguments, force=True)
        except (OSError, ValueError) as error:  # Orbax reports a full disk as ValueError
            sentence = f"Saving step {step} below {self.folder} failed ({brief(error)}); earlier steps are kept."
            raise MachineError(sentence) from error

    def latest(self) -> int | None:
        """The newest complete step."""
        return self._manager.latest_step()

    def restore(self, abstract_state: State, step: int | None = None) -> tuple[State, Any]:
        """State and data position of `step` (the newest by default), with the structure, kinds and shardings given."""
        step = self.latest() if step is None else step
        if step is None:
            raise InputError(f"Checkpoint folder {self.folder} holds no complete step; start training anew.")
        place = f"Checkpoint {self.folder / str(step)}"
        notes = self._read(step, place, notes=self._orbax.args.JsonRestore())["notes"]
        _require_same(notes["leaves"], _described(abstract_state), place)
        named = _named(abstract_state)
        wanted = {name: _wanted(leaf) for name, leaf in named.items()}
        stored = self._read(step, place, state=self._orbax.args.StandardRestore(wanted))["state"]
        leaves = [_restored(leaf, stored[name], notes["keys"].get(name)) for name, leaf in named.items()]
        data = notes["data"]
        data = base64.b64decode(data["base64"]) if "base64" in data else data["json"]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), data

    def _read(self, step: int, place: str, **items):
        try:
            return self._manager.restore(step, args=self._orbax.args.Composite(**items))
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{place} is damaged ({brief(error)}); delete it to resume from the one before."
            ) from error

    def close(self) -> None:
        """Ends the background work of Orbax."""
        self._manager.close()


def _require_same(saved: dict[str, str], wanted: dict[str, str], place: str) -> None:
    """Raises `InputError` naming the first leaves in which a saved and a wanted state differ."""
    wrong = [f"{name}: {saved.get(name, 'absent')} saved, {wanted.get(name, 'absent')} wanted"
             for name in sorted(saved | wanted) if saved.get(name) != wanted.get(name)]  # fmt: skip
    require(not wrong, f"{place} does not fit this training ({len(wrong)} leaves: {'; '.join(wrong[:4])}); "
            "resume with the config it was saved with.")  # fmt: skip
