"""Training checkpoints: any pytree on disk, complete or absent, with the position of the data and what it belongs to.

Steps are written in the background. What goes wrong there is raised by the next call, and earlier steps are kept.
"""

import base64
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from packforcing_jax.errors import InputError, MachineError, brief, require

State = TypeVar("State")


# Any pytree as named arrays and back


def _is_key(leaf) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named(state) -> dict[str, Any]:
    """Every leaf of any pytree under its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


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
    return {
        name: f"{np.result_type(leaf) if not hasattr(leaf, 'dtype') else leaf.dtype}{list(np.shape(leaf))}"
        for name, leaf in _named(state).items()
    }


# The position of the data, which every process has its own of


def _everyones(position: bytes | dict | None) -> list[str]:
    """The positions of all processes as JSON text, in their order."""
    table = (
        {"base64": base64.b64encode(position).decode()}
        if isinstance(position, bytes)
        else {"json": position}
    )
    text = json.dumps(table).encode()
    if jax.process_count() == 1:
        return [text.decode()]
    longest = int(multihost_utils.process_allgather(np.int32(len(text))).max())
    rows = multihost_utils.process_allgather(np.frombuffer(text.ljust(longest), np.uint8))
    return [row.tobytes().decode() for row in rows]


def _own(positions: Sequence[str], place: str) -> bytes | dict | None:
    """The position of this process; with another number of processes than saved it, all must have been at one place."""
    same, now = len(set(positions)) == 1, jax.process_count()
    require(
        same or len(positions) == now,
        f"{place} was saved by {len(positions)} processes that stood at different "
        f"places in their data; resume with {len(positions)} processes instead of {now}.",
    )
    table = json.loads(positions[0 if same else jax.process_index()])
    return base64.b64decode(table["base64"]) if "base64" in table else table["json"]


# What a checkpoint belongs to


def settings(value: Any, name: str = "") -> dict[str, str]:
    """The entries of nested tables under dotted names, as JSON text."""
    if not isinstance(value, Mapping):
        return {name: json.dumps(value)}
    inner = (settings(item, f"{name}.{key}" if name else key) for key, item in value.items())
    return {path: text for table in inner for path, text in table.items()}


def differences(
    saved: Mapping[str, str], wanted: Mapping[str, str], free: Sequence[str] = ()
) -> list[str]:
    """Sentences about the entries that differ, but for those in or below the names in `free`."""
    return [
        f"{name}: {saved.get(name, 'absent')} saved, {wanted.get(name, 'absent')} wanted"
        for name in sorted({**saved, **wanted})
        if saved.get(name) != wanted.get(name)
        and not any(f"{name}.".startswith(f"{each}.") for each in free)
    ]


def _not_orbax(record: logging.LogRecord) -> bool:
    """What fails in the background is raised as one sentence; Orbax also logs it, several times over."""
    return "orbax" not in record.pathname


def _few(sentences: Sequence[str]) -> str:
    return "; ".join(sentences[:4]) + "; ..." * (len(sentences) > 4)


class Checkpoints:
    """The newest `keep` training states below `folder`: pytrees of arrays, keys and numbers, complete or absent.

    `about` says what they belong to (nested tables for JSON); a state of something else is refused, except for
    differences in the settings named in `free`.
    """

    def __init__(
        self,
        folder,
        keep: int = 2,
        *,
        about: Mapping[str, Any] | None = None,
        free: Sequence[str] = (),
    ):
        import orbax.checkpoint as orbax  # slow to import, and only training needs it

        logging.getLogger("absl").addFilter(_not_orbax)
        self._orbax = orbax
        self.folder, self.keep = Path(folder).absolute(), keep
        self.about, self.free = dict(about or {}), tuple(free)
        self._saving: int | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = self._opened()
        except OSError as error:
            raise InputError(
                f"Checkpoint folder {folder} is not usable ({error.strerror}); choose another one."
            ) from error

    def _opened(self):
        options = self._orbax.CheckpointManagerOptions(
            max_to_keep=self.keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
        )
        return self._orbax.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state, data_state: bytes | dict | None = None) -> None:
        """Begins to store `state` and the position of the data; `state` may be used up when this returns."""
        self.wait()
        named = _named(state)
        keys = {
            name: str(jax.random.key_impl(leaf)) for name, leaf in named.items() if _is_key(leaf)
        }
        notes = {
            "leaves": _described(state),
            "keys": keys,
            "data": _everyones(data_state),
            "about": self.about,
        }
        arrays = {name: _plain(leaf) for name, leaf in named.items()}
        arguments = self._orbax.args.Composite(
            state=self._orbax.args.StandardSave(arrays), notes=self._orbax.args.JsonSave(notes)
        )
        self._saving = step
        try:
            self._manager.save(step, args=arguments, force=True)
        except (OSError, ValueError) as error:  # Orbax reports a full disk as ValueError
            raise self._failed(error) from error

    def wait(self) -> None:
        """Returns when the last save is complete on disk; raises `MachineError` if it failed."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> MachineError:
        """The sentence about the save that failed; its leftovers are cleared and the next one may be tried."""
        self._manager = self._opened()
        return MachineError(
            f"Saving step {self._saving} below {self.folder} failed ({brief(error)}); "
            "earlier steps are kept."
        )

    def latest(self) -> int | None:
        """The newest complete step."""
        self.wait()
        return self._manager.latest_step()

    def restore(self, abstract_state: State, step: int | None = None) -> tuple[State, Any]:
        """State and data position of `step` (the newest by default), with the structure, kinds and shardings given."""
        newest = self.latest()
        step = newest if step is None else step
        if step is None:
            raise InputError(
                f"Checkpoint folder {self.folder} holds no complete step; start training anew."
            )
        place = f"Checkpoint {self.folder / str(step)}"
        notes = self._notes(step, place)
        wrong = differences(notes["leaves"], _described(abstract_state))
        require(
            not wrong,
            f"{place} does not fit this training ({len(wrong)} leaves: {_few(wrong)}); "
            "resume with the config it was saved with.",
        )
        named = _named(abstract_state)
        wanted = {name: _wanted(leaf) for name, leaf in named.items()}
        stored = self._read(step, place, state=self._orbax.args.StandardRestore(wanted))["state"]
        leaves = [
            _restored(leaf, stored[name], notes["keys"].get(name)) for name, leaf in named.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), _own(
            notes["data"], place
        )

    def check(self) -> None:
        """Raises `InputError` if the newest step, where there is one, belongs to another training."""
        newest = self.latest()
        if newest is not None:
            self._notes(newest, f"Checkpoint {self.folder / str(newest)}")

    def _notes(self, step: int, place: str) -> dict[str, Any]:
        """What was noted of a step of this training."""
        notes = self._read(step, place, notes=self._orbax.args.JsonRestore())["notes"]
        wrong = (
            differences(settings(notes.get("about", {})), settings(self.about), self.free)
            if self.about
            else []
        )
        require(
            not wrong,
            f"{place} belongs to another training ({_few(wrong)}); "
            "resume with the settings it was saved with or choose another folder.",
        )
        return notes

    def _read(self, step: int, place: str, **items):
        try:
            return self._manager.restore(step, args=self._orbax.args.Composite(**items))
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{place} is damaged ({brief(error)}); delete it to resume from the one before."
            ) from error

    def close(self) -> None:
        """Waits for the last save and ends the background work of Orbax."""
        self.wait()
        self._manager.close()
