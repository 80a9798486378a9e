"""The video codec against that of diffusers: the same weights, converted through the project's own tables."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import twins
from packforcing_jax.convert import rules, wan_vae

from packforcing_jax.networks import vae
from packforcing_jax.verify import parts

pytestmark = pytest.mark.parity

TOLERANCE = 2e-5
ENCODE, MOMENTS, DECODE = (
    twins.jit(function) for function in (vae.encode, vae.encode_moments, vae.decode)
)
UNCLAMPED = {"decoder__conv_out": 0.2}  # keeps pixels within -1..1, where diffusers cuts them off

SIZES = {  # arguments of diffusers' network; video as batch, frames, rows, columns
    "as in Wan": (
        dict(
            base_dim=10,
            z_dim=16,
            dim_mult=[1, 2, 4, 4],
            num_res_blocks=2,
            temperal_downsample=[False, True, True],
        ),
        (1, 9, 24, 16),
    ),
    "three stages": (
        dict(
            base_dim=6,
            z_dim=3,
            dim_mult=[1, 2, 3],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.3, -0.2, 0.1],
            latents_std=[1.5, 0.7, 2.0],
        ),
        (2, 13, 12, 20),
    ),
    "time first": (
        dict(
            base_dim=4,
            z_dim=5,
            dim_mult=[2, 1, 3, 5],
            num_res_blocks=3,
            temperal_downsample=[True, True, False],
        ),
        (1, 5, 8, 24),
    ),
}


class Twins(NamedTuple):
    """The same codec twice, and a video for both; diffusers neither normalises latents nor undoes it."""

    theirs: Any
    ours: vae.WanVAE
    video: np.ndarray  # [b, 3, frames, height, width]

    @property
    def latent(self):
        """A random latent of the video's size."""
        batch, _, frames, height, width = self.video.shape
        cfg = self.ours.cfg
        cells = (
            1 + (frames - 1) // cfg.time_factor,
            height // cfg.space_factor,
            width // cfg.space_factor,
        )
        return np.random.default_rng(1).standard_normal((batch, cfg.z_dim, *cells), np.float32)

    def moments(self, video):
        """Their mean and log-variance [b, 2c, t, y, x], the mean first."""
        return twins.called(lambda vae: self.theirs.encode(vae).latent_dist.parameters, video)

    def vae(self, latent):
        """Their video, none of which was cut off."""
        video = twins.called(lambda cells: self.theirs.decode(cells).sample, latent)
        assert np.abs(video).max() < 1, "lower the gain of the last convolution"
        return video


@functools.cache
def twin(name, seed, normalised=False, **gains):
    from diffusers import AutoencoderKLWan

    arguments, (batch, *size) = SIZES[name]
    theirs = twins.randomized(AutoencoderKLWan(**arguments), seed, **UNCLAMPED, **gains)
    cfg = wan_vae.vae_config(theirs.config)
    cfg = cfg if normalised else wan_vae.unscaled(cfg)
    named = rules.rename(twins.arrays(theirs), wan_vae.diffusers_names(cfg).items())
    video = np.random.default_rng(seed).uniform(-1, 1, (batch, 3, *size)).astype(np.float32)
    return Twins(theirs, parts.load(vae.WanVAE, cfg, named, wan_vae.WAN_VAE), video)


def computed(function, model, value):
    """What our function makes of an array in their order of axes, in that order; moments as theirs."""
    out = function(model, parts.ours(value))
    return parts.theirs(jnp.concatenate(out, axis=-1) if isinstance(out, tuple) else out)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", SIZES)
def test_moments_of_a_video_agree(name, seed):
    pair = twin(name, seed)
    assert (
        twins.error(computed(MOMENTS, pair.ours, pair.video), pair.moments(pair.video)) <= TOLERANCE
    )


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", SIZES)
def test_pixels_of_latents_agree(name, seed):
    pair = twin(name, seed)
    assert twins.error(computed(DECODE, pair.ours, pair.latent), pair.vae(pair.latent)) <= TOLERANCE


def test_the_first_frame_alone_agrees():
    pair = twin("as in Wan", 0)
    video = pair.video[:, :, :1]
    latent = pair.latent[:, :, :1]
    assert twins.error(computed(MOMENTS, pair.ours, video), pair.moments(video)) <= TOLERANCE
    assert twins.error(computed(DECODE, pair.ours, latent), pair.vae(latent)) <= TOLERANCE


def test_frames_that_do_not_fill_a_group_are_ignored_by_both():
    pair = twin("three stages", 0)
    video = pair.video[:, :, :11]
    assert twins.error(computed(MOMENTS, pair.ours, video), pair.moments(video)) <= TOLERANCE


@pytest.mark.parametrize("name", ["as in Wan", "three stages"])
def test_latents_are_normalised_as_the_configuration_says(name):
    """There the pipeline does it, with the lists that the codec's configuration holds."""
    pair = twin(name, 0, normalised=True)
    mean, std = (
        np.reshape(pair.theirs.config[key], (1, -1, 1, 1, 1))
        for key in ("latents_mean", "latents_std")
    )
    mu = np.split(pair.moments(pair.video), 2, axis=1)[0]
    assert twins.error(computed(ENCODE, pair.ours, pair.video), (mu - mean) / std) <= TOLERANCE
    vae = pair.vae((pair.latent * std + mean).astype(np.float32))
    assert twins.error(computed(DECODE, pair.ours, pair.latent), vae) <= TOLERANCE


def test_faint_features_agree():
    """Features so small that the norms divide by their smallest length."""
    pair = twin(
        "three stages", 2, encoder__conv_in=1e-13, decoder__conv_in=1e-13, post_quant_conv=1e-13
    )
    assert (
        twins.error(computed(MOMENTS, pair.ours, pair.video), pair.moments(pair.video)) <= TOLERANCE
    )
    assert twins.error(computed(DECODE, pair.ours, pair.latent), pair.vae(pair.latent)) <= TOLERANCE


HALVES = [
    ("encoder", MOMENTS, Twins.moments, "video"),
    ("quant", MOMENTS, Twins.moments, "video"),
    ("decoder", DECODE, Twins.vae, "latent"),
    ("post_quant", DECODE, Twins.vae, "latent"),
]


@pytest.mark.parametrize(
    ("under", "function", "theirs", "given"), HALVES, ids=[half[0] for half in HALVES]
)
def test_every_tensor_counts(under, function, theirs, given):
    """The comparison can fail: it notices a change of 2 % in any one tensor."""
    pair = twin("three stages", 1)
    value = getattr(pair, given)
    passed = twins.unnoticed(
        pair.ours,
        lambda model: computed(function, model, value),
        theirs(pair, value),
        tolerance=TOLERANCE,
        under=f"{under}/",
    )
    assert passed == []
