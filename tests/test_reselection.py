"""A choice in every pass (PackForcing-Unofficial): who is where, what is chosen, and how it is trained."""

import collections
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from packforcing_jax import config
from packforcing_jax.config import DistilConfig
from packforcing_jax.errors import InputError
from packforcing_jax.memory import cache
from packforcing_jax.memory import layout as layouts
from packforcing_jax.sampling import block_step, reselection
from packforcing_jax.sampling.block_step import Denoiser
from packforcing_jax.training import batches, rollout

PACKS = config.CompressorConfig(
    channels=(5, 7, 6),
    strides=((1, 2, 2), (1, 2, 1), (1, 1, 2)),
    frames=3,
    branches="hr",
    positions="native",
    keys="unmodulated",
    strided_kernel=3,
    adaptive_pool=True,
)
UNOFFICIAL = dataclasses.replace(
    tiny.with_cache(
        sink=3,
        recent=6,
        top=2,
        capacity=3,
        timing="every",
        selection="query_score",
        min_queries=4,
        recent_queries=False,
    ),
    compressor=PACKS,
    latent=(10, 6),  # what is left of 5 and 3 rows and columns is averaged away
)


# Who is where


class Lists:
    """Blocks by what holds them, moved from one to the next as each is committed."""

    def __init__(self, sink, recent, capacity):
        self.sizes = sink, recent, capacity
        self.sink, self.recent, self.mid = (collections.deque() for _ in range(3))

    def take(self, block):
        sink, recent, capacity = self.sizes
        if len(self.sink) < sink:
            self.sink.append(block)
            return
        self.recent.append(block)
        if len(self.recent) > recent:
            self.mid.append(self.recent.popleft())
        if len(self.mid) > capacity:
            self.mid.popleft()


def placed(lists, current, top, size):
    """{block: position} from the current block backwards, without a hole; of packed blocks the newest `top`."""
    past = [b for b in lists.recent if b != current]
    row = [*(b for b in lists.sink if b != current), *list(lists.mid)[-top:], *past]
    return {b: (current - len(row) + i) * size for i, b in enumerate(row)}


def seen(cfg, layout):
    """The same of a layout that chooses the newest."""
    size, start = cfg.block, int(layout.start)
    true = start - float(layout.current_position)
    ids = sorted(int(i) for i in np.asarray(layout.ids) if i >= 0)[-cfg.top :]
    assert len(ids) == int(layout.num_selected)
    first = start - int(layout.recent)
    return {
        **{
            i: float(layout.sink_position) + i * size + true
            for i in range(int(layout.sink) // size)
        },
        **{b: float(layout.mid_position) + i * size + true for i, b in enumerate(ids)},
        **{
            f // size: float(layout.recent_position) + f - first + true
            for f in range(first, start, size)
        },
    }


SIZES = list(itertools.product((0, 1, 2), (0, 1, 2, 3), (1, 2, 5), (1, 2)))


@pytest.mark.parametrize(("sink", "recent", "capacity", "top"), SIZES)
def test_lists_of_blocks_move_on_as_released(sink, recent, capacity, top):
    size = 3
    if top > capacity:
        return
    cfg = dataclasses.replace(
        UNOFFICIAL.cache,
        sink=sink * size,
        recent=recent * size,
        capacity=capacity,
        top=top,
        registry="shared",
    )
    lists = Lists(sink, recent, capacity)
    for block in range(14):
        now = layouts.layout(cfg, layouts.begin(block))
        assert seen(cfg, now) == pytest.approx(placed(lists, block, top, size))
        held = set(lists.mid)
        lists.take(block)
        later = layouts.moved_on(cfg, now, arrived=True)
        if recent:  # without recent blocks the current one itself has left for the archive
            assert seen(cfg, later) == pytest.approx(placed(lists, block, top, size))
        first, *others = layouts.first_to_write(cfg, now, 3)
        assert seen(cfg, first) == seen(cfg, now)
        known = Lists(sink, recent, capacity)
        known.sink, known.recent = lists.sink, lists.recent
        known.mid = [b for b in lists.mid if b in held]
        for other in others:
            assert seen(cfg, other) == pytest.approx(placed(known, block, top, size))


# Blocks


def noise_of(exp, block, batch=tiny.BATCH):
    cfg = exp.step
    videos = jnp.arange(batch, dtype=jnp.uint32)
    return block_step.draw_noise(cfg, jnp.uint32(5), videos, jnp.int32(block))


def text_of(exp, nets):
    states = tiny.normal(3, tiny.BATCH, 5, exp.dit.text_dim)
    return nets.dit.text_kv(states)


def sampled(exp, blocks, made_by=reselection):
    """The latents of a few blocks, and the memory behind them."""
    nets = tiny.apart(exp)
    denoiser = Denoiser(nets, exp.step, text_of(exp, nets))

    @tiny.jit
    def one(memory, noise):
        memory, denoised = made_by.denoise_block(denoiser, memory, noise)
        latent = denoised.latent
        low_res = latent[:, :0]
        memory, _ = made_by.commit_block(denoiser, memory, latent, low_res, denoised.selection)
        return memory, latent

    memory = cache.init(exp.memory, tiny.BATCH)
    latents = []
    for block in range(blocks):
        memory, latent = one(memory, noise_of(exp, block))
        latents.append(latent)
    return np.stack(latents), memory


def apart(one, other):
    return np.abs(one - other).max() / np.abs(other).max()


def test_where_all_is_chosen_choosing_once_makes_the_same_video():
    anew = tiny.with_cache(UNOFFICIAL, capacity=3, top=3)
    once = tiny.with_cache(anew, timing="first")
    assert apart(sampled(anew, 7)[0], sampled(once, 7, block_step)[0]) < 1e-5


def test_where_not_all_is_chosen_it_does_not():
    once = tiny.with_cache(UNOFFICIAL, timing="first")
    assert apart(sampled(UNOFFICIAL, 7)[0], sampled(once, 7, block_step)[0]) > 1e-3


def test_blocks_that_keep_all_their_own_keys_are_as_good_as_never_packed():
    """At their true positions, with room for all: the video of a memory whose recent frames are the whole of it."""
    tokens = 3 * UNOFFICIAL.tokens_per_frame
    keeps = dataclasses.replace(
        tiny.with_cache(UNOFFICIAL, top=4, capacity=4, rope_adjustment="none"),
        compressor=config.CompressorConfig(branches="own", tokens=tokens, frames=3),
    )
    whole = tiny.with_cache(
        UNOFFICIAL, recent=18, top=0, capacity=0, timing="first", rope_adjustment="none"
    )
    assert apart(sampled(keeps, 7)[0], sampled(whole, 7, block_step)[0]) < 1e-5


def test_a_shared_list_changes_nothing_before_a_block_has_left_and_something_behind():
    shared = tiny.with_cache(UNOFFICIAL, registry="shared")
    deep = {
        exp.cache.registry: dataclasses.replace(exp, dit=dataclasses.replace(exp.dit, layers=3))
        for exp in (UNOFFICIAL, shared)
    }
    own, one = (sampled(deep[name], 7)[0] for name in ("per_layer", "shared"))
    assert apart(own[:4], one[:4]) < 1e-5
    assert apart(own[4:], one[4:]) > 1e-5


def test_a_host_archive_random_scores_and_one_choice_for_all_layers_are_refused():
    for changes in (
        {"scope": "shared"},
        {"selection": "random"},
        {"rope_adjustment": "incremental"},
        {"archive": "host"},
    ):
        with pytest.raises(InputError, match=r"timing='every'"):
            tiny.with_cache(UNOFFICIAL, **changes)
    with pytest.raises(InputError, match=r"registry='shared' is about packed blocks"):
        tiny.with_cache(UNOFFICIAL, timing="first", registry="shared")


# Training


def drawn(exp, exit, distil, blocks=7):
    """The latents of a rollout in training, and the gradients of their sum of squares."""
    nets = tiny.nets(exp)
    per_block = [noise_of(exp, block) for block in range(blocks)]
    draws = rollout.Draws(
        noise=jnp.stack([each.noise for each in per_block]),
        renoise=jnp.stack([each.renoise for each in per_block]),
        context=jnp.zeros((blocks, *per_block[0].noise.shape)),
        random=jnp.zeros((blocks, exp.dit.layers, tiny.BATCH, exp.cache.slots)),
        exit=jnp.int32(exit),
        gap=jnp.float32(0),
    )
    states = tiny.normal(3, 1, tiny.BATCH, 5, exp.dit.text_dim)
    text = batches.text_kv(nets.dit, states)
    clip = jax.jit(rollout.draw, static_argnums=(1, 2, 3))(nets, exp, distil, None, draws, text)

    def total(nets):
        again = rollout.again(nets, exp, distil, clip, text)
        return jnp.square(again).sum(), again

    grads, again = jax.jit(jax.grad(total, has_aux=True))(nets)
    return np.asarray(clip.latent), np.asarray(again), grads


def test_training_draws_the_clips_that_sampling_makes():
    last = len(UNOFFICIAL.sample.steps) - 1
    latent, again, _ = drawn(UNOFFICIAL, last, DistilConfig(gradient="packed"))
    right = sampled(UNOFFICIAL, 7)[0]
    assert apart(latent, right) < 2e-5
    assert apart(again, right) < 2e-5


@pytest.mark.parametrize("registry", ["per_layer", "shared"])
def test_the_gradient_step_is_the_exit_step_and_reaches_the_compressor(registry):
    exp = tiny.with_cache(UNOFFICIAL, registry=registry)
    distil = DistilConfig(gradient="packed", finished=False)
    latent, again, grads = drawn(exp, 1, distil)
    assert apart(again, latent) < 2e-5
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads.compressor))
