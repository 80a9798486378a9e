"""The guard against drift: what drifts is told within two windows, and what does not, in 480 frames, is not."""

import dataclasses
import json

import numpy as np
import pytest

from packforcing_jax.errors import InputError
from packforcing_jax.io.video import to_uint8
from packforcing_jax.sampling import drift
from packforcing_jax.stage import world

WINDOW = 20


def video(seed, blocks=120):
    """A story of the Stage world under one prompt, as uint8 frames of each block."""
    story = world.draw_story(np.random.default_rng(seed), blocks)
    one = dataclasses.replace(
        story,
        scenes=np.full_like(story.scenes, story.scenes[0]),
        guests=np.full_like(story.guests, -1),
    )
    frames = to_uint8(world.render(one))
    return frames.reshape(blocks, world.BLOCK, *frames.shape[1:])


def told(blocks, prompts=None, bounds=drift.Bounds()):
    """(block, what) of all that the guard says."""
    guard = drift.Guard(WINDOW)
    said = []
    for index, block in enumerate(blocks):
        prompt = prompts[index] if prompts else "a prompt"
        guard, drifted = drift.watch(guard, block, prompt, bounds)
        said += [(index, each.what) for each in drifted]
    return said


def faded(block, share):
    """Drawn towards a middle grey."""
    return np.uint8(block * (1 - share) + 128 * share)


def blurred(block, share):
    """Mixed with the mean of its neighbours."""
    padded = np.pad(block.astype(float), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    around = sum(
        padded[:, y : y + block.shape[1], x : x + block.shape[2]]
        for y in range(3)
        for x in range(3)
    )
    return np.uint8(block * (1 - share) + around / 9 * share)


@pytest.mark.parametrize("seed", range(6))
def test_what_does_not_drift_is_not_told(seed):
    assert told(video(seed)) == []


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("plant", "what"), [(faded, "colour"), (blurred, "sharpness")])
def test_a_drift_that_grows_is_told_within_two_windows(seed, plant, what):
    blocks = video(seed, 60)
    start = 25  # the border of a window
    drifting = [
        plant(block, min(1.0, max(0, at + 1 - start) / 10)) for at, block in enumerate(blocks)
    ]
    said = told(drifting)
    assert said
    assert min(block for block, _ in said) >= start
    assert min(block for block, kind in said if kind == what) < start + 10  # two windows of five


@pytest.mark.parametrize("start", [25, 27])
def test_a_standstill_is_told_within_two_windows(start):
    blocks = video(1, 60)
    frozen = [
        block if at < start else np.repeat(blocks[start][:1], len(block), 0)
        for at, block in enumerate(blocks)
    ]
    said = [block for block, what in told(frozen) if what == "freeze"]
    assert said
    assert start <= said[0] < start + 10


def test_a_picture_that_turns_flat_has_drifted():
    blocks = video(2, 20)
    flat = [block if at < 10 else np.full_like(block, 40) for at, block in enumerate(blocks)]
    assert {(14, "colour"), (14, "sharpness"), (14, "freeze")} <= set(told(flat))


def test_a_new_prompt_begins_anew():
    blocks = np.concatenate([video(3, 15), video(4, 15)])
    prompts = ["one"] * 15 + ["two"] * 15
    assert told(blocks, prompts) == []
    assert told(blocks) != []


def test_a_guard_goes_on_from_its_json():
    blocks = [faded(block, at / 40) for at, block in enumerate(video(5, 40))]
    guard = kept = drift.Guard(7)
    for block in blocks:
        guard, said = drift.watch(guard, block, "a")
        again = drift.guard_of(json.loads(json.dumps(kept.to_json())), 7)
        kept, said_again = drift.watch(again, block, "a")
        assert (kept, said_again) == (guard, said)


def test_cells_cover_every_pixel_of_awkward_sizes():
    for height, width in [(5, 7), (16, 16), (17, 33), (31, 3)]:
        first = np.zeros((height, width), np.float32)
        for y, x in [(0, 0), (height - 1, width - 1), (height // 2, width // 3)]:
            second = first.copy()
            second[y, x] = 255
            assert drift.change(first, second) > 255 / (2 * -(-height // 16) * 2 * -(-width // 16))
        assert drift.change(first, first + 3) == pytest.approx(3)


def test_fading_alone_leaves_sharpness_as_it_is():
    frame = video(0, 1)[0][0].astype(np.float32) @ drift.LUMINANCE
    assert drift.sharpness(frame * 0.3 + 50) == pytest.approx(drift.sharpness(frame), rel=1e-4)


def test_frames_that_are_no_bytes_are_refused():
    with pytest.raises(InputError, match="uint8"):
        drift.watch(drift.Guard(5), np.zeros((4, 8, 8, 3), np.float32), "a")
