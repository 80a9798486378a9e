"""Ctrl-C, SIGTERM and SIGHUP: raised where the program stands and remembered, or held or noted until a thing is done.

An exception raised inside a callback of the garbage collector is printed and lost. There a signal is only remembered,
and whoever works in steps looks here between them. Compiled code hears no signal: it is waited for beside it.
"""

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import TypeVar

Result = TypeVar("Result")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SWALLOW = ("__del__", "_xla_gc_callback")  # functions out of which no exception comes
LOOK = 0.1  # seconds between two looks at a stop that is only noted
_heard = threading.Event()
_given_up: list[threading.Thread] = []
_at_once = threading.Event()


class Stopped(KeyboardInterrupt):
    """A stop was asked for before some work was done, which was given up."""


@contextlib.contextmanager
def _handled(handler: Callable) -> Iterator[None]:
    """While inside, `handler` hears the signals that the program does not ignore; nothing outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        each: signal.getsignal(each)
        for each in SIGNALS
        if signal.getsignal(each) is not signal.SIG_IGN
    }
    for each in before:
        signal.signal(each, handler)
    try:
        yield
    finally:
        for each, old in before.items():
            signal.signal(each, old)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """While inside, a signal is a KeyboardInterrupt, so that `finally` blocks close files and keep finished work."""

    def interrupt(signum, frame):
        _heard.set()
        if not any(each.f_code.co_name in SWALLOW for each, _ in traceback.walk_stack(frame)):
            raise KeyboardInterrupt

    _heard.clear()
    with _handled(interrupt):
        yield


def ignored() -> None:
    """From now on signals change nothing: for the last lines of a program that ends anyway."""
    if threading.current_thread() is threading.main_thread():
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)


def look() -> None:
    """Raises the KeyboardInterrupt that is still owed or was lost on its way, if one is."""
    if _heard.is_set():
        raise KeyboardInterrupt


@contextlib.contextmanager
def held() -> Iterator[None]:
    """While inside, signals wait; whoever listens to them hears them behind it."""
    waiting: list[int] = []
    try:
        with _handled(lambda signum, frame: waiting.append(signum)):
            yield
    finally:
        for signum in waiting:
            signal.raise_signal(signum)


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """While inside, the first signal is only noted: call what is given to ask for it. The second interrupts."""
    asked = threading.Event()

    def note(signum, frame):
        if asked.is_set():
            _heard.set()
            raise KeyboardInterrupt
        asked.set()

    with _handled(note):
        yield asked.is_set


def interruptible(
    work: Callable[[], Result], stop_requested: Callable[[], bool] = lambda: False
) -> Result:
    """What `work` returns, which may spend minutes in compiled code: it is done in a thread, and waited for.

    Raises `Stopped` once a stop is asked for, or the interruption, at once. The work is then given up: it goes on until
    the process ends, which `leave` sees to, so it must leave nothing half done that others read.
    """
    done: futures.Future[Result] = futures.Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while not futures.wait([done], timeout=LOOK).done:
            if stop_requested():
                raise Stopped
    except BaseException:
        _given_up.append(thread)
        raise
    return done.result()


def leave_at_once() -> None:
    """From now on `leave` ends the process without what libraries do at the end of one."""
    _at_once.set()


def leave(code: int) -> int:
    """`code` for the end of the process; where work that was given up goes on, the process ends here without it."""
    if _at_once.is_set() or any(thread.is_alive() for thread in _given_up):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)
    return code
