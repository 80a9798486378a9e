"""From sentences to video: a model folder, a prompt per block, and blocks that come out as they are finished."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax import Array

from packforcing_jax import pytrees
from packforcing_jax.config import PROFILES, Experiment, overrides
from packforcing_jax.errors import nearest, require
from packforcing_jax.io import model_folder, text_encoder, video
from packforcing_jax.memory import cache, view
from packforcing_jax.networks import codec, compressor, dit, text, tokenizer
from packforcing_jax.sampling import block_step, host_archive
from packforcing_jax.types import KV, Latent, TextStates

Words: TypeAlias = tokenizer.Tokenizer
TextEncoder: TypeAlias = text.UMT5
SHIPPED = Path(__file__).parents[1] / "weights" / "stage"


@struct.dataclass
class State:
    """Everything between two blocks; one pytree, so that a sampler can be saved and continued anywhere.

    The block counter in `memory` is also the position in the timeline.
    """

    memory: cache.Memory
    archive: host_archive.Archive  # packed blocks in host memory; empty when they lie in `memory`
    views: list[KV]  # scratch: nothing in it matters between two blocks
    decoder: Any
    seed: Array
    videos: Array  # [b] video ids


def put_away(state: State) -> State:
    """What has to be kept of a state to go on from it: all but its scratch."""
    return dataclasses.replace(state, views=[])


@dataclass(frozen=True)
class Finished:
    """One finished block of one video: its place, what was asked for, what came out, and what it looked back at."""

    index: int
    prompt: str
    frames: np.ndarray  # [t, height, width, 3] in [-1, 1]
    latent: np.ndarray  # [t, y, x, c]
    chosen: (
        np.ndarray
    )  # [layer, top] packed blocks each layer recalled, in time order, -1 where fewer exist
    scores: np.ndarray  # [layer, top] by which it chose them
    places: np.ndarray  # [layer, top] place in time of the first frame of each
    layout: Mapping[
        str, float
    ]  # counts and places of the other partitions: fields of `cache.Plan`, and `block`
    sink_sum: int  # checksum of the sink; its keys do not count when they move
    state: State  # after this block; used up when the next one is drawn


@functools.partial(jax.jit, static_argnames="exp", donate_argnames="views")
def draw_block(
    nets: block_step.Nets,
    exp: Experiment,
    memory: cache.Memory,
    views: list[KV],
    seed: Array,
    videos: Array,
    words: Any,
) -> block_step.Drawn:
    """`sampler.draw` with the noise of (seed, video, block), its views in place."""
    chance, nets = (
        block_step.chances(exp, seed, videos, memory.num_blocks),
        pytrees.cast(nets, exp.dtypes.compute),
    )
    return block_step.draw(nets, exp, memory, chance=chance, text=words, views=views)


@functools.partial(jax.jit, static_argnames=("exp", "first"))
def show_block(pixels: codec.Codec, exp: Experiment, decoder: Any, latent: Latent, *, first: bool):
    """(frames, their low-resolution latents for packing, the decoder after them)."""
    frames, decoder = codec.decode_chunk(pixels, decoder, latent, first=first)
    low = codec.low_resolution(pixels, frames, latents=exp.packed_grid[0], pool=exp.compressor.pool)
    return frames, low, decoder


@functools.partial(jax.jit, static_argnames="exp", donate_argnames=("memory", "views"))
def remember_block(
    nets: block_step.Nets,
    exp: Experiment,
    memory: cache.Memory,
    views: list[KV],
    latent: Latent,
    low: Latent,
    looked: Any,
    words: Any,
) -> tuple[cache.Memory, Any, list[KV]]:
    """`sampler.remember`, in place."""
    drawn, nets = (
        block_step.Drawn(latent=latent, views=views, looked=looked),
        pytrees.cast(nets, exp.dtypes.compute),
    )
    return block_step.remember(nets, exp, memory, latent=latent, low=low, drawn=drawn, text=words)


chances = jax.jit(block_step.chances, static_argnames="exp")


@functools.partial(jax.jit, static_argnames="exp")
def sink_sum(exp: Experiment, memory: cache.Memory) -> Array:
    """The bits of all stored sink values, and of the keys where they stay, added up as one unsigned number."""
    kept = [
        layer.sink.v if exp.cache.rope_adjustment == "incremental" else layer.sink
        for layer in memory.layers
    ]
    sizes = {2: jnp.uint16, 4: jnp.uint32}
    bits = [jax.lax.bitcast_convert_type(x, sizes[x.dtype.itemsize]) for x in jax.tree.leaves(kept)]
    return sum((x.sum(dtype=jnp.uint32) for x in bits), jnp.uint32(0))


@functools.partial(jax.jit, static_argnames="exp")
def read_prompt(model: dit.WanDiT, exp: Experiment, states: TextStates) -> Any:
    """The cross-attention keys and values of prompts for every layer."""
    return dit.text_kv(pytrees.cast(model, exp.dtypes.compute), states)


def video_id(prompt: str) -> int:
    """The id that decides a video's noise unless one is given: a hash of its first prompt."""
    return int.from_bytes(hashlib.sha256(tokenizer.clean(prompt).encode()).digest()[:4], "big")


def blocks_of(exp: Experiment, seconds: float) -> int:
    """Blocks that make a video of `seconds`; frames that do not fill a last latent are not asked for."""
    require(
        np.isfinite(seconds) and seconds > 0,
        f"seconds={seconds} is not a length; give a number above 0.",
    )
    latents = codec.latents_of(exp.codec, int(np.ceil(seconds * exp.fps)))
    return max(1, -(-latents // exp.cache.block))


def asked_for(exp: Experiment, memory: str | None, sets: Sequence[str]) -> Experiment:
    """`exp` with a memory profile by name and then single settings changed."""
    require(
        memory in (None, *PROFILES),
        f"memory profile {memory!r} is unknown; {nearest(str(memory), PROFILES)}",
    )
    return overrides.override(
        dataclasses.replace(exp, cache=PROFILES[memory]) if memory else exp, list(sets)
    )


def _read(model: model_folder.Opened, part: str, build: Callable[[], Any], dtype: str) -> Any:
    """A part of a model folder as the module that `build` makes; one without parameters needs no file."""
    shapes = jax.eval_shape(build)
    held = model.part(part) if pytrees.flatten(shapes) else {}
    return model_folder.fill(
        shapes, held, dtype=dtype, source=f"the {part} weights of {model.folder}"
    )


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A loaded model. `stream` yields finished blocks, `generate` a whole video."""

    experiment: Experiment
    nets: block_step.Nets
    text: text_encoder.Encoder
    pixels: codec.Codec
    tokenizer: tokenizer.Tokenizer

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path | None = None,
        *,
        memory: str | None = None,
        sets: Sequence[str] = (),
    ) -> "Pipeline":
        """The model of a folder, by default the one that ships, with another memory profile or settings if asked for.

        Weights are read tensor by tensor into their places; the text encoder stays on disk.
        """
        model = model_folder.opened(folder or SHIPPED)
        exp = asked_for(model.experiment, memory, sets)
        nets = block_step.Nets(
            dit=_read(
                model,
                "dit",
                lambda: dit.unrolled(dit.WanDiT(exp.dit, nnx.Rngs(0))),
                exp.dtypes.params,
            ),
            compressor=_read(
                model,
                "compressor",
                lambda: compressor.Compressor(exp, nnx.Rngs(0)),
                exp.dtypes.params,
            ),
        )
        words = tokenizer.Tokenizer.from_file(
            model.folder / model_folder.TOKENIZER, exp.text.max_words
        )
        return cls(
            experiment=exp,
            nets=nets,
            text=text_encoder.of_folder(model, exp.dtypes),
            tokenizer=words,
            pixels=_read(
                model, "codec", lambda: codec.make(exp.codec, nnx.Rngs(0)), exp.dtypes.vae
            ),
        )

    @classmethod
    def of(
        cls, exp: Experiment, nets: block_step.Nets, encoder: TextEncoder, words: Words
    ) -> "Pipeline":
        """Networks in memory, layers stacked as in training, ready to sample."""
        apart = dataclasses.replace(nets, dit=dit.unrolled(nets.dit))
        return cls(
            experiment=exp,
            nets=pytrees.cast(apart, exp.dtypes.params),
            tokenizer=words,
            text=text_encoder.of_module(encoder, exp.dtypes),
            pixels=codec.make(exp.codec, nnx.Rngs(0)),
        )

    def with_memory(self, profile: str) -> "Pipeline":
        """The same model with another memory: a name in `config.PROFILES`."""
        return self._with(asked_for(self.experiment, profile, ()))

    def with_settings(self, sets: Sequence[str]) -> "Pipeline":
        """The same weights with settings changed, such as `cache.top=8`."""
        return self._with(asked_for(self.experiment, None, sets))

    def _with(self, exp: Experiment) -> "Pipeline":
        return dataclasses.replace(
            self,
            experiment=exp,
            nets=pytrees.cast(self.nets, exp.dtypes.params),
            pixels=pytrees.cast(self.pixels, exp.dtypes.vae),
            text=dataclasses.replace(self.text, dtype=exp.dtypes.text),
        )

    def start(self, *, seed: int, videos: Sequence[int]) -> State:
        """The state before the first block of `videos`."""
        exp, batch, kept = self.experiment, len(videos), jnp.dtype(self.experiment.dtypes.cache)
        return State(
            memory=cache.init(exp, batch, kept),
            archive=host_archive.init(exp, batch, kept),
            views=view.scratch(exp, batch, kept),
            decoder=codec.init_decoder(self.pixels, batch, *exp.latent),
            seed=jnp.uint32(seed),
            videos=jnp.asarray(videos, jnp.uint32),
        )

    def kept_form(self, videos: int = 1) -> State:
        """Shapes and dtypes of what `put_away` keeps; packed blocks in host memory stand there as themselves."""
        form = jax.eval_shape(lambda: put_away(self.start(seed=0, videos=[0] * videos)))
        kept = jnp.dtype(self.experiment.dtypes.cache)
        return dataclasses.replace(form, archive=host_archive.init(self.experiment, videos, kept))

    def taken_up(self, kept: State) -> State:
        """A state that was put away, with new scratch."""
        exp = self.experiment
        return dataclasses.replace(
            kept, views=view.scratch(exp, len(kept.videos), jnp.dtype(exp.dtypes.cache))
        )

    def words(self, prompts: Sequence[str]) -> Any:
        """Text keys and values per layer of one prompt per video."""
        return read_prompt(
            self.nets.dit, self.experiment, self.text(*self.tokenizer.encode(prompts))
        )

    def check(self, prompts: Sequence[str]) -> None:
        """Raises `InputError` unless there are prompts and every word of them is known."""
        require(len(prompts) > 0, "a video needs at least one block; give one prompt per block.")
        self.tokenizer.encode(list(dict.fromkeys(prompts)))

    def draw(self, state: State, words: Any) -> block_step.Drawn:
        """The next block of every video, as drawn; the scratch inside `state` is used up."""
        exp, memory = self.experiment, state.memory
        if exp.cache.archive == "device":
            return draw_block(self.nets, exp, memory, state.views, state.seed, state.videos, words)
        chance = chances(exp, state.seed, state.videos, memory.num_blocks)
        return host_archive.draw(
            self.nets, exp, memory, state.archive, chance=chance, text=words, views=state.views
        )

    def step(
        self, state: State, words: Any, *, first: bool
    ) -> tuple[State, Array, block_step.Drawn]:
        """One block of every video: the state after it, its frames [b, t, height, width, 3], and how it was drawn.

        `state` is used up, and with it the views that `Drawn` names.
        """
        exp, block = self.experiment, int(state.memory.num_blocks) if state.archive else 0
        drawn = self.draw(state, words)
        frames, low, decoder = show_block(
            self.pixels, exp, state.decoder, drawn.latent, first=first
        )
        memory, packed, views = remember_block(
            self.nets, exp, state.memory, drawn.views, drawn.latent, low, drawn.looked, words
        )
        if state.archive:
            host_archive.put(exp, state.archive, block, packed)
        return (
            dataclasses.replace(state, memory=memory, views=views, decoder=decoder),
            frames,
            drawn,
        )

    def stream(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        identity: int | None = None,
        state: State | None = None,
    ) -> Iterator[Finished]:
        """Finished blocks of one video, one prompt per block; all are checked before the first is drawn.

        A longer run begins with the shorter one, bit for bit; a changed later prompt leaves earlier blocks alone.
        A `state` that an earlier run left goes on from its block, as if that run had never stopped.
        """
        self.check(prompts)
        if state is None:
            state = self.start(
                seed=seed, videos=[video_id(prompts[0]) if identity is None else identity]
            )
        return self._stream(prompts, state)

    def _stream(self, prompts: Sequence[str], state: State) -> Iterator[Finished]:
        words, first = None, int(state.memory.num_blocks)
        if prompts[first:]:
            self.text.prepare(*self.tokenizer.encode(list(dict.fromkeys(prompts[first:]))))
        for index in range(first, len(prompts)):
            if words is None or prompts[index] != prompts[index - 1]:
                words = self.words([prompts[index]])
            state, frames, drawn = self.step(state, words, first=index == 0)
            shown = np.asarray(frames[0])
            video.guard(shown, first=index * len(shown))
            yield self._finished(index, prompts[index], shown, drawn, state)

    def _finished(
        self, index: int, prompt: str, shown: np.ndarray, drawn: block_step.Drawn, state: State
    ) -> Finished:
        exp = self.experiment
        seen = cache.plan(exp.cache, jnp.int32(index))
        names = ("sink", "recent", "chosen", "step", "sink_at", "mid_at", "recent_at", "current_at")
        per_layer = {
            name: np.stack([np.asarray(getattr(one, name)[0]) for one in drawn.looked])
            for name in ("ids", "scores", "at")
        }
        return Finished(
            index=index,
            prompt=prompt,
            frames=shown,
            latent=np.asarray(drawn.latent[0]),
            chosen=per_layer["ids"],
            scores=per_layer["scores"],
            places=per_layer["at"],
            state=state,
            layout={"block": exp.cache.block}
            | {name: np.asarray(getattr(seen, name)).item() for name in names},
            sink_sum=int(sink_sum(exp, state.memory)),
        )

    def generate(
        self, prompts: Sequence[str], *, seed: int = 0, identity: int | None = None
    ) -> np.ndarray:
        """The whole video [frames, height, width, 3] in [-1, 1]; `stream` keeps less in memory."""
        return np.concatenate(
            [block.frames for block in self.stream(prompts, seed=seed, identity=identity)]
        )
