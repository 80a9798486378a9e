"""`packforcing convert` says what it made, and assumptions apart from it."""

import json

import convert_layouts
import pytest
from safetensors.numpy import load_file

from packforcing_jax.cli import convert, main

PARAMETERS = sum(value.size for value in convert_layouts.dit().values())


@pytest.fixture
def student(tmp_path):
    return convert_layouts.put(
        tmp_path / "student.pt",
        {"generator_ema": convert_layouts.prefixed("model.", convert_layouts.dit()), "step": 12},
    )


def run(*words):
    return main.main(["convert", *map(str, words)])


def test_a_line_for_each_part_and_the_folder(student, tmp_path, capsys):
    assert run(student, "--out", tmp_path / "model") == 0
    said = capsys.readouterr()
    title, line, folder = said.out.splitlines()
    assert title.split() == ["part", "tensors", "ignored", "parameters", "dtype", "bytes"]
    assert line.split() == ["dit", "96", "0", f"{PARAMETERS:,}", "float32", f"{4 * PARAMETERS:,}"]
    assert folder == str(tmp_path / "model")
    assert "dit.heads=1 is assumed" in said.err
    assert "--tokenizer FILE" in said.err
    assert "96/96 tensors" in said.err


def test_the_same_for_machines(student, tmp_path, capsys):
    assert run(student, "--out", tmp_path / "model", "--set", "dit.heads=3", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["out"] == str(tmp_path / "model")
    assert said["parts"] == [
        {
            "part": "dit",
            "tensors": 96,
            "ignored": 0,
            "parameters": PARAMETERS,
            "dtype": "float32",
            "bytes": 4 * PARAMETERS,
        }
    ]
    assert not any("dit.heads" in note for note in said["notes"])


def test_there_and_back(student, tmp_path, capsys):
    assert run(student, "--out", tmp_path / "model", "--dtype", "bfloat16") == 0
    assert (
        run(tmp_path / "model", "--to-torch", tmp_path / "back.safetensors", "--part", "dit") == 0
    )
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == convert_layouts.dit().keys()
    assert {value.dtype.name for value in back.values()} == {"bfloat16"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["a.pt"], "one of the arguments --out --to-torch is required"),
        (["a.pt", "--out", "b", "--to-torch", "c"], "not allowed with argument"),
        (["a", "b", "--to-torch", "c.safetensors"], "--to-torch takes one model folder"),
        (["a.pt", "--out", "b", "--kind", "image"], "invalid choice: 'image'"),
        (["a.pt", "--out", "b", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["a.pt", "--out", "b", "--lora-alpha", "nan"], "--lora-alpha nan is no number"),
        (["--out", "b"], "the following arguments are required: SRC"),
        (["a.pt", "--out", "b", "--netwrok", "x"], "did you mean --network"),
    ],
)
def test_what_cannot_be_meant_is_refused(words, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_shows_an_example(capsys):
    assert run("--help") == 0
    said = capsys.readouterr().out
    assert "example:" in said
    assert "--to-torch" in said


def test_its_choices_are_those_of_the_converter():
    from packforcing_jax.convert import folders

    from packforcing_jax.io import model_folder

    assert set(convert.NETWORKS) == set(folders.KINDS)
    assert set(convert.PARTS) == set(model_folder.PARTS)
