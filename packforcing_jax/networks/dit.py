"""The Wan2.1 diffusion transformer, bidirectional or causal, as one scan over stacked blocks (Wan2.1 `model.py`).

The network knows nothing of caches: a block hands its queries, keys and values to `self_attention`, a function that
decides whom they attend to and what is kept of them. Full attention, masks and the packed memory are three such
functions.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax import Array
from jaxtyping import Float

from packforcing_jax import pytrees, sharding
from packforcing_jax.config import DiTConfig
from packforcing_jax.networks import layers, rope
from packforcing_jax.policies import attention
from packforcing_jax.pytrees import PerLayer
from packforcing_jax.types import KV, Heads, Latent, Tokens

AttentionFn = Callable[..., Heads]  # attend(q, k, v), as in attention.BACKENDS
# (q, k, v, past) -> (attended values, anything worth keeping); q, k without positions, past = this layer's share
SelfAttention = Callable[[Heads, Heads, Heads, Any], tuple[Heads, Any]]


class Attention(nnx.Module):
    """Projections with a root-mean-square norm over all channels before the heads are split."""

    def __init__(self, cfg: DiTConfig, rngs: nnx.Rngs):
        self.q, self.k, self.v, self.o = (nnx.Linear(cfg.dim, cfg.dim, rngs=rngs) for _ in range(4))
        self.norm_q = layers.RMSNorm(cfg.dim, cfg.eps)
        self.norm_k = layers.RMSNorm(cfg.dim, cfg.eps)
        self.heads = cfg.heads

    def split(self, x: Tokens) -> Heads:
        return einops.rearrange(x, "b k (n h) -> b k n h", n=self.heads)

    def queries(self, x: Tokens) -> Heads:
        return self.split(self.norm_q(self.q(x)))

    def keys_values(self, x: Tokens) -> KV:
        return KV(k=self.split(self.norm_k(self.k(x))), v=self.split(self.v(x)))

    def merge(self, attended: Heads) -> Tokens:
        return self.o(einops.rearrange(attended, "b q n h -> b q (n h)"))


class Block(nnx.Module):
    """One transformer layer: modulated self-attention, cross-attention to the text, modulated MLP."""

    def __init__(self, cfg: DiTConfig, rngs: nnx.Rngs):
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (6, cfg.dim)) * cfg.dim**-0.5)
        self.attn = Attention(cfg, rngs)
        self.cross = Attention(cfg, rngs)
        self.norm3 = layers.LayerNorm(cfg.dim, cfg.eps)
        self.ffn_in = nnx.Linear(cfg.dim, cfg.ffn_dim, rngs=rngs)
        self.ffn_out = nnx.Linear(cfg.ffn_dim, cfg.dim, rngs=rngs)
        self.eps = cfg.eps

    def rows(self, time: Float[Array, "b t 6 d"]) -> Sequence[Array]:
        """Shift, scale and gate [b, t, d] of self-attention, then of the MLP."""
        return jnp.unstack(self.modulation[...].astype(time.dtype)[None, None] + time, axis=2)

    def keys_values(self, x: Tokens, time: Float[Array, "b t 6 d"]) -> KV:
        """The keys and values that self-attention makes of `x`."""
        shift, scale, *_ = self.rows(time)
        return self.attn.keys_values(layers.modulate(layers.standardize(x, self.eps), shift, scale))

    def __call__(
        self,
        x: Tokens,
        time: Float[Array, "b t 6 d"],
        text: KV,
        past: Any,
        self_attention: SelfAttention,
        cross_attention: AttentionFn,
    ) -> tuple[Tokens, Any]:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.rows(time)
        y = layers.modulate(layers.standardize(x, self.eps), shift, scale)
        own = self.attn.keys_values(y)
        attended, outputs = self_attention(self.attn.queries(y), own.k, own.v, past)
        x = x + self.attn.merge(attended) * layers.per_frame(x, gate)
        text_kv_in = cross_attention(self.cross.queries(self.norm3(x)), text.k, text.v)
        x = x + self.cross.merge(text_kv_in)
        y = layers.modulate(layers.standardize(x, self.eps), shift_mlp, scale_mlp)
        return x + self.ffn_out(jax.nn.gelu(self.ffn_in(y), approximate=True)) * layers.per_frame(
            x, gate_mlp
        ), outputs


@struct.dataclass
class TimeStates:
    """The embedded timestep of each frame: `e` [b, t, d] for the head, `rows` [b, t, 6, d] for the blocks."""

    e: Array
    rows: Array


class WanDiT(nnx.Module):
    """All parameters of the transformer; the blocks are stacked along a leading layer axis, or `unrolled`."""

    def __init__(self, cfg: DiTConfig, rngs: nnx.Rngs):
        cells = int(np.prod(cfg.patch))
        self.cfg = cfg
        self.patch = nnx.Linear(cfg.in_channels * cells, cfg.dim, rngs=rngs)
        self.text_in = nnx.Linear(cfg.text_dim, cfg.dim, rngs=rngs)
        self.text_out = nnx.Linear(cfg.dim, cfg.dim, rngs=rngs)
        self.time_in = nnx.Linear(cfg.freq_dim, cfg.dim, rngs=rngs)
        self.time_out = nnx.Linear(cfg.dim, cfg.dim, rngs=rngs)
        self.time_proj = nnx.Linear(cfg.dim, 6 * cfg.dim, rngs=rngs)
        self.blocks = nnx.vmap(lambda key: Block(cfg, nnx.Rngs(key)))(
            jax.random.split(rngs.params(), cfg.layers)
        )
        self.head_modulation = nnx.Param(
            jax.random.normal(rngs.params(), (2, cfg.dim)) * cfg.dim**-0.5
        )
        self.head = nnx.Linear(cfg.dim, cfg.out_channels * cells, rngs=rngs)

    def embed(self, latent: Latent) -> Tokens:
        """Patch tokens in the order frame, row, column; inside a patch the channel is slowest.

        They have the weights' dtype, which all that follows then has.
        """
        pt, py, px = self.cfg.patch
        cells = einops.rearrange(
            latent, "b (t pt) (y py) (x px) c -> b (t y x) (c pt py px)", pt=pt, py=py, px=px
        )
        return self.patch(cells.astype(self.patch.kernel.dtype))

    def embed_time(self, timesteps: Float[Array, "b t"]) -> TimeStates:
        """Time states of per-frame timesteps on the 0..1000 scale (fractions allowed)."""
        wave = layers.sinusoid(timesteps, self.cfg.freq_dim)
        e = sharding.by_batch(self.time_out(sharding.by_batch(jax.nn.silu(self.time_in(wave)))))
        rows = sharding.by_batch(self.time_proj(sharding.by_batch(jax.nn.silu(e))))
        return TimeStates(e=e, rows=einops.rearrange(rows, "b t (six d) -> b t six d", six=6))

    def text_kv(self, states: Float[Array, "b words text"]) -> PerLayer[KV]:
        """Cross-attention keys and values per layer, [b, text_len, n, h], of encoder states zero-padded to `text_len`.

        Padding is attended to, as in the original: its zero rows pass the text MLP like any others.
        """
        padded = jnp.pad(states, ((0, 0), (0, self.cfg.text_len - states.shape[1]), (0, 0)))
        text_kv_in = self.text_in(padded.astype(self.text_in.kernel.dtype))
        text_kv_in = self.text_out(jax.nn.gelu(text_kv_in, approximate=True))
        return pytrees.over(lambda block: block.cross.keys_values(text_kv_in), self._layers())

    def run(
        self,
        x: Tokens,
        time: TimeStates,
        text: Any,
        *,
        past: Any,
        self_attention: SelfAttention,
        cross_attention: AttentionFn = attention.reference,
    ) -> tuple[Tokens, Any]:
        """Tokens after all blocks, and what each layer's `self_attention` kept.

        `text` and `past` hold one entry per layer; `cross_attention(q, k, v)` reads the text.
        Unrolled layers run one by one. Stacked ones are scanned: less to compile; under a gradient each is computed
        again rather than stored, which takes less memory and is faster on a CPU too.
        """
        if isinstance(self.blocks, nnx.List):
            outputs = []
            for block, text_kv_in, before in zip(
                self.blocks, text, past or [None] * len(self.blocks), strict=True
            ):
                x, one = block(x, time.rows, text_kv_in, before, self_attention, cross_attention)
                outputs.append(one)
            return x, outputs

        @partial(jax.checkpoint, prevent_cse=False)
        def layer(x, inputs):
            block, text_kv_in, before = inputs
            x = sharding.by_tokens(x)
            return block(x, time.rows, text_kv_in, before, self_attention, cross_attention)

        return jax.lax.scan(layer, x, (self.blocks, text, past))

    def output(self, x: Tokens, time: TimeStates, grid: tuple[int, int]) -> Latent:
        """The network's output as a latent; inside a patch the channel is fastest."""
        rows = self.head_modulation[...].astype(time.e.dtype)[None, None] + time.e[:, :, None]
        y = self.head(
            layers.modulate(layers.standardize(x, self.cfg.eps), rows[:, :, 0], rows[:, :, 1])
        )
        pt, py, px = self.cfg.patch
        return einops.rearrange(
            y,
            "b (t y x) (pt py px c) -> b (t pt) (y py) (x px) c",
            y=grid[0],
            x=grid[1],
            pt=pt,
            py=py,
            px=px,
        )

    def keys_values(self, x: Tokens, time: TimeStates | None) -> PerLayer[KV]:
        """Keys and values that each layer's own projections make of the same tokens `x`.

        Without a time they are neither normalised nor modulated before.
        """
        if time is None:
            return pytrees.over(lambda block: block.attn.keys_values(x), self._layers())
        return pytrees.over(lambda block: block.keys_values(x, time.rows), self._layers())

    def unrolled(self) -> "WanDiT":
        """The same model with its layers apart, run one by one: what each layer reads and writes stays in place."""
        apart = jax.tree.map(lambda leaf: leaf, self)
        apart.blocks = nnx.List(pytrees.unstack(self.blocks, self.cfg.layers))
        return apart

    def _layers(self) -> Any:
        """The transformer's blocks in either form."""
        return list(self.blocks) if isinstance(self.blocks, nnx.List) else self.blocks


def token_grid(cfg: DiTConfig, latent: Latent) -> tuple[int, int]:
    """(rows, columns) of tokens in one frame of `latent`."""
    return latent.shape[2] // cfg.patch[1], latent.shape[3] // cfg.patch[2]


def grid_positions(cfg: DiTConfig, latent: Latent) -> np.ndarray:
    """Grid places [t*s, 2] of the tokens of `latent`."""
    rows, columns = token_grid(cfg, latent)
    return rope.grid(np.arange(rows), np.arange(columns), latent.shape[1])


class _Frames(NamedTuple):
    """Where the frames of a pass lie in time, and which tokens see which; None: all see all."""

    positions: np.ndarray
    mask: Array | None = None  # [q, k]


def _whole(
    model: WanDiT,
    latent: Latent,
    timesteps: Array,
    context: Array,
    frames: _Frames,
    attention_fn: AttentionFn,
) -> Latent:
    """One pass over all frames.

    `context` [b, words, text] is read by all frames, [b, block, words, text] by as many equal blocks of them.
    """
    cfg = model.cfg
    size = np.prod(token_grid(model.cfg, latent))
    angles = rope.time_angles(
        jnp.asarray(np.repeat(frames.positions, size), jnp.float32), cfg
    ) + rope.space_angles(jnp.asarray(grid_positions(cfg, latent)), cfg)
    texts = context if context.ndim == 4 else context[:, None]
    blocks = texts.shape[1]

    def self_attention(q, k, v, past):
        q = rope.rotate(q, angles)
        k = rope.rotate(k, angles)
        return (
            attention_fn(q, k, v)
            if frames.mask is None
            else attention.reference(q, k, v, mask=frames.mask)
        ), None

    def read(q, k, v):
        by_block = einops.rearrange(q, "b (block q) n h -> (b block) q n h", block=blocks)
        return einops.rearrange(
            attention_fn(by_block, k, v), "(b block) q n h -> b (block q) n h", block=blocks
        )

    time = model.embed_time(timesteps)
    text_kv_in = model.text_kv(einops.rearrange(texts, "b block w d -> (b block) w d"))
    x, _ = model.run(
        model.embed(latent),
        time,
        text_kv_in,
        past=None,
        self_attention=self_attention,
        cross_attention=read,
    )
    return model.output(x, time, token_grid(cfg, latent)).astype(latent.dtype)


def bidirectional(
    model: WanDiT,
    latent: Latent,
    timesteps: Float[Array, "b t"],
    context: Array,
    *,
    attention_fn: AttentionFn = attention.reference,
) -> Latent:
    """The network's output when every frame sees every frame (the original Wan2.1; teacher and critic).

    `context` holds one prompt's states per clip [b, words, text], or per block of the clip [b, block, words, text].
    """
    frames = _Frames(np.arange(latent.shape[1]))
    return _whole(model, latent, timesteps, context, frames, attention_fn)


def block_of_frame(block_ends: tuple[int, ...]) -> np.ndarray:
    """Block index of each frame, given where blocks end, such as (1, 3, 5) -> [0, 1, 1, 2, 2]."""
    return np.repeat(np.arange(len(block_ends)), np.diff((0, *block_ends)))


def parallel(
    model: WanDiT,
    latent: Latent,
    timesteps: Float[Array, "b t"],
    context: Array,
    *,
    block_ends: tuple[int, ...],
    clean: Latent | None = None,
) -> Latent:
    """The causal network's output for all blocks at once (Self-Forcing `causal_model.py`).

    Without `clean`, a block sees itself and everything before it. With `clean` (teacher forcing), noisy frames see
    their own noisy block and clean blocks before it; clean frames (timestep 0) see clean blocks up to their own.
    """
    owner = block_of_frame(block_ends)
    frames = np.arange(latent.shape[1])
    size = int(np.prod(token_grid(model.cfg, latent)))
    if clean is None:
        visible = _mask(owner[:, None] >= owner[None], size)
        return _whole(
            model, latent, timesteps, context, _Frames(frames, visible), attention.reference
        )
    past = owner[:, None] > owner[None]
    now = owner[:, None] == owner[None]
    visible = _mask(np.block([[past | now, np.zeros_like(now)], [past, now]]), size)
    both, times = (
        jnp.concatenate(pair, axis=1)
        for pair in ((clean, latent), (jnp.zeros_like(timesteps), timesteps))
    )
    texts = jnp.tile(context, (1, 2, 1, 1)) if context.ndim == 4 else context
    twice = _Frames(np.tile(frames, 2), visible)
    whole = _whole(model, both, times, texts, twice, attention.reference)
    return whole[:, latent.shape[1] :]


def _mask(frames: np.ndarray, size: int) -> Array:
    """A token mask from a frame mask, `size` tokens per frame."""
    return jnp.asarray(np.repeat(np.repeat(frames, size, axis=0), size, axis=1))
