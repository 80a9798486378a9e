"""One thread that owns the model and makes blocks of all sessions in turn, each when it is wanted and not before."""

import dataclasses
import json
import logging
import math
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from packforcing_jax.errors import InputError, MachineError, brief, sentence
from packforcing_jax.io import video
from packforcing_jax.live import images, states
from packforcing_jax.live.fragments import Encoders
from packforcing_jax.live.hub import Hub, Live, Told
from packforcing_jax.live.store import Block, Change, Queued
from packforcing_jax.live.watchers import Shot
from packforcing_jax.sampling import drift
from packforcing_jax.sampling.drift import Drift
from packforcing_jax.sampling.finished import Finished
from packforcing_jax.sampling.session import Session

log = logging.getLogger("packforcing.live")

DONE = {
    "nothing": "the session goes on",
    "stop": "the session is paused",
    "re-anchor": "the session goes back to before it, and on from its first blocks alone",
}
Make = Callable[[str, str | None], Finished]


class Turn(NamedTuple):
    """What is made next: a session as it stands, and the prompt that holds."""

    epoch: int
    index: int
    prompt: str
    policy: str | None
    taken: tuple[Queued, ...]  # of its queue; the last one holds


class Made(NamedTuple):
    """A block as it lies on disk, under a name (`fresh`) that does not count yet."""

    block: Block
    fresh: Path
    shown: bytes
    drifted: list[Drift]


class Runner:
    """Makes blocks until it is stopped."""

    def __init__(self, hub: Hub):
        self._hub = hub
        self._window = hub.limits.drift_window or drift.BLOCKS * hub.models.picture["block_frames"]
        self._loaded: OrderedDict[str, tuple[int, int, Make]] = OrderedDict()
        self._encoders = Encoders(hub.models.shape, hub.limits.loaded)
        self._wanted = threading.Event()
        self._ends = False
        self._turns = 0
        self._thread = threading.Thread(target=self._run, name="blocks", daemon=True)
        hub.wake = self.wake

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def wake(self) -> None:
        """Something may be wanted now."""
        self._wanted.set()

    def stop(self) -> None:
        """Returns behind the block in progress."""
        self._ends = True
        self._wanted.set()
        self._thread.join()
        self._encoders.close()

    def _run(self) -> None:
        self._warm()
        while not self._ends:
            self._wanted.clear()
            live, wait = self._choice(time.monotonic())
            if live is None:
                self._wanted.wait(wait)
                continue
            try:
                self._make(live)
            except Exception as error:  # of one session: the others go on
                self._failed(live, error)
            finally:
                live.making = False

    def _warm(self) -> None:
        """Makes two blocks that nobody sees, so that what is compiled is compiled before somebody waits for it."""
        began = time.monotonic()
        try:
            session = self._hub.models.of_server.session(keep=0)
            for _ in range(2):
                session.next(self._hub.models.example)
        except Exception as error:  # whoever asks for a block is told
            log.error("the first block failed: %s", sentence(brief(error)))
            return
        log.info("ready for blocks after %.1f s", time.monotonic() - began)

    def _choice(self, now: float) -> tuple[Live | None, float | None]:
        """(the session whose block is due and that has waited longest, seconds until one is due)."""
        ready = [live for live in self._hub.all() if _goes_on(live)]
        due = [live for live in ready if live.due <= now]
        if due:
            return min(due, key=lambda live: live.turn), None
        return None, min((live.due - now for live in ready), default=None)

    def _failed(self, live: Live, error: Exception) -> None:
        self._forget(live)
        if live.gone:
            return
        expected = isinstance(error, InputError | MachineError)
        said = str(error) if expected else f"the block failed ({sentence(brief(error))})."
        log.error("session %s stopped: %s", live.about.id, said, exc_info=not expected)
        self._hub.end(live, said)

    # One block

    def _make(self, live: Live) -> None:
        turn = self._taken(live)
        if turn is None:
            return
        self._turns += 1
        live.turn = self._turns
        began = time.monotonic()
        try:
            finished = self._maker(live, turn)(turn.prompt, turn.policy)
            seconds = time.monotonic() - began
            made = self._written(live, turn, finished, seconds)
        except (OSError, InputError):
            if live.gone or live.epoch != turn.epoch:  # its folder went under the block
                self._forget(live)
                return
            raise
        self._publish(live, turn, made)
        spent = max(time.monotonic() - began, 1e-9)
        period = self._period()
        live.rate = 0.8 * live.rate + 0.2 / max(spent, period) if live.rate else 1 / spent
        wanted = max(live.planned, began - period) + period
        live.planned = wanted
        if live.due <= began:  # unless something was asked for meanwhile
            live.due = wanted if live.about.target is None else 0.0

    def _period(self) -> float:
        """Seconds from one block of a session to the next."""
        pace = self._hub.limits.pace
        return self._hub.models.block_seconds / pace if pace else 0.0

    def _taken(self, live: Live) -> Turn | None:
        """What the next block is, None if it is not wanted any more."""
        with live.lock:
            if not _goes_on(live):
                return None
            index = live.next
            if index >= self._hub.limits.blocks:
                self._hub.end(
                    live, f"this session has {index:,} blocks, as many as it may (--blocks)."
                )
                return None
            story = live.story
            taken = tuple(each for each in story.queue if each.at is None or each.at <= index)
            prompt = taken[-1].prompt if taken else story.prompt_at(index)
            policy = taken[-1].policy if taken and index else None
            live.making = True
            return Turn(live.epoch, index, prompt, policy, taken)

    def _maker(self, live: Live, turn: Turn) -> Make:
        """What makes the next block of a session: held since the last one, or read from its newest state."""
        name = live.about.id
        epoch, position, make = self._loaded.pop(name, (None, None, None))
        if make is None or (epoch, position) != (turn.epoch, turn.index):
            while len(self._loaded) >= self._hub.limits.loaded:
                self._encoders.forget(self._loaded.popitem(last=False)[0])
            make = self._opened(live, turn.index)
        self._loaded[name] = (turn.epoch, turn.index + 1, make)
        return make

    def _opened(self, live: Live, index: int) -> Make:
        """A session at block `index`, of its newest state and what was told since."""
        model = self._hub.models.of(live.about)
        with live.lock:
            stated = [block for block in live.folder.stated if block < index]
            story = live.story
        at = stated[-1] + 1 if stated else 0
        if at:
            state = states.load(live.folder.state_path(at - 1), model)
            told = [story.prompt_at(block) for block in range(at)]
            session = Session.behind(model, state, told)
        else:
            session = model.session(seed=live.about.seed, keep=0)
        policies = {change.block: change.policy for change in story.changes}
        make: Make = lambda prompt, policy: session.next(prompt, change=policy)
        if live.about.target is not None:
            left = session.run(live.about.prompt, blocks=live.about.target - at, ends=True)
            make = lambda prompt, policy: next(left)
        for block in range(at, index):
            make(story.prompt_at(block), policies.get(block) if block else None)
        return make

    def _forget(self, live: Live) -> None:
        self._loaded.pop(live.about.id, None)
        self._encoders.forget(live.about.id)

    def _written(self, live: Live, turn: Turn, finished: Finished, seconds: float) -> Made:
        """The block, written."""
        folder = live.folder
        frames = video.to_uint8(finished.frames)
        before = folder.block(turn.index - 1) if turn.index else None
        guard, drifted = drift.watch(
            drift.guard_of(before and before.drift, self._window), frames, turn.prompt
        )
        at = before.position if before else video.Position()
        piece, position = self._encoders.piece(live.about.id, frames, at, live.config)
        shown = images.message(frames, self._hub.models.media)
        block = Block(
            index=turn.index,
            prompt=turn.prompt,
            recalled=[[int(one) for one in layer if one >= 0] for layer in finished.block_ids],
            seconds=round(seconds, 4),
            frames=len(frames),
            position=position,
            drift=guard.to_json(),
        )
        model, state = self._hub.models.of(live.about), finished.state
        due = turn.index % self._hub.limits.state_every == 0
        assert state is not None  # of methods that make blocks one behind the other
        save = (lambda path: states.save(path, model, state)) if due else None
        fresh = folder.add(block, shown, piece, save)
        return Made(block, fresh, shown, drifted)

    def _publish(self, live: Live, turn: Turn, made: Made) -> None:
        """The block counts, unless it was taken back while it was made."""
        block = made.block
        with live.lock:
            if live.gone or live.epoch != turn.epoch:
                self._forget(live)
                shutil.rmtree(made.fresh, ignore_errors=True)
                return
            if turn.taken:
                self._told(live, turn)
            live.folder.publish(made.fresh)
            live.making = False
            told = self._receipts(live, turn)
            kept = self._bounded(live)
            said = {
                "type": "block",
                "index": block.index,
                "prompt": block.prompt,
                "recalled": block.recalled,
                "seconds": block.seconds,
                "kept": kept,
            }
            told.append(Told(Shot(block.index, json.dumps(said), made.shown)))
            self._hub.told(live, told)
            if made.drifted:
                self._drifted(live, block, made.drifted)

    def _told(self, live: Live, turn: Turn) -> None:
        """The story with the prompts that the block took up: written before the block counts."""
        story = live.story
        taken = {id(each) for each in turn.taken}
        queue = tuple(each for each in story.queue if id(each) not in taken)
        before = tuple(each for each in story.changes if each.block < turn.index)
        changes = (*before, Change(turn.index, turn.prompt, turn.policy))
        live.story = dataclasses.replace(story, changes=changes, queue=queue)
        live.folder.tell(live.story)

    def _receipts(self, live: Live, turn: Turn) -> list[Told]:
        """What is said to those whose prompts the block took up."""
        told = []
        for queued in turn.taken:
            if queued == turn.taken[-1]:
                said: dict[str, Any] = {"type": "applied", "ref": queued.ref, "block": turn.index}
            else:
                said = {
                    "type": "error",
                    "ref": queued.ref,
                    "message": f"a later prompt took its place before block {turn.index}.",
                }
            by = live.asked.pop(queued, set())
            told += [Told(said, watcher) for watcher in by] or [Told(said)]
        return told

    def _bounded(self, live: Live) -> int:
        """Drops the oldest states beyond the bound of disk, and says so once; the oldest that can be gone back to."""
        folder = live.folder
        most = int(self._hub.limits.disk_gb * 1e9)
        only_newest = live.about.target is not None
        while len(folder.stated) > 1 and (only_newest or folder.size > most):
            folder.drop_state(folder.stated[0])
            if not only_newest and not live.dropping:
                live.dropping = True
                log.warning(
                    "session %s has reached %g GB: its oldest states go, blocks before %d cannot be gone back to",
                    live.about.id,
                    self._hub.limits.disk_gb,
                    folder.stated[0] + 1,
                )
        if folder.size > most and not only_newest:
            self._hub.end(
                live,
                f"this session has {folder.size / 1e9:.3g} GB on disk and its bound is {self._hub.limits.disk_gb:g}; "
                "fork it, delete it, or start the server with a higher --disk-gb.",
            )
        return folder.stated[0] + 1 if folder.stated else 0

    def _drifted(self, live: Live, block: Block, drifted: list[Drift]) -> None:
        """Says that a window has drifted, and does about it what was chosen; the session's lock is held."""
        blocks = -(-self._window // block.frames)
        since = max(block.index + 1 - blocks, 0)
        to = max(at for at in live.folder.kept if at <= since)
        choice = live.about.drift or self._hub.limits.drift
        anchored = any(each.block == to and each.policy for each in live.story.changes)
        if choice == "re-anchor" and (to == 0 or anchored):
            choice = "stop"  # it would come to the same again
        about = "; ".join(each.sentence for each in drifted)
        message = f"blocks {since} to {block.index}: {about}; {DONE[choice]}."
        said = {
            "type": "drift",
            "block": block.index,
            "since": to,
            "figures": {each.what: [_finite(each.value), each.allowed] for each in drifted},
            "action": choice,
            "message": message,
        }
        log.warning("session %s, %s", live.about.id, message)
        self._hub.told(live, [Told(said)])
        if choice == "stop":
            self._hub.pause(live, True)
        elif choice == "re-anchor":
            budget = self._hub.models.of(live.about).experiment.cache.budget
            self._hub.rewind(live, to, "cut" if budget else "flush")


def _finite(value: float) -> float | None:
    """A number that JSON has."""
    return round(value, 4) if math.isfinite(value) else None


def _goes_on(live: Live) -> bool:
    """Whether a further block of a session is wanted at all."""
    return not live.gone and live.state == "running"
