"""One command through the program's `main`, watched from outside: what it says and what it leaves behind."""

import contextlib
import faulthandler
import gc
import hashlib
import os
import shlex
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fuzz_cases import Case, Special, Tree

from packforcing_jax.cli import main

SECONDS = 60  # that a command may take, on a busy machine and with what it compiles
LONGEST = 1500  # characters of a sentence
CODES = (0, 1, 2, 3)
PROC = Path("/proc/self")
POOLS = ("asyncio_", "ThreadPoolExecutor-", "QueueFeederThread")  # threads that libraries keep


class Hang(BaseException):
    """A command took too long."""


class Outcome(NamedTuple):
    """What a command came to; `reached`: its words were understood; `wrong`: what must not be, in words."""

    code: int | None
    out: str
    err: str
    reached: bool
    wrong: tuple[str, ...]


# What lies where


def lay(items: Tree, folder: Path) -> None:
    """Puts files, folders, pipes and links below `folder`; what has no place any more is left out."""
    for name, item in items.items():
        path = folder / name
        with contextlib.suppress(
            FileExistsError,
            NotADirectoryError,
            OSError if isinstance(item, Special) else FileExistsError,
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not isinstance(item, Special):
                path.write_bytes(item)
            elif item.kind == "folder":
                path.mkdir()
            elif item.kind == "pipe":
                os.mkfifo(path)
            else:
                path.symlink_to(item.target)


def taken(folder: Path, *beginnings: str) -> dict[str, bytes | Special]:
    """The tree below a folder, of names with one of these beginnings."""
    found: dict[str, bytes | Special] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name.startswith(beginnings):
            found[name] = Special("folder") if path.is_dir() else path.read_bytes()
    return found


def snapshot(folder: Path) -> dict[str, tuple]:
    """Everything below a folder: kind, and of files content and time."""
    found = {}
    for path in folder.rglob("*"):
        told = path.lstat()
        if stat.S_ISREG(told.st_mode):
            what: tuple = (told.st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        else:
            what = (os.readlink(path),) if path.is_symlink() else ()
        found[os.fspath(path.relative_to(folder))] = (stat.S_IFMT(told.st_mode), *what)
    return found


# What a process holds


def _open_files(folder: Path) -> set[str]:
    """The files below `folder` that this process holds open."""
    found = set()
    for each in (PROC / "fd").iterdir() if PROC.exists() else ():
        with contextlib.suppress(OSError):
            found.add(os.readlink(each))
    return {name for name in found if name.startswith(f"{folder}/")}


def _children() -> set[str]:
    """The processes that this one started and has not waited for."""
    tasks = (PROC / "task").glob("*/children") if PROC.exists() else ()
    found: set[str] = set()
    for each in tasks:
        with contextlib.suppress(OSError):
            found |= set(each.read_text().split())
    return found


def _threads() -> set[threading.Thread]:
    return {each for each in threading.enumerate() if not each.name.startswith(POOLS)}


class Held(NamedTuple):
    """What a command must give back as it was."""

    environment: dict[str, str]
    folder: str
    signals: tuple[Any, ...]
    threads: set[threading.Thread]
    children: set[str]


def _held() -> Held:
    signals = tuple(
        signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    )
    return Held(dict(os.environ), os.getcwd(), signals, _threads(), _children())


def _left(before: Held, folder: Path) -> Iterator[str]:
    """What a command did not give back."""
    deadline = time.monotonic() + 2  # for what ends on its own just now
    while time.monotonic() < deadline and (
        _threads() - before.threads or _children() - before.children
    ):
        time.sleep(0.01)
    after = _held()
    if after.environment != before.environment:
        yield f"the environment changed: {dict(set(after.environment.items()) ^ set(before.environment.items()))}"
    if after.folder != before.folder:
        yield f"the working folder is {after.folder}"
    if after.signals != before.signals:
        yield "signals are heard by others than before"
    if left := after.threads - before.threads:
        yield f"threads are left: {sorted(each.name for each in left)}"
    if left := after.children - before.children:
        yield f"processes are left: {sorted(left)}"
    if _open_files(folder):
        gc.collect()
    if left := _open_files(folder):
        yield f"files are left open: {sorted(left)}"


# One command


@contextlib.contextmanager
def _streams(folder: Path) -> Iterator[Callable[[], tuple[str, str]]]:
    """While inside, descriptors 1 and 2 are files, as of a program whose output is redirected; gives what they hold."""
    with contextlib.ExitStack() as stack:
        kept = []
        for number, name in ((1, "stdout"), (2, "stderr")):
            file = stack.enter_context((folder / name).open("w+b"))
            saved = os.dup(number)
            stack.callback(os.close, saved)
            stack.callback(os.dup2, saved, number)
            os.dup2(file.fileno(), number)
            stream = os.fdopen(os.dup(number), "w", encoding="utf-8")
            stack.callback(stream.close)
            stack.callback(setattr, sys, name, getattr(sys, name))
            setattr(sys, name, stream)
            kept.append((stream, file))

        def said() -> tuple[str, str]:
            texts = []
            for stream, file in kept:
                with contextlib.suppress(ValueError):
                    stream.flush()
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
            return texts[0], texts[1]

        yield said


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Raises `Hang` where a command is after SECONDS; where no signal is heard, every stack is printed and all ends."""

    def hang(signum, frame):
        raise Hang("".join(traceback.format_stack(frame)[-4:]))

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(4 * SECONDS, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _noticed() -> Iterator[list[str]]:
    """While inside, the verbs that get as far as `run` are put down."""
    reached: list[str] = []
    parser_of = main.parser_of

    def watched(name: str):
        parser, module = parser_of(name)

        def run(args):
            reached.append(name)
            return module.run(args)  # type: ignore[attr-defined]

        return parser, types.SimpleNamespace(run=run)

    main.parser_of = watched
    try:
        yield reached
    finally:
        main.parser_of = parser_of


def run(case: Case, place: Path, program: Callable[[Sequence[str]], int] = main.main) -> Outcome:
    """Runs a case in the new folder `place` and looks at everything; `place` is gone behind it."""
    folder = place / "here"
    folder.mkdir(parents=True)
    (place / "tmp").mkdir()
    lay(case.items, folder)
    before = snapshot(folder)
    outside = os.getcwd()
    own_tmp = tempfile.tempdir
    wrong: list[str] = []
    code = None
    os.chdir(folder)
    tempfile.tempdir = str(place / "tmp")
    held = _held()
    try:
        with (
            _streams(place) as said,
            _noticed() as reached,
            warnings.catch_warnings(record=True) as heard,
        ):
            warnings.simplefilter("always")
            try:
                with _limited():
                    code = program(case.words)
            except Hang as error:
                wrong.append(f"takes more than {SECONDS} seconds, at\n{error}")
            except BaseException as error:
                wrong.append(f"raises\n{''.join(traceback.format_exception(error)[-6:])}")
            out, err = said()
        wrong += [f"warns: {each.category.__name__}: {each.message}" for each in heard]
        wrong += _left(held, folder)
        wrong += _of_sentence(code, out, err)
        wrong += _of_files(code, before, snapshot(folder))
        wrong += [
            f"left in the temporary folder: {each.name}" for each in (place / "tmp").iterdir()
        ]
    finally:
        os.chdir(outside)
        tempfile.tempdir = own_tmp
    shutil.rmtree(place)
    return Outcome(code, out, err, bool(reached), tuple(wrong))


def _of_sentence(code: int | None, out: str, err: str) -> Iterator[str]:
    """What is wrong with the code and with what was said on stderr."""
    if code is not None and code not in CODES:
        yield f"exit code {code}"
    if "Traceback" in out + err:
        yield f"prints a traceback: {(out + err)[-3000:]}"
    if code not in (2, 3):
        return
    *status, last = err.split("\n")[:-1] or [""]
    if (
        not err.endswith("\n")
        or not last.startswith("packforcing: ")
        or not last.endswith((".", "?"))
    ):
        yield f"does not end with one sentence: {err[-500:]!r}"
    if len(last) > LONGEST:
        yield f"has a sentence of {len(last)} characters: {last[:300]!r}"
    if not all(char.isprintable() for char in last):
        yield f"has a sentence that cannot be printed: {last!r}"
    if any(not line.startswith(tuple(f"{verb}: " for verb in main.VERBS)) for line in status):
        yield f"says more than a sentence: {err[-1000:]!r}"


def _of_files(code: int | None, before: dict, after: dict) -> Iterator[str]:
    """What is wrong with the files that are there now."""
    if code == 2 and before != after:
        differ = {name for name in before | after if before.get(name) != after.get(name)}
        yield f"is refused and leaves other files: {sorted(differ)}"
    hidden = {
        name for name in after.keys() - before.keys() if name.endswith((".lock", ".unfinished"))
    }
    if hidden:
        yield f"leaves {sorted(hidden)}"


def put_down(case: Case, wrong: Sequence[str], folder: Path) -> None:
    """Writes a failing case as files beside a `command` to run there and what was `wrong`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lay(case.items, folder)
    command = f"packforcing {shlex.join(case.words)}\n"
    (folder / "command").write_bytes(command.encode(errors="surrogatepass"))
    (folder / "wrong").write_text("\n".join(wrong) + "\n", errors="replace")
