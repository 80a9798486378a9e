"""Sizes of the networks: transformer, autoencoder, text encoder, compressor."""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

from packforcing_jax.config import limits
from packforcing_jax.config.choices import require_choices
from packforcing_jax.errors import require

WAN_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
WAN_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
           3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip


class ModelConfig(Protocol):
    """What has to be known of any base model; a frozen, hashable value that may also `build(rngs)` its model.

    Widths in channels, `patch` in latent cells (t, y, x), `pairs` rotary pairs of a head (time, rows, columns).
    """

    @property
    def dim(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def text_dim(self) -> int: ...
    @property
    def text_len(self) -> int: ...
    @property
    def in_channels(self) -> int: ...
    @property
    def patch(self) -> tuple[int, int, int]: ...
    @property
    def pairs(self) -> tuple[int, int, int]: ...
    @property
    def rope_theta(self) -> tuple[float, float, float]: ...


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
        limits.require_within(limits.DIT, "dit", self)
        require(
            self.dim % self.heads == 0,
            f"dit.dim={self.dim} is not divisible by heads={self.heads}; change one.",
        )
        require(
            self.head_dim % 2 == 0,
            f"dit.dim/heads={self.head_dim} must be even for rotary pairs; change heads.",
        )
        require(
            self.patch[0] == 1,
            f"dit.patch={self.patch} must be 1 in time, as in Wan2.1; give (1, rows, columns).",
        )
        require(
            self.freq_dim % 2 == 0,
            f"dit.freq_dim={self.freq_dim} must be even, half sines and half cosines; change it.",
        )
        if self.rope_pairs is not None:
            require(
                sum(self.rope_pairs) == self.head_dim // 2,
                f"dit.rope_pairs={self.rope_pairs} must add up to {self.head_dim // 2} pairs, half of dim/heads; "
                "change it.",
            )

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

    tag: ClassVar[str] = "vae"  # its name in model folders
    dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    mean: tuple[float, ...] = WAN_MEAN
    std: tuple[float, ...] = WAN_STD

    def __post_init__(self):
        limits.require_within(limits.VAE, "codec", self)
        require(len(self.dim_mult) > 0, "codec.dim_mult=() has no stage; give one entry for each.")
        require(
            len(self.temporal_downsample) == len(self.dim_mult) - 1,
            f"codec.temporal_downsample={self.temporal_downsample} needs {len(self.dim_mult) - 1} entries, one for "
            "each stage of dim_mult but the last; change one.",
        )
        require(
            len(self.mean) == len(self.std) == self.z_dim,
            f"codec.mean and codec.std need z_dim={self.z_dim} entries each; give as many.",
        )

    @property
    def time_factor(self) -> int:
        return 2 ** sum(self.temporal_downsample)

    @property
    def space_factor(self) -> int:
        return 2 ** (len(self.dim_mult) - 1)


@dataclass(frozen=True)
class SpaceToDepthConfig:
    """An exact codec behind the VAE's interface: `factor` x `factor` pixels become channels, frame by frame."""

    tag: ClassVar[str] = "space_to_depth"
    factor: int = 4

    def __post_init__(self):
        limits.require_within(limits.SPACE_TO_DEPTH, "codec", self)

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
        limits.require_within(limits.TEXT, "text", self)
        require(
            self.dim_attn % self.heads == 0,
            f"text.dim_attn={self.dim_attn} is not divisible by heads={self.heads}; change one.",
        )
        require(
            self.max_distance > self.buckets // 4,
            f"text.max_distance={self.max_distance} must exceed a quarter of buckets={self.buckets}, the distances "
            "that have a bucket of their own; change one.",
        )


@dataclass(frozen=True)
class CompressorConfig:
    """The packing of one block (paper sec. 3.3): HR strided 3-D convolutions plus LR pooled re-encoding.

    `strides` are (t, y, x) per HR convolution; a stride-2 spatial convolution has kernel 4 and padding 1, a
    temporal one kernel 3. `pool` is the pixel pooling (t, y, x) of the LR branch. `positions`: packed tokens stand
    at the centres of the patches they cover, or (`native`) on a grid of their own. `keys`: their keys and values come
    out of a pass through all blocks, or (`projected`) from each layer's own projections of the packed tokens, which
    neither are normalised nor modulated before (`unmodulated`). `strided_kernel` is that of a spatial stride.
    `adaptive_pool`: what convolutions leave beside whole strides is averaged away. With `branches="own"` nothing is
    convolved: a block's own rotated keys and values, averaged along the row of tokens to `tokens` of them, are what is
    packed.
    """

    channels: tuple[int, ...] = (32, 128, 512, 2048)
    strides: tuple[tuple[int, int, int], ...] = ((2, 1, 1), (1, 2, 2), (1, 2, 2), (1, 2, 2))
    frames: int = 4  # latent frames packed together; a shorter block repeats its last frame
    pool: tuple[int, int, int] = (2, 4, 4)
    branches: str = "both"
    positions: str = "stretched"
    keys: str = "blocks"
    strided_kernel: int = 4
    adaptive_pool: bool = False
    tokens: int = 0

    def __post_init__(self):
        limits.require_within(limits.COMPRESSOR, "compressor", self)
        require(
            0 < len(self.channels) == len(self.strides),
            f"compressor.channels={self.channels} and strides={self.strides} need the same length, one entry for each "
            "convolution; change one.",
        )
        require_choices("compressor", self)
        require(
            (self.branches == "own") == (self.tokens > 0),
            f"compressor.tokens={self.tokens} is how many averages of a block's own keys are kept, with "
            f"branches={self.branches!r}; give tokens and branches=own together, or neither.",
        )

    @property
    def packs_pixels(self) -> bool:
        """Whether packing needs the pixels of a block."""
        return self.branches in ("both", "lr")

    @property
    def packing_pass(self) -> bool:
        """Whether packed tokens pass through all layers, and attend."""
        return self.keys == "blocks" and self.branches != "own"

    def packed_grid(self, latent: tuple[int, int]) -> tuple[int, int, int]:
        """Tokens of a packed block as (time slots, rows, columns), for latents of so many rows and columns."""
        if self.branches == "own":
            return 1, 1, self.tokens
        least = int(self.adaptive_pool)
        rows, columns = (max(size // self.stride(1 + i), least) for i, size in enumerate(latent))
        return self.frames // self.stride(0), rows, columns

    def token_size(self, patch: tuple[int, int, int]) -> tuple[int, float, float]:
        """What one packed token stands for: frames, rows and columns of tokens of `patch` latent cells."""
        if self.branches == "own":
            return 1, 1.0, 1.0
        return self.stride(0), self.stride(1) / patch[1], self.stride(2) / patch[2]

    def stride(self, axis: int) -> int:
        """Total latent stride along axis 0 (time), 1 (rows) or 2 (columns)."""
        return math.prod(step[axis] for step in self.strides)

    def kernel(self, stride: tuple[int, int, int]) -> tuple[int, int, int]:
        """Kernel of a convolution: `strided_kernel` where space is strided, else 3; in time 3 where strided, else 1.

        It is padded by 1 on both sides wherever it is larger than 1: 30x52 -> 15x26 -> 7x13.
        """
        time, rows, columns = stride
        down, across = (self.strided_kernel if step > 1 else 3 for step in (rows, columns))
        return 3 if time > 1 else 1, down, across

    def convolved(self, axis: int, size: int) -> int:
        """What the convolutions leave of `size` along an axis."""
        for stride in self.strides:
            kernel = self.kernel(stride)[axis]
            size = (size + 2 * (kernel > 1) - kernel) // stride[axis] + 1
        return size


UNOFFICIAL_COMPRESSOR = CompressorConfig(  # of AshadowZ/PackForcing-Unofficial 3f4302e
    channels=(64, 256, 1024),
    strides=((1, 2, 2),) * 3,
    frames=3,
    branches="hr",
    positions="native",
    keys="unmodulated",
    strided_kernel=3,
    adaptive_pool=True,
)
