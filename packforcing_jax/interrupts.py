"""Ctrl-C, SIGTERM and SIGHUP: raised where the program stands and remembered, or held or noted until a thing is done.

An exception raised inside a callback of the garbage collector is printed and lost. There a signal is only remembered,
and whoever works in steps looks here between them.
"""

import contextlib
import signal
import threading
import traceback
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SWALLOW = ("__del__", "_xla_gc_callback")  # functions out of which no exception comes
_heard = threading.Event()


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
