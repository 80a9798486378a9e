"""One of several processes is lost: the others say so in a sentence and end within their time, and the run goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import quick
from test_two_processes import free_port

from packforcing_jax.cli import main, peers
from packforcing_jax.io import locks

HERE = Path(__file__).parent
NATIVE = """
import ctypes, os, sys
from packforcing_jax.cli import peers
peers._listen(peers.Group(None, None, None, 100, as_json={as_json}))
print("from Python", file=sys.stderr)
os.write(2, b"W1128 12:00:00.000001 7 compiler.cc:3] slow\\n going on\\n")
os.write(2, b"E1128 12:00:00.000002 7 coordination_service_agent.cc:2] polled\\nof 1\\n")
{then}
"""
ANNOUNCED = """
os.write(2, b"F1128 12:00:00.000003 7 client.h:80] as the JAX distributed service detected fatal errors.\\n")
ctypes.CDLL(None).abort()
"""
LOST = "packforcing: another process of this run ended, or was silent for --heartbeat-timeout {} s; look at what "


def native(then, as_json=False):
    """How a process ends, and what it says, in which native code writes to stderr."""
    ended = subprocess.run(
        [sys.executable, "-c", NATIVE.format(then=then, as_json=as_json)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=HERE.parent,
    )
    return ended.returncode, ended.stdout, ended.stderr


PASSED_ON = "W1128 12:00:00.000001 7 compiler.cc:3] slow\n going on\n"


def test_the_announcement_of_a_loss_becomes_a_sentence_and_a_code():
    code, out, err = native(ANNOUNCED, as_json=True)
    assert code == 3
    assert err.startswith(f"from Python\n{PASSED_ON}{LOST.format(100)}")
    assert err.count("\n") == 4
    assert out.startswith('{"error": "another process of this run ended')


def test_what_native_code_says_else_is_handed_on_and_about_peers_at_the_end():
    code, _, err = native("")
    assert code == 0
    assert err.startswith(f"from Python\n{PASSED_ON}")
    assert err.endswith("coordination_service_agent.cc:2] polled\nof 1\n")


def test_an_abort_for_another_reason_stays_one_and_is_heard():
    code, _, err = native('os.write(2, b"free(): invalid pointer\\n"); ctypes.CDLL(None).abort()')
    assert code == -signal.SIGABRT
    assert "slow" in err
    assert peers.FATAL.decode() not in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--heartbeat-timeout", "0"], "--heartbeat-timeout 0 is out of range"),
        (["--distributed", "--process", "0"], "--coordinator, --processes is missing"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_joined(tmp_path, capsys, words, said):
    assert main.main(["train", "--out", str(tmp_path / "run"), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# Two trainings that talk over loopback

TIME = 10  # seconds of silence after which a process counts as lost
CONFIG = """
import test_runs
experiment, train = test_runs.real(objective="flow_matching", steps={}, save_every=2)
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Programs that several trainings read."""
    return tmp_path_factory.mktemp("compiled")


def pair(folder, compiled, steps):
    """`packforcing train` as two processes; what each says lies in a file."""
    (folder / "c.py").write_text(CONFIG.format(steps))
    there = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    port = free_port()
    started = []
    for process in range(2):
        words = ["train", "--config", folder / "c.py", "--out", folder / "run", "--processes", "2"]
        words += ["--coordinator", f"127.0.0.1:{port}", "--process", process]
        words += ["--heartbeat-timeout", TIME]
        with (folder / f"said{process}.txt").open("w") as said:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "packforcing_jax", *map(str, words)],
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                    env=there
                    | {
                        "PYTHONPATH": f"{HERE.parent}:{HERE}",
                        "XLA_FLAGS": quick.FLAGS,
                        "JAX_ENABLE_COMPILATION_CACHE": "true",
                        "JAX_COMPILATION_CACHE_DIR": str(compiled),
                        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                    },
                )
            )
    return started


def said_by(folder, process):
    return (folder / f"said{process}.txt").read_text()


def saved(folder, started):
    """Waits for a checkpoint; the newest."""
    deadline = time.monotonic() + 300
    while True:
        steps = [int(path.name) for path in folder.glob("run/checkpoints/*") if path.name.isdigit()]
        if steps:
            return max(steps)
        assert all(each.poll() is None for each in started), said_by(folder, 0)
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_process_that_is_refused_ends_at_once_and_the_other_one_notices(tmp_path, compiled):
    with locks.held([("--out", tmp_path / "run")]):
        started = pair(tmp_path, compiled, steps=1)
        try:
            assert [process.wait(timeout=120) for process in started] == [2, 3]
        finally:
            for process in started:
                process.kill()
    assert "is being written by another process" in said_by(tmp_path, 0)
    for process in range(2):
        assert said_by(tmp_path, process).count("packforcing: ") == 1
        assert "stack trace" not in said_by(tmp_path, process)
    assert said_by(tmp_path, 1).splitlines()[-1].startswith(LOST.format(TIME))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "how"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)]
)
def test_a_training_whose_other_process_is_lost_ends_in_a_sentence_and_goes_on(
    tmp_path, compiled, lost, how
):
    started = pair(tmp_path, compiled, steps=100_000)
    try:
        step = saved(tmp_path, started)
        began = time.monotonic()
        started[lost].send_signal(how)
        survivor = 1 - lost
        assert started[survivor].wait(timeout=TIME + 20) == 3
        assert time.monotonic() - began < TIME + 10
    finally:
        for process in started:
            process.kill()
            process.wait()
    said = said_by(tmp_path, survivor)
    assert said.splitlines()[-1].startswith(LOST.format(TIME))
    assert said.count("packforcing: ") == 1
    assert "Traceback" not in said
    assert "stack trace" not in said
    again = pair(tmp_path, compiled, steps=step + 100)
    assert [process.wait(timeout=300) for process in again] == [0, 0], said_by(tmp_path, 0)
    assert "goes on behind step" in said_by(tmp_path, 0)
    assert (tmp_path / "run" / "model" / "dit.safetensors").exists()
