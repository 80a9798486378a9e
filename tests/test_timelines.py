"""A timeline says which prompt holds when; wrong ones are refused with the line and the remedy."""

import pytest

from packforcing_jax.errors import InputError
from packforcing_jax.sampling import timelines


def test_each_prompt_holds_until_the_next_one_starts():
    entries = timelines.parse(
        ["# a story", "0: a red disc", "", "  3 :  a blue square  ", "5: guest : jade"], "here"
    )
    assert entries == [(0, "a red disc", ""), (3, "a blue square", ""), (5, "guest : jade", "")]
    prompts = timelines.spread(entries, 7)
    assert prompts == ["a red disc"] * 3 + ["a blue square"] * 2 + ["guest : jade"] * 2


def test_entries_behind_the_end_of_the_video_are_left_out():
    entries = [(0, "one"), (2, "two"), (9, "three")]
    assert timelines.spread(entries, 2) == ["one", "one"]
    assert timelines.spread(entries, 4) == ["one", "one", "two", "two"]


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (["a red disc"], "line 1: 'a red disc' is not"),
        (["0: one", "x: two"], "line 2: 'x: two'"),
        (["4: one"], "starts at block 4"),
        (["0: one", "3: two", "3: three"], "do not rise"),
        (["0: one", "5: two", "3: three"], "do not rise"),
        (["# nothing"], "names no prompt"),
        (["0:"], "line 1: '0:'"),
    ],
)
def test_a_wrong_timeline_is_refused(lines, named):
    with pytest.raises(InputError, match=named):
        timelines.parse(lines, "story.txt")


@pytest.mark.parametrize("blocks", [0, -3])
def test_a_length_of_nothing_is_refused(blocks):
    with pytest.raises(InputError, match=f"blocks={blocks}"):
        timelines.spread([(0, "one")], blocks)


def test_a_file_is_read_and_a_missing_or_binary_one_is_refused(tmp_path):
    good = tmp_path / "story.txt"
    binary = tmp_path / "story.bin"
    good.write_text("0: a red disc\n12: a lime figure\n")
    binary.write_bytes(b"\xff\xfe\x00")
    assert timelines.read(good) == [(0, "a red disc", ""), (12, "a lime figure", "")]
    for path in (binary, tmp_path / "none.txt", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            timelines.read(path)
