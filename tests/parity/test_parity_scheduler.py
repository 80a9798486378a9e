"""Noise levels, Euler steps and UniPC against the schedulers of diffusers."""

import numpy as np
import pytest
import twins

from packforcing_jax.sampling import schedules, unipc

pytestmark = pytest.mark.parity

TOLERANCE = 2e-6
SOLVER_TOLERANCE = 5e-5
SHIFTS = [1.0, 3.0, 5.0, 8.0]
RUNS = [(1, 5.0), (2, 1.0), (3, 8.0), (4, 5.0), (7, 3.0), (20, 5.0), (50, 8.0)]  # steps, shift
SHAPE = (2, 3, 5, 4, 7)


def drawn(count, seed=0):
    """Standard normal latents [count, *SHAPE]."""
    return np.random.default_rng(seed).standard_normal((count, *SHAPE), np.float32)


def flow_matching(shift, steps=None):
    """The plain scheduler over its 1000 training steps, or over so many even steps from 1 towards 0."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    if steps is not None:
        scheduler.set_timesteps(sigmas=list(np.linspace(1, 0, steps + 1)[:-1]))
    return scheduler


def multistep(steps, shift, **options):
    """The solver as Wan's pipelines set it up, over the noise levels of Wan's own code, which start below 1."""
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, **options
    )
    scheduler.set_timesteps(sigmas=np.linspace(unipc.SIGMA_MAX, 0, steps + 1)[:-1])
    return scheduler


def run(scheduler, latent, velocities):
    """The latent after each step of a scheduler of diffusers."""
    latents = []
    for timestep, velocity in zip(scheduler.timesteps, velocities, strict=True):
        latent = twins.called(
            lambda v, x, t=timestep: scheduler.step(v, t, x).prev_sample, velocity, latent
        )
        latents.append(latent)
    return np.stack(latents)


def solved(solver, latent, velocities):
    """The latent after each step of our solver."""
    state = unipc.init(latent)
    latents = []
    for index, velocity in enumerate(velocities):
        state = unipc.step(solver, state, velocity, index)
        latents.append(state.latent)
    return np.stack(latents)


# noise levels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", SHIFTS)
def test_the_training_grid_agrees(shift):
    ours = schedules.table(shift)
    theirs = flow_matching(shift)
    assert twins.error(ours.sigmas, theirs.sigmas) <= TOLERANCE
    assert twins.error(ours.timesteps, theirs.timesteps) <= TOLERANCE
    assert twins.error(schedules.table(shift * 1.01).sigmas, theirs.sigmas) > TOLERANCE


@pytest.mark.parametrize(("steps", "shift"), RUNS)
def test_a_shorter_grid_agrees(steps, shift):
    ours = schedules.table(shift, steps=steps)
    theirs = flow_matching(shift, steps)
    assert twins.error(ours.sigmas, theirs.sigmas[:-1]) <= TOLERANCE
    assert twins.error(ours.timesteps, theirs.timesteps) <= TOLERANCE


def test_a_step_list_means_the_same_timesteps():
    assert (
        twins.error(
            schedules.shifted_timesteps((1000, 750, 500, 250), 5.0), flow_matching(5.0, 4).timesteps
        )
        <= TOLERANCE
    )


@pytest.mark.parametrize("shift", SHIFTS)
def test_noise_is_added_alike(shift):
    table = schedules.table(shift)
    theirs = flow_matching(shift)
    clean, noise = drawn(2)
    times = theirs.timesteps.numpy()[[13, 741]]
    ours = schedules.add_noise(clean, noise, schedules.sigma_at(table, times))
    assert twins.error(ours, twins.called(theirs.scale_noise, clean, times, noise)) <= TOLERANCE


@pytest.mark.parametrize(("steps", "shift"), RUNS)
def test_euler_steps_agree(steps, shift):
    table = schedules.table(shift, steps=steps)
    latent, *velocities = drawn(1 + steps)
    expected = run(flow_matching(shift, steps), latent, velocities)
    latents = []
    for index, velocity in enumerate(velocities):
        latent = schedules.euler_step(table, velocity, table.timesteps[index], latent)
        latents.append(latent)
    assert twins.error(np.stack(latents), expected) <= TOLERANCE


# UniPC ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "shift"), RUNS)
def test_unipc_agrees(steps, shift):
    solver = unipc.UniPC(steps, shift)
    theirs = multistep(steps, shift)
    np.testing.assert_array_equal(solver.timesteps, theirs.timesteps.numpy())
    assert twins.error(solver.sigmas, theirs.sigmas) <= TOLERANCE
    latent, *velocities = drawn(1 + steps, seed=steps)
    assert (
        twins.error(solved(solver, latent, velocities), run(theirs, latent, velocities))
        <= SOLVER_TOLERANCE
    )


@pytest.mark.parametrize(
    "other",
    [
        {"solver_order": 1},
        {"solver_order": 3},
        {"solver_type": "bh1"},
        {"disable_corrector": [3]},
        {"lower_order_final": False},
    ],
)
def test_another_solver_is_noticed(other):
    latent, *velocities = drawn(1 + 7)
    ours = solved(unipc.UniPC(7, 3.0), latent, velocities)
    assert twins.error(ours, run(multistep(7, 3.0, **other), latent, velocities)) > SOLVER_TOLERANCE


@pytest.mark.parametrize("step", range(7))
def test_every_velocity_counts(step):
    """The comparison can fail: it notices a change of 2 % in what the network says at any one step."""
    latent, *velocities = drawn(1 + 7)
    expected = run(multistep(7, 3.0), latent, velocities)
    velocities[step] = velocities[step] * (1 + twins.SLIGHT)
    assert twins.error(solved(unipc.UniPC(7, 3.0), latent, velocities), expected) > SOLVER_TOLERANCE
