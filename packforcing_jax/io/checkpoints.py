"""Checkpoints: any pytree on disk under a step number, complete or absent, with notes beside it.

Training runs and samplers keep what they are in the same kind of folder. Orbax writes a step in the background; what
goes wrong there is raised by the next call, and earlier steps are kept.
"""

import functools
import hashlib
import json
import logging
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from packforcing_jax import interrupts
from packforcing_jax.errors import InputError, MachineError, brief, require, shortened
from packforcing_jax.io import append_file

Json: TypeAlias = (
    Any  # tables, lists, numbers, text, truth values and None, as `json` reads and writes them
)
FORMAT = 2  # of what is noted beside a state; version 1 was never released
STATE = "state"
NOTES = "notes"
DIGESTS = "digests.json"  # what a step consists of
STEP = re.compile(r"0|[1-9][0-9]{0,11}")
EARLIER = re.compile(r"block_\d+")  # names of steps, today and before
TEMPORARY = ".orbax-checkpoint-tmp"  # behind the name of a step that is being written
DISCARDED = ".discarded"  # where a step goes first that is not kept, so that half of it never looks like one
START_ANEW = (
    "finish that run with that version, or delete the folder or choose another one to start anew."
)
State = TypeVar("State")


# Any pytree as named arrays and back


def _is_key(leaf) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def named(state) -> dict[str, Any]:
    """Every leaf of any pytree under its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _described(state) -> dict[str, str]:
    """What identifies each leaf: its dtype and shape, as text."""
    return {
        name: f"{np.result_type(leaf) if not hasattr(leaf, 'dtype') else leaf.dtype}{list(np.shape(leaf))}"
        for name, leaf in named(state).items()
    }


def _plain(leaf):
    """A leaf, abstract or not, as an array that Orbax stores: a typed key as its data, a number as an array."""
    if _is_key(leaf):
        abstract = isinstance(leaf, jax.ShapeDtypeStruct)
        return jax.eval_shape(jax.random.key_data, leaf) if abstract else jax.random.key_data(leaf)
    return leaf if hasattr(leaf, "dtype") else np.asarray(leaf)


def _stored(state) -> dict[str, Any]:
    """The arrays that Orbax stores of a state, which may be abstract: it refuses empty ones."""
    plain = {name: _plain(leaf) for name, leaf in named(state).items()}
    return {name: leaf for name, leaf in plain.items() if 0 not in leaf.shape}


def _sharding(leaf) -> jax.sharding.Sharding | None:
    """Where a JAX array is wanted, if that was said."""
    return getattr(leaf, "sharding", None) if getattr(leaf, "committed", True) else None


def _wanted(leaf):
    """What Orbax takes as the form of a stored array: it comes back where it is wanted, else as a NumPy array."""
    if _sharding(leaf) is not None:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_sharding(leaf))
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _like(leaf, stored, kind: str | None):
    """The stored array as a leaf of the same sort as `leaf`; `kind` is the generator of a typed key."""
    if stored is None:
        stored = np.zeros(_plain(leaf).shape, _plain(leaf).dtype)
    if _is_key(leaf):
        return jax.random.wrap_key_data(jnp.asarray(stored), impl=kind)
    if isinstance(leaf, np.ndarray | np.generic):
        return stored if isinstance(leaf, np.ndarray) else stored[()]
    if not hasattr(leaf, "dtype"):
        return type(leaf)(stored.item())
    if isinstance(stored, jax.Array):
        return stored
    return jax.device_put(stored, _sharding(leaf), may_alias=False)


# Notes, which every process has its own of


def _everyones(notes: Json) -> list[str]:
    """The notes of all processes as JSON text, in their order."""
    text = json.dumps(notes).encode()
    if jax.process_count() == 1:
        return [text.decode()]
    longest = int(multihost_utils.process_allgather(np.int32(len(text))).max())
    rows = multihost_utils.process_allgather(np.frombuffer(text.ljust(longest), np.uint8))
    return [row.tobytes().decode() for row in rows]


def _own(notes: Sequence[str], checkpoint: Path) -> Json:
    """The notes of this process; with another number of processes than saved them, all must be the same."""
    same = len(set(notes)) == 1
    now = jax.process_count()
    require(
        same or len(notes) == now,
        f"Checkpoint {checkpoint} was saved by {len(notes)} processes that stood at different "
        f"places in their data; continue with {len(notes)} processes instead of {now}.",
    )
    return json.loads(notes[0 if same else jax.process_index()])


# What a checkpoint belongs to


def settings(value: Json, name: str = "") -> dict[str, str]:
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


def _few(sentences: Sequence[str]) -> str:
    return "; ".join(sentences[:4]) + "; ..." * (len(sentences) > 4)


# On disk


def _digests(step: Path) -> dict[str, str]:
    """The SHA-256 of every file of a step, by its path there."""
    digests = {}
    for path in sorted(path for item in (STATE, NOTES) for path in (step / item).rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
            digests[path.relative_to(step).as_posix()] = digest.hexdigest()
    return digests


def _not_orbax(record: logging.LogRecord) -> bool:
    """What fails in the background is raised as one sentence; Orbax also logs it, several times over."""
    return "orbax" not in record.pathname


def _orbax():
    """The module, imported when it is first needed: that is slow."""
    import orbax.checkpoint

    logging.getLogger("absl").addFilter(_not_orbax)
    _hear_no_late_writes()
    return orbax.checkpoint


@functools.cache
def _hear_no_late_writes() -> None:
    """Other writes of a save that failed end later, where nobody waits for them any more, and print a traceback."""
    hook = sys.unraisablehook

    def heard(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = heard


class Checkpoints:
    """The newest `keep` states below `folder`: pytrees of arrays, keys and numbers, each complete or absent.

    `about` says what they belong to (nested tables for JSON); a state of something else is refused, except for
    differences in the settings named in `free`. With `digests` every file is hashed when a step is saved and again
    before it is read, so that any change on the disk is found; that reads the whole step once more each time, which is
    little for a sampler's megabytes and seconds for the gigabytes of a training state.

    Nothing is created before the first save, and reading writes nothing.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int = 2,
        about: Mapping[str, Any] | None = None,
        free: Sequence[str] = (),
        digests: bool = False,
    ):
        self.folder = Path(folder).absolute()
        self.keep = keep
        self.digests = digests
        self.about = dict(about or {})
        self.free = tuple(free)
        self._manager: Any = None
        self._saving: int | None = None
        names = sorted(name for name in self._names() if not name.startswith("."))
        earlier = [name for name in names if EARLIER.fullmatch(name)]
        require(
            not earlier,
            f"Checkpoint folder {folder} holds {', '.join(earlier[:2])}, saved by an earlier version; "
            f"{START_ANEW}",
        )
        strangers = [name for name in names if not STEP.fullmatch(name.partition(TEMPORARY)[0])]
        require(
            not strangers,
            f"Checkpoint folder {folder} holds {', '.join(strangers[:3])}, which no run saved; "
            "choose another one.",
        )

    def _names(self) -> list[str]:
        """What the folder holds."""
        try:
            return [path.name for path in self.folder.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InputError(
                f"Checkpoint folder {self.folder} is not usable ({error.strerror}); choose another one."
            ) from error

    def _steps(self) -> list[int]:
        """The complete steps, ascending."""
        return sorted(int(name) for name in self._names() if STEP.fullmatch(name))

    def latest(self) -> int | None:
        """The newest complete step, as the first process sees it."""
        self.wait()
        newest = max(self._steps(), default=-1)
        if jax.process_count() > 1:
            newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
        return None if newest < 0 else newest

    def check(self) -> None:
        """Raises `InputError` unless a run can save here: the folder is writable and holds no other run's steps."""
        append_file.check_writable(self.folder / "new", "Checkpoint")
        newest = self.latest()
        if newest is not None:
            self._noted(newest)

    # Saving

    def save(self, step: int, state, notes: Json = None) -> None:
        """Begins to store `state` and notes for JSON; `state` may be used up when this returns.

        Every process has notes of its own. A signal that comes meanwhile is heard when this is done.
        """
        newest = self.latest()
        require(
            newest is None or newest < step,
            f"Checkpoint folder {self.folder} holds step {newest}, so step {step} cannot follow; "
            "continue that run, delete the folder or choose another one.",
        )
        if self._manager is None:
            self.check()
        description = {
            "format": FORMAT,
            "leaves": _described(state),
            "keys": {
                name: str(jax.random.key_impl(leaf))
                for name, leaf in named(state).items()
                if _is_key(leaf)
            },
            "notes": _everyones(notes),
            "about": self.about,
        }
        self._saving = step
        try:
            with interrupts.held():
                args = _orbax().args
                self._opened().save(
                    step,
                    args=args.Composite(
                        state=args.StandardSave(_stored(state)), notes=args.JsonSave(description)
                    ),
                    force=True,
                )
        except (OSError, ValueError) as error:  # Orbax reports a full disk as ValueError
            raise self._failed(error) from error

    def _opened(self):
        """What writes steps; made, and the folder with it, when it is first needed."""
        if self._manager is None:
            orbax = _orbax()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._tidy()
            options = orbax.CheckpointManagerOptions(
                max_to_keep=self.keep,
                todelete_subdir=DISCARDED,
                async_options=orbax.options.AsyncOptions(
                    post_finalization_callback=self._seal if self.digests else None
                ),
            )
            self._manager = orbax.CheckpointManager(self.folder, options=options)
        return self._manager

    def _seal(self) -> None:
        """Adds the digests: the last act, on the first process, before a step gets its name."""
        step = self.folder / f"{self._saving}{TEMPORARY}"
        (step / DIGESTS).write_text(json.dumps(_digests(step)), encoding="utf-8")

    def _tidy(self) -> None:
        """Removes steps that are not kept and what an interrupted save left; nothing is being saved."""
        if jax.process_index() == 0:
            for path in (self.folder / DISCARDED, *self.folder.glob(f"*{TEMPORARY}*")):
                shutil.rmtree(path, ignore_errors=True)

    def wait(self) -> None:
        """Returns when the last save is complete on disk; raises `MachineError` if it failed."""
        if self._saving is None:
            return
        try:
            self._opened().wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._failed(error) from error
        self._saving = None
        self._tidy()

    def _failed(self, error: Exception) -> MachineError:
        """The sentence about the save that failed; its leftovers are cleared and the next one may be tried."""
        step = self._saving
        self._saving = None
        self._manager = None
        self._tidy()
        return MachineError(
            f"Saving step {step} below {self.folder} failed ({brief(error)}); earlier steps are kept."
        )

    def close(self) -> None:
        """Waits for the last save, ends the work of Orbax, and removes what a kill left: for the one who saves here."""
        self.wait()
        self._tidy()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    # Reading

    def notes(self, step: int | None = None) -> Json:
        """The notes of `step` (the newest by default), as JSON gives them back."""
        step = self._chosen(step)
        self._require_whole(step)
        return _own(self._noted(step)["notes"], self._at(step))

    def about_of(self, step: int | None = None) -> Json:
        """What `step` (the newest by default) belongs to, as it was said when it was saved."""
        step = self._chosen(step)
        self._require_whole(step)
        return self._noted(step)["about"]

    def steps(self) -> list[int]:
        """The complete steps, ascending."""
        self.wait()
        return self._steps()

    def restore(self, abstract_state: State, step: int | None = None) -> tuple[State, Json]:
        """The state of `step` (the newest by default) and its notes, with the structure, kinds and shardings given.

        A leaf comes back as a NumPy array where that of `abstract_state` is one, else as a JAX array in its place.
        """
        step = self._chosen(step)
        self._require_whole(step)
        description = self._noted(step)
        wrong = differences(description["leaves"], _described(abstract_state))
        require(
            not wrong,
            f"Checkpoint {self._at(step)} does not fit this run ({len(wrong)} leaves: {_few(wrong)}); "
            "continue with the config it was saved with.",
        )
        wanted = {name: _wanted(leaf) for name, leaf in _stored(abstract_state).items()}
        stored = (
            self._read(step, state=_orbax().args.StandardRestore(wanted))["state"] if wanted else {}
        )
        leaves = [
            _like(leaf, stored.get(name), description["keys"].get(name))
            for name, leaf in named(abstract_state).items()
        ]
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
        return state, _own(description["notes"], self._at(step))

    def _at(self, step: int) -> Path:
        return self.folder / str(step)

    def _chosen(self, step: int | None) -> int:
        """The step asked for, or the newest."""
        newest = self.latest()
        require(
            newest is not None,
            f"Checkpoint folder {self.folder} holds no complete step; check the path or start anew.",
        )
        return newest if step is None else step  # type: ignore[return-value]

    def _noted(self, step: int) -> dict[str, Any]:
        """All that was noted of a step, which must be of this run."""
        description = self._read(step, notes=_orbax().args.JsonRestore())["notes"]
        forms = {"leaves": dict, "keys": dict, "notes": list, "about": dict}
        if not isinstance(description, dict):
            raise self._damaged(step, "its notes are no table")
        require(
            description.get("format") == FORMAT,
            f"Checkpoint {self._at(step)} was saved by another version; {START_ANEW}",
        )
        wrong_kind = [
            name for name, kind in forms.items() if not isinstance(description.get(name), kind)
        ]
        if wrong_kind:
            raise self._damaged(step, f"{', '.join(wrong_kind)} of its notes are not as they were")
        was = settings(description["about"])
        wanted = settings(json.loads(json.dumps(self.about)))
        wrong = differences(was, wanted, self.free) if self.about else []
        require(
            not wrong,
            f"Checkpoint {self._at(step)} belongs to another run ({_few(wrong)}); "
            "continue with the settings it was saved with or choose another folder.",
        )
        return description

    def _read(self, step: int, **items):
        orbax = _orbax()
        for path in self._at(step).rglob("*"):
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise self._damaged(step, f"{path.name} is a pipe or a device")
        try:
            with orbax.Checkpointer(orbax.CompositeCheckpointHandler()) as disk:
                return disk.restore(self._at(step), args=orbax.args.Composite(**items))
        except Exception as error:  # Orbax and what lies below it raise many sorts
            raise self._damaged(step, shortened(brief(error))) from error

    def _require_whole(self, step: int) -> None:
        """Raises `InputError` unless every file of a step is as it was saved."""
        if not self.digests:
            return
        if not (self._at(step) / DIGESTS).is_file():
            raise self._damaged(step, f"{DIGESTS} is missing")
        try:
            wanted = json.loads((self._at(step) / DIGESTS).read_text(encoding="utf-8"))
            digests = _digests(self._at(step))
            wrong = [
                name
                for name in sorted({*wanted, *digests})
                if digests.get(name) != wanted.get(name)
            ]
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(step, f"{DIGESTS} is unreadable") from error
        if wrong:
            raise self._damaged(step, f"{', '.join(wrong[:2])} missing or changed")

    def _damaged(self, step: int, why: str) -> InputError:
        earlier = any(each < step for each in self._steps())
        remedy = "continue from the one before" if earlier else "start anew"
        return InputError(f"Checkpoint {self._at(step)} is damaged ({why}); delete it to {remedy}.")
