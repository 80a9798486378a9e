"""The memory: its sizes in latent frames, which past blocks are attended, and where the keys stand in time."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import numpy as np

from packforcing_jax.config import limits
from packforcing_jax.config.choices import require_choices
from packforcing_jax.errors import require
from packforcing_jax.policies import eviction, fusion, selection
from packforcing_jax.policies.eviction import Eviction
from packforcing_jax.policies.fusion import Fusion
from packforcing_jax.policies.selection import Score
from packforcing_jax.policies.table import named

CHOOSE = (  # settings of how packed blocks are chosen, which leave nothing behind
    "selection",
    "scope",
    "timing",
    "registry",
    "score_pool",
    "score_heads",
    "query_stride",
    "min_queries",
)


@dataclass(frozen=True)
class CacheConfig:
    """The memory (paper sec. 3.2): all sizes in latent frames, `top` and `capacity` in packed blocks.

    `max_position` is the range of positions seen in training; span `fit` squeezes mid into what is left of it.
    `selection` scores packed blocks, `eviction` says which of them the archive keeps: names of
    `policies.selection.SCORES` and `policies.eviction.EVICTIONS`, or values of one's own; so is `fusion`, of
    `policies.fusion.FUSIONS`.
    """

    block: int = 4
    sink: int = 8
    recent: int = 4
    top: int = 16
    capacity: int = 128
    window: int = 0  # frames denoised together at falling noise, whole blocks; 0: one block
    overlap: int = 0  # frames that a clip takes over from the one before; 0: one video, no clips
    rope_adjustment: str = "sink"
    sink_average: float = (
        0.0  # share that the sink keeps of itself when leaving frames are averaged in; 0: none are
    )
    budget: int = 0  # frames that a full window is compressed to, token by token; 0: it is not
    budget_recent: int = 0  # newest of them, which stay whole, the current block among them
    fusion: str | Fusion = "sum"  # how the products of a token with recent queries make its score
    reuse_limit: int = 0  # times that a token is chosen at most; 0: as often as it scores well
    token_positions: str = "none"  # where chosen tokens move: nowhere, side by side, or all alike
    span: str = "true"
    max_position: int = 20
    selection: str | Score = "affinity"
    eviction: str | Eviction = "fifo"
    scope: str = "layer"  # every layer chooses for itself, or one choice is shared by all
    timing: str = (
        "first"  # of the choice: at the first step, late, or anew at every step and commit
    )
    registry: str = (
        "per_layer"  # of timing=every: each layer knows where blocks are, or all share one list
    )
    archive: str = "device"  # where packed blocks lie
    score_pool: tuple[int, int, int] = (2, 4, 4)  # queries averaged: frames, rows, columns
    score_heads: float = 0.5  # of selection=paper, query_score: share of the heads, the first ones
    query_stride: int = 8  # of the same: one query token in so many
    min_queries: int = 0  # of the same: but at least so many, if a block has them
    recent_queries: bool = True  # of the same: recent blocks ask too, by their clean pass
    key_multiple: int = 128

    def __post_init__(self):
        limits.require_within(limits.CACHE, "cache", self)
        require(
            self.top <= self.capacity,
            f"cache.top={self.top} exceeds capacity={self.capacity}; raise capacity.",
        )
        require(
            self.top == 0 or (self.sink % self.block == 0 and self.recent % self.block == 0),
            f"cache.sink={self.sink} and recent={self.recent} must be whole blocks of {self.block} frames "
            "when packed blocks are attended; change them or set top=0.",
        )
        require(
            self.window % self.block == 0 and (self.top == 0 or self.window in (0, self.block)),
            f"cache.window={self.window} must be whole blocks of {self.block} frames, and one block when packed blocks "
            "are attended; change it or set top=0.",
        )
        require(
            not self.joint or self.rope_adjustment == "sink_only",
            f"cache.window={self.window} denoises blocks together behind a sink that moves alone, but "
            f"rope_adjustment={self.rope_adjustment!r}; set rope_adjustment=sink_only.",
        )
        require(
            self.overlap == 0
            or (self.overlap < self.full_frames and self.overlap % self.block == 0)
            and (self.sink, self.top, self.rope_adjustment) == (0, 0, "none")
            and self.recent % self.block == 0
            and not self.joint,
            f"cache.overlap={self.overlap} must be whole blocks of {self.block} frames within clips of "
            f"{self.full_frames}, whole blocks too, with sink=0, top=0 and rope_adjustment=none; change them.",
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

        require(
            self.timing != "every"
            or self.scope == "layer"
            and self.rope_adjustment != "incremental"
            and self.score.name != "random",
            f"cache.timing='every' chooses anew in each layer and pass, but scope={self.scope!r}, "
            f"rope_adjustment={self.rope_adjustment!r} and selection={self.score.name!r}; set scope=layer, another "
            "rope_adjustment than incremental and another selection than random, or timing=first.",
        )
        require(
            self.registry == "per_layer" or self.chooses_anew,
            f"cache.registry='shared' is about packed blocks that every pass chooses anew, but timing={self.timing!r} "
            f"and top={self.top}; set timing=every and top above 0, or registry=per_layer.",
        )
        if self.evicts is not eviction.FIFO:
            eviction.check(self.evicts, self.slots)
        require(
            self.sink_average == 0
            or (0 < self.sink_average <= 1 and self.top == 0 and self.rope_adjustment == "sink"),
            f"cache.sink_average={self.sink_average} must lie within 0..1, with top=0 and rope_adjustment=sink; "
            "change it.",
        )
        require(
            self.sink_average == 0
            or (self.sink == self.block and self.recent > 0 and self.recent % self.block == 0),
            f"cache.sink_average needs as many frames to leave at once as the sink has, but sink={self.sink}, "
            f"block={self.block}, recent={self.recent}; give a sink of one block and whole recent blocks.",
        )
        require(
            self.budget == 0
            or (self.top, self.overlap, self.sink_average, self.rope_adjustment)
            == (0, 0, 0, "sink_only")
            and not self.joint,
            f"cache.budget={self.budget} compresses a window of whole frames behind a sink that moves alone; set "
            "top=0, overlap=0, sink_average=0, window=0 and rope_adjustment=sink_only.",
        )
        require(
            self.budget == 0
            or self.block <= self.budget_recent
            and self.sink + self.budget_recent <= self.budget <= self.full_frames,
            f"cache.budget={self.budget} must hold sink={self.sink} and budget_recent={self.budget_recent}, at least a "
            f"block of {self.block}, and be no more than the window of {self.full_frames} frames; change one.",
        )
        _ = self.score, self.fuses  # an unknown name is refused here

    @property
    def score(self) -> Score:
        """The score by which packed blocks are chosen."""
        return named(selection.SCORES, self.selection, "cache.selection")

    @property
    def evicts(self) -> Eviction:
        """The rule by which the archive forgets packed blocks."""
        return named(eviction.EVICTIONS, self.eviction, "cache.eviction")

    @property
    def fuses(self) -> Fusion:
        """How the products of a token with recent queries make its score."""
        return named(fusion.FUSIONS, self.fusion, "cache.fusion")

    @property
    def chosen(self) -> int:
        """Frames' worth of single tokens that are chosen when a full window is compressed."""
        return self.budget - self.sink - self.budget_recent if self.budget else 0

    @property
    def joint(self) -> bool:
        """Whether several blocks are denoised together, each at a noise level of its own (Rolling Forcing)."""
        return self.window > self.block

    @property
    def together(self) -> int:
        """Frames that are denoised together: a joint window, or one block."""
        return self.window if self.joint else self.block

    @property
    def ring(self) -> int:
        """Frames of the ring behind the sink: those that are attended to, and the block that is being made.

        A joint window that shrinks at a video's end sees as many more recent frames, and a block that is committed
        alone sees as many in all, without the sink once they are all there.
        """
        return self.recent + (self.sink + self.window if self.joint else self.block)

    @property
    def held(self) -> int:
        """Recent frames that are kept at full size, the current block not among them."""
        return self.ring - self.block

    @property
    def full_frames(self) -> int:
        """Frames at full size in all: the sink and the ring behind it (the window of sink-and-window methods)."""
        return self.sink + self.ring

    @property
    def chunk(self) -> int:
        """Frames that always lie side by side, in the sink as in the ring: whole blocks where sizes allow."""
        return math.gcd(self.block, self.sink, self.recent)

    @property
    def attended(self) -> int:
        """Packed blocks a block step attends to at most."""
        return self.capacity if self.top and self.score.attends_all else self.top

    @property
    def chooses_anew(self) -> bool:
        """Whether every pass of a block chooses its packed blocks for itself."""
        return self.timing == "every" and self.top > 0

    @property
    def stride(self) -> int:
        """One query token in so many is summed for the score."""
        return self.query_stride if self.score.subset else 1

    @property
    def asking_blocks(self) -> int:
        """Recent blocks whose queries are kept for the score."""
        asks = self.top > 0 and self.score.subset and self.recent_queries
        return self.recent // self.block if asks else 0

    @property
    def stored(self) -> tuple[tuple[str, object], ...]:
        """(setting, value) of all that decides what a memory holds and where its keys stand."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        held = {name: value for name, value in values.items() if name not in CHOOSE}
        return tuple((held | {"top": self.attended}).items())

    @property
    def slots(self) -> int:
        """Slots of the archive: `capacity`, and one for each block that is still at full size in `recent`."""
        return self.capacity + self.recent // self.block if self.top else 0


@dataclass(frozen=True)
class MemorySpec:
    """All that the memory reads of an experiment: its settings, and the sizes of what it stores."""

    cache: CacheConfig
    layers: int
    heads: int
    head_dim: int
    pairs: tuple[int, int, int]  # rotary pairs of a head: time, rows, columns
    rope_theta: tuple[float, float, float]
    grid: tuple[int, int]  # tokens of a latent frame: rows, columns
    latent: tuple[int, int, int]  # a latent frame: rows, columns, channels
    packed_grid: tuple[int, int, int]  # tokens of a packed block: frames, rows, columns
    packed_stride: tuple[
        int, float, float
    ]  # what one of them stands for: frames, rows, columns of tokens
    packed_frames: int  # latent frames packed together
    packed_position_rule: str  # compressor.positions
    packing_pass: bool  # whether a packed block passes through all layers, and attends

    @property
    def tokens_per_frame(self) -> int:
        return math.prod(self.grid)

    @property
    def tokens_per_packed_block(self) -> int:
        return math.prod(self.packed_grid)

    @property
    def scored_heads(self) -> int:
        """Heads that blocks are scored by, the first ones."""
        share = self.cache.score_heads if self.cache.score.subset else 1
        return max(int(share * self.heads), 1)

    @property
    def asking_tokens(self) -> np.ndarray:
        """Tokens of a block [q] whose queries are summed for the score: one in `query_stride`, or `min_queries`."""
        cfg = self.cache
        least = cfg.min_queries if cfg.score.subset else 0
        return asking(cfg.block * self.tokens_per_frame, cfg.stride, least)

    @property
    def full_res(self) -> int:
        """Keys of a view at full size: sink, recent frames and the current block."""
        return (self.cache.sink + self.cache.ring) * self.tokens_per_frame

    @property
    def room(self) -> int:
        """Keys that a view has room for: all that a block attends to, itself and its packed form, rounded up."""
        cache = self.cache
        packed = (cache.attended + 1) * self.tokens_per_packed_block if cache.top else 0
        if cache.joint:
            return cache.sink * self.tokens_per_frame + self.ring_room
        return self._rounded(self.full_res + packed)

    @property
    def ring_room(self) -> int:
        """Keys that are attended to at most where a block is committed without the sink."""
        return self._rounded(self.cache.ring * self.tokens_per_frame)

    @property
    def ahead_room(self) -> int:
        """Keys of a view in which several blocks are denoised together, behind the most recent frames they may see."""
        cache = self.cache
        recent = cache.held - cache.sink
        return self._rounded((cache.sink + recent + cache.window) * self.tokens_per_frame)

    @property
    def denoised_in(self) -> int:
        """Keys of the view that frames are denoised in."""
        return self.ahead_room if self.cache.joint else self.room

    @property
    def committed_in(self) -> int:
        """Keys of the view that a block is committed in."""
        return self.ring_room if self.cache.joint else self.room

    def _rounded(self, keys: int) -> int:
        """So many keys, rounded up to what attention kernels take."""
        return -(-keys // self.cache.key_multiple) * self.cache.key_multiple

    @property
    def kept_queries(self) -> int:
        """What is kept of the queries that choose single tokens: those of as many frames as stay whole."""
        cache = self.cache
        return cache.chosen and cache.budget_recent * cache.fuses.per_frame(self.tokens_per_frame)

    @property
    def candidates(self) -> int:
        """Tokens of a full window that a compression chooses from, at most."""
        cache = self.cache
        frames = cache.full_frames - cache.sink - (cache.budget_recent - cache.block)
        return frames * self.tokens_per_frame if cache.chosen else 0

    @property
    def sink_moves(self) -> bool:
        """Whether the sink's keys take other positions from block to block, and are stored un-rotated for that."""
        return self.cache.rope_adjustment == "sink_only" or self.cache.sink_average > 0

    @property
    def recent_moves(self) -> bool:
        """The same of the recent frames' keys."""
        return self.cache.rope_adjustment == "sink"


def asking(count: int, stride: int, least: int) -> np.ndarray:
    """Which of `count` tokens [q] ask: one in `stride`, or, where `least` of them have to, evenly spread ones.

    They are spread in float32, as in PackForcing-Unofficial: rounding decides about some of them.
    """
    if least == 0:
        return np.arange(0, count, stride)
    some = min(count, max(least, count // stride))
    spread = np.arange(some, dtype=np.float32) * np.float32(count) / np.float32(some)
    return np.floor(spread).astype(int)


# Profiles


STAGE = CacheConfig(score_pool=(4, 1, 1), key_multiple=32)
# what only leaves parts of a memory out, as changes of the fields of any one
PARTS_LEFT_OUT: Mapping[str, Callable[[CacheConfig], Mapping[str, int]]] = {
    "no-mid": lambda own: {"top": 0, "capacity": 0},
    "no-sink": lambda own: {"sink": 0, "recent": own.sink + own.recent, "top": 0, "capacity": 0},
}
PROFILES = {
    "paper": CacheConfig(),
    "published": CacheConfig(
        block=3, sink=9, recent=3, span="fit", max_position=21, score_pool=(3, 4, 4)
    ),
    "stage": STAGE,
    **{name: replace(STAGE, **changes(STAGE)) for name, changes in PARTS_LEFT_OUT.items()},
}


def profiled(own: CacheConfig, name: str) -> CacheConfig:
    """The memory of a profile for a model whose own is `own`.

    What the model was trained with stays: its block, the range of positions, and how its grid is pooled and padded.
    Frames of a profile count in blocks: 8 frames in blocks of 4 are 6 in blocks of 3.
    """
    if name in PARTS_LEFT_OUT:
        return replace(own, **PARTS_LEFT_OUT[name](own))
    profile = PROFILES[name]
    return replace(
        profile,
        block=own.block,
        sink=-(-profile.sink // profile.block) * own.block,
        recent=-(-profile.recent // profile.block) * own.block,
        max_position=own.max_position,
        score_pool=own.score_pool,
        key_multiple=own.key_multiple,
    )
