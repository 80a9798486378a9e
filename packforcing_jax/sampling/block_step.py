"""One block of video: drawn in a few steps that only read the memory, then remembered once, sharp and packed.

`draw` and `remember` are the whole algorithm (paper figure 2). Training calls the same parts on known latents. What
there is per layer is a list when the transformer's layers run one by one, stacked when they are scanned.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Float

from packforcing_jax import pytrees
from packforcing_jax.config import Experiment, SampleConfig
from packforcing_jax.memory import cache, view
from packforcing_jax.networks import compressor, dit, rope
from packforcing_jax.policies import attention
from packforcing_jax.sampling import schedules
from packforcing_jax.types import KV, Heads, Latent

LOTS = 2**32 - 1  # takes the place of a step's number in the key of a block's lots


@struct.dataclass
class Nets:
    """The trained parts a block needs."""

    dit: dit.WanDiT
    compressor: compressor.Compressor


@struct.dataclass
class Chance:
    """Everything random about a block."""

    noise: Array  # [b, t, y, x, c]         where it starts from
    renoise: Array  # [step, b, t, y, x, c]   added to the clean guess of each step but the last
    lots: Array  # [layer, b, slot]        uniform draws, for the `random` selection


@struct.dataclass
class Drawn:
    """A finished block, the views it was drawn in (to be remembered with), and what it looked back at.

    `views` and `looked` have one entry per layer.
    """

    latent: Array  # [b, t, y, x, c]
    views: Any
    looked: Any


def draw(
    nets: Nets,
    exp: Experiment,
    memory: cache.Memory,
    *,
    chance: Chance,
    text: Any,
    views: Any = None,
) -> Drawn:
    """The next block, drawn from noise in a few steps that only read the memory; `views` is scratch.

    The queries of the first step choose the packed blocks; the views they fix serve the later steps, the clean pass
    and the packing pass. A layer that chooses for itself does so on its way. A choice that takes all layers, or
    comes late, is made after a first step behind the newest blocks.
    """
    seen = cache.plan(exp.cache, memory.num_blocks)
    lots = chance.lots if isinstance(memory.layers, cache.Layer) else list(chance.lots)
    if exp.cache.top == 0 or (exp.cache.scope, exp.cache.timing) == ("layer", "first"):
        past = (
            pytrees.zipped(memory.layers, lots, views)
            if views is not None
            else pytrees.zipped(memory.layers, lots)
        )
        clean, kept = first_step(nets, exp, seen, chance, text, past, look=first_look)
        views, looked = pytrees.unzip(kept)
        return Drawn(*later_steps(nets, exp, seen, chance, text, views, clean), looked)
    newest = pytrees.over(
        lambda layer: view.newest(exp, seen, chance.noise.shape[0]), memory.layers
    )
    clean, views, asked = glance(
        nets,
        exp,
        memory,
        chance,
        text,
        views,
        pytrees.over(view.take, memory.layers, newest),
        newest,
    )
    scores = pytrees.over(lambda *one: view.score(exp, seen, *one), memory.layers, asked, lots)
    looked = decide(exp, seen, scores)
    picked = pytrees.over(view.take, memory.layers, looked)
    return conclude(nets, exp, memory, chance, text, views, clean, picked, looked)


def glance(
    nets: Nets,
    exp: Experiment,
    memory: cache.Memory,
    chance: Chance,
    text: Any,
    views: Any,
    picked: Any,
    looked: Any,
) -> tuple[Latent, Any, Any]:
    """A first step behind given packed blocks: (the clean guess, the views, what each layer asked)."""
    seen = cache.plan(exp.cache, memory.num_blocks)
    views = pytrees.over(
        lambda *one: view.lay(exp, seen, *one), memory.layers, picked, looked, views
    )
    clean, kept = first_step(nets, exp, seen, chance, text, views, look=asking_look)
    return clean, *pytrees.unzip(kept)


def decide(exp: Experiment, seen: cache.Plan, scores: Any) -> Any:
    """What each layer looks at, by its own scores [b, slot] or by the sum over layers."""
    if exp.cache.scope == "layer":
        return pytrees.over(lambda one: view.look(exp, seen, one), scores)
    total = pytrees.stack(scores).sum(axis=0)
    return pytrees.over(lambda _: view.look(exp, seen, total), scores)


def conclude(
    nets: Nets,
    exp: Experiment,
    memory: cache.Memory,
    chance: Chance,
    text: Any,
    views: Any,
    clean: Latent,
    picked: Any,
    looked: Any,
) -> Drawn:
    """The block, given the packed blocks that were chosen after a first step gave `clean`."""
    seen = cache.plan(exp.cache, memory.num_blocks)
    views = pytrees.over(
        lambda *one: view.lay(exp, seen, *one), memory.layers, picked, looked, views
    )
    if exp.cache.timing == "first":
        clean, views = first_step(nets, exp, seen, chance, text, views)
    return Drawn(*later_steps(nets, exp, seen, chance, text, views, clean), looked)


def first_step(
    nets: Nets,
    exp: Experiment,
    seen: cache.Plan,
    chance: Chance,
    text: Any,
    past: Any,
    *,
    look: Callable | None = None,
) -> tuple[Latent, Any]:
    """The clean guess out of pure noise, and what each layer kept."""
    times, sigmas = (jnp.asarray(x) for x in step_table(exp.sample))
    return guess(nets, exp, seen, chance.noise, times[0], sigmas[0], text, past, look=look)


def later_steps(
    nets: Nets,
    exp: Experiment,
    seen: cache.Plan,
    chance: Chance,
    text: Any,
    views: Any,
    clean: Latent,
) -> tuple[Latent, Any]:
    """The block after the remaining steps, each from the clean guess before it plus noise, and the views."""
    times, sigmas = (jnp.asarray(x) for x in step_table(exp.sample))

    def step(carry, inputs):
        time, sigma, fresh = inputs
        noisy = schedules.add_noise(carry[0], fresh, sigma)
        return guess(nets, exp, seen, noisy, time, sigma, text, carry[1]), None

    return jax.lax.scan(step, (clean, views), (times[1:], sigmas[1:], chance.renoise))[0]


def remember(
    nets: Nets,
    exp: Experiment,
    memory: cache.Memory,
    *,
    latent: Latent,
    low: Latent,
    drawn: Drawn,
    text: Any,
) -> tuple[cache.Memory, Any, Any]:
    """(the memory after `latent`, its packed keys and values per layer, the views as scratch).

    One clean pass at timestep 0 for the block's own keys, one more for its packed twin's. The twin sees what the
    clean pass saw, the block at full size, and itself; the block never sees its twin.
    """
    seen, n = cache.plan(exp.cache, memory.num_blocks), memory.num_blocks
    layers, views = read_clean(
        nets,
        exp,
        seen,
        latent,
        text,
        pytrees.zipped(drawn.views, memory.layers, drawn.looked),
        keep=functools.partial(_committed, exp, n),
    )
    packed = None
    if exp.cache.top:
        # Without the barrier a layer's view may be wanted before and after the twin is laid into it: two copies of it.
        views, latent, low = jax.lax.optimization_barrier((views, latent, low))
        packed, views = read_packed(nets, exp, seen, latent, low, text, views)
    if packed is not None and exp.cache.archive == "device":
        layers = pytrees.over(lambda *one: cache.commit_packed(exp, n, *one), layers, packed)
    return cache.Memory(layers=layers, num_blocks=n + 1), packed, views


def read_clean(
    nets: Nets,
    exp: Experiment,
    seen: cache.Plan,
    latent: Latent,
    text: Any,
    past: Any,
    *,
    keep: Callable | None = None,
    behind: Callable | None = None,
) -> tuple[Any, Any]:
    """What `keep` makes of a clean block's keys and values in every layer, by default themselves, and the views.

    `past` holds the views, which afterwards hold that block too, or tuples of a view and what else `keep` takes;
    `behind` makes a view of what stands in its place.
    """
    time = dit.embed_time(nets.dit, jnp.zeros(latent.shape[:2]))
    _, kept = dit.run(
        nets.dit,
        dit.embed_latent(nets.dit, latent),
        time,
        text,
        past=past,
        attend=_reader(exp, text),
        mix=_mix(
            exp,
            *_own_places(exp, seen, latent),
            cache.length(exp, seen),
            keep=keep or _both,
            behind=behind,
        ),
    )
    return pytrees.unzip(kept)


def read_packed(
    nets: Nets,
    exp: Experiment,
    seen: cache.Plan,
    latent: Latent,
    low: Latent,
    text: Any,
    views: Any,
    *,
    keep: Callable | None = None,
    behind: Callable | None = None,
) -> tuple[Any, Any]:
    """Keys and values in every layer of a clean block's packed twin, and the views, which also hold the block.

    The twin passes through all layers, or (`projected`) each layer projects the packed tokens themselves. `keep` and
    `behind` as in `read_clean`.
    """
    tokens = compressor.pack(nets.compressor, nets.dit, exp, latent, low)
    time = dit.embed_time(nets.dit, jnp.zeros((latent.shape[0], 1)))
    places = jnp.asarray(cache.packed_places(exp)[1])
    if exp.compressor.keys == "projected":
        turned = rope.space_angles(places, exp.dit)
        return pytrees.over(
            lambda own: KV(k=rope.rotate(own.k, turned), v=own.v),
            dit.projections(nets.dit, tokens, time),
        ), views
    at = cache.length(exp, seen) + exp.cache.block * exp.tokens_per_frame
    _, kept = dit.run(
        nets.dit,
        tokens,
        time,
        text,
        past=views,
        attend=_reader(exp, text),
        mix=_mix(exp, cache.packed_times(exp, seen), places, at, keep=keep or _both, behind=behind),
    )
    return pytrees.unzip(kept)


def guess(
    nets: Nets,
    exp: Experiment,
    seen: cache.Plan,
    noisy: Latent,
    timestep: Array,
    sigma: Array,
    text: Any,
    past: Any,
    *,
    look: Callable | None = None,
) -> tuple[Latent, Any]:
    """The clean block the network sees behind `noisy`, and what each layer kept: its view, unless `look` says else.

    `past` holds views, or what `look` takes. `timestep` and `sigma` are scalars, one value per video [b] or one per
    frame [b, t].
    """
    per_frame = jnp.expand_dims(timestep, range(jnp.ndim(timestep), 2))
    time = dit.embed_time(nets.dit, jnp.broadcast_to(per_frame, noisy.shape[:2]))
    mix = _mix(exp, *_own_places(exp, seen, noisy), cache.length(exp, seen), keep=_whole)
    if look is not None:
        mix = look(exp, seen, mix)
    x, kept = dit.run(
        nets.dit,
        dit.embed_latent(nets.dit, noisy),
        time,
        text,
        past=past,
        mix=mix,
        attend=_reader(exp, text),
    )
    output = dit.head(nets.dit, x, time.e, exp.grid).astype(noisy.dtype)
    if exp.sample.prediction == "clean":
        return output, kept
    return schedules.clean_from_velocity(noisy, output, sigma), kept


def first_look(exp: Experiment, seen: cache.Plan, mix: dit.Mix) -> dit.Mix:
    """`mix` on a view recalled by the layer's own queries from its (memory, lots[, scratch]); keeps (view, looked)."""

    def look(q: Heads, k: Heads, v: Heads, past: Any) -> tuple[Heads, Any]:
        layer, lots, *scratch = past
        recalled, looked = view.recall(exp, seen, layer, q, lots, *scratch)
        mixed, whole = mix(q, k, v, recalled)
        return mixed, (whole, looked)

    return look


def asking_look(exp: Experiment, seen: cache.Plan, mix: dit.Mix) -> dit.Mix:
    """`mix` that also keeps what the layer's queries ask."""

    def look(q: Heads, k: Heads, v: Heads, past: KV) -> tuple[Heads, Any]:
        mixed, whole = mix(q, k, v, past)
        return mixed, (whole, view.ask(exp, seen, q))

    return look


def watching_look(exp: Experiment, seen: cache.Plan, mix: dit.Mix) -> dit.Mix:
    """`first_look` that also keeps the affinity [b, slot] of every packed block, whatever the policy: for training."""

    def look(q: Heads, k: Heads, v: Heads, past: Any) -> tuple[Heads, Any]:
        mixed, (whole, looked) = first_look(exp, seen, mix)(q, k, v, past)
        wanted = dataclasses.replace(
            exp, cache=dataclasses.replace(exp.cache, selection="affinity")
        )
        return mixed, (
            whole,
            looked,
            view.score(wanted, seen, past[0], view.ask(exp, seen, q), past[1]),
        )

    return look


def _whole(own: KV, whole: KV) -> KV:
    return whole


def _both(own: KV, whole: KV) -> tuple[KV, KV]:
    return own, whole


def _committed(
    exp: Experiment, n: Array, own: KV, whole: KV, layer: cache.Layer, looked: Any
) -> tuple[Any, KV]:
    return cache.commit_sharp(exp, n, layer, own, looked), whole


def _mix(
    exp: Experiment,
    times: Float[Array, " q"],
    places: Float[Array, "q 2"],
    at: Array,
    *,
    keep: Callable,
    behind: Callable | None = None,
) -> dit.Mix:
    """Attention of tokens at (times, places) to the first `at` keys of a view and to themselves."""
    in_time, in_space = rope.time_angles(times, exp.dit), rope.space_angles(places, exp.dit)

    def mix(q: Heads, k: Heads, v: Heads, past: Any) -> tuple[Heads, Any]:
        before, *rest = past if isinstance(past, tuple) else (past,)
        before = before if behind is None else behind(before)
        own = KV(k=rope.rotate(k, in_space), v=v)
        whole = view.extend(before, KV(k=rope.rotate(own.k, in_time), v=v), at)
        attend = attention.backend(exp.attention, whole.k.dtype)
        turned = rope.rotate(q, in_time + in_space).astype(whole.k.dtype)
        mixed = attend(turned, whole.k, whole.v, at + k.shape[1]).astype(q.dtype)
        kept = keep(own, whole, *rest)
        # What is written elsewhere is written now, or keys and values of all layers wait for the end side by side.
        return jax.lax.optimization_barrier((mixed, kept)) if rest else (mixed, kept)

    return mix


def _reader(exp: Experiment, text: Any) -> dit.Attend:
    """The attention that reads the text."""
    return attention.backend(exp.attention, jax.tree.leaves(text)[0].dtype)


def _own_places(exp: Experiment, seen: cache.Plan, latent: Latent) -> tuple[Array, Array]:
    """Places in time [q] and on the grid [q, 2] of the current block's tokens."""
    return cache.current_places(exp, seen), jnp.asarray(dit.frame_places(exp.dit, latent))


def step_table(cfg: SampleConfig):
    """(timesteps, sigmas) of the denoising steps: nominal steps warped by the shift, sigma by nearest grid entry."""
    times = schedules.warped(cfg.steps, cfg.shift)
    return times, schedules.sigma_at(schedules.table(cfg.shift), jnp.asarray(times))


def chances(exp: Experiment, seed: int | Array, videos: Array, block: Array) -> Chance:
    """What is random about one block: a function of (seed, video id, block, step or layer) alone."""
    shape = (exp.cache.block, *exp.latent, exp.dit.in_channels)

    def key(video: Array, step: Array | int) -> Array:
        return jax.random.fold_in(
            jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), video), block), step
        )

    def every(one: Callable, count: int) -> Array:
        return jax.vmap(lambda i: jax.vmap(lambda video: one(video, i))(videos))(jnp.arange(count))

    noise = every(
        lambda video, step: jax.random.normal(key(video, step), shape), len(exp.sample.steps)
    )
    lots = every(
        lambda video, layer: jax.random.uniform(
            jax.random.fold_in(key(video, jnp.uint32(LOTS)), layer), (exp.cache.slots,)
        ),
        exp.dit.layers,
    )
    return Chance(noise=noise[0], renoise=noise[1:], lots=lots)
