"""What one process compiled the next one reads, with the same result; the user's own settings win over all of ours."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import quick

from packforcing_jax.io import compilation_cache

ROOT = Path(__file__).parent.parent


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def used(**environment):
    """The environment after `use`."""
    compilation_cache.use(environment)
    return environment


def test_programs_lie_in_the_users_cache_and_have_a_bound(home):
    found = used()
    assert found["JAX_COMPILATION_CACHE_DIR"] == str(home / "packforcing" / "compiled")
    assert 0 < int(found["JAX_COMPILATION_CACHE_MAX_SIZE"]) <= 2**30


@pytest.mark.parametrize(
    "own",
    [
        {"JAX_COMPILATION_CACHE_DIR": "/elsewhere"},
        {"JAX_COMPILATION_CACHE_DIR": ""},
        {"JAX_ENABLE_COMPILATION_CACHE": "false"},
        {"JAX_ENABLE_COMPILATION_CACHE": "0"},
    ],
    ids=str,
)
def test_a_folder_of_the_users_or_none_is_left_alone(home, own):
    assert used(**own) == own
    assert not home.exists()


def test_a_bound_of_the_users_is_left_alone(home):
    assert used(JAX_COMPILATION_CACHE_MAX_SIZE="-1")["JAX_COMPILATION_CACHE_MAX_SIZE"] == "-1"


def test_a_folder_that_cannot_be_written_is_one_warning(home, capsys):
    home.write_text("a file")
    assert used() == {}
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(home) in said
    assert "--no-compilation-cache" in said


def test_a_program_that_was_not_written_whole_is_removed_and_no_other(home):
    folder = home / "packforcing" / "compiled"
    folder.mkdir(parents=True)
    for name in ("jit_a-1-cache", "jit_a-1-atime", "jit_b-2-cache", ".lockfile"):
        (folder / name).write_bytes(b"12345678")
    used()
    assert {each.name for each in folder.iterdir()} == {
        "jit_a-1-cache",
        "jit_a-1-atime",
        ".lockfile",
    }


def test_the_bound_works_because_filelock_is_installed():
    """jax refuses a bound without it."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert any(each.startswith("filelock") for each in needed)


def sampled(model, folder, home, *words):
    """(trace of two blocks from a fresh process, names of the programs it read, what it said on stderr)."""
    folder.mkdir()
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("JAX_")
    } | {"XDG_CACHE_HOME": str(home), "JAX_LOG_COMPILES": "1", "XLA_FLAGS": quick.FLAGS}
    command = ["sample", "--weights", str(model), "--prompt", "a red disc", "--blocks", "2"]
    files = ["--out", str(folder / "a.mp4"), "--trace", str(folder / "trace.jsonl")]
    done = subprocess.run(
        [sys.executable, "-m", "packforcing_jax", *command, *files, *words],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    read = set(re.findall(r"Persistent compilation cache hit for 'jit_(\w+)'", done.stderr))
    return (folder / "trace.jsonl").read_bytes(), read, done.stderr


@pytest.fixture(scope="module")
def first(folder, tmp_path_factory):
    """(the cache of a user who made one video, what `sampled` gave of it)."""
    place = tmp_path_factory.mktemp("first")
    return place / "cache", sampled(folder, place / "run", place / "cache")


PROGRAMS = {"denoise_program", "commit_program"}


def test_the_second_run_reads_its_programs_and_makes_the_same_latents(folder, tmp_path, first):
    home, (trace, read, said) = first
    assert not read & PROGRAMS
    again, read, said = sampled(folder, tmp_path / "run", home)
    assert read >= PROGRAMS
    assert "compiling the block step" not in said
    assert again == trace


def test_a_run_without_the_cache_makes_the_same_latents_and_keeps_nothing(folder, tmp_path, first):
    trace, read, _ = sampled(folder, tmp_path / "run", tmp_path / "cache", "--no-compilation-cache")
    assert trace == first[1][0]
    assert not read
    assert not (tmp_path / "cache").exists()


def test_damaged_programs_are_a_warning_and_are_compiled_again(folder, tmp_path, first):
    home, (trace, _, _) = first
    for path in (home / "packforcing" / "compiled").glob("*-cache"):
        path.write_bytes(path.read_bytes()[:100])
    again, read, said = sampled(folder, tmp_path / "run", home)
    assert not read & PROGRAMS
    assert "Error reading persistent compilation cache entry for 'jit_denoise_program'" in said
    assert again == trace
