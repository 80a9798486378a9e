"""The transformer against that of diffusers on a CPU: the same weights in one process, taking turns; ratios only.

    python -m benchmarks.against_torch      # needs the extra `parity`; a minute on two cores; exit 1 if they disagree

Both run whole clips in float32 on the same cores, ours compiled by XLA, diffusers' as PyTorch runs it (not compiled).
A small network on a CPU says nothing about a large one on an accelerator. Where others use the cores too, PyTorch's
threads wait for each other and the ratio flatters us: such rows are marked unsteady, and `--cores 1` shows less of it.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import diffusers
import einops
import jax
import jax.numpy as jnp
import numpy as np
import torch
from packforcing_jax.convert import rules, wan_dit

from packforcing_jax.networks import dit
from packforcing_jax.verify import kinds, parts

CORES = 2
STEADY = 1.5  # third quartile of a network's times over its first, at most; beyond it others use the cores too
TOLERANCE = 2e-5  # largest difference of the outputs, over the largest output
TIMESTEP = 562.5


@dataclass(frozen=True)
class Size:
    """A network and what goes into it: latent as (frames, rows, columns), patches of 1x2x2."""

    heads: int
    head_dim: int
    ffn_dim: int
    layers: int
    latent: tuple[int, int, int]
    argv: int
    text_dim: int
    channels: int = 16

    @property
    def tokens(self) -> int:
        frames, rows, columns = self.latent
        return frames * (rows // 2) * (columns // 2)


SIZES = {
    "tiny": Size(
        heads=3, head_dim=22, ffn_dim=94, layers=2, latent=(3, 10, 6), argv=11, text_dim=38
    ),
    "small": Size(
        heads=4, head_dim=48, ffn_dim=900, layers=6, latent=(6, 14, 18), argv=60, text_dim=100
    ),
}


@dataclass(frozen=True)
class Contest:
    """Both networks as functions without arguments that return when the output is there."""

    theirs: Callable[[], np.ndarray]
    ours: Callable[[], np.ndarray]


def contest(size: Size) -> Contest:
    """Both networks of a size, with diffusers' random weights and the same inputs."""
    torch.manual_seed(0)
    network = diffusers.WanTransformer3DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.head_dim,
        ffn_dim=size.ffn_dim,
        num_layers=size.layers,
        text_dim=size.text_dim,
        in_channels=size.channels,
        out_channels=size.channels,
    ).eval()
    inputs = (
        torch.randn(1, size.channels, *size.latent),
        torch.tensor([TIMESTEP]),
        torch.randn(1, size.argv, size.text_dim),
    )
    return Contest(theirs=_theirs(network, inputs), ours=_ours(network, inputs, size))


def _theirs(
    network: diffusers.WanTransformer3DModel, inputs: Sequence[torch.Tensor]
) -> Callable[[], np.ndarray]:
    def run() -> np.ndarray:
        with torch.inference_mode():
            return network(*inputs).sample.numpy()

    return run


def _ours(
    network: diffusers.WanTransformer3DModel, inputs: Sequence[torch.Tensor], size: Size
) -> Callable[[], np.ndarray]:
    latent, timestep, context = (tensor.numpy() for tensor in inputs)
    cfg = wan_dit.config_from_diffusers(network.config, text_len=size.argv)
    weights = rules.rename(
        {name: value.numpy() for name, value in network.state_dict().items()}, wan_dit.DIFFUSERS
    )
    model = parts.load(dit.WanDiT, cfg, weights, wan_dit.WAN_DIT)
    times = einops.repeat(jnp.asarray(timestep), "b -> b t", t=size.latent[0])
    arguments = parts.ours(latent), times, jnp.asarray(context)
    forward = jax.jit(lambda model, *args: parts.theirs(dit.bidirectional(model, *args)))
    return lambda: np.asarray(forward(model, *arguments))


def seconds(run: Callable[[], np.ndarray]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def turns(pair: Contest, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds of each of our runs and of theirs in turn, each right after one that does not count."""
    spent: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(repeats):
        for name in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
            run = getattr(pair, name)
            run()  # threads of the other network still spin for a moment after its last run
            spent[name].append(seconds(run))
    return spent["ours"], spent["theirs"]


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Their times over ours: of the medians, the quartiles of single turns, of the fastest runs; and if both held."""
    low, _, high = statistics.quantiles([b / a for a, b in zip(ours, theirs, strict=True)], n=4)
    spreads = [
        third / first
        for first, _, third in (statistics.quantiles(times, n=4) for times in (ours, theirs))
    ]
    return {
        "ratio": statistics.median(theirs) / statistics.median(ours),
        "quartiles": [low, high],
        "fastest": min(theirs) / min(ours),
        "steady": max(spreads) <= STEADY,
    }


def measured(name: str, size: Size, repeats: int) -> dict[str, Any]:
    """The row of one size; without ratios if the networks disagree."""
    pair = contest(size)
    error = kinds.difference(pair.ours(), pair.theirs())
    row = {
        "size": name,
        "width": size.heads * size.head_dim,
        "layers": size.layers,
        "tokens": size.tokens,
        "turns": repeats,
        "error": error,
        "agree": error <= TOLERANCE,
    }
    return row | ratios(*turns(pair, repeats)) if row["agree"] else row


def limited(cores: int) -> int:
    """Keeps this process to so many cores where the system can do that, and says how many it has."""
    if not hasattr(os, "sched_setaffinity"):
        return os.cpu_count() or 1
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    return len(os.sched_getaffinity(0))


def processor() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(cores: int) -> dict[str, Any]:
    """What the ratios were found with."""
    packages = {name: metadata.version(name) for name in ("jax", "torch", "diffusers")}
    return {"cpu": processor(), "cores": cores, "python": platform.python_version(), **packages}


def table(result: dict[str, Any]) -> str:
    """The outcome as aligned text."""
    lines = [
        f"{'size':<8}{'width':>6}{'layers':>7}{'tokens':>7}{'differ':>9}   diffusers' time over ours"
    ]
    for row in result["sizes"]:
        sizes = f"{row['size']:<8}{row['width']:>6}{row['layers']:>7}{row['tokens']:>7}{row['error']:>9.0e}   "
        lines.append(
            sizes
            + (_spell(row) if row["agree"] else f"none: they differ by more than {TOLERANCE:.0e}")
        )
    return "\n".join(
        [*lines, ", ".join(f"{name} {value}" for name, value in result["machine"].items())]
    )


def _spell(row: dict[str, Any]) -> str:
    low, high = row["quartiles"]
    return (
        f"{row['ratio']:.2f} ({low:.2f} to {high:.2f}), fastest runs {row['fastest']:.2f}"
        + ", UNSTEADY: the cores are shared" * (not row["steady"])
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the ratios; 1 if the networks disagree."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--turns",
        type=int,
        default=31,
        metavar="N",
        help="timed runs of each network (default: 31)",
    )
    parser.add_argument(
        "--cores", type=int, default=CORES, metavar="N", help=f"cores for both (default: {CORES})"
    )
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    args = parser.parse_args(argv)
    if args.turns < 15:
        parser.error(f"--turns={args.turns} is too few for quartiles; give 15 or more")
    cores = limited(args.cores)
    torch.set_num_threads(cores)
    result = {
        "machine": machine(cores),
        "sizes": [measured(name, size, args.turns) for name, size in SIZES.items()],
    }
    print(json.dumps(result) if args.json else table(result))
    return 0 if all(row["agree"] for row in result["sizes"]) else 1


if __name__ == "__main__":
    sys.exit(main())
