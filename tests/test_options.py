"""Experiments are found by path or name, changed by `--set`, and what is unknown is refused by its nearest name."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packforcing_jax.config import (
    CacheConfig,
    DiTConfig,
    Experiment,
    SpaceToDepthConfig,
    choices,
    loading,
)
from packforcing_jax.errors import InputError

SMALL = Experiment(
    name="small",
    dit=DiTConfig(dim=36, ffn_dim=50, heads=3, layers=2, in_channels=27, out_channels=27),
    codec=SpaceToDepthConfig(factor=3),
    latent=(10, 18),
)


def changed(*overrides):
    return loading.override(SMALL, overrides)


def test_nothing_set_changes_nothing():
    assert changed() == SMALL


def test_overrides_reach_every_depth_and_leave_the_rest():
    got = changed("cache.top=8", "fps=24", "dit.rope_pairs=(2, 2, 2)", "name=other")
    assert got == dataclasses.replace(
        SMALL,
        name="other",
        fps=24,
        cache=dataclasses.replace(SMALL.cache, top=8),
        dit=dataclasses.replace(SMALL.dit, rope_pairs=(2, 2, 2)),
    )


def test_combinations_are_judged_together_and_not_one_by_one():
    with pytest.raises(InputError, match="whole blocks of 3"):
        changed("cache.block=3")
    got = changed("cache.block=3", "cache.sink=9", "cache.recent=6").cache
    assert (got.block, got.sink, got.recent) == (3, 9, 6)


def test_the_last_of_two_equal_keys_wins():
    assert changed("fps=5", "fps=7").fps == 7


def test_the_codec_keeps_its_kind():
    got = changed("codec.factor=5", "dit.in_channels=75", "dit.out_channels=75")
    assert got.codec == SpaceToDepthConfig(factor=5)
    with pytest.raises(InputError, match="unknown key"):
        changed("codec.num_res_blocks=1")


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("sample.steps=900,400", "steps", (900, 400)),
        ("sample.steps=[900, 400]", "steps", (900, 400)),
        ("sample.shift=3", "shift", 3),
        (" sample.shift = 2.5 ", "shift", 2.5),
        ("sample.prediction=clean", "prediction", "clean"),
        ("sample.prediction='clean'", "prediction", "clean"),
    ],
)
def test_values_are_literals_or_plain_words(text, key, value):
    assert getattr(changed(text).sample, key) == value


def test_a_name_that_looks_like_a_number_stays_text():
    assert changed("name=2024").name == "2024"


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("cach.top=3", "did you mean cache?"),
        ("cache.topp=3", "did you mean cache.top?"),
        ("dit.head=3", "did you mean dit.heads?"),
        ("qqq=3", "known: "),
        ("=3", "known: "),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(text, nearest):
    with pytest.raises(InputError, match="unknown key") as raised:
        changed(text)
    assert nearest in str(raised.value)
    if nearest == "known: ":
        assert all(field.name in str(raised.value) for field in dataclasses.fields(Experiment))


@pytest.mark.parametrize(
    "text",
    [
        "cache.top=many",
        "cache.top=2.5",
        "cache.top=True",
        "cache.top=",
        "latent=6",
        "latent=(6,)",
        "latent=(6, 10, 3)",
        "sample.steps=('a', 3)",
        "compressor.strides=((2, 1),)",
        "dit.rope_pairs=soon",
        "sample.shift=[5]",
    ],
)
def test_a_value_of_the_wrong_type_names_key_and_type(text):
    key = text.split("=")[0]
    with pytest.raises(InputError, match="must be") as raised:
        changed(text)
    assert text in str(raised.value)
    assert f"{key} must be" in str(raised.value)


def test_groups_and_single_values_are_not_confused():
    with pytest.raises(InputError, match="cache is a group; set one of cache.block, cache.sink"):
        changed("cache=paper")
    with pytest.raises(InputError, match="fps is a single value"):
        changed("fps.rate=3")
    with pytest.raises(InputError, match="fps has no value; write it as --set fps=VALUE"):
        changed("fps")


def test_sentences_of_the_configs_pass_through():
    with pytest.raises(InputError, match=r"dit.dim=37 is not divisible by heads=3"):
        changed("dit.dim=37")


@given(st.integers(min_value=0, max_value=128))
def test_what_is_set_is_what_comes_out(top):
    assert changed(f"cache.top={top}").cache == dataclasses.replace(CacheConfig(), top=top)


@given(st.text(max_size=12))
def test_any_text_is_a_value_or_an_input_error(text):
    for key, kind in (("name", str), ("fps", int), ("latent", tuple)):
        try:
            got = changed(f"{key}={text}")
        except InputError:
            continue
        assert type(getattr(got, key)) is kind


def test_an_experiment_is_found_by_name_and_by_path(tmp_path):
    by_name = loading.load_experiment("wan_t2v_1_3b")
    assert loading.load_experiment(loading.CONFIGS / "wan_t2v_1_3b.py") == by_name
    own = tmp_path / "mine.py"
    own.write_text(
        "from packforcing_jax.config import Experiment\nexperiment = Experiment(name='mine', fps=9)\n"
    )
    assert loading.load_experiment(str(own), ["fps=11"]) == Experiment(name="mine", fps=11)


def test_an_unknown_experiment_names_the_nearest():
    with pytest.raises(InputError, match="no experiment 'wan_t2v_13b'.*did you mean wan_t2v_1_3b"):
        loading.load_experiment("wan_t2v_13b")
    with pytest.raises(InputError, match="no experiment '/nowhere/wan_t2v_14b.py'"):
        loading.load_experiment("/nowhere/wan_t2v_14b.py")


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("experiment = 3\n", "defines no `experiment"),
        ("", "defines no `experiment"),
        ("experiment = (\n", "does not run"),
        ("import no_such_module_anywhere\n", "does not run"),
        ("from packforcing_jax.config import CacheConfig\nCacheConfig(block=0)\n", "cache.block=0"),
    ],
)
def test_a_file_that_gives_no_experiment_is_named(tmp_path, source, sentence):
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(InputError) as raised:
        loading.load_experiment(path)
    assert sentence in str(raised.value)


@pytest.mark.parametrize(("old", "new"), list(choices.RENAMED.items()))
def test_a_key_of_an_earlier_version_is_told_by_its_name_of_today(old, new):
    with pytest.raises(InputError, match=f"called {new} now"):
        loading.load_stage("stage", [f"{old}=1"])
