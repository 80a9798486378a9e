"""Sampler states on disk: what a run needs to go on after any interruption, bit for bit as if it had never stopped."""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from packforcing_jax import pytrees
from packforcing_jax.errors import InputError, MachineError, brief, require

STATE, NOTES, FILES = "state", "notes.json", "files.json"  # what a save consists of
NAME = re.compile(r"block_(\d+)")
UNFINISHED, DISCARDED = ".unfinished", ".discarded"
KEPT = 2
State = TypeVar("State")


def _orbax():
    """The module, imported when it is first needed: that is slow."""
    import orbax.checkpoint

    return orbax.checkpoint


def _described(flat: Mapping[str, Any]) -> dict[str, str]:
    """dtype and shape of each leaf, as text."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in flat.items()}


def _digests(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below `folder`, by its path there."""
    digests = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(
                file, "sha256"
            ).hexdigest()
    return digests


def _store(path: Path, flat: Mapping[str, np.ndarray]) -> None:
    """Writes arrays with Orbax, which refuses empty ones: those are left to their description."""
    orbax = _orbax()
    with orbax.Checkpointer(orbax.StandardCheckpointHandler()) as disk:
        disk.save(
            path,
            args=orbax.args.StandardSave({name: leaf for name, leaf in flat.items() if leaf.size}),
        )


def _fetch(path: Path, wanted: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of `_store`, given anything with their dtypes and shapes."""
    orbax = _orbax()
    empty = {
        name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in wanted.items() if leaf.size == 0
    }
    full = {
        name: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
        for name, leaf in wanted.items()
        if leaf.size
    }
    with orbax.Checkpointer(orbax.StandardCheckpointHandler()) as disk:
        return empty | disk.restore(path, args=orbax.args.StandardRestore(full))


def _like(leaf, stored: np.ndarray):
    """The stored array as the kind of array that `leaf` is, in the place where `leaf` is or shall be."""
    if isinstance(leaf, np.ndarray | np.generic):
        return stored if isinstance(leaf, np.ndarray) else stored[()]
    return jax.device_put(
        stored, leaf.sharding if getattr(leaf, "committed", True) else None, may_alias=False
    )


def _settings(value, name: str = "") -> dict[str, str]:
    """The entries of nested tables under dotted names, as JSON text."""
    if not isinstance(value, Mapping):
        return {name: json.dumps(value)}
    inner = (_settings(item, f"{name}.{key}" if name else key) for key, item in value.items())
    return {path: text for table in inner for path, text in table.items()}


def _require_same(saved: dict[str, str], wanted: dict[str, str], place: Path) -> None:
    """Raises `InputError` naming the first entries in which what was saved is not what is wanted."""
    wrong = [
        f"{name}: {saved.get(name, 'absent')} saved, {wanted.get(name, 'absent')} wanted"
        for name in sorted(saved | wanted)
        if saved.get(name) != wanted.get(name)
    ]
    require(
        not wrong,
        f"Save {place} does not fit this run ({'; '.join(wrong[:4])}{'; ...' * (len(wrong) > 4)}); "
        "continue with the settings it was saved with.",
    )


class Saves:
    """The newest two sampler states below `folder`, each complete or absent; nothing is created before the first."""

    def __init__(self, folder):
        self.folder = Path(folder).absolute()
        strangers = sorted(
            name for name in self._names() if not NAME.fullmatch(name) and not name.startswith(".")
        )
        require(
            not strangers,
            f"Save folder {folder} holds {strangers[:3]}, which no run saved; choose another one.",
        )

    def _names(self) -> list[str]:
        """What the folder holds."""
        try:
            return [path.name for path in self.folder.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            sentence = (
                f"Save folder {self.folder} is not usable ({error.strerror}); choose another one."
            )
            raise InputError(sentence) from error

    def _blocks(self) -> list[int]:
        """Blocks in each complete save, ascending."""
        return sorted(int(name[1]) for name in map(NAME.fullmatch, self._names()) if name)

    def _place(self, block: int) -> Path:
        return self.folder / f"block_{block}"

    def latest(self) -> int | None:
        """Blocks in the newest complete save."""
        return max(self._blocks(), default=None)

    def save(self, block: int, state, about: Mapping[str, Any]) -> None:
        """Stores the state after `block` blocks, a pytree of arrays, and notes for JSON; it is there on return."""
        newest = self.latest()
        require(
            newest is None or newest < block,
            f"Save folder {self.folder} holds block {newest}, so block {block} "
            "cannot follow; continue that run, delete the folder or choose another one.",
        )
        flat = jax.device_get(pytrees.flatten(state))
        notes = json.dumps({"leaves": _described(flat), "about": about})
        try:
            self._write(block, flat, notes)
            for old in self._blocks()[:-KEPT]:
                self._discard(old)
        except (OSError, ValueError) as error:  # Orbax reports a full disk as ValueError
            sentence = f"Saving block {block} below {self.folder} failed ({brief(error)}); "
            raise MachineError(sentence + "earlier saves are kept.") from error

    def _write(self, block: int, flat: Mapping[str, np.ndarray], notes: str) -> None:
        """Writes a save under another name; it gets its own when it is complete."""
        fresh = self.folder / UNFINISHED
        shutil.rmtree(fresh, ignore_errors=True)
        try:
            fresh.mkdir(parents=True)
            _store(fresh / STATE, flat)
            (fresh / NOTES).write_text(notes, encoding="utf-8")
            (fresh / FILES).write_text(json.dumps(_digests(fresh)), encoding="utf-8")
            fresh.rename(self._place(block))
        finally:
            shutil.rmtree(fresh, ignore_errors=True)

    def _discard(self, block: int) -> None:
        """Removes a save; what is left when that is interrupted does not look like one."""
        gone = self.folder / DISCARDED
        shutil.rmtree(gone, ignore_errors=True)
        self._place(block).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def about(self) -> dict[str, Any]:
        """The notes of the newest complete save, as JSON gives them back."""
        return self._notes()[1]["about"]

    def restore(
        self, abstract_state: State, same: Mapping[str, Any] | None = None
    ) -> tuple[State, dict[str, Any]]:
        """The newest complete state and its notes; notes named in `same` must be as they are there.

        A leaf comes back as a NumPy array where that of `abstract_state` is one, else as a JAX array in its place.
        """
        place, notes = self._notes()
        expected = json.loads(json.dumps(same or {}))
        saved = {name: value for name, value in notes["about"].items() if name in expected}
        _require_same(_settings(saved), _settings(expected), place)
        wanted = pytrees.flatten(abstract_state)
        _require_same(notes["leaves"], _described(wanted), place)
        stored = _fetch(place / STATE, wanted)
        leaves = [_like(leaf, stored[name]) for name, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), notes["about"]

    def _notes(self) -> tuple[Path, dict[str, Any]]:
        """Where the newest complete save is and all its notes, once each of its files is found to be whole."""
        blocks = self._blocks()
        require(
            blocks != [],
            f"Save folder {self.folder} holds no complete save; check the path or start anew.",
        )
        place = self._place(blocks[-1])
        remedy = "continue from the one before" if len(blocks) > 1 else "start anew"
        try:
            wanted, found = json.loads((place / FILES).read_text(encoding="utf-8")), _digests(place)
        except (OSError, ValueError) as error:
            raise InputError(
                f"Save {place} is damaged ({FILES} is unreadable); delete it to {remedy}."
            ) from error
        wrong = [name for name in wanted if found.get(name) != wanted[name]]
        require(
            not wrong,
            f"Save {place} is damaged ({', '.join(wrong[:2])} missing or changed); "
            f"delete it to {remedy}.",
        )
        return place, json.loads((place / NOTES).read_text(encoding="utf-8"))
