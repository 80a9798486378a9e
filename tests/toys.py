"""Random settings of toy size, right and wrong, and one block drawn with them."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from flax import nnx

from packforcing_jax.config import decode
from packforcing_jax.config.experiment import require_whole
from packforcing_jax.networks import codec, text
from packforcing_jax.sampling import player

SIZES = (0, 1, 2, 3, 4, 5, 6, 8, 9, 12)
STRIDES = (
    "((2,1,1),)",
    "((1,2,2),)",
    "((2,2,2),)",
    "((4,2,2),)",
    "((1,3,3),)",
    "((2,4,2),(1,2,1))",
)
VALUES = {  # what a setting may be changed to
    **{
        f"cache.{name}": SIZES
        for name in ("block", "sink", "recent", "top", "capacity", "max_position", "key_multiple")
    },
    "cache.window": (0, 3, 6, 8),
    "cache.sink_average": (0.0, 0.5, 1.0, 2.0),
    "cache.rope_adjustment": ("sink", "incremental", "sink_only", "none"),
    "cache.span": ("true", "fit"),
    "cache.scope": ("layer", "shared"),
    "cache.timing": ("first", "late"),
    "cache.selection": ("affinity", "recency", "all", "random"),
    "cache.eviction": ("fifo",),
    "cache.score_pool": ("(1,1,1)", "(3,4,2)", "(9,1,1)", "(0,1,1)"),
    "dit.dim": (0, 6, 12, 18, 30, 37),
    "dit.ffn_dim": SIZES,
    "dit.heads": SIZES,
    "dit.layers": (0, 1, 2, 3),
    "dit.text_len": (1, 16, 17),
    "dit.freq_dim": SIZES,
    "dit.in_channels": (3, 12, 27),
    "dit.out_channels": (3, 12, 27),
    "dit.patch": ("(1,1,1)", "(1,2,1)", "(1,4,4)", "(2,2,2)", "(1,3,1)"),
    "dit.rope_pairs": ("None", "(2,2,2)", "(6,0,0)", "(0,0,6)", "(7,-1,0)"),
    "dit.rope_theta": ("(1.0,1.0,1.0)", "(100.0,0.0,1.0)"),
    "codec.factor": (0, 1, 2, 3),
    "text.heads": SIZES,
    "text.dim": (0, 5, 10),
    "text.dim_attn": SIZES,
    "text.dim_ffn": SIZES,
    "text.buckets": (0, 3, 4, 7, 32),
    "text.max_distance": (1, 8, 9, 128),
    "text.max_words": (1, 16, 17, 18),
    "compressor.frames": SIZES,
    "compressor.pool": (
        "(1,1,1)",
        "(2,2,1)",
        "(2,4,4)",
        "(4,1,1)",
        "(1,8,8)",
        "(0,1,1)",
        "(1,3,3)",
    ),
    "compressor.branches": ("both", "hr", "lr"),
    "compressor.positions": ("stretched", "native"),
    "compressor.keys": ("blocks", "projected"),
    "sample.steps": ("()", "(1000,)", "(1000,500)", "(500,500)"),
    "sample.first_steps": ("()", "(900,)"),
    "sample.shift": (0.0, 1.0, 5.0),
    "sample.warp": (True, False),
    "sample.prediction": ("velocity", "clean"),
    "latent": ("(8,4)", "(4,4)", "(2,2)", "(6,6)", "(7,4)", "(9,9)", "(1,1)", "(12,8)"),
    "fps": (0, 1, 5),
    "attention": ("auto", "reference", "xla", "none"),
    "dtypes.compute": ("float32", "bfloat16"),
    "dtypes.cache": ("float32", "bfloat16", "float16"),
}
TOGETHER = {  # settings that are mostly changed with one another
    "dit.in_channels": lambda value: [
        f"dit.out_channels={value}",
        f"codec.factor={1 if value == 3 else 3}",
    ],
    "compressor.strides": lambda value: [f"compressor.channels={(4,) * value.count('(1') or 4}"],
    "text.dim": lambda value: [f"dit.text_dim={value}"],
}


def changes(seed):
    """A few random `a.b=value`."""
    rng = random.Random(seed)
    keys = rng.sample(sorted(VALUES), rng.randint(1, 4))
    made = []
    for key in keys:
        value = rng.choice(VALUES[key])
        made.append(f"{key}={value}")
        if key in TOGETHER and rng.random() < 0.8:
            made += TOGETHER[key](value)
    if rng.random() < 0.3:
        strides = rng.choice(STRIDES)
        count = len(eval(strides))
        made += [f"compressor.strides={strides}", f"compressor.channels={(4,) * count}"]
    return made


def experiment(overrides, exp=tiny.EXP):
    """The tiny experiment with them."""
    return decode.override(exp, overrides)


def whole(exp):
    """Raises what a verb that draws would."""
    require_whole(exp)


class Toy:
    """A model of random weights."""

    def __init__(self, exp):
        self.experiment = exp
        nets = tiny._build(exp)
        self.nets = type(nets)(dit=nets.dit.unrolled(), compressor=nets.compressor)
        self.vae = codec.make(exp.codec, nnx.Rngs(0))


def draw(exp, blocks=1):
    """The frames of the last of `blocks` blocks, text encoder included."""
    model = Toy(exp)
    words = exp.text.max_words
    states = text.encode(
        text.UMT5(exp.text, nnx.Rngs(1)),
        jnp.zeros((1, words), jnp.int32),
        jnp.ones((1, words), jnp.int32),
    )
    read = player.text_program(model.nets.dit, exp.dtypes.compute, states)
    state = player.start(model, seeds=0, videos=[0])
    frames = None
    for _ in range(blocks):
        state, block = player.next_block(model, state, read)
        frames = block.frames
    return frames


def traced(exp):
    """The shape of a block's frames, without computing any of it."""
    return jax.eval_shape(lambda: draw(exp)).shape


def is_finite(frames):
    return bool(np.isfinite(np.asarray(frames)).all())
