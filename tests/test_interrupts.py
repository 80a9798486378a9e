"""A signal ends the work once, wherever it falls; what is only noted lets the step finish."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from packforcing_jax import interrupts

ROOT = Path(__file__).parent.parent
SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.fixture(autouse=True)
def default_handlers():
    before = {each: signal.getsignal(each) for each in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for each, handler in before.items():
        signal.signal(each, handler)
    with interrupts.raised():  # forgets what was heard, which would interrupt a later test
        pass


@pytest.mark.parametrize("stop", SIGNALS)
def test_a_signal_is_an_interruption_and_the_handlers_come_back(stop):
    before = signal.getsignal(stop)
    with pytest.raises(KeyboardInterrupt), interrupts.raised():
        os.kill(os.getpid(), stop)
    assert signal.getsignal(stop) is before


@pytest.mark.parametrize("callback", ["swallow", "_xla_gc_callback"])
def test_one_that_cannot_pass_is_raised_at_the_next_look(callback, monkeypatch):
    def swallow(phase, info):
        gc.callbacks.remove(swallow)
        os.kill(os.getpid(), signal.SIGINT)

    swallow.__code__ = swallow.__code__.replace(co_name=callback)
    lost = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    with interrupts.raised():
        gc.callbacks.append(swallow)
        gc.collect()
        with pytest.raises(KeyboardInterrupt):
            interrupts.look()
    assert len(lost) == (callback == "swallow")


def test_there_is_nothing_to_raise_in_quiet_or_in_the_next_run():
    with pytest.raises(KeyboardInterrupt), interrupts.raised():
        os.kill(os.getpid(), signal.SIGINT)
    with interrupts.raised():
        interrupts.look()


@pytest.mark.parametrize("stop", SIGNALS)
def test_a_held_signal_is_heard_behind_the_work_by_whoever_listened(stop):
    done = []

    def work():
        with interrupts.held():
            os.kill(os.getpid(), stop)
            done.append(1)

    with pytest.raises(KeyboardInterrupt), interrupts.raised():
        work()
    with interrupts.noted() as asked:
        work()
        assert asked()
    assert done == [1, 1]


@pytest.mark.parametrize("stop", SIGNALS)
def test_a_noted_signal_waits_and_the_second_does_not(stop):
    def work():
        with interrupts.noted() as asked:
            answers.append(asked())
            os.kill(os.getpid(), stop)
            answers.append(asked())
            os.kill(os.getpid(), stop)
            answers.append("went on")

    answers = []
    with pytest.raises(KeyboardInterrupt):
        work()
    assert answers == [False, True]


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts.raised(), interrupts.noted() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert not asked()


def test_outside_the_main_thread_nothing_is_changed():
    seen = []

    def work():
        with interrupts.raised(), interrupts.noted() as asked:
            seen.append((signal.getsignal(signal.SIGTERM), asked()))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def test_a_terminal_that_is_closed_interrupts_too():
    with pytest.raises(KeyboardInterrupt), interrupts.raised():
        os.kill(os.getpid(), signal.SIGHUP)


TWICE = """
import os, signal, sys
from packforcing_jax.cli import main
def run(words):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        os.kill(os.getpid(), signal.SIGINT)
main.run = run
code = main.main()
os.kill(os.getpid(), signal.SIGINT)  # while the program ends
os.kill(os.getpid(), signal.SIGTERM)
sys.exit(code)
"""


def test_signals_while_a_program_ends_change_nothing():
    done = subprocess.run([sys.executable, "-c", TWICE, "sample"], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr == "packforcing: interrupted; what was finished is kept.\n"


def test_interruptible_work_gives_what_it_returns_and_raises_what_it_raises():
    assert interrupts.interruptible(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        interrupts.interruptible(lambda: 1 // 0)


@pytest.mark.parametrize("stop", SIGNALS)
def test_a_stop_is_answered_while_the_work_goes_on(stop):
    going = threading.Event()

    def work():
        os.kill(os.getpid(), stop)
        going.wait(30)

    try:
        with pytest.raises(KeyboardInterrupt), interrupts.raised():
            interrupts.interruptible(work)
        with pytest.raises(interrupts.Stopped), interrupts.noted() as asked:
            interrupts.interruptible(work, asked)
    finally:
        going.set()


COMPILING = """
import signal, sys, threading
import jax
from packforcing_jax import interrupts

def long(x):
    for i in range(4000):
        x = jax.numpy.sin(x @ x + i)
    return x

def work():
    lowered = jax.jit(long).lower(jax.ShapeDtypeStruct((8, 8), "float32"))
    threading.Timer(0.5, lambda: print("compiling", flush=True)).start()
    lowered.compile()
    print("compiled")

signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with interrupts.raised():
        interrupts.interruptible(work)
except KeyboardInterrupt:
    print("stopped")
    sys.exit(interrupts.leave(130))
"""


@pytest.mark.parametrize("stop", SIGNALS)
def test_a_process_that_compiles_ends_at_once(stop):
    process = subprocess.Popen(
        [sys.executable, "-c", COMPILING], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "compiling\n"
    sent = time.monotonic()
    process.send_signal(stop)
    said, _ = process.communicate(timeout=60)
    assert (said, process.returncode) == ("stopped\n", 130)
    assert time.monotonic() - sent < 2
