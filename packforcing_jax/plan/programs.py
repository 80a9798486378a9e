"""The programs that sampling runs, on shapes alone: what they are given, traced, and compiled; nothing is allocated."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from packforcing_jax import pytrees
from packforcing_jax.config import DiTConfig, Experiment, ModelConfig, StepConfig, TextConfig
from packforcing_jax.io import text_encoder
from packforcing_jax.memory import cache, view
from packforcing_jax.memory import layout as layouts
from packforcing_jax.memory.cache import LayerCache, Memory, Selection
from packforcing_jax.networks import base_model, codec, compressor, text
from packforcing_jax.plan import jaxpr_cost
from packforcing_jax.pytrees import PerLayer
from packforcing_jax.sampling import block_step, host_archive, player, reselection, rolling_window
from packforcing_jax.sampling.block_step import Denoiser, Nets
from packforcing_jax.sampling.schedules import NoiseLevel
from packforcing_jax.types import KV, Latent, Video

ENCODING = "a layer of the text encoder"
PROMPT = "a prompt's keys and values"
DENOISING = "denoising"
SHOWING = "showing"
COMMITTING = "committing"
FUSED = "fused attention"
WRITTEN = "attention written out"

DecoderState: TypeAlias = (
    Any  # what a codec remembers between chunks; each codec has a form of its own
)


def forms(build: Callable[[], Any], dtype: str) -> Any:
    """Shapes of what `build` makes, its floating leaves as `dtype`."""
    return jax.eval_shape(lambda: pytrees.cast(build(), dtype))


@dataclass(frozen=True)
class BlockShapes:
    """What denoising and committing a block are given, as shapes."""

    nets: Nets
    memory: Memory
    seeds: jax.ShapeDtypeStruct
    videos: jax.ShapeDtypeStruct
    context: jax.ShapeDtypeStruct  # text states
    text_kv: PerLayer[KV]  # what each layer reads of them
    latent: jax.ShapeDtypeStruct
    selection: Selection  # of one layer
    window: Any  # blocks that are denoised together, or ()

    @property
    def layers(self) -> list[LayerCache]:
        assert isinstance(self.memory.layers, list)  # one by one, as in sampling
        return self.memory.layers

    def denoiser(self, cfg: StepConfig, nets: Nets) -> Denoiser:
        """What their passes take."""
        return Denoiser(nets, cfg, self.text_kv)

    def joint(self, denoiser: Denoiser) -> tuple[Any, ...]:
        """What a pass over blocks that are denoised together is given."""
        blocks = jax.ShapeDtypeStruct((), jnp.int32)
        return denoiser, (self.seeds, self.videos), self.memory, self.window, blocks

    @property
    def view(self) -> tuple[int, ...]:
        """Shape of the keys of a view."""
        return self.layers[0].view.k.shape


@dataclass(frozen=True)
class Shapes(BlockShapes):
    """What a sampler holds between two blocks, and what comes into a block, as shapes; all packed blocks are there."""

    computed: Nets  # as they are computed with
    vae: codec.Codec
    decoder: DecoderState
    frames: jax.ShapeDtypeStruct
    low_res: jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Showing:
    """What decides about showing a block, and nothing else."""

    codec: codec.Config
    dtype: str
    latent: tuple[int, int]
    block: int  # latent frames
    shrink: player.Shrink | None


def showing(exp: Experiment) -> Showing:
    """What decides about showing a block of `exp`."""
    return Showing(
        codec=exp.codec,
        dtype=exp.dtypes.vae,
        latent=exp.latent,
        block=exp.cache.block,
        shrink=player.shrink_of(exp),
    )


def plain(cfg: StepConfig) -> StepConfig:
    """`cfg` as it is traced: attention written out, since fused kernels hide their products, the archive at hand."""
    return dataclasses.replace(
        cfg, attention="reference", cache=dataclasses.replace(cfg.cache, archive="device")
    )


def shapes_of(exp: Experiment, batch: int = 1) -> Shapes:
    """All shapes of `batch` videos in the dtypes of the experiment."""
    cfg = plain(exp.step)
    dtypes = exp.dtypes
    show = showing(exp)
    vae, decoder = codec_of(show.codec, show.latent, batch, show.dtype)
    frames, low_res = frames_of(show, batch)
    return Shapes(
        **vars(block_shapes(cfg, dtypes.params, dtypes.cache, dtypes.text, batch)),
        computed=nets_of(cfg, dtypes.compute),
        vae=vae,
        decoder=decoder,
        frames=frames,
        low_res=low_res,
    )


def block_shapes(cfg: StepConfig, params: str, stored: str, text: str, batch: int) -> BlockShapes:
    """What a block's programs are given, with so stored weights, keys and values, and text states."""
    nets = nets_of(cfg, params)
    spec = cfg.memory
    memory = jax.eval_shape(lambda: cache.init(spec, batch, jnp.dtype(stored)))
    context = context_of(cfg.dit, text, batch)
    numbers = jax.ShapeDtypeStruct((batch,), jnp.uint32)
    return BlockShapes(
        nets=nets,
        memory=memory,
        seeds=numbers,
        videos=numbers,
        context=context,
        text_kv=text_kv_of(cfg, params, text, batch),
        latent=latent_of(cfg.latent, cfg.cache.block, cfg.dit.in_channels, batch),
        selection=jax.eval_shape(
            lambda progress: view.newest(spec, layouts.layout(cfg.cache, progress), batch),
            memory.progress,
        ),
        window=jax.eval_shape(functools.partial(player.window_of, cfg), numbers, numbers),
    )


def context_of(cfg: ModelConfig, dtype: str, batch: int) -> jax.ShapeDtypeStruct:
    """Shape of text states, one prompt per video."""
    return jax.ShapeDtypeStruct((batch, cfg.text_len, cfg.text_dim), dtype)


def text_kv_of(cfg: StepConfig, params: str, text: str, batch: int) -> PerLayer[KV]:
    """Shapes of what each layer reads of the text."""
    return _text_kv_of(cfg.dit, cfg.compute, params, text, batch)


@functools.cache
def _text_kv_of(cfg: ModelConfig, compute: str, params: str, text: str, batch: int) -> PerLayer[KV]:
    def read(model, states):
        return player.text_program(model, compute, states)

    return jax.eval_shape(read, _model_of(cfg, params), context_of(cfg, text, batch))


@functools.cache
def nets_of(cfg: StepConfig, dtype: str) -> Nets:
    """Shapes of the trained parts, layers one by one."""
    return Nets(
        dit=_model_of(cfg.dit, dtype),
        compressor=forms(lambda: compressor.build(cfg, nnx.Rngs(0)), dtype),
    )


@functools.cache
def _model_of(cfg: ModelConfig, dtype: str) -> Any:
    return forms(lambda: base_model.build(cfg, nnx.Rngs(0)).unrolled(), dtype)


def shallow(cfg: StepConfig) -> StepConfig:
    """`cfg` with two layers at most, since intermediate values of a layer are gone before the next one but one.

    A model of one's own stays as it is.
    """
    if type(cfg.dit) is not DiTConfig:
        return cfg
    few = dataclasses.replace(cfg.dit, layers=min(cfg.dit.layers, 2))
    return dataclasses.replace(cfg, dit=few)


@functools.cache
def codec_of(
    cfg: codec.Config, latent: tuple[int, int], batch: int, dtype: str
) -> tuple[codec.Codec, DecoderState]:
    """Shapes of a codec and of its decoder's state."""
    vae = jax.eval_shape(lambda vae: pytrees.cast(vae, dtype), codec.shapes(cfg))
    return vae, jax.eval_shape(lambda vae: codec.init_decoder(vae, batch, *latent), vae)


def latent_of(
    latent: tuple[int, int], block: int, channels: int, batch: int
) -> jax.ShapeDtypeStruct:
    """Shape of a block; noise is drawn in float32 and the dtype stays."""
    return jax.ShapeDtypeStruct((batch, block, *latent, channels), jnp.float32)


@functools.cache
def frames_of(show: Showing, batch: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Shapes of a block's frames and of their low-resolution latents."""
    return jax.eval_shape(functools.partial(_show, show), *_show_arguments(show, batch))[:2]


def _show_arguments(
    show: Showing, batch: int
) -> tuple[codec.Codec, DecoderState, jax.ShapeDtypeStruct]:
    """What showing is given: the codec, its decoder's state and a block."""
    latent = latent_of(show.latent, show.block, show.codec.z_dim, batch)
    return *codec_of(show.codec, show.latent, batch, show.dtype), latent


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
    denoise: core.ClosedJaxpr
    clean: core.ClosedJaxpr
    choosing: core.ClosedJaxpr | None  # the clean pass where it chooses anew, else None
    packed: core.ClosedJaxpr | None
    decode: core.ClosedJaxpr
    shrink: core.ClosedJaxpr | None  # None where packing does not ask for it


def trace(exp: Experiment, shapes: Shapes) -> Traced:
    """The programs whose operations are counted: the player's, and the parts that they consist of."""
    cfg = plain(exp.step)
    show = showing(exp)
    progress = shapes.memory.progress
    own = shapes.denoiser(cfg, shapes.computed), shapes.latent, shapes.memory

    def lay(layer, progress):
        layout = layouts.layout(cfg.cache, progress)
        chosen = view.newest(cfg.memory, layout, shapes.latent.shape[0])
        return view.lay(cfg.memory, layout, layer, view.gather(layer, chosen), chosen)

    def step(denoiser, latent, memory):
        layout = layouts.layout(cfg.cache, memory.progress)
        none = NoiseLevel(jnp.zeros(()), jnp.zeros(()))
        return block_step.predict_x0(denoiser, layout, latent, none, block_step.views_of(memory))

    def clean(denoiser, latent, memory):
        layout = layouts.layout(cfg.cache, memory.progress)
        into_layer = block_step.Access(
            view_of=lambda layer: layer.view,
            keep=lambda own, view, layer: dataclasses.replace(layer, view=view),
            attends=block_step.remembering,
        )
        return block_step.read_clean(denoiser, layout, latent, memory.layers, into_layer)

    def choosing(denoiser, latent, memory):
        layout = layouts.layout(cfg.cache, memory.progress)
        unmade = reselection.before_choosing(cfg.memory, layout, memory, len(latent))
        past = pytrees.zipped(memory.layers, unmade)
        into_layer = block_step.Access(attends=reselection.choosing)
        return block_step.read_clean(denoiser, layout, latent, past, into_layer)

    def packed(denoiser, latent, memory, low_res):
        layout = layouts.layout(cfg.cache, memory.progress)
        own = block_step.Access(keep=lambda own, view, past: own)
        views = block_step.views_of(memory)
        return block_step.read_packed(denoiser, layout, latent, low_res, views, own)

    denoise = _traced_denoising(cfg, shapes, shapes.computed)
    return Traced(
        lay=jaxpr_cost.trace(lay, shapes.layers[0], progress),
        step=denoise if cfg.cache.joint else jaxpr_cost.trace(step, *own),
        denoise=denoise,
        clean=jaxpr_cost.trace(clean, *own),
        choosing=jaxpr_cost.trace(choosing, *own) if cfg.cache.chooses_anew else None,
        packed=jaxpr_cost.trace(packed, *own, shapes.low_res) if cfg.cache.top else None,
        decode=jaxpr_cost.trace(_decode, shapes.vae, shapes.decoder, shapes.latent),
        shrink=jaxpr_cost.trace(functools.partial(_shrink, show), shapes.vae, shapes.frames)
        if show.shrink
        else None,
    )


def _traced_denoising(cfg: StepConfig, shapes: BlockShapes, nets: Nets) -> core.ClosedJaxpr:
    denoiser = shapes.denoiser(cfg, nets)
    if cfg.cache.joint:
        return jaxpr_cost.trace(rolling_window.pass_program, *shapes.joint(denoiser))
    program = player.denoise_program
    return jaxpr_cost.trace(program, denoiser, shapes.memory, shapes.seeds, shapes.videos)


def _traced_committing(
    cfg: StepConfig, shapes: BlockShapes, low_res: jax.ShapeDtypeStruct
) -> core.ClosedJaxpr:
    def commit(denoiser, memory, latent, low_res, selection):
        each = [selection] * cfg.memory.layers
        return player.commit_program(denoiser, memory, latent, low_res, each)

    denoiser = shapes.denoiser(cfg, shapes.nets)
    arguments = denoiser, shapes.memory, shapes.latent, low_res, shapes.selection
    return jaxpr_cost.trace(commit, *arguments)


def _decode(vae: codec.Codec, decoder: DecoderState, latent: Latent) -> tuple[Video, DecoderState]:
    return codec.decode_chunk(vae, decoder, latent, first=False)


def _shrink(show: Showing, vae: codec.Codec, frames: Video) -> Latent:
    assert show.shrink is not None
    return codec.low_res_latents(vae, frames, **show.shrink._asdict())


def _show(
    show: Showing, vae: codec.Codec, decoder: DecoderState, latent: Latent
) -> tuple[Video, Latent, DecoderState]:
    return player.show_program(vae, decoder, latent, first=False, shrink=show.shrink)


# How much memory each takes while it runs, estimated from the traced programs


def workspace(exp: Experiment, batch: int = 1) -> dict[str, int]:
    """Bytes of intermediate values at their peak, by program, before compilers fuse anything.

    Stores are written in place. Fused attention keeps no array of all queries by all keys, attention written out a
    few. Weights that are not stored as they are computed with are cast in a program, all at once.
    """
    cfg = plain(exp.step)
    dtypes = exp.dtypes
    show = showing(exp)
    casts = dtypes.params != dtypes.compute
    cast = casts * jaxpr_cost.nbytes(nets_of(cfg, dtypes.compute))
    low_res = frames_of(show, batch)[1]
    block = {
        name: size + cast * (name != PROMPT)
        for name, size in _block_workspace(shallow(cfg), dtypes.cache, dtypes.text, low_res).items()
    }
    return _text_workspace(exp.text, dtypes.text) | block | _show_workspace(show, batch)


@functools.cache
def _block_workspace(
    cfg: StepConfig, stored: str, text: str, low_res: jax.ShapeDtypeStruct
) -> dict[str, int]:
    batch = low_res.shape[0]
    shapes = block_shapes(cfg, cfg.compute, stored, text, batch)
    heads = shapes.view[2]
    sizes = (cfg.cache.together, cfg.memory.denoised_in), (cfg.cache.block, cfg.memory.committed_in)
    logits = [
        (batch, heads, frames * cfg.tokens_per_frame, keys)
        for frames, room in sizes
        for keys in (room, cfg.dit.text_len)
    ]
    stores = {leaf.shape for leaf in jax.tree.leaves(shapes.layers) if leaf.ndim >= 4}
    programs = {
        DENOISING: (_traced_denoising(cfg, shapes, shapes.nets), {shapes.view}),
        COMMITTING: (_traced_committing(cfg, shapes, low_res), stores),
    }
    text_kv = jaxpr_cost.trace(
        lambda dit, states: player.text_program(dit, cfg.compute, states),
        shapes.nets.dit,
        shapes.context,
    )
    kinds = {FUSED: logits, WRITTEN: []}
    return {PROMPT: jaxpr_cost.peak(text_kv, results=False)} | {
        f"{name}, {kind}": jaxpr_cost.peak(program, besides={*besides, *more}, results=False)
        for name, (program, besides) in programs.items()
        for kind, more in kinds.items()
    }


@functools.cache
def _show_workspace(show: Showing, batch: int) -> dict[str, int]:
    arguments = _show_arguments(show, batch)
    frames = frames_of(show, batch)[0]
    programs = {"decoding": jaxpr_cost.trace(_decode, *arguments)}
    if show.shrink:
        programs["low-resolution encode"] = jaxpr_cost.trace(
            functools.partial(_shrink, show), arguments[0], frames
        )
    programs[SHOWING] = jaxpr_cost.trace(functools.partial(_show, show), *arguments)
    return {name: jaxpr_cost.peak(program, results=False) for name, program in programs.items()}


@functools.cache
def _text_workspace(cfg: TextConfig, dtype: str) -> dict[str, int]:
    program = jaxpr_cost.trace(
        functools.partial(text.layer, cfg=cfg), encoder_layer(cfg, dtype), *states_of(cfg, dtype)
    )
    return {ENCODING: jaxpr_cost.peak(program, results=False)}


def states_of(cfg: TextConfig, dtype: str) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
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
    analyses = {
        name: lowered.compile().memory_analysis() for name, lowered in lowered_programs(exp, batch)
    }
    return {
        name: Use(
            temporary=each.temp_size_in_bytes,
            results=each.output_size_in_bytes,
            arguments=each.argument_size_in_bytes,
            reused=each.alias_size_in_bytes,
        )
        for name, each in analyses.items()
        if each
    }


def lowered_programs(exp: Experiment, batch: int = 1) -> Iterator[tuple[str, jax.stages.Lowered]]:
    """The real programs with what they are given, by name."""
    cfg = exp.step
    dtypes = exp.dtypes
    show = showing(exp)
    shapes = block_shapes(cfg, dtypes.params, dtypes.cache, dtypes.text, batch)
    layer = encoder_layer(exp.text, dtypes.text)
    arguments = _show_arguments(show, batch)
    yield (
        ENCODING,
        text_encoder._layer.lower(layer, *states_of(exp.text, dtypes.text), cfg=exp.text),
    )
    yield PROMPT, player.text_program.lower(shapes.nets.dit, cfg.compute, shapes.context)
    yield from _lowered_denoising(cfg, shapes, shapes_of(exp, batch).layers[0])
    for name, first in ((f"{SHOWING} the first block", True), (SHOWING, False)):
        yield name, player.show_program.lower(*arguments, first=first, shrink=show.shrink)
    yield (
        COMMITTING,
        player.commit_program.lower(
            shapes.denoiser(cfg, shapes.nets),
            shapes.memory,
            shapes.latent,
            frames_of(show, batch)[1],
            [shapes.selection] * cfg.memory.layers,
        ),
    )


def _lowered_denoising(
    cfg: StepConfig, shapes: BlockShapes, archived: LayerCache
) -> Iterator[tuple[str, jax.stages.Lowered]]:
    """Denoising is one program, or several where packed blocks, as in the layer `archived`, come from the host."""
    denoiser = shapes.denoiser(cfg, shapes.nets)
    if cfg.cache.joint:
        yield DENOISING, rolling_window.pass_program.lower(*shapes.joint(denoiser))
        return
    if cfg.cache.archive == "device":
        yield (
            DENOISING,
            player.denoise_program.lower(denoiser, shapes.memory, shapes.seeds, shapes.videos),
        )
        return
    number = shapes.memory.num_blocks
    noise = jax.eval_shape(
        functools.partial(player.noise_program, cfg), shapes.seeds, shapes.videos, number
    )
    gathered = [jax.eval_shape(view.gather, archived, shapes.selection)] * cfg.memory.layers
    own = denoiser, shapes.memory, noise
    _, clean, queries = jax.eval_shape(host_archive.first_pass, *own, gathered, shapes.selection)
    yield (
        f"{DENOISING}, its noise",
        player.noise_program.lower(cfg, shapes.seeds, shapes.videos, number),
    )
    yield (
        f"{DENOISING}, the first step",
        host_archive.first_pass.lower(*own, gathered, shapes.selection),
    )
    random = jax.ShapeDtypeStruct(noise.random.shape[1:], jnp.float32)
    scored = (
        cfg.memory,
        shapes.memory.progress,
        shapes.layers[0],
        archived.packed.k,
        queries[0],
        random,
    )
    yield f"{DENOISING}, scoring a layer", host_archive._score.lower(*scored)
    yield (
        f"{DENOISING}, the other steps",
        host_archive.remaining_passes.lower(*own, clean, gathered, shapes.selection),
    )
