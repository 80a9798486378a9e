"""Frames to H.264 by one ffmpeg process that lives as long as its video and holds no frame back.

The samples of a block are a function of its frames and of its place in the video, never of the process that encodes
it: the quantiser is fixed, nothing looks ahead, and every block begins with a key frame. So any process can go on
where another one stopped. Two counters of x264 outlive a key frame: the number of frames modulo 32 (it decides about
a padding bit at the end of each frame) and that of key frames modulo 2 (`idr_pic_id`). A new process first encodes
black frames, which nobody sees, until both counters stand where those of an unbroken process would.
"""

import contextlib
import os
import selectors
import struct
import subprocess
import tempfile
import weakref
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from packforcing_jax.errors import MachineError
from packforcing_jax.io import ffmpeg

TICKS = 1000  # of a video's clock, per frame and unit of the rate's denominator
GROUP = 48  # frames between key frames inside one long block
PATIENCE = 120  # seconds without any progress after which an encoder is given up
COUNTED = 32  # x264 counts frames modulo this for its padding bit
COLOURS = "-colorspace bt709 -color_primaries bt709 -color_trc bt709 -color_range tv".split()
# One thread: the samples are then the same on every machine. zerolatency: no B-frames, no lookahead.
X264 = [
    *"-c:v libx264 -preset veryfast -tune zerolatency -threads 1 -qp 14 -bf 0".split(),
    *f"-g {GROUP} -sc_threshold 0 -pix_fmt yuv420p -fps_mode passthrough".split(),
    *COLOURS,
]
MP4 = "-movflags +frag_keyframe+empty_moov+default_base_moof+skip_trailer -f mp4".split()
FLV = "-f flv -flvflags no_duration_filesize -flush_packets 1 pipe:1".split()
FLV_HEADER, TAG_HEADER = 9, 15  # bytes; a tag's includes the size of the tag before it
FLV_VIDEO, FLV_KEY, FLV_CONFIG, FLV_SAMPLE = 9, 1, 0, 1  # tag type, frame type, packet types
TO_YUV = "scale=flags=area+accurate_rnd+full_chroma_int:out_color_matrix=bt709:out_range=tv"


@dataclass(frozen=True)
class Picture:
    """What is encoded: RGB frames of `width` x `height`, each pixel shown as `scale` x `scale`, at `rate` a second."""

    width: int
    height: int
    scale: int
    rate: Fraction

    def source(self) -> list[str]:
        """How ffmpeg reads the frames."""
        size = ["-s", f"{self.width}x{self.height}", "-r", str(self.rate)]
        return ["-f", "rawvideo", "-pix_fmt", "rgb24", *size, "-i", "pipe:0"]

    def filters(self) -> list[str]:
        """How ffmpeg enlarges the frames and converts their colours.

        Colours are averaged over 2 x 2 shown pixels. Where these are always of one pixel, converting first gives the
        same samples for half the time.
        """
        enlarged = f"scale={self.width * self.scale}:{self.height * self.scale}:flags=neighbor"
        if self.scale == 1:
            return ["-vf", TO_YUV]
        if self.scale % 2 == 0:
            return ["-vf", f"{TO_YUV},format=yuv444p,{enlarged},format=yuv420p"]
        return ["-vf", f"{enlarged},format=rgb24,{TO_YUV}"]

    def black(self) -> np.ndarray:
        """One frame."""
        return np.zeros((1, self.height, self.width, 3), np.uint8)


class Sample(NamedTuple):
    """One encoded frame, as MP4 stores it."""

    key: bool
    data: bytes


def header(picture: Picture, comment: str) -> bytes:
    """`ftyp` and `moov` boxes of a fragmented MP4 of such pictures, `comment` in its metadata."""
    with tempfile.TemporaryDirectory(prefix="packforcing-") as folder:
        # Files: a comment may be longer than an argument, and ffmpeg cannot pipe a header above 32 KiB.
        notes, target = Path(folder, "notes.txt"), Path(folder, "header.mp4")
        notes.write_text(f";FFMETADATA1\ncomment={_escaped(comment)}\n", encoding="utf-8")
        metadata = ["-f", "ffmetadata", "-i", str(notes), "-map", "0:v", "-map_metadata", "1"]
        clock = ["-video_track_timescale", str(picture.rate.numerator * TICKS)]
        arguments = [*picture.source(), *metadata, *picture.filters(), *X264, *clock, *MP4]
        try:
            ffmpeg.run([*arguments, str(target)], picture.black().tobytes())
            found = target.read_bytes()
            return found[: found.index(b"moof") - 4]
        except (MachineError, FileNotFoundError, ValueError) as error:
            if not isinstance(error, MachineError):
                error = f"The ffmpeg program {ffmpeg.program()} wrote no MP4."
            raise MachineError(
                f"No H.264 video can be made here: {error} "
                "Install imageio[ffmpeg], whose ffmpeg has libx264, and leave IMAGEIO_FFMPEG_EXE unset."
            ) from None


def _escaped(text: str) -> str:
    """`text` as a value of ffmpeg's metadata format."""
    return "".join("\\" + letter if letter in "=;#\\\n" else letter for letter in text)


def config(moov: bytes) -> bytes:
    """The decoder configuration (ISO/IEC 14496-15, `avcC`) in the boxes that `header` gives."""
    at = moov.index(b"avcC")
    return moov[at + 4 : at - 4 + struct.unpack_from(">I", moov, at - 4)[0]]


class Encoder:
    """A process that encodes blocks of `block` frames each, behind the `frames` and `keys` key frames of a video.

    It ends with `stop`, with the object, and with the program, however that ends: its input is then at an end.
    A forked copy of the program has no part in it.
    """

    def __init__(self, picture: Picture, *, block: int, frames: int, keys: int):
        unseen = (
            2 + frames % COUNTED
        )  # the first is a key frame, and the second where the parity asks for it
        forced = f"if(lt(n,{unseen}),lt(n,{1 + keys % 2}),not(mod(n-{unseen},{block})))"
        arguments = [*picture.source(), *picture.filters(), *X264]
        self.block, self.config = block, b""
        self._said, self._read, self._skip = bytearray(), bytearray(), FLV_HEADER
        self._process = ffmpeg.start(
            [*arguments, "-force_key_frames", f"expr:{forced}", *FLV], bufsize=0
        )
        self._end = weakref.finalize(self, _end, self._process)
        _running.add(self)
        for stream in ffmpeg.streams(self._process):
            os.set_blocking(stream.fileno(), False)
        for _ in range(unseen):
            self.encode(picture.black())

    def goes_on(self, block: int) -> bool:
        """Whether the process lives and encodes blocks of so many frames."""
        return self._end.alive and self.block == block and self._process.poll() is None

    def encode(self, frames: np.ndarray) -> list[Sample]:
        """The samples of uint8 frames [t,h,w,3]. Whatever interrupts this ends the process."""
        try:
            return self._exchange(np.ascontiguousarray(frames).data.cast("B"), len(frames))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the process; it owes nothing."""
        self._end()

    def _exchange(self, data: memoryview, count: int) -> list[Sample]:
        """Writes `data` and reads `count` samples as both become possible, so that neither waits for the other."""
        samples, (into, out, said) = [], ffmpeg.streams(self._process)
        with selectors.DefaultSelector() as ready:
            ready.register(into, selectors.EVENT_WRITE)
            ready.register(out, selectors.EVENT_READ)
            ready.register(said, selectors.EVENT_READ)
            while len(samples) < count:
                events = ready.select(PATIENCE)
                if not events:
                    raise MachineError(
                        f"ffmpeg encoded nothing for {PATIENCE} s; the finished part is kept."
                    )
                for key, _ in events:
                    if key.fileobj is into:
                        with contextlib.suppress(BrokenPipeError):  # its output ends as well
                            data = data[os.write(key.fd, data) :]
                        if not data:
                            ready.unregister(into)
                    elif piece := os.read(key.fd, 2**20):
                        (self._read if key.fileobj is out else self._said).extend(piece)
                    elif key.fileobj is said:
                        ready.unregister(said)
                    else:
                        raise self._failure()
                samples += self._samples()
        return samples

    def _samples(self) -> list[Sample]:
        """The samples that have come in whole, taken off what was read."""
        found, at, read = [], self._skip, self._read
        while len(read) >= at + TAG_HEADER:
            kind, size = read[at + 4], int.from_bytes(read[at + 5 : at + 8], "big")
            end = at + TAG_HEADER + size
            if len(read) < end:
                break
            body = bytes(read[at + TAG_HEADER : end])  # frame type and codec, packet type, delay
            if kind == FLV_VIDEO and body[1] == FLV_SAMPLE:
                found.append(Sample(body[0] >> 4 == FLV_KEY, body[5:]))
            elif kind == FLV_VIDEO and body[1] == FLV_CONFIG:
                self.config = body[5:]
            at = end
        if at > self._skip:
            del read[:at]
            self._skip = 0
        return found

    def _failure(self) -> MachineError:
        """Why the process has ended its output."""
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.extend(ffmpeg.streams(self._process)[2].read() or b"")
        return MachineError(ffmpeg.failure(bytes(self._said), self._process.returncode))


def _end(process: subprocess.Popen) -> None:
    """Ends a process of ffmpeg and all that belongs to it."""
    process.kill()
    process.wait()
    for stream in ffmpeg.streams(process):
        stream.close()


_running: weakref.WeakSet[Encoder] = weakref.WeakSet()


def _forget() -> None:
    """Lets go of the encoders of the program that this one was forked from: it would keep their input open."""
    for encoder in list(_running):
        if encoder._end.detach() is not None:
            process = encoder._process
            process.returncode = 0  # not a child of this program: nothing to wait for
            for stream in ffmpeg.streams(process):
                stream.close()


os.register_at_fork(after_in_child=_forget)
