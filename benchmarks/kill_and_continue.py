"""`kill -9` at 50 moments of `sample`, `train`, `convert` and `prepare`, each continued by the same command.

python -m benchmarks.kill_and_continue                          # 20 minutes on two CPU cores; exit 1 if it breaks
python -m benchmarks.kill_and_continue train convert --seed 3   # two of the verbs, other moments

Each moment has a run of its own: it is begun in an empty folder, killed once with its whole process group, and the same
command is given again to its end. That must equal the unbroken run bit for bit, with no name more or less beside it.
Moments are drawn uniformly over the wall time of the unbroken run; some of `sample` uniformly within a save. One that
misses (the run was over, the save was) is logged and drawn again.
"""

import argparse
import contextlib
import datetime
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint

from benchmarks import convert_full_size
from packforcing_jax.config import loading
from packforcing_jax.data import records
from packforcing_jax.io import checkpoints, model_folder, video
from packforcing_jax.stage import captions, data, world
from packforcing_jax.training import logs, runs

LOG = "kill_and_continue.jsonl"
OFTEN = 0.002  # seconds between two looks at a running command
PATIENCE = 300  # seconds until a save that does not come is given up
STAGE = Path(loading.__file__).parents[1] / "weights" / "stage"
BLOCK = 4  # frames of a block of the Stage model
CLIPS = 150
PROMPTS = 80_000  # of which a file of the data set holds 1,000
TOY = {
    "dit.layers": 1,
    "dit.dim": 24,
    "dit.heads": 2,
    "dit.rope_pairs": "(2,2,2)",
    "dit.ffn_dim": 48,
    "compressor.channels": "(6,7,8,9)",
    "train.source.kind": "records",
    "train.batch": 2,
    "train.cover.sinks": "(4,)",
    "train.cover.matching": 0,
    "train.save_every": 4,
    "train.steps": 40,
}
WENT_ON = re.compile(r"goes on behind (?:block|step) \d+|\d+ of \d+ items are done already")


class Work(NamedTuple):
    """One command that is killed: `words` with FOLDER for where it writes, ROOM for what was made for it."""

    name: str
    words: tuple[str, ...]
    moments: int  # drawn over the whole run
    in_saves: int = 0  # drawn within saves

    @property
    def verb(self) -> str:
        return self.words[0]


WORKS = (
    Work(
        "sample",
        (
            *("sample", "--blocks", "160", "--seed", "3", "--every", "3"),
            *("--out", "FOLDER/video.mp4", "--trace", "FOLDER/trace.jsonl"),
            *("--state", "FOLDER/saves"),
        ),
        moments=15,
        in_saves=5,
    ),
    Work(
        "train",
        (
            *("train", "--config", "stage", "--out", "FOLDER/run"),
            *("--set", "train.source.path=ROOM/data"),
            *(word for name, value in TOY.items() for word in ("--set", f"{name}={value}")),
        ),
        moments=10,
    ),
    Work("convert", ("convert", "ROOM/checkpoint", "--out", "FOLDER/model"), moments=10),
    Work(
        "prepare clips",
        ("prepare", "ROOM/clips", "--weights", "STAGE", "--out", "FOLDER/data"),
        moments=5,
    ),
    Work(
        "prepare prompts",
        ("prepare", "ROOM/prompts.txt", "--weights", "STAGE", "--out", "FOLDER/data"),
        moments=5,
    ),
)
VERBS = tuple(dict.fromkeys(work.verb for work in WORKS))


# A command


@dataclass(frozen=True)
class Room:
    """Where everything lies: what the commands read, what they write, what they compiled."""

    folder: Path

    def start(self, work: Work, folder: Path) -> subprocess.Popen:
        """The command in a process group of its own, which writes to `folder`; what it says lies beside it."""
        places = {"FOLDER": folder, "ROOM": self.folder, "STAGE": STAGE}
        words = [
            re.sub("|".join(places), lambda found: str(places[found[0]]), word)
            for word in work.words
        ]
        with self.said(folder).open("wb") as said:
            return subprocess.Popen(
                [sys.executable, "-m", "packforcing_jax", *words],
                stdout=said,
                stderr=said,
                start_new_session=True,
                env=os.environ | {"XDG_CACHE_HOME": str(self.folder / "cache")},
            )

    def said(self, folder: Path) -> Path:
        return self.folder / f"{folder.name}.txt"

    def ended(self, work: Work, folder: Path) -> dict[str, Any]:
        """The command run to its end: its exit code, its seconds, and where it says that it went on."""
        began = time.monotonic()
        code = self.start(work, folder).wait()
        seconds = round(time.monotonic() - began, 3)
        said = self.said(folder).read_text(encoding="utf-8", errors="replace")
        found = WENT_ON.search(said)
        return {"code": code, "seconds": seconds, "went_on": found[0] if found else None} | (
            {"said": said[-500:]} if code else {}
        )


# What is on the disk


def names(folder: Path) -> Iterator[Path]:
    """Everything below a folder, hidden or not; what lies in a complete checkpoint, or in a half-written thing, is not.

    Files that vanish meanwhile are left out.
    """
    with contextlib.suppress(FileNotFoundError):
        for path in sorted(folder.iterdir()):
            yield path
            if path.is_dir() and not (_complete(path) or half_written(path.name)):
                yield from names(path)


def _complete(path: Path) -> bool:
    """Whether this is a complete step of checkpoints."""
    return path.name.isdigit() and (path / checkpoints.DIGESTS).is_file()


def half_written(name: str) -> bool:
    return checkpoints.TEMPORARY in name or name.startswith(".")


def saving(folder: Path) -> str | None:
    """The step that is being saved just now."""
    found = [path.name for path in names(folder) if checkpoints.TEMPORARY in path.name]
    return found[0].partition(checkpoints.TEMPORARY)[0] if found else None


def contents(folder: Path) -> dict[str, str]:
    """A hash of everything that a command wrote, by name: bytes of files, arrays and notes of checkpoints.

    Left out is what no two runs have in common: times in a log and in a manifest.
    """
    found = {}
    for path in names(folder):
        name = path.relative_to(folder).as_posix()
        if _complete(path):
            found |= {f"{name}/{part}": digest for part, digest in _checkpoint(path).items()}
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = hashlib.sha256(TIMELESS.get(path.name, Path.read_bytes)(path)).hexdigest()
    return found


def _checkpoint(step: Path) -> dict[str, str]:
    """A hash of every array of a step, and of its notes."""
    args = orbax.checkpoint.args
    with orbax.checkpoint.Checkpointer(orbax.checkpoint.CompositeCheckpointHandler()) as disk:
        stored = disk.restore(
            step,
            args=args.Composite(state=args.StandardRestore(), notes=args.JsonRestore()),
        )
    notes = json.dumps(stored["notes"], sort_keys=True)
    return {
        name: hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        for name, array in stored["state"].items()
    } | {"notes": hashlib.sha256(notes.encode()).hexdigest()}


def _log(path: Path) -> bytes:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [{name: line[name] for name in line if name not in runs.TIMES} for line in lines]
    return json.dumps(kept).encode()


def _manifest(path: Path) -> bytes:
    manifest = json.loads(path.read_text())
    for file in manifest.get("files", ()):
        del file["modified"]
    return json.dumps(manifest).encode()


TIMELESS: Mapping[str, Callable[[Path], bytes]] = {
    logs.LINES: _log,
    model_folder.MANIFEST: _manifest,
}


def shown(folder: Path) -> dict[str, Any]:
    """How many whole blocks of a video can be played, whether that is all of it and no less than was saved."""
    path = folder / "video.mp4"
    if not path.exists():
        return {}
    blocks, rest = divmod(len(video.read(path)) if path.stat().st_size else 0, BLOCK)
    saved = max((int(each.name) for each in names(folder) if _complete(each)), default=0)
    return {"blocks": blocks, "saved": saved, "plays": rest == 0 and blocks >= saved}


# What is killed


class Unbroken(NamedTuple):
    """A run without a kill: its seconds, everything it wrote, its saves and how long one takes."""

    seconds: float
    wrote: dict[str, str]
    saves: tuple[str, ...]
    save: float


def unbroken(room: Room, work: Work) -> Unbroken:
    """The run that the others are compared with, the second of two: the first compiles."""
    wrote = []
    for number in range(2):
        folder = room.folder / f"unbroken {number}"
        folder.mkdir()
        seen: dict[str, list[float]] = {}
        began = time.monotonic()
        process = room.start(work, folder)
        while process.poll() is None:
            step = saving(folder) if work.in_saves else None
            if step is not None:
                seen.setdefault(step, []).append(time.monotonic())
            time.sleep(OFTEN if work.in_saves else 10 * OFTEN)
        seconds = time.monotonic() - began
        if process.returncode:
            sys.exit(f"{work.name}: {room.said(folder).read_text()[-2000:]}")
        wrote.append(contents(folder))
        shutil.rmtree(folder)
    if wrote[0] != wrote[1]:
        sys.exit(f"{work.name}: two unbroken runs differ in {differing(*wrote)}")
    spans = [times[-1] - times[0] for times in seen.values()]
    return Unbroken(seconds, wrote[1], tuple(seen), statistics.median(spans) if spans else 0.0)


class Moment(NamedTuple):
    """`after` seconds behind the start, or behind the beginning of a save."""

    after: float
    save: str | None = None


def moments(work: Work, whole: Unbroken, rng: random.Random) -> Iterator[Callable[[], Moment]]:
    """How to draw each moment of a work."""
    for _ in range(work.moments):
        yield lambda: Moment(rng.uniform(0, whole.seconds))
    for _ in range(work.in_saves):
        yield lambda: Moment(rng.uniform(0, whole.save), rng.choice(whole.saves))


def killed(room: Room, work: Work, folder: Path, moment: Moment) -> dict[str, Any]:
    """Begins a run, kills its process group at the moment, and says where that was and what is on the disk."""
    began = time.monotonic()
    process = room.start(work, folder)
    if moment.save is not None:
        while (
            process.poll() is None
            and saving(folder) != moment.save
            and time.monotonic() < began + PATIENCE
        ):
            time.sleep(OFTEN)
    since = began if moment.save is None else time.monotonic()
    time.sleep(max(0.0, since + moment.after - time.monotonic()))
    running = process.poll() is None
    hit = time.monotonic() - began
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    step = saving(folder)
    return {
        "asked": {"after": round(moment.after, 4), "save": moment.save},
        "hit": round(hit, 4),
        "missed": not running or (moment.save is not None and step != moment.save),
        "in_save": step,
        "on_disk": [path.relative_to(folder).as_posix() for path in names(folder)],
        "shown": shown(folder),
    }


def differing(whole: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """What is in both and not equal, or missing."""
    return [name for name in whole if other.get(name) != whole[name]]


def continued(room: Room, work: Work, folder: Path, whole: Unbroken) -> dict[str, Any]:
    """The same command once more, to its end, and what is then not as in the unbroken run."""
    again = room.ended(work, folder)
    found = contents(folder)
    return {
        "again": again,
        "differing": differing(whole.wrote, found),
        "left": [name for name in found if name not in whole.wrote],
    }


def holds(line: Mapping[str, Any]) -> bool:
    """Whether all of what must hold does, for one moment."""
    plays = line["shown"].get("plays", True)
    return plays and line["again"]["code"] == 0 and not line["differing"] and not line["left"]


def lines(room: Room, work: Work, seed: int) -> Iterator[dict[str, Any]]:
    """A line about the unbroken run, and one for every kill."""
    whole = unbroken(room, work)
    yield {
        "work": work.name,
        "command": ["packforcing", *work.words],
        "seed": seed,
        "seconds": round(whole.seconds, 3),
        "saves": len(whole.saves),
        "save_seconds": round(whole.save, 4),
        "compared": len(whole.wrote),
    }
    rng = random.Random(f"{seed} {work.name}")
    for number, draw in enumerate(moments(work, whole, rng), start=1):
        missed = True
        while missed:
            folder = room.folder / "killed"
            folder.mkdir()
            line = {"work": work.name, "seed": seed, "moment": number}
            line |= killed(room, work, folder, draw())
            line |= continued(room, work, folder, whole)
            missed = line["missed"]
            yield line
            if holds(line):
                shutil.rmtree(folder)
            else:
                folder.rename(room.folder / f"{work.name} {number} {time.time():.0f}")


# What the commands read


def make(room: Room, works: Sequence[Work]) -> None:
    """Clips, prompts, a data set and a checkpoint, those that the works need."""
    wanted = " ".join(word for work in works for word in work.words)
    prompts = []
    clips = room.folder / "clips"
    clips.mkdir()
    for number in range(CLIPS):
        story = data.draw_clip(np.random.default_rng((0, number)))
        frames = world.render(story)
        size = (frames.shape[2], frames.shape[1])
        with video.Writer(clips / f"{number}.mp4", fps=8, size=size, settings={}) as out:
            out.write(video.to_uint8(frames))
        prompts.append(captions.caption(story, 0))
        (clips / f"{number}.txt").write_text(prompts[-1])
    (room.folder / "prompts.txt").write_text(
        "".join(f"{prompts[number % CLIPS]}\n" for number in range(PROMPTS))
    )
    if "ROOM/data" in wanted:
        prepare = next(work for work in WORKS if work.name == "prepare clips")
        room.start(prepare, room.folder).wait()
        records.opened(room.folder / "data")
    if "ROOM/checkpoint" in wanted:
        (room.folder / "checkpoint").mkdir()
        exp = loading.load_experiment("wan_t2v_1_3b", ["dit.layers=5"])
        path = room.folder / "checkpoint" / "diffusion_pytorch_model.safetensors"
        convert_full_size.write(path, exp, seed=0)


# All together


def machine(seed: int) -> dict[str, Any]:
    """What the log is about."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "processors": os.cpu_count(),
        "seed": seed,
    }


def table(log: Sequence[Mapping[str, Any]]) -> str:
    """A line for every work, as aligned text."""
    rows = [["", "unbroken", "kills", "in a save", "missed", "not equal", "left over", "failed"]]
    for work in dict.fromkeys(line["work"] for line in log if "work" in line):
        mine = [line for line in log if line.get("work") == work]
        kills = [line for line in mine if "moment" in line]
        columns = (
            [not line["missed"] for line in kills],
            [line["in_save"] for line in kills],
            [line["missed"] for line in kills],
            [line["differing"] for line in kills],
            [line["left"] for line in kills],
            [line["again"]["code"] for line in kills],
        )
        counts = (str(sum(map(bool, column))) for column in columns)
        rows.append([work, f"{mine[0]['seconds']:.1f} s", *counts])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if at else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line for each work; 1 if anything does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "verbs", nargs="*", metavar="VERB", help=f"of {', '.join(VERBS)} (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/kill_and_continue"),
        metavar="FOLDER",
        help=f"an empty folder with 6 GB of room; {LOG} stays there, and what did not hold",
    )
    args = parser.parse_args(argv)
    unknown = set(args.verbs) - set(VERBS)
    if unknown:
        parser.error(f"no verb {', '.join(sorted(unknown))}; known: {', '.join(VERBS)}")
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"--out {args.out} is not empty; choose another folder")
    works = [work for work in WORKS if work.verb in (args.verbs or VERBS)]
    room = Room((args.out / "room").resolve())
    room.folder.mkdir(parents=True)
    make(room, works)
    log = [machine(args.seed)]
    with (args.out / LOG).open("w", encoding="utf-8") as file:
        print(json.dumps(log[0]), file=file, flush=True)
        for work in works:
            for line in lines(room, work, args.seed):
                log.append(line)
                print(json.dumps(line), file=file, flush=True)
                print(f"{work.name}: {json.dumps(line)[:400]}", file=sys.stderr)
    print(table(log))
    whole = all(holds(line) for line in log if "moment" in line)
    if whole:
        shutil.rmtree(room.folder)
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
