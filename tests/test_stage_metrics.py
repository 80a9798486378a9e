"""Every score on scripted videos whose value is known in closed form, on calibration renders and on controls."""

import dataclasses
import json
import math

import numpy as np
import pytest

from packforcing_jax.errors import InputError
from packforcing_jax.stage import captions, metrics, oracle, world

WALK = np.array([0, 1, 2, 3, 2, 1])
PROMPT = captions.Prompt(colour=3, shape=1, speed=1, backdrop=5, scene=2, guest=None)


def script(frames: int, **changes) -> oracle.Reading:
    """A reading of a video that does what `PROMPT` asks, but for the given fields (numbers or arrays)."""
    fields = {
        "column": WALK[np.arange(frames) % 6],
        "colour": 3,
        "shape": 1,
        "mark": 7,
        "hue": 4.0,
        "backdrop": 5,
        "gain": 1.1,
        "scene": 2,
        "poster": 9,
        "guest": -1,
        "guest_mark": -1,
        "residual": 0.0,
    }
    fields |= changes
    return oracle.Reading(
        **{name: np.broadcast_to(value, (frames,)) for name, value in fields.items()}
    )


def shuffled(reading: oracle.Reading, rng: np.random.Generator) -> oracle.Reading:
    """A control without memory: the same video with the marks of every block drawn anew."""
    block = np.arange(len(reading)) // world.BLOCK
    mark, poster, guest_mark = rng.integers(world.MARKS, size=(3, len(reading)))[:, block]
    guest_mark = np.where(reading.guest < 0, -1, guest_mark)
    return dataclasses.replace(reading, mark=mark, poster=poster, guest_mark=guest_mark)


def by_block(values) -> np.ndarray:
    return np.repeat(values, world.BLOCK)


def whole(reading: oracle.Reading) -> slice:
    return slice(0, len(reading))


def rendered(seed: int, blocks: int) -> tuple[oracle.Reading, list[captions.Prompt]]:
    rng = np.random.default_rng((77, seed))
    story = world.draw_story(
        rng, blocks, guests=rng.integers(-1, 8, blocks), scenes=rng.integers(4, size=blocks)
    )
    return oracle.read(world.render(story)), [
        captions.parse(captions.caption(story, b)) for b in range(blocks)
    ]


@pytest.mark.parametrize(
    ("frames", "size", "expected"),
    [
        (60, 20, [(0, 20), (20, 40), (40, 60)]),
        (50, 20, [(0, 20), (20, 40), (30, 50)]),
        (20, 20, [(0, 20)]),
        (13, 20, [(0, 13)]),
        (21, 20, [(0, 20), (1, 21)]),
        (9, 3, [(0, 3), (3, 6), (6, 9)]),
    ],
)
def test_windows_follow_each_other_and_the_last_ends_with_the_video(frames, size, expected):
    assert [(span.start, span.stop) for span in metrics.windows(frames, size)] == expected


def test_what_is_asked_is_spread_over_the_frames_of_its_block():
    prompts = [PROMPT, PROMPT._replace(guest=6), PROMPT._replace(colour=None)]
    np.testing.assert_array_equal(
        metrics.prompted(prompts, "guest", 10), [-1] * 4 + [6] * 4 + [-1] * 2
    )
    np.testing.assert_array_equal(metrics.prompted(prompts, "colour", 10), [3] * 8 + [-1] * 2)
    with pytest.raises(InputError, match="3 prompts do not cover 13 frames"):
        metrics.prompted(prompts, "guest", 13)


@pytest.mark.parametrize(
    ("values", "expected"), [([3, 3, 5], 3), ([-1, -1, 2], -1), ([4, 2], 2), ([], -1)]
)
def test_majority(values, expected):
    assert metrics.majority(np.array(values, int)) == expected


def test_valid_share_counts_frames_under_tau():
    reading = script(12, residual=np.where(np.arange(12) < 3, 2 * oracle.TAU, oracle.TAU / 2))
    assert metrics.valid_share(reading, whole(reading)) == 0.75
    assert metrics.valid_share(reading, slice(0, 4)) == 0.25


# Text


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ([0, 1, 2, 3, 2, 1, 0, 1], [1, 1]),
        ([2, 2, 1, 1, 0, 0, 1, 1], [0, 0]),
        ([1] * 8, [-1, -1]),  # standing is no speed
        ([0, 3, 0, 3, 0, 3, 0, 3], [-1, -1]),  # nor is jumping
        ([0, 0, 2, 2, 2, 2, 2, 2], [-1, -1]),  # nor one jump at the right mean pace
        ([0, 1, 2, 3, 3, 2, 1, 0], [1, -1]),  # three of four steps: half-way between two speeds
        ([0, 1, 2, 3, 3], [1, -1]),
        ([2], [-1]),
    ],
)
def test_speed_is_measured_over_the_steps_into_each_block(columns, expected):
    np.testing.assert_array_equal(
        metrics.speed_of(np.array(columns)), by_block(expected)[: len(columns)]
    )


@pytest.mark.parametrize("speed", [0, 1])
def test_the_worlds_own_walks_are_read_at_their_speed_in_every_block(speed):
    for seed in range(40):
        columns = world.walk(np.random.default_rng(seed), 44, speed)
        np.testing.assert_array_equal(metrics.speed_of(columns), speed)


def test_text_alignment_of_a_video_that_obeys_is_one():
    scores = metrics.text_alignment(script(24), [PROMPT] * 6, slice(4, 24))
    assert scores == dict.fromkeys((*metrics.ATTRIBUTES, "mean"), 1.0)


def test_text_alignment_counts_the_share_of_wrong_frames_by_attribute():
    reading = script(20, colour=np.where(np.arange(20) < 5, 2, 3), column=1, shape=0)
    scores = metrics.text_alignment(reading, [PROMPT] * 5, whole(reading))
    expected = {
        "colour": 0.75,
        "shape": 0,
        "speed": 0,
        "backdrop": 1,
        "scene": 1,
        "guest": 1,
        "mean": 3.75 / 6,
    }
    assert scores == pytest.approx(expected)


def test_an_uncalled_guest_and_a_missing_one_are_both_wrong():
    prompts = [PROMPT, PROMPT._replace(guest=4), PROMPT._replace(guest=4), PROMPT]
    reading = script(16, guest=by_block([2, 4, -1, -1]))
    assert metrics.text_alignment(reading, prompts, whole(reading))["guest"] == 0.5


def test_what_the_text_leaves_open_is_not_judged():
    reading = script(8, colour=by_block([6, 6]))
    assert (
        metrics.text_alignment(reading, [PROMPT, PROMPT._replace(colour=6)], whole(reading))[
            "colour"
        ]
        == 0.5
    )
    silent = metrics.text_alignment(reading, [captions.Prompt()] * 2, whole(reading))
    assert math.isnan(silent["colour"])
    assert silent["mean"] == silent["guest"] == 1


# Identity and drift


@pytest.mark.parametrize(("switch", "last"), [(60, 1.0), (50, 0.5), (45, 0.25), (20, 0.0)])
def test_a_mark_that_switches_at_frame_t_agrees_until_then(switch, last):
    reading = script(60, mark=np.where(np.arange(60) < switch, 7, 11))
    assert metrics.mark_agreement(reading, slice(0, 20))["mark"] == 1
    assert metrics.mark_agreement(reading, slice(40, 60))["mark"] == last


def test_the_reference_mark_is_the_majority_of_the_first_eight_frames():
    reading = script(40, mark=np.where(np.isin(np.arange(40), [0, 3, 4]), 1, 5))
    assert metrics.mark_agreement(reading, slice(0, 20))["mark"] == 0.85


def test_posters_are_compared_scene_by_scene():
    scene = by_block([0, 1, 0, 1, 3])
    poster = by_block([4, 8, 4, 8, 8])
    assert (
        metrics.mark_agreement(script(20, scene=scene, poster=poster), slice(0, 20))["poster"] == 1
    )
    exchanged = by_block([4, 8, 4, 4, 8])
    assert (
        metrics.mark_agreement(script(20, scene=scene, poster=exchanged), slice(12, 20))["poster"]
        == 0.5
    )


def test_a_linear_hue_ramp_drifts_by_its_closed_form():
    slope = 0.25
    frames = 60
    reading = script(frames, hue=slope * np.arange(frames))
    start = slope * 9.5
    last = np.sqrt(np.mean((slope * np.arange(40, 60) - start) ** 2))
    first = slope * np.sqrt((20**2 - 1) / 12)  # the standard deviation of 0 .. 19
    assert metrics.hue_drift(reading, slice(40, 60)) == pytest.approx(last)
    assert metrics.hue_drift(reading, slice(0, 20)) == pytest.approx(first)
    assert metrics.gain_drift(reading, slice(40, 60)) == 0


def test_a_step_in_the_light_drifts_by_its_height_and_one_odd_frame_does_not_move_the_reference():
    gain = np.where(np.arange(60) < 40, 1.0, 0.8)
    gain[2] = 1.25
    assert metrics.gain_drift(script(60, gain=gain), slice(40, 60)) == pytest.approx(0.2)


def test_uniform_redraws_drift_by_the_chance_level():
    rng = np.random.default_rng(3)
    pairs = rng.uniform(-world.HUE_SPREAD, world.HUE_SPREAD, (2, 200_000))
    assert metrics.CHANCE["hue drift"] == pytest.approx(
        np.sqrt(np.mean((pairs[0] - pairs[1]) ** 2)), rel=0.01
    )
    pairs = rng.uniform(*world.GAIN_RANGE, (2, 200_000))
    assert metrics.CHANCE["gain drift"] == pytest.approx(
        np.sqrt(np.mean((pairs[0] - pairs[1]) ** 2)), rel=0.01
    )


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        (np.arange(16), 1.0),
        (np.full(9, 5), 0.0),
        ([0, 0, 15, 15], 0.25),
        ([1, 2, 3, 4], 0.5),
        ([3, 3, 3, 8], 0.2028),
    ],
)
def test_diversity_is_the_entropy_of_first_marks(marks, expected):
    assert metrics.diversity(np.array(marks)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("videos", [1, 7, 48])
def test_fair_diversity_is_what_fair_draws_have_on_average(videos):
    draws = np.random.default_rng(0).integers(world.MARKS, size=(3000, videos))
    mean = np.mean([metrics.diversity(marks) for marks in draws])
    assert metrics.fair_diversity(videos) == pytest.approx(mean, abs=0.005)


# Recall


def calls(guests, **changes) -> list[captions.Prompt]:
    return [PROMPT._replace(guest=None if guest < 0 else guest, **changes) for guest in guests]


GUESTS = [2, -1, 5, 5, 2, 2, -1, -1, 5]


def test_a_guest_recalled_wrongly_is_one_wrong_row_with_its_gap():
    guest = by_block(GUESTS)
    mark = by_block([3, -1, 6, 6, 3, 3, -1, -1, 12])
    rows = metrics.recall(script(36, guest=guest, guest_mark=mark), calls(GUESTS))
    assert rows == [("guest", 4, True), ("guest", 5, False)]


def test_recall_takes_the_majority_of_the_visit_and_only_the_first_block_of_a_revisit():
    mark = by_block([3, -1, 6, 6, 3, 9, -1, -1, 6])
    mark[[1, 17, 33]] = 15  # one frame of four
    rows = metrics.recall(script(36, guest=by_block(GUESTS), guest_mark=mark), calls(GUESTS))
    assert rows == [("guest", 4, True), ("guest", 5, True)]


def test_the_first_visit_is_the_reference_for_every_later_one():
    guests = [1, -1, 1, 0, -1, 1]
    reading = script(24, guest=by_block(guests), guest_mark=by_block([4, -1, 8, 2, -1, 8]))
    assert metrics.recall(reading, calls(guests)) == [("guest", 2, False), ("guest", 3, False)]


@pytest.mark.parametrize("shown", [[-1, -1, 2], [2, -1, -1], [-1, -1, -1], [7, -1, 2], [2, -1, 7]])
def test_a_guest_that_was_not_shown_is_not_recalled(shown):
    reading = script(
        12, guest=by_block(shown), guest_mark=by_block([-1 if who < 0 else 5 for who in shown])
    )
    assert metrics.recall(reading, calls([2, -1, 2])) == [("guest", 2, False)]


def test_scenes_are_recalled_by_their_posters():
    scenes = [0, 3, 3, 0, 3]
    prompts = [PROMPT._replace(scene=scene) for scene in scenes]
    reading = script(20, scene=by_block(scenes), poster=by_block([11, 6, 6, 11, 7]))
    assert metrics.recall(reading, prompts) == [("scene", 3, True), ("scene", 2, False)]


def test_an_unfinished_last_block_is_judged_by_the_frames_it_has():
    reading = script(10, guest=by_block([2, -1, 2])[:10], guest_mark=by_block([5, -1, 5])[:10])
    assert metrics.recall(reading, calls([2, -1, 2])) == [("guest", 2, True)]


def test_distinct_marks_show_a_model_that_gives_all_guests_one_mark():
    guests = [0, 1, 2, 3, 0, 1]
    fair = 16 * (1 - (15 / 16) ** 4)
    same = script(24, guest=by_block(guests), guest_mark=5)
    assert all(row.correct for row in metrics.recall(same, calls(guests)))
    assert metrics.distinct_marks(same, calls(guests)) == (1, pytest.approx(fair))
    other = script(24, guest=by_block(guests), guest_mark=by_block([5, 6, 6, 7, 1, 2]))
    assert metrics.distinct_marks(other, calls(guests)) == (3, pytest.approx(fair))


# Motion


def test_a_walk_at_the_commanded_speed_has_every_frame_in_pace():
    expected = {"pace": 1.0, "speed": 1.0, "dynamic": 1.0, "jumps": 0.0}
    for speed in range(2):
        for seed in range(20):
            reading = script(36, column=world.walk(np.random.default_rng(seed), 36, speed))
            assert (
                metrics.motion(reading, [PROMPT._replace(speed=speed)] * 9, slice(16, 36))
                == expected
            )


def test_a_frozen_video_has_no_motion():
    reading = script(20, column=2)
    expected = {"pace": 0.0, "speed": 0.0, "dynamic": 0.0, "jumps": 0.0}
    assert metrics.motion(reading, [PROMPT] * 5, whole(reading)) == expected


def test_a_teleport_costs_two_pairs_and_is_one_jump():
    column = np.array([0, 1, 2, 3, 0, 1, 2, 3, 2, 1, 0])  # three cells at once into frame 4
    scores = metrics.motion(script(11, column=column), [PROMPT] * 3, slice(0, 11))
    assert scores == pytest.approx({"pace": 7 / 9, "speed": 22 / 18, "dynamic": 1, "jumps": 0.1})


def test_a_slow_video_of_a_quick_prompt_has_half_the_speed():
    reading = script(20, column=world.walk(np.random.default_rng(1), 20, 0))
    scores = metrics.motion(reading, [PROMPT] * 5, whole(reading))
    assert scores == {"pace": 0.0, "speed": 0.5, "dynamic": 1.0, "jumps": 0.0}


def test_pairs_of_steps_across_a_change_of_speed_are_not_judged():
    prompts = [PROMPT] * 2 + [PROMPT._replace(speed=0)] * 2
    column = np.array([0, 1, 2, 3, 2, 1, 0, 1, 2, 2, 1, 1, 0, 0, 1, 1])
    assert metrics.motion(script(16, column=column), prompts, slice(0, 16))["pace"] == 1
    assert math.isnan(metrics.motion(script(16), [captions.Prompt()] * 4, slice(0, 16))["pace"])


def test_random_columns_reach_the_chance_levels_of_motion():
    columns = np.random.default_rng(4).integers(world.LANES, size=60_000)
    prompts = [PROMPT._replace(speed=speed) for speed in (0, 1) for _ in range(7500)]
    scores = metrics.motion(script(60_000, column=columns), prompts, slice(0, 60_000))
    assert scores["jumps"] == pytest.approx(metrics.CHANCE["motion jumps"], abs=0.01)
    assert scores["pace"] == pytest.approx(metrics.CHANCE["motion pace"], abs=0.01)


# Intervals


@pytest.mark.parametrize(
    ("successes", "n", "expected"),
    [
        (160, 200, (0.8, 0.7391, 0.8496)),
        (0, 10, (0, 0, 0.2775)),
        (10, 10, (1, 0.7225, 1)),
        (1, 2, (0.5, 0.0945, 0.9055)),
    ],
)
def test_wilson_against_published_values(successes, n, expected):
    assert metrics.wilson(successes, n) == pytest.approx(expected, abs=2e-4)


def test_wilson_of_nothing_says_nothing():
    share, low, high = metrics.wilson(0, 0)
    assert math.isnan(share)
    assert (low, high) == (0, 1)


def test_bootstrap_is_near_the_normal_interval_and_repeats_itself():
    values = np.random.default_rng(2).normal(3, 2, 400)
    mean, low, high = metrics.bootstrap(values.tolist(), seed=7)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx(
        (mean - 1.96 * values.std() / 20, mean + 1.96 * values.std() / 20), abs=0.03
    )
    assert metrics.bootstrap(values.tolist(), seed=7) == (mean, low, high)
    assert metrics.bootstrap(values.tolist(), seed=8) != (mean, low, high)


def test_bootstrap_leaves_out_videos_without_a_value():
    assert metrics.bootstrap([math.nan, 2.0, 2.0]) == (2, 2, 2)
    assert all(map(math.isnan, metrics.bootstrap([math.nan])))


def test_jackknife_has_the_width_of_the_delta_method():
    share = np.repeat([0.5, 0.2, 0.3], [150, 60, 90])
    value, low, high = metrics.jackknife(np.repeat([0, 4, 2], [150, 60, 90]))
    half = 1.96 * np.std(np.log(share)) / math.log(16) / math.sqrt(300)
    assert (low, high) == pytest.approx((value - half, value + half), rel=0.01)
    assert metrics.jackknife(np.full(12, 3)) == (0, 0, 0)
    assert metrics.jackknife(np.array([3])) == (0, 0, 1)


# The report


@pytest.fixture(scope="module")
def renders():
    return [rendered(seed, 24) for seed in range(24)]


PERFECT = {
    name: 0.0 if name in ("motion jumps", "hue drift", "gain drift") else 1.0
    for name in metrics.CHANCE
}


def test_renders_score_perfectly_in_every_row(renders):
    result = metrics.report(*zip(*renders, strict=True))
    for part in ("first", "last"):
        values = {name: row[part][0] for name, row in result["windows"].items()}
        assert values == pytest.approx(PERFECT, abs=2e-3), part
    recalls = {name: row for name, row in result["whole"].items() if name.startswith("recall")}
    assert {name.split(",")[0] for name in recalls} == {"recall guest", "recall scene"}
    assert all(row["value"][0] == 1 for row in recalls.values())
    distinct = result["whole"]["distinct guest marks"]
    assert distinct["value"][1] < distinct["chance"] < distinct["value"][2]


def test_shuffled_identities_fall_to_one_in_sixteen(renders):
    rng = np.random.default_rng(9)
    readings = [shuffled(reading, rng) for reading, _ in renders]
    result = metrics.report(readings, [prompts for _, prompts in renders])
    assert result["windows"]["kept mark"]["last"][0] == pytest.approx(1 / 16, abs=0.05)
    assert result["windows"]["kept poster"]["last"][0] == pytest.approx(1 / 16, abs=0.05)
    rows = [
        row
        for reading, (_, prompts) in zip(readings, renders, strict=True)
        for row in metrics.recall(reading, prompts)
    ]
    share, low, high = metrics.wilson(sum(row.correct for row in rows), len(rows))
    assert len(rows) > 300
    assert low < 1 / 16 < high
    assert high - low < 0.06
    assert result["windows"]["text mean"]["last"][0] == 1, (
        "the control leaves alone what the text decides"
    )


def test_uniform_readings_score_the_chance_level_of_every_text_row(renders):
    rng = np.random.default_rng(10)
    hits = []
    for _ in range(60):
        guess = {
            name: rng.integers(count, size=96)
            for name, count in metrics.CHOICES.items()
            if name != "speed"
        }
        guess["guest"] -= 1
        hits.append(metrics.text_alignment(script(96, **guess), renders[0][1], slice(0, 96)))
    for name in guess:
        assert np.mean([hit[name] for hit in hits]) == pytest.approx(
            metrics.CHANCE[f"text {name}"], abs=0.02
        ), name


@pytest.mark.parametrize(("sigma", "valid"), [(0.05, 1.0), (0.1, 0.0)])
def test_noise_costs_validity_and_nothing_that_is_discrete(sigma, valid):
    rng = np.random.default_rng(1)
    story = world.draw_story(
        rng, 6, guests=np.array([3, -1, 6, 3, -1, 6]), scenes=np.array([0, 1, 1, 0, 0, 1])
    )
    reading = oracle.read(
        world.render(story) + sigma * rng.standard_normal((24, 32, 32, 3), np.float32)
    )
    prompts = [captions.parse(captions.caption(story, block)) for block in range(6)]
    scores = metrics.window_scores(reading, prompts, slice(4, 24))
    expected = PERFECT | {"valid": valid}
    assert {name: scores[name] for name in expected if "drift" not in name} == pytest.approx(
        {name: expected[name] for name in expected if "drift" not in name}
    )
    assert 0 < scores["hue drift"] < 12 * sigma
    assert all(row.correct for row in metrics.recall(reading, prompts))


def test_a_report_is_plain_json_with_an_interval_and_a_chance_level_in_every_row(renders):
    readings, prompts = zip(*renders[:5], strict=True)
    result = json.loads(json.dumps(metrics.report(readings, prompts), allow_nan=False))
    assert (result["videos"], result["frames"]) == (5, 96)
    rows = [
        (row["chance"], row[part])
        for row in result["windows"].values()
        for part in ("first", "last")
    ]
    rows += [(row["chance"], row["value"]) for row in result["whole"].values()]
    for chance, (value, low, high) in rows:
        assert chance >= 0
        assert low - 1e-9 <= value <= high + 1e-9


def test_a_report_names_what_it_could_not_measure():
    still = script(8)
    result = metrics.report([still], [[captions.Prompt()] * 2])
    assert result["windows"]["text colour"]["first"] == [None, None, None]
    assert "- [-, -]" in metrics.table(metrics.report([still] * 2, [[captions.Prompt()] * 2] * 2))
    assert "[-, -]" not in metrics.table(result)  # one video has no spread
    with pytest.raises(InputError, match="1 readings and 0 lists of prompts"):
        metrics.report([still], [])


def test_drift_is_pooled_over_videos_as_squares():
    ramps = [script(40, hue=np.where(np.arange(40) < 20, 0.0, height)) for height in (3.0, 4.0)]
    result = metrics.report(ramps, [[PROMPT] * 10] * 2)
    assert result["windows"]["hue drift"]["last"] == pytest.approx([math.sqrt(12.5), 3, 4])


def test_recall_is_pooled_by_gap():
    guests = [0, -1, 0, 1, -1, -1, -1, 1]
    reading = script(32, guest=by_block(guests), guest_mark=by_block([3, -1, 3, 8, -1, -1, -1, 2]))
    whole_video = metrics.report([reading] * 3, [calls(guests)] * 3)["whole"]
    assert whole_video["recall guest, gap 2-3"]["value"][0] == 1
    assert whole_video["recall guest, gap 4-7"]["value"][0] == 0
    assert whole_video["recall guest, gap 4-7"]["n"] == 3


def test_the_table_has_one_aligned_line_per_row(renders):
    readings, prompts = zip(*renders[:3], strict=True)
    result = metrics.report(readings, prompts)
    lines = metrics.table(result).splitlines()
    assert lines[0] == "3 videos of 96 frames; brackets hold 95 % intervals"
    assert len(lines) == 4 + len(result["windows"]) + len(result["whole"])
    row = next(line for line in lines if line.startswith("kept mark"))
    assert row.split() == ["kept", "mark", "0.062", *["1.000", "[1.000,", "1.000]"] * 2]
    assert len({len(line) for line in lines[1 : 2 + len(result["windows"])]}) == 1


def test_shuffling_changes_marks_block_by_block_and_nothing_else():
    reading = script(80, guest=by_block([-1, 3] * 10), guest_mark=by_block([-1, 5] * 10))
    control = shuffled(reading, np.random.default_rng(0))
    for name in ("mark", "poster", "guest_mark"):
        values = getattr(control, name).reshape(20, 4)
        assert (values == values[:, :1]).all()
        assert len(np.unique(values)) > 3
    np.testing.assert_array_equal(control.guest_mark[reading.guest < 0], -1)
    for field in dataclasses.fields(reading):
        if "mark" not in field.name and field.name != "poster":
            np.testing.assert_array_equal(
                getattr(control, field.name), getattr(reading, field.name)
            )
