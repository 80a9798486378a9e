"""The program says what it can do without loading jax, and answers every failure with one sentence and a code."""

import argparse
import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types

import pytest

import packforcing_jax
from packforcing_jax import config, versions
from packforcing_jax.cli import common, main
from packforcing_jax.config import loading
from packforcing_jax.errors import InputError, MachineError

VERBS = list(main.VERBS)


def python(code):
    """stdout of `code` in a new process, in the environment of the tests."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def run(capsys, *words):
    """(exit code, stdout, stderr) of one command, in this process."""
    code = main.main(list(words))
    return code, *capsys.readouterr()


@pytest.fixture
def verb(monkeypatch):
    """Installs a verb `probe` that does what the given function does."""

    def install(act, arguments=lambda parser: None, checked=False):
        module = types.SimpleNamespace(add_arguments=arguments, run=act)
        monkeypatch.setitem(sys.modules, "packforcing_jax.cli.probe", module)
        monkeypatch.setitem(
            main.VERBS, "probe", main.Verb("probe", "probe", "packforcing probe", checked)
        )

    return install


def raiser(error):
    def act(args):
        raise error

    return act


def test_importing_the_package_and_help_load_no_jax():
    code = "import sys; from packforcing_jax.cli import main; main.main({}); print('jax' in sys.modules)"
    assert (
        python(
            "import sys, packforcing_jax; print(sorted({'jax', 'numpy', 'flax'} & set(sys.modules)))"
        )
        == "[]"
    )
    for words in (["--help"], *([name, "--help"] for name in VERBS)):
        assert python(code.format(words)).splitlines()[-1] == "False", words


def test_help_answers_in_under_a_second():
    took = []
    for _ in range(3):
        start = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "packforcing_jax", "--help"], check=True, capture_output=True
        )
        took.append(time.monotonic() - start)
    assert min(took) < 1


def test_the_overview_lists_every_verb_with_an_example(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name, row in main.VERBS.items():
        assert f"  {name} " in out
        assert row.example.startswith(f"packforcing {name} ")
        assert row.example in out


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_help_with_its_example_and_json(capsys, name):
    code, out, _ = run(capsys, name, "--help")
    assert code == 0
    assert main.VERBS[name].example in out
    assert "--json" in out


@pytest.mark.parametrize("name", VERBS)
def test_the_example_of_every_verb_is_understood(name):
    parser, _ = main.parser_of(name)
    words = main.VERBS[name].example.split()[2:]
    parser.refuse_unknown_flags(words)
    parser.parse_args(words)


def test_both_ways_to_start_it_are_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "packforcing_jax", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, packforcing_jax.__version__)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "give a verb"),
        (["smaple"], "no verb 'smaple'; did you mean sample?"),
        (["zzz"], "known: bench, compare, convert"),
        (["--halp"], "no verb '--halp'"),
        (["doctor", "--jsn"], "doctor has no flag --jsn; did you mean --json?"),
        (["doctor", "--jso=3"], "did you mean --json?"),
        (["doctor", "--js"], "doctor has no flag --js"),
        (["doctor", "-q"], "doctor has no flag -q"),
        (["doctor", "extra"], "extra"),
    ],
)
def test_what_is_unknown_is_named_in_one_line_with_code_2(capsys, words, sentence):
    code, out, err = run(capsys, *words)
    assert code == 2
    assert out == ""
    assert sentence in err
    assert err.startswith("packforcing: ")
    assert err.count("\n") == 1
    assert "usage" not in err


def test_an_unknown_flag_is_named_before_a_missing_argument(capsys, verb):
    verb(lambda args: 0, lambda parser: parser.add_argument("file"))
    assert "no flag --fil" in run(capsys, "probe", "--fil")[2]
    assert "file" in run(capsys, "probe")[2]


def test_values_may_look_like_flags_where_argparse_allows_it(capsys, verb):
    seen = []
    verb(
        lambda args: seen.append(args) or 0,
        lambda parser: parser.add_argument("--shift", type=float),
    )
    assert run(capsys, "probe", "--shift", "-2.5")[0] == 0
    assert seen[0].shift == -2.5
    assert run(capsys, "probe", "--shift", "much")[0] == 2


class JaxRuntimeError(RuntimeError):
    """Named as jax names its own."""


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (InputError("prompt 'x' is empty; give words."), 2, "prompt 'x' is empty; give words."),
        (MachineError("latents of block 3 are not numbers."), 3, "latents of block 3"),
        (OSError(errno.ENOSPC, "No space left on device", "out/a.mp4"), 3, "out/a.mp4"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 3, "Disk quota exceeded"),
        (MemoryError(), 3, "out of memory"),
        (
            JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore"),
            3,
            "device is out of memory",
        ),
        (JaxRuntimeError("UNAVAILABLE: device lost"), 3, "not reachable"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "w/x"),
            2,
            "w/x: No such file or directory",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_failures_map_to_codes_and_one_line(capsys, verb, error, code, sentence):
    verb(raiser(error))
    got, out, err = run(capsys, "probe")
    assert (got, out) == (code, "")
    assert sentence in err
    assert err.count("\n") == 1
    got, out, _ = run(capsys, "probe", "--json")
    assert got == code
    assert sentence in json.loads(out)["error"]


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("a\u2028b\nc.", "a b c."),
        ("\x1b[2J\x00\udcff is no name.", "\\x1b[2J\\x00\\udcff is no name."),
        ("é 狐.", "é 狐."),
        ("x" * 5000 + "; correct it.", f"{'x' * 500}[...]{'x' * 487}; correct it."),
    ],
)
def test_a_sentence_is_one_line_that_can_be_printed(capsys, verb, told, said):
    verb(raiser(InputError(told)))
    assert run(capsys, "probe") == (2, "", f"packforcing: {said}\n")


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "--weights", ""],
        ["sample", "--out="],
        ["plan", "--config", ""],
        ["inspect", ""],
        ["train", "--out", ""],
    ],
)
def test_an_empty_path_or_name_is_no_wish_for_the_default(capsys, words):
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert "is empty; give it a value or leave it out" in err


@pytest.mark.parametrize(
    "error",
    [
        ValueError("ours"),
        RuntimeError("RESOURCE_EXHAUSTED but not of jax"),
        JaxRuntimeError("INVALID_ARGUMENT: x"),
    ],
)
def test_a_defect_of_ours_keeps_its_traceback(verb, error):
    verb(raiser(error))
    with pytest.raises(type(error)):
        main.main(["probe"])


@pytest.mark.parametrize("code", [0, 1])
def test_the_code_of_a_verb_is_the_programs(capsys, verb, code):
    verb(lambda args: code)
    assert run(capsys, "probe")[0] == code


def test_sigterm_runs_finally_blocks_and_ends_with_130(capsys, verb):
    kept = []

    def act(args):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        finally:
            kept.append("closed")

    before = signal.getsignal(signal.SIGTERM)
    verb(act)
    assert run(capsys, "probe")[0] == 130
    assert kept == ["closed"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_program_also_runs_outside_the_main_thread(verb):
    verb(lambda args: 1)
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main.main(["probe"])))
    thread.start()
    thread.join()
    assert codes == [1]


def test_a_broken_pair_stops_a_checked_verb_before_it_runs(capsys, verb, monkeypatch):
    def refuse():
        raise MachineError("flax 0.12.8 does not work with jax 0.11.1")

    monkeypatch.setattr(versions, "check", refuse)
    verb(lambda args: 0, checked=True)
    assert run(capsys, "probe")[0] == 3
    verb(lambda args: 0, checked=False)
    assert run(capsys, "probe")[0] == 0


def test_public_names_are_those_listed_and_load_when_used(monkeypatch):
    assert packforcing_jax.Experiment is config.Experiment
    assert packforcing_jax.load_experiment is loading.load_experiment
    assert set(packforcing_jax.__all__) == set(packforcing_jax._HOME)
    for name in packforcing_jax.__all__:
        assert getattr(packforcing_jax, name).__class__ is not types.ModuleType
    with pytest.raises(AttributeError, match="Pipline"):
        packforcing_jax.Pipline  # noqa: B018


def test_a_broken_pair_stops_the_pipeline_from_loading(monkeypatch):
    def refuse():
        raise MachineError("flax 0.12.8 does not work with jax 0.11.1")

    monkeypatch.setattr(versions, "check", refuse)
    monkeypatch.delitem(vars(packforcing_jax), "Pipeline", raising=False)
    with pytest.raises(MachineError):
        packforcing_jax.Pipeline  # noqa: B018


class Clock:
    """A clock that the test moves."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def walked(monkeypatch, capsys):
    """Lines that `progress` writes while items take the given seconds each."""

    def walk(seconds, **settings):
        clock = Clock()
        monkeypatch.setattr(common, "clock", clock)
        for took in common.progress(seconds, name="sample", unit="block", **settings):
            clock.now += took
        return capsys.readouterr().err.splitlines()

    return walk


def test_plain_progress_tells_rate_and_time_left(walked):
    assert walked([4.0, 4.0, 4.0, 8.0]) == [
        "sample: 1/4 block, 0.25 block/s, 0:04 gone, 0:12 left",
        "sample: 2/4 block, 0.25 block/s, 0:08 gone, 0:08 left",
        "sample: 3/4 block, 0.25 block/s, 0:12 gone, 0:04 left",
        "sample: 4/4 block, 0.20 block/s, 0:20 gone, 0:00 left",
    ]


def test_plain_progress_counts_from_where_it_resumed_and_ends_with_the_note(walked):
    assert walked([4.0, 4.0], total=12, first=10, note=lambda took: f"loss {took}") == [
        "sample: 11/12 block, 0.25 block/s, 0:04 gone, 0:04 left, loss 4.0",
        "sample: 12/12 block, 0.25 block/s, 0:08 gone, 0:00 left, loss 4.0",
    ]


def test_plain_progress_keeps_a_log_short_but_always_ends_with_a_line(walked):
    lines = walked([0.125] * 1001)
    assert len(lines) == 1000 * 0.125 // common.SECONDS_BETWEEN_LINES + 1
    assert "1001/1001" in lines[-1]
    assert walked([]) == []


def test_progress_of_a_stream_without_end_counts_up(walked):
    lines = walked(iter([3.0, 0.5]))
    assert lines[0] == "sample: 1 block, 0.33 block/s, 0:03 gone"
    assert "2/2 block" in lines[-1]


class Terminal(io.StringIO):
    """A terminal that remembers."""

    def isatty(self):
        return True


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(common.progress([5, 6, 7], name="sample", unit="block")) == [5, 6, 7]
    assert "sample: 100%" in sys.stderr.getvalue()
    assert "3/3" in sys.stderr.getvalue()


def test_a_bar_counts_from_where_it_resumed_and_shows_the_note(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    for _ in common.progress(
        [5, 6], name="train", unit="steps", total=12, first=10, note=lambda each: f"loss {each}"
    ):
        assert "10/12" in sys.stderr.getvalue()
    assert "12/12" in sys.stderr.getvalue()
    assert "loss 6" in sys.stderr.getvalue()


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (75, "1:15"), (59.6, "1:00"), (3675, "1:01:15")]
)
def test_durations_read_as_clock_time(seconds, shown):
    assert common.duration(seconds) == shown


def test_the_start_line_names_device_dtype_attention_and_why():
    out = io.StringIO()
    experiment = config.Experiment(name="small")
    common.start_line(
        "sample", experiment=experiment, dtype="bfloat16", attention="xla", why="asked for", out=out
    )
    line = out.getvalue()
    assert line == f"sample: small on {common.device_line()}, bfloat16, attention xla (asked for)\n"
    assert "cpu" in line


def test_experiment_flags_are_read_back():
    parser = argparse.ArgumentParser()
    common.add_experiment_arguments(parser, default="wan_t2v_1_3b")
    args = parser.parse_args(["--set", "fps=5", "--set", "cache.top=2"])
    got = common.load_experiment(args.config, args.overrides)
    assert (got.name, got.fps, got.cache.top) == ("wan_t2v_1_3b", 5, 2)
