"""Methods: recorded rollouts, one value for verify, layout and sample, and what a new prompt does to the memory."""

import dataclasses
import functools
import json
import pathlib
import runpy
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_examples import logic

from packforcing_jax import methods
from packforcing_jax.cli.main import main
from packforcing_jax.config import loading
from packforcing_jax.errors import InputError
from packforcing_jax.memory import cache, view
from packforcing_jax.memory import layout as layouts
from packforcing_jax.methods import calls
from packforcing_jax.methods.method import Method, applied, memory_of, sized
from packforcing_jax.networks import rope
from packforcing_jax.sampling import block_step, host_archive, player, timelines
from packforcing_jax.sampling.pipeline import Pipeline
from packforcing_jax.types import KV
from packforcing_jax.verify import kinds
from packforcing_jax.verify import methods as rollouts

RECORDED = sorted((pathlib.Path(__file__).parent / "golden" / "methods").glob("*.safetensors"))
WINDOWED = [
    each
    for each in methods.METHODS.values()
    if each.window is not None
    and not each.joint  # this and what follows is tested on its own
    and not each.overlap
    and not {"budget", "top"} & set(each.settings)
]
QUICK = ["sample.steps=(1000, 400)"]
RED, BLUE = (
    f"a {colour} disc walks slowly before the moss curtain in scene one"
    for colour in ("red", "blue")
)


@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_rollouts_are_reproduced(path):
    rows = kinds.verify([path])
    assert [row for row in rows if not row.ok] == []
    alone = kinds.read(path).kind.endswith("_scores")  # of a score, not of a rollout
    assert alone or any(row.output.endswith("layout") for row in rows)


@pytest.fixture(scope="module")
def recorded():
    """The smallest rollout of a sink and a window: (fixture, what it should give)."""
    path = next(path for path in RECORDED if path.stem == "infinite_forcing")
    return kinds.read(path), kinds.expected(path)


def wrong(fixture, expected, method=methods.INFINITE_FORCING):
    ours = rollouts.sink_and_window(method, fixture)
    return {row.output for row in kinds.compare("", fixture.kind, ours, expected) if not row.ok}


def test_a_changed_weight_and_a_changed_number_are_noticed(recorded):
    fixture, expected = recorded
    name = "blocks.0.self_attn.q.weight"
    bent = {**fixture.weights, name: fixture.weights[name] * 1.01}
    assert "latents" in wrong(dataclasses.replace(fixture, weights=bent), expected)
    for key in ("layout.key_frame", "layout.key_pos", "layout.call", "layout.key_prompt"):
        other = expected[key].copy()
        other[7, 1] += 1
        assert wrong(fixture, {**expected, key: other}) == {"layout"}


def test_one_value_decides_what_is_verified_shown_and_sampled(recorded, monkeypatch, capsys):
    """A sink of one frame more."""
    fixture, expected = recorded
    own = methods.INFINITE_FORCING
    longer = dataclasses.replace(own, settings=own.settings | {"sink": 2, "recent": 1})
    config = {**fixture.config, "runs": fixture.config["runs"][:1]}
    one_run = dataclasses.replace(fixture, config=config)
    others = tuple(f"{run['name']}." for run in fixture.config["runs"][1:])
    main_run = {key: value for key, value in expected.items() if not key.startswith(others)}
    assert wrong(one_run, main_run) == set()
    assert {"latents", "layout"} <= wrong(one_run, main_run, longer)

    def shown():
        assert main(["layout", "--method", own.name, "--blocks", "8", "--json"]) == 0
        return json.loads(capsys.readouterr().out)["steps"][-1]["keys"]

    def sampled():
        model = Pipeline.from_pretrained(method=own.name, overrides=QUICK)
        return [block.latent for block in model.stream([RED] * 6)]

    before = shown(), sampled()
    published = methods.METHODS[own.name]
    monkeypatch.setitem(
        methods.METHODS,
        own.name,
        dataclasses.replace(published, sink=4, window=published.window + 3),
    )
    after = shown(), sampled()
    assert [key["frames"] for key in before[0]] != [key["frames"] for key in after[0]]
    # while nothing has left either window, two programs differ by their rounding alone
    np.testing.assert_allclose(before[1][:2], after[1][:2], atol=1e-4)
    assert np.abs(before[1][-1] - after[1][-1]).max() > 1e-2


# What attention receives is what `layout` prints


def numbered(exp, blocks, method, prompts):
    """The memory after blocks whose values are their frames' numbers and whose keys all were one before rotation."""
    spec = exp.memory
    memory = cache.init(spec, 1)
    ones = jnp.ones((1, spec.cache.block * spec.tokens_per_frame, spec.heads, spec.head_dim))
    for block in range(blocks):
        frames = block * spec.cache.block + np.arange(spec.cache.block)
        values = jnp.asarray(np.repeat(frames, spec.tokens_per_frame), jnp.float32)
        own = KV(k=ones, v=ones * values[None, :, None, None])
        latent = jnp.zeros((1, spec.cache.block, *spec.latent))
        memory = cache.commit(spec, memory, latent, [own] * spec.layers, None)
    return memory


@pytest.mark.parametrize("method", WINDOWED, ids=lambda method: method.name)
@pytest.mark.parametrize("blocks", [0, 1, 2, 5, 9])
def test_attention_receives_the_frames_and_positions_that_are_shown(method, blocks):
    exp = dataclasses.replace(
        tiny.EXP, cache=memory_of(dataclasses.replace(method, one_clip=False), tiny.EXP.cache, 3)
    )
    spec = exp.memory
    memory = numbered(exp, blocks, method, [0] * (blocks + 1))
    step = [c for c in calls.calls(spec, method, [0] * (blocks + 1)) if c.call == calls.DENOISE][-1]
    past = [key for key in step.keys if key.kind != "current"]
    layout = layouts.layout(spec.cache, memory.progress)
    valid = int(layouts.length(spec, layout)) - spec.cache.block * spec.tokens_per_frame
    frames = jnp.asarray([key.frames[0] for key in past], jnp.int32)
    slots = layouts.frame_slots(spec.cache, layout, frames)
    view = jax.tree.map(
        lambda x: x[0, : spec.full_res].reshape(-1, spec.tokens_per_frame, *x.shape[2:]),
        memory.layers[0].view,
    )
    assert len(past) * spec.tokens_per_frame == valid
    if method.settings.get("sink_average"):
        mixed = [sum(f * share for f, share in key.mix) or key.frames[0] for key in past]
    else:
        mixed = [key.frames[0] for key in past]
    np.testing.assert_allclose(view.v[slots][:, 0, 0, 0], mixed, rtol=1e-5)
    times = jnp.asarray([key.position for key in past], jnp.float32)
    angles = rope.time_angles(times, spec)
    ones = jnp.ones((1, len(past), spec.heads, spec.head_dim))
    np.testing.assert_allclose(view.k[slots][:, 0], rope.rotate(ones, angles)[0], atol=1e-4)


ROLLING = dataclasses.replace(
    tiny.EXP,
    cache=memory_of(methods.ROLLING_FORCING, tiny.EXP.cache, 4),
    sample=dataclasses.replace(tiny.EXP.sample, steps=(1000, 750, 500, 250)),
)


@pytest.mark.parametrize("block", [0, 1, 2, 5, 9, 10, 11])
def test_a_window_receives_the_frames_and_positions_that_are_shown(block):
    """Twelve blocks: the window runs empty behind the ninth."""
    spec, total = ROLLING.memory, 12
    memory = numbered(ROLLING, block, methods.ROLLING_FORCING, [0] * total)
    every = calls.calls(spec, methods.ROLLING_FORCING, [0] * total)
    steps = [call for call in every if call.call == calls.DENOISE]
    (step,) = [call for call in steps if call.block == block + 3]
    layout = layouts.joint(spec.cache, memory.progress, len(step.queries))
    own = [key for key in step.keys if key.kind == "current"]
    past = [key for key in step.keys if key.kind != "current"]
    assert [key.frames[0] for key in own] == [frame for frame, _ in step.queries]
    assert int(layouts.length(spec, layout)) == step.tokens
    seen = jax.tree.map(
        lambda x: x[0, : len(past) * spec.tokens_per_frame], joint_view(spec, layout, memory)
    )
    frames = np.repeat([key.frames[0] for key in past], spec.tokens_per_frame)
    np.testing.assert_allclose(seen.v[:, 0, 0], frames)
    times = np.repeat([key.position for key in past], spec.tokens_per_frame)
    ones = jnp.ones((1, len(times), spec.heads, spec.head_dim))
    angles = rope.time_angles(jnp.asarray(times, jnp.float32), spec)
    np.testing.assert_allclose(seen.k, rope.rotate(ones, angles)[0], atol=1e-4)
    assert int(layout.current_position) == step.queries[0][1]


@functools.partial(tiny.jit, static_argnums=0)
def joint_view(spec, layout, memory):
    return view.joint(spec, layout, memory.layers[0])


# Sizes


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("packforcing", 26_312),
        ("self-forcing", 32_760),
        ("causal-forcing", 32_760),
        ("longlive", 18_720),
        ("longlive-infinity", 18_720),
        ("infinite-forcing", 9_360),
        ("reward-forcing", 14_040),
        ("rolling-forcing", 32_760),
        ("causvid", 32_760),
    ],
)
def test_at_full_size_a_method_attends_what_was_published(name, tokens, capsys):
    assert (
        main(["layout", "--config", "wan_t2v_1_3b", "--method", name, "--blocks", "60", "--json"])
        == 0
    )
    table = json.loads(capsys.readouterr().out)
    assert max(step["tokens"] for step in table["steps"]) == tokens
    passes = 60 + (3 if name == "rolling-forcing" else 0)  # a window moves over the end
    assert [step["block"] for step in table["steps"]] == list(range(passes))
    for step in table["steps"]:
        assert step["tokens"] == sum(key["tokens"] for key in step["keys"])


@pytest.mark.parametrize(
    ("name", "sink", "window"),
    [
        ("longlive", 4, 16),
        ("longlive-infinity", 4, 16),
        ("infinite-forcing", 4, 12),
        ("reward-forcing", 4, 12),
        ("self-forcing", 0, 20),
        ("causal-forcing", 0, 20),
        ("causvid", 0, 20),
    ],
)
def test_on_stage_sizes_are_counted_in_blocks_and_fit_the_trained_range(name, sink, window):
    stage = loading.load_experiment("stage")
    ours = sized(methods.METHODS[name], stage.cache)
    assert (ours.sink, ours.window) == (sink, window)
    assert applied(methods.METHODS[name], stage).cache.full_frames == window


def test_on_stage_a_rolling_window_of_four_steps_fits_the_trained_range():
    student = loading.load_experiment("stage_student")
    ours = applied(methods.ROLLING_FORCING, student).cache
    assert (ours.sink, ours.recent, ours.window) == (4, 0, 16)


def test_more_steps_than_a_rolling_window_has_room_for_are_thinned_out():
    stage = loading.load_experiment("stage")
    ours = applied(methods.ROLLING_FORCING, stage)
    assert len(stage.sample.steps) == 16
    assert ours.sample.steps == stage.sample.steps[::4]
    assert ours.cache.window == 16


def test_models_of_single_frames_keep_published_sizes():
    one = dataclasses.replace(loading.load_experiment("wan_t2v_1_3b").cache, block=1, top=0)
    assert sized(methods.LONGLIVE, one) == methods.LONGLIVE
    assert memory_of(methods.LONGLIVE, one, 4).recent == 8


def test_a_window_too_short_is_refused():
    with pytest.raises(InputError, match="window of 5 frames, too short for a sink of 3"):
        memory_of(Method("short", "", sink=3, window=5), tiny.EXP.cache, 4)


# Clips


@pytest.fixture(scope="module")
def clipped(model):
    return model.with_method("causvid")


def test_a_clip_begins_with_the_end_of_the_one_before_and_nothing_else(clipped):
    """Five blocks a clip on Stage, one of them given: blocks 4 and 8 end a clip."""
    assert (clipped.experiment.cache.full_frames, clipped.experiment.cache.overlap) == (20, 4)
    blocks = list(clipped.stream([RED] * 11, seed=3))
    assert [block.state.position for block in blocks[-1:]] == [11]
    spec = clipped.experiment.memory
    for end in (4, 8):
        state = next(iter(islice(clipped.stream([RED] * 11, seed=3), end, None))).state
        assert int(state.memory.num_blocks) == end + 1 + end // 4
        fresh = player.start(clipped, seeds=3, videos=[0])
        latent = jnp.asarray(blocks[end].latent)[None]
        denoiser = block_step.Denoiser(
            clipped.nets, clipped.experiment.step, clipped.text_kv([RED])
        )
        none = [host_archive.newest(spec, fresh.memory.progress, batch=1)] * spec.layers
        memory, _ = player.commit_program(denoiser, fresh.memory, latent, latent, none)
        for ours, theirs in zip(state.memory.layers, memory.layers, strict=True):
            seen = slice(0, spec.cache.block * spec.tokens_per_frame)
            slot = int(state.memory.progress.scene_start) % spec.cache.ring
            there = slice(slot * spec.tokens_per_frame, None)
            for name in "kv":
                one = getattr(ours.view, name)[:, there][:, seen]
                np.testing.assert_allclose(one, getattr(theirs.view, name)[:, seen], atol=1e-5)
        assert int(layouts.layout(spec.cache, state.memory.progress).recent) == 4


def test_what_overlaps_is_shown_once(clipped):
    whole = [block.frames for block in clipped.stream([RED] * 11, seed=3)]
    assert [len(frames) for frames in whole] == [4] * 11
    short = [block.frames for block in clipped.stream([RED] * 9, seed=3)]
    assert [len(frames) for frames in short] == [4] * 8 + [0]  # the last one loses its end too
    np.testing.assert_array_equal(np.concatenate(short), np.concatenate(whole[:8]))


def test_clips_go_on_from_a_state_as_if_they_had_never_stopped(clipped):
    whole = [block.latent for block in clipped.stream([RED] * 7, seed=3)]
    state = list(islice(clipped.stream([RED] * 7, seed=3), 5))[-1].state
    rest = [block.latent for block in clipped.stream([RED] * 7, state=state)]
    np.testing.assert_array_equal(rest, whole[5:])


# Without a bound


def test_the_unbounded_memory_sees_every_frame_of_the_length_asked_for(model, capsys):
    full = model.with_method("full")
    blocks = [block.layout for block in full.stream([RED] * 8, seed=3)]
    assert [layout["recent"] for layout in blocks] == list(range(0, 32, 4))
    assert main(["layout", "--method", "full", "--config", "stage", "--blocks", "8", "--json"]) == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert [step["tokens"] for step in steps] == [16 * 4 * n for n in range(1, 9)]
    assert main(["plan", "--method", "full", "--config", "stage", "--blocks", "8"]) == 0
    assert "0 differ" in capsys.readouterr().out


def test_the_unbounded_memory_draws_a_clip_as_self_forcing_does(model):
    each = [model.with_method(name).stream([RED] * 5, seed=3) for name in ("full", "self-forcing")]
    for ours, theirs in zip(*each, strict=True):
        np.testing.assert_array_equal(ours.latent, theirs.latent)


# A rolling window


@pytest.fixture(scope="module")
def rolling():
    steps = ["sample.steps=(1000, 750, 500, 250)"]
    return Pipeline.from_pretrained(overrides=steps).with_method("rolling-forcing")


def test_a_rolling_window_goes_on_from_a_state_as_if_it_had_never_stopped(rolling):
    prompts = [RED] * 4 + [BLUE] * 3
    whole = [block.latent for block in rolling.stream(prompts, seed=3)]
    first = rolling.stream(prompts, seed=3)
    states = [next(first).state for _ in range(5)]
    rest = [block.latent for block in rolling.stream(prompts, state=states[-1])]
    np.testing.assert_array_equal(rest, whole[5:])
    assert np.isfinite(whole).all()


def test_a_longer_video_begins_as_a_shorter_one_until_its_window_runs_empty(rolling):
    short, long = (
        [block.latent for block in rolling.stream([RED] * count, seed=3)] for count in (5, 6)
    )
    np.testing.assert_array_equal(short[:2], long[:2])
    assert all(np.abs(one - other).max() > 0 for one, other in zip(short[2:], long[2:5]))


def test_a_video_whose_window_ran_empty_is_not_made_longer(rolling):
    *_, last = rolling.stream([RED] * 4, seed=3)
    with pytest.raises(InputError, match="ended with block 3.*draw a longer video from its beginn"):
        next(rolling.stream([RED] * 9, state=last.state))


def test_a_rolling_window_refuses_fewer_blocks_than_steps(tmp_path, capsys):
    command = ["sample", "--method", "rolling-forcing", "--blocks", "3"]
    assert main([*command, "--out", str(tmp_path / "a.mp4")]) == 2
    assert "ask for at least 4" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# A new prompt


@pytest.fixture(scope="module")
def model():
    return Pipeline.from_pretrained(overrides=QUICK)


@pytest.mark.parametrize(
    ("how", "sink", "recent"), [("keep", 8, 4), ("recache", 8, 4), ("flush", 8, 0), ("cut", 0, 0)]
)
def test_a_new_prompt_does_to_the_memory_what_is_said(model, how, sink, recent):
    prompts = [RED] * 6 + [BLUE] * 3
    kept = list(model.stream(prompts))
    changed = list(model.stream(prompts, changes={6: how}))
    seen = changed[6].layout
    assert (seen["sink"], seen["recent"]) == (sink, recent)
    same = [(one.latent == other.latent).all() for one, other in zip(kept, changed, strict=True)]
    assert same[:6] == [True] * 6
    assert same[6] == (how == "keep")


def test_a_change_survives_a_stop_right_before_it(model):
    prompts, how = [RED] * 5 + [BLUE] * 3, {5: "recache"}
    whole = [block.latent for block in model.stream(prompts, changes=how)]
    *_, last = model.stream(prompts[:5], seed=0)
    rest = [block.latent for block in model.stream(prompts, state=last.state, changes=how)]
    np.testing.assert_array_equal(rest, whole[5:])


def test_longlive_reads_its_window_again_without_being_told(model):
    live = model.with_method("longlive")
    prompts = [RED] * 6 + [BLUE] * 2
    own, kept = (list(live.stream(prompts, changes=how)) for how in ({}, {6: "keep"}))
    assert (own[5].latent == kept[5].latent).all()
    assert (own[6].latent != kept[6].latent).any()


def test_timelines_say_what_a_prompt_does():
    entries = timelines.parse(["0: one", "3 recache: two", "5: three", "9 cut: four"], "t")
    assert timelines.changes(entries, 12) == {3: "recache", 9: "cut"}
    assert timelines.changes(entries, 9) == {3: "recache"}
    with pytest.raises(InputError, match="line 2: 'forget' is nothing"):
        timelines.parse(["0: one", "3 forget: two"], "t")
    with pytest.raises(InputError, match="block 0 has no memory to cut"):
        timelines.parse(["0 cut: one"], "t")


# Wrong use


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--method", "bidirectional"], "one clip of 20 frames"),
        (["--guidance-scale", "5"], "give --method bidirectional"),
        (["--set", "sample.negative_prompt=red"], "give --method bidirectional"),
        (["--method", "longlve"], "did you mean longlive"),
        (["--method", "longlive", "--memory", "no-mid"], "belongs to method packforcing"),
        (["--method", "self-forcing-short"], "one clip of 20 frames"),
    ],
)
def test_wrong_use_is_refused_in_one_sentence(flags, sentence, tmp_path, capsys):
    target = tmp_path / "a.mp4"
    assert main(["sample", *flags, "--blocks", "9", "--out", str(target)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence in error
    assert not target.exists()


def test_a_line_of_prompts_cannot_bring_another_methods_memory(tmp_path, capsys):
    lines = tmp_path / "prompts.jsonl"
    lines.write_text(json.dumps({"prompt": RED, "memory": "no-mid", "blocks": 2}) + "\n")
    flags = ["--method", "longlive", "--prompts", str(lines), "--out", str(tmp_path / "videos")]
    assert main(["sample", *flags]) == 2
    assert "belongs to method packforcing" in capsys.readouterr().err


def test_a_trace_knows_no_flush(tmp_path, capsys):
    story = tmp_path / "story.txt"
    story.write_text(f"0: {RED}\n2 flush: {BLUE}\n")
    files = [
        "--timeline",
        str(story),
        "--trace",
        str(tmp_path / "t"),
        "--out",
        str(tmp_path / "a.mp4"),
    ]
    assert main(["sample", *files, "--blocks", "3"]) == 2
    assert "records a memory that only grows" in capsys.readouterr().err


def test_a_method_of_ones_own_is_sampled_shown_and_planned(capsys):
    path = pathlib.Path(__file__).parent.parent / "examples" / "own_method.py"
    runpy.run_path(str(path), run_name="__main__")
    printed = capsys.readouterr().out.splitlines()
    assert printed[5] == "5 (4, 32, 32, 3) 0 0"  # the cut
    assert json.loads(printed[10]) == [64, 128, 192, 192, 192, 64, 128, 192, 192, 192]
    assert printed[11] == "nothing differs from its formula"
    assert len(logic(path)) <= 40
