"""Wan2.1 1.3B in float32 through the converter and back: how long it takes, how much memory, and that nothing changes.

python -m benchmarks.convert_full_size --room /tmp/room      # needs 12 GB of disk there; exit 1 if a bound breaks
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from packforcing_jax.convert import contents, networks, rules

from packforcing_jax.config import Experiment
from packforcing_jax.errors import InputError
from packforcing_jax.io import model_folder, safetensors_io

LONGEST = 240.0
MOST = 3e9  # seconds, bytes of private memory
OFTEN = 0.05  # seconds between two looks at the memory


class Run(NamedTuple):
    """What one command took: seconds, and the most private memory that it held at once."""

    seconds: float
    memory: int


def shapes(exp: Experiment) -> dict[str, rules.Shape]:
    """The tensors of the published transformer by original name."""
    wanted = networks.wanted("dit", exp)
    sizes = networks.merged_axes(exp)
    targets = rules.sources(wanted, networks.NETWORKS["dit"].table, rules.no_mismatches())
    return {
        name: target.inverse(
            rules.hollow(wanted[target.path][0 if target.layer is None else 1 :]), sizes
        ).shape
        for name, target in targets.items()
    }


def write(path: Path, exp: Experiment, seed: int) -> dict[str, str]:
    """A checkpoint of random numbers, written one tensor at a time, and the SHA-256 of each."""
    rng = np.random.default_rng(seed)
    forms = {name: (shape, np.dtype("f4")) for name, shape in shapes(exp).items()}
    digests = {}
    with safetensors_io.Writer(path, forms, {"format": "pt"}) as file:
        for name, (shape, _) in forms.items():
            value = rng.random(shape, dtype=np.float32) - np.float32(0.5)
            digests[name] = contents.digest(value)
            file.put(name, value)
    return digests


def private_memory(pid: int) -> int:
    """Bytes of memory that belong to a process alone (`RssAnon`); 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next(
        (1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")),
        0,
    )


def run(*argv: str) -> Run:
    """`packforcing WORDS` in a process of its own."""
    start = time.monotonic()
    most = 0
    process = subprocess.Popen(
        [sys.executable, "-m", "packforcing_jax", *argv],
        stderr=subprocess.PIPE,
        text=True,
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None:
        most = max(most, private_memory(process.pid))
        time.sleep(OFTEN)
    if process.returncode:
        raise InputError(
            f"packforcing {argv[0]} ended with {process.returncode}: {process.communicate()[1][-500:]}"
        )
    return Run(time.monotonic() - start, most)


def measured(room: Path, exp: Experiment, seed: int) -> dict:
    """Figures of one conversion there and back, in an empty folder."""
    source = room / "Wan" / "diffusion_pytorch_model.safetensors"
    model = room / "model"
    back = room / "back.safetensors"
    source.parent.mkdir()
    digests = write(source, exp, seed)
    size = source.stat().st_size
    there = run("convert", str(source.parent), "--out", str(model))
    shutil.rmtree(source.parent)  # room for the way back
    manifest = json.loads((model / model_folder.MANIFEST).read_text())["tensors"]
    again = run("convert", str(model), "--to-torch", str(back))
    same = {
        name: contents.digest(tensor.read()) for name, tensor in safetensors_io.opened(back).items()
    }
    return {
        "tensors": len(digests),
        "bytes": size,
        "seconds": there.seconds,
        "memory": there.memory,
        "seconds_back": again.seconds,
        "memory_back": again.memory,
        "manifest_tells_them": {row["original"]: row["sha256"] for row in manifest} == digests,
        "there_and_back_is_the_same": same == digests,
    }


def holds(figures: dict) -> bool:
    """Whether all of what this shows is so."""
    fast = max(figures["seconds"], figures["seconds_back"]) < LONGEST
    small = max(figures["memory"], figures["memory_back"]) < MOST
    return (
        fast and small and figures["manifest_tells_them"] and figures["there_and_back_is_the_same"]
    )


def main() -> int:
    """Prints the figures; exit code 1 if a bound is broken or a tensor has changed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--room", type=Path, required=True, help="a folder with 12 GB of room, which is given back"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.room.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.room) as room:
        figures = measured(Path(room), Experiment("wan"), args.seed)
    print(json.dumps(figures, indent=2))
    return 0 if holds(figures) else 1


if __name__ == "__main__":
    sys.exit(main())
