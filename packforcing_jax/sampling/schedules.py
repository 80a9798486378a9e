"""Flow matching: the shifted noise levels, and the way between noisy, clean, noise and velocity (Self-Forcing).

sigma runs from 1 (noise) to 0 (clean); a timestep is 1000 sigma. A noisy sample is (1 - sigma) clean + sigma noise and
its velocity is noise - clean. The sigma of a timestep is that of the nearest entry of a table, never timestep / 1000:
timestep 0 therefore means the table's last sigma.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.typing import ArrayLike

from packforcing_jax.errors import require

TIMESTEPS = 1000


@dataclass(frozen=True, eq=False)
class Table:
    """A falling grid of noise levels, float32 [steps]; cached per setting, so it compares and hashes by identity."""

    sigmas: np.ndarray
    timesteps: np.ndarray


@struct.dataclass
class NoiseLevel:
    """How noisy a sample is, or several are: an index takes a part of them."""

    timestep: Array  # on the 0..1000 scale
    sigma: Array

    def __getitem__(self, index: Any) -> "NoiseLevel":
        return NoiseLevel(timestep=self.timestep[index], sigma=self.sigma[index])


def _frozen(values: np.ndarray) -> np.ndarray:
    """`values` in float32, read-only because every caller shares them."""
    values = values.astype(np.float32)
    values.setflags(write=False)
    return values


def shifted(sigma: np.ndarray, shift: float | np.float32) -> np.ndarray:
    """Sigmas moved towards noise: s u / (1 + (s - 1) u)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@functools.cache
def table(
    shift: float,
    *,
    steps: int = TIMESTEPS,
    sigma_max: float = 1.0,
    sigma_min: float = 0.0,
    extra_one_step: bool = True,
) -> Table:
    """The shifted grid from `sigma_max` towards `sigma_min`; `extra_one_step` leaves out the end point itself."""
    require(shift > 0, f"shift={shift} must be positive; 1 leaves the noise levels as they are.")
    require(steps > 0, f"steps={steps} must be at least 1.")
    line = np.linspace(sigma_max, sigma_min, steps + 1 if extra_one_step else steps)
    sigmas = shifted(line[:steps], shift)
    return Table(sigmas=_frozen(sigmas), timesteps=_frozen(sigmas * TIMESTEPS))


def sigmas_to_zero(table: Table) -> np.ndarray:
    """The noise levels of a trajectory along the table: its sigmas, then 0, float32 [steps + 1]."""
    return np.append(table.sigmas, np.float32(0))


@functools.cache
def shifted_timesteps(steps: tuple[int, ...], shift: float, *, exact: bool = False) -> np.ndarray:
    """The timesteps a step list stands for, float32 [len(steps)]: listed n is grid entry 1000 - n, listed 0 is 0.

    The original computes them in float32 throughout; `exact` ones are rounded once.
    """
    require(
        all(0 <= step <= TIMESTEPS for step in steps),
        f"steps={steps} must lie within {TIMESTEPS}..0.",
    )
    whole = table(shift)
    line = np.linspace(1, 0, TIMESTEPS + 1)[:-1].astype(np.float32)
    times = whole.timesteps if exact else np.float32(TIMESTEPS) * shifted(line, np.float32(shift))
    grid = np.append(times, np.float32(0))
    return _frozen(grid[TIMESTEPS - np.asarray(steps, dtype=int)])


def nearest_id(table: Table, timestep: ArrayLike) -> Array:
    """The index of the table entry nearest to each timestep; of two equally near the noisier one."""
    distance = jnp.subtract.outer(jnp.asarray(timestep, jnp.float32), jnp.asarray(table.timesteps))
    return jnp.argmin(jnp.abs(distance), axis=-1)


def sigma_at(table: Table, timestep: ArrayLike) -> Array:
    """The sigma of the table entry nearest to each timestep, of the timestep's shape."""
    return jnp.asarray(table.sigmas)[nearest_id(table, timestep)]


def over(sigma: ArrayLike, sample: Array) -> Array:
    """`sigma` of the leading axes, with unit axes behind them, so that it multiplies `sample`."""
    sigma = jnp.asarray(sigma, jnp.float32)
    return jnp.expand_dims(sigma, range(sigma.ndim, sample.ndim))


def add_noise(clean: Array, noise: Array, sigma: ArrayLike) -> Array:
    """The sample at noise level `sigma` (of the leading axes), mixed in float32, of the noise's dtype."""
    sigma = over(sigma, noise)
    return ((1 - sigma) * clean.astype(jnp.float32) + sigma * noise.astype(jnp.float32)).astype(
        noise.dtype
    )


def clean_from_velocity(noisy: Array, velocity: Array, sigma: ArrayLike) -> Array:
    """The clean sample a velocity points at: noisy - sigma velocity, in float32, of the velocity's dtype."""
    moved = over(sigma, velocity) * velocity.astype(jnp.float32)
    return (noisy.astype(jnp.float32) - moved).astype(velocity.dtype)


def velocity_from_clean(noisy: Array, clean: Array, sigma: ArrayLike) -> Array:
    """The velocity that points at `clean`: (noisy - clean) / sigma, in float32, of the clean dtype."""
    return ((noisy.astype(jnp.float32) - clean.astype(jnp.float32)) / over(sigma, clean)).astype(
        clean.dtype
    )


def training_target(clean: Array, noise: Array) -> Array:
    """The velocity a network learns: noise - clean."""
    return noise - clean


@functools.lru_cache(maxsize=16)
def training_weights(table: Table) -> np.ndarray:
    """The weight of each entry in a flow loss, float32 [steps]: a bell around timestep 500, mean 1, 0 at its foot."""
    bell = np.exp(-2 * (table.timesteps.astype(np.float64) / TIMESTEPS - 0.5) ** 2)
    raised = bell - bell.min()
    return _frozen(raised / raised.mean())


def euler_step(
    table: Table, velocity: Array, timestep: ArrayLike, sample: Array, *, to_final: bool = False
) -> Array:
    """`sample` moved along `velocity` to the next entry of the table; from the last one, or `to_final`, to sigma 0."""
    here = nearest_id(table, timestep)
    below = jnp.asarray(sigmas_to_zero(table)[1:])[here]
    step = (0.0 if to_final else below) - jnp.asarray(table.sigmas)[here]
    return sample + over(step, sample) * velocity


def shift_uniform(raw: ArrayLike, shift: float, low: float = 20.0, high: float = 980.0) -> Array:
    """Uniform draws from 0..1000 as shifted timesteps within [low, high], in float32."""
    fraction = jnp.asarray(raw, jnp.float32) / TIMESTEPS
    return jnp.clip(shift * fraction / (1 + (shift - 1) * fraction) * TIMESTEPS, low, high)
