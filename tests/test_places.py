"""What a command will write is looked at before anything is loaded, and belongs to one process at a time."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from packforcing_jax.cli import failures, main, places
from packforcing_jax.cli.places import Place
from packforcing_jax.errors import InputError, MachineError
from packforcing_jax.io import append_file, ffmpeg, locks, video

HOLDER = """
import sys, time
from packforcing_jax.io import locks
with locks.held([("--out", sys.argv[1])]):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def another_process(path):
    """Another process that holds `path`."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def said(capsys, *words):
    assert main.main(list(map(str, words))) in (2, 3)
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


@pytest.fixture
def unloaded(monkeypatch):
    """Nothing is loaded and nothing is asked of the machine: what is refused is refused before."""
    from packforcing_jax.plan import memory_fit
    from packforcing_jax.sampling import pipeline

    def loaded(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(memory_fit, "require_fits", loaded)
    monkeypatch.setattr(pipeline.Pipeline, "from_pretrained", loaded)


# One process at a time


def test_a_place_is_held_once_and_free_again_after(tmp_path):
    path = tmp_path / "new" / "folder" / "v.mp4"
    with locks.held([("--out", path)]):
        with pytest.raises(InputError, match="--out .*v.mp4 is being written by another process"):
            locks.held([("--out", path)]).__enter__()
        with locks.held([("--out", path.with_name("w.mp4")), ("--state", None)]):
            pass
    assert list(tmp_path.iterdir()) == []  # folders in which nothing was written are gone too
    with locks.held([("--out", path)]):
        path.write_text("a video")
    assert [each.name for each in path.parent.iterdir()] == ["v.mp4"]


def test_one_place_named_in_two_ways_is_one(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    with locks.held([("--out", "v.mp4")]), pytest.raises(InputError, match="another process"):
        locks.held([("--state", tmp_path / "link" / "v.mp4")]).__enter__()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--out", ["sample", "--prompt", "x", "--out", "{}.mp4"]),
        ("--state", ["sample", "--prompt", "x", "--out", "{}2.mp4", "--state", "{}"]),
        ("--trace", ["sample", "--prompt", "x", "--out", "{}2.mp4", "--trace", "{}"]),
        ("--out", ["sample", "--prompts", "{}.txt", "--out", "{}"]),
        ("--out", ["train", "--config", "stage", "--out", "{}"]),
        ("--write", ["bench", "--write", "{}"]),
    ],
)
def test_the_second_process_is_refused_in_a_sentence(tmp_path, capsys, unloaded, flag, words):
    path = tmp_path / "it"
    path.with_suffix(".txt").write_text("a red disc")
    taken = path.with_suffix(".mp4") if "{}.mp4" in words else path
    before = sorted(tmp_path.iterdir())
    with locks.held([("--out", taken)]):
        sentence = said(capsys, *(word.format(path) for word in words))
    assert f"{flag} {taken} is being written by another process; wait for it" in sentence
    assert sorted(tmp_path.iterdir()) == before


def test_a_kill_releases_a_lock(tmp_path):
    path = tmp_path / "v.mp4"
    with another_process(path) as process:
        with pytest.raises(InputError, match="another process"):
            locks.held([("--out", path)]).__enter__()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert locks.beside(path).exists()  # what the kill left is no obstacle
        with locks.held([("--out", path)]):
            pass
    assert not locks.beside(path).exists()


# Known before anything is loaded


def fifo(folder):
    os.mkfifo(folder / "pipe.mp4")
    return "pipe.mp4"


def long_name(folder):
    return "n" * 300 + ".mp4"


def long_folder(folder):
    return "n" * 300 + "/v.mp4"


@pytest.mark.parametrize("flag", ["--out", "--state", "--trace", "--sheet"])
@pytest.mark.parametrize("make", [fifo, long_name, long_folder], ids=lambda make: make.__name__)
def test_pipes_and_long_names_are_refused_at_once(
    tmp_path, capsys, unloaded, monkeypatch, flag, make
):
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path)
    if flag == "--sheet":
        (tmp_path / path).rename(tmp_path / "pipe.png") if make is fifo else None
        path = path.replace(".mp4", ".png")
    began = time.monotonic()
    sentence = said(capsys, "sample", "--prompt", "a red disc", flag, path)
    assert time.monotonic() - began < 5
    assert flag in sentence
    assert any(word in sentence for word in ("pipe or a device", "bytes", "no folder"))
    assert len(sentence) < 300


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--sheet", "s.jpg"], "--sheet s.jpg does not end in .png; give it that suffix"),
        (["--sheet", "/proc/s.png"], "--sheet /proc/s.png is not writable"),
        (["--state", "/proc/s"], "--state /proc/s is not writable"),
        (["--out", "/proc/v.mp4"], "--out /proc/v.mp4 is not writable"),
        (["--out", "v.avi"], "--out v.avi does not end in .mp4"),
        (["--trace", "/proc/t"], "--trace /proc/t is not writable"),
        (["--blocks", str(10**30)], "is not a length; give 1 to 10,000,000"),
        (["--seconds", "1e30"], "is not a length"),
        (["--seed", str(10**4000)], "is out of range"),
        (["--blocks", "9" * 5000], "invalid int value"),
    ],
)
def test_what_can_be_known_is_said_before_the_model_is_loaded(
    tmp_path, capsys, unloaded, monkeypatch, words, named
):
    monkeypatch.chdir(tmp_path)
    sentence = said(capsys, "sample", "--prompt", "a red disc", *words)
    assert named in sentence
    assert len(sentence) < 600
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["--timeline", "--prompts"])
def test_texts_are_read_before_the_model_and_pipes_are_not(tmp_path, capsys, unloaded, flag):
    os.mkfifo(tmp_path / "pipe.txt")
    assert "it is a pipe or a device" in said(capsys, "sample", flag, tmp_path / "pipe.txt")
    (tmp_path / "t.txt").write_text("")
    assert f"{tmp_path}/t.txt" in said(capsys, "sample", flag, tmp_path / "t.txt")


def test_links_in_a_circle_are_refused(tmp_path, capsys, unloaded, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    assert "check its links" in said(capsys, "sample", "--state", "state", "--out", "loop")


@pytest.mark.parametrize(
    "words", [["layout", "--picture"], ["bench", "--write"], ["train", "--out"]]
)
def test_other_verbs_look_at_their_places_too(tmp_path, capsys, unloaded, words):
    (tmp_path / "file").write_text("")
    sentence = said(capsys, *words, tmp_path / "file" / "p.png", "--config", "stage")
    assert (
        f"{words[1]} {tmp_path}/file/p.png lies below {tmp_path}/file, which is a file" in sentence
    )


def program(folder, script):
    path = folder / "ffmpeg"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("script", "named"),
    [
        ("echo ' V..... mpeg4'", "has no encoder libx264; install imageio"),
        ("exit 1", "has no encoder libx264"),
        (None, "does not start"),
    ],
)
def test_an_ffmpeg_that_makes_no_video_is_told_before_the_first_block(
    tmp_path, capsys, unloaded, monkeypatch, script, named
):
    path = program(tmp_path, script) if script else tmp_path / "gone"
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))
    ffmpeg.require_encoder.cache_clear()
    try:
        out = tmp_path / "v.mp4"
        assert named in said(capsys, "sample", "--prompt", "a red disc", "--out", out)
        from packforcing_jax.cli import doctor

        found = doctor.examine(*doctor.CHECKS["ffmpeg"])
        assert not found.ok
        assert str(path) in found.detail
        assert "IMAGEIO_FFMPEG_EXE" in found.remedy
    finally:
        ffmpeg.require_encoder.cache_clear()


def test_the_ffmpeg_of_today_makes_video():
    ffmpeg.require_encoder()


def test_a_kind_of_place_is_looked_at_by_its_own_rules(tmp_path):
    (tmp_path / "file").write_text("kept")
    for kind in places.KINDS:
        with places.held([Place("--x", None, kind)]):
            pass
    with pytest.raises(InputError, match="--x .*file is no folder"):
        places.held([Place("--x", tmp_path / "file", "folder")]).__enter__()
    append_file.check_writable(tmp_path / "file", "It")
    assert (tmp_path / "file").read_text() == "kept"


# What other libraries raise


@pytest.mark.parametrize(
    ("error", "code", "named"),
    [
        (OSError(36, "File name too long", "n" * 400), 2, "File name too long; give a shorter one"),
        (OSError(40, "Too many levels of symbolic links", "a"), 2, "check its links"),
        (RuntimeError("Symlink loop from 'a/b'"), 2, "a/b: Too many levels of symbolic links"),
        (PermissionError(13, "Permission denied", "a"), 2, "a: Permission denied"),
        (OSError(28, "No space left on device", "a"), 3, "free space"),
        (RuntimeError("Unable to initialize backend 'tpu': no"), 2, "unset JAX_PLATFORMS"),
        (RuntimeError("Unknown backend: 'x' requested"), 2, "unset JAX_PLATFORMS"),
        (MachineError("the disk is full."), 3, "the disk is full."),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_foreign_failure_is_a_code_and_a_sentence(error, code, named):
    found = failures.outcome(error)
    assert found[0] == code
    assert named in found[1]
    assert len(found[1]) < 400


@pytest.mark.parametrize(
    "error", [RuntimeError("a defect"), ValueError("x"), OSError("x"), KeyError(1)]
)
def test_a_defect_keeps_its_traceback(error):
    assert failures.outcome(error) is None


def ran(*words, **environment):
    code = "import sys; from packforcing_jax.cli import main; sys.exit(main.main())"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        env=os.environ | environment,
        timeout=100,
    )


def test_a_device_that_is_not_there_is_named_by_the_variable_that_asks_for_it():
    done = ran("bench", "--repeats", "1", JAX_PLATFORMS="tpux")
    assert done.returncode == 2
    assert b"JAX_PLATFORMS=tpux names a device that is not here" in done.stderr
    assert done.stderr.count(b"\n") == 1
    found = ran("doctor", JAX_PLATFORMS="tpux").stdout.decode().splitlines()
    for name in ("devices", "memory", "weights", "attention"):
        (row,) = [line for line in found if f" {name}:" in line]
        assert "JAX_PLATFORMS=tpux" in row
        assert "remedy: unset JAX_PLATFORMS" in row


def test_a_console_without_a_character_shows_its_number(tmp_path):
    name = tmp_path / "größe.jsonl"
    done = ran("inspect", name, PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert b"gr\\xf6\\xdfe" in done.stderr
    assert b"Traceback" not in done.stderr


def test_attention_that_needs_a_gpu_is_told_before_the_first_block(tmp_path, capsys, folder):
    out = tmp_path / "v.mp4"
    words = ["--weights", folder, "--prompt", "a red disc", "--set", "attention=cudnn"]
    sentence = said_last(capsys, "sample", *words, "--blocks", "1", "--out", out)
    assert (
        sentence == "packforcing: attention=cudnn needs a GPU, and this is cpu; set attention=auto."
    )
    assert not out.exists()


def test_a_size_that_no_player_shows_is_refused():
    for size, scale, named in (
        ((3, 3), 1, "odd side"),
        ((385, 400), 1, "odd side"),
        ((20_000, 2), 1, "larger than the 16384"),
    ):
        with pytest.raises(InputError, match=named):
            video.check_size(size, scale)
    video.check_size((3, 3), 2)


def said_last(capsys, *words):
    assert main.main(list(map(str, words))) == 2
    return capsys.readouterr().err.splitlines()[-1]
