"""Frames to video files that play at every moment while they grow, and back.

Every block is encoded at once and appended as MP4 fragments. So when `write` returns the block is on disk, and a
process that dies can cost at most the block being written.
"""

import contextlib
import dataclasses
import json
import mmap
import re
import signal
import struct
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, NamedTuple

import einops
import numpy as np

from packforcing_jax.errors import InputError, MachineError, brief, require
from packforcing_jax.io import append_file, atomic, ffmpeg, h264

GREY_LEVEL = 2 / 255  # one 8-bit step on the scale [-1, 1]
LARGEST = 16384  # pixels of a side
KEY_SAMPLE = 0x02000000
OTHER_SAMPLE = 0x01010000  # flags of ISO/IEC 14496-12: depends on no other, on others
TO_RGB = "scale=flags=bilinear+accurate_rnd+full_chroma_int+full_chroma_inp"
TO_PPM = ["-vf", TO_RGB, "-fps_mode", "passthrough", "-c:v", "ppm", "-f", "image2pipe", "-"]
STREAMED = 1 << 26  # bytes of frames that `stream` gives at once
NOTE = uuid.UUID("6b3d0f2e-8a41-5c57-9d0c-7061636b6e74").bytes  # of boxes with a note about a block


def to_uint8(frames) -> np.ndarray:
    """Frames in [-1, 1] as uint8, clipped; uint8 frames pass through."""
    frames = np.asarray(frames)
    if frames.dtype == np.uint8:
        return frames
    return np.clip(np.rint((frames.astype(np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


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
    if len(frames) and (frames.std(axis=(1, 2), dtype=np.float64) < GREY_LEVEL / 2).all():
        last = first + len(frames) - 1
        colour = to_uint8(frames[0, 0, 0]).tolist()
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


def check_size(size: tuple[int, int], scale: int) -> None:
    """Raises `InputError` unless a video of `size` (width, height), shown `scale` times as large, can be made."""
    require(scale >= 1, f"scale={scale} must be 1 or more.")
    require(
        all(side > 0 and side * scale % 2 == 0 for side in size),
        f"Video of {size[0]}x{size[1]} pixels at scale {scale} has an odd side, which H.264 players refuse; "
        "use an even scale or an even size.",
    )
    require(
        all(side * scale <= LARGEST for side in size),
        f"Video of {size[0]}x{size[1]} pixels at scale {scale} is larger than the {LARGEST} that H.264 takes; "
        "make it smaller.",
    )


def boxes(stream: bytes | mmap.mmap) -> Iterator[tuple[bytes, bytes]]:
    """The (kind, whole box) pairs an MP4 byte stream consists of."""
    at = 0
    while at < len(stream):
        size, kind = struct.unpack_from(">I4s", stream, at)
        header = 8
        if size == 1:
            size = struct.unpack_from(">Q", stream, at + 8)[0]
            header = 16
        if size < header or at + size > len(stream):
            raise MachineError(
                f"The video encoder wrote a broken {kind!r} box; the finished part is kept."
            )
        yield kind, stream[at : at + size]
        at += size


def box(kind: bytes, *parts: bytes) -> bytes:
    """An MP4 box."""
    return struct.pack(">I4s", 8 + sum(map(len, parts)), kind) + b"".join(parts)


def fragment(samples: Sequence[h264.Sample], number: int, start: int, duration: int) -> bytes:
    """`moof` and `mdat` with samples of which the first is a key frame; times in ticks of the file's clock."""
    # flags of tfhd: offsets count from moof, a duration and flags for all samples; of trun: offset of the data, flags
    # of the first sample, a size for each
    track = box(b"tfhd", struct.pack(">4I", 0x020028, 1, duration, OTHER_SAMPLE))
    clock = box(b"tfdt", struct.pack(">IQ", 0x01000000, start))
    sizes = [len(sample.data) for sample in samples]

    def moof(size: int) -> bytes:
        fields = (0x000205, len(sizes), size + 8, KEY_SAMPLE)  # data begin behind the head of mdat
        run = box(b"trun", struct.pack(f">4I{len(sizes)}I", *fields, *sizes))
        numbered = box(b"mfhd", struct.pack(">II", 0, number))
        return box(b"moof", numbered, box(b"traf", track, clock, run))

    return moof(len(moof(0))) + box(b"mdat", *(sample.data for sample in samples))


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


@dataclass(frozen=True)
class Position:
    """How far a video file has been written: all that is needed to go on with it."""

    bytes: int = 0
    frames: int = 0
    fragments: int = 0


def fragments(
    samples: Sequence[h264.Sample], picture: h264.Picture, at: Position
) -> tuple[bytes, Position]:
    """(a block's fragments, one for each key frame, and the position behind them in a video that is at `at`)."""
    duration = picture.rate.denominator * h264.TICKS
    keys = [number for number, sample in enumerate(samples) if sample.key]
    ends = [*keys[1:], len(samples)]
    block = b"".join(
        fragment(samples[key:end], at.fragments + group, (at.frames + key) * duration, duration)
        for group, (key, end) in enumerate(zip(keys, ends), start=1)
    )
    return block, Position(
        at.bytes + len(block), at.frames + len(samples), at.fragments + len(keys)
    )


def picture_of(size: tuple[int, int], scale: int, fps: float) -> h264.Picture:
    """What is encoded of frames of `size` (width, height) at `fps`, each pixel shown as `scale` x `scale`."""
    return h264.Picture(*size, scale, Fraction(fps).limit_denominator(1001))


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
        require(fps > 0, f"fps={fps} must be above 0.")
        check_size(size, scale)
        check_writable(path)
        self.path = Path(path)
        self.fps = fps
        self.size = size
        self.scale = scale
        self.position = resume or Position()
        self._encoder = None
        self._picture = picture_of(size, scale, fps)
        try:
            self._header = h264.header(self._picture, json.dumps(settings))
        except OSError as error:
            raise self._failed(error) from error
        if self.position.bytes:
            _check_same_file(self.path, self.position, h264.config(self._header))
        self._file = append_file.File(self.path, self.position.bytes)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def frames(self) -> int:
        """Frames written so far."""
        return self.position.frames

    def write(self, frames, note: Mapping[str, object] | None = None) -> None:
        """Appends frames [t,h,w,3] (float in [-1, 1] or uint8); they are on disk and play when this returns.

        A `note` for JSON lies before them, for `notes` to read; players pass over it.
        """
        frames = to_uint8(frames)
        width, height = self.size
        fits = frames.ndim == 4 and frames.shape[1:] == (height, width, 3) and len(frames) > 0
        require(
            fits,
            f"Frames {frames.shape} do not fit a {width}x{height} video; give [t, {height}, {width}, 3].",
        )
        with _signals_wait():
            try:
                self._append(self._encoded(frames), note)
            except BaseException as error:
                self._stop()  # it is ahead of the file
                if isinstance(error, OSError):
                    raise self._failed(error) from error
                raise

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

    def _encoded(self, frames: np.ndarray) -> list[h264.Sample]:
        """The samples of a block. The process is a new one where there is none for blocks of this length."""
        if self._encoder is None or not self._encoder.goes_on(len(frames)):
            self._stop()
            at = self.position
            self._encoder = h264.Encoder(
                self._picture, block=len(frames), frames=at.frames, keys=at.fragments
            )
            if self._encoder.config != h264.config(self._header):
                raise MachineError(f"ffmpeg does not encode as it did before; {ffmpeg.KEPT}.")
        samples = self._encoder.encode(frames)
        if not samples[0].key:
            raise MachineError(f"ffmpeg began a block without a key frame; {ffmpeg.KEPT}.")
        return samples

    def _append(self, samples: list[h264.Sample], note: Mapping[str, object] | None = None) -> None:
        """Adds a block, and its header to an empty file; a failure leaves the file as it was."""
        at = self.position
        block, end = fragments(samples, self._picture, at)
        if note is not None:
            block = box(b"uuid", NOTE, json.dumps(note).encode()) + block
        if at.bytes == 0:
            self._file.append(self._header + block)
        else:  # players skip what is not there as a whole
            self._file.append(block, cover=struct.pack(">I4s", len(block), b"free"))
        self.position = dataclasses.replace(end, bytes=self._file.size)

    def _stop(self) -> None:
        if self._encoder is not None:
            self._encoder.stop()
            self._encoder = None

    def close(self) -> None:
        """Ends the file; without a single block written there is none."""
        self._stop()
        self._file.close()


def _check_same_file(path: Path, at: Position, config: bytes) -> None:
    """Raises `InputError` unless the file at `path` begins as a run left it that had written up to `at`.

    `config` is the decoder configuration that further blocks need.
    """
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
            begun = next((h264.config(moov) for kind, moov in boxes(start) if kind == b"moov"), b"")
            fragments = sum(kind == b"moof" for kind, _ in boxes(start))
    except (MachineError, ValueError):
        fragments = None
        begun = b""
    require(
        fragments == at.fragments,
        f"Video {path} ({size} bytes) is not the file of the run to continue; "
        "put that file back or start anew.",
    )
    require(
        begun == config,
        f"Video {path} was begun with another encoder, size or rate; go on with those or start anew.",
    )


def _existing(path) -> str:
    """`path` in the form in which ffmpeg takes it for a file whatever its letters."""
    require(Path(path).is_file(), f"Video {path} does not exist; check the path.")
    return f"file:{path}"


def settings(path) -> dict:
    """The settings stored inside a video by `Writer`."""
    source = _existing(path)
    try:
        text = ffmpeg.run(["-i", source, "-f", "ffmetadata", "-"]).decode()
        line = next(
            line for line in text.replace("\\\n", "\n").split("\n") if line.startswith("comment=")
        )
        return json.loads(_unescaped(line.removeprefix("comment=")))
    except (MachineError, StopIteration, ValueError) as error:
        raise InputError(
            f"Video {path} holds no settings; give a file written by packforcing."
        ) from error


class Noted(NamedTuple):
    """A note about a block, and how far the file had been written before it and after it."""

    note: dict
    before: Position
    after: Position


def notes(path) -> list[Noted]:
    """The notes of a video's blocks, in order, with their places; a block that a kill cut off is not among them.

    Raises `InputError` for a file without any.
    """
    _existing(path)
    found: list[Noted] = []
    at = Position()
    try:
        with (
            Path(path).open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            for kind, whole in boxes(content):
                size = at.bytes + len(whole)
                if kind == b"uuid" and whole[8 : 8 + len(NOTE)] == NOTE:
                    note = json.loads(whole[8 + len(NOTE) :])
                    start = at if found else Position()
                    found.append(Noted(note, start, start))
                    at = dataclasses.replace(at, bytes=size)
                    continue
                samples = _samples(whole) if kind == b"moof" else 0
                at = Position(size, at.frames + samples, at.fragments + (kind == b"moof"))
                if kind == b"mdat" and found:
                    found[-1] = found[-1]._replace(after=at)
    except (MachineError, OSError, ValueError, struct.error):  # as far as it goes
        pass
    whole_ones = [each for each in found if each.after.frames > each.before.frames]
    require(
        len(whole_ones) > 0,
        f"Video {path} holds no notes of its blocks; give a file written by packforcing.",
    )
    return whole_ones


def _samples(moof: bytes) -> int:
    """How many samples the fragment that begins with these bytes has."""
    return struct.unpack_from(">I", moof, moof.index(b"trun") + 8)[0]


def _unescaped(value: str) -> str:
    """The text that ffmpeg was given as a value of its metadata format."""
    letters = iter(value)
    return "".join(next(letters, "") if letter == "\\" else letter for letter in letters)


def read(path) -> np.ndarray:
    """All frames of a video that decode, as uint8 [t,h,w,3]."""
    source = _existing(path)
    try:
        stream = ffmpeg.run(["-i", source, *TO_PPM])
        width, height = (int(side) for side in stream.split(b"\n", 2)[1].split())
    except (MachineError, IndexError) as error:
        raise InputError(f"Video {path} cannot be decoded; give a complete video file.") from error
    header = len(f"P6\n{width} {height}\n255\n")
    frames = np.frombuffer(stream, np.uint8).reshape(-1, header + height * width * 3)[:, header:]
    return einops.rearrange(frames, "t (h w c) -> t h w c", h=height, c=3)


class Probe(NamedTuple):
    """How many frames a video file lists, how many it shows a second (0 of fewer than two), and (width, height)."""

    frames: int
    fps: float
    size: tuple[int, int]


def probe(path) -> Probe:
    """What a video file says about its frames; nothing is decoded.

    Raises `InputError` for a file that is no video, or one that does not say when its frames are shown.
    """
    source = _existing(path)
    try:
        listed = ffmpeg.run(
            ["-i", source, "-map", "0:v:0", "-c", "copy", "-f", "framecrc", "-"]
        ).decode()
        facts = dict(re.findall(r"^#(\w+) 0: (.+)$", listed, re.MULTILINE))
        width, height = map(int, facts["dimensions"].split("x"))
        rows = [line.split(",") for line in listed.splitlines() if line[:1].isdigit()]
        times = [int(row[2]) for row in rows]
        unit = Fraction(facts["tb"])
    except (MachineError, LookupError, ValueError) as error:
        raise _undecodable(path, error) from error
    span = (max(times) - min(times)) * unit if times else 0
    require(
        len(times) < 2 or span > 0,
        f"Video {path} does not say when its frames are shown; convert it to MP4.",
    )
    fps = float((len(times) - 1) / span) if span else 0.0
    return Probe(len(times), fps, (width, height))


def stream(path, most: int = STREAMED) -> Iterator[np.ndarray]:
    """The frames of a video in order, as uint8 [t,h,w,3] of at most `most` bytes, or of one frame.

    Raises `InputError` for a file that does not decode, and at the end for one that decodes with errors.
    """
    source = _existing(path)
    with ffmpeg.start(["-i", source, *TO_PPM]) as process:
        _, out, stderr = ffmpeg.streams(process)
        said: list[bytes] = []
        listener = threading.Thread(target=lambda: said.append(stderr.read()), daemon=True)
        listener.start()
        try:
            block: list[np.ndarray] = []
            while (frame := _next_frame(out)) is not None:
                block.append(frame)
                if (len(block) + 1) * frame.nbytes > most:
                    yield np.stack(block)
                    block = []
            status = process.wait()
            listener.join()
            if status or said[0].strip():
                raise _undecodable(path, ffmpeg.failure(said[0], status))
            if block:
                yield np.stack(block)
        finally:
            process.kill()


def _next_frame(out: IO[bytes]) -> np.ndarray | None:
    """The next picture of a stream of PPM, None at its end or where it is cut."""
    head = [out.readline() for _ in range(3)]
    if not head[2]:
        return None
    width, height = (int(side) for side in head[1].split())
    content = out.read(width * height * 3)
    full = len(content) == width * height * 3
    return np.frombuffer(content, np.uint8).reshape(height, width, 3) if full else None


def _undecodable(path, error: BaseException) -> InputError:
    said = re.fullmatch(r"ffmpeg failed \((?:Error opening input files: )?(.*)\); .*", brief(error))
    why = re.sub(r"\[[^\]]* @ 0x[0-9a-f]+\] ", "", said[1]) if said else "it lists no frames"
    return InputError(f"Video {path} cannot be decoded ({why}); give a complete video file.")


def contact_sheet(frames, path, *, columns: int = 8, every: int = 1) -> None:
    """Writes one PNG with every `every`-th frame, `columns` to a row; missing places stay black."""
    import imageio.v3  # no other function needs it

    path = Path(path)
    chosen = to_uint8(frames)[::every]
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
