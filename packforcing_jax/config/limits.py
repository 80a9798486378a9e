"""The numbers that settings may hold: the least and the most of each field, by group.

Every group checks its own numbers when it is made, so before anything is traced or allocated, and before any rule about
how they go together. The most is what no machine holds, or what makes a loop too long, not what is sensible.
"""

import numbers
from collections.abc import Mapping
from typing import TypeAlias

from packforcing_jax.errors import require, shown

Number: TypeAlias = int | float
Limits: TypeAlias = Mapping[str, tuple[Number, Number]]  # whole numbers where both ends are

WIDTH = 2**16  # channels
DEPTH = 256  # layers
SIDE = 4096  # cells or tokens along one axis
FRAMES = 2**16
COUNT = 2**20  # of anything that lies in a store
KEYS = 2**31 - 1  # what an index of 32 bits reaches
MANY = 10**9  # steps of a run
LEAST = 1e-12  # above zero

DIT: Limits = {
    "dim": (1, WIDTH),
    "ffn_dim": (1, 4 * WIDTH),
    "heads": (1, 1024),
    "layers": (1, DEPTH),
    "text_dim": (1, WIDTH),
    "text_len": (1, WIDTH),
    "freq_dim": (2, WIDTH),
    "in_channels": (1, WIDTH),
    "out_channels": (1, WIDTH),
    "patch": (1, 64),
    "eps": (LEAST, 1.0),
    "rope_theta": (1.0, 1e12),
    "rope_pairs": (0, WIDTH),
}
VAE: Limits = {
    "dim": (1, WIDTH),
    "z_dim": (1, WIDTH),
    "dim_mult": (1, 64),
    "num_res_blocks": (1, 64),
    "mean": (-1e6, 1e6),
    "std": (LEAST, 1e6),
}
SPACE_TO_DEPTH: Limits = {"factor": (1, 64)}
TEXT: Limits = {
    "vocab": (1, 2**24),
    "dim": (1, WIDTH),
    "dim_attn": (1, WIDTH),
    "dim_ffn": (1, 4 * WIDTH),
    "heads": (1, 1024),
    "layers": (1, DEPTH),
    "buckets": (4, WIDTH),
    "max_distance": (2, COUNT),
    "max_words": (2, WIDTH),
}
COMPRESSOR: Limits = {
    "channels": (1, WIDTH),
    "strides": (1, 64),
    "frames": (1, 1024),
    "pool": (1, SIDE),
    "strided_kernel": (3, 4),
    "tokens": (0, COUNT),
}
CACHE: Limits = {
    "block": (1, 1024),
    "sink": (0, FRAMES),
    "recent": (0, FRAMES),
    "top": (0, COUNT),
    "capacity": (0, COUNT),
    "window": (0, FRAMES),
    "overlap": (0, FRAMES),
    "sink_average": (0.0, 1.0),
    "budget": (0, FRAMES),
    "budget_recent": (0, FRAMES),
    "reuse_limit": (0, MANY),
    "score_heads": (LEAST, 1.0),
    "query_stride": (1, COUNT),
    "min_queries": (0, COUNT),
    "max_position": (1, COUNT),
    "score_pool": (1, SIDE),
    "key_multiple": (1, COUNT),
}
SAMPLE: Limits = {
    "steps": (1, 1000),
    "first_steps": (1, 1000),
    "shift": (1e-3, 1e3),
    "guidance": (0.0, 1e3),
}
EXPERIMENT: Limits = {"latent": (1, SIDE), "fps": (1, 1000), "clip": (1, FRAMES)}
OPTIMISER: Limits = {
    "rate": (0.0, 1e3),
    "matrix_rate": (0.0, 1e3),
    "betas": (0.0, 1 - 1e-9),
    "decay": (0.0, 1e3),
    "clip": (0.0, 1e9),
    "warmup": (0, MANY),
    "cooldown": (0.0, 1.0),
    "delay": (0, MANY),
}
MESH: Limits = dict.fromkeys(("data", "fsdp", "tensor", "context"), (0, COUNT))
DATA: Limits = {"limit": (0, MANY)}
COVER: Limits = {
    "sinks": (0, FRAMES),
    "recents": (0, FRAMES),
    "shortest": (0, FRAMES),
    "longest": (0, FRAMES),
    "gap": (0.0, 1e6),
    "gap_share": (0.0, 1.0),
    "top": (0, COUNT),
    "matching": (0.0, 1e6),
}
DISTIL: Limits = {
    "critic_updates": (1, COUNT),
    "guidance": (-1e3, 1e3),
    "score_shift": (0.0, 1e3),
    "min_timestep": (0.0, 1000.0),
    "max_timestep": (0.0, 1000.0),
    "scored": (0, FRAMES),
    "alpha": (-1e3, 1e3),
}
TRAIN: Limits = {
    "steps": (1, MANY),
    "batch": (1, COUNT),
    "accumulate": (1, COUNT),
    "shift": (1e-3, 1e3),
    "drop_text": (0.0, 1.0),
    "grid": (1, COUNT),
    "ema": (0.0, 1.0),
    "ema_from": (0, MANY),
    "blend": (0.0, 1.0),
    "save_every": (1, MANY),
    "keep": (1, COUNT),
    "log_every": (1, MANY),
    "preview_every": (0, MANY),
    "patience": (1, MANY),
    "profile": (0, MANY),
}


def require_within(limits: Limits, group: str, settings: object) -> None:
    """Raises `InputError` for the first field of `settings` that holds a number beyond its limits.

    `group` is how users call it, such as `train.mesh`; "" is the experiment itself.
    """
    for name, (least, most) in limits.items():
        value = getattr(settings, name)
        whole = isinstance(least, int) and isinstance(most, int)
        numbers = "whole numbers" if isinstance(value, tuple) else "a whole number"
        kind = numbers if whole else numbers.replace("whole ", "")
        key = f"{group}.{name}" if group else name
        require(
            all(_within(each, least, most, whole) for each in _leaves(value)),
            f"{key}={shown(value)} is out of range; give {kind} from {least:,} to {most:,}.",
        )


def _leaves(value: object) -> list[object]:
    """The numbers of a field, out of tuples in tuples; none where it may be left out."""
    if isinstance(value, tuple):
        return [leaf for each in value for leaf in _leaves(each)]
    return [] if value is None else [value]


def _within(value: object, least: Number, most: Number, whole: bool) -> bool:
    kind = numbers.Integral if whole else numbers.Real
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    return bool(least <= value <= most)  # type: ignore[operator]  which no not-a-number is
