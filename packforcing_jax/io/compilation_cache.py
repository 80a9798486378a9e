"""Compiled programs kept on disk: what one process compiled, the next one reads.

jax takes these settings from the environment when it is imported, and what the user has set there stays.
"""

import os
import sys
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

from packforcing_jax.io import user_cache

ON = "JAX_ENABLE_COMPILATION_CACHE"
OFF = ("0", "f", "false", "n", "no", "off")  # as jax reads it
FOLDER = "JAX_COMPILATION_CACHE_DIR"
SIZE = "JAX_COMPILATION_CACHE_MAX_SIZE"
SETTINGS = {
    SIZE: str(512 * 2**20),  # bytes; what was read longest ago goes first
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none",  # XLA's own files beside ours have no bound
}
ENTRY = "-cache"  # jax's names: of a program, and of the time it was last read, which is written behind it
READ_AT = "-atime"
TICK = 0.02  # seconds by which the time of a file may lag behind


def use(environment: MutableMapping[str, str] = os.environ) -> None:
    """Keeps programs in the user's cache, unless the environment names a folder or turns keeping off.

    It has to be called before jax is imported. A folder that cannot be written is a warning.
    """
    if FOLDER in environment or environment.get(ON, "").lower() in OFF:
        return
    try:
        folder = user_cache.folder("compiled")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        if SIZE not in environment:
            remove_unfinished(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        print(
            f"packforcing: compiled programs cannot be kept for the next run ({error}); choose another folder "
            "with XDG_CACHE_HOME, or give --no-compilation-cache.",
            file=sys.stderr,
        )
        return
    environment[FOLDER] = str(folder)
    for name, value in SETTINGS.items():
        environment.setdefault(name, value)


def remove_unfinished(folder: Path) -> None:
    """Removes programs that a process was writing when it was killed: jax would stumble over each, again and again."""
    names = {each.name for each in folder.iterdir()}
    for name in names:
        if name.endswith(ENTRY) and name.removesuffix(ENTRY) + READ_AT not in names:
            (folder / name).unlink(missing_ok=True)


def in_use() -> Path | None:
    """The folder in which jax keeps the programs that it compiles, if it does."""
    import jax

    folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    on = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    return Path(folder) if on and folder else None


def read_since(moment: float) -> bool:
    """Whether jax found a program in a folder with a bound since then: it says so before it has loaded it."""
    folder = in_use()
    try:
        return folder is not None and any(
            each.stat().st_mtime > moment - TICK for each in folder.glob(f"*{READ_AT}")
        )
    except OSError:
        return False
