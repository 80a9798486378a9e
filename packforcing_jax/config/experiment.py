"""One model with everything needed to sample from it, as one frozen value."""

import math
from dataclasses import dataclass

from packforcing_jax.config.memory import CacheConfig
from packforcing_jax.config.networks import (
    CompressorConfig,
    DiTConfig,
    SpaceToDepthConfig,
    TextConfig,
    VAEConfig,
)
from packforcing_jax.config.sampling import DtypeConfig, SampleConfig
from packforcing_jax.config.training import TrainConfig
from packforcing_jax.errors import require


@dataclass(frozen=True)
class Experiment:
    """One model with everything needed to sample from it; `latent` is (rows, columns), `fps` of the video."""

    name: str
    dit: DiTConfig = DiTConfig()
    codec: VAEConfig | SpaceToDepthConfig = VAEConfig()
    text: TextConfig = TextConfig()
    cache: CacheConfig = CacheConfig()
    compressor: CompressorConfig = CompressorConfig()
    sample: SampleConfig = SampleConfig()
    dtypes: DtypeConfig = DtypeConfig()
    train: TrainConfig = TrainConfig()
    latent: tuple[int, int] = (60, 104)
    fps: int = 16
    clip: int = 20  # latent frames of a training clip
    attention: str = "auto"  # or a row of attention.BACKENDS

    def __post_init__(self):
        for axis, size in zip((1, 2), self.latent):
            require(
                size % self.dit.patch[axis] == 0,
                f"latent={self.latent} is not a multiple of dit.patch={self.dit.patch}; change one.",
            )
        pool, frame = self.cache.score_pool, (self.cache.block, *self.grid)
        require(
            self.cache.top == 0 or all(0 < window <= size for window, size in zip(pool, frame)),
            f"cache.score_pool={pool} does not fit into a block of {frame} tokens; make it smaller.",
        )
        require(
            self.codec.z_dim == self.dit.in_channels,
            f"codec.z_dim={self.codec.z_dim} differs from dit.in_channels={self.dit.in_channels}; change one.",
        )

    @property
    def blocks(self) -> int:
        """Blocks of a training clip."""
        require(
            self.clip % self.cache.block == 0,
            f"clip={self.clip} is not a whole number of blocks of {self.cache.block}; change one.",
        )
        return self.clip // self.cache.block

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens per latent frame as (rows, columns)."""
        return self.latent[0] // self.dit.patch[1], self.latent[1] // self.dit.patch[2]

    @property
    def tokens_per_frame(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def packed_grid(self) -> tuple[int, int, int]:
        """Tokens of one packed block as (time slots, rows, columns)."""
        stride = self.compressor.stride
        return (
            self.compressor.frames // stride(0),
            self.latent[0] // stride(1),
            self.latent[1] // stride(2),
        )

    @property
    def tokens_per_packed_block(self) -> int:
        return math.prod(self.packed_grid)
