"""Wan2.1 1.3B at full width and depth with random weights, two blocks of a small picture: does `plan` say its memory?

    python -m benchmarks.measure_peak --room /data      # 6 GB of disk, 9 GB of memory, about half an hour on two cores

A process loads the model and draws two blocks, forgets them, and does it again. What it takes the second time above
what it took in between, with everything compiled, is read from Linux and compared with the peak that `packforcing plan
--compile` gives for the same settings. Two of the text encoder's 24 layers are there, at full width: no more are ever
in memory. Exit code 1 if the two peaks differ by more than 15 %.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.endurance import status_bytes
from packforcing_jax import pytrees
from packforcing_jax.config import Experiment, loading
from packforcing_jax.errors import InputError
from packforcing_jax.io import model_folder, safetensors_io
from packforcing_jax.networks import codec, compressor, dit, text, tokenizer
from packforcing_jax.plan import budget, memory_fit, programs
from packforcing_jax.sampling import pipeline
from packforcing_jax.stage import captions

CONFIG = "wan_t2v_1_3b_paper"
# A CPU's XLA computes halves by way of float32 copies, so that figures of bfloat16 would be of those.
SETS = (
    "latent=16,24",
    "text.layers=2",
    f"text.vocab={len(captions.VOCABULARY) + 3}",
    *(f"dtypes.{name}=float32" for name in ("params", "compute", "cache", "vae", "text")),
)
PARTS = ("loading", "a prompt and the first block", "the second block")
WITHIN = 0.15
PAUSE = 0.01  # seconds between two readings
POOL = 1_000_003  # random numbers that weights repeat


# The model folder


def write_model(folder: Path, exp: Experiment) -> None:
    """A model folder of random weights, written tensor by tensor."""
    builds: dict[str, tuple[Callable[[], Any], str]] = {
        "dit": (lambda: dit.WanDiT(exp.dit, nnx.Rngs(0)), exp.dtypes.params),
        "compressor": (lambda: compressor.build(exp.step, nnx.Rngs(0)), exp.dtypes.params),
        "codec": (lambda: codec.make(exp.codec, nnx.Rngs(0)), exp.dtypes.vae),
        "text": (lambda: text.UMT5(exp.text, nnx.Rngs(0)), exp.dtypes.text),
    }
    pool = np.random.default_rng(0).standard_normal(POOL, np.float32)
    with model_folder.replacing(folder) as fresh:
        for part, (build, dtype) in builds.items():
            shapes = pytrees.flatten(jax.eval_shape(build))
            if shapes:
                forms = {
                    name: (leaf.shape, np.dtype(jnp.dtype(dtype))) for name, leaf in shapes.items()
                }
                with safetensors_io.Writer(
                    fresh / model_folder.weights_file(part), forms, {}
                ) as file:
                    for name, leaf in shapes.items():
                        write_tensor(file, name, leaf.shape, dtype, pool)
        (fresh / model_folder.CONFIG).write_text(model_folder.experiment_to_json(exp))
        (fresh / model_folder.TOKENIZER).write_text(
            tokenizer.word_tokenizer(captions.VOCABULARY).to_str()
        )


def write_tensor(
    file: safetensors_io.Writer, name: str, shape: tuple[int, ...], dtype: str, pool: np.ndarray
) -> None:
    """Random numbers of a size that keeps activations in bounds; what is stacked is written layer by layer."""
    scale = max(int(np.prod(shape[-2:-1])), 16) ** -0.5
    draw = lambda shape: (np.resize(pool, shape) * scale).astype(jnp.dtype(dtype))  # noqa: E731
    if not name.startswith("blocks/"):
        file.put(name, draw(shape))
        return
    for layer in range(shape[0]):
        file.put(name, draw(shape[1:]), layer)


# What a child does


class Watch:
    """Reads what this process takes of memory that is its own, again and again, in a thread."""

    def __init__(self):
        self.most = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._ended.wait(PAUSE):
            self.most = max(self.most, status_bytes("RssAnon", "RssShmem"))

    def since(self) -> int:
        """The most since this was asked before."""
        most = self.most
        self.most = 0
        return most

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._ended.set()
        self._thread.join()


def sample(folder: Path, room: Path, watch: Watch) -> dict[str, int]:
    """Loads the model and draws blocks; the most in each part of that. Text states are kept in `room`."""
    os.environ["XDG_CACHE_HOME"] = str(room)
    pipe = pipeline.Pipeline.from_pretrained(folder)
    most = {}
    most[PARTS[0]] = watch.since()
    began = time.monotonic()
    prompt = captions.write(captions.Prompt(0, 0, 0, 0, 0, 0))
    for block, part in zip(pipe.stream([prompt] * 2, seed=0), PARTS[1:], strict=True):
        most[part] = watch.since()
        print(
            f"block {block.index} after {time.monotonic() - began:.0f} s",
            file=sys.stderr,
            flush=True,
        )
    return most


def forget() -> None:
    """Gives what is not in use any more back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def child(folder: Path, room: Path) -> dict[str, int]:
    """Bytes of the idle process, and above it in each part the second time."""
    with Watch() as watch:
        sample(folder, room / "first", watch)
    forget()
    idle = status_bytes("RssAnon", "RssShmem")
    with Watch() as watch:
        most = sample(folder, room / "second", watch)
    return {"idle": idle} | {part: size - idle for part, size in most.items()}


def run_child(folder: Path, room: Path) -> dict[str, int]:
    """A child's figures."""
    argv = [
        sys.executable,
        "-m",
        "benchmarks.measure_peak",
        "--child",
        str(folder),
        "--room",
        str(room),
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return json.loads(
        subprocess.run(argv, env=environment, stdout=subprocess.PIPE, check=True).stdout
    )


# The comparison


def measure(room: Path, exp: Experiment) -> dict[str, Any]:
    """What `plan` says, what was measured, and their ratio."""
    costs = budget.of(exp, 2, compiled=True)
    print(f"planned: {costs.peaks.together / 1e9:.3f} GB at most", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=room) as temporary:
        folder = Path(temporary, "model")
        write_model(folder, exp)
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(
            f"{exp.name}: {size / 1e9:.2f} GB of weights; once to compile, once to measure",
            file=sys.stderr,
        )
        measured = run_child(folder, Path(temporary))
    planned = parts_of(costs.peaks)
    ratio = {part: measured[part] / size for part, size in planned.items()}
    most = {"planned": costs.peaks.together, "measured": max(measured[part] for part in PARTS)}
    return {
        "config": exp.name,
        "latent": exp.latent,
        "dtypes": vars(exp.dtypes),
        "jax": jax.__version__,
        "measured": measured,
        "planned": planned,
        "ratio": ratio,
        "phases": costs.peaks.device,
        "peak": most,
        "peak ratio": most["measured"] / most["planned"],
        "ok": abs(most["measured"] / most["planned"] - 1) <= WITHIN,
    }


def parts_of(peaks: memory_fit.Peaks) -> dict[str, int]:
    """What is planned for each part, in the one memory of a CPU."""
    sampling = max(
        peaks.device[phase] for phase in (programs.DENOISING, programs.SHOWING, programs.COMMITTING)
    )
    return {
        PARTS[0]: peaks.device[memory_fit.LOADING] + peaks.host[memory_fit.LOADING],
        PARTS[1]: peaks.together,
        PARTS[2]: sampling + peaks.host[memory_fit.SAMPLING],
    }


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """The outcome as aligned text."""
    yield (
        f"{result['config']}, latent {result['latent']}, {result['dtypes']['params']} weights, two blocks on a CPU, "
        f"jax {result['jax']}; idle process {result['measured']['idle'] / 1e9:.3f} GB"
    )
    yield f"{'above the idle process':<32}{'planned':>12}{'measured':>12}{'ratio':>9}"
    rows = {part: (size, result["measured"][part]) for part, size in result["planned"].items()}
    for part, (planned, now) in (rows | {"peak": tuple(result["peak"].values())}).items():
        yield f"{part:<32}{planned / 1e9:>9.3f} GB{now / 1e9:>9.3f} GB{now / planned:>9.3f}"
    yield "planned by phase: " + ", ".join(
        f"{name} {size / 1e9:.3f} GB" for name, size in result["phases"].items()
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prints what came out; 1 if it is off by more than it may."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--room", metavar="DIR", type=Path, default=Path("."), help="where weights go for a while"
    )
    parser.add_argument(
        "--config", default=CONFIG, metavar="FILE", help="a config (default: %(default)s)"
    )
    parser.add_argument(
        "--set",
        metavar="A.B=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help=f"change one setting more, behind {' '.join(SETS[:2])} ...",
    )
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    parser.add_argument("--child", metavar="DIR", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child is not None:
        print(json.dumps(child(args.child, args.room)))
        return 0
    jax.config.update("jax_platforms", "cpu")
    try:
        result = measure(args.room, loading.load_experiment(args.config, [*SETS, *args.overrides]))
    except InputError as error:
        print(f"measure_peak: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(result) if args.json else "\n".join(table(result)))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
