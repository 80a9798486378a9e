"""Compiling is counted once, kept out of the estimate, and told to the user where it takes long."""

import time

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


def test_a_program_that_takes_long_is_told_once(monkeypatch, capsys):
    monkeypatch.setattr(compiling, "PATIENCE", 0.0)
    with compiling.told(lambda: "sample: compiling the block step"):
        for _ in range(3):
            fresh()(1.0)
            time.sleep(0.05)
    assert capsys.readouterr().err == "sample: compiling the block step\n"


def test_a_program_that_is_there_at_once_is_not_told(capsys):
    with compiling.told(lambda: "sample: compiling the block step"):
        fresh()(1.0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("kept", "end"), [(True, " (first run only)"), (False, "")])
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
