"""`packforcing sample`: a video and what was asked for inside it; wrong requests leave one sentence and no file."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from packforcing_jax import video
from packforcing_jax.cli import main


def run(capsys, folder, *words):
    """(exit code, stdout, stderr) of one `sample` command with the tiny model."""
    code = main.main(["sample", "--weights", str(folder), *map(str, words)])
    return code, *capsys.readouterr()


def test_a_prompt_becomes_a_file_with_its_settings_inside(capsys, folder, tmp_path):
    out, sheet = tmp_path / "new" / "video.mp4", tmp_path / "sheet.png"
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
    code, said, _ = run(capsys, folder, "--timeline", story, "--seconds", 2, "--out", tmp_path / "v.mp4", "--json")
    made = json.loads(said)
    assert code == 0
    assert made["blocks"] == 4
    assert video.settings(tmp_path / "v.mp4")["prompts"] == [[0, "a red disc"], [2, "lime square"]]


def test_the_same_request_gives_the_same_pixels(capsys, folder, tmp_path):
    made = []
    for name in ("a.mp4", "b.mp4"):
        assert run(capsys, folder, "--prompt", "a red disc", "--blocks", 2, "--out", tmp_path / name)[0] == 0
        made.append(video.read(tmp_path / name))
    assert (made[0] == made[1]).all()


PROMPT = ["--prompt", "a red disc"]
WRONG = {
    "unknown flag": (["--promt", "a red disc"], ["--promt", "--prompt"]),
    "unknown profile": ([*PROMPT, "--memory", "papre"], ["papre", "paper"]),
    "unknown key": ([*PROMPT, "--set", "cache.tpo=3"], ["tpo", "top"]),
    "value of a wrong kind": ([*PROMPT, "--set", "cache.top=many"], ["cache.top", "many"]),
    "impossible value": ([*PROMPT, "--set", "cache.top=9"], ["cache.top=9", "capacity=4"]),
    "unknown word": (["--prompt", "a purpel disc"], ["purpel"]),
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
def test_a_wrong_request_is_one_sentence_and_leaves_nothing(case, capsys, folder, tmp_path, monkeypatch):
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


def test_missing_and_broken_weights_are_refused(capsys, folder, tmp_path):
    code, _, complaint = run(capsys, tmp_path / "nowhere", *PROMPT, "--out", tmp_path / "v.mp4")
    assert code == 2
    assert "nowhere" in complaint
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in folder.iterdir():
        data = file.read_bytes()
        (broken / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    code, _, complaint = run(capsys, broken, *PROMPT, "--out", tmp_path / "v.mp4")
    assert code == 2
    assert "model.safetensors" in complaint
    assert not (tmp_path / "v.mp4").exists()


def test_an_unwritable_output_is_refused(capsys, folder, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    code, _, complaint = run(capsys, folder, *PROMPT, "--out", tmp_path / "file" / "v.mp4")
    assert code == 2
    assert str(tmp_path / "file") in complaint


PROGRAM = """
import signal
from packforcing_jax.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell takes it from what it runs in the background
raise SystemExit(main.main())
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_video_plays(folder, tmp_path, stop):
    out = tmp_path / "v.mp4"
    command = [sys.executable, "-c", PROGRAM, "sample", "--weights", folder, *PROMPT, "--blocks", "4000",
               "--out", out]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
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
