"""What an experiment costs in keys, bytes, parameters and operations, before anything of it is allocated.

Every figure is counted from the shapes of the real step, traced abstractly, and stands beside its closed formula.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from flax import nnx

from packforcing_jax.config import DtypeConfig, Experiment
from packforcing_jax.errors import require
from packforcing_jax.memory import layout as layouts
from packforcing_jax.networks import codec, text
from packforcing_jax.plan import formulas, jaxpr_cost, memory_fit, programs
from packforcing_jax.plan.programs import Shapes, Traced
from packforcing_jax.sampling import block_step, player, snapshots

UNITS = {
    "keys": "keys",
    "last block": "count",
    "bytes": "bytes",
    "held": "bytes",
    "snapshots": "bytes",
    "weights": "bytes",
    "workspace": "bytes",
    "compiled": "bytes",
    "peak": "bytes",
    "parameters": "numbers",
    "operations": "operations",
    "share": "share",
}
USES = {
    "temporary": "temporary",
    "results": "results",
    "arguments": "arguments",
    "reused": "laid into arguments",
}


@dataclass(frozen=True)
class Row:
    """One figure as counted; `formula` is what it has to be by `terms`, None where there is no closed form."""

    name: str
    counted: float
    formula: float | None
    unit: str
    terms: str

    @property
    def ok(self) -> bool:
        return self.formula is None or self.counted == self.formula


@dataclass(frozen=True)
class Budget:
    """All figures of `blocks` blocks of `batch` videos, and how much memory each phase takes."""

    experiment: Experiment
    blocks: int
    batch: int
    compiled: bool
    rows: dict[str, Row]
    peaks: memory_fit.Peaks

    @property
    def wrong(self) -> list[Row]:
        """The figures that are not what their formulas say."""
        return [row for row in self.rows.values() if not row.ok]


def of(
    exp: Experiment,
    blocks: int,
    *,
    batch: int = 1,
    dtype: str | None = None,
    compiled: bool = False,
) -> Budget:
    """The budget of a video of `blocks` blocks; `dtype` stands for all of the experiment's.

    `compiled`: the peaks are those of programs compiled here, not estimated from traced ones for a GPU.
    """
    require(blocks > 0, f"blocks={blocks} is no video; give at least 1.")
    require(batch > 0, f"batch={batch} is no video; give at least 1.")
    if dtype is not None:
        exp = dataclasses.replace(
            exp, dtypes=DtypeConfig(*[dtype] * len(dataclasses.fields(DtypeConfig)))
        )
    shapes = programs.shapes_of(exp, batch)
    uses = programs.compiled(exp, batch) if compiled else memory_fit.estimated(exp, batch)
    peaks = memory_fit.peaks(exp, batch, uses)
    counted = count(exp, shapes, programs.trace(exp, shapes), blocks) | _peaks(peaks)
    if compiled:
        counted |= {
            f"compiled/{name}, {label}": getattr(use, field)
            for name, use in uses.items()
            for field, label in USES.items()
        }
    want = formulas.closed(exp, blocks=blocks, batch=batch)
    rows = {
        name: Row(
            name,
            figure,
            want.get(name),
            UNITS[name.partition("/")[0]],
            formulas.TERMS.get(name, ""),
        )
        for name, figure in counted.items()
    }
    return Budget(exp, blocks, batch, compiled, rows, peaks)


# Counting


def count(exp: Experiment, shapes: Shapes, traced: Traced, blocks: int) -> dict[str, float]:
    """Every figure by name, read off the shapes and the programs."""
    keys = _keys(exp, shapes, traced)
    layout = layouts.layout(exp.cache, layouts.begin(blocks - 1))
    if exp.cache.joint:  # the last window of a video holds its last block alone
        layout = layouts.joint(exp.cache, layouts.begin(blocks - 1), exp.cache.block)
    last = {
        "last block/packed blocks it chooses from": int((layout.ids >= 0).sum()),
        "last block/packed blocks it attends": int(layout.num_selected),
        "last block/keys it attends": int(layouts.length(exp.memory, layout)),
    }
    views = jaxpr_cost.nbytes([layer.view for layer in shapes.layers])
    archive = jaxpr_cost.nbytes([layer.packed for layer in shapes.layers])
    each = views // shapes.view[1]
    one = archive // max(exp.cache.slots, 1)
    stored = {
        "bytes/cached": keys["keys/cached"] * each,
        "bytes/attended": keys["keys/attended"] * each,
        "bytes/one packed block": one,
        "bytes/archive of the last block": one * last["last block/packed blocks it chooses from"],
        "bytes/every block at full size": shapes.latent.shape[1]
        * exp.tokens_per_frame
        * each
        * blocks,
    }
    return (
        keys
        | last
        | stored
        | resident(exp, shapes)
        | _snapshots(exp, shapes)
        | _weights(exp, shapes)
        | _workspace(exp, shapes)
        | _operations(exp, shapes, traced, keys)
    )


def full_position(exp: Experiment) -> int:
    """The number of a block behind which nothing is empty any more: sink, recent frames and the whole archive.

    Where a full window is compressed, the number of a block that attends to as much as any.
    """
    cfg = exp.cache
    if cfg.budget:  # right before a compression, the first one or a later one
        fit, more = (size // cfg.block for size in (cfg.full_frames, cfg.full_frames - cfg.budget))
        longer = cfg.budget + more * cfg.block > fit * cfg.block
        return fit + more if longer else fit - 1
    return -(-(cfg.sink + cfg.held) // cfg.block) + cfg.capacity


def _keys(exp: Experiment, shapes: Shapes, traced: Traced) -> dict[str, int]:
    """Keys that one layer of one video attends to, by partition.

    Those of sink and recent frames lie where commits left them, the others are laid down for each block.
    """
    full = layouts.denoising(exp.cache, layouts.begin(full_position(exp)))
    whole = shapes.view
    room = exp.memory.denoised_in
    parts = {
        "keys/sink": int(full.sink) * exp.tokens_per_frame,
        "keys/packed": sum(jaxpr_cost.writes(traced.lay, whole)) // 2,  # keys, then values
        "keys/recent": int(full.chosen + full.recent) * exp.tokens_per_frame,
    }
    written = jaxpr_cost.writes(traced.step, (whole[0], room, *whole[2:]))
    current = sum(written) // (2 * exp.dit.layers)
    if exp.cache.joint:  # its view is laid down with the recent frames
        current -= (exp.cache.held - exp.cache.sink) * exp.tokens_per_frame
    cached = sum(parts.values())
    own_packed = traced.packed.out_avals[0].shape[1] if traced.packed else 0
    return parts | {
        "keys/cached": cached,
        "keys/current": current,
        "keys/attended": cached + current,
        "keys/packed twin": own_packed,
        "keys/room": room,
    }


def resident(exp: Experiment, shapes: Shapes) -> dict[str, int]:
    """Bytes that lie there from the first block to the last, however long the video is."""
    layers = shapes.layers
    nets = (shapes.nets, shapes.vae)
    views = [layer.view for layer in layers]
    archive = [layer.packed for layer in layers]
    unrotated = [(layer.sink, layer.recent) for layer in layers]
    trees = {
        "weights": nets,
        "views": views,
        "archive": archive,
        "un-rotated keys": unrotated,
        "keys and values": (views, archive, unrotated),
        "recent latents": shapes.memory.latents,
        "text_kv": shapes.text_kv,
        "decoder": shapes.decoder,
    }
    host = jaxpr_cost.nbytes(archive) if exp.cache.archive == "host" else 0
    some = {"blocks in the window": shapes.window} if exp.cache.joint else {}
    if exp.cache.asking_blocks:
        some["recent queries"] = [layer.queries for layer in layers]
    if exp.cache.budget:
        some["what is known of tokens"] = [layer.tokens for layer in layers]
    every = jaxpr_cost.nbytes((nets, shapes.memory, shapes.text_kv, shapes.decoder, shapes.window))
    totals = {"held/on the device": every - host, "held/on the host": host}
    held = trees | some
    return {f"held/{name}": jaxpr_cost.nbytes(tree) for name, tree in held.items()} | totals


class _Model(NamedTuple):
    """What `player` needs of a model, as shapes."""

    experiment: Experiment
    nets: block_step.Nets
    vae: codec.Codec


def _snapshots(exp: Experiment, shapes: Shapes) -> dict[str, int]:
    """Bytes of the states that a session can go back to: copies of all that is needed to go on, without scratch."""

    videos = shapes.latent.shape[0]
    one = jaxpr_cost.nbytes(player.abstract_state(_Model(exp, shapes.nets, shapes.vae), videos))
    return {
        "snapshots/one state": one,
        "snapshots/most of a session, by default": max(snapshots.FEW * one, snapshots.FREE),
    }


def _weights(exp: Experiment, shapes: Shapes) -> dict[str, int]:
    """Numbers in every network, and their bytes; the text encoder is read layer by layer and forgotten."""
    encoder = programs.forms(lambda: text.UMT5(exp.text, nnx.Rngs(0)), exp.dtypes.text)
    layer = programs.encoder_layer(exp.text, exp.dtypes.text)
    modules = {
        "transformer": shapes.nets.dit,
        "compressor": shapes.nets.compressor,
        "codec": shapes.vae,
    }
    counts = {f"parameters/{name}": jaxpr_cost.count(module) for name, module in modules.items()}
    counts["parameters/text encoder"] = jaxpr_cost.count(encoder)
    return (
        counts
        | {f"weights/{name}": jaxpr_cost.nbytes(module) for name, module in modules.items()}
        | {
            "weights/text encoder, on disk alone": jaxpr_cost.nbytes(encoder),
            "weights/of it while prompts are read": 2 * jaxpr_cost.nbytes(layer),
            "weights/text states of one prompt": jaxpr_cost.nbytes(
                programs.states_of(exp.text, exp.dtypes.text)[0]
            ),
        }
    )


def _workspace(exp: Experiment, shapes: Shapes) -> dict[str, int]:
    """Bytes that each program takes beside its arguments and results, as estimated from its trace."""
    return {
        f"workspace/{name}": size
        for name, size in programs.workspace(exp, shapes.latent.shape[0]).items()
    }


def _peaks(peaks: memory_fit.Peaks) -> dict[str, int]:
    """Most bytes of each phase, and of all."""
    device = {f"peak/{phase}": size for phase, size in peaks.device.items()}
    return device | {
        "peak/on the device": peaks.on_device,
        "peak/on the host": peaks.on_host,
        "peak/both, in one memory": peaks.together,
    }


def _operations(
    exp: Experiment, shapes: Shapes, traced: Traced, keys: dict[str, int]
) -> dict[str, float]:
    """Operations of one block, and what share of them the choice of packed blocks takes."""
    step = jaxpr_cost.operations(traced.step)
    steps = 1 if exp.cache.joint else len(exp.sample.steps)
    batch, _, *heads = shapes.view
    attending = jaxpr_cost.operations(traced.step, on=(batch, exp.memory.denoised_in, *heads))
    denoising = jaxpr_cost.operations(traced.denoise)
    clean = jaxpr_cost.operations(traced.clean)
    packing = jaxpr_cost.operations(traced.packed) if traced.packed else 0
    committing = jaxpr_cost.operations(traced.choosing) if traced.choosing else clean
    selecting = denoising - steps * step + committing - clean
    whole = denoising + committing + packing
    return {
        "operations/one step": step,
        "operations/of it self-attention": attending,
        "operations/one step, keys attended": step
        - attending
        + attending // keys["keys/room"] * keys["keys/attended"],
        "operations/denoising": steps * step,
        "operations/selection": selecting,
        "operations/clean pass": clean,
        "operations/packing pass": packing,
        "operations/whole block": whole,
        "operations/decoding": jaxpr_cost.operations(traced.decode),
        "operations/low resolution for packing": jaxpr_cost.operations(traced.shrink)
        if traced.shrink
        else 0,
        "share/selection": selecting / whole,
    }
