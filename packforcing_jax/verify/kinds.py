"""Holds the networks against files of reference numbers: convert their weights, run the part named, compare outputs.

A file has `weights/`, `inputs/` and `outputs/` and says in its metadata what it is about (`fixture`) and at which
sizes (`config`). What is computed never sees the outputs, only their names; they are read again for the comparison.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import jax
import numpy as np
import safetensors
from safetensors import SafetensorError

from packforcing_jax import methods as published
from packforcing_jax.errors import InputError, MachineError
from packforcing_jax.verify import methods, parts, reselection, training, transformer
from packforcing_jax.verify.parts import Fixture, Outputs

Expected: TypeAlias = Mapping[str, np.ndarray]
Archive: TypeAlias = safetensors.safe_open


@dataclass(frozen=True)
class Case:
    """How the outputs of one kind of file are computed, and how far they may be from the expected ones."""

    run: Callable[[Fixture], Outputs]
    tolerance: float = 2e-5  # float32 against float64 of the same network differs by up to 4e-6
    derived: float | None = None  # of losses and gradients, where it is another

    def allowed(self, output: str) -> float:
        """The tolerance of an output by its name."""
        return (
            self.tolerance
            if self.derived is None or not re.search("grad|loss", output)
            else self.derived
        )


CASES = {
    "scheduler": Case(parts.scheduler, 2e-6),
    "unipc_solver": Case(parts.unipc_solver, 5e-5),
    "umt5_tiny": Case(parts.umt5_tiny, 5e-5),
    "vae_tiny": Case(parts.vae_original),
    "vae_realflags": Case(parts.vae_original),
    "diffusers_vae_tiny": Case(parts.vae_diffusers),
    "wan_dit_tiny": Case(transformer.wan_dit_original),
    "wan_dit_headdim128": Case(transformer.wan_dit_original),
    "diffusers_wan_dit_tiny": Case(transformer.wan_dit_diffusers),
    "causal_dit_blockmask": Case(transformer.causal_dit_blockmask),
    "causal_dit_kvcache": Case(transformer.causal_dit_kvcache),
    "causal_dit_kvcache_rolling": Case(transformer.causal_dit_kvcache),
    "causal_rollout": Case(transformer.causal_rollout, 5e-5),  # errors add up over blocks
    **{
        f"method_{method.name.replace('-', '_')}": Case(partial(methods.sink_and_window, method))
        for method in (
            published.LONGLIVE,
            published.LONGLIVE_INFINITY,
            published.INFINITE_FORCING,
            published.REWARD_FORCING,
        )
    },
    "method_self_forcing_rolling": Case(partial(methods.sink_and_window, published.SELF_FORCING)),
    "method_rolling_forcing": Case(methods.rolling_forcing, 5e-5),
    "method_causal_forcing_longvideo": Case(methods.rolling_forcing, 5e-5),
    "method_deep_forcing": Case(methods.deep_forcing),
    "method_packforcing_unofficial": Case(reselection.rollouts),
    "method_packforcing_unofficial_compressor": Case(reselection.compressed),
    "method_packforcing_unofficial_scores": Case(reselection.scores),
    "method_causvid": Case(methods.causvid, 5e-5),
    "method_causal_forcing_chunkwise": Case(methods.causal_forcing, 5e-5),
    "method_causal_forcing_framewise": Case(methods.causal_forcing, 5e-5),
    "method_packforcing_unofficial_train_rollout": Case(reselection.training, 5e-5, derived=2e-4),
    "dmd_math": Case(training.dmd_math, 5e-5, derived=2e-4),
    "self_forcing_train_rollout": Case(training.self_forcing_train_rollout, 5e-5, derived=2e-4),
}
LAYOUT = r"^(.*\.)?layout\."  # tensors that together say whom each call of a run sees
COMMIT = 1  # in the second column of a layout's calls
PLACE, SHARE = 1e-3, 1e-5  # how far positions and shares of a mixed key may be off
UNKNOWN = Case(lambda fixture: {}, 0.0)


@dataclass(frozen=True)
class Row:
    """One compared output: the largest difference over the largest expected value, infinite if it was not computed."""

    file: str
    output: str
    error: float
    tolerance: float
    ok: bool


def _names(archive: Archive, prefix: str) -> tuple[str, ...]:
    """Names of the tensors that start with `prefix`, without it."""
    names = sorted(archive.keys())
    return tuple(name.removeprefix(prefix) for name in names if name.startswith(prefix))


def _under(archive: Archive, prefix: str) -> dict[str, np.ndarray]:
    return {name: archive.get_tensor(prefix + name) for name in _names(archive, prefix)}


def _open(path: str | PathLike[str]) -> Archive:
    """The safetensors file at `path`; one that cannot be read is an `InputError`."""
    if not Path(path).is_file():
        raise InputError(f"{path} is not a file; give safetensors files of reference numbers.")
    try:
        return safetensors.safe_open(str(path), framework="np")
    except (SafetensorError, OSError) as reason:
        raise InputError(
            f"{path} is not a readable safetensors file ({reason}); get it again."
        ) from reason


def _meta(path: str | PathLike[str], archive: Archive) -> dict[str, Any]:
    """The metadata that says what `path` is about."""
    try:
        meta = json.loads((archive.metadata() or {})["meta"])
        if not (isinstance(meta["fixture"], str) and isinstance(meta["config"], dict)):
            raise TypeError("fixture is a name and config a mapping")
    except (KeyError, TypeError, ValueError) as reason:
        raise InputError(
            f"{path} does not say what it is about: its metadata needs `meta`, JSON with `fixture` and "
            "`config`."
        ) from reason
    return meta


def read(path: str | PathLike[str]) -> Fixture:
    """What the file asks to compute: everything but the values under `outputs/`."""
    with _open(path) as archive:
        meta = _meta(path, archive)
        wanted = _names(archive, "outputs/")
        if not wanted:
            raise InputError(f"{path} has no tensor under outputs/; there is nothing to verify.")
        try:
            weights = _under(archive, "weights/") | _under(
                archive, "weights."
            )  # weights.real/x is named real/x
            inputs = _under(archive, "inputs/")
        except (SafetensorError, TypeError) as reason:
            raise InputError(
                f"{path} has tensors that cannot be read ({reason}); store them as float32."
            ) from reason
    return Fixture(
        kind=meta["fixture"],
        config=meta["config"],
        weights=weights,
        inputs=inputs,
        wanted=wanted,
        variants=meta.get("variants") or {},
    )


def expected(path: str | PathLike[str]) -> Expected:
    """The values under `outputs/`, for the comparison alone."""
    with _open(path) as archive:
        return _under(archive, "outputs/")


def compute(fixture: Fixture) -> Outputs:
    """Our outputs by name, in float32; none if the kind is unknown or the computation fails, with the reason logged."""
    if fixture.kind not in CASES:
        logging.error(
            "nothing is known of files of kind %r; known kinds: %s", fixture.kind, ", ".join(CASES)
        )
    try:
        with jax.default_matmul_precision("highest"):
            return jax.block_until_ready(CASES.get(fixture.kind, UNKNOWN).run(fixture))
    except (MachineError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as reason:  # noqa: BLE001  whatever stops the computation is a failed check, and the next file runs
        logging.error("%s was not computed: %s", fixture.kind, reason)
        return {}


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """max|ours - theirs| / max|theirs|; infinite where shapes differ or a value is not finite."""
    if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return math.inf
    gap = np.abs(ours.astype(np.float64) - theirs.astype(np.float64)).max(initial=0.0)
    scale = np.abs(theirs.astype(np.float64)).max(initial=0.0)
    return 0.0 if gap == 0 else float(gap / scale) if scale > 0 else math.inf


def layout_difference(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> float:
    """How many calls differ in whom they see, where, and who made it; infinite if there are others.

    The order of keys does not matter. Positions are taken from the query's first and may differ by a thousandth.
    """
    if not set(theirs) <= set(ours):
        return math.inf
    if "call" not in theirs:
        return _token_difference(ours, theirs)
    rows = [_with_effect(each) for each in (ours, theirs)]
    if len(rows[0]) != len(rows[1]):
        return math.inf
    made_by = sorted(set(theirs) & {"key_prompt", "key_timestep", "query_timestep"})
    sights = [
        [_sights(each, row, made_by) for row in own]
        for each, own in zip((ours, theirs), rows, strict=True)
    ]
    return float(sum(not _same(*pair) for pair in zip(*sights, strict=True)))


def _token_difference(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> float:
    """How many passes differ in what a layer sees, and where: `<pass>.key_...` [block, layer, key] of tokens or blocks.

    As for calls the order of keys does not matter, and positions are taken from the query's first.
    """
    wrong = 0
    which = "key_index" if any("key_index" in name for name in theirs) else "key_block_id"
    for each in sorted(name.removesuffix(which) for name in theirs if which in name):
        names = sorted(parts.below(theirs, each))
        sights = [_token_sights(parts.below(side, each), which, names) for side in (ours, theirs)]
        if len({sight.shape[:2] for sight in sights}) > 1:
            return math.inf
        widest = max(sight.shape[2] for sight in sights)
        one, other = (
            np.pad(sight, ((0, 0), (0, 0), (0, widest - sight.shape[2]), (0, 0)))
            for sight in sights
        )
        wrong += int((np.abs(one - other) > PLACE).any(axis=(1, 2, 3)).sum())
    return float(wrong)


def _token_sights(sight: Mapping[str, np.ndarray], which: str, names: Sequence[str]) -> np.ndarray:
    """[block, layer, query frames and keys, (number, position, ...)] of one pass, keys in order and empty places last.

    Where a file has several passes side by side, [block, pass, layer, key], each is a row.
    `which` of the tensors `names` numbers what is seen.
    """
    which_shape = sight[which].shape
    sight = {
        name: value.reshape(-1, *which_shape[-2:]) if value.shape == which_shape else value
        for name, value in sight.items()
    }
    rows = len(sight[which])
    query = sight.get("query_frame", np.zeros((rows, 0)))
    query_pos = sight.get("query_pos", np.zeros((rows, 0)))
    origin = query_pos[:, :1] if query_pos.size else np.zeros((rows, 1))
    places = [name for name in names if name.startswith("key_pos")]
    others = [name for name in names if name.startswith("key_") and name not in (which, *places)]
    empty = sight[which] < 0
    columns = [
        sight[which],
        *(sight[name] - origin[:, :, None] for name in places),
        *(sight[name] for name in others),
    ]
    keys = np.stack([np.where(empty, np.inf, column) for column in columns], axis=-1)
    order = np.lexsort((keys[..., 1], keys[..., 0]), axis=-1)[..., None]
    keys = np.take_along_axis(keys, order, axis=2)
    keys = np.where(np.isinf(keys), 0, keys)
    queries = np.stack([query, query_pos - origin], axis=-1)
    queries = np.pad(queries, ((0, 0), (0, 0), (0, len(columns) - 2)))
    count = (~empty).sum(axis=-1)[..., None, None].repeat(len(columns), axis=-1)
    asked = np.broadcast_to(queries[:, None], (*empty.shape[:2], *queries.shape[1:]))
    return np.concatenate([count, asked, keys], axis=2)


def _with_effect(layout: Mapping[str, np.ndarray]) -> list[int]:
    """The calls of a layout, without commits whose frames another commit writes over before anyone reads them."""
    calls = layout["call"]
    rollouts = layout.get("rollout", np.zeros(len(calls)))
    frames = [(rollout, *call[1:3]) for rollout, call in zip(rollouts, calls, strict=True)]
    commits = {frame: row for row, frame in enumerate(frames) if frame[1] == COMMIT}
    return [row for row, frame in enumerate(frames) if commits.get(frame, row) == row]


def _same(
    one_call: tuple[np.ndarray, np.ndarray], other_call: tuple[np.ndarray, np.ndarray]
) -> bool:
    """Whether one call is the same on both sides."""
    (one, mix), (other, wanted) = one_call, other_call
    frames = wanted.shape[1]
    return (
        one.shape == other.shape
        and bool(np.abs(one - other).max() <= PLACE)
        and bool(np.abs(mix[:, :frames] - wanted).max(initial=0) <= SHARE)
    )


def _sights(
    layout: Mapping[str, np.ndarray], row: int, made_by: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of one call, of its queries and of its keys, these in order; and what each key is mixed of."""
    call = layout["call"][row].astype(float)
    queries, keys = int(call[3]), int(call[4])
    origin = layout["query_pos"][row][0]
    asked = [layout["query_frame"][row][:queries], layout["query_pos"][row][:queries] - origin]
    asked += [layout[name][row][:queries] for name in made_by if name.startswith("query")]
    seen = np.array(
        [
            layout["key_frame"][row][:keys],
            layout["key_pos"][row][:keys] - origin,
            *(layout[name][row][:keys] for name in made_by if name.startswith("key")),
        ],
        float,
    )
    order = np.lexsort(seen[::-1])
    mix = layout["key_mix"][row][order] if "key_mix" in layout else np.zeros((keys, 0))
    return np.concatenate([call, *asked, seen[:, order].ravel()]), mix


def compare(file: str, kind: str, ours: Outputs, theirs: Expected) -> list[Row]:
    """One row per expected output; integers must agree exactly, an output that was not computed fails."""
    runs = sorted({name[: at.end()] for name in theirs if (at := re.search(LAYOUT, name))})
    rows = [
        Row(file, run.removesuffix("."), error, 0.0, error <= 0)
        for run in runs
        for error in [layout_difference(parts.below(ours, run), parts.below(theirs, run))]
    ]
    for name, value in sorted(theirs.items()):
        if re.search(LAYOUT, name):
            continue
        exact = np.issubdtype(value.dtype, np.integer)
        tolerance = 0.0 if exact else CASES.get(kind, UNKNOWN).allowed(name)
        error = difference(np.asarray(ours[name]), value) if name in ours else math.inf
        rows.append(
            Row(file=file, output=name, error=error, tolerance=tolerance, ok=error <= tolerance)
        )
    return rows


def verify_each(paths: Sequence[str | PathLike[str]]) -> Iterator[list[Row]]:
    """The rows of one file after the other; all files are read first, so a bad one stops before anything runs."""
    fixtures = [(path, read(path)) for path in paths]
    for path, fixture in fixtures:
        yield compare(str(path), fixture.kind, compute(fixture), expected(path))


def verify(paths: Sequence[str | PathLike[str]]) -> list[Row]:
    """One row per output of every file."""
    return [row for rows in verify_each(paths) for row in rows]
