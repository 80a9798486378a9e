"""Every backend that runs here computes the same attention, and none replaces another unasked."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from packforcing_jax.errors import InputError
from packforcing_jax.memory import cache
from packforcing_jax.policies import attention

LENGTHS = [1, 5, 13]
HALF = {"cudnn"}  # backends that take half precision only


def inputs(name="reference", seed=0, keys=13, head=16):
    rng = np.random.default_rng(seed)
    shapes = ((2, 6, 3, head), (2, keys, 3, head), (2, keys, 3, head))
    dtype = jnp.bfloat16 if name in HALF else jnp.float32
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def exact(q, k, v, visible):
    """Attention in float64 over the keys where `visible` [q, k]."""
    q, k, v = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v))
    logits = np.where(visible, np.einsum("bqnh,bknh->bnqk", q, k) / np.sqrt(q.shape[-1]), -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnqk,bknh->bqnh", weights / weights.sum(-1, keepdims=True), v)


@functools.cache
def attend_with(name):
    return tiny.jit(attention.backend(name))


def close(mixed, expected, name):
    np.testing.assert_allclose(
        np.asarray(mixed, np.float32), expected, atol=2e-2 if name in HALF else 1e-6
    )


STATES = attention.working_backends()


@pytest.fixture(params=[name for name, said in STATES.items() if said == "ok"])
def name(request):
    return request.param


@pytest.mark.parametrize("length", LENGTHS)
def test_a_backend_attends_to_the_first_keys_only(name, length):
    q, k, v = inputs(name)
    mixed = attend_with(name)(q, k, v, jnp.int32(length))
    visible = np.tile(np.arange(13) < length, (6, 1))
    assert mixed.dtype == q.dtype
    close(mixed, exact(q, k, v, visible), name)


@pytest.mark.parametrize("length", LENGTHS[:-1])
def test_what_lies_behind_the_valid_keys_changes_no_bit(name, length):
    q, k, v = inputs(name)
    noise = [
        jnp.where(jnp.arange(13)[None, :, None, None] < length, x, 1e4 * y)
        for x, y in zip((k, v), inputs(name, seed=1)[1:])
    ]
    attention_fn = attend_with(name)
    np.testing.assert_array_equal(
        attention_fn(q, *noise, jnp.int32(length)), attention_fn(q, k, v, jnp.int32(length))
    )


def test_without_a_length_all_keys_are_valid(name):
    q, k, v = inputs(name)
    attention_fn = attend_with(name)
    np.testing.assert_allclose(
        np.asarray(attention_fn(q, k, v), np.float32),
        np.asarray(attention_fn(q, k, v, jnp.int32(13)), np.float32),
        atol=1e-6,
    )


def test_the_length_may_be_known_only_at_run_time(name):
    q, k, v = inputs(name)
    attention_fn = tiny.jit(lambda *inputs: attention.backend(name)(*inputs))
    outputs = [
        np.asarray(attention_fn(q, k, v, jnp.int32(length)), np.float32) for length in LENGTHS
    ]
    assert attention_fn._cache_size() == 1
    assert np.abs(outputs[0] - outputs[1]).max() > 0.1


def test_a_dense_mask_says_who_sees_whom(name):
    q, k, v = inputs(name)
    visible = np.random.default_rng(2).random((6, 13)) < 0.5
    visible[:, 4] = True  # nobody sees nothing
    mixed = attention.backend(name)(q, k, v, mask=jnp.asarray(visible))
    close(mixed, exact(q, k, v, visible), name)


def test_a_single_visible_key_is_copied():
    q, k, v = inputs()
    mixed = attention.reference(q, k, v, mask=jnp.arange(13)[None] == jnp.arange(6)[:, None])
    np.testing.assert_array_equal(mixed, v[:, :6])


def test_logits_beyond_what_exp_holds_are_harmless():
    q, k, v = inputs()
    mixed = attention.reference(1000 * q, k, v)
    best = jnp.einsum("bqnh,bknh->bqnk", q, k).argmax(-1)
    np.testing.assert_allclose(mixed, jnp.take_along_axis(v, best[..., None], axis=1), atol=1e-5)


def test_half_precision_keeps_a_float32_softmax():
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs(seed=3, keys=300))
    ones = attention.reference(q, k, jnp.ones_like(v))
    assert ones.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(ones, np.float32), 1, atol=1e-2)
    mixed = attention.reference(q, k, v)
    np.testing.assert_allclose(
        np.asarray(mixed, np.float32), exact(q, k, v, np.ones((6, 300), bool)), atol=5e-3
    )


def test_an_unknown_backend_is_refused_by_name():
    with pytest.raises(
        InputError, match=r"'flash' is unknown; choose one of auto, reference, xla, cudnn"
    ):
        attention.backend("flash")


def test_auto_is_the_default_of_this_machine():
    for dtype in (jnp.float32, jnp.bfloat16):
        assert attention.resolve("auto", dtype) == attention.default_backend(dtype)
        assert (
            attention.backend("auto", dtype)
            is attention.BACKENDS[attention.default_backend(dtype)[0]].attention_fn
        )
    assert attention.resolve("xla")[0] == "xla"


def test_the_table_is_what_backend_answers_from():
    for name, one in attention.BACKENDS.items():
        assert one.name == name
        assert attention.backend(name) is attention.backend(one) is one.attention_fn


def test_a_backend_of_ones_own_is_the_one_that_runs():
    """Of a block's self-attention and of what reads the text, in every layer."""
    calls = []

    def attention_fn(q, k, v, length=None, mask=None):
        calls.append((q.shape[1], k.shape[1]))
        return attention.reference(q, k, v, length, mask)

    own = dataclasses.replace(tiny.EXP, attention=attention.Backend("own", attention_fn))
    assert attention.resolve(own.attention) == ("own", "as the config says")
    memory = cache.init(own.memory, tiny.BATCH)
    noise = tiny.noise(own, 0)
    latent = tiny.denoise(tiny.apart(), own.step, memory, noise=noise, text=tiny.text())[1].latent
    assert set(calls) == {(24, own.memory.room), (24, own.dit.text_len)}
    as_is = dataclasses.replace(tiny.EXP, attention="reference")
    _, expected = tiny.denoise(tiny.apart(), as_is.step, memory, noise=noise, text=tiny.text())
    np.testing.assert_array_equal(latent, expected.latent)


def test_every_backend_is_reported_and_a_refusal_is_no_failure():
    assert set(STATES) == set(attention.BACKENDS)
    assert STATES["reference"] == STATES["xla"] == "ok"
    if jax.default_backend() == "cpu":
        assert STATES["cudnn"] != "ok"
        assert 0 < len(STATES["cudnn"]) <= 120
        assert "\n" not in STATES["cudnn"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_cpu_uses_the_reference_and_says_why(dtype, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    name, why = attention.default_backend(dtype)
    assert name == "reference"
    assert "cpu" in why
