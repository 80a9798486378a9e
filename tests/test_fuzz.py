"""Thousands of wrong commands, files and folders through `main` in one process: each ends in a code and a sentence."""

import collections
import os
import resource
from pathlib import Path

import convert_layouts
import fuzz_cases
import fuzz_watch
import pytest
from fuzz_cases import Bases

from packforcing_jax.cli import main

SEED = int(os.environ.get("FUZZ_SEED", "18"))
CASES = int(os.environ.get("FUZZ_CASES", "350"))  # of each kind
ONLY = os.environ.get("FUZZ_ONLY")  # one number
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


@pytest.mark.parametrize("kind", fuzz_cases.KINDS)
def test_every_case_ends_in_a_code_and_a_sentence_and_leaves_nothing(kind, bases, tmp_path):
    codes, failures, reached = collections.Counter(), [], 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    numbers = range(CASES) if ONLY is None else [int(ONLY)]
    for number in numbers:
        case = fuzz_cases.made(kind, SEED, number, bases)
        Path("/tmp/fz/at").write_text(f"{kind} {number} {case.words!r}"[:3000], errors="replace")
        import time

        t0 = time.time()
        t1 = time.process_time()
        found = fuzz_watch.run(case, tmp_path / str(number))
        codes[found.code] += 1
        with open("/tmp/fz/all", "a", errors="replace") as f:
            f.write(
                f"{time.time() - t0:.2f} {time.process_time() - t1:.2f} {kind.replace(' ', '-')} {number} {found.code} {found.reached} {' '.join(case.words)[:150]!r} | {found.err[-300:].replace(chr(10), ' ')}\n"
            )
        reached += found.reached
        if found.wrong:
            fuzz_watch.put_down(case, found.wrong, FAILED / f"{kind} {SEED} {number}")
            failures.append(
                f"seed {SEED}, {kind} {number}: {' '.join(case.words)[:300]!r}\n"
                + "\n".join(found.wrong)
            )
    print(
        f"fuzz: {kind}, seed {SEED}: {len(numbers)} cases, {reached} past the parser, codes {dict(codes)}"
    )
    assert not failures, "\n\n".join(
        [f"{len(failures)} cases, put down in {FAILED}", *failures[:30]]
    )
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MOST_GROWTH, f"memory grew by {grown} KiB"
    if ONLY is None and CASES >= 100:
        assert reached >= SHARE * CASES
        assert codes[0] > 0
        assert codes[2] > CASES / 4
