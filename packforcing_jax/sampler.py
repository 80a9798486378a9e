"""One block of video: drawn in a few steps that only read the memory, then remembered once, sharp and packed.

`draw` and `remember` are the whole algorithm (paper figure 2). Training calls the same parts on known latents.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Float

from packforcing_jax import attention, cache, compressor, dit, rope, schedules, selection
from packforcing_jax.config import Experiment, SampleConfig
from packforcing_jax.types import KV, Heads, Latent


@struct.dataclass
class Nets:
    """The trained parts a block needs."""

    dit: dit.WanDiT
    compressor: compressor.Compressor


@struct.dataclass
class Drawn:
    """A finished block, the context it was drawn in (to be remembered with), and the packed blocks it chose."""

    latent: Array  # [b, t, y, x, c]
    view: KV  # [layer, b, room, n, h]
    chosen: Array  # [layer, b, top] block ids, -1 where empty


def draw(nets: Nets, exp: Experiment, memory: cache.Memory, *, noise: Latent, renoise: Float[Array, "step b t y x c"],
         text: KV) -> Drawn:  # fmt: skip
    """The next block's latent, drawn from `noise`; step i+1 starts from the clean guess of step i plus `renoise[i]`.

    Each layer looks back once: the first step's queries choose its packed blocks and fix its view, which later
    steps, the clean pass and the packing pass reuse.
    """
    seen = cache.plan(exp.cache, memory.num_blocks)
    times, sigmas = (jnp.asarray(x) for x in step_table(exp.sample))
    past = (memory.sink, memory.mid, memory.recent)
    clean, (view, chosen) = guess(nets, exp, seen, noise, times[0], sigmas[0], text, past, look=first_look)

    def step(clean, inputs):
        time, sigma, fresh = inputs
        noisy = schedules.add_noise(clean, fresh, sigma)
        return guess(nets, exp, seen, noisy, time, sigma, text, view)[0], None

    clean, _ = jax.lax.scan(step, clean, (times[1:], sigmas[1:], renoise))
    return Drawn(latent=clean, view=view, chosen=chosen)


def remember(nets: Nets, exp: Experiment, memory: cache.Memory, *, latent: Latent, low: Latent, view: KV,
             text: KV) -> cache.Memory:  # fmt: skip
    """The memory after `latent`: one clean pass at timestep 0 for its own keys, one more for its packed twin's.

    The twin sees what the clean pass saw, the block at full size, and itself; the block never sees its twin.
    """
    seen = cache.plan(exp.cache, memory.num_blocks)
    full, whole = read_clean(nets, exp, seen, latent, text, view)
    packed = read_packed(nets, exp, seen, latent, low, text, whole) if exp.cache.top else None
    return cache.commit(exp, memory, full, packed)


def read_clean(nets: Nets, exp: Experiment, seen: cache.Plan, latent: Latent, text: KV, view: KV) -> tuple[KV, KV]:
    """Keys and values of a clean block in every layer, and the views with that block laid down behind."""
    time = dit.embed_time(nets.dit, jnp.zeros(latent.shape[:2]))
    _, (own, whole) = dit.run(nets.dit, dit.embed_latent(nets.dit, latent), time, text, past=view,
                              mix=_mix(exp, *_own_places(exp, seen, latent), cache.length(exp, seen), keep=_both))
    return own, whole


def read_packed(nets: Nets, exp: Experiment, seen: cache.Plan, latent: Latent, low: Latent, text: KV,
                whole: KV) -> KV:  # fmt: skip
    """Keys and values in every layer of a clean block's packed twin, which also sees the block in `whole`."""
    tokens = compressor.pack(nets.compressor, nets.dit, exp, latent, low)
    time = dit.embed_time(nets.dit, jnp.zeros((latent.shape[0], 1)))
    behind = cache.length(exp, seen) + exp.cache.block * exp.tokens_per_frame
    places = jnp.asarray(cache.packed_places(exp)[1])
    _, packed = dit.run(nets.dit, tokens, time, text, past=whole,
                        mix=_mix(exp, cache.packed_times(exp, seen), places, behind, keep=_own))  # fmt: skip
    return packed


def guess(nets: Nets, exp: Experiment, seen: cache.Plan, noisy: Latent, timestep: Array, sigma: Array, text: KV,
          past: Any, *, look: Callable | None = None) -> tuple[Latent, Any]:  # fmt: skip
    """The clean block the network sees behind `noisy`, and what `look` keeps; `past` is a view unless it makes one.

    `timestep` and `sigma` are scalars, one value per video [b] or one per frame [b, t].
    """
    per_frame = jnp.expand_dims(timestep, range(jnp.ndim(timestep), 2))
    time = dit.embed_time(nets.dit, jnp.broadcast_to(per_frame, noisy.shape[:2]))
    places = _own_places(exp, seen, noisy)
    mix = _mix(exp, *places, cache.length(exp, seen), keep=_nothing)
    if look is not None:
        mix = look(exp, seen, mix)
    x, kept = dit.run(nets.dit, dit.embed_latent(nets.dit, noisy), time, text, past=past, mix=mix)
    output = dit.head(nets.dit, x, time.e, exp.grid)
    if exp.sample.prediction == "clean":
        return output, kept
    return schedules.clean_from_velocity(noisy, output, sigma), kept


def first_look(exp: Experiment, seen: cache.Plan, mix: dit.Mix) -> dit.Mix:
    """`mix` on a view recalled from the memory by the layer's own queries; keeps the view and the chosen ids."""

    def look(q: Heads, k: Heads, v: Heads, past: Any) -> tuple[Heads, Any]:
        view, ids = cache.recall(exp, seen, past, q)
        return mix(q, k, v, view)[0], (view, ids)

    return look


def watching_look(exp: Experiment, seen: cache.Plan, mix: dit.Mix) -> dit.Mix:
    """`first_look` that also keeps the affinity [b, slot] of every packed block, whatever the policy: for training."""

    def look(q: Heads, k: Heads, v: Heads, past: Any) -> tuple[Heads, Any]:
        mixed, (view, ids) = first_look(exp, seen, mix)(q, k, v, past)
        return mixed, (view, ids, selection.affinity(cache.ask(exp, seen, past, q)))

    return look


def _nothing(own: KV, whole: KV) -> None:
    return None


def _own(own: KV, whole: KV) -> KV:
    return own


def _both(own: KV, whole: KV) -> tuple[KV, KV]:
    return own, whole


def _mix(exp: Experiment, times: Float[Array, " q"], places: Float[Array, "q 2"], at: Array, *,
         keep: Callable[[KV, KV], Any]) -> dit.Mix:  # fmt: skip
    """Attention of tokens at (times, places) to the first `at` keys of a view and to themselves."""
    in_time, in_space = rope.time_angles(times, exp.dit), rope.space_angles(places, exp.dit)

    def mix(q: Heads, k: Heads, v: Heads, view: KV) -> tuple[Heads, Any]:
        own = KV(k=rope.rotate(k, in_space), v=v)
        whole = cache.extend(view, KV(k=rope.rotate(own.k, in_time), v=v), at)
        attend = attention.backend(exp.attention, q.dtype)
        return attend(rope.rotate(q, in_time + in_space), whole.k, whole.v, at + k.shape[1]), keep(own, whole)

    return mix


def _own_places(exp: Experiment, seen: cache.Plan, latent: Latent) -> tuple[Array, Array]:
    """Places in time [q] and on the grid [q, 2] of the current block's tokens."""
    return cache.current_places(exp, seen), jnp.asarray(dit.frame_places(exp.dit, latent))


def step_table(cfg: SampleConfig):
    """(timesteps, sigmas) of the denoising steps: nominal steps warped by the shift, sigma by nearest grid entry."""
    times = schedules.warped(cfg.steps, cfg.shift)
    return times, schedules.sigma_at(schedules.table(cfg.shift), jnp.asarray(times))


def noises(exp: Experiment, seed: int | Array, videos: Array, block: Array) -> tuple[Latent, Array]:
    """(noise [b,t,y,x,c], renoise [step,b,t,y,x,c]) of one block: a function of (seed, video id, block, step) alone."""
    shape = (exp.cache.block, *exp.latent, exp.dit.in_channels)

    def one(video: Array, step: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), video), block), step)
        return jax.random.normal(key, shape)

    every = jax.vmap(lambda step: jax.vmap(lambda video: one(video, step))(videos))(jnp.arange(len(exp.sample.steps)))
    return every[0], every[1:]
