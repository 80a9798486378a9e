"""What a method is: how much of the past a block sees, at which positions, and what a change of prompt does to it.

A method is a value. `sample --method NAME`, `layout`, `plan` and `verify` read the same one.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from packforcing_jax.config import CacheConfig, Experiment
from packforcing_jax.config.choices import AT_PROMPT_CHANGE
from packforcing_jax.errors import require

PUBLISHED_BLOCK = 3  # frames of a block in the models that methods were published with


@dataclass(frozen=True)
class Method:
    """A method of long video over the one player.

    `window` frames are at full size in all: `sink` first ones, recent ones, and the current block. None: the memory is
    the experiment's own. `settings` are fields of `CacheConfig`. `at_prompt_change` is what a new prompt does to the
    memory: `keep` it, `recache` the frames at full size under the new prompt, `flush` all but the sink, `cut`
    everything. `keeps_sink`: a re-cache leaves the sink as it is once it has left the window. `one_clip`: no block is
    made beyond the window.
    """

    name: str
    source: str
    sink: int = 0
    window: int | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    at_prompt_change: str = "keep"
    keeps_sink: bool = True
    one_clip: bool = False

    def __post_init__(self):
        require(
            self.at_prompt_change in AT_PROMPT_CHANGE,
            f"at_prompt_change={self.at_prompt_change!r} is unknown; choose one of {', '.join(AT_PROMPT_CHANGE)}.",
        )


def memory_of(method: Method, own: CacheConfig) -> CacheConfig:
    """The memory of the method for a model whose own is `own`, which gives the block and the trained range."""
    if method.window is None:
        return own
    recent = method.window - method.sink - own.block
    require(
        recent >= 0,
        f"method {method.name!r} has a window of {method.window} frames, too short for a sink of {method.sink} and a "
        f"block of {own.block}; give a longer window.",
    )
    bare = CacheConfig(
        block=own.block,
        sink=method.sink,
        recent=recent,
        top=0,
        capacity=0,
        max_position=own.max_position,
        score_pool=own.score_pool,
        key_multiple=own.key_multiple,
    )
    return dataclasses.replace(bare, **method.settings)


def sized(method: Method, own: CacheConfig) -> Method:
    """The method at the sizes of a model.

    Published sizes belong to blocks of 3 frames, or of 1. For other blocks they are counted in blocks, rounded up, and
    recent frames are cut until the window fits the trained range.
    """
    block = own.block
    if method.window is None or PUBLISHED_BLOCK % block == 0:
        return method
    recent = method.window - method.sink - PUBLISHED_BLOCK
    sink, recent = (-(-frames // PUBLISHED_BLOCK) * block for frames in (method.sink, recent))
    room = max(own.max_position // block * block - block, 0)
    sink = min(sink, room)
    return dataclasses.replace(method, sink=sink, window=sink + min(recent, room - sink) + block)


def applied(method: Method, experiment: Experiment) -> Experiment:
    """`experiment` with the memory of the method, at the sizes of its model."""
    own = experiment.cache
    memory = memory_of(sized(method, own), own)
    return dataclasses.replace(experiment, cache=memory, method=method.name)
