"""One model with everything needed to sample from it, and the part of it that decides about a block's programs."""

import functools
import math
from dataclasses import dataclass

from packforcing_jax.config.memory import CacheConfig, MemorySpec
from packforcing_jax.config.networks import (
    CompressorConfig,
    DiTConfig,
    ModelConfig,
    SpaceToDepthConfig,
    TextConfig,
    VAEConfig,
)
from packforcing_jax.config.sampling import DtypeConfig, SampleConfig
from packforcing_jax.errors import require
from packforcing_jax.policies.attention import Backend


@dataclass(frozen=True)
class StepConfig:
    """What decides about the programs of one block, and nothing else: the static argument of what is compiled."""

    dit: ModelConfig
    cache: CacheConfig
    compressor: CompressorConfig
    sample: SampleConfig
    latent: tuple[int, int]
    attention: str | Backend
    compute: str  # number format of what is computed

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens per latent frame as (rows, columns)."""
        return self.latent[0] // self.dit.patch[1], self.latent[1] // self.dit.patch[2]

    @property
    def tokens_per_frame(self) -> int:
        return math.prod(self.grid)

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

    @functools.cached_property
    def memory(self) -> MemorySpec:
        """What the memory reads of this."""
        dit = self.dit
        stride = self.compressor.stride
        return MemorySpec(
            cache=self.cache,
            layers=dit.layers,
            heads=dit.heads,
            head_dim=dit.head_dim,
            pairs=dit.pairs,
            rope_theta=dit.rope_theta,
            grid=self.grid,
            latent=(*self.latent, dit.in_channels),
            packed_grid=self.packed_grid,
            packed_stride=(stride(0), stride(1) / dit.patch[1], stride(2) / dit.patch[2]),
            packed_frames=self.compressor.frames,
            packed_position_rule=self.compressor.positions,
        )


@dataclass(frozen=True)
class Experiment:
    """One model with everything needed to sample from it; `latent` is (rows, columns), `fps` of the video."""

    name: str
    dit: DiTConfig = DiTConfig()  # or a `ModelConfig` of one's own, which builds its model
    codec: VAEConfig | SpaceToDepthConfig = VAEConfig()
    text: TextConfig = TextConfig()
    cache: CacheConfig = CacheConfig()
    compressor: CompressorConfig = CompressorConfig()
    sample: SampleConfig = SampleConfig()
    dtypes: DtypeConfig = DtypeConfig()
    latent: tuple[int, int] = (60, 104)
    fps: int = 16
    clip: int = 20  # latent frames of a training clip
    attention: str | Backend = "auto"  # a name of policies.attention.BACKENDS, or a backend
    method: str = "packforcing"  # by which the past is stored and attended to
    card: str = ""  # of the published checkpoint that the weights come from

    def __post_init__(self):
        for axis, size in zip((1, 2), self.latent):
            require(
                size % self.dit.patch[axis] == 0,
                f"latent={self.latent} is not a multiple of dit.patch={self.dit.patch}; change one.",
            )
        pool = self.cache.score_pool
        frame = (self.cache.block, *self.grid)
        require(
            self.cache.top == 0 or all(0 < window <= size for window, size in zip(pool, frame)),
            f"cache.score_pool={pool} does not fit into a block of {frame} tokens; make it smaller.",
        )
        steps = len(self.sample.steps)
        require(
            not self.cache.joint
            or (self.cache.window == steps * self.cache.block and not self.sample.first_steps),
            f"cache.window={self.cache.window} must be a block of {self.cache.block} frames for each of the {steps} "
            "denoising steps, and no sample.first_steps; change one.",
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

    @functools.cached_property
    def step(self) -> StepConfig:
        """What decides about the programs of one block."""
        return StepConfig(
            dit=self.dit,
            cache=self.cache,
            compressor=self.compressor,
            sample=self.sample,
            latent=self.latent,
            attention=self.attention,
            compute=self.dtypes.compute,
        )

    @property
    def memory(self) -> MemorySpec:
        """What the memory reads of this."""
        return self.step.memory

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens per latent frame as (rows, columns)."""
        return self.step.grid

    @property
    def tokens_per_frame(self) -> int:
        return self.step.tokens_per_frame

    @property
    def packed_grid(self) -> tuple[int, int, int]:
        """Tokens of one packed block as (time slots, rows, columns)."""
        return self.step.packed_grid

    @property
    def tokens_per_packed_block(self) -> int:
        return self.step.tokens_per_packed_block
