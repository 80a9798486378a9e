"""The player: the one function that makes the next block of a batch of videos, whatever archive, dtype and selection.

`Pipeline`, evaluation, previews and benchmarks call `next_block`; plans are counted from its programs.
"""

import dataclasses
import functools
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Int

from packforcing_jax import pytrees
from packforcing_jax.config import CacheConfig, Experiment, MemorySpec, StepConfig
from packforcing_jax.memory import cache
from packforcing_jax.memory import layout as layouts
from packforcing_jax.memory.cache import Memory, Selection
from packforcing_jax.networks import codec
from packforcing_jax.pytrees import PerLayer
from packforcing_jax.sampling import (
    block_step,
    clips,
    host_archive,
    participative,
    reselection,
    rolling_window,
)
from packforcing_jax.sampling.block_step import Denoised, Denoiser, Nets
from packforcing_jax.sampling.clips import Seam
from packforcing_jax.sampling.rolling_window import Window
from packforcing_jax.types import KV, Latent, TextStates, Video


class Model(Protocol):
    """What the player needs of a model."""

    @property
    def experiment(self) -> Experiment: ...
    @property
    def nets(self) -> Nets: ...
    @property
    def vae(self) -> codec.Codec: ...


@struct.dataclass
class State:
    """Everything between two blocks of a batch of videos; one pytree, to be saved and gone on from anywhere.

    The block counter of the memory is also the position in the timeline.
    """

    memory: Memory
    archive: host_archive.Archive  # packed blocks in host memory; empty where they lie in `memory`
    decoder: Any
    seeds: Int[Array, " b"]
    videos: Int[Array, " b"]  # ids, which with the seed decide the noise
    window: Window | tuple[()] = ()  # blocks that are denoised together, where a method does so
    seam: Seam | tuple[()] = ()  # what the next clip begins with, where a video consists of clips
    stored: tuple[tuple[str, object], ...] = (
        struct.field(  # settings of the memory that it was made with
            pytree_node=False, default=()
        )
    )

    @property
    def position(self) -> int:
        """Blocks of the video that are finished; the memory may have been given more."""
        given = int(self.seam.given) if isinstance(self.seam, Seam) else 0
        return int(self.memory.num_blocks) - given


@struct.dataclass
class Block:
    """The next block of every video: as it was denoised, shown, and committed."""

    frames: Array  # [b, t, height, width, 3] in [-1, 1]
    latent: Array  # [b, t, y, x, c]
    selection: PerLayer[Selection]


def start(model: Model, *, seeds: Any, videos: Any) -> State:
    """The state before the first block; `seeds` is one for all videos, or one for each.

    It lies where the weights do, as what a block leaves behind: a program compiled for one fits the other.
    """
    exp = model.experiment
    batch = len(videos)
    dtype = jnp.dtype(model.experiment.dtypes.cache)
    videos = jnp.asarray(videos, jnp.uint32)
    seeds = jnp.broadcast_to(jnp.asarray(seeds, jnp.uint32), videos.shape)
    state = State(
        memory=cache.init(exp.memory, batch, dtype),
        archive=[],
        decoder=codec.init_decoder(model.vae, batch, *exp.latent),
        seeds=seeds,
        videos=videos,
        window=window_program(exp.step, seeds, videos) if exp.cache.joint else (),
        seam=clips.start(exp, batch) if exp.cache.overlap else (),
        stored=exp.cache.stored,
    )
    state = jax.device_put(state, beside(model.nets))
    return dataclasses.replace(state, archive=host_archive.init(exp.memory, batch, dtype))


def beside(nets: Nets) -> Any:
    """Where what belongs to these weights is put, None for weights of which only shapes are known."""
    return getattr(jax.tree.leaves(nets)[0], "sharding", None)


def next_block(
    model: Model, state: State, text: Any, *, given: Latent | None = None, left: int | None = None
) -> tuple[State, Block]:
    """One more block of every video, its text as keys and values per layer; `state` is used up.

    A block that is `given` [b, t, y, x, c] is committed in place of the denoised one. `left` counts the blocks from
    this one to the video's last one, None for a video without an end.
    """
    state, denoised = denoise(model, state, text, left=left)
    return finish(model, state, denoised, text, given=given, left=left)


def given_block(
    model: Model, state: State, text: Any, latent: Latent, *, left: int | None = None
) -> tuple[State, Block]:
    """A block [b, t, y, x, c] that the video begins with, shown and committed like a denoised one; uses up `state`.

    It is denoised all the same, since that is how blocks find out what they look back at; a rolling window, which
    would take later blocks along, begins anew behind it.
    """
    exp = model.experiment
    if isinstance(state.window, Window):
        selection = _nothing_packed(exp.memory, state.memory, len(state.videos))
        denoised = Denoised(latent, selection)
        first = state.memory.num_blocks + 1
        window = window_program(exp.step, state.seeds, state.videos, first)
        state = dataclasses.replace(state, window=window)
    else:
        state, denoised = denoise(model, state, text, left=left)
        denoised = dataclasses.replace(denoised, latent=latent.astype(denoised.latent.dtype))
    return finish(model, state, denoised, text, left=left)


def finish(
    model: Model,
    state: State,
    denoised: Denoised,
    text: Any,
    *,
    given: Latent | None = None,
    left: int | None = None,
) -> tuple[State, Block]:
    """A denoised block shown and committed, or the one that is `given` in its place; `state` is used up."""
    exp = model.experiment
    opens = exp.codec.time_factor > 1 and int(state.memory.num_blocks) == 0
    slot = host_archive.slot(exp.memory, state.memory.progress) if state.archive else -1
    denoiser = Denoiser(model.nets, exp.step, text)
    frames, low_res, decoder = show_program(
        model.vae, state.decoder, denoised.latent, given, first=opens, shrink=shrink_of(exp)
    )
    latent = denoised.latent if given is None else given
    memory, packed = commit_program(denoiser, state.memory, latent, low_res, denoised.selection)
    if packed is not None:
        host_archive.put(state.archive, slot, packed)
    state = dataclasses.replace(state, memory=memory, decoder=decoder)
    if isinstance(state.seam, Seam):
        state, frames = _in_clip(model, denoiser, (state, state.seam), frames, left)
    return state, Block(frames=frames, latent=denoised.latent, selection=denoised.selection)


def _in_clip(
    model: Model, denoiser: Denoiser, made: tuple[State, Seam], frames: Video, left: int | None
) -> tuple[State, Video]:
    """(the state behind a block of a clip, what is shown of it): its last block is followed by the next clip's begin.

    A clip that the video's end cuts short is shown whole.
    """
    exp = model.experiment
    state, seam = made
    progress = state.memory.progress
    block = int(progress.num_blocks) - 1 - int(progress.scene_start) // exp.cache.block
    to_end = clips.blocks(exp.cache) - block
    left = to_end + 1 if left is None else left
    seam = clips.keep_frame(exp, seam, block, frames)
    if left >= to_end:
        frames = frames[:, : clips.shown(exp, block)]
    if to_end > 1 or left == 1:
        return dataclasses.replace(state, seam=seam), frames
    state, opening = _next_clip(model, denoiser, state, seam)
    return state, jnp.concatenate([frames, opening], axis=1)


def _next_clip(model: Model, denoiser: Denoiser, state: State, seam: Seam) -> tuple[State, Video]:
    """(the state behind the blocks that the next clip is given, their frames)."""
    exp = model.experiment
    given = clips.beginning(exp, model.vae, state.memory, seam.frame)
    batch, count = given.shape[0], exp.cache.overlap // exp.cache.block
    none = _nothing_packed(exp.memory, state.memory, batch)
    memory = cut_program(exp.memory, state.memory)
    decoder = jax.device_put(codec.init_decoder(model.vae, batch, *exp.latent), beside(model.nets))
    opening = []
    for number, latent in enumerate(jnp.split(given, count, axis=1)):
        first = exp.codec.time_factor > 1 and number == 0
        frames, low_res, decoder = show_program(
            model.vae, decoder, latent, None, first=first, shrink=shrink_of(exp)
        )
        memory, _ = commit_program(denoiser, memory, latent, low_res, none)
        opening.append(frames)
    seam = Seam(given=seam.given + count, frame=seam.frame)
    state = dataclasses.replace(state, memory=memory, decoder=decoder, seam=seam)
    return state, jnp.concatenate(opening, axis=1)


def change_prompt(model: Model, state: State, text: Any, *, how: str, keep_sink: bool) -> State:
    """The state once a new prompt, `text`, is met as `how` says: keep, recache, flush or cut; `state` is used up."""
    exp = model.experiment
    memory = state.memory
    if how == "recache":
        denoiser = Denoiser(model.nets, exp.step, text)
        memory = recache_program(denoiser, memory, keep_sink=keep_sink)
    elif how == "flush":
        memory = flush_program(exp.memory, memory)
    elif how == "cut":
        memory = cut_program(exp.memory, memory)
    return dataclasses.replace(state, memory=memory)


def denoise(
    model: Model, state: State, text: Any, *, left: int | None = None
) -> tuple[State, Denoised]:
    """The next block as it is denoised, and the state before it is committed; the memory of `state` is used up."""
    cfg = model.experiment.step
    if cfg.sample.first_steps and int(state.memory.num_blocks) == 0:
        cfg = first_block(cfg)
    denoiser = Denoiser(model.nets, cfg, text)
    who = state.seeds, state.videos
    if isinstance(state.window, Window):
        one_pass = functools.partial(rolling_window.pass_program, denoiser, who)
        latent, window = rolling_window.denoise(cfg, state.memory, state.window, one_pass, left)
        selection = _nothing_packed(cfg.memory, state.memory, len(state.videos))
        return dataclasses.replace(state, window=window), Denoised(latent, selection)
    if cfg.cache.archive == "device":
        memory, denoised = denoise_program(denoiser, state.memory, *who)
        if cfg.cache.budget:
            selection = _nothing_packed(cfg.memory, memory, len(state.videos))
            denoised = dataclasses.replace(denoised, selection=selection)
    else:
        noise = noise_program(cfg, *who, state.memory.num_blocks)
        memory, denoised = host_archive.denoise(denoiser, state.memory, state.archive, noise)
    return dataclasses.replace(state, memory=memory), denoised


def _nothing_packed(spec: MemorySpec, memory: Memory, batch: int) -> list[Selection]:
    """The choice of every layer of a memory without packed blocks."""
    return [host_archive.newest(spec, memory.progress, batch=batch)] * spec.layers


def first_block(cfg: StepConfig) -> StepConfig:
    """`cfg` with the steps of the first generated block."""
    sample = cfg.sample
    steps = sample.first_steps or sample.steps
    return dataclasses.replace(cfg, sample=dataclasses.replace(sample, steps=steps, first_steps=()))


# The programs


@functools.partial(jax.jit, donate_argnames="memory")
def denoise_program(
    denoiser: Denoiser, memory: Memory, seeds: Array, videos: Array
) -> tuple[Memory, Denoised]:
    """The next block with the noise of (seed, video, block), in place."""
    noise = block_step.draw_noise(denoiser.cfg, seeds, videos, memory.num_blocks)
    made_by = _made_by(denoiser.cfg.cache)
    memory, denoised = made_by.denoise_block(denoiser.computed(), memory, noise)
    return memory, dataclasses.replace(denoised, predictions=None)


def window_of(
    cfg: StepConfig, seeds: Array, videos: Array, first: Array | int = 0
) -> Window | tuple[()]:
    """The blocks that are denoised together, before the first pass; nothing where each is denoised alone."""
    if not cfg.cache.joint:
        return ()
    return rolling_window.start(cfg, rolling_window.drawn(cfg, seeds, videos), first)


window_program = jax.jit(window_of, static_argnames="cfg")
noise_program = jax.jit(block_step.draw_noise, static_argnames="cfg")
layout_program = jax.jit(layouts.denoising, static_argnames="cfg")


class Shrink(NamedTuple):
    """How a block's pixels become low-resolution latents."""

    latents: int
    pool: tuple[int, int, int]  # pixels (t, y, x) that are averaged


def shrink_of(exp: Experiment) -> Shrink | None:
    """How blocks of `exp` are shrunk; None where packing does not ask for it."""
    if not exp.packs_pixels:
        return None
    return Shrink(latents=exp.packed_grid[0], pool=exp.compressor.pool)


@functools.partial(jax.jit, static_argnames=("first", "shrink"))
def show_program(
    vae: codec.Codec,
    decoder: Any,
    latent: Latent,
    given: Latent | None = None,
    *,
    first: bool,
    shrink: Shrink | None,
) -> tuple[Video, Latent, Any]:
    """(frames of `latent`, low-resolution latents for packing, the decoder after them).

    What is packed, and what the decoder goes on from, is the block that is `given`, if one is.
    """
    frames, after = codec.decode_chunk(vae, decoder, latent, first=first)
    committed = frames
    if given is not None:
        committed, after = codec.decode_chunk(vae, decoder, given, first=first)
    low_res = latent[:, :0]
    if shrink is not None:
        low_res = codec.low_res_latents(vae, committed, **shrink._asdict())
    return frames, low_res, after


@functools.partial(jax.jit, donate_argnames="memory")
def commit_program(
    denoiser: Denoiser,
    memory: Memory,
    latent: Latent,
    low_res: Latent,
    selection: PerLayer[Selection],
) -> tuple[Memory, PerLayer[KV] | None]:
    """`block_step.commit_block`, or its like, in place."""
    made_by = _made_by(denoiser.cfg.cache)
    return made_by.commit_block(denoiser.computed(), memory, latent, low_res, selection)


def _made_by(cfg: CacheConfig) -> ModuleType:
    """How blocks are denoised and committed: behind single tokens, behind a choice in every pass, or behind one."""
    if cfg.budget:
        return participative
    return reselection if cfg.chooses_anew else block_step


@functools.partial(jax.jit, static_argnames="keep_sink", donate_argnames="memory")
def recache_program(denoiser: Denoiser, memory: Memory, *, keep_sink: bool) -> Memory:
    """`block_step.recache`, in place."""
    return block_step.recache(denoiser.computed(), memory, keep_sink=keep_sink)[0]


flush_program = jax.jit(cache.flush, static_argnames="spec", donate_argnames="memory")
cut_program = jax.jit(cache.cut, static_argnames="spec", donate_argnames="memory")


@functools.partial(jax.jit, static_argnames="compute")
def text_program(model: Any, compute: str, states: TextStates) -> PerLayer[Any]:
    """What each layer reads of prompts."""
    return pytrees.cast(model, compute).text_kv(states)


@functools.partial(jax.jit, static_argnames="spec")
def sink_sums(spec: MemorySpec, memory: Memory) -> Array:
    """For each video the bits of its sink values, and of its keys where they stay, added up as one unsigned number."""
    tokens = spec.cache.sink * spec.tokens_per_frame
    moves = spec.cache.rope_adjustment in ("incremental", "sink_only")
    sizes = {2: jnp.uint16, 4: jnp.uint32}
    total: Array | int = 0
    layers: Any = memory.layers  # one by one, as in sampling
    for layer in layers:
        stores = (layer.view.v,) if moves else (layer.view.k, layer.view.v)
        for store in stores:
            bits = jax.lax.bitcast_convert_type(store[:, :tokens], sizes[store.dtype.itemsize])
            total = total + einops.reduce(bits.astype(jnp.uint32), "b ... -> b", "sum")
    return jnp.asarray(total)


# What has to be kept of a state to go on from it


def strip_scratch(model: Model, state: State) -> State:
    """`state` without its scratch."""
    memory = cache.strip_scratch(model.experiment.memory, state.memory)
    return dataclasses.replace(state, memory=memory)


def with_scratch(model: Model, state: State) -> State:
    """A state that was stripped, with new scratch, beside the weights."""
    archive = state.archive
    spec = model.experiment.memory
    state = dataclasses.replace(state, memory=cache.with_scratch(spec, state.memory), archive=[])
    return dataclasses.replace(jax.device_put(state, beside(model.nets)), archive=archive)


def abstract_state(model: Model, videos: int = 1) -> State:
    """Shapes and dtypes of a stripped state; packed blocks in host memory stand there as themselves."""
    exp = model.experiment

    def stripped() -> State:
        return strip_scratch(model, start(model, seeds=0, videos=[0] * videos))

    archive = host_archive.init(exp.memory, videos, jnp.dtype(exp.dtypes.cache))
    return dataclasses.replace(jax.eval_shape(stripped), archive=archive)


def snapshot(model: Model, state: State) -> State:
    """A copy of a state, stripped, in host memory, made array by array; the next block leaves it as it is."""
    forms = jax.eval_shape(functools.partial(strip_scratch, model), state)

    def copied(form: jax.ShapeDtypeStruct, leaf: Array | np.ndarray) -> np.ndarray:
        return np.array(leaf[tuple(map(slice, form.shape))])

    return jax.tree.map(copied, forms, state)


def of_snapshot(model: Model, copy: State) -> State:
    """A state to go on from that a block may use up; the snapshot stays as it is."""
    return with_scratch(model, jax.tree.map(np.array, copy))
