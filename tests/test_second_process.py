"""Two processes of the program at one place: the second is refused, and goes on once the first is killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import quick

HERE = Path(__file__).parent
PROMPT = "a red disc walks"
LONG = 100_000  # blocks or steps, more than a test waits for
CONFIG = """
import test_runs
experiment, train = test_runs.real(objective="flow_matching", steps=100_000, save_every=1)
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Programs that several processes read."""
    return tmp_path_factory.mktemp("cache")


class Case(NamedTuple):
    """Words of the first process, of one that meets it at the place of `flag`, and of one behind it.

    The first is killed when it has written `sign`.
    """

    flag: str
    place: str
    first: list[str]
    second: list[str]
    sign: str
    behind: Callable[[Path], list[str]]


def sampled(*words, blocks=LONG):
    return ["sample", "--prompt", PROMPT, "--blocks", str(blocks), *words]


def newest(folder):
    """The newest complete step of checkpoints."""
    return max(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def prompts(folder, name, blocks):
    (folder / name).write_text(json.dumps({"prompt": PROMPT, "blocks": blocks, "name": name[0]}))
    return ["sample", "--prompts", name, "--out", "videos"]


STATE = ["--state", "saves", "--every", "1", "--out"]
TRAIN = ["train", "--config", "c.py", "--out", "run"]
CASES = {
    "a video": lambda folder: Case(
        *("--out", "v.mp4", sampled("--out", "v.mp4"), sampled("--out", "v.mp4"), "v.mp4"),
        lambda _: sampled("--out", "v.mp4", blocks=1),
    ),
    "a state": lambda folder: Case(
        *("--state", "saves", sampled(*STATE, "v.mp4"), sampled(*STATE, "w.mp4"), "saves/2"),
        lambda folder: sampled(*STATE, "v.mp4", blocks=newest(folder / "saves") + 2),
    ),
    "a folder of videos": lambda folder: Case(
        *("--out", "videos", prompts(folder, "a.jsonl", LONG), prompts(folder, "b.jsonl", 1)),
        "videos/a.mp4",
        lambda folder: prompts(folder, "b.jsonl", 1),
    ),
    "a training": lambda folder: Case(
        *("--out", "run", TRAIN, TRAIN, "run/checkpoints/2"),
        lambda folder: [*TRAIN, "--steps", str(newest(folder / "run" / "checkpoints") + 2)],
    ),
}
GOES_ON = {"a state": "goes on behind block", "a training": "goes on behind step"}


def started(folder, cache, words, said):
    """The program in a process group of its own."""
    with (folder / said).open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "packforcing_jax", *words],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=file,
            start_new_session=True,
            env=os.environ
            | {
                "PYTHONPATH": f"{HERE.parent}:{HERE}",
                "XLA_FLAGS": quick.FLAGS,
                "XDG_CACHE_HOME": str(cache),
                "JAX_ENABLE_COMPILATION_CACHE": "true",
            },
        )


def ended(folder, cache, words):
    """The exit code of the program and what it says on stderr."""
    code = started(folder, cache, words, "said.txt").wait(timeout=300)
    return code, (folder / "said.txt").read_text()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "a video")) for name in CASES],
)
def test_the_second_process_is_refused_and_goes_on_when_the_first_is_killed(tmp_path, cache, name):
    (tmp_path / "c.py").write_text(CONFIG)
    case = CASES[name](tmp_path)
    first = started(tmp_path, cache, case.first, "first.txt")
    try:
        deadline = time.monotonic() + 300
        while not (tmp_path / case.sign).exists():
            assert first.poll() is None, (tmp_path / "first.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        code, said = ended(tmp_path, cache, case.second)
        assert first.poll() is None
        assert code == 2
        assert said == (
            f"packforcing: {case.flag} {case.place} is being written by another process; wait for it or choose another "
            "place.\n"
        )
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    code, said = ended(tmp_path, cache, case.behind(tmp_path))
    assert code == 0, said
    assert GOES_ON.get(name, "") in said
    left = [
        path for path in tmp_path.rglob(".*") if "lock" in path.name or "unfinished" in path.name
    ]
    assert left == []
