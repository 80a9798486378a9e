"""Choosing packed blocks: every score against slow sums over single queries and keys, and what is chosen from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packforcing_jax import config
from packforcing_jax.errors import InputError
from packforcing_jax.policies import selection

VIDEOS = 2
QUERIES = 5
HEADS = 3
SIZE = 7
PACKED = 4
WINDOW = 6
IDS = (9, -1, 2, 5, -1, 11, 3)
BY_CONTENT = (
    "affinity",
    "mass_sum",
    "mass_max",
    "logit_max",
    "centred_logit_max",
    "log_sum_exp",
    "paper_sum",
    "paper",
    "query_score",
)
SCORES = selection.SCORES
choose = jax.jit(selection.choose, static_argnums=2)


def inputs_of(rng, ids=IDS, full_res_valid=(True, True, False), *, scale=1.5):
    """Random queries and keys, each pooled query the mean over a window of those that are summed."""

    def normal(*shape):
        return scale * rng.normal(size=(VIDEOS, *shape, HEADS, SIZE))

    q = np.sqrt(WINDOW) * normal(QUERIES, WINDOW)
    packed = normal(len(ids), PACKED)
    random = rng.uniform(size=(VIDEOS, len(ids)))
    near = normal(len(full_res_valid))
    arrays = (q.mean(axis=2), packed, near, q.sum(axis=(1, 2)), packed.sum(axis=2), random)
    queries, packed, near, query_sum, key_sum, random = (
        jnp.asarray(x, jnp.float32) for x in arrays
    )
    return selection.ScoreInputs(
        queries=queries,
        packed=packed,
        full_res=(near[:, :1], near[:, 1:]),
        full_res_valid=tuple(
            jnp.asarray(x, bool) for x in (full_res_valid[:1], full_res_valid[1:])
        ),
        ids=jnp.asarray(ids),
        query_sum=query_sum,
        key_sum=key_sum,
        random=random,
    )


def slow_logits(asked):
    """Logits [b, slot, p, q, n] of packed keys and [b, k, q, n] at full size, one query at a time in float64."""
    arrays = (asked.queries, asked.packed, np.concatenate(asked.full_res, axis=1))
    q, packed, full_res = (np.asarray(x, float) for x in arrays)
    far = np.zeros((*packed.shape[:3], *q.shape[1:3]))
    near = np.zeros((*full_res.shape[:2], *q.shape[1:3]))
    for video, query, head in np.ndindex(q.shape[:3]):
        one = q[video, query, head] / np.sqrt(SIZE)
        far[video, ..., query, head] = packed[video, :, :, head] @ one
        near[video, ..., query, head] = full_res[video, :, head] @ one
    return far, near


def slow_mass(asked):
    """Attention mass [b, slot, q, n] of every block, of which one at least is visible."""
    packed, near = slow_logits(asked)
    visible = np.asarray(asked.ids) >= 0
    valid = np.concatenate(asked.full_res_valid)
    top = max(packed.max(), near.max(initial=-np.inf))
    packed = np.exp(packed - top).sum(axis=2) * visible[None, :, None, None]
    total = packed.sum(axis=1, keepdims=True)
    for key in np.flatnonzero(valid):
        total = total + np.exp(near[:, key] - top)[:, None]
    return packed / total


def slow_centred(asked):
    """Logits averaged over keys, [b, slot, q, n], less each query's mean over the visible blocks."""
    packed = slow_logits(asked)[0].mean(axis=2)
    return packed - packed[:, np.asarray(asked.ids) >= 0].mean(axis=1, keepdims=True)


SLOW = {
    "affinity": lambda asked: (slow_mass(asked) ** 4).sum(axis=(2, 3)),
    "mass_sum": lambda asked: slow_mass(asked).sum(axis=(2, 3)),
    "mass_max": lambda asked: slow_mass(asked).max(axis=(2, 3)),
    "logit_max": lambda asked: slow_logits(asked)[0].mean(axis=2).max(axis=(2, 3)),
    "centred_logit_max": lambda asked: slow_centred(asked).max(axis=(2, 3)),
    "log_sum_exp": lambda asked: np.logaddexp.reduce(slow_logits(asked)[0], axis=2).sum(
        axis=(2, 3)
    ),
}


def test_a_config_takes_a_score_by_name_or_as_a_value():
    assert tuple(name for name, one in SCORES.items() if one.across_heads) == BY_CONTENT
    for name, score in SCORES.items():
        assert score.name == name
        assert config.CacheConfig(selection=name).score is score
        assert config.CacheConfig(selection=score).score is score
    own = selection.Score("oldest", lambda inputs: -selection.recency(inputs))
    assert config.CacheConfig(selection=own).score is own
    assert "oldest" not in SCORES


@pytest.mark.parametrize(
    ("name", "hint"),
    [("affinty", r"did you mean affinity\?"), ("zzz", "known: affinity, all, centred_logit_max")],
)
def test_an_unknown_score_is_refused_with_the_nearest_one(name, hint):
    with pytest.raises(InputError, match=f"cache.selection='{name}' is unknown; {hint}"):
        config.CacheConfig(selection=name)


@pytest.mark.parametrize("ids", [IDS, (3, 4, 5, 6, 7, 1, 2), (-1, 2, -1, -1, -1, -1, -1)])
@pytest.mark.parametrize("full_res_valid", [(True, True, False), (True,) * 3, (False,) * 3])
@pytest.mark.parametrize("policy", SLOW)
def test_scores_are_those_of_a_sum_over_single_queries(policy, ids, full_res_valid):
    asked = inputs_of(np.random.default_rng(len(set(ids))), ids, full_res_valid)
    scores = SCORES[policy].fn(asked)
    visible = np.asarray(ids) >= 0
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(
        scores[:, visible], SLOW[policy](asked)[:, visible], rtol=1e-5, atol=1e-6
    )


def test_the_papers_sum_is_the_double_sum_over_all_queries_and_keys():
    rng = np.random.default_rng(12)
    q = rng.normal(size=(VIDEOS, 11, HEADS, SIZE))
    archive = rng.normal(size=(VIDEOS, 3, PACKED, HEADS, SIZE))
    sums = (jnp.asarray(x, jnp.float32) for x in (q.sum(axis=1), archive.sum(axis=2)))
    asked = inputs_of(rng, (4, 0, 2)).replace(
        **dict(zip(("query_sum", "key_sum"), sums, strict=True))
    )
    expected = np.zeros((VIDEOS, 3))
    for video, slot, query, key, head in np.ndindex(VIDEOS, 3, 11, PACKED, HEADS):
        expected[video, slot] += (
            q[video, query, head] @ archive[video, slot, key, head] / np.sqrt(SIZE)
        )
    np.testing.assert_allclose(selection.paper_sum(asked), expected, rtol=1e-5)


@pytest.mark.parametrize("policy", BY_CONTENT)
def test_half_precision_is_rounded_once(policy):
    asked = inputs_of(np.random.default_rng(3))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 2 else x, asked)
    exact = jax.tree.map(lambda x, like: x.astype(like.dtype), half, asked)
    scores = SCORES[policy].fn(half)
    expected = SCORES[policy].fn(exact)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", SCORES)
def test_scores_move_with_their_slots(policy):
    asked = inputs_of(np.random.default_rng(5))
    order = np.asarray((4, 6, 0, 3, 5, 1, 2))
    moved = asked.replace(
        packed=asked.packed[:, order],
        ids=asked.ids[order],
        key_sum=asked.key_sum[:, order],
        random=asked.random[:, order],
    )
    seen = np.asarray(moved.ids) >= 0
    policy = SCORES[policy].fn
    np.testing.assert_allclose(policy(moved)[:, seen], policy(asked)[:, order][:, seen], rtol=1e-5)


@pytest.mark.parametrize("policy", SCORES)
def test_what_lies_in_unseen_slots_and_keys_does_not_count(policy):
    asked = inputs_of(np.random.default_rng(6))
    unseen = np.asarray(IDS) < 0
    best = 60 * asked.queries[:, None, :PACKED]  # what every head likes best
    noisy = asked.replace(
        packed=asked.packed.at[:, unseen].set(best),
        key_sum=asked.key_sum.at[:, unseen].set(1e4),
        full_res=(asked.full_res[0], asked.full_res[1].at[:, 1].set(1e4)),
        random=asked.random.at[:, unseen].set(2.0),
    )
    scores, before = (SCORES[policy].fn(x) for x in (noisy, asked))
    assert np.isfinite(scores).all()
    np.testing.assert_array_equal(scores[:, ~unseen], before[:, ~unseen])
    slots, chosen, _ = choose(scores, noisy.ids, 6)
    np.testing.assert_array_equal(chosen, [[2, 3, 5, 9, 11, -1]] * VIDEOS)
    np.testing.assert_array_equal(slots[:, :5], [[2, 6, 3, 0, 5]] * VIDEOS)


@pytest.mark.parametrize("policy", BY_CONTENT)
def test_every_visible_block_can_win_by_its_keys(policy):
    asked = inputs_of(np.random.default_rng(7), scale=0.3)
    for slot in (0, 2, 6):
        keys = asked.packed.at[:, slot].set(40 * asked.queries.mean(axis=1, keepdims=True))
        liked = asked.replace(packed=keys, key_sum=keys.sum(axis=2))
        _, chosen, _ = choose(SCORES[policy].fn(liked), asked.ids, 1)
        np.testing.assert_array_equal(chosen, [[IDS[slot]]] * VIDEOS)


@pytest.mark.parametrize("policy", SCORES)
@pytest.mark.parametrize("full_res_valid", [(False, False, False), (True, False, True)])
def test_an_archive_without_blocks_is_scored_without_harm(policy, full_res_valid):
    asked = inputs_of(np.random.default_rng(8), (-1,) * len(IDS), full_res_valid)
    scores = SCORES[policy].fn(asked)
    assert np.isfinite(scores).all()
    _, chosen, height = choose(scores, asked.ids, 2)
    np.testing.assert_array_equal(chosen, np.full((VIDEOS, 2), -1))
    np.testing.assert_array_equal(height, np.full((VIDEOS, 2), -np.inf))


@pytest.mark.parametrize("policy", SCORES)
def test_an_archive_without_slots_has_no_scores(policy):
    asked = inputs_of(np.random.default_rng(8), np.zeros(0, int), ())
    scores = SCORES[policy].fn(asked)
    assert scores.shape == (VIDEOS, 0)
    assert all(x.shape == (VIDEOS, 0) for x in selection.choose(scores, asked.ids, 0))


@pytest.mark.parametrize("full_res_valid", [(True, False), (False, False)])
def test_affinity_survives_large_logits(full_res_valid):
    scores = np.asarray(
        selection.affinity(
            inputs_of(np.random.default_rng(1), (0, 1, 2), full_res_valid, scale=40.0)
        )
    )
    assert np.isfinite(scores).all()
    assert (scores.sum(axis=1) <= QUERIES * HEADS).all()
    assert (scores.max(axis=1) > 0.9).all()


def test_the_gradient_of_affinity_is_finite_when_nothing_is_visible():
    asked = inputs_of(np.random.default_rng(2), (-1, -1), (False,))
    slope = jax.grad(lambda q: selection.affinity(asked.replace(queries=q)).sum())(asked.queries)
    assert np.isfinite(slope).all()


def test_affinity_and_recency_choose_differently():
    asked = inputs_of(np.random.default_rng(0), (15, 16, 12, 13, 14), (True,))
    old = asked.replace(packed=asked.packed.at[:, 2, 1].set(9 * asked.queries[:, 3]))
    slots, chosen, _ = choose(selection.recency(old), old.ids, 3)
    np.testing.assert_array_equal(chosen, [[14, 15, 16]] * VIDEOS)
    np.testing.assert_array_equal(slots, [[4, 0, 1]] * VIDEOS)
    assert (np.asarray(choose(selection.affinity(old), old.ids, 3)[1])[:, 0] == 12).all()


def test_random_depends_on_the_random_scores_alone():
    asked, other = (inputs_of(np.random.default_rng(seed)) for seed in (10, 11))
    draw = SCORES["random"].fn
    np.testing.assert_array_equal(draw(asked), draw(other.replace(random=asked.random)))
    scores = jnp.asarray(np.random.default_rng(9).uniform(size=(VIDEOS, len(IDS))), jnp.float32)
    scores = scores.at[0, 6].set(1.5).at[1, 3].set(1.5)
    _, chosen, _ = choose(draw(asked.replace(random=scores)), asked.ids, 1)
    np.testing.assert_array_equal(chosen, [[3], [5]])


@given(st.integers(0, 9), st.sampled_from((0, 1, 4, 9)), st.integers(0, 99))
@settings(max_examples=30, derandomize=True, deadline=None)
def test_the_best_visible_are_chosen_in_time_order(visible, keep, seed):
    rng = np.random.default_rng(seed)
    size = 9
    ids = np.full(size, -1)
    ids[rng.permutation(size)[:visible]] = rng.choice(40, visible, replace=False)
    scores = rng.permutation(2 * size).reshape(2, size).astype(np.float32)
    scores[:, ids < 0] += 100  # the unseen look best
    slots, chosen, height = choose(jnp.asarray(scores), jnp.asarray(ids), keep)
    assert slots.shape == chosen.shape == height.shape == (2, keep)
    for video in range(2):
        best = sorted(np.flatnonzero(ids >= 0), key=lambda slot: -scores[video, slot])[:keep]
        best = sorted(best, key=lambda slot: ids[slot])
        behind = keep - len(best)
        np.testing.assert_array_equal(chosen[video], [*ids[best], *[-1] * behind])
        np.testing.assert_array_equal(slots[video][: len(best)], best)
        np.testing.assert_array_equal(height[video], [*scores[video, best], *[-np.inf] * behind])
        assert len(set(np.asarray(slots[video]).tolist())) == keep


def test_a_pool_averages_whole_windows_and_leaves_the_rest_out():
    q = np.random.default_rng(8).normal(size=(VIDEOS, 3, 5, 7, HEADS, SIZE)).astype(np.float32)
    pooled = selection.pool(jnp.asarray(q.reshape(VIDEOS, -1, HEADS, SIZE)), (5, 7), (2, 2, 3))
    expected = [
        q[:, :2, 2 * y : 2 * y + 2, 3 * x : 3 * x + 3].mean(axis=(1, 2, 3))
        for y in range(2)
        for x in range(2)
    ]
    np.testing.assert_allclose(pooled, np.stack(expected, axis=1), atol=1e-6)
    noisy = q.copy()
    noisy[:, 2:] = 9
    noisy[:, :, 4:] = 9
    noisy[:, :, :, 6:] = 9
    again = selection.pool(jnp.asarray(noisy.reshape(VIDEOS, -1, HEADS, SIZE)), (5, 7), (2, 2, 3))
    np.testing.assert_array_equal(again, pooled)


def test_a_pool_of_one_is_every_query():
    q = jnp.arange(2.0 * 12 * 3 * 4).reshape(2, 12, 3, 4)
    np.testing.assert_array_equal(selection.pool(q, (2, 3), (1, 1, 1)), q)
