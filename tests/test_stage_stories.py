import numpy as np
import pytest

from packforcing_jax.errors import InputError
from packforcing_jax.stage import captions, stories, world

SEEDS = range(12)


def columns(seed, blocks):
    """(guests, scenes) of a timeline, read from its sentences."""
    prompts = [captions.parse(sentence) for sentence in stories.default_timeline(seed, blocks)]
    return tuple(
        np.array(
            [
                -1 if value is None else value
                for value in (getattr(prompt, name) for prompt in prompts)
            ]
        )
        for name in ("guest", "scene")
    )


def test_a_timeline_is_a_function_of_the_seed():
    assert stories.default_timeline(3, 41) == stories.default_timeline(3, 41)
    assert stories.default_timeline(3, 41) != stories.default_timeline(4, 41)


@pytest.mark.parametrize(("short", "long"), [(1, 7), (40, 80), (119, 121), (130, 300)])
def test_a_longer_timeline_begins_with_the_shorter_one(short, long):
    assert stories.default_timeline(5, long)[:short] == stories.default_timeline(5, short)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_subject_throughout(seed):
    said = {
        sentence.split(" with guest")[0].split(maxsplit=3)[-1]
        for sentence in stories.default_timeline(seed, 53)
    }
    assert len(said) == 1


@pytest.mark.parametrize("blocks", [1, 2, 3, 30, 120, 240])
def test_no_guest_comes_before_the_opening_and_whole_chapters_call_each_one_back(blocks):
    for seed in SEEDS:
        guests, scenes = columns(seed, blocks)
        assert len(guests) == len(scenes) == blocks
        assert (guests[: stories.OPENING] < 0).all()
        visits = np.bincount(guests[guests >= 0], minlength=len(world.GUESTS))
        assert blocks % stories.CHAPTER or (visits != 1).all()


def test_two_minutes_have_guests_in_about_two_fifths_of_the_blocks_at_every_gap():
    gaps = []
    share = []
    for seed in SEEDS:
        guests, _ = columns(seed, 120)
        share.append((guests >= 0).mean())
        gaps.append(
            [
                gap
                for guest in range(len(world.GUESTS))
                for gap in np.diff(np.flatnonzero(guests == guest))
            ]
        )
    assert 0.3 < np.mean(share) < 0.5
    for gap in stories.GAPS:
        assert sum(gap in video for video in gaps) >= len(SEEDS) / 2, gap
    assert all(max(video) >= 96 for video in gaps)


@pytest.mark.parametrize("seed", SEEDS)
def test_scenes_last_and_come_back(seed):
    _, scenes = columns(seed, 120)
    starts = np.flatnonzero(np.diff(scenes, prepend=-1))
    lengths = np.diff([*starts, len(scenes)])
    assert lengths[:-1].min() >= 6
    assert lengths.max() <= 12
    assert (np.bincount(scenes[starts], minlength=len(world.SCENES)) >= 2).all()


def test_no_length_is_refused():
    with pytest.raises(InputError, match="blocks=0"):
        stories.default_timeline(0, 0)
