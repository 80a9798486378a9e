"""UniPC for many-step sampling (Wan2.1 `fm_solvers_unipc.py`: bh2, order 2, clean prediction), as two weight tables.

Predictor and corrector are linear in the latents and clean predictions of the last three steps. All that depends on
the noise levels is therefore one row of numbers per step, and a step is two weighted sums without a branch.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from packforcing_jax.errors import require
from packforcing_jax.sampling import schedules

SIGMA_MAX = float(
    np.float32(0.999)
)  # Wan's training grid starts below pure noise and is held in float32


@dataclass(frozen=True)
class UniPC:
    """A solver of `steps` steps whose noise levels are moved by `shift`."""

    steps: int
    shift: float

    def __post_init__(self):
        require(self.steps > 0, f"steps={self.steps} must be at least 1.")
        require(
            self.shift > 0,
            f"shift={self.shift} must be positive; 1 leaves the noise levels as they are.",
        )

    @functools.cached_property
    def _levels(self) -> np.ndarray:
        """Noise levels of every step in float64, [steps]."""
        return schedules.shifted(np.linspace(SIGMA_MAX, 0, self.steps + 1)[:-1], self.shift)

    @property
    def sigmas(self) -> np.ndarray:
        """Noise levels from first to last and a final 0, float32 [steps + 1]."""
        return np.append(self._levels, 0).astype(np.float32)

    @property
    def timesteps(self) -> np.ndarray:
        """What the network is told at every step, int32 [steps]."""
        return (self._levels * schedules.TIMESTEPS).astype(np.int32)

    @functools.cached_property
    def corrector(self) -> np.ndarray:
        """Weights of (last corrected latent, clean two steps ago, last clean, clean now), float32 [steps, 4]."""
        return np.stack([_corrector(self, index) for index in range(self.steps)]).astype(np.float32)

    @functools.cached_property
    def predictor(self) -> np.ndarray:
        """Weights of (corrected latent, last clean, clean now), float32 [steps, 3]."""
        return np.stack([_predictor(self, index) for index in range(self.steps)]).astype(np.float32)


@struct.dataclass
class State:
    """Where the solver stands: the next input of the network and what the next step needs of the last two."""

    latent: Array
    corrected: Array  # the latent of the last step, after its correction
    clean: Array  # clean prediction of the last step
    older: Array  # and of the one before


def init(latent: Array) -> State:
    """The state before the first step, in float32; the tables give the empty predictions no weight."""
    latent = jnp.asarray(latent, jnp.float32)
    return State(
        latent,
        corrected=jnp.copy(latent),
        clean=jnp.zeros_like(latent),
        older=jnp.zeros_like(latent),
    )


def step(solver: UniPC, state: State, velocity: Array, index: ArrayLike) -> State:
    """The state after step `index`, whose network returned `velocity` for `state.latent`."""
    clean = state.latent - jnp.asarray(solver.sigmas)[index] * velocity
    corrected = _weighted(
        jnp.asarray(solver.corrector)[index], state.corrected, state.older, state.clean, clean
    )
    latent = _weighted(jnp.asarray(solver.predictor)[index], corrected, state.clean, clean)
    return State(latent=latent, corrected=corrected, clean=clean, older=state.clean)


def solve(
    solver: UniPC, latent: Array, velocity: Callable[[Array, Array], Array]
) -> tuple[Array, Array]:
    """(the clean sample, the latent after every step [steps, ...]) from `latent`, along `velocity(latent, index)`."""

    def one(state: State, index: Array) -> tuple[State, Array]:
        state = step(solver, state, velocity(state.latent, index), index)
        return state, state.latent

    state, latents = jax.lax.scan(one, init(latent), jnp.arange(solver.steps))
    return state.latent, latents


def _weighted(weights: Array, *samples: Array) -> Array:
    return functools.reduce(
        jnp.add, (weight * sample for weight, sample in zip(weights, samples, strict=True))
    )


def _order(solver: UniPC, index: int) -> int:
    """The predictor's order at a step: 1 at both ends, 2 between."""
    return min(2, solver.steps - index, index + 1)


def _log_ratio(solver: UniPC, index: int) -> float:
    """lambda = ln(alpha / sigma) at a step, with alpha = 1 - sigma."""
    sigma = np.float64(solver.sigmas[index])
    return np.log1p(-sigma) - np.log(sigma)


def _corrector(solver: UniPC, index: int) -> np.ndarray:
    """One row of `UniPC.corrector`; the first step has nothing to correct."""
    if index == 0:
        return np.array([1.0, 0.0, 0.0, 0.0])
    sigma = solver.sigmas.astype(np.float64)
    h = _log_ratio(solver, index) - _log_ratio(solver, index - 1)
    gain = -(1 - sigma[index]) * np.expm1(-h)
    slope = 0.0
    now = 0.5
    if _order(solver, index - 1) == 2:
        r = (_log_ratio(solver, index - 2) - _log_ratio(solver, index - 1)) / h
        rho, now = _second_order(h, r)
        slope = rho / r
    return np.array(
        [sigma[index] / sigma[index - 1], gain * slope, gain * (1 - slope - now), gain * now]
    )


def _second_order(h: float, r: float) -> np.ndarray:
    """The corrector's weights of the older and the new difference, which match both phi functions over the step."""
    gain = np.expm1(-h)
    phi1 = -gain / h - 1
    phi2 = -phi1 / h - 0.5
    return np.linalg.solve(np.array([[1.0, 1.0], [r, 1.0]]), np.array([phi1, 2 * phi2]) / gain)


def _predictor(solver: UniPC, index: int) -> np.ndarray:
    """One row of `UniPC.predictor`; the last step lands on the clean prediction."""
    if index == solver.steps - 1:
        return np.array([0.0, 0.0, 1.0])
    sigma = solver.sigmas.astype(np.float64)
    h = _log_ratio(solver, index + 1) - _log_ratio(solver, index)
    gain = -(1 - sigma[index + 1]) * np.expm1(-h)
    slope = 0.0
    if _order(solver, index) == 2:
        slope = h / (_log_ratio(solver, index - 1) - _log_ratio(solver, index)) / 2
    return np.array([sigma[index + 1] / sigma[index], gain * slope, gain * (1 - slope)])
