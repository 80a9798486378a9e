import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from packforcing_jax.errors import InputError
from packforcing_jax.sampling import unipc

GOLDEN = load_file(pathlib.Path(__file__).parent / "golden" / "unipc_solver.safetensors")
RUNS = [(8, 5.0), (3, 8.0)]


def sample(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def final(solver, latent, velocity_of):
    """The last latent of a run whose velocity is `velocity_of(latent, index)`."""
    state = unipc.init(latent)
    for index in range(solver.steps):
        state = unipc.step(solver, state, velocity_of(state.latent, index), index)
    return state.latent


@pytest.mark.parametrize(("steps", "shift"), [*RUNS, (50, 5.0), (50, 8.0), (30, 3.0)])
def test_noise_levels_match_the_original(steps, shift):
    solver = unipc.UniPC(steps, shift)
    name = f"outputs/steps{steps}_shift{shift:.0f}."
    np.testing.assert_allclose(solver.sigmas, GOLDEN[name + "sigmas"], rtol=0, atol=1e-7)
    assert np.issubdtype(solver.timesteps.dtype, np.integer)
    np.testing.assert_array_equal(solver.timesteps, GOLDEN[name + "timesteps"])


@pytest.mark.parametrize(("steps", "shift"), RUNS)
def test_every_step_matches_the_original(steps, shift):
    solver = unipc.UniPC(steps, shift)
    name = f"steps{steps}_shift{shift:.0f}."
    velocities = GOLDEN[f"inputs/{name}velocity_per_step"]
    state = unipc.init(GOLDEN[f"inputs/{name}latent"])
    for index, expected in enumerate(GOLDEN[f"outputs/{name}latent_after_each_step"]):
        state = unipc.step(solver, state, velocities[index], index)
        np.testing.assert_allclose(
            state.latent, expected, rtol=0, atol=5e-6 * np.abs(expected).max()
        )


@pytest.mark.parametrize(("steps", "shift"), RUNS)
def test_the_loop_that_sampling_runs_matches_the_original(steps, shift):
    name = f"steps{steps}_shift{shift:.0f}."
    velocities = jnp.asarray(GOLDEN[f"inputs/{name}velocity_per_step"])
    latent = jnp.asarray(GOLDEN[f"inputs/{name}latent"])
    last, every = jax.jit(
        lambda latent: unipc.solve(unipc.UniPC(steps, shift), latent, lambda _, i: velocities[i])
    )(latent)
    expected = GOLDEN[f"outputs/{name}latent_after_each_step"]
    for ours, theirs in zip(every, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6 * np.abs(theirs).max())
    np.testing.assert_array_equal(last, every[-1])


def test_a_scan_equals_a_python_loop():
    solver = unipc.UniPC(7, 3.0)
    latent = sample(0, 2, 3, 5)
    velocities = sample(1, 7, 2, 3, 5)

    def body(state, inputs):
        state = unipc.step(solver, state, *inputs)
        return state, state.latent

    scanned, trail = jax.jit(lambda state: jax.lax.scan(body, state, (velocities, jnp.arange(7))))(
        unipc.init(latent)
    )
    looped = unipc.init(latent)
    for index in range(7):
        looped = unipc.step(solver, looped, velocities[index], index)
        np.testing.assert_allclose(trail[index], looped.latent, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), scanned, looped)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
def test_the_velocity_towards_one_clean_sample_leads_there(steps):
    solver = unipc.UniPC(steps, 5.0)
    clean = sample(2, 3, 4, 5)
    reached = final(solver, sample(3, 3, 4, 5), lambda x, index: (x - clean) / solver.sigmas[index])
    np.testing.assert_allclose(reached, clean, atol=1e-5)


def test_all_latents_between_lie_at_their_noise_level():
    solver = unipc.UniPC(6, 4.0)
    clean = sample(4, 5, 3)
    noise = sample(5, 5, 3)
    state = unipc.init((1 - solver.sigmas[0]) * clean + solver.sigmas[0] * noise)
    for index in range(solver.steps):
        state = unipc.step(solver, state, noise - clean, index)
        sigma = solver.sigmas[index + 1]
        np.testing.assert_allclose(state.latent, (1 - sigma) * clean + sigma * noise, atol=1e-5)


def test_twice_the_steps_leave_a_quarter_of_the_error():
    """Data of variance 0.25 have a velocity linear in x, whose flow scales x like the square root of the variance."""

    def variance(sigma):
        return sigma**2 + 0.25 * (1 - sigma) ** 2

    def error(steps):
        solver = unipc.UniPC(steps, 1.0)
        sigmas = solver.sigmas
        slopes = (sigmas - 0.25 * (1 - sigmas)) / variance(sigmas)

        def body(state, inputs):
            slope, index = inputs
            return unipc.step(solver, state, slope * state.latent, index), None

        within = jnp.arange(
            steps - 1
        )  # the last step is of order 1: it jumps to the clean prediction
        state, _ = jax.lax.scan(
            body, unipc.init(jnp.ones((1, 1))), (jnp.asarray(slopes[:-2]), within)
        )
        return abs(float(state.latent[0, 0]) - np.sqrt(variance(sigmas[-2]) / variance(sigmas[0])))

    assert error(40) < 2e-3
    assert 3.5 < error(40) / error(80) < 4.5


@pytest.mark.parametrize("steps", [2, 5, 11])
def test_weights_keep_the_sum_of_signal_and_noise(steps):
    """With clean = 1 everywhere a latent of alpha + sigma c must become the next level's, for every c."""
    solver = unipc.UniPC(steps, 5.0)
    sigma = solver.sigmas.astype(np.float64)
    alpha = 1 - sigma
    predictor = solver.predictor.astype(np.float64)
    corrector = solver.corrector.astype(np.float64)
    np.testing.assert_allclose(predictor[:, 0] * sigma[:-1], sigma[1:], atol=1e-6)
    np.testing.assert_allclose(
        predictor[:, 0] * alpha[:-1] + predictor[:, 1:].sum(1), alpha[1:], atol=1e-6
    )
    np.testing.assert_allclose(corrector[1:, 0] * sigma[:-2], sigma[1:-1], atol=1e-6)
    np.testing.assert_allclose(
        corrector[1:, 0] * alpha[:-2] + corrector[1:, 1:].sum(1), alpha[1:-1], atol=1e-6
    )


def test_a_solver_is_a_value_that_jit_takes_as_static():
    step = jax.jit(unipc.step, static_argnums=0, donate_argnums=1)
    for solver in (unipc.UniPC(4, 5.0), unipc.UniPC(4, 5.0)):
        state = step(solver, unipc.init(sample(6, 2, 3)), sample(7, 2, 3), 1)
    assert step._cache_size() == 1
    assert jax.tree.leaves(state)[0].dtype == jnp.float32


def test_a_half_precision_velocity_keeps_the_state_in_float32():
    state = unipc.init(sample(8, 2, 3).astype(jnp.bfloat16))
    after = unipc.step(unipc.UniPC(4, 5.0), state, sample(9, 2, 3).astype(jnp.bfloat16), 0)
    assert {leaf.dtype for leaf in jax.tree.leaves((state, after))} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(("steps", "shift"), [(0, 5.0), (4, 0.0), (4, -1.0)])
def test_impossible_solvers_are_refused(steps, shift):
    with pytest.raises(InputError, match=f"steps={steps}|shift={shift}"):
        unipc.UniPC(steps, shift)
