"""What a method is: how much of the past a block sees, at which positions, and what a change of prompt does to it.

A method is a value. `sample --method NAME`, `layout`, `plan` and `verify` read the same one.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from packforcing_jax.config import CacheConfig, Experiment, evenly_spaced
from packforcing_jax.config.choices import AT_PROMPT_CHANGE, KEEPS_TOKENS
from packforcing_jax.errors import require

PUBLISHED_BLOCK = 3  # frames of a block in the models that methods were published with


@dataclass(frozen=True)
class Method:
    """A method of long video over the one player.

    `window` frames are at full size in all: `sink` first ones, recent ones, and the current block. None: the memory is
    the experiment's own. `settings` are fields of `CacheConfig`. `at_prompt_change` is what a new prompt does to the
    memory: `keep` it, `recache` the frames at full size under the new prompt, `flush` all but the sink, `cut`
    everything. `keeps_sink`: a re-cache leaves the sink as it is once it has left the window. `one_clip`: no block is
    made beyond the window. `joint`: as many blocks as there are denoising steps are denoised together. `overlap`: the
    video consists of clips as long as the window, and each begins with so many frames of the one before. `unbounded`:
    the window grows to the whole video. `whole_clip`: there are no blocks and no memory, all frames of one clip are
    denoised together. `steps`: of denoising, evenly spaced, for models that were made for another method; 0: the
    model's own.
    """

    name: str
    source: str
    sink: int = 0
    window: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    at_prompt_change: str = "keep"
    keeps_sink: bool = True
    one_clip: bool = False
    joint: bool = False
    overlap: int = 0
    unbounded: bool = False
    whole_clip: bool = False
    steps: int = 0

    @property
    def own_memory(self) -> bool:
        """Whether the memory is the experiment's own, whose profiles can be chosen."""
        return self.window is None and not self.whole_clip

    def __post_init__(self):
        require(
            self.at_prompt_change in AT_PROMPT_CHANGE,
            f"at_prompt_change={self.at_prompt_change!r} is unknown; choose one of {', '.join(AT_PROMPT_CHANGE)}.",
        )
        require(
            not self.settings.get("budget") or self.at_prompt_change in KEEPS_TOKENS,
            f"at_prompt_change={self.at_prompt_change!r} takes whole frames out of a memory that keeps single tokens "
            f"of them; choose one of {', '.join(KEEPS_TOKENS)}.",
        )


def memory_of(method: Method, own: CacheConfig, steps: int) -> CacheConfig:
    """The memory of the method for a model that denoises in `steps` and whose own memory is `own`.

    The latter gives the block and the trained range.
    """
    if method.window is None:
        return own
    together = own.block * (steps if method.joint else 1)
    recent = method.window - method.sink - together
    require(
        recent >= 0,
        f"method {method.name!r} has a window of {method.window} frames, too short for a sink of {method.sink} and "
        f"{together} frames that are made at once; give a longer window, or a model of fewer denoising steps.",
    )
    sizes: dict[str, Any] = {
        "block": own.block,
        "sink": method.sink,
        "recent": recent,
        "top": 0,
        "capacity": 0,
        "window": together if together > own.block else 0,
        "overlap": method.overlap,
        "max_position": own.max_position,
        "score_pool": own.score_pool,
        "key_multiple": own.key_multiple,
    }
    return CacheConfig(**sizes | dict(method.settings))


def sized(method: Method, own: CacheConfig) -> Method:
    """The method at the sizes of a model.

    Published sizes belong to blocks of 3 frames, or of 1. For other blocks they are counted in blocks, rounded up, and
    recent frames are cut until the window fits the trained range, or the sink where blocks are packed. A budget and its
    parts keep their share of the window, to the nearest block. Without a memory nothing stands behind a block.
    """
    block = own.block
    if method.whole_clip:
        return dataclasses.replace(method, window=block)
    if method.window is None or PUBLISHED_BLOCK % block == 0:
        return method
    if "budget" in method.settings:
        return _in_proportion(method, own, method.window)
    recent = method.window - method.sink - PUBLISHED_BLOCK
    sink, recent = (-(-frames // PUBLISHED_BLOCK) * block for frames in (method.sink, recent))
    room = max(own.max_position // block * block - block, 0)
    if method.settings.get("top"):  # the sink gives way: what leaves the recent blocks is packed
        recent = min(recent, room)
        sink = min(sink, room - recent)
    sink = min(sink, room)
    overlap = -(-method.overlap // PUBLISHED_BLOCK) * block
    window = sink + min(recent, room - sink) + block
    return dataclasses.replace(method, sink=sink, window=window, overlap=overlap)


def _in_proportion(method: Method, own: CacheConfig, published: int) -> Method:
    """A method whose full window is compressed, with everything as long as it is in a window of `published` frames."""
    block = own.block
    window = min(-(-published // PUBLISHED_BLOCK), max(own.max_position // block, 1)) * block

    def share(frames: int) -> int:
        return int(frames * window / published / block + 0.5) * block

    sink = min(share(method.sink), window - block)
    budget = min(max(share(method.settings["budget"]), sink + block), window)
    published_recent = method.settings.get("budget_recent", 0)
    recent = min(max(share(published_recent), block), budget - sink)
    if method.sink + published_recent == method.settings["budget"]:
        recent = budget - sink  # nothing is chosen
    settings = {**method.settings, "budget": budget, "budget_recent": recent}
    return dataclasses.replace(method, sink=sink, window=window, settings=settings)


def applied(method: Method, experiment: Experiment) -> Experiment:
    """`experiment` with the memory of the method, at the sizes of its model.

    Where more blocks than a `joint` window has room for would be denoised together, evenly spaced steps are left out.
    """
    own = experiment.cache
    value = sized(method, own)
    sample = experiment.sample
    if method.steps and experiment.method != method.name:
        sample = dataclasses.replace(sample, steps=evenly_spaced(method.steps), first_steps=())
    if method.joint and value.window is not None:
        most = max((value.window - value.sink) // own.block, 1)
        count = min(most, len(sample.steps))
        steps = tuple(sample.steps[i * len(sample.steps) // count] for i in range(count))
        sample = dataclasses.replace(sample, steps=steps)
    memory = memory_of(value, own, len(sample.steps))
    return dataclasses.replace(experiment, cache=memory, sample=sample, method=method.name)


def lengthened(method: Method, experiment: Experiment, blocks: int) -> Experiment:
    """`experiment` with room for so many blocks, where the window of the method grows with the video."""
    cache = experiment.cache
    if not method.unbounded:
        return experiment
    recent = max(cache.recent, blocks * cache.block - cache.sink - cache.block)
    return dataclasses.replace(experiment, cache=dataclasses.replace(cache, recent=recent))


def require_blocks(method: Method, who: str) -> None:
    """Raises `InputError` unless the method makes its videos block by block, as `who` needs it."""
    require(
        not method.whole_clip,
        f"{who} is about blocks that are made one behind the other, and method {method.name} denoises all frames of "
        "a clip together; give another method or model.",
    )


def require_one_prompt(method: Method, prompts: Sequence[object]) -> None:
    """Raises `InputError` for another prompt than the first where all frames are denoised together."""
    require(
        not method.whole_clip or len({*prompts}) < 2,
        f"method {method.name} denoises all frames of a clip together under one prompt, and {len({*prompts})} were "
        "given; give one.",
    )


def sizes_told(method: Method, experiment: Experiment) -> str:
    """The sizes of the method on this model, in a sentence."""
    cache, sample = experiment.cache, experiment.sample
    if method.whole_clip:
        against = "sample.negative_prompt" if sample.negative_prompt else "no text (states of zero)"
        guidance = (
            "no guidance"
            if sample.guidance == 1
            else f"guidance {sample.guidance:g} against {against}"
        )
        return (
            f"method {method.name}: all frames of a clip at once, {len(sample.steps)} steps, shift {sample.shift:g}, "
            f"{guidance}"
        )
    together = f"{cache.together} frames at once" if cache.joint else f"blocks of {cache.block}"
    clips = f", clips of {cache.full_frames} with {cache.overlap} shared" if cache.overlap else ""
    budget = (
        f", a full window compressed to {cache.budget}, the newest {cache.budget_recent} of them whole"
        if cache.budget
        else ""
    )
    steps = " ".join(map(str, experiment.sample.steps))
    return (
        f"method {method.name}: sink {cache.sink}, recent {cache.recent}, {together}{clips}{budget} "
        f"(latent frames), steps {steps}"
    )
