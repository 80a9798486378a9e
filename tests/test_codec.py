"""One interface for all codecs: exactness, streaming, counts, and the low-resolution view that packing takes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from packforcing_jax import pytrees
from packforcing_jax.config import SpaceToDepthConfig, VAEConfig
from packforcing_jax.errors import InputError
from packforcing_jax.networks import codec as codec_lib

CELLS = SpaceToDepthConfig(factor=2)
WAN = VAEConfig(
    dim=2,
    z_dim=3,
    dim_mult=(1, 2, 1),
    num_res_blocks=1,
    temporal_downsample=(True, True),
    mean=(0.3, -0.2, 0.1),
    std=(1.5, 0.7, 2.0),
)
BOTH = pytest.mark.parametrize("cfg", [CELLS, WAN], ids=["cells", "wan"])

jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)  # compiles three times faster
encode = jit(codec_lib.encode)
decode = jit(codec_lib.decode)
decode_chunk = jit(codec_lib.decode_chunk, static_argnames="first")
low_res_latents = jit(codec_lib.low_res_latents, static_argnames=("latents", "pool"))


@functools.cache
def make(cfg):
    """A codec with random weights that keep the size of features; NumPy draws, as JAX compiles once per shape."""
    shapes = jax.eval_shape(lambda: codec_lib.make(cfg, nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    draws = {
        path: rng.normal(size=leaf.shape) / math.sqrt(math.prod(leaf.shape[:-1]))
        for path, leaf in pytrees.flatten(shapes).items()
    }
    return pytrees.fill(
        shapes, {path: jnp.asarray(draw, jnp.float32) for path, draw in draws.items()}
    )


def film(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1.0, 1.0, (*shape, 3)), jnp.float32)


def latents(*shape):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def test_cells_are_exact_and_have_no_parameters():
    cells = make(CELLS)
    video = film(2, 3, 4, 10)
    latent = encode(cells, video)
    assert pytrees.flatten(cells) == {}
    assert latent.shape == (2, 3, 2, 5, CELLS.z_dim)
    np.testing.assert_array_equal(decode(cells, latent), video)


def test_a_cell_lists_its_pixels_row_by_row_with_colour_fastest():
    video = jnp.arange(24.0).reshape(1, 1, 2, 4, 3)
    latent = encode(make(CELLS), video)
    np.testing.assert_array_equal(latent[0, 0, 0, 1], [6, 7, 8, 9, 10, 11, 18, 19, 20, 21, 22, 23])


@BOTH
def test_counts_of_frames_and_latents_agree_with_the_codec(cfg):
    codec = make(cfg)
    for count in (1, 3):
        frames = codec_lib.frames_of(cfg, count)
        latent = jax.eval_shape(codec_lib.encode, codec, film(1, frames, 8, 12))
        video = jax.eval_shape(codec_lib.decode, codec, latent)
        assert (latent.shape[1], video.shape[1:]) == (count, (frames, 8, 12, 3))
        assert (
            codec_lib.latents_of(cfg, frames)
            == codec_lib.latents_of(cfg, frames + cfg.time_factor - 1)
            == count
        )
    assert codec_lib.frames_of(cfg, 0) == codec_lib.latents_of(cfg, 0) == 0


@BOTH
def test_chunks_make_the_whole_video_and_stay_in_range(cfg):
    codec = jax.tree.map(lambda leaf: 4.0 * leaf, make(cfg))  # loud enough to leave the range
    latent = 30 * latents(1, 4, 2, 3, cfg.z_dim)
    whole = decode(codec, latent)
    state = codec_lib.init_decoder(codec, 1, 2, 3)
    head, state = decode_chunk(codec, state, latent[:, :3], first=True)
    tail, state = decode_chunk(codec, state, latent[:, 3:], first=False)
    np.testing.assert_allclose(jnp.concatenate([head, tail], axis=1), whole, atol=1e-5)
    assert np.abs(whole).max() == 1.0
    assert (state == ()) == (cfg is CELLS)


@BOTH
def test_pixels_that_do_not_fill_cells_are_refused(cfg):
    with pytest.raises(InputError, match="8x13 pixels"):
        codec_lib.encode(make(cfg), film(1, 1, 8, 13))


def test_pooling_averages_and_keeps_every_frame():
    video = film(1, 5, 7, 9)
    small = codec_lib.pooled(video, (2, 3, 4))
    assert small.shape == (1, 3, 2, 2, 3)
    np.testing.assert_allclose(small[0, 0, 1, 1], video[0, 0, 3:6, 4:8].mean((0, 1)), atol=1e-6)
    np.testing.assert_allclose(
        small[0, 2, 0, 0], video[0, 3:5, 0:3, 0:4].mean((0, 1, 2)), atol=1e-6
    )


@pytest.mark.parametrize("frames", [12, 16, 13])
def test_every_pixel_of_a_block_counts_in_its_low_resolution_latents(frames):
    """Blocks of 3 and 4 latents at the original's time factor, and the first block of a video, whose first is alone."""
    slope = jit(
        jax.grad(lambda x: jnp.square(codec_lib.low_res_latents(make(WAN), x, latents=2)).sum())
    )
    assert np.all(np.abs(slope(film(1, frames, 16, 32))) > 0)


def test_a_short_block_is_filled_on_the_left_and_its_first_latent_dropped():
    video = film(
        2, 12, 17, 31
    )  # the last row, and the columns beyond 28 and then 24, do not fill pools and cells
    small = codec_lib.pooled(video, (2, 4, 4))[:, :, :, :4]
    filled = jnp.concatenate([small[:, :1]] * 3 + [small], axis=1)
    latent = low_res_latents(make(WAN), video, latents=2)
    assert latent.shape == (2, 2, 1, 1, 3)
    np.testing.assert_allclose(latent, encode(make(WAN), filled)[:, 1:], atol=1e-6)


def test_cells_encode_one_latent_per_pooled_frame():
    cells = make(CELLS)
    video = film(1, 4, 16, 24)
    latent = low_res_latents(cells, video, latents=2)
    small = codec_lib.pooled(video, (2, 4, 4))
    np.testing.assert_allclose(latent, encode(cells, small), atol=1e-6)
    filled = small[:, jnp.asarray([0, 0, 1])]
    np.testing.assert_allclose(
        low_res_latents(cells, video, latents=3), encode(cells, filled), atol=1e-6
    )


def test_too_many_frames_for_the_latents_are_refused():
    with pytest.raises(InputError, match="20 frames pooled by 2 exceed the 9"):
        codec_lib.low_res_latents(make(WAN), film(1, 20, 16, 16), latents=2)


def test_pictures_too_small_for_a_pooled_cell_are_refused():
    with pytest.raises(InputError, match="8x40 pixels"):
        codec_lib.low_res_latents(make(WAN), film(1, 4, 8, 40), latents=1)


def test_the_codec_is_frozen_and_the_pixels_are_not():
    video = film(1, 4, 16, 16)
    slope_of = jax.grad(
        lambda *args: codec_lib.low_res_latents(*args, latents=1).sum(), argnums=(0, 1)
    )
    slope = jit(slope_of)(make(WAN), video)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(slope[0]))
    assert np.any(slope[1] != 0)


@dataclasses.dataclass(frozen=True)
class MirrorConfig:
    """A codec of one's own: the exact one, seen in a mirror."""

    factor: int = 2
    z_dim: int = 12
    time_factor: int = 1
    space_factor: int = 2


class Mirror(nnx.Module):
    def __init__(self, cfg, rngs=None):
        self.cfg = cfg


def _encode(mirror, video):
    return codec_lib.encode(codec_lib.SpaceToDepth(CELLS), video[:, :, :, ::-1])


def _decode(mirror, state, latents, *, first):
    exact = codec_lib.SpaceToDepth(CELLS)
    video, state = codec_lib.decode_chunk(exact, state, latents, first=first)
    return video[:, :, :, ::-1], state


MirrorConfig.kind = codec_lib.Kind(Mirror, _encode, lambda *sizes: (), _decode)


def test_a_codec_of_ones_own_is_a_config_that_says_what_it_offers():
    mirror = codec_lib.make(MirrorConfig(), nnx.Rngs(0))
    video = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (1, 3, 6, 4, 3)), jnp.float32)
    latent = codec_lib.encode(mirror, video)
    np.testing.assert_array_equal(codec_lib.decode(mirror, latent), video)
    assert (latent != codec_lib.encode(codec_lib.SpaceToDepth(CELLS), video)).any()
