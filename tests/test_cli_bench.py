"""`packforcing bench` prints what was measured, compares ratios with a baseline, and never half writes one."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import types

import pytest
import tiny

from packforcing_jax.cli import bench as verb
from packforcing_jax.errors import InputError
from packforcing_jax.plan import bench, timing

SECONDS = {"forward": 2.0, "denoise": 9.0, "store": 0.5, "second": 12.0}


def measured(seconds):
    """What a machine that takes these seconds would give."""
    product = timing.Product(20, 20, 20, "float32")
    times = {
        name: timing.Times(first=50.0, runs=(each, each, each)) for name, each in seconds.items()
    }
    return bench.Measurements(
        experiment=tiny.EXP,
        times=times | {product.name: timing.Times(1.0, (4e-3,) * 3)},
        products=[product],
        moved=dict.fromkeys(seconds, 6000),
        operations={name: 0 if name == "store" else 3_000_000 for name in seconds},
    )


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """(exit code, stdout, stderr) of `bench` on a machine whose times are `run.seconds`."""
    config = tmp_path / "small.py"
    config.write_text("from tiny import EXP as experiment\n")
    asked = []

    def measure(pipe, names, *, warmup, repeats, show):
        asked.append((tuple(names), warmup, repeats, list(show(range(2), "rounds"))))
        return measured(
            {name: each for name, each in go.seconds.items() if name in names or not names}
        )

    monkeypatch.setattr(bench, "random_model", lambda exp: types.SimpleNamespace(experiment=exp))
    monkeypatch.setattr(bench, "measure", measure)

    def go(*words, config=str(config)):
        parser = argparse.ArgumentParser()
        verb.add_arguments(parser)
        parser.add_argument("--json", action="store_true")
        code = verb.run(
            parser.parse_args([*(["--config", config] if config else []), *map(str, words)])
        )
        return code, *capsys.readouterr()

    go.seconds = dict(SECONDS)
    go.asked = asked
    return go


# What it prints


def test_the_table_has_a_line_for_each_part(run):
    code, out, err = run()
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert code == 0
    assert err.startswith("bench: tiny on ")
    assert "float32, attention reference (" in err
    assert lines["forward"].split() == [
        "forward",
        "50.00",
        "s",
        "2000.000",
        "ms",
        "2000.000",
        "-",
        "2000.000",
        "3.000",
        "MFLOP",
        "1.500",
        "MFLOP/s",
        "37.5",
        "%",
    ]  # noqa: SIM905
    assert lines["store"].split() == [
        "store",
        "50.00",
        "s",
        "500.000",
        "ms",
        "500.000",
        "-",
        "500.000",
        "6.000",
        "kB",
        "12.000",
        "kB/s",
        "-",
    ]  # noqa: SIM905
    assert lines["second"].split()[3] == "20000.000"  # 3 frames a block, 5 a second
    assert "ceiling: 4.000 MFLOP/s, a product of 20 x 20 x 20 in float32" in out
    assert "second: 0.2 frames of video a second, which plays 5" in out


def test_json_has_every_figure(run):
    code, out, _ = run("--json")
    said = json.loads(out)
    assert code == 0
    assert (said["config"], said["dtype"], said["set"], said["device"]) == (
        "tiny",
        "float32",
        [],
        "cpu",
    )
    assert said["gate"] == []
    assert said["parts"]["denoise"]["median"] == 9.0
    assert said["metrics"]["denoise/forward"] == {"value": 4.5, "direction": "lower"}


def test_flags_reach_the_measurement(run):
    assert run("--part", "forward", "--part", "store", "--repeats", 7, "--warmup", 0)[0] == 0
    assert run.asked == [(("forward", "store"), 0, 7, [0, 1])]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--weights", "x"], "--config and --weights exclude each other"),
        (["--repeats", "0"], "--repeats 0 is out of range"),
        (["--warmup", "-1"], "--warmup -1 is out of range"),
        (["--part", "stor"], "--part stor is unknown; did you mean store"),
        (["--set", "cache.top=0", "--part", "selection"], "selection: cache.top=0 leaves nothing"),
        (
            ["--write", "/proc/nowhere/at/all.json"],
            "--write /proc/nowhere/at/all.json is not writable",
        ),
        (
            ["--gate", "nothing.json"],
            "Baseline nothing.json does not exist; make it with packforcing bench --write",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_measured(run, words, sentence):
    with pytest.raises(InputError, match=sentence):
        run(*words)
    assert run.asked == []


def test_a_gate_and_a_new_baseline_exclude_each_other(run):
    with pytest.raises(SystemExit):
        run("--gate", "--write", "x.json")


# The baseline


@pytest.fixture
def baseline(run, tmp_path):
    path = tmp_path / "baseline.json"
    assert run("--write", path)[0] == 0
    run.asked.clear()
    return path


def test_a_baseline_says_what_it_is_of(baseline):
    said = json.loads(baseline.read_text())
    assert {"rule", "machine", "config", "set", "dtype", "rounds", "metrics"} == said.keys()
    assert (said["config"], said["dtype"], said["set"], said["rounds"]) == (
        "tiny",
        "float32",
        [],
        3,
    )
    assert {"device", "processor", "cores", "jax", "date"} <= said["machine"].keys()
    assert said["metrics"]["store/forward"] == {
        "value": 0.25,
        "direction": "lower",
        "tolerance": 0.5,
        "runs": [0.25],
    }
    assert said["metrics"]["forward, share of ceiling"]["direction"] == "higher"


def test_more_runs_make_the_tolerance(run, baseline):
    for denoise in (10.0, 10.4, 9.4, 9.8):
        run.seconds["denoise"] = denoise
        assert run("--write", baseline)[0] == 0
    metrics = json.loads(baseline.read_text())["metrics"]
    assert metrics["denoise/forward"]["runs"] == [4.5, 5.0, 5.2, 4.7, 4.9]
    assert (metrics["denoise/forward"]["value"], metrics["denoise/forward"]["tolerance"]) == (
        4.9,
        0.24,
    )  # 4 x 0.3 / 4.9
    assert metrics["store/forward"]["tolerance"] == verb.LEAST


@pytest.mark.parametrize(
    ("seconds", "worse"),
    [
        ({}, set()),
        ({"denoise": 9.0 * 1.49}, set()),
        ({"denoise": 9.0 * 1.51}, {"denoise/forward"}),
        ({"denoise": 0.1, "store": 0.001}, set()),
        ({"forward": 2.0 * 1.49}, set()),
        ({"forward": 2.0 * 1.51}, {"forward, share of ceiling"}),
        ({"forward": 2.0 / 1.6}, {"denoise/forward", "store/forward", "second/forward"}),
    ],
)
def test_the_gate_fails_for_what_is_worse_than_allowed(run, baseline, seconds, worse):
    run.seconds |= seconds
    code, out, _ = run("--gate", baseline)
    assert code == bool(worse)
    assert {line.split("  ")[0] for line in out.splitlines() if line.endswith("  WORSE")} == worse
    assert out.rstrip().endswith(f"4 metrics, {len(worse)} worse")
    verdicts = json.loads(run("--gate", baseline, "--json")[1])["gate"]
    assert {each["metric"] for each in verdicts if not each["ok"]} == worse


def test_a_metric_that_one_side_lacks_is_an_error(run, baseline):
    with pytest.raises(
        InputError, match="this run lacks denoise/forward, second/forward; compare runs of"
    ):
        run("--gate", baseline, "--part", "store", "--part", "forward")
    run.seconds["decode"] = 1.0
    with pytest.raises(InputError, match="baseline.json lacks decode/forward"):
        run("--gate", baseline)
    with pytest.raises(InputError, match="lacks decode/forward"):
        run("--write", baseline)


@pytest.mark.parametrize(
    ("words", "change", "sentence"),
    [
        (["--set", "cache.top=1"], {}, r"a baseline of set \[\], this run of \[\"cache.top=1\"\]"),
        ([], {"config": "large"}, "a baseline of config large, this run of tiny"),
        ([], {"dtype": "bfloat16"}, "a baseline of dtype bfloat16, this run of float32"),
        (
            [],
            {"machine": {"device": "NVIDIA H200"}},
            "a baseline of device NVIDIA H200, this run of cpu",
        ),
        ([], {"machine": {}}, "cannot be read .KeyError: 'device'.; write it anew"),
        ([], {"metrics": {"a": {"value": "?"}}}, "cannot be read"),
        (
            [],
            {"metrics": {"a": {"value": 1, "tolerance": -1, "runs": [1], "direction": "lower"}}},
            "has -1 in a",
        ),
        (
            [],
            {"metrics": {"a": {"value": 1, "tolerance": 1, "runs": [1], "direction": "up"}}},
            "says of a neither",
        ),
        ([], {"metrics": []}, "cannot be read"),
    ],
)
@pytest.mark.parametrize("flag", ["--gate", "--write"])
def test_a_baseline_of_something_else_is_refused(run, baseline, flag, words, change, sentence):
    baseline.write_text(json.dumps(json.loads(baseline.read_text()) | change))
    with pytest.raises(InputError, match=sentence):
        run(flag, baseline, *words)
    assert run.asked == []


def test_runs_of_different_machines_do_not_mix(run, baseline):
    said = json.loads(baseline.read_text())
    said["machine"] |= {"processor": "Other 9", "date": "2020-02-02"}
    baseline.write_text(json.dumps(said))
    assert run("--gate", baseline)[0] == 0
    with pytest.raises(InputError, match="on another machine.*processor Other 9"):
        run("--write", baseline)


def test_a_file_that_is_no_json_is_refused(run, baseline):
    baseline.write_text("{")
    with pytest.raises(InputError, match="cannot be read .JSONDecodeError"):
        run("--gate", baseline)


def test_a_write_that_fails_leaves_what_was_there(run, baseline, monkeypatch):
    before = baseline.read_bytes()

    def refuse(*paths):
        raise OSError(28, "No space left on device", str(baseline))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        run("--write", baseline)
    assert baseline.read_bytes() == before
    assert sorted(path.name for path in baseline.parent.iterdir() if path.suffix != ".py") == [
        "baseline.json"
    ]


def test_the_committed_baseline_follows_its_rule():
    said = verb.read(verb.BASELINE)
    assert (said["config"], said["set"], said["dtype"]) == ("stage", [], "float32")
    assert said["rule"] == verb.RULE
    names = {f"{name}/forward" for name in verb.PARTS if name != "forward"} | {
        "forward, share of ceiling"
    }
    assert said["metrics"].keys() == names
    for metric in said["metrics"].values():
        assert len(metric["runs"]) >= 5
        assert metric["tolerance"] == verb.tolerance(metric["runs"])
        assert metric["value"] == statistics.median(metric["runs"])


# The real thing


def test_the_verb_knows_the_parts_without_loading_jax():
    assert tuple(bench.PARTS) == verb.PARTS
    code = "import sys, packforcing_jax.cli.bench; print('jax' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
        == "False"
    )


def test_a_model_folder_is_measured(folder, capsys):
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    words = [
        "--weights",
        str(folder),
        "--part",
        "store",
        "--part",
        "decode",
        "--repeats",
        "2",
        "--warmup",
        "0",
    ]
    args = parser.parse_args([*words, "--set", "cache.capacity=5"])
    args.json = True
    assert verb.run(args) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["config"], list(said["parts"]), said["metrics"]) == (
        "tiny",
        ["decode", "store"],
        {},
    )
    assert said["set"] == ["cache.capacity=5"]
    assert all(row["median"] > 0 and row["bytes_per_second"] > 0 for row in said["parts"].values())
