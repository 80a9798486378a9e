"""Every size and choice of an experiment, as frozen values that refuse impossible combinations.

What holds policies is loaded when first used: policies compute, and the command line answers `--help` without jax.
"""

import importlib
from typing import TYPE_CHECKING

from packforcing_jax.config.choices import CHOICES, DTYPES
from packforcing_jax.config.networks import (
    WAN_MEAN,
    WAN_STD,
    CompressorConfig,
    DiTConfig,
    ModelConfig,
    SpaceToDepthConfig,
    TextConfig,
    VAEConfig,
)
from packforcing_jax.config.sampling import (
    HALF,
    WAN_NEGATIVE_PROMPT,
    DtypeConfig,
    SampleConfig,
    evenly_spaced,
)
from packforcing_jax.config.training import (
    CoverConfig,
    DataConfig,
    DistilConfig,
    MeshConfig,
    Objective,
    OptimiserConfig,
    TrainConfig,
)

if TYPE_CHECKING:
    from packforcing_jax.config.experiment import Experiment, StepConfig
    from packforcing_jax.config.memory import PROFILES, CacheConfig, MemorySpec
    from packforcing_jax.config.recipe import Stage

_HOME = {
    "Experiment": "experiment",
    "StepConfig": "experiment",
    "Stage": "recipe",
    "PROFILES": "memory",
    "CacheConfig": "memory",
    "MemorySpec": "memory",
}

__all__ = [
    "CHOICES",
    "DTYPES",
    "HALF",
    "PROFILES",
    "WAN_MEAN",
    "WAN_NEGATIVE_PROMPT",
    "WAN_STD",
    "CacheConfig",
    "CompressorConfig",
    "CoverConfig",
    "DataConfig",
    "DistilConfig",
    "DiTConfig",
    "DtypeConfig",
    "Experiment",
    "MemorySpec",
    "MeshConfig",
    "ModelConfig",
    "Objective",
    "OptimiserConfig",
    "SampleConfig",
    "SpaceToDepthConfig",
    "Stage",
    "StepConfig",
    "TextConfig",
    "TrainConfig",
    "VAEConfig",
    "evenly_spaced",
]


def __getattr__(name: str):
    """A name of a module that holds policies."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    return globals()[name]
