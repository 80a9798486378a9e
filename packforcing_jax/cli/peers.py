"""Several processes as one run: they join, and where one of them is lost each other one says so in a sentence and ends.

jax notices a lost process by its connection or by heartbeats that stay away, and then aborts this one from a thread of
its own, with a page of addresses on stderr, and takes no function to call before. So what native code writes to stderr
passes a thread here, which knows that announcement; the abort is held up for the moment that this takes.
"""

import atexit
import contextlib
import ctypes
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import NamedTuple

from packforcing_jax import interrupts
from packforcing_jax.cli import failures
from packforcing_jax.errors import MachineError, brief, require

HEARTBEAT = 100  # seconds, as jax has it
STDERR = 2
FATAL = b"JAX distributed service detected fatal errors"
RECORD = re.compile(
    rb"[IWEF]\d{4} |[A-Z]+:"
)  # how an entry of a log begins; it may have more lines
ABOUT_PEERS = re.compile(rb"coordination|preemption_sync", re.IGNORECASE)
LOST = re.compile(
    r"gloo|nccl.*(remote|network)|coordination service|barrier|heartbeat|connection (closed|reset)|socket closed",
    re.IGNORECASE,
)  # in what jax raises where another process does not answer
_ending = threading.Lock()


class Group(NamedTuple):
    """Which process this is of how many, where process 0 listens, and after how many silent seconds one is lost.

    Without numbers and address jax finds them by what SLURM, Kubernetes, Open MPI or a TPU pod says.
    """

    coordinator: str | None
    processes: int | None
    process: int | None
    heartbeat: int
    as_json: bool = False


@contextlib.contextmanager
def joined(group: Group) -> Iterator[None]:
    """While inside, this process is one of several; a loss of another one ends it with exit code 3.

    Raises `MachineError` if the others are not found. Behind an error the program ends without waiting for the others,
    as jax would; they notice.
    """
    flags = {
        "--coordinator": group.coordinator,
        "--processes": group.processes,
        "--process": group.process,
    }
    missing = [flag for flag, value in flags.items() if value is None]
    require(
        len(missing) in (0, len(flags)),
        f"several processes need --coordinator, --processes and --process; "
        f"{', '.join(missing)} is missing, or use --distributed alone.",
    )
    _listen(group)
    import jax

    try:
        jax.distributed.initialize(*flags.values(), heartbeat_timeout_seconds=group.heartbeat)
    except (RuntimeError, ValueError) as error:
        raise MachineError(
            f"Joining the other processes failed ({brief(error)}); "
            "give --coordinator, --processes and --process to each of them."
        ) from error
    try:
        yield
        jax.distributed.shutdown()  # while the thread listens
    except BaseException as error:
        if isinstance(error, Exception) and LOST.search(str(error)):
            _end(group)
        if failures.outcome(error) is None:  # a defect
            traceback.print_exc()
            os._exit(1)
        interrupts.leave_at_once()
        raise


def _end(group: Group) -> None:
    """Ends this process in the sentence. At once: what jax does at the end of a program waits for the lost one."""
    _ending.acquire()  # for good: an error and the announcement may come together
    sentence = (
        f"another process of this run ended, or was silent for --heartbeat-timeout {group.heartbeat} s; look at what "
        "it said and start all of them again: the same command goes on behind the last checkpoint."
    )
    with contextlib.suppress(OSError):
        if group.as_json:
            os.write(1, json.dumps({"error": sentence}).encode() + b"\n")
        os.write(sys.stderr.fileno(), f"packforcing: {sentence}\n".encode())
    os._exit(MachineError.exit_code)


def _listen(group: Group) -> None:
    """Puts a thread between native code and stderr, to which Python goes on to write itself."""
    own = os.dup(STDERR)
    source, target = os.pipe()
    os.dup2(target, STDERR)
    os.close(target)
    sys.stderr = open(  # noqa: SIM115  as long as the process
        own, "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace"
    )
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))  # for 6 s, its number
    reader = threading.Thread(target=_pass_on, args=(source, own, group), daemon=True)
    reader.start()
    atexit.register(_stop_listening, own, reader)  # behind jax's own end


def _pass_on(source: int, target: int, group: Group) -> None:
    """Hands on what comes from `source`; what is about other processes is held back until the end."""
    held: list[bytes] = []
    about_peers = False
    with open(source, "rb") as lines:
        for line in lines:
            if FATAL in line:
                _end(group)
            about_peers = bool(ABOUT_PEERS.search(line)) if RECORD.match(line) else about_peers
            if about_peers:
                held.append(line)
            else:
                os.write(target, line)
    os.write(target, b"".join(held))


def _stop_listening(own: int, reader: threading.Thread) -> None:
    os.dup2(own, STDERR)  # which closes the pipe
    reader.join(timeout=1)
