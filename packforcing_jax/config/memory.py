"""The memory: its sizes in latent frames, who is looked back at, and where the keys stand in time."""

import dataclasses
from dataclasses import dataclass

from packforcing_jax.config.choices import require_choices
from packforcing_jax.errors import require


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
    score_pool: tuple[int, int, int] = (
        2,
        4,
        4,
    )  # query tokens averaged before scoring: frames, rows, columns
    key_multiple: int = 128

    def __post_init__(self):
        sizes = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.type is int}
        for name, value in sizes.items():
            require(value >= 0, f"cache.{name}={value} is negative; give 0 or more.")
        require(self.block > 0, f"cache.block={self.block} must be at least one latent frame.")
        require(
            self.top <= self.capacity,
            f"cache.top={self.top} exceeds capacity={self.capacity}; raise capacity.",
        )
        require(
            self.top == 0 or (self.sink % self.block == 0 and self.recent % self.block == 0),
            f"cache.sink={self.sink} and recent={self.recent} must be whole blocks of {self.block} frames "
            "when packed blocks are attended; change them or set top=0.",
        )
        require_choices("cache", self)
        require(
            self.rope_adjustment != "incremental" or self.span == "true",
            f"cache.rope_adjustment='incremental' moves whole blocks, but span={self.span!r} squeezes them; "
            "set span=true or rope_adjustment=sink.",
        )
        require(
            self.archive == "device" or (self.scope, self.timing) == ("shared", "late"),
            f"cache.archive='host' is fetched once a block, but scope={self.scope!r} and timing={self.timing!r} "
            "look it up in every layer; set scope=shared and timing=late.",
        )
        require(
            self.archive == "device" or self.rope_adjustment != "incremental",
            "cache.archive='host' cannot be turned in place by rope_adjustment='incremental'; "
            "set rope_adjustment=sink.",
        )

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
    "published": CacheConfig(
        block=3, sink=9, recent=3, span="fit", trained=21, score_pool=(3, 4, 4)
    ),
    "stage": CacheConfig(score_pool=(4, 1, 1), key_multiple=32),
    "no-mid": CacheConfig(top=0, capacity=0, key_multiple=32),
    "no-sink": CacheConfig(sink=0, recent=12, top=0, capacity=0, key_multiple=32),
}
