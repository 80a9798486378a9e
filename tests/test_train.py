"""Training moves every parameter as its optimiser should, and a run stopped and resumed is the run never stopped."""

import dataclasses
import io
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from packforcing_jax import checkpoints, codec, config, models, objectives, train, trees
from packforcing_jax.errors import InputError
from packforcing_jax.stage import data

EXP = dataclasses.replace(
    tiny.EXP, name="stage",
    dit=dataclasses.replace(tiny.EXP.dit, dim=24, heads=2, in_channels=48, out_channels=48),
    codec=config.SpaceToDepthConfig(factor=4),
    cache=config.CacheConfig(block=4, sink=4, recent=4, top=2, capacity=4, score_pool=(4, 1, 1), key_multiple=1),
    compressor=config.CompressorConfig(channels=(5,), strides=((2, 8, 8),)),
    sample=dataclasses.replace(tiny.EXP.sample, prediction="clean"),
    train=config.TrainConfig(steps=4, batch=2, sinks=(4,), warmup=1, save_every=3),
    latent=(8, 8), clip=20)  # fmt: skip
IN_TRAINING = objectives.for_training(EXP, 5, 4)
ENCODE = train.stage_tokenizer().encode


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Runs of a few steps spend their time in the compiler."""

    def jit(function, **settings):
        quick, plain = tiny.jit(function, **settings), jax.jit(function, **settings)

        def call(*inputs):
            traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(inputs))
            return (plain if traced else quick)(*inputs)  # compiler options are for what really runs

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "jax", types.SimpleNamespace(**vars(jax) | {"jit": jit}))
        yield


@pytest.fixture(scope="module")
def start():
    """The state before the first step."""
    return train.init(EXP, 0)


@pytest.fixture(scope="module")
def batch():
    """A batch of clips as the data set gives it."""
    return next(iter(data.dataset(3, 2, encode=ENCODE)))


@pytest.fixture(scope="module")
def clips(batch):
    """The same batch as the objective reads it."""
    given = {name: batch[name] for name in ("video", "ids", "mask", "weight", "called")}
    return tiny.jit(lambda given: train.as_clips(EXP, codec.make(EXP.codec, nnx.Rngs(0)), given))(given)


@pytest.fixture(scope="module")
def fixed(start, clips):
    """(state, metrics) after each of four steps on one batch with one noise."""
    step = tiny.jit(train.train_step, static_argnames="exp", donate_argnums=0)  # as in `train.steps`: compiled once
    state, history = jax.tree.map(jnp.copy, start), []
    for _ in range(4):
        state, metrics = step(state, clips, jax.random.key(0), IN_TRAINING)
        history.append((jax.tree.map(np.array, state), metrics))
    return history


def run_to(folder, last=EXP.train.steps):
    """A run started or continued in `folder` and stopped after step `last`, with the metrics of its steps."""
    run = train.start(EXP, folder, 7)
    first, metrics, running = run.step, [], train.steps(run)
    for each in running:
        metrics.append(each)
        if each["step"] == last:
            break
    running.close()
    run.saved.close()
    return first, run, metrics


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of four steps without a stop."""
    return run_to(tmp_path_factory.mktemp("straight"))


# rates and what they apply to -----------------------------------------------------------------------------------------


def test_rates_rise_stay_and_fall_to_two_percent():
    schedule = train.rates(config.TrainConfig(steps=100, warmup=10, cooldown=0.4), 3.0)
    steps = np.array([0, 5, 10, 40, 60, 80, 100, 130])
    share = np.array([0, 0.5, 1, 1, 1, 0.51, 0.02, 0.02])
    np.testing.assert_allclose([schedule(step) for step in steps], 3 * share, rtol=1e-5)


def test_a_run_shorter_than_its_warm_up_keeps_rising():
    schedule = train.rates(config.TrainConfig(steps=20, warmup=50), 1.0)
    np.testing.assert_allclose([schedule(step) for step in (0, 10, 20)], [0, 0.2, 0.4], rtol=1e-6)


def test_matrices_go_to_muon_layer_by_layer_and_the_rest_to_adam(start):
    for path, leaf in start.params.items():
        axes = train.matrix_axes(path, leaf)
        if path.rsplit("/", 1)[1] != "kernel":
            assert axes is None, path
        elif "/blocks/" in path:
            assert leaf.shape[0] in (EXP.dit.layers, EXP.text.layers)
            assert (axes.reduction_axis, axes.output_axis) == ((1,), 2), path
        elif "convs" in path:
            assert (axes.reduction_axis, axes.output_axis) == ((0, 1, 2, 3), 4), path
        else:
            assert (axes.reduction_axis, axes.output_axis) == ((0,), 1), path


def test_both_optimisers_have_work(start):
    names = {path.rsplit("/", 1)[1] for path, leaf in start.params.items() if train.matrix_axes(path, leaf) is None}
    assert names == {"bias", "scale", "modulation", "head_modulation", "embedding"}
    matrices = [path for path, leaf in start.params.items() if train.matrix_axes(path, leaf)]
    for part in ("nets/dit/blocks/attn/q", "nets/dit/patch", "nets/compressor/convs/0", "text/blocks/ffn/gate"):
        assert f"{part}/kernel" in matrices


def test_muon_moves_a_stack_as_it_moves_each_of_its_matrices():
    cfg = dataclasses.replace(EXP.train, warmup=0, decay=0.0)
    gradient = tiny.normal(1, 3, 6, 4)

    together = _moved(cfg, "nets/dit/blocks/x/kernel", gradient)
    for layer in range(3):
        np.testing.assert_allclose(together[layer], _moved(cfg, "x/kernel", gradient[layer]), atol=1e-6)
    assert jnp.abs(together).max() > 1e-4


def _moved(cfg, path, gradient):
    """The first update of one parameter."""
    given, optimiser = {path: gradient}, train.optimiser(cfg)
    return tiny.jit(lambda given: optimiser.update(given, optimiser.init(given), given)[0])(given)[path]


# the state ------------------------------------------------------------------------------------------------------------


def test_keys_start_equal_to_queries_and_nowhere_else(start):
    attn = "nets/dit/blocks/attn"
    np.testing.assert_array_equal(start.params[f"{attn}/k/kernel"], start.params[f"{attn}/q/kernel"])
    assert (start.params[f"{attn}/v/kernel"] != start.params[f"{attn}/q/kernel"]).all()
    cross = "nets/dit/blocks/cross"
    assert (start.params[f"{cross}/k/kernel"] != start.params[f"{cross}/q/kernel"]).all()


def test_layers_start_different_and_the_average_starts_where_the_parameters_do(start):
    kernel = start.params["nets/dit/blocks/ffn_in/kernel"]
    assert (kernel[0] != kernel[1]).all()
    for path, leaf in start.params.items():
        np.testing.assert_array_equal(leaf, start.ema[path], err_msg=path)
    assert int(start.step) == 0


def test_parameters_become_the_modules_they_came_from(start):
    flat = trees.flatten(train.as_model(EXP, start.params))
    assert flat.keys() == start.params.keys()
    assert all(flat[path] is leaf or (flat[path] == leaf).all() for path, leaf in start.params.items())


# steps on one batch ---------------------------------------------------------------------------------------------------


def test_the_loss_of_a_fixed_batch_falls(fixed):
    losses = [float(metrics["loss"]) for _, metrics in fixed]
    assert losses[1] == losses[0]  # the warm-up starts from nothing
    assert losses[3] < losses[2] < losses[1]


def test_metrics_say_loss_by_block_and_gradient(fixed):
    metrics = fixed[0][1]
    assert metrics["loss_by_block"].shape == (5,)
    total = metrics["loss_by_block"].mean() + EXP.train.matching * metrics["matching"]
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-6)
    assert metrics["gradient"] > 0


def test_every_parameter_that_can_learn_moves(fixed, start):
    still = {path for path, leaf in fixed[-1][0].params.items() if (leaf == np.asarray(start.params[path])).all()}
    assert still == set()


def test_the_average_follows_with_a_memory_that_grows(fixed, start):
    before, ema = start.ema, "nets/dit/blocks/attn/o/kernel"
    for count, (state, _) in enumerate(fixed):
        keep = (count + 1) / (count + 10)
        expected = keep * before[ema] + (1 - keep) * state.params[ema]
        np.testing.assert_allclose(state.ema[ema], expected, atol=1e-6)
        assert int(state.step) == count + 1
        before = state.ema


def test_clips_are_the_encoded_blocks_of_the_batch(clips, batch):
    assert clips.latent.shape == (5, 2, 4, 8, 8, 48)
    assert clips.low.shape == (5, 2, 2, 2, 2, 48)
    pixels = codec.make(EXP.codec, nnx.Rngs(0))
    np.testing.assert_array_equal(codec.decode(pixels, clips.latent[3]), batch["video"][:, 12:16])
    halves = batch["video"][:, 12:16].reshape(2, 2, 2, 8, 4, 8, 4, 3).mean(axis=(2, 4, 6))
    np.testing.assert_allclose(codec.decode(pixels, clips.low[3]), halves, atol=1e-6)
    np.testing.assert_array_equal(clips.ids[3], batch["ids"][:, 3])
    np.testing.assert_array_equal(clips.mask[3], batch["mask"][:, 3])
    np.testing.assert_array_equal(clips.called[3], batch["called"][:, 3])
    cells = batch["weight"][:, 3].reshape(2, 4, 8, 4, 8, 4).mean(axis=(3, 5))
    np.testing.assert_allclose(clips.weight[3, ..., 0], cells, rtol=1e-6)


# runs -----------------------------------------------------------------------------------------------------------------


def test_a_stopped_run_continues_bit_for_bit(straight, tmp_path):
    first, stopped, early = run_to(tmp_path, last=2)
    assert (first, stopped.step) == (0, 2)
    first, resumed, late = run_to(tmp_path)
    assert (first, resumed.step) == (2, 4)
    for one, other in zip(early + late, straight[2], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    whole = checkpoints._named(straight[1].state)
    for path, leaf in checkpoints._named(resumed.state).items():
        np.testing.assert_array_equal(leaf, whole[path], err_msg=path)


def test_a_finished_run_has_nothing_left_to_do(straight):
    first, again, metrics = run_to(straight[1].folder)
    assert (first, again.step, metrics) == (4, 4, [])


def test_a_run_reports_each_step_as_json(straight):
    metrics, file = straight[2], io.StringIO()
    assert [each["step"] for each in metrics] == [1, 2, 3, 4]
    for each in metrics:
        train.log_line(file, each)
    lines = [json.loads(line) for line in file.getvalue().splitlines()]
    assert lines == metrics
    assert set(lines[0]) == {"step", "seconds", "sink", "loss", "gradient", "loss_by_block", "matching"}
    assert {each["sink"] for each in metrics} <= set(EXP.train.sinks)


def test_the_average_is_exported_as_a_folder_that_loads(straight, tmp_path):
    run = straight[1]
    train.export(run, tmp_path / "model", card="what it is")
    exported = models.opened(tmp_path / "model")
    assert exported.experiment == EXP
    parts = {"dit": "nets/dit", "compressor": "nets/compressor", "text": "text"}
    for name, prefix in parts.items():
        part = {path: tensor.read() for path, tensor in exported.part(name).items()}
        averaged = {path for path in run.state.ema if path.startswith(f"{prefix}/")}
        assert {f"{prefix}/{path}" for path in part} == averaged
        for path, leaf in part.items():
            np.testing.assert_array_equal(leaf, run.state.ema[f"{prefix}/{path}"].astype(jnp.bfloat16), err_msg=path)
    assert (tmp_path / "model" / models.CARD).read_text() == "what it is"
    again = type(train.stage_tokenizer()).from_file(tmp_path / "model" / models.TOKENIZER, 16)
    np.testing.assert_array_equal(again.encode(["a red disc"])[0], ENCODE(["a red disc"])[0])


def test_a_clip_that_is_no_whole_number_of_blocks_is_refused(tmp_path):
    with pytest.raises(InputError, match="clip=22 is not a whole number of blocks of 4"):
        train.start(dataclasses.replace(EXP, clip=22), tmp_path, 0)
    assert not list(tmp_path.iterdir())
