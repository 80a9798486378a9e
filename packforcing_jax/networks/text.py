"""The text encoder: UMT5 (Wan2.1 `t5.py`), where every layer has its own relative position bias."""

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jaxtyping import Float, Int

from packforcing_jax.config import TextConfig
from packforcing_jax.errors import require
from packforcing_jax.networks import layers
from packforcing_jax.types import Heads, Mask, TextStates, TokenIds

EPS = 1e-6


def buckets(words: int, count: int, max_distance: int) -> Int[np.ndarray, "q k"]:
    """The bias bucket of each (query, key): half of `count` per direction, exact when near, logarithmic when far."""
    relative = np.arange(words)[None, :] - np.arange(words)[:, None]
    half = count // 2
    exact = count // 4
    distance = np.abs(relative)
    steps = np.log(np.maximum(distance, 1) / exact) / np.log(max_distance / exact) * (half - exact)
    far = np.minimum(exact + np.floor(steps).astype(int), half - 1)
    return np.where(distance < exact, distance, far) + half * (relative > 0)


def _dense(inputs: int, outputs: int, std: float, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        inputs, outputs, use_bias=False, kernel_init=nnx.initializers.normal(std), rngs=rngs
    )


def _rows(table: nnx.Embed, ids: Array) -> Array:
    """The table's rows in the dtype its weights have now; not-a-number for an id beyond them."""
    return jnp.take(table.embedding[...], ids, axis=0, mode="fill")


class Attention(nnx.Module):
    """Attention without 1/sqrt(h) scaling: T5 puts that factor into the initial queries."""

    def __init__(self, cfg: TextConfig, rngs: nnx.Rngs):
        head = cfg.dim_attn // cfg.heads
        self.q = _dense(cfg.dim, cfg.dim_attn, (cfg.dim * head) ** -0.5, rngs)
        self.k = _dense(cfg.dim, cfg.dim_attn, cfg.dim**-0.5, rngs)
        self.v = _dense(cfg.dim, cfg.dim_attn, cfg.dim**-0.5, rngs)
        self.o = _dense(cfg.dim_attn, cfg.dim, cfg.dim_attn**-0.5, rngs)
        self.heads = cfg.heads

    def split(self, x: TextStates) -> Heads:
        return einops.rearrange(x, "b k (n h) -> b k n h", n=self.heads)

    def __call__(self, x: TextStates, bias: Float[Array, "1 n q k"], mask: Mask) -> TextStates:
        q = self.split(self.q(x))
        k = self.split(self.k(x))
        v = self.split(self.v(x))
        scores = jnp.einsum("bqnh,bknh->bnqk", q, k, preferred_element_type=jnp.float32) + bias
        masked = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
        mixed = jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(masked).astype(x.dtype), v)
        return self.o(einops.rearrange(mixed, "b q n h -> b q (n h)"))


class FeedForward(nnx.Module):
    """Gated MLP: fc2(fc1(x) * gelu(gate(x))), with the tanh form of GELU."""

    def __init__(self, cfg: TextConfig, rngs: nnx.Rngs):
        self.gate = _dense(cfg.dim, cfg.dim_ffn, cfg.dim**-0.5, rngs)
        self.fc1 = _dense(cfg.dim, cfg.dim_ffn, cfg.dim**-0.5, rngs)
        self.fc2 = _dense(cfg.dim_ffn, cfg.dim, cfg.dim_ffn**-0.5, rngs)

    def __call__(self, x: TextStates) -> TextStates:
        return self.fc2(self.fc1(x) * jax.nn.gelu(self.gate(x), approximate=True))


class Block(nnx.Module):
    """One encoder layer: attention and MLP, each on normed states and added back."""

    def __init__(self, cfg: TextConfig, rngs: nnx.Rngs):
        self.norm1 = layers.RMSNorm(cfg.dim, EPS)
        self.norm2 = layers.RMSNorm(cfg.dim, EPS)
        self.attn = Attention(cfg, rngs)
        initial = nnx.initializers.normal(cfg.dim**-0.5)
        self.position = nnx.Embed(cfg.buckets, cfg.heads, embedding_init=initial, rngs=rngs)
        self.ffn = FeedForward(cfg, rngs)

    def __call__(self, x: TextStates, bucket: Int[Array, "q k"], mask: Mask) -> TextStates:
        bias = einops.rearrange(_rows(self.position, bucket), "q k n -> 1 n q k")
        x = x + self.attn(self.norm1(x), bias, mask)
        return x + self.ffn(self.norm2(x))


class UMT5(nnx.Module):
    """All parameters of the encoder; the blocks are stacked along a leading layer axis."""

    def __init__(self, cfg: TextConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embedding = nnx.Embed(
            cfg.vocab, cfg.dim, embedding_init=nnx.initializers.normal(1.0), rngs=rngs
        )
        self.blocks = nnx.vmap(lambda key: Block(cfg, nnx.Rngs(key)))(
            jax.random.split(rngs.params(), cfg.layers)
        )
        self.norm = layers.RMSNorm(cfg.dim, EPS)


def layer(block: Block, x: TextStates, mask: Mask, cfg: TextConfig) -> TextStates:
    """States after one of the encoder's layers; real tokens alone are attended to."""
    bucket = jnp.asarray(buckets(x.shape[1], cfg.buckets, cfg.max_distance))
    return block(x, bucket, mask)


def finish(
    norm: layers.RMSNorm, x: TextStates, mask: Mask, *, zero_padding: bool = True
) -> TextStates:
    """States behind the last layer; those of padding are zero, as the DiT expects, or left as they are."""
    states = norm(x)
    return jnp.where(mask[..., None], states, 0) if zero_padding else states


def encode(
    model: UMT5, ids: TokenIds, mask: Int[Array, "b words"] | Mask, *, zero_padding: bool = True
) -> TextStates:
    """Text states of every token; those of padding are zero, or left as the encoder made them."""
    require(
        ids.shape == mask.shape,
        f"text ids {ids.shape} and mask {mask.shape} differ in shape; give one per token.",
    )
    real = jnp.asarray(mask).astype(bool)
    x, _ = jax.lax.scan(
        lambda x, block: (layer(block, x, real, model.cfg), None),
        _rows(model.embedding, jnp.asarray(ids)),
        model.blocks,
    )
    return finish(model.norm, x, real, zero_padding=zero_padding)
