"""The layers of the causal video autoencoder: each maps (frames, what it remembers) to (frames, what it remembers).

A 3-tap causal convolution remembers its last two input frames; fresh memory is zero, which is its left padding. So
whole videos and chunks run the same code, and only resampling in time treats the `first` chunk of a video apart.
"""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jax import Array
from jaxtyping import Float

Frames: TypeAlias = Float[Array, "b t y x c"]
Past: TypeAlias = (
    Any  # arrays in nested tuples, one entry per layer; () for a layer that remembers nothing
)
Size: TypeAlias = tuple[int, int, int]  # batch, rows, columns of the frames that enter a layer

HISTORY = 2  # input frames a causal convolution remembers (Wan2.1: CACHE_T)
TINY = 1e-12  # the smallest norm that is divided by


class Layer(Protocol):
    """What every layer offers: fresh memory for frames of a size, and a step over any number of frames."""

    def start(self, size: Size) -> tuple[Past, Size]: ...

    def __call__(self, x: Frames, past: Past, *, first: bool) -> tuple[Frames, Past]: ...


def start(layers: Iterable[Layer], size: Size) -> tuple[tuple[Past, ...], Size]:
    """Fresh memory of `layers` run in turn, and the size of the frames that come out."""
    memory = []
    for layer in layers:
        past, size = layer.start(size)
        memory.append(past)
    return tuple(memory), size


def run(
    layers: Iterable[Layer], x: Frames, memory: Past, *, first: bool
) -> tuple[Frames, tuple[Past, ...]]:
    """`x` through `layers` in turn, and what each remembers afterwards."""
    after = []
    for layer, past in zip(layers, memory, strict=True):
        x, past = layer(x, past, first=first)
        after.append(past)
    return x, tuple(after)


def per_channel(values: Array, ndim: int) -> Array:
    """`values` [c] with leading axes, ready to meet an array of `ndim` axes, channels last."""
    return jnp.expand_dims(values, range(ndim - 1))


def causal_conv(channels: int, out: int, rngs: nnx.Rngs) -> nnx.Conv:
    """A 3x3x3 convolution that pads space only: time is extended to the left by what is remembered."""
    return nnx.Conv(channels, out, (3, 3, 3), padding=((0, 0), (1, 1), (1, 1)), rngs=rngs)


def pointwise(channels: int, out: int, rngs: nnx.Rngs) -> nnx.Conv:
    """A 1x1x1 convolution."""
    return nnx.Conv(channels, out, (1, 1, 1), rngs=rngs)


def blank(conv: nnx.Conv, size: Size, frames: int = HISTORY) -> Frames:
    """Zeros in place of the last `frames` inputs of `conv`."""
    batch, rows, columns = size
    return jnp.zeros((batch, frames, rows, columns, conv.in_features), conv.kernel.dtype)


def extend(conv: nnx.Conv, x: Frames, past: Frames) -> tuple[Frames, Frames]:
    """`conv` over `x` continued from `past`, and the last input frames it has now seen."""
    frames = jnp.concatenate([past, x], axis=1)
    return conv(frames), frames[:, -HISTORY:]


class RMSNorm(nnx.Module):
    """Scales every voxel to length sqrt(channels), then by `gamma`: x / max(|x|, 1e-12) * sqrt(c) * gamma."""

    def __init__(self, channels: int):
        self.gamma = nnx.Param(jnp.ones((channels,)))

    def __call__(self, x: Frames) -> Frames:
        wide = x.astype(jnp.float32)
        squares = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
        length = jnp.sqrt(
            jnp.maximum(squares, TINY**2)
        )  # inside the root, so that the slope at zero is finite
        gamma = self.gamma[...].astype(jnp.float32) * x.shape[-1] ** 0.5
        return (wide / length * per_channel(gamma, x.ndim)).astype(x.dtype)


class Stem(nnx.Module):
    """The convolution that opens the encoder and the decoder."""

    def __init__(self, channels: int, out: int, rngs: nnx.Rngs):
        self.conv = causal_conv(channels, out, rngs)

    def start(self, size: Size) -> tuple[Past, Size]:
        return blank(self.conv, size), size

    def __call__(self, x: Frames, past: Past, *, first: bool) -> tuple[Frames, Past]:
        return extend(self.conv, x, past)


class Head(nnx.Module):
    """The convolution that closes the encoder and the decoder."""

    def __init__(self, channels: int, out: int, rngs: nnx.Rngs):
        self.norm = RMSNorm(channels)
        self.conv = causal_conv(channels, out, rngs)

    def start(self, size: Size) -> tuple[Past, Size]:
        return blank(self.conv, size), size

    def __call__(self, x: Frames, past: Past, *, first: bool) -> tuple[Frames, Past]:
        return extend(self.conv, jax.nn.silu(self.norm(x)), past)


class ResidualBlock(nnx.Module):
    """Two normalised causal convolutions beside a shortcut, which is the identity where the width stays."""

    def __init__(self, channels: int, out: int, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(channels)
        self.conv1 = causal_conv(channels, out, rngs)
        self.norm2 = RMSNorm(out)
        self.conv2 = causal_conv(out, out, rngs)
        self.shortcut = pointwise(channels, out, rngs) if channels != out else None

    def start(self, size: Size) -> tuple[Past, Size]:
        return (blank(self.conv1, size), blank(self.conv2, size)), size

    def __call__(self, x: Frames, past: Past, *, first: bool) -> tuple[Frames, Past]:
        inner, past1 = extend(self.conv1, jax.nn.silu(self.norm1(x)), past[0])
        inner, past2 = extend(self.conv2, jax.nn.silu(self.norm2(inner)), past[1])
        return inner + (x if self.shortcut is None else self.shortcut(x)), (past1, past2)


class Attention(nnx.Module):
    """One head of attention among the places of each frame, beside the identity."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.norm = RMSNorm(channels)
        self.to_qkv = nnx.Conv(channels, 3 * channels, (1, 1), rngs=rngs)
        self.proj = nnx.Conv(channels, channels, (1, 1), rngs=rngs)

    def start(self, size: Size) -> tuple[Past, Size]:
        return (), size

    def __call__(self, x: Frames, past: Past, *, first: bool) -> tuple[Frames, Past]:
        rows = x.shape[2]
        qkv = rearrange(self.to_qkv(self.norm(x)), "b t y x (part c) -> t part b (y x) c", part=3)
        mixed = jax.lax.map(
            _spatial_attention, qkv
        )  # frame by frame, to hold one frame's weights at a time
        return x + self.proj(rearrange(mixed, "t b (y x) c -> b t y x c", y=rows)), ()


def _spatial_attention(qkv: Float[Array, "3 b places c"]) -> Float[Array, "b places c"]:
    """The attention of one frame; softmax in float32."""
    q, k, v = qkv
    affinity = (
        jnp.einsum("bqc,bkc->bqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    )
    return jnp.einsum("bqk,bkc->bqc", jax.nn.softmax(affinity, axis=-1).astype(v.dtype), v)


class Downsample(nnx.Module):
    """Half the rows and columns (padded right and bottom), then, if `temporal`, half the frames after the first."""

    def __init__(self, channels: int, *, temporal: bool, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            channels, channels, (3, 3), strides=2, padding=((0, 1), (0, 1)), rngs=rngs
        )
        self.time_conv = _time_conv(channels, channels, stride=2, rngs=rngs) if temporal else None

    def start(self, size: Size) -> tuple[Past, Size]:
        batch, rows, columns = size
        small = (batch, rows // 2, columns // 2)
        return () if self.time_conv is None else blank(self.time_conv, small, frames=1), small

    def __call__(self, x: Frames, past: Past, *, first: bool) -> tuple[Frames, Past]:
        x = self.conv(x)
        if self.time_conv is None:
            return x, ()
        alone, frames = (x[:, :1], x) if first else (x[:, :0], jnp.concatenate([past, x], axis=1))
        pairs = self.time_conv(frames) if frames.shape[1] > 1 else frames[:, :0]
        return jnp.concatenate([alone, pairs], axis=1), frames[:, -1:]


class Upsample(nnx.Module):
    """Twice the frames after the first, if `temporal`, then twice the rows and columns at half the channels."""

    def __init__(self, channels: int, *, temporal: bool, rngs: nnx.Rngs):
        self.time_conv = (
            _time_conv(channels, 2 * channels, stride=1, rngs=rngs) if temporal else None
        )
        self.conv = nnx.Conv(channels, channels // 2, (3, 3), padding=1, rngs=rngs)

    def start(self, size: Size) -> tuple[Past, Size]:
        batch, rows, columns = size
        return () if self.time_conv is None else blank(self.time_conv, size), (
            batch,
            2 * rows,
            2 * columns,
        )

    def __call__(self, x: Frames, past: Past, *, first: bool) -> tuple[Frames, Past]:
        x, past = self.lengthen(x, past, first=first)
        return self.conv(repeat(x, "b t y x c -> b t (y 2) (x 2) c")), past

    def lengthen(self, x: Frames, past: Past, *, first: bool) -> tuple[Frames, Past]:
        """Two frames for one, except for the first of a video, which no convolution in time ever sees."""
        alone, rest = (x[:, :1], x[:, 1:]) if first else (x[:, :0], x)
        if self.time_conv is None or rest.shape[1] == 0:
            return x, past
        doubled, past = extend(self.time_conv, rest, past)
        doubled = rearrange(doubled, "b t y x (parity c) -> b (t parity) y x c", parity=2)
        return jnp.concatenate([alone, doubled], axis=1), past


def _time_conv(channels: int, out: int, *, stride: int, rngs: nnx.Rngs) -> nnx.Conv:
    """A convolution over three frames at one place, without padding."""
    return nnx.Conv(channels, out, (3, 1, 1), strides=(stride, 1, 1), padding="VALID", rngs=rngs)


class Chain(nnx.Module):
    """Layers run in turn, as one layer; they are called 0, 1, 2, ..."""

    def __init__(self, layers: Iterable[Layer]):
        self.length = 0
        for layer in layers:
            setattr(self, str(self.length), layer)
            self.length += 1

    def __iter__(self) -> Iterator[Layer]:
        return (getattr(self, str(number)) for number in range(self.length))

    def start(self, size: Size) -> tuple[Past, Size]:
        return start(self, size)

    def __call__(self, x: Frames, past: Past, *, first: bool) -> tuple[Frames, Past]:
        return run(self, x, past, first=first)
