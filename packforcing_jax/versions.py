"""Refuses pairs of jax and flax that are known to break, before either is imported."""

import re
from collections.abc import Callable
from importlib import metadata

from packforcing_jax.errors import MachineError

Version = tuple[int, ...]

# (flax, first broken jax, first jax that is not broken any more or None, flax to install instead)
BROKEN: tuple[tuple[Version, Version, Version | None, str], ...] = (
    ((0, 12, 8), (0, 11, 1), None, "0.12.12"),
    ((0, 12, 9), (0, 11, 2), (0, 11, 3), "0.12.12"),
)


def parse(text: str) -> Version:
    """The leading numbers of a version: `0.11.2.dev3` is (0, 11, 2)."""
    leading = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in leading[0].split(".")) if leading else ()


def problem(jax: str, flax: str) -> str | None:
    """One sentence naming what is wrong with the pair and the remedy, or None if it is not known to break."""
    for broken_flax, first, end, instead in BROKEN:
        if parse(flax) == broken_flax and first <= parse(jax) and (end is None or parse(jax) < end):
            return f'flax {flax} does not work with jax {jax}; run: pip install "flax>={instead}"'
    return None


def installed(name: str, version: Callable[[str], str] = metadata.version) -> str:
    """The installed version of `name`; raises `MachineError` if there is none."""
    try:
        return version(name)
    except metadata.PackageNotFoundError:
        raise MachineError(f"{name} is not installed; run: pip install {name}") from None


def check(version: Callable[[str], str] = metadata.version) -> None:
    """Raises `MachineError` if jax or flax is missing or the pair is known to break."""
    found = problem(installed("jax", version), installed("flax", version))
    if found:
        raise MachineError(found)
