"""The ffmpeg program: where it is, one run of it, and a process of it that goes on."""

import functools
import subprocess
from typing import IO

import imageio_ffmpeg

from packforcing_jax.errors import MachineError

ENCODER = "libx264"
QUIET = ("-nostdin", "-hide_banner", "-v", "error", "-y")
KEPT = "the finished part is kept"
REMEDY = "install imageio[ffmpeg], whose ffmpeg makes H.264, and leave IMAGEIO_FFMPEG_EXE unset"


def program() -> str:
    """Path of the ffmpeg program."""
    try:
        return imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise MachineError(f"No ffmpeg program was found; {REMEDY}.") from error


@functools.cache
def require_encoder() -> None:
    """Raises `MachineError` unless the ffmpeg program is here, starts, and makes H.264."""
    name = program()
    try:
        done = subprocess.run(
            [name, "-nostdin", "-hide_banner", "-v", "error", "-encoders"],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise MachineError(
            f"The ffmpeg program {name} does not start ({error}); {REMEDY}."
        ) from error
    if ENCODER.encode() not in done.stdout.split():
        raise MachineError(f"The ffmpeg program {name} has no encoder {ENCODER}; {REMEDY}.")


def start(arguments: list[str], **streams) -> subprocess.Popen:
    """A process of ffmpeg in a session of its own, which no signal to a terminal or to our process group reaches."""
    name = program()
    try:
        return subprocess.Popen(
            [name, *QUIET, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            **streams,
        )
    except OSError as error:
        raise MachineError(
            f"The ffmpeg program {name} does not start ({error.strerror}); {REMEDY}."
        ) from error


def streams(process: subprocess.Popen) -> tuple[IO[bytes], IO[bytes], IO[bytes]]:
    """Standard input, output and error of what `start` gave."""
    into = process.stdin
    out = process.stdout
    stderr = process.stderr
    assert into is not None
    assert out is not None
    assert stderr is not None
    return into, out, stderr


def run(arguments: list[str], data: bytes | None = None, *, then: str = KEPT) -> bytes:
    """Standard output of one ffmpeg run that reads `data`; `then` ends the sentence about a failure."""
    with start(arguments) as process:
        try:
            out, stderr = process.communicate(data)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise failure(stderr, process.returncode, then)
    return out


def failure(stderr: bytes, status: int | None, then: str = KEPT) -> MachineError:
    """The error about an ffmpeg that ended with `status` and wrote `stderr` to its standard error."""
    lines = stderr.decode(errors="replace").strip().splitlines() or [f"exit status {status}"]
    return MachineError(f"ffmpeg failed ({lines[-1]}); {then}.")
