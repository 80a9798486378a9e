"""Training checkpoints: any pytree on disk, complete or absent, with the position of the data."""

import base64
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from packforcing_jax.config import require
from packforcing_jax.errors import InputError, MachineError, brief

State = TypeVar("State")


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
