"""What the verbs share: the experiment's flags, the start line, the progress display."""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO, TypeVar

from packforcing_jax import interrupts
from packforcing_jax.cli import compiling
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


def clock() -> float:
    """Seconds on a clock that stands still while jax compiles: the first block says little about the others."""
    return time.monotonic() - compiling.seconds()


def progress(
    items: Iterable[Item],
    *,
    name: str,
    unit: str,
    total: int | None = None,
    first: int = 0,
    note: Callable[[Item], str] = lambda item: "",
) -> Iterator[Item]:
    """`items` unchanged, shown as a bar with rate and time left on a terminal, as plain lines otherwise (stderr).

    Of a `total` the `first` were done earlier; `note` is shown of the latest item. What jax spends on compiling is left
    out of rate and times. Between two items a lost interruption is raised again.
    """
    total = len(items) if total is None and hasattr(items, "__len__") else total  # type: ignore[arg-type]
    if sys.stderr is None or not sys.stderr.isatty():
        yield from _lines(items, _Task(name, unit, total, first), note)
        return
    import tqdm

    with tqdm.tqdm(
        desc=name, unit=unit, total=total, initial=first, file=sys.stderr, dynamic_ncols=True
    ) as bar:
        compiled = compiling.seconds()
        for item in items:
            yield item
            interrupts.look()
            spent = compiling.seconds() - compiled
            compiled += spent
            bar.start_t += spent
            bar.last_print_t += spent
            bar.set_postfix_str(note(item), refresh=False)
            bar.update()


class _Task(NamedTuple):
    """What a line of progress is about; of `total`, if that is known, the `first` were done earlier."""

    name: str
    unit: str
    total: int | None
    first: int

    def line(self, made: int, seconds: float, note: str) -> str:
        rate = made / max(seconds, 1e-9)
        done = self.first + made
        count = f"{done}/{self.total}" if self.total else f"{done}"
        left = f", {duration((self.total - done) / rate)} left" if self.total else ""
        gone = f"{rate:.2f} {self.unit}/s, {duration(seconds)} gone{left}"
        return f"{self.name}: {count} {self.unit}, {gone}{note and ', '}{note}"


def _lines(items: Iterable[Item], task: _Task, note: Callable[[Item], str]) -> Iterator[Item]:
    start = printed = clock()
    made = 0
    told = ""
    for made, item in enumerate(items, start=1):
        yield item
        interrupts.look()
        now = clock()
        if now - printed >= SECONDS_BETWEEN_LINES or task.first + made == task.total:
            told = note(item)
            print(task.line(made, now - start, told), file=sys.stderr, flush=True)
            printed = now
    if task.total is None and made:
        whole = task._replace(total=task.first + made)
        print(whole.line(made, clock() - start, told), file=sys.stderr, flush=True)
