"""Method bidirectional: a clip at once by UniPC with guidance, from Stage weights, by hand, and at the command line."""

import dataclasses
import hashlib
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from packforcing_jax import config, methods
from packforcing_jax.cli.main import main
from packforcing_jax.errors import InputError
from packforcing_jax.io import video
from packforcing_jax.methods.method import applied
from packforcing_jax.networks import codec, dit
from packforcing_jax.sampling import block_step, schedules, unipc, whole_clip
from packforcing_jax.sampling.pipeline import Pipeline, video_id

RED = "in scene one a red disc walks slowly before the moss curtain"
BLUE = RED.replace("red", "blue")
THREE = "sample.steps=(1000, 700, 400)"


@pytest.fixture(scope="module")
def model():
    return Pipeline.from_pretrained(method="bidirectional", overrides=[THREE])


def latent_of(model, *settings, prompt=RED, blocks=2, **noise):
    stream = model.with_settings(settings).stream([prompt] * blocks, **noise)
    return np.concatenate([block.latent for block in stream])


# The clip


def test_a_clip_of_stage_weights_is_made_whole(model):
    blocks = list(model.stream([RED] * 5, seed=3))
    assert [(block.index, block.prompt, block.state) for block in blocks] == [
        (index, RED, None) for index in range(5)
    ]
    latent = np.concatenate([block.latent for block in blocks])
    frames = np.concatenate([block.frames for block in blocks])
    assert (latent.shape[0], frames.shape) == (20, (20, 32, 32, 3))
    whole = codec.decode(model.vae, jnp.asarray(latent)[None])[0]
    np.testing.assert_array_equal(frames, whole)
    np.testing.assert_array_equal(frames, model.generate([RED] * 5, seed=3))


def test_a_clip_is_the_solver_along_the_network_from_the_noise_of_seed_and_video(model):
    """The same by hand: a Python loop over steps, from the noise with which blocks begin."""
    exp = model.experiment
    ids = jnp.asarray([video_id(RED)], jnp.uint32)
    noise = [block_step.step_noise(exp.step, jnp.uint32([3]), ids, i, 0) for i in range(2)]
    states = model.text(*model.tokenizer.encode([RED]))
    solver = unipc.UniPC(3, exp.sample.shift)
    state = unipc.init(jnp.concatenate(noise, axis=1))
    for index in range(3):
        times = jnp.full((1, 8), solver.timesteps[index], jnp.float32)
        clean = dit.bidirectional(model.nets.dit, state.latent, times, states)
        velocity = schedules.velocity_from_clean(state.latent, clean, solver.sigmas[index])
        state = unipc.step(solver, state, velocity, index)
    assert exp.sample.prediction == "clean"
    np.testing.assert_allclose(latent_of(model, seed=3), state.latent[0], atol=2e-4)


def test_seed_and_video_decide_and_every_frame_sees_every_other(model):
    ours = latent_of(model, seed=3)
    np.testing.assert_array_equal(ours, latent_of(model, seed=3))
    for other in (
        latent_of(model, seed=4),
        latent_of(model, seed=3, identity=7),
        latent_of(model, seed=3, prompt=BLUE),
        latent_of(model, seed=3, blocks=3)[:8],  # the first frames see the last ones
    ):
        assert np.abs(ours - other).max() > 1e-3


def test_a_program_is_compiled_once_whatever_seed_prompt_and_guidance(model):
    guided = model.with_settings(["sample.guidance=2"])
    latent_of(guided)
    before = whole_clip.denoise_program._cache_size()
    latent_of(guided, prompt=BLUE, seed=9)
    latent_of(model, "sample.guidance=3", f"sample.negative_prompt={BLUE}")
    assert whole_clip.denoise_program._cache_size() == before


# Guidance


def text_of(guidance, negative):
    """States of a prompt, and of a negative one."""
    return whole_clip.text_of(
        config.SampleConfig(guidance=guidance, negative_prompt=negative),
        tiny.normal(1, 1, 5, 10),
        lambda prompt: tiny.normal(len(prompt), 1, 5, 10),
    )


def velocity(text, prediction="velocity"):
    cfg = whole_clip.ClipConfig(unipc.UniPC(4, 3.0), prediction, "reference", "float32")
    noisy, model = tiny.normal(2, 1, 6, 8, 4, 12), tiny.apart().dit
    return tiny.jit(lambda text: whole_clip.velocity(model, cfg, text, noisy, jnp.int32(1)))(text)


@pytest.mark.parametrize("prediction", ["velocity", "clean"])
def test_guidance_moves_away_from_the_negative_prompt(prediction):
    guided = text_of(4.0, "ugly")
    alone = [
        velocity(whole_clip.Text(states, None, jnp.float32(1)), prediction)
        for states in (guided.states, guided.negative)
    ]
    conditional, unconditional = alone
    by_hand = unconditional + 4 * (conditional - unconditional)
    np.testing.assert_allclose(velocity(guided, prediction), by_hand, atol=1e-4)
    assert np.abs(by_hand - conditional).max() > 1e-2


def test_without_a_negative_prompt_guidance_moves_away_from_no_text():
    text = text_of(4.0, "")
    assert text.negative.shape == text.states.shape
    assert not text.negative.any()
    assert text_of(1.0, "ugly").negative is None


def test_guidance_of_one_is_none_bit_for_bit(model):
    plain = latent_of(model)
    np.testing.assert_array_equal(
        latent_of(model, "sample.guidance=1", f"sample.negative_prompt={BLUE}"), plain
    )
    asked = velocity(dataclasses.replace(text_of(4.0, "ugly"), guidance=jnp.float32(1)))
    np.testing.assert_allclose(asked, velocity(text_of(1.0, "")), atol=1e-5)


def test_another_negative_prompt_is_another_clip(model):
    clips = [
        latent_of(model, "sample.guidance=2", f"sample.negative_prompt={negative}")
        for negative in ("", BLUE, "red")
    ]
    for ours, other in zip(clips, [*clips[1:], clips[0]], strict=True):
        assert np.abs(ours - other).max() > 1e-2


def test_the_published_negative_prompt_is_the_published_one():
    """Its length and hash are those of the text in the original's `shared_config.py`."""
    text = config.WAN_NEGATIVE_PROMPT
    digest = "ce96e0324e4b54ce4b6e867f669ca520952e1a34cc116543516b1897f0d3c47e"
    assert (len(text), len(text.split("，"))) == (137, 28)
    assert hashlib.sha256(text.encode()).hexdigest() == digest


@pytest.mark.parametrize("scale", ["-1", "nan", "inf"])
def test_an_impossible_scale_is_refused(scale):
    with pytest.raises(InputError, match="sample.guidance=.* is out of range"):
        config.SampleConfig(guidance=float(scale))


# The method


def test_models_made_for_another_method_take_its_steps_and_keep_their_other_settings(model):
    student = config.loading.load_experiment("stage_student")
    ours = applied(methods.BIDIRECTIONAL, student)
    assert ours.sample == dataclasses.replace(student.sample, steps=tuple(range(1000, 0, -20)))
    assert (ours.cache.sink, ours.cache.recent, ours.cache.top) == (0, 0, 0)
    fewer = dataclasses.replace(ours, sample=dataclasses.replace(ours.sample, steps=(1000,)))
    assert applied(methods.BIDIRECTIONAL, fewer) == fewer  # its own folder's steps stay


def test_from_python_what_it_cannot_do_is_refused(model):
    with pytest.raises(InputError, match="under one prompt, and 2 were given"):
        model.stream([RED, BLUE])
    with pytest.raises(InputError, match="one clip of 20 frames"):
        model.stream([RED] * 6)
    with pytest.raises(InputError, match="without a state"):
        model.stream([RED] * 2, changes={1: "cut"})
    with pytest.raises(InputError, match="belongs to method packforcing"):
        model.with_memory("no-mid")
    with pytest.raises(InputError, match="not in this model's vocabulary"):
        model.with_settings(["sample.guidance=2", "sample.negative_prompt=ugly"]).check([RED])
    with pytest.raises(InputError, match="give --method bidirectional"):
        model.with_method("packforcing").with_settings(["sample.guidance=2"])


# The command line


def test_sample_makes_a_clip_and_says_what_the_weights_are_for(tmp_path, capsys):
    out = tmp_path / "a.mp4"
    flags = ["--method", "bidirectional", "--steps", "2", "--out", str(out)]
    guided = ["--guidance-scale", "2", "--negative-prompt", BLUE]
    assert main(["sample", *flags, *guided]) == 0
    said = capsys.readouterr().err
    assert "all frames of a clip at once, 2 steps, shift" in said
    assert "guidance 2 against sample.negative_prompt" in said
    assert "made for method packforcing and not trained for this one" in said
    assert len(video.read(out)) == 20


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--seconds", "60"], "one clip of 20 frames"),
        (["--state", "STATE"], "saves between blocks"),
        (["--trace", "t.jsonl"], "makes or keeps them otherwise"),
        (["--memory", "no-mid"], "belongs to method packforcing"),
        (["--timeline", "STORY"], "under one prompt, and 2 were given"),
        (["--steps", "0"], "give 1 to 1000"),
        (["--guidance-scale", "-2"], "is out of range"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_sentence(flags, sentence, tmp_path, capsys):
    story = tmp_path / "story.txt"
    story.write_text(f"0: {RED}\n2: {BLUE}\n")
    named = {"STORY": str(story), "STATE": str(tmp_path / "state")}
    words = [named.get(word, word) for word in flags]
    target = tmp_path / "a.mp4"
    assert main(["sample", "--method", "bidirectional", *words, "--out", str(target)]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert sentence in said
    assert [path.name for path in tmp_path.iterdir()] == ["story.txt"]


def test_layout_shows_one_call_in_which_all_frames_see_all(capsys):
    assert main(["layout", "--method", "bidirectional", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    (step,) = table["steps"]
    assert table["other"] == []
    assert step["queries"] == [[frame, frame] for frame in range(21)]
    assert [(key["frames"], key["kind"]) for key in step["keys"]] == [
        ([frame, frame], "current") for frame in range(21)
    ]
    assert step["tokens"] == 21 * 1560
    assert main(["layout", "--method", "bidirectional", "--blocks", "8"]) == 2
    assert "one clip of 21 frames" in capsys.readouterr().err
    assert main(["layout", "--method", "bidirectional", "--switch", "3"]) == 2
    assert "under one prompt" in capsys.readouterr().err


def test_plan_is_about_blocks(capsys):
    assert main(["plan", "--config", "wan2_1_t2v_1_3b"]) == 2
    assert "denoises all frames of a clip together" in capsys.readouterr().err


def test_a_folder_that_remembers_it_is_sampled_by_it_and_not_evaluated(folder, tmp_path, capsys):
    own = shutil.copytree(folder, tmp_path / "own")
    settings = json.loads((own / "config.json").read_text()) | {"method": "bidirectional"}
    (own / "config.json").write_text(json.dumps(settings))
    pipeline = Pipeline.from_pretrained(own)
    assert pipeline.method is methods.BIDIRECTIONAL
    assert list(pipeline.experiment.sample.steps) == settings["sample"]["steps"]
    for verb in ("evaluate", "bench"):
        assert main([verb, "--weights", str(own)]) == 2
        assert "denoises all frames of a clip together" in capsys.readouterr().err
