"""Blocks that are not denoised one by one: given ones, windows of several, and recent ones committed again."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from packforcing_jax.errors import InputError
from packforcing_jax.memory import cache
from packforcing_jax.memory import layout as layouts
from packforcing_jax.networks import dit
from packforcing_jax.sampling import block_step
from packforcing_jax.sampling.schedules import NoiseLevel

ADJUSTMENTS = ("sink", "incremental", "sink_only", "none")
CONTEXT = tiny.normal(2, 2, 15, 10)
OTHER = tiny.normal(3, 2, 15, 10)
LATENTS = tiny.latents(9, seed=21)
LOWS = tiny.low_res(9, seed=22)


def text_of(context, exp=tiny.EXP):
    return tiny.text_kv(tiny.apart(exp).dit, context)


def give(exp, memory, block, context, selection=None):
    """`memory` with block number `block` of LATENTS committed as it is."""
    return tiny.commit(
        tiny.apart(exp) if exp.dit != tiny.EXP.dit else tiny.apart(),
        exp.step,
        memory,
        latent=LATENTS[block],
        low_res=LOWS[block],
        selection=selection,
        text=text_of(context, exp) if exp.dit != tiny.EXP.dit else text_of(context),
    )[0]


def given(exp, blocks, context=CONTEXT, memory=None):
    """A memory of given blocks."""
    memory = cache.init(exp.memory, tiny.BATCH) if memory is None else memory
    for block in blocks:
        memory = give(exp, memory, block, context)
    return memory


def close(ours, theirs, atol=1e-5):
    jax.tree.map(partial(np.testing.assert_allclose, atol=atol), ours, theirs)


# Given blocks


@pytest.mark.parametrize("rule", ADJUSTMENTS)
def test_a_given_block_is_committed_behind_the_newest_packed_ones(rule):
    """As one that was denoised with them; none of what its place in the views held before is seen."""
    exp = tiny.with_cache(rope_adjustment=rule, selection="recency")
    memory = given(exp, range(6))
    text = text_of(CONTEXT)
    after, done = tiny.denoise(tiny.apart(), exp.step, memory, noise=tiny.noise(exp, 6), text=text)
    assert (tiny.ids(done) == [3, 4]).all()
    ours = give(exp, memory, 6, CONTEXT)
    theirs = give(exp, after, 6, CONTEXT, done.selection)
    close(tiny.committed(exp, ours), tiny.committed(exp, theirs), atol=1e-6)
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        close(
            (one.packed, one.packed_positions, one.recent),
            (other.packed, other.packed_positions, other.recent),
            atol=1e-6,
        )
    newest = cache.latents_of(exp.memory, ours, 18 + jnp.arange(3))
    np.testing.assert_array_equal(newest, LATENTS[6])


# Windows of several blocks


def joint(layers, window, recent):
    """An experiment in which a window of blocks is denoised together; its prediction is the network's output."""
    steps = tuple(range(1000, 0, -100)[: window // 3])
    exp = dataclasses.replace(
        tiny.EXP,
        dit=dataclasses.replace(tiny.EXP.dit, layers=layers),
        sample=dataclasses.replace(tiny.EXP.sample, prediction="clean", steps=steps),
    )
    sizes = {"sink": 3, "recent": recent, "window": window}
    return tiny.with_cache(exp, top=0, capacity=0, rope_adjustment="sink_only", **sizes)


@partial(tiny.jit, static_argnums=0)
def predict(exp, nets, memory, noisy, times, blocks, text):
    denoiser = block_step.Denoiser(nets, exp.step, text)
    level = NoiseLevel(timestep=times, sigma=times / 1000)
    return block_step.denoise_jointly(denoiser, memory, noisy, level, blocks)


parallel = tiny.jit(dit.parallel, static_argnames="block_ends")


def dense(exp, clean, noisy, times):
    """One pass over clean frames and a window behind them, by the transformer's own attention."""
    frames = jnp.concatenate([*clean, noisy], axis=1)
    at = jnp.concatenate([jnp.zeros(frames.shape[1] - len(times)), times])
    at = jnp.broadcast_to(at, frames.shape[:2])
    ends = (*(3 * (i + 1) for i in range(len(clean))), frames.shape[1])
    whole = parallel(tiny.nets(exp).dit, frames, at, CONTEXT, block_ends=ends)
    return whole[:, -len(times) :]


@pytest.mark.parametrize(
    ("layers", "before", "exist", "window", "recent", "seen"),
    [
        (2, 0, 1, 9, 3, []),  # it fills up
        (2, 0, 2, 9, 3, []),
        (2, 0, 3, 9, 3, []),
        (2, 1, 3, 9, 3, [0]),  # the sink alone
        (2, 2, 3, 9, 3, [0, 1]),
        (1, 3, 3, 9, 3, [0, 2]),  # with one layer, what has left does not matter
        (1, 8, 3, 9, 3, [0, 7]),
        (1, 8, 2, 9, 3, [0, 6, 7]),  # it runs empty, and sees more
        (1, 8, 1, 9, 3, [0, 5, 6, 7]),
        (1, 4, 2, 6, 0, [0]),  # no recent frames at all
        (1, 4, 1, 6, 0, [0, 3]),
    ],
)
def test_a_window_is_one_dense_pass_behind_a_sink_that_moved(
    layers, before, exist, window, recent, seen
):
    """Over the sink, the recent frames and its own blocks; what lies behind them means nothing."""
    exp = joint(layers, window, recent)
    memory = given(exp, range(before))
    noisy = tiny.normal(31, 2, window, *exp.latent, 12)
    times = jnp.abs(tiny.normal(32, window)) * 300 + jnp.arange(window) * 20
    there = slice(0, 3 * exist)
    ask = partial(predict, exp, tiny.apart(exp), memory)
    output = ask(noisy, times, exist, text_of(CONTEXT, exp))[:, there]
    clean = [LATENTS[block] for block in seen]
    expected = dense(exp, clean, noisy[:, there], times[there])
    np.testing.assert_allclose(output, expected, atol=1e-5 * np.abs(expected).max())
    other = ask(noisy.at[:, 3 * exist :].set(9.0), times, exist, text_of(CONTEXT, exp))[:, there]
    np.testing.assert_array_equal(output, other)
    if exist > 1:  # frames hear each other
        alone = ask(noisy.at[:, 3].add(1.0), times, exist, text_of(CONTEXT, exp))[:, :3]
        assert np.abs(alone - output[:, :3]).max() > 1e-4


@pytest.mark.parametrize("block", range(8))
def test_a_block_of_a_window_is_committed_behind_the_newest_frames(block):
    """It sees as many as a whole window does (15), the sink as long as it is among them, all where they stand."""
    exp = joint(1, 9, 3)
    memory = given(exp, range(block))
    now = layouts.layout(exp.cache, memory.progress)
    newest = range(max(0, 3 * block - 12), 3 * block)
    assert int(now.sink) == (max(0, 3 - newest.start) if block else 0)
    assert int(now.recent) == len(newest) - int(now.sink)
    assert int(now.start - now.recent) == max(3, newest.start) or block < 2
    if block < 5:
        assert int(now.sink_position) == 0
    plain = tiny.with_cache(exp, sink=0, recent=12, window=0, rope_adjustment="none")
    text = text_of(CONTEXT, exp)
    outputs = []
    for each in (exp, plain):
        denoiser = block_step.Denoiser(tiny.apart(exp), each.step, text)
        behind = given(each, range(block))
        outputs.append(clean_pass(denoiser, behind, LATENTS[block]))
    np.testing.assert_allclose(*outputs, atol=1e-5)


@tiny.jit
def clean_pass(denoiser, memory, latent):
    layout = layouts.layout(denoiser.cfg.cache, memory.progress)
    none = NoiseLevel(timestep=jnp.zeros(()), sigma=jnp.zeros(()))
    return block_step.predict_x0(denoiser, layout, latent, none, block_step.views_of(memory))[0]


def test_a_window_needs_a_block_for_each_step_and_a_sink_that_moves_alone():
    exp = joint(1, 9, 3)
    with pytest.raises(InputError, match="a block of 3 frames for each of the 2"):
        dataclasses.replace(exp, sample=dataclasses.replace(exp.sample, steps=(1000, 500)))
    with pytest.raises(InputError, match="rope_adjustment=sink_only"):
        dataclasses.replace(exp.cache, rope_adjustment="none")


# A re-cache

recache = tiny.jit(block_step.recache, static_argnames="keep_sink")
LONG = {"sink": 3, "recent": 6, "capacity": 4}


def again(exp, memory, context, **how):
    denoiser = block_step.Denoiser(tiny.apart(), exp.step, text_of(context))
    return recache(denoiser, memory, **how)[0]


@pytest.mark.parametrize("rule", ADJUSTMENTS)
def test_a_lone_block_is_read_again_as_it_was_committed(rule):
    exp = tiny.with_cache(**LONG, rope_adjustment=rule)
    memory = given(exp, range(1))
    after = again(exp, memory, CONTEXT)
    close(tiny.committed(exp, after), tiny.committed(exp, memory))
    close(
        tiny.committed(exp, again(exp, memory, OTHER)), tiny.committed(exp, given(exp, [0], OTHER))
    )


@pytest.mark.parametrize("rule", ADJUSTMENTS)
@pytest.mark.parametrize(("blocks", "sink_stays"), [(2, False), (4, False), (5, True), (9, True)])
def test_the_sink_is_read_again_until_it_has_left_the_window(rule, blocks, sink_stays):
    """A window of 12 frames; packed blocks, latents and counts stay bit for bit."""
    exp = tiny.with_cache(**LONG, rope_adjustment=rule)
    memory = given(exp, range(blocks))
    after = again(exp, memory, OTHER)
    for one, other in zip(after.layers, memory.layers, strict=True):
        parts = ((x.packed, x.packed_positions, x.sink_position) for x in (one, other))
        jax.tree.map(np.testing.assert_array_equal, *parts)
    same = ((x.latents, x.progress) for x in (after, memory))
    jax.tree.map(np.testing.assert_array_equal, *same)
    now, before = (tiny.committed(exp, x) for x in (after, memory))
    change = np.abs(np.asarray(now.v - before.v))[1].max(
        axis=(0, 2, 3, 4)
    )  # a layer behind the text
    assert (change[:3] == 0).all() == sink_stays
    assert (change[3:] > 1e-3).all()


@pytest.mark.parametrize("rule", ["sink", "incremental"])
def test_stores_of_keys_that_move_agree_with_those_that_stay(rule):
    """The next block after a re-cache reads the same keys wherever they were kept un-rotated."""
    exp = tiny.with_cache(**{**LONG, "top": 0, "capacity": 0}, rope_adjustment=rule)
    one = given(exp, [6], OTHER, again(exp, given(exp, range(6)), OTHER))
    other = tiny.with_cache(exp, rope_adjustment="sink_only")
    two = given(other, [6], OTHER, again(other, given(other, range(6)), OTHER))
    close(tiny.committed(exp, one).v, tiny.committed(other, two).v, atol=2e-5)


def test_without_its_sink_the_windows_oldest_frames_become_one():
    exp = tiny.with_cache(**{**LONG, "top": 0, "capacity": 0}, rope_adjustment="none")
    after = again(exp, given(exp, range(7)), OTHER, keep_sink=False)
    now = layouts.layout(exp.cache, after.progress)
    assert (int(now.scene), int(now.sink), int(now.recent)) == (21 - 12, 3, 6)


def test_a_sink_that_moves_leaves_no_packed_block_behind():
    exp = tiny.with_cache(**LONG)
    with pytest.raises(InputError, match="keep the sink or set cache.top=0"):
        again(exp, given(exp, range(3)), OTHER, keep_sink=False)


# Scratch


@pytest.mark.parametrize("rule", ADJUSTMENTS)
@pytest.mark.parametrize("blocks", [0, 1, 6])
def test_a_memory_without_scratch_goes_on_as_if_it_had_kept_it(rule, blocks):
    exp = tiny.with_cache(rope_adjustment=rule)
    memory = tiny.rollout(exp, blocks)[1]
    spec = exp.memory
    text = tiny.text()
    kept = cache.strip_scratch(spec, memory)
    empty = cache.init(spec, tiny.BATCH, scratch=False)
    assert jax.tree.map(jnp.shape, kept) == jax.tree.map(jnp.shape, empty)
    assert all(layer.view.k.shape[1] == spec.full_res for layer in kept.layers)
    again = cache.with_scratch(spec, kept)
    assert jax.tree.map(jnp.shape, again) == jax.tree.map(jnp.shape, memory)
    jax.tree.map(np.testing.assert_array_equal, cache.strip_scratch(spec, again), kept)
    found = [tiny.one_block(exp, x, text, blocks, tiny.low_res(1)[0]) for x in (memory, again)]
    (one, after), (other, later) = found
    np.testing.assert_array_equal(one.latent, other.latent)
    remembered = [cache.strip_scratch(spec, x) for x in (after, later)]
    for ours, theirs in zip(*(x.layers for x in remembered), strict=True):
        stores = ((x.packed, x.sink, x.recent, x.packed_positions) for x in (ours, theirs))
        jax.tree.map(np.testing.assert_array_equal, *stores)
    jax.tree.map(np.testing.assert_array_equal, *(tiny.committed(exp, x) for x in (after, later)))
