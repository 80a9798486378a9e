"""Packing starts as the low-resolution branch alone and learns from there; the config says how many tokens it gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from packforcing_jax import config, pytrees
from packforcing_jax.config import loading
from packforcing_jax.networks import codec, compressor, dit

LATENT = tiny.latents(1)[0]
LOW = tiny.low_res(1)[0]


def with_branches(branches):
    return dataclasses.replace(
        tiny.EXP, compressor=dataclasses.replace(tiny.EXP.compressor, branches=branches)
    )


_pack = tiny.jit(compressor.Compressor.pack, static_argnums=2)


def pack(nets, latent=LATENT, low_res=LOW, exp=tiny.EXP):
    return _pack(nets.compressor, nets.dit, exp.step, latent, low_res)


def test_before_training_only_low_resolution_speaks():
    nets = tiny.fresh()
    np.testing.assert_array_equal(pack(nets), tiny.jit(dit.WanDiT.embed)(nets.dit, LOW))
    np.testing.assert_array_equal(pack(nets), pack(nets, latent=LATENT + 1))


def test_an_untrained_high_resolution_branch_is_exactly_zero():
    start = tiny.fresh().compressor
    assert (tiny.jit(start)(jnp.pad(LATENT, ((0, 0), (0, 1), (0, 0), (0, 0), (0, 0)))) == 0).all()
    assert all(
        (leaf != 0).any()
        for name, leaf in pytrees.flatten(start).items()
        if name.endswith("kernel") and not name.startswith("out")
    )


def test_branches_add_up():
    nets = tiny.nets()
    both, hr, lr = (pack(nets, exp=with_branches(name)) for name in ("both", "hr", "lr"))
    np.testing.assert_allclose(both, hr + lr, atol=1e-6)
    for each in (hr, lr):
        assert np.abs(each).max() > 0.01


@pytest.mark.parametrize(
    ("branch", "latent_counts", "low_counts"), [("hr", True, False), ("lr", False, True)]
)
def test_a_branch_alone_reads_only_its_own_input(branch, latent_counts, low_counts):
    exp = with_branches(branch)
    nets = tiny.nets()
    plain = pack(nets, exp=exp)
    assert (pack(nets, latent=LATENT + 1, exp=exp) != plain).any() == latent_counts
    assert (pack(nets, low_res=LOW + 1, exp=exp) != plain).any() == low_counts


def test_a_compressor_of_ones_own_is_built_by_its_settings():
    """The settings are a value that builds what packs; no table knows of it."""

    @dataclasses.dataclass(frozen=True)
    class Averaging(config.CompressorConfig):
        gain: float = 2.0

        def build(self, step, rngs):
            return Mean(self.gain)

    @dataclasses.dataclass(frozen=True)
    class Mean:
        gain: float

        def pack(self, model, step, latent, low_res):
            return self.gain * model.embed(low_res)

    settings = Averaging(**vars(tiny.EXP.compressor))
    exp = dataclasses.replace(tiny.EXP, compressor=settings)
    built = compressor.build(exp.step, nnx.Rngs(0))
    tokens = built.pack(tiny.nets().dit, exp.step, LATENT, LOW)
    np.testing.assert_allclose(tokens, 2 * tiny.nets().dit.embed(LOW))


def test_token_counts_are_the_configs():
    assert pack(tiny.nets()).shape == (
        tiny.BATCH,
        tiny.EXP.tokens_per_packed_block,
        tiny.EXP.dit.dim,
    )


@pytest.mark.parametrize("name", loading.names())
def test_token_counts_are_the_configs_at_full_size(name):
    exp = loading.load_experiment(name)
    module = jax.eval_shape(lambda: compressor.build(exp.step, nnx.Rngs(0)))
    latent = jax.ShapeDtypeStruct(
        (1, exp.compressor.frames, *exp.latent, exp.dit.in_channels), jnp.float32
    )
    grid = exp.packed_grid[1:] if exp.compressor.adaptive_pool else None
    tokens = jax.eval_shape(lambda module, latent: module(latent, grid), module, latent)
    assert tokens.shape == (1, exp.tokens_per_packed_block, exp.dit.dim)


def test_odd_grids_lose_what_does_not_fill_a_patch():
    exp = dataclasses.replace(
        tiny.EXP, latent=(14, 6)
    )  # convolutions: 14 -> 7 -> 3 rows, 6 -> 3 columns
    assert exp.packed_grid == (2, 3, 3)
    module = jax.eval_shape(lambda: compressor.build(exp.step, nnx.Rngs(0)))
    latent = jax.ShapeDtypeStruct((1, 4, 14, 6, 12), jnp.float32)
    assert jax.eval_shape(lambda module, latent: module(latent), module, latent).shape[1] == 18


def test_a_short_block_repeats_its_last_frame():
    repeated = jnp.concatenate([LATENT, LATENT[:, -1:]], axis=1)
    assert (LATENT.shape[1], repeated.shape[1]) == (3, tiny.EXP.compressor.frames)
    np.testing.assert_array_equal(pack(tiny.nets()), pack(tiny.nets(), latent=repeated))
    other = jnp.concatenate([LATENT, LATENT[:, :1]], axis=1)
    assert (pack(tiny.nets(), latent=other) != pack(tiny.nets())).any()


def test_low_resolution_cells_beyond_the_packed_grid_are_dropped():
    larger = jnp.pad(LOW, ((0, 0), (0, 1), (0, 1), (0, 3), (0, 0)), constant_values=9.0)
    np.testing.assert_array_equal(pack(tiny.nets(), low_res=larger), pack(tiny.nets()))


def test_tokens_lie_in_the_order_time_row_column():
    """With kernels that hand on one cell each, a bump in that cell is felt by its token alone."""

    def pick(name, shape):
        one = np.zeros(shape, np.float32)
        if name.endswith("kernel"):
            one[tuple(min(1, size - 1) for size in shape[:-2])] = 1 / shape[-2]
        return one

    module = tiny.nets().compressor
    picks = {name: pick(name, leaf.shape) for name, leaf in pytrees.flatten(module).items()}
    picking = tiny.jit(pytrees.fill(module, picks))
    latent = jnp.ones((1, 4, 8, 4, 12))
    for token, (slot, row, column) in enumerate(np.ndindex(tiny.EXP.packed_grid)):
        bumped = picking(latent.at[:, 2 * slot, 4 * row, 2 * column].add(5.0))
        felt = (bumped != picking(latent)).any(axis=(0, 2))
        np.testing.assert_array_equal(felt, np.arange(8) == token)


def test_one_step_opens_the_way_to_every_convolution():
    model = tiny.fresh().dit
    target = tiny.normal(1, tiny.BATCH, tiny.EXP.tokens_per_packed_block, tiny.EXP.dit.dim)

    @tiny.jit
    @jax.grad
    def gradient(module):
        return jnp.mean((module.pack(model, tiny.EXP.step, LATENT, LOW) - target) ** 2)

    start = tiny.fresh().compressor
    first = gradient(start)
    moving = {name for name, leaf in pytrees.flatten(first).items() if jnp.abs(leaf).max() > 0}
    assert moving == {"out/kernel", "out/bias"}
    second = pytrees.flatten(gradient(jax.tree.map(lambda x, g: x - 0.1 * g, start, first)))
    assert set(second) == moving | {
        f"convs/{i}/{leaf}" for i in range(3) for leaf in ("kernel", "bias")
    }
    assert all(jnp.abs(leaf).max() > 0 for leaf in second.values())


def test_kernels_are_as_wide_as_their_strides_ask():
    wan = jax.eval_shape(lambda: compressor.build(config.Experiment("wan").step, nnx.Rngs(0)))
    assert [
        leaf.shape for name, leaf in pytrees.flatten(wan).items() if name.endswith("kernel")
    ] == [
        (3, 3, 3, 16, 32),
        (1, 4, 4, 32, 128),
        (1, 4, 4, 128, 512),
        (1, 4, 4, 512, 2048),
        (2048, 1536),
    ]


# Nothing a block shows is left out ------------------------------------------------------------------------------------

WAN = config.VAEConfig(
    dim=2,
    z_dim=12,
    dim_mult=(1, 2, 1),
    num_res_blocks=1,
    temporal_downsample=(True, True),
    mean=(0.1,) * 12,
    std=(1.5,) * 12,
)
SEEN = [(WAN, block, first) for block in (3, 4) for first in (True, False)]
SEEN += [(tiny.EXP.codec, block, False) for block in (3, 4)]


@functools.cache
def codec_of(cfg):
    """A codec with random weights that keep the size of features."""
    shapes = jax.eval_shape(lambda: codec.make(cfg, nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    return pytrees.fill(
        shapes,
        {
            name: jnp.asarray(rng.normal(size=leaf.shape) * np.prod(leaf.shape[:-1]) ** -0.5)
            for name, leaf in pytrees.flatten(shapes).items()
        },
    )


def frames_shown(cfg, block, first):
    """Pixel frames of one block: the first latent of a video is a single frame, others are a group."""
    return codec.frames_of(cfg, block) if first else block * cfg.time_factor


@pytest.mark.parametrize(("cfg", "block", "first"), SEEN)
def test_every_pixel_frame_of_a_block_is_felt_by_its_packed_tokens(cfg, block, first):
    """Each frame alone is another one, in a batch of the block as it is and with every one of these changes."""
    exp = with_branches("lr")
    count = frames_shown(cfg, block, first)
    size = [cfg.space_factor * cells for cells in tiny.EXP.latent]
    plain, other = np.random.default_rng(3).uniform(-1, 1, (2, count, *size, 3)).astype(np.float32)
    video = np.where(np.eye(count + 1, count, dtype=bool)[..., None, None, None], other, plain)

    @tiny.jit
    def packed(nets, vae, video):
        low_res = codec.low_res_latents(
            vae, video, latents=exp.packed_grid[0], pool=exp.compressor.pool
        )
        latent = jnp.zeros((len(video), block, 8, 4, 12))
        return nets.compressor.pack(nets.dit, exp.step, latent, low_res)

    tokens = np.asarray(packed(tiny.nets(), codec_of(cfg), video))
    assert tokens.shape == (count + 1, exp.tokens_per_packed_block, exp.dit.dim)
    moved = np.abs(tokens[:count] - tokens[count]).max(axis=(1, 2))
    assert (moved > 1e-4).all(), moved


@pytest.mark.parametrize("block", [3, 4])
def test_every_latent_frame_of_a_block_is_felt_by_its_packed_tokens(block):
    exp = with_branches("hr")
    plain, other = np.random.default_rng(4).normal(size=(2, block, 8, 4, 12)).astype(np.float32)
    latent = np.where(np.eye(block + 1, block, dtype=bool)[..., None, None, None], other, plain)
    tokens = np.asarray(
        pack(tiny.nets(), jnp.asarray(latent), np.zeros((block + 1, *LOW.shape[1:])), exp)
    )
    moved = np.abs(tokens[:block] - tokens[block]).max(axis=(1, 2))
    assert (moved > 1e-4).all(), moved
