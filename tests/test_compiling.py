"""Compiling is counted once, kept out of the estimate, and told to the user where it takes long."""

import os
import time
from pathlib import Path

import jax
import pytest

from packforcing_jax.cli import common, compiling


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(compiling, "_spans", [])


def fresh():
    """A program that was never compiled."""
    return jax.jit(lambda x: x + 1)


def test_a_span_inside_another_is_counted_once():
    for span in [(1.0, 2.0), (2.5, 3.0), (0.5, 3.5), (4.0, 5.0)]:
        compiling.add(*span)
    assert compiling.seconds() == 4.0


def test_what_compiles_is_counted_inside_and_no_more_behind():
    with compiling.told(lambda: "compiling"):
        before = time.time()
        fresh()(1.0)
        assert 0 < compiling.seconds() <= time.time() - before
    counted = compiling.seconds()
    fresh()(1.0)
    assert compiling.seconds() == counted


@pytest.fixture
def compiles(monkeypatch, capsys):
    """What is said while jax says that it compiles a program, until something is."""
    monkeypatch.setattr(compiling, "PATIENCE", 0.01)

    def wait(seconds, read=lambda: None):
        now = time.time()
        jax.monitoring.record_event_time_span(compiling.LOWERED, now, now, fun_name="f")
        read()
        said = ""
        while not said and time.time() < now + seconds:
            time.sleep(0.01)
            said = capsys.readouterr().err
        jax.monitoring.record_event_time_span(compiling.COMPILED, now, time.time(), fun_name="f")
        return said

    return wait


def test_a_program_that_takes_long_is_told_once(compiles):
    with compiling.told(lambda: "sample: compiling the block step"):
        assert compiles(10) == "sample: compiling the block step\n"
        assert compiles(0.2) == ""


def test_a_program_that_is_there_at_once_is_not_told(compiles, monkeypatch):
    monkeypatch.setattr(compiling, "PATIENCE", 60.0)
    with compiling.told(lambda: "sample: compiling the block step"):
        assert compiles(0.05) == ""


def test_a_program_that_is_being_read_is_not_told_however_long_it_takes(
    tmp_path, monkeypatch, compiles
):
    monkeypatch.setattr(compiling.compilation_cache, "in_use", lambda: tmp_path)
    old = tmp_path / "jit_old-1-atime"
    old.touch()
    os.utime(old, (time.time() - 60,) * 2)
    with compiling.told(lambda: "told"):
        assert compiles(0.2, read=(tmp_path / "jit_new-1-atime").touch) == ""
    (tmp_path / "jit_new-1-atime").unlink()
    with compiling.told(lambda: "told"):
        assert compiles(10) == "told\n"


@pytest.mark.parametrize(("kept", "end"), [(Path("here"), " (first run only)"), (None, "")])
def test_the_first_run_is_only_blamed_where_programs_are_kept(monkeypatch, kept, end):
    monkeypatch.setattr(compiling.compilation_cache, "in_use", lambda: kept)
    assert compiling.line("sample", "the block step") == f"sample: compiling the block step{end}"


def test_the_estimate_knows_nothing_of_compiling(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    for block in common.progress(range(4), name="sample", unit="blocks"):
        if block == 0:
            compiling.add(now[0], now[0] + 60)
            now[0] += 60
        now[0] += 3
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first == "sample: 1/4 blocks, 0.33 blocks/s, 0:03 gone, 0:09 left"
    assert last == "sample: 4/4 blocks, 0.33 blocks/s, 0:12 gone, 0:00 left"
