"""From sentences to video: a model folder, a prompt per block, and blocks that come out as they are finished."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax import Array

from packforcing_jax import cache, checkpoints, codec, compressor, dit, options, sampler, text, tokenizer, trees, video
from packforcing_jax.config import PROFILES, Experiment, require
from packforcing_jax.types import KV, Latent

SHIPPED = Path(__file__).parent / "weights" / "stage"


@struct.dataclass
class State:
    """Everything between two blocks; one pytree, so that a sampler can be saved and continued anywhere."""

    memory: cache.Memory
    decoder: Any
    seed: Array
    videos: Array  # [b] video ids


@dataclass(frozen=True)
class Finished:
    """One finished block of one video: its place, what was asked for, and what came out."""

    index: int
    prompt: str
    frames: np.ndarray  # [t, height, width, 3] in [-1, 1]
    latent: np.ndarray  # [t, y, x, c]
    chosen: np.ndarray  # [layer, top] packed blocks each layer recalled, -1 where fewer exist


@functools.partial(jax.jit, static_argnames="exp")
def draw_block(nets: sampler.Nets, exp: Experiment, state: State, words: KV) -> sampler.Drawn:
    """`sampler.draw` with the noise of (seed, video, block)."""
    noise, renoise = sampler.noises(exp, state.seed, state.videos, state.memory.num_blocks)
    return sampler.draw(nets, exp, state.memory, noise=noise, renoise=renoise, text=words)


@functools.partial(jax.jit, static_argnames=("exp", "first"))
def show_block(pixels: codec.Codec, exp: Experiment, decoder: Any, latent: Latent, *, first: bool):
    """(frames, their low-resolution latents for packing, the decoder after them)."""
    frames, decoder = codec.decode_chunk(pixels, decoder, latent, first=first)
    low = codec.low_resolution(pixels, frames, latents=exp.packed_grid[0], pool=exp.compressor.pool)
    return frames, low, decoder


@functools.partial(jax.jit, static_argnames="exp", donate_argnames="memory")
def remember_block(nets: sampler.Nets, exp: Experiment, memory: cache.Memory, drawn: sampler.Drawn, low: Latent,
                   words: KV) -> cache.Memory:  # fmt: skip
    """`sampler.remember`, in place."""
    return sampler.remember(nets, exp, memory, latent=drawn.latent, low=low, view=drawn.view, text=words)


@jax.jit
def read_prompt(encoder: text.UMT5, model: dit.WanDiT, ids: Array, mask: Array) -> KV:
    """The cross-attention keys and values of one prompt for every layer."""
    return dit.text_kv(model, text.encode(encoder, ids, mask))


def video_id(prompt: str) -> int:
    """The id that decides a video's noise unless one is given: a hash of its first prompt."""
    return int.from_bytes(hashlib.sha256(tokenizer.clean(prompt).encode()).digest()[:4], "big")


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A loaded model. `stream` yields finished blocks, `generate` a whole video."""

    experiment: Experiment
    nets: sampler.Nets
    text: text.UMT5
    pixels: codec.Codec
    tokenizer: tokenizer.Tokenizer

    @classmethod
    def from_pretrained(cls, folder: str | Path | None = None) -> "Pipeline":
        """The model of a folder (config, weights, tokenizer); by default the one that ships."""
        folder = Path(folder or SHIPPED)
        exp, flat = checkpoints.load_model(folder)

        def part(name: str, build) -> Any:
            held = {path: jnp.asarray(leaf) for path, leaf in checkpoints.part(flat, name).items()}
            return trees.fill(jax.eval_shape(build), held, source=f"the {name} weights of {folder}")

        nets = sampler.Nets(dit=part("dit", lambda: dit.WanDiT(exp.dit, nnx.Rngs(0))),
                            compressor=part("compressor", lambda: compressor.Compressor(exp, nnx.Rngs(0))))  # fmt: skip
        return cls(experiment=exp, nets=nets, text=part("text", lambda: text.UMT5(exp.text, nnx.Rngs(0))),
                   pixels=part("codec", lambda: codec.make(exp.codec, nnx.Rngs(0))),
                   tokenizer=tokenizer.Tokenizer.from_file(folder / "tokenizer.json", exp.text.max_words))  # fmt: skip

    def with_memory(self, profile: str) -> "Pipeline":
        """The same model with another memory: a name in `config.PROFILES`."""
        require(profile in PROFILES, f"memory profile {profile!r} is unknown; {options.nearest(profile, PROFILES)}")
        return dataclasses.replace(self, experiment=dataclasses.replace(self.experiment, cache=PROFILES[profile]))

    def with_settings(self, sets: Sequence[str]) -> "Pipeline":
        """The same weights with settings changed, such as `cache.top=8`."""
        return dataclasses.replace(self, experiment=options.override(self.experiment, list(sets)))

    def start(self, *, seed: int, videos: Sequence[int]) -> State:
        """The state before the first block of `videos`."""
        exp = self.experiment
        return State(memory=cache.init(exp, len(videos)), seed=jnp.uint32(seed), videos=jnp.asarray(videos, jnp.uint32),
                     decoder=codec.init_decoder(self.pixels, len(videos), *exp.latent))  # fmt: skip

    def words(self, prompts: Sequence[str]) -> KV:
        """Text keys and values of one prompt per video."""
        ids, mask = self.tokenizer.encode(prompts)
        return read_prompt(self.text, self.nets.dit, jnp.asarray(ids), jnp.asarray(mask))

    def step(self, state: State, words: KV, *, first: bool) -> tuple[State, Array, sampler.Drawn]:
        """One block of every video: the state after it, its frames [b, t, height, width, 3], and how it was drawn.

        The memory inside `state` is used up.
        """
        drawn = draw_block(self.nets, self.experiment, state, words)
        frames, low, decoder = show_block(self.pixels, self.experiment, state.decoder, drawn.latent, first=first)
        memory = remember_block(self.nets, self.experiment, state.memory, drawn, low, words)
        return dataclasses.replace(state, memory=memory, decoder=decoder), frames, drawn

    def stream(self, prompts: Sequence[str], *, seed: int = 0, identity: int | None = None) -> Iterator[Finished]:
        """Finished blocks of one video, one prompt per block; all are checked before the first is drawn.

        A longer run begins with the shorter one, bit for bit; a changed later prompt leaves earlier blocks alone.
        """
        require(len(prompts) > 0, "a video needs at least one block; give one prompt per block.")
        self.tokenizer.encode(list(dict.fromkeys(prompts)))
        return self._stream(prompts, seed, video_id(prompts[0]) if identity is None else identity)

    def _stream(self, prompts: Sequence[str], seed: int, identity: int) -> Iterator[Finished]:
        state, words = self.start(seed=seed, videos=[identity]), None
        for index, prompt in enumerate(prompts):
            if words is None or prompt != prompts[index - 1]:
                words = self.words([prompt])
            state, frames, drawn = self.step(state, words, first=index == 0)
            shown = np.asarray(frames[0])
            video.guard(shown, first=index * len(shown))
            yield Finished(index=index, prompt=prompt, frames=shown, latent=np.asarray(drawn.latent[0]),
                           chosen=np.asarray(drawn.chosen[:, 0]))  # fmt: skip

    def generate(self, prompts: Sequence[str], *, seed: int = 0, identity: int | None = None) -> np.ndarray:
        """The whole video [frames, height, width, 3] in [-1, 1]; `stream` keeps less in memory."""
        return np.concatenate([block.frames for block in self.stream(prompts, seed=seed, identity=identity)])

    def blocks_of(self, seconds: float) -> int:
        """Blocks that make a video of at least `seconds`."""
        require(np.isfinite(seconds) and seconds > 0, f"seconds={seconds} is not a length; give a number above 0.")
        exp = self.experiment
        latents = codec.latents_of(exp.codec, int(np.ceil(seconds * exp.fps)))
        return max(1, -(-latents // exp.cache.block))

