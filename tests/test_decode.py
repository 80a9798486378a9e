"""Settings come back from plain data as they were, whatever their fields hold; one set of rules judges all of it."""

import dataclasses
import json
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packforcing_jax import config
from packforcing_jax.config import (
    DiTConfig,
    Experiment,
    Objective,
    SpaceToDepthConfig,
    TrainConfig,
    VAEConfig,
    decode,
    loading,
)
from packforcing_jax.errors import InputError
from packforcing_jax.io import model_folder


@dataclass(frozen=True)
class Score:
    """A policy: it has a name."""

    name: str
    power: float = 2.0


@dataclass(frozen=True)
class Inner:
    size: int = 3
    share: float | None = None


@dataclass(frozen=True)
class Wide:
    size: int = 4
    places: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Outer:
    """One field of every sort."""

    text: str = "a"
    score: str | Score = "sum"
    inner: Inner = Inner()
    either: Inner | Wide = Inner()
    maybe: Wide | None = None
    pair: tuple[int, float] = (1, 2.0)


@dataclass(frozen=True)
class Woven:
    """A codec of a user's own, of the channels that `Experiment` wants."""

    time_factor = 1
    space_factor = 8
    depth: int = 16
    shifts: tuple[float, ...] = (0.5,)

    @property
    def z_dim(self) -> int:
        return self.depth


@dataclass(frozen=True)
class OtherDiT(DiTConfig):
    """A base model of a user's own."""

    turns: int = 2


def back(settings, **how):
    return decode.from_json(type(settings), decode.to_json(settings), "here.json", **how)


@given(
    st.builds(
        Outer,
        text=st.text(),
        score=st.text(),
        inner=st.builds(Inner, st.integers(), st.none() | st.floats(allow_nan=False)),
        either=st.builds(Inner, st.integers())
        | st.builds(
            Wide,
            st.integers(),
            st.lists(st.tuples(st.integers(), st.floats(allow_nan=False))).map(tuple),
        ),
        maybe=st.none() | st.builds(Wide),
        pair=st.tuples(st.integers(), st.floats(allow_nan=False)),
    )
)
def test_settings_come_back_as_they_were(settings):
    assert back(settings) == settings
    assert hash(back(settings)) == hash(settings)


def test_a_member_of_a_union_says_which_and_nothing_else_does():
    table = decode.encode(Outer(either=Wide(), maybe=Wide()))
    assert table["either"]["kind"] == "Wide"
    assert "kind" not in table["inner"]
    assert "kind" not in table["maybe"]
    assert "kind" not in table


def test_a_policy_is_written_by_its_name_and_read_as_that_name():
    settings = Outer(score=Score("fourth", power=4.0))
    assert decode.encode(settings)["score"] == "fourth"
    assert back(settings) == dataclasses.replace(settings, score="fourth")


def test_a_policy_that_is_given_as_a_value_stays_one_unless_it_is_set():
    settings = Outer(score=Score("fourth"))
    assert decode.override(settings, ["text=b"]).score == Score("fourth")
    assert decode.override(settings, ["score=sum"]).score == "sum"
    with pytest.raises(InputError, match=r"score is a single value, not a group"):
        decode.override(settings, ["score.power=3"])


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("inner.share", "2", 2.0),
        ("inner.share", "None", None),
        ("pair", "(3, 4)", (3, 4.0)),
        ("either.size", "9", 9),
    ],
)
def test_what_is_set_and_what_is_read_are_of_one_type(key, text, value):
    """A whole number becomes the float that its field holds, so that 5 and 5.0 are the same setting."""
    outer, _, last = key.rpartition(".")
    found = decode.override(Outer(), [f"{key}={text}"])
    group = getattr(found, outer) if outer else found
    assert repr(getattr(group, last)) == repr(value)
    assert repr(back(found)) == repr(found)


@pytest.mark.parametrize(
    ("key", "value"),
    [("text", 3), ("score", 3), ("inner.size", "3"), ("inner.size", True), ("pair", [1])],
)
def test_json_and_set_refuse_with_the_same_words(key, value):
    table = json.loads(decode.to_json(Outer()))
    *outer, last = key.split(".")
    (table[outer[0]] if outer else table)[last] = value
    with pytest.raises(InputError) as read:
        decode.from_json(Outer, json.dumps(table), "here.json")
    assert f"here.json: {key}={value!r}: {key} must be " in str(read.value)
    if isinstance(value, str) or key in ("text", "score"):
        return  # any text is a text
    with pytest.raises(InputError) as set_:
        decode.override(Outer(), [f"{key}={value}"])
    assert str(set_.value).partition(": ")[2] == str(read.value).partition(f"{value!r}: ")[2]


def test_half_a_literal_is_refused_without_a_warning(recwarn):
    for value in ("1if 1else 2", "0or 1", "'\\d'"):
        with pytest.raises(InputError, match="must be"):
            decode.override(Experiment("e"), [f"fps={value}"])
    assert not recwarn.list


def test_annotations_that_do_not_resolve_are_one_sentence():
    odd = dataclasses.make_dataclass("Odd", [("size", "NoSuchType", 3)], frozen=True)
    with pytest.raises(InputError, match="annotations of Odd do not resolve .*NoSuchType"):
        decode.encode(odd())


# Classes that the package does not know


OWN = Experiment("own", codec=Woven(), dit=OtherDiT())  # type: ignore[arg-type]


def test_a_class_of_ones_own_is_written_by_its_name():
    table = decode.encode(OWN)
    assert table["codec"] == {"kind": "Woven", "depth": 16, "shifts": [0.5]}
    assert (table["dit"]["kind"], table["dit"]["turns"]) == ("OtherDiT", 2)
    for codec, kind in ((VAEConfig(), "vae"), (SpaceToDepthConfig(), "space_to_depth")):
        assert decode.encode(codec, VAEConfig | SpaceToDepthConfig)["kind"] == kind


def test_it_is_read_where_the_class_is_known_and_else_refused_with_what_to_do(tmp_path):
    known = decode.classes_in(OWN)
    assert {Woven, OtherDiT} <= set(known)
    assert back(OWN, known=known) == OWN
    text = decode.to_json(OWN)
    with pytest.raises(InputError, match=r"here.json: dit\.kind='OtherDiT' .*give --config FILE"):
        model_folder.experiment_from_json(text, "here.json")
    model_folder.save(tmp_path / "model", OWN, {})
    with pytest.raises(InputError, match=r"config.json: dit\.kind='OtherDiT'"):
        _ = model_folder.opened(tmp_path / "model").experiment
    assert model_folder.opened(tmp_path / "model", known).experiment == OWN


def test_a_class_of_ones_own_is_set_by_its_own_fields():
    found = loading.override(OWN, ["codec.shifts=(1, 2)", "dit.turns=5"])
    assert (found.codec, found.dit.turns) == (Woven(shifts=(1.0, 2.0)), 5)  # type: ignore[union-attr]


# Training beside the experiment


def test_a_model_folder_of_an_earlier_version_says_what_to_do():
    table = decode.encode(Experiment("old")) | {"train": {"steps": 3}}
    with pytest.raises(
        InputError, match=r"m/config.json: the table `train` .* delete it from the file\."
    ):
        model_folder.experiment_from_json(json.dumps(table), "m/config.json")


def test_an_objective_is_written_by_its_name():
    own = Objective("mine", print)  # type: ignore[arg-type]
    assert decode.encode(TrainConfig(objective=own))["objective"] == "mine"
    assert hash(TrainConfig(objective=own)) == hash(TrainConfig(objective=own))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train.step=3", "--set train.step: unknown key; did you mean train.steps?"),
        ("train.cover.gab=3", "did you mean train.cover.gap?"),
        ("train=3", "train is a group; set one of train.objective"),
        ("train", "train is a group"),
        ("train.cover=3", "train.cover is a group; set one of train.cover.sinks"),
        ("train.steps.now=3", "train.steps is a single value"),
        ("train.steps=soon", "train.steps must be int"),
        ("tran.steps=3", "did you mean train?"),
        ("train.", "has no value"),
        ("train.=3", "unknown key"),
    ],
)
def test_keys_of_training_are_refused_like_all_others(text, said):
    with pytest.raises(InputError) as raised:
        loading.load_stage("stage", [text])
    assert said in str(raised.value)


def test_a_command_that_does_not_train_refuses_settings_of_training():
    with pytest.raises(
        InputError, match=r"--set train\.steps=3: train\.\* are settings of `packforcing train`"
    ):
        loading.load_experiment("stage", ["train.steps=3"])
    assert loading.load_stage("stage", ["train.steps=3", "fps=5"]).experiment.fps == 5


def test_a_train_that_is_none_is_refused(tmp_path):
    path = tmp_path / "c.py"
    path.write_text(
        "from packforcing_jax.config import Experiment\n"
        "experiment, train = Experiment('e'), {'steps': 3}\n"
    )
    with pytest.raises(InputError, match=r"c\.py: `train` must be a TrainConfig"):
        loading.load_stage(path)


@pytest.mark.parametrize("name", loading.names())
def test_the_settings_of_every_config_come_back(name):
    for stage in loading.load_recipe(name):
        assert back(stage.experiment) == stage.experiment
        assert back(stage.train) == stage.train
    assert isinstance(loading.load_stage(name).train, config.TrainConfig)
