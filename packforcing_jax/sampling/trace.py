"""The diary of a run: what every layer recalled for every block, written while it goes, and read back."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from packforcing_jax.config import CacheConfig, Experiment
from packforcing_jax.errors import InputError, MachineError, require
from packforcing_jax.io import append_file
from packforcing_jax.policies import eviction, selection

VERSION = 2
LAYOUT = (
    "sink_position",
    "sink",
    "recent_position",
    "recent",
    "current_position",
    "block",
    "step",
    "num_selected",
)
BLOCK = {
    "block": int,
    "prompt": str,
    "latent": str,
    "sink_sum": int,
    "layout": dict,
    "layers": list,
}
LAYER = ("ids", "scores", "ages", "positions")
SAME_RUN = (
    "trace",
    "experiment",
    "cache",
    "layers",
    "seed",
)  # of the header, when a run is continued


@dataclass(frozen=True, eq=False)
class Layer:
    """The packed blocks one layer recalled: [count] each; a score or place that was not finite is nan."""

    ids: np.ndarray
    scores: np.ndarray
    ages: np.ndarray  # blocks since
    positions: np.ndarray  # of the first frames


@dataclass(frozen=True, eq=False)
class Block:
    """One finished block; `latent` is the hash of its latent, `sink_sum` the checksum of the sink behind it."""

    index: int
    prompt: str
    latent: str
    sink_sum: int
    layout: dict[str, float]
    layers: tuple[Layer, ...]


@dataclass(frozen=True, eq=False)
class Trace:
    """All finished blocks of one video; `note` says what was left out of the file."""

    header: dict[str, Any]
    cache: CacheConfig
    blocks: tuple[Block, ...]
    note: str = ""


def header(exp: Experiment, **settings: Any) -> dict[str, Any]:
    """The first line of a trace: the experiment, its memory, and the run's own `settings` (seed, prompts)."""
    return {
        "trace": VERSION,
        "experiment": exp.name,
        "cache": memory_settings(exp.cache),
        "layers": exp.dit.layers,
    } | settings


def memory_settings(cache: CacheConfig) -> dict[str, Any]:
    """The memory's settings as JSON holds them; a policy stands there by its name."""
    stored = {field.name: getattr(cache, field.name) for field in dataclasses.fields(cache)}
    return {name: getattr(value, "name", value) for name, value in stored.items()}


def _number(value: float) -> float | None:
    """`value` in the digits that give its float32 back, a whole number as it is; None unless finite."""
    if isinstance(value, int):
        return value
    return float(f"{value:.9g}") if math.isfinite(value) else None


def line(finished: Any) -> dict[str, Any]:
    """The line of one finished block (a `pipeline.Finished`): padding and values that are not finite stay out."""
    layers = []
    for ids, scores, positions in zip(
        finished.block_ids, finished.scores, finished.positions, strict=True
    ):
        valid = np.asarray(ids) >= 0
        selected = np.asarray(ids)[valid].tolist()
        layers.append(
            {
                "ids": selected,
                "scores": list(map(_number, np.asarray(scores)[valid].tolist())),
                "ages": [finished.index - id for id in selected],
                "positions": list(map(_number, np.asarray(positions)[valid].tolist())),
            }
        )
    return {
        "block": int(finished.index),
        "prompt": finished.prompt,
        "latent": hashlib.sha256(np.ascontiguousarray(finished.latent).tobytes()).hexdigest(),
        "sink_sum": int(finished.sink_sum),
        "layout": {name: _number(finished.layout[name]) for name in LAYOUT},
        "layers": layers,
    }


def check_writable(path) -> None:
    """Raises `InputError` unless a trace can be written at `path`; leaves nothing behind."""
    append_file.check_writable(path, "Trace")


def _check_same_run(path: Path, head: dict[str, Any], position: int) -> None:
    """Raises `InputError` unless the file holds `position` bytes of whole lines that a run like this one wrote."""
    remedy = "put that file back or start anew"
    size = path.stat().st_size if path.is_file() else 0
    require(
        size >= position,
        f"Trace {path} has {size} bytes, but {position} were written by the run to continue; "
        f"{remedy}.",
    )
    with path.open("rb") as file:
        first = file.readline()
        file.seek(position - 1)
        require(
            file.read(1) == b"\n",
            f"Trace {path} has no line that ends at byte {position}; {remedy}.",
        )
    line = _parsed(path, 1, first, _of_this_version)
    for name, value in json.loads(json.dumps(head)).items():
        require(
            name not in SAME_RUN or line.get(name) == value,
            f"Trace {path} is of another run ({name}={line.get(name)}, here {value}); {remedy}.",
        )


class Writer:
    """A growing trace, one line per block; a file already at `path` is replaced by the first `write`, not before.

    From a `position` of an earlier writer on it goes on with the file that is there, cut back to that byte.
    """

    def __init__(self, path, head: dict[str, Any], *, position: int = 0):
        require(position >= 0, f"Trace position {position} is negative; give 0 or more.")
        check_writable(path)
        self.path = Path(path)
        self.head = head
        if position > 0:
            _check_same_run(self.path, head, position)
        self._file = append_file.File(self.path, position)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def position(self) -> int:
        """Bytes written so far."""
        return self._file.size

    def write(self, finished: Any) -> None:
        """Appends one finished block; its line is in the file when this returns, and `position` behind it."""
        lines = [line(finished)] if self.position else [self.head, line(finished)]
        text = "".join(json.dumps(each, allow_nan=False) + "\n" for each in lines)
        try:
            self._file.append(text.encode())
        except OSError as error:
            raise self._failed(error) from error

    def sync(self) -> int:
        """The position, once everything up to it is on the disk itself."""
        try:
            self._file.sync()
        except OSError as error:
            raise self._failed(error) from error
        return self.position

    def _failed(self, error: OSError) -> MachineError:
        return MachineError(
            f"Writing trace {self.path} failed ({error.strerror}); what it holds is kept."
        )

    def close(self) -> None:
        """Ends the file; without a single line written there is none."""
        self._file.close()


def _parsed(path, number: int, text: bytes, make: Callable[[Any], Any]) -> Any:
    """`make` of the JSON in line `number`; `InputError` says what is wrong with it."""

    def refuse(constant: str):
        raise ValueError(f"holds {constant}, which is no number")

    try:
        try:
            line = json.loads(text.decode(), parse_constant=refuse)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError("is not JSON") from error
        return make(line)
    except (ValueError, OverflowError, InputError) as error:
        raise InputError(
            f"Trace {path}, line {number}: {str(error).rstrip('.')}; "
            "give a file written by sample --trace."
        ) from error


def _field(line: Any, name: str, kind: type) -> Any:
    """The value `name` of a JSON object, of type `kind`."""
    require(isinstance(line, dict), "is no JSON object")
    require(name in line, f"has no {name!r}")
    require(type(line[name]) is kind, f"{name!r} is no {kind.__name__}")
    return line[name]


def _of_this_version(line: Any) -> dict[str, Any]:
    """A header that has all that this version writes."""
    require(
        _field(line, "trace", int) == VERSION,
        f"is version {line['trace']}, but {VERSION} is read here",
    )
    _field(line, "experiment", str)
    require(_field(line, "layers", int) > 0, f"has {line['layers']} layers")
    other = set(_field(line, "cache", dict)) ^ {one.name for one in dataclasses.fields(CacheConfig)}
    require(
        not other, f"its cache settings differ from this version's in {', '.join(sorted(other))}"
    )
    return line


def _header(line: Any, known: CacheConfig | None) -> tuple[dict[str, Any], CacheConfig]:
    """A header and the settings of the memory in it: those `known`, with policies of their own, where they agree."""
    stored = _of_this_version(line)["cache"]
    fields = dataclasses.fields(CacheConfig)
    if known is not None:
        wanted = json.loads(json.dumps(memory_settings(known)))
        differing = sorted(name for name in wanted if wanted[name] != stored[name])
        require(
            not differing, f"--config has other settings of {', '.join(differing)} than the run"
        )
        return line, known
    values = {}
    for field in fields:
        value = _field(stored, field.name, type(json.loads(json.dumps(field.default))))
        values[field.name] = tuple(value) if isinstance(value, list) else value
    _require_known(stored)
    return line, CacheConfig(**values)


def _require_known(stored: Mapping[str, Any]) -> None:
    """Raises `InputError` where a policy is one of the run's own, of which a name says too little."""
    tables = {"selection": selection.SCORES, "eviction": eviction.EVICTIONS}
    for name, table in tables.items():
        require(
            stored[name] in table,
            f"cache.{name}={stored[name]!r} is a policy of the run's own; give the --config that the run was given",
        )


def _numbers(line: Any, name: str, kind: type) -> np.ndarray:
    """The list `name` as an array; a null, where numbers may have been infinite, is nan."""
    values = _field(line, name, list)
    allowed = (int,) if kind is int else (int, float, type(None))
    require(
        all(type(value) in allowed for value in values),
        f"{name!r} holds something that is no number",
    )
    return np.array(
        [np.nan if value is None else value for value in values],
        np.int64 if kind is int else np.float64,
    )


def _block(line: Any, layers: int) -> Block:
    """The finished block in one line."""
    index, prompt, latent, total, layout, rows = (
        _field(line, name, kind) for name, kind in BLOCK.items()
    )
    require(0 <= index < 2**31, f"is of block {index}, which no run reaches")
    require(len(rows) == layers, f"has {len(rows)} layers instead of {layers}")
    stored = []
    for row in rows:
        parts = [_numbers(row, name, int if name in ("ids", "ages") else float) for name in LAYER]
        require(len(set(map(len, parts))) == 1, f"a layer's {', '.join(LAYER)} differ in length")
        stored.append(Layer(*parts))
    missing = [name for name in LAYOUT if name not in layout]
    require(not missing, f"its layout has no {', '.join(missing)}")
    layout = {name: _numbers({name: [layout[name]]}, name, float).item() for name in LAYOUT}
    return Block(
        index=index,
        prompt=prompt,
        latent=latent,
        sink_sum=total,
        layout=layout,
        layers=tuple(stored),
    )


def _whole(data: bytes) -> tuple[list[bytes], str]:
    """The lines of a file, and a note if the last was cut off and is left out."""
    *lines, rest = data.split(b"\n")
    if not rest:
        return lines, ""
    try:
        json.loads(rest)
    except (ValueError, RecursionError):
        return lines, f"line {len(lines) + 1} was cut off and is left out"
    return [*lines, rest], ""


def read(path, known: CacheConfig | None = None) -> Trace:
    """The trace in a file. A last line that a killed run left unfinished is dropped, with a note.

    `known` are the run's settings of the memory, needed where it had a score or an eviction rule of its own.
    """
    path = Path(path)
    require(path.is_file(), f"Trace {path} is no file; check the path.")
    try:
        lines, note = _whole(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"Trace {path} cannot be read ({error.strerror}); check the path."
        ) from error
    first = lines[0] if lines else b""
    head, cache = _parsed(path, 1, first, lambda line: _header(line, known))
    blocks = tuple(
        _parsed(path, number, text, lambda line: _block(line, head["layers"]))
        for number, text in enumerate(lines[1:], start=2)
    )
    require(
        len(blocks) > 0,
        f"Trace {path} holds no finished block; give one of a run that finished some.",
    )
    return Trace(header=head, cache=cache, blocks=blocks, note=note)
