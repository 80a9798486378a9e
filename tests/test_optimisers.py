"""Rates rise, stay and fall; every group of parameters moves by its own optimiser, and nothing else moves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from packforcing_jax import pytrees
from packforcing_jax.config import DistilConfig, OptimiserConfig, TrainConfig
from packforcing_jax.training import batches, optimisers

SHAPES = pytrees.flatten(jax.eval_shape(lambda: batches.new_model(tiny.EXP, jax.random.key(0))))


# rates ----------------------------------------------------------------------------------------------------------------


def shares(steps, updates, **settings):
    return (
        np.asarray(optimisers.rates(OptimiserConfig(**settings), 3.0, updates)(np.array(steps))) / 3
    )


def test_rates_rise_stay_and_fall_to_two_percent():
    np.testing.assert_allclose(
        shares([0, 5, 10, 40, 60, 80, 100, 130], 100, warmup=10, cooldown=0.4),
        [0, 0.5, 1, 1, 1, 0.51, 0.02, 0.02],
        rtol=1e-5,
    )


def test_a_group_that_starts_late_stands_still_before():
    np.testing.assert_allclose(
        shares([0, 6, 7, 12, 17, 60, 80, 100], 100, delay=7, warmup=10, cooldown=0.4),
        [0, 0, 0, 0.5, 1, 1, 0.51, 0.02],
        rtol=1e-5,
    )
    np.testing.assert_array_equal(shares([0, 4, 5, 6], 20, delay=5), [0, 0, 1, 1])


def test_without_warm_up_and_cooldown_the_rate_is_the_peak_throughout():
    np.testing.assert_array_equal(shares(range(51), 50), np.ones(51))


def test_a_run_shorter_than_its_warm_up_keeps_rising():
    np.testing.assert_allclose(shares([0, 10, 20], 20, warmup=50), [0, 0.2, 0.4], rtol=1e-6)


# what goes where ------------------------------------------------------------------------------------------------------


def test_matrices_go_to_muon_layer_by_layer_and_the_rest_to_adam():
    for path, leaf in SHAPES.items():
        axes = optimisers.matrix_axes(path, leaf)
        if path.rsplit("/", 1)[1] != "kernel":
            assert axes is None, path
        elif "/blocks/" in path:
            assert leaf.shape[0] in (tiny.EXP.dit.layers, tiny.EXP.text.layers)
            assert (axes.reduction_axis, axes.output_axis) == ((1,), 2), path
        elif "convs" in path:
            assert (axes.reduction_axis, axes.output_axis) == ((0, 1, 2, 3), 4), path
        else:
            assert (axes.reduction_axis, axes.output_axis) == ((0,), 1), path


def test_both_kinds_of_update_have_work():
    names = {
        path.rsplit("/", 1)[1]
        for path, leaf in SHAPES.items()
        if optimisers.matrix_axes(path, leaf) is None
    }
    assert names == {"bias", "scale", "modulation", "head_modulation", "embedding"}
    matrices = {path for path, leaf in SHAPES.items() if optimisers.matrix_axes(path, leaf)}
    for part in ("dit/blocks/attn/q", "dit/patch", "compressor/convs/0", "text/blocks/ffn/gate"):
        assert f"{part}/kernel" in matrices


PARAMS = {
    "generator": {"dit/a": 1, "dit/b": 2, "compressor/a": 3, "text/a": 4},
    "critic": {"dit/a": 5},
}


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        (
            ("dit", "compressor"),
            {"generator": {"dit/a": 1, "dit/b": 2}, "compressor": {"compressor/a": 3}},
        ),
        (("dit", "text"), {"generator": {"dit/a": 1, "dit/b": 2, "text/a": 4}}),
        (("compressor",), {"compressor": {"compressor/a": 3}}),
    ],
)
def test_what_is_trained_is_what_moves_the_compressor_apart(trained, expected):
    cfg = TrainConfig(trainable=trained)
    assert optimisers.groups(cfg, PARAMS) == expected | {"critic": {"dit/a": 5}}
    assert optimisers.groups(cfg, {"generator": PARAMS["generator"]}) == expected


@pytest.mark.parametrize(
    ("objective", "expected"), [("dmd", (3, 3, 13)), ("sid", (3, 3, 13)), ("forcing", (13, 13, 13))]
)
def test_schedules_are_as_long_as_a_group_is_updated(objective, expected):
    cfg = TrainConfig(objective=objective, steps=13, distil=DistilConfig(critic_updates=5))
    assert (
        tuple(optimisers.updates_of(cfg, group) for group in ("generator", "compressor", "critic"))
        == expected
    )


def test_a_group_takes_its_own_settings():
    cfg = TrainConfig(
        steps=9,
        **{
            group: OptimiserConfig(rate=rate, decay=0.0, clip=0.0)
            for group, rate in (("generator", 0.1), ("compressor", 0.02), ("critic", 0.003))
        },
    )
    for group, rate in (("generator", 0.1), ("compressor", 0.02), ("critic", 0.003)):
        (update,) = moved(optimisers.of_group(cfg, group), [{"a/bias": tiny.normal(1, 5)}])
        np.testing.assert_allclose(jnp.abs(update["a/bias"]), np.full(5, rate), rtol=1e-5)


# how it moves ---------------------------------------------------------------------------------------------------------


def moved(optimiser, gradients, start=None):
    """The updates that `gradients` make one after the other."""
    params = jax.tree.map(jnp.zeros_like, gradients[0]) if start is None else start

    @tiny.jit
    def step(gradient, opt, params):
        update, opt = optimiser.update(gradient, opt, params)
        return update, opt, jax.tree.map(jnp.add, params, update)

    opt = optimiser.init(params)
    updates = []
    for gradient in gradients:
        update, opt, params = step(gradient, opt, params)
        updates.append(update)
    return updates


@pytest.mark.parametrize("betas", [(0.0, 0.999), (0.9, 0.95)])
def test_adamw_is_its_formula(betas):
    cfg = OptimiserConfig(rate=0.02, betas=betas, decay=0.3, clip=0.0, warmup=2, delay=1)
    gradients = np.asarray(tiny.normal(1, 4, 3, 5))
    weight = np.asarray(tiny.normal(2, 3, 5))
    updates = moved(
        optimisers.optimiser(cfg, 9),
        [{"kernel": g} for g in gradients],
        {"kernel": jnp.asarray(weight)},
    )
    first = np.zeros((3, 5))
    second = np.zeros((3, 5))
    for count, (gradient, rate) in enumerate(
        zip(gradients, (0, 0, 0.01, 0.02), strict=True), start=1
    ):
        first = betas[0] * first + (1 - betas[0]) * gradient
        second = betas[1] * second + (1 - betas[1]) * gradient**2
        mean = first / (1 - betas[0] ** count)
        square = second / (1 - betas[1] ** count)
        expected = -rate * (mean / (np.sqrt(square) + 1e-8) + 0.3 * weight)
        np.testing.assert_allclose(updates[count - 1]["kernel"], expected, rtol=2e-4, atol=1e-8)
        weight = weight + expected


def test_a_gradient_is_clipped_to_its_norm_over_the_whole_group():
    cfg = OptimiserConfig(rate=0.1, betas=(0.5, 0.9), decay=0.0, clip=2.0)
    gradients = [
        {"a": factor * tiny.normal(1, 3), "b": factor * tiny.normal(2, 2, 4)}
        for factor in (0.1, 5.0)
    ]
    norm = np.sqrt(sum((np.asarray(leaf) ** 2).sum() for leaf in gradients[1].values()))
    assert norm > 2.0
    assert float(optimisers.norm(gradients[1])) == pytest.approx(norm, rel=1e-5)
    by_hand = [gradients[0], jax.tree.map(lambda leaf: leaf * 2.0 / norm, gradients[1])]
    unclipped = optimisers.optimiser(dataclasses.replace(cfg, clip=0.0), 9)
    ours = moved(optimisers.optimiser(cfg, 9), gradients)[1]
    expected = moved(unclipped, by_hand)[1]
    for name in ("a", "b"):
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-4)
    assert np.abs(moved(unclipped, gradients)[1]["a"] - ours["a"]).max() > 1e-3


MUON = OptimiserConfig(kind="muon", rate=0.03, matrix_rate=0.01, decay=0.0, clip=0.0)


def test_muon_moves_a_stack_as_it_moves_each_of_its_matrices():
    gradient = tiny.normal(1, 3, 6, 4)
    optimiser = optimisers.optimiser(MUON, 9)
    together = moved(optimiser, [{"dit/blocks/x/kernel": gradient}])[0]["dit/blocks/x/kernel"]
    for layer in range(3):
        alone = moved(optimiser, [{"x/kernel": gradient[layer]}])[0]["x/kernel"]
        np.testing.assert_allclose(together[layer], alone, atol=1e-6)


def test_muon_moves_matrices_equally_far_in_all_directions_and_the_rest_by_adam():
    given = {"x/kernel": tiny.normal(1, 7, 3), "x/bias": tiny.normal(2, 7)}
    (update,) = moved(optimisers.optimiser(MUON, 9), [given])
    lengths = np.linalg.svd(np.asarray(update["x/kernel"]), compute_uv=False) / (
        0.01 * 0.2 * 7**0.5
    )
    assert (lengths > 0.6).all()
    assert (lengths < 1.3).all()
    np.testing.assert_allclose(update["x/bias"], -0.03 * np.sign(given["x/bias"]), rtol=1e-4)
