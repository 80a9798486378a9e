"""The sessions of a server: what each one is, what clients may do to it, and what is told of it.

Everything here may wait for a disk, and none of it for a model: it is called from threads beside the event loop, while
the one that makes blocks (`runner`) goes on.
"""

import dataclasses
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from packforcing_jax.errors import InputError, require, shown
from packforcing_jax.io import h264
from packforcing_jax.live import fragments, store
from packforcing_jax.live.limits import Limits
from packforcing_jax.live.models import Models
from packforcing_jax.live.protocol import NewSession, NewVideo, Prompt
from packforcing_jax.live.store import About, Change, Queued, Story
from packforcing_jax.live.watchers import Shot, Watcher

CANCELLED = "cancelled"


class Refused(InputError):
    """A wish that cannot be granted; `status` says why."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


class Told(NamedTuple):
    """Something that happened: a message or a block, for one client while it is here, else for all."""

    what: Mapping[str, Any] | Shot
    to: Watcher | None = None


@dataclass(eq=False)
class Live:
    """A session. What is on disk, and what stands for it here, changes under `lock` alone.

    `epoch` rises when blocks are taken back, so that a block in progress is known to be of no use.
    """

    about: About
    story: Story
    folder: store.Folder
    config: bytes  # the decoder configuration that its video began with
    lock: threading.RLock = field(default_factory=threading.RLock)
    epoch: int = 0
    gone: bool = False
    making: bool = False  # its next block
    due: float = 0.0  # when the next block is wanted
    planned: float = 0.0  # when it would be at the pace alone
    turn: int = 0  # when it had its last block, in blocks of all sessions
    asked: dict[Queued, set[Watcher]] = field(default_factory=dict)
    watchers: set[Watcher] = field(default_factory=set)  # belongs to the event loop
    rate: float = 0.0  # blocks a second of late
    dropping: bool = False  # its oldest states have begun to go

    @property
    def next(self) -> int:
        """The block that is made next."""
        return self.folder.count

    @property
    def finished(self) -> bool:
        """Whether all of it is there."""
        return self.about.target is not None and self.next >= self.about.target

    @property
    def watched(self) -> bool:
        """Whether somebody waits for its blocks."""
        return bool(self.watchers) or self.about.run or self.about.target is not None

    @property
    def state(self) -> str:
        """`running`, `waiting` for someone to watch, `paused`, `finished`, or `stopped` by an error."""
        if self.story.ended is not None:
            return "stopped"
        if self.finished:
            return "finished"
        if self.story.paused:
            return "paused"
        return "running" if self.watched else "waiting"


class Hub:
    """All sessions and jobs below `root`. `told` is called with (session, what happened), from any thread."""

    def __init__(self, root: Path, models: Models, limits: Limits):
        self.models = models
        self.limits = limits
        self.told: Callable[[Live, list[Told]], None] = lambda live, told: None
        self.wake: Callable[[], None] = lambda: None
        self.lost: list[str] = []  # sentences about folders that do not open
        self._lock = threading.Lock()
        self._stores = {
            "sessions": store.Store(root / "sessions"),
            "videos": store.Store(root / "videos"),
        }
        self._lives: dict[str, dict[str, Live]] = {kind: {} for kind in self._stores}
        for kind, each in self._stores.items():
            for folder in each.open():
                self._open(kind, folder)

    def _open(self, kind: str, folder: store.Folder) -> None:
        try:
            about, story = folder.opened()
            config = h264.config((folder.path / store.HEADER).read_bytes())
        except (InputError, OSError, ValueError) as error:
            self.lost.append(f"{folder.path} does not open: {error}")
            return
        if story.ended is None and about.model != self.models.digest:
            story = dataclasses.replace(
                story,
                ended="this session was made with another model; start the server with its --weights.",
            )
        self._lives[kind][about.id] = Live(about, story, folder, config)

    # Looking

    def all(self) -> list[Live]:
        """All sessions and jobs."""
        with self._lock:
            return [live for lives in self._lives.values() for live in lives.values()]

    def of(self, kind: str) -> list[Live]:
        """The sessions, or the videos, oldest first."""
        with self._lock:
            return sorted(self._lives[kind].values(), key=lambda live: live.about.created)

    def get(self, kind: str, name: str) -> Live:
        """A session or a video by its id; raises `Refused`."""
        with self._lock:
            live = self._lives[kind].get(name)
        if live is None:
            raise Refused(
                404, f"there is no {kind[:-1]} {shown(name, 40)}; GET /v1/{kind} lists them."
            )
        return live

    def facts(self, live: Live) -> dict[str, Any]:
        """What is said of a session."""
        about, story = live.about, live.story
        return {
            "id": about.id,
            **self.models.picture,
            "state": live.state,
            "block": live.next,
            "prompt": story.changes[-1].prompt,
            "changes": [dataclasses.asdict(each) for each in story.changes],
            "queue": [
                {"text": each.prompt, "at": each.at, "policy": each.policy, "ref": each.ref}
                for each in story.queue
            ],
            "seed": about.seed,
            "memory": about.memory,
            "method": about.method,
            "run": about.run,
            "parent": about.parent,
            "created": about.created,
            "kept": _runs(live.folder.kept),
            "bytes": live.folder.size,
            "watchers": len(live.watchers),
            "blocks_per_second": round(live.rate, 3),
            "dropped": sum(each.dropped for each in tuple(live.watchers)),
            **({"message": story.ended} if story.ended else {}),
        }

    def status(self, live: Live) -> dict[str, Any]:
        """What is said of a job."""
        target = live.about.target or 1
        if live.story.ended is not None:
            status = CANCELLED if live.story.ended == CANCELLED else "failed"
        elif live.finished:
            status = "completed"
        else:
            status = "in_progress" if live.making or live.next else "queued"
        said = {"id": live.about.id, "status": status, "progress": round(live.next / target, 4)}
        return said | ({"message": live.story.ended} if status == "failed" else {})

    # Beginning and ending

    def begin(self, wish: NewSession) -> Live:
        """A new session."""
        about = About(
            id=secrets.token_hex(8),
            model=self.models.digest,
            prompt=wish.prompt,
            seed=wish.seed,
            created=time.time(),
            memory=wish.memory,
            method=wish.method,
            run=wish.run,
            drift=wish.drift,
        )
        return self._create("sessions", about, self.limits.sessions)

    def order(self, wish: NewVideo) -> Live:
        """A new job."""
        require(
            wish.seconds <= self.limits.video_seconds,
            f"seconds={wish.seconds:g} is longer than this server makes a video; ask for at most "
            f"{self.limits.video_seconds:g} (--video-seconds).",
        )
        about = About(
            id=secrets.token_hex(8),
            model=self.models.digest,
            prompt=wish.prompt,
            seed=wish.seed,
            created=time.time(),
            target=self.models.blocks_of(wish.seconds),
        )
        return self._create("videos", about, self.limits.videos)

    def _create(self, kind: str, about: About, most: int) -> Live:
        self.models.check(about, about.prompt)
        self._require_room(kind, most)
        header = fragments.header(self.models.shape, self.models.settings(about))
        story = Story(changes=(Change(0, about.prompt),))
        folder = self._stores[kind].create(about, story, header)
        return self._listed(kind, Live(about, story, folder, h264.config(header)), most)

    def _require_room(self, kind: str, most: int) -> None:
        with self._lock:
            if len(self._lives[kind]) >= most:
                raise Refused(
                    429, f"this server keeps {most} {kind}; delete one of them (--{kind})."
                )

    def _listed(self, kind: str, live: Live, most: int) -> Live:
        with self._lock:
            full = len(self._lives[kind]) >= most  # others came meanwhile
            if not full:
                self._lives[kind][live.about.id] = live
        if full:
            live.folder.remove()
            self._require_room(kind, most)
        self.wake()
        return live

    def fork(self, parent: Live, at: int | None) -> Live:
        """Another session that shares the blocks before `at`."""
        self._require_room("sessions", self.limits.sessions)
        with _open(parent):
            at = parent.folder.kept[-1] if at is None else at
            self._require_kept(parent, at)
            about = dataclasses.replace(
                parent.about, id=secrets.token_hex(8), created=time.time(), parent=parent.about.id
            )
            story = Story(changes=_before(parent.story, at), paused=parent.story.paused)
            folder = self._stores["sessions"].fork(parent.folder, at, about, story)
        live = Live(about, story, folder, parent.config)
        return self._listed("sessions", live, self.limits.sessions)

    def delete(self, kind: str, name: str) -> None:
        """Ends a session or a job and forgets it; a job that is not done is cancelled first, and stays to be asked."""
        live = self.get(kind, name)
        with _open(live):
            live.epoch += 1
            if kind == "videos" and live.story.ended is None and not live.finished:
                live.story = dataclasses.replace(live.story, ended=CANCELLED)
                live.folder.cut(0, live.story)
                return
            live.gone = True
            with self._lock:
                self._lives[kind].pop(name, None)
            live.folder.remove()
        self.told(live, [Told({"type": "error", "message": "this session was deleted."})])
        self.wake()

    # Steering

    def prompt(self, live: Live, wish: Prompt, by: Watcher | None = None) -> list[Told]:
        """Takes up a prompt; what is to be told of it."""
        self.models.check(live.about, wish.text, wish.policy)
        with _open(live):
            self._require_open(live)
            require(
                wish.policy is None or max(wish.at or 0, live.next) > 0,
                f"policy={wish.policy}: block 0 has no memory to {wish.policy}; leave it out.",
            )
            first = live.next + live.making
            require(
                wish.at is None or wish.at >= first,
                f"at={wish.at} is before block {first}, the next one that is not begun; give that or a later one, "
                "or rewind.",
            )
            if len(live.story.queue) >= self.limits.queue:
                raise Refused(
                    429,
                    f"{self.limits.queue} prompts of this session wait already; wait (--queue).",
                )
            require(
                len(live.story.changes) + len(live.story.queue) < self.limits.changes,
                f"this session has {self.limits.changes:,} changes of prompt; begin another (--changes).",
            )
            queued = Queued(wish.text, wish.at, wish.policy, wish.ref)
            self._tell(live, queue=(*live.story.queue, queued))
            if by is not None:
                live.asked.setdefault(queued, set()).add(by)
            if wish.at is None:
                live.due = 0.0  # the block under it is not waited for
        self.wake()
        return [Told({"type": "received", "ref": wish.ref}, by)]

    def pause(self, live: Live, paused: bool) -> int:
        """Stops or goes on; the block that is made next."""
        with _open(live):
            self._require_open(live)
            self._tell(live, paused=paused)
            live.due = 0.0
            block = live.next
        self.wake()
        return block

    def rewind(self, live: Live, to: int, policy: str | None = None) -> None:
        """Blocks from `to` on are taken back; with a `policy` the next one is made under it."""
        with _open(live):
            require(
                live.story.ended is None or live.about.model == self.models.digest,
                live.story.ended or "",
            )
            self._require_kept(live, to)
            story = live.story
            queue = story.queue
            if policy is not None:
                queue = (Queued(story.prompt_at(max(to - 1, 0)), to, policy), *queue)
            live.epoch += 1
            live.story = dataclasses.replace(
                story, changes=_before(story, to), queue=queue, ended=None
            )
            live.folder.cut(to, live.story)
            live.due = 0.0
            self.told(live, [Told({"type": "rewound", "to": to})])
        self.wake()

    def end(self, live: Live, sentence: str) -> None:
        """No further block is made, for the reason that `sentence` gives."""
        with live.lock:
            if not live.gone:
                live.story = dataclasses.replace(live.story, ended=sentence)
                self.told(live, [Told({"type": "error", "message": sentence})])

    def _tell(self, live: Live, **changed: Any) -> None:
        story = dataclasses.replace(live.story, **changed)
        live.folder.tell(story)
        live.story = story

    def _require_open(self, live: Live) -> None:
        if live.story.ended is not None:
            raise Refused(409, f"this session has stopped: {live.story.ended}")

    def _require_kept(self, live: Live, at: int) -> None:
        require(
            at in (0, *live.folder.kept),
            f"block {at} cannot be gone back to; this session keeps {_told_runs(live.folder.kept)}.",
        )


@contextmanager
def _open(live: Live) -> Iterator[None]:
    """The session's lock; raises `Refused` if it is gone."""
    with live.lock:
        if live.gone:
            raise Refused(404, "this session was deleted; begin another.")
        yield


def _before(story: Story, at: int) -> tuple[Change, ...]:
    """The changes of blocks before `at`, the first one in any case."""
    return tuple(each for each in story.changes if each.block < max(at, 1))


def _runs(numbers: list[int]) -> list[list[int]]:
    """Rising numbers as first and last of each unbroken run."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return runs


def _told_runs(numbers: list[int]) -> str:
    runs = _runs(numbers)[-5:]
    return ", ".join(f"{a} to {b}" if b > a else f"{a}" for a, b in runs)
