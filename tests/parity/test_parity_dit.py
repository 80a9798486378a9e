"""The transformer against that of diffusers: the same weights, converted through the project's own tables."""

import functools
from dataclasses import dataclass
from typing import Any

import einops
import jax.numpy as jnp
import numpy as np
import pytest
import twins
from packforcing_jax.convert import rules, wan_dit

from packforcing_jax.networks import dit
from packforcing_jax.verify import parts

pytestmark = pytest.mark.parity

TOLERANCE = 2e-5
TEXT_LEN = 11
WORDS = 7  # the network's text length, and how many of them the prompts fill
BIDIRECTIONAL = twins.jit(dit.bidirectional)

SIZES = {  # arguments of diffusers' network; latent as batch, frames, rows, columns
    "odd grid": (
        dict(
            num_attention_heads=3,
            attention_head_dim=22,
            ffn_dim=94,
            num_layers=3,
            text_dim=38,
            freq_dim=42,
            in_channels=5,
            out_channels=7,
        ),
        (2, 3, 10, 6),
    ),
    "heads of 128": (
        dict(
            num_attention_heads=3,
            attention_head_dim=128,
            ffn_dim=500,
            num_layers=2,
            text_dim=38,
            freq_dim=256,
            in_channels=16,
            out_channels=16,
        ),
        (1, 5, 14, 6),
    ),
    "one head": (
        dict(
            num_attention_heads=1,
            attention_head_dim=40,
            ffn_dim=70,
            num_layers=4,
            text_dim=20,
            freq_dim=30,
            in_channels=4,
            out_channels=4,
            patch_size=(1, 3, 1),
            eps=1e-5,
        ),
        (3, 4, 9, 5),
    ),
}


@dataclass(frozen=True)
class Twins:
    """The same network twice and what goes into it, in diffusers' order of axes."""

    theirs: Any
    ours: dit.WanDiT
    latent: np.ndarray  # [b, c, t, y, x]
    text: np.ndarray  # [b, words, text_dim]

    def expected(self, timesteps):
        """Their output for timesteps [b] or, one per token, [b, tokens]."""
        padded = np.pad(self.text, ((0, 0), (0, TEXT_LEN - WORDS), (0, 0)))
        return twins.called(lambda *args: self.theirs(*args).sample, self.latent, timesteps, padded)

    def computed(self, timesteps, model=None):
        """Our output for timesteps [b, t]."""
        flow = BIDIRECTIONAL(
            model or self.ours,
            parts.ours(self.latent),
            jnp.asarray(timesteps),
            jnp.asarray(self.text),
        )
        return parts.theirs(flow)


@functools.cache
def twin(name, seed, **gains):
    from diffusers import WanTransformer3DModel

    arguments, (batch, *cells) = SIZES[name]
    theirs = twins.randomized(WanTransformer3DModel(**arguments), seed, **gains)
    cfg = wan_dit.config_from_diffusers(theirs.config, text_len=TEXT_LEN)
    ours = parts.load(
        dit.WanDiT, cfg, rules.rename(twins.arrays(theirs), wan_dit.DIFFUSERS), wan_dit.WAN_DIT
    )
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal((batch, cfg.in_channels, *cells), np.float32)
    return Twins(
        theirs, ours, latent, rng.standard_normal((batch, WORDS, cfg.text_dim), np.float32)
    )


def one_per_sample(pair):
    """Timesteps [b] that differ."""
    return np.array([937.5, 62.25, 501.0], np.float32)[: len(pair.latent)]


def each_frame(pair, timesteps):
    """Timesteps [b] as [b, t]."""
    return einops.repeat(timesteps, "b -> b t", t=pair.latent.shape[2])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", SIZES)
def test_the_network_agrees(name, seed):
    pair = twin(name, seed)
    times = one_per_sample(pair)
    assert twins.error(pair.computed(each_frame(pair, times)), pair.expected(times)) <= TOLERANCE


@pytest.mark.parametrize("timestep", [1000.0, 833.25, 1.0, 0.0])
def test_timesteps_from_end_to_end_agree(timestep):
    pair = twin("odd grid", 0)
    times = np.full(len(pair.latent), timestep, np.float32)
    assert twins.error(pair.computed(each_frame(pair, times)), pair.expected(times)) <= TOLERANCE


@pytest.mark.parametrize("name", ["odd grid", "one head"])
def test_a_timestep_per_frame_agrees(name):
    pair = twin(name, 2)
    shape = pair.latent.shape[0], pair.latent.shape[2]
    times = np.random.default_rng(5).uniform(0, 1000, shape).astype(np.float32)
    tokens = np.prod(pair.latent.shape[3:]) // np.prod(pair.theirs.config.patch_size)
    expected = pair.expected(einops.repeat(times, "b t -> b (t s)", s=tokens))
    assert twins.error(pair.computed(times), expected) <= TOLERANCE
    assert twins.error(pair.computed(times[:, ::-1]), expected) > TOLERANCE


@pytest.mark.parametrize("name", ["heads of 128", "one head"])
def test_faint_activations_agree(name):
    """Tokens, queries and keys so small that the norms' epsilon counts."""
    pair = twin(name, 3, patch_embedding=1e-3, attn1__to_q=2e-3, attn1__to_k=2e-3, attn2__to_k=2e-3)
    times = one_per_sample(pair)
    assert twins.error(pair.computed(each_frame(pair, times)), pair.expected(times)) <= TOLERANCE


def test_every_tensor_counts():
    """The comparison can fail: it notices a change of 2 % in any one tensor."""
    pair = twin("odd grid", 1)
    times = one_per_sample(pair)
    passed = twins.unnoticed(
        pair.ours,
        lambda model: pair.computed(each_frame(pair, times), model),
        pair.expected(times),
        tolerance=TOLERANCE,
    )
    assert passed == []
