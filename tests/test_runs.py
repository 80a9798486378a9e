"""A run that was stopped, killed or broken is in the end the unbroken one; what is wrong is said before a step."""

import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import pytest
import tiny

from packforcing_jax import config
from packforcing_jax.cli import main
from packforcing_jax.config import DataConfig, MeshConfig, OptimiserConfig, TrainConfig, loading
from packforcing_jax.errors import InputError, MachineError
from packforcing_jax.io import atomic, checkpoints, model_folder
from packforcing_jax.training import exports, logs, runs, state

# A program of nine parameters that draws noise, has momentum and an average, and whose every fifth batch may be bad


class Counted:
    """Endless batches, each a function of its number; those numbered `bad` are not finite."""

    bad: tuple[int, ...] = ()

    def __init__(self, rows):
        self.rows = rows
        self.next = 0

    def __next__(self):
        x = np.random.default_rng(self.next).normal(size=(self.rows, 5)).astype(np.float32)
        self.next += 1
        return {"x": np.where(self.next - 1 in self.bad, np.nan, x)}

    def get_state(self):
        return {"next": self.next}

    def set_state(self, told):
        self.next = told["next"]


def init(exp, train, key, given):
    params = {"dit/head/kernel": jax.random.normal(key, (5, 3)), "dit/head/bias": jnp.zeros(3)}
    params |= given.get("generator", {})
    return state.TrainState(
        params={"generator": params},
        ema=jax.tree.map(jnp.copy, params),
        step=jnp.int32(0),
        opt={"generator": jax.tree.map(jnp.zeros_like, params)},
        skipped=jnp.int32(0),
    )


def update(now, frozen, batch, key, exp, train, *, moves):
    def loss(params):
        guess = batch @ params["dit/head/kernel"] + params["dit/head/bias"][None]
        return jnp.mean((guess - jax.random.normal(key, guess.shape)) ** 2)

    own = now.params["generator"]
    value, grads = jax.value_and_grad(loss)(own)
    speed = jax.tree.map(lambda old, new: 0.9 * old + new, now.opt["generator"], grads)
    params = jax.tree.map(lambda p, v: p - 0.05 * v, own, speed)
    ema = jax.tree.map(lambda old, new: 0.8 * old + 0.2 * new, now.ema, params)
    new = now.replace(params={"generator": params}, ema=ema, opt={"generator": speed})
    fine = jnp.isfinite(value)
    kept = jax.tree.map(lambda after, before: jnp.where(fine, after, before), new, now)
    metrics = {
        "loss": value,
        "bias": params["dit/head/bias"],
        "first": 1.0 * ("generator" in moves),
    }
    return kept.replace(step=now.step + 1, skipped=jnp.where(fine, 0, now.skipped + 1)), metrics


PROGRAM = runs.Program(
    init=init,
    update=update,
    movers=lambda train, step: ("generator", "critic") if step % 3 == 0 else ("critic",),
    encode=lambda exp, pixels, raw: raw["x"],
    batches=lambda exp, source, share, **_: Counted(share.batch),
)
TRAIN = TrainConfig(steps=11, batch=4, save_every=3, patience=2)
EXP = dataclasses.replace(
    tiny.EXP, dit=dataclasses.replace(tiny.EXP.dit, heads=2, rope_pairs=(4, 3, 2))
)


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """The small program does not depend on the experiment, so it is compiled once per mesh."""
    whole = runs.compiled
    kept = {}

    def compiled(exp, train, program, form, grid):
        if program is not PROGRAM:
            return whole(exp, train, program, form, grid)
        return kept.setdefault(grid, whole(exp, train, program, form, grid))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "compiled", compiled)
        yield


def with_train(**changes):
    return dataclasses.replace(TRAIN, **changes)


def begin(folder, train=TRAIN, seed=7, exp=EXP):
    return runs.start(exp, train, folder, seed=seed, program=PROGRAM)


def trained(folder, train=TRAIN, seed=7, until=None):
    """A run started or continued in `folder`, asked to stop in step `until`, and the metrics of its steps."""
    run = begin(folder, train, seed)
    metrics = []
    for each in runs.steps(run, lambda: run.step == until):
        metrics.append(each)
    runs.finish(run)
    return run, metrics


def same(metrics):
    """What two equal runs have in common."""
    return [
        {name: value for name, value in each.items() if name not in runs.TIMES} for each in metrics
    ]


def lines(folder):
    return same(json.loads(line) for line in (folder / logs.LINES).read_text().splitlines())


def assert_same_state(one, other, **tolerance):
    named = checkpoints.named(one.state)
    for path, leaf in checkpoints.named(other.state).items():
        np.testing.assert_allclose(
            np.asarray(leaf), np.asarray(named[path]), err_msg=path, **{"rtol": 0} | tolerance
        )


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run without a stop."""
    return trained(tmp_path_factory.mktemp("straight"))


# from the first step to the last --------------------------------------------------------------------------------------


def test_a_run_learns_and_tells_each_step(straight):
    run, metrics = straight
    told = lines(run.folder)
    assert (
        [line["step"] for line in told] == [each["step"] for each in metrics] == list(range(1, 12))
    )
    assert [line["moves"] for line in told][:4] == [
        "generator+critic",
        "critic",
        "critic",
        "generator+critic",
    ]
    assert [line["first"] for line in told][:4] == [1.0, 0.0, 0.0, 1.0]
    assert told[-1]["loss"] < told[0]["loss"]
    for line, each in zip(told, metrics):
        assert np.float32(line["loss"]) == each["loss"]
        assert each["seconds"] > each["waited"] >= 0
        np.testing.assert_allclose(each["clips_per_second"] * each["seconds"], 4)
        np.testing.assert_allclose(each["tokens_per_second"] / each["clips_per_second"], 15 * 4 * 2)


def test_the_state_lies_on_the_mesh(straight):
    run = straight[0]
    assert dict(run.mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 1, "context": 1}
    assert all(leaf.sharding.mesh == run.mesh for leaf in jax.tree.leaves(run.state))


def test_the_newest_checkpoints_are_kept_and_the_last_is_the_end(straight):
    assert sorted(int(path.name) for path in (straight[0].folder / runs.CHECKPOINTS).iterdir()) == [
        9,
        11,
    ]


def test_the_average_is_exported(straight):
    run = straight[0]
    exported = model_folder.opened(run.folder / runs.MODEL)
    assert exported.experiment == EXP
    for path, tensor in exported.part("dit").items():
        np.testing.assert_array_equal(
            tensor.read(), run.state.ema[f"dit/{path}"].astype(jnp.bfloat16), err_msg=path
        )
    assert (
        run.state.ema["dit/head/kernel"] != run.state.params["generator"]["dit/head/kernel"]
    ).all()
    again = exports.tokenizer_of(EXP, TRAIN).from_file(
        run.folder / runs.MODEL / model_folder.TOKENIZER, 16
    )
    np.testing.assert_array_equal(
        again.encode(["a red disc"])[0], exports.tokenizer_of(EXP, TRAIN).encode(["a red disc"])[0]
    )


def test_a_log_may_be_thinner_than_the_steps(tmp_path):
    _, metrics = trained(tmp_path, with_train(log_every=4))
    assert [line["step"] for line in lines(tmp_path)] == [4, 8, 11]
    assert len(metrics) == 11


def test_another_seed_is_another_run(straight, tmp_path):
    _, metrics = trained(tmp_path, seed=8, until=1)
    assert metrics[0]["loss"] != straight[1][0]["loss"]


# stopped, killed, resumed ---------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on_bit_for_bit(straight, tmp_path):
    run, early = trained(tmp_path, until=5)
    assert (run.step, run.stopped, run.done, (tmp_path / runs.MODEL).exists()) == (
        5,
        True,
        False,
        False,
    )
    again, late = trained(tmp_path)
    assert (late[0]["step"], again.stopped, again.done) == (6, False, True)
    assert lines(tmp_path) == lines(straight[0].folder)
    np.testing.assert_equal(same(early + late), same(straight[1]))
    assert_same_state(again, straight[0])


def test_a_run_killed_at_random_points_is_the_unbroken_one_in_the_end(straight, tmp_path):
    """In process: what lay in memory is lost, whatever the disk has is taken up, a torn line included."""
    rng = np.random.default_rng(5)
    killed = []
    while len(killed) < 5:
        run = begin(tmp_path)
        killed.append((run.step, int(rng.integers(1, 5))))
        for _ in zip(range(killed[-1][1]), runs.steps(run)):
            pass  # two runs cannot write at once: what was begun to be saved is complete
        with (tmp_path / logs.LINES).open("ab") as file:
            file.write(b'{"step": 99, "lo')
    again, _ = trained(tmp_path)
    assert len({step for step, _ in killed}) > 2
    assert lines(tmp_path) == lines(straight[0].folder)
    assert_same_state(again, straight[0])


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=2), MeshConfig(tensor=2)])
def test_a_run_goes_on_on_another_mesh(straight, tmp_path, mesh):
    trained(tmp_path, until=4)
    again, _ = trained(tmp_path, with_train(mesh=mesh))
    assert again.mesh.shape != straight[0].mesh.shape
    assert_same_state(again, straight[0], rtol=1e-5, atol=1e-6)


def test_a_longer_run_goes_on_from_a_finished_one(straight, tmp_path):
    trained(tmp_path, with_train(steps=6))
    again, metrics = trained(tmp_path)
    assert [each["step"] for each in metrics] == [7, 8, 9, 10, 11]
    assert_same_state(again, straight[0])


def test_a_save_that_failed_is_told_and_the_one_before_is_there(straight, tmp_path, monkeypatch):
    trained(tmp_path, until=3)
    run = begin(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(
            orbax.checkpoint.CheckpointManager,
            "wait_until_finished",
            lambda _: (_ for _ in ()).throw(OSError(28, "full")),
        )
        with pytest.raises(
            MachineError,
            match=r"Saving step .* failed \(\[Errno 28\] full\); earlier steps are kept",
        ):
            list(runs.steps(run))
    assert_same_state(trained(tmp_path)[0], straight[0])


# numbers that are none ------------------------------------------------------------------------------------------------


def test_a_bad_update_is_left_out_and_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(Counted, "bad", (2, 4))
    run, metrics = trained(tmp_path)
    told = lines(tmp_path)
    assert [line["step"] for line in told if line["loss"] is None] == [3, 5]
    assert [each["skipped"] for each in metrics][:6] == [0, 0, 1, 0, 1, 0]
    assert run.done
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.state))


def test_too_many_in_a_row_end_the_run_with_the_last_good_state_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(Counted, "bad", (4, 5, 6))
    run = begin(tmp_path)
    good = []
    states = (jax.tree.map(np.array, run.state) for _ in runs.steps(run))
    with pytest.raises(
        MachineError, match=r"Step 6 was number 2 in a row .*\(not finite: .*loss.*lower the rates"
    ):
        good.extend(states)
    assert len(lines(tmp_path)) == 6
    saved = begin(tmp_path)
    assert saved.step == 6
    for kept, before in zip(jax.tree.leaves(saved.state.params), jax.tree.leaves(good[3].params)):
        np.testing.assert_array_equal(kept, before)
        assert np.isfinite(kept).all()


# what is wrong --------------------------------------------------------------------------------------------------------


def untouched(folder):
    return not folder.exists() or not any(folder.iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mesh": MeshConfig(fsdp=3)}, "train.mesh"),
        ({"batch": 3}, "train.batch=3 is not divisible"),
        ({"objective": "dmd"}, "asks a teacher; name a model folder in train.teacher_from"),
        ({"log": ("wandb",)}, r"wandb is not installed; install packforcing-jax\[wandb\]"),
        ({"log": ("jsonnl",)}, "'jsonnl', which is no log; did you mean jsonl?"),
        ({"objective": "forcin"}, "train.objective='forcin' is unknown; did you mean forcing?"),
        ({"source": DataConfig("record")}, "'record' is unknown; did you mean records?"),
        (
            {"objective": "sid", "history": "clean", "teacher_from": "x"},
            "train.history='clean' is none that the objective 'sid' is trained behind; .* memory",
        ),
        ({"generator_from": "/nowhere/model"}, "/nowhere/model does not exist"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_nothing_left_behind(tmp_path, changes, said):
    with pytest.raises(InputError, match=said):
        begin(tmp_path / "run", with_train(**changes))
    assert untouched(tmp_path / "run")


def test_folders_that_cannot_hold_a_run_are_refused(straight, tmp_path):
    (tmp_path / "file").touch()
    for place, said in (
        (tmp_path / "file", "which is a file"),
        (tmp_path / "file" / "run", "which is a file"),
        ("/proc/run", "is not writable"),
        (straight[0].folder / runs.MODEL, "is a model folder"),
    ):
        with pytest.raises(InputError, match=said):
            begin(type(tmp_path)(place))
    (tmp_path / "ended" / runs.MODEL).mkdir(parents=True)
    with pytest.raises(InputError, match="holds a finished model, but no checkpoints"):
        begin(tmp_path / "ended")


def test_another_run_is_not_gone_on_with(tmp_path):
    trained(tmp_path, until=1)
    before = sorted(tmp_path.rglob("*"))
    wider = dataclasses.replace(EXP, dit=dataclasses.replace(EXP.dit, ffn_dim=24))
    for exp, train, seed, said in (
        (EXP, TRAIN, 8, "seed: 7 saved, 8 wanted"),
        (wider, TRAIN, 7, "experiment.dit.ffn_dim: 20 saved, 24"),
        (EXP, with_train(batch=8), 7, "train.batch: 4 saved, 8 wanted"),
    ):
        with pytest.raises(InputError, match=f"belongs to another run .*{said}"):
            begin(tmp_path, train, seed, exp)
    assert sorted(tmp_path.rglob("*")) == before
    assert begin(tmp_path, with_train(steps=20, save_every=5, log_every=2, patience=9)).step == 1


def test_settings_that_may_change_exist():
    flat = checkpoints.settings(runs.about(EXP, TRAIN, 0))
    for name in runs.FREE:
        assert any(f"{each}.".startswith(f"{name}.") for each in flat), name


def test_a_stop_while_a_program_is_compiled_saves_the_step_before_and_loses_nothing(
    straight, tmp_path
):
    asked = threading.Event()
    release = threading.Event()

    def slow(*operands, moves):
        if moves == ("critic",):  # the second program
            asked.set()
            release.wait(30)
        return update(*operands, moves=moves)

    run = runs.start(
        EXP, TRAIN, tmp_path, seed=7, program=dataclasses.replace(PROGRAM, update=slow)
    )
    assert runs.to_compile(run) == 2
    began = time.monotonic()
    try:
        assert [each["step"] for each in runs.steps(run, asked.is_set)] == [1]
    finally:
        release.set()
    runs.finish(run)
    assert time.monotonic() - began < 15
    assert (run.step, run.stopped, run.saved.latest(), runs.to_compile(run)) == (1, True, 1, 1)
    again, _ = trained(tmp_path)
    assert runs.to_compile(again) == 0
    assert lines(tmp_path) == lines(straight[0].folder)


# beside the steps -----------------------------------------------------------------------------------------------------


def test_a_preview_that_fails_is_one_warning(tmp_path, caplog):
    run, _ = trained(tmp_path, with_train(preview_every=6))  # nine parameters draw no video
    assert run.done
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert warnings[0].startswith("no preview step-6.mp4: ")
    assert "\n" not in warnings[0]


def test_the_profiler_is_on_for_its_window(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(
        jax.profiler, "start_trace", lambda folder: heard.append(("on", run.step, folder))
    )
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: heard.append(("off", run.step)))
    run = begin(tmp_path, with_train(profile=(2, 5)))
    list(runs.steps(run))
    assert heard == [("on", 2, str(tmp_path / runs.PROFILE)), ("off", 5)]
    heard.clear()
    run = begin(tmp_path / "short", with_train(profile=(2, 50)))
    list(runs.steps(run))
    assert heard == [("on", 2, str(tmp_path / "short" / runs.PROFILE)), ("off", 11)]


# networks of model folders --------------------------------------------------------------------------------------------


def test_a_generator_begins_as_the_model_of_a_folder(straight, tmp_path):
    run = begin(tmp_path, with_train(generator_from=str(straight[0].folder / runs.MODEL)))
    for path, leaf in run.state.params["generator"].items():
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(
            leaf, straight[0].state.ema[path].astype(jnp.bfloat16).astype(jnp.float32)
        )


def test_a_model_is_written_on_the_line_to_another(straight, tmp_path):
    """Another share asks for another model, but for no step."""
    source = str(straight[0].folder / runs.MODEL)
    folder = tmp_path / "run"
    for share, steps in ((0.25, 11), (0.75, 0)):
        train = with_train(blend_from=source, blend=share)
        assert not runs.finished(EXP, train, folder, seed=8)
        run, metrics = trained(folder, train, seed=8)
        assert (len(metrics), runs.finished(EXP, train, folder, seed=8)) == (steps, True)
        other, made = (
            exports.network(one, run.state.ema, run.mesh)
            for one in (source, str(folder / runs.MODEL))
        )
        for path, leaf in run.state.ema.items():
            apart = other[path] - leaf
            assert np.abs(apart).max() > 1e-2 * np.abs(leaf).max(), path
            np.testing.assert_allclose(made[path], leaf + share * apart, rtol=2**-8, atol=1e-6)


def test_a_model_that_cannot_be_gone_towards_is_refused_before_a_step(straight, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        begin(tmp_path / "run", with_train(blend_from=str(tmp_path / "nowhere"), blend=0.5))
    other = tmp_path / "other"
    model_folder.save(
        other,
        EXP,
        {
            "dit": {
                path.partition("/")[2]: np.ones((*leaf.shape, 2), np.float32)
                for path, leaf in straight[0].state.ema.items()
            }
        },
    )
    with pytest.raises(InputError, match=f"the weights of {other}"):
        begin(tmp_path / "run", with_train(blend_from=str(other), blend=0.5))


def test_what_was_not_trained_is_handed_on(straight, tmp_path):
    """The codec's and the text encoder's files of the first model are in the last one."""
    source = tmp_path / "source"
    model_folder.save(
        source,
        EXP,
        {
            "dit": {
                "head/kernel": np.ones((5, 3), np.float32),
                "head/bias": np.ones(3, np.float32),
            },
            "codec": {"scale": np.full(3, 1 / 3, np.float32)},
        },
        dtype="float32",
    )
    run, _ = trained(tmp_path / "run", with_train(generator_from=str(source), steps=1))
    made = tmp_path / "run" / runs.MODEL / "codec.safetensors"
    assert made.read_bytes() == (source / "codec.safetensors").read_bytes()
    assert not (tmp_path / "run" / runs.MODEL / "text.safetensors").exists()


# recipes --------------------------------------------------------------------------------------------------------------

RECIPE = """
import dataclasses
import test_runs
from packforcing_jax.config import Stage

def stage(name, **changes):
    return Stage(name, test_runs.EXP, test_runs.with_train(**changes))

recipe = (stage("teacher", steps=2), stage("causal-1", steps=3, generator_from="teacher"),
          stage("student", steps=4, generator_from="causal-1", critic_from="teacher"))
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(RECIPE)
    return path


def steps_of(stages):
    return {stage.name: stage.train.steps for stage in stages}


def test_a_setting_changes_every_stage_or_the_one_it_names(recipe):
    assert steps_of(loading.load_recipe(recipe)) == {"teacher": 2, "causal-1": 3, "student": 4}
    assert set(steps_of(loading.load_recipe(recipe, ["train.steps=9"])).values()) == {9}
    overrides = ["train.steps=9", "causal-1:train.steps=7", "student : fps=11"]
    stages = loading.load_recipe(recipe, overrides)
    assert steps_of(stages) == {"teacher": 9, "causal-1": 7, "student": 9}
    assert [stage.experiment.fps for stage in stages] == [5, 5, 11]


def test_an_experiment_is_a_recipe_of_one_stage():
    (stage,) = loading.load_recipe("stage", ["train.steps=3"])
    assert (stage.name, stage.train.steps) == ("", 3)
    assert stage == loading.load_stage("stage", ["train.steps=3"])
    assert stage.experiment == loading.load_experiment("stage")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["studnet:fps=3"], "no stage 'studnet' in this recipe; did you mean student?"),
        ([":fps=3"], "no stage ''"),
        (["teacher:fqs=3"], "unknown key; did you mean fps?"),
    ],
)
def test_settings_of_unknown_stages_are_refused(recipe, overrides, said):
    with pytest.raises(InputError, match=said):
        loading.load_recipe(recipe, overrides)


@pytest.mark.parametrize(
    "text",
    [
        "recipe = ()",
        "recipe = 3",
        "recipe = (Stage('a', 1, t),)",
        "recipe = (Stage('a', e, e),)",
        "recipe = (('a', e),)",
        "recipe = (Stage('a/b', e, t),)",
        "recipe = (Stage('a', e, t), Stage('a', e, t))",
        "recipe = (Stage('', e, t),)",
    ],
)
def test_broken_recipes_are_refused(tmp_path, text):
    (tmp_path / "c.py").write_text(
        "from packforcing_jax.config import Experiment, Stage, TrainConfig\n"
        f"e, t = Experiment(name='e'), TrainConfig()\n{text}\n"
    )
    with pytest.raises(InputError, match=r"c\.py: .*recipe"):
        loading.load_recipe(tmp_path / "c.py")


def test_stages_begin_from_the_models_of_earlier_ones(recipe, tmp_path):
    plan = runs.planned(loading.load_recipe(recipe), tmp_path)
    assert [folder for folder, _ in plan] == [
        tmp_path / name for name in ("teacher", "causal-1", "student")
    ]
    begins = [(stage.train.generator_from, stage.train.critic_from) for _, stage in plan]
    teacher, causal = (str(tmp_path / name / "model") for name in ("teacher", "causal-1"))
    assert begins == [("", ""), (teacher, ""), (causal, teacher)]


@pytest.mark.parametrize(
    ("overrides", "only", "said"),
    [
        (
            ["teacher:train.generator_from=student"],
            None,
            "train.generator_from is student, which is not there",
        ),
        (
            ["train.teacher_from=no/folder"],
            None,
            "train.teacher_from is no/folder, which is not there; run the stage",
        ),
        ([], "student", "causal-1/model, which is not there; run the stage that makes it"),
        ([], "studant", "no stage 'studant' in this recipe; did you mean student?"),
        (
            ["student:train.objective=dmdd"],
            None,
            "train.objective='dmdd' is unknown; did you mean dmd?",
        ),
    ],
)
def test_beginnings_that_do_not_exist_are_refused(recipe, tmp_path, overrides, only, said):
    with pytest.raises(InputError, match=said):
        runs.planned(loading.load_recipe(recipe, overrides), tmp_path / "run", only)


# the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, tmp_path):
    """`packforcing train` on the small program: words -> exit code."""
    start = runs.start
    monkeypatch.setattr(runs, "start", functools.partial(start, program=PROGRAM))

    def run(*words, config=None, out="run"):
        if config is None:
            config = tmp_path / "plain.py"
            config.write_text(
                "import test_runs\nexperiment, train = test_runs.EXP, test_runs.TRAIN\n"
            )
        return main.main(
            ["train", "--config", str(config), "--out", str(tmp_path / out), "--seed", "7", *words]
        )

    return run


def test_a_recipe_is_one_command_and_what_is_done_is_not_done_again(
    command, recipe, tmp_path, capsys
):
    assert command("--json", config=recipe) == 0
    told, said = capsys.readouterr()
    assert json.loads(told)["model"] == str(tmp_path / "run" / "student" / "model")
    assert json.loads(told)["step"] == 4
    assert "there already" not in said
    assert command("--set", "student:train.steps=5", config=recipe) == 0
    told, said = capsys.readouterr()
    assert said.count("is there already") == 2
    assert "goes on behind step 4" in said
    assert [line["step"] for line in lines(tmp_path / "run" / "student")] == [1, 2, 3, 4, 5]
    assert command("--stage", "teacher", "--set", "train.batch=8", config=recipe) == 2
    assert "belongs to another run (train.batch: 4 saved, 8 wanted)" in capsys.readouterr().err


def test_what_a_kill_left_beside_a_finished_model_is_removed_by_the_same_command(
    command, tmp_path, capsys
):
    assert command() == 0
    folder = tmp_path / "run"
    found = sorted(folder.rglob("*"))
    for left in (
        f"{runs.CHECKPOINTS}/{checkpoints.DISCARDED}/9",
        f"{runs.CHECKPOINTS}/12{checkpoints.TEMPORARY}",
        f".{runs.MODEL}-k1{atomic.UNFINISHED}/new",
    ):
        (folder / left).mkdir(parents=True)
    assert command() == 0
    assert "is there already" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == found


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_exits_with_0(
    command, straight, tmp_path, stop, monkeypatch, capsys
):
    advance = runs.advance

    def signalled(run, *rest):
        if run.step == 4:
            os.kill(os.getpid(), stop)
        return advance(run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "advance", signalled)
        assert command() == 0
    assert "stopped behind step 5; the same command goes on from there" in capsys.readouterr().out
    assert not (tmp_path / "run" / runs.MODEL).exists()
    assert command() == 0
    assert f"goes on behind step 5 in {tmp_path / 'run'}" in capsys.readouterr().err
    assert lines(tmp_path / "run") == lines(straight[0].folder)


def test_a_second_signal_interrupts_at_once_and_the_checkpoint_before_stays(
    command, straight, tmp_path, monkeypatch
):
    advance = runs.advance

    def signalled(run, *rest):
        for _ in range(2 * (run.step == 4)):
            os.kill(os.getpid(), signal.SIGINT)
        return advance(run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "advance", signalled)
        assert command() == 130
    assert begin(tmp_path / "run").step == 3
    assert command() == 0
    assert lines(tmp_path / "run") == lines(straight[0].folder)


def test_failures_are_one_sentence_and_a_code(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Counted, "bad", (1, 2))
    assert command() == 3
    assert "Step 3 was number 2 in a row" in capsys.readouterr().err
    (tmp_path / "file").touch()
    for words, said in (
        (("--seed", "-1"), "--seed -1 does not fit"),
        (("--steps", "0"), "train.steps=0"),
        (("--process", "1"), "--coordinator, --processes is missing"),
        (("--stage", "x"), "no stage 'x'"),
        (("--seed", "8"), "seed: 7 saved, 8 wanted"),
    ):
        assert command(*words) == 2, words
        error = capsys.readouterr().err
        assert said in error
        assert "Traceback" not in error
    assert command(out="file") == 2


def test_an_unknown_objective_is_refused_before_anything_is_loaded(
    command, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(runs, "finished", None)
    monkeypatch.setattr(runs, "start", None)
    assert command("--set", "train.objective=forcin") == 2
    assert "did you mean forcing?" in capsys.readouterr().err
    assert untouched(tmp_path / "run")


# the real thing -------------------------------------------------------------------------------------------------------


def real(**changes):
    """The Stage world's clips, and networks that compile fast."""
    cut = dataclasses.replace(
        tiny.EXP.dit, dim=24, heads=2, rope_pairs=None, in_channels=48, out_channels=48
    )
    train = TrainConfig(
        **{"steps": 2, "batch": 2, "trainable": ("dit", "compressor", "text")} | changes
    )
    exp = dataclasses.replace(
        tiny.EXP,
        name="stage",
        dit=cut,
        codec=config.SpaceToDepthConfig(factor=4),
        latent=(8, 8),
        cache=config.CacheConfig(
            block=4, sink=4, recent=4, top=2, capacity=4, score_pool=(4, 1, 1), key_multiple=1
        ),
        compressor=config.CompressorConfig(channels=(5,), strides=((2, 8, 8),)),
        clip=20,
        sample=dataclasses.replace(tiny.EXP.sample, prediction="clean"),
    )
    return exp, train


def test_real_networks_have_a_place_and_are_read_into_it(folder):
    train = TrainConfig(mesh=MeshConfig(fsdp=2))
    grid = runs.mesh.make(train.mesh)
    shapes = runs.abstract(tiny.EXP, train, runs.Program(), 0, grid).params["generator"]
    read = exports.network(str(folder), shapes, grid)
    held = model_folder.opened(folder)
    assert read.keys() == shapes.keys()
    for path, leaf in read.items():
        part, _, name = path.partition("/")
        assert leaf.sharding == shapes[path].sharding
        np.testing.assert_array_equal(leaf, held.part(part)[name].read(), err_msg=path)
    assert any(not leaf.sharding.is_fully_replicated for leaf in read.values())


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, ("latent", "low_res")),
        ({"history": "clean"}, ("latent",)),
        ({"objective": "flow_matching"}, ("latent",)),
        ({"objective": "trajectory"}, ("trajectory", "low_res")),
        ({"objective": "dmd"}, ()),
    ],
)
def test_objectives_say_what_they_read(changes, wanted):
    assert runs.needs(EXP, with_train(**changes)) == wanted


@pytest.mark.slow
def test_real_networks_learn_and_are_begun_from(tmp_path):
    exp, train = real(objective="flow_matching", steps=1, save_every=5)
    run = runs.start(exp, train, tmp_path, seed=3)
    (metrics,) = runs.steps(run)
    runs.finish(run)
    assert metrics["loss"] > 0
    assert model_folder.opened(tmp_path / runs.MODEL).experiment == exp
    shapes = {
        path: leaf for path, leaf in run.state.ema.items() if path.startswith(("dit/", "text/"))
    }
    begun = exports.network(str(tmp_path / runs.MODEL), shapes, run.mesh)
    assert {path.split("/")[0] for path in begun} == {"dit", "text"}
    for path, leaf in begun.items():
        np.testing.assert_array_equal(
            leaf, run.state.ema[path].astype(jnp.bfloat16).astype(jnp.float32), err_msg=path
        )


@pytest.mark.slow
def test_real_networks_are_watched_and_sample_as_a_model(tmp_path, caplog):
    run = runs.start(*real(preview_every=2), tmp_path, seed=3)
    metrics = list(runs.steps(run))
    runs.finish(run)
    assert [each["step"] for each in metrics] == [1, 2]
    assert all(np.isfinite(each["loss"]) for each in metrics)
    assert not caplog.records
    from packforcing_jax.io import video
    from packforcing_jax.sampling import pipeline

    assert video.read(tmp_path / runs.PREVIEWS / "step-2.mp4").shape == (20, 256, 256, 3)
    model = pipeline.Pipeline.from_pretrained(tmp_path / runs.MODEL)
    assert model.experiment == run.exp
    again = runs.start(
        *real(generator_from=str(tmp_path / runs.MODEL), history="clean"), tmp_path / "next", seed=4
    )
    assert {path.split("/")[0] for path in again.state.params["generator"]} == {
        "dit",
        "compressor",
        "text",
    }


OWN = """
import jax.numpy as jnp
import test_runs
from packforcing_jax.config import Objective
from packforcing_jax.training import objectives

def brightness(nets, batch, key, exp, train):
    # flow matching, and a head without a bias
    loss, told = objectives.flow_matching(nets, batch, key, exp, train)
    mean = jnp.abs(nets.generator.dit.head.bias[...]).sum()
    return loss + mean, told | {"mean": mean}

experiment, train = test_runs.real(
    objective=Objective("brightness", brightness, histories=()), generator=test_runs.QUICK
)
"""
QUICK = OptimiserConfig(rate=1e-2, betas=(0.9, 0.99))


def test_an_objective_of_ones_own_trains_from_a_config_file(tmp_path, capsys):
    (tmp_path / "own.py").write_text(OWN)
    words = ["train", "--config", str(tmp_path / "own.py"), "--out", str(tmp_path / "run")]
    assert main.main([*words, "--steps", "1"]) == 0
    assert main.main(words) == 0
    assert "goes on behind step 1" in capsys.readouterr().err
    first, second = lines(tmp_path / "run")
    assert first["mean"] == 0.0  # the head begins with none
    assert second["mean"] == pytest.approx(192 * 1e-2, rel=1e-3)  # Adam: each by the rate
    np.testing.assert_allclose(
        second["loss"], second["mean"] + np.mean(second["loss_by_block"]), rtol=1e-5
    )
    made = json.loads((tmp_path / "run" / runs.MODEL / runs.TRAINING).read_text())
    assert (made["train"]["objective"], made["train"]["steps"]) == ("brightness", 2)
    assert main.main([*words, "--set", "train.objective=flow_matching"]) == 2
    assert '"brightness" saved, "flow_matching" wanted' in capsys.readouterr().err


KILLED = """
import test_runs
experiment, train = test_runs.real(objective="flow_matching", steps=14, save_every=2)
"""


@pytest.mark.slow
def test_a_command_killed_at_five_random_points_is_the_unbroken_one_in_the_end(tmp_path):
    """`kill -9` while it starts, trains and saves: losses and weights equal to the last bit."""
    (tmp_path / "c.py").write_text(KILLED)
    rng = np.random.default_rng(int.from_bytes(os.urandom(2), "big"))
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    killed = []
    assert started(tmp_path, whole).wait(600) == 0
    for point in sorted(rng.choice(13, size=5, replace=False)):
        process = started(tmp_path, broken)
        deadline = time.monotonic() + 600
        while told_of(broken) <= point and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.2))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed.append(told_of(broken))
    assert started(tmp_path, broken).wait(600) == 0
    assert [line["step"] for line in lines(broken)] == list(range(1, 15))
    assert lines(broken) == lines(whole), killed
    for name in ("dit", "compressor", "text"):
        file = f"model/{name}.safetensors"
        assert (broken / file).read_bytes() == (whole / file).read_bytes(), (name, killed)


def started(folder, out):
    """The command in a process group of its own."""
    here = os.path.dirname(__file__)
    alike = {
        "JAX_NUM_CPU_DEVICES": "2",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "PYTHONPATH": f"{here}/..:{here}",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    words = ["train", "--config", str(folder / "c.py"), "--out", str(out), "--seed", "7"]
    with (folder / "said.txt").open("ab") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "packforcing_jax", *words],
            stdout=said,
            stderr=said,
            start_new_session=True,
            env=os.environ | alike,
        )


def told_of(folder):
    """Steps that the log tells of."""
    return (folder / logs.LINES).read_bytes().count(b"\n") if (folder / logs.LINES).exists() else 0
