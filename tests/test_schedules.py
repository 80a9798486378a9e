import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from packforcing_jax.errors import InputError
from packforcing_jax.sampling import schedules

GOLDEN = load_file(pathlib.Path(__file__).parent / "golden" / "scheduler.safetensors")
INPUTS = {
    name.removeprefix("inputs/"): value
    for name, value in GOLDEN.items()
    if name.startswith("inputs/")
}
SHIFTS = (5.0, 8.0)


@pytest.fixture(autouse=True)
def strict_dtypes():
    with jax.numpy_dtype_promotion("strict"):
        yield


def check(value, name):
    expected = GOLDEN[f"outputs/{name}"]
    assert value.shape == expected.shape
    np.testing.assert_allclose(
        value, expected, rtol=0, atol=2e-6 * np.abs(expected).max(), err_msg=name
    )


def sample(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("shift", SHIFTS)
def test_tables_match_the_original(shift):
    for name, steps in (("", 1000), ("inference50.", 50)):
        grid = schedules.table(shift, steps=steps)
        check(grid.sigmas, f"shift{shift:.0f}.{name}sigmas")
        check(grid.timesteps, f"shift{shift:.0f}.{name}timesteps")


def test_a_table_with_its_end_point_matches_the_original():
    grid = schedules.table(3.0, steps=100, sigma_min=0.003 / 1.002, extra_one_step=False)
    check(grid.sigmas, "defaults100.sigmas")
    check(grid.timesteps, "defaults100.timesteps")


@pytest.mark.parametrize("shift", SHIFTS)
def test_looking_up_and_mixing_match_the_original(shift):
    grid = schedules.table(shift)
    name = f"shift{shift:.0f}."
    ids = schedules.nearest_id(grid, INPUTS["timestep"])
    np.testing.assert_array_equal(ids, GOLDEN[f"outputs/{name}nearest_id"])
    sigma = schedules.sigma_at(grid, INPUTS["timestep"])
    check(schedules.add_noise(INPUTS["clean"], INPUTS["noise"], sigma), name + "add_noise")
    check(
        schedules.clean_from_velocity(INPUTS["xt"], INPUTS["flow_pred"], sigma),
        name + "x0_from_flow",
    )
    check(
        schedules.velocity_from_clean(INPUTS["xt"], INPUTS["x0_pred"], sigma), name + "flow_from_x0"
    )
    check(schedules.training_target(INPUTS["clean"], INPUTS["noise"]), name + "training_target")
    check(schedules.training_weights(grid), name + "linear_timesteps_weights")
    check(schedules.training_weights(grid)[ids], name + "training_weight")


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("to_final", [False, True])
def test_an_euler_step_matches_the_original(shift, to_final):
    velocity, timestep, noisy = (
        jnp.asarray(INPUTS[name][1:3]) for name in ("flow_pred", "timestep", "xt")
    )
    step = jax.jit(schedules.euler_step, static_argnums=0, static_argnames="to_final")
    moved = step(schedules.table(shift), velocity, timestep, noisy, to_final=to_final)
    check(moved, f"shift{shift:.0f}.step_of_samples_1_2" + "_to_final" * to_final)


@pytest.mark.parametrize("shift", SHIFTS)
def test_warped_steps_and_draws_match_the_original(shift):
    name = f"shift{shift:.0f}."
    check(
        schedules.shifted_timesteps((1000, 750, 500, 250), shift),
        name + "denoising_step_list_1000_750_500_250_warped",
    )
    check(
        schedules.shift_uniform(INPUTS["raw_timestep_int"], shift),
        name + "raw_timestep_warped_clamped",
    )


def test_a_listed_zero_is_timestep_zero():
    np.testing.assert_allclose(
        schedules.shifted_timesteps((1000, 500, 0), 5.0), [1000.0, 833.33333, 0.0], rtol=1e-6
    )


def test_warped_draws_stay_within_their_bounds():
    drawn = schedules.shift_uniform(jnp.arange(1001), 5.0, low=35.0, high=910.0)
    assert drawn.dtype == jnp.float32
    assert drawn.min() == 35.0
    assert drawn.max() == 910.0
    assert jnp.all(jnp.diff(drawn) >= 0)


def test_timestep_zero_means_the_last_sigma_of_the_table():
    grid = schedules.table(5.0)
    assert schedules.sigma_at(grid, 0.0) == grid.sigmas[-1]
    assert grid.sigmas[-1] == pytest.approx(0.0049801, rel=1e-4)


@pytest.mark.parametrize("shift", [1.0, 5.0, 8.0])
def test_each_entry_is_nearest_to_itself_in_any_shape(shift):
    grid = schedules.table(shift)
    timesteps = grid.timesteps[7:67].reshape(3, 4, 5)
    np.testing.assert_array_equal(
        schedules.nearest_id(grid, timesteps), np.arange(7, 67).reshape(3, 4, 5)
    )
    assert schedules.nearest_id(grid, grid.timesteps[11]).shape == ()


def test_between_two_entries_the_closer_one_is_found():
    grid = schedules.table(5.0)
    upper, lower = grid.timesteps[400:402]
    assert schedules.nearest_id(grid, 0.51 * upper + 0.49 * lower) == 400
    assert schedules.nearest_id(grid, 0.49 * upper + 0.51 * lower) == 401


@settings(max_examples=25, deadline=None)
@given(st.floats(0.5, 12.0), st.integers(2, 60))
def test_tables_fall_from_pure_noise_and_shift_towards_it(shift, steps):
    sigmas = schedules.table(shift, steps=steps).sigmas
    assert sigmas[0] == 1
    assert np.all(np.diff(sigmas) < 0)
    assert sigmas[-1] > 0
    plain = schedules.table(1.0, steps=steps).sigmas
    assert np.all((sigmas[1:] - plain[1:]) * (shift - 1) >= -1e-6)


def test_velocity_and_clean_are_two_views_of_one_prediction():
    clean = sample(0, 2, 3, 5, 7)
    noise = sample(1, 2, 3, 5, 7)
    sigma = jnp.array([[1.0, 0.6, 0.05], [0.3, 0.9, 0.4]])
    noisy = schedules.add_noise(clean, noise, sigma)
    velocity = schedules.training_target(clean, noise)
    np.testing.assert_allclose(
        schedules.clean_from_velocity(noisy, velocity, sigma), clean, atol=1e-6
    )
    np.testing.assert_allclose(
        schedules.velocity_from_clean(noisy, clean, sigma), velocity, atol=2e-5
    )
    np.testing.assert_array_equal(noisy[0, 0], noise[0, 0])


def test_each_frame_gets_its_own_sigma():
    clean = jnp.zeros((2, 3, 4, 5))
    noise = jnp.ones((2, 3, 4, 5))
    sigma = jnp.arange(6.0).reshape(2, 3) / 10
    noisy = schedules.add_noise(clean, noise, sigma)
    np.testing.assert_allclose(
        noisy, np.broadcast_to(np.asarray(sigma)[..., None, None], (2, 3, 4, 5)), rtol=1e-6
    )


def test_mixing_runs_in_float32_and_returns_the_dtype_it_was_given():
    clean = sample(2, 3, 11)
    noise = sample(3, 3, 11)
    sigma = jnp.array([0.00498, 0.5, 0.99])
    half = jnp.bfloat16
    noisy = schedules.add_noise(clean.astype(half), noise.astype(half), sigma)
    exact = schedules.add_noise(
        clean.astype(half).astype(jnp.float32), noise.astype(half).astype(jnp.float32), sigma
    )
    assert noisy.dtype == half
    np.testing.assert_array_equal(noisy, exact.astype(half))
    assert schedules.clean_from_velocity(noisy, noise.astype(half), sigma).dtype == half
    assert schedules.velocity_from_clean(noisy, clean.astype(half), sigma).dtype == half


def test_euler_along_the_true_velocity_follows_the_noise_levels_to_the_clean_sample():
    grid = schedules.table(5.0, steps=6)
    clean = sample(4, 2, 3, 4)
    noise = sample(5, 2, 3, 4)
    noisy = noise
    for index, timestep in enumerate(grid.timesteps):
        np.testing.assert_allclose(
            noisy, schedules.add_noise(clean, noise, grid.sigmas[index]), atol=2e-6
        )
        noisy = schedules.euler_step(grid, noise - clean, jnp.full((2,), timestep), noisy)
    np.testing.assert_allclose(noisy, clean, atol=2e-6)


def test_training_weights_average_to_one_and_peak_in_the_middle():
    grid = schedules.table(5.0)
    weights = schedules.training_weights(grid)
    assert weights.mean() == pytest.approx(1, rel=1e-5)
    assert weights[0] == 0
    assert abs(grid.timesteps[weights.argmax()] - 500) < 1
    assert weights.max() == pytest.approx(2.0764, abs=1e-4)


def test_equal_settings_share_one_read_only_table():
    assert schedules.table(5.0) is schedules.table(5.0)
    with pytest.raises(ValueError, match="read-only"):
        schedules.table(5.0).sigmas[0] = 0


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: schedules.table(0.0), "shift=0.0"),
        (lambda: schedules.table(5.0, steps=0), "steps=0"),
        (lambda: schedules.shifted_timesteps((1000, -250), 5.0), "-250"),
        (lambda: schedules.shifted_timesteps((1001,), 5.0), "1001"),
    ],
)
def test_impossible_settings_are_refused(call, named):
    with pytest.raises(InputError, match=named):
        call()
