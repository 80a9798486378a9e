"""What `train` tells of a run besides its metrics."""

import types

import pytest
import tiny

from packforcing_jax import config
from packforcing_jax.cli import train
from packforcing_jax.errors import MachineError
from packforcing_jax.training import runs


@pytest.fixture
def job(monkeypatch):
    """A run whose third and fourth updates are left out."""
    job = types.SimpleNamespace(step=0, stopped=False, done=True)
    rows = [{"step": number, "skipped": number in (3, 4)} for number in range(1, 7)]
    monkeypatch.setattr(runs, "finished", lambda *args, **kwargs: False)
    monkeypatch.setattr(runs, "start", lambda *args, **kwargs: job)
    monkeypatch.setattr(runs, "steps", lambda job, stopping: iter(rows))
    monkeypatch.setattr(runs, "finish", lambda job: None)
    monkeypatch.setattr(runs, "to_compile", lambda job: 0)
    return job


def trained(tmp_path):
    stage = config.Stage("", tiny.EXP, config.TrainConfig(steps=6))
    return train.train(stage, tmp_path, 0, lambda: False)


def test_updates_that_were_left_out_are_counted_in_total_and_told(job, tmp_path, capsys):
    assert trained(tmp_path)["left_out"] == 2
    said = capsys.readouterr().err
    assert "train: 2 updates were left out, as they were not finite; look at the data" in said


def test_they_are_told_too_when_the_run_ends_in_an_error(job, tmp_path, capsys, monkeypatch):
    def broken(job, stopping):
        yield {"step": 1, "skipped": 1}
        raise MachineError("too many.")

    monkeypatch.setattr(runs, "steps", broken)
    with pytest.raises(MachineError):
        trained(tmp_path)
    assert "1 updates were left out" in capsys.readouterr().err


def test_a_run_without_any_says_nothing(job, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, "steps", lambda job, stopping: iter([{"step": 1, "skipped": 0}]))
    assert trained(tmp_path)["left_out"] == 0
    assert "left out" not in capsys.readouterr().err
