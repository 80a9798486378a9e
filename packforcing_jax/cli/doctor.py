"""`packforcing doctor`: what works on this machine, and the remedy for what does not."""

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from typing import NamedTuple

from packforcing_jax import versions
from packforcing_jax.cli import common, failures

ENOUGH_DISK = 10**9  # bytes; an hour of the small model's video with room for a checkpoint


class Finding(NamedTuple):
    """What a check saw; `remedy` is what to do if not `ok`."""

    ok: bool
    detail: str
    remedy: str = ""


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def python() -> Finding:
    """Whether this Python is one we are tested on."""
    return Finding(
        (3, 11) <= sys.version_info[:2] <= (3, 12),
        f"{platform.python_version()} on {platform.platform()}",
        "use Python 3.11 or 3.12 (make setup PYTHON=/path/to/it)",
    )


def pair() -> Finding:
    """Whether the installed jax and flax work together."""
    jax = versions.installed("jax")
    flax = versions.installed("flax")
    problem = versions.problem(jax, flax)
    return Finding(problem is None, f"jax {jax}, flax {flax}", problem or "")


def devices() -> Finding:
    """What jax computes on."""
    return Finding(True, common.device_line())


def memory() -> Finding:
    """Memory of the host and of the first device."""
    import jax

    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return Finding(True, f"host {_gib(host)}" + (f", device {_gib(limit)} usable" if limit else ""))


def ffmpeg() -> Finding:
    """Whether videos can be written."""
    import imageio_ffmpeg

    from packforcing_jax.io import ffmpeg

    ffmpeg.require_encoder()
    return Finding(
        True,
        f"{imageio_ffmpeg.get_ffmpeg_version()} with {ffmpeg.ENCODER} at {ffmpeg.program()}",
    )


def weights() -> Finding:
    """Whether the model that ships is here and fits its config."""
    from packforcing_jax.sampling import pipeline

    loaded = pipeline.Pipeline.from_pretrained()
    return Finding(True, f"{loaded.experiment.name} loads")


def disk() -> Finding:
    """Room in the current folder."""
    free = shutil.disk_usage(".").free
    return Finding(
        free >= ENOUGH_DISK, f"{_gib(free)} free here", "free some space or work in another folder"
    )


def attention() -> Finding:
    """Which attention backends run here; the default one must."""
    from packforcing_jax.policies import attention as lib

    name, why = lib.default_backend()
    working = lib.working_backends()
    backends = ", ".join(f"{each} {result.splitlines()[0]}" for each, result in working.items())
    return Finding(
        working[name] == "ok",
        f"{name} is used ({why}); {backends}",
        "reinstall jax for this device",
    )


CHECKS: dict[str, tuple[Callable[[], Finding], str]] = {  # name: (check, remedy if it raises)
    "python": (python, ""),
    "jax and flax": (pair, "pip install jax flax"),
    "devices": (
        devices,
        "reinstall jax for this device, for example: pip install 'packforcing-jax[cuda13]'",
    ),
    "memory": (memory, "reinstall jax for this device"),
    "ffmpeg": (ffmpeg, "pip install 'imageio[ffmpeg]'"),
    "weights": (weights, "reinstall packforcing-jax"),
    "disk": (disk, "work in a folder that exists"),
    "attention": (attention, "reinstall jax for this device"),
}


def examine(check: Callable[[], Finding], remedy: str) -> Finding:
    """The finding of one check; a check that raises has failed."""
    try:
        return check()
    except Exception as error:
        told = failures.outcome(error)
        if told is not None:
            said, _, own = told[1].rpartition("; ")
            return Finding(False, said or told[1], own.rstrip(".") if said else remedy)
        return Finding(False, " ".join(f"{type(error).__name__}: {error}".split()), remedy)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Doctor takes no arguments of its own."""


def run(args: argparse.Namespace) -> int:
    """Prints every finding; 1 if any check failed."""
    findings = {name: examine(*row) for name, row in CHECKS.items()}
    failed = sum(not finding.ok for finding in findings.values())
    if args.json:
        rows = [{"name": name, **finding._asdict()} for name, finding in findings.items()]
        print(json.dumps({"checks": rows, "failed": failed}))
    else:
        for name, finding in findings.items():
            remedy = "" if finding.ok else f"; remedy: {finding.remedy}"
            print(f"{'ok  ' if finding.ok else 'FAIL'} {name}: {finding.detail}{remedy}")
        print(f"{len(findings)} checks, {failed} failed")
    return int(failed > 0)
