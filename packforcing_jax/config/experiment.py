"""One model with everything needed to sample from it, and the part of it that decides about a block's programs."""

import functools
import math
from dataclasses import dataclass

from packforcing_jax.config import limits
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
from packforcing_jax.errors import nearest, require
from packforcing_jax.policies.attention import BACKENDS, Backend


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
        return self.compressor.packed_grid(self.latent)

    @property
    def tokens_per_packed_block(self) -> int:
        return math.prod(self.packed_grid)

    @functools.cached_property
    def memory(self) -> MemorySpec:
        """What the memory reads of this."""
        dit = self.dit
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
            packed_stride=self.compressor.token_size(dit.patch),
            packed_frames=self.compressor.frames,
            packed_position_rule=self.compressor.positions,
            packing_pass=self.compressor.packing_pass,
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
        limits.require_within(limits.EXPERIMENT, "", self)
        require(
            isinstance(self.attention, Backend) or self.attention in ("auto", *BACKENDS),
            f"attention={self.attention!r} is unknown; {nearest(str(self.attention), ('auto', *BACKENDS))}",
        )
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
            f"codec.z_dim={self.codec.z_dim}{_factor(self.codec)} differs from dit.in_channels={self.dit.in_channels}; "
            "change one.",
        )
        if self.packs_pixels:
            require_pools(self)
        if self.cache.top:
            require_packs(self.step, self.codec)
        require_indexed(self.memory)

    @property
    def packs_pixels(self) -> bool:
        """Whether packing needs the pixels of a block."""
        return self.cache.top > 0 and self.compressor.packs_pixels

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


def _factor(codec: VAEConfig | SpaceToDepthConfig) -> str:
    """Where the channels of a codec come from, if no setting says them."""
    return f" (codec.factor={codec.factor})" if isinstance(codec, SpaceToDepthConfig) else ""


def require_whole(exp: Experiment) -> None:
    """Raises `InputError` unless the parts of a model go together, so that it can draw; some may be converted alone."""
    dit: DiTConfig = exp.dit
    out = getattr(dit, "out_channels", dit.in_channels)
    require(
        out == dit.in_channels,
        f"dit.out_channels={out} differs from in_channels={dit.in_channels}, but what comes out is denoised again; "
        "give them one value.",
    )
    require(
        exp.text.dim == dit.text_dim,
        f"text.dim={exp.text.dim} differs from dit.text_dim={dit.text_dim}, which reads it; change one.",
    )
    require(
        exp.text.max_words <= dit.text_len,
        f"text.max_words={exp.text.max_words} exceeds dit.text_len={dit.text_len}, the words that the transformer "
        "reads; change one.",
    )


def require_pools(exp: Experiment) -> None:
    """Raises `InputError` unless the pixels of a block, pooled as packing wants them, fill whole latents."""
    pool = exp.compressor.pool
    group = exp.codec.time_factor
    slots = exp.packed_grid[0]
    frames = -(-exp.cache.block * group // pool[0])
    most = slots if group == 1 else 1 + group * slots
    require(
        slots > 0 and frames <= most,
        f"compressor.pool={pool} leaves {frames} frames of a block of cache.block={exp.cache.block}, but "
        f"compressor.frames={exp.compressor.frames} and strides={exp.compressor.strides} pack {most} at most; pool "
        "more frames or pack more.",
    )
    rows, columns = low_res_cells(exp.latent, exp.codec, pool)
    require(
        rows > 0 and columns > 0,
        f"compressor.pool={pool} leaves no whole cell of latent={exp.latent} in rows or columns; make it smaller.",
    )


def low_res_cells(
    latent: tuple[int, int], codec: VAEConfig | SpaceToDepthConfig, pool: tuple[int, int, int]
) -> tuple[int, int]:
    """Rows and columns of latents that are made of pooled pixels."""
    factor = codec.space_factor
    rows, columns = (side * factor // each // factor for side, each in zip(latent, pool[1:]))
    return rows, columns


def require_packs(step: StepConfig, codec: VAEConfig | SpaceToDepthConfig) -> None:
    """Raises `InputError` unless a block can be packed: its convolutions and its pooled pixels give the same tokens."""
    cfg = step.compressor
    require(
        step.cache.block <= cfg.frames,
        f"cache.block={step.cache.block} exceeds compressor.frames={cfg.frames}, the frames that are packed together; "
        "change one or set cache.top=0.",
    )
    sizes = (cfg.frames, *step.latent)
    require(
        min(step.packed_grid) > 0,
        f"compressor strides of {tuple(cfg.stride(axis) for axis in range(3))} in all leave nothing of "
        f"compressor.frames={cfg.frames} and latent={step.latent}; make them smaller or set cache.top=0.",
    )
    if isinstance(cfg, CompressorConfig) and cfg.branches in ("both", "hr"):
        convolved = tuple(cfg.convolved(axis, size) for axis, size in enumerate(sizes))
        require(
            convolved == step.packed_grid
            or (cfg.adaptive_pool and min(convolved) > 0 and convolved[0] == step.packed_grid[0]),
            f"compressor.strides={cfg.strides} make {convolved} tokens of compressor.frames={cfg.frames} and "
            f"latent={step.latent}, not {step.packed_grid}; choose strides that divide them.",
        )
    if cfg.branches == "own":
        own = step.cache.block * step.tokens_per_frame
        require(
            cfg.tokens <= own,
            f"compressor.tokens={cfg.tokens} exceeds the {own} tokens of a block, which are averaged; make it smaller.",
        )
    if cfg.packs_pixels:
        cells = low_res_cells(step.latent, codec, cfg.pool)
        wanted = tuple(n * p for n, p in zip(step.packed_grid[1:], step.dit.patch[1:]))
        require(
            all(have >= want for have, want in zip(cells, wanted)),
            f"compressor.pool={cfg.pool} leaves {cells} cells of latent={step.latent}, but packing needs {wanted}; "
            "make pool smaller in rows and columns.",
        )


def require_indexed(memory: MemorySpec) -> None:
    """Raises `InputError` for a memory of more keys than an index reaches."""
    stored = memory.cache.slots * memory.tokens_per_packed_block
    require(
        max(memory.room, stored) <= limits.KEYS,
        f"the memory of cache.sink={memory.cache.sink}, recent={memory.cache.recent}, top={memory.cache.top} and "
        f"capacity={memory.cache.capacity} holds {max(memory.room, stored):,} keys a layer, more than "
        f"{limits.KEYS:,}; make them smaller.",
    )
