"""The student's own clips: drawn once without a gradient, then every block once more with one (Self-Forcing).

The first pass leaves the clip behind as constants: the clean keys and values of every block, and what one step, the
exit, read in each. The second computes that step again, all blocks alike. Gradients reach a block's loss through the
step itself and through packed keys computed again from stored latents; stored keys are constants (paper section 8).
"""

import dataclasses
from typing import Any, TypeAlias, cast

import einops
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.typing import DTypeLike

from packforcing_jax import pytrees
from packforcing_jax.config import (
    CoverConfig,
    DistilConfig,
    Experiment,
    MemorySpec,
    StepConfig,
)
from packforcing_jax.errors import require
from packforcing_jax.memory import cache, view
from packforcing_jax.memory import layout as layouts
from packforcing_jax.memory.cache import Selection
from packforcing_jax.memory.layout import Layout
from packforcing_jax.networks import codec, dit, rope
from packforcing_jax.sampling import block_step, schedules
from packforcing_jax.sampling.block_step import Access, Denoiser
from packforcing_jax.training import batches
from packforcing_jax.types import KV, Heads, Latent

DecoderState: TypeAlias = Any  # between two chunks of a video; each codec has its own structure


@struct.dataclass
class Draws:
    """Everything random about a rollout."""

    noise: Array  # [block, b, t, y, x, c]
    renoise: Array  # [block, step, b, t, y, x, c]
    context: (
        Array  # [block, b, t, y, x, c]  noise of the clean pass, where that reads noised blocks
    )
    random: Array  # [block, layer, b, slot]
    exit: Array  # []  the step that gets a gradient, one for all blocks and clips
    gap: Array  # []  frames that the past is moved back


@struct.dataclass
class Stored:
    """What one layer, or all along a leading axis, remembers of a clip, and what a block attends to."""

    full: KV  # [b, frame, s, n, h]  clean keys, rotated in space
    packed: KV  # [b, block, p, n, h]
    selection: Any = None  # Selection


@struct.dataclass
class Condition:
    """What a pass over one block is conditioned on: the layout in front of it, the stored clip, the block's text."""

    layout: Layout
    stored: Stored  # all layers
    text: KV  # [layer, b, words, n, h]


@struct.dataclass
class Clip:
    """A clip and all that is needed to draw each of its blocks again."""

    noisy: Array  # [block, b, t, y, x, c]  what the exit step read
    latent: Array  # [block, b, t, y, x, c]  the block as later ones remember it
    low_res: Array  # [block, b, t', y', x', c]
    stored: Stored  # all layers
    selection: Selection  # [block, layer, ...]
    exit: Array  # []  the step that read `noisy`
    gap: Array  # []  frames that the past was moved back


def for_training(
    exp: Experiment, blocks: int, sink: int, recent: int | None = None, *, top: int = 0
) -> Experiment:
    """`exp` with a memory for clips of `blocks` blocks: `sink` and `recent` frames, packed blocks for all the rest.

    `top` of them are attended by the cache's own selection; 0: all. The choice is made at the first step, in every
    layer, or in every pass if the cache says so and no packed block passes through the layers. Raises `InputError` if
    it asks with the queries of recent blocks.
    """
    recent = exp.cache.recent if recent is None else recent
    packs = exp.cache.top > 0
    anew = exp.cache.chooses_anew and not exp.memory.packing_pass
    packed_blocks = max(blocks - (sink + recent) // exp.cache.block, 1)
    smaller = dataclasses.replace(
        exp.cache,
        sink=sink,
        recent=recent,
        top=packs * min(top or packed_blocks, packed_blocks),
        capacity=packs * packed_blocks,
        selection=exp.cache.selection if top else "all",
        span="true",
        scope="layer",
        timing="every" if anew else "first",
        registry=exp.cache.registry if anew else "per_layer",
        archive="device",
        rope_adjustment="none" if exp.cache.rope_adjustment == "none" else "sink",
    )
    require(
        smaller.asking_blocks == 0,
        f"cache.selection={smaller.score.name!r} asks with the queries of recent blocks, which training does not keep; "
        "set cache.recent_queries=false.",
    )
    return dataclasses.replace(exp, cache=smaller)


def sample_draws(exp: Experiment, cover: CoverConfig, key: Array, blocks: int, batch: int) -> Draws:
    """The draws of a rollout of `batch` clips, sampled from `key`."""
    keys = jax.random.split(key, 6)
    shape = (batch, exp.cache.block, *exp.latent, exp.dit.in_channels)
    return Draws(
        noise=jax.random.normal(keys[0], (blocks, *shape)),
        context=jax.random.normal(keys[2], (blocks, *shape)),
        renoise=jax.random.normal(keys[1], (blocks, len(exp.sample.steps) - 1, *shape)),
        random=jax.random.uniform(keys[3], (blocks, exp.dit.layers, batch, exp.cache.slots)),
        exit=jax.random.randint(keys[4], (), 0, len(exp.sample.steps)),
        gap=gap(cover, keys[5]),
    )


def gap(cover: CoverConfig, key: Array) -> Array:
    """Frames that the past is moved back in this step: none, or up to `train.cover.gap`."""
    size_key, share_key = jax.random.split(key)
    return jnp.where(
        jax.random.uniform(share_key) < cover.gap_share,
        jax.random.uniform(size_key, maxval=cover.gap),
        0.0,
    )


def lay(spec: MemorySpec, layout: Layout, stored: Stored) -> KV:
    """A layer's view in front of block `layout.num_blocks` of a stored clip."""
    layer = cache.layer_at(spec, layout, stored.full, stored.packed)
    gathered = view.gather(layer, stored.selection)
    return view.lay(spec, layout, layer, gathered, stored.selection)


def lay_with_block(spec: MemorySpec, layout: Layout, stored: Stored) -> KV:
    """The same with the block's own clean keys in their slots, as its packed form sees it."""
    size = spec.cache.block
    start = layout.num_blocks * spec.cache.block

    def block(frames: Array) -> Heads:
        own = jax.lax.dynamic_slice_in_dim(frames, start, size, axis=1)
        return einops.rearrange(own, "b t s n h -> b (t s) n h")

    angles = rope.time_angles(layouts.current_times(spec, layout, size), spec)
    own = KV(k=rope.rotate(block(stored.full.k), angles), v=block(stored.full.v))
    return cache.write_block(spec, layout, lay(spec, layout, stored), own)


def in_clip(spec: MemorySpec, layout: Layout) -> Access:
    """A pass in the views of a stored clip, of which each layer keeps the block's own keys and values."""
    return Access(
        view_of=lambda stored: lay(spec, layout, stored), keep=lambda own, view, stored: own
    )


def behind_block(spec: MemorySpec, layout: Layout) -> Access:
    """The same for a block's packed form."""
    return Access(
        view_of=lambda stored: lay_with_block(spec, layout, stored),
        keep=lambda own, view, stored: own,
    )


def choosing(cfg: StepConfig, layout: Layout, attention_fn: dit.SelfAttention) -> dit.SelfAttention:
    """`attend` in a view chosen by the layer's own queries from its (stored clip, random scores); keeps the choice."""

    def self_attention(
        q: Heads, k: Heads, v: Heads, past: tuple[Stored, Array]
    ) -> tuple[Heads, Selection]:
        stored, random = past
        layer = cache.layer_at(cfg.memory, layout, stored.full, stored.packed)
        recalled, selection = view.recall(cfg.memory, layout, layer, q, random)
        return attention_fn(q, k, v, recalled)[0], selection

    return self_attention


def choosing_anew(
    cfg: StepConfig, layout: Layout, attention_fn: dit.SelfAttention
) -> dit.SelfAttention:
    """The same from (stored clip, what the layer sees), without chance; also what the pass keeps."""

    def self_attention(
        q: Heads, k: Heads, v: Heads, past: tuple[Stored, Layout]
    ) -> tuple[Heads, tuple[Selection, Any]]:
        stored, _ = past
        layer = cache.layer_at(cfg.memory, layout, stored.full, stored.packed)
        no_random = jnp.zeros((len(q), cfg.cache.slots))
        recalled, selection = view.recall(cfg.memory, layout, layer, q, no_random)
        mixed, kept = attention_fn(q, k, v, recalled)
        return mixed, (selection, kept)

    return self_attention


def draw(
    nets: block_step.Nets,
    exp: Experiment,
    distil: DistilConfig,
    vae: codec.Codec | None,
    draws: Draws,
    text: KV,
) -> Clip:
    """Clips drawn block after block without a gradient, to their end or, not `train.distil.finished`, to `draws.exit`.

    `text` [block or 1, layer, ...].
    """
    nets, text = jax.lax.stop_gradient((nets, text))
    blocks, batch = draws.noise.shape[:2]
    start = empty(exp, blocks, batch, jax.tree.leaves(text)[0].dtype)
    decoder = (
        codec.init_decoder(_require_codec(vae), batch, *exp.latent) if exp.packs_pixels else ()
    )
    per_block = (jnp.arange(blocks), draws.noise, draws.renoise, draws.context, draws.random)

    def one_block(carry, inputs, first: bool = False):
        stored, decoder = carry
        n, noise, renoise, context, random = inputs
        layout = layouts.layout(exp.cache, layouts.begin(n), draws.gap)
        condition = Condition(layout=layout, stored=stored, text=batches.of_block(text, n))
        block_noise = block_step.Noise(noise=noise, renoise=renoise, random=random)
        steps = _steps_anew if exp.cache.chooses_anew else _steps
        noisy, latent, selection = steps(nets, exp, distil, condition, block_noise, draws.exit)
        low_res, decoder = low_res_latents(exp, vae, decoder, latent, first=first)
        condition = _behind(condition, dataclasses.replace(stored, selection=selection))
        clean = _context(exp, distil, latent, context)
        if exp.cache.chooses_anew:  # what is packed is what the clean pass read
            latent = clean
            _, full = read_anew(nets, exp, condition, clean, draws.exit)
            stored = _with_block(nets, exp, condition, full, (clean, low_res))
        else:
            stored = _remembered(nets, exp, condition, clean, latent, low_res)
        return (stored, decoder), (noisy, latent, low_res, selection)

    carry = (start, decoder)
    opened = []
    if exp.codec.time_factor > 1:  # the first latent of a video is decoded by a program of its own
        carry, out = one_block(carry, jax.tree.map(lambda x: x[0], per_block), first=True)
        opened = [jax.tree.map(lambda x: x[None], out)]
        per_block = jax.tree.map(lambda x: x[1:], per_block)
    (stored, _), rest = jax.lax.scan(one_block, carry, per_block)
    noisy, latent, low_res, selection = jax.tree.map(
        lambda *parts: jnp.concatenate(parts), *opened, rest
    )
    return jax.lax.stop_gradient(
        Clip(
            noisy=noisy,
            latent=latent,
            low_res=low_res,
            selection=selection,
            stored=stored,
            exit=draws.exit,
            gap=draws.gap,
        )
    )


def empty(exp: Experiment, blocks: int, batch: int, dtype: DTypeLike) -> Stored:
    """Room for the keys and values of a clip, in all layers."""

    def store(count: int, tokens: int) -> KV:
        shape = (exp.dit.layers, batch, count, tokens, exp.dit.heads, exp.dit.head_dim)
        return KV(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))

    return Stored(
        full=store(blocks * exp.cache.block, exp.tokens_per_frame),
        packed=store(blocks if exp.cache.top else 0, exp.tokens_per_packed_block),
    )


def _behind(condition: Condition, stored: Stored) -> Condition:
    """`condition` with another state of what is stored."""
    return dataclasses.replace(condition, stored=stored)


def _steps(
    nets: block_step.Nets,
    exp: Experiment,
    distil: DistilConfig,
    condition: Condition,
    noise: block_step.Noise,
    exit: Array,
) -> tuple[Latent, Latent, Selection]:
    """(what the exit step read, the block as its history keeps it, what each layer attended to)."""
    layout = condition.layout
    stored = condition.stored
    access = in_clip(exp.memory, layout)
    denoiser = Denoiser(nets, exp.step, condition.text)
    levels = block_step.noise_levels(exp.sample)
    choose = block_step.Access(attends=choosing)
    past = (stored, noise.random)
    clean, selection = block_step.first_step(denoiser, layout, noise, past, choose)
    behind = dataclasses.replace(stored, selection=selection)

    def step(i, carry):
        read, before = carry
        level = levels[i + 1]
        noisy = schedules.add_noise(before, noise.renoise[i], level.sigma)
        clean, _ = block_step.predict_x0(denoiser, layout, noisy, level, behind, access)
        return jnp.where(i < exit, noisy, read), clean

    last = len(levels.sigma) - 1 if distil.finished else exit
    return *jax.lax.fori_loop(0, last, step, (noise.noise, clean)), selection


def seen(exp: Experiment, now: Layout, step: Array, exit: Array, *, commits: bool) -> Layout:
    """What each layer [layer, ...] sees in a denoising step, or in the commit behind the `exit`.

    Where all layers share one list of blocks, the first pass without a gradient moves it on (PackForcing-Unofficial
    3f4302e, cache mode rollout_compatible): a step before the exit, or the commit. What comes before sees what sampling
    does, what comes after sees one recent block less besides the current one.
    """
    cfg, layers = exp.cache, exp.dit.layers
    alike = pytrees.stack([now] * layers)
    if cfg.registry == "per_layer":
        return alike
    writes = pytrees.stack(layouts.first_to_write(cfg, now, layers))
    after = pytrees.stack([layouts.moved_on(cfg, now, arrived=True)] * layers)
    is_first = (exit == 0) if commits else (step == 0) & (exit > 0)
    is_before = jnp.bool_(False) if commits else (step == 0) & (exit == 0)

    def one(plain: Array, writing: Array, later: Array) -> Array:
        return jnp.where(is_before, plain, jnp.where(is_first, writing, later))

    chosen = jax.tree.map(one, alike, writes, after)
    return dataclasses.replace(chosen, sink_turn=jnp.zeros(layers))  # a clip's keys lie there


def _anew(exp: Experiment, keep: Any = Access().keep) -> Access:
    """A pass that chooses anew from (stored clip, what the layer sees)."""
    shared = exp.cache.registry == "shared"
    return Access(
        keep=keep,
        attends=choosing_anew,
        layout_of=(lambda past: past[1]) if shared else None,
    )


def _steps_anew(
    nets: block_step.Nets,
    exp: Experiment,
    distil: DistilConfig,
    condition: Condition,
    noise: block_step.Noise,
    exit: Array,
) -> tuple[Latent, Latent, Selection]:
    """`_steps` of which each chooses anew; the choice is that of the exit step."""
    levels = block_step.noise_levels(exp.sample)

    def step(i, carry):
        read, before, chosen = carry
        noisy = schedules.add_noise(before, noise.renoise[i - 1], levels[i].sigma)
        clean, selection = predict_anew(nets, exp, condition, noisy, i, exit)
        here = i <= exit
        chosen = jax.tree.map(lambda new, old: jnp.where(here, new, old), selection, chosen)
        return jnp.where(here, noisy, read), clean, chosen

    last = len(levels.sigma) if distil.finished else exit + 1
    clean, selection = predict_anew(nets, exp, condition, noise.noise, jnp.int32(0), exit)
    return jax.lax.fori_loop(1, last, step, (noise.noise, clean, selection))


def predict_anew(
    nets: block_step.Nets,
    exp: Experiment,
    condition: Condition,
    noisy: Latent,
    step: Array,
    exit: Array,
) -> tuple[Latent, Selection]:
    """(the clean prediction of a step that chooses anew, what each layer chose)."""
    now = condition.layout
    denoiser = Denoiser(nets, exp.step, condition.text)
    level = block_step.noise_levels(exp.sample)[step]
    past = (condition.stored, seen(exp, now, step, exit, commits=False))
    clean, (selection, _) = block_step.predict_x0(denoiser, now, noisy, level, past, _anew(exp))
    return clean, selection


def read_anew(
    nets: block_step.Nets, exp: Experiment, condition: Condition, clean: Latent, exit: Array
) -> tuple[Selection, KV]:
    """(what each layer chose in a clean pass that chooses anew, the block's own keys and values)."""
    now = condition.layout
    denoiser = Denoiser(nets, exp.step, condition.text)
    past = (condition.stored, seen(exp, now, jnp.int32(0), exit, commits=True))
    keeps_own = _anew(exp, lambda own, view, past: own)
    return block_step.read_clean(denoiser, now, clean, past, keeps_own)


def _context(exp: Experiment, distil: DistilConfig, latent: Array, noise: Array) -> Array:
    """What the clean pass reads: the block, or the block with the noise that timestep 0 has in the table."""
    if not distil.noised_context:
        return latent
    return schedules.add_noise(
        latent, noise, schedules.sigma_at(schedules.table(exp.sample.shift), 0.0)
    )


def _remembered(
    nets: block_step.Nets,
    exp: Experiment,
    condition: Condition,
    clean: Latent,
    latent: Latent,
    low_res: Latent,
) -> Stored:
    """What is stored after one more block: `clean`, as the clean pass reads it, then its packed form.

    The passes are those of `block_step.commit_block`.
    """
    layout = condition.layout
    stored = condition.stored
    access = in_clip(exp.memory, layout)
    denoiser = Denoiser(nets, exp.step, condition.text)
    full = block_step.read_clean(denoiser, layout, clean, stored, access)
    return _with_block(nets, exp, condition, full, (latent, low_res))


def _with_block(
    nets: block_step.Nets,
    exp: Experiment,
    condition: Condition,
    full: KV,
    packs: tuple[Latent, Latent],
) -> Stored:
    """What is stored with one more block: its own keys and values [layer, b, t*s, n, h], and what is packed of it.

    `packs`: the latent and its low-resolution form.
    """
    layout, stored = condition.layout, condition.stored
    frames = KV(
        *(
            einops.rearrange(x, "layer b (t s) n h -> layer b t s n h", t=exp.cache.block)
            for x in (full.k, full.v)
        )
    )
    stored = dataclasses.replace(
        stored, full=_put(stored.full, frames, layout.num_blocks * exp.cache.block)
    )
    if exp.cache.top:
        packed = _packed(nets, exp, _behind(condition, stored), *packs)
        stored = dataclasses.replace(
            stored,
            packed=_put(
                stored.packed, KV(packed.k[:, :, None], packed.v[:, :, None]), layout.num_blocks
            ),
        )
    return dataclasses.replace(stored, selection=None)


def _packed(
    nets: block_step.Nets, exp: Experiment, condition: Condition, latent: Latent, low_res: Latent
) -> KV:
    """Keys and values [layer, b, p, n, h] of a packed block."""
    layout = condition.layout
    access = behind_block(exp.memory, layout)
    denoiser = Denoiser(nets, exp.step, condition.text)
    return block_step.read_packed(denoiser, layout, latent, low_res, condition.stored, access)


def _put(store: KV, new: KV, at: Array) -> KV:
    return KV(
        *(
            jax.lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), at, axis=2)
            for x, y in ((store.k, new.k), (store.v, new.v))
        )
    )


def _require_codec(vae: codec.Codec | None) -> codec.Codec:
    require(
        vae is not None,
        "packing by pixels needs the codec; give a model folder with one, or set "
        "compressor.branches=hr.",
    )
    return cast(codec.Codec, vae)


def low_res_latents(
    exp: Experiment, vae: codec.Codec | None, decoder: DecoderState, latent: Latent, *, first: bool
) -> tuple[Latent, DecoderState]:
    """A sampled block in low resolution, through its pixels, and the decoder after it."""
    if not exp.packs_pixels:
        return latent[:, :0], decoder
    vae = _require_codec(vae)
    frames, decoder = codec.decode_chunk(vae, decoder, latent, first=first)
    return codec.low_res_latents(
        vae, frames, latents=exp.packed_grid[0], pool=exp.compressor.pool
    ), decoder


# Under a gradient


def again(
    nets: block_step.Nets,
    exp: Experiment,
    distil: DistilConfig,
    clip: Clip,
    text: KV,
    *,
    first: int = 0,
) -> Array:
    """The blocks of `clip` from number `first` on [block, b, t, y, x, c], each drawn again under a gradient."""
    level = block_step.noise_levels(exp.sample)[clip.exit]
    stored = _through_packed(nets, exp, clip, text) if distil.gradient == "packed" else clip.stored
    leaks = distil.gradient == "leak"
    start = jax.tree.map(jnp.zeros_like, stored.full) if leaks else None

    def one_block(leaked, inputs):
        n, noisy, selection = inputs
        layout = layouts.layout(exp.cache, layouts.begin(n), clip.gap)
        access = in_clip(exp.memory, layout)
        if exp.cache.registry == "shared":
            layout, access = _in_list(exp, layout, clip.exit)
        denoiser = Denoiser(nets, exp.step, batches.of_block(text, n))
        full = stored.full if leaked is None else jax.tree.map(jnp.add, stored.full, leaked)
        behind = Stored(full=full, packed=stored.packed, selection=selection)
        latent, own = block_step.predict_x0(denoiser, layout, noisy, level, behind, access)
        if leaked is None:
            return None, latent
        # Zero in value: later blocks read the stored keys, whose gradient is that of this block's exit step.
        gradient_only = jax.tree.map(
            lambda x: einops.rearrange(
                x - jax.lax.stop_gradient(x),
                "layer b (t s) n h -> layer b t s n h",
                t=exp.cache.block,
            ),
            own,
        )
        return _put(leaked, gradient_only, n * exp.cache.block), latent

    each = (jnp.arange(clip.latent.shape[0]), clip.noisy, clip.selection)
    return jax.lax.scan(one_block, start, jax.tree.map(lambda x: x[first:], each))[1]


def _in_list(exp: Experiment, now: Layout, exit: Array) -> tuple[Layout, Access]:
    """What the exit step of a block sees where all layers share one list: all of them alike; and a pass in it."""
    each = seen(exp, now, exit, exit, commits=False)
    layout = jax.tree.map(lambda x: x[0], each)
    access = dataclasses.replace(in_clip(exp.memory, layout), layout_of=lambda past: layout)
    return layout, access


def _through_packed(nets: block_step.Nets, exp: Experiment, clip: Clip, text: KV) -> Stored:
    """What the clip left behind, its packed keys computed again from stored latents, so that they have a gradient."""
    if exp.cache.top == 0:
        return clip.stored

    def one_block(_, inputs):
        n, latent, low_res, selection = inputs
        condition = Condition(
            layout=layouts.layout(exp.cache, layouts.begin(n), clip.gap),
            stored=dataclasses.replace(clip.stored, selection=selection),
            text=batches.of_block(text, n),
        )
        return None, _packed(nets, exp, condition, latent, low_res)

    per_block = (jnp.arange(clip.latent.shape[0]), clip.latent, clip.low_res, clip.selection)
    packed = jax.lax.scan(one_block, None, per_block)[1]
    return dataclasses.replace(
        clip.stored,
        packed=KV(
            *(
                einops.rearrange(x, "block layer b p n h -> layer b block p n h")
                for x in (packed.k, packed.v)
            )
        ),
    )


def covered(exp: Experiment, clip: Clip) -> dict[str, Array]:
    """What a rollout really used of the memory: pairs of a block and a packed one it saw, choices, reach in frames."""
    blocks = jnp.arange(clip.latent.shape[0])
    layout = jax.vmap(lambda n: layouts.layout(exp.cache, layouts.begin(n), clip.gap))(blocks)
    visible = (layout.ids >= 0).sum(axis=1)
    return {
        "packed_seen": layout.num_selected.sum(),
        "choices": (visible > layout.num_selected).sum(),
        "reach": (layout.current_position - layout.sink_position).max() + exp.cache.block,
        "exit": clip.exit,
    }
