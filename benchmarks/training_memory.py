"""Compiles a full-size distillation step for eight devices, without any, and shows what each holds and exchanges.

    python -m benchmarks.training_memory                              # eight fake CPU devices: the state counts
    python -m benchmarks.training_memory wan_t2v_1_3b_dmd_14b --steps ""     # the state alone
    .venv-h200/bin/python -m benchmarks.training_memory --json        # eight H200s, where jax[cuda13] is installed

Nothing is allocated, computed or timed. On a CPU attention is not fused and numbers are not half as wide, so that only
what the devices hold means anything there; the memory of a step and what it exchanges are those of the H200s.
"""

import argparse
import dataclasses
import importlib.util
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from benchmarks import compile_for_h200
from benchmarks.compile_for_h200 import Row
from packforcing_jax.config import loading
from packforcing_jax.networks import mesh
from packforcing_jax.plan import formulas, hlo, training_budget
from packforcing_jax.plan.training_budget import Setup, device_bytes
from packforcing_jax.training import runs, teachers

COUNT = 8
SETTINGS = (
    "train.objective=dmd",
    "train.source.kind=records",
    f"train.batch={COUNT}",
    f"train.mesh.fsdp={COUNT}",
)
STEPS = ("generator", "critic")
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
COLLECTIVE = re.compile(
    rf"^\s+(?:ROOT )?%?\S+ = (.+?) ({'|'.join(KINDS)})(?:-done)?\(", re.MULTILINE
)
ROOM = 1.03  # times equal shares of the transformers: the compressor is held too, and vectors are whole everywhere
PEAK = 80e9  # bytes on a device with one clip each, from the size of activations
WANTED = 0.99  # share of the exchanged bytes that all-gather and reduce-scatter carry


def gpus() -> bool:
    """Whether XLA's compiler for NVIDIA GPUs is installed."""
    return importlib.util.find_spec("jax_cuda13_plugin") is not None


def devices(on_gpus: bool) -> Sequence[Any]:
    """Eight H200s of one machine that are only described, or eight fake devices."""
    if not on_gpus:
        jax.config.update("jax_num_cpu_devices", COUNT)
        return jax.devices()
    compile_for_h200.answer_for_cudnn()
    return topologies.get_topology_desc(
        platform="cuda", target_config=compile_for_h200.DEVICE.read_text(), topology=f"1x{COUNT}x1"
    ).devices


def state_rows(setup: Setup) -> Iterator[Row]:
    """What each device holds between steps, beside an equal share of the transformer's parameters, times bytes each."""
    state = setup.state
    teacher = setup.frozen["teacher"]
    parts = setup.grid.shape["fsdp"] * setup.grid.shape["tensor"]
    size = formulas.transformer_share(setup.exp.dit, 1, 1) / parts
    taught = formulas.transformer_share(teachers.sizes(setup.exp, setup.train), 1, 1) / parts
    taught *= jnp.dtype(setup.exp.dtypes.compute).itemsize
    table = (
        ("generator", state.params["generator"], 4 * size),
        ("its average", state.ema, 4 * size),
        ("its moments", (state.opt["generator"], state.opt.get("compressor", ())), 8 * size),
        ("critic", state.params["critic"], 4 * size),
        ("its moments", state.opt["critic"], 8 * size),
        ("teacher", teacher, taught),
        ("all", (state, teacher), 28 * size + taught),
        ("all, with gradients", (state, teacher, state.params["generator"]), 32 * size + taught),
    )
    for name, tree, share in table:
        known = device_bytes(tree)
        ok = known <= ROOM * share if name.startswith("all") else None
        yield Row("state", name, f"{known / 1e9:.2f} GB; {share / 1e9:.2f} of equal shares", ok)
    yield Row(
        "state", "codec, whole on each", f"{device_bytes(setup.frozen['codec']) / 1e9:.2f} GB", None
    )


def exchanged(text: str) -> tuple[Counter, Counter]:
    """(places, bytes that come out on each device) of the collectives in a compiled program, by kind and type.

    What stands in a loop is counted once.
    """
    counts = Counter()
    volume = Counter()
    for result, kind in COLLECTIVE.findall(text):
        for item, sizes in hlo.ARRAY.findall(result):
            shape = item, tuple(int(size) for size in sizes.split(",") if size)
            counts[kind, item] += 1
            volume[kind, item] += hlo.size(shape)
    return counts, volume


def step_rows(setup: Setup, name: str, *, on_gpus: bool) -> Iterator[Row]:
    """What one step needs beside the state, and what the devices exchange in it."""
    exp = setup.exp
    state = setup.state
    start = time.monotonic()
    states = jax.ShapeDtypeStruct(
        (setup.train.batch, exp.dit.text_len, exp.dit.text_dim),
        jnp.bfloat16,
        sharding=mesh.batch_sharding(cast(jax.sharding.Mesh, setup.grid)),
    )
    grid = cast(jax.sharding.Mesh, setup.grid)  # of devices, if fake ones
    with jax.set_mesh(grid):
        update = runs.compiled(exp, setup.train, runs.Program(), state, grid)
        done = update.lower(
            state, setup.frozen, {"states": states}, np.uint32(0), (name,), exp
        ).compile()
    stats: Any = done.memory_analysis()
    peak = (
        stats.argument_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
    )
    yield Row(
        name,
        "state handed back in place",
        f"{stats.alias_size_in_bytes / 1e9:.2f} of {device_bytes(state) / 1e9:.2f} GB",
        stats.alias_size_in_bytes >= device_bytes(state) - 64,
    )
    yield Row(name, "temporary memory", f"{stats.temp_size_in_bytes / 1e9:.2f} GB", None)
    yield Row(
        name, "in all on each device", f"{peak / 1e9:.2f} GB", peak < PEAK if on_gpus else None
    )
    counts, volume = exchanged(done.as_text())
    for key in sorted(counts):
        yield Row(
            name, f"{key[0]} of {key[1]}", f"{counts[key]} times, {volume[key] / 1e6:,.1f} MB", None
        )
    wanted = sum(size for (kind, _), size in volume.items() if kind in KINDS[:2]) / max(
        sum(volume.values()), 1
    )
    yield Row(
        name,
        "carried by all-gather and reduce-scatter",
        f"{wanted:.1%}",
        wanted > WANTED if on_gpus else None,
    )
    yield Row(name, "time to compile", f"{time.monotonic() - start:.0f} s", None)


def run(args: argparse.Namespace) -> int:
    """Prints the report; 1 if a check failed."""
    on_gpus = gpus() and not args.cpu
    chips = devices(on_gpus)
    stage = loading.load_stage(args.config, (*SETTINGS, *args.overrides))
    exp = stage.experiment
    train = stage.train
    exp = dataclasses.replace(exp, attention="cudnn" if on_gpus else "xla")
    setup = training_budget.setup(exp, train, mesh.make(train.mesh, chips))
    rows = list(state_rows(setup))
    for name in filter(None, args.steps.split(",")):
        rows += step_rows(setup, name, on_gpus=on_gpus)
    what = (
        f"{COUNT} x {compile_for_h200.DEVICE.stem.upper()}"
        if on_gpus
        else f"{COUNT} fake CPU devices"
    )
    sizes = ", ".join(f"{name}={size}" for name, size in setup.grid.shape.items())
    return compile_for_h200.print_report(
        rows,
        f"{args.config} on {what} ({sizes})",
        as_json=args.json,
        config=args.config,
        devices=what,
        mesh=dict(setup.grid.shape),
    )


if __name__ == "__main__":
    sys.exit(
        compile_for_h200.program(
            run,
            __doc__,
            steps={
                "default": ",".join(STEPS),
                "help": "what to compile, or nothing (default: %(default)s)",
            },
            cpu={"action": "store_true", "help": "fake CPU devices, whatever is installed"},
        )
    )
