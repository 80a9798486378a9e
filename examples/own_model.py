"""A base model of one's own: two layers without cross-attention and a head of its own, in the same memory.

    python examples/own_model.py
    packforcing plan --config examples/own_model.py

The text reaches it as one vector that is added to every token. Its weights are drawn at random: it shows what has to
be there, not a good video.
"""

from dataclasses import dataclass

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from packforcing_jax.config import (
    CacheConfig,
    CompressorConfig,
    Experiment,
    SpaceToDepthConfig,
    TextConfig,
)
from packforcing_jax.types import KV


@dataclass(frozen=True)
class OwnConfig:
    """Sizes that the memory and the block step ask for, and `build`."""

    dim: int = 48
    heads: int = 2
    head_dim: int = 24
    layers: int = 2
    text_dim: int = 32
    text_len: int = 16
    in_channels: int = 48
    patch: tuple[int, int, int] = (1, 1, 1)
    pairs: tuple[int, int, int] = (6, 3, 3)
    rope_theta: tuple[float, float, float] = (1000.0, 100.0, 100.0)

    def build(self, rngs):
        return OwnModel(self, rngs)


class OwnLayer(nnx.Module):
    """Attention and a linear step, each added to its input."""

    def __init__(self, cfg, rngs):
        self.qkv = nnx.Linear(cfg.dim, 3 * cfg.heads * cfg.head_dim, rngs=rngs)
        self.out = nnx.Linear(cfg.heads * cfg.head_dim, cfg.dim, rngs=rngs)
        self.mlp = nnx.Linear(cfg.dim, cfg.dim, rngs=rngs)
        self.heads = cfg.heads

    def project(self, x):
        return einops.rearrange(
            self.qkv(x), "b q (three n h) -> three b q n h", three=3, n=self.heads
        )

    def __call__(self, x, past, self_attention):
        mixed, kept = self_attention(*self.project(x), past)
        x = x + self.out(einops.rearrange(mixed, "b q n h -> b q (n h)"))
        return x + jax.nn.silu(self.mlp(x)), kept


class OwnModel(nnx.Module):
    """What `networks.base_model.BaseModel` asks for; its layers always run one by one."""

    def __init__(self, cfg, rngs):
        self.enter = nnx.Linear(cfg.in_channels, cfg.dim, rngs=rngs)
        self.time = nnx.Linear(1, cfg.dim, rngs=rngs)
        self.text = nnx.Linear(cfg.text_dim, cfg.dim, rngs=rngs)
        self.blocks = nnx.List([OwnLayer(cfg, rngs) for _ in range(cfg.layers)])
        self.leave = nnx.Linear(cfg.dim, cfg.in_channels, rngs=rngs)

    def embed(self, latent):
        return self.enter(einops.rearrange(latent, "b t y x c -> b (t y x) c"))

    def embed_time(self, timesteps):
        return self.time(timesteps[..., None] / 1000)

    def text_kv(self, states):
        return [self.text(states.mean(axis=1)) for _ in self.blocks]

    def run(self, x, time, text, *, past, self_attention, cross_attention):
        x = x + jnp.repeat(time, x.shape[1] // time.shape[1], axis=1) + text[0][:, None]
        kept = []
        for layer, before in zip(self.blocks, past, strict=True):
            x, one = layer(x, before, self_attention)
            kept.append(one)
        return x, kept

    def output(self, x, time, grid):
        return einops.rearrange(self.leave(x), "b (t y x) c -> b t y x c", y=grid[0], x=grid[1])

    def keys_values(self, x, time):
        return [KV(*layer.project(x)[1:]) for layer in self.blocks]

    def unrolled(self):
        return self


experiment = Experiment(
    name="own_model",
    dit=OwnConfig(),
    codec=SpaceToDepthConfig(factor=4),
    text=TextConfig(vocab=46, dim=32, dim_attn=32, dim_ffn=64, heads=4, layers=1, max_words=16),
    cache=CacheConfig(
        block=4, sink=4, recent=4, top=2, capacity=6, score_pool=(4, 1, 1), key_multiple=32
    ),
    compressor=CompressorConfig(channels=(32,), strides=((2, 2, 2),), pool=(2, 2, 2)),
    latent=(8, 8),
)


def pipeline(exp=experiment):
    """The model with random weights and the Stage world's words, ready to sample."""
    from packforcing_jax.networks import compressor, text
    from packforcing_jax.sampling.block_step import Nets
    from packforcing_jax.sampling.pipeline import Pipeline
    from packforcing_jax.stage import captions

    nets = Nets(dit=exp.dit.build(nnx.Rngs(0)), compressor=compressor.build(exp.step, nnx.Rngs(1)))
    return Pipeline.of(exp, nets, text.UMT5(exp.text, nnx.Rngs(2)), captions.reader())


if __name__ == "__main__":
    sentence = "a red disc walks slowly before the moss curtain in scene one"
    for block in pipeline().stream([sentence] * 8, seed=1):
        print(block.index, block.frames.shape, block.block_ids.tolist())
