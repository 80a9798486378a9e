"""Sessions on disk: whole after any end of the program, the block in progress left out.

A session is a folder. `about.json` never changes. `story.json`, replaced as a whole, holds what was told and what is
to come. Each finished block is a folder of its own under `blocks/`, given its name once all of it is written. What
takes more than one step is announced in `story.json` first, and done to its end when the session is opened again.
One process at a time owns the root (`io.locks`), so nothing here is locked.
"""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from packforcing_jax.errors import InputError, require
from packforcing_jax.io import atomic, video
from packforcing_jax.live.protocol import Ref

FORMAT = 1
ABOUT, STORY, HEADER, BLOCKS = "about.json", "story.json", "header.mp4", "blocks"
FRESH = ".unfinished"  # a block, or a session, on its way
GONE = ".gone"  # a session on its way out
BLOCK, IMAGES, PIECE, STATE = "block.json", "images", "piece.mp4", "state"
NAME = re.compile(r"[0-9a-f]{16}")  # of a session

Value = TypeVar("Value")


@dataclass(frozen=True)
class About:
    """What a session is. `target`: blocks at which it is finished, None for a session without an end.

    `model` is the digest of the weights that made its blocks.
    """

    id: str
    model: str
    prompt: str
    seed: int
    created: float
    memory: str | None = None
    method: str | None = None
    run: bool = False
    drift: str | None = None
    target: int | None = None
    parent: str | None = None
    format: int = FORMAT


@dataclass(frozen=True)
class Change:
    """From block `block` on `prompt` holds; `policy` is what it did to the memory, None: what the method says."""

    block: int
    prompt: str
    policy: str | None = None


@dataclass(frozen=True)
class Queued:
    """A prompt that waits for its block, the next one if `at` is None."""

    prompt: str
    at: int | None = None
    policy: str | None = None
    ref: Ref = None


@dataclass(frozen=True)
class Story:
    """What changes of a session. `changes` begins with block 0. `cut`: blocks from here on are to be removed.

    `ended` is why no further block is made: an error's sentence, or "cancelled".
    """

    changes: tuple[Change, ...]
    queue: tuple[Queued, ...] = ()
    paused: bool = False
    cut: int | None = None
    ended: str | None = None

    def prompt_at(self, block: int) -> str:
        """The prompt that holds at a block."""
        return next(each.prompt for each in reversed(self.changes) if each.block <= block)


@dataclass(frozen=True)
class Block:
    """What is said of a finished block; `position`: that of the video behind it. `drift`: what its guard knows."""

    index: int
    prompt: str
    recalled: list[list[int]]
    seconds: float
    frames: int
    position: video.Position
    drift: dict[str, Any] | None = None


@dataclass
class Folder:
    """A session's folder: how many blocks it has, which of them have their state, and their size."""

    path: Path
    count: int = 0
    stated: list[int] = dataclasses.field(default_factory=list)  # blocks whose state is here
    size: int = 0  # bytes of the blocks

    @property
    def kept(self) -> list[int]:
        """Positions that can be gone back to: each is the block that is made next."""
        return [0, *(block + 1 for block in self.stated)]

    def block_path(self, index: int) -> Path:
        """Where a finished block lies."""
        return self.path / BLOCKS / f"{index:08d}"

    def state_path(self, index: int) -> Path:
        """Where the state behind a block lies, if it is kept."""
        return self.block_path(index) / STATE

    # Reading

    def about(self) -> About:
        """Raises `InputError` for a file that says something else."""
        return _read(self.path / ABOUT, lambda fields: About(**fields))

    def story(self) -> Story:
        """Raises `InputError` for a file that says something else."""
        return _read(self.path / STORY, _story)

    def block(self, index: int) -> Block:
        """What is said of a finished block."""
        return _read(
            self.block_path(index) / BLOCK,
            lambda fields: Block(**{**fields, "position": video.Position(**fields["position"])}),
        )

    def images(self, index: int) -> bytes:
        """A block as it was sent."""
        return (self.block_path(index) / IMAGES).read_bytes()

    def video_bytes(self, blocks: int) -> int:
        """The size of the video of the first `blocks` blocks."""
        pieces = self.block(blocks - 1).position.bytes if blocks else 0
        return (self.path / HEADER).stat().st_size + pieces

    def video(self, blocks: int) -> Iterator[bytes]:
        """The video of the first `blocks` blocks: header and whole pieces."""
        yield (self.path / HEADER).read_bytes()
        for index in range(blocks):
            yield (self.block_path(index) / PIECE).read_bytes()

    # Writing

    def tell(self, story: Story) -> None:
        """Replaces the story."""
        _write(self.path / STORY, dataclasses.asdict(story))

    def add(
        self, block: Block, images: bytes, piece: bytes, save: Callable[[Path], None] | None
    ) -> Path:
        """Writes a block under a name that does not count yet, for `publish`. `save` writes its state at a path."""
        fresh = self.path / FRESH
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        (fresh / IMAGES).write_bytes(images)
        (fresh / PIECE).write_bytes(piece)
        (fresh / BLOCK).write_text(json.dumps(dataclasses.asdict(block)))
        if save is not None:
            save(fresh / STATE)
        atomic.sync(fresh)
        return fresh

    def publish(self, fresh: Path) -> None:
        """The block that `add` wrote is the next one."""
        self.size += _size(fresh)
        stated = (fresh / STATE).exists()
        final = self.block_path(self.count)
        os.rename(fresh, final)
        atomic.sync_entry(final)
        if stated:
            self.stated.append(self.count)
        self.count += 1

    def drop_state(self, index: int) -> None:
        """The state behind a block is no longer kept."""
        size = _size(self.state_path(index))
        self.state_path(index).unlink()
        self.stated.remove(index)
        self.size -= size

    def cut(self, to: int, story: Story) -> None:
        """Blocks from `to` on are removed; `story` holds from then on."""
        self.tell(dataclasses.replace(story, cut=to))
        self._cut(to)
        self.tell(story)

    def _cut(self, to: int) -> None:
        for index in reversed(range(to, self.count)):
            self.size -= _size(self.block_path(index))
            shutil.rmtree(self.block_path(index))
        self.count = min(self.count, to)
        self.stated = [index for index in self.stated if index < to]

    def remove(self) -> None:
        """The session is gone from the list at once, and then from the disk."""
        gone = self.path.with_name(f"{GONE}-{self.path.name}")
        os.rename(self.path, gone)
        shutil.rmtree(gone, ignore_errors=True)

    # Opening

    def opened(self) -> tuple[About, Story]:
        """(what the session is, what was told), once what a kill left half done is done or gone."""
        shutil.rmtree(self.path / FRESH, ignore_errors=True)
        about, story = self.about(), self.story()
        require(
            about.format <= FORMAT,
            f"session {self.path} was made by a newer version (format {about.format}); update packforcing.",
        )
        names = sorted(os.listdir(self.path / BLOCKS))
        self.count = next((at for at, name in enumerate(names) if name != f"{at:08d}"), len(names))
        for name in names[self.count :]:  # behind a gap, which only a hand from outside can make
            shutil.rmtree(self.path / BLOCKS / name, ignore_errors=True)
        self.stated = [index for index in range(self.count) if self.state_path(index).exists()]
        self.size = sum(_size(self.block_path(index)) for index in range(self.count))
        if story.cut is not None:
            self._cut(story.cut)
            story = dataclasses.replace(story, cut=None)
            self.tell(story)
        return about, _settled(story, self.count)


def _settled(story: Story, count: int) -> Story:
    """Changes of blocks that were not finished wait for them again."""
    told = tuple(each for each in story.changes if each.block < max(count, 1))
    undone = tuple(
        Queued(each.prompt, each.block, each.policy)
        for each in story.changes
        if each.block >= max(count, 1)
    )
    return dataclasses.replace(story, changes=told, queue=(*undone, *story.queue))


@dataclass(frozen=True)
class Store:
    """All sessions of one kind below a folder."""

    path: Path

    def open(self) -> Iterator[Folder]:
        """The folders of sessions; what is on its way in or out is removed."""
        self.path.mkdir(parents=True, exist_ok=True)
        for each in sorted(self.path.iterdir()):
            if each.name.startswith((FRESH, GONE)):
                shutil.rmtree(each, ignore_errors=True)
            elif NAME.fullmatch(each.name) and (each / ABOUT).is_file():
                yield Folder(each)

    def create(self, about: About, story: Story, header: bytes) -> Folder:
        """A session without a block."""
        fresh = self._fresh(about, story)
        (fresh / HEADER).write_bytes(header)
        return self._named(fresh, about)

    def fork(self, parent: Folder, at: int, about: About, story: Story) -> Folder:
        """A session with the first `at` blocks of `parent`, of which it has links, not copies."""
        fresh = self._fresh(about, story)
        os.link(parent.path / HEADER, fresh / HEADER)
        for index in range(at):
            shutil.copytree(
                parent.block_path(index),
                fresh / BLOCKS / f"{index:08d}",
                copy_function=os.link,
            )
        folder = self._named(fresh, about)
        folder.opened()
        return folder

    def _fresh(self, about: About, story: Story) -> Path:
        fresh = self.path / f"{FRESH}-{about.id}"
        (fresh / BLOCKS).mkdir(parents=True)
        (fresh / ABOUT).write_text(json.dumps(dataclasses.asdict(about)))
        (fresh / STORY).write_text(json.dumps(dataclasses.asdict(story)))
        return fresh

    def _named(self, fresh: Path, about: About) -> Folder:
        final = self.path / about.id
        atomic.sync(fresh)
        os.rename(fresh, final)
        atomic.sync_entry(final)
        return Folder(final)


def _story(fields: dict[str, Any]) -> Story:
    changes = tuple(Change(**each) for each in fields.pop("changes"))
    queue = tuple(Queued(**each) for each in fields.pop("queue"))
    return Story(changes=changes, queue=queue, **fields)


def _read(path: Path, built: Callable[[dict[str, Any]], Value]) -> Value:
    try:
        return built(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"{path} does not hold what a session keeps there; remove the session's folder."
        ) from error


def _write(path: Path, fields: dict[str, Any]) -> None:
    """Replaces a small file; the old one stands until the new one is whole."""
    fresh = path.with_name(f".{path.name}.fresh")
    fresh.write_text(json.dumps(fields))
    atomic.move(fresh, path)


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    if not path.is_dir():
        return path.stat().st_size if path.exists() else 0
    return sum(_size(each) for each in path.iterdir())
