"""A video plays after every block, whatever ends the run, and gives back its settings."""

import contextlib
import dataclasses
import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import imageio.v3
import imageio_ffmpeg
import numpy as np
import pytest

from packforcing_jax.errors import InputError, MachineError
from packforcing_jax.io import ffmpeg, h264, video

WIDTH = 20
HEIGHT = 12
SCALE = 6


def to_floats(frames: np.ndarray) -> np.ndarray:
    """uint8 frames as float32 in [-1, 1]."""
    return np.asarray(frames, np.float32) / 127.5 - 1


def scene(count, start=0, width=WIDTH, height=HEIGHT):
    """uint8 frames: a gradient behind a bright bar whose column is the frame number."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    ground = np.stack([4 * columns, 5 * rows, 40 + 0 * rows], axis=-1).astype(np.uint8)
    frames = np.repeat(ground[None], count, axis=0)
    for i in range(count):
        frames[i, :, (start + i) % width] = 230
    return frames


def bars(shown, scale=SCALE):
    """The column of the bar in every frame of an enlarged `scene`."""
    return shown.mean(axis=(1, 3))[:, scale // 2 :: scale].argmax(axis=1).tolist()


def writer(path, **changes):
    return video.Writer(
        path, **({"fps": 16, "size": (WIDTH, HEIGHT), "settings": {}, "scale": SCALE} | changes)
    )


def timing(path):
    """(seconds, frames per second) that players see in the headers."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(path)]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    hours, minutes, seconds = map(
        float, re.search(r"Duration: (\d+):(\d+):([\d.]+)", said).groups()
    )
    return 3600 * hours + 60 * minutes + seconds, float(re.search(r"([\d.]+) fps", said).group(1))


def test_uint8_survives_the_way_to_floats_and_back():
    every = np.arange(256, dtype=np.uint8).reshape(1, 8, 32, 1).repeat(3, -1)
    floats = to_floats(every)
    assert floats.dtype == np.float32
    assert (floats.min(), floats.max()) == (-1, 1)
    np.testing.assert_array_equal(video.to_uint8(floats), every)
    assert video.to_uint8(np.float32([-7.0, 1.5])).tolist() == [0, 255]


def test_file_plays_after_every_block_with_every_frame_once_and_in_order(tmp_path):
    path = tmp_path / "new folder" / "a=b é.mp4"
    done = 0
    with writer(path) as out:
        for count in (3, 1, 1, 7):
            out.write(to_floats(scene(count, done)))
            done += count
            shown = video.read(path)
            assert shown.shape == (done, HEIGHT * SCALE, WIDTH * SCALE, 3)
            assert bars(shown) == list(range(done))
            assert timing(path) == (pytest.approx(done / 16, abs=0.01), 16)
    assert bars(video.read(path)) == list(range(12))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_one_long_write_equals_many_short_ones(tmp_path):
    count = h264.GROUP + 9
    with writer(tmp_path / "long.mp4") as out:
        out.write(scene(count))
        out.write(scene(5, count))
    assert bars(video.read(tmp_path / "long.mp4")) == [i % WIDTH for i in range(count + 5)]
    assert timing(tmp_path / "long.mp4")[0] == pytest.approx((count + 5) / 16, abs=0.01)


@pytest.mark.parametrize("fps", [16, 24000 / 1001])
@pytest.mark.parametrize("stopped", [1, 2, 3])
def test_continued_file_is_byte_for_byte_that_of_an_unbroken_run(tmp_path, fps, stopped):
    counts = (h264.GROUP + 9, 1, 5, 3)
    starts = np.cumsum((0, *counts)).tolist()
    blocks = [scene(count, start) for count, start in zip(counts, starts)]
    whole = tmp_path / "whole.mp4"
    broken = tmp_path / "broken.mp4"
    with writer(whole, fps=fps, settings={"seed": 3}) as out:
        for block in blocks:
            out.write(block)
            assert out.sync() == out.position
            assert out.position.bytes == whole.stat().st_size
        assert out.position == video.Position(
            bytes=whole.stat().st_size, frames=sum(counts), fragments=5
        )
    with writer(broken, fps=fps, settings={"seed": 3}) as out:
        for block in blocks[:stopped]:
            out.write(block)
        kept = dataclasses.asdict(out.sync())
        out.write(scene(4))  # not part of what was saved
    broken.write_bytes(broken.read_bytes() + b"torn")
    kept = video.Position(**json.loads(json.dumps(kept)))
    with writer(broken, fps=fps, settings={"seed": 3}, resume=kept) as out:
        assert out.position == kept
        assert bars(video.read(broken)) == [i % WIDTH for i in range(starts[stopped])]
        for block in blocks[stopped:]:
            out.write(block)
    assert broken.read_bytes() == whole.read_bytes()
    assert bars(video.read(broken)) == [i % WIDTH for i in range(sum(counts))]


def test_continuing_from_before_the_first_block_starts_anew(tmp_path):
    path = tmp_path / "a.mp4"
    with writer(path) as out:
        assert out.sync() == video.Position(0, 0, 0)
        out.write(scene(4))
        whole = path.read_bytes()
    with writer(path, resume=video.Position()) as out:
        assert path.read_bytes() == whole
        out.write(scene(4))
    assert path.read_bytes() == whole


def test_files_of_other_runs_are_not_continued_and_left_alone(tmp_path):
    path = tmp_path / "a.mp4"
    with writer(path) as out:
        out.write(scene(5))
        kept = out.sync()
        out.write(scene(5, 5))
    whole = path.read_bytes()
    with writer(tmp_path / "other.mp4", scale=20, settings={"prompts": ["another"] * 99}) as out:
        out.write(scene(7))
        out.write(scene(30))
    other = (tmp_path / "other.mp4").read_bytes()
    assert len(other) > len(whole)
    strangers = {
        b"": "has 0 bytes",
        whole[: kept.bytes - 1]: f"has {kept.bytes - 1} bytes, but {kept.bytes} were",
        other: "is not the file of the run",
        9 * b"years of work" * len(whole): "is not the file",
    }
    for content, reason in strangers.items():
        path.write_bytes(content)
        with pytest.raises(
            InputError, match=f"a.mp4 .*{reason}.* put that file back or start anew"
        ):
            writer(path, resume=kept)
        assert path.read_bytes() == content
    path.write_bytes(whole)
    for fragments in (0, kept.fragments + 1):
        with pytest.raises(InputError, match="is not the file of the run"):
            writer(path, resume=dataclasses.replace(kept, fragments=fragments))
    path.unlink()
    with pytest.raises(InputError, match="has 0 bytes"):
        writer(path, resume=kept)
    assert not path.exists()


def test_position_is_given_only_once_the_disk_has_it(tmp_path, monkeypatch):
    synced = []
    with writer(tmp_path / "a.mp4") as out:
        out.write(scene(3))
        monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
        assert out.sync().bytes == synced[0] == (tmp_path / "a.mp4").stat().st_size

        def refuse(_):
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(MachineError, match="Input/output error.; the first 3 frames are kept"):
            out.sync()


def test_fragments_are_numbered_and_timed_without_gaps(tmp_path):
    with writer(tmp_path / "a.mp4", fps=24000 / 1001) as out:
        for start in (0, 4, 8):
            out.write(scene(4, start))
    kinds = list(video.boxes((tmp_path / "a.mp4").read_bytes()))
    assert [kind for kind, _ in kinds] == [b"ftyp", b"moov"] + 3 * [b"moof", b"mdat"]
    fragments = [box for kind, box in kinds if kind == b"moof"]
    numbers = [int.from_bytes(box[box.index(b"mfhd") + 8 :][:4]) for box in fragments]
    starts = [int.from_bytes(box[box.index(b"tfdt") + 8 :][:8]) for box in fragments]
    assert numbers == [1, 2, 3]
    assert starts == [0, 4 * 1001 * h264.TICKS, 8 * 1001 * h264.TICKS]
    assert timing(tmp_path / "a.mp4")[0] == pytest.approx(12 * 1001 / 24000, abs=0.01)


@pytest.mark.parametrize("scale", [SCALE, 7])
def test_pixels_keep_their_colours(tmp_path, scale):
    frames = np.random.default_rng(0).integers(16, 240, (3, HEIGHT, WIDTH, 3)).astype(np.uint8)
    with writer(tmp_path / "a.mp4", scale=scale) as out:
        out.write(frames)
    shown = video.read(tmp_path / "a.mp4")
    assert shown.shape == (3, HEIGHT * scale, WIDTH * scale, 3)
    centres = shown[:, scale // 2 :: scale, scale // 2 :: scale].astype(int)
    error = np.abs(centres - frames)
    assert error.mean() < 4
    assert np.quantile(error, 0.99) < 20
    assert np.abs(centres.mean(axis=(0, 1, 2)) - frames.mean(axis=(0, 1, 2))).max() < 1


def test_settings_come_back_however_long_and_odd(tmp_path):
    wanted = {
        "prompts": ["a = b; # c\\ d\n\t'\"é漢"] * 4000,
        "seed": 7,
        "nested": {"sizes": [1, 2.5, None, True]},
    }
    with writer(tmp_path / "a.mp4", settings=wanted) as out:
        out.write(scene(2))
        assert video.settings(tmp_path / "a.mp4") == wanted
        out.write(scene(2, 2))
    assert video.settings(tmp_path / "a.mp4") == wanted


def test_foreign_and_missing_videos_are_refused(tmp_path):
    plain = tmp_path / "plain.mp4"
    picture = ["-f", "lavfi", "-i", "color=red:size=64x64", "-frames:v", "3"]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *picture, plain], check=True)
    with pytest.raises(InputError, match="no settings"):
        video.settings(plain)
    (tmp_path / "text.mp4").write_text("not a video")
    for ask in (video.settings, video.read):
        with pytest.raises(InputError, match="absent.mp4 does not exist"):
            ask(tmp_path / "absent.mp4")
        with pytest.raises(InputError, match="text.mp4"):
            ask(tmp_path / "text.mp4")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.avi", "end in .mp4"),
        ("folder.mp4", "is a folder"),
        ("file.txt/b/a.mp4", "which is a file"),
        ("/proc/1/a.mp4", "not writable"),
        ("/proc/new/a.mp4", "not writable"),
    ],
)
def test_unwritable_path_is_refused_before_anything_happens(tmp_path, name, reason):
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=reason):
        writer(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before


def test_writable_path_is_left_alone_until_the_first_block(tmp_path):
    old = tmp_path / "old.mp4"
    old.write_text("yesterday")
    for path in (old, tmp_path / "x" / "y" / "new.mp4"):
        video.check_writable(path)
        with writer(path):
            pass
    assert [p.name for p in tmp_path.rglob("*")] == ["old.mp4"]
    assert old.read_text() == "yesterday"
    with writer(old) as out:
        out.write(scene(2))
    assert len(video.read(old)) == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"size": (21, 12), "scale": 3}, "odd side"),
        ({"fps": 0}, "fps=0"),
        ({"scale": 0}, "scale=0"),
    ],
)
def test_impossible_videos_are_refused(tmp_path, changes, reason):
    with pytest.raises(InputError, match=reason):
        writer(tmp_path / "a.mp4", **changes)


def test_frames_of_another_size_are_refused_and_the_rest_kept(tmp_path):
    with writer(tmp_path / "a.mp4") as out:
        out.write(scene(3))
        for wrong in (scene(2, width=22), scene(2)[0], scene(2)[:0]):
            with pytest.raises(InputError, match=r"give \[t, 12, 20, 3\]"):
                out.write(wrong)
    assert len(video.read(tmp_path / "a.mp4")) == 3


def test_full_disk_keeps_the_finished_part(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    noise = np.random.default_rng(1).integers(0, 255, (4, HEIGHT, WIDTH, 3)).astype(np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with writer(path) as out:
        out.write(noise)
        whole = path.read_bytes()
        try:  # room for one and a half blocks
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) * 3 // 2, limits[1]))
            with pytest.raises(MachineError, match="the first 4 frames are kept"):
                out.write(noise)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.read_bytes() == whole
        out.write(noise)  # room again
    assert len(video.read(path)) == 8


def test_first_block_that_fails_leaves_no_file(tmp_path):
    out = writer(tmp_path / "a.mp4")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # room for the header and a part of the block
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(out._header) + 200, limits[1]))
        with pytest.raises(MachineError, match="the first 0 frames are kept"):
            out.write(scene(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    out.close()
    assert list(tmp_path.iterdir()) == []


def test_one_encoder_makes_the_whole_video(tmp_path, monkeypatch):
    started = []
    start = ffmpeg.start
    monkeypatch.setattr(
        ffmpeg,
        "start",
        lambda *args, **kwargs: started.append(start(*args, **kwargs)) or started[-1],
    )
    with writer(tmp_path / "a.mp4") as out:
        assert len(started) == 1  # made the header, and is finished
        assert started[0].returncode == 0
        for first in range(0, 40, 4):
            out.write(scene(4, first))
            assert started[1].poll() is None
    assert len(started) == 2
    assert started[1].returncode == -signal.SIGKILL
    assert bars(video.read(tmp_path / "a.mp4")) == [i % WIDTH for i in range(40)]


@pytest.mark.parametrize("size", [(WIDTH, HEIGHT), (832, 480)])  # whole, and in slices
def test_encoder_that_was_killed_is_replaced_and_leaves_no_mark(tmp_path, size):
    pause = {"scale": SCALE if size[0] == WIDTH else 1, "size": size}
    blocks = [scene(3, first, *size) for first in range(0, 30, 3)]
    with writer(tmp_path / "whole.mp4", **pause) as out:
        for block in blocks:
            out.write(block)
    with writer(tmp_path / "patched.mp4", **pause) as out:
        for number, block in enumerate(blocks):
            out.write(block)
            if number in (0, 3, 4):
                out._encoder._process.kill()
                out._encoder._process.wait()
    assert (tmp_path / "patched.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_signals_do_not_reach_the_encoder(tmp_path):
    with writer(tmp_path / "a.mp4") as out:
        out.write(scene(3))
        encoder = out._encoder
        assert os.getsid(encoder._process.pid) == encoder._process.pid
        for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(encoder._process.pid, each)
        out.write(scene(3, 3))
        assert out._encoder is encoder
    assert bars(video.read(tmp_path / "a.mp4")) == list(range(6))


def stand_in(path, monkeypatch, script):
    """Makes `script` the ffmpeg program; in it, $FFMPEG is the real one."""
    monkeypatch.setenv("FFMPEG", imageio_ffmpeg.get_ffmpeg_exe())
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(path))


def when_encoding(script):
    """A program that does as ffmpeg does, but `script` where it is to encode a video."""
    return f'if [[ "$*" == *flv* ]]; then {script}; else exec "$FFMPEG" "$@"; fi'


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("/no/such/ffmpeg", "ffmpeg program /no/such/ffmpeg does not start .No such file"),
        ("/etc/passwd", "does not start .Permission denied"),
        ("/bin/false", "ffmpeg failed .exit status 1."),
        ("/bin/true", "/bin/true wrote no video"),
    ],
)
def test_program_that_is_no_encoder_is_refused_before_anything_happens(
    tmp_path, monkeypatch, program, reason
):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", program)
    with pytest.raises(MachineError, match=f"{reason}.*; install imageio.ffmpeg., whose ffmpeg"):
        writer(tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


def test_ffmpeg_without_the_codec_is_refused_with_its_own_words(tmp_path, monkeypatch):
    monkeypatch.setattr(h264, "X264", ["-c:v", "libx264_that_is_not_there"])
    with pytest.raises(MachineError, match="ffmpeg failed .*; install imageio.ffmpeg., whose"):
        writer(tmp_path / "a.mp4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ('echo "no more memory" >&2; exit 1', "ffmpeg failed .no more memory.; the finished part"),
        ("exit 0", "ffmpeg failed .exit status 0.; the finished part is kept"),
        ("sleep 600", "stood still for 1 s; the finished part is kept"),
        ("exec 0<&-; exec sleep 600", "stood still for 1 s; the finished part is kept"),
    ],
)
def test_encoder_that_fails_at_once_leaves_no_file(tmp_path, monkeypatch, script, reason):
    monkeypatch.setattr(h264, "PATIENCE", 1)
    stand_in(tmp_path / "program", monkeypatch, when_encoding(script))
    with pytest.raises(MachineError, match=reason), writer(tmp_path / "a.mp4") as out:
        out.write(scene(4))
    assert [path.name for path in tmp_path.iterdir()] == ["program"]


CUTTING = """
import os, subprocess, sys
left, process = int(sys.argv[1]), subprocess.Popen(sys.argv[2:], stdout=subprocess.PIPE)
while left > 0:
    piece = os.read(process.stdout.fileno(), left)
    left -= os.write(1, piece)
process.kill()
sys.exit("out of memory")
"""


def test_encoder_that_fails_in_a_block_costs_this_block_alone(tmp_path, monkeypatch):
    noise = np.random.default_rng(1).integers(0, 255, (6, 4, HEIGHT, WIDTH, 3)).astype(np.uint8)
    with writer(tmp_path / "whole.mp4") as out:
        for block in noise:
            out.write(block)
    whole = (tmp_path / "whole.mp4").read_bytes()
    path = tmp_path / "a.mp4"
    (tmp_path / "cutting.py").write_text(CUTTING)
    cut = f'exec {sys.executable} {tmp_path}/cutting.py {len(whole) // 2} "$FFMPEG" "$@"'
    stand_in(tmp_path / "program", monkeypatch, when_encoding(cut))
    failed = 0
    written = 0
    with writer(path) as out:
        while written < len(noise):
            try:
                out.write(noise[written])
            except MachineError as error:
                assert str(error) == "ffmpeg failed (out of memory); the finished part is kept."  # noqa: PT017
                failed += 1
            else:
                written += 1
            assert path.read_bytes() == whole[: out.position.bytes]
            assert out.frames == written * 4
    assert failed >= 1
    assert path.read_bytes() == whole


def test_video_of_another_encoder_is_not_continued(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    with writer(path) as out:
        out.write(scene(4))
        kept = out.sync()
    whole = path.read_bytes()
    monkeypatch.setattr(
        h264, "X264", [{"14": "20", "veryfast": "medium"}.get(each, each) for each in h264.X264]
    )
    with pytest.raises(InputError, match="a.mp4 was begun with another encoder"):
        writer(path, resume=kept)
    assert path.read_bytes() == whole


def test_block_that_is_cut_short_anywhere_does_not_show(tmp_path):
    path = tmp_path / "a.mp4"
    cut = tmp_path / "cut.mp4"

    class Dying:
        """A file of which a kill cuts the next write short; keeps what is on disk then."""

        def __init__(self, file, share):
            self.file = file
            self.share = share

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            self.file.write(data[: int(len(data) * self.share)])
            cut.write_bytes(path.read_bytes())
            raise KeyboardInterrupt

    with writer(path) as out:
        out.write(scene(3))
        whole = path.read_bytes()
        file = out._file.handle
        for share in (0.02, 0.05, 0.1, 0.3, 0.6, 0.9, 0.999, 1):
            out._file.handle = Dying(file, share)
            with pytest.raises(KeyboardInterrupt):
                out.write(scene(3, 3))
            out._file.handle = file
            assert cut.read_bytes().startswith(whole)
            assert len(cut.read_bytes()) > len(whole)
            assert bars(video.read(cut)) == [0, 1, 2]
            assert timing(cut)[0] == pytest.approx(3 / 16, abs=0.01)
        out.write(scene(3, 3))
    assert bars(video.read(path)) == list(range(6))


def test_writing_does_not_load_what_only_pictures_need():
    command = "import sys; from packforcing_jax.io import video; print('imageio.v3' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_interrupt_while_appending_keeps_whole_blocks(tmp_path):
    class Interrupted:
        """A file whose write stores half of what it gets, then meets Ctrl-C."""

        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            self.file.write(data[: len(data) // 2])
            raise KeyboardInterrupt

    path = tmp_path / "a.mp4"
    with writer(path) as out:
        out.write(scene(3))
        whole = path.read_bytes()
        file = out._file.handle
        out._file.handle = Interrupted(file)
        with pytest.raises(KeyboardInterrupt):
            out.write(scene(3, 3))
        out._file.handle = file
    assert path.read_bytes() == whole


PROGRAM = """
import signal, sys
import numpy as np
from packforcing_jax.io import video
frames = np.random.default_rng(0).integers(0, 255, (5, 12, 20, 3)).astype(np.uint8)
try:
    with video.Writer(sys.argv[1], fps=16, size=(20, 12), settings={"seed": 3}, scale=6) as out:
        while True:
            out.write(frames)
            print(out.frames, flush=True)
except KeyboardInterrupt:
    sys.exit(130)
"""


MARK = "PACKFORCING_TEST_OF"


def marked(path):
    """Processes that live and were started, however remotely, by a child that writes the video at `path`."""
    mark = f"{MARK}={path}".encode()
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in environ.read_bytes().split(b"\0"):
                found.append(int(environ.parent.name))
    return found


def gone(path):
    """Whether all of them end within some seconds."""
    until = time.monotonic() + 20
    while marked(path) and time.monotonic() < until:
        time.sleep(0.02)
    return not marked(path)


def start(program, path):
    """A child that runs `program` for the video at `path` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), str(path)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {MARK: str(path)},
    )


def run_until(path, frames, how, delay):
    """Exit status and last report of a process that wrote at least `frames` frames when its group was sent `how`."""
    child = start(PROGRAM, path)
    reported = 0
    while reported < frames:
        reported = int(child.stdout.readline())
    assert len(marked(path)) == 2  # the encoder is beside it
    time.sleep(delay)  # into the middle of the next block
    os.killpg(child.pid, how)  # as a terminal does
    rest, _ = child.communicate(timeout=30)
    return child.returncode, int((rest.split() or [reported])[-1])


@pytest.mark.parametrize(
    ("how", "status", "delay"),
    [
        (signal.SIGINT, 130, 0.01),
        (signal.SIGTERM, -signal.SIGTERM, 0.01),
        (signal.SIGHUP, -signal.SIGHUP, 0.01),
        *((signal.SIGKILL, -signal.SIGKILL, delay) for delay in (0, 0.001, 0.003, 0.01, 0.03)),
    ],
)
def test_stopped_process_leaves_a_video_of_every_finished_block(tmp_path, how, status, delay):
    path = tmp_path / "a.mp4"
    code, reported = run_until(path, 15, how, delay)
    assert code == status
    shown = video.read(path)
    assert len(shown) in (reported, reported + 5)  # the report follows the block
    assert video.settings(path) == {"seed": 3}
    assert gone(path)


LEAVING = """
import gc, os, signal, sys
import numpy as np
from packforcing_jax.io import video
out = video.Writer(sys.argv[1], fps=16, size=(20, 12), settings={}, scale=6)
out.write(np.random.default_rng(0).integers(0, 255, (5, 12, 20, 3)).astype(np.uint8))
%s
"""


@pytest.mark.parametrize(
    "end",
    [
        "",  # never closed
        "out.me = out; del out; gc.collect(); print('collected', flush=True); sys.stdin.read()",
        "raise RuntimeError",
        "os._exit(0)",
        "os.kill(os.getpid(), signal.SIGKILL)",
    ],
)
def test_no_encoder_outlives_its_writer(tmp_path, end):
    path = tmp_path / "a.mp4"
    child = start(LEAVING % end, path)
    if "collected" in end:
        assert child.stdout.readline() == "collected\n"
        assert marked(path) == [child.pid]
        child.kill()
    child.communicate(timeout=30)
    assert gone(path)
    assert len(video.read(path)) == 5


FORKING = """
import os, sys, time
import numpy as np
from packforcing_jax.io import video
frames = np.random.default_rng(0).integers(0, 255, (5, 12, 20, 3)).astype(np.uint8)
out = video.Writer(sys.argv[1], fps=16, size=(20, 12), settings={}, scale=6)
out.write(frames)
before = out._encoder
if os.fork() == 0:
    sys.exit(0)  # with all that a program does at its end
os.wait()
if (copy := os.fork()) == 0:
    before.stop()
    os.close(1)
    time.sleep(600)
out.write(frames)
assert out._encoder is before
print(copy, flush=True)
time.sleep(600)
"""


def test_forked_copies_neither_end_nor_hold_the_encoder(tmp_path):
    path = tmp_path / "a.mp4"
    child = start(FORKING, path)
    copy = int(child.stdout.readline())
    try:
        assert len(marked(path)) == 3
        child.kill()
        child.communicate(timeout=30)
        until = time.monotonic() + 20
        while marked(path) != [copy] and time.monotonic() < until:
            time.sleep(0.02)
        assert marked(path) == [copy]
    finally:
        os.kill(copy, signal.SIGKILL)
    assert len(video.read(path)) == 10


PATIENT = """
import os, signal, sys
import numpy as np
from packforcing_jax.io import video
with video.Writer(sys.argv[1], fps=16, size=(20, 12), settings={}, scale=6) as out:
    signal.signal(signal.SIGINT, lambda *_: None)
    for _ in range(6):
        print(out.frames, flush=True)
        out.write(np.random.default_rng(0).integers(0, 255, (5, 12, 20, 3)).astype(np.uint8))
os._exit(0)
"""


def test_interrupt_does_not_reach_the_encoder_of_a_program_that_finishes_first(tmp_path):
    child = start(PATIENT, tmp_path / "a.mp4")
    child.stdout.readline()
    while child.poll() is None:
        os.killpg(child.pid, signal.SIGINT)
        time.sleep(0.005)
    child.communicate()
    assert child.returncode == 0
    assert len(video.read(tmp_path / "a.mp4")) == 30


def test_torn_tail_costs_only_the_last_block(tmp_path):
    path = tmp_path / "a.mp4"
    with writer(path) as out:
        for start in (0, 4, 8):
            out.write(scene(4, start))
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    assert bars(video.read(path))[:8] == list(range(8))
    last = max(i for i in range(len(whole)) if whole[i : i + 4] == b"moof")
    path.write_bytes(whole[: last + 30])
    assert bars(video.read(path)) == list(range(8))
    with pytest.raises(MachineError, match="broken"):
        list(video.boxes(whole[:-40]))


def test_guard_passes_pictures_even_dark_ones():
    video.guard(to_floats(scene(4)))
    dark = np.full((3, 6, 10, 3), -1, np.float32)
    dark[:, 2:4, 3:5, 1] = -0.8
    video.guard(dark)
    black_then_picture = np.concatenate(
        [np.full((2, HEIGHT, WIDTH, 3), -1, np.float32), to_floats(scene(1))]
    )
    video.guard(black_then_picture)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_guard_names_the_first_frame_that_is_not_finite(value):
    frames = to_floats(scene(5))
    frames[4, 0, 0, 0] = value
    frames[3, 11, 19, 2] = value
    with pytest.raises(MachineError, match="Frame 43 holds values that are not finite"):
        video.guard(frames, first=40)


@pytest.mark.parametrize("colour", [(-1, -1, -1), (0.003, 0.003, 0.003), (0.9, -0.4, 0.1)])
def test_guard_refuses_a_block_of_one_flat_colour(colour):
    frames = (
        np.broadcast_to(np.float32(colour), (4, 7, 9, 3))
        + np.float32(1e-4) * np.indices((4, 7, 9, 3))[2] / 9
    )
    with pytest.raises(MachineError, match="Frames 8 to 11 are one flat colour"):
        video.guard(frames, first=8)


def test_contact_sheet_shows_chosen_frames_in_reading_order(tmp_path):
    frames = scene(11)
    video.contact_sheet(frames, tmp_path / "new" / "sheet.png", columns=3, every=3)
    sheet = imageio.v3.imread(tmp_path / "new" / "sheet.png")
    assert sheet.shape == (2 * HEIGHT, 3 * WIDTH, 3)
    tiles = [sheet[r * HEIGHT :, c * WIDTH :][:HEIGHT, :WIDTH] for r in range(2) for c in range(3)]
    for tile, frame in zip(tiles, frames[::3]):
        np.testing.assert_array_equal(tile, frame)
    assert tiles[4].max() == tiles[5].max() == 0
    with pytest.raises(InputError, match="end in .png"):
        video.contact_sheet(frames, tmp_path / "sheet.jpg")
    with pytest.raises(InputError, match="not writable"):
        video.contact_sheet(frames, "/proc/new/sheet.png")
