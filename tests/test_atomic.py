"""What is written is there whole or not at all, and what was there before stays until then, whatever happens."""

import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import pytest

from packforcing_jax.io import atomic


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write_file(path, content):
    with atomic.file(path) as fresh:
        assert not fresh.exists()
        fresh.write_text(content)


def write_folder(path, content):
    with atomic.folder(path) as fresh:
        assert list(fresh.iterdir()) == []
        (fresh / "deep").mkdir()
        (fresh / "deep" / "a.txt").write_text(content)


def read(path):
    return (path / "deep" / "a.txt" if path.is_dir() else path).read_text()


WRITERS = pytest.mark.parametrize("write", [write_file, write_folder])


@WRITERS
def test_what_is_written_takes_the_place_of_what_was_there(tmp_path, write):
    path = tmp_path / "new" / "there"
    for content in ("one", "two"):
        write(path, content)
        assert read(path) == content
        assert names(tmp_path / "new") == ["there"]


def test_bytes_are_written_readable_for_others(tmp_path):
    before = os.umask(0o022)
    try:
        atomic.write(tmp_path / "a", b"\x00\xff")
        write_folder(tmp_path / "b", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").read_bytes() == b"\x00\xff"
    assert ((tmp_path / "a").stat().st_mode & 0o777, (tmp_path / "b").stat().st_mode & 0o777) == (
        0o644,
        0o755,
    )


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("how", [atomic.file, atomic.folder])
@pytest.mark.parametrize("there", [True, False])
def test_a_body_that_ends_badly_changes_nothing(tmp_path, how, error, there):
    path = tmp_path / "there"
    if there:
        (write_file if how is atomic.file else write_folder)(path, "before")

    def ends_badly():
        with how(path) as fresh:
            (fresh / "a" if how is atomic.folder else fresh).write_text("half")
            raise error

    with pytest.raises(error):
        ends_badly()
    assert names(tmp_path) == ["there"] * there
    assert not there or read(path) == "before"


@pytest.mark.parametrize(
    ("write", "function"),
    [
        (write_file, "replace"),
        (write_file, "fsync"),
        (write_folder, "rename"),
        (write_folder, "fsync"),
    ],
)
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_failure_at_the_last_moment_changes_nothing(
    tmp_path, monkeypatch, write, function, error
):
    """Each of the calls that put the new one there fails once, the first time it is about the new one."""
    path = tmp_path / "there"
    write(path, "before")
    original = getattr(os, function)
    failed = []

    def fails(*arguments):
        about_new = function == "fsync" or "unfinished" in str(arguments[0])
        if about_new and not failed:
            failed.append(arguments)
            raise error
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fails)
        with pytest.raises(type(error)):
            write(path, "after")
    assert failed
    assert read(path) == "before"
    assert names(tmp_path) == ["there"]


@WRITERS
def test_a_full_disk_changes_nothing(tmp_path, write):
    path = tmp_path / "there"
    write(path, "before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(OSError, match="File too large"):
            write(path, "x" * 9000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read(path) == "before"
    assert names(tmp_path) == ["there"]


@WRITERS
def test_a_link_stays_one(tmp_path, write):
    (tmp_path / "far").mkdir()
    write(tmp_path / "far" / "there", "before")
    (tmp_path / "link").symlink_to(tmp_path / "far" / "there")
    write(tmp_path / "link", "after")
    assert (tmp_path / "link").is_symlink()
    assert read(tmp_path / "far" / "there") == "after"
    assert names(tmp_path) == ["far", "link"]


def test_the_disk_has_all_of_it_before_it_gets_its_name(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync
    rename = os.rename

    def noted(handle):
        synced.append(pathlib.Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    def renamed(source, target):
        assert synced == ["a.txt", "deep", "new"]
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", renamed)
    write_folder(tmp_path / "there", "x")
    assert synced[3:] == [tmp_path.name]


CHILD = """
import pathlib, sys
from packforcing_jax.io import atomic

path, kind = pathlib.Path(sys.argv[1]), sys.argv[2]
with getattr(atomic, kind)(path) as fresh:
    (fresh / "a" if kind == "folder" else fresh).write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def writing(path, kind):
    """A process in the middle of writing."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "writing\n"
    return child


def killed(child):
    """What the process still said before `kill -9`."""
    child.send_signal(signal.SIGKILL)
    return child.communicate()[0]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_kill_leaves_is_known_and_removed_by_the_next_writer(tmp_path, kind):
    path = tmp_path / "there"
    write = {"file": write_file, "folder": write_folder}[kind]
    write(path, "before")
    for _ in range(2):
        killed(writing(path, kind))
    left = [name for name in names(tmp_path) if name != "there"]
    assert len(left) == 1  # the second writer has removed what the first one left
    assert all(atomic.is_leftover(name) for name in left)
    assert not atomic.is_leftover("there")
    assert read(path) == "before"
    write(tmp_path / "other", "x")  # another path's leftovers are not its business
    assert names(tmp_path) == sorted([*left, "other", "there"])
    write(path, "after")
    assert (read(path), names(tmp_path)) == ("after", ["other", "there"])


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_writer_that_is_alive_is_left_alone(tmp_path, kind):
    path = tmp_path / "there"
    write = {"file": write_file, "folder": write_folder}[kind]
    child = writing(path, kind)
    write(path, "ours")
    assert read(path) == "ours"
    child.communicate("")
    assert child.returncode == 0
    assert (path / "a" if kind == "folder" else path).read_text() == "half"  # the last one wins
    assert names(tmp_path) == ["there"]


def test_a_folder_killed_on_its_way_out_comes_back(tmp_path):
    """Between the two renames the old folder lies beside its place: the next writer puts it back."""
    path = tmp_path / "there"
    write_folder(path, "before")
    killed(writing(path, "folder"))
    (left,) = (tmp_path / name for name in names(tmp_path) if atomic.is_leftover(name))
    path.rename(left / atomic.OLD)
    with pytest.raises(KeyboardInterrupt), atomic.folder(path):
        raise KeyboardInterrupt
    assert (read(path), names(tmp_path)) == ("before", ["there"])


@pytest.mark.slow
def test_a_killed_writer_leaves_the_old_one_or_the_new_one(tmp_path):
    code = """
import itertools, sys
from packforcing_jax.io import atomic
for n in itertools.count():
    atomic.write(sys.argv[1], (b"%08d" % n) * 5000)
    print(n, flush=True)
"""
    for delay in (0.0, 0.01, 0.05):
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "there")], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout.readline() == "0\n"
        time.sleep(delay)
        last = int(["0", *killed(child).split()][-1])
        content = (tmp_path / "there").read_bytes()
        assert content in [(b"%08d" % n) * 5000 for n in (last, last + 1)]
        assert len(names(tmp_path)) <= 2
