"""The launchers start what there is, hand signals on, and end as the run they started did."""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from packforcing_jax.cli import main

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
JOBSET = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
STUBS = {
    "packforcing": "trap 'sleep 0.2; echo saved >> \"$NOTES/saved\"; exit 0' TERM\n"
    'echo "$*" >> "$NOTES/started.${JAX_LOCAL_DEVICE_IDS:-x}"\n'
    '[[ "$*" == *"--process ${FAILS:-none}"* ]] && exit 3\n'
    '[[ -n "${EAGER:-}" && "$*" =~ (--distributed|--process 0)$ ]] && kill -TERM "$PPID"\n'
    '[[ -n "${WAITS:-}" ]] || exit 0\n'
    "for _ in {1..200}; do sleep 0.05; done\nexit 9\n",
    "srun": 'while [[ "$1" == -* ]]; do shift; done\nexec "$@"\n',
    "scontrol": 'echo "$*" >> "$NOTES/requeued"\n',
    "gcloud": 'for last in "$@"; do :; done\nexec bash -c "$last"\n',
}


@pytest.fixture
def room(tmp_path):
    """A folder with programs that take the place of real ones, and what they note."""
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (tmp_path / name).chmod(0o755)
    return tmp_path


def start(script, room, *words, **settings):
    """A launcher started with the stand-ins."""
    keep = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    there = keep | {
        "PATH": f"{room}:{os.environ['PATH']}",
        "PACKFORCING": str(room / "packforcing"),
        "PROGRAM": str(room / "packforcing"),
        "NOTES": str(room),
        "FOLDER": str(room),
        "SLURM_JOB_ID": "17",
        **settings,
    }
    return subprocess.Popen(
        [LAUNCH / script, *words], env=there, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def ended(process, patience=30):
    """The exit code, and what was said."""
    said, _ = process.communicate(timeout=patience)
    return process.returncode, said.decode()


def noted(room, name):
    """Lines that the stand-ins noted under a name."""
    return [
        line for path in sorted(room.glob(f"{name}*")) for line in path.read_text().splitlines()
    ]


def stopped(process, room, count):
    """How a launcher ends that is told to stop when `count` runs have begun."""
    deadline = time.monotonic() + 20
    while len(noted(room, "started")) < count:
        assert time.monotonic() < deadline, ended(process)
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    return ended(process)


# the files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_sound_and_strict(path):
    text = path.read_text()
    assert subprocess.run(["bash", "-n", path], capture_output=True).returncode == 0
    assert "\nset -euo pipefail\n" in text
    assert path.stat().st_mode & stat.S_IXUSR
    assert path.name in (LAUNCH / "README.md").read_text()


def test_the_job_set_is_one_indexed_job_with_a_process_per_pod():
    job = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    given = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
    assert (JOBSET["kind"], job["completionMode"]) == ("JobSet", "Indexed")
    assert job["parallelism"] == job["completions"] == int(given["PROCESSES"])
    assert given["COORDINATOR"].startswith("packforcing-worker-0-0.packforcing:")
    assert (JOBSET["metadata"]["name"], JOBSET["spec"]["replicatedJobs"][0]["name"]) == (
        "packforcing",
        "worker",
    )
    assert {each["name"] for each in pod["containers"][0]["volumeMounts"]} == {
        each["name"] for each in pod["volumes"]
    }
    assert pod["terminationGracePeriodSeconds"] >= 120
    assert (
        subprocess.run(
            ["bash", "-n"], input=pod_script(), text=True, capture_output=True
        ).returncode
        == 0
    )


def pod_script():
    pod = JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    return pod["containers"][0]["args"][0]


@pytest.mark.parametrize(
    "name", [*(path.name for path in SCRIPTS if path.name != "single_gpu.sh"), "jobset.yaml"]
)
def test_every_flag_a_launcher_gives_is_one_of_train(name):
    known = main.parser_of("train")[0]._option_string_actions
    lines = (LAUNCH / name).read_text().replace("\\\n", " ").splitlines()
    flags = {
        flag for line in lines for flag in re.findall(r"--[a-z-]+", line.partition(" train ")[2])
    }
    assert flags
    assert flags <= set(known)


# what they do ---------------------------------------------------------------------------------------------------------


def test_one_process_is_the_program_itself(room):
    code, _ = ended(start("single_gpu.sh", room, "train", "--out", "a b"))
    assert (code, noted(room, "started")) == (0, ["train --out a b"])


def test_local_processes_know_each_other_and_take_a_device_each(room):
    code, _ = ended(
        start(
            "local_processes.sh",
            room,
            "--config",
            "stage",
            PROCESSES="3",
            COORDINATOR="127.0.0.1:7",
        )
    )
    lines = [
        f"train --config stage --coordinator 127.0.0.1:7 --processes 3 --process {i}"
        for i in range(3)
    ]
    assert (code, noted(room, "started")) == (0, lines)
    assert {path.name for path in room.glob("started*")} == {"started.0", "started.1", "started.2"}


def test_local_processes_are_all_told_to_stop_and_waited_for(room):
    code, _ = stopped(start("local_processes.sh", room, WAITS="yes"), room, 2)
    assert (code, noted(room, "saved")) == (0, ["saved"] * 2)


def test_a_process_that_fails_ends_the_others_and_its_code_is_told(room):
    code, _ = ended(start("local_processes.sh", room, WAITS="yes", FAILS="1"))
    assert (code, noted(room, "saved")) == (3, ["saved"])


def test_a_missing_program_is_said(room):
    code, said = ended(start("local_processes.sh", room, PACKFORCING="nowhere/packforcing"))
    assert code == 2
    assert "nowhere/packforcing is missing; run make setup." in said


def test_a_slurm_job_that_is_stopped_saves_and_queues_again(room):
    code, _ = stopped(start("slurm.sbatch", room, "--out", "r", WAITS="yes"), room, 1)
    assert (code, noted(room, "saved"), noted(room, "requeued")) == (0, ["saved"], ["requeue 17"])
    assert noted(room, "started") == ["train --out r --distributed"]


def test_a_slurm_job_that_ends_or_fails_does_not(room):
    assert ended(start("slurm.sbatch", room))[0] == 0
    assert ended(start("slurm.sbatch", room, "--process", "5", FAILS="5"))[0] == 3
    assert noted(room, "requeued") == []


@pytest.mark.parametrize("script", ["slurm.sbatch", "local_processes.sh"])
def test_a_slow_launcher_that_is_stopped_as_it_starts_tells_every_process(script, room):
    slow = room / "slow"  # sourced by every shell; a launcher waits before each of its commands
    slow.write_text("if [[ $0 == */launch/* ]]; then trap 'sleep 0.1' DEBUG; fi\n")
    code, _ = ended(
        start(script, room, PROCESSES="3", WAITS="yes", EAGER="yes", BASH_ENV=str(slow))
    )
    assert code in (
        0,
        143,
    )  # 143: a process told before it could listen; 9 would be one that was never told


def test_every_host_of_a_tpu_is_started_and_told_to_stop(room):
    code, _ = stopped(start("tpu_pod.sh", room, "--out", "a b", WAITS="yes"), room, 1)
    assert (code, noted(room, "saved"), noted(room, "started")) == (
        0,
        ["saved"],
        ["train --distributed --out a b"],
    )


def test_a_pod_that_is_stopped_saves_and_does_not_count_as_done(room):
    script = pod_script().replace(".venv/bin/packforcing", str(room / "packforcing"))
    there = os.environ | {
        "NOTES": str(room),
        "CONFIG": "c",
        "RUN": "r",
        "PROCESSES": "2",
        "COORDINATOR": "h:1",
        "JOB_COMPLETION_INDEX": "1",
    }
    begin = lambda **more: subprocess.Popen(
        ["bash", "-c", script], env=there | more, stdout=subprocess.PIPE
    )  # noqa: E731
    assert ended(begin())[0] == 0
    assert ended(begin(FAILS="1"))[0] == 3
    assert stopped(begin(WAITS="yes"), room, 3)[0] == 143
    assert noted(room, "saved") == ["saved"]


SMALL = (
    "dit.dim=24",
    "dit.heads=2",
    "dit.rope_pairs=(4,1,1)",
    "dit.ffn_dim=20",
    "dit.layers=1",
    "train.steps=2",
    "train.objective=flow_matching",
    "train.batch=2",
)


@pytest.mark.slow
def test_two_real_processes_train_and_leave_a_model(room):
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        port = door.getsockname()[1]
    real = room / "real"
    real.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -m packforcing_jax "$@"\n')
    real.chmod(0o755)
    overrides = [word for each in SMALL for word in ("--set", each)]
    train = start(
        "local_processes.sh",
        room,
        "--config",
        "stage",
        "--out",
        room / "run",
        *overrides,
        PACKFORCING=str(real),
        JAX_PLATFORMS="cpu",
        COORDINATOR=f"127.0.0.1:{port}",
    )
    code, said = ended(train, 600)
    assert code == 0, said
    lines = [json.loads(line) for line in (room / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "step" in line] == [1, 2]
    assert (room / "run" / "model" / "config.json").exists()
