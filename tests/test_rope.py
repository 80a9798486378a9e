"""Positions turn channel pairs: only differences are felt, space and time add up, fractions are positions too."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from packforcing_jax.config import DiTConfig
from packforcing_jax.networks import rope

CFG = DiTConfig(dim=36, heads=3, rope_theta=(100.0, 20.0, 10.0), rope_pairs=(3, 1, 2))
FRAMES = np.array([0, 1, 2.25, 7, 7.5], np.float32)
PLACES = np.array([[0, 0], [3, 1], [0.5, 2], [1, 4.75], [2, 2]], np.float32)


rotate = tiny.jit(rope.rotate)


def heads(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def reference(x, frames, places, cfg):
    """The rotation in complex float64: pair j of an axis with n pairs turns by position * theta^(-j/n)."""
    positions = np.concatenate([frames[:, None], places], axis=1).astype(np.float64)
    speeds = [
        theta ** (-np.arange(count) / max(count, 1))
        for count, theta in zip(cfg.pairs, cfg.rope_theta)
    ]
    angles = np.concatenate(
        [positions[:, [axis]] * speed[None] for axis, speed in enumerate(speeds)], axis=1
    )
    pairs = x.astype(np.float64).reshape(*x.shape[:-1], -1, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)[None, :, None]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def both(frames, places, cfg=CFG):
    return rope.time_angles(jnp.asarray(frames), cfg) + rope.space_angles(jnp.asarray(places), cfg)


@pytest.mark.parametrize("pairs", [(3, 1, 2), (6, 0, 0), (2, 2, 2), (0, 5, 1), None])
def test_rotation_is_the_one_of_float64(pairs):
    cfg = dataclasses.replace(CFG, rope_pairs=pairs)
    x = heads(0, 2, 5, 3, 12)
    np.testing.assert_allclose(
        rotate(jnp.asarray(x), both(FRAMES, PLACES, cfg)),
        reference(x, FRAMES, PLACES, cfg),
        atol=1e-6,
        rtol=1e-6,
    )


def scores(frames_q, frames_k, places_q, places_k):
    q, k = (jnp.asarray(heads(seed, 1, 5, 3, 12)) for seed in (1, 2))
    q = rotate(q, both(frames_q, places_q))
    k = rotate(k, both(frames_k, places_k))
    return np.einsum("bqnh,bknh->bnqk", q, k)


def test_only_differences_are_felt():
    near = scores(FRAMES, FRAMES[::-1], PLACES, PLACES[::-1])
    for frames, place in ((40.0, (0, 0)), (-3.5, (2, 0)), (0.0, (-1.25, 7))):
        later = FRAMES + np.float32(frames)
        aside = PLACES + np.array([place], np.float32)
        moved = scores(later, later[::-1], aside, aside[::-1])
        np.testing.assert_allclose(moved, near, atol=2e-5)
    for shift in np.eye(3, dtype=np.float32):
        apart = scores(FRAMES + shift[0], FRAMES[::-1], PLACES + shift[None, 1:], PLACES[::-1])
        assert np.abs(apart - near).max() > 0.1


def test_space_then_time_is_both_at_once():
    x = jnp.asarray(heads(3, 2, 5, 3, 12))
    time = rope.time_angles(jnp.asarray(FRAMES), CFG)
    space = rope.space_angles(jnp.asarray(PLACES), CFG)
    np.testing.assert_allclose(rotate(rotate(x, space), time), rotate(x, space + time), atol=1e-6)
    np.testing.assert_allclose(rotate(rotate(x, time), space), rotate(x, space + time), atol=1e-6)


def test_two_half_steps_are_one():
    x = jnp.asarray(heads(4, 1, 5, 2, 12))
    half = rope.time_angles(jnp.full(5, 0.5), CFG)
    whole = rope.time_angles(jnp.full(5, 1.0), CFG)
    np.testing.assert_allclose(rotate(rotate(x, half), half), rotate(x, whole), atol=1e-6)


def test_every_video_may_have_its_own_places_in_time():
    x = jnp.asarray(heads(5, 3, 4, 2, 12))
    frames = jnp.asarray(heads(6, 3, 4) * 9)
    together = rotate(x, rope.time_angles(frames, CFG))
    for video in range(3):
        alone = rotate(x[video : video + 1], rope.time_angles(frames[video], CFG))
        np.testing.assert_array_equal(together[video], alone[0])
    assert (
        np.asarray(together[0]) != np.asarray(rotate(x, rope.time_angles(frames[1], CFG))[0])
    ).any()


def test_a_quarter_turn_of_two_channels():
    cfg = DiTConfig(dim=2, heads=1, rope_pairs=(1, 0, 0))
    turned = rotate(jnp.array([[[[1.0, 0.0]]]]), rope.time_angles(jnp.array([math.pi / 2]), cfg))
    np.testing.assert_allclose(turned[0, 0, 0], [0, 1], atol=1e-7)
    turned = rotate(jnp.array([[[[0.0, 1.0]]]]), rope.time_angles(jnp.array([math.pi / 2]), cfg))
    np.testing.assert_allclose(turned[0, 0, 0], [-1, 0], atol=1e-7)


def test_pairs_are_adjacent_channels():
    cfg = DiTConfig(
        dim=4, heads=1, rope_pairs=(2, 0, 0), rope_theta=(1e8, 1.0, 1.0)
    )  # the second pair hardly turns
    turned = rotate(
        jnp.array([[[[1.0, 0.0, 3.0, 4.0]]]]), rope.time_angles(jnp.array([math.pi / 2]), cfg)
    )
    np.testing.assert_allclose(turned[0, 0, 0], [0, 1, 3, 4], atol=1e-3)


@pytest.mark.parametrize(
    ("axis", "channels"), [(0, slice(0, 6)), (1, slice(6, 8)), (2, slice(8, 12))]
)
def test_time_comes_first_then_rows_then_columns(axis, channels):
    position = np.zeros((1, 3), np.float32)
    position[0, axis] = 1.5
    x = jnp.ones((1, 1, 1, 12))
    turned = np.asarray(rotate(x, both(position[:, 0], position[:, 1:])))[0, 0, 0]
    moved = np.zeros(12, bool)
    moved[channels] = True
    np.testing.assert_array_equal(turned != 1, moved)


def test_a_head_of_128_gives_time_22_pairs_and_rows_and_columns_21():
    assert DiTConfig(dim=1536, heads=12).pairs == (22, 21, 21)
    assert rope.time_angles(jnp.zeros(2), DiTConfig()).shape == (2, 64)


def test_frequencies_fall_from_one():
    np.testing.assert_allclose(rope.frequencies(4, 10000.0), [1, 0.1, 0.01, 0.001], rtol=1e-6)
    assert rope.frequencies(0, 10000.0).shape == (0,)


def test_half_precision_comes_back_as_it_went_in_and_is_rounded_once():
    x = jnp.asarray(heads(7, 1, 5, 3, 12)).astype(jnp.bfloat16)
    angles = both(FRAMES, PLACES)
    turned = rotate(x, angles)
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        turned, rotate(x.astype(jnp.float32), angles).astype(jnp.bfloat16)
    )


def test_grid_goes_through_columns_first_then_rows_then_frames():
    places = rope.grid([0, 2.5], [1, 3, 4], 2)
    one = [[0, 1], [0, 3], [0, 4], [2.5, 1], [2.5, 3], [2.5, 4]]
    np.testing.assert_array_equal(places, one * 2)
    assert places.dtype == np.float32
