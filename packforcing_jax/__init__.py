"""PackForcing in JAX: minutes of video from a memory that never grows.

`Pipeline.from_pretrained(folder)` loads a model, `.stream(...)` yields finished blocks, `.generate(...)` a video.
Names are loaded when first used, so importing the package costs no import of jax.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packforcing_jax.config import (
        PROFILES,
        CacheConfig,
        CompressorConfig,
        DiTConfig,
        Experiment,
        SampleConfig,
        SpaceToDepthConfig,
        TextConfig,
        VAEConfig,
    )
    from packforcing_jax.config.loading import load_experiment
    from packforcing_jax.errors import InputError, MachineError
    from packforcing_jax.sampling.pipeline import Pipeline

__version__ = "0.1.0"

_HOME = {
    "Pipeline": "sampling.pipeline",
    "CacheConfig": "config",
    "CompressorConfig": "config",
    "DiTConfig": "config",
    "Experiment": "config",
    "SampleConfig": "config",
    "SpaceToDepthConfig": "config",
    "TextConfig": "config",
    "VAEConfig": "config",
    "PROFILES": "config",
    "load_experiment": "config.loading",
    "InputError": "errors",
    "MachineError": "errors",
}
_NEEDS_JAX = {"sampling.pipeline"}

__all__ = [
    "PROFILES",
    "CacheConfig",
    "CompressorConfig",
    "DiTConfig",
    "Experiment",
    "InputError",
    "MachineError",
    "Pipeline",
    "SampleConfig",
    "SpaceToDepthConfig",
    "TextConfig",
    "VAEConfig",
    "load_experiment",
]


def __getattr__(name: str):
    """The public `name`, from the module that defines it; versions of jax and flax are checked before jax loads."""
    if name not in _HOME:
        raise AttributeError(f"module 'packforcing_jax' has no attribute {name!r}")
    if _HOME[name] in _NEEDS_JAX:
        importlib.import_module("packforcing_jax.versions").check()
    globals()[name] = getattr(importlib.import_module(f"packforcing_jax.{_HOME[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
