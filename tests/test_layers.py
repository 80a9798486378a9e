"""Norms keep their epsilon, modulation meets its frame, and the time embedding is that of float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from packforcing_jax.networks import layers


def values(seed, *shape, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def exact_sinusoid(timesteps, dim):
    half = dim // 2
    angle = timesteps.astype(np.float64)[..., None] * 10000.0 ** (-np.arange(half) / half)
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)


ROUNDING = 3 * np.spacing(np.float32(np.pi))  # three roundings of an angle within half a turn


@pytest.mark.parametrize("dim", [14, 64, 256])
def test_time_embedding_is_that_of_float64(dim):
    asked = np.array([0, 0.3, 437.5, 999, 1000, 71.428574], np.float32)
    times = np.append(
        asked, np.random.default_rng(0).uniform(0, 1000, 94).astype(np.float32)
    ).reshape(2, 50)
    embedded = jax.jit(layers.sinusoid, static_argnums=1)(jnp.asarray(times), dim)
    np.testing.assert_allclose(embedded, exact_sinusoid(times, dim), rtol=0, atol=ROUNDING)
    early = times < 1
    np.testing.assert_allclose(
        embedded[early], exact_sinusoid(times[early], dim), rtol=0, atol=2e-7
    )


def test_time_embedding_puts_cosines_first():
    np.testing.assert_array_equal(layers.sinusoid(jnp.zeros((1, 2)), 6), [[[1, 1, 1, 0, 0, 0]] * 2])


@pytest.mark.parametrize("dim", [5, 128])
def test_rms_norm_is_its_formula(dim):
    norm = layers.RMSNorm(dim, 1e-6)
    norm.scale = nnx.Param(jnp.asarray(values(1, dim)))
    x = values(2, 3, 4, dim)
    expected = (
        x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6) * values(1, dim)
    )
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dim", [5, 128])
def test_layer_norm_is_its_formula(dim):
    norm = layers.LayerNorm(dim, 1e-6)
    norm.scale = nnx.Param(jnp.asarray(values(1, dim)))
    norm.bias = nnx.Param(jnp.asarray(values(3, dim)))
    x = values(2, 3, 4, dim) + 2
    centred = x - x.astype(np.float64).mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * values(
        1, dim
    ) + values(3, dim)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=2e-6, atol=2e-6)


NORMS = {
    "rms": lambda dim, eps: layers.RMSNorm(dim, eps),
    "layer": lambda dim, eps: layers.LayerNorm(dim, eps),
    "standardize": lambda dim, eps: lambda x: layers.standardize(x, eps),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize(("size", "factor"), [(1e-3, 0.5**0.5), (2e-3, 0.8**0.5), (1e-6, 1e-3)])
def test_small_inputs_feel_epsilon(kind, size, factor):
    x = (
        size * np.tile(np.array([1, -1], np.float32), 64)[None]
    )  # head size 128, mean 0, variance size^2
    np.testing.assert_allclose(
        NORMS[kind](128, 1e-6)(jnp.asarray(x)), np.sign(x) * factor, rtol=1e-5
    )
    np.testing.assert_allclose(
        NORMS[kind](128, 1e-5)(jnp.asarray(x)), x / np.sqrt(size**2 + 1e-5), rtol=1e-5
    )


@pytest.mark.parametrize("kind", NORMS)
def test_zeros_stay_zeros_and_pass_a_finite_gradient(kind):
    norm = NORMS[kind](6, 1e-6)
    zeros = jnp.zeros((2, 6))
    np.testing.assert_array_equal(norm(zeros), zeros)
    assert np.isfinite(jax.grad(lambda x: norm(x).sum())(zeros)).all()


@pytest.mark.parametrize("kind", NORMS)
def test_half_precision_comes_back_with_float32_statistics(kind):
    x = jnp.asarray(values(4, 3, 128, scale=300) + 100, jnp.bfloat16)
    normed = NORMS[kind](128, 1e-6)(x)
    exact = NORMS[kind](128, 1e-6)(x.astype(jnp.float32))
    assert normed.dtype == jnp.bfloat16
    np.testing.assert_array_equal(normed, exact.astype(jnp.bfloat16))


def test_rms_norm_rounds_before_it_scales():
    norm = layers.RMSNorm(7, 1e-6)
    norm.scale = nnx.Param(jnp.asarray(values(5, 7)))
    x = jnp.asarray(values(6, 4, 7), jnp.bfloat16)
    rounded = layers.RMSNorm(7, 1e-6)(x)
    np.testing.assert_array_equal(norm(x), rounded * jnp.asarray(values(5, 7), jnp.bfloat16)[None])


def test_standardize_forgets_offset_and_scale_of_each_token():
    x = values(7, 2, 3, 10)
    moved = 5 * x + np.array([-3, 0, 40], np.float32)[None, :, None]
    one, other = (layers.standardize(jnp.asarray(each), 0.0) for each in (x, moved))
    np.testing.assert_allclose(other, one, atol=1e-5)


def test_a_frames_row_meets_the_tokens_of_that_frame():
    rows = jnp.arange(6.0).reshape(1, 3, 2)
    spread = layers.per_frame(jnp.zeros((1, 12, 2)), rows)
    np.testing.assert_array_equal(spread[0, :, 0], [0] * 4 + [2] * 4 + [4] * 4)


def test_modulation_is_per_frame():
    x = values(8, 2, 12, 5)
    shift = values(9, 2, 3, 5)
    scale = values(10, 2, 3, 5)
    out = layers.modulate(*(jnp.asarray(a) for a in (x, shift, scale)))
    for video in range(2):
        for token in range(12):
            expected = x[video, token] * (1 + scale[video, token // 4]) + shift[video, token // 4]
            np.testing.assert_allclose(out[video, token], expected, rtol=1e-6, atol=1e-6)


def test_modulation_by_nothing_changes_nothing():
    x = jnp.asarray(values(11, 1, 6, 5))
    nothing = jnp.zeros((1, 2, 5))
    np.testing.assert_array_equal(layers.modulate(x, nothing, nothing), x)


def test_modulation_keeps_half_precision():
    x = jnp.asarray(values(12, 1, 6, 5), jnp.bfloat16)
    rows = jnp.asarray(values(13, 1, 2, 5))
    assert layers.modulate(x, rows, rows).dtype == jnp.bfloat16
