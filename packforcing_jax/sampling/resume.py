"""Runs that can be stopped at any moment: everything a run is, put into one pytree after every few blocks."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from packforcing_jax import interrupts, pytrees
from packforcing_jax.errors import require
from packforcing_jax.io import checkpoints, identity, model_folder, text_encoder, video
from packforcing_jax.sampling import player, trace
from packforcing_jax.sampling.pipeline import Finished, Pipeline, State


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on: the sampler after its last saved block, and how far its files had been written."""

    state: State | None = None
    written: video.Position | None = None
    traced: int = 0


class Keeper:
    """Saves a run's state below `folder` after every `every` blocks and behind the last one."""

    def __init__(
        self, folder, model: Pipeline, *, prompts: Sequence[str], every: int = 8, **same: Any
    ):
        require(every > 0, f"every={every} must be at least 1.")
        self.model = model
        self.prompts = list(prompts)
        self.every = every
        experiment = json.loads(model_folder.experiment_to_json(model.experiment))
        self.saved = checkpoints.Checkpoints(
            folder,
            about={"experiment": experiment, "weights": digest(model)} | same,
            digests=True,
        )

    def resume(self) -> Resumed:
        """The newest save, which must be of this very run up to its block; from the start if there is none."""
        self.saved.check()
        if self.saved.latest() is None:
            return Resumed()
        state, notes = self.saved.restore(_form(self.model))
        block = state["sampler"].position
        told = notes["prompts"][:block]
        wanted = self.prompts[:block]
        require(
            told[: len(wanted)] != wanted or len(wanted) == block,
            f"Checkpoint folder {self.saved.folder} holds {block} blocks of this story, and {len(wanted)} are asked "
            f"for; ask for {block} or more, or choose another folder.",
        )
        changed = next(
            (at for at, pair in enumerate(zip(told, wanted)) if pair[0] != pair[1]), None
        )
        require(
            told == wanted,
            f"Checkpoint folder {self.saved.folder} tells another story from block {changed} on, and holds {block} "
            "blocks; give the same prompts up to there or choose another folder.",
        )
        at = {name: int(value) for name, value in state["video"].items()}
        return Resumed(
            player.with_scratch(self.model, state["sampler"]),
            video.Position(**at),
            int(state["trace"]),
        )

    def keep(self, block: Finished, written: video.Writer, traced: trace.Writer | None) -> None:
        """Begins to save the state behind `block` if it is time to; the next block may be drawn meanwhile."""
        done = block.index + 1
        if done % self.every and done != len(self.prompts):
            return
        assert block.state is not None  # a clip that is denoised as a whole keeps none
        at = {name: np.int64(value) for name, value in dataclasses.asdict(written.sync()).items()}
        state = {
            "sampler": player.strip_scratch(self.model, block.state),
            "video": at,
            "trace": np.int64(traced.sync() if traced else 0),
        }
        # as NumPy arrays, which Orbax copies and writes in half the time
        self.saved.save(done, jax.device_get(state), {"prompts": self.prompts})

    def close(self) -> None:
        """Returns when the last save is complete on disk, whatever signal comes; raises `MachineError` if it failed."""
        with interrupts.held():
            self.saved.close()


def _form(model: Pipeline) -> dict[str, Any]:
    """Shapes of what `keep` saves; NumPy leaves are those that come back as such."""
    at = {field.name: np.int64(0) for field in dataclasses.fields(video.Position)}
    return {"sampler": player.abstract_state(model), "video": at, "trace": np.int64(0)}


def digest(model: Pipeline) -> str:
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
