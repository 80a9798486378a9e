"""A batch is the data block by block: latents as given or encoded here, and text that each block reads by itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from packforcing_jax import pytrees
from packforcing_jax.errors import InputError
from packforcing_jax.networks import codec, text
from packforcing_jax.training import batches
from packforcing_jax.training.batches import Model, TokenizedText

EXP = tiny.EXP
BLOCKS = 4
SIZE = EXP.cache.block
PIXELS = codec.make(EXP.codec, nnx.Rngs(0))
READER = tiny.filled(jax.eval_shape(lambda: text.UMT5(EXP.text, nnx.Rngs(0))))
MODEL = Model(dit=tiny.nets().dit, compressor=tiny.nets().compressor, text=READER)
encode = tiny.jit(lambda raw: batches.encode(EXP, PIXELS, raw))
text_states = tiny.jit(batches.text_states)


def pixels():
    """A batch as the Stage world gives it, with frames of 16 by 8 pixels."""
    rng = np.random.default_rng(1)
    return {
        "video": rng.uniform(-1, 1, (2, BLOCKS * SIZE, 16, 8, 3)).astype(np.float32),
        "weight": rng.uniform(0.5, 2, (2, BLOCKS, SIZE, 16, 8)).astype(np.float32),
        "ids": rng.integers(3, 46, (2, BLOCKS, 7)).astype(np.int32),
        "mask": (np.arange(7) < rng.integers(2, 8, (2, BLOCKS, 1))).astype(np.int32),
        "called": rng.random((2, BLOCKS, 5, BLOCKS)) < 0.5,
    }


def latents():
    """A batch as records give it, in half precision."""
    rng = np.random.default_rng(2)
    return {
        "latent": rng.normal(size=(5, BLOCKS * SIZE, 8, 4, 12)).astype(np.float16),
        "low_res": rng.normal(size=(5, BLOCKS, 2, 4, 4, 12)).astype(np.float16),
        "trajectory": rng.normal(size=(5, 6, BLOCKS * SIZE, 8, 4, 12)).astype(np.float16),
        "states": rng.normal(size=(5, 9, 10)).astype(np.float16),
    }


# data -----------------------------------------------------------------------------------------------------------------


def test_pixels_are_encoded_block_by_block():
    raw = pixels()
    batch = encode(raw)
    assert batch.latent.shape == (BLOCKS, 2, SIZE, 8, 4, 12)
    np.testing.assert_allclose(
        codec.decode(PIXELS, batch.latent[2]), raw["video"][:, 6:9], atol=1e-6
    )
    np.testing.assert_array_equal(batch.text.ids[3], raw["ids"][:, 3])
    np.testing.assert_array_equal(batch.text.mask[3], raw["mask"][:, 3])
    np.testing.assert_array_equal(batch.called[3], raw["called"][:, 3])
    assert batch.called.dtype == bool
    assert batch.trajectory is None


def test_pixels_are_seen_in_low_resolution():
    """Three frames are the pairs (first, first) and (second, third); rows are halved, columns stay."""
    raw = pixels()
    frames = raw["video"][:, 6:9][:, [0, 0, 1, 2]]
    expected = frames.reshape(2, 2, 2, 8, 2, 8, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(codec.decode(PIXELS, encode(raw).low_res[2]), expected, atol=1e-6)


def test_weights_are_averaged_over_the_pixels_of_a_latent_cell():
    raw = pixels()
    cells = raw["weight"][:, 1].reshape(2, SIZE, 8, 2, 4, 2).mean(axis=(3, 5))
    np.testing.assert_allclose(encode(raw).weight[1, ..., 0], cells, rtol=1e-6)


def test_latents_are_taken_as_they_are_in_float32():
    raw = latents()
    batch = encode(raw)
    assert {leaf.dtype for leaf in jax.tree.leaves(batch)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(batch.latent[3], raw["latent"][:, 9:12])
    np.testing.assert_array_equal(batch.low_res[3], raw["low_res"][:, 3])
    assert batch.trajectory.shape == (6, BLOCKS, 5, SIZE, 8, 4, 12)
    np.testing.assert_array_equal(batch.trajectory[4, 1], raw["trajectory"][:, 4, 3:6])
    assert batch.text.shape == (1, 5, 9, 10)  # one prompt for all blocks
    np.testing.assert_array_equal(batch.text[0], raw["states"])
    assert batch.weight is None
    assert batch.called is None


def test_blocks_of_clips_and_back():
    blocks = np.random.default_rng(3).normal(size=(4, 2, 3, 5, 6, 7))
    clips = batches.by_clip(blocks)
    np.testing.assert_array_equal(clips[1, 7], blocks[2, 1, 1])
    np.testing.assert_array_equal(batches.by_block(clips, 3), blocks)


def test_what_there_is_once_is_there_for_every_block():
    each = jnp.arange(12.0).reshape(4, 3)
    once = jnp.arange(3.0).reshape(1, 3)
    of_block = jax.jit(batches.of_block)
    for block in range(4):
        told = of_block({"each": each, "once": once}, jnp.int32(block))
        np.testing.assert_array_equal(told["each"], each[block])
        np.testing.assert_array_equal(told["once"], once[0])


# text -----------------------------------------------------------------------------------------------------------------


def words():
    raw = pixels()
    return TokenizedText(
        ids=jnp.asarray(raw["ids"]).swapaxes(0, 1), mask=jnp.asarray(raw["mask"]).swapaxes(0, 1)
    )


def test_every_block_is_read_by_itself():
    given = words()
    states = text_states(MODEL, given)
    assert states.shape == (BLOCKS, 2, 7, 10)
    alone = tiny.jit(text.encode)(READER, given.ids[2], given.mask[2])
    np.testing.assert_allclose(states[2], alone, atol=1e-5)
    assert not np.asarray(states)[np.asarray(given.mask) == 0].any()


def test_padding_words_do_not_count():
    given = words()
    other = dataclasses.replace(given, ids=jnp.where(given.mask == 1, given.ids, 7))
    np.testing.assert_array_equal(text_states(MODEL, other), text_states(MODEL, given))


def test_states_of_the_text_need_no_reader():
    states = tiny.normal(3, 1, 2, 9, 10)
    assert batches.text_states(dataclasses.replace(MODEL, text=None), states) is states


def test_keys_and_values_of_the_text_are_those_of_each_block():
    states = tiny.normal(3, 3, 2, 9, 10)
    kv = tiny.jit(batches.text_kv)(MODEL.dit, states)
    assert kv.k.shape == (3, EXP.dit.layers, 2, EXP.dit.text_len, 3, 12)
    alone = tiny.text_kv(MODEL.dit, states[1])
    np.testing.assert_allclose(kv.k[1], alone.k, atol=1e-5)
    np.testing.assert_allclose(kv.v[1], alone.v, atol=1e-5)


def test_hidden_text_is_nothing():
    states = tiny.normal(3, 2, 4, 6, 10)
    chosen = jnp.asarray([True, False, False, True])
    hidden = batches.without_text(states, None, chosen)
    np.testing.assert_array_equal(hidden[:, [1, 2]], states[:, [1, 2]])
    assert not np.asarray(hidden)[:, [0, 3]].any()
    assert not np.asarray(batches.without_text(states, None)).any()


def test_hidden_text_is_the_negative_prompt_where_there_is_one():
    states = tiny.normal(3, 2, 4, 6, 10)
    negative = tiny.normal(4, 5, 10)
    hidden = np.asarray(
        batches.without_text(states, negative, jnp.asarray([True, False, True, True]))
    )
    np.testing.assert_array_equal(hidden[:, 1], states[:, 1])
    for clip in (0, 2, 3):
        for block in range(2):
            np.testing.assert_array_equal(hidden[block, clip, :5], negative)
    assert not hidden[:, [0, 2, 3], 5].any()  # padded as the data's text is


def test_a_negative_prompt_longer_than_the_datas_text_is_refused():
    with pytest.raises(
        InputError, match="train.negative_prompt has 7 words, but the data's text holds 6"
    ):
        batches.without_text(tiny.normal(3, 2, 4, 6, 10), tiny.normal(4, 7, 10))


# networks -------------------------------------------------------------------------------------------------------------


def test_parameters_become_the_modules_they_came_from():
    flat = pytrees.flatten(MODEL)
    assert {path.split("/")[0] for path in flat} == {"dit", "compressor", "text"}
    again = pytrees.flatten(batches.as_model(EXP, flat))
    assert again.keys() == flat.keys()
    assert all(again[path] is leaf for path, leaf in flat.items())


def test_a_model_without_a_reader_has_none():
    flat = {
        path: leaf for path, leaf in pytrees.flatten(MODEL).items() if not path.startswith("text/")
    }
    model = batches.as_model(EXP, flat)
    assert model.text is None
    assert pytrees.flatten(model).keys() == flat.keys()


def test_a_transformer_is_the_part_under_dit():
    alone = pytrees.flatten(batches.as_transformer(EXP.dit, pytrees.flatten(MODEL)))
    assert alone.keys() == pytrees.flatten(MODEL.dit).keys()
    np.testing.assert_array_equal(alone["patch/kernel"], MODEL.dit.patch.kernel[...])
