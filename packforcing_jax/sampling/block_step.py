"""One block of video: denoised in a few steps that only read the memory, then committed once, at full size and packed.

`denoise_block` and `commit_block` are the whole algorithm (paper figure 2). Everything that makes blocks goes through
them: sampling, evaluation, previews, benchmarks, plans, recorded numbers. Training calls their parts on known latents.
What there is per layer is a list where the model's layers run one by one, stacked where they are scanned.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Float

from packforcing_jax import pytrees
from packforcing_jax.config import SampleConfig, StepConfig
from packforcing_jax.errors import require
from packforcing_jax.memory import cache, view
from packforcing_jax.memory import layout as layouts
from packforcing_jax.memory.cache import LayerCache, Memory, Selection
from packforcing_jax.memory.layout import Layout
from packforcing_jax.networks import compressor, rope
from packforcing_jax.networks.base_model import BaseModel
from packforcing_jax.networks.dit import SelfAttention
from packforcing_jax.policies import attention
from packforcing_jax.pytrees import PerLayer
from packforcing_jax.sampling import schedules
from packforcing_jax.sampling.schedules import NoiseLevel
from packforcing_jax.types import KV, Heads, Latent, Tokens

RANDOM_SCORES = (
    2**32 - 1
)  # takes the place of a step's number in the key of a block's random scores


@dataclass(frozen=True)
class Access:
    """How one pass uses what each layer has of the past.

    `view_of(past)` is the view that it attends in, `keep(own, view, past)` what the layer keeps: `own` tokens with keys
    rotated in space only, the view with these tokens in it. `writes`: `keep` writes into stores, which is then done
    at once, or keys and values of all layers wait for the end side by side. `write(view, own)` lays the block's tokens
    into a view other than the layer's own, and `seen(view)` is the part of it that is attended to. `attends` takes
    the place of a layer's plain attention, as `choosing` does. `layout_of(past)` is what a layer sees where layers
    differ in that.
    """

    view_of: Callable[[Any], KV] = lambda past: past
    keep: Callable[[KV, KV, Any], Any] = lambda own, view, past: view
    writes: bool = False
    write: Callable[[KV, KV], KV] | None = None
    seen: Callable[[KV], KV] = lambda view: view
    attends: Callable[[StepConfig, Layout, SelfAttention], SelfAttention] = (
        lambda cfg, layout, attention_fn: attention_fn
    )
    layout_of: Callable[[Any], Layout] | None = None


READS = Access()  # past: a view, which is kept with the tokens in it


@struct.dataclass
class Nets:
    """The trained parts a block needs."""

    dit: BaseModel
    compressor: Any


@struct.dataclass
class Denoiser:
    """What every pass of a block takes: the networks, their settings, and what they read of the prompt."""

    nets: Nets
    cfg: StepConfig = struct.field(pytree_node=False)
    text: Any  # per layer, of one prompt per video

    def computed(self) -> "Denoiser":
        """The same with weights in the dtype that is computed with."""
        return dataclasses.replace(self, nets=pytrees.cast(self.nets, self.cfg.compute))


@struct.dataclass
class Noise:
    """Everything random about a block."""

    noise: Array  # [b, t, y, x, c]         where it starts from
    renoise: (
        Array  # [step, b, t, y, x, c]   added to the clean prediction of each step but the last
    )
    random: Array  # [layer, b, slot]        uniform draws, for the `random` selection


@struct.dataclass
class Denoised:
    """A finished block, and which packed blocks each layer attended to."""

    latent: Array  # [b, t, y, x, c]
    selection: PerLayer[Selection]
    predictions: Array | None = (
        None  # [step, b, t, y, x, c]  what each step predicted, where it is asked for
    )


# Denoising


def denoise_block(denoiser: Denoiser, memory: Memory, noise: Noise) -> tuple[Memory, Denoised]:
    """The next block, denoised from pure noise in a few steps; of the memory only scratch is written.

    The queries of the first step choose the packed blocks, which then serve the later steps, the clean pass and the
    packing pass. A layer that chooses for itself does so on its way. A choice that takes all layers, or comes late,
    is made after a first step behind the newest blocks.
    """
    cfg = denoiser.cfg
    spec = cfg.memory
    layout = layouts.layout(cfg.cache, memory.progress)
    random = random_scores(memory, noise)
    if cfg.cache.top == 0 or (cfg.cache.scope, cfg.cache.timing) == ("layer", "first"):
        past = pytrees.zipped(memory.layers, random)
        clean, outputs = first_step(denoiser, layout, noise, past, Access(attends=choosing))
        views, selection = pytrees.unzip(outputs)
        return remaining_steps(denoiser, with_views(memory, views), noise, clean, selection)
    newest = pytrees.over(lambda _: view.newest(spec, layout, len(noise.noise)), memory.layers)
    gathered = pytrees.over(view.gather, memory.layers, newest)
    memory, clean, queries = first_pass(denoiser, memory, noise, gathered, newest)
    scores = pytrees.over(
        lambda *one: view.score(spec, layout, *one), memory.layers, queries, random
    )
    selection = decide(cfg, layout, scores)
    gathered = pytrees.over(view.gather, memory.layers, selection)
    return remaining_passes(denoiser, memory, noise, clean, gathered, selection)


def first_pass(
    denoiser: Denoiser,
    memory: Memory,
    noise: Noise,
    gathered: PerLayer[view.Gathered],
    selection: PerLayer[Selection],
) -> tuple[Memory, Latent, PerLayer[view.PooledQueries]]:
    """A first step behind given packed blocks: (the memory, the clean prediction, what each layer asked)."""
    layout = layouts.layout(denoiser.cfg.cache, memory.progress)
    memory = laid(denoiser.cfg, memory, gathered, selection)
    clean, outputs = first_step(denoiser, layout, noise, views_of(memory), Access(attends=asking))
    views, queries = pytrees.unzip(outputs)
    return with_views(memory, views), clean, queries


def decide(cfg: StepConfig, layout: Layout, scores: PerLayer[Array]) -> PerLayer[Selection]:
    """What each layer attends to, by its own scores [b, slot] or by the sum over layers."""
    if cfg.cache.scope == "layer":
        return pytrees.over(lambda one: view.select(cfg.memory, layout, one), scores)
    total = pytrees.stack(scores).sum(axis=0)
    return pytrees.over(lambda _: view.select(cfg.memory, layout, total), scores)


def remaining_passes(
    denoiser: Denoiser,
    memory: Memory,
    noise: Noise,
    clean: Latent,
    gathered: PerLayer[view.Gathered],
    selection: PerLayer[Selection],
) -> tuple[Memory, Denoised]:
    """The block, given the packed blocks that were chosen after a first step predicted `clean`."""
    cfg = denoiser.cfg
    layout = layouts.layout(cfg.cache, memory.progress)
    memory = laid(cfg, memory, gathered, selection)
    if cfg.cache.timing == "first":
        clean, views = first_step(denoiser, layout, noise, views_of(memory))
        memory = with_views(memory, views)
    return remaining_steps(denoiser, memory, noise, clean, selection)


def first_step(
    denoiser: Denoiser, layout: Layout, noise: Noise, past: Any, access: Access = READS
) -> tuple[Latent, Any]:
    """The clean prediction out of pure noise, and what each layer kept."""
    level = noise_levels(denoiser.cfg.sample)[0]
    return predict_x0(denoiser, layout, noise.noise, level, past, access)


def remaining_steps(
    denoiser: Denoiser,
    memory: Memory,
    noise: Noise,
    clean: Latent,
    selection: PerLayer[Selection],
) -> tuple[Memory, Denoised]:
    """The block after the remaining steps, behind the views of `memory`."""
    layout = layouts.layout(denoiser.cfg.cache, memory.progress)
    latent, views, predictions = later_steps(denoiser, layout, noise, clean, views_of(memory))
    return with_views(memory, views), Denoised(latent, selection, predictions)


def later_steps(
    denoiser: Denoiser,
    layout: Layout,
    noise: Noise,
    clean: Latent,
    past: Any,
    access: Access = READS,
) -> tuple[Latent, Any, Array]:
    """(the block, what each layer kept, all predictions) after the remaining steps.

    Each goes on from the clean prediction before it plus noise. What `access` keeps is what the next step takes.
    """

    def step(carry, inputs):
        clean, past = carry
        level, fresh = inputs
        noisy = schedules.add_noise(clean, fresh, level.sigma)
        after = predict_x0(denoiser, layout, noisy, level, past, access)
        return after, after[0]

    steps = noise_levels(denoiser.cfg.sample)[1:], noise.renoise
    (latent, past), later = jax.lax.scan(step, (clean, past), steps)
    return latent, past, jnp.concatenate([clean[None], later])


def predict_x0(
    denoiser: Denoiser,
    layout: Layout,
    noisy: Latent,
    level: NoiseLevel,
    past: Any,
    access: Access = READS,
) -> tuple[Latent, Any]:
    """The clean sample that the network sees behind `noisy`, and what each layer kept: its view, unless told else.

    `past` holds views, or what `access` takes. `level` is one for all [], one per video [b] or one per frame [b, t].
    """
    dit, cfg = denoiser.nets.dit, denoiser.cfg
    per_frame = jnp.expand_dims(level.timestep, range(jnp.ndim(level.timestep), 2))
    time = dit.embed_time(jnp.broadcast_to(per_frame, noisy.shape[:2]))
    self_attention = block_attention(cfg, layout, noisy.shape[1], access)
    x, outputs = _run(denoiser, dit.embed(noisy), time, past, self_attention)
    output = dit.output(x, time, cfg.grid).astype(noisy.dtype)
    if cfg.sample.prediction == "clean":
        return output, outputs
    return schedules.clean_from_velocity(noisy, output, level.sigma), outputs


def denoise_jointly(
    denoiser: Denoiser, memory: Memory, noisy: Latent, level: NoiseLevel, blocks: Array | np.int32
) -> Latent:
    """The clean predictions of all blocks of a window at once, each from its own noise level (Rolling Forcing).

    `noisy` holds [b, window, y, x, c], `level` one value per frame [window]. The first `blocks` blocks exist and
    attend to one another and to what `layouts.joint` says; what is predicted of the others means nothing.
    """
    cfg, spec = denoiser.cfg, denoiser.cfg.memory
    layout = layouts.joint(cfg.cache, memory.progress, blocks * cfg.cache.block)
    behind = (layout.sink + layout.recent) * cfg.tokens_per_frame
    access = Access(
        view_of=lambda layer: view.joint(spec, layout, layer),
        keep=lambda own, whole, layer: (),
        write=lambda whole, own: cache.extend(whole, own, behind),
    )
    per_frame = jax.tree.map(lambda x: jnp.broadcast_to(x, noisy.shape[:2]), level)
    return predict_x0(denoiser, layout, noisy, per_frame, memory.layers, access)[0]


# Committing


def commit_block(
    denoiser: Denoiser,
    memory: Memory,
    latent: Latent,
    low_res: Latent,
    selection: PerLayer[Selection] | None,
) -> tuple[Memory, PerLayer[KV] | None]:
    """(the memory after `latent`, the packed keys and values per layer where the archive is not in it).

    One clean pass at timestep 0 for the block's own keys, one more for those of its packed twin. The twin sees what
    the clean pass saw, the block at full size, and itself; the block never sees its twin. `selection` is what the
    block was denoised with; None lays down the newest packed blocks, for a block that was given and not denoised.
    """
    cfg = denoiser.cfg
    spec = cfg.memory
    cache_cfg = cfg.cache
    now = layouts.layout(cache_cfg, memory.progress)
    following = layouts.layout(cache_cfg, memory.progress.after_block())
    if selection is None:
        newest = pytrees.over(lambda _: view.newest(spec, now, len(latent)), memory.layers)
        memory = laid(cfg, memory, pytrees.over(view.gather, memory.layers, newest), newest)
        selection = newest

    def keep_full(own: KV, whole: KV, past: Any) -> LayerCache:
        layer, selected = past
        layer = dataclasses.replace(layer, view=whole)
        layer = cache.keep_unrotated(spec, now, layer, own.k)
        return (
            layer
            if cache_cfg.top
            else cache.finish_layer(spec, now, following, layer, None, selected)
        )

    def keep_packed(own: KV, whole: KV, past: Any) -> tuple[LayerCache, KV | None]:
        layer, selected = past
        layer = dataclasses.replace(layer, view=whole)
        stored, handed = (own, None) if cache_cfg.archive == "device" else (None, own)
        return cache.finish_layer(spec, now, following, layer, stored, selected), handed

    past = pytrees.zipped(memory.layers, selection)
    writes = Access(
        view_of=lambda past: past[0].view, keep=keep_full, writes=True, attends=remembering
    )
    layers = read_clean(denoiser, now, latent, past, writes)
    packed = None
    if cache_cfg.top:
        # Without the barrier a layer's view may be wanted before and after the twin is laid into it: two copies of it.
        layers, latent, low_res = jax.lax.optimization_barrier((layers, latent, low_res))
        past = pytrees.zipped(layers, selection)
        writes = dataclasses.replace(writes, keep=keep_packed)
        outputs = read_packed(denoiser, now, latent, low_res, past, writes)
        layers, packed = pytrees.unzip(outputs)
    memory = cache.advanced(spec, dataclasses.replace(memory, layers=layers), latent)
    return memory, packed if cache_cfg.archive == "host" else None


def read_clean(
    denoiser: Denoiser, layout: Layout, latent: Latent, past: Any, access: Access = READS
) -> Any:
    """What each layer keeps of a pass of a clean block, at timestep 0, by default its view with the block in it."""
    dit = denoiser.nets.dit
    time = dit.embed_time(jnp.zeros(latent.shape[:2]))
    self_attention = block_attention(denoiser.cfg, layout, latent.shape[1], access)
    return _run(denoiser, dit.embed(latent), time, past, self_attention)[1]


def read_packed(
    denoiser: Denoiser,
    layout: Layout,
    latent: Latent,
    low_res: Latent,
    past: Any,
    access: Access = READS,
) -> Any:
    """What each layer keeps of a pass of a clean block's packed twin; the views in `past` hold the block as well.

    The twin passes through all layers, or each layer projects the packed tokens themselves (`compressor.keys`),
    or averages the block's own keys and values.
    """
    nets, cfg = denoiser.nets, denoiser.cfg
    if cfg.compressor.branches == "own":

        def averaged(past: Any) -> Any:
            view = access.view_of(past)
            block = cache.read_block(cfg.memory, layout, view)
            return access.keep(compressor.averaged(cfg, block), view, past)

        return pytrees.over(averaged, past)
    tokens = nets.compressor.pack(nets.dit, cfg, latent, low_res)
    modulated = cfg.compressor.keys != "unmodulated"
    time = nets.dit.embed_time(jnp.zeros((latent.shape[0], 1))) if modulated else None
    grid = jnp.asarray(layouts.packed_positions(cfg.memory)[1])
    if cfg.compressor.keys != "blocks":
        turn = rope.space_angles(grid, cfg.memory)

        def projected(own: KV, past: Any) -> Any:
            own = KV(k=rope.rotate(own.k, turn), v=own.v)
            return access.keep(own, access.view_of(past), past)

        return pytrees.over(projected, nets.dit.keys_values(tokens, time), past)

    def behind_all(layout: Layout) -> SelfAttention:
        at = layouts.length(cfg.memory, layout)
        behind = dataclasses.replace(access, write=lambda view, own: cache.extend(view, own, at))
        times = layouts.packed_times(cfg.memory, layout)
        valid = at + cfg.tokens_per_packed_block
        return _attention_behind(cfg, times, grid, behind, layout, valid)

    self_attention = _by_layer(layout, access, behind_all)
    return _run(denoiser, tokens, time, past, self_attention)[1]


def recache(denoiser: Denoiser, memory: Memory, *, keep_sink: bool = True) -> tuple[Memory, Latent]:
    """`memory` with the keys and values of its frames at full size computed again, as at a prompt switch (LongLive).

    One pass at timestep 0 over the finished latents of the newest `sink + recent + block` frames, which attend to one
    another without a mask; also what the network returns of it. Behind more frames than that, the sink keeps its keys,
    or, not `keep_sink`, the oldest of these frames become the sink. Packed blocks stay as they are.
    Raises `InputError` where packed blocks would be left behind a sink that moves.
    """
    dit, cfg = denoiser.nets.dit, denoiser.cfg
    spec, count = cfg.memory, cfg.cache.full_frames
    require(
        keep_sink or cfg.cache.top == 0,
        "a re-cache that moves the sink forgets what is packed; keep the sink or set cache.top=0.",
    )
    plan = layouts.recache(cfg.cache, memory.progress, keep_sink)
    each = functools.partial(jnp.repeat, repeats=cfg.tokens_per_frame)
    in_sink = jnp.broadcast_to(plan.behind_sink, cfg.cache.sink * cfg.tokens_per_frame)
    visible = jnp.concatenate([in_sink, each(plan.written)])
    mask = jnp.broadcast_to(visible[None], (count * cfg.tokens_per_frame, len(visible)))
    rows, columns = cfg.grid

    def behind(sink: KV, own: KV) -> KV:
        return jax.tree.map(lambda *both: jnp.concatenate(both, axis=1), sink, own)

    self_attention = _attention(
        cfg,
        each(plan.positions.astype(jnp.float32)),
        jnp.asarray(rope.grid(range(rows), range(columns), count)),
        Access(
            view_of=lambda layer: cache.sink_of(spec, layer.view),
            keep=lambda own, view, layer: own,
            write=behind,
        ),
        mask=mask,
    )
    latents = cache.latents_of(spec, memory, plan.frames)
    time = dit.embed_time(jnp.zeros(latents.shape[:2]))
    x, own = _run(denoiser, dit.embed(latents), time, memory.layers, self_attention)
    memory = cache.rewritten(spec, memory, plan, own)
    return memory, dit.output(x, time, cfg.grid)


# What a layer does when its tokens attend


def choosing(cfg: StepConfig, layout: Layout, attention_fn: SelfAttention) -> SelfAttention:
    """`attend` in a view recalled by the layer's own queries from its (memory, random scores).

    Keeps (view, selection).
    """

    def self_attention(q: Heads, k: Heads, v: Heads, past: Any) -> tuple[Heads, Any]:
        layer, random = past
        recalled, selection = view.recall(cfg.memory, layout, layer, q, random)
        mixed, whole = attention_fn(q, k, v, recalled)
        return mixed, (whole, selection)

    return self_attention


def asking(cfg: StepConfig, layout: Layout, attention_fn: SelfAttention) -> SelfAttention:
    """`attend` that also keeps what the layer's queries ask."""

    def self_attention(q: Heads, k: Heads, v: Heads, past: KV) -> tuple[Heads, Any]:
        mixed, whole = attention_fn(q, k, v, past)
        return mixed, (whole, view.pool_queries(cfg.memory, layout, q))

    return self_attention


def remembering(cfg: StepConfig, layout: Layout, attention_fn: SelfAttention) -> SelfAttention:
    """`attend` that leaves the sum of the layer's queries in the memory that it keeps, where that has room for it."""

    def self_attention(q: Heads, k: Heads, v: Heads, past: Any) -> tuple[Heads, LayerCache]:
        mixed, layer = attention_fn(q, k, v, past)
        return mixed, cache.keep_queries(layout, layer, view.sum_queries(cfg.memory, q))

    return self_attention


def watching(cfg: StepConfig, layout: Layout, attention_fn: SelfAttention) -> SelfAttention:
    """`choosing` that also keeps the affinity [b, slot] of every packed block, whatever the score: for training."""
    wanted = dataclasses.replace(
        cfg.memory, cache=dataclasses.replace(cfg.cache, selection="affinity")
    )

    def self_attention(q: Heads, k: Heads, v: Heads, past: Any) -> tuple[Heads, Any]:
        layer, random = past
        mixed, (whole, selection) = choosing(cfg, layout, attention_fn)(q, k, v, past)
        queries = view.pool_queries(wanted, layout, q)
        return mixed, (whole, selection, view.score(wanted, layout, layer, queries, random))

    return self_attention


def block_attention(
    cfg: StepConfig, layout: Layout, frames: int, access: Access = READS
) -> SelfAttention:
    """Attention of the tokens of the next `frames` frames, laid into the slots where they will stay."""
    spec = cfg.memory
    rows, columns = cfg.grid
    grid = jnp.asarray(rope.grid(range(rows), range(columns), frames))

    def in_place(layout: Layout) -> SelfAttention:
        own = access
        if access.write is None:
            alone = functools.partial(view.alone, spec, layout)
            own = dataclasses.replace(
                access,
                write=functools.partial(cache.write_block, spec, layout),
                seen=alone if cfg.cache.joint else access.seen,
            )
        times = layouts.current_times(spec, layout, frames)
        valid = layouts.length(spec, layout)
        self_attention = _attention_behind(cfg, times, grid, own, layout, valid)
        return access.attends(cfg, layout, self_attention)

    return _by_layer(layout, access, in_place)


def _by_layer(
    layout: Layout, access: Access, attention_in: Callable[[Layout], SelfAttention]
) -> SelfAttention:
    """Attention in `layout`, or in what each layer sees where layers differ."""
    layout_of = access.layout_of
    if layout_of is None:
        return attention_in(layout)
    return lambda q, k, v, past: attention_in(layout_of(past))(q, k, v, past)


def _attention_behind(
    cfg: StepConfig,
    times: Float[Array, " q"],
    grid: Float[Array, "q 2"],
    access: Access,
    layout: Layout,
    valid: Array,
) -> SelfAttention:
    """Attention to the first `valid` keys of a view; where layers differ, without those that theirs has hidden."""
    if access.layout_of is None:
        return _attention(cfg, times, grid, access, valid=valid)
    spec = cfg.memory
    turned = dataclasses.replace(
        access, seen=functools.partial(view.with_sink_turned, spec, layout)
    )
    seen = layouts.seen_keys(spec, layout, valid)
    mask = jnp.broadcast_to(seen, (len(times), len(seen)))
    return _attention(cfg, times, grid, turned, mask=mask)


def _attention(
    cfg: StepConfig,
    times: Float[Array, " q"],
    grid: Float[Array, "q 2"],
    access: Access,
    valid: Array | None = None,
    mask: Array | None = None,
) -> SelfAttention:
    """Attention of tokens at (times, grid), once written into a view, to its first `valid` keys, or by a mask."""
    assert access.write is not None
    write = access.write
    in_time = rope.time_angles(times, cfg.memory)
    in_space = rope.space_angles(grid, cfg.memory)

    def self_attention(q: Heads, k: Heads, v: Heads, past: Any) -> tuple[Heads, Any]:
        own = KV(k=rope.rotate(k, in_space), v=v)
        whole = write(access.view_of(past), KV(k=rope.rotate(own.k, in_time), v=v))
        seen = access.seen(whole)
        attention_fn = attention.backend(cfg.attention, seen.k.dtype)
        turned = rope.rotate(q, in_time + in_space).astype(seen.k.dtype)
        mixed = attention_fn(turned, seen.k, seen.v, valid, mask).astype(q.dtype)
        if not access.writes:
            return mixed, access.keep(own, whole, past)
        # The first barrier: what is read now is written only afterwards, or it is copied. The second: it is then done.
        mixed, whole = jax.lax.optimization_barrier((mixed, whole))
        return jax.lax.optimization_barrier((mixed, access.keep(own, whole, past)))

    return self_attention


def _run(
    denoiser: Denoiser, x: Tokens, time: Any, past: Any, self_attention: SelfAttention
) -> tuple[Tokens, Any]:
    """Tokens after all layers, which read the text, if there is any, by the attention that the config names."""
    cfg = denoiser.cfg
    read = jax.tree.leaves(denoiser.text)
    cross_attention = attention.backend(cfg.attention, read[0].dtype if read else cfg.compute)
    return denoiser.nets.dit.run(
        x,
        time,
        denoiser.text,
        past=past,
        self_attention=self_attention,
        cross_attention=cross_attention,
    )


# Views


def views_of(memory: Memory) -> PerLayer[KV]:
    """The view of every layer."""
    return pytrees.over(lambda layer: layer.view, memory.layers)


def with_views(memory: Memory, views: PerLayer[KV]) -> Memory:
    """`memory` with these views: the same in all that is remembered, other scratch."""

    def one(layer: LayerCache, view: KV) -> LayerCache:
        return dataclasses.replace(layer, view=view)

    return dataclasses.replace(memory, layers=pytrees.over(one, memory.layers, views))


def laid(
    cfg: StepConfig,
    memory: Memory,
    gathered: PerLayer[view.Gathered],
    selection: PerLayer[Selection],
) -> Memory:
    """`memory` with these packed blocks in the views."""
    layout = layouts.layout(cfg.cache, memory.progress)
    views = pytrees.over(
        lambda *one: view.lay(cfg.memory, layout, *one), memory.layers, gathered, selection
    )
    return with_views(memory, views)


# Steps and noise


def step_table(cfg: SampleConfig):
    """(timesteps, sigmas) of the denoising steps: nominal steps warped by the shift, sigma by nearest grid entry.

    Without `cfg.warp` the steps are the timesteps.
    """
    times = np.asarray(cfg.steps, np.float32)
    if cfg.warp:
        times = schedules.shifted_timesteps(cfg.steps, cfg.shift, exact=cfg.exact_timesteps)
    return times, schedules.sigma_at(schedules.table(cfg.shift), jnp.asarray(times))


def noise_levels(cfg: SampleConfig) -> NoiseLevel:
    """The levels [step] of the denoising steps."""
    return NoiseLevel(*(jnp.asarray(x) for x in step_table(cfg)))


def random_scores(memory: Memory, noise: Noise) -> PerLayer[Array]:
    """Each layer's random scores, in the form that the memory's layers have."""
    return list(noise.random) if isinstance(memory.layers, list) else noise.random


def draw_noise(cfg: StepConfig, seeds: Array, videos: Array, block: Array) -> Noise:
    """What is random about one block of each video: a function of (seed, video id, block, step or layer) alone.

    `seeds` is one for all videos, or one for each [b].
    """
    seeds = jnp.broadcast_to(jnp.asarray(seeds, jnp.uint32), videos.shape)

    def uniforms(layer: Array) -> Array:
        def one(seed: Array, video: Array) -> Array:
            of_block = _noise_key(seed, video, block, jnp.uint32(RANDOM_SCORES))
            return jax.random.uniform(jax.random.fold_in(of_block, layer), (cfg.cache.slots,))

        return jax.vmap(one)(seeds, videos)

    steps, layers = jnp.arange(len(cfg.sample.steps)), jnp.arange(cfg.dit.layers)
    noise = jax.vmap(lambda step: step_noise(cfg, seeds, videos, block, step))(steps)
    return Noise(noise=noise[0], renoise=noise[1:], random=jax.vmap(uniforms)(layers))


def step_noise(
    cfg: StepConfig, seeds: Array, videos: Array, block: Array, step: Array
) -> Float[Array, "b t y x c"]:
    """The noise with which one block of each video goes into a denoising step; into the first it is that alone."""
    shape = cfg.cache.block, *cfg.latent, cfg.dit.in_channels

    def normal(seed: Array, video: Array) -> Array:
        return jax.random.normal(_noise_key(seed, video, block, step), shape)

    return jax.vmap(normal)(seeds, videos)


def noise_of_blocks(
    cfg: StepConfig, seeds: Array, videos: Array, blocks: Array, steps: Array
) -> Float[Array, "block b t y x c"]:
    """The noise with which each of several blocks goes into a step of its own."""

    def one(block: Array, step: Array) -> Array:
        return step_noise(cfg, seeds, videos, block, step)

    return jax.vmap(one)(blocks, steps)


def _noise_key(seed: Array, video: Array, block: Array, step: Array | int) -> Array:
    of_block = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), video), block)
    return jax.random.fold_in(of_block, step)
