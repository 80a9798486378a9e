"""The mesh of devices, one table of where every parameter lies on it, and what cannot be divided over it.

`data` copies the model, `fsdp` divides every matrix and gathers it where it is used, `tensor` divides heads and the
MLP's inner width, `context` the tokens of a video. Moments and averages lie where their parameter does.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from packforcing_jax.config import Experiment, MeshConfig, TrainConfig
from packforcing_jax.errors import require
from packforcing_jax.sharding import AXES, BATCH, HEADS, divisor, fitting

Tree = TypeVar("Tree")
Grid: TypeAlias = (
    Mesh | AbstractMesh
)  # devices, or sizes of axes over devices that need not be there

SHARED = ("fsdp", "tensor")  # of what is gathered whole before it is used

# Where a parameter lies, by its path. A leading axis of layers is never divided.
RULES: tuple[tuple[str, P], ...] = (
    # The transformer. What heads or the MLP's inner width make is divided over `tensor`, what reads them along it.
    (r"dit/blocks/(attn|cross)/[qkv]/kernel", P(None, "fsdp", "tensor")),
    (r"dit/blocks/(attn|cross)/[qkv]/bias", P(None, "tensor")),
    (r"dit/blocks/(attn|cross)/norm_[qk]/scale", P(None, "tensor")),
    (r"dit/blocks/(attn|cross)/o/kernel", P(None, "tensor", "fsdp")),
    (r"dit/blocks/(attn|cross)/o/bias", P()),
    (r"dit/blocks/ffn_in/kernel", P(None, "fsdp", "tensor")),
    (r"dit/blocks/ffn_in/bias", P(None, "tensor")),
    (r"dit/blocks/ffn_out/kernel", P(None, "tensor", "fsdp")),
    (r"dit/blocks/ffn_out/bias", P()),
    (r"dit/blocks/norm3/(scale|bias)", P()),
    (r"dit/(blocks/|head_)modulation", P()),
    (r"dit/(patch|text_out|time_in|time_out|time_proj)/kernel", P(None, SHARED)),
    (r"dit/(text_in|head)/kernel", P(SHARED)),
    (r"dit/(patch|text_in|text_out|time_in|time_out|time_proj|head)/bias", P()),
    # The compressor: [t, y, x, in, out], then [in, out].
    (r"compressor/convs/\d+/kernel", P(None, None, None, None, SHARED)),
    (r"compressor/out/kernel", P(SHARED)),
    (r"compressor/(convs/\d+|out)/bias", P()),
    # The text encoder.
    (r"text/embedding/embedding", P(SHARED)),
    (r"text/blocks/attn/[qkv]/kernel", P(None, "fsdp", "tensor")),
    (r"text/blocks/attn/o/kernel", P(None, "tensor", "fsdp")),
    (r"text/blocks/ffn/(gate|fc1)/kernel", P(None, "fsdp", "tensor")),
    (r"text/blocks/ffn/fc2/kernel", P(None, "tensor", "fsdp")),
    (r"text/blocks/position/embedding", P()),
    (r"text/(blocks/norm[12]|norm)/scale", P()),
    # The codec is frozen and small.
    (r"codec/.+", P()),
)
_PATTERNS = [(re.compile(pattern), spec) for pattern, spec in RULES]


def make(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices, or over those given; `data` = 0 takes what the other axes leave."""
    count = len(jax.devices() if devices is None else devices)
    # Auto: the compiler lays out what lies between parameters, batch and `placement.constrain`.
    return jax.make_mesh(
        sizes(cfg, count), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def sizes(cfg: MeshConfig, count: int) -> tuple[int, ...]:
    """The sizes of the axes over `count` devices; raises `InputError` if they do not multiply to it."""
    sizes = tuple(getattr(cfg, name) for name in AXES)
    for name, size, least in zip(AXES, sizes, (0, 1, 1, 1)):
        require(size >= least, f"train.mesh.{name}={size} is no size; give {least} or more.")
    rest = math.prod(sizes[1:])
    filled = (sizes[0] or max(count // rest, 1), *sizes[1:])
    require(
        math.prod(filled) == count,
        f"train.mesh {_named(sizes)} takes {math.prod(filled)} devices, but there are {count}; "
        f"{_named(_near(sizes, count))} would fit.",
    )
    return filled


def _near(sizes: Sequence[int], count: int) -> tuple[int, ...]:
    """Sizes that multiply to `count`, each axis but the first a divisor of what was asked for."""
    shares: dict[str, int] = {}
    for name, size in reversed(list(zip(AXES[1:], sizes[1:]))):
        shares[name] = math.gcd(size, count // math.prod(shares.values()))
    return count // math.prod(shares.values()), *(shares[name] for name in AXES[1:])


def _named(sizes: Sequence[int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes))


# Where things lie


def rule(path: str) -> P:
    """The one rule of a parameter."""
    matches = [spec for pattern, spec in _PATTERNS if pattern.fullmatch(path)]
    require(
        len(matches) == 1,
        f"{path} is matched by {len(matches)} sharding rules and needs exactly one; "
        "correct RULES in packforcing_jax/training/mesh.py.",
    )
    return matches[0]


def spec(path: str, shape: Sequence[int], mesh: Grid) -> P:
    """How a parameter is divided, or what an optimiser keeps of it: whole if that has fewer axes.

    A dimension that an axis does not divide stays whole on it.
    """
    wanted = rule(path)
    return fitting(tuple(wanted), shape, mesh.shape) if len(wanted) <= len(shape) else P()


def shardings(tree: Tree, mesh: Grid) -> Tree:
    """Where every leaf lies, of a flat network, a training state or an optimiser's.

    What belongs to a parameter has its path as the last key, as in flat networks; everything else is whole everywhere.
    """

    def sharding_of(keys: tuple, leaf: Any) -> NamedSharding:
        path = str(getattr(keys[-1], "key", "")) if keys else ""
        return NamedSharding(mesh, spec(path, np.shape(leaf), mesh) if "/" in path else P())

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where a batch lies, its first axis divided over the copies and shards of the model."""
    return NamedSharding(mesh, P(BATCH))


# What cannot be divided


def check(exp: Experiment, train: TrainConfig, mesh: Grid) -> None:
    """Raises `InputError` for heads, batch or tokens that the mesh does not divide; allocates nothing."""
    parts = divisor(HEADS, mesh.shape)
    for name, model in ((exp.name, exp.dit), ("the teacher", train.teacher or exp.dit)):
        require(
            model.heads % parts == 0,
            f"{name} has {model.heads} heads, which train.mesh tensor x context = "
            f"{mesh.shape['tensor']} x {mesh.shape['context']} = {parts} does not divide; "
            f"sizes that work: {_divisors(model.heads)}.",
        )
    parts = divisor(BATCH, mesh.shape)
    processes = jax.process_count()
    whole = parts * train.accumulate
    require(
        train.batch % whole == 0,
        f"train.batch={train.batch} is not divisible by data x fsdp x accumulate = {mesh.shape['data']} x "
        f"{mesh.shape['fsdp']} x {train.accumulate} = {whole}; "
        f"make it {-(-train.batch // whole) * whole}.",
    )
    require(
        parts % processes == 0,
        f"train.mesh data x fsdp = {parts} is not divisible by {processes} processes; "
        "make tensor and context smaller, so that each process has videos of its own.",
    )
    tokens = exp.cache.block * exp.tokens_per_frame
    context = mesh.shape["context"]
    require(
        tokens % context == 0,
        f"{exp.name} has {tokens} tokens in a block, which train.mesh.context={context} does not divide; "
        f"sizes that work: {_divisors(tokens)}.",
    )


def _divisors(number: int) -> str:
    """The sizes of an axis that divide `number`, as text."""
    return ", ".join(str(size) for size in range(1, 65) if number % size == 0)
