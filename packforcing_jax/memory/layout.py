"""Who the next block sees, and at which positions in time: functions of how far the video has come, nothing else.

Positions are laid out behind the sink, or moved so that the current block lies at its true frame: attention depends on
differences only, so both are the same (paper fig. 2c adds to each position what was dropped behind it).
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int

from packforcing_jax.config import CacheConfig, MemorySpec
from packforcing_jax.networks import rope
from packforcing_jax.policies.eviction import FIFO
from packforcing_jax.types import Length


@struct.dataclass
class Progress:
    """How far a video has come; every mask, slot and position of the memory is derived from it.

    A scene cut moves `scene_start` and `first_visible` to the next frame, a flush moves `first_visible` alone.
    """

    num_blocks: Int[Array, ""]  # finished blocks of the video
    scene_start: Int[Array, ""]  # frame that the sink begins with
    first_visible: Int[Array, ""]  # first frame that may be seen behind the sink

    def after_block(self) -> "Progress":
        """The same with one more finished block."""
        return dataclasses.replace(self, num_blocks=self.num_blocks + 1)


@struct.dataclass
class Layout:
    """Counts and positions in time of what the next block sees."""

    num_blocks: Array
    start: Array  # true number of the current block's first frame
    scene: Array  # true number of the sink's first frame
    origin: Array  # true number of the first frame that went into the ring behind the sink
    sink: Array  # visible sink frames
    recent: Array  # visible recent frames
    current: Array | np.int32 | int  # frames that are made: one block, or several together
    num_selected: Array  # attended packed blocks
    ids: Array  # [slot] block whose packed twin lies in each slot of the archive, -1 where none is visible
    step: Array  # positions that one packed block takes
    sink_position: Array  # position of the sink's first frame
    mid_position: Array  # where a row of packed blocks that ends before `recent` begins
    recent_position: Array
    current_position: Array
    chosen: Array | int = 0  # frames' worth of single tokens behind the sink
    hidden: Array | int = 0  # frames before `recent` that lie in the view and are not seen
    sink_turn: Array | float = 0.0  # from where the sink's keys are in the view to its position


def begin(blocks: int | Array = 0) -> Progress:
    """The progress of a video of so many finished blocks, without a cut or a flush."""
    return Progress(*(jnp.asarray(x, jnp.int32) for x in (blocks, 0, 0)))


def flushed(cfg: CacheConfig, progress: Progress) -> Progress:
    """The progress once all but the sink is forgotten."""
    return dataclasses.replace(progress, first_visible=progress.num_blocks * cfg.block)


def cut(cfg: CacheConfig, progress: Progress) -> Progress:
    """The progress once everything is forgotten: the next block begins a scene and a sink of its own."""
    start = progress.num_blocks * cfg.block
    return dataclasses.replace(progress, scene_start=start, first_visible=start)


def layout(cfg: CacheConfig, progress: Progress, gap: Array | float = 0.0) -> Layout:
    """What the next block sees, everything before `recent` moved `gap` frames further back (training jitter).

    `rope_adjustment="none"` leaves the sink at its true frames. So does a block that is committed where several are
    denoised together (`joint`): it sees the newest frames, and the sink until these are as many as it may see.
    """
    if cfg.budget:
        return _within_budget(cfg, progress)
    start = progress.num_blocks * cfg.block
    scene = progress.scene_start
    origin = jnp.maximum(scene + cfg.sink, progress.first_visible)
    sink = jnp.minimum(start - scene, cfg.sink)
    behind = jnp.maximum(start - origin, 0)
    recent = jnp.minimum(behind, cfg.held)
    if cfg.joint:
        sink = jnp.where(sink + recent > cfg.held, 0, sink)
    ids, visible = _visible(cfg, origin // cfg.block, behind // cfg.block, cfg.recent)
    num_selected = jnp.minimum(visible, cfg.attended)

    step = jnp.float32(cfg.block)
    if cfg.span == "fit":
        room = float(max(cfg.max_position - cfg.sink - cfg.recent - cfg.block, 1))
        step = jnp.minimum(step, room / jnp.maximum(num_selected, 1))
    row = sink + num_selected * step + gap + recent
    moved = 0.0 if cfg.rope_adjustment == "sink" else start - row
    if cfg.overlap:  # positions begin anew with each clip
        moved = moved - scene
    positions = {
        "sink_position": scene if cfg.rope_adjustment == "none" or cfg.joint else moved,
        "mid_position": moved + sink,
        "recent_position": moved + row - recent,
        "current_position": moved + row,
    }
    return Layout(
        num_blocks=progress.num_blocks,
        start=start,
        scene=scene,
        origin=origin,
        sink=sink,
        recent=recent,
        current=cfg.block,
        num_selected=num_selected,
        ids=ids,
        step=step,
        **{name: jnp.asarray(value, jnp.float32) for name, value in positions.items()},
    )


def moved_on(cfg: CacheConfig, now: Layout, *, arrived: bool) -> Layout:
    """What a pass over the current block sees once the list of blocks counts this one among the recent ones.

    The oldest recent block has then left for the archive, and the archive's oldest is forgotten where it is full. What
    is left stands before the current block without a hole. `arrived`: what has left is chosen from already.
    """
    in_sink = now.start - now.scene < cfg.sink
    leaves = ~in_sink & (now.recent + cfg.block > cfg.recent)
    gone = jnp.where(leaves, jnp.minimum(cfg.block, now.recent), 0)
    recent = now.recent - gone
    first = now.origin // cfg.block
    written = jnp.maximum(now.start - now.origin, 0) // cfg.block
    ids, _ = _visible(cfg, first, written, recent)
    newer = (ids[None] > ids[:, None]).sum(axis=1)
    room = cfg.capacity - (leaves & (cfg.recent == 0))  # where the block itself has left at once
    ids = jnp.where(newer < room, ids, -1)
    left = (now.start - now.recent) // cfg.block
    if not arrived:
        ids = jnp.where(leaves & (ids == left), -1, ids)
    num_selected = jnp.minimum((ids >= 0).sum(), cfg.attended)
    recent_position = now.current_position - recent
    mid_position = recent_position - num_selected * now.step
    moves = cfg.rope_adjustment != "none"
    sink_position = mid_position - now.sink if moves else now.sink_position
    return dataclasses.replace(
        now,
        recent=recent,
        hidden=gone,
        num_selected=num_selected,
        ids=ids,
        sink_position=sink_position,
        mid_position=mid_position,
        recent_position=recent_position,
        sink_turn=sink_position - now.sink_position,
    )


def first_to_write(cfg: CacheConfig, now: Layout, layers: int) -> list[Layout]:
    """What each layer sees in the pass that first writes the current block.

    Where all layers share one list of blocks (PackForcing-Unofficial 3f4302e), the first one moves it on, and the
    others hold nothing yet of what has moved.
    """
    others = moved_on(cfg, now, arrived=False) if cfg.registry == "shared" else now
    return [now, *[others] * (layers - 1)]


@struct.dataclass
class Compression:
    """What becomes of a window that the next block would make too long (Deep Forcing)."""

    due: Array  # whether it is compressed before the next block
    begun: Array  # whether it ever was, with the one that is due
    held: Array  # frames that are held when the block begins
    seen: Array  # frames that the block sees besides itself
    sink_moved: Array  # positions that the sink has moved by
    mid_moves: Array  # positions that the place of the chosen tokens moves by, from one compression to the next


def compression(cfg: CacheConfig, progress: Progress) -> Compression:
    """When the window is compressed, and what that changes: whenever a block would take it beyond its size.

    The sink moves along with the blocks, but first by what the window is longer than the budget, wherever that is.
    """
    window, block = cfg.full_frames, cfg.block
    fit = window // block  # blocks until it is compressed for the first time
    every = (window - cfg.budget) // block + 1  # blocks from one time to the next
    blocks = progress.num_blocks - progress.scene_start // block
    since = blocks - fit
    begun = since >= 0
    kept = cfg.budget - block
    return Compression(
        due=begun & (since % every == 0),
        begun=begun,
        held=jnp.where(since > 0, kept + ((since - 1) % every + 1) * block, blocks * block),
        seen=jnp.where(begun, kept + since % every * block, blocks * block),
        sink_moved=jnp.where(begun, window - cfg.budget + since // every * every * block, 0),
        mid_moves=jnp.where(since > 0, every * block, 0),
    )


def _within_budget(cfg: CacheConfig, progress: Progress) -> Layout:
    """What the next block sees of a window that is compressed when it is full: all but the sink at true frames."""
    now = compression(cfg, progress)
    start, scene = progress.num_blocks * cfg.block, progress.scene_start
    sink = jnp.minimum(now.seen, cfg.sink)
    chosen = jnp.where(now.begun, cfg.chosen, 0)
    recent = now.seen - sink - chosen
    positions = {
        "sink_position": scene + now.sink_moved,
        "mid_position": scene + now.sink_moved + sink,
        "recent_position": start - recent,
        "current_position": start,
    }
    return Layout(
        num_blocks=progress.num_blocks,
        start=start,
        scene=scene,
        origin=scene + cfg.sink,
        sink=sink,
        recent=recent,
        current=cfg.block,
        num_selected=jnp.int32(0),
        ids=jnp.zeros(0, jnp.int32),
        step=jnp.float32(cfg.block),
        chosen=chosen,
        **{name: jnp.asarray(value, jnp.float32) for name, value in positions.items()},
    )


def denoising(cfg: CacheConfig, progress: Progress) -> Layout:
    """What the frames see that are denoised next: the next block, or a whole window of blocks."""
    return joint(cfg, progress, cfg.window) if cfg.joint else layout(cfg, progress)


def joint(cfg: CacheConfig, progress: Progress, frames: Array | np.int32 | int) -> Layout:
    """What the next `frames` frames see that are denoised together (Rolling Forcing sec. 3.3).

    `cfg.sink + cfg.recent + cfg.window` frames in all: the sink moved to stand before the recent frames, and as many
    more recent frames as the window has grown shorter.
    """
    alone = layout(cfg, progress)
    behind = jnp.maximum(alone.start - alone.origin, 0)
    recent = jnp.minimum(behind, cfg.recent + cfg.window - frames)
    sink = jnp.minimum(alone.start - alone.scene, cfg.sink)
    moved = jnp.asarray(alone.start - recent - sink, jnp.float32)
    return dataclasses.replace(
        alone,
        sink=sink,
        recent=recent,
        current=frames,
        sink_position=moved,
        mid_position=moved + sink,
        recent_position=moved + sink,
    )


def _visible(
    cfg: CacheConfig, origin: Array, written: Array, recent: Array | int
) -> tuple[Array, Array]:
    """Ids [slot] of the archive's blocks older than `recent` frames, -1 elsewhere, and how many these are."""
    if cfg.slots == 0:
        return jnp.zeros(0, jnp.int32), jnp.int32(0)
    in_slots = cfg.evicts.ids_in(written, cfg.slots)
    visible = (in_slots >= 0) & (in_slots < written - recent // cfg.block)
    return jnp.where(visible, in_slots + origin, -1).astype(jnp.int32), visible.sum()


def packed_slot(cfg: CacheConfig, layout: Layout) -> Array:
    """Slot of the archive that the current block's packed twin goes to, negative where it is not kept."""
    written = (layout.start - layout.origin) // cfg.block
    return jnp.where(written >= 0, cfg.evicts.slot_of(jnp.maximum(written, 0), cfg.slots), -1)


# The frames of a view, which begins with the sink and a ring of recent frames and the current block


def frame_slots(cfg: CacheConfig, layout: Layout, frames: Array) -> Array:
    """Where in a view, in frames, the frames of true numbers `frames` lie."""
    in_sink = frames - layout.scene
    in_ring = cfg.sink + FIFO.slot_of(frames - layout.origin, cfg.ring)
    return jnp.where(in_sink < cfg.sink, in_sink, in_ring)


def frame_positions(cfg: CacheConfig, layout: Layout, frames: Array) -> Array:
    """Positions in time of frames of the sink, of `recent` and of the current block, by their true numbers."""
    in_sink = frames - layout.scene
    behind = layout.current_position + frames - layout.start
    return jnp.where(in_sink < cfg.sink, layout.sink_position + in_sink, behind)


def recent_frames(layout: Layout, count: int) -> Int[Array, " frame"]:
    """True numbers of the `count` frames that may be visible, in order; the first `layout.recent` of them are."""
    return layout.start - layout.recent + jnp.arange(count)


@struct.dataclass
class Recache:
    """A pass over the newest `sink + recent + block` frames that writes their keys and values anew (LongLive)."""

    frames: Array  # [frame] true numbers, in order; those before the scene do not exist
    positions: Array  # [frame] in time, in this pass
    written: Array  # [frame] whose keys are attended to and written
    behind_sink: Array  # whether the sink as it is is attended to, and stays
    progress: Progress  # after it


def recache(cfg: CacheConfig, progress: Progress, keep_sink: bool) -> Recache:
    """Who takes part in a re-cache, and where.

    Once more frames exist than the window holds, the sink stays, or, not `keep_sink`, the window's oldest frames
    become the sink. Before that, every frame is written anew.
    """
    now = layout(cfg, progress)
    frames = now.start - cfg.full_frames + jnp.arange(cfg.full_frames)
    full = frames[0] > now.scene
    behind_sink = full & jnp.bool_(keep_sink)
    oldest = jnp.maximum(frames[0], now.scene)
    in_row = now.sink_position + frames - oldest
    first_written = jnp.where(behind_sink, frames[0] + cfg.sink, oldest)
    scene = now.scene if keep_sink else oldest
    return Recache(
        frames=frames,
        positions=frames if cfg.rope_adjustment == "none" or cfg.joint else in_row,
        written=frames >= first_written,
        behind_sink=behind_sink,
        progress=dataclasses.replace(progress, scene_start=scene.astype(jnp.int32)),
    )


def length(spec: MemorySpec, layout: Layout) -> Length:
    """Valid keys of a view, those of the current frames and of hidden ones among them."""
    full_res = layout.sink + layout.chosen + layout.hidden + layout.recent + layout.current
    return full_res * spec.tokens_per_frame + layout.num_selected * spec.tokens_per_packed_block


def seen_keys(spec: MemorySpec, layout: Layout, valid: Array) -> Bool[Array, " k"]:
    """Which keys of a whole view are seen: the first `valid`, but for those of hidden frames."""
    first = layout.start - layout.recent - layout.hidden
    frames = first + jnp.arange(spec.cache.block)
    slots = frame_slots(spec.cache, layout, frames)
    slots = jnp.where(frames < first + layout.hidden, slots, -1)
    keys = jnp.arange(spec.room)
    hidden = (keys[:, None] // spec.tokens_per_frame == slots[None]).any(axis=1)
    return (keys < valid) & ~hidden


# Positions of tokens


def packed_positions(spec: MemorySpec) -> tuple[np.ndarray, np.ndarray]:
    """Positions of a packed block's tokens: (frames after the block's first [p], grid positions [p, 2]).

    Each token sits at the centre of the cells it stands for; frames that only pad the block do not count.
    """
    slots, rows, columns = spec.packed_grid
    block = spec.cache.block
    frames_each, *tokens_each = spec.packed_stride
    frames = np.minimum(np.arange(slots * frames_each), spec.packed_frames - 1).reshape(slots, -1)
    frames = np.ma.masked_greater_equal(frames, block).mean(axis=1).filled(block - 1)
    down = np.arange(rows)
    across = np.arange(columns)
    if spec.packed_position_rule == "stretched":
        down, across = (
            (np.arange(size) + 0.5) * each - 0.5 for size, each in zip((rows, columns), tokens_each)
        )
    return np.repeat(frames, rows * columns).astype(np.float32), rope.grid(down, across, slots)


def current_times(spec: MemorySpec, layout: Layout, frames: int) -> Float[Array, " q"]:
    """Position in time of each token of the next `frames` frames."""
    frame_numbers = np.repeat(np.arange(frames), spec.tokens_per_frame).astype(np.float32)
    return layout.current_position + jnp.asarray(frame_numbers)


def packed_times(spec: MemorySpec, layout: Layout) -> Float[Array, " p"]:
    """Position in time of each token of the current block's packed twin."""
    return layout.current_position + jnp.asarray(packed_positions(spec)[0])
