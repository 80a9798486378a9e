"""`packforcing prepare`: what goes in comes out as a data set, after any interruption too, or is refused."""

import json
import pathlib

import numpy as np
import pytest
import tiny
from packforcing_jax.configs import stage

from packforcing_jax.cli import main, prepare
from packforcing_jax.data import records
from packforcing_jax.io import model_folder, video
from packforcing_jax.training import importing

SAID = [
    "a red disc walks",
    "a lime square walks slowly",
    "a red disc walks",
    "a red disc",
    "a figure walks quickly",
]


def run(*words):
    return main.main(["prepare", *map(str, words)])


def reported(capsys, *words):
    code = run(*words, "--json")
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(SAID))
    return path


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A folder of three videos, the second of them too short."""
    folder = tmp_path_factory.mktemp("films")
    for number, count in enumerate((15, 4, 16)):
        rng = np.random.default_rng(number)
        with video.Writer(folder / f"{number}.mp4", fps=5, size=(8, 16), settings={}) as out:
            out.write(rng.integers(0, 256, (count, 16, 8, 3), np.uint8))
        (folder / f"{number}.txt").write_text(SAID[number])
    return folder


def test_prompts_become_text_states(prompts, folder, tmp_path, capsys):
    code, said = reported(capsys, prompts, "--out", tmp_path / "set", "--weights", folder)
    assert code == 0
    assert (said["kind"], said["examples"], said["left_out"]) == ("prompts", 5, [])
    held = records.opened(tmp_path / "set")
    assert [bytes(held[at]["prompt"]).decode() for at in range(5)] == SAID
    parts = importing.parts_of(tiny.EXP, model_folder.opened(folder))
    whole = np.asarray(parts.text(*parts.tokenizer.encode(SAID)))
    for at in range(5):
        states = held[at]["states"]
        assert np.array_equal(states, whole[at, : len(states)])
        assert len(states) == len(SAID[at].split()) + 1


def test_videos_become_latents_and_those_too_short_are_named(films, folder, tmp_path, capsys):
    assert run(films, "--out", tmp_path / "set", "--weights", folder) == 0
    said = capsys.readouterr()
    assert "left out: " in said.err
    assert "1.mp4 has 4 frames at 5 a second, 15 are needed" in said.err
    assert said.out.startswith(
        "2 examples of latent float16[15, 8, 4, 12], low_res float16[5, 2, 4, 4, 12], prompt uint8"
    )
    held = records.opened(tmp_path / "set")
    assert [bytes(held[at]["prompt"]).decode() for at in range(2)] == [SAID[0], SAID[2]]
    assert set(held[0]) == {"latent", "low_res", "prompt", "states"}
    assert held.notes.about["fps"] == 5
    assert not np.array_equal(held[0]["latent"], held[1]["latent"])


def test_settings_and_limits_are_part_of_what_it_is(films, folder, tmp_path, capsys):
    wanted = (films, "--out", tmp_path / "set", "--weights", folder)
    assert reported(capsys, *wanted, "--limit", 1, "--set", "clip=12")[1]["fields"]["latent"][
        "shape"
    ] == [12, 8, 4, 12]
    assert run(*wanted, "--limit", 1, "--set", "clip=15") == 2
    assert "clip=12, not 15" in capsys.readouterr().err
    assert run(*wanted, "--set", "clip=12") == 2
    assert "holds data made otherwise" in capsys.readouterr().err


def test_the_same_command_goes_on_and_then_has_nothing_to_do(
    prompts, folder, tmp_path, capsys, monkeypatch
):
    wanted = (prompts, "--out", tmp_path / "set", "--weights", folder)
    read = []
    put = records.Writer.put

    def interrupted(writer, example):
        put(writer, example)
        if writer.taken == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(records.Writer, "put", interrupted)
        assert run(*wanted) == 130
    walk = importing.Texts._walk
    monkeypatch.setattr(
        importing.Texts, "_walk", lambda self, new: read.extend(new) or walk(self, new)
    )
    assert run(*wanted) == 0
    assert "3 of 5 items are done already" in capsys.readouterr().err
    assert read == SAID[3:]
    held = records.opened(tmp_path / "set")
    assert [bytes(held[at]["prompt"]).decode() for at in range(5)] == SAID
    assert reported(capsys, *wanted)[1]["examples"] == 5
    assert read == SAID[3:]


def lmdb_of(path, form, prompts):
    lmdb = pytest.importorskip("lmdb")
    latents = np.random.default_rng(1).normal(size=form).astype(np.float16)
    with lmdb.open(str(path), map_size=2**24) as database, database.begin(write=True) as writing:
        writing.put(b"latents_shape", " ".join(map(str, form)).encode())
        for index, prompt in enumerate(prompts):
            writing.put(f"latents_{index}_data".encode(), latents[index].tobytes())
            writing.put(f"prompts_{index}_data".encode(), prompt.encode())
    return path


def test_public_trajectories_come_with_their_timesteps(tmp_path, capsys):
    source = lmdb_of(tmp_path / "base", (2, 3, 20, 48, 8, 8), ["anything", "at all"])
    wanted = (source, "--out", tmp_path / "set", "--config", "stage")
    assert run(*wanted) == 2
    assert (
        "has 3 states from noise to clean, whose timesteps are not given; say them with"
        in capsys.readouterr().err
    )
    assert run(*wanted, "--timesteps", "1000,757,0") == 0
    held = records.opened(tmp_path / "set")
    assert held[1]["trajectory"].shape == (3, 20, 8, 8, 48)
    assert set(held[1]) == {"latent", "low_res", "prompt", "trajectory"}
    assert held.notes.about["timesteps"] == [1000, 757, 0]
    assert held.notes.about["config"] == stage.experiment.name


def damaged_only(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.mp4").write_bytes(b"x")
    (tmp_path / "bad" / "x.txt").write_text("a red disc")


def wrong(words, sentence, make=lambda tmp_path: None):
    return pytest.param(words, sentence, make, id=sentence)


@pytest.mark.parametrize(
    ("words", "sentence", "make"),
    [
        wrong(["none.txt", "--out", "b", "--config", "stage"], "none.txt does not exist"),
        wrong(["p.txt", "--out", "b"], "give --weights MODEL, or --config"),
        wrong(
            ["p.txt", "--out", "b", "--config", "stage"], "preparing prompts needs a text encoder"
        ),
        wrong(
            ["bad", "--out", "b", "--config", "wan_t2v_1_3b"],
            "preparing videos needs a codec",
            damaged_only,
        ),
        wrong(
            ["bad", "--out", "b", "--config", "stage"],
            "none of the 1 items of bad could be",
            damaged_only,
        ),
        wrong(["p.txt", "--out", "p.txt/b", "--config", "stage"], "which is a file"),
        wrong(["p.txt", "--out", ".", "--weights", "W"], "holds other files (p.txt)"),
        wrong(
            ["empty.txt", "--out", "b", "--weights", "W"],
            "empty.txt holds no prompt",
            lambda tmp_path: (tmp_path / "empty.txt").write_text("\n"),
        ),
        wrong(
            ["odd.txt", "--out", "b", "--weights", "W"],
            "word 'zebra' in prompt is not in this model's vocabulary",
            lambda tmp_path: (tmp_path / "odd.txt").write_text("a zebra"),
        ),
        wrong(
            ["p.txt", "--out", "b", "--weights", "W", "--limit", "0"], "--limit 0 is out of range"
        ),
        wrong(
            ["p.txt", "--out", "b", "--weights", "W", "--timesteps", "1,b"],
            "--timesteps 1,b is not a list",
        ),
        wrong(
            ["p.txt", "--out", "b", "--weights", "W", "--timesteps", "0,900"],
            "must fall from at most 1000 to 0",
        ),
        wrong(
            ["p.txt", "--out", "b", "--weights", "W", "--timesteps", "nan"],
            "must fall from at most 1000 to 0",
        ),
        wrong(
            ["p.txt", "--out", "b", "--weights", "W", "--kind", "music"], "invalid choice: 'music'"
        ),
        wrong(
            ["p.txt", "--out", "b", "--weights", "W", "--config", "wan_t2v_1_3b"],
            "has other sizes than --config",
        ),
        wrong(["p.txt", "--weights", "W"], "the following arguments are required: --out"),
    ],
)
def test_what_cannot_be_prepared_is_refused_in_a_sentence(
    words, sentence, make, folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("p.txt").write_text("a red disc")
    make(tmp_path)
    assert run(*[str(folder) if word == "W" else word for word in words]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "b" / records.COMPLETE).exists()


def test_its_kinds_are_those_that_can_be_imported():
    assert set(prepare.KINDS) == set(importing.KINDS)
    assert {need for kind in importing.KINDS.values() for need in kind.needs} <= set(prepare.NEEDED)


def test_a_word_outside_the_vocabulary_is_told_before_anything_is_written(folder, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join([*SAID, "a red zeppelin"]))
    out = tmp_path / "set"
    assert run(path, "--out", out, "--weights", folder) == 2
    assert "zeppelin" in capsys.readouterr().err
    assert not out.exists()


def test_a_source_of_which_nothing_can_be_prepared_leaves_nothing(folder, tmp_path, capsys):
    (tmp_path / "x.mp4").write_bytes(b"no video")
    (tmp_path / "x.txt").write_text("a red disc")
    out = tmp_path / "set"
    assert run(tmp_path, "--kind", "videos", "--out", out, "--weights", folder) == 2
    assert "none of the 1 items" in capsys.readouterr().err
    assert not out.exists()


def test_values_that_are_not_finite_are_left_out_by_name(folder, tmp_path, capsys, monkeypatch):
    broken = [
        importing.Item(
            f"clip {number}", "a red disc", lambda parts, text, value=value: {"latent": value}
        )
        for number, value in enumerate((np.ones(4, np.float16), np.full(4, np.nan, np.float16)))
    ]
    (tmp_path / "p.txt").write_text("a red disc")
    kind = importing.KINDS["prompts"]
    monkeypatch.setitem(
        importing.KINDS, "prompts", importing.Kind(kind.sees, lambda path: broken, kind.needs, "")
    )
    out = tmp_path / "set"
    assert run(tmp_path / "p.txt", "--out", out, "--weights", folder) == 0
    assert "left out: clip 1: 4 of 4 values of latent are not finite" in capsys.readouterr().err
    assert len(records.opened(out)) == 1
