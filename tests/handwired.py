"""A transformer whose weights are set by hand, so that what it must answer is known: it asks its memory for a mark.

Latents hold a guest's id and mark one-hot at the guest's place, and a cue where a guest is expected. Recalling: the
prompt brings the id to every token (cross-attention of layer 0), the cue lets only the guest's place ask for it (MLP
of layer 0), keys answer by id and values by mark (attention of layer 1). Reading: keys carry nothing but their place,
and a token takes the marks from a fixed distance in time. Both sample clean latents from real queries and keys.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from packforcing_jax import pytrees
from packforcing_jax.config import (
    CacheConfig,
    CompressorConfig,
    DiTConfig,
    Experiment,
    SampleConfig,
    SpaceToDepthConfig,
)
from packforcing_jax.memory import cache
from packforcing_jax.networks import compressor, dit
from packforcing_jax.sampling import block_step

IDS = 8
MARKS = 6
WORDS = 3  # guests, their marks, words of a prompt
ID = 0
MARK = IDS
CUE = IDS + MARKS  # latent channels
PLACE = (slice(None), 1, slice(4, 8))  # of a guest: every frame, second row, right half
CHANNELS = 27
CELLS = 2
FREQUENCIES = (6, 3, 2)  # rotary pairs in time, rows, columns

# Channels of the residual stream
SEEN_ID, SEEN_MARK, SEEN_CUE, TOLD, ASKED, ANSWER, FIXED = np.cumsum(
    [0, IDS, MARKS, 1, IDS, IDS, MARKS]
)
LEVEL = 8.0  # of the fixed pair of channels, which makes the norms of all tokens nearly equal

# Channels of the head that matches: slow pairs carry content, fast ones positions
HEAD = 1
HEAD_DIM = 2 * sum(FREQUENCIES)
SLOW = HEAD * HEAD_DIM + np.asarray(
    [6, 7, 8, 9, 10, 11, 14, 15, 16]
)  # time pairs 3-5, row pairs 1-2
FAST = (0, 1, 2, 6, 9)  # time pairs 0-2, row pair 0, column pair 0
THETA = 5.0**6  # a fifth from one time pair to the next, so that no distance looks like another


def experiment(**memory) -> Experiment:
    """Blocks of 3 frames of 2x4 tokens that pack to 2x1x2; sink 6, recent 3, the best 16 of up to 60."""
    sizes = {
        "block": 3,
        "sink": 6,
        "recent": 3,
        "top": 16,
        "capacity": 60,
        "score_pool": (3, 1, 2),
        "key_multiple": 16,
    }
    return Experiment(
        name="handwired",
        dit=DiTConfig(
            dim=3 * HEAD_DIM,
            ffn_dim=IDS + 1,
            heads=3,
            layers=2,
            text_dim=IDS + 2,
            text_len=5,
            freq_dim=4,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            patch=(1, 1, CELLS),
            rope_theta=(THETA,) * 3,
            rope_pairs=FREQUENCIES,
        ),
        codec=SpaceToDepthConfig(factor=3),
        latent=(2, 8),
        cache=CacheConfig(**(sizes | memory)),
        compressor=CompressorConfig(
            channels=(2, 3, 5), strides=((2, 1, 1), (1, 2, 2), (1, 1, 2)), pool=(2, 1, 1)
        ),
        sample=SampleConfig(steps=(1000, 500), prediction="clean"),
    )


def bare(exp: Experiment) -> dict[str, np.ndarray]:
    """Weights that pass tokens on unchanged: zeros, open gates, patches that read and write the latent channels."""
    shapes = pytrees.flatten(model(exp))
    flat = {
        name: np.full(leaf.shape, name.endswith("scale"), np.float32)
        for name, leaf in shapes.items()
    }
    flat["blocks/modulation"][:, [2, 5]] = 1
    for cell in range(CELLS):
        for channel, stream in ((ID, SEEN_ID), (MARK, SEEN_MARK)):
            for i in range(IDS if channel == ID else MARKS):
                flat["patch/kernel"][(channel + i) * CELLS + cell, stream + i] = 1 / CELLS
        flat["patch/kernel"][CUE * CELLS + cell, SEEN_CUE] = 1 / CELLS
        connect(flat["head/kernel"], ANSWER, cell * CHANNELS + MARK, MARKS, 1 / GAIN)
        connect(flat["head/kernel"], ASKED, cell * CHANNELS + ID, IDS, 1 / GAIN)
    flat["patch/bias"][FIXED : FIXED + 2] = LEVEL, -LEVEL
    return flat


GAIN = np.sqrt(3 * HEAD_DIM / 2) / LEVEL  # of a norm: what LEVEL leaves of one unit


def connect(kernel: np.ndarray, source: int, target: int, count: int, weight: float) -> None:
    """Sets `weight` from each of `count` channels at `source` to its partner at `target`."""
    kernel[np.arange(source, source + count), np.arange(target, target + count)] = weight


def model(exp: Experiment) -> dit.WanDiT:
    """The shapes of the transformer."""
    return jax.eval_shape(lambda: dit.WanDiT(exp.dit, nnx.Rngs(0)))


def nets(exp: Experiment, flat: dict[str, np.ndarray]) -> block_step.Nets:
    """The transformer with the weights `flat`, and a compressor as it is before training: low resolution alone."""
    shapes = jax.eval_shape(lambda: compressor.build(exp.step, nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    high = {
        name: rng.normal(size=leaf.shape) * (not name.startswith("out/"))
        for name, leaf in pytrees.flatten(shapes).items()
    }
    transformer = pytrees.fill(model(exp), jax.tree.map(jnp.asarray, flat))
    return block_step.Nets(
        dit=transformer.unrolled(),
        compressor=pytrees.fill(shapes, jax.tree.map(jnp.asarray, high)),
    )


def values_to_answer(flat: dict[str, np.ndarray], layer: int) -> None:
    """Values of `layer` carry the mark that a token shows, and their mixture becomes the answer."""
    first = HEAD * HEAD_DIM
    connect(flat["blocks/attn/v/kernel"][layer], SEEN_MARK, first, MARKS, 1 / GAIN)
    connect(flat["blocks/attn/o/kernel"][layer], first, ANSWER, MARKS, 1.0)


def recalling(exp: Experiment) -> block_step.Nets:
    """A model that answers, at the cued place, the guest its prompt names with the mark that it finds in the memory."""
    flat = bare(exp)
    connect(flat["text_in/kernel"], 0, 0, IDS, 4.0)
    connect(flat["text_out/kernel"], 0, 0, IDS, 0.25)
    flat["blocks/cross/q/bias"][0, 0] = 1
    flat["blocks/cross/k/kernel"][0, :IDS, 0] = (
        1  # a word that names a guest is attended to, others are not
    )
    connect(flat["blocks/cross/v/kernel"][0], 0, 0, IDS, 1.0)
    connect(flat["blocks/cross/o/kernel"][0], 0, TOLD, IDS, 1.0)
    connect(flat["blocks/ffn_in/kernel"][0], TOLD, 0, IDS, 8 / GAIN)
    flat["blocks/ffn_in/kernel"][0, SEEN_CUE, :IDS] = 8 / GAIN
    flat["blocks/ffn_in/bias"][0, :IDS] = -12  # told and cued, not one of them
    connect(flat["blocks/ffn_out/kernel"][0], 0, ASKED, IDS, 0.25)

    for name, source, level in (("q", ASKED, 0.3), ("k", SEEN_ID, 0.5)):
        flat[f"blocks/attn/{name}/kernel"][1, np.arange(source, source + IDS), SLOW[:IDS]] = (
            1 / GAIN
        )
        flat[f"blocks/attn/{name}/bias"][1, SLOW[IDS]] = level  # what every token has in common
        flat[f"blocks/attn/{name}/bias"][1, HEAD * HEAD_DIM] = (
            0.1  # and a fast pair: places move all logits a little
        )
    flat["blocks/attn/norm_q/scale"][1, SLOW[:IDS]] = 2
    values_to_answer(flat, layer=1)
    return nets(exp, flat)


def reading(exp: Experiment, distance: float) -> block_step.Nets:
    """A model that answers with the marks at its own place, `distance` frames back, whatever keys contain."""
    flat = bare(exp)
    time, rows, columns = FREQUENCIES
    turns = np.concatenate(
        [THETA ** (-np.arange(time) / time) * distance, np.zeros(rows + columns)]
    )
    for pair in FAST:
        first = HEAD * HEAD_DIM + 2 * pair
        flat["blocks/attn/q/bias"][0, first : first + 2] = np.cos(turns[pair]), -np.sin(turns[pair])
        flat["blocks/attn/k/bias"][0, first] = 1
    flat["blocks/attn/norm_q/scale"][0] = 25
    values_to_answer(flat, layer=0)
    return nets(exp, flat)


def prompts(guests: np.ndarray) -> np.ndarray:
    """Text states [b, words, text]: a filler, the guest's name (a filler if -1), another filler."""
    states = np.zeros((len(guests), WORDS, IDS + 2), np.float32)
    states[:, ::2, IDS] = 1
    named = np.where(guests < 0, IDS + 1, guests)
    states[np.arange(len(guests)), 1, named] = 1
    return states


def scene(guests: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """Clean latents [b, 3, 2, 8, c] with each video's guest at its place; an empty scene where the guest is -1."""
    latent = np.zeros((len(guests), 3, 2, 8, CHANNELS), np.float32)
    for video in np.flatnonzero(guests >= 0):
        latent[(video, *PLACE, ID + guests[video])] = 1
        latent[(video, *PLACE, MARK + marks[video])] = 1
    return latent


def low(latent):
    """Low-resolution latents [b, 2, 1, 4, c] that keep ids and marks: every second frame, row and column."""
    return latent[:, ::2, 1:, ::2]


def noises(rng: np.random.Generator, videos: int) -> np.ndarray:
    """Faint noise [step, b, 3, 2, 8, c] for both steps, with the cue at the guest's place."""
    noise = 0.1 * rng.normal(size=(2, videos, 3, 2, 8, CHANNELS)).astype(np.float32)
    noise[..., CUE] = 0
    noise[(slice(None), slice(None), *PLACE, CUE)] = 1
    return noise


@dataclasses.dataclass(frozen=True)
class Player:
    """One jitted block step for all blocks of all models of an experiment: denoise, then commit what is given."""

    exp: Experiment

    def __post_init__(self):
        object.__setattr__(self, "step", jax.jit(self._step))

    def _step(self, nets, memory, noise, prompt, latent):
        text = nets.dit.text_kv(prompt)
        no_scores = jnp.zeros((self.exp.dit.layers, len(prompt), self.exp.cache.slots))
        given = block_step.Noise(noise=noise[0], renoise=noise[1:], random=no_scores)
        denoiser = block_step.Denoiser(nets, self.exp.step, text)
        memory, denoised = block_step.denoise_block(denoiser, memory, given)
        after, _ = block_step.commit_block(
            denoiser, memory, latent, low(latent), denoised.selection
        )
        return after, denoised.latent, jnp.stack([one.ids for one in denoised.selection])

    def history(self, nets, rng, script):
        """The memories before every block of `script`, a list of (prompt, latent), and the one behind the last."""
        memories = [cache.init(self.exp.memory, len(script[0][0]))]
        for prompt, latent in script:
            memories.append(
                self.step(nets, memories[-1], noises(rng, len(prompt)), prompt, latent)[0]
            )
        return memories

    def ask(self, nets, rng, memory, guests):
        """(marks [b] at the guest's place when `guests` are called, ids [layer, b, top] attended to); read-only."""
        empty = scene(np.full(len(guests), -1), guests)
        _, latent, chosen = self.step(
            nets, memory, noises(rng, len(guests)), prompts(guests), empty
        )
        shown = np.asarray(latent)[(slice(None), *PLACE, slice(MARK, MARK + MARKS))].mean(
            axis=(1, 2)
        )
        return shown.argmax(axis=-1), np.asarray(chosen)
