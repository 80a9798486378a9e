"""The comparison of methods on Stage: a row, a video and a row of pictures for each, and finished ones stay."""

import json
import subprocess

import pytest
from PIL import Image

from benchmarks import methods as comparison
from packforcing_jax import methods
from packforcing_jax.io import video
from packforcing_jax.methods.method import sized
from packforcing_jax.sampling.pipeline import Pipeline

NAMES = ("longlive", "self-forcing-short")
FRAMES = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compared")


@pytest.fixture(scope="module")
def printed(folder):
    """What the command printed, and its exit code, once it has drawn both videos."""
    command = ["--out", str(folder), "--frames", str(FRAMES), "--methods", ",".join(NAMES)]

    def run(*flags):
        return comparison.main([*command, *flags])

    return run, run()


@pytest.fixture(scope="module")
def rows(folder, printed):
    return json.loads((folder / "methods.json").read_text())["methods"]


def test_every_row_says_what_was_made_and_compiled(rows, printed):
    assert printed[1] == 0
    assert list(rows) == list(NAMES)
    own = comparison.model_folder.opened(comparison.SHIPPED).experiment.cache
    for name, blocks in zip(NAMES, (6, 5), strict=True):
        row = rows[name]
        ours = sized(methods.METHODS[name], own)
        assert (row["blocks"], row["frames"], row["block"]) == (blocks, 4 * blocks, 4)
        assert (row["sink"], row["sink"] + row["recent"] + row["block"]) == (ours.sink, ours.window)
        assert row["keys"] == 16 * ours.window
        assert row["bytes"] > 0
        assert row["first"] > row["seconds"][1] > 0
        assert row["trained for"] is False
        assert {"denoise_program", "commit_program", "show_program"} <= set(row["compiled"])
        assert {len(found) for found in row["compiled"].values()} == {1}
    assert rows["longlive"]["compiled"]["recache_program"] == [1]
    assert "recache_program" not in rows["self-forcing-short"]["compiled"]


def test_videos_and_sheet_are_there(folder, rows):
    for name, row in rows.items():
        assert len(video.read(folder / f"{name}.mp4")) == row["frames"]
    with Image.open(folder / "methods.png") as sheet, Image.open(folder / "longlive.png") as row:
        assert row.size == (32 * comparison.COLUMNS, 32)
        colours = sheet.convert("RGB")
        corner = (comparison.LEFT, comparison.TOP)
        assert colours.getpixel(corner) == pytest.approx(row.getpixel((0, 0)), abs=16)
        last = (sheet.width - comparison.SCALE * 16, sheet.height - comparison.SCALE * 16)
        assert colours.getpixel(last) == comparison.PAPER  # the one clip has ended


def test_finished_methods_are_not_drawn_again(printed, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(subprocess, "run", lambda *words, **_: started.append(words))
    assert printed[0]("--markdown") == 0
    head, rule, *lines = capsys.readouterr().out.splitlines()
    assert started == []
    assert {line.count("|") for line in (head, rule, *lines)} == {head.count("|")}
    assert [line.split("|")[1].strip() for line in lines] == [f"`{name}`" for name in NAMES]


def test_other_settings_are_drawn_anew():
    keys = [comparison.plan("longlive", *each).key for each in ((24, 0), (24, 0), (28, 0), (24, 1))]
    assert len(set(keys)) == 3
    assert keys[0] == keys[1]


@pytest.mark.parametrize("blocks", [3, 6, 120])
def test_the_story_is_of_this_world_and_changes(blocks):
    prompts = comparison.story(blocks)
    assert len(prompts) == blocks
    assert len(set(prompts)) > 2
    Pipeline.from_pretrained().check(prompts)


def test_what_breaks_is_said():
    row = {"blocks": 8, "compiled": {"a": [0], "b": [0, 1], "c": [0, 1, 2], "d": [0, 6]}}
    assert comparison.breaks(row) == [
        "c is compiled 3 times",
        "d is compiled in the second half",
    ]
    assert comparison.programs(row) == "4, b 2 times, c 3 times, d 2 times"
    assert comparison.breaks({"failed": "its process ended with 1"})


def test_what_is_finished_survives_an_interruption_and_a_failure(tmp_path, monkeypatch, capsys):
    ends = {"packforcing": 3, "longlive": KeyboardInterrupt}

    def run(command, **_):
        end = ends[command[command.index("--child") + 1]]
        if end is KeyboardInterrupt:
            raise end
        return subprocess.CompletedProcess(command, end)

    monkeypatch.setattr(subprocess, "run", run)
    command = ["--out", str(tmp_path), "--methods", "packforcing,longlive"]
    assert comparison.main(command) == 130
    assert "the same command goes on" in capsys.readouterr().err
    held = json.loads((tmp_path / "methods.json").read_text())["methods"]
    assert held == {"packforcing": {"failed": "its process ended with 3"}}
    assert comparison.main(command[:-1] + ["packforcing"]) == 1
    assert "BROKEN packforcing: its process ended with 3" in capsys.readouterr().err


def test_an_unknown_method_is_refused(tmp_path, capsys):
    assert comparison.main(["--out", str(tmp_path / "a"), "--methods", "longlve"]) == 2
    assert "did you mean longlive" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
