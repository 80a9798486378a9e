import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from packforcing_jax import config, pytrees
from packforcing_jax.cli import main
from packforcing_jax.config import loading
from packforcing_jax.errors import InputError
from packforcing_jax.evaluation import recall, stage_figures
from packforcing_jax.evaluation.stage_figures import Sampling
from packforcing_jax.io import checkpoints
from packforcing_jax.sampling import pipeline
from packforcing_jax.stage import captions, data, oracle, stories, world
from packforcing_jax.training import batches, state

TINY = """
from packforcing_jax import config
experiment = config.Experiment(
    name="stage", latent=(8, 8), clip=20, fps=8, codec=config.SpaceToDepthConfig(factor=4),
    dit=config.DiTConfig(dim=24, ffn_dim=40, heads=2, layers=2, text_dim=16, text_len=16, freq_dim=12, in_channels=48,
                         out_channels=48, rope_pairs=(2, 2, 2)),
    text=config.TextConfig(vocab=46, dim=16, dim_attn=16, dim_ffn=24, heads=2, layers=1, max_words=16),
    compressor=config.CompressorConfig(channels=(6, 7, 8, 9)),
    cache=config.CacheConfig(top=3, capacity=6, score_pool=(4, 1, 1), key_multiple=1),
    sample=config.SampleConfig(steps=(1000, 600, 250), prediction="clean"),
)
"""
SEED = 7


@pytest.fixture(scope="module")
def exp():
    found: dict = {}
    exec(TINY, found)
    return found["experiment"]


@pytest.fixture(scope="module")
def model(exp):
    """An untrained model of the stage, whose frames are too faint to be clipped."""
    built = jax.jit(lambda key: batches.new_model(exp, key))(jax.random.key(3))
    head = built.nets.dit.head
    head.kernel = nnx.Param(0.15 * head.kernel[...])
    return pipeline.Pipeline.of(exp, built.nets, built.text, captions.reader())


def clip(guests, *, scenes=None, seed=0):
    return world.draw_story(np.random.default_rng(seed), len(guests), guests=guests, scenes=scenes)


def repainted(story, **changes):
    """The perfect reading of a story, with fields changed."""
    return dataclasses.replace(stage_figures.true_reading(story), **changes)


# Truth and scores


@pytest.mark.parametrize("seed", range(4))
def test_the_true_reading_is_what_the_oracle_reads(seed):
    story = data.draw_clip(np.random.default_rng(seed))
    seen = oracle.read(world.render(story))
    true = stage_figures.true_reading(story)
    for field in dataclasses.fields(oracle.Reading):
        np.testing.assert_allclose(
            getattr(seen, field.name), getattr(true, field.name), atol=2e-2, err_msg=field.name
        )


def test_perfect_readings_score_one_everywhere(exp):
    told = [data.draw_clip(np.random.default_rng(i)) for i in range(9)]
    rows = stage_figures.teacher_figures(
        exp, [stage_figures.true_reading(story) for story in told], told
    )
    for name, row in rows.items():
        value, low, high = row["value"]
        if name.endswith("RMS error"):
            assert (value, low, high) == (0, 0, 0)
        else:
            assert value == high == 1, name
            assert low < 1
            assert 0 <= row["chance"] < 1
        assert row["n"] > 0


def test_chance_levels_are_those_of_uniform_draws(exp):
    told = [data.draw_clip(np.random.default_rng(i)) for i in range(9)]
    rows = stage_figures.teacher_figures(
        exp, [stage_figures.true_reading(story) for story in told], told
    )
    wanted = {
        "colour": 1 / 8,
        "shape": 1 / 4,
        "backdrop": 1 / 8,
        "scene": 1 / 4,
        "position": 1 / 4,
        "guest identity": 1 / 9,
        "subject's mark": 1 / 16,
        "guest there or not": 1 / 2,
        "called-back guest, packed only": 1 / 16,
        "hue RMS error": 36 / math.sqrt(6),
    }
    assert {name: rows[name]["chance"] for name in wanted} == pytest.approx(wanted)


def test_readings_of_another_story_score_near_chance(exp):
    told = [data.draw_clip(np.random.default_rng(i)) for i in range(60)]
    others = [
        stage_figures.true_reading(data.draw_clip(np.random.default_rng(1000 + i)))
        for i in range(60)
    ]
    rows = stage_figures.teacher_figures(exp, others, told)
    for name in ("colour", "backdrop", "subject's mark", "position"):
        _, low, high = rows[name]["value"]
        assert low < rows[name]["chance"] < high, name
    assert rows["hue RMS error"]["value"][0] == pytest.approx(
        rows["hue RMS error"]["chance"], rel=0.15
    )


def test_the_first_block_does_not_count_and_wrong_frames_count_by_share(exp):
    story = clip([-1, 2, -1, -1])
    mark = np.full(16, story.mark)
    mark[:4] = (story.mark + 1) % 16
    assert (
        stage_figures.teacher_figures(exp, [repainted(story, mark=mark)], [story])[
            "subject's mark"
        ]["value"][0]
        == 1
    )
    mark[4:7] = (story.mark + 1) % 16
    row = stage_figures.teacher_figures(exp, [repainted(story, mark=mark)], [story])[
        "subject's mark"
    ]
    assert row["value"][0] == pytest.approx(9 / 12)
    assert row["n"] == 1


def test_rms_errors_are_in_the_units_of_the_world(exp):
    story = clip([-1, -1, 5])
    true = stage_figures.true_reading(story)
    rows = stage_figures.teacher_figures(
        exp, [repainted(story, hue=true.hue + 3, gain=true.gain - 0.1)], [story]
    )
    assert rows["hue RMS error"]["value"][0] == pytest.approx(3, rel=1e-4)
    assert rows["gain RMS error"]["value"][0] == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize(
    ("sink", "packed", "places"),
    [
        (8, 2, ["sink", "sink", "packed", "packed", "recent"]),
        (0, 4, ["packed", "packed", "packed", "packed", "recent"]),
    ],
)
def test_call_backs_are_sorted_by_where_the_memory_has_them(exp, sink, packed, places):
    told = [
        clip([3 if block == shown else 6, *[6] * 4, 3], seed=shown) for shown, block in ((0, 0),)
    ]
    told += [
        clip([*([1] * shown), 3, *([1] * (4 - shown)), 3], seed=shown) for shown in range(1, 5)
    ]
    changed = dataclasses.replace(exp, cache=dataclasses.replace(exp.cache, sink=sink))
    wrong = repainted(told[2], guest_mark=np.full(24, -1))
    readings = [
        wrong if i == 2 else stage_figures.true_reading(story) for i, story in enumerate(told)
    ]
    rows = stage_figures.teacher_figures(changed, readings, told)
    for block, place in enumerate(places):
        row = rows[f"called-back guest, block {block} ({place})"]
        assert row["n"] == 1
        assert row["value"][0] == (block != 2)
    assert rows["called-back guest, packed only"]["n"] == packed
    assert rows["called-back guest, packed only"]["value"][0] == pytest.approx(1 - 1 / packed)


def test_a_guest_also_seen_sharply_is_not_packed_only(exp):
    told = [clip([3, -1, 3, -1, 3]), clip([-1, -1, 3, -1, 3])]
    rows = stage_figures.teacher_figures(
        exp, [stage_figures.true_reading(story) for story in told], told
    )
    assert rows["called-back guest, packed only"]["n"] == 1
    assert rows["called-back guest, block 2 (packed)"]["n"] == 2


def test_the_right_mark_on_the_wrong_guest_is_not_recall(exp):
    story = clip([-1, -1, 3, -1, 3])
    rows = stage_figures.teacher_figures(exp, [repainted(story, guest=np.full(20, 4))], [story])
    assert rows["called-back guest, packed only"]["value"][0] == 0


# Videos: those that sampling makes, whatever the memory and the number formats

HALF = ["dtypes.cache=bfloat16", "dtypes.compute=bfloat16"]
HOST = ["cache.archive=host", "cache.scope=shared", "cache.timing=late"]
SETTINGS = {
    "default": [],
    "bfloat16": HALF,
    "host": HOST,
    "incremental": ["cache.rope_adjustment=incremental"],
}
BLOCKS = 9  # the ring of packed blocks turns over


def video(i):
    """Prompts of a video, and who it is."""
    prompts = stories.default_timeline(SEED + i, BLOCKS)
    return prompts, {"seeds": [SEED + i], "videos": [pipeline.video_id(prompts[0])]}


@pytest.fixture(scope="module")
def free(model):
    """Two videos of nine blocks, made together."""
    prompts = [stories.default_timeline(SEED + i, BLOCKS) for i in range(2)]
    ids = [pipeline.video_id(each[0]) for each in prompts]
    frames, chosen = stage_figures.play(model, prompts, seeds=[SEED, SEED + 1], videos=ids)
    return prompts, ids, frames, chosen


@pytest.mark.parametrize("name", SETTINGS)
def test_a_video_is_the_one_that_sampling_makes_bit_for_bit(model, free, name):
    changed = model.with_settings(SETTINGS[name])
    prompts, who = video(0)
    alone = list(changed.stream(prompts, seed=SEED))
    wanted = np.concatenate([block.frames for block in alone])
    chosen = np.stack([block.block_ids for block in alone])
    frames, found = stage_figures.play(changed, [prompts], **who)
    np.testing.assert_array_equal(frames[0], wanted)
    np.testing.assert_array_equal(found[:, :, 0], chosen)
    assert abs(wanted).max() < 1  # nothing was clipped: the true frames hold all of the latents
    forced, found = stage_figures.play(changed, [prompts], **who, truth=frames)
    np.testing.assert_array_equal(forced[0], wanted)
    np.testing.assert_array_equal(found[:, :, 0], chosen)
    if name == "bfloat16":
        assert abs(wanted - free[2][0]).max() > 1e-3, "float32 figures"


@pytest.mark.parametrize("name", ["default", "host"])
def test_videos_made_together_are_those_made_alone(model, free, name):
    """Up to rounding: where matrices are higher, sums are added up in another order."""
    changed = model.with_settings(SETTINGS[name])
    prompts, ids, frames, chosen = free
    if name != "default":
        frames, chosen = stage_figures.play(changed, prompts, seeds=[SEED, SEED + 1], videos=ids)
    for i in range(2):
        alone = list(changed.stream(prompts[i], seed=SEED + i))
        wanted = np.concatenate([block.frames for block in alone])
        np.testing.assert_allclose(frames[i], wanted, atol=1e-5)
        np.testing.assert_array_equal(
            chosen[:, :, i], np.stack([block.block_ids for block in alone])
        )


def test_blocks_before_the_first_one_only_look_back(model, free):
    prompts, ids, frames, chosen = free
    seeds = [SEED, SEED + 1]
    last, found = stage_figures.play(model, prompts, seeds=seeds, videos=ids, truth=frames, first=7)
    assert found.shape == (2, 2, 2, 3)
    np.testing.assert_array_equal(found, chosen[7:])
    np.testing.assert_allclose(last, frames[:, 28:], atol=2e-4)


def test_another_history_changes_what_is_drawn_behind_it_but_not_before(model, free):
    prompts, ids, frames, _ = free
    changed = frames.copy()
    changed[1, 8:12] = 0.9 - changed[1, 8:12]
    forced, _ = stage_figures.play(
        model, prompts, seeds=[SEED, SEED + 1], videos=ids, truth=changed
    )
    np.testing.assert_allclose(forced[0], frames[0], atol=2e-4)
    np.testing.assert_allclose(forced[1, :12], frames[1, :12], atol=2e-4)
    assert abs(forced[1, 12:16] - frames[1, 12:16]).max() > 1e-3


# Whole evaluations of an untrained model


def same(a, b):
    return json.dumps(a) == json.dumps(b)


def test_teacher_forcing_an_untrained_model(model):
    result = stage_figures.teacher_forced(model, clips=2, sampling=Sampling(SEED, 2))
    assert list(result["sections"]) == ["sink of 8 frames", "sink of 0 frames"]
    for rows in result["sections"].values():
        assert rows["valid frames"]["value"][0] == 0
        assert rows["colour"]["n"] == 2
        assert all(name in stage_figures.table(result) for name in rows)
    assert same(result, stage_figures.teacher_forced(model, clips=2, sampling=Sampling(SEED, 2)))
    assert not same(
        result, stage_figures.teacher_forced(model, clips=2, sampling=Sampling(SEED + 1, 2))
    )


def test_rolling_out_an_untrained_model(model):
    counted = []

    def watch(parts):
        counted.append(len(parts))
        return parts

    result = stage_figures.rollout(model, videos=2, blocks=31, sampling=Sampling(SEED, 2, watch))
    assert (result["videos"], result["frames"], counted) == (2, 124, [1])
    assert result["windows"]["valid"]["last"][0] == 0
    assert "last window" in stage_figures.table(result)
    assert any(name.startswith("recall guest") for name in result["whole"])


def test_what_cannot_be_evaluated_is_refused(model):
    with pytest.raises(InputError, match="batch=0"):
        stage_figures.rollout(model, videos=2, blocks=3, sampling=Sampling(batch=0))
    with pytest.raises(InputError, match="0 videos"):
        stage_figures.teacher_forced(model, clips=0)
    other = dataclasses.replace(
        model, experiment=dataclasses.replace(model.experiment, latent=(10, 8), name="wide")
    )
    with pytest.raises(InputError, match="'wide' draws no stage videos"):
        stage_figures.rollout(other)


# Models on disk, and the program


@pytest.fixture(scope="module")
def run(exp, tmp_path_factory):
    """The folder of a training run with checkpoints 9 and 10; the average of the newer one is twice the other's."""
    folder = tmp_path_factory.mktemp("run")
    now = state.init(exp, config.TrainConfig(), jax.random.key(0), {})
    saved = checkpoints.Checkpoints(folder / "checkpoints")
    saved.save(9, now)
    saved.save(10, now.replace(ema=jax.tree.map(lambda x: 2 * x, now.ema)))
    saved.close()
    return folder, now


def listing(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_average_of_the_newest_checkpoint_is_read_and_the_run_left_alone(exp, run):
    folder, now = run
    before = listing(folder)
    assert stage_figures.newest(folder).name == "10"
    model = stage_figures.of_checkpoint(exp, config.TrainConfig(), stage_figures.newest(folder))
    read = pytrees.flatten(model.nets.dit)
    for path, leaf in now.ema.items():
        if not path.startswith("dit/"):
            continue
        name = path.removeprefix("dit/")
        rest = name.removeprefix("blocks/")
        held = (
            read[name] if rest == name else np.stack([read[f"blocks/{i}/{rest}"] for i in range(2)])
        )
        np.testing.assert_array_equal(held, 2 * leaf)
    assert listing(folder) == before


def test_a_run_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no checkpoint"):
        stage_figures.newest(tmp_path)


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(TINY)
    return str(path)


def test_the_program_evaluates_a_run(run, tiny, capsys):
    words = [
        "evaluate",
        "--run",
        str(run[0]),
        "--config",
        tiny,
        "--blocks",
        "2",
        "--videos",
        "1",
        "--json",
    ]
    assert main.main(words) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert (result["mode"], result["videos"], result["frames"]) == ("rollout", 1, 8)
    assert result["seed"] == stage_figures.HELD_OUT
    assert "checkpoints/10" in err


def test_the_program_evaluates_half_precision_and_the_host_archive(run, tiny, capsys):
    words = ["--run", str(run[0]), "--config", tiny, "--mode", "forced", "--gaps", "3", "--json"]
    overrides = [word for each in HALF + HOST for word in ("--set", each)]
    assert main.main(["evaluate", *words, "--videos", "1", "--ways", "affinity", *overrides]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["videos"] == 1
    assert "(cpu), bfloat16, attention" in err


@pytest.mark.parametrize(
    ("mode", "module", "function", "videos"),
    [
        ("teacher", stage_figures, "teacher_forced", {"clips": 48}),
        ("rollout", stage_figures, "rollout", {"videos": 64, "blocks": 12}),
        (
            "forced",
            recall,
            "forced",
            {"videos": 32, "gaps": (4, 9), "ways": recall.variants_of("recency,all-fit")},
        ),
    ],
)
def test_flags_reach_the_evaluation(run, tiny, capsys, monkeypatch, mode, module, function, videos):
    asked = {}

    def stand_in(model, *ways, **settings):
        asked.update(settings, cache=model.experiment.cache)
        asked.update(zip(("ways",), ways))
        return {"mode": mode, "videos": 0, "sections": {}}

    monkeypatch.setattr(module, function, stand_in)
    monkeypatch.setattr(stage_figures, "table", lambda result: f"table of {result['mode']}")
    words = [
        "--run",
        str(run[0]),
        "--config",
        tiny,
        "--memory",
        "no-mid",
        "--set",
        "cache.sink=4",
        "--ways",
        "recency,all-fit",
    ]
    assert (
        main.main(
            ["evaluate", *words, "--mode", mode, "--seed", "5", "--blocks", "12", "--gaps", "4,9"]
        )
        == 0
    )
    assert capsys.readouterr().out == f"table of {mode}\n"
    assert asked.pop("cache") == dataclasses.replace(
        loading.load_experiment(tiny).cache, top=0, capacity=0, sink=4
    )
    sampling = asked.pop("sampling")
    assert callable(sampling.watch)
    assert (sampling.seed, sampling.batch) == (5, 16)
    assert asked == videos


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--config", "stage"], "--config goes with --run"),
        (
            ["--run", "nowhere", "--memory", "no-mod"],
            "--memory no-mod is unknown; choose one of paper",
        ),
        (["--run", "nowhere"], "nowhere holds no checkpoint"),
        (["--weights", "nowhere"], "nowhere does not exist"),
        (["--gaps", "2,x"], "--gaps 2,x is not a list"),
        (["--ways", "recensy"], "--ways recensy: no such way to choose; did you mean recency"),
        (["--seed", "-1"], "--seed -1 is out of range"),
        (["--weights", "a", "--run", "b"], "not allowed with"),
        (["--mode", "guess"], "invalid choice: 'guess'"),
    ],
)
def test_bad_flags_end_with_code_2_and_one_sentence(capsys, words, sentence):
    assert main.main(["evaluate", *words]) == 2
    assert sentence in capsys.readouterr().err


def test_captions_of_held_out_clips_are_understood(model):
    story = data.draw_clip(np.random.default_rng((stage_figures.HELD_OUT, 0)))
    sentences = [captions.caption(story, block) for block in range(5)]
    texts, which = stage_figures.read_texts(model, [sentences, sentences[::-1]])
    assert [len(kv.k) for kv in texts] == [len(set(sentences))] * 2
    np.testing.assert_array_equal(which[0], which[1][::-1])
    alone = model.text_kv([sentences[3]])
    for kv, one in zip(texts, alone, strict=True):
        np.testing.assert_array_equal(kv.k[which[0, 3]], one.k[0])
        np.testing.assert_array_equal(kv.v[which[0, 3]], one.v[0])
