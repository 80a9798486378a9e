"""What a user installs is a wheel: it takes one name in site-packages and works without the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import convert_layouts
import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("packforcing_jax", "configs", "convert", "pyproject.toml", "README.md", "LICENSE")
CONSTRAINTS = ROOT / f"constraints-py{sys.version_info[0]}{sys.version_info[1]}.txt"


def call(*words, folder, **environment):
    """Runs a program in `folder` without the caller's PYTHONPATH; its standard output."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        [*map(str, words)],
        cwd=folder,
        env=inherited | {"JAX_PLATFORMS": "cpu"} | environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this tree, built from a copy: setuptools would take over what an older `build/` holds."""
    room = tmp_path_factory.mktemp("wheel")
    for name in PARTS:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, room / "tree" / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, room / "tree")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel")
    call(
        *pip,
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        room,
        ".",
        folder=room / "tree",
    )
    (path,) = room.glob("*.whl")
    return path


@pytest.fixture
def student(tmp_path):
    """A checkpoint in Self-Forcing's layout."""
    weights = convert_layouts.prefixed("model.", convert_layouts.dit())
    return convert_layouts.put(tmp_path / "student.pt", {"generator_ema": weights, "step": 12})


def installed_files():
    """Every file of the package and of the folders beside it, under its name in site-packages."""
    for name in PARTS[:3]:
        inside = ROOT if name == "packforcing_jax" else ROOT / "packforcing_jax"
        for path in (ROOT / name).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                beside = path.relative_to(ROOT).as_posix()
                yield beside if inside == ROOT else f"packforcing_jax/{beside}"


def test_a_wheel_has_one_top_level_name_and_every_file(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {
        "packforcing_jax"
    }
    assert {name for name in names if ".dist-info/" not in name} == set(installed_files())
    for name in (
        "weights/stage/dit.safetensors",
        "configs/stage.py",
        "convert/rules.py",
        "evaluation/vbench.txt",
    ):
        assert f"packforcing_jax/{name}" in names


def test_an_unpacked_wheel_works_without_the_repository(wheel, student, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    asked = (
        "from packforcing_jax import configs, convert; print(*configs.__path__, *convert.__path__)"
    )
    found = call(sys.executable, "-c", asked, folder=tmp_path, PYTHONPATH=str(site)).split()
    assert found == [str(site / "packforcing_jax" / name) for name in ("configs", "convert")]
    program = (sys.executable, "-m", "packforcing_jax")
    run = {"folder": tmp_path, "PYTHONPATH": str(site)}
    call(*program, "convert", student, "--out", "model", "--set", "dit.heads=3", **run)
    assert (tmp_path / "model" / "dit.safetensors").exists()
    call(*program, "plan", "--config", "wan_t2v_1_3b", **run)


@pytest.mark.wheel
def test_a_new_environment_samples_trains_converts_and_plans(wheel, student, tmp_path):
    call(sys.executable, "-m", "venv", tmp_path / "venv", folder=tmp_path)
    python, program = (tmp_path / "venv" / "bin" / name for name in ("python", "packforcing"))
    pip = (python, "-m", "pip", "--disable-pip-version-check")
    call(*pip, "install", "--quiet", "-c", CONSTRAINTS, wheel, folder=tmp_path)
    call(*pip, "check", folder=tmp_path)
    call(program, "sample", "--blocks", "2", "--out", "x.mp4", folder=tmp_path)
    call(program, "train", "--config", "stage", "--steps", "2", "--out", "run", folder=tmp_path)
    call(program, "convert", student, "--out", "model", "--set", "dit.heads=3", folder=tmp_path)
    call(program, "plan", "--config", "wan_t2v_1_3b", folder=tmp_path)
    for name in ("x.mp4", "run/model/dit.safetensors", "model/dit.safetensors"):
        assert (tmp_path / name).stat().st_size > 0
