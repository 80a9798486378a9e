"""Wan2.1 1.3B at full width and depth with random weights, two blocks of a small picture: does `plan` say its memory?

    python -m benchmarks.measure_peak --room /data      # 6 GB of disk, 9 GB of memory, about half an hour on two cores

What the process takes above an idle one (jax imported, its device ready) is read from Linux while it loads the model
and draws two blocks, and compared with the peak that `packforcing plan --compile` gives for the same settings. What is
compiled is left behind by a run before. Two of the text encoder's 24 layers are there, at full width: no more are ever
in memory. Exit code 1 if the two peaks differ by more than 15 %.
"""

import argparse
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

from benchmarks.endurance import held
from packforcing_jax import (
    budget,
    codec,
    compressor,
    dit,
    models,
    options,
    pipeline,
    tensors,
    text,
    tokenizer,
    trees,
)
from packforcing_jax.config import Experiment
from packforcing_jax.errors import InputError
from packforcing_jax.stage import captions

CONFIG = "wan_t2v_1_3b_paper"
# A CPU's XLA computes halves by way of float32 copies, so that figures of bfloat16 would be of those.
SETS = ("latent=16,24", "text.layers=2", f"text.vocab={len(captions.VOCABULARY) + 3}",
        *(f"dtypes.{name}=float32" for name in ("params", "compute", "cache", "vae", "text")))  # fmt: skip
BLOCKS = 2
WITHIN = 0.15
PAUSE = 0.01  # seconds between two readings
POOL = 1_000_003  # random numbers that weights repeat
CACHE = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_ENABLE_COMPILATION_CACHE": "true"}


# The model folder


def write_model(folder: Path, exp: Experiment) -> None:
    """A model folder of random weights, written tensor by tensor."""
    builds: dict[str, tuple[Callable[[], Any], str]] = {
        "dit": (lambda: dit.WanDiT(exp.dit, nnx.Rngs(0)), exp.dtypes.params),
        "compressor": (lambda: compressor.Compressor(exp, nnx.Rngs(0)), exp.dtypes.params),
        "codec": (lambda: codec.make(exp.codec, nnx.Rngs(0)), exp.dtypes.vae),
        "text": (lambda: text.UMT5(exp.text, nnx.Rngs(0)), exp.dtypes.text)}  # fmt: skip
    pool = np.random.default_rng(0).standard_normal(POOL, np.float32)
    with models.replacing(folder) as fresh:
        for part, (build, dtype) in builds.items():
            shapes = trees.flatten(jax.eval_shape(build))
            if shapes:
                forms = {name: (leaf.shape, np.dtype(jnp.dtype(dtype))) for name, leaf in shapes.items()}
                with tensors.Writer(fresh / models.weights_file(part), forms, {}) as file:
                    for name, leaf in shapes.items():
                        write_tensor(file, name, leaf.shape, dtype, pool)
        (fresh / models.CONFIG).write_text(models.experiment_to_json(exp))
        (fresh / models.TOKENIZER).write_text(tokenizer.word_tokenizer(captions.VOCABULARY).to_str())


def write_tensor(file: tensors.Writer, name: str, shape: tuple[int, ...], dtype: str, pool: np.ndarray) -> None:
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
        self.most, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._ended.wait(PAUSE):
            self.most = max(self.most, held("RssAnon", "RssShmem"))

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._ended.set()
        self._thread.join()


def child(folder: Path) -> dict[str, float]:
    """Loads the model and draws blocks; bytes above the idle process, most while loading and most of all."""
    jax.block_until_ready(jnp.zeros(3) + 1)
    idle = held("RssAnon", "RssShmem")
    with Watch() as watch:
        pipe = pipeline.Pipeline.from_pretrained(folder)
        loading, began = watch.most - idle, time.monotonic()
        prompt = captions.write(captions.Prompt(0, 0, 0, 0, 0, 0))
        for block in pipe.stream([prompt] * BLOCKS, seed=0):
            print(f"block {block.index} after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return {"idle": idle, "loading": loading, "peak": watch.most - idle}


def run_child(folder: Path, room: Path, name: str) -> dict[str, float]:
    """A child's figures; text states that one keeps do not spare the other the reading."""
    places = {"JAX_COMPILATION_CACHE_DIR": str(room / "compiled"), "XDG_CACHE_HOME": str(room / name)}
    environment = os.environ | CACHE | places | {"JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-m", "benchmarks.measure_peak", "--child", str(folder)]
    return json.loads(subprocess.run(words, env=environment, stdout=subprocess.PIPE, check=True).stdout)


# The comparison


def measure(room: Path, exp: Experiment) -> dict[str, Any]:
    """What `plan` says, what was measured, and their ratio."""
    said = budget.of(exp, BLOCKS, compiled=True)
    print(f"planned: {said.peaks.together / 1e9:.3f} GB at most", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=room) as place:
        folder = Path(place, "model")
        write_model(folder, exp)
        size = sum(path.stat().st_size for path in folder.iterdir())
        for when in ("compiling", "measured"):
            print(f"{when}: {exp.name}, {size / 1e9:.2f} GB of weights", file=sys.stderr, flush=True)
            found = run_child(folder, Path(place), when)
    planned = {"loading": said.peaks.device["loading"] + said.peaks.host["loading"], "peak": said.peaks.together}
    ratio = {name: found[name] / planned[name] for name in planned}
    return {"config": exp.name, "latent": exp.latent, "dtypes": vars(exp.dtypes), "blocks": BLOCKS,
            "jax": jax.__version__, "measured": found, "planned": planned, "ratio": ratio,
            "phases": said.peaks.device,
            "ok": abs(ratio["peak"] - 1) <= WITHIN}  # fmt: skip


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """The outcome as aligned text."""
    yield (f"{found['config']}, latent {found['latent']}, {found['dtypes']['params']} weights, {found['blocks']} "
           f"blocks on a CPU, jax {found['jax']}; idle process {found['measured']['idle'] / 1e9:.3f} GB")  # fmt: skip
    yield f"{'above the idle process':<28}{'planned':>12}{'measured':>12}{'ratio':>9}"
    for name, said in found["planned"].items():
        now = found["measured"][name]
        yield f"{name:<28}{said / 1e9:>9.3f} GB{now / 1e9:>9.3f} GB{now / said:>9.3f}"
    yield "planned by phase: " + ", ".join(f"{name} {size / 1e9:.3f} GB" for name, size in found["phases"].items())


def main(words: Sequence[str] | None = None) -> int:
    """Prints what came out; 1 if it is off by more than it may."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--room", metavar="DIR", type=Path, default=Path("."), help="where weights go for a while")
    parser.add_argument("--config", default=CONFIG, metavar="FILE", help="a config (default: %(default)s)")
    parser.add_argument("--set", metavar="A.B=VALUE", action="append", default=[], dest="sets",
                        help=f"change one setting more, behind {' '.join(SETS[:2])} ...")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    parser.add_argument("--child", metavar="DIR", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.child is not None:
        print(json.dumps(child(args.child)))
        return 0
    jax.config.update("jax_platforms", "cpu")
    try:
        found = measure(args.room, options.load_experiment(args.config, [*SETS, *args.sets]))
    except InputError as error:
        print(f"measure_peak: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(found) if args.json else "\n".join(table(found)))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
