"""Every size and choice of an experiment, as frozen values that refuse impossible combinations."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from packforcing_jax.errors import require
from packforcing_jax.train_config import TrainConfig

WAN_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
WAN_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
           3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip


DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class DiTConfig:
    """The diffusion transformer (Wan2.1 `model.py`). Widths in channels, `patch` in latent cells (t, y, x)."""

    dim: int = 1536
    ffn_dim: int = 8960
    heads: int = 12
    layers: int = 30
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    in_channels: int = 16
    out_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    rope_theta: tuple[float, float, float] = (10000.0, 10000.0, 10000.0)  # time, rows, columns
    rope_pairs: tuple[int, int, int] | None = None  # None: Wan's split of the head

    def __post_init__(self):
        require(self.dim % self.heads == 0, f"dit.dim={self.dim} is not divisible by heads={self.heads}; change one.")
        require(self.head_dim % 2 == 0, f"dit.dim/heads={self.head_dim} must be even for rotary pairs; change heads.")
        require(self.patch[0] == 1, f"dit.patch={self.patch} must be 1 in time, as in Wan2.1.")
        if self.rope_pairs is not None:
            require(sum(self.rope_pairs) == self.head_dim // 2,
                    f"dit.rope_pairs={self.rope_pairs} must add up to {self.head_dim // 2} pairs.")  # fmt: skip

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def pairs(self) -> tuple[int, int, int]:
        """Rotary pairs per axis: Wan gives each spatial axis 2*(d//6) channels and time the rest."""
        if self.rope_pairs is not None:
            return self.rope_pairs
        space = self.head_dim // 6
        return self.head_dim // 2 - 2 * space, space, space


@dataclass(frozen=True)
class VAEConfig:
    """The causal 3-D autoencoder (Wan2.1 `vae.py`): first frame alone, then groups of `time_factor`."""

    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    mean: tuple[float, ...] = WAN_MEAN
    std: tuple[float, ...] = WAN_STD

    def __post_init__(self):
        require(len(self.temporal_downsample) == len(self.dim_mult) - 1,
                f"vae.temporal_downsample={self.temporal_downsample} needs {len(self.dim_mult) - 1} entries.")
        require(len(self.mean) == len(self.std) == self.z_dim,
                f"vae.mean and vae.std need z_dim={self.z_dim} entries each.")  # fmt: skip

    @property
    def time_factor(self) -> int:
        return 2 ** sum(self.temporal_downsample)

    @property
    def space_factor(self) -> int:
        return 2 ** (len(self.dim_mult) - 1)


@dataclass(frozen=True)
class SpaceToDepthConfig:
    """An exact codec behind the VAE's interface: `factor` x `factor` pixels become channels; time is kept."""

    factor: int = 4

    @property
    def z_dim(self) -> int:
        return 3 * self.factor**2

    @property
    def time_factor(self) -> int:
        return 1

    @property
    def space_factor(self) -> int:
        return self.factor


@dataclass(frozen=True)
class TextConfig:
    """The UMT5 encoder (Wan2.1 `t5.py`): every layer has its own relative position bias."""

    vocab: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    heads: int = 64
    layers: int = 24
    buckets: int = 32
    max_distance: int = 128
    max_words: int = 512

    def __post_init__(self):
        require(self.dim_attn % self.heads == 0,
                f"text.dim_attn={self.dim_attn} is not divisible by heads={self.heads}; change one.")  # fmt: skip


CHOICES = {
    "cache.rope_adjustment": ("sink", "incremental", "sink_only", "none"),
    "cache.span": ("true", "fit"),
    "cache.selection": ("affinity", "mass_sum", "mass_max", "logit_max", "centred_logit_max", "log_sum_exp",
                        "paper_sum", "recency", "random", "all"),
    "cache.scope": ("layer", "shared"),
    "cache.timing": ("first", "late"),
    "cache.archive": ("device", "host"),
    "compressor.branches": ("both", "hr", "lr"),
    "compressor.places": ("stretched", "native"),
    "compressor.keys": ("blocks", "projected"),
    "sample.prediction": ("velocity", "clean"),
    **{f"dtypes.{name}": DTYPES for name in ("params", "compute", "cache", "vae", "text")},
}  # fmt: skip


def require_choices(group: str, settings: Any) -> None:
    """Raises `InputError` for the first field of the dataclass `settings` that is none of its `CHOICES`."""
    for key, allowed in CHOICES.items():
        owner, name = key.split(".")
        if owner == group:
            value = getattr(settings, name)
            require(value in allowed, f"{key}={value!r} is unknown; choose one of {', '.join(allowed)}.")


@dataclass(frozen=True)
class CacheConfig:
    """The memory (paper sec. 3.2): all sizes in latent frames, `top` and `capacity` in packed blocks.

    `spare` recent frames outlive the block that could see them (Self-Forcing's rolling cache evicts one block late).
    `trained` is the range of positions seen in training; span `fit` squeezes mid into what is left of it.
    """

    block: int = 4
    sink: int = 8
    recent: int = 4
    top: int = 16
    capacity: int = 128
    spare: int = 0
    rope_adjustment: str = "sink"
    span: str = "true"
    trained: int = 20
    selection: str = "affinity"
    scope: str = "layer"  # every layer chooses for itself, or one choice is shared by all
    timing: str = "first"
    archive: str = "device"  # where packed blocks lie
    score_pool: tuple[int, int, int] = (2, 4, 4)  # query tokens averaged before scoring: frames, rows, columns
    key_multiple: int = 128

    def __post_init__(self):
        sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.type is int}
        for name, value in sizes.items():
            require(value >= 0, f"cache.{name}={value} is negative; give 0 or more.")
        require(self.block > 0, f"cache.block={self.block} must be at least one latent frame.")
        require(self.top <= self.capacity, f"cache.top={self.top} exceeds capacity={self.capacity}; raise capacity.")
        require(self.top == 0 or (self.sink % self.block == 0 and self.recent % self.block == 0),
                f"cache.sink={self.sink} and recent={self.recent} must be whole blocks of {self.block} frames "
                "when packed blocks are attended; change them or set top=0.")  # fmt: skip
        require_choices("cache", self)
        require(self.rope_adjustment != "incremental" or self.span == "true",
                f"cache.rope_adjustment='incremental' moves whole blocks, but span={self.span!r} squeezes them; "
                "set span=true or rope_adjustment=sink.")  # fmt: skip
        require(self.archive == "device" or (self.scope, self.timing) == ("shared", "late"),
                f"cache.archive='host' is fetched once a block, but scope={self.scope!r} and timing={self.timing!r} "
                "look it up in every layer; set scope=shared and timing=late.")  # fmt: skip
        require(self.archive == "device" or self.rope_adjustment != "incremental",
                "cache.archive='host' cannot be turned in place by rope_adjustment='incremental'; "
                "set rope_adjustment=sink.")  # fmt: skip

    @property
    def ring(self) -> int:
        """Frames the recent ring stores."""
        return self.recent + self.spare

    @property
    def attended(self) -> int:
        """Packed blocks a block step attends to at most."""
        return self.capacity if self.top and self.selection == "all" else self.top

    @property
    def slots(self) -> int:
        """Slots of the packed ring: the archive plus the twins of blocks still sharp in `recent`."""
        return self.capacity + self.recent // self.block if self.top else 0


PROFILES = {
    "paper": CacheConfig(),
    "published": CacheConfig(block=3, sink=9, recent=3, span="fit", trained=21, score_pool=(3, 4, 4)),
    "stage": CacheConfig(score_pool=(4, 1, 1), key_multiple=32),
    "no-mid": CacheConfig(top=0, capacity=0, key_multiple=32),
    "no-sink": CacheConfig(sink=0, recent=12, top=0, capacity=0, key_multiple=32),
}


@dataclass(frozen=True)
class CompressorConfig:
    """The packing of one block (paper sec. 3.3): HR strided 3-D convolutions plus LR pooled re-encoding.

    `strides` are (t, y, x) per HR convolution; a stride-2 spatial convolution has kernel 4 and padding 1, a
    temporal one kernel 3. `pool` is the pixel pooling (t, y, x) of the LR branch. `places`: packed tokens stand at the
    centres of the patches they cover, or (`native`) on a grid of their own. `keys`: their keys and values come out of
    a pass through all transformer blocks, or (`projected`) from each layer's own projections of the packed tokens.
    """

    channels: tuple[int, ...] = (32, 128, 512, 2048)
    strides: tuple[tuple[int, int, int], ...] = ((2, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2))
    frames: int = 4  # latent frames packed together; a shorter block repeats its last frame
    pool: tuple[int, int, int] = (2, 4, 4)
    branches: str = "both"
    places: str = "stretched"
    keys: str = "blocks"

    def __post_init__(self):
        require(len(self.channels) == len(self.strides), "compressor.channels and strides need the same length.")
        require_choices("compressor", self)

    def stride(self, axis: int) -> int:
        """Total latent stride along axis 0 (time), 1 (rows) or 2 (columns)."""
        return math.prod(step[axis] for step in self.strides)


@dataclass(frozen=True)
class SampleConfig:
    """How a block is drawn: nominal `steps` warped by `shift` (Self-Forcing), re-noised after each but the last."""

    steps: tuple[int, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    prediction: str = "velocity"  # what the network returns: velocity or clean

    def __post_init__(self):
        require(len(self.steps) > 0 and all(0 < s <= 1000 for s in self.steps)
                and all(a > b for a, b in zip(self.steps, self.steps[1:])),
                f"sample.steps={self.steps} must fall strictly within 1000..1.")  # fmt: skip
        require_choices("sample", self)


@dataclass(frozen=True)
class DtypeConfig:
    """Number formats: weights as held, what is computed with them, stored keys and values, codec, text encoder.

    Norms, softmax, rotary angles and time embeddings are computed in float32 whatever stands here.
    """

    params: str = "float32"
    compute: str = "float32"
    cache: str = "float32"
    vae: str = "float32"
    text: str = "float32"

    def __post_init__(self):
        require_choices("dtypes", self)


HALF = DtypeConfig(*(["bfloat16"] * 5))  # as Self-Forcing samples


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
            require(size % self.dit.patch[axis] == 0,
                    f"latent={self.latent} is not a multiple of dit.patch={self.dit.patch}; change one.")  # fmt: skip
        pool, frame = self.cache.score_pool, (self.cache.block, *self.grid)
        require(self.cache.top == 0 or all(0 < window <= size for window, size in zip(pool, frame)),
                f"cache.score_pool={pool} does not fit into a block of {frame} tokens; make it smaller.")  # fmt: skip
        require(self.codec.z_dim == self.dit.in_channels,
                f"codec.z_dim={self.codec.z_dim} differs from dit.in_channels={self.dit.in_channels}; change one.")

    @property
    def blocks(self) -> int:
        """Blocks of a training clip."""
        require(self.clip % self.cache.block == 0,
                f"clip={self.clip} is not a whole number of blocks of {self.cache.block}; change one.")  # fmt: skip
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
        return self.compressor.frames // stride(0), self.latent[0] // stride(1), self.latent[1] // stride(2)

    @property
    def tokens_per_packed_block(self) -> int:
        return math.prod(self.packed_grid)
