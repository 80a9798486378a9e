"""The verb shows a table and a map, ends with 1 where an invariant fails, and refuses what is no trace."""

import argparse
import json
import re

import diaries
import imageio.v3
import numpy as np
import pytest

from packforcing_jax.cli import inspect
from packforcing_jax.errors import InputError
from packforcing_jax.sampling import inspect_trace, trace


@pytest.fixture
def path(tmp_path):
    return diaries.write(tmp_path / "run.jsonl", blocks=15)


def broken(path):
    """The same run, but layer 1 of block 12 recalls one block twice and layer 2 of block 9 a sink block."""
    blocks = list(diaries.finished(blocks=15))
    blocks[12].block_ids[1] = [4, 7, 7, 9]
    blocks[9].block_ids[2, 0] = 0
    with trace.Writer(path, diaries.head()) as writer:
        for block in blocks:
            writer.write(block)
    return path


def call(*words):
    """The exit code of `inspect WORDS`."""
    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    parser.add_argument("--json", action="store_true")
    return inspect.run(parser.parse_args(list(map(str, words))))


def test_a_sound_run_is_shown_with_code_0(path, capsys):
    assert call(path) == 0
    out, err = capsys.readouterr()
    assert inspect_trace.table(trace.read(path)) in out
    assert "15 blocks checked: positions contiguous, sink untouched, nothing twice" in out
    assert err == ""
    assert f"map: {path.with_suffix('.png')}" in out
    np.testing.assert_array_equal(
        imageio.v3.imread(path.with_suffix(".png")), inspect_trace.heat_map(trace.read(path))
    )


def test_every_problem_is_one_line_and_the_code_1(tmp_path, capsys):
    assert call(broken(tmp_path / "a.jsonl"), "--no-map") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3:] == [
        "Block 9, layer 2: packed block 0 was recalled, but only 2 to 7 could be.",
        "Block 12, layer 1: packed block 7 came twice.",
        "15 blocks checked, 2 problems",
    ]
    assert [each.name for each in tmp_path.iterdir()] == ["a.jsonl"]


def test_many_problems_are_cut_short_for_people_but_not_for_machines(tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    with trace.Writer(file, diaries.head()) as writer:
        for block in diaries.finished(blocks=15):
            block.positions += 1
            writer.write(block)
    assert call(file, "--no-map") == 1
    out = capsys.readouterr().out
    assert len(re.findall("begins at", out)) == inspect.SHOWN
    assert call(file, "--no-map", "--json") == 1
    found = json.loads(capsys.readouterr().out)["problems"]
    assert len(found) == 3 * (1 + 2 + 3 + 4 * 8)
    assert f"... and {len(found) - inspect.SHOWN} more" in out


def test_json_holds_blocks_problems_and_layers(tmp_path, path, capsys):
    assert call(path, "--json", "--map", tmp_path / "deep" / "er" / "b.PNG") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["blocks"], found["problems"], found["note"]) == (15, [], "")
    assert found["map"] == str(tmp_path / "deep" / "er" / "b.PNG")
    assert [row["layer"] for row in found["layers"]] == [0, 1, 2, "random"]
    assert found["layers"][0] == inspect_trace.rows(trace.read(path))[0]
    drawn = imageio.v3.imread(found["map"])
    np.testing.assert_array_equal(drawn, inspect_trace.heat_map(trace.read(path)))
    assert not path.with_suffix(".png").exists()
    assert call(broken(tmp_path / "a.jsonl"), "--json", "--no-map") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["map"], len(found["problems"])) == (None, 2)


def test_a_cut_off_line_is_mentioned(path, capsys):
    path.write_bytes(path.read_bytes()[:-9])
    assert call(path, "--no-map") == 0
    out, err = capsys.readouterr()
    assert "14 blocks checked" in out
    assert err == "inspect: line 16 was cut off and is left out.\n"


def test_bad_input_is_refused_and_leaves_nothing(tmp_path, path):
    other = tmp_path / "x.jsonl"
    other.write_text("no trace\n")
    trace_named_png = diaries.write(tmp_path / "t.png", blocks=3)
    files = {each.name: each.read_bytes() for each in tmp_path.iterdir()}
    cases = [
        ((tmp_path / "none",), "none is no file"),
        ((tmp_path,), "is no file"),
        (("",), "is no file"),
        ((other,), "line 1: is not JSON"),
        ((path, "--map", tmp_path / "a.jpg"), "does not end in .png"),
        ((trace_named_png,), "replace the trace"),
        ((path, "--map", tmp_path / "b" / ".." / "t.png", "--no-map"), None),
    ]
    for words, said in cases[:-1]:
        with pytest.raises(InputError, match=said):
            call(*words)
    with pytest.raises(SystemExit):  # --map and --no-map exclude each other
        call(*cases[-1][0])
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == files


def test_a_map_that_cannot_be_written_leaves_nothing(tmp_path, path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match="is a folder"):
        call(path, "--map", tmp_path / "folder.png")
    with pytest.raises(InputError, match="which is a file; choose another folder"):
        call(path, "--map", path / "map.png")
    with pytest.raises(InputError, match="/proc/map.png is not writable"):
        call(path, "--map", "/proc/map.png")
