"""A teacher of other sizes than the student's scores its clips, with weights, places and figures of its own."""

import dataclasses
import functools
import json

import folders
import jax
import jax.numpy as jnp
import meshed
import numpy as np
import pytest
import tiny

from packforcing_jax import pytrees
from packforcing_jax.cli import main
from packforcing_jax.config import (
    WAN_NEGATIVE_PROMPT,
    DataConfig,
    DistilConfig,
    MeshConfig,
    OptimiserConfig,
    TrainConfig,
    loading,
)
from packforcing_jax.errors import InputError
from packforcing_jax.io import checkpoints, model_folder, text_encoder
from packforcing_jax.networks import mesh
from packforcing_jax.plan import formulas, training_budget
from packforcing_jax.training import exports, rollout, runs, state, teachers
from packforcing_jax.training.batches import Batch

BLOCKS = 2
EXP = rollout.for_training(
    dataclasses.replace(
        tiny.EXP,
        dit=dataclasses.replace(tiny.EXP.dit, layers=1),
        sample=dataclasses.replace(tiny.EXP.sample, steps=(1000, 400)),
        clip=3 * BLOCKS,
    ),
    BLOCKS,
    0,
)
DEEP = dataclasses.replace(EXP.dit, layers=3)
WIDE = dataclasses.replace(EXP.dit, dim=48, heads=4, layers=2, rope_pairs=None)
MOVES = OptimiserConfig(rate=1e-3, betas=(0.9, 0.99))
TRAIN = TrainConfig(
    objective="dmd",
    steps=2,
    batch=2,
    save_every=1,
    generator=MOVES,
    compressor=MOVES,
    critic=MOVES,
    distil=DistilConfig(critic_updates=1, guidance=2.0),
    source=DataConfig(kind="records"),
    negative_prompt="",
)
BOTH = ("generator", "critic")
IDENTITY = ("attn/o", "cross/o", "ffn_out")  # a layer that adds nothing where these are zero
NEGATIVE = "blue"  # a word of the Stage world, whose encoder the folders hold


def with_train(**changes):
    return dataclasses.replace(TRAIN, **changes)


def of_sizes(dit):
    return dataclasses.replace(EXP, dit=dit)


def flat(dit, seed):
    """The parameters of a teacher of these sizes."""
    return pytrees.flatten({"dit": tiny.filled(tiny.nets(of_sizes(dit)).dit, seed)})


def longer(params):
    """The same teacher behind two more layers that leave everything as it is."""
    rng = np.random.default_rng(9)

    def more(path, leaf):
        if not path.startswith("dit/blocks/"):
            return leaf
        still = any(f"/{name}/" in path for name in IDENTITY)
        added = np.zeros((2, *leaf.shape[1:])) if still else rng.normal(size=(2, *leaf.shape[1:]))
        return jnp.concatenate([leaf, jnp.asarray(added, leaf.dtype)])

    return {path: more(path, leaf) for path, leaf in params.items()}


update = tiny.jit(state.update, static_argnames=("exp", "train", "moves"))


@functools.cache
def begun():
    """The state that all steps here begin with; its critic is not the teacher."""
    given = {
        "generator": pytrees.flatten(
            {"dit": tiny.nets(EXP).dit, "compressor": tiny.nets(EXP).compressor}
        ),
        "critic": flat(EXP.dit, 4),
    }
    return tiny.jit(lambda: state.init(EXP, TRAIN, jax.random.key(1), given))()


def two_steps(params, train):
    """The state after two steps with this teacher, and the metrics of both."""
    now = begun()
    metrics = []
    for step in range(2):
        batch = Batch(text=tiny.normal(20 + step, 1, 2, 9, EXP.dit.text_dim))
        key = jax.random.key(30 + step)
        now, one = update(now, {"teacher": params, "codec": {}}, batch, key, EXP, train, moves=BOTH)
        metrics.append({name: np.asarray(value) for name, value in one.items()})
    return now, metrics


def program(params, train):
    """A step as it goes to the compiler."""
    batch = Batch(text=tiny.normal(20, 1, 2, 9, EXP.dit.text_dim))
    given = {"teacher": params, "codec": {}}, batch, jax.random.key(30), EXP, train
    return update.lower(begun(), *given, moves=BOTH).as_text()


@pytest.fixture(scope="module")
def equal():
    """Two steps with a teacher of the student's sizes, as they always were."""
    return two_steps(flat(EXP.dit, 3), TRAIN)


def losses(metrics):
    return np.asarray([[one[f"{network}/loss"] for network in BOTH] for one in metrics])


# two steps against the path of equal sizes ----------------------------------------------------------------------------


def test_a_teacher_whose_sizes_are_named_and_equal_is_the_same_program_bit_for_bit():
    """So both steps are, whatever the weights."""
    plain, named = (program(flat(EXP.dit, 3), with_train(teacher=dit)) for dit in (None, EXP.dit))
    assert plain == named
    assert plain != program(flat(DEEP, 3), with_train(teacher=DEEP))


@pytest.mark.slow
def test_layers_that_add_nothing_change_no_loss(equal):
    now, metrics = two_steps(longer(flat(EXP.dit, 3)), with_train(teacher=DEEP))
    np.testing.assert_allclose(losses(metrics), losses(equal[1]), rtol=1e-5)
    assert jax.tree.structure(now) == jax.tree.structure(equal[0])  # the student has not grown


@pytest.mark.slow
def test_a_wider_and_deeper_teacher_pulls_elsewhere(equal):
    _, metrics = two_steps(flat(WIDE, 3), with_train(teacher=WIDE))
    own, others = losses(metrics), losses(equal[1])
    assert np.isfinite(own).all()
    assert np.abs(own[:, 0] / others[:, 0] - 1).min() > 1e-3


# runs from folders ----------------------------------------------------------------------------------------------------


class Drawn:
    """Endless batches of text states, each a function of its number."""

    def __init__(self, rows):
        self.rows = rows
        self.next = 0

    def __next__(self):
        rng = np.random.default_rng(self.next)
        self.next += 1
        shape = self.rows, EXP.text.max_words, EXP.text.dim
        return {"states": rng.normal(size=shape).astype(np.float32)}

    def get_state(self):
        return {"next": self.next}

    def set_state(self, told):
        self.next = told["next"]


PROGRAM = runs.Program(batches=lambda exp, source, share, **_: Drawn(share.batch))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a model of the student's sizes and of a wider teacher."""
    base = tmp_path_factory.mktemp("models")
    return {
        name: str(folders.write_model_folder(base / name, of_sizes(dit)))
        for name, dit in (("student", EXP.dit), ("wide", WIDE))
    }


@pytest.fixture(scope="module")
def taught(models):
    return with_train(
        generator_from=models["student"],
        critic_from=models["student"],
        teacher_from=models["wide"],
        negative_prompt=NEGATIVE,
    )


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Runs that do the same share their programs."""
    whole = runs.ahead
    kept = {}

    def ahead(run, *operands):
        key = run.train, *operands[-2:]
        if key not in kept:
            kept[key] = whole(run, *operands)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "ahead", ahead)
        yield


def begin(folder, train):
    return runs.start(EXP, train, folder, seed=7, program=PROGRAM)


def trained(folder, train, until=None):
    run = begin(folder, train)
    metrics = list(runs.steps(run, lambda: run.step == until))
    run.saved.close()
    return run, [
        {name: value for name, value in one.items() if name not in runs.TIMES} for one in metrics
    ]


@pytest.fixture(scope="module")
def straight(taught, tmp_path_factory):
    return trained(tmp_path_factory.mktemp("straight"), taught)


def test_a_run_takes_the_teachers_sizes_from_its_folder(straight, models):
    run, metrics = straight
    assert run.train.teacher == WIDE
    held = model_folder.opened(models["wide"]).part("dit")
    for path, leaf in run.frozen["teacher"].items():
        np.testing.assert_array_equal(leaf, held[path.removeprefix("dit/")].read(), err_msg=path)
    assert run.state.params["critic"]["dit/head/kernel"].shape[0] == EXP.dit.dim
    assert np.isfinite([one["generator/loss"] for one in metrics]).all()


def test_a_run_with_it_that_was_stopped_goes_on_bit_for_bit(straight, taught, tmp_path):
    _, first = trained(tmp_path, taught, until=1)
    run, second = trained(tmp_path, taught)
    assert [one["step"] for one in first + second] == [1, 2]
    for one, other in zip(first + second, straight[1], strict=True):
        for name, value in other.items():
            np.testing.assert_array_equal(one[name], value, err_msg=name)
    named = checkpoints.named(run.state)
    for path, leaf in checkpoints.named(straight[0].state).items():
        np.testing.assert_array_equal(named[path], leaf, err_msg=path)


def test_a_run_with_it_is_gone_on_with_by_no_other_sizes_and_no_other_text(
    straight, taught, models
):
    folder = straight[0].folder
    with pytest.raises(InputError, match="train.negative_prompt"):
        begin(folder, dataclasses.replace(taught, negative_prompt="red"))
    with pytest.raises(InputError, match="train.teacher"):
        begin(folder, dataclasses.replace(taught, teacher_from=models["student"]))


def test_each_device_reads_its_part_of_the_teacher(taught, models):
    train = teachers.sized(EXP, dataclasses.replace(taught, mesh=MeshConfig(fsdp=2)))
    grid = mesh.make(train.mesh)
    found = runs.others(EXP, train, grid)["teacher"]
    held = model_folder.opened(models["wide"]).part("dit")
    for path, leaf in found.items():
        assert leaf.sharding.spec == mesh.spec(path, leaf.shape, grid)
        np.testing.assert_array_equal(leaf, held[path.removeprefix("dit/")].read(), err_msg=path)
    divided = [not leaf.sharding.is_fully_replicated for leaf in found.values()]
    assert sum(divided) > 10


# what does not fit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [("text_dim", 11), ("text_len", 18), ("patch", (1, 1, 1)), ("in_channels", 11)],
)
def test_a_teacher_that_reads_other_clips_or_text_is_refused_by_name_and_value(name, value):
    train = with_train(teacher=dataclasses.replace(WIDE, **{name: value}))
    with pytest.raises(InputError) as refused:
        teachers.require_fits(EXP, train)
    assert f"dit.{name}={value} differs from tiny's" in str(refused.value)


def other_folder(path, **changes):
    """A folder that holds settings alone: what does not fit is refused before weights are looked at."""
    path.mkdir()
    exp = dataclasses.replace(of_sizes(WIDE), **changes)
    (path / model_folder.CONFIG).write_text(model_folder.experiment_to_json(exp))
    return str(path)


def test_what_cannot_be_taught_is_refused_before_weights_are_read(taught, tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "network", None)
    clean = dataclasses.replace(EXP.sample, prediction="clean")
    wide = other_folder(tmp_path / "wide")
    for changes, said in (
        ({"teacher_from": wide, "critic_from": ""}, "name a model folder of the generator's sizes"),
        (
            {"teacher_from": other_folder(tmp_path / "clean", sample=clean)},
            "predicts clean, and tiny velocity",
        ),
        (
            {"teacher_from": wide, "teacher": DEEP},
            "of 48 channels in 2 layers, and train.teacher asks for 36 channels in 3 layers",
        ),
        (
            {"teacher_from": wide, "objective": "consistency"},
            "looks back through the generator's memory",
        ),
    ):
        with pytest.raises(InputError, match=said):
            begin(tmp_path / "run", dataclasses.replace(taught, **changes))
        assert not (tmp_path / "run").exists()


def test_a_mesh_has_to_divide_the_teachers_heads_too():
    grid = training_budget.described(with_train(mesh=MeshConfig(tensor=3)), 3)
    mesh.check(EXP, with_train(batch=3), grid)
    with pytest.raises(InputError, match="the teacher has 4 heads, which .* 3 does not divide"):
        mesh.check(EXP, with_train(batch=3, teacher=WIDE), grid)


# the text that guidance moves away from -------------------------------------------------------------------------------


def test_the_negative_prompt_is_read_once_by_the_runs_encoder_and_moves_the_loss(
    straight, taught, tmp_path, monkeypatch
):
    read = []
    call = text_encoder.Encoder.__call__
    monkeypatch.setattr(
        text_encoder.Encoder,
        "__call__",
        lambda self, ids, mask: read.append(len(ids)) or call(self, ids, mask),
    )
    states = exports.null_text(EXP, taught)
    assert read == [1]
    np.testing.assert_array_equal(straight[0].frozen["null_text"], states)
    assert np.abs(states).max() > 1e-3
    assert exports.null_text(EXP, dataclasses.replace(taught, negative_prompt="")) is None
    untold = begin(tmp_path, taught)
    assert read == [1, 1]  # once a run
    untold.frozen = {**untold.frozen, "null_text": np.zeros_like(states)}
    other = next(runs.steps(untold))["generator/loss"]
    assert abs(float(straight[1][0]["generator/loss"]) / float(other) - 1) > 1e-5


@pytest.mark.parametrize("name", loading.names())
def test_full_size_configs_guide_with_wans_prompt_and_the_closed_vocabulary_with_none(name):
    stages = loading.load_recipe(name)
    guides = {
        stage.train.negative_prompt
        for stage in stages
        if stage.train.objective in ("dmd", "sid", "consistency", "trajectory")
    }
    assert guides <= {WAN_NEGATIVE_PROMPT if name.startswith("wan") else ""}


# rates ----------------------------------------------------------------------------------------------------------------

ADAM = {"kind": "adamw", "betas": (0.0, 0.999), "decay": 0.01, "clip": 10.0, "rate": 2e-6}
PUBLISHED = {
    "wan_t2v_1_3b_dmd_paper": {
        "steps": 3000,
        "batch": 8,
        "shift": 5.0,
        "ema": 0.99,
        "ema_from": 40,
        "ema_grows": False,
        "teacher": None,
        "generator": ADAM,
        "compressor": ADAM,
        "critic": ADAM | {"rate": 1e-6},
        "distil": {"critic_updates": 5, "guidance": 3.0, "form": "extra"},
    },
    "wan_t2v_1_3b_dmd_self_forcing": {
        "steps": 600,
        "batch": 64,
        "shift": 5.0,
        "ema": 0.99,
        "ema_from": 40,
        "ema_grows": False,
        "teacher": {"dim": 5120, "ffn_dim": 13824, "heads": 40, "layers": 40},
        "generator": ADAM,
        "critic": ADAM | {"rate": 4e-7},
        "distil": {
            "critic_updates": 5,
            "guidance": 3.0,
            "form": "extra",
            "score_shift": 8.0,
            "noised_context": True,
            "finished": False,
            "gradient": "leak",
            "min_timestep": 20.0,
            "max_timestep": 980.0,
        },
    },
    "wan_t2v_1_3b_dmd": {
        "steps": 3000,
        "batch": 8,
        "shift": 5.0,
        "ema": 0.99,
        "ema_from": 40,
        "teacher": None,
        "generator": ADAM,
        "compressor": ADAM | {"rate": 1e-4, "warmup": 20},
        "critic": ADAM | {"rate": 4e-7},
        "distil": {"critic_updates": 5, "guidance": 3.0, "form": "extra"},
    },
    "wan_t2v_1_3b_sid": {
        "ema": 0.99,
        "ema_from": 40,
        "generator": ADAM | {"decay": 0.0},
        "critic": ADAM | {"rate": 2e-6, "decay": 0.0},
        "distil": {"critic_updates": 5, "alpha": 1.0, "guidance": 3.0},
    },
}


def values(settings, wanted):
    """Those of the settings that are asked for, in the form they are asked in."""
    return {
        name: values(getattr(settings, name), value)
        if isinstance(value, dict)
        else getattr(settings, name)
        for name, value in wanted.items()
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_rates_are_those_of_their_sources(name):
    stage = loading.load_stage(name)
    assert values(stage.train, PUBLISHED[name]) == PUBLISHED[name]
    assert stage.train.negative_prompt == WAN_NEGATIVE_PROMPT
    frames = 21 if name.endswith("self_forcing") else 20
    assert stage.experiment.clip == frames


def test_self_forcings_average_is_a_copy_after_40_updates_and_then_keeps_99_in_100():
    train = loading.load_stage("wan_t2v_1_3b_dmd_self_forcing").train
    now = begun()
    ema = {"x": np.float32(1.0)}
    for step, expected in ((0, 3.0), (195, 3.0), (200, 0.99 * 1.0 + 0.01 * 3.0), (595, 1.02)):
        state_then = dataclasses.replace(now, ema=ema, step=jnp.int32(step))
        found = state.averaged(train, state_then, {"x": jnp.float32(3.0)})
        assert float(found["x"]) == pytest.approx(expected, rel=1e-6)


def test_the_teacher_of_14b_is_the_14b_config_and_all_else_is_the_students():
    big, small = (loading.load_stage(f"wan_t2v_1_3b_dmd{end}") for end in ("_14b", ""))
    teacher = loading.load_experiment("wan_t2v_14b").dit
    assert big.train == dataclasses.replace(small.train, teacher=teacher)
    assert big.experiment == dataclasses.replace(small.experiment, name="wan_t2v_1_3b_dmd_14b")
    teachers.require_fits(big.experiment, big.train)


# what it takes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", [None, WIDE, DEEP])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 1), (1, 2, 3, 1)])
def test_a_teacher_lies_and_costs_by_its_own_sizes(teacher, sizes):
    grid = training_budget.described(with_train(mesh=MeshConfig(*sizes)), int(np.prod(sizes)))
    train = with_train(teacher=teacher)
    own = teacher or EXP.dit
    places = mesh.shardings(teachers.shapes(EXP, train), grid)
    placed = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=places[path])
        for path, leaf in teachers.shapes(EXP, train).items()
    }
    share = formulas.transformer_share(own, sizes[1], sizes[2])
    assert training_budget.device_bytes(placed) == 4 * share
    assert share >= formulas.transformer_share(own, 1, 1) / np.prod(sizes[1:3])


def test_a_teacher_of_14b_over_eight_devices_is_counted_as_its_formulas_say():
    stage = loading.load_stage("wan_t2v_1_3b_dmd_14b", ["train.mesh.fsdp=8"])
    rows = training_budget.rows(stage, 8)
    counted = {name: row.counted for name, row in rows.items()}
    assert [row.name for row in rows.values() if not row.ok] == []
    equal_share = 14_288_491_584 * 2 / 8
    assert equal_share <= counted["training/teacher"] <= 1.003 * equal_share
    parts = ("generator", "average of the generator", "moments of the generator", "critic")
    parts += ("moments of the critic", "teacher", "codec", "negative prompt")
    counters = 8
    assert counted["training/held"] == counters + sum(counted[f"training/{part}"] for part in parts)
    one, own = (counted[f"step/one score by the {who}"] for who in ("teacher", "critic"))
    assert counted["step/the teacher's scores"] == 2 * one
    assert 5 < one / own < 7
    per_step = counted["step/the teacher's scores"] / 5
    assert counted["step/on average"] == pytest.approx(
        counted["step/update of the critic"] + counted["step/update of the generator"] / 5
    )
    assert counted["step/share of the teacher's scores"] == pytest.approx(
        per_step / counted["step/on average"]
    )


SETTINGS = "from test_teacher import EXP as experiment, TRAIN as train\n"


def test_plan_shows_training_over_devices_beside_the_rest(tmp_path, capsys):
    path = tmp_path / "taught.py"
    path.write_text(SETTINGS)
    words = ["plan", "--config", str(path), "--blocks", "3"]
    assert main.main([*words, "--devices", "2", "--set", "train.mesh.fsdp=2", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert figures["training/devices"]["counted"] == 2
    teacher = figures["training/teacher"]
    assert teacher["counted"] == teacher["formula"] == 4 * formulas.transformer_share(EXP.dit, 2, 1)
    assert main.main([*words, "--devices", "2"]) == 0
    out = capsys.readouterr().out
    assert "training, held on each device" in out
    assert "operations of one step of training" in out
    assert max(map(len, out.splitlines())) <= 120
    assert main.main(words) == 0
    assert "training" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "train.mesh.fsdp=8"], "with --devices N alone"),
        (["--devices", "0"], "--devices 0 is out of range"),
        (["--devices", "8", "--set", "train.mesh.tensor=8"], "has 12 heads"),
        (["--devices", "3"], "train.batch=8 is not divisible"),
    ],
)
def test_plan_refuses_devices_that_cannot_be(words, said, capsys):
    assert main.main(["plan", "--config", "wan_t2v_1_3b_dmd_14b", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_what_plan_says_is_held_is_what_the_compiler_says_each_of_eight_devices_is_given():
    """The arguments of an update, by XLA's own account, with a teacher three times as deep."""
    sizes = (1, 2, 2, 2)
    teacher = {"dim": 48, "layers": 3}
    found = meshed.told(
        meshed.child(objective="dmd", teacher=teacher, compile=True, meshes=[sizes])
    )
    compiled, planned = found[sizes]
    assert compiled == planned


@pytest.mark.slow
def test_a_larger_teacher_over_eight_devices_teaches_what_it_teaches_on_one():
    one, eight, three = (1, 1, 1, 1), (1, 8, 1, 1), (1, 2, 2, 2)
    teacher = {"dim": 48, "layers": 3}
    found = meshed.told(
        meshed.child(objective="dmd", steps=2, teacher=teacher, meshes=[one, eight, three]),
        patience=1800,
    )
    assert meshed.apart(found[one], found[eight]) < 1e-5
    assert meshed.apart(found[one], found[three]) < 1e-5
