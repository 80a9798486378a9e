"""Frames to H.264 by one ffmpeg process that lives as long as its video and holds no frame back.

The samples of a block are a function of its frames and of its place in the video, never of the process that encodes
it: the quantiser is fixed, nothing looks ahead, and every block begins with a key frame. So any process can go on
where another one stopped. Two counters of x264 outlive a key frame: the number of frames modulo 32 (it decides about
a padding bit at the end of each frame) and that of key frames modulo 2 (`idr_pic_id`). A new process first encodes
black frames, which nobody sees, until both counters stand where those of an unbroken process would.
"""

import os
import selectors
import signal
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

SLICED = 2**18
SLICES = 4  # pictures of more pixels are cut into slices, each with a thread of its own
TICKS = 1000  # of a video's clock, per frame and unit of the rate's denominator
GROUP = 48  # frames between key frames inside one long block
PATIENCE = 120  # seconds without any progress after which an encoder is given up
COUNTED = 32  # x264 counts frames modulo this for its padding bit
COLOURS = "-colorspace bt709 -color_primaries bt709 -color_trc bt709 -color_range tv".split()
X264 = [  # zerolatency: no B-frames, no lookahead
    *"-c:v libx264 -preset veryfast -tune zerolatency -qp 14 -bf 0".split(),
    *f"-g {GROUP} -sc_threshold 0 -pix_fmt yuv420p -fps_mode passthrough".split(),
    *COLOURS,
]
MP4 = "-movflags +frag_keyframe+empty_moov+default_base_moof+skip_trailer -f mp4".split()
FLV = "-f flv -flvflags no_duration_filesize -flush_packets 1 pipe:1".split()
FLV_HEADER = 9
TAG_HEADER = 15  # bytes; a tag's includes the size of the tag before it
FLV_VIDEO = 9
FLV_KEY = 1
FLV_CONFIG = 0
FLV_SAMPLE = 1  # tag type, frame type, packet types
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

    def encoding(self) -> list[str]:
        """How ffmpeg makes H.264 of them. The number of threads is not the machine's: the samples depend on it."""
        sliced = self.width * self.height * self.scale**2 > SLICED
        return ["-vf", self.filters(), *X264, "-threads", str(SLICES if sliced else 1)]

    def filters(self) -> str:
        """How ffmpeg enlarges the frames and converts their colours.

        Colours are averaged over 2 x 2 shown pixels. Where these always show one pixel, converting first gives the
        same colours in half the time.
        """
        enlarged = f"scale={self.width * self.scale}:{self.height * self.scale}:flags=neighbor"
        if self.scale == 1:
            return TO_YUV
        if self.scale % 2 == 0:
            return f"{TO_YUV},format=yuv444p,{enlarged},format=yuv420p"
        return f"{enlarged},format=rgb24,{TO_YUV}"

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
        notes = Path(folder, "notes.txt")
        target = Path(folder, "header.mp4")
        notes.write_text(f";FFMETADATA1\ncomment={_escaped(comment)}\n", encoding="utf-8")
        metadata = ["-f", "ffmetadata", "-i", str(notes), "-map", "0:v", "-map_metadata", "1"]
        clock = ["-video_track_timescale", str(picture.rate.numerator * TICKS)]
        arguments = [*picture.source(), *metadata, *picture.encoding(), *clock, *MP4]
        ffmpeg.run([*arguments, str(target)], picture.black().tobytes(), then=ffmpeg.REMEDY)
        boxes = target.read_bytes() if target.exists() else b""
    end = boxes.find(b"moof") - 4
    if end < 0:
        raise MachineError(f"{ffmpeg.program()} wrote no video; {ffmpeg.REMEDY}.")
    return boxes[:end]


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
        unseen = 2 + frames % COUNTED  # one or two key frames, then others
        forced = f"if(lt(n,{unseen}),lt(n,{1 + keys % 2}),not(mod(n-{unseen},{block})))"
        arguments = [*picture.source(), *picture.encoding()]
        self.block = block
        self.config = b""
        self._stderr = bytearray()
        self._read = bytearray()
        self._skip = FLV_HEADER
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
        samples = []
        into, out, stderr = ffmpeg.streams(self._process)
        with selectors.DefaultSelector() as ready:
            ready.register(into, selectors.EVENT_WRITE)
            ready.register(out, selectors.EVENT_READ)
            ready.register(stderr, selectors.EVENT_READ)
            while len(samples) < count:
                events = ready.select(PATIENCE)
                if not events:
                    raise MachineError(f"ffmpeg stood still for {PATIENCE} s; {ffmpeg.KEPT}.")
                for key, _ in events:
                    if key.fileobj is into:
                        data = data[_written(key.fd, data) :]
                        if not data:
                            ready.unregister(into)
                    elif piece := os.read(key.fd, 2**20):
                        (self._read if key.fileobj is out else self._stderr).extend(piece)
                    elif key.fileobj is stderr:
                        ready.unregister(stderr)
                    else:
                        raise self._failure()
                samples += self._samples()
        return samples

    def _samples(self) -> list[Sample]:
        """The samples that have come in whole, taken off what was read."""
        samples = []
        at = self._skip
        read = self._read
        while len(read) >= at + TAG_HEADER:
            kind = read[at + 4]
            size = int.from_bytes(read[at + 5 : at + 8], "big")
            end = at + TAG_HEADER + size
            if len(read) < end:
                break
            body = bytes(read[at + TAG_HEADER : end])  # frame type and codec, packet type, delay
            if kind == FLV_VIDEO and body[1] == FLV_SAMPLE:
                samples.append(Sample(body[0] >> 4 == FLV_KEY, body[5:]))
            elif kind == FLV_VIDEO and body[1] == FLV_CONFIG:
                self.config = body[5:]
            at = end
        if at > self._skip:
            del read[:at]
            self._skip = 0
        return samples

    def _failure(self) -> MachineError:
        """Why the process has ended its output."""
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.extend(ffmpeg.streams(self._process)[2].read() or b"")
        return ffmpeg.failure(bytes(self._stderr), self._process.returncode)


def _written(pipe: int, data: memoryview) -> int:
    """How many bytes the pipe took; all of them if nobody reads it, who then ends the output as well."""
    try:
        return os.write(pipe, data)
    except BrokenPipeError:
        return len(data)


def _end(process: subprocess.Popen) -> None:
    """Ends a process of ffmpeg and all that belongs to it; where ffmpeg is a script, what this has started too."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
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
