"""The oracle reads renders exactly, damaged frames as their nearest legal ones, and never changes."""

import ast
import dataclasses
import hashlib
import itertools
import pathlib
import time

import numpy as np
import pytest

from packforcing_jax.errors import InputError
from packforcing_jax.stage import oracle, world

FROZEN = "9f319c1a40218395c747e451e9c8e56ce1ea59868826cc3fd7fbe6b1acd26291"
DISCRETE = {
    "column": world.LANES,
    "colour": len(world.COLOURS),
    "shape": len(world.SHAPES),
    "mark": world.MARKS,
    "backdrop": len(world.BACKDROPS),
    "scene": len(world.SCENES),
    "poster": world.MARKS,
    "guest": len(world.GUESTS),
    "guest_mark": world.MARKS,
}


def digest() -> str:
    """sha256 of what the oracle and the world that it reads compute: their code but for line breaks and imports."""
    stage = pathlib.Path(oracle.__file__).parent
    told = hashlib.sha256()
    for name in ("oracle.py", "world.py"):
        module = ast.parse((stage / name).read_text(encoding="utf-8"))
        imports = (ast.Import, ast.ImportFrom)
        module.body = [each for each in module.body if not isinstance(each, imports)]
        told.update(ast.unparse(module).encode())
    return told.hexdigest()


def test_the_oracle_is_frozen():
    """Figures are comparable only under one oracle; whoever changes it measures everything again, then says so here."""
    assert digest() == FROZEN


def draw(seed: int, blocks: int = 5) -> world.Story:
    rng = np.random.default_rng((31, seed))
    return world.draw_story(
        rng, blocks, guests=rng.integers(-1, 8, blocks), scenes=rng.integers(4, size=blocks)
    )


def truth(story: world.Story) -> dict[str, np.ndarray]:
    """What a perfect reading of the story holds."""
    block = np.arange(len(story.columns)) // world.BLOCK
    guest = story.guests[block]
    scene = story.scenes[block]
    still = {
        name: np.full(len(block), getattr(story, name))
        for name in ("colour", "shape", "mark", "backdrop", "hue", "gain")
    }
    return still | {
        "column": story.columns,
        "scene": scene,
        "poster": story.posters[scene],
        "guest": guest,
        "guest_mark": np.where(guest < 0, -1, story.guest_marks[guest]),
    }


@pytest.fixture(scope="module")
def shown() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Sixty videos end to end, and what they show."""
    stories = [draw(seed) for seed in range(60)]
    truths = [truth(story) for story in stories]
    frames = np.concatenate([world.render(story) for story in stories])
    return frames, {name: np.concatenate([each[name] for each in truths]) for name in truths[0]}


def assert_reads(reading: oracle.Reading, state: dict[str, np.ndarray]):
    for name in DISCRETE:
        np.testing.assert_array_equal(getattr(reading, name), state[name], err_msg=name)


def test_renders_are_read_exactly(shown):
    frames, state = shown
    reading = oracle.read(frames)
    assert_reads(reading, state)
    np.testing.assert_allclose(reading.hue, state["hue"], atol=0.01)
    np.testing.assert_allclose(reading.gain, state["gain"], atol=1e-4)
    assert reading.residual.max() < 1e-9
    assert reading.valid.all()
    assert len(reading) == len(frames)


@pytest.mark.parametrize("hue", [-18.0, -15.0, -7.3, 0.0, 15.0, 18.0])
@pytest.mark.parametrize("gain", [0.75, 1.25])
def test_every_subject_is_read_at_the_ends_and_bends_of_the_hidden_ranges(hue, gain):
    stories = [
        dataclasses.replace(
            draw(seed, 1),
            colour=colour,
            shape=shape,
            backdrop=(colour + seed) % 8,
            hue=hue,
            gain=gain,
        )
        for seed, (colour, shape) in enumerate(itertools.product(range(8), range(4)))
    ]
    reading = oracle.read(np.concatenate([world.render(story) for story in stories]))
    truths = [truth(story) for story in stories]
    assert_reads(
        reading, {name: np.concatenate([each[name] for each in truths]) for name in truths[0]}
    )
    np.testing.assert_allclose(reading.hue, hue, atol=0.01)
    np.testing.assert_allclose(reading.gain, gain, atol=1e-4)


def test_every_mark_is_read_in_all_three_places():
    stories = [
        dataclasses.replace(
            draw(mark, 1),
            mark=mark,
            guests=np.array([mark % 8]),
            guest_marks=np.full(8, mark),
            posters=np.full(4, mark),
        )
        for mark in range(world.MARKS)
    ]
    reading = oracle.read(np.concatenate([world.render(story) for story in stories]))
    for name in ("mark", "poster", "guest_mark"):
        np.testing.assert_array_equal(
            getattr(reading, name), np.repeat(np.arange(world.MARKS), world.BLOCK)
        )


@pytest.mark.parametrize(("sigma", "valid"), [(0.05, 1.0), (0.1, 0.0), (0.2, 0.0)])
def test_noise_leaves_every_attribute_readable_and_its_own_power_as_residual(shown, sigma, valid):
    frames, state = shown
    noise = sigma * np.random.default_rng(5).standard_normal(frames.shape, np.float32)
    reading = oracle.read(frames + noise)
    assert_reads(reading, state)
    np.testing.assert_allclose(reading.residual, sigma**2, rtol=0.15)
    assert reading.valid.mean() == valid
    assert np.sqrt(np.mean(np.square(reading.hue - state["hue"]))) < 8 * sigma
    assert np.sqrt(np.mean(np.square(reading.gain - state["gain"]))) < 0.15 * sigma


def cells(frames: np.ndarray) -> np.ndarray:
    """A copy cut into [frame, row, column, y, x, rgb]."""
    return frames.reshape(len(frames), 4, 8, 4, 8, 3).transpose(0, 1, 3, 2, 4, 5).copy()


def whole(cut: np.ndarray) -> np.ndarray:
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(len(cut), 32, 32, 3)


def torn(cut: np.ndarray, column: np.ndarray, *half):
    """The named half of the subject stands one column further."""
    here = np.arange(len(cut))[:, None, None], 2, column[:, None, None]
    there = (here[0], 2, (here[2] + 1) % 4)
    y, x = (part[half] for part in np.indices((8, 8)))
    y = np.atleast_2d(y)
    x = np.atleast_2d(x)
    cut[*here, y, x], cut[*there, y, x] = cut[*there, y, x], cut[*here, y, x]


def halved(cut, column):
    frame = np.arange(len(cut))
    cut[frame, 2, column, :4] = cut[frame, 2, (column + 1) % 4, :4]


def doubled(cut, column):
    frame = np.arange(len(cut))
    cut[frame, 2, (column + 2) % 4] = cut[frame, 2, column]


def missing(cut, column):
    frame = np.arange(len(cut))
    cut[frame, 2, column] = cut[frame, 2, (column + 1) % 4]


def buried(cut, column):
    cut[np.arange(len(cut)), 2, column] = cut[:, 3, 0]


def on_the_wall(cut, column):
    cut[:, 0, 3] = cut[np.arange(len(cut)), 2, column]


def no_poster(cut, column):
    cut[:, 0, 1] = cut[:, 0, 0]


DAMAGE = {
    "torn across": lambda cut, column: torn(cut, column, slice(4), slice(8)),
    "torn down": lambda cut, column: torn(cut, column, slice(8), slice(4)),
    "halved": halved,
    "doubled": doubled,
    "missing": missing,
    "buried": buried,
    "on the wall": on_the_wall,
    "no poster": no_poster,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_tau_calls_frames_with_one_wrong_cell_invalid(shown, damage):
    frames, state = shown
    cut = cells(frames)
    DAMAGE[damage](cut, state["column"])
    residual = oracle.read(whole(cut)).residual
    assert residual.min() > max(oracle.TAU, 0.006)


def test_the_nearest_legal_frame_is_never_further_than_the_one_that_was_damaged(shown):
    frames, _ = shown
    cut = cells(frames)
    rng = np.random.default_rng(8)
    source, target = rng.integers(16, size=(2, len(frames)))
    frame = np.arange(len(frames))
    cut[frame, target // 4, target % 4] = cut[frame, source // 4, source % 4]
    change = np.square(whole(cut) - frames).mean(axis=(1, 2, 3))
    residual = oracle.read(whole(cut)).residual
    assert (residual <= change + 1e-6).all()
    assert (residual[change == 0] < 1e-9).all()


def test_crossfades_and_unstructured_frames_are_invalid(shown):
    frames, _ = shown
    half = (frames[:-20:7] + frames[20::7]) / 2
    assert oracle.read(half).valid.mean() < 0.02
    assert not oracle.read(np.random.default_rng(0).uniform(-1, 1, (9, 32, 32, 3))).valid.any()
    assert not oracle.read(np.zeros((3, 32, 32, 3), np.float32)).valid.any()


def test_a_mildly_wrong_frame_keeps_its_attributes(shown):
    frames, state = shown
    smudged = frames.copy()
    smudged[:, 20:22, ::2] *= 0.5
    smudged[:, 9:11, 17:23] += 0.1
    assert_reads(oracle.read(smudged), state)


def changed(
    reading: oracle.Reading, name: str, count: int, frame: int
) -> list[dict[str, np.ndarray]]:
    """The state read from one frame with every other value of one factor."""
    state = {
        field.name: np.asarray(getattr(reading, field.name)[frame : frame + 1])
        for field in dataclasses.fields(reading)
        if field.name not in ("gain", "residual")
    }
    return [state | {name: np.array([value])} for value in range(count) if value != state[name][0]]


def test_no_change_of_one_factor_comes_closer_to_a_damaged_frame(shown):
    frames, _ = shown
    damaged = (0.7 * frames[::83] + 0.3 * frames[5:-1:83][: len(frames[::83])]).astype(np.float32)
    damaged += 0.1 * np.random.default_rng(6).standard_normal(damaged.shape, np.float32)
    reading = oracle.read(damaged)
    unit = (cells(damaged) + 1) / 2
    for frame, (name, count) in itertools.product(range(len(damaged)), DISCRETE.items()):
        if name != "guest_mark" or reading.guest[frame] >= 0:
            for other in changed(reading, name, count, frame):
                if name != "guest" or reading.guest[frame] >= 0:
                    worse = oracle.refit(unit[frame : frame + 1], **other)[1][0]
                    assert worse > reading.residual[frame] - 1e-5, (frame, name, other[name])


def test_hidden_values_outside_their_range_are_read_as_its_end():
    story = dataclasses.replace(draw(2), hue=21.0, gain=1.3)
    reading = oracle.read(world.render(story))
    np.testing.assert_allclose(reading.hue, world.HUE_SPREAD, atol=1e-4)
    np.testing.assert_allclose(reading.gain, world.GAIN_RANGE[1], atol=1e-6)
    assert reading.residual.min() > 1e-5


def test_frames_are_read_one_by_one(shown):
    frames, _ = shown
    part = frames[: oracle.CHUNK + 5] + 0.1 * np.random.default_rng(1).standard_normal(
        (oracle.CHUNK + 5, 32, 32, 3)
    )
    together = oracle.read(part)
    alone = oracle.read(part[oracle.CHUNK + 2 : oracle.CHUNK + 3])
    for field in dataclasses.fields(oracle.Reading):
        mine = getattr(together, field.name)[oracle.CHUNK + 2]
        np.testing.assert_allclose(
            getattr(alone, field.name)[0], mine, rtol=1e-4, err_msg=field.name
        )


def test_a_frame_that_is_not_finite_is_invalid_and_leaves_its_neighbours_alone(shown):
    frames, state = shown
    spoilt = frames[:6].copy()
    spoilt[2, 3, 4, 1] = np.nan
    spoilt[4, 0, 0, 0] = np.inf
    reading = oracle.read(spoilt)
    np.testing.assert_array_equal(reading.valid, [True, True, False, True, False, True])
    np.testing.assert_array_equal(reading.mark[reading.valid], state["mark"][:6][reading.valid])


def test_no_frames_give_an_empty_reading():
    assert len(oracle.read(np.zeros((0, 32, 32, 3), np.float32))) == 0


@pytest.mark.parametrize("shape", [(32, 32, 3), (5, 32, 31, 3), (5, 32, 32, 4)])
def test_other_shapes_are_refused_by_name(shape):
    with pytest.raises(InputError, match="not of the stage"):
        oracle.read(np.zeros(shape, np.float32))


def test_three_thousand_frames_take_less_than_a_second_of_processor_time(shown):
    frames, _ = shown
    oracle.read(frames[:100])

    def seconds() -> float:
        start = time.process_time()
        oracle.read(frames)
        return time.process_time() - start

    assert len(frames) / min(seconds() for _ in range(3)) > 3000
