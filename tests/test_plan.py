"""`packforcing plan` prints each figure beside its formula, and exits 1 if one differs."""

import argparse
import functools
import json
import subprocess
import sys

import pytest

from packforcing_jax import budget, formulas
from packforcing_jax.cli import plan
from packforcing_jax.errors import InputError

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
    lines = {line.strip().split("  ")[0]: line.split() for line in out.splitlines() if line.startswith("  ")}
    assert code == 0
    assert out.startswith("tiny: 7 blocks of 3 latent frames, bfloat16")
    assert lines["room"] == ["room", "100", "100", "attended", "+", "p,", "rounded", "up"]
    assert lines["one packed block"][3:7] == ["2.304", "kB", "2.304", "kB"]  # 8 keys, 2 layers of 36, 2 bytes
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
    assert cached["counted"] == 64 * 2 * 2 * 36 * 2


def test_settings_memory_batch_dtype_and_seconds_change_the_figures(run):
    code, out = run("--seconds", "3", "--memory", "no-mid", "--set", "cache.recent=6", "--set", "cache.block=3",
                    "--batch", "3", "--dtype", "float32", "--json")  # fmt: skip
    said = json.loads(out)
    figures = {name: figure["counted"] for name, figure in said["figures"].items()}
    assert code == 0
    assert said["blocks"] == 5  # 15 frames of its codec, 3 a block
    assert (figures["keys/packed"], figures["keys/recent"], figures["keys/cached"]) == (0, 6 * 8, (8 + 6) * 8)
    assert figures["bytes/cached"] == 14 * 8 * 2 * 2 * 36 * 4 * 3


def test_a_figure_that_differs_from_its_formula_is_an_error(run, monkeypatch):
    real = formulas.closed
    monkeypatch.setattr(formulas, "closed", lambda *args, **sizes: real(*args, **sizes) | {"keys/cached": 65})
    code, out = run("--blocks", "2")
    assert code == 1
    assert "DIFFERS from sink + packed + recent" in out
    assert "1 differ" in out
    code, out = run("--blocks", "2", "--json")
    assert code == 1
    assert json.loads(out)["differ"] == ["keys/cached"]


@pytest.mark.parametrize(("figure", "unit", "said"), [
    (12_480, "keys", "12,480"),
    (3_987_210_240, "bytes", "3.987 GB"),
    (999, "bytes", "999 B"),
    (1000, "bytes", "1.000 kB"),
    (0, "bytes", "0 B"),
    (48_253_967_007_744, "operations", "48.254 TFLOP"),
    (0.0029073, "share", "0.291 %"),
])  # fmt: skip
def test_figures_are_spelt_for_people(figure, unit, said):
    assert plan.spell(figure, unit) == said


def test_an_unknown_memory_is_refused(run):
    with pytest.raises(InputError, match="papers.*choose one of paper, published"):
        run("--memory", "papers")


def test_reading_the_flags_loads_no_jax():
    code = "import sys, packforcing_jax.cli.plan; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
