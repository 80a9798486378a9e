"""How long functions take on this machine: the first call apart, then all of them in rounds, each one waited for."""

import datetime
import functools
import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

State: TypeAlias = Any  # what steps hand on: any pytree of arrays
# From a state to the next one and a result. Buffers of the state may be used up: the next call gets what came back.
Step = Callable[[State], tuple[State, Any]]
Show = Callable[
    [Sequence[Any], str], Iterable[Any]
]  # (items, unit) -> the same items, shown as they pass


@dataclass(frozen=True)
class Times:
    """Seconds of one step: its first call, tracing and compiling included, and later runs in order."""

    first: float
    runs: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.runs))

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.percentile(self.runs, (25, 75))
        return float(low), float(high)

    @property
    def best(self) -> float:
        return min(self.runs)


def unshown(items: Sequence[Any], unit: str) -> Iterable[Any]:
    return items


def measure(
    steps: Mapping[str, Step],
    state: State,
    *,
    warmup: int = 3,
    repeats: int = 20,
    show: Show = unshown,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """The times of `steps`, which hand one state on.

    A round runs every step once, so that a machine that grows slower does so for all, each in another order, since
    a step leaves warm or cold caches to the next. `warmup` rounds do not count.
    """
    took: dict[str, list[float]] = {name: [] for name in steps}
    shuffle = random.Random(0)

    def run(name: str) -> None:
        nonlocal state
        began = clock()
        state, _ = jax.block_until_ready(steps[name](state))
        took[name].append(clock() - began)

    for name in show(list(steps), "compiled"):
        run(name)
    for _ in show(range(warmup + repeats), "rounds"):
        for name in shuffle.sample(list(steps), len(steps)):
            run(name)
    return {
        name: Times(first=all_runs[0], runs=tuple(all_runs[1 + warmup :]))
        for name, all_runs in took.items()
    }


def ratio(these: Times, those: Times) -> float:
    """How many times as long `these` take as `those`: the median over rounds, in which both met the same machine."""
    return float(np.median(np.divide(these.runs, those.runs)))


# The ceiling

PRODUCTS = {"cpu": (512, 1024, 1536)}  # sides of the square matrices by platform
LARGE_PRODUCTS = (4096, 8192, 16384)  # a call costs time of its own, which small ones do not hide


@dataclass(frozen=True)
class Product:
    """A product of matrices [rows, inner] and [inner, columns] of random numbers."""

    rows: int
    inner: int
    columns: int
    dtype: str

    @property
    def operations(self) -> int:
        return 2 * self.rows * self.inner * self.columns

    @property
    def name(self) -> str:
        return f"{self.rows} x {self.inner} x {self.columns}"

    def step(self) -> Step:
        """The product as a step; its matrices are made now."""
        left = normal(0, (self.rows, self.inner), self.dtype)
        right = normal(1, (self.inner, self.columns), self.dtype)
        multiply = jax.jit(jnp.matmul)
        return lambda state: (state, multiply(left, right))


def products(dtype: str) -> list[Product]:
    """Square products large enough to show what this device can do at most."""
    return [
        Product(side, side, side, dtype)
        for side in PRODUCTS.get(jax.default_backend(), LARGE_PRODUCTS)
    ]


POOL = 1_000_003  # random numbers dealt out again and again; a prime, so that no two rows of a matrix are alike


def normal(
    seed: int, shape: Sequence[int], dtype: jax.typing.DTypeLike, scale: float = 1.0
) -> jax.Array:
    """Random numbers, laid out on the device: hardware is faster on zeros. Little to compile, whatever the shape."""
    # each seed begins far from the others in the pool
    return _dealt(_pool(), seed * 7919 % POOL, scale, tuple(shape), jnp.dtype(dtype).name)


@functools.cache
def _pool() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).standard_normal(POOL, np.float32))


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _dealt(
    pool: jax.Array, first: int, scale: float, shape: tuple[int, ...], dtype: str
) -> jax.Array:
    numbers = pool[(jnp.arange(math.prod(shape)) + first) % POOL] * scale
    return numbers.reshape(shape).astype(dtype)


# The machine


def machine() -> dict[str, Any]:
    """What figures depend on beside the program: devices, processor, versions, the day."""
    devices = jax.devices()
    return {
        "device": devices[0].device_kind,
        "platform": devices[0].platform,
        "devices": len(devices),
        "processor": processor(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The name of this machine's processor."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (named or [platform.processor() or platform.machine()])[0]
