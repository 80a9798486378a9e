import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from packforcing_jax.convert import rules, umt5
from safetensors import safe_open
from safetensors.numpy import load_file

from packforcing_jax import pytrees
from packforcing_jax.config import TextConfig
from packforcing_jax.errors import InputError
from packforcing_jax.networks import text

PATH = pathlib.Path(__file__).parent / "golden" / "umt5_tiny.safetensors"
GOLDEN = load_file(PATH)
WEIGHTS = {
    name.removeprefix("weights/"): value
    for name, value in GOLDEN.items()
    if name.startswith("weights/")
}
with safe_open(PATH, "np") as file:
    META = json.loads(file.metadata()["meta"])
CFG = umt5.config_from_original(META["config"])
SMALL = TextConfig(
    vocab=213, dim=60, dim_attn=84, dim_ffn=100, heads=3, layers=2, buckets=8, max_distance=20
)

encode = jax.jit(text.encode, static_argnames="zero_padding")


def shapes(cfg):
    model = jax.eval_shape(lambda: text.UMT5(cfg, nnx.Rngs(0)))
    return model, {name: leaf.shape for name, leaf in pytrees.flatten(model).items()}


def converted(tensors):
    model, wanted = shapes(CFG)
    return pytrees.fill(model, rules.convert(tensors, umt5.UMT5, wanted))


@pytest.fixture(scope="module")
def golden_model():
    return converted(WEIGHTS)


@pytest.fixture(scope="module")
def small():
    return jax.jit(lambda: text.UMT5(SMALL, nnx.Rngs(3)))()


def check(value, name):
    expected = GOLDEN[f"outputs/{name}"]
    np.testing.assert_allclose(
        value, expected, rtol=0, atol=5e-5 * np.abs(expected).max(), err_msg=name
    )


@pytest.mark.parametrize(
    ("name", "zero_padding"), [("hidden_padding_zeroed", True), ("hidden", False)]
)
def test_states_match_the_original(golden_model, name, zero_padding):
    check(
        encode(
            golden_model, GOLDEN["inputs/ids"], GOLDEN["inputs/mask"], zero_padding=zero_padding
        ),
        name,
    )


def test_long_texts_match_the_original(golden_model):
    ids = GOLDEN["inputs/long_ids"]
    check(encode(golden_model, ids, np.ones_like(ids), zero_padding=False), "long_hidden")


def test_buckets_match_the_original():
    table = text.buckets(201, META["config"]["num_buckets"], META["config"]["max_dist"])
    expected = GOLDEN["aux/bucket_table_offsets_-200_to_200"]
    np.testing.assert_array_equal(np.concatenate([table[200], table[0, 1:]]), expected)


def test_a_bucket_depends_on_the_offset_alone_and_saturates():
    table = text.buckets(40, SMALL.buckets, SMALL.max_distance)
    np.testing.assert_array_equal(table[1:, 1:], table[:-1, :-1])
    assert set(table.ravel()) == set(range(SMALL.buckets)) - {SMALL.buckets // 2}
    assert np.all(table[0, 20:] == SMALL.buckets - 1)
    assert np.all(table[20:, 0] == SMALL.buckets // 2 - 1)


def test_a_wrong_weight_shows(golden_model):
    flat = {name: jnp.asarray(value) for name, value in pytrees.flatten(golden_model).items()}
    for name in ("blocks/position/embedding", "blocks/ffn/gate/kernel", "blocks/norm2/scale"):
        other = pytrees.fill(golden_model, {**flat, name: flat[name].at[1].multiply(1.1)})
        states = encode(other, GOLDEN["inputs/ids"], GOLDEN["inputs/mask"])
        assert np.abs(states - GOLDEN["outputs/hidden_padding_zeroed"]).max() > 1e-3, name


def test_padding_changes_no_real_state(small):
    ids = jnp.array([[4, 9, 1, 0, 0, 0, 0], [7, 2, 5, 5, 3, 11, 1]])
    mask = jnp.array([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
    padded = encode(small, ids, mask)
    np.testing.assert_allclose(padded[:1, :3], encode(small, ids[:1, :3], mask[:1, :3]), atol=2e-6)
    poisoned = encode(small, ids.at[0, 3:].set(8), mask)
    np.testing.assert_array_equal(poisoned, padded)
    assert not np.any(padded[0, 3:])
    assert np.all(np.any(encode(small, ids, mask, zero_padding=False)[0, 3:] != 0, axis=-1))


def test_a_boolean_mask_and_an_integer_mask_are_the_same(small):
    ids = jnp.array([[4, 9, 1, 0, 0]])
    mask = jnp.array([[1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(encode(small, ids, mask), encode(small, ids, mask.astype(bool)))


def test_order_matters_only_through_the_position_bias(small):
    ids = jnp.array([[4, 9, 2, 7, 3]])
    mask = jnp.ones((1, 5), int)
    swapped = encode(small, ids[:, ::-1], mask)[:, ::-1]
    assert jnp.abs(swapped - encode(small, ids, mask)).max() > 1e-2
    flat = pytrees.flatten(small)
    name = "blocks/position/embedding"
    blind = pytrees.fill(small, {**flat, name: jnp.zeros_like(flat[name])})
    np.testing.assert_allclose(
        encode(blind, ids[:, ::-1], mask)[:, ::-1], encode(blind, ids, mask), atol=5e-6
    )


def test_the_scan_over_layers_equals_a_python_loop(small):
    ids = jnp.array([[4, 9, 2, 7, 3, 1]])
    mask = jnp.ones(ids.shape, bool)
    bucket = jnp.asarray(text.buckets(6, SMALL.buckets, SMALL.max_distance))
    x = small.embedding(ids)
    for index in range(SMALL.layers):
        x = jax.tree.map(lambda leaf, index=index: leaf[index], small.blocks)(x, bucket, mask)
    np.testing.assert_allclose(encode(small, ids, mask), small.norm(x), atol=1e-5)


def test_an_id_beyond_the_vocabulary_is_not_read_as_another_word(small):
    states = encode(small, jnp.array([[4, SMALL.vocab, 1]]), jnp.ones((1, 3), int))
    assert np.all(np.isnan(states))


def test_a_text_without_words_stays_finite(small):
    states = encode(small, jnp.zeros((2, 4), int), jnp.zeros((2, 4), int), zero_padding=False)
    assert np.all(np.isfinite(states))


def test_half_precision_weights_give_half_precision_states_close_to_exact_ones(small):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small)
    ids = jnp.array([[4, 9, 2, 7, 1, 0]])
    mask = jnp.array([[1, 1, 1, 1, 1, 0]])
    states = encode(half, ids, mask)
    assert states.dtype == jnp.bfloat16
    np.testing.assert_allclose(states.astype(jnp.float32), encode(small, ids, mask), atol=0.15)


def test_initial_weights_have_the_spread_of_t5(small):
    flat = pytrees.flatten(small)
    expected = {
        "embedding/embedding": 1.0,
        "blocks/attn/q/kernel": (60 * 28) ** -0.5,
        "blocks/attn/k/kernel": 60**-0.5,
        "blocks/attn/v/kernel": 60**-0.5,
        "blocks/attn/o/kernel": 84**-0.5,
        "blocks/ffn/gate/kernel": 60**-0.5,
        "blocks/ffn/fc1/kernel": 60**-0.5,
        "blocks/ffn/fc2/kernel": 100**-0.5,
    }
    for name, std in expected.items():
        assert np.std(flat[name]) == pytest.approx(std, rel=0.05), name
    layers = flat["blocks/attn/q/kernel"]
    assert jnp.abs(layers[0] - layers[1]).max() > 0.01
    assert {leaf.dtype for leaf in flat.values()} == {jnp.dtype(jnp.float32)}


def test_a_small_encoder_learns_to_tell_order(small):
    """Whether token 3 stands before token 4 cannot be read off the set of tokens."""
    ids = jnp.array(
        [[3, 4, 7, 1], [4, 3, 7, 1], [7, 3, 4, 1], [4, 7, 3, 1], [3, 7, 4, 1], [7, 4, 3, 1]]
    )
    labels = jnp.array([0, 1, 0, 1, 0, 1])
    mask = jnp.ones_like(ids)
    optimiser = optax.adam(1e-3)

    def loss(model):
        logits = text.encode(model, ids, mask)[:, -1, :2]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def train(model, state):
        def body(carry, _):
            value, grads = jax.value_and_grad(loss)(carry[0])
            updates, state = optimiser.update(grads, carry[1])
            return (optax.apply_updates(carry[0], updates), state), value

        return jax.lax.scan(body, (model, state), length=120)[1]

    values = train(small, optimiser.init(small))
    assert values[0] > 0.3
    assert values[-1] < 0.05


def test_ids_and_mask_must_belong_together(small):
    with pytest.raises(InputError, match="mask"):
        text.encode(small, jnp.zeros((2, 5), int), jnp.zeros((2, 4), int))


def test_the_table_goes_there_and_back():
    flat = rules.convert(WEIGHTS, umt5.UMT5, shapes(CFG)[1])
    back = rules.invert(flat, umt5.UMT5, {name: value.shape for name, value in WEIGHTS.items()})
    assert set(back) == set(WEIGHTS)
    for name, value in WEIGHTS.items():
        np.testing.assert_array_equal(back[name], value)


def test_transformers_names_are_the_known_ones():
    expected = META["checks"]["name_map_wan_to_transformers"]
    theirs = rules.rename(WEIGHTS, [(b, a) for a, b in umt5.UMT5_TRANSFORMERS.items()])
    assert set(theirs) == set(expected.values())
    for original, name in expected.items():
        np.testing.assert_array_equal(theirs[name], WEIGHTS[original])
    back = rules.rename(theirs, umt5.UMT5_TRANSFORMERS.items())
    assert set(back) == set(WEIGHTS)


def test_every_tensor_is_needed_and_nothing_else_is_taken():
    missing = {name: value for name, value in WEIGHTS.items() if name != "blocks.1.ffn.fc1.weight"}
    with pytest.raises(InputError, match="blocks/ffn/fc1/kernel of layers"):
        converted(missing)
    with pytest.raises(InputError, match=r"blocks\.0\.attn\.q\.bias"):
        converted({**WEIGHTS, "blocks.0.attn.q.bias": np.zeros(3, np.float32)})


def test_both_configs_describe_the_published_encoder():
    published = {
        "vocab_size": 256384,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_heads": 64,
        "num_layers": 24,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
    }
    assert umt5.config_from_transformers(published) == TextConfig()
    sizes = shapes(TextConfig())[1]
    assert sum(int(np.prod(shape)) for shape in sizes.values()) == 5_680_910_336
    with pytest.raises(InputError, match="shared_pos"):
        umt5.config_from_original({**META["config"], "shared_pos": True})
    with pytest.raises(InputError, match="model_type='t5'"):
        umt5.config_from_transformers({**published, "model_type": "t5"})
