"""The first half hour on an NVIDIA GPU: what decides the speed of a full-size block, each choice beside its rivals.

    python -m benchmarks.on_h200 --out on_h200.json            # full size, random weights; needs jax[cuda13]
    python -m benchmarks.on_h200 --only attention --only conv  # some of the trials
    python -m benchmarks.on_h200 --toy                         # the same program at tiny sizes, on any device

Trials that need other compiler flags run in a process of their own. A trial that fails, or takes its process with it,
is reported, and the others go on. Exit code 1 if any failed, 2 without a GPU.
"""

import argparse
import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from packforcing_jax.cli import bench as verb
from packforcing_jax.config import Experiment, loading
from packforcing_jax.errors import InputError, brief, nearest, require
from packforcing_jax.plan import bench, timing
from packforcing_jax.policies import attention

ROOT = Path(__file__).parent.parent
CONFIG = "wan_t2v_1_3b_paper"
TOY = (
    "dit.dim=24",
    "dit.heads=2",
    "dit.layers=1",
    "dit.ffn_dim=40",
    "dit.text_dim=8",
    "dit.text_len=5",
    "dit.freq_dim=8",
    "codec.dim=2",
    "codec.dim_mult=(1, 1, 1, 1)",
    "codec.num_res_blocks=1",
    "latent=(8, 8)",
    "compressor.channels=(3, 4, 5, 6)",
    "cache.capacity=3",
    "cache.top=2",
    "sample.steps=(1000, 500)",
    "dtypes.vae=float32",
)
WARMUP = 3
REPEATS = 10
MINUTES = 15  # for the trials of one process, or for one that takes longer alone
QUERIES = 64  # whose attention is compared with float32
NHWC = "--xla_gpu_force_conv_nhwc=true"
NO_TRITON = "--xla_gpu_enable_triton_gemm=false"
MARK = "trial: "  # begins the lines of a child's output that are results

Row = dict[str, Any]


class Skipped(Exception):
    """A trial that cannot be run here; the text says why."""


@dataclass(frozen=True)
class Trial:
    """Something to measure; those of one group with the same flags share a process."""

    group: str
    name: str
    run: Callable[[Experiment], Row]
    flags: str = ""

    @property
    def full_name(self) -> str:
        return " ".join(
            [f"{self.group}: {self.name}", *([f"({self.flags})"] if self.flags else [])]
        )


def timed(call: Callable[..., Any], every: Sequence[tuple], operations: int) -> Row:
    """Times of one `call`, run once on each of `every` tuples of arrays by one program that hides the cost of calls."""
    program = jax.jit(lambda every: [call(*args) for args in every])
    times = timing.measure(
        {"": lambda state: (state, program(every))}, None, warmup=WARMUP, repeats=REPEATS
    )[""]
    low, high = times.quartiles
    seconds = times.median / len(every)
    return {
        "ms": 1e3 * seconds,
        "low": 1e3 * low / len(every),
        "high": 1e3 * high / len(every),
        "tflops": operations / seconds / 1e12,
        "first_call": times.first,
    }


# Attention of a block to a full view


def attending(
    call: Callable[..., jax.Array], keys: Callable[[Experiment], int | None], exp: Experiment
) -> Row:
    """`call`(q, k, v, length) over a view, of which the first `keys` count, and how far from float32 it is."""
    length = keys(exp)
    room = exp.memory.room
    queries = exp.cache.block * exp.tokens_per_frame
    own = (exp.dit.heads, exp.dit.head_dim)
    every = [
        tuple(
            timing.normal(3 * seed + part, (1, size, *own), jnp.bfloat16)
            for part, size in enumerate((queries, room, room))
        )
        for seed in range(4)
    ]
    traced = None if length is None else jnp.int32(length)
    row = timed(
        lambda *qkv: call(*qkv, traced), every, 4 * queries * (length or room) * exp.dit.dim
    )
    q, k, v = every[0]
    got = jax.jit(call)(q, k, v, traced)[:, :QUERIES].astype(jnp.float32)
    want = attention.reference(
        *(x.astype(jnp.float32) for x in (q[:, :QUERIES], k, v)), length=traced
    )
    return row | {"error": float(jnp.abs(got - want).max() / jnp.abs(want).max())}


def cudnn(q, k, v, length):
    """cuDNN over the first `length` keys, or over all without a mask."""
    if jax.default_backend() != "gpu":
        raise Skipped("cuDNN needs an NVIDIA GPU")
    return attention.BACKENDS["cudnn"].attention_fn(q, k, v, length)


def mosaic(q, k, v, length):
    """Tokamax's kernel for Hopper."""
    if importlib.util.find_spec("tokamax") is None:
        raise Skipped("tokamax is not installed")
    import tokamax

    lengths = None if length is None else jnp.full(1, length, jnp.int32)
    return tokamax.dot_product_attention(
        q, k, v, key_value_seq_lengths=lengths, implementation="mosaic"
    )


def own_keys(exp: Experiment) -> int:
    """Keys that the first block of a video attends to."""
    return exp.cache.block * exp.tokens_per_frame


ATTENTION = [
    ("cudnn, traced length, full view", cudnn, bench.attended),
    ("cudnn, traced length, first block", cudnn, own_keys),
    ("cudnn, no mask", cudnn, lambda exp: None),
    ("tokamax mosaic, traced length, full view", mosaic, bench.attended),
    ("tokamax mosaic, no mask", mosaic, lambda exp: None),
    ("xla, traced length, full view", attention.BACKENDS["xla"].attention_fn, bench.attended),
    ("written out, traced length, full view", attention.reference, bench.attended),
]

# Matrix products of a layer


def multiplying(
    dtype: str,
    inner: Callable[[Experiment], int],
    columns: Callable[[Experiment], int],
    exp: Experiment,
) -> Row:
    """Tokens of a block [rows, inner] times weights; eight-bit floats with the weights stored [columns, inner]."""
    rows = exp.cache.block * exp.tokens_per_frame
    small = dtype.startswith("float8")
    right = (columns(exp), inner(exp)) if small else (inner(exp), columns(exp))
    every = [
        tuple(
            timing.normal(2 * seed + side, shape, jnp.bfloat16).astype(dtype)
            for side, shape in enumerate(((rows, inner(exp)), right))
        )
        for seed in range(8)
    ]
    contracted = (((1,), (1 if small else 0,)), ((), ()))
    call = lambda a, b: jax.lax.dot_general(a, b, contracted, preferred_element_type=jnp.bfloat16)  # noqa: E731
    return timed(call, every, 2 * rows * inner(exp) * columns(exp))


def dim(exp: Experiment) -> int:
    return exp.dit.dim


def ffn(exp: Experiment) -> int:
    return exp.dit.ffn_dim


PRODUCTS = [
    ("d x d", dim, dim),
    ("d x 3d", dim, lambda exp: 3 * exp.dit.dim),
    ("d x ffn", dim, ffn),
    ("ffn x d", ffn, dim),
]

# The convolution that most of decoding goes into, [b, t + 2, y, x, c] to [b, t, y, x, c], in four forms


def _convolve(x, kernel, layout: tuple[str, str, str]):
    padding = [(0, 0)] * (x.ndim - 4) + [(1, 1)] * 2
    return jax.lax.conv_general_dilated(
        x, kernel, (1,) * (x.ndim - 2), padding, dimension_numbers=layout
    )


def channels_last(x, kernel):
    return _convolve(x, kernel, ("NDHWC", "DHWIO", "NDHWC"))


def channels_first(x, kernel):
    turned = _convolve(
        x.transpose(0, 4, 1, 2, 3), kernel.transpose(4, 3, 0, 1, 2), ("NCDHW", "OIDHW", "NCDHW")
    )
    return turned.transpose(0, 2, 3, 4, 1)


def _taps(x) -> list[jax.Array]:
    """What each of the three taps in time sees, frames as a batch."""
    return [x[:, tap : x.shape[1] - 2 + tap].reshape(-1, *x.shape[2:]) for tap in range(3)]


def frames_on_channels(x, kernel):
    stacked = jnp.concatenate(_taps(x), axis=-1)
    weights = jnp.concatenate(list(kernel), axis=-2)
    flat = _convolve(stacked, weights, ("NHWC", "HWIO", "NHWC"))
    return flat.reshape(x.shape[0], -1, *flat.shape[1:])


def sum_of_taps(x, kernel):
    each = [
        _convolve(frames, tap, ("NHWC", "HWIO", "NHWC"))
        for frames, tap in zip(_taps(x), kernel, strict=True)
    ]
    flat = each[0] + each[1] + each[2]
    return flat.reshape(x.shape[0], -1, *flat.shape[1:])


CONVOLUTIONS = {
    "3-D, channels last": channels_last,
    "3-D, channels first": channels_first,
    "2-D, three frames on channels": frames_on_channels,
    "2-D, sum of three": sum_of_taps,
}


def convolving(call: Callable[..., jax.Array], exp: Experiment) -> Row:
    """A convolution at the size of decoded frames, and how far it is from the first form."""
    width = exp.codec.dim
    frames = exp.cache.block * exp.codec.time_factor
    rows, columns = (size * exp.codec.space_factor for size in exp.latent)
    x = timing.normal(0, (1, frames + 2, rows, columns, width), exp.dtypes.vae)
    kernel = timing.normal(1, (3, 3, 3, width, width), exp.dtypes.vae, (27 * width) ** -0.5)
    row = timed(call, [(x, kernel)], 2 * frames * rows * columns * 27 * width**2)
    got, want = (jax.jit(each)(x, kernel).astype(jnp.float32) for each in (call, channels_last))
    return row | {"error": float(jnp.abs(got - want).max() / jnp.abs(want).max())}


# Parts of a block, as `packforcing bench` measures them


@functools.cache
def model(exp: Experiment):
    return bench.random_model(exp)


def part(name: str, exp: Experiment) -> Row:
    """A part of a block behind a full memory."""
    report = bench.report(bench.measure(model(exp), [name], warmup=WARMUP, repeats=REPEATS))
    row = report["parts"][name]
    figures = {
        "ms": 1e3 * row["median"],
        "low": 1e3 * row["low"],
        "high": 1e3 * row["high"],
        "first_call": row["first_call"],
        "ceiling": report["ceiling"]["operations_per_second"] / 1e12,
    }
    work = (
        {"tflops": row["operations_per_second"] / 1e12, "share": row["share"]}
        if "share" in row
        else {"gigabytes_per_second": row["bytes_per_second"] / 1e9}
    )
    speed = {"frames_per_second": report["frames_per_second"]} if name == "second" else {}
    return figures | work | speed


TRIALS = [
    *(
        Trial("attention", name, functools.partial(attending, call, keys))
        for name, call, keys in ATTENTION
    ),
    *(
        Trial("gemm", f"{name}, {dtype}", functools.partial(multiplying, dtype, inner, columns))
        for dtype in ("bfloat16", "float8_e4m3fn")
        for name, inner, columns in PRODUCTS
    ),
    *(
        Trial("conv", name, functools.partial(convolving, call), flags)
        for flags in ("", NHWC)
        for name, call in CONVOLUTIONS.items()
    ),
    *(
        Trial(name, "one block", functools.partial(part, name), flags)
        for name, rival in (("forward", NO_TRITON), ("decode", NHWC))
        for flags in ("", rival)
    ),
    *(
        Trial("block", name, functools.partial(part, name))
        for name in ("denoise", "selection", "compression", "store", "commit", "second")
    ),
    Trial("block", "second", functools.partial(part, "second"), f"{NO_TRITON} {NHWC}"),
]


# The child: runs trials and prints a line for each


def outcome(trial: Trial, exp: Experiment) -> Row:
    """What a trial found, or why it found nothing."""
    try:
        return trial.run(exp) | {"clocks": smi("clocks.sm,clocks.mem,power.draw")}
    except Skipped as reason:
        return {"skipped": str(reason)}
    except Exception as error:  # noqa: BLE001  a trial may fail in any way; the others go on
        return {"failed": f"{type(error).__name__}: {brief(error)[:200]}"}


def experiment(toy: bool) -> Experiment:
    return loading.load_experiment(CONFIG, TOY if toy else ())


def child(numbers: Sequence[int], toy: bool) -> None:
    """Runs the trials with these numbers and prints a line for each; without any, says where it runs."""
    if not numbers:
        print(
            MARK
            + json.dumps(
                timing.machine() | {"gpu": smi("name,driver_version,clocks.max.sm,power.limit")}
            )
        )
    for number in numbers:
        print(MARK + json.dumps(outcome(TRIALS[number], experiment(toy))), flush=True)


def smi(fields: str) -> str | None:
    """What nvidia-smi says of the first GPU."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


# The parent: never touches the device, which its children need whole


def launch(numbers: Sequence[int], flags: str, toy: bool) -> tuple[list[Row], str]:
    """The results of trials in a new process, and how that ended."""
    argv = [
        sys.executable,
        "-m",
        "benchmarks.on_h200",
        "--child",
        *map(str, numbers),
        *(["--toy"] if toy else []),
    ]
    env = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()}
    try:
        done = subprocess.run(
            argv, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60 * MINUTES
        )
        out = done.stdout
        reason = (done.stderr.strip().splitlines() or [""])[-1][:200]
        ended = f"the process ended with code {done.returncode}: {reason}"
    except subprocess.TimeoutExpired as late:
        out = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        ended = f"the process was stopped after {MINUTES} minutes"
    return [
        json.loads(line.removeprefix(MARK)) for line in out.splitlines() if line.startswith(MARK)
    ], ended


def results(
    chosen: Sequence[int], toy: bool, start: Callable[..., tuple[list[Row], str]]
) -> Iterator[tuple[int, Row]]:
    """(number, result) of every trial; one that ends its process fails, and those behind it get another process."""
    together: dict[tuple[str, str], list[int]] = {}
    for number in chosen:
        together.setdefault((TRIALS[number].group, TRIALS[number].flags), []).append(number)
    for (_, flags), left in together.items():
        while left:
            done, ended = start(left, flags, toy)
            yield from zip(left, done)
            left = left[len(done) :]
            if left:
                yield left.pop(0), {"failed": ended}


def line(trial: Trial, row: Row) -> str:
    """A result as a line of the table."""
    for reason in ("skipped", "failed"):
        if reason in row:
            return f"{trial.full_name:<66}{reason.upper() if reason == 'failed' else reason}: {row[reason]}"
    rate = (
        f"{row['tflops']:10.2f} TFLOP/s"
        if "tflops" in row
        else f"{row['gigabytes_per_second']:10.1f} GB/s   "
    )
    extra = {
        "error": "error {:.1e}",
        "share": "{:.0%} of ceiling",
        "frames_per_second": "{:.1f} frames/s",
    }
    return (
        f"{trial.full_name:<66}{row['ms']:>11.3f} ms ({row['low']:.3f} - {row['high']:.3f}){rate}  "
        + ", ".join(text.format(row[key]) for key, text in extra.items() if key in row)
    ).rstrip()


def run(args: argparse.Namespace, start: Callable[..., tuple[list[Row], str]] = launch) -> int:
    """Prints a line per trial and keeps the file up to date; 1 if any failed, 2 without a GPU."""
    groups = list(dict.fromkeys(trial.group for trial in TRIALS))
    for name in args.only:
        require(name in groups, f"--only {name} is unknown; {nearest(name, groups)}")
    machine, ended = start([], "", args.toy)
    require(bool(machine), f"jax does not start: {ended}.")
    require(
        args.toy or machine[0]["platform"] == "gpu",
        f"no GPU here, only {machine[0]['device']}; full size is meant for "
        "an H200, --toy runs anywhere.",
    )
    made: dict[str, Any] = {"machine": machine[0], "config": CONFIG, "toy": args.toy, "trials": []}
    print(
        f"{CONFIG}{', toy sizes' if args.toy else ''}, on {machine[0]['device']}, jax {machine[0]['jax']}"
    )
    for number, row in results(
        [i for i, trial in enumerate(TRIALS) if not args.only or trial.group in args.only],
        args.toy,
        start,
    ):
        print(line(TRIALS[number], row), flush=True)
        made["trials"].append({"trial": TRIALS[number].full_name, **row})
        if args.out:
            verb.write(args.out, made)
    failed = sum("failed" in row for row in made["trials"])
    print(f"{len(made['trials'])} trials, {failed} failed")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", metavar="FILE", help="also write everything as JSON")
    parser.add_argument(
        "--only",
        metavar="GROUP",
        action="append",
        default=[],
        help=f"one of {', '.join(dict.fromkeys(trial.group for trial in TRIALS))}; may be repeated",
    )
    parser.add_argument("--toy", action="store_true", help="tiny sizes, on any device")
    parser.add_argument("--child", type=int, nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        if args.child is not None:
            child(args.child, args.toy)
            return 0
        return run(args)
    except InputError as error:
        print(f"on_h200: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
