"""Who sees whom: every call of the network that a method makes, with its frames, their positions and who made them.

All of it follows from `memory.layout`, which the block step reads too; nothing is traced and no network is needed.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from packforcing_jax.config import CacheConfig, MemorySpec
from packforcing_jax.memory import layout as layouts
from packforcing_jax.memory.layout import Layout, Progress
from packforcing_jax.methods.method import Method

DENOISE, COMMIT, PACK, RECACHE, GIVEN = "denoise", "commit", "pack", "recache", "given"


@dataclass(frozen=True)
class Key:
    """Something that is attended to: a frame at full size, or a packed block that the data choose."""

    kind: str  # sink, mid, recent or current
    frames: (
        tuple[int, int] | None
    )  # first and last true number; None: a choice that depends on data
    position: float | None  # in time, of the first of them; None: it depends on data too
    tokens: int
    prompt: int | None = None  # under which its keys and values were computed
    mix: tuple[tuple[int, float], ...] = ()  # frames averaged in it, and their shares


@dataclass(frozen=True)
class Call:
    """One pass of the network."""

    call: str  # denoise, commit, pack, recache or given
    block: int  # that is made, or the window's number; of a block that was given, its number among those
    queries: tuple[tuple[int, float], ...]  # (frame, position)
    keys: tuple[Key, ...]
    prompt: int
    steps: tuple[int, ...] = ()  # of denoising that each query frame is at, where not the first
    clip: int = 0  # frames are counted in it; one that was given blocks counts those too

    @property
    def tokens(self) -> int:
        """Keys of this call."""
        return sum(key.tokens for key in self.keys)


@dataclass
class _Made:
    """Under which prompt the keys of each frame were computed, and what the sink's frames are mixed of."""

    prompts: dict[int, int]
    mix: dict[int, dict[int, float]]


def calls(
    spec: MemorySpec, method: Method, prompts: Sequence[int], *, given: int = 0
) -> Iterator[Call]:
    """The calls that make one block for each of `prompts` (their numbers), behind `given` blocks that are committed.

    A change of prompt is met as the method says.
    """
    cfg = spec.cache
    if method.whole_clip:
        yield _whole_clip(spec, len(prompts) * cfg.block, prompts[0])
        return
    progress = layouts.begin()
    made = _Made({}, {})
    clip = 0
    for number, prompt in enumerate([*[prompts[0]] * given, *prompts]):
        block = number - given
        if block > 0 and prompt != prompts[block - 1]:
            if method.at_prompt_change == "recache":
                yield _recache(spec, method, progress, made, block, prompt)
            progress = after_change(cfg, method, progress)
        if block < 0:
            yield from _remembered(spec, progress, made, GIVEN, number, prompt)
        elif cfg.joint:
            yield from _windows(spec, progress, made, (block, len(prompts)), prompt)
            finished_in = block + cfg.window // cfg.block - 1
            yield from _remembered(spec, progress, made, COMMIT, finished_in, prompt)
        else:
            queries, keys = _sight(spec, progress, made, prompt)
            yield Call(DENOISE, block, queries, keys, prompt, clip=clip)
            for call in _remembered(spec, progress, made, COMMIT, block, prompt):
                yield dataclasses.replace(call, clip=clip)
        progress = progress.after_block()
        if _fills_a_clip(cfg, progress) and block + 1 < len(prompts):
            clip += 1
            progress, made = layouts.begin(), _Made({}, {})
            for own in range(cfg.overlap // cfg.block):
                for call in _remembered(spec, progress, made, GIVEN, own, prompt):
                    yield dataclasses.replace(call, clip=clip)
                progress = progress.after_block()


def _whole_clip(spec: MemorySpec, frames: int, prompt: int) -> Call:
    """The pass in which every frame sees every frame; each denoising step makes it again."""
    queries = tuple((frame, float(frame)) for frame in range(frames))
    keys = tuple(_key(spec, "current", frame, at, prompt) for frame, at in queries)
    return Call(DENOISE, 0, queries, keys, prompt)


def _fills_a_clip(cfg: CacheConfig, progress: Progress) -> bool:
    return cfg.overlap > 0 and int(progress.num_blocks) * cfg.block == cfg.full_frames


def _sight(
    spec: MemorySpec, progress: Progress, made: _Made, prompt: int
) -> tuple[tuple[tuple[int, float], ...], tuple[Key, ...]]:
    """Queries and keys of the next block alone."""
    now = layouts.layout(spec.cache, progress)
    start = int(now.start)
    queries = _placed(spec.cache, now, range(start, start + spec.cache.block))
    own = [_key(spec, "current", frame, at, prompt) for frame, at in queries]
    return queries, (*_past(spec, now, made), *own)


def _remembered(
    spec: MemorySpec, progress: Progress, made: _Made, call: str, number: int, prompt: int
) -> Iterator[Call]:
    """The passes that commit the next block, as number `number`."""
    cfg = spec.cache
    queries, keys = _sight(spec, progress, made, prompt)
    yield Call(call, number, queries, keys, prompt)
    if cfg.top and spec.packing_pass:
        first = queries[0][0]
        tokens = spec.tokens_per_packed_block
        packed = Key("mid", (first, first + cfg.block - 1), queries[0][1], tokens, prompt)
        yield Call(PACK, number, queries, (*keys, packed), prompt)
    made.prompts |= {frame: prompt for frame, _ in queries}
    _average(cfg, layouts.layout(cfg, progress), made)


def _windows(
    spec: MemorySpec, progress: Progress, made: _Made, place: tuple[int, int], prompt: int
) -> Iterator[Call]:
    """The passes over a window of blocks that finish one: one, or as many as the first one needs.

    `place`: the number of that block, and of all blocks.
    """
    cfg = spec.cache
    block, total = place
    whole = cfg.window // cfg.block
    for step in range(whole) if block == 0 else [whole - 1]:
        frames = min(step + 1, total - block) * cfg.block
        now = layouts.joint(cfg, progress, frames)
        start = int(now.start)
        queries = _placed(cfg, now, range(start, start + frames))
        own = [_key(spec, "current", frame, at, prompt) for frame, at in queries]
        steps = tuple(step - i // cfg.block for i in range(frames))
        yield Call(DENOISE, block + step, queries, (*_past(spec, now, made), *own), prompt, steps)


def after_change(cfg: CacheConfig, method: Method, progress: Progress) -> Progress:
    """The progress behind what a new prompt does to the memory."""
    if method.at_prompt_change == "recache":
        return layouts.recache(cfg, progress, method.keeps_sink).progress
    if method.at_prompt_change == "flush":
        return layouts.flushed(cfg, progress)
    if method.at_prompt_change == "cut":
        return layouts.cut(cfg, progress)
    return progress


def _placed(
    cfg: CacheConfig, layout: Layout, frames: Sequence[int] | range
) -> tuple[tuple[int, float], ...]:
    at = np.asarray(layouts.frame_positions(cfg, layout, jnp.asarray(frames, jnp.int32)), float)
    return tuple((int(frame), float(one)) for frame, one in zip(frames, at, strict=True))


def _key(
    spec: MemorySpec, kind: str, frame: int, position: float, prompt: int | None, mix=()
) -> Key:
    return Key(kind, (frame, frame), position, spec.tokens_per_frame, prompt, mix)


def _past(spec: MemorySpec, now: Layout, made: _Made) -> tuple[Key, ...]:
    """What a block sees besides itself: sink, selected packed blocks, recent frames."""
    cfg = spec.cache
    scene, start = int(now.scene), int(now.start)
    kinds = {
        "sink": range(scene, scene + int(now.sink)),
        "recent": range(start - int(now.recent), start),
    }
    by_kind = {
        kind: [
            _key(spec, kind, frame, at, made.prompts.get(frame), _mix(made, frame))
            for frame, at in _placed(cfg, now, frames)
        ]
        for kind, frames in kinds.items()
    }
    count = int(now.num_selected)
    everything = count == int((np.asarray(now.ids) >= 0).sum())  # then nothing is left to choose
    ids = sorted(i for i in np.asarray(now.ids).tolist() if i >= 0)
    packed = [
        Key(
            "mid",
            (ids[rank] * cfg.block, (ids[rank] + 1) * cfg.block - 1) if everything else None,
            float(now.mid_position) + rank * float(now.step),
            spec.tokens_per_packed_block,
        )
        for rank in range(count)
    ]
    tokens = int(now.chosen) * spec.tokens_per_frame
    chosen = [Key("mid", None, None, tokens)] if tokens else []
    return (*by_kind["sink"], *packed, *chosen, *by_kind["recent"])


def _mix(made: _Made, frame: int) -> tuple[tuple[int, float], ...]:
    return tuple(sorted(made.mix.get(frame, {}).items()))


def _average(cfg: CacheConfig, now: Layout, made: _Made) -> None:
    """Takes the frames that leave after this block into the sink's."""
    if cfg.sink_average == 0 or int(now.recent) < cfg.recent:
        return
    oldest = int(now.start) - int(now.recent)
    for i in range(cfg.sink):
        slot = int(now.scene) + i
        share = made.mix.setdefault(slot, {slot: 1.0})
        made.mix[slot] = {frame: cfg.sink_average * one for frame, one in share.items()} | {
            oldest + i: 1 - cfg.sink_average
        }


def _recache(
    spec: MemorySpec, method: Method, progress: Progress, made: _Made, block: int, prompt: int
) -> Call:
    """The pass over the frames at full size, whose keys are then of the new prompt."""
    cfg = spec.cache
    now = layouts.layout(cfg, progress)
    plan = layouts.recache(cfg, progress, method.keeps_sink)
    frames, written = np.asarray(plan.frames), np.asarray(plan.written)
    at = np.asarray(plan.positions, float)
    exist = frames >= int(now.scene)
    sink = range(int(now.scene), int(now.scene) + int(now.sink)) if plan.behind_sink else ()
    old = [
        _key(spec, "sink", frame, position, made.prompts.get(frame), _mix(made, frame))
        for frame, position in _placed(cfg, now, sink)
    ]
    made.prompts |= {int(frame): prompt for frame in frames[written]}
    new = [
        _key(spec, "current", int(frame), float(position), prompt)
        for frame, position in zip(frames[written], at[written], strict=True)
    ]
    queries = tuple(
        (int(frame), float(position))
        for frame, position in zip(frames[exist], at[exist], strict=True)
    )
    return Call(RECACHE, block, queries, (*old, *new), prompt)
