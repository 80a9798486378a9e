"""The memory works: a guest of long ago is found, and only through its packed block, its key, its value, its place."""

import math
import types

import handwired
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from packforcing_jax.memory import layout as layouts
from packforcing_jax.memory import view
from packforcing_jax.sampling import block_step
from packforcing_jax.sampling.schedules import NoiseLevel

VIDEOS = 11
CALLED = 4
GAP = 40
FIRST = 2  # guests 0..3 appear once in blocks 2..5, before 40 further blocks
TOP = 16


def guests_and_marks(rng):
    """Guests [block, b] (-1 empty) and marks: two empty blocks, each called guest once, then others and none."""
    others = np.where(
        rng.random((GAP, VIDEOS)) < 0.65, -1, rng.integers(CALLED, handwired.IDS, (GAP, VIDEOS))
    )
    once = np.stack([rng.permutation(CALLED) for _ in range(VIDEOS)], axis=1)
    guests = np.concatenate([np.full((FIRST, VIDEOS), -1), once, others])
    return guests, rng.integers(0, handwired.MARKS, guests.shape)


def play(player, nets, rng, guests, marks):
    script = [
        (handwired.prompts(who), handwired.scene(who, what)) for who, what in zip(guests, marks)
    ]
    return player.history(nets, rng, script)


def first_seen(guests, marks, guest):
    """(block [b], mark [b]) of each video's only appearance of `guest`."""
    block = (guests == guest).argmax(axis=0)
    return block, marks[block, np.arange(VIDEOS)]


def hits(player, nets, memory, guests, marks):
    """How many calls, of every once-seen guest in every video, are answered with the right mark."""
    rng = np.random.default_rng(5)
    return sum(
        (
            player.ask(nets, rng, memory, np.full(VIDEOS, guest))[0]
            == first_seen(guests, marks, guest)[1]
        ).sum()
        for guest in range(CALLED)
    )


def tail(trials, chance, at_least):
    """P(X >= at_least) of a binomial."""
    return sum(
        math.comb(trials, k) * chance**k * (1 - chance) ** (trials - k)
        for k in range(at_least, trials + 1)
    )


def test_binomial_tail():
    assert tail(2, 0.5, 2) == 0.25
    assert tail(3, 0.25, 0) == pytest.approx(1)


def at_chance(right):
    """Whether `right` of all calls is what guessing among the marks gives, at the 1 % level on either side."""
    chance = 1 / handwired.MARKS
    return (
        min(tail(VIDEOS * CALLED, chance, right), 1 - tail(VIDEOS * CALLED, chance, right + 1))
        > 0.01
    )


def told(memory_settings, seed=0):
    """A story played through a memory of such settings, with the recalling model."""
    rng = np.random.default_rng(seed)
    player = handwired.Player(handwired.experiment(**memory_settings))
    nets = handwired.recalling(player.exp)
    guests, marks = guests_and_marks(rng)
    memories = play(player, nets, rng, guests, marks)
    return types.SimpleNamespace(
        player=player, nets=nets, guests=guests, marks=marks, memories=memories
    )


@pytest.fixture(scope="module")
def story():
    return told({})


@pytest.fixture(scope="module")
def fifo():
    return told({"selection": "recency"})


def test_a_guest_is_recalled_after_forty_blocks(story):
    assert (
        hits(story.player, story.nets, story.memories[-1], story.guests, story.marks)
        == VIDEOS * CALLED
    )
    assert story.player.step._cache_size() == 1


def test_without_packed_blocks_the_answer_is_a_guess():
    blind = told({"top": 0, "capacity": 0})
    assert at_chance(hits(blind.player, blind.nets, blind.memories[-1], blind.guests, blind.marks))


def test_the_block_that_answers_was_chosen(story):
    for guest in range(CALLED):
        _, chosen = story.player.ask(
            story.nets, np.random.default_rng(1), story.memories[-1], np.full(VIDEOS, guest)
        )
        block, _ = first_seen(story.guests, story.marks, guest)
        assert (chosen[1] == block[:, None]).any(axis=1).all()
        assert (np.diff(chosen, axis=-1) > 0).all()  # in time order, each once


def swapped(memory, first, second, what):
    """`memory` with the packed keys or values of two blocks [b] exchanged."""
    videos = np.arange(VIDEOS)
    slots = (np.stack([first, second]) - FIRST) % memory.layers[0].packed.k.shape[1]

    def one(layer):
        old = np.array(getattr(layer.packed, what))
        new = old.copy()
        new[videos, slots[0]], new[videos, slots[1]] = old[videos, slots[1]], old[videos, slots[0]]
        return layer.replace(packed=layer.packed.replace(**{what: new}))

    return memory.replace(layers=[one(layer) for layer in memory.layers])


@pytest.mark.parametrize("what", ["k", "v"])
def test_the_answer_follows_the_packed_block(story, what):
    (mine, _), (theirs, instead) = (
        first_seen(story.guests, story.marks, guest) for guest in (0, 1)
    )
    memory = swapped(story.memories[-1], mine, theirs, what)
    answer, _ = story.player.ask(
        story.nets, np.random.default_rng(2), memory, np.zeros(VIDEOS, int)
    )
    np.testing.assert_array_equal(answer, instead)


def test_the_answer_is_the_mark_that_was_shown(story):
    """The same story with one other mark in one block, more than forty blocks ago."""
    block, before = first_seen(story.guests, story.marks, 3)
    marks = story.marks.copy()
    marks[block, np.arange(VIDEOS)] = (before + 1 + np.arange(VIDEOS) % 4) % handwired.MARKS
    memory = play(story.player, story.nets, np.random.default_rng(3), story.guests, marks)[-1]
    answer, _ = story.player.ask(story.nets, np.random.default_rng(2), memory, np.full(VIDEOS, 3))
    np.testing.assert_array_equal(answer, first_seen(story.guests, marks, 3)[1])
    assert (answer != before).all()


def test_first_in_first_out_forgets_what_left_the_newest(fifo):
    def ask(memory):
        return fifo.player.ask(fifo.nets, np.random.default_rng(4), memory, fifo.guests[FIRST])

    last = (
        FIRST + 1 + TOP
    )  # blocks when the first guest's block is the oldest of the newest 16 packed ones
    answer, chosen = ask(fifo.memories[last])
    np.testing.assert_array_equal(answer, fifo.marks[FIRST])
    assert (chosen[..., 0] == FIRST).all()
    answer, chosen = ask(fifo.memories[last + 1])
    assert (answer != fifo.marks[FIRST]).any()
    assert (chosen[..., 0] == FIRST + 1).all()
    assert at_chance(hits(fifo.player, fifo.nets, fifo.memories[-1], fifo.guests, fifo.marks))


def test_valid_keys_stop_growing_while_the_archive_grows(story):
    exp = story.player.exp
    counts = [
        int(layouts.length(exp.memory, layouts.layout(exp.cache, memory.progress)))
        for memory in story.memories
    ]
    full = FIRST + 1 + TOP
    assert (np.diff(counts[: full + 1]) > 0).all()
    assert set(counts[full:]) == {(6 + 3 + 3) * 8 + TOP * 4}
    assert (
        len({tuple(leaf.shape for leaf in jax.tree.leaves(memory)) for memory in story.memories})
        == 1
    )


def test_a_sum_of_raw_products_misses_what_one_place_asks(story):
    """Paper eq. 8 without its sub-sampling: the many tokens that do not ask outvote the few that do."""
    exp = story.player.exp
    memory = story.memories[-1]
    nets = story.nets

    def keep_queries(cfg, layout, attention_fn):
        def self_attention(q, k, v, layer):
            recalled, _ = view.recall(cfg.memory, layout, layer, q, None)
            return attention_fn(q, k, v, recalled)[0], q

        return self_attention

    @jax.jit
    def first_queries(memory, noise, prompt):
        layout = layouts.layout(exp.cache, memory.progress)
        _, queries = block_step.predict_x0(
            block_step.Denoiser(nets, exp.step, nets.dit.text_kv(prompt)),
            layout,
            noise,
            NoiseLevel(timestep=jnp.float32(1000.0), sigma=jnp.float32(1.0)),
            memory.layers,
            block_step.Access(attends=keep_queries),
        )
        return queries, layout.ids

    noise = handwired.noises(np.random.default_rng(6), VIDEOS)[0]
    queries, ids = first_queries(memory, noise, handwired.prompts(np.full(VIDEOS, 2)))
    visible = np.flatnonzero(ids >= 0)
    scores = np.einsum(
        "bqnh,bmpnh->bm", np.asarray(queries[1]), np.asarray(memory.layers[1].packed.k)[:, visible]
    )
    relevant = np.asarray(ids)[visible] == first_seen(story.guests, story.marks, 2)[0][:, None]
    rank = (scores > scores[relevant][:, None]).sum(axis=1)
    assert relevant.sum() == VIDEOS
    assert (rank >= TOP).all()


# The position in time: keys without content, and an answer that depends on nothing but a distance.


def covered(marks):
    """Latents [..., 2, 8, c] whose tokens show `marks` [..., 2, 4]."""
    latents = np.zeros((*marks.shape, 2, handwired.CHANNELS), np.float32)
    np.put_along_axis(latents, handwired.MARK + marks[..., None, None], 1, axis=-1)
    return latents.reshape(*marks.shape[:-1], 8, handwired.CHANNELS)


@pytest.fixture(scope="module")
def numbered(fifo):
    """A memory of 22 blocks where marks are random, and those marks [b, t, 2, 4], alike in each half of the columns."""
    rng = np.random.default_rng(7)
    blocks = 22
    marks = np.repeat(rng.integers(0, handwired.MARKS, (blocks, VIDEOS, 3, 2, 2)), 2, axis=-1)
    latents = covered(marks)
    nobody = handwired.prompts(np.full(VIDEOS, -1))
    nets = handwired.reading(fifo.player.exp, 1.0)
    memory = fifo.player.history(nets, rng, [(nobody, latent) for latent in latents])[-1]
    return types.SimpleNamespace(
        player=fifo.player, memory=memory, marks=np.concatenate(list(marks), axis=1)
    )


def read(numbered, distance, own=None):
    """The marks [b, 3, 2, 4] that the current block's tokens find `distance` frames back; `own` is what they show."""
    nets = handwired.reading(numbered.player.exp, distance)
    nobody = handwired.prompts(np.full(VIDEOS, -1))
    blank = np.zeros((VIDEOS, 3, 2, 8, handwired.CHANNELS), np.float32)
    noise = np.stack([blank if own is None else own] * 2)
    _, latent, _ = numbered.player.step(nets, numbered.memory, noise, nobody, blank)
    shown = np.asarray(latent).reshape(VIDEOS, 3, 2, 4, 2, -1)[
        ..., handwired.MARK : handwired.MARK + handwired.MARKS
    ]
    return shown.mean(axis=-2).argmax(axis=-1)


def test_frames_at_full_size_lie_at_their_positions(numbered):
    now = 6 + TOP * 3 + 3
    np.testing.assert_array_equal(read(numbered, 3.0), numbered.marks[:, -3:])
    np.testing.assert_array_equal(read(numbered, float(now)), numbered.marks[:, :3])
    np.testing.assert_array_equal(read(numbered, float(now - 3)), numbered.marks[:, 3:6])


@pytest.mark.parametrize("age", [1, 9, TOP])
def test_packed_blocks_lie_at_their_positions(numbered, age):
    """Counted back from the newest packed one: its first token, half a frame in, and its second, two frames in.

    Both rows share a packed token, which shows the row that the low resolution kept.
    """
    back = 3 + 3 * age
    for frame, position in ((0, 0.5), (2, 2.0)):
        shown = np.repeat(numbered.marks[:, frame - back, 1:], 2, axis=-2)
        np.testing.assert_array_equal(read(numbered, back - position)[:, 0], shown)


def test_a_block_sees_itself_at_its_position(numbered):
    """One frame back from the first frame lies the newest recent one, from the others their own neighbours."""
    own = np.random.default_rng(9).integers(0, handwired.MARKS, (VIDEOS, 3, 2, 4))
    back = np.concatenate([numbered.marks[:, -1:], own[:, :2]], axis=1)
    np.testing.assert_array_equal(read(numbered, 1.0, covered(own)), back)
    np.testing.assert_array_equal(read(numbered, 0.0, covered(own)), own)


def test_reading_forgets_nothing_of_the_memory(numbered):
    before = jax.tree.map(np.array, numbered.memory)
    read(numbered, 5.0)
    jax.tree.map(np.testing.assert_array_equal, numbered.memory, before)
