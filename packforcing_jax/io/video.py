"""Frames to video files that play at every moment while they grow, and back.

Every block is encoded by its own short ffmpeg run and appended as MP4 fragments. So when `write` returns the block is
on disk, no encoder is alive between blocks, and a process that dies can cost at most the block being written.
"""

import contextlib
import itertools
import json
import mmap
import signal
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import einops
import imageio.v3
import imageio_ffmpeg
import numpy as np

from packforcing_jax.errors import InputError, MachineError, require
from packforcing_jax.io import append_file, atomic

TICKS = 1000  # of the file's clock, per frame
GREY_LEVEL = 2 / 255  # one 8-bit step on the scale [-1, 1]
GROUP = 48  # frames between key frames inside one long write
COLOURS = (
    "-colorspace",
    "bt709",
    "-color_primaries",
    "bt709",
    "-color_trc",
    "bt709",
    "-color_range",
    "tv",
)
FRAGMENTS = "+frag_keyframe+empty_moov+default_base_moof+skip_trailer"
H264 = (
    "-c:v",
    "libx264",
    "-preset",
    "veryfast",
    "-crf",
    "14",
    "-bf",
    "0",
    "-g",
    str(GROUP),
    "-pix_fmt",
    "yuv420p",
    *COLOURS,
    "-movflags",
    FRAGMENTS,
    "-f",
    "mp4",
)
TO_YUV = "scale=flags=area+accurate_rnd+full_chroma_int:out_color_matrix=bt709:out_range=tv"
TO_RGB = "scale=flags=bilinear+accurate_rnd+full_chroma_int+full_chroma_inp"


def to_uint8(frames) -> np.ndarray:
    """Frames in [-1, 1] as uint8, clipped; uint8 frames pass through."""
    frames = np.asarray(frames)
    if frames.dtype == np.uint8:
        return frames
    return np.clip(np.rint((frames.astype(np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


def from_uint8(frames: np.ndarray) -> np.ndarray:
    """uint8 frames as float32 in [-1, 1]; `to_uint8` gives them back exactly."""
    return np.asarray(frames, np.float32) / 127.5 - 1


def guard(frames, first: int = 0) -> None:
    """Raises `MachineError` if a frame [t,h,w,3] in [-1, 1] is not finite or the block is blank; `first` counts on.

    A block is blank when each colour of each of its frames spreads less than half an 8-bit level: one flat colour.
    """
    frames = np.asarray(frames, np.float32)
    broken = np.flatnonzero(~np.isfinite(frames).all(axis=(1, 2, 3)))
    if broken.size:
        raise MachineError(
            f"Frame {first + broken[0]} holds values that are not finite; what came before it is kept."
        )
    if (frames.std(axis=(1, 2), dtype=np.float64) < GREY_LEVEL / 2).all():
        last, colour = first + len(frames) - 1, to_uint8(frames[0, 0, 0]).tolist()
        raise MachineError(
            f"Frames {first} to {last} are one flat colour {colour}; what came before them is kept."
        )


def check_writable(path) -> None:
    """Raises `InputError` unless a video can be written at `path`; leaves nothing behind."""
    suffix = Path(path).suffix
    require(
        suffix.lower() == ".mp4", f"Video path {path} does not end in .mp4; give it that suffix."
    )
    append_file.check_writable(path, "Video path")


def boxes(stream: bytes | mmap.mmap) -> Iterator[tuple[bytes, bytes]]:
    """The (kind, whole box) pairs an MP4 byte stream consists of."""
    at = 0
    while at < len(stream):
        size, kind = struct.unpack_from(">I4s", stream, at)
        header = 8
        if size == 1:
            size, header = struct.unpack_from(">Q", stream, at + 8)[0], 16
        if size < header or at + size > len(stream):
            raise MachineError(
                f"The video encoder wrote a broken {kind!r} box; the finished part is kept."
            )
        yield kind, stream[at : at + size]
        at += size


def placed(fragment: bytes, number: int, ticks: int) -> bytes:
    """A `moof` box that is fragment `number` of its file and starts `ticks` later than it says."""
    moved = bytearray(fragment)
    struct.pack_into(">I", moved, fragment.index(b"mfhd") + 8, number)
    clock = (
        fragment.index(b"tfdt") + 8
    )  # after the kind come version and flags; ffmpeg writes the 64-bit version
    struct.pack_into(">Q", moved, clock, struct.unpack_from(">Q", fragment, clock)[0] + ticks)
    return bytes(moved)


def encoder() -> str:
    """Path of the ffmpeg program."""
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise MachineError(
            "No ffmpeg program was found; install imageio[ffmpeg], which brings one."
        ) from error


def _ffmpeg(arguments: list[str], data: bytes | None = None) -> bytes:
    """Standard output of one ffmpeg run."""
    command = [encoder(), "-nostdin", "-hide_banner", "-v", "error", "-y", *arguments]
    done = subprocess.run(command, input=data, capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [
            f"exit status {done.returncode}"
        ]
        raise MachineError(f"ffmpeg failed ({said[-1]}); the finished part is kept.")
    return done.stdout


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Keeps Ctrl-C and termination from this thread and from the programs it starts until the body is done."""
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    )
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _escaped(text: str) -> str:
    """`text` as a value of ffmpeg's metadata format."""
    return "".join("\\" + letter if letter in "=;#\\\n" else letter for letter in text)


def encode(frames: np.ndarray, fps: float, comment: str) -> bytes:
    """uint8 frames [t,h,w,3] as one complete fragmented H.264 MP4 without trailer, `comment` in its metadata."""
    _, height, width, _ = frames.shape
    rate = Fraction(fps).limit_denominator(1001)
    with tempfile.TemporaryDirectory(
        prefix="packforcing-"
    ) as folder:  # a pipe cannot hold a header above 32 KiB
        notes, target = Path(folder, "notes.txt"), Path(folder, "block.mp4")
        notes.write_text(f";FFMETADATA1\ncomment={_escaped(comment)}\n", encoding="utf-8")
        source = [
            "-f",
            "rawvideo",
            "-pix_fmt",
            "rgb24",
            "-s",
            f"{width}x{height}",
            "-r",
            str(rate),
            "-i",
            "pipe:0",
        ]
        source += ["-f", "ffmetadata", "-i", str(notes), "-map", "0:v", "-map_metadata", "1"]
        clock = ["-video_track_timescale", str(rate.numerator * TICKS)]
        _ffmpeg(
            [*source, "-vf", TO_YUV, *clock, *H264, str(target)],
            np.ascontiguousarray(frames).tobytes(),
        )
        return target.read_bytes()


@dataclass(frozen=True)
class Position:
    """How far a video file has been written: all that is needed to go on with it."""

    bytes: int = 0
    frames: int = 0
    fragments: int = 0


class Writer:
    """A growing MP4 of `size` (width, height) frames, each pixel shown as `scale` x `scale`, settings kept inside.

    Nothing is created before the first `write`; a file already at `path` is replaced then. Whatever ends the block,
    an error, Ctrl-C or a kill, the file holds every block whose `write` returned. `resume`, a `position` of an earlier
    writer, cuts the file at `path` back to there and goes on: the result is byte for byte that of an unbroken run.
    """

    def __init__(
        self,
        path,
        *,
        fps: float,
        size: tuple[int, int],
        settings: dict,
        scale: int = 1,
        resume: Position | None = None,
    ):
        require(scale >= 1, f"scale={scale} must be 1 or more.")
        require(fps > 0, f"fps={fps} must be above 0.")
        require(
            all(side > 0 and side * scale % 2 == 0 for side in size),
            f"Video of {size[0]}x{size[1]} pixels at scale {scale} has an odd side, which H.264 players refuse; "
            "use an even scale.",
        )
        check_writable(path)
        encoder()
        self.path, self.fps, self.size, self.scale = Path(path), fps, size, scale
        self.comment = json.dumps(settings)
        self.position = resume or Position()
        if self.position.bytes:
            _check_same_file(self.path, self.position)
        self._file = append_file.File(self.path, self.position.bytes)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def frames(self) -> int:
        """Frames written so far."""
        return self.position.frames

    def write(self, frames) -> None:
        """Appends frames [t,h,w,3] (float in [-1, 1] or uint8); they are on disk and play when this returns."""
        frames = to_uint8(frames)
        width, height = self.size
        fits = frames.ndim == 4 and frames.shape[1:] == (height, width, 3) and len(frames) > 0
        require(
            fits,
            f"Frames {frames.shape} do not fit a {width}x{height} video; give [t, {height}, {width}, 3].",
        )
        shown = einops.repeat(frames, "t h w c -> t (h a) (w b) c", a=self.scale, b=self.scale)
        with _signals_wait():
            try:
                self._append(
                    encode(shown, self.fps, "" if self.position.bytes else self.comment),
                    len(frames),
                )
            except OSError as error:
                raise self._failed(error) from error

    def sync(self) -> Position:
        """The position, once everything up to it is on the disk itself."""
        try:
            self._file.sync()
        except OSError as error:
            raise self._failed(error) from error
        return self.position

    def _failed(self, error: OSError) -> MachineError:
        return MachineError(
            f"Writing {self.path} failed ({error.strerror}); "
            f"the first {self.frames} frames are kept in it."
        )

    def _append(self, stream: bytes, frames: int) -> None:
        """Adds the fragments of `stream`, and its header to an empty file; a failure leaves the file as it was."""
        at = self.position
        numbers = itertools.count(at.fragments + 1)
        start = Fraction(at.frames) * TICKS * Fraction(self.fps).limit_denominator(1001).denominator
        added = b"".join(
            placed(box, next(numbers), int(start)) if kind == b"moof" else box
            for kind, box in boxes(stream)
            if at.bytes == 0 or kind in (b"moof", b"mdat")
        )
        self._file.append(added)
        self.position = Position(self._file.size, at.frames + frames, next(numbers) - 1)

    def close(self) -> None:
        """Ends the file; without a single block written there is none."""
        self._file.close()


def _check_same_file(path: Path, at: Position) -> None:
    """Raises `InputError` unless the file at `path` begins as a run left it that had written up to `at`."""
    size = path.stat().st_size if path.exists() else 0
    require(
        size >= at.bytes,
        f"Video {path} has {size} bytes, but {at.bytes} were written by the run to continue; "
        "put that file back or start anew.",
    )
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), at.bytes, access=mmap.ACCESS_READ) as start,
        ):
            fragments = sum(kind == b"moof" for kind, _ in boxes(start))
    except MachineError:
        fragments = None
    require(
        fragments == at.fragments,
        f"Video {path} ({size} bytes) is not the file of the run to continue; "
        "put that file back or start anew.",
    )


def _existing(path) -> str:
    """`path` in the form in which ffmpeg takes it for a file whatever its letters."""
    require(Path(path).is_file(), f"Video {path} does not exist; check the path.")
    return f"file:{path}"


def settings(path) -> dict:
    """The settings stored inside a video by `Writer`."""
    source = _existing(path)
    try:
        text = _ffmpeg(["-i", source, "-f", "ffmetadata", "-"]).decode()
        line = next(
            line for line in text.replace("\\\n", "\n").split("\n") if line.startswith("comment=")
        )
        return json.loads(_unescaped(line.removeprefix("comment=")))
    except (MachineError, StopIteration, ValueError) as error:
        raise InputError(
            f"Video {path} holds no settings; give a file written by packforcing."
        ) from error


def _unescaped(value: str) -> str:
    """The text that `_escaped` was given."""
    letters = iter(value)
    return "".join(next(letters, "") if letter == "\\" else letter for letter in letters)


def read(path) -> np.ndarray:
    """All frames of a video that decode, as uint8 [t,h,w,3]."""
    source = _existing(path)
    try:
        stream = _ffmpeg(
            [
                "-i",
                source,
                "-vf",
                TO_RGB,
                "-fps_mode",
                "passthrough",
                "-c:v",
                "ppm",
                "-f",
                "image2pipe",
                "-",
            ]
        )
        width, height = (int(side) for side in stream.split(b"\n", 2)[1].split())
    except (MachineError, IndexError) as error:
        raise InputError(f"Video {path} cannot be decoded; give a complete video file.") from error
    header = len(f"P6\n{width} {height}\n255\n")
    frames = np.frombuffer(stream, np.uint8).reshape(-1, header + height * width * 3)[:, header:]
    return einops.rearrange(frames, "t (h w c) -> t h w c", h=height, c=3)


def contact_sheet(frames, path, *, columns: int = 8, every: int = 1) -> None:
    """Writes one PNG with every `every`-th frame, `columns` to a row; missing places stay black."""
    path, chosen = Path(path), to_uint8(frames)[::every]
    require(
        path.suffix.lower() == ".png",
        f"Contact sheet {path} does not end in .png; give it that suffix.",
    )
    require(len(chosen) > 0, f"Contact sheet {path} would be empty; give at least one frame.")
    missing = -len(chosen) % columns
    filled = np.concatenate([chosen, np.zeros((missing, *chosen.shape[1:]), np.uint8)])
    try:
        with atomic.file(path) as fresh:
            imageio.v3.imwrite(
                fresh,
                einops.rearrange(
                    filled, "(row column) h w c -> (row h) (column w) c", column=columns
                ),
            )
    except OSError as error:
        raise InputError(
            f"Contact sheet {path} is not writable ({error.strerror}); choose another folder."
        ) from error
