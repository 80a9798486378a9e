"""`packforcing sample`: a video and what was asked for inside it; wrong requests leave one sentence and no file."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from packforcing_jax.cli import main
from packforcing_jax.io import checkpoints, video
from packforcing_jax.sampling import trace


def run(capsys, folder, *words):
    """(exit code, stdout, stderr) of one `sample` command with the tiny model."""
    code = main.main(["sample", "--weights", str(folder), *map(str, words)])
    return code, *capsys.readouterr()


def test_a_prompt_becomes_a_file_with_its_settings_inside(capsys, folder, tmp_path):
    out = tmp_path / "new" / "video.mp4"
    sheet = tmp_path / "sheet.png"
    words = ("--blocks", 3, "--seed", 5, "--out", out, "--sheet", sheet)
    code, said, _ = run(capsys, folder, "--prompt", "a red disc", *words)
    assert code == 0
    assert str(out) in said
    assert sheet.stat().st_size > 0
    assert video.read(out).shape == (9, 384, 192, 3)  # 3 blocks of 3 frames of 16 x 8, enlarged
    settings = video.settings(out)
    assert settings["seed"] == 5
    assert settings["prompts"] == [[0, "a red disc"]]
    assert settings["blocks"] == 3


def test_seconds_and_timeline_and_json(capsys, folder, tmp_path):
    story = tmp_path / "story.txt"
    story.write_text("0: a red disc\n2: lime square\n")
    code, said, _ = run(
        capsys, folder, "--timeline", story, "--seconds", 2, "--out", tmp_path / "v.mp4", "--json"
    )
    made = json.loads(said)
    assert code == 0
    assert made["blocks"] == 4
    assert video.settings(tmp_path / "v.mp4")["prompts"] == [[0, "a red disc"], [2, "lime square"]]


def test_the_same_request_gives_the_same_pixels(capsys, folder, tmp_path):
    made = []
    for name in ("a.mp4", "b.mp4"):
        assert (
            run(capsys, folder, "--prompt", "a red disc", "--blocks", 2, "--out", tmp_path / name)[
                0
            ]
            == 0
        )
        made.append(video.read(tmp_path / name))
    assert (made[0] == made[1]).all()


PROMPT = ["--prompt", "a red disc"]
HOST = ["--set", "cache.archive=host"]
LATE = ["--set", "cache.scope=shared", "--set", "cache.timing=late"]
WRONG = {
    "unknown flag": (["--promt", "a red disc"], ["--promt", "--prompt"]),
    "unknown profile": ([*PROMPT, "--memory", "papre"], ["papre", "paper"]),
    "unknown key": ([*PROMPT, "--set", "cache.tpo=3"], ["tpo", "top"]),
    "value of a wrong kind": ([*PROMPT, "--set", "cache.top=many"], ["cache.top", "many"]),
    "impossible value": ([*PROMPT, "--set", "cache.top=9"], ["cache.top=9", "capacity=4"]),
    "sink that is no number of frames": (
        [*PROMPT, "--set", "cache.sink=7.5"],
        ["cache.sink=7.5", "int"],
    ),
    "sink of no whole blocks": (
        [*PROMPT, "--set", "cache.sink=7"],
        ["cache.sink=7", "whole blocks of 3 frames"],
    ),
    "a choice per layer on the host": (
        [*PROMPT, *HOST, *LATE[2:]],
        ["archive='host'", "scope='layer'", "=shared"],
    ),
    "an early choice on the host": (
        [*PROMPT, *HOST, *LATE[:2]],
        ["archive='host'", "timing='first'", "timing=late"],
    ),
    "keys left turned on the host": (
        [*PROMPT, *HOST, *LATE, "--set", "cache.rope_adjustment=incremental"],
        ["archive='host'", "'incremental'", "rope_adjustment=sink"],
    ),
    "unknown selection": (
        [*PROMPT, "--set", "cache.selection=afinity"],
        ["'afinity'", "did you mean affinity?"],
    ),
    "trace in place of a folder": ([*PROMPT, "--trace", "."], ["--trace .", "folder"]),
    "trace that cannot be written": (
        [*PROMPT, "--trace", "/proc/run.jsonl"],
        ["/proc/run.jsonl", "not writable"],
    ),
    "saves in a place that is none": (
        [*PROMPT, "--state", "/proc/version/saves"],
        ["--state /proc/version/saves", "which is a file"],
    ),
    "no pace of saving": ([*PROMPT, "--state", "saves", "--every", "0"], ["--every 0", "1"]),
    "no pace, nothing saved": ([*PROMPT, "--every", "-2"], ["--every -2", "1"]),
    "video among the saves": (
        [*PROMPT, "--state", "a", "--out", "a/v.mp4"],
        ["--out a/v.mp4", "--state a"],
    ),
    "trace among the saves": (
        [*PROMPT, "--state", "a", "--trace", "a/t.jsonl"],
        ["--trace a/t.jsonl", "--state a"],
    ),
    "trace in place of the video": (
        [*PROMPT, "--out", "a.mp4", "--trace", "./a.mp4"],
        ["--trace ./a.mp4", "--out"],
    ),
    "unknown word": (["--prompt", "a purpel disc"], ["purpel"]),
    "prompt and prompts": ([*PROMPT, "--prompts", "x"], ["--prompt", "--prompts"]),
    "missing prompts": (["--prompts", "nowhere.txt"], ["nowhere.txt"]),
    "one trace for many videos": (
        ["--prompts", "x", "--trace", "t.jsonl"],
        ["--trace t.jsonl", "--prompts"],
    ),
    "unknown number format": (
        [*PROMPT, "--set", "dtypes.cache=float8"],
        ["dtypes.cache='float8'", "bfloat16"],
    ),
    "more than there is memory": (
        [*PROMPT, "--set", "latent=(1024,1024)"],
        ["needs", "of memory", "use a larger device"],
    ),
    "empty prompt": (["--prompt", "  "], ["--prompt", "empty"]),
    "prompt and timeline": ([*PROMPT, "--timeline", "x"], ["--prompt", "--timeline"]),
    "no story for this model": ([], ["--prompt"]),
    "missing timeline": (["--timeline", "nowhere.txt"], ["nowhere.txt"]),
    "no blocks": ([*PROMPT, "--blocks", "0"], ["--blocks 0"]),
    "negative blocks": ([*PROMPT, "--blocks", "-4"], ["--blocks -4"]),
    "blocks that are no number": ([*PROMPT, "--blocks", "two"], ["two"]),
    "no seconds": ([*PROMPT, "--seconds", "0"], ["--seconds 0"]),
    "negative seconds": ([*PROMPT, "--seconds", "-1"], ["--seconds -1"]),
    "NaN seconds": ([*PROMPT, "--seconds", "nan"], ["--seconds nan"]),
    "two lengths": ([*PROMPT, "--seconds", "3", "--blocks", "3"], ["--seconds", "--blocks"]),
    "negative seed": ([*PROMPT, "--seed", "-1"], ["--seed -1"]),
    "a folder as output": ([*PROMPT, "--out", "."], ["."]),
    "another kind of file": ([*PROMPT, "--out", "video.gif"], ["video.gif", ".mp4"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_one_sentence_and_leaves_nothing(
    case, capsys, folder, tmp_path, monkeypatch
):
    words, named = WRONG[case]
    monkeypatch.chdir(tmp_path)
    code, said, complaint = run(capsys, folder, *words)
    assert code == 2
    assert said == ""
    assert complaint.startswith("packforcing: ")
    assert complaint.count("\n") == 1
    assert "Traceback" not in complaint
    assert all(name in complaint for name in named), complaint
    assert list(tmp_path.iterdir()) == []


# Many videos from one file

LINES = [
    {"prompt": "a red disc"},
    {
        "timeline": [[0, "a red disc"], [2, "lime square"]],
        "blocks": 4,
        "seed": 9,
        "name": "two halves",
    },
    {"prompt": "a red disc", "set": ["cache.top=1"], "seconds": 2},
]


@pytest.fixture
def lines(tmp_path):
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return tmp_path / "lines.jsonl"


def test_every_line_is_a_video_with_its_own_settings(capsys, folder, tmp_path, lines):
    words = ("--blocks", 3, "--seed", 5, "--out", tmp_path / "made")
    assert run(capsys, folder, "--prompts", lines, *words)[0] == 0
    made = {path.name: video.settings(path) for path in (tmp_path / "made").glob("*.mp4")}
    assert sorted(made) == ["a-red-disc-2.mp4", "a-red-disc.mp4", "two halves.mp4"]
    assert [made[name]["blocks"] for name in sorted(made)] == [4, 3, 4]
    assert [made[name]["seed"] for name in sorted(made)] == [5, 5, 9]
    assert made["two halves.mp4"]["prompts"] == [[0, "a red disc"], [2, "lime square"]]
    assert made["a-red-disc-2.mp4"]["set"] == ["cache.top=1"]


def test_a_line_gives_the_video_that_the_prompt_alone_gives(capsys, folder, tmp_path):
    (tmp_path / "lines.txt").write_text("# two videos\nlime square\n\na red disc\n")
    assert (
        run(
            capsys,
            folder,
            "--prompts",
            tmp_path / "lines.txt",
            "--blocks",
            2,
            "--out",
            tmp_path / "made",
        )[0]
        == 0
    )
    assert (
        run(
            capsys, folder, "--prompt", "a red disc", "--blocks", 2, "--out", tmp_path / "alone.mp4"
        )[0]
        == 0
    )
    assert (
        video.read(tmp_path / "made" / "a-red-disc.mp4") == video.read(tmp_path / "alone.mp4")
    ).all()


def test_finished_lines_are_skipped_and_changed_ones_made_again(capsys, folder, tmp_path):
    story = tmp_path / "lines.txt"
    made = tmp_path / "made"

    def again(text):
        story.write_text(text)
        before = {path.name: path.stat().st_mtime_ns for path in made.glob("*.mp4")}
        assert run(capsys, folder, "--prompts", story, "--blocks", 2, "--out", made)[0] == 0
        after = {path.name: path.stat().st_mtime_ns for path in made.glob("*.mp4")}
        return sorted(name for name, at in after.items() if before.get(name) != at)

    assert again("a red disc\nlime square\n") == ["a-red-disc.mp4", "lime-square.mp4"]
    assert again("lime square\na red disc\n") == []
    assert again("lime square\na red disc\na lime disc\n") == ["a-lime-disc.mp4"]
    (made / "lime-square.mp4").write_bytes(b"cut off")
    with (made / "finished.jsonl").open("a") as ledger:
        ledger.write('{"key": "')  # as a kill leaves it
    assert again("lime square\na red disc\n") == ["lime-square.mp4"]
    assert (
        run(capsys, folder, "--prompts", story, "--blocks", 2, "--seed", 3, "--out", made)[0] == 0
    )
    assert video.settings(made / "a-red-disc.mp4")["seed"] == 3


def test_a_wrong_line_stops_everything_before_the_first_video(capsys, folder, tmp_path):
    lines = [LINES[0], {"prompt": "a purpel disc"}]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _, complaint = run(
        capsys, folder, "--prompts", tmp_path / "lines.jsonl", "--out", tmp_path / "made"
    )
    assert code == 2
    assert "lines.jsonl, line 2" in complaint
    assert "purpel" in complaint
    assert not (tmp_path / "made").exists()


def test_half_precision_is_sampled_and_named(capsys, folder, tmp_path):
    half = [
        word
        for name in ("params", "compute", "cache")
        for word in ("--set", f"dtypes.{name}=bfloat16")
    ]
    code, _, said = run(capsys, folder, *PROMPT, "--blocks", 3, *half, "--out", tmp_path / "v.mp4")
    assert code == 0
    assert "bfloat16" in said
    assert video.read(tmp_path / "v.mp4").std() > 0


# Runs that are traced, kept and continued

STORY = ["a red disc"] * 4 + ["lime square"] * 7


@pytest.fixture
def story(tmp_path):
    (tmp_path / "story.txt").write_text("0: a red disc\n4: lime square\n")
    return tmp_path / "story.txt"


def kept(capsys, folder, story, place, blocks, *more):
    """A run with all its files in `place`: (exit code, stdout, stderr)."""
    return run(
        capsys,
        folder,
        "--timeline",
        story,
        "--blocks",
        blocks,
        "--every",
        4,
        "--state",
        place / "saves",
        "--out",
        place / "v.mp4",
        "--trace",
        place / "t.jsonl",
        *more,
    )


def contents(place):
    return {
        path.relative_to(place): path.read_bytes() for path in place.rglob("*") if path.is_file()
    }


def test_a_trace_tells_of_the_blocks_that_were_drawn(capsys, folder, story, tmp_path):
    code, _, _ = run(
        capsys,
        folder,
        "--timeline",
        story,
        "--blocks",
        7,
        "--seed",
        5,
        "--out",
        tmp_path / "v.mp4",
        "--trace",
        tmp_path / "new" / "t.jsonl",
    )
    assert code == 0
    found = trace.read(tmp_path / "new" / "t.jsonl")
    assert [block.prompt for block in found.blocks] == STORY[:7]
    assert (found.header["seed"], found.header["prompts"]) == (
        5,
        [[0, "a red disc"], [4, "lime square"]],
    )
    assert [len(block.layers[0].ids) for block in found.blocks] == [0, 0, 0, 1, 2, 2, 2]
    assert main.main(["inspect", "--no-map", str(tmp_path / "new" / "t.jsonl")]) == 0


def test_tracing_and_keeping_leave_the_video_alone(capsys, folder, story, tmp_path):
    assert kept(capsys, folder, story, tmp_path / "kept", 5)[0] == 0
    plain = ("--timeline", story, "--blocks", 5, "--out", tmp_path / "plain.mp4")
    assert run(capsys, folder, *plain)[0] == 0
    assert (tmp_path / "plain.mp4").read_bytes() == (tmp_path / "kept" / "v.mp4").read_bytes()


def test_a_run_goes_on_from_its_last_save(capsys, folder, story, tmp_path):
    """What was drawn behind that save, and a line that was cut off, are drawn and written again."""
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    assert kept(capsys, folder, story, whole, 11)[0] == 0
    shutil.copytree(whole, broken)
    assert checkpoints.Checkpoints(broken / "saves").latest() == 11
    shutil.rmtree(broken / "saves" / "11")
    lines = (whole / "t.jsonl").read_bytes()
    (broken / "t.jsonl").write_bytes(lines[:-40])
    code, said, told = kept(capsys, folder, story, broken, 11)
    assert code == 0
    assert "goes on behind block 8" in told
    assert "11 blocks" in said
    for file in ("v.mp4", "t.jsonl"):
        assert (broken / file).read_bytes() == (whole / file).read_bytes(), file
    assert len(video.read(broken / "v.mp4")) == 33


def test_a_finished_run_can_be_asked_again_and_made_longer(capsys, folder, story, tmp_path):
    whole = tmp_path / "whole"
    grown = tmp_path / "grown"
    assert kept(capsys, folder, story, grown, 6)[0] == 0
    before = contents(grown)
    assert kept(capsys, folder, story, grown, 6)[0] == 0
    assert contents(grown) == before
    code, said, _ = kept(capsys, folder, story, grown, 11, "--json")
    assert code == 0
    assert (json.loads(said)["resumed_at"], json.loads(said)["blocks"]) == (6, 11)
    assert kept(capsys, folder, story, whole, 11)[0] == 0
    one, other = (trace.read(place / "t.jsonl").blocks for place in (whole, grown))
    assert [block.latent for block in one] == [block.latent for block in other]
    assert (video.read(grown / "v.mp4") == video.read(whole / "v.mp4")).all()


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A traced run of 5 blocks, kept behind the fourth and the last."""
    place = tmp_path_factory.mktemp("finished")
    (place / "story.txt").write_text("0: a red disc\n4: lime square\n")
    assert (
        main.main(
            [
                "sample",
                "--weights",
                str(folder),
                "--timeline",
                str(place / "story.txt"),
                "--blocks",
                "5",
                "--every",
                "4",
                "--state",
                str(place / "saves"),
                "--out",
                str(place / "v.mp4"),
                "--trace",
                str(place / "t.jsonl"),
            ]
        )
        == 0
    )
    return place


OTHERS = {
    "another seed": (["--seed", "9"], "seed: 0 saved, 9 wanted"),
    "another memory": (["--set", "cache.top=1"], "experiment.cache.top: 2 saved, 1 wanted"),
    "another profile": (["--memory", "no-mid"], "experiment.cache"),
    "another story": (["--timeline", "other.txt"], "tells another story from block 3 on"),
    "fewer blocks": (["--blocks", "3"], "holds 5 blocks of this story, and 3 are asked for"),
    "another video": (["--out", "other.mp4"], "other.mp4 has 0 bytes"),
    "another trace": (["--trace", "other.jsonl"], "other.jsonl has 0 bytes"),
}


def refused(capsys, folder, place, *words):
    """The complaint about a run in `place` with other words, which may not change a file there."""
    before = contents(place)
    code, said, complaint = kept(capsys, folder, place / "story.txt", place, 9, *words)
    assert code == 2
    assert said == ""
    assert complaint.splitlines()[-1].startswith("packforcing: ")
    assert "Traceback" not in complaint
    assert contents(place) == before
    return complaint.splitlines()[-1]


@pytest.mark.parametrize("case", OTHERS)
def test_saves_of_another_run_are_refused_and_left_alone(
    case, capsys, folder, finished, tmp_path, monkeypatch
):
    words, named = OTHERS[case]
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "other.txt").write_text("0: a red disc\n3: lime square\n")
    monkeypatch.chdir(tmp_path)
    assert named in refused(capsys, folder, tmp_path / "run", *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.txt", "run"]


def test_a_damaged_save_is_refused_with_the_way_out(capsys, folder, finished, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(finished, place)
    largest = max(
        (place / "saves" / "5").rglob("*"),
        key=lambda path: path.is_file() and path.stat().st_size,
    )
    largest.write_bytes(largest.read_bytes()[:-7])
    assert "delete it to continue from the one before" in refused(capsys, folder, place)
    shutil.rmtree(place / "saves" / "5")
    code, _, told = kept(capsys, folder, place / "story.txt", place, 5)
    assert code == 0
    assert "goes on behind block 4" in told
    for file in ("v.mp4", "t.jsonl"):
        assert (place / file).read_bytes() == (finished / file).read_bytes(), file


def test_a_folder_of_other_things_takes_no_saves(capsys, folder, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "saves" / "thesis.txt").write_text("years")
    assert "thesis.txt" in refused(capsys, folder, tmp_path / "run")


def test_a_trace_cannot_begin_in_the_middle(capsys, folder, finished, tmp_path):
    place = tmp_path / "run"
    words = (
        "--timeline",
        finished / "story.txt",
        "--out",
        place / "v.mp4",
        "--state",
        place / "saves",
    )
    assert run(capsys, folder, *words, "--blocks", 2)[0] == 0
    code, _, complaint = run(capsys, folder, *words, "--blocks", 3, "--trace", place / "t.jsonl")
    assert code == 2
    assert "was not traced from its start; leave --trace out" in complaint
    assert not (place / "t.jsonl").exists()
    assert run(capsys, folder, *words, "--blocks", 3)[0] == 0


def test_missing_and_broken_weights_are_refused(capsys, folder, tmp_path):
    code, _, complaint = run(capsys, tmp_path / "nowhere", *PROMPT, "--out", tmp_path / "v.mp4")
    assert code == 2
    assert "nowhere" in complaint
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        data = file.read_bytes()
        (broken / file.name).write_bytes(
            data[: len(data) // 2] if file.suffix == ".safetensors" else data
        )
    code, _, complaint = run(capsys, broken, *PROMPT, "--out", tmp_path / "v.mp4")
    assert code == 2
    assert "dit.safetensors" in complaint
    assert not (tmp_path / "v.mp4").exists()


def test_an_unwritable_output_is_refused(capsys, folder, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    code, _, complaint = run(capsys, folder, *PROMPT, "--out", tmp_path / "file" / "v.mp4")
    assert code == 2
    assert str(tmp_path / "file") in complaint


PROGRAM = """
from packforcing_jax.cli import main
raise SystemExit(main.main())
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_video_plays(folder, tmp_path, stop):
    out = tmp_path / "v.mp4"
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        "sample",
        "--weights",
        folder,
        *PROMPT,
        "--blocks",
        "4000",
        "--out",
        out,
    ]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 120
        while not (out.exists() and out.stat().st_size > 5000) and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, stop)  # as a terminal does: everyone in the group hears it
        complaint = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in complaint
    frames = video.read(out)
    assert len(frames) >= 3
    assert len(frames) % 3 == 0
    assert video.settings(out)["blocks"] == 4000


def test_every_video_has_its_place_before_the_first_is_drawn(folder, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a red disc\na green disc\n")
    (tmp_path / "videos").mkdir()
    os.mkfifo(tmp_path / "videos" / "a-green-disc.mp4")
    words = ("--prompts", tmp_path / "p.txt", "--blocks", "1", "--out", tmp_path / "videos")
    assert main.main(["sample", "--weights", str(folder), *map(str, words)]) == 2
    assert "a-green-disc.mp4 is a pipe" in capsys.readouterr().err
    assert [each.name for each in (tmp_path / "videos").iterdir()] == ["a-green-disc.mp4"]
