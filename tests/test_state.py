"""A step moves what is trained, at its own rate, and nothing else; a bad one leaves everything as it was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from packforcing_jax import pytrees
from packforcing_jax.config import (
    DataConfig,
    DistilConfig,
    DtypeConfig,
    OptimiserConfig,
    TrainConfig,
)
from packforcing_jax.errors import InputError
from packforcing_jax.networks import codec, text
from packforcing_jax.training import rollout, state
from packforcing_jax.training.batches import Batch, Model, TokenizedText

BLOCKS = 4
KEY = jax.random.key(4)
RATES = {"generator": 2e-3, "compressor": 7e-3, "critic": 5e-4}
BASE = dataclasses.replace(
    tiny.EXP,
    sample=dataclasses.replace(tiny.EXP.sample, prediction="clean"),
    clip=3 * BLOCKS,
)
TRAIN = TrainConfig(
    steps=9,
    distil=DistilConfig(critic_updates=5),
    **{group: OptimiserConfig(rate=rate, decay=0.0) for group, rate in RATES.items()},
)
READER = tiny.filled(jax.eval_shape(lambda: text.UMT5(BASE.text, nnx.Rngs(0))))
GENERATOR = pytrees.flatten(
    Model(dit=tiny.nets().dit, compressor=tiny.nets().compressor, text=READER)
)
TEACHER = pytrees.flatten({"dit": tiny.filled(tiny.nets().dit, 3)})
init = tiny.jit(state.init, static_argnames=("exp", "train"))
update = tiny.jit(state.update, static_argnames=("exp", "train", "moves"))


def with_train(**settings):
    return dataclasses.replace(TRAIN, **settings)


def clips(batch=2):
    rng = np.random.default_rng(2)
    shape = (BLOCKS, batch, 7)
    words = TokenizedText(
        ids=jnp.asarray(rng.integers(3, 46, shape), jnp.int32),
        mask=jnp.asarray(np.arange(7) < rng.integers(2, 8, (*shape[:2], 1)), jnp.int32),
    )
    return Batch(
        text=words,
        latent=tiny.latents(BLOCKS, batch=batch),
        low_res=tiny.low_res(BLOCKS, batch=batch),
    )


def part(flat, name):
    return {path: leaf for path, leaf in flat.items() if path.startswith(f"{name}/")}


def moves_of(before, after):
    """The paths whose values are not what they were, bit for bit."""
    return {path for path in before if (np.asarray(before[path]) != np.asarray(after[path])).any()}


def same(one, other):
    return all(
        (np.asarray(a) == np.asarray(b)).all()
        for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)
    )


# the beginning --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn():
    return init(BASE, TRAIN, KEY, {})


def test_keys_start_equal_to_queries_and_nowhere_else(drawn):
    params = drawn.params["generator"]
    attn = "dit/blocks/attn"
    cross = "dit/blocks/cross"
    np.testing.assert_array_equal(params[f"{attn}/k/kernel"], params[f"{attn}/q/kernel"])
    assert (params[f"{attn}/v/kernel"] != params[f"{attn}/q/kernel"]).all()
    assert (params[f"{cross}/k/kernel"] != params[f"{cross}/q/kernel"]).all()


def test_layers_start_different_and_the_average_starts_where_the_parameters_do(drawn):
    kernel = drawn.params["generator"]["dit/blocks/ffn_in/kernel"]
    assert (kernel[0] != kernel[1]).all()
    assert same(drawn.ema, drawn.params["generator"])
    assert (int(drawn.step), int(drawn.skipped)) == (0, 0)
    assert drawn.opt.keys() == {"generator", "compressor"}
    assert drawn.params.keys() == {"generator"}


def test_a_given_generator_is_taken_and_a_compressor_it_lacks_is_drawn(drawn):
    half = {
        path: leaf.astype(jnp.bfloat16)
        for path, leaf in GENERATOR.items()
        if not path.startswith("compressor/")
    }
    params = init(BASE, TRAIN, KEY, {"generator": half}).params["generator"]
    assert {leaf.dtype for leaf in params.values()} == {np.dtype(np.float32)}
    for path, leaf in params.items():
        np.testing.assert_array_equal(
            leaf, half.get(path, drawn.params["generator"][path]), err_msg=path
        )


def test_a_generator_without_its_other_parts_is_refused():
    train = with_train(generator_from="models/half")
    for lacking in ("text", "dit"):
        given = {
            path: leaf for path, leaf in GENERATOR.items() if not path.startswith(f"{lacking}/")
        }
        with pytest.raises(InputError, match=f"train.generator_from=models/half lacks {lacking};"):
            jax.eval_shape(lambda given=given: state.init(BASE, train, KEY, {"generator": given}))


def test_data_that_hold_states_need_no_reader():
    train = with_train(source=DataConfig(kind="records"))
    params = jax.eval_shape(lambda: state.init(BASE, train, KEY, {})).params["generator"]
    assert {path.split("/")[0] for path in params} == {"dit", "compressor"}


@pytest.mark.parametrize("given", ["critic", "teacher", "generator"])
def test_a_critic_starts_as_what_is_given_for_it_else_as_the_teacher_else_as_the_generator(given):
    critic = pytrees.flatten({"dit": tiny.filled(tiny.nets().dit, 6)})
    networks = {
        "critic": critic,
        "teacher": TEACHER | part(GENERATOR, "compressor"),
        "generator": GENERATOR,
    }
    for name in ("critic", "teacher", "generator"):
        if name == given:
            break
        del networks[name]
    began = init(
        BASE,
        with_train(objective="dmd", trainable=("dit",)),
        KEY,
        networks | {"generator": GENERATOR},
    )
    assert same(began.params["critic"], part(networks[given], "dit"))
    assert same(began.params["generator"], GENERATOR)
    assert began.opt.keys() == {"generator", "critic"}


# one objective, step by step ------------------------------------------------------------------------------------------

WHOLE = with_train(objective="flow_matching", trainable=("dit",))


@pytest.fixture(scope="module")
def steps():
    """[(state, metrics)] before and after steps on one batch with one noise: two good, two spoilt, one good."""
    good = clips()
    bad = dataclasses.replace(good, latent=good.latent.at[2, 1, 0, 0, 0, 0].set(jnp.nan))
    now = init(BASE, WHOLE, KEY, {"generator": GENERATOR})
    history = [(now, {})]
    for batch in (good, good, bad, bad, good):
        now, metrics = update(now, {}, batch, KEY, BASE, WHOLE, moves=("generator",))
        history.append((now, jax.tree.map(np.asarray, metrics)))
    return history


def test_the_loss_of_a_fixed_batch_falls(steps):
    losses = [float(steps[count][1]["loss"]) for count in (1, 2, 5)]
    assert losses[2] < losses[1] < losses[0]


def test_every_trained_parameter_moves_and_no_other(steps):
    before, after = (steps[count][0].params["generator"] for count in (0, 1))
    assert moves_of(before, after) == set(part(GENERATOR, "dit"))
    assert steps[1][1].keys() == {"loss", "loss_by_block", "gradient"}


def test_an_update_that_is_not_finite_is_left_out_and_counted(steps):
    good = steps[2][0]
    for count in (3, 4):
        now, metrics = steps[count]
        assert not np.isfinite(metrics["loss"])
        assert same((good.params, good.opt, good.ema), (now.params, now.opt, now.ema))
    assert [int(now.skipped) for now, _ in steps] == [0, 0, 0, 1, 2, 0]
    assert [int(now.step) for now, _ in steps] == [0, 1, 2, 3, 4, 5]
    after = steps[5][0]
    assert moves_of(good.params["generator"], after.params["generator"])
    assert np.isfinite(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(after)])).all()


def test_the_average_follows_with_a_memory_that_grows(steps):
    for path in ("dit/blocks/attn/o/kernel", "dit/head/bias"):
        for count in (1, 2):
            before, after = (np.asarray(steps[at][0].ema[path]) for at in (count - 1, count))
            keep = count / (count + 9)
            now = np.asarray(steps[count][0].params["generator"][path])
            np.testing.assert_allclose(after, keep * before + (1 - keep) * now, atol=1e-6)


@pytest.mark.parametrize(("objective", "every"), [("forcing", 1), ("dmd", 5)])
def test_the_average_is_a_copy_until_it_begins_and_bounded_later(objective, every):
    """The generator's own updates count, of which there is one in five where a critic takes part."""
    train = with_train(objective=objective, ema=0.6, ema_from=3)
    for updates, keep in ((1, 0.0), (3, 0.0), (4, 0.1), (6, 0.25), (12, 0.5), (40, 0.6)):
        began = state.TrainState(
            params={},
            ema={"x": np.float32(2)},
            opt={},
            skipped=np.int32(0),
            step=np.int32(every * (updates - 1)),
        )
        ema = state.averaged(train, began, {"x": jnp.float32(12)})
        np.testing.assert_allclose(ema["x"], 2 * keep + 12 * (1 - keep), rtol=1e-5)


# a batch in parts -----------------------------------------------------------------------------------------------------


def test_a_batch_in_parts_gives_the_mean_of_the_parts():
    """Six clips in three parts, each with its own words, latents and way; every clip is in one part."""
    train = with_train(objective="trajectory", history="clean", batch=6)
    way = jnp.stack(
        [tiny.latents(BLOCKS, batch=6, seed=seed) for seed in range(1 + len(BASE.sample.steps))]
    )
    batch = dataclasses.replace(clips(6), trajectory=way)
    now = state.TrainState(
        params={"generator": GENERATOR}, ema={}, opt={}, step=jnp.int32(0), skipped=jnp.int32(0)
    )
    moving = {
        "generator": {path: GENERATOR[path] for path in ("dit/patch/kernel", "dit/head/bias")}
    }

    def graded(batch, key, train):
        loss = state.loss_of(BASE, train, now, {}, "generator")
        return state.gradients(loss, moving, batch, key, train.accumulate)

    compiled = tiny.jit(graded, static_argnames="train")
    keys = jax.random.split(KEY, 3)
    ours = compiled(batch, KEY, dataclasses.replace(train, accumulate=3))
    taken = [[at for at in range(6) if at % 3 == number] for number in range(3)]
    each = [
        compiled(
            Batch(
                text=jax.tree.map(lambda x, at=at: x[:, jnp.asarray(at)], batch.text),
                latent=batch.latent[:, jnp.asarray(at)],
                low_res=batch.low_res[:, jnp.asarray(at)],
                trajectory=way[:, :, jnp.asarray(at)],
            ),
            key,
            train,
        )
        for at, key in zip(taken, keys, strict=True)
    ]
    expected = jax.tree.map(
        lambda *parts: sum(np.asarray(one, np.float64) for one in parts) / 3, *each
    )
    for one, other in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


# who takes part -------------------------------------------------------------------------------------------------------


def test_a_critic_moves_in_every_step_and_the_generator_in_one_of_five_the_first_included():
    train = with_train(objective="dmd")
    both = ("generator", "critic")
    alone = ("critic",)
    assert [state.movers(train, step) for step in range(11)] == [
        both,
        *[alone] * 4,
        both,
        *[alone] * 4,
        both,
    ]
    assert (
        state.movers(with_train(objective="sid", distil=DistilConfig(critic_updates=1)), 7) == both
    )
    assert state.movers(TRAIN, 3) == ("generator",)


def networks_of(objective, frozen=None, **settings):
    exp = dataclasses.replace(BASE, **settings)
    train = with_train(objective=objective)
    params = {"generator": GENERATOR} | ({"critic": TEACHER} if objective == "dmd" else {})
    ema = {path: leaf + 1 for path, leaf in GENERATOR.items()}
    now = state.TrainState(params=params, ema=ema, opt={}, step=jnp.int32(0), skipped=jnp.int32(0))
    moving = {"generator": {"dit/head/bias": GENERATOR["dit/head/bias"] + 3}}
    return state.assembled(exp, train, now, frozen or {}, moving, "generator")


def test_consistency_asks_the_average_and_a_whole_teacher():
    teacher = {path: leaf - 1 for path, leaf in GENERATOR.items()}
    networks = networks_of("consistency", {"teacher": teacher})
    assert same(
        pytrees.flatten(networks.average), {path: leaf + 1 for path, leaf in GENERATOR.items()}
    )
    assert same(pytrees.flatten(networks.teacher), teacher)
    assert networks.critic is None


def test_distillation_asks_the_transformers_of_critic_and_teacher():
    networks = networks_of("dmd", {"teacher": TEACHER, "null_text": jnp.ones((3, 10))})
    assert networks.average is None
    assert same(
        pytrees.flatten(networks.critic),
        {path.removeprefix("dit/"): leaf for path, leaf in TEACHER.items()},
    )
    assert same(networks.teacher.dit, networks.critic)
    assert networks.null_text.shape == (3, 10)
    assert isinstance(networks.vae, codec.SpaceToDepth)


def test_what_is_under_the_gradient_takes_its_place():
    networks = networks_of("forcing")
    assert (networks.teacher, networks.critic, networks.average) == (None, None, None)
    wanted = GENERATOR | {"dit/head/bias": GENERATOR["dit/head/bias"] + 3}
    assert same(pytrees.flatten(networks.generator), wanted)


def test_networks_compute_in_the_dtype_of_computing():
    networks = networks_of("dmd", {"teacher": TEACHER}, dtypes=DtypeConfig(compute="bfloat16"))
    for network in (networks.generator, networks.teacher, networks.critic):
        assert {leaf.dtype for leaf in jax.tree.leaves(network)} == {np.dtype(jnp.bfloat16)}


# a generator and its critic -------------------------------------------------------------------------------------------

HR = dataclasses.replace(BASE, compressor=dataclasses.replace(BASE.compressor, branches="hr"))
SHORT = dataclasses.replace(rollout.for_training(HR, 3, 0), clip=9)
DMD = with_train(objective="dmd", source=DataConfig(kind="records"), distil=DistilConfig(scored=1))
WORDS = Batch(text=tiny.normal(3, 1, 2, 7, BASE.dit.text_dim))


@pytest.fixture(scope="module")
def before():
    generator = pytrees.flatten(tiny.nets(HR))
    return init(SHORT, DMD, KEY, {"generator": generator, "teacher": TEACHER})


def test_a_generator_step_moves_the_generator_alone(before):
    after, metrics = update(
        before, {"teacher": TEACHER}, WORDS, KEY, SHORT, DMD, moves=("generator",)
    )
    old = before.params["generator"]
    new = after.params["generator"]
    assert moves_of(old, new) == set(old)
    assert same(
        (before.params["critic"], before.opt["critic"]),
        (after.params["critic"], after.opt["critic"]),
    )
    assert not same(before.ema, after.ema)
    groups = {
        f"generator/{what}/{group}"
        for what in ("gradient", "update")
        for group in ("generator", "compressor")
    }
    told = {
        f"generator/{name}"
        for name in ("loss", "gradient", "pull", "packed_seen", "choices", "reach", "exit")
    }
    assert metrics.keys() == groups | told
    each = [metrics[f"generator/gradient/{group}"] for group in ("generator", "compressor")]
    np.testing.assert_allclose(metrics["generator/gradient"], np.hypot(*each), rtol=1e-5)
    for name, group in (("dit", "generator"), ("compressor", "compressor")):
        far = np.concatenate(
            [np.ravel(new[path]) - np.ravel(old[path]) for path in part(old, name)]
        )
        assert np.abs(far).max() == pytest.approx(
            RATES[group], rel=1e-3
        )  # Adam's first update, at the group's rate
        np.testing.assert_allclose(
            metrics[f"generator/update/{group}"], np.linalg.norm(far), rtol=1e-3
        )
    assert (int(after.step), int(after.skipped)) == (1, 0)


def test_a_critic_step_moves_the_critic_alone(before):
    after, metrics = update(before, {"teacher": TEACHER}, WORDS, KEY, SHORT, DMD, moves=("critic",))
    moved = moves_of(before.params["critic"], after.params["critic"])
    assert moved == set(TEACHER)
    assert same((before.params["generator"], before.ema), (after.params["generator"], after.ema))
    assert all(same(before.opt[group], after.opt[group]) for group in ("generator", "compressor"))
    assert metrics.keys() == {
        f"critic/{name}" for name in ("loss", "gradient", "packed_seen", "choices", "reach", "exit")
    }
    far = max(
        np.abs(after.params["critic"][path] - before.params["critic"][path]).max()
        for path in TEACHER
    )
    assert far == pytest.approx(RATES["critic"], rel=1e-3)
