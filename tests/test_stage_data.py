"""Training clips: the promised call-backs, and functions of (seed, index) only."""

import numpy as np
import pytest

from packforcing_jax.errors import InputError
from packforcing_jax.stage import captions, data, world

NUMBERS = {word: number for number, word in enumerate(captions.VOCABULARY, start=2)}
CLIPS = 2500


def encode(sentences):
    """Word numbers, 1 for the end, 0 for padding."""
    ids = np.zeros((len(sentences), captions.MAX_WORDS), np.int32)
    for row, sentence in zip(ids, sentences, strict=True):
        words = [NUMBERS[word] for word in sentence.split()] + [1]
        row[: len(words)] = words
    return ids, ids > 0


def decode(ids):
    words = {number: word for word, number in NUMBERS.items()}
    return " ".join(words[number] for number in ids if number > 1)


@pytest.fixture(scope="module")
def stories():
    return [data.draw_clip(np.random.default_rng((11, index))) for index in range(CLIPS)]


def near(share, expected, count=CLIPS):
    return abs(share - expected) < 4.5 * (expected * (1 - expected) / count) ** 0.5


def planned(story):
    """Whether the last block's guest was on stage in one of the first three blocks."""
    return story.guests[-1] >= 0 and story.guests[-1] in story.guests[:3]


def test_most_clips_call_a_guest_back_in_the_last_block(stories):
    by_chance = 0.6 * (1 - (1 - 0.6 / 8) ** 3)
    assert near(np.mean([planned(story) for story in stories]), 0.87 + 0.13 * by_chance)


def test_call_backs_only_and_never():
    always = [
        data.draw_clip(np.random.default_rng(i), callback=1.0, distractor=1.0, blocks=6)
        for i in range(300)
    ]
    for story in always:
        assert (story.guests[:-1] == story.guests[-1]).sum() == 1
        assert story.guests[4] != story.guests[5]
        assert (story.guests >= 0).all()
    first = np.bincount(
        [int(np.argmax(story.guests == story.guests[-1])) for story in always], minlength=4
    )
    assert abs(first - 75).max() < 40
    never = [data.draw_clip(np.random.default_rng(i), callback=0.0) for i in range(800)]
    assert near(np.mean([story.guests < 0 for story in never]), 0.4, 4000)


def test_other_blocks_mostly_show_another_guest():
    clips = [data.draw_clip(np.random.default_rng(i), callback=1.0) for i in range(1000)]
    others = [guest for story in clips for guest in story.guests if guest != story.guests[-1]]
    assert len(others) == 3000
    assert near(np.mean(np.array(others) >= 0), 0.8, 3000)


def test_scenes_change_in_most_clips_and_then_come_back(stories):
    constant = [len(set(story.scenes)) == 1 for story in stories]
    assert near(np.mean(constant), 0.15)
    for story, still in zip(stories, constant, strict=True):
        if not still:
            assert (story.scenes[:3] == story.scenes[-1]).sum() == 1
            assert story.scenes[3] != story.scenes[4]
    lasts = np.bincount([story.scenes[-1] for story in stories], minlength=4) / CLIPS
    assert all(near(share, 0.25) for share in lasts)


def test_every_guest_is_called_equally_often(stories):
    counts = np.bincount(
        np.concatenate([story.guests[story.guests >= 0] for story in stories]), minlength=8
    )
    assert len(counts) == 8
    assert counts.max() / counts.min() < 1.25


def test_too_short_a_clip_is_refused():
    with pytest.raises(InputError, match="blocks=2"):
        data.draw_clip(np.random.default_rng(0), blocks=2)


def test_appeared_before_is_about_guests_and_earlier_blocks():
    assert data.appeared_before(np.array([3, -1, 3, -1, 5, 3])).tolist() == [
        False,
        False,
        True,
        False,
        False,
        True,
    ]


def test_a_clip_holds_what_its_text_says():
    made = data.clip(4, 17, encode)
    said = [captions.parse(decode(ids)) for ids in made["ids"]]
    assert [-1 if prompt.guest is None else prompt.guest for prompt in said] == made[
        "guests"
    ].tolist()
    assert [prompt.scene for prompt in said] == made["scenes"].tolist()
    story = data.draw_clip(np.random.default_rng((4, 17)))
    assert {prompt[:4] for prompt in said} == {
        (story.colour, story.shape, story.speed, story.backdrop)
    }
    np.testing.assert_array_equal(made["video"], world.render(story))
    np.testing.assert_array_equal(made["columns"], story.columns)
    np.testing.assert_array_equal(made["recalled"], data.appeared_before(made["guests"]))
    np.testing.assert_array_equal(made["mask"].sum(axis=1), 13 + 3 * (made["guests"] >= 0))


def test_shapes_and_types_are_ready_for_training():
    shapes = {
        name: (array.shape, array.dtype.name) for name, array in data.clip(0, 0, encode).items()
    }
    assert shapes == {
        "video": ((20, 32, 32, 3), "float32"),
        "ids": ((5, 16), "int32"),
        "mask": ((5, 16), "int32"),
        "guests": ((5,), "int32"),
        "scenes": ((5,), "int32"),
        "recalled": ((5,), "bool"),
        "columns": ((20,), "int32"),
        "weight": ((5, 4, 32, 32), "float32"),
        "called": ((5, 2, 5), "bool"),
    }


def test_a_clip_depends_on_seed_and_index_only():
    np.testing.assert_array_equal(
        data.clip(2, 9, encode)["video"], data.clip(2, 9, encode)["video"]
    )
    videos = [
        data.clip(seed, index, encode)["video"] for seed, index in ((2, 9), (2, 10), (3, 9), (9, 2))
    ]
    for i, video in enumerate(videos):
        assert all((video != other).any() for other in videos[i + 1 :])


def test_a_remembering_encoder_answers_the_same_and_asks_once():
    asked = []

    def counting(sentences):
        asked.extend(sentences)
        return encode(sentences)

    lookup = data.remembering(counting)
    red = "a red disc"
    blue = "a blue disc walks"
    for sentences in ([red, blue, red], [blue], [red, red]):
        for found, expected in zip(lookup(sentences), encode(sentences), strict=True):
            np.testing.assert_array_equal(found, expected)
    assert asked == [red, blue]


def shown(guests, scenes):
    """A story in which only guests and scenes matter."""
    return world.draw_story(np.random.default_rng(0), len(guests), guests=guests, scenes=scenes)


def test_what_is_called_back_is_told_apart_from_what_stays_or_is_new():
    called = data.called_back(shown([2, 5, 2, 2, -1], [0, 1, 1, 0, 1]))
    guest = called[:, 0]
    scene = called[:, 1]
    assert [np.flatnonzero(row).tolist() for row in guest] == [
        [],
        [],
        [0],
        [],
        [],
    ]  # block 3 only keeps guest 2
    assert [np.flatnonzero(row).tolist() for row in scene] == [[], [], [], [0], [1, 2]]


def test_a_call_back_weighs_more_and_a_first_appearance_less():
    weight = data.loss_weight(shown([2, 5, 2, -1, 5], [0, 0, 1, 1, 0]))
    assert weight.shape == (5, 4, 32, 32)
    guest, poster = (
        weight[:, 0, *(span.start for span in world.cell(*place))]
        for place in (world.GUEST_CELL, world.POSTER_CELL)
    )
    np.testing.assert_array_equal(guest, [0.25, 0.25, 4, 1, 4])
    np.testing.assert_array_equal(poster, [0.25, 1, 0.25, 1, 4])
    assert (weight[:, :, 16:] == 1).all()
