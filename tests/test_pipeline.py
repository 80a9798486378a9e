"""A model folder becomes video, block by block: the same whatever follows, compiled once, stopped when broken."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from packforcing_jax import pipeline, trees
from packforcing_jax.config import PROFILES
from packforcing_jax.errors import InputError, MachineError

RED, BLUE, LIME = "a red disc", "the blue figure walks", "lime square"


@pytest.fixture(scope="session")
def pipe(folder):
    return pipeline.Pipeline.from_pretrained(folder)


def latents(pipe, prompts, **how):
    return np.stack([block.latent for block in pipe.stream(prompts, **how)])


def test_a_folder_comes_back_as_it_was_saved(pipe):
    assert pipe.experiment == tiny.EXP
    saved, loaded = trees.flatten(tiny.nets()), trees.flatten(pipe.nets)
    assert saved.keys() == loaded.keys()
    for name, leaf in saved.items():
        np.testing.assert_array_equal(leaf, loaded[name], err_msg=name)


def test_blocks_say_what_they_are(pipe):
    blocks = list(pipe.stream([RED, RED, BLUE, BLUE, BLUE], seed=4))
    assert [block.index for block in blocks] == [0, 1, 2, 3, 4]
    assert [block.prompt for block in blocks] == [RED, RED, BLUE, BLUE, BLUE]
    assert all(block.frames.shape == (3, 16, 8, 3) and abs(block.frames).max() <= 1 for block in blocks)
    assert (blocks[1].chosen == -1).all()  # nothing is packed yet
    assert [set(block.chosen.ravel().tolist()) for block in blocks[3:]] == [{1, -1}, {1, 2}]


def test_a_longer_run_begins_with_the_shorter_one(pipe):
    """Bit for bit, and a changed later prompt leaves what came before alone."""
    long = latents(pipe, [RED] * 6 + [BLUE] * 5, seed=2)
    np.testing.assert_array_equal(long[:7], latents(pipe, [RED] * 6 + [BLUE], seed=2))
    other = latents(pipe, [RED] * 6 + [LIME] * 2, seed=2)
    np.testing.assert_array_equal(long[:6], other[:6])
    assert (long[6] != other[6]).any()


def test_two_prompts_in_two_orders_give_the_same_videos(pipe):
    there = [latents(pipe, [prompt] * 4) for prompt in (RED, BLUE)]
    back = [latents(pipe, [prompt] * 4) for prompt in (BLUE, RED)][::-1]
    np.testing.assert_array_equal(there, back)
    assert (there[0] != there[1]).any()


def test_noise_follows_the_seed_and_the_first_prompt_unless_told_otherwise(pipe):
    same = latents(pipe, [RED] * 2, seed=1, identity=pipeline.video_id(RED))
    np.testing.assert_array_equal(same, latents(pipe, [RED] * 2, seed=1))
    for changed in ({"seed": 2}, {"seed": 1, "identity": 77}):
        assert (latents(pipe, [RED] * 2, **changed) != same).any()
    assert pipeline.video_id("  a   red disc ") == pipeline.video_id(RED) != pipeline.video_id(BLUE)


def test_one_compilation_serves_every_block(pipe):
    """Warm-up, saturation of every partition, and changes of prompt."""
    jitted = (pipeline.draw_block, pipeline.remember_block, pipeline.read_prompt)
    latents(pipe, [RED] * 2)
    before = [function._cache_size() for function in jitted]
    latents(pipe, [RED] * 7 + [BLUE] * 7 + [LIME] * 6, seed=9)
    assert [function._cache_size() for function in jitted] == before


def test_a_state_can_be_kept_and_continued(pipe):
    def run(state, first, count):
        found = []
        for index in range(first, first + count):
            state, _, drawn = pipe.step(state, words, first=index == 0)
            found.append(np.asarray(drawn.latent))
        return state, found

    words = pipe.words([RED, BLUE])
    start = {"seed": 3, "videos": [5, 8]}
    _, whole = run(pipe.start(**start), 0, 7)
    half, first = run(pipe.start(**start), 0, 4)
    kept = jax.tree.map(np.asarray, half)
    _, second = run(jax.tree.map(jax.numpy.asarray, kept), 4, 3)
    np.testing.assert_array_equal(whole, first + second)


def test_videos_of_a_batch_do_not_meet(pipe):
    def drawn(prompts, videos):
        state, found = pipe.start(seed=3, videos=videos), []
        for index in range(5):
            state, _, block = pipe.step(state, pipe.words(prompts), first=index == 0)
            found.append(np.asarray(block.latent))
        return np.stack(found)

    pair = drawn([RED, BLUE], [5, 8])
    np.testing.assert_allclose(pair[:, ::-1], drawn([BLUE, RED], [8, 5]), atol=1e-5)
    np.testing.assert_allclose(pair[:, :1], drawn([RED], [5]), atol=1e-5)


def test_a_broken_model_stops_before_its_block_is_shown(pipe):
    nets = jax.tree.map(lambda leaf: leaf * np.nan, pipe.nets)
    with pytest.raises(MachineError, match="Frame 0 holds values that are not finite"):
        next(dataclasses.replace(pipe, nets=nets).stream([RED]))


def test_every_prompt_is_checked_before_the_first_block(pipe):
    for prompts, named in (([RED, "a purpel disc"], "purpel"), ([RED, " "], "empty"), ([], "at least one block")):
        with pytest.raises(InputError, match=named):
            pipe.stream(prompts)


def test_generate_is_the_stream_in_one_piece(pipe):
    whole = pipe.generate([RED, BLUE], seed=6)
    np.testing.assert_array_equal(whole, np.concatenate([b.frames for b in pipe.stream([RED, BLUE], seed=6)]))


def test_memory_profiles_are_names(pipe):
    assert pipe.with_memory("no-mid").experiment.cache == PROFILES["no-mid"]
    for wrong, remedy in (("papre", "did you mean paper"), ("qqq", "known: .*no-mid")):
        with pytest.raises(InputError, match=f"'{wrong}' is unknown; {remedy}"):
            pipe.with_memory(wrong)


def test_settings_change_the_experiment_and_keep_the_weights(pipe):
    changed = pipe.with_settings(["cache.top=1"])
    assert changed.experiment.cache.top == 1
    assert changed.nets is pipe.nets
    with pytest.raises(InputError, match="tpo"):
        pipe.with_settings(["cache.tpo=1"])


@pytest.mark.parametrize(("seconds", "blocks"), [(0.1, 1), (0.6, 1), (0.61, 2), (7.0, 12)])
def test_a_length_in_seconds_is_rounded_up_to_blocks(pipe, seconds, blocks):
    assert pipe.blocks_of(seconds) == blocks  # 3 frames a block, 5 a second


@pytest.mark.parametrize("seconds", [0, -2.0, float("nan"), float("inf")])
def test_a_length_that_is_none_is_refused(pipe, seconds):
    with pytest.raises(InputError, match="is not a length"):
        pipe.blocks_of(seconds)
