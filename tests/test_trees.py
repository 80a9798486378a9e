"""A module is a flat dictionary of named arrays, and one that does not fit is told all that is wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from packforcing_jax import pytrees
from packforcing_jax.errors import InputError
from packforcing_jax.networks import compressor


class Layer(nnx.Module):
    def __init__(self, size, rngs):
        self.dense = nnx.Linear(size, 3, rngs=rngs)
        self.scale = nnx.Param(jnp.arange(2.0))
        self.size = size  # not an array


class Net(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([Layer(2, nnx.Rngs(0)), Layer(5, nnx.Rngs(1))])
        self.table = nnx.Param(jnp.ones((4, 2), jnp.bfloat16))


SHAPES = {
    "layers/0/dense/bias": (3,),
    "layers/0/dense/kernel": (2, 3),
    "layers/0/scale": (2,),
    "layers/1/dense/bias": (3,),
    "layers/1/dense/kernel": (5, 3),
    "layers/1/scale": (2,),
    "table": (4, 2),
}


def numbered(module):
    """Other values for every leaf, each different."""
    return {
        name: np.arange(leaf.size, dtype=np.float32).reshape(leaf.shape) + 10 * i
        for i, (name, leaf) in enumerate(pytrees.flatten(module).items())
    }


def test_leaves_are_named_by_where_they_stand():
    assert {name: leaf.shape for name, leaf in pytrees.flatten(Net()).items()} == SHAPES


def test_shapes_have_the_names_of_arrays():
    assert {
        name: leaf.shape for name, leaf in pytrees.flatten(jax.eval_shape(Net)).items()
    } == SHAPES


def test_stacked_blocks_have_one_name_and_a_leading_axis():
    flat = pytrees.flatten(tiny.fresh())
    assert flat["dit/blocks/attn/q/kernel"].shape == (2, 36, 36)
    assert flat["dit/blocks/modulation"].shape == (2, 6, 36)
    assert flat["compressor/convs/0/kernel"].shape == (3, 3, 3, 12, 5)


def test_blocks_apart_have_a_name_each_and_no_leading_axis():
    flat = pytrees.flatten(tiny.apart())
    assert {flat[f"dit/blocks/{layer}/attn/q/kernel"].shape for layer in range(2)} == {(36, 36)}
    assert "dit/blocks/attn/q/kernel" not in flat


@pytest.mark.parametrize("build", [Net, lambda: jax.eval_shape(Net)], ids=["arrays", "shapes"])
def test_filled_modules_hold_what_they_were_given(build):
    flat = numbered(Net())
    filled = pytrees.fill(build(), flat)
    assert isinstance(filled, Net)
    assert filled.layers[1].size == 5
    for name, leaf in pytrees.flatten(filled).items():
        np.testing.assert_array_equal(leaf, flat[name].astype(leaf.dtype), err_msg=name)
    assert filled.table[...].dtype == jnp.bfloat16
    np.testing.assert_array_equal(filled.layers[0].scale[...], flat["layers/0/scale"])


def test_filling_leaves_the_module_alone():
    net = Net()
    before = pytrees.flatten(net)
    pytrees.fill(net, numbered(net))
    for name, leaf in pytrees.flatten(net).items():
        np.testing.assert_array_equal(leaf, before[name], err_msg=name)


def test_a_filled_module_computes_with_its_new_values():
    shapes = jax.eval_shape(lambda: compressor.build(tiny.EXP.step, nnx.Rngs(0)))
    filled = pytrees.fill(shapes, pytrees.flatten(tiny.nets().compressor))
    latent = tiny.normal(0, 1, 4, 8, 4, 12)
    np.testing.assert_array_equal(
        tiny.jit(filled)(latent), tiny.jit(tiny.nets().compressor)(latent)
    )


# One entry per layer --------------------------------------------------------------------------------------------------


def entries():
    """Three layers' dictionaries, no two numbers alike."""
    return [{"a": jnp.arange(4.0) + 10 * i, "b": jnp.full((2, 1), 100.0 * i)} for i in range(3)]


def both_forms():
    return [entries(), pytrees.stack(entries())]


def as_list(layers):
    return layers if isinstance(layers, list) else pytrees.unstack(layers, 3)


def test_stacking_and_taking_apart_undo_each_other():
    stacked = pytrees.stack(entries())
    assert jax.tree.map(jnp.shape, stacked) == {"a": (3, 4), "b": (3, 2, 1)}
    jax.tree.map(np.testing.assert_array_equal, pytrees.unstack(stacked, 3), entries())
    jax.tree.map(np.testing.assert_array_equal, pytrees.stack(stacked), stacked)  # it is already


@pytest.mark.parametrize("form", [0, 1], ids=["list", "stacked"])
def test_a_function_is_asked_once_per_layer_and_answers_in_the_form_it_was_asked(form):
    layers = both_forms()[form]
    shifts = [jnp.arange(3.0)[i] for i in range(3)]
    shifts = shifts if form == 0 else pytrees.stack(shifts)
    sums = pytrees.over(
        lambda layer, shift: layer["a"].sum() - layer["b"].sum() + shift, layers, shifts
    )
    assert isinstance(sums, list) == (form == 0)
    np.testing.assert_array_equal(pytrees.stack(sums), [6, 46 - 200 + 1, 86 - 400 + 2])


@pytest.mark.parametrize("form", [0, 1], ids=["list", "stacked"])
def test_nothing_is_nothing_for_every_layer(form):
    layers = both_forms()[form]
    asked = []
    pytrees.over(lambda layer, other: asked.append(other) or layer, layers, None)
    assert set(asked) == {None}


@pytest.mark.parametrize("form", [0, 1], ids=["list", "stacked"])
def test_pairs_come_apart_and_together(form):
    layers = both_forms()[form]
    pairs = pytrees.over(lambda layer: (layer["a"], layer["b"]), layers)
    first, second = pytrees.unzip(pairs)
    for i, (a, b, entry) in enumerate(zip(as_list(first), as_list(second), entries(), strict=True)):
        np.testing.assert_array_equal(a, entry["a"], err_msg=str(i))
        np.testing.assert_array_equal(b, entry["b"], err_msg=str(i))
    again = pytrees.zipped(first, second)
    jax.tree.map(np.testing.assert_array_equal, again, pairs)


def test_layers_that_do_not_match_in_number_are_noticed():
    with pytest.raises(ValueError, match="shorter"):
        pytrees.zipped(entries(), entries()[:2])


def test_every_mismatch_is_told_at_once():
    flat = numbered(Net())
    del flat["layers/0/dense/bias"]
    flat["layers/1/scale"] = np.zeros(7, np.float32)
    flat["head"] = np.zeros(1, np.float32)
    with pytest.raises(InputError) as caught:
        pytrees.fill(Net(), flat, "a.safetensors")
    said = str(caught.value)
    assert said.startswith("a.safetensors do not fit the model (3 tensors: ")
    for part in (
        "layers/0/dense/bias: missing",
        "layers/1/scale: shape (7,), expected (2,)",
        "head: not part",
    ):
        assert part in said


def test_a_long_list_of_mismatches_is_cut():
    strangers = {f"stranger{i}": np.zeros(1, np.float32) for i in range(5)}
    with pytest.raises(InputError, match=r"\(12 tensors: .*; and 4 more\)"):
        pytrees.fill(Net(), strangers)
