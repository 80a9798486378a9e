"""Settings that cannot be drawn are refused before anything is traced, and those that are accepted draw."""

import dataclasses
import json
from pathlib import Path

import pytest
import tiny
import toys

from packforcing_jax import config
from packforcing_jax.cli import main
from packforcing_jax.config import decode, limits
from packforcing_jax.errors import InputError, shown

REFUSED = Path(__file__).with_name("settings_refused.txt").read_text().splitlines()


def said(capsys, *words):
    assert main.main(["plan", "--config", "stage", "--json", *words]) == 2
    out, err = capsys.readouterr()
    sentence = json.loads(out)["error"]
    assert err == f"packforcing: {sentence}\n"
    return sentence


@pytest.mark.parametrize("setting", REFUSED)
def test_a_setting_that_cannot_be_drawn_is_refused_in_one_sentence_with_key_and_value(
    setting, capsys, monkeypatch
):
    from packforcing_jax.plan import budget

    monkeypatch.setattr(budget, "of", None)  # nothing is traced
    sentence = said(capsys, "--set", setting)
    key = setting.partition("=")[0].strip(".")
    assert key.rpartition(".")[2] in sentence
    assert len(sentence) < 600
    assert any(sign in sentence for sign in (";", "did you mean", "set one of"))


@pytest.mark.parametrize(
    ("setting", "remedy"),
    [
        ("dit.heads=0", "dit.heads=0 is out of range; give a whole number from 1 to 1,024."),
        ("dit.freq_dim=63", "dit.freq_dim=63 must be even"),
        ("top=8", "--set top: unknown key; did you mean cache.top?"),
        ("dit.score_pool=(1,1,1)", "did you mean cache.score_pool?"),
        ("heads=3", "did you mean dit.heads or text.heads?"),
        ("cache.spare=3", "--set cache.spare: the key is gone"),
        ("compressor.pool=(2,8,8)", "needs (2, 2); make pool smaller"),
        ("cache.block=2", "score_pool=(4, 1, 1) does not fit"),
    ],
)
def test_the_sentence_names_what_is_wrong_and_what_to_give(setting, remedy, capsys):
    assert remedy in said(capsys, "--set", setting)


@pytest.mark.parametrize("text", ["9" * 4200, "9" * 5000, "(" * 50_000, "[" * 300 + "]" * 300])
def test_long_numbers_and_deep_nesting_are_refused_in_a_short_sentence(text, capsys):
    assert len(said(capsys, "--set", f"dit.layers={text}")) < 500
    assert len(said(capsys, "--set", f"{text}=1")) < 800


def test_a_number_that_python_does_not_spell_has_a_sentence_too():
    with pytest.raises(InputError, match=r"cache\.top=a int too long to print is out of range"):
        config.CacheConfig(top=10**6000)
    assert len(shown(10**4000)) < 150


@pytest.mark.parametrize(
    ("group", "within"),
    [
        (config.DiTConfig, limits.DIT),
        (config.VAEConfig, limits.VAE),
        (config.SpaceToDepthConfig, limits.SPACE_TO_DEPTH),
        (config.TextConfig, limits.TEXT),
        (config.CacheConfig, limits.CACHE),
        (config.CompressorConfig, limits.COMPRESSOR),
        (config.SampleConfig, limits.SAMPLE),
        (config.OptimiserConfig, limits.OPTIMISER),
        (config.MeshConfig, limits.MESH),
        (config.DataConfig, limits.DATA),
        (config.CoverConfig, limits.COVER),
        (config.DistilConfig, limits.DISTIL),
        (config.TrainConfig, limits.TRAIN),
    ],
)
def test_every_number_of_a_group_has_limits(group, within):
    """A new field cannot be forgotten."""
    numbers = {
        field.name
        for field in dataclasses.fields(group)
        if any(kind in str(field.type) for kind in ("int", "float"))
        and "Config" not in str(field.type)
    }
    assert numbers == set(within)


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ({"mesh": config.MeshConfig(data=-1)}, "train.mesh.data=-1"),
        ({"critic": config.OptimiserConfig(rate=float("nan"))}, "train.critic.rate=nan"),
        ({"cover": config.CoverConfig(sinks=(0, -4))}, r"train.cover.sinks=\(0, -4\)"),
        ({"distil": config.DistilConfig(guidance=float("inf"))}, "train.distil.guidance=inf"),
        ({"source": config.DataConfig(limit=-1)}, "train.source.limit=-1"),
        ({"steps": 10**12}, "train.steps=1000000000000"),
    ],
)
def test_numbers_of_training_are_refused_by_the_key_that_sets_them(setting, key):
    with pytest.raises(InputError, match=f"{key} is out of range; give"):
        config.TrainConfig(**setting)


def accepted(seeds):
    """(changes, experiment) of the random toy settings that are accepted."""
    for seed in seeds:
        changes = toys.changes(seed)
        try:
            exp = toys.experiment(changes)
            toys.whole(exp)
        except InputError:
            continue
        yield changes, exp


def test_accepted_random_settings_can_be_traced():
    tried = list(accepted(range(90)))[:12]
    assert len(tried) == 12
    for changes, exp in tried:
        frames = toys.traced(exp)
        assert len(frames) == 5, changes


def test_accepted_random_settings_draw_a_block():
    for changes, exp in list(accepted(range(100, 110)))[:2]:
        assert toys.is_finite(toys.draw(exp)), changes


def test_the_toy_itself_is_accepted():
    assert toys.experiment([]) == tiny.EXP


@pytest.mark.parametrize("text", ["[" * 100_000, '{"fps": ' + "9" * 5000 + "}", "{", "\x00"])
def test_settings_in_a_file_that_is_no_json_are_refused_in_a_sentence(text):
    with pytest.raises(
        InputError, match="config.json (is not JSON|cannot be read as JSON)"
    ) as raised:
        decode.from_json(config.Experiment, text, "config.json")
    assert len(str(raised.value)) < 400
