"""Folders of states: what a video is between two blocks, on disk under the number of finished blocks.

`sample --state` and `Session.save` write them, in one form: the state itself, how far the files of a command had been
written, and as notes the prompts, what they did to the memory, and the number that decides the noise.
"""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from packforcing_jax import interrupts, pytrees
from packforcing_jax.errors import InputError, require
from packforcing_jax.io import atomic, checkpoints, identity, model_folder, text_encoder, video
from packforcing_jax.sampling import player
from packforcing_jax.sampling.loaded import Loaded
from packforcing_jax.sampling.player import State

Prompts: TypeAlias = str | tuple[str, ...]  # of one block: of the video, or of each of a batch
KEEP = 2  # states of a folder
OTHER_VERSION = "start anew, or go on with that version"


@dataclass(frozen=True)
class Notes:
    """What is noted beside a state: prompts by block and what they did to the memory where that was said.

    `identity` is what decides the noise of each video beside its seed, None where the first prompts do; `batch`:
    several videos are made together, each with prompts of its own.
    """

    prompts: Sequence[Prompts]
    changes: Mapping[int, str] = field(default_factory=dict)
    identity: Sequence[int] | None = None
    batch: bool = False
    start: str | None = None  # the hash of what the video was begun with
    end: int | None = None  # blocks of a video that was to be so long, and no longer
    video: str | None = None  # the file of the command that saved it
    folder: str | None = None  # of the states whose video that is: a copy of them leaves it alone
    weights: str | None = None  # the model folder; None: the one that ships, or networks in memory

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "changes": {str(at): how for at, how in self.changes.items()}}


def notes_of(table: Any, folder: Path | str) -> Notes:
    """The notes of `Notes.to_json`."""
    names = {each.name for each in dataclasses.fields(Notes)}
    require(
        isinstance(table, dict) and table.keys() == names,
        f"Checkpoint folder {folder} was saved by another version, or by no sampler; {OTHER_VERSION}.",
    )
    rows = [tuple(row) if isinstance(row, list) else row for row in table["prompts"]]
    changes = {int(at): how for at, how in table["changes"].items()}
    return Notes(**{**table, "prompts": rows, "changes": changes})


def about(model: Loaded, seed: int | Sequence[int]) -> dict[str, Any]:
    """What a state belongs to: settings, weights and seed."""
    experiment = json.loads(model_folder.experiment_to_json(model.experiment))
    return {"experiment": experiment, "weights": digest(model), "seed": seed}


@dataclass(frozen=True)
class Saved:
    """What lies under one number of a folder."""

    sampler: State  # stripped
    written: video.Position = video.Position()
    traced: int = 0

    def tree(self) -> dict[str, Any]:
        at = {name: np.int64(value) for name, value in dataclasses.asdict(self.written).items()}
        return {"sampler": self.sampler, "video": at, "trace": np.int64(self.traced)}


def saved_of(tree: Mapping[str, Any]) -> Saved:
    """What `Saved.tree` gave."""
    at = {name: int(value) for name, value in tree["video"].items()}
    return Saved(tree["sampler"], video.Position(**at), int(tree["trace"]))


def form(model: player.Model, videos: int = 1) -> dict[str, Any]:
    """Shapes of what is saved; NumPy leaves are those that come back as such."""
    return Saved(player.abstract_state(model, videos)).tree()


def opened(folder: str | Path) -> checkpoints.Checkpoints:
    """A folder of states, to be read whatever it belongs to."""
    return checkpoints.Checkpoints(folder, digests=True)


def numbers(folder: str | Path) -> list[int]:
    """Behind which blocks a folder holds states, ascending; raises `InputError` if behind none."""
    held = opened(folder).steps()
    require(len(held) > 0, f"State folder {folder} holds no state; check the path.")
    return held


def read(model: Loaded, folder: str | Path, at: int) -> tuple[Saved, Notes]:
    """The state behind `at` blocks and its notes; raises `InputError` unless it is of this very model."""
    said = opened(folder).about_of(at)
    require(
        isinstance(said, dict) and said.keys() == {"experiment", "weights", "seed"},
        f"Checkpoint folder {folder} was saved by no sampler, or by another version; {OTHER_VERSION}.",
    )
    mine = digest(model)
    require(
        said["weights"] == mine,
        f"State folder {folder} belongs to other weights ({said['weights']}) than these ({mine}); give the model "
        "folder that it was made with.",
    )
    seeds = said["seed"]
    videos = len(seeds) if isinstance(seeds, list) else 1
    own = checkpoints.Checkpoints(folder, about=about(model, seeds), digests=True)
    tree, noted = own.restore(form(model, videos), at)
    return saved_of(tree), notes_of(noted, folder)


def write(
    folder: str | Path,
    saved: Saved,
    notes: Notes,
    *,
    about: Mapping[str, Any],
    keep: int = KEEP,
) -> None:
    """Adds a state to a folder, on disk when this returns; states from that block on, of another future, go.

    Where there are such, the folder is replaced as a whole, so that a kill leaves the one or the other.
    """
    folder = Path(folder).absolute()
    atomic.clear(folder)
    at = saved.sampler.position
    store = functools.partial(checkpoints.Checkpoints, about=about, digests=True, keep=keep)
    held = store(folder)
    held.check()
    if max(held.steps(), default=-1) < at:
        _save(held, at, saved, notes)
        return
    with atomic.folder(folder) as fresh:
        for step in [step for step in held.steps() if step < at][-keep:]:
            shutil.copytree(folder / str(step), fresh / str(step), copy_function=os.link)
        _save(store(fresh), at, saved, notes)


def require_empty(folder: str | Path, flag: str) -> None:
    """Raises `InputError` unless a folder that `flag` names is not there yet, or holds nothing."""
    held = [each.name for each in Path(folder).iterdir()] if Path(folder).is_dir() else []
    require(
        not held,
        f"{flag} {folder} holds {', '.join(sorted(held)[:3])}; choose a new folder.",
    )


def copy(folder: str | Path, out: str | Path, at: int) -> None:
    """Makes the folder `out` of one state of `folder`, once that was found to be whole."""
    opened(folder).about_of(at)
    with atomic.folder(out) as fresh:
        shutil.copytree(Path(folder) / str(at), fresh / str(at))


def _save(store: checkpoints.Checkpoints, at: int, saved: Saved, notes: Notes) -> None:
    with interrupts.held():
        try:
            store.save(at, saved.tree(), notes.to_json())
        finally:
            store.close()


def weights_of(model: Loaded) -> str | None:
    """The folder that a model was read from, unless it is the one that ships."""
    if model.origin is None or not model.origin.of(model.nets, model.vae):
        return None
    folder = model.origin.model.folder.resolve()
    return None if folder == model_folder.SHIPPED.resolve() else str(folder)


def notes_in(folder: str | Path, at: int) -> Notes:
    """The notes of a state, whatever model it is of."""
    return notes_of(opened(folder).notes(at), folder)


def settings_in(folder: str | Path, at: int) -> dict[str, Any]:
    """The settings of a model as a state notes them, by name."""
    said = opened(folder).about_of(at)
    experiment = said.get("experiment") if isinstance(said, dict) else None
    if not isinstance(experiment, dict):
        raise InputError(f"Checkpoint folder {folder} was saved by no sampler; check the path.")
    return experiment


def digest(model: Loaded) -> str:
    """What tells one model from another: every tensor of all its networks.

    Of a model folder its identity, which its manifest keeps; of networks in memory their values.
    """
    if model.origin is not None and model.origin.of(model.nets, model.vae):
        return model.origin.model.identity
    held = {"nets": model.nets, "codec": model.vae}
    arrays = {
        f"{part}/{path}": (str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes())
        for part, module in held.items()
        for path, leaf in pytrees.flatten(module).items()
    }
    words = model.tokenizer.inner.to_str().encode()
    texts = {"text": ("", (), text_encoder.identity(model.text).encode()), "words": ("", (), words)}
    return identity.of_arrays(arrays | texts)
