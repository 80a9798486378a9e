"""Every size and choice of an experiment, as frozen values that refuse impossible combinations."""

from packforcing_jax.config.choices import CHOICES, DTYPES
from packforcing_jax.config.experiment import Experiment
from packforcing_jax.config.memory import PROFILES, CacheConfig
from packforcing_jax.config.networks import (
    WAN_MEAN,
    WAN_STD,
    CompressorConfig,
    DiTConfig,
    SpaceToDepthConfig,
    TextConfig,
    VAEConfig,
)
from packforcing_jax.config.sampling import HALF, DtypeConfig, SampleConfig
from packforcing_jax.config.training import (
    CoverConfig,
    DataConfig,
    DistilConfig,
    MeshConfig,
    OptimiserConfig,
    TrainConfig,
)

__all__ = [
    "CHOICES",
    "DTYPES",
    "HALF",
    "PROFILES",
    "WAN_MEAN",
    "WAN_STD",
    "CacheConfig",
    "CompressorConfig",
    "CoverConfig",
    "DataConfig",
    "DistilConfig",
    "DiTConfig",
    "DtypeConfig",
    "Experiment",
    "MeshConfig",
    "OptimiserConfig",
    "SampleConfig",
    "SpaceToDepthConfig",
    "TextConfig",
    "TrainConfig",
    "VAEConfig",
]
