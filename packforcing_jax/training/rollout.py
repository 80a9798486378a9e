"""The student's own clips: drawn once without a gradient, then every block once more with one (Self-Forcing).

The first pass leaves the clip behind as constants: the clean keys and values of every block, and what one step, the
exit, read in each. The second computes that step again, all blocks alike. Gradients reach a block's loss through the
step itself and through packed keys computed again from stored latents; stored keys are constants (paper section 8).
"""

import dataclasses
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from packforcing_jax.config import Experiment
from packforcing_jax.errors import require
from packforcing_jax.memory import cache, view
from packforcing_jax.networks import codec, dit, rope
from packforcing_jax.sampling import block_step, schedules
from packforcing_jax.training import batches
from packforcing_jax.types import KV, Heads


@struct.dataclass
class Draws:
    """Everything random about a rollout."""

    noise: Array  # [block, b, t, y, x, c]
    renoise: Array  # [block, step, b, t, y, x, c]
    context: Array  # [block, b, t, y, x, c]  noise of the clean pass, where it is asked for
    lots: Array  # [block, layer, b, slot]
    exit: Array  # []  the step that gets a gradient, one for all blocks and clips
    gap: Array  # []  frames that the past is moved back


@struct.dataclass
class Stored:
    """What one layer, or all along a leading axis, remembers of a clip, and what a block looks back at."""

    full: KV  # [b, frame, s, n, h]  clean keys, rotated in space
    packed: KV  # [b, block, p, n, h]
    looked: Any = None


@struct.dataclass
class Clip:
    """A clip and all that is needed to draw each of its blocks again."""

    noisy: Array  # [block, b, t, y, x, c]  what the exit step read
    latent: Array  # [block, b, t, y, x, c]  the block as later ones remember it
    low: Array  # [block, b, t', y', x', c]
    stored: Stored  # all layers
    looked: Any  # [block, layer, ...]


def for_training(exp: Experiment, blocks: int, sink: int, recent: int | None = None) -> Experiment:
    """`exp` with a memory for clips of `blocks` blocks: `sink` and `recent` frames, packed blocks for all the rest.

    All of them are attended, or `train.cover.top` by the cache's own selection.
    """
    recent = exp.cache.recent if recent is None else recent
    held, top = max(blocks - (sink + recent) // exp.cache.block, 1), exp.train.cover.top
    packs = exp.cache.top > 0
    smaller = dataclasses.replace(
        exp.cache,
        sink=sink,
        recent=recent,
        top=packs * min(top or held, held),
        capacity=packs * held,
        selection=exp.cache.selection if top else "all",
        span="true",
        scope="layer",
        timing="first",
        archive="device",
        rope_adjustment="none" if exp.cache.rope_adjustment == "none" else "sink",
    )
    return dataclasses.replace(exp, cache=smaller)


def variant(exp: Experiment, seed: int, step: int) -> Experiment:
    """`exp` as one step trains it: with sizes of sink, recent and clip drawn from `train.cover`."""
    cfg, cover, whole = exp.train, exp.train.cover, exp.blocks
    if cfg.objective == "flow_matching" or (not cfg.distils and cfg.history != "memory"):
        return exp  # nothing is remembered
    rng = np.random.default_rng((seed, step))
    sink, recent = (
        int(rng.choice(sizes))
        for sizes in (cover.sinks or (exp.cache.sink,), cover.recents or (exp.cache.recent,))
    )
    blocks = whole
    if cfg.distils:
        blocks = int(rng.integers(cover.shortest or whole, (cover.longest or whole) + 1))
    longer = dataclasses.replace(exp, clip=blocks * exp.cache.block)
    return for_training(longer, blocks, sink, recent)


def draws(exp: Experiment, key: Array, blocks: int, batch: int) -> Draws:
    """What a rollout of `batch` clips draws from `key`."""
    keys = jax.random.split(key, 6)
    shape = (batch, exp.cache.block, *exp.latent, exp.dit.in_channels)
    return Draws(
        noise=jax.random.normal(keys[0], (blocks, *shape)),
        context=jax.random.normal(keys[2], (blocks, *shape)),
        renoise=jax.random.normal(keys[1], (blocks, len(exp.sample.steps) - 1, *shape)),
        lots=jax.random.uniform(keys[3], (blocks, exp.dit.layers, batch, exp.cache.slots)),
        exit=jax.random.randint(keys[4], (), 0, len(exp.sample.steps)),
        gap=gap(exp, keys[5]),
    )


def gap(exp: Experiment, key: Array) -> Array:
    """Frames that the past is moved back in this step: none, or up to `train.cover.gap`."""
    cover, (size, chance) = exp.train.cover, jax.random.split(key)
    return jnp.where(
        jax.random.uniform(chance) < cover.gap_share,
        jax.random.uniform(size, maxval=cover.gap),
        0.0,
    )


def layer_at(exp: Experiment, stored: Stored, n: Array) -> cache.Layer:
    """What a layer remembers before block `n` of a stored clip, as commits would have left it."""
    cfg, frames = exp.cache, n * exp.cache.block
    last = cache.ring_ids(
        cfg.ring, frames - cfg.sink - cfg.ring, frames - cfg.sink, frames - cfg.sink
    )
    past = n - cfg.sink // cfg.block
    packed = cache.ring_ids(cfg.slots, past - cfg.slots, past, past)

    def taken(kv: KV, ids: Array) -> KV:
        return KV(*(jnp.take(x, ids, axis=1, mode="clip") for x in (kv.k, kv.v)))

    return cache.Layer(
        sink=taken(stored.full, jnp.arange(cfg.sink)),
        recent=taken(stored.full, cfg.sink + last),
        mid=taken(stored.packed, cfg.sink // cfg.block + packed),
        sink_at=jnp.zeros(()),
        at=jnp.zeros((stored.full.k.shape[0], 0)),
    )


def lay(exp: Experiment, seen: cache.Plan, stored: Stored) -> KV:
    """A layer's view in front of block `seen.num_blocks`."""
    layer = layer_at(exp, stored, seen.num_blocks)
    return view.lay(exp, seen, layer, view.take(layer, stored.looked), stored.looked, None)


def lay_with_block(exp: Experiment, seen: cache.Plan, stored: Stored) -> KV:
    """The same with the block's own clean keys behind it, as its packed twin sees it."""
    size, start = exp.cache.block, seen.num_blocks * exp.cache.block
    own = KV(
        *(
            einops.rearrange(
                jax.lax.dynamic_slice_in_dim(x, start, size, axis=1), "b t s n h -> b (t s) n h"
            )
            for x in (stored.full.k, stored.full.v)
        )
    )
    turned = rope.rotate(own.k, rope.time_angles(cache.current_places(exp, seen), exp.dit))
    return view.extend(lay(exp, seen, stored), KV(k=turned, v=own.v), cache.length(exp, seen))


def choosing_look(exp: Experiment, seen: cache.Plan, mix: dit.Mix) -> dit.Mix:
    """`mix` on a view chosen by the layer's own queries from its (stored clip, lots); keeps what it looked at."""

    def look(q: Heads, k: Heads, v: Heads, past: Any) -> tuple[Heads, Any]:
        stored, lots = past
        recalled, looked = view.recall(exp, seen, layer_at(exp, stored, seen.num_blocks), q, lots)
        return mix(q, k, v, recalled)[0], looked

    return look


def given_look(exp: Experiment, seen: cache.Plan, mix: dit.Mix) -> dit.Mix:
    """`mix` on the view that a stored clip says; keeps the block's own keys and values, rotated in space."""
    rows, columns = (np.arange(size) for size in exp.grid)
    grid = rope.grid(rows, columns, exp.cache.block)
    places = rope.space_angles(jnp.asarray(grid), exp.dit)

    def look(q: Heads, k: Heads, v: Heads, past: Stored) -> tuple[Heads, KV]:
        mixed, _ = mix(q, k, v, lay(exp, seen, past))
        return mixed, KV(k=rope.rotate(k, places), v=v)

    return look


def draw(nets: block_step.Nets, exp: Experiment, pixels: Any, drawn: Draws, text: Any) -> Clip:
    """Clips drawn block after block without a gradient, to their end or, not `train.distil.finished`, to `drawn.exit`.

    `text` [block or 1, layer, ...].
    """
    nets, text = jax.lax.stop_gradient((nets, text))
    blocks, batch = drawn.noise.shape[:2]
    start = empty(exp, blocks, batch, jax.tree.leaves(text)[0].dtype)
    decoder = codec.init_decoder(pixels, batch, *exp.latent) if sees_pixels(exp) else ()
    given = (jnp.arange(blocks), drawn.noise, drawn.renoise, drawn.context, drawn.lots)

    def one_block(carry, inputs, first: bool = False):
        (stored, decoder), (n, noise, renoise, context, lots) = carry, inputs
        seen, words = cache.plan(exp.cache, n, drawn.gap), batches.of_block(text, n)
        noisy, latent, looked = _steps(
            nets, exp, seen, stored, words, (noise, renoise, lots, drawn.exit)
        )
        low, decoder = low_resolution(exp, pixels, decoder, latent, first=first)
        stored = _remembered(
            nets,
            exp,
            seen,
            dataclasses.replace(stored, looked=looked),
            words,
            (_context(exp, latent, context), latent, low),
        )
        return (stored, decoder), (noisy, latent, low, looked)

    carry, opened = (start, decoder), []
    if exp.codec.time_factor > 1:  # the first latent of a video is decoded by a program of its own
        carry, out = one_block(carry, jax.tree.map(lambda x: x[0], given), first=True)
        opened, given = [jax.tree.map(lambda x: x[None], out)], jax.tree.map(lambda x: x[1:], given)
    (stored, _), rest = jax.lax.scan(one_block, carry, given)
    noisy, latent, low, looked = jax.tree.map(lambda *parts: jnp.concatenate(parts), *opened, rest)
    return jax.lax.stop_gradient(
        Clip(noisy=noisy, latent=latent, low=low, looked=looked, stored=stored)
    )


def empty(exp: Experiment, blocks: int, batch: int, dtype: Any) -> Stored:
    """Room for the keys and values of a clip, in all layers."""

    def store(count: int, tokens: int) -> KV:
        shape = (exp.dit.layers, batch, count, tokens, exp.dit.heads, exp.dit.head_dim)
        return KV(k=jnp.zeros(shape, dtype), v=jnp.zeros(shape, dtype))

    return Stored(
        full=store(blocks * exp.cache.block, exp.tokens_per_frame),
        packed=store(blocks if exp.cache.top else 0, exp.tokens_per_packed_block),
    )


def _steps(
    nets: block_step.Nets, exp: Experiment, seen: cache.Plan, stored: Stored, words: KV, chance: Any
):
    """(what the exit step read, the block as its history keeps it, what each layer looked at)."""
    noise, renoise, lots, exit = chance
    times, sigmas = (jnp.asarray(x) for x in block_step.step_table(exp.sample))
    clean, looked = block_step.guess(
        nets, exp, seen, noise, times[0], sigmas[0], words, (stored, lots), look=choosing_look
    )
    behind = dataclasses.replace(stored, looked=looked)

    def step(i, carry):
        read, before = carry
        noisy = schedules.add_noise(before, renoise[i], sigmas[i + 1])
        clean, _ = block_step.guess(
            nets, exp, seen, noisy, times[i + 1], sigmas[i + 1], words, behind, look=given_look
        )
        return jnp.where(i < exit, noisy, read), clean

    last = len(sigmas) - 1 if exp.train.distil.finished else exit
    return *jax.lax.fori_loop(0, last, step, (noise, clean)), looked


def _context(exp: Experiment, latent: Array, noise: Array) -> Array:
    """What the clean pass reads: the block, or the block with the noise that timestep 0 has in the table."""
    if not exp.train.distil.noised_context:
        return latent
    return schedules.add_noise(
        latent, noise, schedules.sigma_at(schedules.table(exp.sample.shift), 0.0)
    )


def _remembered(
    nets: block_step.Nets, exp: Experiment, seen: cache.Plan, stored: Stored, words: KV, blocks
) -> Stored:
    """`stored` with one more block, as `sampler.remember` reads it: clean, then its packed twin."""
    read, latent, low = blocks
    full, _ = block_step.read_clean(
        nets, exp, seen, read, words, stored, keep=_own, behind=lambda one: lay(exp, seen, one)
    )
    frames = KV(
        *(
            einops.rearrange(x, "layer b (t s) n h -> layer b t s n h", t=exp.cache.block)
            for x in (full.k, full.v)
        )
    )
    stored = dataclasses.replace(
        stored, full=_put(stored.full, frames, seen.num_blocks * exp.cache.block)
    )
    if exp.cache.top:
        packed = _packed(nets, exp, seen, stored, words, latent, low)
        stored = dataclasses.replace(
            stored,
            packed=_put(
                stored.packed, KV(packed.k[:, :, None], packed.v[:, :, None]), seen.num_blocks
            ),
        )
    return dataclasses.replace(stored, looked=None)


def _packed(
    nets: block_step.Nets,
    exp: Experiment,
    seen: cache.Plan,
    stored: Stored,
    words: KV,
    latent: Array,
    low: Array,
) -> KV:
    """Keys and values [layer, b, p, n, h] of a block's packed twin."""
    return block_step.read_packed(
        nets,
        exp,
        seen,
        latent,
        low,
        words,
        stored,
        keep=_own,
        behind=lambda one: lay_with_block(exp, seen, one),
    )[0]


def _own(own: KV, whole: KV) -> tuple[KV, None]:
    return own, None


def _put(store: KV, new: KV, at: Array) -> KV:
    return KV(
        *(
            jax.lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), at, axis=2)
            for x, y in ((store.k, new.k), (store.v, new.v))
        )
    )


def sees_pixels(exp: Experiment) -> bool:
    """Whether packing needs the pixels of a block."""
    return exp.cache.top > 0 and exp.compressor.branches != "hr"


def low_resolution(
    exp: Experiment, pixels: Any, decoder: Any, latent: Array, *, first: bool
) -> tuple[Array, Any]:
    """A drawn block in low resolution, through its pixels, and the decoder after it."""
    if not sees_pixels(exp):
        return latent[:, :0], decoder
    require(
        pixels is not None,
        "packing by pixels needs the codec; give a model folder with one, or set "
        "compressor.branches=hr.",
    )
    frames, decoder = codec.decode_chunk(pixels, decoder, latent, first=first)
    return codec.low_resolution(
        pixels, frames, latents=exp.packed_grid[0], pool=exp.compressor.pool
    ), decoder


# Under a gradient


def again(
    nets: block_step.Nets, exp: Experiment, clip: Clip, drawn: Draws, text: Any, *, first: int = 0
) -> Array:
    """The blocks of `clip` from number `first` on [block, b, t, y, x, c], each drawn again under a gradient."""
    times, sigmas = (jnp.asarray(x) for x in block_step.step_table(exp.sample))
    stored, leaks = (
        _through_packed(nets, exp, clip, drawn, text),
        exp.train.distil.gradient == "leak",
    )
    start = jax.tree.map(jnp.zeros_like, stored.full) if leaks else None

    def one_block(leaked, inputs):
        n, noisy, looked = inputs
        seen, words = cache.plan(exp.cache, n, drawn.gap), batches.of_block(text, n)
        full = stored.full if leaked is None else jax.tree.map(jnp.add, stored.full, leaked)
        behind = Stored(full=full, packed=stored.packed, looked=looked)
        latent, own = block_step.guess(
            nets,
            exp,
            seen,
            noisy,
            times[drawn.exit],
            sigmas[drawn.exit],
            words,
            behind,
            look=given_look,
        )
        if leaked is None:
            return None, latent
        gradient_only = jax.tree.map(
            lambda x: einops.rearrange(
                x - jax.lax.stop_gradient(x),
                "layer b (t s) n h -> layer b t s n h",
                t=exp.cache.block,
            ),
            own,
        )
        return _put(leaked, gradient_only, n * exp.cache.block), latent

    each = (jnp.arange(clip.latent.shape[0]), clip.noisy, clip.looked)
    return jax.lax.scan(one_block, start, jax.tree.map(lambda x: x[first:], each))[1]


def _through_packed(
    nets: block_step.Nets, exp: Experiment, clip: Clip, drawn: Draws, text: Any
) -> Stored:
    """What the clip left behind, its packed keys computed again from stored latents, so that they have a gradient."""
    if exp.cache.top == 0 or exp.train.distil.gradient != "packed":
        return clip.stored

    def one_block(_, inputs):
        n, latent, low, looked = inputs
        stored = dataclasses.replace(clip.stored, looked=looked)
        seen, words = cache.plan(exp.cache, n, drawn.gap), batches.of_block(text, n)
        return None, _packed(nets, exp, seen, stored, words, latent, low)

    given = (jnp.arange(clip.latent.shape[0]), clip.latent, clip.low, clip.looked)
    packed = jax.lax.scan(one_block, None, given)[1]
    return dataclasses.replace(
        clip.stored,
        packed=KV(
            *(
                einops.rearrange(x, "block layer b p n h -> layer b block p n h")
                for x in (packed.k, packed.v)
            )
        ),
    )


def covered(exp: Experiment, clip: Clip, drawn: Draws) -> dict[str, Array]:
    """What a rollout really used of the memory: pairs of a block and a packed one it saw, choices, reach in frames."""
    seen = jax.vmap(lambda n: cache.plan(exp.cache, n, drawn.gap))(jnp.arange(clip.latent.shape[0]))
    visible = (seen.ids >= 0).sum(axis=1)
    return {
        "packed_seen": seen.chosen.sum(),
        "choices": (visible > seen.chosen).sum(),
        "reach": (seen.current_at - seen.sink_at).max() + exp.cache.block,
        "exit": drawn.exit,
    }
