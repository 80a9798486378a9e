"""Choosing packed blocks: scores against a slow softmax, and what is chosen when few or none may be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packforcing_jax import selection

VIDEOS, QUERIES, HEADS, SIZE, PACKED = 2, 5, 3, 6, 2


def question(rng, ids, sharp_valid, *, scale=1.0):
    def normal(*shape):
        return jnp.asarray(scale * rng.normal(size=(VIDEOS, *shape, HEADS, SIZE)), jnp.float32)

    return selection.Question(q=normal(QUERIES), archive=normal(len(ids), PACKED), ids=jnp.asarray(ids),
                              sharp=normal(len(sharp_valid)), sharp_valid=jnp.asarray(sharp_valid))  # fmt: skip


def slow_affinity(asked):
    """Sum over queries and heads of (softmax mass of a block)^4, one query at a time."""
    scores = np.zeros((VIDEOS, len(asked.ids)))
    visible, valid = np.asarray(asked.ids) >= 0, np.asarray(asked.sharp_valid)
    q, archive, sharp = (np.asarray(x, float) for x in (asked.q, asked.archive, asked.sharp))
    for video, query, head in np.ndindex(VIDEOS, q.shape[1], HEADS):
        one = q[video, query, head] / np.sqrt(SIZE)
        packed = np.exp(archive[video, :, :, head] @ one).sum(axis=1) * visible
        total = packed.sum() + (np.exp(sharp[video, :, head] @ one) * valid).sum()
        scores[video] += (packed / total) ** 4
    return scores


@pytest.mark.parametrize("ids", [(3, 4, 5, 6, 7, 1, 2), (7, -1, -1, 4, 5, 6, -1), (-1, 2, -1, -1, -1, -1, -1)])
@pytest.mark.parametrize("sharp_valid", [(True,) * 4, (True, True, False, False), (False,) * 4])
def test_affinity_is_the_fourth_power_of_attention_mass(ids, sharp_valid):
    asked = question(np.random.default_rng(len(set(ids))), ids, sharp_valid, scale=1.5)
    np.testing.assert_allclose(selection.affinity(asked), slow_affinity(asked), rtol=1e-4, atol=1e-5)


def test_affinity_survives_large_logits():
    asked = question(np.random.default_rng(1), (0, 1, 2), (True, False), scale=40.0)
    scores = np.asarray(selection.affinity(asked))
    assert np.isfinite(scores).all()
    assert (scores.sum(axis=1) <= QUERIES * HEADS).all()
    assert (scores.max(axis=1) > 0.9).all()


def one_of_many(rng, *, relevant, slots):
    """One query of one head asks for block `relevant`; the other 63 lean towards what all other blocks have."""
    q = 0.1 * rng.normal(size=(1, 64, HEADS, SIZE))
    archive = 0.1 * rng.normal(size=(1, slots, PACKED, HEADS, SIZE))
    q[..., 0] += 2
    archive[..., 0] += 2
    archive[:, relevant, :, :, 0] -= 2
    archive[:, relevant, 0, 1, 3] += 5
    q[:, 17, 1] = 5 * np.eye(SIZE)[3]
    return selection.Question(
        q=jnp.asarray(q, jnp.float32), archive=jnp.asarray(archive, jnp.float32), ids=jnp.arange(slots),
        sharp=jnp.zeros((1, 3, HEADS, SIZE)), sharp_valid=jnp.ones(3, bool))  # fmt: skip


@pytest.mark.parametrize("relevant", [0, 8, 20])
def test_one_asking_query_of_many_finds_its_block_where_a_plain_sum_misses(relevant):
    asked = one_of_many(np.random.default_rng(relevant), relevant=relevant, slots=21)
    assert int(selection.affinity(asked).argmax()) == relevant
    plain = np.einsum("bqnh,bmpnh->m", asked.q, asked.archive)
    assert int(plain.argmin()) == relevant


@given(st.integers(0, 9), st.integers(1, 7), st.integers(0, 99))
@settings(max_examples=30, derandomize=True, deadline=None)
def test_the_best_visible_are_chosen_in_time_order(visible, keep, seed):
    rng, size = np.random.default_rng(seed), 9
    ids = np.full(size, -1)
    ids[rng.permutation(size)[:visible]] = rng.choice(40, visible, replace=False)
    scores = rng.permutation(2 * size).reshape(2, size).astype(np.float32)
    scores[:, ids < 0] += 100  # the unseen look best
    slots, chosen = choose(jnp.asarray(scores), jnp.asarray(ids), keep)
    for video in range(2):
        best = sorted(np.flatnonzero(ids >= 0), key=lambda slot: -scores[video, slot])[:keep]
        expected = sorted(ids[best])
        np.testing.assert_array_equal(chosen[video], expected + [-1] * (keep - len(expected)))
        np.testing.assert_array_equal(ids[slots[video]][: len(expected)], expected)
        assert len(set(np.asarray(slots[video]).tolist())) == keep


choose = jax.jit(selection.choose, static_argnums=2)


@pytest.mark.parametrize("policy", selection.POLICIES)
def test_unseen_blocks_are_never_chosen(policy):
    ids = (9, -1, 2, -1, -1, 5)
    asked = question(np.random.default_rng(4), ids, (True, True), scale=2.0)
    archive = asked.archive.at[:, 1].set(60 * asked.q[:, :PACKED])  # what every query of a head likes best
    slots, chosen = choose(selection.POLICIES[policy](asked.replace(archive=archive)), asked.ids, 4)
    np.testing.assert_array_equal(chosen, [[2, 5, 9, -1]] * VIDEOS)
    np.testing.assert_array_equal(slots[:, :3], [[2, 5, 0]] * VIDEOS)


def test_what_lies_in_unseen_slots_and_keys_does_not_count():
    asked = question(np.random.default_rng(6), (9, -1, 2, 5), (True, False, True))
    noisy = asked.replace(archive=asked.archive.at[:, 1].set(1e3), sharp=asked.sharp.at[:, 1].set(1e3))
    np.testing.assert_array_equal(selection.affinity(noisy), selection.affinity(asked))
    assert (np.asarray(selection.affinity(asked))[:, 1] == 0).all()


def test_recency_takes_the_newest_wherever_they_lie():
    asked = question(np.random.default_rng(0), (15, 16, 12, 13, 14), (True,))
    slots, chosen = choose(selection.recency(asked), asked.ids, 3)
    np.testing.assert_array_equal(chosen, [[14, 15, 16]] * VIDEOS)
    np.testing.assert_array_equal(slots, [[4, 0, 1]] * VIDEOS)


def test_a_pool_averages_whole_windows_and_leaves_the_rest_out():
    q = np.random.default_rng(8).normal(size=(VIDEOS, 3, 5, 7, HEADS, SIZE)).astype(np.float32)
    pooled = selection.pool(jnp.asarray(q.reshape(VIDEOS, -1, HEADS, SIZE)), (5, 7), (2, 2, 3))
    expected = [q[:, :2, 2 * y : 2 * y + 2, 3 * x : 3 * x + 3].mean(axis=(1, 2, 3)) for y in range(2) for x in range(2)]
    np.testing.assert_allclose(pooled, np.stack(expected, axis=1), atol=1e-6)
    noisy = q.copy()
    noisy[:, 2:], noisy[:, :, 4:], noisy[:, :, :, 6:] = 9, 9, 9
    again = selection.pool(jnp.asarray(noisy.reshape(VIDEOS, -1, HEADS, SIZE)), (5, 7), (2, 2, 3))
    np.testing.assert_array_equal(again, pooled)


def test_a_pool_of_one_is_every_query():
    q = jnp.arange(2.0 * 12 * 3 * 4).reshape(2, 12, 3, 4)
    np.testing.assert_array_equal(selection.pool(q, (2, 3), (1, 1, 1)), q)
