"""A session: a video, or a batch of them, that is told block by block, branches, goes back, and survives its process.

The state between two blocks is a frozen pytree and the arithmetic is the player's; a session holds the model, the
newest state, what was told, and copies of earlier states.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeAlias, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from packforcing_jax.errors import InputError, require, shown
from packforcing_jax.io import video
from packforcing_jax.sampling import (
    finished,
    opening,
    player,
    requests,
    snapshots,
    state_folder,
    timelines,
)
from packforcing_jax.sampling.finished import Finished
from packforcing_jax.sampling.loaded import Loaded
from packforcing_jax.sampling.player import State
from packforcing_jax.sampling.snapshots import Keep, Snapshot

Timeline: TypeAlias = Sequence[tuple[int, str] | tuple[int, str, str]]
Story: TypeAlias = str | Iterable[str | Sequence[str]] | Timeline


Made = TypeVar("Made", Finished, tuple[Finished, ...])  # a block: of one video, of a batch


class Told(NamedTuple):
    """What was asked for in one block: a prompt for each video, and what it was said to do to the memory.

    `left` counts the blocks from this one to the video's last one, None where no end was said or it makes no
    difference; `given`: it is a block
    of the picture or clip that the video begins with.
    """

    prompts: tuple[str, ...]
    change: str | None = None
    left: int | None = None
    given: bool = False


@dataclass(frozen=True)
class Videos:
    """Whose noise is drawn: a seed for each video, and its id, which its first prompt decides where none was given."""

    seeds: tuple[int, ...]
    ids: tuple[int, ...] | None = None
    batch: bool = False  # whether several were asked for, be it one

    def numbered(self, first: Told) -> tuple[int, ...]:
        """The ids of the videos that begin with `first`."""
        return self.ids or tuple(map(requests.video_id, first.prompts))


def videos_of(seed: int, identity: int | Sequence[int] | None, batch: int | None) -> Videos:
    """The videos of a session; video `i` of a batch has the seed `seed + i`."""
    require(
        batch is None or (isinstance(batch, int) and batch > 0),
        f"batch={shown(batch)} is no number of videos; give 1 or more.",
    )
    count = 1 if batch is None else batch
    requests.require_number("seed", seed)
    requests.require_number("seed", int(seed) + count - 1)
    ids = identity
    if ids is not None:
        listed = tuple(ids) if isinstance(ids, Sequence) and batch is not None else (ids,) * count
        require(
            len(listed) == count,
            f"identity={shown(identity)} names {len(listed)} videos and batch={batch}; give one for each.",
        )
        for each in listed:
            requests.require_number("a video's id", each)
        ids = tuple(int(each) for each in listed)  # type: ignore[arg-type]
    return Videos(tuple(int(seed) + i for i in range(count)), ids, batch is not None)


class Session(Generic[Made]):
    """A video that is made block by block; see `Pipeline.session`. For one thread at a time.

    A block that fails or is interrupted leaves the session where it was, unless no state is kept (`keep=0`).
    """

    def __init__(self, pipeline: Loaded, videos: Videos, keep: Keep = snapshots.AUTO):
        method = pipeline.method
        require(
            not method.whole_clip,
            f"method {method.name} denoises all frames of a clip together, so there is no session; use "
            "Pipeline.generate, or give another method.",
        )
        self.pipeline = pipeline
        self.videos = videos
        self.keep = keep
        self._told: list[Told] = []
        self._state: State | Snapshot | None = None  # None: before the first block, or lost
        self._kept: dict[int, Snapshot] = {}
        self._text: tuple[tuple[str, ...], Any] = ((), None)
        self._opening: str | None = None  # the hash of what it was begun with
        self._end: int | None = None  # its last block and one, where it was ended

    # What it is

    @property
    def position(self) -> int:
        """Finished blocks; the number of the block that is made next."""
        return len(self._told)

    @property
    def told(self) -> tuple[Told, ...]:
        """What was asked for in every finished block."""
        return tuple(self._told)

    @property
    def prompts(self) -> list[Any]:
        """The prompt of every finished block; of a batch, a tuple of them."""
        return [told.prompts if self.videos.batch else told.prompts[0] for told in self._told]

    @property
    def changes(self) -> dict[int, str]:
        """What prompts did to the memory, by block, where that was said."""
        return {at: told.change for at, told in enumerate(self._told) if told.change is not None}

    @property
    def seed(self) -> int:
        """The seed of the video; video `i` of a batch has `seed + i`."""
        return self.videos.seeds[0]

    @property
    def identity(self) -> Any:
        """The id of the video, of a batch a tuple of them; None before a first prompt that decides it."""
        ids = self.videos.ids
        if ids is None and self._told:
            ids = self.videos.numbered(self._told[0])
        return ids if ids is None or self.videos.batch else ids[0]

    @property
    def kept(self) -> tuple[int, ...]:
        """The positions that it can be rewound to or forked at, ascending; 0 and the current one are always there."""
        return tuple(sorted({0, self.position, *self._kept}))

    @property
    def snapshot_bytes(self) -> int:
        """Bytes that the kept states take, wherever they lie; forks share theirs."""
        return sum(each.bytes for each in self._kept.values())

    # Making blocks

    def next(self, prompt: str | Sequence[str], *, change: str | None = None) -> Made:
        """The next block (`Finished`), under this prompt; of a batch one for each video, under one prompt or as many.

        `change` says what the prompt does to the memory: keep, recache, flush or cut. Without it, a prompt that
        differs from the one before does what the method says.
        """
        told = Told(self._for_each(prompt), change)
        self.check([told])
        return self._handed(self._next(told))

    def run(
        self,
        prompts: Story,
        *,
        seconds: float | None = None,
        blocks: int | None = None,
        changes: Mapping[int, str] | None = None,
        ends: bool = False,
    ) -> Iterator[Made]:
        """Blocks as they are finished: of one prompt or a timeline for `seconds` or `blocks`, or of a prompt per block.

        A timeline is a list of (block, prompt) or (block, prompt, change); its blocks, as those of `changes`, count
        from the beginning of the video. What is a list is checked as a whole before the first block, and what comes
        one by one is asked for when it is needed. `seconds` and `blocks` count from here on.

        The video goes on behind the last block. With `ends` that block is the video's last: a rolling window runs
        empty and a clip is shown whole, as `Pipeline.stream` makes it, and nothing can follow in a rolling window.
        """
        told = self._story(prompts, self.count(seconds, blocks), changes or {})
        if isinstance(told, list):
            self.check(told)
            self._prepare(told)
        require(
            not ends or isinstance(told, list),
            "a video that ends needs its prompts as a list, or one prompt and blocks= or seconds=; give such.",
        )
        if ends and isinstance(told, list) and self._knows_an_end:
            told = [one._replace(left=len(told) - number) for number, one in enumerate(told)]
        return self._run(told)

    def retell(self, story: Sequence[Told]) -> Iterator[Made]:
        """Blocks of what was told before, such as `told` of another session or the notes of a video say."""
        self.check(story)
        self._prepare(story)
        return self._run(list(story))

    def start(self, frames: np.ndarray, prompts: str | Sequence[str]) -> list[Made]:
        """Begins the video with a picture or a clip: encoded, and committed as its first blocks; those are returned.

        `frames` [t, height, width, 3] or, of a picture, [height, width, 3]: uint8, or floats in [-1, 1]. `prompts` is
        one prompt, or one for each block. Raises `InputError` for another size, for fewer frames than a block has or
        more than a clip of the training, and behind the first block.
        """
        return list(self.begun(opening.of_frames(self.pipeline.experiment, frames), prompts))

    def begun(self, given: opening.Opening, prompts: str | Sequence[str]) -> Iterator[Made]:
        """`start` with an opening, block by block."""
        require(
            self.position == 0,
            f"the video has {self.position} blocks, and a picture or a clip is what it begins with; rewind to block "
            "0, or start another session.",
        )
        rows = [prompts] * given.blocks if isinstance(prompts, str) else list(prompts)
        require(
            len(rows) == given.blocks,
            f"{len(rows)} prompts were given for the {given.blocks} blocks of the start; give one, or one for each.",
        )
        story = [Told(self._for_each(row), given=True) for row in rows]
        self.check(story)
        exp = self.pipeline.experiment
        latents = opening.latents(exp, self.pipeline.vae, given)
        return self._begun(given.hash, zip(story, latents, strict=True))

    def _begun(self, hashed: str, blocks: Iterable[tuple[Told, np.ndarray]]) -> Iterator[Made]:
        count = len(self.videos.seeds)
        for told, latent in blocks:
            self._opening = hashed
            yield self._handed(self._next(told, np.repeat(latent, count, axis=0)))

    def check(self, story: Sequence[Told]) -> None:
        """Raises `InputError` unless all of this can be told from here on; nothing is drawn."""
        exp, method = self.pipeline.experiment, self.pipeline.method
        self._require_open()
        before = self._told[-1].prompts if self._told else None
        changed = [told.prompts for told in story if told.prompts != before]
        if changed:
            self.pipeline.check([prompt for prompts in changed for prompt in prompts])
        changes = {self.position + at: told.change for at, told in enumerate(story) if told.change}
        requests.check_changes(exp, changes)
        require(
            0 not in changes,
            f"block 0 has no memory to {changes.get(0)}; leave the change out.",
        )
        requests.require_room(method, exp, self.position + len(story))
        for told in story:
            self._require_all_or_none(before, told)
            before = told.prompts

    @property
    def _knows_an_end(self) -> bool:
        """Whether the last blocks of a video are made otherwise than those of one that goes on."""
        cache = self.pipeline.experiment.cache
        return cache.joint or cache.overlap > 0

    def _require_open(self) -> None:
        """Raises `InputError` behind the end of a video whose last blocks are made as such."""
        require(
            self._end != self.position or not self._knows_an_end,
            f"this video was ended with block {self.position - 1}, and method {self.pipeline.method.name} makes the "
            "last blocks as the last ones; go on from an earlier state, or make a longer video from its beginning.",
        )

    def _require_all_or_none(self, before: tuple[str, ...] | None, told: Told) -> None:
        """A batch has one memory: what a new prompt does to it, it does to all videos."""
        how = told.change or self.pipeline.method.at_prompt_change
        new = before is not None and [a != b for a, b in zip(before, told.prompts, strict=True)]
        require(
            how == "keep" or told.change is not None or not new or all(new) or not any(new),
            f"a new prompt does {how!r} to the memory, which is one for all videos of the batch, and only some of "
            "the prompts are new; say change= for all of them.",
        )

    def _next(self, told: Told, given: np.ndarray | None = None) -> tuple[Finished, ...]:
        """The next block of every video, of what was checked; `given` is its latent, where it is one that was given."""
        state = self._to_use_up(told)
        model = self.pipeline
        index = self.position
        try:
            if told.prompts != self._text[0]:
                self._text = (told.prompts, model.text_kv(told.prompts))
            text = self._text[1]
            if index and (told.change or told.prompts != self._told[-1].prompts):
                how = told.change or model.method.at_prompt_change
                state = player.change_prompt(
                    model, state, text, how=how, keep_sink=model.method.keeps_sink
                )
            before = jax.tree.map(np.asarray, state.memory.progress)
            state, block = (
                player.next_block(model, state, text, left=told.left)
                if given is None
                else player.given_block(model, state, text, jnp.asarray(given), left=told.left)
            )
            blocks = finished.of_batch(model, index, told.prompts, block, (before, state))
            for each in blocks:  # the number is about right, where a clip ends
                video.guard(each.frames, first=index * len(each.frames))
        except BaseException:
            self._state = self._kept.get(index)
            raise
        self._told.append(told)
        self._state = state
        self._kept = snapshots.newest(self._kept, self.keep)
        return blocks

    def _to_use_up(self, first: Told) -> State:
        """The current state, copied before it goes if copies are kept."""
        if self.position == 0:
            ids = self.videos.numbered(first)
            return player.start(self.pipeline, seeds=list(self.videos.seeds), videos=ids)
        if self.keep.count != 0 or isinstance(self._state, Snapshot):
            self._kept[self.position] = self._snapshot()
        state = self._state
        if isinstance(state, Snapshot):
            return state.load(self.pipeline)
        return self._live()

    def _live(self) -> State:
        """The state on the device; raises `InputError` where there is none any more."""
        state = self._state
        if not isinstance(state, State):
            raise InputError(
                f"the state behind block {self.position - 1} is gone: the next block failed and no state was kept; "
                f"rewind to one of {shown(self.kept[:-1])}, or begin again with keep=1 or more."
            )
        requests.require_not_used_up(state)
        return state

    def _snapshot(self) -> Snapshot:
        """The current state as a copy."""
        if isinstance(self._state, Snapshot):
            return self._state
        known = self._kept.get(self.position)
        return known or Snapshot(self.pipeline, self._live(), self.keep.place)

    def _run(self, story: Iterable[Told]) -> Iterator[Made]:
        for told in story:
            if not isinstance(story, list):
                self.check([told])
            made = self._next(told)
            self._end = self.position if told.left == 1 else None
            yield self._handed(made)

    def _handed(self, made: tuple[Finished, ...]) -> Made:
        """A block as it is handed out: of one video alone, of a batch all of them."""
        return made if self.videos.batch else made[0]  # type: ignore[return-value]

    # What is told

    def _for_each(self, prompt: object) -> tuple[str, ...]:
        """One prompt for each video."""
        count = len(self.videos.seeds)
        listed = (prompt,) * count if isinstance(prompt, str) else prompt
        fits = (
            isinstance(listed, Sequence)
            and len(listed) == count
            and (self.videos.batch or isinstance(prompt, str))
            and all(isinstance(each, str) for each in listed)
        )
        require(
            fits,
            f"{shown(prompt, 60)} is no prompt for {count} {'videos' if count > 1 else 'video'}; give one string"
            + (", or one for each video." if self.videos.batch else "."),
        )
        return tuple(listed)  # type: ignore[arg-type]

    def count(self, seconds: float | None = None, blocks: int | None = None) -> int | None:
        """How many blocks from here on are `seconds`, or those that were asked for; None where neither is said."""
        require(
            seconds is None or blocks is None, "seconds and blocks exclude each other; give one."
        )
        if seconds is not None:
            return requests.further_blocks(self.pipeline.experiment, seconds, self.position)
        if blocks is not None:
            requests.require_blocks(blocks, f"blocks={shown(blocks)}")
        return blocks

    def _story(
        self, prompts: Story, count: int | None, changes: Mapping[int, str]
    ) -> list[Told] | Iterator[Told]:
        """What is told in the blocks from here on: a list where it has an end, else as it comes."""
        if isinstance(prompts, str):
            require(
                count is not None,
                f"{shown(prompts, 60)} is one prompt; say seconds= or blocks= beside it, or give one for each block.",
            )
            prompts = [prompts] * (count or 0)
        require(
            isinstance(prompts, Iterable),
            f"prompts={shown(prompts, 60)} are none; give one prompt, one for each block, or a timeline.",
        )
        if _is_timeline(prompts):
            rows: Sequence[Any] = prompts
            entries = timelines.checked([timelines.Entry(*row) for row in rows], "the timeline")
            require(count is not None, "a timeline has no end; say seconds= or blocks= beside it.")
            last = self.position + (count or 0)
            changes = timelines.changes(entries, last) | dict(changes)
            prompts = timelines.spread(entries, last)[self.position :]
        first = self.position
        told = (
            Told(self._for_each(prompt), changes.get(at))
            for at, prompt in enumerate(itertools.islice(prompts, count), start=first)
        )
        return list(told) if isinstance(prompts, Sequence) else told

    def _prepare(self, story: Sequence[Told]) -> None:
        """Reads all prompts at once: a large text encoder goes through its layers once."""
        new = dict.fromkeys(prompt for told in story for prompt in told.prompts)
        if new:
            self.pipeline.text.prepare(*self.pipeline.tokenizer.encode(list(new)))

    # Branches and returns

    def fork(self, at: int | None = None) -> "Session[Made]":
        """A session of its own that shares every block before the current one, or before block `at`, one of `kept`.

        This one goes on as if there were no other; the copies of states that both need are shared.
        """
        at = self.position if at is None else at
        self._require_kept(at)
        other: Session[Made] = Session(self.pipeline, self.videos, self.keep)
        other._opening = self._opening if at else None
        other._told = self._told[:at]
        other._text = self._text
        if at:
            other._state = self._kept[at] if at < self.position else self._snapshot()
            if at == self.position and self.keep.count != 0:
                self._kept[at] = other._state
        other._kept = {position: one for position, one in self._kept.items() if position <= at}
        return other

    def rewind(self, to_block: int) -> None:
        """Back to where `to_block`, one of `kept`, is made next; what was made from there on is forgotten."""
        self._require_kept(to_block)
        if to_block == self.position:
            return
        self._state = self._kept[to_block] if to_block else None
        del self._told[to_block:]
        self._end = None
        self._opening = self._opening if to_block else None
        self._kept = {at: one for at, one in self._kept.items() if at <= to_block}

    def _require_kept(self, at: object) -> None:
        require(
            at in self.kept and not isinstance(at, bool),
            f"block {shown(at)} cannot be gone back to: states are kept for {shown(self.kept)}; choose one of them, or "
            "keep more.",
        )

    # On disk

    def save(self, folder: str | Path, *, keep: int = state_folder.KEEP) -> None:
        """Writes the session to a folder of states, whole or not at all; `Pipeline.restore` goes on from it.

        The folder keeps the newest `keep` states. Those of a future that was taken back by `rewind` go.
        """
        saved, notes = self.saved()
        about = state_folder.about(self.pipeline, self._seeds())
        state_folder.write(folder, saved, notes, about=about, keep=keep)

    def saved(self) -> tuple[state_folder.Saved, state_folder.Notes]:
        """What `save` writes."""
        ids = self.videos.ids
        notes = state_folder.Notes(
            prompts=self.prompts,
            changes=self.changes,
            identity=ids if ids is None else list(ids),
            batch=self.videos.batch,
            start=self._opening,
            end=self._end,
            weights=state_folder.weights_of(self.pipeline),
        )
        return state_folder.Saved(self._host()), notes

    def _host(self) -> State:
        """The current state, stripped, in host memory; before the first block, one that knows no video yet."""
        if self.position:
            return self._snapshot().host()
        videos = self.videos.ids or (0,) * len(self.videos.seeds)
        state = player.start(self.pipeline, seeds=list(self.videos.seeds), videos=videos)
        return player.snapshot(self.pipeline, state)

    def _seeds(self) -> int | list[int]:
        return list(self.videos.seeds) if self.videos.batch else self.seed

    @staticmethod
    def of_saved(
        pipeline: Loaded,
        saved: state_folder.Saved,
        notes: state_folder.Notes,
        keep: Keep = snapshots.AUTO,
    ) -> "Session[Any]":
        """The session that goes on from what `state_folder.read` gave; `pipeline` has its very settings."""
        seeds = tuple(np.asarray(saved.sampler.seeds).tolist())
        ids = None if notes.identity is None else tuple(notes.identity)
        session: Session[Any] = Session(pipeline, Videos(seeds, ids, notes.batch), keep)
        at = saved.sampler.position
        rows = zip(range(at), notes.prompts)
        session._told = [
            Told(row if isinstance(row, tuple) else (row,), notes.changes.get(number))
            for number, row in rows
        ]
        require(
            len(session._told) == at,
            f"a state behind {at} blocks notes {len(session._told)} prompts; it is damaged, so go on from another one.",
        )
        session._state = player.with_scratch(pipeline, saved.sampler) if at else None
        session._opening, session._end = notes.start, notes.end
        return session

    @staticmethod
    def behind(pipeline: Loaded, state: State, prompts: Sequence[str]) -> "Session[Finished]":
        """A session that goes on from a block's state, once `prompts` were told; it keeps no copies."""
        seeds, ids = (tuple(np.asarray(each).tolist()) for each in (state.seeds, state.videos))
        session: Session[Finished] = Session(pipeline, Videos(seeds, ids), Keep(0))
        session._told = [Told((prompt,)) for prompt in prompts]
        session._state = state
        return session


def _is_timeline(prompts: object) -> TypeGuard[Timeline]:
    """Whether these are (block, prompt) or (block, prompt, change)."""
    return (
        isinstance(prompts, Sequence)
        and len(prompts) > 0
        and all(
            isinstance(each, Sequence)
            and not isinstance(each, str)
            and len(each) in (2, 3)
            and isinstance(each[0], int)
            and all(isinstance(text, str) for text in each[1:])
            for each in prompts
        )
    )
