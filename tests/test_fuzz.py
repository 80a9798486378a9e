"""Thousands of wrong commands, files and folders through `main` in one process: each ends in a code and a sentence."""

import collections
import os
import resource
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import convert_layouts
import fuzz_cases
import fuzz_watch
import pytest
from fuzz_cases import Bases, Case, Special

from packforcing_jax.cli import main

SEED = int(os.environ.get("FUZZ_SEED", "18"))
COSTLY = "state folder"  # whose cases go on with a video
CASES = {
    kind: int(os.environ.get("FUZZ_CASES", "200" if kind == COSTLY else "360"))
    for kind in fuzz_cases.KINDS
}
ONLY = os.environ.get("FUZZ_ONLY")  # the number of one case
FAILED = Path("out", "fuzz").absolute()
SHARE = 0.5  # of the cases must get past the parser
MOST_GROWTH = 3 * 2**20  # KiB of memory while all of them run
GOLDEN = Path(__file__).parent / "golden" / "unipc_solver.safetensors"


@pytest.fixture(scope="module")
def bases(folder, tmp_path_factory):
    """What valid runs leave."""
    here = tmp_path_factory.mktemp("valid")
    fuzz_watch.lay({"p.txt": b"a red disc\na green disc\n"}, here)
    os.symlink(folder, here / "model")
    convert_layouts.put(
        here / "student.pt",
        {"generator_ema": convert_layouts.prefixed("model.", convert_layouts.dit())},
    )
    (here / "reference.safetensors").write_bytes(GOLDEN.read_bytes())
    commands = (
        (*fuzz_cases.RESUMED, "--blocks", "2", "--trace", "t.jsonl"),
        fuzz_cases.VIDEOS,
        fuzz_cases.PREPARE,
        (*fuzz_cases.BENCH, "--write", "baseline.json"),
    )
    outside = os.getcwd()
    os.chdir(here)
    try:
        assert [main.main(command) for command in commands] == [0] * len(commands)
    finally:
        os.chdir(outside)
    of = lambda *names: fuzz_watch.taken(here, *names)  # noqa: E731
    model = {f"model/{name}": item for name, item in fuzz_watch.taken(folder, "").items()}
    return Bases(
        model=model,
        state=of("state", "out"),
        videos=of("videos"),
        data=of("data"),
        checkpoint=of("student.pt"),
        trace=of("t.jsonl"),
        baseline=of("baseline.json"),
        reference=of("reference"),
    )


def names_of(kind, number):
    return f"{kind.replace(' ', '-')}-{SEED}-{number}"


FOLDERS = (
    "state folder",
    "model folder",
)  # in a file of their own: files of tests run side by side


@pytest.mark.parametrize("kind", [kind for kind in fuzz_cases.KINDS if kind not in FOLDERS])
def test_every_case_ends_in_a_code_and_a_sentence_and_leaves_nothing(kind, bases, tmp_path):
    require_clean(kind, bases, tmp_path)


def require_clean(kind, bases, tmp_path):
    """Runs all cases of a kind; each has to end in a code and a sentence, and leave nothing."""
    codes, failures, reached = collections.Counter(), [], 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    numbers = range(CASES[kind]) if ONLY is None else [int(ONLY)]
    for number in numbers:
        case = fuzz_cases.made(kind, SEED, number, bases)
        found = fuzz_watch.run(case, tmp_path / str(number))
        codes[found.code] += 1
        reached += found.reached
        if found.wrong:
            place = FAILED / names_of(kind, number)
            fuzz_watch.put_down(case, found.wrong, place)
            failures.append("\n".join([f"{place}: {' '.join(case.words)[:300]!r}", *found.wrong]))
    told = ", ".join(f"code {code}: {count}" for code, count in sorted(codes.items(), key=str))
    print(f"fuzz: seed {SEED}, {kind}: {len(numbers)} cases, {reached} past the parser, {told}")
    assert not failures, "\n\n".join([f"{len(failures)} of {len(numbers)}", *failures[:20]])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MOST_GROWTH, f"memory grew by {grown} KiB"
    if len(numbers) >= 100:
        assert reached >= SHARE * len(numbers)
        assert codes[0] > 0
        assert codes[2] > len(numbers) / 4


def test_two_thousand_cases_are_a_run():
    assert sum(CASES.values()) >= 2000 or "FUZZ_CASES" in os.environ


def test_the_same_seed_and_number_give_the_same_case(bases):
    for kind in fuzz_cases.KINDS:
        one, same, other = (fuzz_cases.made(kind, *at, bases) for at in ((3, 5), (3, 5), (3, 6)))
        assert one == same
        assert one != other


def says(text, code=2):
    def program(words):
        print(text, file=sys.stderr)
        return code

    return program


def hidden(words):
    Path(".video.mp4.lock").touch()
    return 0


def opened(words, held=[]):  # noqa: B006  so that it stays open
    held.append(Path("file").open("rb"))  # noqa: SIM115
    return 0


def threaded(words):
    threading.Thread(target=time.sleep, args=(4,), daemon=True).start()
    return 0


def child(words, held=[]):  # noqa: B006
    held.append(subprocess.Popen(["sleep", "4"]))
    return 0


def written(words):
    Path("file").write_text("other")
    return says("packforcing: this is refused.")(words)


def raising(words):
    raise KeyError("x")


FAULTS = {
    "a traceback": (raising, "raises"),
    "a traceback that is printed": (says("packforcing: Traceback of x.", 0), "prints a traceback"),
    "another code": (says("", 7), "exit code 7"),
    "no sentence": (says(""), "does not end with one sentence"),
    "two lines": (says("more\npackforcing: this is refused."), "says more than a sentence"),
    "a long sentence": (says(f"packforcing: {'x' * 2000}."), "has a sentence of"),
    "a control character": (says("packforcing: \x1b[2J."), "cannot be printed"),
    "a file written": (written, "leaves other files: ['file']"),
    "a lock": (hidden, ".video.mp4.lock"),
    "an open file": (opened, "files are left open"),
    "a thread": (threaded, "threads are left"),
    "a process": (child, "processes are left"),
    "another folder": (lambda words: os.chdir("/") or 0, "the working folder is /"),
    "another environment": (lambda words: os.environ.update(FUZZED="1") or 0, "FUZZED"),
    "a warning": (lambda words: warnings.warn("x", stacklevel=1) or 0, "warns: UserWarning: x"),
    "a hang": (lambda words: time.sleep(5) or 0, "takes more than"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_must_not_be_is_seen(tmp_path, monkeypatch, fault):
    program, said = FAULTS[fault]
    monkeypatch.setattr(fuzz_watch, "SECONDS", 1 if fault == "a hang" else 60)
    monkeypatch.setenv("FUZZED", "0")
    case = Case(("sample",), {"file": b"text"})
    (wrong,) = fuzz_watch.run(case, tmp_path / "case", program).wrong
    assert said in wrong


def test_a_failing_case_is_put_down_to_be_run_again(tmp_path):
    case = Case(("sample", "--prompt", "a b"), {"model/config.json": b"{}", "p": Special("pipe")})
    fuzz_watch.put_down(case, ["it hangs"], tmp_path / "case")
    assert (tmp_path / "case" / "command").read_text() == "packforcing sample --prompt 'a b'\n"
    assert (tmp_path / "case" / "model" / "config.json").read_text() == "{}"
    assert (tmp_path / "case" / "p").is_fifo()
    assert (tmp_path / "case" / "wrong").read_text() == "it hangs\n"
