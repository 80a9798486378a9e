"""Cuts and flushes: which blocks, frames and positions are visible before and after, and how a video goes on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from packforcing_jax.config import CacheConfig
from packforcing_jax.memory import cache
from packforcing_jax.memory import layout as layouts

ADJUSTMENTS = ("sink", "incremental", "sink_only", "none")
# A sink of one block, one recent block, the best two of the newest four packed ones
NUMBERED = CacheConfig(block=3, sink=3, recent=3, top=2, capacity=4, score_pool=(3, 1, 1))
UNEVEN = CacheConfig(
    block=3, sink=1, recent=4, top=0, capacity=0
)  # frames, not blocks, are counted


def progress(blocks, scene=0, first=0):
    return dataclasses.replace(
        layouts.begin(blocks), scene_start=jnp.int32(3 * scene), first_visible=jnp.int32(3 * first)
    )


def sight(cfg, at):
    """(frames of the sink, frames of `recent`, packed blocks, positions of sink, packed row, recent, current)."""
    seen = layouts.layout(cfg, at)
    sink = int(seen.scene) + np.arange(int(seen.sink))
    recent = int(seen.start) - int(seen.recent) + np.arange(int(seen.recent))
    positions = (seen.sink_position, seen.mid_position, seen.recent_position, seen.current_position)
    packed = sorted(i for i in seen.ids.tolist() if i >= 0)
    return sink.tolist(), recent.tolist(), packed, [float(x) for x in positions]


@pytest.mark.parametrize(
    ("at", "sink", "recent", "packed", "positions"),
    [
        (progress(9), [0, 1, 2], [24, 25, 26], [4, 5, 6, 7], [0, 3, 9, 12]),
        # a flush before block 9: the sink alone, then as after a sink of its own
        (progress(9, first=9), [0, 1, 2], [], [], [0, 3, 3, 3]),
        (progress(10, first=9), [0, 1, 2], [27, 28, 29], [], [0, 3, 3, 6]),
        (progress(11, first=9), [0, 1, 2], [30, 31, 32], [9], [0, 3, 6, 9]),
        (progress(15, first=9), [0, 1, 2], [42, 43, 44], [10, 11, 12, 13], [0, 3, 9, 12]),
        # a cut before block 9: as a new video
        (progress(9, 9, 9), [], [], [], [0, 0, 0, 0]),
        (progress(10, 9, 9), [27, 28, 29], [], [], [0, 3, 3, 3]),
        (progress(11, 9, 9), [27, 28, 29], [30, 31, 32], [], [0, 3, 3, 6]),
        (progress(12, 9, 9), [27, 28, 29], [33, 34, 35], [10], [0, 3, 6, 9]),
        (progress(20, 9, 9), [27, 28, 29], [57, 58, 59], [15, 16, 17, 18], [0, 3, 9, 12]),
        # a cut before block 9, then a flush before block 13
        (progress(13, 9, 13), [27, 28, 29], [], [], [0, 3, 3, 3]),
        (progress(15, 9, 13), [27, 28, 29], [42, 43, 44], [13], [0, 3, 6, 9]),
        # a flush inside the first sink block's scene changes nothing that is not there yet
        (progress(1, first=1), [0, 1, 2], [], [], [0, 3, 3, 3]),
        (progress(0), [], [], [], [0, 0, 0, 0]),
    ],
)
def test_which_numbered_blocks_are_visible(at, sink, recent, packed, positions):
    assert sight(NUMBERED, at) == (sink, recent, packed, positions)


@pytest.mark.parametrize(
    ("rule", "flushed", "cut"),
    [
        ("incremental", [24, 27, 27, 27], [27, 27, 27, 27]),
        ("sink_only", [24, 27, 27, 27], [27, 27, 27, 27]),
        ("none", [0, 27, 27, 27], [27, 27, 27, 27]),
    ],
)
def test_true_positions_go_on_over_a_flush_and_a_cut(rule, flushed, cut):
    cfg = dataclasses.replace(NUMBERED, rope_adjustment=rule)
    assert sight(cfg, progress(9, first=9))[3] == flushed
    assert sight(cfg, progress(9, 9, 9))[3] == cut


@pytest.mark.parametrize(
    ("at", "sink", "recent", "positions"),
    [
        (progress(1), [0], [1, 2], [0, 1, 1, 3]),
        (progress(2), [0], [2, 3, 4, 5], [0, 1, 1, 5]),
        (progress(5), [0], [11, 12, 13, 14], [0, 1, 1, 5]),
        (progress(5, first=5), [0], [], [0, 1, 1, 1]),
        (progress(6, first=5), [0], [15, 16, 17], [0, 1, 1, 4]),
        (progress(7, first=5), [0], [17, 18, 19, 20], [0, 1, 1, 5]),
        (progress(6, 5, 5), [15], [16, 17], [0, 1, 1, 3]),
        (progress(7, 5, 5), [15], [17, 18, 19, 20], [0, 1, 1, 5]),
    ],
)
def test_frames_are_counted_where_sizes_are_not_whole_blocks(at, sink, recent, positions):
    assert sight(UNEVEN, at) == (sink, recent, [], positions)
    seen = layouts.layout(UNEVEN, at)
    chunk = UNEVEN.chunk
    assert chunk == 1
    frames = jnp.asarray([*sink, *recent, *range(int(seen.start), int(seen.start) + 3)])
    slots = layouts.frame_slots(UNEVEN, seen, frames).tolist()
    assert sorted(slots) == list(range(len(slots)))  # valid ones first, none twice
    expected = [0, *range(1, len(recent) + 1)]
    found = layouts.frame_positions(UNEVEN, seen, frames)[: len(expected)]
    np.testing.assert_array_equal(found, expected)


# A memory


@pytest.fixture(scope="module")
def text():
    return tiny.text()


def memory_of(exp, blocks, text):
    return tiny.rollout(exp, blocks, lambda block: text)[1]


def one_more(exp, memory, text, noise):
    """(latent, ids, memory) of one more block."""
    memory, done = tiny.denoise(tiny.apart(), exp.step, memory, noise=noise, text=text)
    low_res = tiny.low_res(1, exp)[0]
    memory, _ = tiny.commit(
        tiny.apart(),
        exp.step,
        memory,
        latent=done.latent,
        low_res=low_res,
        selection=done.selection,
        text=text,
    )
    return np.asarray(done.latent), tiny.ids(done), memory


flush = tiny.jit(cache.flush, static_argnums=0)
cut = tiny.jit(cache.cut, static_argnums=0)


@pytest.mark.parametrize("rule", ADJUSTMENTS)
def test_after_a_flush_the_sink_stays_and_all_else_is_gone(text, rule):
    """Bit for bit what a memory gives that never held more than the sink, where positions are the same."""
    exp = tiny.with_cache(rope_adjustment=rule)
    long = memory_of(exp, 7, text)
    short = memory_of(exp, 1, text)
    flushed = flush(exp.memory, long)
    assert [int(x) for x in jax.tree.leaves(flushed.progress)] == [7, 0, 7 * 3]
    sinks = [tiny.committed(exp, memory) for memory in (flushed, short)]
    assert sinks[0].k.shape[2] == sinks[1].k.shape[2] == 3
    np.testing.assert_array_equal(sinks[0].v, sinks[1].v)
    if rule in ("sink", "none"):
        np.testing.assert_array_equal(sinks[0].k, sinks[1].k)
    for number in range(4):
        noise = tiny.noise(exp, number)
        latent, ids, flushed = one_more(exp, flushed, text, noise)
        expected, chosen, short = one_more(exp, short, text, noise)
        np.testing.assert_array_equal(ids, np.where(chosen >= 0, chosen + 6, -1))
        if rule == "sink":
            np.testing.assert_array_equal(latent, expected)
        elif rule != "none":  # whose sink is as far away as it truly is
            np.testing.assert_allclose(latent, expected, atol=5e-6)
    assert (ids >= 0).any()


@pytest.mark.parametrize("rule", ADJUSTMENTS)
def test_after_a_cut_the_next_blocks_are_those_of_a_new_video(text, rule):
    """Given the same noise: bit for bit where positions are the same, else as far as other positions round."""
    exp = tiny.with_cache(rope_adjustment=rule)
    after = cut(exp.memory, memory_of(exp, 7, text))
    new = cache.init(exp.memory, tiny.BATCH)
    assert [int(x) for x in jax.tree.leaves(after.progress)] == [7, 7 * 3, 7 * 3]
    assert tiny.committed(exp, after).k.shape[2] == 0
    for number in range(5):
        noise = tiny.noise(exp, number)
        latent, ids, after = one_more(exp, after, text, noise)
        expected, chosen, new = one_more(exp, new, text, noise)
        np.testing.assert_array_equal(ids, np.where(chosen >= 0, chosen + 7, -1))
        if rule == "sink":
            np.testing.assert_array_equal(latent, expected)
        else:
            np.testing.assert_allclose(latent, expected, atol=5e-6)
    assert (ids >= 0).any()


def test_a_cut_and_a_flush_change_only_what_is_counted_where_keys_stay(text):
    exp = tiny.with_cache(rope_adjustment="none")
    memory = memory_of(exp, 6, text)
    for forget in (cut, flush):
        after = forget(exp.memory, memory)
        for one, other in zip(memory.layers, after.layers, strict=True):
            stores = ((x.packed, x.packed_positions, x.view) for x in (one, other))
            jax.tree.map(np.testing.assert_array_equal, *stores)
        np.testing.assert_array_equal(after.latents, memory.latents)


@pytest.mark.parametrize("forget", [cut, flush])
def test_one_program_serves_a_video_with_and_without_cuts(text, forget):
    memory = memory_of(tiny.EXP, 3, text)
    sizes = [function._cache_size() for function in (tiny.denoise, tiny.commit)]
    one_more(tiny.EXP, forget(tiny.EXP.memory, memory), text, tiny.noise(tiny.EXP, 3))
    assert [function._cache_size() for function in (tiny.denoise, tiny.commit)] == sizes
