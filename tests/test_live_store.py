"""Folders of sessions: whatever step the program is killed at, what was finished is there, whole, and goes on."""

import dataclasses
import os
from pathlib import Path

import pytest

from packforcing_jax.errors import InputError
from packforcing_jax.io import video
from packforcing_jax.live import store
from packforcing_jax.live.store import About, Block, Change, Folder, Queued, Store, Story

NAME, FORK = "0" * 16, "1" * 16
STEPS = ("rename", "replace", "unlink", "rmdir", "mkdir", "link", "fsync")  # of os


class Killed(BaseException):
    """The program ends here."""


def about(name=NAME, **changed):
    return dataclasses.replace(About(name, "weights", "one", 7, 1.5), **changed)


def add(folder, story, word="a"):
    """A further block, as a runner writes it; the images and the piece say which it is."""
    index = folder.count
    at = folder.block(index - 1).position if index else video.Position()
    piece = f"piece {index} {word};".encode()
    end = video.Position(at.bytes + len(piece), at.frames + 3, at.fragments + 1)
    block = Block(index, story.prompt_at(index), [[0]], 0.1, 3, end)
    images = f"images {index} {word}".encode()
    fresh = folder.add(block, images, piece, lambda path: path.write_bytes(b"state" * (index + 1)))
    folder.publish(fresh)


def life(root):
    """Everything that happens to a session."""
    sessions = Store(root)
    list(sessions.open())
    story = Story((Change(0, "one"),))
    folder = sessions.create(about(), story, b"header;")
    add(folder, story)
    add(folder, story)
    story = dataclasses.replace(story, queue=(Queued("two", 2, "cut", "ref"),))
    folder.tell(story)
    told = dataclasses.replace(story, changes=(*story.changes, Change(2, "two", "cut")), queue=())
    folder.tell(told)
    add(folder, told)
    add(folder, told)
    folder.drop_state(0)
    back = dataclasses.replace(told, changes=(Change(0, "one"),))
    folder.cut(1, back)
    add(folder, back, "b")
    add(folder, back, "b")
    fork = sessions.fork(folder, 2, about(FORK, parent=NAME), back)
    add(fork, back, "c")
    fork.remove()
    return folder


def opened(root):
    """Sessions by their id, each as (folder, story)."""
    found = {}
    for folder in Store(root).open():
        told, story = folder.opened()
        found[told.id] = folder, story
    return found


def check(folder, story):
    """What must hold of a session, whatever happened to it."""
    names = sorted(os.listdir(folder.path / store.BLOCKS))
    assert names == [f"{index:08d}" for index in range(folder.count)]
    content = b"".join(folder.video(folder.count))
    assert len(content) == folder.video_bytes(folder.count)
    pieces = content.removeprefix(b"header;").split(b";")[:-1]
    assert len(pieces) == folder.count
    for index, piece in enumerate(pieces):
        images = folder.images(index)
        assert images.split()[1:] == piece.split()[1:] == [str(index).encode(), piece.split()[2]]
        block = folder.block(index)
        assert (block.index, block.prompt) == (index, story.prompt_at(index))
        if index in folder.stated:
            assert folder.state_path(index).read_bytes() == b"state" * (index + 1)
    assert not (folder.path / store.FRESH).exists()
    assert all(each.block < max(folder.count, 1) for each in story.changes)
    assert story.cut is None
    assert folder.size == sum(
        each.stat().st_size for each in (folder.path / store.BLOCKS).rglob("*") if each.is_file()
    )


def test_a_session_is_found_as_it_was_left(tmp_path):
    left = life(tmp_path)
    found = opened(tmp_path)
    assert list(found) == [NAME]
    folder, story = found[NAME]
    check(folder, story)
    assert (folder.count, folder.stated, folder.size) == (left.count, left.stated, left.size)
    assert folder.kept == [0, 2, 3]
    assert story == Story((Change(0, "one"),))
    assert folder.about() == about()


def killed_at(monkeypatch, number):
    """Ends the program at its step `number`; a list that holds how many steps were made."""
    made = [0]

    def dying(step):
        def call(*arguments, **options):
            made[0] += 1
            if made[0] == number:
                raise Killed
            return step(*arguments, **options)

        return call

    for name in STEPS:
        step = (
            getattr(os, name) if name != "fsync" else lambda handle: None
        )  # the disk is not what is tried
        monkeypatch.setattr(os, name, dying(step))
    for name in ("write_bytes", "write_text"):
        monkeypatch.setattr(Path, name, _torn(getattr(Path, name), dying(lambda: None)))
    return made


def _torn(write, step):
    """Writes half of the content, and then the rest."""

    def call(path, content, *arguments, **options):
        write(path, content[: len(content) // 2], *arguments, **options)
        step()
        return write(path, content, *arguments, **options)

    return call


def steps_of_life(tmp_path):
    with pytest.MonkeyPatch.context() as patched:
        made = killed_at(patched, -1)
        life(tmp_path / "whole")
        return made[0]


def test_a_kill_at_any_step_leaves_whole_sessions_that_go_on(tmp_path):
    steps = steps_of_life(tmp_path)
    assert steps > 100
    counts = set()
    for number in range(1, steps + 1):
        root = tmp_path / str(number)
        with pytest.MonkeyPatch.context() as patched:
            killed_at(patched, number)
            with pytest.raises(Killed):
                life(root)
        for name, (folder, story) in opened(root).items():
            check(folder, story)
            counts.add((name, folder.count))
            add(folder, story, "d")
            check(folder, story)
        opened(root)
        assert not [each for each in root.iterdir() if each.name.startswith(".")]
    assert counts >= {(NAME, count) for count in range(5)} | {(FORK, 2), (FORK, 3)}


def test_a_prompt_is_not_lost_between_the_story_and_its_block(tmp_path):
    sessions = Store(tmp_path)
    list(sessions.open())
    story = Story((Change(0, "one"),))
    folder = sessions.create(about(), story, b"header;")
    add(folder, story)
    folder.tell(Story((Change(0, "one"), Change(1, "two", "flush")), (Queued("three", 9),)))
    _, story = opened(tmp_path)[NAME][0].opened()
    assert story.changes == (Change(0, "one"),)
    assert story.queue == (Queued("two", 1, "flush"), Queued("three", 9))


def test_forks_share_what_they_have_in_common_and_nothing_else(tmp_path):
    folder = life(tmp_path)
    story = folder.story()
    fork = Store(tmp_path).fork(folder, 2, about(FORK), story)
    add(fork, story, "f")
    add(folder, story, "p")
    assert fork.images(1) == folder.images(1)
    assert fork.block_path(1).joinpath("images").samefile(folder.block_path(1) / "images")
    folder.cut(0, story)
    check(fork, story)
    assert (fork.count, folder.count) == (3, 0)


@pytest.mark.parametrize("wrong", [b"", b"{", b"[]", b'{"changes": 5}', b'{"id": "x"}', b"\xff"])
@pytest.mark.parametrize("name", [store.ABOUT, store.STORY])
def test_a_damaged_folder_is_said_and_left(tmp_path, wrong, name):
    folder = life(tmp_path)
    (folder.path / name).write_bytes(wrong)
    with pytest.raises(InputError, match=r"does not hold what a session keeps|newer version"):
        Folder(folder.path).opened()
    assert folder.path.exists()


def test_a_newer_format_is_said(tmp_path):
    sessions = Store(tmp_path)
    list(sessions.open())
    folder = sessions.create(about(format=2), Story((Change(0, "one"),)), b"header;")
    with pytest.raises(InputError, match="newer version"):
        folder.opened()


def test_folders_that_are_no_sessions_are_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / ("a" * 16)).mkdir()
    (tmp_path / "note.txt").write_text("x")
    assert list(Store(tmp_path).open()) == []
    assert {each.name for each in tmp_path.iterdir()} == {"mine", "a" * 16, "note.txt"}
