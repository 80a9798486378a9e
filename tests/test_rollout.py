"""A rollout under training is the sampler's own; its gradients reach the compressor and nothing that is stored."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from packforcing_jax import pytrees
from packforcing_jax.config import CoverConfig, DistilConfig, TrainConfig
from packforcing_jax.memory import cache
from packforcing_jax.memory import layout as layouts
from packforcing_jax.networks import codec
from packforcing_jax.sampling import block_step, schedules
from packforcing_jax.training import batches, rollout, state

BLOCKS = 5
SINK = 3
RECENT = 3
BASE = dataclasses.replace(tiny.EXP, clip=3 * BLOCKS)
EXP = rollout.for_training(BASE, BLOCKS, SINK, RECENT)
NETS = tiny.nets()
PIXELS = codec.make(EXP.codec, nnx.Rngs(0))
STATES = tiny.normal(
    7, BLOCKS, tiny.BATCH, EXP.dit.text_len - 1, EXP.dit.text_dim
)  # another prompt for each block
PLAIN = DistilConfig()
draw = tiny.jit(rollout.draw, static_argnames=("exp", "distil"))
SPEC = EXP.memory
lay = tiny.jit(
    jax.vmap(lambda layout, one: rollout.lay(SPEC, layout, one), in_axes=(None, 0))
)  # in every layer


def draws(exit=2):
    sampled = rollout.sample_draws(EXP, CoverConfig(), jax.random.key(3), BLOCKS, tiny.BATCH)
    return dataclasses.replace(sampled, exit=jnp.int32(exit), gap=jnp.float32(0))


@pytest.fixture(scope="module")
def text():
    return tiny.jit(batches.text_kv)(NETS.dit, STATES)


@pytest.fixture(scope="module")
def clip(text):
    return draw(NETS, EXP, PLAIN, PIXELS, draws(), text)


@pytest.fixture(scope="module")
def sampled(text):
    """The same clip made by the sampler, layers one by one: memories behind each block's steps, blocks, lows."""
    memory = cache.init(SPEC, tiny.BATCH)
    out = []
    apart = tiny.apart()
    given = draws()
    for block in range(BLOCKS):
        words = pytrees.unstack(batches.of_block(text, block), EXP.dit.layers)
        noise = block_step.Noise(
            noise=given.noise[block], renoise=given.renoise[block], random=given.random[block]
        )
        memory, drawn = tiny.denoise(apart, EXP.step, memory, text=words, noise=noise)
        low_res = codec.low_res_latents(
            PIXELS,
            codec.decode(PIXELS, drawn.latent),
            latents=EXP.packed_grid[0],
            pool=EXP.compressor.pool,
        )
        out.append((memory, drawn, low_res))
        memory, _ = tiny.commit(
            apart,
            EXP.step,
            memory,
            latent=drawn.latent,
            low_res=low_res,
            selection=drawn.selection,
            text=words,
        )
    return out


# what training sees is what sampling sees -----------------------------------------------------------------------------


def test_a_rollout_to_the_last_step_is_the_samplers_clip(clip, sampled):
    for block, (_, drawn, low_res) in enumerate(sampled):
        np.testing.assert_allclose(clip.latent[block], drawn.latent, atol=1e-5)
        np.testing.assert_allclose(clip.low_res[block], low_res, atol=1e-5)


def test_both_look_at_the_same_blocks_in_the_same_places(clip, sampled):
    looked = 0
    for block, (_, drawn, _) in enumerate(sampled):
        for name in ("ids", "slots", "positions"):
            ours, theirs = (
                np.asarray(getattr(one, name))
                for one in (clip.selection, pytrees.stack(drawn.selection))
            )
            np.testing.assert_array_equal(ours[block], theirs, err_msg=name)
        looked += (np.asarray(clip.selection.ids[block]) >= 0).any()
    assert looked == BLOCKS - 2 - 1  # those behind sink, recent and at least one packed block


def test_both_see_the_same_keys_and_values(clip, sampled):
    """Keys and values of every view up to its length, as laid out of a stored clip and as kept by the sampler."""
    for block, (memory, _, _) in enumerate(sampled):
        layout = layouts.layout(EXP.cache, layouts.begin(block))
        stored = dataclasses.replace(
            clip.stored, selection=jax.tree.map(lambda x, at=block: x[at], clip.selection)
        )
        laid = lay(layout, stored)
        views = pytrees.stack(block_step.views_of(memory))
        past = np.ones(int(layouts.length(SPEC, layout)), bool)
        own = int(layouts.frame_slots(EXP.cache, layout, layout.start)) * EXP.tokens_per_frame
        past[own : own + 24] = False  # the block's own keys, which are not there yet
        for ours, theirs in ((laid.k, views.k), (laid.v, views.v)):
            ours, theirs = (np.asarray(x)[:, :, : len(past)][:, :, past] for x in (ours, theirs))
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert past.sum() == {0: 0, 1: 24, 2: 48}.get(block, 48 + 8 * (block - 2))


@pytest.mark.parametrize(("sink", "recent"), [(0, 3), (6, 3), (3, 6), (0, 0)])
def test_what_a_layer_remembers_is_what_commits_leave(sink, recent):
    """Blocks with their numbers as keys: the memory read from a stored clip against the memory that was written."""
    exp = rollout.for_training(BASE, BLOCKS, sink, recent)
    numbers = jnp.arange(1.0, 1 + BLOCKS)
    full, packed = (
        jnp.broadcast_to(numbers[:, None, None, None, None], (BLOCKS, 1, tokens, 3, 12))
        for tokens in (3 * exp.tokens_per_frame, exp.tokens_per_packed_block)
    )
    stored = jax.tree.map(lambda x: x[0], rollout.empty(exp, BLOCKS, 1, jnp.float32))
    memory = cache.init(exp.memory, 1)
    latent = jnp.zeros((1, 3, *exp.memory.latent))
    for block in range(BLOCKS):
        layout = layouts.layout(exp.cache, memory.progress)
        read = cache.layer_at(exp.memory, layout, stored.full, stored.packed)
        held = memory.layers[0]
        frames = np.concatenate(
            [np.arange(int(layout.sink)), 3 * block - 1 - np.arange(int(layout.recent))]
        )
        slots = layouts.frame_slots(exp.cache, layout, jnp.asarray(frames, jnp.int32))
        tokens = (np.asarray(slots)[:, None] * 8 + np.arange(8)).reshape(-1)
        visible = np.asarray(layout.ids) >= 0
        for ours, theirs in ((read.view.k, held.view.k), (read.view.v, held.view.v)):
            np.testing.assert_allclose(ours[:, tokens], theirs[:, tokens], atol=1e-5)
        np.testing.assert_array_equal(
            np.asarray(read.packed.v)[:, visible], np.asarray(held.packed.v)[:, visible]
        )
        own = [rollout.KV(k=x[block], v=x[block]) for x in (full, packed)]
        memory = cache.commit(exp.memory, memory, latent, [own[0]] * 2, [own[1]] * 2)
        frames = own[0].k.reshape(1, 3, -1, 3, 12)
        stored = rollout.Stored(
            full=_with(stored.full, frames, 3 * block), packed=_with(stored.packed, own[1].k, block)
        )


def _with(store, values, at):
    values = values if values.ndim == store.k.ndim else values[:, None]
    new = jax.lax.dynamic_update_slice_in_dim(store.k, values, at, axis=1)
    return rollout.KV(k=new, v=new)


def test_a_rollout_stops_at_its_step_and_goes_on_from_there(text, clip):
    """The first block up to each step: what a step reads is what the one before it made, under new noise."""
    _, sigmas = block_step.step_table(EXP.sample)
    stops = DistilConfig(finished=False)
    chance = draws()
    reached = [draw(NETS, EXP, stops, PIXELS, draws(exit), text) for exit in (0, 1)] + [clip]
    np.testing.assert_array_equal(reached[0].noisy, chance.noise)
    for step in (1, 2):
        read = schedules.add_noise(
            reached[step - 1].latent[0], chance.renoise[0, step - 1], sigmas[step]
        )
        np.testing.assert_allclose(reached[step].noisy[0], read, atol=1e-5)
        assert (
            np.abs(np.asarray(reached[step].latent) - np.asarray(reached[step - 1].latent)).max()
            > 1e-3
        )


@pytest.mark.parametrize("exit", [0, 1])
def test_a_finished_rollout_is_the_samplers_clip_wherever_a_gradient_begins(exit, text, clip):
    """Later blocks remember what all steps made; of the exit step, what it read is kept."""
    found = draw(NETS, EXP, PLAIN, PIXELS, draws(exit), text)
    np.testing.assert_allclose(found.latent, clip.latent, atol=2e-5)
    stopped = draw(NETS, EXP, DistilConfig(finished=False), PIXELS, draws(exit), text)
    np.testing.assert_allclose(found.noisy[0], stopped.noisy[0], atol=1e-5)
    made = tiny.jit(lambda: rollout.again(NETS, EXP, DistilConfig(gradient="none"), found, text))()
    np.testing.assert_allclose(made[0], stopped.latent[0], atol=2e-5)
    assert np.abs(np.asarray(made - found.latent)).max(axis=(1, 2, 3, 4, 5)).min() > 1e-3
    apart = np.abs(np.asarray(found.noisy - stopped.noisy)).max(axis=(1, 2, 3, 4, 5))
    assert np.all((apart[1:] > 1e-4) == (exit > 0))  # the first step reads nothing but noise


def test_some_blocks_are_drawn_again_as_all_are(clip, text):
    last = tiny.jit(
        lambda: rollout.again(NETS, EXP, DistilConfig(gradient="none"), clip, text, first=3)
    )()
    np.testing.assert_allclose(last, clip.latent[3:], atol=2e-5)


def test_noise_in_the_clean_pass_is_asked_for():
    """It is what timestep 0 has in the table: not none."""
    latent, noise = tiny.normal(1, 2, 2, 3, 8, 4, 12)
    np.testing.assert_array_equal(rollout._context(EXP, PLAIN, latent, noise), latent)
    sigma = schedules.table(EXP.sample.shift).sigmas[-1]
    assert sigma > 1e-3
    np.testing.assert_allclose(
        rollout._context(EXP, DistilConfig(noised_context=True), latent, noise),
        (1 - sigma) * latent + sigma * noise,
        atol=1e-6,
    )


# gradients ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_block(clip, text):
    """What the weighted sum of each block depends on: compressor, what its last step read, transformer."""
    weights = tiny.normal(9, *clip.latent.shape)

    def sums(compressor, noisy, transformer, gradient):
        nets = block_step.Nets(dit=transformer, compressor=compressor)
        given = dataclasses.replace(clip, noisy=noisy)
        latent = rollout.again(nets, EXP, DistilConfig(gradient=gradient), given, text)
        return (latent * weights).sum(axis=range(1, 6)), latent

    def jacobian(gradient, argnums):
        jacobian = jax.jacrev(lambda *given: sums(*given, gradient), argnums=argnums, has_aux=True)
        return tiny.jit(jacobian)(NETS.compressor, clip.noisy, NETS.dit)

    return {"packed": jacobian("packed", (0, 1, 2)), "leak": jacobian("leak", (0, 1))}


@pytest.mark.parametrize("gradient", ["packed", "leak"])
def test_drawing_again_gives_the_clip(by_block, clip, gradient):
    np.testing.assert_allclose(by_block[gradient][1], clip.latent, atol=2e-5)


def test_the_compressor_learns_from_the_first_block_that_sees_a_packed_one(by_block):
    """Sink and recent hold blocks 0 and 1 in front of block 2: mid is empty up to there, and not behind."""
    for name, leaf in pytrees.flatten(by_block["packed"][0][0]).items():
        learns = np.abs(leaf).max(axis=tuple(range(1, leaf.ndim))) > 0
        np.testing.assert_array_equal(learns, np.arange(BLOCKS) > 2, err_msg=name)


def test_nothing_reaches_the_compressor_through_what_is_stored(by_block):
    assert all(
        (np.asarray(leaf) == 0).all() for leaf in pytrees.flatten(by_block["leak"][0][0]).values()
    )


def test_a_drawn_clip_and_all_it_leaves_behind_are_constants(text):
    def total(nets, text):
        drawn = rollout.draw(nets, EXP, PLAIN, PIXELS, draws(), text)
        return sum(
            leaf.sum()
            for leaf in jax.tree.leaves((drawn.latent, drawn.noisy, drawn.low_res, drawn.stored))
        )

    assert not any(
        np.asarray(leaf).any()
        for leaf in jax.tree.leaves(tiny.jit(jax.grad(total, (0, 1)))(NETS, text))
    )


def test_blocks_do_not_reach_each_other_but_through_the_leak(by_block):
    def reach(gradient):
        return np.abs(by_block[gradient][0][1]).max(axis=tuple(range(2, 7))) > 0

    np.testing.assert_array_equal(reach("packed"), np.eye(BLOCKS, dtype=bool))
    seen = np.array(
        [
            [j <= n and (j == n or j < SINK // 3 or j >= n - RECENT // 3) for j in range(BLOCKS)]
            for n in range(BLOCKS)
        ]
    )
    leaked = reach("leak")
    assert (leaked >= seen).all()  # directly, and on from there
    assert not leaked[np.triu_indices(BLOCKS, 1)].any()


def test_the_gradient_of_a_block_without_packed_ones_is_that_of_its_last_step_alone(
    by_block, clip, sampled, text
):
    """Block 2 sees sink and recent alone: differentiated behind the sampler's memory, a constant."""
    weights = tiny.normal(9, *clip.latent.shape)[2]
    memory = sampled[2][0]
    random = jnp.zeros((EXP.dit.layers, tiny.BATCH, EXP.cache.slots))
    past = pytrees.stack(memory.layers), random

    def total(transformer):
        nets = block_step.Nets(dit=transformer, compressor=NETS.compressor)
        clean, _ = block_step.predict_x0(
            block_step.Denoiser(nets, EXP.step, batches.of_block(text, 2)),
            layouts.layout(EXP.cache, memory.progress),
            clip.noisy[2],
            block_step.noise_levels(EXP.sample)[2],
            past,
            block_step.Access(attends=block_step.choosing),
        )
        return (clean * weights).sum()

    alone = pytrees.flatten(tiny.jit(jax.grad(total))(NETS.dit))
    for name, leaf in pytrees.flatten(by_block["packed"][0][2]).items():
        scale = max(np.abs(alone[name]).max(), 1e-6)
        np.testing.assert_allclose(leaf[2] / scale, alone[name] / scale, atol=2e-5, err_msg=name)


# coverage -------------------------------------------------------------------------------------------------------------


def test_what_was_covered_is_counted(clip):
    told = rollout.covered(EXP, clip)
    assert {name: int(value) for name, value in told.items()} == {
        "packed_seen": 1 + 2,
        "choices": 0,
        "reach": 15,
        "exit": 2,
    }
    jittered = dataclasses.replace(clip, gap=jnp.float32(7.5))
    assert float(rollout.covered(EXP, jittered)["reach"]) == 22.5
    chosen = rollout.for_training(BASE, BLOCKS, SINK, RECENT, top=1)
    told = rollout.covered(chosen, clip)
    assert (int(told["packed_seen"]), int(told["choices"])) == (2, 1)


def test_each_step_draws_its_sizes_by_seed_and_number():
    cover = CoverConfig(sinks=(0, 3), recents=(3, 6), shortest=4, longest=7)
    train = TrainConfig(objective="dmd", cover=cover)
    drawn = [state.variant(BASE, train, 1, step) for step in range(60)]
    assert {(each.cache.sink, each.cache.recent) for each in drawn} == {
        (0, 3),
        (0, 6),
        (3, 3),
        (3, 6),
    }
    assert {each.clip // 3 for each in drawn} == {4, 5, 6, 7}
    assert drawn == [state.variant(BASE, train, 1, step) for step in range(60)]
    assert drawn != [state.variant(BASE, train, 2, step) for step in range(60)]
    forced = TrainConfig(objective="forcing", cover=cover)
    assert {state.variant(BASE, forced, 1, step).clip for step in range(20)} == {BASE.clip}


def test_what_remembers_nothing_is_left_as_it_is():
    for objective, history in (
        ("flow_matching", "memory"),
        ("forcing", "clean"),
        ("trajectory", "noisy"),
    ):
        train = TrainConfig(objective=objective, history=history)
        assert state.variant(BASE, train, 0, 5) == BASE


@pytest.mark.parametrize(("sink", "held"), [(0, 4), (3, 3), (6, 2), (9, 1)])
def test_training_attends_every_packed_block(sink, held):
    exp = rollout.for_training(BASE, BLOCKS, sink)
    assert (exp.cache.sink, exp.cache.top, exp.cache.capacity, exp.cache.attended) == (
        sink,
        held,
        held,
        held,
    )
    assert (exp.cache.selection, exp.cache.span) == ("all", "true")
    assert dataclasses.replace(exp, cache=BASE.cache) == BASE


def test_training_lets_every_layer_look_for_itself_on_the_device_however_sampling_does():
    hosted = tiny.with_cache(BASE, scope="shared", timing="late", archive="host")
    assert rollout.for_training(hosted, BLOCKS, 3) == rollout.for_training(BASE, BLOCKS, 3)


def test_a_memory_without_packed_blocks_stays_without():
    sharp = rollout.for_training(tiny.with_cache(BASE, top=0, capacity=0), BLOCKS, 3)
    assert (sharp.cache.top, sharp.cache.capacity, sharp.cache.slots) == (0, 0, 0)
