"""Training sees what sampling sees: losses depend on earlier blocks, and on packed twins when they show."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from packforcing_jax import cache, objectives, sampler, schedules, text, trees
from packforcing_jax.types import KV

BLOCKS = 4
BASE = dataclasses.replace(
    tiny.EXP, cache=dataclasses.replace(tiny.EXP.cache, recent=3),
    train=dataclasses.replace(tiny.EXP.train, gap_share=0.0, gap=9.0), clip=3 * BLOCKS)  # fmt: skip
MODEL = objectives.Model(nets=tiny.nets(), text=tiny.filled(jax.eval_shape(lambda: text.UMT5(BASE.text, nnx.Rngs(0)))))
APART = tiny.apart()  # layers one by one
KEY = jax.random.key(4)
CALLED = np.zeros((BLOCKS, tiny.BATCH, 2, BLOCKS), bool)  # block 3 calls back block 0 or 2
CALLED[3, 0, 1, 0] = CALLED[3, 1, 0, 2] = True
teacher_forcing = tiny.jit(objectives.teacher_forcing, static_argnames="exp")


def losses(given, key=KEY, exp=None):
    """The denoising loss of each block."""
    return teacher_forcing(MODEL, given, key, training(0) if exp is None else exp)[1][0]


def clips():
    rng = np.random.default_rng(2)
    shape = (BLOCKS, tiny.BATCH, 16)
    return objectives.Clips(
        latent=tiny.latents(BLOCKS), low=tiny.lows(BLOCKS), ids=jnp.asarray(rng.integers(3, 46, shape), jnp.int32),
        mask=jnp.asarray(np.arange(16) < rng.integers(2, 17, shape[:2])[..., None], jnp.int32),
        weight=jnp.asarray(rng.uniform(0.5, 2, (BLOCKS, tiny.BATCH, 3, 8, 4, 1)), jnp.float32),
        called=jnp.asarray(CALLED))  # fmt: skip


def training(sink, exp=BASE):
    return objectives.for_training(exp, BLOCKS, sink)


def with_gap(share):
    return dataclasses.replace(BASE, train=dataclasses.replace(BASE.train, gap_share=share))


def twins_seen(sink):
    """[loss, twin]: whether the packed twin of a block shows when another is guessed."""
    return np.array([[twin >= sink // 3 and twin < block - 1 for twin in range(BLOCKS)] for block in range(BLOCKS)])


@pytest.fixture(scope="module", params=[3, 6])
def gradients(request):
    """The sink, and what each block's loss depends on: latents, low-resolution latents, the compressor."""

    def by_block(latent, low, packer):
        model = dataclasses.replace(MODEL, nets=sampler.Nets(dit=MODEL.nets.dit, compressor=packer))
        given = dataclasses.replace(clips(), latent=latent, low=low)
        return objectives.teacher_forcing(model, given, KEY, training(request.param))[1][0]

    given = clips()
    jacobian = jax.jacrev(by_block, argnums=(0, 1, 2))
    return request.param, *tiny.jit(jacobian)(given.latent, given.low, MODEL.nets.compressor)


def test_a_loss_depends_on_its_own_block_and_earlier_ones_only(gradients):
    depends = jnp.abs(gradients[1]).max(axis=range(2, 7)) > 0
    np.testing.assert_array_equal(depends, np.tri(BLOCKS, dtype=bool))


def test_a_loss_depends_on_the_packed_twins_that_show(gradients):
    depends = jnp.abs(gradients[2]).max(axis=range(2, 7)) > 0
    np.testing.assert_array_equal(depends, twins_seen(gradients[0]))


def test_the_compressor_learns_from_blocks_that_see_packed_ones(gradients):
    for name, leaf in trees.flatten(gradients[3]).items():
        learns = jnp.abs(leaf).max(axis=range(1, leaf.ndim)) > 0
        np.testing.assert_array_equal(learns, twins_seen(gradients[0]).any(axis=1), err_msg=name)


@pytest.mark.parametrize(("sink", "held"), [(0, 3), (3, 2), (6, 1), (9, 1)])
def test_training_attends_every_packed_block(sink, held):
    exp = training(sink)
    assert (exp.cache.sink, exp.cache.top, exp.cache.capacity, exp.cache.attended) == (sink, held, held, held)
    assert (exp.cache.selection, exp.cache.span) == ("all", "true")
    assert exp.sample.prediction == BASE.sample.prediction
    assert dataclasses.replace(exp, cache=BASE.cache, sample=BASE.sample) == BASE


def test_training_lets_every_layer_look_for_itself_on_the_device_however_sampling_does():
    hosted = dataclasses.replace(BASE, cache=dataclasses.replace(
        BASE.cache, scope="shared", timing="late", archive="host"))  # fmt: skip
    assert training(3, hosted) == training(3)


def test_training_keeps_what_the_network_predicts():
    clean = dataclasses.replace(BASE, sample=dataclasses.replace(BASE.sample, prediction="clean"))
    assert training(3, clean).sample.prediction == "clean"


def test_training_guesses_behind_the_memory_that_sampling_fills():
    """Losses recomputed behind a memory filled by the sampler, its layers apart, in views of its own drawing."""
    exp, given, memory = training(0), clips(), cache.init(training(0), tiny.BATCH)
    keys = jax.random.split(KEY, 4)
    levels = objectives.noise_levels(keys[0], given.latent.shape[:2], exp.train.shift)
    noise = jax.random.normal(keys[1], given.latent.shape)
    words = tiny.jit(objectives.text_states)(MODEL, given)
    lots = jnp.zeros((exp.dit.layers, tiny.BATCH, exp.cache.slots))

    @tiny.jit
    def block_loss(memory, latent, noise, sigma, words, weight):
        seen, past = cache.plan(exp.cache, memory.num_blocks), trees.zipped(memory.layers, list(lots))
        noisy = schedules.add_noise(latent, noise, sigma)
        clean, _ = sampler.guess(APART, exp, seen, noisy, 1000 * sigma, sigma, words, past, look=sampler.first_look)
        return jnp.mean(weight * (clean - latent) ** 2)

    by_hand, chance = [], tiny.chances(exp, 0)
    for block in range(BLOCKS):
        prompt = trees.unstack(KV(k=words.k[block], v=words.v[block]), exp.dit.layers)
        by_hand.append(block_loss(memory, given.latent[block], noise[block], levels[block], prompt,
                                  given.weight[block]))  # fmt: skip
        drawn = tiny.draw(APART, exp, memory, chance=chance.replace(noise=noise[block]), text=prompt)
        memory, *_ = tiny.remember(APART, exp, memory, latent=given.latent[block], low=given.low[block],
                                   drawn=drawn, text=prompt)  # fmt: skip
    np.testing.assert_allclose(losses(given), jnp.stack(by_hand), rtol=1e-5)


def test_weights_scale_the_loss_of_their_cells():
    given = clips()
    other = losses(dataclasses.replace(given, weight=given.weight.at[1].mul(2).at[2].set(0)))
    np.testing.assert_allclose(other, losses(given) * jnp.asarray([1, 2, 0, 1]), rtol=1e-6)


def test_a_block_hears_its_own_prompt():
    given = clips()
    plain, other = losses(given), losses(dataclasses.replace(given, ids=given.ids.at[2, :, 0].add(-1)))
    np.testing.assert_array_equal(plain[:2], other[:2])
    assert (plain[2:] != other[2:]).all()


def test_padding_words_do_not_count():
    given = clips()
    padded = dataclasses.replace(given, ids=jnp.where(given.mask == 1, given.ids, 7))
    np.testing.assert_array_equal(losses(padded), losses(given))


def test_prompts_are_encoded_block_by_block():
    given = clips()
    words = tiny.jit(objectives.text_states)(MODEL, given)
    assert words.k.shape == (BLOCKS, 2, tiny.BATCH, 17, 3, 12)
    one = tiny.jit(objectives.text_states)(MODEL, jax.tree.map(lambda x: x[2:3], given))
    np.testing.assert_allclose(words.v[2], one.v[0], atol=1e-5)


def test_a_gap_moves_only_what_lies_before_recent():
    plain, moved = (losses(clips(), exp=training(0, with_gap(share))) for share in (0.0, 1.0))
    np.testing.assert_allclose(plain[:2], moved[:2], rtol=1e-6)  # nothing, or only recent, lies behind them
    assert (np.abs(plain - moved)[2:] > 1e-4).all()


def test_the_key_decides():
    one, same, other = (losses(clips(), key) for key in (KEY, KEY, jax.random.key(5)))
    np.testing.assert_array_equal(one, same)
    assert (one != other).all()


# the loss that selection finds what is called back --------------------------------------------------------------------


def test_both_losses_count_and_matching_counts_where_a_called_block_is_packed():
    total, (denoising, missed) = teacher_forcing(MODEL, clips(), KEY, training(0))
    np.testing.assert_allclose(total, denoising.mean() + BASE.train.matching * missed.mean(), rtol=1e-6)
    np.testing.assert_array_equal(missed > 0, [False, False, False, True])  # block 0 is packed by then, 2 still sharp


def test_matching_is_the_surprise_at_the_called_blocks_share():
    scores = jnp.asarray([[3.0, 1.0, 9.0, 4.0], [2.0, 5.0, 9.0, 1.0]])
    ids = jnp.asarray([4, 1, -1, 2])  # block 4 in the first slot; the third is empty
    called = np.zeros((2, 3, 5), bool)
    called[0, 0, [1, 2]] = called[0, 1, 4] = called[1, 0, 3] = True  # block 3 is not packed
    expected = -(np.log(5 / 8) + np.log(3 / 8)) / 6  # over two videos and three kinds
    np.testing.assert_allclose(objectives.matching(scores, ids, jnp.asarray(called)), expected, rtol=1e-6)


def test_matching_raises_the_called_block_and_lowers_the_others():
    called = jnp.asarray([[[False, True, False]]])
    gradient = jax.grad(objectives.matching)(jnp.asarray([[1.0, 2.0, 3.0, 4.0]]), jnp.asarray([2, 1, 0, -1]), called)
    np.testing.assert_array_equal(jnp.sign(gradient), [[1, -1, 1, 0]])


def test_nothing_called_or_nothing_packed_is_no_surprise_and_no_gradient():
    scores, called = jnp.zeros((1, 2)), jnp.ones((1, 2, 3), bool)
    for ids, asked in ((jnp.asarray([-1, -1]), called), (jnp.asarray([0, 2]), ~called)):
        value, gradient = jax.value_and_grad(objectives.matching)(scores, ids, asked)
        assert value == 0
        np.testing.assert_array_equal(gradient, scores)


def test_noise_levels_are_uniform_draws_warped_towards_noise():
    plain, warped = (objectives.noise_levels(KEY, (40, 50), shift) for shift in (1.0, 6.0))
    np.testing.assert_allclose(warped, 6 * plain / (1 + 5 * plain), rtol=1e-6)
    np.testing.assert_allclose(np.quantile(plain, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.03)
    assert np.median(warped) == pytest.approx(6 / 7, abs=0.02)
    assert 0 <= warped.min() <= warped.max() < 1
