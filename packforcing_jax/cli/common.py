"""What the verbs share: the experiment's flags, the start line, the progress display."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, TypeVar

from packforcing_jax import interrupts
from packforcing_jax.errors import require, shown

if TYPE_CHECKING:
    from packforcing_jax.config import Experiment

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = (
    2.0  # plain progress lines come at most this often, so that a log stays readable
)


def load_experiment(config: str | Path, overrides: Sequence[str] = ()) -> "Experiment":
    """`config.loading.load_experiment`, which loads jax."""
    from packforcing_jax.config import loading

    return loading.load_experiment(config, overrides)


def add_experiment_arguments(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Adds `--config` and `--set`, read back as `args.config` and `args.overrides`."""
    note = f" (default: {default})" if default else ""
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=default,
        help=f"experiment: a Python file or a name in configs/{note}",
    )
    parser.add_argument(
        "--set",
        metavar="A.B=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="change one setting, such as cache.top=8; may be repeated",
    )


def require_model_folder(folder: str | Path | None) -> None:
    """Raises `InputError` if --weights names a file, such as weights that have to be converted first."""
    require(
        folder is None or not Path(folder).is_file(),
        f"--weights {folder} is a file, not a model folder; make one of it first: packforcing convert {folder} "
        "--out DIR.",
    )


def require_count(flag: str, value: int | None, least: int = 1, most: int = 10**6) -> None:
    """Raises `InputError` about a flag unless its number, if one is given, lies between bounds."""
    require(
        value is None or least <= value <= most,
        f"{flag} {shown(value)} is out of range; give a whole number from {least:,} to {most:,}.",
    )


def device_line() -> str:
    """The devices jax uses, such as `2 x NVIDIA H200 (gpu)`."""
    import jax

    devices = jax.devices()
    count = f"{len(devices)} x " if len(devices) > 1 else ""
    return f"{count}{devices[0].device_kind} ({devices[0].platform})"


def start_line(
    verb: str,
    *,
    experiment: "Experiment",
    dtype,
    attention: str,
    why: str,
    out: TextIO | None = None,
):
    """Prints on stderr what is about to run: experiment, device, dtype, attention backend really used and why."""
    import jax
    import jax.numpy as jnp

    require(
        attention != "cudnn" or jax.default_backend() == "gpu",
        f"attention=cudnn needs a GPU, and this is {jax.default_backend()}; set attention=auto.",
    )
    print(
        f"{verb}: {experiment.name} on {device_line()}, {jnp.dtype(dtype).name}, attention {attention} ({why})",
        file=out or sys.stderr,
        flush=True,
    )


def duration(seconds: float) -> str:
    """`75` as `1:15`, `3675` as `1:01:15`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def progress(
    items: Iterable[Item],
    *,
    name: str,
    unit: str,
    total: int | None = None,
    out: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Item]:
    """`items` unchanged, shown as a bar with rate and time left on a terminal, as plain lines otherwise (stderr).

    Between two items a lost interruption is raised again.
    """
    out = out or sys.stderr
    total = len(items) if total is None and hasattr(items, "__len__") else total  # type: ignore[arg-type]
    if out is None or not out.isatty():
        yield from _lines(items, name, unit, total, out, clock)
        return
    import tqdm

    with tqdm.tqdm(items, desc=name, unit=unit, total=total, file=out, dynamic_ncols=True) as bar:
        for item in bar:
            yield item
            interrupts.look()


def _lines(items, name, unit, total, out, clock):
    start = printed = clock()
    done = 0
    for done, item in enumerate(items, start=1):
        yield item
        interrupts.look()
        now = clock()
        if now - printed >= SECONDS_BETWEEN_LINES or done == total:
            print(_line(name, unit, done, total, now - start), file=out, flush=True)
            printed = now
    if total is None and done:
        print(_line(name, unit, done, done, clock() - start), file=out, flush=True)


def _line(name: str, unit: str, done: int, total: int | None, seconds: float) -> str:
    rate = done / max(seconds, 1e-9)
    count = f"{done}/{total}" if total else f"{done}"
    left = f", {duration((total - done) / rate)} left" if total else ""
    return f"{name}: {count} {unit}, {rate:.2f} {unit}/s, {duration(seconds)} gone{left}"
