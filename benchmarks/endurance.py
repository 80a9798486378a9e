"""Thousands of blocks at toy size: nothing may grow, slow down or be compiled again, however long a video gets.

python -m benchmarks.endurance              # 5,000 blocks: a few minutes on two CPU cores; exit 1 if a bound breaks
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from packforcing_jax import pytrees
from packforcing_jax.cli import common
from packforcing_jax.config import (
    CacheConfig,
    CompressorConfig,
    DiTConfig,
    Experiment,
    SampleConfig,
    SpaceToDepthConfig,
    TextConfig,
    loading,
)
from packforcing_jax.errors import InputError
from packforcing_jax.sampling import player
from packforcing_jax.sampling.pipeline import Finished, Pipeline
from packforcing_jax.stage import captions, world
from packforcing_jax.training import batches

TOY = Experiment(
    name="toy",
    dit=DiTConfig(
        dim=24,
        ffn_dim=40,
        heads=2,
        layers=2,
        text_dim=16,
        text_len=16,
        freq_dim=12,
        in_channels=48,
        out_channels=48,
        rope_theta=(1000.0, 50.0, 50.0),
        rope_pairs=(2, 2, 2),
    ),
    codec=SpaceToDepthConfig(factor=4),
    text=TextConfig(vocab=46, dim=16, dim_attn=16, dim_ffn=24, heads=2, layers=1, max_words=16),
    cache=CacheConfig(top=3, capacity=11, score_pool=(4, 1, 1), key_multiple=1),
    compressor=CompressorConfig(channels=(6, 7, 8, 9)),
    sample=SampleConfig(steps=(1000, 600, 250), prediction="clean"),
    latent=(8, 8),
    fps=8,
)
COMPILED = "/jax/core/compile/backend_compile_duration"  # the event JAX reports once for everything it compiles
OPENING = 2  # blocks in which everything is compiled: the first of a video is shown by a program of its own
MEMORY = 1.02
TIME = 1.1  # highest ratio of the second half's median to the first's


def weights(exp: Experiment = TOY, seed: int = 0) -> batches.Model:
    """Random weights, none of which is zero or one as some are before training."""
    shapes = jax.eval_shape(lambda: batches.new_model(exp, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    draws = {
        name: name.endswith("scale")
        + rng.normal(size=leaf.shape) * max(leaf.shape[-2:-1] + (4,)) ** -0.5
        for name, leaf in pytrees.flatten(shapes).items()
    }
    return pytrees.fill(
        shapes, {name: jnp.asarray(draw, jnp.float32) for name, draw in draws.items()}
    )


def toy(exp: Experiment = TOY, seed: int = 0) -> Pipeline:
    """The model of these weights."""
    built = weights(exp, seed)
    return Pipeline.of(exp, built.nets, built.text, captions.reader())


def changing_prompts(blocks: int, every: int) -> list[str]:
    """One prompt per block, another one after every `every` blocks."""
    sizes = len(world.COLOURS), len(world.SHAPES), len(world.BACKDROPS), len(world.GUESTS)
    which = [np.unravel_index(block // every % np.prod(sizes), sizes) for block in range(blocks)]
    return [
        captions.write(captions.Prompt(colour, shape, 0, backdrop, 0, guest))
        for guest, colour, shape, backdrop in (each[::-1] for each in which)
    ]


def status_bytes(*fields: str) -> int:
    """Bytes of this process, fields of Linux's /proc/self/status added up."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines.get(field, "0 kB").split()[0]) * 1024 for field in fields)


def gauges() -> dict[str, Callable[[Finished], float]]:
    """What is read after every block."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(seconds) if event == COMPILED else None
    )
    return {
        "compilations": lambda block: len(compiled),
        "state": lambda block: sum(leaf.nbytes for leaf in jax.tree.leaves(block.state)),
        "resident": lambda block: status_bytes("VmRSS"),
        "own": lambda block: status_bytes("RssAnon", "VmSwap"),
        "finite": lambda block: np.isfinite(block.latent).all(),
        "frame": lambda block: (block.index + 1) * len(block.frames),
    }


def yardstick(side: int = 64, rounds: int = 150) -> float:
    """A fixed piece of work in small steps, which takes longer exactly while others use the machine."""
    x = matrix = np.cos(np.arange(side**2, dtype=np.float32)).reshape(side, side)
    for _ in range(rounds):
        x = np.tanh(x @ matrix)
    return float(x.sum())


def endure(model: Pipeline, prompts: Sequence[str], *, seed: int) -> dict[str, np.ndarray]:
    """Every gauge and the times after every block; their room is there from the start, so that they are no growth."""
    readers = gauges()
    read = {name: np.zeros(len(prompts)) for name in (*readers, "wall", "processor", "yardstick")}
    stream = model.stream(prompts, seed=seed)
    for index in common.progress(range(len(prompts)), name="endurance", unit="blocks"):
        began = time.perf_counter()
        busy = time.process_time()
        block = next(stream)
        ended = time.perf_counter()
        done = time.process_time()
        yardstick()
        read["wall"][index] = ended - began
        read["processor"][index] = done - busy
        read["yardstick"][index] = time.process_time() - done
        for name, gauge in readers.items():
            read[name][index] = gauge(block)
    return read


class Row(NamedTuple):
    """One finding and whether it is within its bound."""

    name: str
    found: str
    bound: str = ""
    holds: bool = True


def growth(name: str, values: np.ndarray, bound: float = math.inf) -> Row:
    """Medians of the two halves of `values` with their middle halves, and the ratio of the medians."""
    quarters = [np.percentile(half, (50, 25, 75)) for half in np.array_split(values, 2)]
    ratio = quarters[1][0] / quarters[0][0]
    spreads = " -> ".join(f"{middle:.2f} [{low:.2f}, {high:.2f}]" for middle, low, high in quarters)
    limit = "" if bound == math.inf else f"ratio < {bound}"
    return Row(name, f"{spreads}, ratio {ratio:.4f}", limit, bool(ratio < bound))


def findings(exp: Experiment, read: dict[str, np.ndarray], compiled: dict[str, int]) -> list[Row]:
    """What the run shows, bound by bound. Halves begin once every partition is full.

    A machine shared with others is never equally fast for long. So a block's time is told in yardsticks: where JAX
    computes on the processor, in processor time; elsewhere the wall clock is the block's and the yardstick steady.
    """
    cfg = exp.cache
    full = (cfg.sink + cfg.recent) // cfg.block + cfg.capacity
    later = {name: values[max(full, OPENING) :] for name, values in read.items()}
    spent = later["processor" if jax.default_backend() == "cpu" else "wall"]
    again = int(read["compilations"][-1] - read["compilations"][OPENING - 1])
    sizes = np.unique(read["state"])
    return [
        Row(
            "blocks",
            f"{len(read['state'])}, all partitions full after {full}, frame {int(read['frame'][-1])}",
        ),
        Row("compiled versions", ", ".join(f"{name} {count}" for name, count in compiled.items())),
        Row(f"compilations after block {OPENING}", f"{again}", "0", again == 0),
        Row(
            "bytes of the state",
            f"{read['state'][0]:,.0f} -> {read['state'][-1]:,.0f}",
            "constant",
            len(sizes) == 1,
        ),
        growth("resident memory, MiB", later["resident"] / 2**20, MEMORY),
        growth("own memory, swapped or not, MiB", later["own"] / 2**20, MEMORY),
        growth("time per block, yardsticks", spent / later["yardstick"], TIME),
        growth("wall time per block, ms", 1e3 * later["wall"]),
        growth("yardstick, ms", 1e3 * later["yardstick"]),
        Row(
            "blocks with values not finite",
            f"{int((read['finite'] == 0).sum())}",
            "0",
            bool(read["finite"].all()),
        ),
    ]


def table(rows: Sequence[Row]) -> str:
    """The findings as aligned text."""
    wide = [2 + max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "".join(f"{text:<{width}}" for text, width in zip(row, wide))
        + ("" if row.holds else "BROKEN")
        for row in rows
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the findings; 1 if any breaks its bound."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--blocks", type=int, default=5000, metavar="N", help="length of the video (default: 5000)"
    )
    parser.add_argument(
        "--every",
        type=int,
        default=50,
        metavar="N",
        help="blocks between new prompts (default: 50)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and noise (default: 0)")
    parser.add_argument(
        "--set",
        metavar="A.B=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="change one setting, such as cache.rope_adjustment=incremental; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    args = parser.parse_args(argv)
    if args.blocks < 100 or args.every < 1:
        parser.error(f"--blocks {args.blocks} and --every {args.every} must be at least 100 and 1")
    try:
        exp = loading.override(TOY, args.overrides)
    except InputError as error:
        parser.error(str(error))
    jitted = (
        player.text_program,
        player.denoise_program,
        player.show_program,
        player.commit_program,
    )
    read = endure(toy(exp, args.seed), changing_prompts(args.blocks, args.every), seed=args.seed)
    rows = findings(exp, read, {function.__name__: function._cache_size() for function in jitted})
    print(json.dumps([row._asdict() for row in rows]) if args.json else table(rows))
    return 0 if all(row.holds for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
