"""The verb `serve`: what is wrong is said before the model is loaded, and a kill costs the block in progress."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import live
import pytest

from packforcing_jax.cli import main
from packforcing_jax.io import locks, video
from packforcing_jax.live import images
from packforcing_jax.sampling import pipeline as pipelines
from packforcing_jax.sampling.pipeline import Pipeline


@pytest.fixture
def no_model(monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(pipelines.Pipeline, "from_pretrained", loaded)


def said(capsys, *words):
    """The sentence of a refused command."""
    assert main.exit_code(["serve", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("packforcing: ")
    return line


def test_a_taken_port(no_model, capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = said(capsys, "--port", port, "--root", tmp_path / "root")
    assert f"--port {port}" in line
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none(no_model, capsys, port):
    assert f"--port {port}" in said(capsys, "--port", port)


def test_a_host_that_is_not_this_machine(no_model, capsys, tmp_path):
    (tmp_path / "token").write_text("a-good-token")
    line = said(capsys, "--host", "203.0.113.7", "--token-file", tmp_path / "token", "--port", 0)
    assert "--host 203.0.113.7" in line
    assert "no-such-host.invalid" in said(
        capsys, "--host", "no-such-host.invalid", "--token-file", tmp_path / "token", "--port", 0
    )


def test_an_open_host_without_a_token(no_model, capsys):
    assert "--token-file" in said(capsys, "--host", "0.0.0.0")


def test_a_token_file_without_a_token(no_model, capsys, tmp_path):
    (tmp_path / "token").write_text("no good")
    assert "holds no token" in said(capsys, "--token-file", tmp_path / "token")


def test_a_root_that_is_a_file_or_in_use(no_model, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--root" in said(capsys, "--root", tmp_path / "file", "--port", 0)
    with locks.held([("--root", tmp_path / "root")]):
        line = said(capsys, "--root", tmp_path / "root", "--port", 0)
    assert "written by another process" in line


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "websockets"])
def test_a_missing_extra(no_model, capsys, monkeypatch, package):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name)
    )
    line = said(capsys, "--port", 0)
    assert package in line
    assert "packforcing-jax[web]" in line


@pytest.mark.parametrize(
    "words", [("--sessions", 0), ("--pace", -1), ("--drift", "panic"), ("--patience", "nan")]
)
def test_a_bound_out_of_its_own(no_model, capsys, words):
    assert words[0] in said(capsys, *words, "--port", 0)


def test_a_model_that_is_none(capsys, tmp_path):
    assert "does not exist" in said(
        capsys, "--weights", tmp_path / "none", "--port", 0, "--root", tmp_path / "root"
    )
    assert not (tmp_path / "root").exists()


class Process:
    """A server of its own, that can be killed."""

    def __init__(self, folder, root):
        words = [
            "serve",
            "--weights",
            str(folder),
            "--root",
            str(root),
            "--port",
            "0",
            "--pace",
            "0",
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "packforcing_jax", *words],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {
                "JAX_ENABLE_COMPILATION_CACHE": "true",
                "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            },
        )
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"http://127.0.0.1:(\d+)/", line):
                self.served = live.Served(int(found[1]), None, None)  # type: ignore[arg-type]
                return
        raise AssertionError("it did not start")

    def end(self, how):
        self.process.send_signal(how)
        self.process.communicate(timeout=60)
        return self.process.returncode


@pytest.mark.slow
def test_a_kill_costs_the_block_in_progress_and_ctrl_c_costs_nothing(folder, tmp_path):
    server = Process(folder, tmp_path)
    session = server.served.begin(seed=3)
    with server.served.watch(session) as client:
        client.until(type="block", index=4)
        client.say(type="prompt", text="with guest fern", at=9, ref="later")
        client.until(type="received", ref="later")
        last = max(client.blocks)
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
    server = Process(folder, tmp_path)
    facts = server.served.facts(session)
    assert facts["block"] > last
    assert facts["state"] == "waiting"
    assert facts["queue"] or facts["block"] > 9
    with server.served.watch(session) as client:
        client.until(type="block", index=12)
        client.say(type="pause", ref="p")
        client.until(type="applied", ref="p")
    path = tmp_path / "sofar.mp4"
    path.write_bytes(server.served.ask("GET", f"/v1/sessions/{session}/video.mp4")[1])
    assert server.end(signal.SIGINT) == 130
    about = json.loads(Path(tmp_path, "sessions", session, "story.json").read_text())
    (change,) = [each["block"] for each in about["changes"] if each["block"]]
    blocks = sorted(Path(tmp_path, "sessions", session, "blocks").iterdir())
    prompts = [live.PROMPT] * change + ["with guest fern"] * (len(blocks) - change)
    made = [
        video.to_uint8(block.frames)
        for block in Pipeline.from_pretrained(folder).stream(prompts, seed=3)
    ]
    for block, frames in zip(blocks, made, strict=True):
        assert (images.decoded((block / "images").read_bytes()) == frames).all()
    assert video.probe(path).frames >= 13 * 3
