"""Compiles denoising and committing a block for an NVIDIA H200, without one, and checks what XLA made of them.

    make h200                                                             # installs jax[cuda13] and runs this
    python -m benchmarks.compile_for_h200 wan_t2v_1_3b_paper --json       # with jax[cuda13] installed

Nothing is computed and nothing timed. All arrays are bfloat16 and none is allocated.
"""

import argparse
import dataclasses
import importlib.util
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from packforcing_jax.config import HALF, Experiment, loading
from packforcing_jax.errors import InputError, require
from packforcing_jax.memory.cache import Memory
from packforcing_jax.plan import hlo, programs
from packforcing_jax.sampling import player

DEVICE = Path(__file__).parent / "h200.txtpb"
CUDNN = {
    "check_cudnn_version": 92700,
    "check_compute_capability": True,
    "is_cuda_compute_capability_equal": True,
}
TEMPORARY = (
    0.3e9  # bytes: the largest values of one layer side by side, and nothing of a second one
)
DENOISE = "denoise"
COMMIT = "commit"
LENGTH = 4  # operand of cuDNN's attention, after queries, keys, values and the queries' lengths


@dataclass(frozen=True)
class Built:
    """A program compiled for the H200: the memory donated to it, its operations, where XLA put their results."""

    name: str
    memory: Memory
    stats: Any
    program: hlo.Program
    assignment: str
    seconds: float


@dataclass(frozen=True)
class Row:
    """One line of the report; `ok` is None where nothing is promised."""

    program: str
    check: str
    figure: str
    ok: bool | None


def device() -> jax.sharding.Sharding:
    """Placement on one H200 that is only described."""
    require(
        importlib.util.find_spec("jax_cuda13_plugin") is not None,
        "XLA's compiler for NVIDIA GPUs is missing; run `make h200`, or install jax[cuda13].",
    )
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=DEVICE.read_text(), topology="1x1x1"
    )
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def answer_for_cudnn() -> None:
    """Lets jax emit cuDNN attention here.

    Before it does, jax asks the GPU of this machine for its cuDNN version and compute capability. There is none to
    ask, and the program is not for this machine: the answers are an H200's.
    """
    from jax._src.cudnn import fused_attention_stablehlo as attention

    for name, answer in CUDNN.items():
        require(
            hasattr(attention, name),
            f"jax {jax.__version__} does not ask for cuDNN by {name}; use jax 0.12.0.1.",
        )
        setattr(attention, name, lambda *_, _answer=answer: _answer)


def build(exp: Experiment) -> Iterator[Built]:
    """`player.denoise_program` and `player.commit_program` of one video."""
    where = device()
    shapes = programs.shapes_of(exp)
    numbers = shapes.seeds, shapes.videos
    denoiser = shapes.denoiser(exp.step, shapes.nets)
    operands = denoiser, shapes.memory, *numbers
    yield compiled(DENOISE, player.denoise_program, where, operands)
    selection = [shapes.selection] * exp.dit.layers
    operands = denoiser, shapes.memory, shapes.latent, shapes.low_res, selection
    yield compiled(COMMIT, player.commit_program, where, operands)


def compiled(
    name: str,
    function: jax.stages.Wrapped,
    where: jax.sharding.Sharding,
    operands: tuple[Any, ...],
) -> Built:
    """`function` of (denoiser, memory, ...), compiled for `where`, with XLA's account of where each result lies."""
    start = time.monotonic()
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), operands
    )
    with tempfile.TemporaryDirectory() as folder:
        done = function.lower(*placed).compile(
            {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        )
        assignment = "".join(
            path.read_text() for path in Path(folder).glob("*buffer-assignment.txt")
        )
    return Built(
        name=name,
        memory=operands[1],
        stats=done.memory_analysis(),
        program=hlo.read(done.as_text()),
        assignment=assignment,
        seconds=time.monotonic() - start,
    )


def rows(exp: Experiment, built: Built) -> Iterator[Row]:
    """What is checked of one program."""
    shapes = stores(built.memory)
    least = min(map(hlo.size, shapes))
    donated = total(built.memory)
    aliased = built.stats.alias_size_in_bytes
    yield Row(
        built.name,
        "donated buffers handed back",
        f"{aliased:,} of {donated:,} bytes",
        aliased == donated,
    )
    updates = len(hlo.written(built.program, shapes))
    astray = hlo.astray(built.assignment, shapes)
    yield Row(built.name, "stores updated by slices", f"{updates} times", updates > 0)
    yield Row(
        built.name,
        "results of a store's shape elsewhere",
        listed(astray),
        not astray and known(built),
    )
    beside = hlo.remade(built.program, shapes, least)
    plain = [
        op
        for op in beside
        if built.program.ends_in(op) in hlo.MOVES and not built.program.multiplies(op)
    ]
    copies = plain + hlo.moved(built.program, shapes)
    yield Row(built.name, f"copies of {least / 1e6:.0f} MB or more", counted(copies), not copies)
    yield Row(
        built.name,
        "keys turned beside their store",
        counted(op for op in beside if op not in copies),
        None,
    )
    yield from attention_rows(exp, built)
    arguments = built.stats.argument_size_in_bytes
    yield Row(built.name, "arguments, weights among them", f"{arguments / 1e9:.2f} GB", None)
    used = built.stats.temp_size_in_bytes
    yield Row(built.name, "temporary memory", f"{used / 1e9:.2f} GB", used < TEMPORARY)
    yield Row(built.name, "time to compile", f"{built.seconds:.0f} s", None)


def attention_rows(exp: Experiment, built: Built) -> Iterator[Row]:
    """How the program attends, to views and to the text."""
    calls = [(name, op) for name, op in built.program.kernels() if '"__cudnn$fmha' in op.text]
    own = [call for call in calls if keys_of(call[1]) == {exp.memory.room}]
    wanted = passes(exp, built.name)
    yield Row(
        built.name, "self-attention by cuDNN", f"{len(own)} of {wanted} calls", len(own) == wanted
    )
    cut = [
        op
        for name, op in own
        if '"mask_type": "PADDING"' in op.text and traced(built.program, name, op)
    ]
    yield Row(built.name, "of them over a traced length", f"{len(cut)}", len(cut) == len(own) > 0)
    room = exp.memory.room
    yield Row(built.name, "keys in a view", f"{room} = {room / 128:g} x 128", room % 128 == 0)
    read = [op for _, op in calls if keys_of(op) == {exp.dit.text_len}]
    yield Row(
        built.name, "text read by cuDNN", f"{len(read)} of {wanted} calls", len(read) == wanted
    )


def keys_of(call: hlo.Op) -> set[int]:
    """How many keys an attention call has room for."""
    return {int(size) for size in re.findall(r"constraints=\{[^}]*\}, \w+\[\d+,(\d+),", call.text)}


def passes(exp: Experiment, name: str) -> int:
    """Self-attentions in a program: per layer one in each pass that is written out.

    Denoising is a first step, one more where a shared choice is made before it, and the loop over the others. In
    committing, the last layer of each pass attends to nothing: its keys are made before.
    """
    if name == DENOISE:
        twice = exp.cache.top > 0 and (exp.cache.scope, exp.cache.timing) == ("shared", "first")
        return (2 + twice) * exp.dit.layers
    return (1 + (exp.cache.top > 0 and exp.compressor.keys == "blocks")) * (exp.dit.layers - 1)


def traced(program: hlo.Program, computation: str, call: hlo.Op) -> bool:
    """Whether the number of valid keys is computed by the program."""
    return len(call.operands) > LENGTH and "constant" not in call.operands[LENGTH]


def stores(memory: Memory) -> set[hlo.Shape]:
    """Shapes of everything that keeps keys or values."""
    return {("bf16", x.shape) for x in jax.tree.leaves(memory.layers) if x.ndim >= 4 and x.size}


def total(memory: Memory) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(memory))


def known(built: Built) -> bool:
    """Whether XLA told where results lie."""
    return "BufferAssignment:" in built.assignment


def listed(names: list[str]) -> str:
    return f"{len(names)}: {', '.join(names[:3])}" if names else "none"


def counted(ops: Iterable[hlo.Op]) -> str:
    """Operations by kind, as `30 x concatenate bf16[1,18720,12,128] (58 MB)`."""
    kinds = Counter((op.shape, re.sub(r"[.\d]+$", "", op.name)) for op in ops)
    return (
        "; ".join(
            f"{count} x {name} {kind[0]}[{','.join(map(str, kind[1]))}] ({hlo.size(kind) / 1e6:.0f} MB)"
            for (kind, name), count in kinds.items()
        )
        or "none"
    )


def report(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    lines = [("program", "check", "figure", "ok")]
    lines += [
        (row.program, row.check, row.figure, {None: "-", True: "yes", False: "NO"}[row.ok])
        for row in rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    )


def print_report(rows: Sequence[Row], title: str, *, as_json: bool, **facts: object) -> int:
    """Prints `rows` below a title, or with `facts` as one JSON object; 1 if a check failed."""
    failed = [row for row in rows if row.ok is False]
    if as_json:
        print(
            json.dumps(
                {
                    **facts,
                    "jax": jax.__version__,
                    "ok": not failed,
                    "rows": [dataclasses.asdict(row) for row in rows],
                }
            )
        )
    else:
        print(f"{title}, jax {jax.__version__}\n\n{report(rows)}")
        print(f"\n{len(failed)} of {sum(row.ok is not None for row in rows)} checks failed.")
    return 1 if failed else 0


def program(
    run: Callable[[argparse.Namespace], int], doc: str | None, **flags: Mapping[str, Any]
) -> int:
    """Runs `run` on the command line's words: a config, changes to it, and `flags` of its own."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "config", nargs="?", default="wan_t2v_1_3b_paper", help="a config (default: %(default)s)"
    )
    parser.add_argument(
        "--set",
        metavar="A.B=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="change one value",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    for name, settings in flags.items():
        parser.add_argument(f"--{name}", **settings)
    jax.config.update("jax_platforms", "cpu")
    try:
        return run(parser.parse_args())
    except InputError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        return error.exit_code


def run(args: argparse.Namespace) -> int:
    """The block step's report; 1 if a check failed."""
    exp = dataclasses.replace(
        loading.load_experiment(args.config, args.overrides), attention="cudnn", dtypes=HALF
    )
    require(
        exp.cache.archive == "device",
        "cache.archive='host' is denoised in parts; this looks at whole steps only.",
    )
    answer_for_cudnn()
    checks = [row for built in build(exp) for row in rows(exp, built)]
    return print_report(
        checks,
        f"{args.config} for {DEVICE.stem.upper()}, bfloat16, one video",
        as_json=args.json,
        config=args.config,
    )


if __name__ == "__main__":
    sys.exit(program(run, __doc__))
