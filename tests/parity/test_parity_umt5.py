"""The text encoder against that of transformers: the same weights, converted through the project's own tables."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
import twins
from packforcing_jax.convert import umt5

from packforcing_jax.networks import text
from packforcing_jax.verify import parts

pytestmark = pytest.mark.parity

TOLERANCE = 5e-5
ENCODE = twins.jit(text.encode, static_argnames="zero_padding")

SIZES = {  # arguments of transformers' configuration
    "as in Wan": dict(vocab_size=97, d_model=36, d_kv=10, d_ff=50, num_layers=3, num_heads=3),
    "narrow": dict(vocab_size=61, d_model=26, d_kv=7, d_ff=31, num_layers=2, num_heads=5,
                   relative_attention_num_buckets=20, relative_attention_max_distance=37),
}  # fmt: skip
LENGTHS = (13, 1, 29, 22)  # words of the prompts, padded to the longest and some more
PADDED = 31
LONG = 300  # words: more than the bias tells apart


class Twins(NamedTuple):
    """The same encoder twice."""

    theirs: Any
    ours: text.UMT5

    def expected(self, ids, mask):
        return twins.called(lambda *args: self.theirs(*args).last_hidden_state, ids, mask)


@functools.cache
def twin(name, seed, **gains):
    from transformers import UMT5Config, UMT5EncoderModel

    theirs = twins.randomized(UMT5EncoderModel(UMT5Config(**SIZES[name])), seed, **gains)
    cfg = umt5.config_from_transformers(theirs.config.to_dict())
    return Twins(
        theirs, parts.load(text.UMT5, cfg, umt5.original_names(twins.arrays(theirs)), umt5.UMT5)
    )


def prompts(name, lengths, words, seed=0):
    """Random token ids [b, words] with 0 behind each prompt's length, and the mask of the real ones."""
    ids = np.random.default_rng(seed).integers(1, SIZES[name]["vocab_size"], (len(lengths), words))
    mask = np.arange(words)[None] < np.array(lengths)[:, None]
    return ids * mask, mask.astype(np.int64)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", SIZES)
def test_padded_prompts_agree(name, seed):
    pair = twin(name, seed)
    ids, mask = prompts(name, LENGTHS, PADDED, seed)
    expected = pair.expected(ids, mask)
    assert twins.error(ENCODE(pair.ours, ids, mask, zero_padding=False), expected) <= TOLERANCE
    assert twins.error(ENCODE(pair.ours, ids, mask), expected * mask[..., None]) <= TOLERANCE


@pytest.mark.parametrize("name", SIZES)
def test_long_prompts_agree(name):
    pair = twin(name, 2)
    ids, mask = prompts(name, (LONG, LONG - 41), LONG)
    expected = pair.expected(ids, mask)
    assert twins.error(ENCODE(pair.ours, ids, mask, zero_padding=False), expected) <= TOLERANCE


def test_faint_activations_agree():
    """Words so small that the norms' epsilon counts."""
    pair = twin("narrow", 3, shared=2e-3, embed_tokens=2e-3)
    ids, mask = prompts("narrow", LENGTHS, PADDED)
    assert (
        twins.error(ENCODE(pair.ours, ids, mask, zero_padding=False), pair.expected(ids, mask))
        <= TOLERANCE
    )


@pytest.mark.parametrize("name", SIZES)
def test_the_same_distances_share_a_bias(name):
    pair = twin(name, 0)
    theirs = pair.theirs.encoder.block[0].layer[0].SelfAttention._relative_position_bucket
    relative = np.arange(600)[None, :] - np.arange(600)[:, None]
    cfg = pair.ours.cfg
    np.testing.assert_array_equal(
        text.buckets(600, cfg.buckets, cfg.max_distance), twins.called(theirs, relative)
    )


def test_every_tensor_counts():
    """The comparison can fail: it notices a change of 2 % in any one tensor."""
    pair = twin("as in Wan", 1)
    ids, mask = prompts("as in Wan", LENGTHS, PADDED)
    passed = twins.unnoticed(
        pair.ours,
        lambda model: ENCODE(model, jnp.asarray(ids), jnp.asarray(mask)),
        pair.expected(ids, mask) * mask[..., None],
        tolerance=TOLERANCE,
    )
    assert passed == []
