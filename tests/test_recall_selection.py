"""One token of many asks for a block long past: a sum of products misses it, a softmax with a high power finds it.

Every video's archive is set by hand: in half of its blocks there is no guest, in the others one of several, and the
guest now called in one alone. In one of three heads all tokens lean a little towards blocks without a guest; those
that ask match the called guest strongly and the other guests by half of that at most. The lean of 63 tokens sums up
to 6 to 10 times one asking token's spread over blocks. Everything else is noise.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from packforcing_jax.policies import selection

VIDEOS = 12
QUERIES = 64
HEADS = 3
HEAD = 1
KEEP = 16  # HEAD is the one that matches
BLOCKS = 109
UNSEEN = 3
GUESTS = 7
NOISE = 9  # packed blocks, empty slots, kinds of guest, channels of noise
SIZE = 1 + GUESTS + NOISE  # channel 0: no guest, 1: the called one
MATCH = 12.0  # logit of the called guest, enough for most of the attention among some thousand keys


def video(rng, *, queries, asking, keys, answering):
    """(queries [q, n, h], packed keys [slot, p, n, h], slot of the block in which the called guest is)."""
    shown = np.where(rng.random(BLOCKS) < 0.5, 0, rng.integers(2, GUESTS + 1, BLOCKS))
    called = rng.integers(BLOCKS - KEEP)  # slots are in time order here: not one of the newest
    shown[called] = 1
    archive = np.zeros((BLOCKS, keys, HEADS, SIZE))
    archive[..., -NOISE:] = rng.normal(size=(BLOCKS, keys, HEADS, NOISE))
    archive[np.arange(BLOCKS), :, HEAD, shown] = 1

    q = np.zeros((queries, HEADS, SIZE))
    q[..., -NOISE:] = (
        np.sqrt(SIZE / NOISE) / 2 * rng.normal(size=(queries, HEADS, NOISE))
    )  # logits of spread 1/2
    who = rng.permutation(queries)
    wish = np.sqrt(SIZE) * MATCH * np.concatenate([[1], rng.uniform(-0.5, 0.5, GUESTS - 1)])
    q[who[:asking], HEAD, 1 : GUESTS + 1] = wish
    blocks = archive[:, :, HEAD].sum(axis=1)
    lean = (blocks @ q[who[0], HEAD]).std() / (blocks[:, 0] * (QUERIES - 1)).std()
    q[:, HEAD, 0] = rng.uniform(6, 10) * lean
    archive[called, rng.permutation(keys)[answering:], HEAD, 1] = (
        0  # keys that show nothing of the guest
    )
    return q, archive, called


def called_back(seed, *, queries=QUERIES, asking=1, keys=3, answering=3):
    """(ScoreInputs, ids [b] of the blocks it asks for) with slots out of time order, what is called in unseen ones."""
    rng = np.random.default_rng(seed)
    parts = [
        video(rng, queries=queries, asking=asking, keys=keys, answering=answering)
        for _ in range(VIDEOS)
    ]
    q, archive, called = (np.stack(x) for x in zip(*parts, strict=True))
    archive = np.concatenate(
        [archive, archive[np.arange(VIDEOS), called][:, None].repeat(UNSEEN, axis=1)], axis=1
    )
    near = np.zeros((VIDEOS, 11, HEADS, SIZE))
    near[..., -NOISE:] = rng.normal(size=(VIDEOS, 11, HEADS, NOISE))
    order = rng.permutation(BLOCKS + UNSEEN)
    ids = np.where(order < BLOCKS, order, -1)
    arrays = (q, archive[:, order], near, q.sum(axis=1), archive[:, order].sum(axis=2))
    queries, packed, near, query_sum, key_sum = (jnp.asarray(x, jnp.float32) for x in arrays)
    return selection.ScoreInputs(
        queries=queries,
        packed=packed,
        full_res=(near,),
        full_res_valid=(jnp.arange(11) < 8,),
        ids=jnp.asarray(ids),
        query_sum=query_sum,
        key_sum=key_sum,
        random=jnp.asarray(rng.uniform(size=(VIDEOS, BLOCKS + UNSEEN)), jnp.float32),
    ), called


def found(policy, asked, called):
    """For every video, whether the block it asks for is among the chosen."""
    score = jax.jit(selection.SCORES[policy].fn)
    _, chosen, _ = selection.choose(score(asked), asked.ids, KEEP)
    return (np.asarray(chosen) == called[:, None]).any(axis=1)


def spread(asked, called):
    """Spread over blocks of what all others sum up to, as a multiple of that of the asking token, in its head."""
    seen = np.asarray(asked.ids) >= 0
    q = np.asarray(asked.queries)[:, :, HEAD]
    sums = np.asarray(asked.key_sum)[:, seen, HEAD]
    asking = q[:, :, 1].argmax(axis=1)
    one = q[np.arange(VIDEOS), asking]
    parts = [np.einsum("bh,bmh->bm", x, sums).std(axis=1) for x in (q.sum(axis=1) - one, one)]
    return parts[0] / parts[1]


@pytest.mark.parametrize("seed", range(3))
def test_one_asking_token_is_outvoted_in_the_papers_sum(seed):
    asked, called = called_back(seed)
    assert (spread(asked, called) > 4).all()
    assert (spread(asked, called) < 12).all()
    assert not found("paper_sum", asked, called).any()
    assert not found("recency", asked, called).any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("policy", ["affinity", "mass_max", "centred_logit_max"])
def test_one_asking_token_is_heard(policy, seed):
    asked, called = called_back(seed)
    assert found(policy, asked, called).all()
    silent = asked.replace(queries=asked.queries.at[..., 1].set(0))  # the same without the question
    assert not found(policy, silent, called).all()


def test_one_asking_token_of_thousands_is_heard():
    asked, called = called_back(1, queries=2500, keys=2, answering=2)
    for policy in ("affinity", "mass_max"):
        assert found(policy, asked, called).all(), policy
    for policy in ("mass_sum", "paper_sum"):
        assert not found(policy, asked, called).any(), policy


def test_the_papers_sum_finds_what_enough_tokens_ask_for():
    share = [
        found("paper_sum", *called_back(2, asking=asking)).mean()
        for asking in (1, QUERIES // 2, QUERIES)
    ]
    assert share[0] == 0
    assert share[1:] == [1, 1]


def test_a_mean_over_keys_loses_the_one_that_answers():
    asked, called = called_back(3, keys=61, answering=1)
    for policy in ("affinity", "mass_max"):
        assert found(policy, asked, called).all(), policy
    for policy in ("logit_max", "centred_logit_max", "paper_sum"):
        assert not found(policy, asked, called).any(), policy
    asked, called = called_back(3, keys=61, answering=61)
    for policy in ("affinity", "mass_max", "logit_max", "centred_logit_max"):
        assert found(policy, asked, called).all(), policy
