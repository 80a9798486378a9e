"""The attention study: masses are those of a softmax by hand, planted profiles are found, chance is counted out."""

import dataclasses
import functools
import json

import histories
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import slow_memory
from folders import write_model_folder

from packforcing_jax.cli import main
from packforcing_jax.config import CacheConfig
from packforcing_jax.evaluation import attention_mass, attention_study, recall, stage_figures
from packforcing_jax.evaluation.attention_mass import PARTS, Mass
from packforcing_jax.evaluation.attention_study import Recorded
from packforcing_jax.evaluation.stage_figures import Sampling
from packforcing_jax.memory import cache
from packforcing_jax.memory import layout as layouts
from packforcing_jax.networks import rope
from packforcing_jax.sampling import block_step, inspect_trace, pipeline, player
from packforcing_jax.sampling.block_step import Access

SIZES = {"block": 3, "sink": 3, "recent": 3, "top": 2, "capacity": 7, "score_pool": (3, 1, 2)}
VIDEOS = 2
PROMPTS = ("a red disc", "a blue disc")


# Masses against a softmax by hand


@functools.cache
def program(exp, span, count):
    """What measures one block of a story behind a memory, compiled once."""
    whole = attention_mass.unrestricted(exp, span)
    spec = whole.memory

    @histories.jit
    def run(memory, q, k, v):
        memory = recall.copied(spec, memory)
        layout = layouts.layout(spec.cache, memory.progress)
        choosing = Access(attends=block_step.choosing)
        access = Access(attends=attention_mass.measuring(choosing, count))
        attend = block_step.block_attention(whole.step, layout, spec.cache.block, access)
        draws = jnp.zeros((VIDEOS, spec.cache.slots))
        each = zip(memory.layers, q, k, v, strict=True)
        return jnp.stack([attend(q, k, v, (layer, draws))[1] for layer, q, k, v in each])

    return run


def measured(exp, span, story, memory, number, count):
    """Masses and shares of keys, [layer, 2, b, column], of one block of a story behind a memory."""
    full = (x[number] for x in story.full)
    return np.asarray(program(exp, span, count)(memory, story.q[number], *full))


def by_hand(exp, span, story, number, count):
    """The same in 64 bit: a softmax over all keys, summed up by the age of their block and by part."""
    whole = attention_mass.unrestricted(exp, span)
    cfg = whole.cache
    seen = slow_memory.visible(cfg, number)
    ids = np.broadcast_to(np.asarray(seen.archive, int), (2, VIDEOS, len(seen.archive)))
    k, _ = slow_memory.view(whole, story, seen, ids)
    q, *_ = slow_memory.own(whole, story, seen)
    s, p = exp.tokens_per_frame, exp.tokens_per_packed_block
    now = np.arange(seen.start, seen.start + cfg.block)
    owners = [
        np.repeat(np.asarray(part, int) // cfg.block, s) for part in (seen.sink, seen.recent, now)
    ]
    owners.insert(1, np.repeat(np.asarray(seen.archive, int), p))
    parts = np.repeat(np.arange(len(PARTS)), [len(each) for each in owners])
    age = number - np.concatenate(owners)
    named = np.concatenate([np.eye(count)[age], np.eye(len(PARTS))[parts]], axis=1)
    logits = np.einsum("lbqnh,lbknh->lbnqk", q, k.astype(float)) / np.sqrt(q.shape[-1])
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    mass = (weights @ named).mean((2, 3))
    return np.stack([mass, np.broadcast_to(named.mean(0), mass.shape)], axis=1)


@pytest.mark.parametrize(
    ("adjustment", "changes", "span"),
    [
        ("sink", {"selection": "recency"}, "true"),
        ("sink", {"selection": "paper_sum"}, "fit"),
        ("sink", {"span": "fit", "max_position": 13, "recent": 6}, "fit"),
        ("incremental", {"sink": 6}, "true"),
        ("sink_only", {"selection": "random"}, "true"),
        ("none", {"sink": 0}, "true"),
        ("sink", {"top": 0, "capacity": 0, "sink": 2, "recent": 5, "block": 2}, "true"),
    ],
)
def test_masses_are_those_of_a_softmax_over_the_whole_history(adjustment, changes, span):
    cfg = CacheConfig(**SIZES | {"rope_adjustment": adjustment} | changes)
    exp = histories.experiment(cfg)
    rng = np.random.default_rng(3)
    blocks = 9
    story = slow_memory.tell(exp, rng, blocks=blocks, layers=2, videos=VIDEOS)
    step = histories.stepper(exp)
    memory = cache.init(exp.memory, VIDEOS)
    count = attention_mass.ages(cfg, blocks)
    for number in range(blocks):
        if number in (0, 1, 2, 4, 8):
            found = measured(exp, span, story, memory, number, count)
            np.testing.assert_allclose(found[..., :count].sum(-1), 1, atol=1e-5)
            np.testing.assert_allclose(found[..., count:].sum(-1), 1, atol=1e-5)
            wanted = by_hand(exp, span, story, number, count)
            np.testing.assert_allclose(found, wanted, atol=1e-5)
        _, memory = step(memory, histories.block_of(story, number), 0.0)
    if cfg.top:  # a whole history was seen, of which the model itself attends to two blocks
        assert (wanted[0, 0, 0, :count] > 0).sum() == blocks
    assert abs(wanted[:, 0] - wanted[:, 1]).max() > 0.02


def test_a_planted_profile_is_found():
    """Keys agree with every query by what their block's age says, along a channel that hardly turns in time."""
    cfg = CacheConfig(**SIZES, selection="recency", span="true")
    exp = histories.experiment(cfg)
    exp = dataclasses.replace(exp, dit=dataclasses.replace(exp.dit, rope_theta=(1e12, 20.0, 7.0)))
    blocks, fall = 9, 0.25
    story = slow_memory.tell(exp, np.random.default_rng(4), blocks=blocks, layers=2, videos=VIDEOS)
    channel = 2 * (exp.dit.pairs[0] - 1)  # of the slowest pair in time

    def planted(keys, agreed):
        flat = np.zeros_like(keys)
        flat[..., channel] = agreed
        return flat

    agreed = np.where(np.arange(blocks) == 3, 3.0, fall * np.arange(blocks))
    shaped = agreed.reshape(-1, 1, 1, 1, 1) * np.sqrt(exp.dit.head_dim)
    story.full = planted(story.full[0], shaped), story.full[1]
    story.packed = planted(story.packed[0], shaped), story.packed[1]
    story.q = planted(story.q, 1.0)
    step = histories.stepper(exp)
    memory = cache.init(exp.memory, VIDEOS)
    for number in range(blocks - 1):
        _, memory = step(memory, histories.block_of(story, number), 0.0)
    last = blocks - 1
    found = measured(exp, "true", story, memory, last, blocks)[:, 0, :, :blocks]
    full, small = cfg.block * exp.tokens_per_frame, exp.tokens_per_packed_block
    keys = np.array([full, full, *[small] * (last - 2), full])  # by age
    wanted = keys * np.exp(agreed[::-1])
    np.testing.assert_allclose(
        found, np.broadcast_to(wanted / wanted.sum(), found.shape), atol=1e-5
    )
    profile = np.where(keys == small, found, np.nan)
    assert (np.nanargmax(profile, axis=-1) == last - 3).all()
    profile[..., last - 3] = np.nan
    figures = attention_study.figures_of(profile)
    np.testing.assert_allclose(figures["rank correlation with age"][1], -1)


# Masses of whole models


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_model_folder(tmp_path_factory.mktemp("model"))
    return pipeline.Pipeline.from_pretrained(folder)


def told(blocks):
    return [[prompt] * blocks for prompt in PROMPTS]


@pytest.mark.parametrize(
    "changed",
    [
        lambda model: model.with_settings(["cache.capacity=9"]),
        lambda model: model.with_settings(
            [
                "cache.capacity=9",
                "dtypes.cache=bfloat16",
                "dtypes.compute=bfloat16",
                "attention=xla",
            ]
        ),
        lambda model: model.with_settings(
            ["cache.capacity=9", "cache.scope=shared", "cache.timing=late", "cache.selection=paper"]
        ),
        lambda model: model.with_method("self-forcing"),
        lambda model: model.with_method("infinite-forcing"),
        lambda model: model.with_method("reward-forcing"),
        lambda model: model.with_method("longlive"),
        lambda model: model.with_method("causvid"),
        lambda model: model.with_method("deep-forcing"),
        lambda model: model.with_method("full").for_length(8),
        lambda model: model.with_method("packforcing-unofficial"),
    ],
)
def test_every_memory_adds_up_to_one_and_is_only_read(model, changed):
    arm = changed(model)
    seeds = [5, 6]
    whole = attention_study.recorded(arm, told(8), seeds=seeds)
    half = arm.experiment.dtypes.cache == "bfloat16"
    for mass in whole.mass.values():
        for part in dataclasses.astuple(mass):
            np.testing.assert_allclose(part.sum(-1), 1, atol=2e-2 if half else 1e-5)
        assert abs(mass.by_part - mass.flat_by_part).max() > 1e-3
        if not arm.experiment.cache.budget:  # there each layer keeps tokens of its own
            same = mass.flat_by_part[:, :1, :1]
            np.testing.assert_allclose(mass.flat_by_part - same, 0, atol=1e-2 if half else 1e-6)
    ids = [pipeline.video_id(each) for each in PROMPTS]
    _, alone = stage_figures.play(arm, told(8), seeds=seeds, videos=ids)
    np.testing.assert_array_equal(whole.chosen, alone)


def test_where_nothing_is_left_out_masses_are_those_of_the_blocks_own_attention(model):
    few = model.with_settings(["cache.top=4", "cache.capacity=4"])
    state = few.start(seed=1, videos=[3, 4])
    text = few.text_kv(list(PROMPTS))
    for _ in range(5):
        state, _ = player.next_block(few, state, text)
    exp = few.experiment
    spec = exp.memory
    noise = block_step.draw_noise(exp.step, state.seeds, state.videos, state.memory.num_blocks)
    layout = layouts.layout(exp.cache, state.memory.progress)
    times = layouts.current_times(spec, layout, exp.cache.block)
    grid = rope.grid(*(np.arange(size) for size in exp.grid), frames=exp.cache.block)
    angles = rope.time_angles(times, spec) + rope.space_angles(jnp.asarray(grid), spec)
    length = int(layouts.length(spec, layout))

    def weighing(cfg, layout, attention_fn):
        attend = block_step.choosing(cfg, layout, attention_fn)

        def self_attention(q, k, v, past):
            mixed, (view, _) = attend(q, k, v, past)
            products = jnp.einsum("bqnh,bknh->bnqk", rope.rotate(q, angles), view.k[:, :length])
            return mixed, jax.nn.softmax(products / np.sqrt(q.shape[-1])).mean((1, 2))

        return self_attention

    draws = block_step.random_scores(state.memory, noise)
    past = list(zip(state.memory.layers, draws, strict=True))
    denoiser = block_step.Denoiser(few.nets, exp.step, text).computed()
    _, weights = block_step.first_step(denoiser, layout, noise, past, Access(attends=weighing))
    weights = np.stack(weights)
    by_part = attention_mass.masses(few, state, text, "true", 6).by_part
    frame = exp.tokens_per_frame
    assert weights.shape[-1] == 9 * frame + 3 * exp.tokens_per_packed_block
    np.testing.assert_allclose(by_part[..., 0], weights[..., : 3 * frame].sum(-1), atol=1e-5)
    np.testing.assert_allclose(by_part[..., 1], weights[..., 9 * frame :].sum(-1), atol=1e-5)


# Figures of profiles


def test_figures_of_known_profiles():
    n = 11
    age = np.arange(n, dtype=float)
    falling = {"flat": np.ones(n), "line": 20 - age, "one": np.where(age == 4, 1.0, 0.0)}
    found = {
        name: {what: float(value) for what, (_, value) in attention_study.figures_of(one).items()}
        for name, one in falling.items()
    }
    assert found["flat"]["entropy / log n"] == pytest.approx(1)
    assert np.isnan(found["flat"]["correlation with age"])
    assert found["line"]["min-max mean"] == pytest.approx(0.5)
    assert found["line"]["correlation with age"] == pytest.approx(-1)
    assert found["line"]["rank correlation with age"] == pytest.approx(-1)
    assert found["one"]["min-max mean"] == pytest.approx(1 / n)
    assert found["one"]["entropy / log n"] == pytest.approx(0)


def test_figures_of_any_profile_leave_out_what_is_not_there():
    rng = np.random.default_rng(0)
    profiles = rng.uniform(0.1, 1, (2, 3, 4, 13))
    profiles[..., 0] = np.nan
    profiles[0, ..., 7] = np.nan
    found = attention_study.figures_of(profiles)
    for at in np.ndindex(profiles.shape[:-1]):
        known = ~np.isnan(profiles[at])
        x, age = profiles[at][known], np.flatnonzero(known)
        share = x / x.sum()
        wanted = {
            "min-max mean": ((x - x.min()) / (x.max() - x.min())).mean(),
            "entropy / log n": -(share * np.log(share)).sum() / np.log(len(x)),
            "correlation with age": np.corrcoef(x, age)[0, 1],
            "rank correlation with age": np.corrcoef(np.argsort(np.argsort(x)), range(len(x)))[
                0, 1
            ],
        }
        for name, value in wanted.items():
            assert found[name][1][at] == pytest.approx(value), name


def test_the_papers_mean_says_nothing_of_order():
    rng = np.random.default_rng(1)
    profile = rng.gamma(0.5, size=20)
    shuffled = attention_study.figures_of(rng.permutation(profile))
    ordered = attention_study.figures_of(np.sort(profile)[::-1])
    assert shuffled["min-max mean"][1] == pytest.approx(ordered["min-max mean"][1])
    assert ordered["rank correlation with age"][1] == pytest.approx(-1)
    assert abs(shuffled["rank correlation with age"][1]) < 0.7


# Choices


CFG = CacheConfig(block=3, sink=3, recent=3, top=3, capacity=20, score_pool=(1, 1, 1))


def recorded_at_random(blocks, layers, videos, seed=0):
    """Choices at random, with masses of which those of the packed blocks are proportional to their age."""
    rng = np.random.default_rng(seed)
    chosen = np.full((blocks, layers, videos, CFG.top), -1)
    for block in range(blocks):
        ids, count = inspect_trace.visible(CFG, block), inspect_trace.due(CFG, block)
        for at in np.ndindex(layers, videos):
            chosen[(block, *at)][:count] = np.sort(rng.choice(ids, count, False)) if count else []
    late = attention_study.late_blocks(blocks)
    packed = np.stack(
        [np.isin(block - np.arange(blocks), inspect_trace.visible(CFG, block)) for block in late]
    )
    age = np.where(packed, np.arange(blocks), 0.0) / np.where(packed, np.arange(blocks), 0).sum(
        -1, keepdims=True
    )
    by_age = np.broadcast_to(age[:, None, None], (len(late), layers, videos, blocks))
    part = np.broadcast_to(np.array([0, 1.0, 0, 0]), (len(late), layers, videos, 4))
    mass = Mass(by_age, part, by_age, part)
    return Recorded(mass={"true": mass}, packed=packed, chosen=chosen)


def test_choices_at_random_have_the_figures_of_chance():
    blocks, videos = 16, 400
    whole = recorded_at_random(blocks, 2, videos)
    late = attention_study.late_blocks(blocks)
    found = attention_study.choices(CFG, whole, late)
    assert set(found) == {
        "Jaccard distance, all blocks",
        "overlap excess, all blocks",
        "Jaccard distance, late blocks",
        "overlap excess, late blocks",
        "position diversity",
    }
    for name, (level, values) in found.items():
        assert values.shape == (3, videos)
        error = values[:2].std(axis=1) / np.sqrt(videos)
        assert (abs(values[:2].mean(axis=1) - level) < 4 * error).all(), name
    jaccard = found["Jaccard distance, late blocks"][0]
    assert jaccard == pytest.approx(
        np.mean([inspect_trace.jaccard_at_random(CFG, block - 1, block) for block in late])
    )


def test_figures_of_two_choices_by_hand():
    chosen = np.full((8, 1, 1, 3), -1)
    chosen[4, 0, 0], chosen[5, 0, 0] = (1, 2, -1), (1, 2, 3)
    chosen[6, 0, 0], chosen[7, 0, 0] = (1, 2, 3), (2, 3, 5)
    whole = Recorded(mass={}, packed=np.zeros((2, 8), bool), chosen=chosen)
    assert inspect_trace.visible(CFG, 6) == [1, 2, 3, 4]
    assert attention_study.free(CFG, 8) == [7]
    distance, excess = attention_study.changes(CFG, whole, 7)
    assert distance.ravel() == pytest.approx([0.5, 0.5])  # 2 of 4
    assert excess.ravel() == pytest.approx([2 / 3 - 3 / 5] * 2)
    level, value = attention_study.diversity(CFG, whole)
    assert value.ravel() == pytest.approx([4 / 5] * 2)  # 1, 2, 3 and 5 of 1 to 5
    # 1 to 3 are chosen for want of others; 4 is left out by blocks 6 and 7, 5 by block 7.
    assert level == pytest.approx(1 - (1 / 4 * 2 / 5 + 2 / 5) / 5)


def test_a_random_choice_gets_its_share_of_the_mass_and_the_oldest_get_more():
    blocks = 12
    whole = recorded_at_random(blocks, 1, 600)
    mass = jax.tree.map(attention_study.with_mean, whole.mass["true"])
    level, share = attention_study.captured(whole, mass)
    assert share.mean() == pytest.approx(level.mean(), abs=0.01)
    late = attention_study.late_blocks(blocks)
    assert level[0, 0] == pytest.approx(np.mean([3 / (block - 2) for block in late]))
    oldest = np.broadcast_to(np.array([1, 2, 3]), whole.chosen.shape)
    _, share = attention_study.captured(dataclasses.replace(whole, chosen=oldest), mass)
    wanted = [
        sum(block - id for id in (1, 2, 3)) / sum(block - id for id in range(1, block - 1))
        for block in late
    ]
    assert share == pytest.approx(np.full((2, 600), np.mean(wanted)))


# The study and the command


@pytest.mark.slow
def test_a_study_tells_layers_methods_and_ways(model):
    arm = model.with_settings(["cache.capacity=9"])
    ways = recall.variants_of("affinity,recency")
    prompts = [["a red disc"] * 9, ["a blue disc"] * 9, ["a disc"] * 9]
    result = attention_study.study(arm, prompts, ways, sampling=Sampling(seed=4, batch=2))
    json.dumps(result, allow_nan=False)
    assert list(result["sections"]) == [
        f"{way}, {layer}" for way in ways for layer in ("layer 0", "layer 1", "mean over layers")
    ]
    assert result["late"] == [7, 8]
    rows = result["sections"]["recency, layer 1"]
    assert rows["Jaccard distance, late blocks"]["value"] == pytest.approx([2 / 3] * 3)
    assert rows["Jaccard distance, late blocks"]["n"] == 3
    shares = [rows[f"mass on {part}, squeezed"] for part in PARTS]
    assert sum(row["value"][0] for row in shares) == pytest.approx(1, abs=1e-5)
    assert sum(row["chance"] for row in shares) == pytest.approx(1, abs=1e-5)
    curve = result["curves"]["affinity"]["importance"]["true"]["packed blocks"]
    assert curve["age"] == [2, 3, 4, 5, 6, 7]
    assert np.shape(curve["normalised"]) == (3, 6)
    assert "packed blocks: min-max mean" in stage_figures.table(result)
    alone = attention_study.study(arm, prompts[:1], {"affinity": {}}, sampling=Sampling(seed=4))
    again = attention_study.recorded(arm, prompts, seeds=[4, 5, 6])
    one = attention_study.recorded(arm, prompts[:1], seeds=[4])
    np.testing.assert_array_equal(again.chosen[:, :, :1], one.chosen)
    assert alone["videos"] == 1


def test_the_command_measures_any_converted_model(tmp_path, capsys):
    folder = write_model_folder(tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red disc\na blue disc\n")
    command = ["evaluate", "--mode", "attention", "--weights", str(folder), "--blocks", "7"]
    told = [*command, "--prompts", str(prompts), "--set", "cache.capacity=5"]
    assert main.main([*told, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["experiment"], result["videos"], result["blocks"]) == ("tiny", 2, 7)
    assert "affinity, mean over layers" in result["sections"]
    assert main.main([*told, "--method", "longlive", "--videos", "1"]) == 0
    assert "longlive, layer 1" in capsys.readouterr().out


WRONG = {
    "no stories": ([], "--prompts FILE"),
    "too short an archive": (
        ["--prompts", "FILE", "--set", "cache.capacity=3"],
        "set cache.capacity=4 or more",
    ),
    "too few lines": (["--prompts", "FILE", "--videos", "3"], "--videos 3 exceeds the 2 lines"),
    "blocks together": (["--prompts", "FILE", "--method", "rolling-forcing"], "rolling-forcing"),
    "unknown method": (["--prompts", "FILE", "--method", "longlove"], "longlive"),
    "unknown way": (["--prompts", "FILE", "--ways", "afinity"], "affinity"),
    "nothing to choose": (
        ["--prompts", "FILE", "--memory", "no-mid", "--ways", "recency"],
        "leave --ways out",
    ),
    "one block": (["--prompts", "FILE", "--blocks", "1"], "2 or more"),
    "settings of a line": (["--prompts", "SET"], "settings of its own"),
    "host": (
        ["--prompts", "FILE", "--set", "cache.archive=host"]
        + ["--set", "cache.scope=shared", "--set", "cache.timing=late"],
        "cache.archive=device",
    ),
    "another mode": (["--method", "longlive", "--mode", "rollout"], "--mode attention"),
    "prompts of another mode": (["--prompts", "FILE", "--mode", "rollout"], "--prompts"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_measured_is_refused_in_a_sentence(name, tmp_path, capsys):
    flags, told = WRONG[name]
    folder = write_model_folder(tmp_path / "model")
    (tmp_path / "FILE.txt").write_text("a red disc\na blue disc\n")
    (tmp_path / "SET.jsonl").write_text('{"prompt": "a disc", "blocks": 4}\n')
    places = {"FILE": str(tmp_path / "FILE.txt"), "SET": str(tmp_path / "SET.jsonl")}
    flags = [places.get(flag, flag) for flag in flags]
    command = ["evaluate", "--weights", str(folder), "--blocks", "7", "--mode", "attention", *flags]
    assert main.main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert told in error
    assert error.startswith("packforcing: ")
