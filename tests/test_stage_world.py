"""The stage: exact pixels, every factor visible, nothing clipped, walks with the promised statistics."""

import dataclasses
import itertools

import numpy as np
import pytest

from packforcing_jax.errors import InputError
from packforcing_jax.stage import world

PROMPT = {
    "colour": world.COLOURS,
    "shape": world.SHAPES,
    "speed": world.SPEEDS,
    "backdrop": world.BACKDROPS,
}


def story(seed=3, blocks=3, **fixed):
    fixed = {"guests": [4, -1, 7][:blocks], "scenes": [2, 0, 3][:blocks]} | fixed
    return world.draw_story(np.random.default_rng(seed), blocks, **fixed)


def changed(base, **fields):
    return world.render(dataclasses.replace(base, **fields))


def light_levels(video):
    return (video + 1) / 2


def cell(video, row, column):
    return video[:, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]


def assert_all_differ(videos, pixels=1):
    """Each pair of videos differs clearly in at least `pixels` places of every differing frame."""
    for (i, one), (j, other) in itertools.combinations(enumerate(videos), 2):
        apart = (abs(one - other).max(axis=-1) > 0.02).sum(axis=(1, 2))
        assert apart.max() >= pixels, f"values {i} and {j} look alike"


def test_the_same_story_gives_the_same_pixels():
    one = world.render(story())
    two = world.render(story())
    assert one.shape == (12, 32, 32, 3)
    assert one.dtype == np.float32
    np.testing.assert_array_equal(one, two)


def test_rendering_leaves_the_story_and_the_tables_alone():
    before = world.BACKGROUNDS.copy()
    base = story()
    marks = base.guest_marks.copy()
    world.render(base)
    np.testing.assert_array_equal(world.BACKGROUNDS, before)
    np.testing.assert_array_equal(base.guest_marks, marks)


def test_tables_have_unique_words_and_matching_sizes():
    for table, size in (
        (world.COLOURS, 8),
        (world.SHAPES, 4),
        (world.SPEEDS, 2),
        (world.BACKDROPS, 8),
        (world.GUESTS, 8),
        (world.SCENES, 4),
    ):
        assert len(set(table)) == len(table) == size
    assert world.LANES * world.CELL == world.SIZE
    assert len(world.MARK_COLOURS) ** 2 == world.MARKS


def test_sprites_differ_and_cover_the_mark():
    assert world.SPRITES.shape == (4, 8, 8)
    assert world.SPRITES.dtype == bool
    assert world.SPRITES[:, world.MARK_SPAN, world.MARK_SPAN].all()
    assert world.SPRITES.sum(axis=(1, 2)).tolist() == [64, 52, 40, 32]
    for one, other in itertools.combinations(world.SPRITES, 2):
        assert (one != other).sum() >= 8


def test_sprites_are_mirror_images_of_themselves():
    np.testing.assert_array_equal(world.SPRITES, world.SPRITES[:, :, ::-1])


def test_hsv_matches_the_corners_of_the_colour_wheel():
    wheel = world.hsv(np.array([0, 60, 120, 180, 240, 300, 360, -60]), 1.0, 1.0)
    corners = [
        [1, 0, 0],
        [1, 1, 0],
        [0, 1, 0],
        [0, 1, 1],
        [0, 0, 1],
        [1, 0, 1],
        [1, 0, 0],
        [1, 0, 1],
    ]
    np.testing.assert_allclose(wheel, corners, atol=1e-6)
    np.testing.assert_allclose(world.hsv(200.0, 0.0, 0.3), [0.3, 0.3, 0.3], atol=1e-7)


@pytest.mark.parametrize("name", ["colour", "shape", "backdrop"])
def test_every_pair_of_prompt_values_looks_different(name):
    assert_all_differ(
        [changed(story(), **{name: value}) for value in range(len(PROMPT[name]))], pixels=8
    )


def test_every_pair_of_subject_marks_looks_different_whatever_the_shape():
    for shape in range(4):
        assert_all_differ([changed(story(shape=shape), mark=mark) for mark in range(16)], pixels=8)


@pytest.mark.parametrize(("field", "shown"), [("guest_marks", 4), ("posters", 2)])
def test_every_pair_of_hidden_guest_and_poster_marks_looks_different(field, shown):
    marks = np.arange(8 if field == "guest_marks" else 4)
    videos = [changed(story(), **{field: np.where(marks == shown, mark, 0)}) for mark in range(16)]
    assert_all_differ(videos, pixels=18)


def test_every_pair_of_guests_and_of_scenes_looks_different_even_with_equal_marks():
    same = {"guest_marks": np.full(8, 6), "posters": np.full(4, 9)}
    border = 28
    assert_all_differ(
        [changed(story(), **same, guests=np.array([g, 1, 1])) for g in range(-1, 8)], pixels=border
    )
    assert_all_differ(
        [changed(story(), **same, scenes=np.array([s, 1, 1])) for s in range(4)], pixels=border
    )


def test_borders_of_guests_and_posters_are_clearly_distinct():
    borders = np.concatenate([world.GUEST_COLOURS, world.SCENE_COLOURS])
    for one, other in itertools.combinations(borders, 2):
        assert np.linalg.norm(one - other) > 0.15


@pytest.mark.parametrize(
    ("field", "values"), [("hue", (-18.0, -17.0, 0.0, 17.0, 18.0)), ("gain", (0.75, 0.8, 1.25))]
)
def test_continuous_factors_show(field, values):
    assert_all_differ([changed(story(), **{field: value}) for value in values])


def test_neighbouring_colours_stay_apart_at_the_ends_of_the_hue_range():
    for colour in range(8):
        nearest = (
            world.body_colour(colour, world.HUE_SPREAD),
            world.body_colour(colour + 1, -world.HUE_SPREAD),
        )
        assert abs(nearest[0] - nearest[1]).max() > 0.1


def test_gain_lights_the_scene_but_neither_guest_nor_subject():
    base = story(colour=1)
    dim, bright = (light_levels(changed(base, gain=gain)) for gain in (0.75, 1.25))
    ratio = bright / dim
    same = np.isclose(ratio, 1, atol=1e-5).all(axis=-1)
    assert same[:4, 8:16, 16:24].all(), "the guest of block 0"
    np.testing.assert_allclose(
        ratio[4:8, 8:16, 16:24], 5 / 3, rtol=1e-4, err_msg="nobody called in block 1"
    )
    for row, column in ((0, 0), (0, 1), (1, 0), (3, 2)):
        np.testing.assert_allclose(cell(ratio, row, column), 5 / 3, rtol=1e-4)
    sprite = world.SPRITES[base.shape]
    for frame, lane in enumerate(base.columns):
        np.testing.assert_array_equal(cell(same, 2, lane)[frame], sprite)


def test_nothing_clips():
    for gain, backdrop, seed in itertools.product((0.75, 1.25), range(8), range(4)):
        video = world.render(dataclasses.replace(story(seed), gain=gain, backdrop=backdrop))
        assert video.min() > -1
        assert video.max() <= 1
    brightest = (
        1.25
        * world.LIGHT
        * max(world.BACKGROUNDS.max(), world.SCENE_COLOURS.max(), world.MARK_COLOURS.max())
    )
    assert brightest <= 0.95 + 1e-6


def test_the_subject_stands_where_the_walk_says():
    base = story(shape=0)
    video = light_levels(world.render(base))
    body = world.body_colour(base.colour, base.hue)
    corners = video[np.arange(12), 16, base.columns * 8]
    np.testing.assert_allclose(corners, np.broadcast_to(body, corners.shape), atol=1e-6)
    left = video[5, 19, base.columns[5] * 8 + 3]
    right = video[5, 19, base.columns[5] * 8 + 4]
    np.testing.assert_allclose(left, world.MARK_COLOURS[base.mark // 4], atol=1e-6)
    np.testing.assert_allclose(right, world.MARK_COLOURS[base.mark % 4], atol=1e-6)


def test_a_called_guest_looks_the_same_in_every_block():
    video = world.render(story(guests=[5, 2, 5], scenes=[1, 3, 1]))
    for row, column in (world.GUEST_CELL, world.POSTER_CELL):
        np.testing.assert_array_equal(cell(video, row, column)[:4], cell(video, row, column)[8:])
        assert abs(cell(video, row, column)[:4] - cell(video, row, column)[4:8]).max() > 0.05


def test_guest_pixels_follow_the_tables():
    base = story()
    guest = light_levels(cell(world.render(base), *world.GUEST_CELL))[0]
    mark = base.guest_marks[4]
    np.testing.assert_allclose(guest[0], np.broadcast_to(world.GUEST_COLOURS[4], (8, 3)), atol=1e-6)
    np.testing.assert_allclose(
        guest[1, 1:4], np.tile(world.MARK_COLOURS[mark // 4], (3, 1)), atol=1e-6
    )
    np.testing.assert_allclose(
        guest[6, 4:7], np.tile(world.MARK_COLOURS[mark % 4], (3, 1)), atol=1e-6
    )


def test_hidden_factors_do_not_depend_on_the_prompt():
    free = story()
    fixed = story(colour=5, shape=2, backdrop=1)
    assert (fixed.colour, fixed.shape, fixed.backdrop, fixed.speed) == (5, 2, 1, free.speed)
    for name in ("mark", "hue", "gain", "guest_marks", "posters", "columns"):
        np.testing.assert_array_equal(getattr(free, name), getattr(fixed, name))


def test_without_calls_nobody_comes_and_the_scene_stays():
    quiet = world.draw_story(np.random.default_rng(0), 7)
    assert quiet.guests.tolist() == [-1] * 7
    assert quiet.scenes.tolist() == [0] * 7
    assert quiet.columns.shape == (28,)


def test_hidden_factors_are_spread_over_their_ranges():
    stories = [world.draw_story(np.random.default_rng((1, seed)), 1) for seed in range(1600)]
    for name, size in (("colour", 8), ("shape", 4), ("speed", 2), ("backdrop", 8), ("mark", 16)):
        counts = np.bincount([getattr(one, name) for one in stories], minlength=size)
        expected = 1600 / size
        assert len(counts) == size
        assert abs(counts - expected).max() < 5 * expected**0.5
    hues, gains = np.array([(one.hue, one.gain) for one in stories]).T
    assert -18 <= hues.min() < -17.5
    assert 17.5 < hues.max() <= 18
    assert abs(hues.mean()) < 1.3
    assert 0.75 <= gains.min() < 0.76
    assert 1.24 < gains.max() <= 1.25
    marks = np.bincount(np.concatenate([one.guest_marks for one in stories]), minlength=16)
    assert abs(marks - 800).max() < 5 * 800**0.5


def test_a_quick_walk_steps_every_frame_and_a_slow_one_every_second():
    for seed in range(50):
        quick = world.walk(np.random.default_rng(seed), 41, 1)
        slow = world.walk(np.random.default_rng(seed), 41, 0)
        assert (abs(np.diff(quick)) == 1).all()
        np.testing.assert_array_equal(abs(np.diff(slow)), 1 - np.arange(1, 41) % 2)
        assert {*quick, *slow} <= set(range(world.LANES))


def test_a_walk_starts_where_told_and_goes_either_way():
    second = [world.walk(np.random.default_rng(seed), 2, 1, start=2)[1] for seed in range(400)]
    assert set(second) == {1, 3}
    assert 140 < second.count(3) < 260
    assert all(world.walk(np.random.default_rng(seed), 5, 0, start=3)[0] == 3 for seed in range(9))
    starts = np.bincount(
        [world.walk(np.random.default_rng(seed), 1, 0)[0] for seed in range(800)], minlength=4
    )
    assert abs(starts - 200).max() < 65


def test_the_walk_turns_round_only_at_block_starts_with_the_promised_chance():
    walks = np.stack([world.walk(np.random.default_rng(seed), 40, 1) for seed in range(600)])
    before = walks[:, :-2]
    here = walks[:, 1:-1]
    after = walks[:, 2:]
    inner = (here > 0) & (here < world.LANES - 1)
    turned = (after == before) & inner
    at_block_start = np.arange(2, 40) % world.BLOCK == 0
    assert not turned[:, ~at_block_start].any()
    rate = turned[:, at_block_start].sum() / inner[:, at_block_start].sum()
    assert abs(rate - 0.3) < 0.03


def test_the_walk_is_not_periodic():
    walks = np.stack([world.walk(np.random.default_rng(seed), 60, 1) for seed in range(300)])
    assert (walks[:, 36:42] == walks[:, :6]).all(axis=1).mean() < 0.5


@pytest.mark.parametrize(
    "fixed",
    [
        {"colour": 8},
        {"shape": -1},
        {"guests": [0, 1]},
        {"guests": [0, 8, 1]},
        {"scenes": [-1, 0, 0]},
        {"scenes": [0, 4, 0]},
    ],
)
def test_what_is_not_on_the_stage_is_refused(fixed):
    with pytest.raises(InputError, match=f"{next(iter(fixed))}.*give"):
        story(**fixed)
