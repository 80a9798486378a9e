"""Copies of a session's state behind finished blocks: how many are kept, and where they lie."""

import os
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import jax
import numpy as np

from packforcing_jax.errors import InputError, MachineError, require, shown
from packforcing_jax.sampling import player
from packforcing_jax.sampling.player import Model, State

FREE = 1 << 28  # bytes that snapshots may take however many they are, unless it is said how many
FEW = 2  # and the number of those that are larger
PLACES = ("host", "disk")


@dataclass(frozen=True)
class Keep:
    """How many of the newest states are kept beside the current one (`count`, None: all), and where.

    Beyond `count` more are kept as long as all of them together take at most `room` bytes. `host` is this machine's
    memory, `disk` its folder for temporary files, where each goes when nobody can return to it any more.
    """

    count: int | None = FEW
    room: int = 0
    place: str = "host"

    def __post_init__(self):
        fits = self.count is None or (isinstance(self.count, int) and self.count >= 0)
        require(
            fits,
            f"keep={shown(self.count)} is no number of states; give 0 or more, or None for all.",
        )
        require(
            self.place in PLACES,
            f"snapshots cannot lie in {shown(self.place)}; choose one of {', '.join(PLACES)}.",
        )


AUTO = Keep(count=FEW, room=FREE)


class Snapshot:
    """A stripped state that stays as it is; `load` gives a state that a block may use up."""

    def __init__(self, model: Model, state: State, place: str = "host"):
        copy = player.snapshot(model, state)
        self.bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(copy))
        self._copy = _File(copy) if place == "disk" else copy

    def host(self) -> State:
        """The stripped state as NumPy arrays; not to be changed."""
        return self._copy.read() if isinstance(self._copy, _File) else self._copy

    def load(self, model: Model) -> State:
        """A state to go on from, beside the weights."""
        return player.of_snapshot(model, self.host())


class _File:
    """A state in a file of its own, which goes with this object."""

    def __init__(self, copy: State):
        leaves, self._tree = jax.tree.flatten(copy)
        self._forms = [(leaf.shape, leaf.dtype) for leaf in leaves]
        handle, path = tempfile.mkstemp(prefix="packforcing-", suffix=".state")
        self._path = Path(path)
        weakref.finalize(self, _remove, self._path)
        try:
            with os.fdopen(handle, "wb") as file:
                for leaf in leaves:
                    file.write(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
        except OSError as error:
            raise MachineError(
                f"A snapshot of the session cannot be written to {self._path.parent} ({error.strerror}); "
                "free space, or keep fewer."
            ) from error

    def read(self) -> State:
        try:
            content = self._path.read_bytes()
        except OSError as error:
            raise InputError(
                f"the snapshot {self._path} cannot be read ({error.strerror}); go on from another block."
            ) from error
        leaves = []
        at = 0
        for shape, dtype in self._forms:
            count = int(np.prod(shape))
            leaves.append(np.frombuffer(content, dtype, count, at).reshape(shape))
            at += count * dtype.itemsize
        return jax.tree.unflatten(self._tree, leaves)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


Kept: TypeAlias = Mapping[int, Snapshot]  # by the number of finished blocks


def newest(kept: Kept, keep: Keep) -> dict[int, Snapshot]:
    """Those of `kept` that stay, in order."""
    left = dict(sorted(kept.items()))
    if keep.count is None:
        return left
    size = sum(each.bytes for each in left.values())
    for position in [*left]:
        if len(left) <= keep.count or size <= keep.room:
            break
        size -= left.pop(position).bytes
    return left
