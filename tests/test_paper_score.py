"""The paper's own score: the sum over the heads, queries and keys that it takes, and what the memory keeps for it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from packforcing_jax.config import CacheConfig
from packforcing_jax.errors import InputError
from packforcing_jax.memory import cache, view
from packforcing_jax.memory import layout as layouts
from packforcing_jax.sampling import block_step, pipeline, player
from packforcing_jax.sampling.block_step import Access, Denoiser
from packforcing_jax.training import rollout
from packforcing_jax.types import KV

NUMBER = 9  # the block that asks: four packed blocks of three frames lie behind a sink of one and two recent ones
ADJUSTMENTS = ("sink", "incremental", "sink_only", "none")
ALL = {"score_heads": 1.0, "query_stride": 1, "recent_queries": False}
SIZES = {"recent": 6, "selection": "paper"}


def turned(x, frame, row, column):
    """One head [h] rotated to a frame and a place on the grid, in 64 bit, two channels to an angle."""
    rates = [100.0 ** (-np.arange(3) / 3), 20.0 ** (-np.arange(2) / 2), np.ones(1)]
    angles = np.concatenate([at * rate for at, rate in zip((frame, row, column), rates)])
    pairs = np.asarray(x, float).reshape(6, 2)
    spun = (pairs[:, 0] + 1j * pairs[:, 1]) * np.exp(1j * angles)
    return np.stack([spun.real, spun.imag], axis=-1).ravel()


def asked(exp, blocks, heads):
    """Sum [b, n, h] of single queries at their true places; `blocks` holds [b, token, n, h] by block number."""
    total = np.zeros((tiny.BATCH, heads, 12))
    for number, q in blocks.items():
        for token in range(0, q.shape[1], exp.cache.stride):
            frame, rest = divmod(token, 8)
            for video, head in np.ndindex(tiny.BATCH, heads):
                place = (3 * number + frame, *divmod(rest, 2))
                total[video, head] += turned(q[video, token, head], *place)
    return total


def brute(exp, layout, layer, blocks, heads):
    """Score [b, slot] of every visible block: products of single queries and keys, summed in 64 bit."""
    queries = asked(exp, blocks, heads)
    offsets, grid = layouts.packed_positions(exp.memory)
    scores = np.full((tiny.BATCH, exp.cache.slots), np.nan)
    for slot, number in enumerate(np.asarray(layout.ids)):
        for video in range(tiny.BATCH if number >= 0 else 0):
            lies = 0.0
            if layer.packed_positions.size:
                lies = float(layer.packed_positions[video, slot]) + offsets
            times = 3 * number + offsets - lies
            keys = np.asarray(layer.packed.k[video, slot])
            scores[video, slot] = sum(
                queries[video, head] @ turned(keys[token, head], times[token], 0, 0)
                for token in range(len(offsets))
                for head in range(heads)
            ) / np.sqrt(12)
    return scores


def situation(rope_adjustment="sink", **changes):
    """(experiment, layout, a layer of random packed keys that kept its recent blocks' queries, queries by block)."""
    exp = tiny.with_cache(rope_adjustment=rope_adjustment, **{**SIZES, **changes})
    layout = layouts.layout(exp.cache, layouts.begin(NUMBER))
    layer = cache.init(exp.memory, tiny.BATCH).layers[0]
    queries = {n: tiny.normal(n, tiny.BATCH, 24, 3, 12) for n in range(NUMBER - 4, NUMBER + 1)}
    for number in range(NUMBER - 4, NUMBER):  # older ones give way
        then = layouts.layout(exp.cache, layouts.begin(number))
        layer = cache.keep_queries(then, layer, view.sum_queries(exp.memory, queries[number]))
    layer = dataclasses.replace(
        layer,
        packed=KV(k=tiny.normal(40, *layer.packed.k.shape), v=layer.packed.v),
        packed_positions=5 * tiny.normal(41, *layer.packed_positions.shape),
    )
    return exp, layout, layer, queries


def score(exp, layout, layer, q):
    """The score of every packed block [b, slot]."""
    spec = exp.memory
    random = jnp.zeros((tiny.BATCH, exp.cache.slots))
    return view.score(spec, layout, layer, view.pool_queries(spec, layout, q), random)


@pytest.mark.parametrize(
    ("changes", "heads", "blocks"),
    [
        ({}, 1, (7, 8, 9)),
        ({"score_heads": 0.7, "query_stride": 5}, 2, (7, 8, 9)),
        ({"score_heads": 1.0, "query_stride": 7, "recent_queries": False}, 3, (9,)),
        ({"score_heads": 0.1, "query_stride": 100, "recent": 3}, 1, (8, 9)),
        ({"recent": 0}, 1, (9,)),
    ],
)
@pytest.mark.parametrize("rope_adjustment", ADJUSTMENTS)
def test_the_score_is_the_sum_over_single_queries_and_keys(rope_adjustment, changes, heads, blocks):
    exp, layout, layer, queries = situation(rope_adjustment, **changes)
    found = score(exp, layout, layer, queries[NUMBER])
    expected = brute(exp, layout, layer, {n: queries[n] for n in blocks}, heads)
    visible = np.asarray(layout.ids) >= 0
    assert visible.sum() == exp.cache.capacity
    scale = np.abs(expected[:, visible]).max()
    np.testing.assert_allclose(found[:, visible] / scale, expected[:, visible] / scale, atol=1e-5)


@pytest.mark.parametrize("rope_adjustment", ADJUSTMENTS)
def test_with_all_heads_and_the_blocks_own_queries_it_is_the_bilinear_sum(rope_adjustment):
    exp, layout, layer, queries = situation(rope_adjustment, **ALL)
    whole = tiny.with_cache(exp, selection="paper_sum")
    visible = np.asarray(layout.ids) >= 0
    ours, theirs = (score(one, layout, layer, queries[NUMBER]) for one in (exp, whole))
    np.testing.assert_array_equal(ours[:, visible], theirs[:, visible])
    more, _, layer, _ = situation(rope_adjustment, **ALL | {"recent_queries": True})
    assert (score(more, layout, layer, queries[NUMBER]) != ours)[:, visible].all()


def test_only_the_paper_takes_a_part_and_keeps_queries():
    """Other scores take all heads and queries whatever the settings say, and keep nothing."""
    for name, heads, stride, kept in (("paper", 1, 8, 2), ("paper_sum", 3, 1, 0)):
        exp = tiny.with_cache(recent=6, selection=name)
        assert (exp.memory.scored_heads, exp.cache.stride) == (heads, stride)
        shapes = {layer.queries.shape for layer in cache.init(exp.memory, 2, jnp.bfloat16).layers}
        assert shapes == {(2, kept, 3, 12)}
    layer = cache.init(tiny.with_cache(**SIZES).memory, 2, jnp.bfloat16).layers[0]
    assert layer.queries.dtype == jnp.float32
    assert tiny.with_cache(**SIZES, recent_queries=False).cache.asking_blocks == 0
    assert CacheConfig(selection="paper", top=0, capacity=0).asking_blocks == 0


def test_a_commit_keeps_the_queries_of_the_clean_pass():
    exp = tiny.with_cache(**SIZES, query_stride=5)
    spec = exp.memory
    _, memory = tiny.rollout(exp, 5)
    denoiser = Denoiser(tiny.apart(), exp.step, tiny.text())
    memory, denoised = tiny.denoise(
        tiny.apart(), exp.step, memory, noise=tiny.noise(exp, 5), text=tiny.text()
    )
    before = [np.array(layer.queries) for layer in memory.layers]

    def watching(cfg, layout, attention_fn):
        return lambda q, k, v, past: (attention_fn(q, k, v, past)[0], q)

    clean = tiny.jit(
        lambda views: block_step.read_clean(
            denoiser,
            layouts.layout(exp.cache, layouts.begin(5)),
            denoised.latent,
            views,
            Access(attends=watching),
        )
    )
    seen = clean(block_step.views_of(memory))
    memory, _ = tiny.commit(
        tiny.apart(),
        exp.step,
        memory,
        latent=denoised.latent,
        low_res=tiny.low_res(1, exp)[0],
        selection=denoised.selection,
        text=tiny.text(),
    )
    for was, layer, q in zip(before, memory.layers, seen, strict=True):
        np.testing.assert_allclose(
            layer.queries[:, 1], asked(exp, {0: np.asarray(q)}, 3), atol=1e-4
        )
        np.testing.assert_array_equal(layer.queries[:, 0], was[:, 0])
        assert (np.asarray(layer.queries[:, 1]) != was[:, 1]).any()
    assert spec.cache.asking_blocks == 2


def test_the_queries_of_recent_blocks_change_what_is_chosen():
    found = {
        recent: [
            tiny.ids(one)
            for one in tiny.rollout(tiny.with_cache(**SIZES, recent_queries=recent), 9)[0]
        ]
        for recent in (True, False)
    }
    assert any((a != b).any() for a, b in zip(*found.values(), strict=True))


@pytest.mark.parametrize("forget", [cache.flush, cache.cut])
def test_forgotten_blocks_do_not_ask(forget):
    exp, _, layer, queries = situation(rope_adjustment="sink")
    memory = dataclasses.replace(
        cache.init(exp.memory, tiny.BATCH), layers=[layer], progress=layouts.begin(NUMBER)
    )
    memory = forget(exp.memory, memory)
    layout = layouts.layout(exp.cache, memory.progress)
    pooled = view.pool_queries(exp.memory, layout, queries[NUMBER])
    random = jnp.zeros((tiny.BATCH, exp.cache.slots))
    found = view.score_inputs(exp.memory, layout, memory.layers[0], pooled, random)
    np.testing.assert_array_equal(found.query_sum, pooled.total)


def test_an_archive_on_the_host_is_asked_alike(folder):
    """Late and shared, as the host needs it; to what programs compiled in one piece or in four differ by."""
    loaded = pipeline.Pipeline.from_pretrained(folder)
    settings = ("selection=paper", "scope=shared", "timing=late", "capacity=3")
    played = []
    for place in ("device", "host"):
        model = loaded.with_settings([f"cache.{each}" for each in (*settings, f"archive={place}")])
        state = model.start(seed=3, videos=[5, 8])
        text = model.text_kv(["a red disc", "the blue figure walks"])
        blocks = []
        for _ in range(7):
            state, block = player.next_block(model, state, text)
            blocks.append((tiny.ids(block), np.array(block.latent)))
        played.append(blocks)
    for (ids, latent), (chosen, expected) in zip(*played, strict=True):
        np.testing.assert_array_equal(ids, chosen)
        np.testing.assert_allclose(latent, expected, atol=2e-5)


def test_training_refuses_what_it_does_not_keep():
    exp = tiny.with_cache(selection="paper")
    with pytest.raises(InputError, match=r"'paper' asks .* recent blocks.*recent_queries=false"):
        rollout.for_training(exp, 8, 3, top=1)
    assert rollout.for_training(exp, 8, 3).cache.selection == "all"
    own = tiny.with_cache(exp, recent_queries=False)
    assert rollout.for_training(own, 8, 3, top=1).cache.selection == "paper"


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"score_heads": 0.0}, "cache.score_heads=0.0 is out of range"),
        ({"score_heads": 1.5}, "cache.score_heads=1.5 is out of range; .* to 1.0"),
        ({"query_stride": 0}, "cache.query_stride=0 is out of range; give a whole number from 1"),
        ({"query_stride": -2}, "cache.query_stride=-2 is out of range"),
    ],
)
def test_settings_that_ask_nothing_are_refused(changes, remedy):
    with pytest.raises(InputError, match=remedy):
        CacheConfig(selection="paper", **changes)


def test_the_command_line_reaches_the_settings():
    changed = pipeline.with_overrides(
        tiny.EXP,
        None,
        [
            "cache.selection=paper",
            "cache.score_heads=1",
            "cache.query_stride=1",
            "cache.recent_queries=False",
        ],
    )
    assert changed == tiny.with_cache(selection="paper", **ALL)
    assert jax.tree.leaves(cache.init(changed.memory, 2).layers[0].queries)[0].size == 0
