"""An experiment that compiles in a second and has no two sizes alike, and the parts that tests run it with."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from packforcing_jax import config, pytrees
from packforcing_jax.memory import cache
from packforcing_jax.memory import layout as layouts
from packforcing_jax.networks import codec, compressor, dit
from packforcing_jax.sampling import block_step
from packforcing_jax.sampling.block_step import Denoiser

EXP = config.Experiment(
    name="tiny",
    dit=config.DiTConfig(
        dim=36,
        ffn_dim=20,
        heads=3,
        layers=2,
        text_dim=10,
        text_len=17,
        freq_dim=14,
        in_channels=12,
        out_channels=12,
        rope_theta=(100.0, 20.0, 10.0),
        rope_pairs=(3, 2, 1),
    ),
    codec=config.SpaceToDepthConfig(factor=2),
    text=config.TextConfig(
        vocab=46, dim=10, dim_attn=6, dim_ffn=9, heads=2, layers=1, max_words=16
    ),
    cache=config.CacheConfig(
        block=3,
        sink=3,
        recent=3,
        top=2,
        capacity=4,
        max_position=16,
        score_pool=(2, 2, 1),
        key_multiple=5,
    ),
    compressor=config.CompressorConfig(
        channels=(5, 7, 6), strides=((2, 1, 1), (1, 2, 2), (1, 2, 1)), pool=(2, 2, 1)
    ),
    sample=config.SampleConfig(steps=(1000, 600, 250), shift=3.0),
    latent=(8, 4),  # 4 x 2 tokens a frame, packed to 2 x 2 x 2
    fps=5,
    clip=15,
)
BATCH = 2
jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)  # compiling is what takes time


def with_cache(exp=EXP, **changes):
    """`exp` with other memory settings."""
    return dataclasses.replace(exp, cache=dataclasses.replace(exp.cache, **changes))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def _build(exp, key=0):
    return block_step.Nets(
        dit=dit.WanDiT(exp.dit, nnx.Rngs(key)), compressor=compressor.build(exp.step, nnx.Rngs(key))
    )


def _trained(rng, name, shape):
    """Values such as training leaves: nothing is zero or one any more."""
    if name.endswith("kernel"):
        return rng.normal(size=shape) * np.prod(shape[(1 if "blocks" in name else 0) : -1]) ** -0.5
    return name.endswith("scale") + 0.1 * rng.normal(size=shape)


def filled(module, seed=0):
    """A module of the shapes of `module` in which no parameter has its starting value."""
    rng = np.random.default_rng(seed)
    return pytrees.fill(
        module,
        {
            name: jnp.asarray(_trained(rng, name, leaf.shape), jnp.float32)
            for name, leaf in pytrees.flatten(module).items()
        },
    )


@functools.cache
def nets(exp=EXP):
    """Nets as if trained, their layers stacked, as training runs them."""
    return filled(jax.eval_shape(lambda: _build(exp)))


@functools.cache
def apart(exp=EXP):
    """The same nets with their layers one by one, as sampling runs them."""
    return dataclasses.replace(nets(exp), dit=nets(exp).dit.unrolled())


@functools.cache
def fresh(exp=EXP):
    """The same transformer with a compressor as training starts it."""
    return block_step.Nets(
        dit=nets(exp).dit, compressor=jit(lambda: compressor.build(exp.step, nnx.Rngs(0)))()
    )


def latents(blocks, exp=EXP, batch=BATCH, seed=5):
    """Random clean blocks [block, b, t, y, x, c]."""
    return normal(seed, blocks, batch, exp.cache.block, *exp.latent, exp.dit.in_channels)


def low_res(blocks, exp=EXP, batch=BATCH, seed=6):
    """Random low-resolution twins of blocks [block, b, t', y', x', c], of the shape the codec gives."""
    pixels = codec.make(exp.codec, nnx.Rngs(0))
    frames = exp.cache.block
    video = jax.ShapeDtypeStruct(
        (batch, frames, *(n * exp.codec.space_factor for n in exp.latent), 3), jnp.float32
    )
    shape = jax.eval_shape(
        lambda video: codec.low_res_latents(
            pixels, video, latents=exp.packed_grid[0], pool=exp.compressor.pool
        ),
        video,
    ).shape
    return normal(seed, blocks, *shape)


text_kv = jit(dit.WanDiT.text_kv)


def _denoise(nets, cfg, memory, *, noise, text):
    return block_step.denoise_block(Denoiser(nets, cfg, text), memory, noise)


def _commit(nets, cfg, memory, *, latent, low_res, selection, text):
    return block_step.commit_block(Denoiser(nets, cfg, text), memory, latent, low_res, selection)


denoise = jit(_denoise, static_argnames="cfg")
commit = jit(_commit, static_argnames="cfg")
_noise = jit(block_step.draw_noise, static_argnames="cfg")


def text(exp=EXP, batch=BATCH, seed=7):
    """Cross-attention keys and values per layer of a random prompt, one word shorter than the longest."""
    return text_kv(apart(exp).dit, normal(seed, batch, exp.dit.text_len - 1, exp.dit.text_dim))


def noise(exp, block, videos=range(BATCH), seed=11):
    """Everything random about a block."""
    return _noise(exp.step, seed, jnp.asarray(videos, jnp.uint32), jnp.int32(block))


def ids(denoised):
    """The packed blocks that each layer attended to, [layer, b, top]."""
    return np.asarray(pytrees.stack(denoised.selection).ids)


def committed(exp, memory):
    """Keys and values [layer, b, frame, s, n, h] of the frames at full size that the next block sees, in time order."""
    cfg = exp.cache
    layout = layouts.layout(exp.cache, memory.progress)
    sink = int(layout.scene) + np.arange(int(layout.sink))
    recent = int(layout.start) - int(layout.recent) + np.arange(int(layout.recent))
    slots = layouts.frame_slots(cfg, layout, jnp.asarray([*sink, *recent], jnp.int32))

    def frames(store):
        whole = np.asarray(store)[:, :, : exp.memory.full_res]
        return whole.reshape(*whole.shape[:2], -1, exp.tokens_per_frame, *whole.shape[3:])[
            :, :, slots
        ]

    return jax.tree.map(frames, pytrees.stack(block_step.views_of(memory)))


def one_block(exp, memory, text, block, low_res):
    """A block denoised and committed: what was denoised, and the memory after it."""
    memory, denoised = denoise(apart(), exp.step, memory, noise=noise(exp, block), text=text)
    memory, _ = commit(
        apart(),
        exp.step,
        memory,
        latent=denoised.latent,
        low_res=low_res,
        selection=denoised.selection,
        text=text,
    )
    return denoised, memory


def rollout(exp, blocks, text_of=lambda block: text()):
    """What was denoised block by block, and the memory at the end."""
    memory = cache.init(exp.memory, BATCH)
    denoised = []
    small = low_res(1, exp)[0]
    for block in range(blocks):
        one, memory = one_block(exp, memory, text_of(block), block, small)
        denoised.append(one)
    return denoised, memory


def reaches(jacobian, blocks):
    """Whether outputs depend on blocks: jacobian [output, b, frames, ...], `blocks` the block of each frame."""
    per_frame = jnp.abs(jacobian).max(axis=(1, *range(3, jacobian.ndim)))
    return jnp.stack(
        [per_frame[:, blocks == block].max(axis=1) > 0 for block in range(max(blocks) + 1)], axis=1
    )
