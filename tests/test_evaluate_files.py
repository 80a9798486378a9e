"""`packforcing evaluate VIDEOS...`: which files are measured, what lies in the folder of results, what is refused."""

import csv
import errno
import importlib.util
import json
import re

import numpy as np
import pytest

from packforcing_jax.cli import evaluate_files, main
from packforcing_jax.errors import InputError
from packforcing_jax.evaluation import native, results, suites, video_files
from packforcing_jax.evaluation.suite import Meaning, Measured, Options, Results
from packforcing_jax.io import ffmpeg, video

FPS = 8
SIZE = (48, 32)
BROKEN = {"cut.mp4", "empty.mp4", "one.mp4", "text.mp4"}


def write_video(path, frames=12, seed=0):
    """A texture that moves by a pixel a frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = np.random.default_rng(seed).integers(0, 255, (SIZE[1], SIZE[0] + frames, 3), np.uint8)
    moving = np.stack([picture[:, at : at + SIZE[0]] for at in range(frames)])
    with video.Writer(path, fps=FPS, size=SIZE, settings={}) as writer:
        writer.write(moving)
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two videos, one of them deeper, beside files that are none, or not whole."""
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "b.mp4", 12)
    write_video(folder / "deep" / "a.mp4", 9, seed=1)
    write_video(folder / "one.mp4", 1)
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no video\n")
    whole = (folder / "b.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (folder / "notes.txt").write_text("left alone")
    (folder / ".hidden.mp4").write_text("left alone")
    return folder


@pytest.fixture(scope="module")
def measured(clips, tmp_path_factory):
    """The folder of results, and the exit code."""
    out = tmp_path_factory.mktemp("out") / "figures"
    words = ["evaluate", str(clips), "--window", "0.5", "--out", str(out)]
    return out, main.main(words)


def table(out):
    return json.loads((out / "results.json").read_text())


def test_good_videos_are_measured_and_broken_ones_named(measured):
    out, code = measured
    found = table(out)
    assert code == 1
    assert set(found["videos"]) == {"b.mp4", "deep/a.mp4"}
    assert set(found["skipped"]) == BROKEN
    assert "is empty" in found["skipped"]["empty.mp4"]
    assert "holds 1 frame" in found["skipped"]["one.mp4"]
    for name in ("text.mp4", "cut.mp4"):
        assert "cannot be decoded" in found["skipped"][name]


def test_every_figure_stands_there_whole_by_window_and_at_both_ends(measured):
    found = table(measured[0])
    names = set(native.FIGURES)
    assert set(found["protocol"]["figures"]) == names
    assert all(
        set(each) == {"unit", "better", "meaning"} for each in found["protocol"]["figures"].values()
    )
    one = found["videos"]["b.mp4"]
    for part in ("figures", "windows", "first", "last", "intervals"):
        assert set(one[part]) == names
    assert (one["frames"], one["fps"], one["size"]) == (12, FPS, list(SIZE))
    assert one["window_frames"] == [[0, 4], [4, 8], [8, 12]]
    assert {len(values) for values in one["windows"].values()} == {3}
    low, high = one["intervals"]["flow"]
    assert low <= np.mean(one["windows"]["flow"]) <= high
    assert one["figures"]["flow"] == pytest.approx(100 / SIZE[0], rel=0.3)
    over = found["summary"]["sharpness"]
    both = [each["figures"]["sharpness"] for each in found["videos"].values()]
    assert over["mean"] == pytest.approx(np.mean(both))
    assert over["n"] == 2
    assert [each["n"] for each in found["curves"]["flow"]] == [2, 2, 1]
    assert found["protocol"]["suite"] == "native"
    assert found["protocol"]["window_seconds"] == 0.5


def test_the_other_files_hold_the_same_numbers(measured):
    out, _ = measured
    found = table(out)["videos"]
    rows = list(csv.DictReader((out / "figures.csv").read_text().splitlines()))
    assert len(rows) == 2 * len(native.FIGURES)
    for row in rows:
        value = found[row["video"]]["figures"][row["figure"]]
        assert row["value"] == ("" if value is None else str(value))
    windows = list(csv.DictReader((out / "windows.csv").read_text().splitlines()))
    assert len(windows) == (3 + 2) * len(native.FIGURES)
    page = (out / "results.md").read_text()
    assert all(name in page for name in (*native.FIGURES, "deep/a.mp4", *BROKEN))
    assert (out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_what_was_measured_is_not_measured_again(measured, clips, monkeypatch, tmp_path, capsys):
    out, _ = measured
    before = table(out)
    counted = []
    once = native.parts
    monkeypatch.setattr(native, "parts", lambda blocks: counted.append(1) or once(blocks))
    words = ["evaluate", "--out", str(out), "--json", "--window"]
    good = [str(clips / "b.mp4"), str(clips / "deep" / "a.mp4")]
    copy = tmp_path / "copy.mp4"
    copy.write_bytes((clips / "b.mp4").read_bytes())
    assert main.main([*words, "0.5", *good]) == 0
    assert json.loads(capsys.readouterr().out)["videos"] == before["videos"]
    assert main.main([*words, "0.5", str(copy)]) == 0
    assert counted == []
    assert main.main([*words, "0.75", str(copy)]) == 0
    assert counted == [1]
    copy.write_bytes(write_video(tmp_path / "other.mp4", 10, seed=5).read_bytes())
    assert main.main([*words, "0.75", str(copy)]) == 0
    assert counted == [1, 1]


def test_a_store_file_that_is_broken_counts_as_none(tmp_path):
    store = results.Store(tmp_path, {"version": 1})
    one = Measured({"flow": 1.5}, {"flow": [1.0, None]})
    assert store.put("content", one) == one == store.get("content")
    assert results.Store(tmp_path, {"version": 2}).get("content") is None
    for content in ("{", "[]", '{"other": 1}'):
        next((tmp_path / results.STORE).iterdir()).write_text(content)
        assert store.get("content") is None


def test_prompts_are_noted_under_their_rule(clips, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"file": "a.mp4", "prompt": "a cat", "extended": "a cat on a wide field"}\n\n'
        '{"file": "b.mp4", "prompt": "a dog"}\n'
    )
    words = ["evaluate", str(clips / "b.mp4"), str(clips / "deep"), "--prompts", str(prompts)]
    out = ["--json", "--out", str(tmp_path / "out")]
    for rule, noted in (
        ("short", {"b.mp4": "a dog", "deep/a.mp4": "a cat"}),
        ("extended", {"b.mp4": None, "deep/a.mp4": "a cat on a wide field"}),
    ):
        assert main.main([*words, "--rule", rule, *out]) == 0
        found = json.loads(capsys.readouterr().out)
        assert {name: each["prompt"] for name, each in found["videos"].items()} == noted
        assert found["protocol"]["rule"] == rule


# What is found --------------------------------------------------------------------------------------------------------


def names(*places):
    return [each.name for each in video_files.find(places)]


def test_names_are_paths_below_the_deepest_common_folder(clips):
    assert names(clips / "deep") == ["a.mp4"]
    assert names(clips / "deep" / "a.mp4") == ["a.mp4"]
    assert names(clips / "deep", clips / "b.mp4") == ["b.mp4", "deep/a.mp4"]
    assert names(clips, clips / "b.mp4", clips / "deep") == names(clips)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 1 is not JSON"),
        ("[1]", "is not a table"),
        ('{"file": "b.mp4"}', "lacks prompt"),
        ('{"file": "b.mp4", "prompt": " "}', "prompt=' ' is not a text"),
        ('{"file": "b.mp4", "prompt": "x", "seed": "1"}', "'seed' is unknown"),
        ('{"file": "c.mp4", "prompt": "x"}', "file='c.mp4' is not among the videos"),
        ('{"file": "b.mp4", "prompt": "x"}\n{"file": "b.mp4", "prompt": "y"}', "line 2: b.mp4 has"),
        ("", "holds no prompt"),
    ],
)
def test_prompts_that_fit_no_video_are_refused(clips, tmp_path, line, sentence):
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(InputError, match=re.escape(sentence)):
        video_files.read_prompts(path, video_files.find([clips / "b.mp4"]))


def test_a_name_that_may_be_two_videos_is_refused(tmp_path):
    videos = [video_files.VideoFile(f"{folder}/a.mp4", tmp_path) for folder in "xy"]
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"file": "a.mp4", "prompt": "x"}')
    with pytest.raises(InputError, match="may be x/a.mp4 or y/a.mp4"):
        video_files.read_prompts(path, videos)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nowhere", "--out", "o"], "nowhere does not exist"),
        (["VIDEO"], "--out is missing"),
        (["", "--out", "o"], "One of VIDEOS is empty"),
        (
            ["VIDEO", "--out", "o", "--suite", "natif"],
            "--suite natif is unknown; did you mean native",
        ),
        (["VIDEO", "--out", "o", "--suite", "stage"], "--suite stage makes its own videos"),
        (["--suite", "native"], "--suite native needs VIDEOS"),
        (["--out", "o"], "--out is about video files; give VIDEOS"),
        (["--window", "2"], "--window is about video files"),
        (["VIDEO", "--out", "o", "--mode", "teacher"], "--mode is about a Stage model"),
        (["VIDEO", "--out", "o", "--set", "cache.top=4"], "--set is about a Stage model"),
        (["VIDEO", "--out", "o", "--window", "nan"], "--window nan is out of range"),
        (["VIDEO", "--out", "o", "--window", "0"], "--window 0.0 is out of range"),
        (["VIDEO", "--out", "o", "--block", "1"], "--block 1 is out of range"),
        (["VIDEO", "--out", "o", "--seed", "-1"], "--seed -1 is out of range"),
        (["VIDEO", "--out", "o", "--rule", "extended"], "give them with --prompts"),
        (["VIDEO", "--out", "o", "--rule", "long"], "invalid choice: 'long'"),
        (["VIDEO", "--out", "o", "--prompts", "nowhere"], "nowhere cannot be read"),
        (["VIDEO", "--out", "VIDEO"], "is no folder"),
        (["EMPTY", "--out", "o"], "holds no video"),
    ],
)
def test_bad_flags_end_with_code_2_and_leave_nothing(
    clips, tmp_path, monkeypatch, capsys, words, sentence
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    at = {"VIDEO": str(clips / "b.mp4"), "EMPTY": "empty"}
    assert main.main(["evaluate", *(at.get(word, word) for word in words)]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(("library", "name"), [("cv2", "OpenCV"), ("matplotlib", "Matplotlib")])
def test_a_missing_library_is_named_with_its_extra_before_anything_is_read(
    library, name, tmp_path, monkeypatch, capsys
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda each, *more: None if each == library else find(each, *more),
    )
    assert main.main(["evaluate", "nowhere.mp4", "--out", str(tmp_path / "o")]) == 2
    err = capsys.readouterr().err
    assert f"{name}, which measures videos, is not installed" in err
    assert "pip install 'packforcing-jax[eval]'" in err


def test_results_of_another_suite_are_not_replaced(clips, tmp_path, capsys):
    words = ["evaluate", str(clips / "b.mp4"), "--out", str(tmp_path)]
    other = Results("other", {}, {"score": Meaning("%", "higher", "a score")}, {}, {"x": "broken"})
    results.write(tmp_path, other, 0)
    before = (tmp_path / "results.json").read_bytes()
    assert main.main(words) == 2
    assert "holds results of suite other" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_bytes() == before
    (tmp_path / "results.json").write_text("[]")
    assert main.main(words) == 2
    assert "is not a file of results" in capsys.readouterr().err


def test_the_flags_that_suites_read_are_options():
    fields = set(Options.__dataclass_fields__) - {"watch"}
    assert all(suite.flags <= fields for suite in suites.SUITES.values())
    assert evaluate_files.RULES == video_files.RULES


# Reading videos -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 3 * 48 * 32 * 3, 1 << 26])
def test_a_stream_gives_every_frame_in_blocks_of_a_bounded_size(clips, most):
    blocks = list(video.stream(clips / "b.mp4", most))
    assert all(block.nbytes <= max(most, SIZE[0] * SIZE[1] * 3) for block in blocks)
    np.testing.assert_array_equal(np.concatenate(blocks), video.read(clips / "b.mp4"))


def test_a_stream_that_is_left_ends_its_program(clips, monkeypatch):
    started = []
    start = ffmpeg.start
    monkeypatch.setattr(ffmpeg, "start", lambda words: started.append(start(words)) or started[-1])
    stream = video.stream(clips / "b.mp4", 1)
    next(stream)
    stream.close()
    assert started[0].returncode is not None


def test_the_rate_of_a_video_is_that_of_its_times(clips):
    assert video.probe(clips / "b.mp4") == (12, FPS, SIZE)
    assert video.probe(clips / "one.mp4") == (1, 0, SIZE)


@pytest.mark.parametrize("broken", ["text.mp4", "empty.mp4"])
@pytest.mark.parametrize("read", [video.probe, lambda path: list(video.stream(path))])
def test_what_is_no_video_is_refused(clips, broken, read):
    with pytest.raises(InputError, match="cannot be decoded"):
        read(clips / broken)


def test_a_video_that_lacks_its_end_is_refused_though_its_beginning_decodes(clips):
    with pytest.raises(InputError, match="cannot be decoded"):
        list(video.stream(clips / "cut.mp4"))


def test_a_disk_that_is_full_is_no_fault_of_the_video(clips, tmp_path, monkeypatch, capsys):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(results.atomic, "write", full)
    assert main.main(["evaluate", str(clips / "b.mp4"), "--out", str(tmp_path / "o")]) == 3
    assert "free space" in capsys.readouterr().err
