"""`kill -9` at ten random moments, each time continued by the same command: the end must equal the unbroken run.

python -m benchmarks.kill_and_continue      # some minutes on two CPU cores; exit 1 if anything differs
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import endurance
from packforcing_jax.io import checkpoints, model_folder, video
from packforcing_jax.networks import tokenizer
from packforcing_jax.stage import captions

PATIENCE = 300  # seconds until a moment that does not come is given up
CACHE = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


@dataclass(frozen=True)
class Run:
    """One `sample` command and the files it writes."""

    folder: Path
    argv: tuple[str, ...]
    environment: dict[str, str]

    @property
    def video(self) -> Path:
        return self.folder / "video.mp4"

    @property
    def trace(self) -> Path:
        return self.folder / "trace.jsonl"

    @property
    def saves(self) -> Path:
        return self.folder / "saves"

    def start(self) -> subprocess.Popen:
        """The command in a process group of its own."""
        files = ["--out", self.video, "--trace", self.trace, "--state", self.saves]
        command = [sys.executable, "-m", "packforcing_jax", "sample", *self.argv, *files]
        with (self.folder / "said.txt").open("ab") as log:
            return subprocess.Popen(
                list(map(str, command)),
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | self.environment,
            )

    def traced(self) -> int:
        """Blocks in the trace."""
        return max(0, self.trace.read_bytes().count(b"\n") - 1) if self.trace.exists() else 0

    def saved(self) -> int:
        """Blocks in the newest complete save."""
        return checkpoints.Checkpoints(self.saves).latest() or 0

    def saving(self, since: float) -> bool:
        """Whether a save is being written that was begun after `since`, in seconds of the system's clock."""
        written = self.saves.glob(f"*{checkpoints.TEMPORARY}*")
        with contextlib.suppress(FileNotFoundError):  # it has got its name meanwhile
            return any(step.stat().st_ctime > since for step in written)
        return False


@dataclass(frozen=True)
class Moment:
    """`delay` seconds after so many blocks were drawn and, perhaps, a save begun; without blocks, after the start."""

    blocks: int
    in_save: bool
    delay: float

    def __str__(self) -> str:
        if self.blocks == 0:
            return f"{self.delay:.1f} s after the start"
        return f"{'in a save ' * self.in_save}behind block {self.blocks}"


def moments(rng: random.Random, *, blocks: int, every: int, start: float) -> list[Moment]:
    """Ten moments that rise through the video: three while it starts, four while it draws, three while it saves.

    The first of these fall within `start` seconds.
    """
    kinds = rng.sample([(False, False)] * 3 + [(True, False)] * 4 + [(True, True)] * 3, k=10)
    behind = [
        1 + int((number + rng.random()) * (blocks - 2 * every) / len(kinds))
        for number in range(len(kinds))
    ]
    longest = {(False, False): start, (True, False): 0.2, (True, True): 0.05}
    return [
        Moment(block * counted, in_save, rng.uniform(0, longest[counted, in_save]))
        for block, (counted, in_save) in zip(behind, kinds)
    ]


def killed(run: Run, moment: Moment) -> dict:
    """Starts the run, kills its whole process group at the moment, and says where that was and what is left."""
    before = run.traced()
    since = time.time()
    until = time.monotonic() + PATIENCE
    process = run.start()

    def comes() -> bool:
        if moment.blocks == 0:
            return True
        return run.traced() > max(moment.blocks - 1, before) and (
            run.saving(since) or not moment.in_save
        )

    while not comes() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(moment.delay)
    alive = process.poll() is None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    where = (
        "in a save"
        if run.saving(since)
        else "before its first block"
        if run.traced() == before
        else "drawing"
    )
    outcome = {
        "asked": str(moment),
        "hit": alive,
        "where": where,
        "drawn": run.traced(),
        "saved": run.saved(),
    }
    return outcome | playing(run)


def playing(run: Run) -> dict:
    """How many blocks of the video decode, and whether it is whole blocks and all that was saved."""
    if not run.video.exists() or run.video.stat().st_size == 0:
        return {"shown": 0, "plays": run.saved() == 0}
    decoded, rest = divmod(len(video.read(run.video)), endurance.TOY.cache.block)
    return {"shown": decoded, "plays": rest == 0 and decoded >= run.saved()}


def prepared(folder: Path, blocks: int, every: int) -> list[Run]:
    """Runs of the same model and the same story: a short one, one that stays unbroken and one that is killed."""
    exp = endurance.TOY
    built = endurance.weights()
    parts = {"dit": built.nets.dit, "compressor": built.nets.compressor, "text": built.text}
    argv = tokenizer.word_tokenizer(captions.VOCABULARY).to_str()
    model_folder.save(
        folder / "model", exp, parts, dtype="float32", texts={model_folder.TOKENIZER: argv}
    )
    story = folder / "story.txt"
    story.write_text(
        "".join(
            f"{i}: {prompt}\n" for i, prompt in enumerate(endurance.changing_prompts(blocks, 7))
        )
    )
    model = ("--weights", str(folder / "model"), "--timeline", str(story))
    environment = CACHE | {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    runs = [
        Run(folder / name, (*model, "--blocks", str(length), "--every", str(every)), environment)
        for name, length in (("short", every + 1), ("unbroken", blocks), ("killed", blocks))
    ]
    for run in runs:
        run.folder.mkdir()
    return runs


def compared(whole: Run, broken: Run) -> dict[str, bool]:
    """What must hold at the end. The trace holds the hash of every latent and all that was recalled."""
    inspect = [sys.executable, "-m", "packforcing_jax", "inspect", "--no-map", str(broken.trace)]
    return {
        "traces equal, line by line": whole.trace.read_bytes() == broken.trace.read_bytes(),
        "videos equal, byte by byte": whole.video.read_bytes() == broken.video.read_bytes(),
        "video plays, all blocks": playing(broken) == {"shown": whole.traced(), "plays": True},
        "inspect finds nothing wrong": subprocess.run(inspect, capture_output=True).returncode == 0,
    }


def experiment(folder: Path, *, blocks: int, every: int, seed: int) -> dict:
    """One unbroken run, ten kills with a continuation each, and what came out."""
    short, whole, broken = prepared(folder, blocks, every)
    short.start().wait()  # leaves what is compiled behind, so that the others start alike
    began = time.monotonic()
    process = whole.start()
    while whole.traced() == 0 and process.poll() is None:
        time.sleep(0.1)
    start = time.monotonic() - began
    codes = [process.wait()]
    print(
        f"unbroken: first block after {start:.0f} s, all after {time.monotonic() - began:.0f} s",
        file=sys.stderr,
    )
    kills = []
    for moment in moments(random.Random(seed), blocks=blocks, every=every, start=start):
        kills.append(killed(broken, moment))
        print(f"killed: {json.dumps(kills[-1])}", file=sys.stderr)
    codes.append(broken.start().wait())
    if any(codes):
        print((broken.folder / "said.txt").read_text()[-2000:], file=sys.stderr)
        return {"kills": kills, "holds": {f"both runs end with 0 ({codes})": False}}
    checks = {
        "both runs end with 0": True,
        "ten kills hit": all(kill["hit"] for kill in kills),
        "video plays after every kill": all(kill["plays"] for kill in kills),
    }
    return {
        "blocks": blocks,
        "every": every,
        "seed": seed,
        "kills": kills,
        "holds": checks | compared(whole, broken),
    }


def table(result: dict) -> str:
    """The outcome as aligned text."""
    lines = [f"{'asked for':<28}{'killed':<26}{'drawn':>6}{'saved':>6}{'shown':>6}"]
    lines += [
        f"{kill['asked']:<28}{kill['where']:<26}{kill['drawn']:>6}{kill['saved']:>6}{kill['shown']:>6}"
        for kill in result["kills"]
    ]
    return "\n".join(
        [
            *lines,
            "",
            *(f"{name}: {'yes' if holds else 'NO'}" for name, holds in result["holds"].items()),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what came out; 1 if anything does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--blocks", type=int, default=40, metavar="N", help="length of the video (default: 40)"
    )
    parser.add_argument(
        "--every", type=int, default=3, metavar="N", help="blocks between two saves (default: 3)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        result = experiment(Path(folder), blocks=args.blocks, every=args.every, seed=args.seed)
    print(json.dumps(result) if args.json else table(result))
    return 0 if all(result["holds"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
