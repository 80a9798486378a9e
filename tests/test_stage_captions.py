"""Captions: every attribute survives the way to words and back, and the vocabulary stays closed and small."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packforcing_jax.errors import InputError
from packforcing_jax.stage import captions, world

PROMPTS = st.builds(
    captions.Prompt,
    *(st.integers(0, len(words) - 1) for name, words in captions.WORDS.items() if name != "guest"),
    guest=st.none() | st.integers(0, 7),
)


def all_prompts():
    *sizes, guests = [range(len(words)) for words in captions.WORDS.values()]
    return itertools.starmap(captions.Prompt, itertools.product(*sizes, [None, *guests]))


def test_every_prompt_survives_the_way_to_words_and_back():
    seen = set()
    for prompt in all_prompts():
        text = captions.write(prompt)
        assert captions.parse(text) == prompt
        seen.add(text)
    assert len(seen) == 8 * 4 * 2 * 8 * 4 * 9


def test_sentences_use_the_closed_vocabulary_and_leave_room_for_the_end():
    lengths = set()
    used = set()
    for prompt in all_prompts():
        words = captions.write(prompt).split()
        lengths.add(len(words))
        used.update(words)
    assert used == set(captions.VOCABULARY)
    assert max(lengths) + 1 == captions.MAX_WORDS
    assert captions.MAX_WORDS % 4 == 0


def test_no_word_means_two_things():
    assert len(set(captions.VOCABULARY)) == len(captions.VOCABULARY) < 64


def test_the_caption_of_a_block_names_its_own_scene_and_guest():
    story = world.draw_story(
        np.random.default_rng(5),
        3,
        guests=[-1, 0, 6],
        scenes=[3, 1, 1],
        colour=0,
        shape=1,
        speed=0,
        backdrop=0,
    )
    assert (
        captions.caption(story, 0)
        == "in scene four a red disc walks slowly before the brick curtain"
    )
    assert captions.caption(story, 1) == (
        "in scene two a red disc walks slowly before the brick curtain with guest coral"
    )
    assert captions.parse(captions.caption(story, 2)).guest == 6


@settings(max_examples=60, deadline=None)
@given(PROMPTS, st.randoms(use_true_random=False))
def test_the_order_of_words_does_not_matter(prompt, random):
    words = captions.write(prompt).split()
    random.shuffle(words)
    assert captions.parse(" ".join(words)) == prompt


def test_case_punctuation_and_strange_words_do_not_matter():
    said = captions.parse("A Violet, tremendous DIAMOND! (quickly)")
    assert said == captions.Prompt(colour=6, shape=2, speed=1)
    assert captions.parse("") == captions.Prompt()
    assert captions.parse("reddish discs") == captions.Prompt()


def test_saying_the_same_twice_is_no_contradiction():
    assert captions.parse("a red red disc").colour == 0


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a red blue disc", "colour"),
        ("disc and figure", "shape"),
        ("slowly then quickly", "speed"),
        ("wine before the moss", "backdrop"),
        ("scene one or four", "scene"),
        ("rose with sky", "guest"),
    ],
)
def test_contradicting_words_are_refused(text, name):
    with pytest.raises(InputError, match=f"more than one {name}"):
        captions.parse(text)
