"""Strict settings for every test: no silent rank promotion, exact matrix products, two fake CPU devices."""

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

import quick

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} {quick.FLAGS}"  # read when a backend starts
)

if "PYTEST_XDIST_WORKER" not in os.environ:
    # What one test compiles the others read, in this run alone.
    COMPILED = tempfile.mkdtemp(prefix="packforcing-tests-")
    atexit.register(shutil.rmtree, COMPILED, ignore_errors=True)
    os.environ |= {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": COMPILED,
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(2**31),  # with a bound comes a lock
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }

import signal

import jax
import pytest

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell takes it from what it runs in the background
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_num_cpu_devices", 2)

gc.set_threshold(100_000, 20, 20)  # traced programs are many objects, and seldom garbage


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Compiled programs go before they fill the table of memory maps (65,530 by default): then compiling crashes."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_text().count("\n") > 30_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model folder of the tiny experiment with random weights and the Stage world's words."""
    import folders  # after the settings above

    return folders.write_model_folder(tmp_path_factory.mktemp("models") / "tiny")
