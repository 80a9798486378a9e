"""Logs tell each step once, whatever was killed and begun again, in numbers that are what training computed."""

import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from packforcing_jax.errors import InputError
from packforcing_jax.training import logs


def log(folder, names=("jsonl",), after=0):
    return logs.Log(folder, names, after=after, about={"seed": 3})


def lines(folder):
    return [json.loads(line) for line in (folder / logs.LINES).read_text().splitlines()]


def test_numbers_are_short_and_exactly_what_they_were():
    for value in (0.1, 1 / 3, 2e-45, 3.4e38, -7.25):
        told = logs.plain(np.float32(value))
        assert np.float32(told) == np.float32(value)
        assert len(repr(told)) <= 15
    assert logs.plain(jnp.float32(0.1)) == 0.1
    assert logs.plain(jnp.bfloat16(0.5)) == 0.5
    assert logs.plain(1 / 3) == 0.333333
    assert (logs.plain(np.int32(7)), logs.plain(True), logs.plain(jnp.array([[2], [3]]))) == (
        7,
        True,
        [[2], [3]],
    )


@pytest.mark.parametrize("value", [np.float32("nan"), float("inf"), jnp.float32(-jnp.inf)])
def test_what_is_no_number_is_null(value):
    assert logs.plain(value) is None
    assert logs.plain(np.array([1.5, value], np.float32)) == [1.5, None]


def test_scalars_name_the_entries_of_arrays_and_leave_text_out():
    found = logs.scalars(
        {"loss": jnp.bfloat16(2), "by_block": np.array([1.0, 3.0]), "moves": "critic", "n": 4}
    )
    assert found == {"loss": 2.0, "by_block/0": 1.0, "by_block/1": 3.0, "n": 4.0}


def test_every_step_is_one_line(tmp_path):
    one = log(tmp_path)
    one.write(
        1,
        {"moves": "critic", "loss": np.float32(0.7), "by_block": np.array([1, np.nan], np.float32)},
    )
    assert lines(tmp_path) == [
        {"step": 1, "moves": "critic", "loss": 0.7, "by_block": [1.0, None]}
    ]  # at once
    one.write(2, {"loss": np.float32(0.5)})
    one.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("after", "kept"), [(0, []), (1, []), (2, [2]), (3, [2]), (4, [2, 4]), (9, [2, 4, 6])]
)
def test_a_resumed_log_has_each_step_once(tmp_path, after, kept):
    one = log(tmp_path)
    for step in (2, 4, 6):
        one.write(step, {"loss": 1.0})
    one.close()
    again = log(tmp_path, after=after)
    again.write(after + 1, {"loss": 2.0})
    again.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        (s, 1.0) for s in kept
    ] + [(after + 1, 2.0)]


@pytest.mark.parametrize(
    "torn", [b'{"step": 2, "lo', b'{"step": 2}', b"\0" * 7, b'{"steps": 2}\n{"step": 3}\n']
)
def test_a_torn_line_is_cut_away(tmp_path, torn):
    (tmp_path / logs.LINES).write_bytes(b'{"step": 1}\n' + torn)
    again = log(tmp_path, after=5)
    again.write(6, {})
    again.close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 6]


def test_a_log_that_says_nothing_leaves_what_was_said(tmp_path):
    for _ in range(2):
        one = log(tmp_path, after=1)
        one.close()
        assert not (tmp_path / logs.LINES).exists()
    one = log(tmp_path)
    one.write(1, {})
    one.close()
    log(tmp_path, after=1).close()
    assert lines(tmp_path) == [{"step": 1}]


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(logs.jax, "process_index", lambda: 1)
    one = log(tmp_path)
    one.write(1, {"loss": 1.0})
    one.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "library"), logs.LIBRARIES.items())
def test_a_missing_library_is_named_with_its_extra(tmp_path, name, library, monkeypatch):
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=rf"{library} is not installed; install packforcing-jax\[{name}\]"
    ):
        log(tmp_path, ("jsonl", name))
    assert list(tmp_path.iterdir()) == []


class Told(list):
    """Stands for a library: every call on it, by name."""

    def __getattr__(self, name):
        return lambda *args, **settings: self.append((name, args, settings)) or self


def test_tensorboard_hears_every_number_and_takes_back_what_is_done_again(tmp_path, monkeypatch):
    told = Told()
    monkeypatch.setitem(sys.modules, "tensorboardX", told)
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: types.ModuleType)
    one = log(tmp_path, ("tensorboard",), after=4)
    one.write(5, {"loss": np.float32(0.5), "by_block": np.array([1.0, 2.0])})
    one.close()
    assert told[0] == (
        "SummaryWriter",
        (str(tmp_path / "tensorboard"),),
        {"purge_step": 5, "filename_suffix": ".4"},
    )
    assert [each[1] for each in told if each[0] == "add_scalar"] == [
        ("loss", 0.5, 5),
        ("by_block/0", 1.0, 5),
        ("by_block/1", 2.0, 5),
    ]
    assert told[-1][0] == "close"
    assert [line["step"] for line in lines(tmp_path)] == [5]  # lines of JSON always


def test_weights_and_biases_continue_the_run_of_the_folder(tmp_path, monkeypatch):
    told = Told()
    monkeypatch.setitem(sys.modules, "wandb", told)
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: types.ModuleType)
    for after in (0, 3):
        one = log(tmp_path, ("wandb",), after=after)
        one.write(after + 1, {"loss": np.float32(0.5)})
        one.close()
    first, second = (settings for name, _, settings in told if name == "init")
    assert first["id"] == second["id"] != ""
    assert (first["resume"], first["config"], first["dir"]) == ("allow", {"seed": 3}, str(tmp_path))
    assert [(args, settings["step"]) for name, args, settings in told if name == "log"] == [
        (({"loss": 0.5},), 1),
        (({"loss": 0.5},), 4),
    ]
