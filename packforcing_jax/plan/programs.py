"""The programs that sampling runs, on shapes alone: what they are given, traced, and compiled; nothing is allocated."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from packforcing_jax import pytrees
from packforcing_jax.config import (
    CacheConfig,
    DtypeConfig,
    Experiment,
    SampleConfig,
    TextConfig,
    TrainConfig,
)
from packforcing_jax.io import text_encoder
from packforcing_jax.memory import cache, view
from packforcing_jax.networks import codec, compressor, dit, text
from packforcing_jax.plan import formulas, jaxpr_cost
from packforcing_jax.sampling import block_step, host_archive, pipeline
from packforcing_jax.types import KV

ENCODING, PROMPT, DRAWING, SHOWING, REMEMBERING = (
    "a layer of the text encoder",
    "a prompt's keys and values",
    "drawing",
    "showing",
    "remembering",
)
FUSED, WRITTEN = "fused attention", "attention written out"


def forms(build: Callable[[], Any], dtype: str) -> Any:
    """Shapes of what `build` makes, its floating leaves as `dtype`."""
    return jax.eval_shape(lambda: pytrees.cast(build(), dtype))


@dataclass(frozen=True)
class Shapes:
    """What a sampler holds between two blocks, and what comes into a block, as shapes."""

    nets: block_step.Nets
    computed: block_step.Nets  # as they are computed with
    pixels: Any
    decoder: Any
    memory: cache.Memory  # with all packed blocks, wherever they lie
    views: list[KV]
    context: Any  # text states
    words: Any
    chance: block_step.Chance
    latent: Any
    frames: Any
    low: Any
    looked: cache.Looked  # of one layer

    @property
    def layers(self) -> list[cache.Layer]:
        assert isinstance(self.memory.layers, list)  # one by one, as in sampling
        return self.memory.layers


def plain(exp: Experiment) -> Experiment:
    """`exp` as it is traced: attention written out, since fused kernels hide their products, the archive at hand."""
    return dataclasses.replace(
        exp, attention="reference", cache=dataclasses.replace(exp.cache, archive="device")
    )


def shapes_of(exp: Experiment, batch: int = 1) -> Shapes:
    """All shapes of `batch` videos in the dtypes of the experiment."""
    exp, of, dtypes = plain(exp), jax.eval_shape, exp.dtypes
    nets = nets_of(visible(exp), exp.dit.layers, dtypes.params)
    pixels, decoder = codec_of(exp.codec, exp.latent, batch, dtypes.vae)
    latent = latent_of(exp, batch)
    context = jax.ShapeDtypeStruct((batch, exp.dit.text_len, exp.dit.text_dim), dtypes.text)
    frames, low = shown_of(exp, batch)
    return Shapes(
        nets=nets,
        computed=of(lambda nets: pytrees.cast(nets, dtypes.compute), nets),
        pixels=pixels,
        decoder=decoder,
        memory=of(lambda: cache.init(exp, batch, jnp.dtype(dtypes.cache))),
        views=of(lambda: view.scratch(exp, batch, jnp.dtype(dtypes.cache))),
        context=context,
        words=of(lambda model, states: pipeline.read_prompt(model, exp, states), nets.dit, context),
        chance=of(lambda: block_step.chances(exp, 0, jnp.zeros(batch, jnp.uint32), jnp.int32(0))),
        latent=latent,
        frames=frames,
        low=low,
        looked=of(lambda: view.newest(exp, cache.plan(exp.cache, jnp.int32(0)), batch)),
    )


@functools.cache
def nets_of(exp: Experiment, layers: int, dtype: str) -> block_step.Nets:
    """Shapes of the trained parts, with so many layers one by one."""
    deep = dataclasses.replace(exp.dit, layers=layers)
    return forms(
        lambda: block_step.Nets(
            dit=dit.unrolled(dit.WanDiT(deep, nnx.Rngs(0))),
            compressor=compressor.Compressor(exp, nnx.Rngs(0)),
        ),
        dtype,
    )


@functools.cache
def codec_of(cfg: codec.Config, latent: tuple[int, int], batch: int, dtype: str) -> tuple[Any, Any]:
    """Shapes of a codec and of its decoder's state."""
    pixels = jax.eval_shape(lambda pixels: pytrees.cast(pixels, dtype), codec.shapes(cfg))
    return pixels, jax.eval_shape(lambda pixels: codec.init_decoder(pixels, batch, *latent), pixels)


def latent_of(exp: Experiment, batch: int) -> jax.ShapeDtypeStruct:
    """Shape of a block; noise is drawn in float32 and the dtype stays."""
    return jax.ShapeDtypeStruct(
        (batch, exp.cache.block, *exp.latent, exp.dit.in_channels), jnp.float32
    )


def shown_of(exp: Experiment, batch: int) -> tuple[Any, Any]:
    """Shapes of a block's frames and of their low-resolution latents."""
    return _shown_of(visible(exp), batch)


@functools.cache
def _shown_of(exp: Experiment, batch: int) -> tuple[Any, Any]:
    own = *codec_of(exp.codec, exp.latent, batch, exp.dtypes.vae), latent_of(exp, batch)
    return jax.eval_shape(functools.partial(_show, exp), *own)[:2]


@functools.cache
def encoder_layer(cfg: TextConfig, dtype: str) -> text.Block:
    """Shapes of one layer of the text encoder."""
    return forms(lambda: text.Block(cfg, nnx.Rngs(0)), dtype)


# Traced


@dataclass(frozen=True)
class Traced:
    """The programs of one block; `packed` is None where nothing is packed."""

    lay: core.ClosedJaxpr  # of one layer's view
    step: core.ClosedJaxpr
    draw: core.ClosedJaxpr
    clean: core.ClosedJaxpr
    packed: core.ClosedJaxpr | None
    decode: core.ClosedJaxpr
    shrink: core.ClosedJaxpr


def trace(exp: Experiment, shapes: Shapes) -> Traced:
    """The parts of the real step whose operations are counted."""
    exp, n = plain(exp), shapes.memory.num_blocks
    own = shapes.computed, shapes.latent, shapes.words, shapes.views, n

    def lay(layer, scratch, n):
        seen = cache.plan(exp.cache, n)
        looked = view.newest(exp, seen, shapes.latent.shape[0])
        return view.lay(exp, seen, layer, view.take(layer, looked), looked, scratch)

    def step(nets, latent, words, views, n):
        none = jnp.zeros(())
        return block_step.guess(
            nets, exp, cache.plan(exp.cache, n), latent, none, none, words, views
        )

    def clean(nets, latent, words, views, n):
        return block_step.read_clean(nets, exp, cache.plan(exp.cache, n), latent, words, views)

    def packed(nets, latent, words, views, n, low):
        return block_step.read_packed(
            nets, exp, cache.plan(exp.cache, n), latent, low, words, views
        )

    return Traced(
        lay=jaxpr_cost.trace(lay, shapes.layers[0], shapes.views[0], n),
        step=jaxpr_cost.trace(step, *own),
        clean=jaxpr_cost.trace(clean, *own),
        packed=jaxpr_cost.trace(packed, *own, shapes.low) if exp.cache.top else None,
        draw=jaxpr_cost.trace(
            functools.partial(_draw, exp),
            shapes.computed,
            shapes.memory,
            shapes.chance,
            shapes.words,
            shapes.views,
        ),
        decode=jaxpr_cost.trace(_decode, shapes.pixels, shapes.decoder, shapes.latent),
        shrink=jaxpr_cost.trace(functools.partial(_shrink, exp), shapes.pixels, shapes.frames),
    )


def _draw(
    exp: Experiment, nets: Any, memory: Any, chance: Any, words: Any, views: Any
) -> block_step.Drawn:
    return block_step.draw(nets, exp, memory, chance=chance, text=words, views=views)


def _remember(
    exp: Experiment,
    nets: Any,
    memory: Any,
    latent: Any,
    low: Any,
    words: Any,
    views: Any,
    looked: Any,
) -> Any:
    drawn = block_step.Drawn(latent=latent, views=views, looked=[looked] * exp.dit.layers)
    return block_step.remember(nets, exp, memory, latent=latent, low=low, drawn=drawn, text=words)


def _decode(pixels: Any, decoder: Any, latent: Any) -> Any:
    return codec.decode_chunk(pixels, decoder, latent, first=False)


def _shrink(exp: Experiment, pixels: Any, frames: Any) -> Any:
    return codec.low_resolution(
        pixels, frames, latents=exp.packed_grid[0], pool=exp.compressor.pool
    )


def _show(exp: Experiment, pixels: Any, decoder: Any, latent: Any) -> Any:
    return pipeline.show_block(pixels, exp, decoder, latent, first=False)


# How much memory each takes while it runs, estimated from the traced programs


def workspace(exp: Experiment, batch: int = 1) -> dict[str, int]:
    """Bytes of intermediate values at their peak, by program, before compilers fuse anything.

    Stores and views are written in place. Fused attention keeps no array of all queries by all keys, attention
    written out a few. Weights that are not stored as they are computed with are cast in a program, all at once.
    """
    numbers, dtypes = formulas.parameters(exp), exp.dtypes
    nets = int(numbers["parameters/transformer"] + numbers["parameters/compressor"])
    cast = (dtypes.params != dtypes.compute) * nets * formulas.BYTES[dtypes.compute]
    block = {
        name: size + cast * (name != PROMPT)
        for name, size in _block_workspace(_essential(exp), batch).items()
    }
    return _text_workspace(exp.text, dtypes.text) | block | _show_workspace(visible(exp), batch)


def _essential(exp: Experiment) -> Experiment:
    """What decides about a block's own programs; of two layers, since the next one needs nothing of a layer's."""
    dtypes = dataclasses.replace(exp.dtypes, params=exp.dtypes.compute)
    return dataclasses.replace(
        plain(exp),
        name="",
        dit=dataclasses.replace(exp.dit, layers=min(exp.dit.layers, 2)),
        text=TextConfig(),
        dtypes=dtypes,
        train=TrainConfig(),
        fps=1,
        clip=1,
    )


def visible(exp: Experiment) -> Experiment:
    """What decides about showing a block, and about the sizes of networks."""
    cache = CacheConfig(block=exp.cache.block, sink=0, recent=0, top=0, capacity=0)
    dtypes = DtypeConfig(vae=exp.dtypes.vae)
    return dataclasses.replace(_essential(exp), cache=cache, sample=SampleConfig(), dtypes=dtypes)


@functools.cache
def _block_workspace(exp: Experiment, batch: int) -> dict[str, int]:
    held = shapes_of(exp, batch)
    whole, (_, room, heads, _) = held.views[0].k.shape, held.views[0].k.shape
    logits = [
        (batch, heads, exp.cache.block * exp.tokens_per_frame, keys)
        for keys in (room, exp.dit.text_len)
    ]
    stores = {leaf.shape for leaf in jax.tree.leaves(held.memory) if leaf.ndim == 5}
    given = held.computed, held.memory
    draw = jaxpr_cost.trace(
        functools.partial(_draw, exp), *given, held.chance, held.words, held.views
    )
    remember = jaxpr_cost.trace(
        functools.partial(_remember, exp),
        *given,
        held.latent,
        held.low,
        held.words,
        held.views,
        held.looked,
    )
    programs = {DRAWING: (draw, {whole}), REMEMBERING: (remember, {whole, *stores})}
    words, kinds = (
        jaxpr_cost.trace(dit.text_kv, held.computed.dit, held.context),
        {FUSED: logits, WRITTEN: []},
    )
    return {PROMPT: jaxpr_cost.peak(words, results=False)} | {
        f"{name}, {kind}": jaxpr_cost.peak(program, besides={*besides, *more}, results=False)
        for name, (program, besides) in programs.items()
        for kind, more in kinds.items()
    }


@functools.cache
def _show_workspace(exp: Experiment, batch: int) -> dict[str, int]:
    held = shapes_of(exp, batch)
    programs = {
        "decoding": jaxpr_cost.trace(_decode, held.pixels, held.decoder, held.latent),
        "low-resolution encode": jaxpr_cost.trace(
            functools.partial(_shrink, exp), held.pixels, held.frames
        ),
        SHOWING: jaxpr_cost.trace(
            functools.partial(_show, exp), held.pixels, held.decoder, held.latent
        ),
    }
    return {name: jaxpr_cost.peak(program, results=False) for name, program in programs.items()}


@functools.cache
def _text_workspace(cfg: TextConfig, dtype: str) -> dict[str, int]:
    program = jaxpr_cost.trace(
        functools.partial(text.layer, cfg=cfg), encoder_layer(cfg, dtype), *states_of(cfg, dtype)
    )
    return {ENCODING: jaxpr_cost.peak(program, results=False)}


def states_of(cfg: TextConfig, dtype: str) -> tuple[Any, Any]:
    """Shapes of the text states of one prompt, and of the mask of its words."""
    return (
        jax.ShapeDtypeStruct((1, cfg.max_words, cfg.dim), dtype),
        jax.ShapeDtypeStruct((1, cfg.max_words), jnp.bool_),
    )


# The same as the compiler of this machine says


@dataclass(frozen=True)
class Use:
    """Bytes of one run: temporary ones, results, arguments, and what of the results is laid into arguments."""

    temporary: int
    results: int
    arguments: int
    reused: int


def compiled(exp: Experiment, batch: int = 1) -> dict[str, Use]:
    """What this machine's compiler reserves for each program that sampling runs."""
    found = {
        name: lowered.compile().memory_analysis() for name, lowered in lowered_programs(exp, batch)
    }
    return {
        name: Use(
            temporary=each.temp_size_in_bytes,
            results=each.output_size_in_bytes,
            arguments=each.argument_size_in_bytes,
            reused=each.alias_size_in_bytes,
        )
        for name, each in found.items()
        if each
    }


def lowered_programs(exp: Experiment, batch: int = 1) -> Iterator[tuple[str, jax.stages.Lowered]]:
    """The real programs with what they are given, by name."""
    held = shapes_of(exp, batch)
    memory = jax.eval_shape(lambda: cache.init(exp, batch, jnp.dtype(exp.dtypes.cache)))
    layer, shown = (
        encoder_layer(exp.text, exp.dtypes.text),
        (held.pixels, exp, held.decoder, held.latent),
    )
    yield (
        ENCODING,
        text_encoder._layer.lower(layer, *states_of(exp.text, exp.dtypes.text), cfg=exp.text),
    )
    yield PROMPT, pipeline.read_prompt.lower(held.nets.dit, exp, held.context)
    yield from _lowered_drawing(exp, held, memory)
    yield f"{SHOWING} the first block", pipeline.show_block.lower(*shown, first=True)
    yield SHOWING, pipeline.show_block.lower(*shown, first=False)
    yield (
        REMEMBERING,
        pipeline.remember_block.lower(
            held.nets,
            exp,
            memory,
            held.views,
            held.latent,
            held.low,
            [held.looked] * exp.dit.layers,
            held.words,
        ),
    )


def _lowered_drawing(
    exp: Experiment, held: Shapes, memory: cache.Memory
) -> Iterator[tuple[str, jax.stages.Lowered]]:
    """Drawing is one program, or three where packed blocks come from the host."""
    number = (
        jax.ShapeDtypeStruct((), jnp.uint32),
        jax.ShapeDtypeStruct(held.latent.shape[:1], jnp.uint32),
    )
    if exp.cache.archive == "device":
        yield (
            DRAWING,
            pipeline.draw_block.lower(held.nets, exp, memory, held.views, *number, held.words),
        )
        return
    picked = [jax.eval_shape(view.take, layer, held.looked) for layer in held.layers]
    own = held.nets, exp, memory, held.chance, held.words, held.views
    clean, _, asked = jax.eval_shape(
        functools.partial(host_archive._glance, exp=exp),
        held.nets,
        memory=memory,
        chance=held.chance,
        text=held.words,
        views=held.views,
        picked=picked,
        looked=held.looked,
    )
    lots = jax.ShapeDtypeStruct(held.chance.lots.shape[1:], jnp.float32)
    yield f"{DRAWING}, the first step", host_archive._glance.lower(*own, picked, held.looked)
    yield (
        f"{DRAWING}, scoring a layer",
        host_archive._score.lower(
            exp, memory.num_blocks, memory.layers[0], held.layers[0].mid.k, asked[0], lots
        ),
    )
    yield (
        f"{DRAWING}, the other steps",
        host_archive._conclude.lower(*own, clean, picked, held.looked),
    )
