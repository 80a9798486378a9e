"""`packforcing plan` prints each figure beside its formula, and exits 1 if one differs."""

import argparse
import functools
import json
import subprocess
import sys

import pytest

from packforcing_jax.cli import plan
from packforcing_jax.errors import InputError
from packforcing_jax.plan import budget, formulas, programs

CONFIG = "from tiny import EXP as experiment\n"


counted = functools.cache(budget.of)


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """(exit code, stdout) of `plan` for the tiny experiment; what was counted once is not counted again."""
    monkeypatch.setattr(budget, "of", counted)
    path = tmp_path / "small.py"
    path.write_text(CONFIG)

    def go(*words):
        parser = argparse.ArgumentParser()
        plan.add_arguments(parser)
        parser.add_argument("--json", action="store_true")
        code = plan.run(parser.parse_args(["--config", str(path), *words]))
        return code, capsys.readouterr().out

    return go


def test_the_table_has_every_figure_beside_its_formula(run):
    code, out = run("--blocks", "7")
    lines = {
        line.strip().split("  ")[0]: line.split()
        for line in out.splitlines()
        if line.startswith("  ")
    }
    assert code == 0
    assert out.startswith("tiny: 7 blocks of 3 latent frames, float32")
    assert lines["room"] == ["room", "100", "100", "attended", "+", "p,", "rounded", "up"]
    assert lines["one packed block"][3:7] == [
        "4.608",
        "kB",
        "4.608",
        "kB",
    ]  # 8 keys, 2 layers of 36, 4 bytes
    assert max(map(len, out.splitlines())) <= 120
    assert "N_sink s" in out
    assert "not compiled" in out
    assert out.rstrip().endswith("0 differ from it")


def test_json_has_the_exact_figures(run):
    code, out = run("--blocks", "7", "--json")
    said = json.loads(out)
    assert code == 0
    assert (said["experiment"], said["blocks"], said["batch"], said["differ"]) == ("tiny", 7, 1, [])
    attended, cached = (said["figures"][name] for name in ("keys/attended", "bytes/cached"))
    assert (attended["counted"], attended["formula"], attended["unit"]) == (88, 88, "keys")
    assert cached["counted"] == 64 * 2 * 2 * 36 * 4
    assert said["dtypes"] == dict.fromkeys(("params", "compute", "cache", "vae", "text"), "float32")


def test_every_use_is_named_where_dtypes_differ(run):
    code, out = run("--blocks", "7", "--set", "dtypes.cache=bfloat16")
    assert code == 0
    assert out.startswith(
        "tiny: 7 blocks of 3 latent frames, params float32, compute float32, cache bfloat16, vae"
    )
    assert "cached 18.432 kB 18.432 kB" in " ".join(out.split())


def test_what_fits_is_said_of_every_memory(run):
    """A card of 24 GB and one of 141 GB, or those asked for."""
    code, out = run("--blocks", "7")
    assert code == 0
    assert "24GB      fits, 24.000 GB are left" in out  # all but a few hundred kilobytes
    assert "141GB     fits, 141.000 GB are left" in out
    code, out = run(
        "--blocks", "7", "--device-memory", "0.0004GB", "--device-memory", "1MiB", "--json"
    )
    small, large = json.loads(out)["fits"]
    assert code == 0  # no figure differs
    assert (small["bytes"], small["fits"], large["bytes"], large["fits"]) == (
        400_000,
        False,
        2**20,
        True,
    )
    assert small["set"]
    assert small["then_needs"] <= 400_000 < small["needs"] == large["needs"]
    code, out = run("--blocks", "7", "--device-memory", "0.0004GB")
    assert "0.0004GB  does not fit" in out
    assert f"with --set {small['set'][0]}" in out
    code, out = run("--blocks", "7", "--device-memory", "100kB")
    assert "no setting helps enough" in out


def test_a_card_that_is_nearly_full_needs_a_larger_share(run):
    """jax leaves a quarter of a GPU alone."""
    needs = json.loads(run("--blocks", "7", "--json")[1])["fits"][0]["needs"]
    assert (
        "XLA_PYTHON_CLIENT_MEM_FRACTION=0.96"
        in run("--blocks", "7", "--device-memory", f"{needs / 955:.1f}kB")[1]
    )
    assert "FRACTION" not in run("--blocks", "7", "--device-memory", f"{needs / 740:.1f}kB")[1]


def test_compiled_programs_stand_in_one_line_each(run, monkeypatch):
    names = (
        programs.ENCODING,
        programs.PROMPT,
        programs.DENOISING,
        programs.SHOWING,
        programs.COMMITTING,
    )
    uses = dict.fromkeys(
        names, programs.Use(temporary=2_000_000, results=1500, arguments=70, reused=0)
    )
    monkeypatch.setattr(programs, "compiled", lambda exp, batch: uses)
    code, out = run("--blocks", "7", "--batch", "2", "--compile")
    assert code == 0
    assert "not compiled" not in out
    assert "peak, as compiled here" in out
    line = next(
        line for line in out.splitlines() if line.startswith("  denoising  ") and "1.500 kB" in line
    )
    assert line.split() == ["denoising", "2.000", "MB", "1.500", "kB", "70", "B", "0", "B"]
    assert max(map(len, out.splitlines())) <= 120


def test_settings_memory_batch_dtype_and_seconds_change_the_figures(run):
    code, out = run(
        "--seconds",
        "3",
        "--memory",
        "no-mid",
        "--set",
        "cache.recent=6",
        "--set",
        "cache.block=3",
        "--batch",
        "3",
        "--dtype",
        "bfloat16",
        "--json",
    )
    said = json.loads(out)
    figures = {name: figure["counted"] for name, figure in said["figures"].items()}
    assert code == 0
    assert said["blocks"] == 5  # 15 frames of its codec, 3 a block
    assert (figures["keys/packed"], figures["keys/recent"], figures["keys/cached"]) == (
        0,
        6 * 8,
        (3 + 6) * 8,
    )
    assert figures["bytes/cached"] == 9 * 8 * 2 * 2 * 36 * 2 * 3
    assert set(said["dtypes"].values()) == {"bfloat16"}


def test_a_figure_that_differs_from_its_formula_is_an_error(run, monkeypatch):
    real = formulas.closed
    monkeypatch.setattr(
        formulas, "closed", lambda *args, **sizes: real(*args, **sizes) | {"keys/cached": 65}
    )
    code, out = run("--blocks", "2")
    assert code == 1
    assert "DIFFERS from sink + packed + recent" in out
    assert "1 differ" in out
    code, out = run("--blocks", "2", "--json")
    assert code == 1
    assert json.loads(out)["differ"] == ["keys/cached"]


@pytest.mark.parametrize(
    ("figure", "unit", "said"),
    [
        (12_480, "keys", "12,480"),
        (3_987_210_240, "bytes", "3.987 GB"),
        (999, "bytes", "999 B"),
        (1000, "bytes", "1.000 kB"),
        (0, "bytes", "0 B"),
        (48_253_967_007_744, "operations", "48.254 TFLOP"),
        (0.0029073, "share", "0.291 %"),
    ],
)
def test_figures_are_spelt_for_people(figure, unit, said):
    assert plan.spell(figure, unit) == said


def test_an_unknown_memory_is_refused(run):
    with pytest.raises(InputError, match="memory profile 'papers' is unknown; did you mean paper?"):
        run("--memory", "papers")


def test_a_size_of_no_memory_is_refused(run):
    with pytest.raises(InputError, match="'24' is no size of a memory; write it as 24GB"):
        run("--device-memory", "24")


def test_reading_the_flags_loads_no_jax():
    code = "import sys, packforcing_jax.cli.plan; print('jax' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "False"
    )
