import logging

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from packforcing_jax.errors import InputError
from packforcing_jax.networks import tokenizer

WORDS = ("a", "red", "purple", "fox", "enters", "from", "left")


@pytest.fixture
def closed():
    return tokenizer.Tokenizer(tokenizer.word_tokenizer(WORDS), max_words=7)


def subwords(path):
    """A saved Unigram tokenizer with the ids of UMT5's specials, and with padding and a cut set in its file."""
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -2.0),
        ("▁Fox", -1.0),
        ("▁fox", -1.0),
        ("es", -1.5),
    ]
    inner = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.enable_padding(length=3)
    inner.enable_truncation(max_length=2)
    inner.save(str(path))
    return path


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  A Fox\n\t enters \u3000 left ", "A Fox enters left"),
        ("fox &amp; hound", "fox & hound"),
        ("fox &amp;amp; hound", "fox & hound"),
        ("schÃ¶n", "schön"),
        ("&nbsp;A&nbsp;&nbsp;B ", "A B"),
        ("tabs\u2028and\r\nlines", "tabs and lines"),
        ("ÉCOLE stays Upper", "ÉCOLE stays Upper"),
        (" &nbsp; \n", ""),
    ],
)
def test_cleaning_mends_text_and_keeps_case(raw, cleaned):
    assert tokenizer.clean(raw) == cleaned
    assert tokenizer.clean(cleaned) == cleaned


def test_texts_end_with_one_end_token_and_padding(closed):
    ids, mask = closed.encode(["a red fox", "fox"])
    np.testing.assert_array_equal(ids, [[3, 4, 6, 1, 0, 0, 0], [6, 1, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0]])
    assert ids.dtype == mask.dtype == np.int32


def test_closed_vocabularies_read_any_case_and_skip_punctuation(closed):
    ids, _ = closed.encode(["A RED fox,fox."])
    np.testing.assert_array_equal(ids, [[3, 4, 6, 6, 1, 0, 0]])


def test_a_full_row_is_not_cut(closed, caplog):
    ids, mask = closed.encode(["a red fox enters from left"])
    assert ids[0, -1] == 1
    assert mask.all()
    assert not caplog.records


def test_a_long_text_is_cut_before_the_end_token_with_one_warning(closed, caplog):
    with caplog.at_level(logging.WARNING):
        ids, mask = closed.encode(
            ["a red fox enters from left , a purple fox", "fox", "a a a a a a a a"]
        )
    np.testing.assert_array_equal(ids[0], [3, 4, 6, 7, 8, 9, 1])
    np.testing.assert_array_equal(mask.sum(axis=1), [7, 2, 7])
    (record,) = caplog.records
    assert record.getMessage() == "2 of 3 prompts exceed 7 tokens; cut 5 tokens off their ends."


def test_a_saved_closed_vocabulary_is_the_same_one(closed, tmp_path):
    closed.inner.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizer.Tokenizer.from_file(tmp_path / "tokenizer.json", max_words=7)
    assert loaded.closed
    for mine, theirs in zip(closed.encode(["a purple fox."]), loaded.encode(["a purple fox."])):
        np.testing.assert_array_equal(mine, theirs)
    with pytest.raises(InputError, match="purpel"):
        loaded.encode(["a purpel fox"])


def test_the_saved_file_adds_the_end_token_for_other_programs(closed):
    assert closed.inner.encode("a fox").tokens == ["a", "fox", "</s>"]


def test_open_vocabularies_keep_case_and_ignore_the_widths_in_their_file(tmp_path):
    loaded = tokenizer.Tokenizer.from_file(subwords(tmp_path / "tokenizer.json"), max_words=6)
    ids, mask = loaded.encode(["Fox  foxes", "fox"])
    np.testing.assert_array_equal(ids, [[4, 5, 6, 1, 0, 0], [5, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(mask.sum(axis=1), [4, 2])
    assert not loaded.closed
    assert loaded.encode(["zebra"])[0].max() > 1


def test_an_unknown_word_is_named_as_written_with_its_nearest(closed):
    with pytest.raises(InputError) as caught:
        closed.encode(["a red fox", "a PurPel fox"])
    assert str(caught.value).startswith(
        "word 'PurPel' in prompt is not in this model's vocabulary; nearest: purple; its "
    )


def test_every_unknown_word_is_named_once(closed):
    with pytest.raises(InputError) as caught:
        tokenizer.refuse_unknown(closed, "a rad fox enterz rad")
    message = str(caught.value)
    assert message.count("'rad'") == 1
    assert "nearest: red" in message
    assert "'enterz'" in message
    assert "nearest: enters" in message


def test_a_word_like_no_other_still_gets_suggestions(closed):
    with pytest.raises(InputError, match=r"nearest: [^,]+, [^,]+, [^,;]+; its 7 words"):
        tokenizer.refuse_unknown(closed, "zzzz")


@pytest.mark.parametrize("text", ["a <pad> fox", "a </s> fox", "a <unk> fox", "a f0x!", "狐"])
def test_special_tokens_and_foreign_signs_are_words_like_others(closed, text):
    with pytest.raises(InputError, match="not in this model's vocabulary"):
        closed.encode([text])


def test_known_words_pass(closed):
    tokenizer.refuse_unknown(closed, "A red, purple fox.")


@pytest.mark.parametrize("empty", ["", "  \n", "&nbsp;"])
def test_an_empty_prompt_is_refused_with_its_place(closed, empty):
    with pytest.raises(InputError, match="prompt 2 of 3 is empty"):
        closed.encode(["a fox", empty, "fox"])


def test_one_text_instead_of_a_list_is_refused(closed):
    with pytest.raises(InputError, match="give a list"):
        closed.encode("a fox")


@pytest.mark.parametrize(
    "words",
    [
        ("fox", "fox"),
        ("fox", "</s>"),
        ("Fox",),
        ("blue-green",),
        ("two words",),
        ("",),
    ],
)
def test_words_that_could_never_be_read_are_refused(words):
    with pytest.raises(InputError, match="vocabulary"):
        tokenizer.word_tokenizer(words)


def test_files_that_are_no_tokenizers_are_refused(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        tokenizer.Tokenizer.from_file(tmp_path / "nowhere.json", max_words=5)
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(InputError, match=r"broken\.json is not a tokenizer\.json"):
        tokenizer.Tokenizer.from_file(tmp_path / "broken.json", max_words=5)
    tokenizers.Tokenizer(models.WordLevel({"fox": 0, "<unk>": 1}, unk_token="<unk>")).save(
        str(tmp_path / "bare.json")
    )
    with pytest.raises(InputError, match=r"bare\.json has no token '<pad>'"):
        tokenizer.Tokenizer.from_file(tmp_path / "bare.json", max_words=5)


def test_a_width_without_room_is_refused():
    with pytest.raises(InputError, match="max_words=1"):
        tokenizer.Tokenizer(tokenizer.word_tokenizer(WORDS), max_words=1)


def test_a_text_of_punctuation_alone_is_refused(closed):
    with pytest.raises(InputError, match="has no words"):
        closed.encode(["... !"])
