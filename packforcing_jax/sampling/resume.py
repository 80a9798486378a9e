"""Runs that can be stopped at any moment: everything a run is, put into one pytree after every few blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax

from packforcing_jax import interrupts
from packforcing_jax.errors import require
from packforcing_jax.io import checkpoints, video
from packforcing_jax.sampling import player, state_folder, trace
from packforcing_jax.sampling.finished import Finished
from packforcing_jax.sampling.player import State
from packforcing_jax.sampling.state_folder import Notes, Saved

if TYPE_CHECKING:
    from packforcing_jax.sampling.pipeline import Pipeline


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on: the sampler after its last saved block, and how far its files had been written."""

    state: State | None = None
    written: video.Position | None = None
    traced: int = 0


class Keeper:
    """Saves a run's state below `folder` after every `every` blocks and behind the last one.

    `notes` is what the run tells from its first block to its last.
    """

    def __init__(
        self,
        folder,
        model: "Pipeline",
        notes: Notes,
        *,
        seed: int = 0,
        every: int = 8,
        keep: int = state_folder.KEEP,
    ):
        require(every > 0, f"every={every} must be at least 1.")
        self.model = model
        self.notes = notes
        self.every = every
        self.saved = checkpoints.Checkpoints(
            folder, about=state_folder.about(model, seed), digests=True, keep=keep
        )

    def resume(self) -> Resumed:
        """The newest save, which must be of this very run up to its block; from the start if there is none."""
        self.saved.check()
        if self.saved.latest() is None:
            return Resumed()
        tree, noted = self.saved.restore(state_folder.form(self.model))
        saved = state_folder.saved_of(tree)
        block = saved.sampler.position
        told = _told(state_folder.notes_of(noted, self.saved.folder), block)
        wanted = _told(self.notes, block)
        require(
            told[: len(wanted)] != wanted or len(wanted) == block,
            f"Checkpoint folder {self.saved.folder} holds {block} blocks of this story, and {len(wanted)} are asked "
            f"for; ask for {block} or more, or choose another folder.",
        )
        theirs = state_folder.notes_of(noted, self.saved.folder)
        require(
            theirs.start == self.notes.start,
            f"Checkpoint folder {self.saved.folder} holds a video that began with "
            f"{'another' if theirs.start else 'no'} picture or clip; give the same --start or choose another folder.",
        )
        changed = next(
            (at for at, pair in enumerate(zip(told, wanted)) if pair[0] != pair[1]), None
        )
        require(
            told == wanted,
            f"Checkpoint folder {self.saved.folder} tells another story from block {changed} on, and holds {block} "
            "blocks; give the same prompts up to there or choose another folder.",
        )
        return Resumed(player.with_scratch(self.model, saved.sampler), saved.written, saved.traced)

    def keep(self, block: Finished, written: video.Writer, traced: trace.Writer | None) -> None:
        """Begins to save the state behind `block` if it is time to; the next block may be drawn meanwhile."""
        done = block.index + 1
        if done % self.every and done != len(self.notes.prompts):
            return
        assert block.state is not None  # a clip that is denoised as a whole keeps none
        sampler = player.strip_scratch(self.model, block.state)
        saved = Saved(sampler, written.sync(), traced.sync() if traced else 0)
        # as NumPy arrays, which Orbax copies and writes in half the time
        self.saved.save(done, jax.device_get(saved.tree()), self.notes.to_json())

    def close(self) -> None:
        """Returns when the last save is complete on disk, whatever signal comes; raises `MachineError` if it failed."""
        with interrupts.held():
            self.saved.close()


def _told(notes: Notes, blocks: int) -> list[tuple[Any, str | None]]:
    """(prompt, what it did to the memory) of the first `blocks` blocks, or of as many as there are."""
    changes: Mapping[int, str] = notes.changes
    prompts: Sequence[Any] = notes.prompts[:blocks]
    return [(prompt, changes.get(at)) for at, prompt in enumerate(prompts)]
