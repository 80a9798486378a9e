"""What objectives read: clips block by block with their text, and the networks that take part."""

from collections.abc import Mapping
from typing import Any, TypeAlias, TypeVar, cast

import einops
import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import Array

from packforcing_jax import pytrees
from packforcing_jax.config import DiTConfig, Experiment
from packforcing_jax.errors import require
from packforcing_jax.networks import codec, compressor, dit
from packforcing_jax.networks import text as umt5
from packforcing_jax.sampling import block_step
from packforcing_jax.types import KV

Flat: TypeAlias = dict[str, Array]  # parameters by path
Leaf = TypeVar("Leaf")  # an array, or the shape of one
Tree = TypeVar("Tree")


@struct.dataclass
class TokenizedText:
    """A prompt per block as tokens."""

    ids: Array  # [block, b, words]
    mask: Array  # [block, b, words]


Text: TypeAlias = TokenizedText | Array  # the array: encoder states [block or 1, b, words, d]


@struct.dataclass
class Batch:
    """Clips, `block` latent frames at a time; what an objective does not need may be None."""

    text: Any  # Text
    latent: Any = None  # [block, b, t, y, x, c]
    low_res: Any = None  # [block, b, t', y', x', c]  low-resolution latents of the same frames
    trajectory: Any = (
        None  # [k, block, b, t, y, x, c]  a teacher's trajectory from noise to its clip
    )
    weight: Any = None  # [block, b, t, y, x, 1]  scales the loss of each latent cell
    called: Any = (
        None  # [block, b, kind, block]  earlier blocks that show what this one calls back, by kind
    )


@struct.dataclass
class Model:
    """What a generator is made of; `text` is None where states of the text come with the data."""

    dit: dit.WanDiT
    compressor: compressor.Compressor
    text: Any = None  # umt5.UMT5

    @property
    def nets(self) -> block_step.Nets:
        return block_step.Nets(dit=self.dit, compressor=self.compressor)


@struct.dataclass
class Networks:
    """Who takes part in a step: the generator in training, and the networks that an objective evaluates."""

    generator: Model
    teacher: Any = None  # Model
    critic: Any = None  # WanDiT
    average: Any = None  # Model, the generator's running average
    vae: Any = None  # the codec, by which a rollout sees its own frames
    null_text: Any = None  # [words, d]  states of the null text; None: zeros


def new_model(exp: Experiment, key: Array, *, reads: bool = True) -> Model:
    """A generator from scratch, with a text encoder if it `reads`.

    Keys start equal to queries: matching by content is then there to be refined.
    """
    keys = jax.random.split(key, 3)
    model = Model(
        dit=dit.WanDiT(exp.dit, nnx.Rngs(keys[0])),
        compressor=compressor.build(exp.step, nnx.Rngs(keys[1])),
        text=umt5.UMT5(exp.text, nnx.Rngs(keys[2])) if reads else None,
    )
    attn = model.dit.blocks.attn
    attn.k.kernel = nnx.Param(jnp.copy(attn.q.kernel[...]))
    return model


def as_model(exp: Experiment, params: Mapping[str, Array]) -> Model:
    """The modules that hold `params`, whose paths begin with dit/, compressor/ and, if it reads, text/."""
    reads = any(path.startswith("text/") for path in params)
    shapes = jax.eval_shape(lambda: new_model(exp, jax.random.key(0), reads=reads))
    return pytrees.fill(shapes, params, put=pytrees.unchanged)


def part(params: Mapping[str, Leaf], name: str) -> dict[str, Leaf]:
    """What lies below `name` in flat parameters."""
    return {
        path.removeprefix(f"{name}/"): leaf
        for path, leaf in params.items()
        if path.startswith(f"{name}/")
    }


def as_transformer(cfg: DiTConfig, params: Mapping[str, Array]) -> dit.WanDiT:
    """A transformer of these sizes alone, from the paths under dit/."""
    shapes = jax.eval_shape(lambda: dit.WanDiT(cfg, nnx.Rngs(0)))
    return pytrees.fill(shapes, part(params, "dit"), put=pytrees.unchanged)


def as_codec(exp: Experiment, params: Mapping[str, Array] | None) -> codec.Codec | None:
    """The codec of these parameters; None where it has some and they are not known."""
    shapes = codec.shapes(exp.codec)
    if params is None and pytrees.flatten(shapes):
        return None
    return pytrees.fill(shapes, params or {}, put=pytrees.unchanged)


def encode(exp: Experiment, vae: codec.Codec, raw: Mapping[str, Array]) -> Batch:
    """A raw batch, clips in front, as objectives read it; pixels are encoded here, latents were before."""
    blocked = {"latent": by_block(raw["latent"], exp.cache.block)} if "latent" in raw else {}
    swapped = {name: jnp.moveaxis(raw[name], 1, 0) for name in ("low_res", "called") if name in raw}
    if "video" in raw:
        blocked |= encode_blocks(exp, vae, raw["video"])
    if "trajectory" in raw:
        blocked["trajectory"] = einops.rearrange(
            raw["trajectory"], "b k (block t) y x c -> k block b t y x c", t=exp.cache.block
        )
    if "weight" in raw:
        blocked["weight"] = einops.reduce(
            raw["weight"],
            "b block t (y i) (x j) -> block b t y x 1",
            "mean",
            i=exp.codec.space_factor,
            j=exp.codec.space_factor,
        )
    if "states" in raw:
        text: Text = raw["states"].astype(jnp.float32)[None]
    else:
        text = TokenizedText(*(jnp.moveaxis(raw[name], 1, 0) for name in ("ids", "mask")))
    floats = {
        name: leaf.astype(jnp.float32) if leaf.dtype != bool else leaf
        for name, leaf in {**blocked, **swapped}.items()
    }
    return Batch(text=text, **floats)


def encode_blocks(exp: Experiment, vae: codec.Codec, video: Array) -> dict[str, Array]:
    """The latents of whole clips [b, frames, height, width, 3], block by block, and of each block in low resolution."""
    blocks = einops.rearrange(video, "b (block t) y x c -> (block b) t y x c", t=exp.cache.block)
    low_res = codec.low_res_latents(
        vae, blocks, latents=exp.packed_grid[0], pool=exp.compressor.pool
    )
    return {
        "latent": by_block(codec.encode(vae, video), exp.cache.block),
        "low_res": einops.rearrange(
            low_res, "(block b) t y x c -> block b t y x c", b=video.shape[0]
        ),
    }


def text_states(model: Model, text: Text) -> Array:
    """Encoder states [block or 1, b, words, d] of every block's prompt."""
    if not isinstance(text, TokenizedText):
        return text
    flat = [einops.rearrange(x, "block b words -> (block b) words") for x in (text.ids, text.mask)]
    states = umt5.encode(model.text, *flat)
    return einops.rearrange(states, "(block b) words d -> block b words d", b=text.ids.shape[1])


def without_text(states: Array, null_text: Array | None, where: Array | bool = True) -> Array:
    """`states` with those of the clips [b] `where` it is hidden replaced by the null text."""
    nothing = jnp.zeros_like(states)
    if null_text is not None:
        short = states.shape[2] - null_text.shape[0]
        require(
            short >= 0,
            f"train.negative_prompt has {null_text.shape[0]} words, but the data's text holds {states.shape[2]}; "
            "shorten it or prepare the data with longer text.",
        )
        nothing = nothing + jnp.pad(null_text, ((0, short), (0, 0)))[None, None].astype(
            states.dtype
        )
    return jnp.where(jnp.reshape(where, (1, -1, 1, 1)), nothing, states)


def text_kv(transformer: dit.WanDiT, states: Array) -> KV:
    """Cross-attention keys and values [block or 1, layer, b, words, n, h] of such states."""
    flat = einops.rearrange(states, "block b words d -> (block b) words d")
    kv = cast(KV, transformer.text_kv(flat))  # layers of a model in training are stacked
    return KV(
        *(
            einops.rearrange(
                x, "layer (block b) words n h -> block layer b words n h", b=states.shape[1]
            )
            for x in (kv.k, kv.v)
        )
    )


def of_block(per_block: Tree, block: Array) -> Tree:
    """What there is for one block, or for all of them if there is only one entry."""
    return jax.tree.map(lambda x: x[jnp.minimum(block, x.shape[0] - 1)], per_block)


def by_clip(blocks: Array) -> Array:
    """[block, b, t, ...] as whole clips [b, block*t, ...]."""
    return einops.rearrange(blocks, "block b t y x c -> b (block t) y x c")


def by_block(clips: Array, block: int) -> Array:
    """Whole clips [b, frames, ...] as [block, b, t, ...], `block` frames each."""
    return einops.rearrange(clips, "b (block t) y x c -> block b t y x c", t=block)
