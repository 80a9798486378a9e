"""What an experiment costs in keys, bytes, parameters and operations, before anything of it is allocated.

Every figure is counted from the shapes of the real step, traced abstractly, and stands beside its closed formula.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from packforcing_jax import cache, codec, compressor, counting, dit, formulas, pipeline, sampler, text, view
from packforcing_jax.config import Experiment, require

UNITS = {"keys": "keys", "last block": "count", "bytes": "bytes", "held": "bytes", "workspace": "bytes",
         "parameters": "numbers", "operations": "operations", "share": "share"}  # fmt: skip


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
    """All figures of `blocks` blocks of `batch` videos with weights, keys and values of `dtype`."""

    experiment: Experiment
    blocks: int
    batch: int
    dtype: str
    rows: dict[str, Row]

    @property
    def wrong(self) -> list[Row]:
        """The figures that are not what their formulas say."""
        return [row for row in self.rows.values() if not row.ok]


def of(exp: Experiment, blocks: int, *, batch: int = 1, dtype: str = "bfloat16", compiled: bool = False) -> Budget:
    """The budget of a video of `blocks` blocks. `compiled`: also compile the step here and read its workspace."""
    require(blocks > 0, f"blocks={blocks} is no video; give at least 1.")
    require(batch > 0, f"batch={batch} is no video; give at least 1.")
    shapes = shapes_of(exp, batch, jnp.dtype(dtype))
    counted = count(exp, shapes, trace(exp, shapes), blocks) | (compile_here(exp, shapes) if compiled else {})
    want = formulas.closed(exp, blocks=blocks, batch=batch, itemsize=jnp.dtype(dtype).itemsize)
    rows = {name: Row(name, figure, want.get(name), UNITS[name.partition("/")[0]], formulas.TERMS.get(name, ""))
            for name, figure in counted.items()}  # fmt: skip
    return Budget(exp, blocks, batch, dtype, rows)


# The real step, traced on shapes


@dataclass(frozen=True)
class Shapes:
    """What a sampler holds between two blocks, and what comes into a block, as shapes."""

    nets: sampler.Nets
    text: text.UMT5
    pixels: Any
    decoder: Any
    memory: cache.Memory  # with all packed blocks, wherever they lie
    views: list
    words: Any
    chance: sampler.Chance
    latent: Any
    frames: Any
    low: Any

    @property
    def layers(self) -> list[cache.Layer]:
        assert isinstance(self.memory.layers, list)  # one by one, as in sampling
        return self.memory.layers


@dataclass(frozen=True)
class Traced:
    """The programs of one block."""

    lay: core.ClosedJaxpr  # of one layer's view
    step: core.ClosedJaxpr
    draw: core.ClosedJaxpr
    clean: core.ClosedJaxpr
    packed: core.ClosedJaxpr | None
    decode: core.ClosedJaxpr
    shrink: core.ClosedJaxpr


def _plain(exp: Experiment) -> Experiment:
    """`exp` as it is traced: attention written out, since fused kernels hide their products, the archive at hand."""
    return dataclasses.replace(exp, attention="reference", cache=dataclasses.replace(exp.cache, archive="device"))


def shapes_of(exp: Experiment, batch: int, dtype: Any) -> Shapes:
    """All shapes of `batch` videos; weights, keys and values are of `dtype`, noise is drawn in float32."""
    exp, of = _plain(exp), jax.eval_shape

    def weights(build: Callable[[], Any]) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), of(build))

    nets = weights(lambda: sampler.Nets(dit=dit.unrolled(dit.WanDiT(exp.dit, nnx.Rngs(0))),
                                        compressor=compressor.Compressor(exp, nnx.Rngs(0))))  # fmt: skip
    pixels = weights(lambda: codec.make(exp.codec, nnx.Rngs(0)))
    decoder = of(lambda pixels: codec.init_decoder(pixels, batch, *exp.latent), pixels)
    latent = jax.ShapeDtypeStruct((batch, exp.cache.block, *exp.latent, exp.dit.in_channels), jnp.float32)
    context = jax.ShapeDtypeStruct((batch, exp.dit.text_len, exp.dit.text_dim), dtype)
    frames = of(_decode, pixels, decoder, latent)[0]
    return Shapes(nets=nets, text=weights(lambda: text.UMT5(exp.text, nnx.Rngs(0))), pixels=pixels, decoder=decoder,
                  memory=of(lambda: cache.init(exp, batch, dtype)), views=of(lambda: view.scratch(exp, batch, dtype)),
                  words=of(dit.text_kv, nets.dit, context), latent=latent, frames=frames,
                  chance=of(lambda: sampler.chances(exp, 0, jnp.zeros(batch, jnp.uint32), jnp.int32(0))),
                  low=of(functools.partial(_shrink, exp), pixels, frames))  # fmt: skip


def trace(exp: Experiment, shapes: Shapes) -> Traced:
    """The real step's programs; nothing runs."""
    exp, n = _plain(exp), shapes.memory.num_blocks
    own = shapes.nets, shapes.latent, shapes.words, shapes.views, n

    def lay(layer, scratch, n):
        seen = cache.plan(exp.cache, n)
        looked = view.newest(exp, seen, shapes.latent.shape[0])
        return view.lay(exp, seen, layer, view.take(layer, looked), looked, scratch)

    def step(nets, latent, words, views, n):
        none = jnp.zeros(())
        return sampler.guess(nets, exp, cache.plan(exp.cache, n), latent, none, none, words, views)

    def clean(nets, latent, words, views, n):
        return sampler.read_clean(nets, exp, cache.plan(exp.cache, n), latent, words, views)

    def packed(nets, latent, words, views, n, low):
        return sampler.read_packed(nets, exp, cache.plan(exp.cache, n), latent, low, words, views)

    return Traced(
        lay=counting.trace(lay, shapes.layers[0], shapes.views[0], n), step=counting.trace(step, *own),
        clean=counting.trace(clean, *own),
        packed=counting.trace(packed, *own, shapes.low) if exp.cache.top else None,
        draw=counting.trace(functools.partial(_draw, exp), shapes.nets, shapes.memory, shapes.chance, shapes.words,
                            shapes.views),
        decode=counting.trace(_decode, shapes.pixels, shapes.decoder, shapes.latent),
        shrink=counting.trace(functools.partial(_shrink, exp), shapes.pixels, shapes.frames))  # fmt: skip


def _draw(exp: Experiment, nets: Any, memory: Any, chance: Any, words: Any, views: Any) -> sampler.Drawn:
    return sampler.draw(nets, exp, memory, chance=chance, text=words, views=views)


def _decode(pixels: Any, decoder: Any, latent: Any) -> Any:
    return codec.decode_chunk(pixels, decoder, latent, first=False)


def _shrink(exp: Experiment, pixels: Any, frames: Any) -> Any:
    return codec.low_resolution(pixels, frames, latents=exp.packed_grid[0], pool=exp.compressor.pool)


# Counting


def count(exp: Experiment, shapes: Shapes, traced: Traced, blocks: int) -> dict[str, float]:
    """Every figure by name, read off the shapes and the programs."""
    keys, seen = _keys(exp, shapes, traced), cache.plan(exp.cache, jnp.int32(blocks - 1))
    last = {"last block/packed blocks it chooses from": int((seen.ids >= 0).sum()),
            "last block/packed blocks it attends": int(seen.chosen),
            "last block/keys it attends": int(cache.length(exp, seen)) + keys["keys/current"]}  # fmt: skip
    each = counting.nbytes(shapes.views) // keys["keys/room"]
    one = counting.nbytes([layer.mid for layer in shapes.layers]) // max(exp.cache.slots, 1)
    stored = {"bytes/cached": keys["keys/cached"] * each, "bytes/attended": keys["keys/attended"] * each,
              "bytes/one packed block": one,
              "bytes/archive of the last block": one * last["last block/packed blocks it chooses from"],
              "bytes/every block at full size": keys["keys/current"] * each * blocks}  # fmt: skip
    return keys | last | stored | _held(exp, shapes) | _workspace(exp, shapes, traced) | _parameters(shapes) \
        | _operations(exp, shapes, traced, keys)  # fmt: skip


def _keys(exp: Experiment, shapes: Shapes, traced: Traced) -> dict[str, int]:
    """Keys that one layer of one video attends to, by partition, as they are laid into its view."""
    whole, names = shapes.views[0].k.shape, ("sink", "packed", "recent") if exp.cache.attended else ("sink", "recent")
    laid = dict(zip(names, counting.writes(traced.lay, whole)[::2], strict=True))  # a part's keys, then its values
    parts = {f"keys/{name}": laid.get(name, 0) for name in ("sink", "packed", "recent")}
    current = sum(counting.writes(traced.step, whole)) // (2 * exp.dit.layers)
    cached = sum(parts.values())
    twin = traced.packed.out_avals[0].shape[1] if traced.packed else 0
    return parts | {"keys/cached": cached, "keys/current": current, "keys/attended": cached + current,
                    "keys/packed twin": twin, "keys/room": whole[1]}  # fmt: skip


def _held(exp: Experiment, shapes: Shapes) -> dict[str, int]:
    """Bytes that lie there from the first block to the last, however long the video is."""
    layers, nets = shapes.layers, (shapes.nets, shapes.pixels)
    packed = [layer.mid for layer in layers]
    trees = {"sink": [layer.sink for layer in layers], "recent": [layer.recent for layer in layers],
             "packed blocks": packed, "views": shapes.views, "words": shapes.words, "decoder": shapes.decoder,
             "weights": nets, "text encoder": shapes.text}  # fmt: skip
    every = (shapes.memory, shapes.views, shapes.words, shapes.decoder, nets, shapes.text)
    host = counting.nbytes(packed) if exp.cache.archive == "host" else 0
    totals = {"held/on the device": counting.nbytes(every) - host, "held/on the host": host}
    return {f"held/{name}": counting.nbytes(tree) for name, tree in trees.items()} | totals


def _workspace(exp: Experiment, shapes: Shapes, traced: Traced) -> dict[str, int]:
    """Bytes of intermediate values at their peak, before fusion; views are filled in place.

    Fused attention keeps no array of all queries by all keys, attention written out a few.
    """
    whole, (batch, room, heads, _) = shapes.views[0].k.shape, shapes.views[0].k.shape
    logits = batch, heads, exp.cache.block * exp.tokens_per_frame, room
    return {"workspace/drawing, fused attention": counting.peak(traced.draw, besides=[whole, logits]),
            "workspace/drawing, attention written out": counting.peak(traced.draw, besides=[whole]),
            "workspace/decoding": counting.peak(traced.decode)}  # fmt: skip


def _parameters(shapes: Shapes) -> dict[str, int]:
    """Numbers in the weights of every network."""
    modules = {"transformer": shapes.nets.dit, "compressor": shapes.nets.compressor, "codec": shapes.pixels,
               "text encoder": shapes.text}  # fmt: skip
    return {f"parameters/{name}": counting.count(module) for name, module in modules.items()}


def _operations(exp: Experiment, shapes: Shapes, traced: Traced, keys: dict[str, int]) -> dict[str, float]:
    """Operations of one block, and what share of them the choice of packed blocks takes."""
    step, steps = counting.operations(traced.step), len(exp.sample.steps)
    attending = counting.operations(traced.step, on=shapes.views[0].k.shape)
    drawing, clean = counting.operations(traced.draw), counting.operations(traced.clean)
    packing = counting.operations(traced.packed) if traced.packed else 0
    selecting, whole = drawing - steps * step, drawing + clean + packing
    return {
        "operations/one step": step, "operations/of it self-attention": attending,
        "operations/one step, keys attended": step - attending + attending // keys["keys/room"] * keys["keys/attended"],
        "operations/denoising": steps * step, "operations/selection": selecting, "operations/clean pass": clean,
        "operations/packing pass": packing, "operations/whole block": whole,
        "operations/decoding": counting.operations(traced.decode),
        "operations/low resolution for packing": counting.operations(traced.shrink) if traced.packed else 0,
        "share/selection": selecting / whole,
    }  # fmt: skip


def compile_here(exp: Experiment, shapes: Shapes) -> dict[str, int]:
    """Bytes of workspace that the compiler of this machine reserves for drawing and for remembering a block."""
    exp = dataclasses.replace(exp, cache=dataclasses.replace(exp.cache, archive="device"))
    drawn = jax.eval_shape(functools.partial(_draw, exp), shapes.nets, shapes.memory, shapes.chance, shapes.words,
                           shapes.views)  # fmt: skip
    seed, videos = jax.ShapeDtypeStruct((), jnp.uint32), jax.ShapeDtypeStruct(shapes.latent.shape[:1], jnp.uint32)
    lowered = {
        "drawing": pipeline.draw_block.lower(shapes.nets, exp, shapes.memory, shapes.views, seed, videos, shapes.words),
        "remembering": pipeline.remember_block.lower(shapes.nets, exp, shapes.memory, shapes.views, shapes.latent,
                                                     shapes.low, drawn.looked, shapes.words),
    }  # fmt: skip
    found = {name: program.compile().memory_analysis() for name, program in lowered.items()}
    return {f"workspace/{name}, compiled here": each.temp_size_in_bytes for name, each in found.items() if each}
