"""Forced recall: guests shown once in a true history, one for every way of choosing; each figure with its chance."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from packforcing_jax import config, pytrees
from packforcing_jax.errors import InputError
from packforcing_jax.evaluation import recall, stage_figures
from packforcing_jax.evaluation.stage_figures import Sampling
from packforcing_jax.memory import layout as layouts
from packforcing_jax.policies import selection
from packforcing_jax.sampling import pipeline
from packforcing_jax.stage import captions, world
from packforcing_jax.training import batches

GAPS = (4, 5)  # newest blocks alone reach back 4 behind a top of 3 and one recent block
SMALL = config.Experiment(
    name="stage",
    latent=(8, 8),
    clip=20,
    fps=8,
    codec=config.SpaceToDepthConfig(factor=4),
    dit=config.DiTConfig(
        dim=24,
        ffn_dim=20,
        heads=2,
        layers=2,
        text_dim=10,
        text_len=16,
        freq_dim=12,
        in_channels=48,
        out_channels=48,
        rope_pairs=(2, 2, 2),
    ),
    text=config.TextConfig(
        vocab=46, dim=10, dim_attn=6, dim_ffn=9, heads=2, layers=1, max_words=16
    ),
    compressor=config.CompressorConfig(channels=(6, 7, 8, 9)),
    cache=config.CacheConfig(top=3, capacity=6, score_pool=(4, 1, 1), key_multiple=1),
    sample=config.SampleConfig(steps=(1000, 400), prediction="clean"),
)


@pytest.fixture(scope="module")
def model():
    """A model of the stage with random weights."""
    shapes = jax.eval_shape(lambda: batches.new_model(SMALL, jax.random.key(0)))
    rng = np.random.default_rng(1)
    draws = {
        name: name.endswith("scale") + 0.2 * rng.normal(size=leaf.shape)
        for name, leaf in pytrees.flatten(shapes).items()
    }
    built = pytrees.fill(
        shapes, {name: jnp.asarray(draw, jnp.float32) for name, draw in draws.items()}
    )
    return pipeline.Pipeline.of(SMALL, built.nets, built.text, captions.reader())


# Stories


@pytest.mark.parametrize("gaps", [(2,), (9, 4), (3, 17, 8, 40)])
def test_a_called_guest_is_seen_once_and_only_at_its_gap(gaps):
    shares = []
    for seed in range(12):
        guests = recall.forced_story(np.random.default_rng(seed), gaps).guests
        assert len(guests) == recall.OPENING + max(gaps) + 1
        called = [int(guests[-1 - gap]) for gap in gaps]
        assert len(set(called)) == len(gaps)
        for gap, guest in zip(gaps, called):
            assert np.flatnonzero(guests == guest).tolist() == [len(guests) - 1 - gap]
        assert (guests[: recall.OPENING] == -1).all()
        shares.append((np.delete(guests, [-1 - gap for gap in gaps]) >= 0)[recall.OPENING :].mean())
    assert max(gaps) < 40 or 0.4 < np.mean(shares) < 0.6


def test_others_pass_by_and_none_of_them_is_called():
    gaps = (3, 50, 8)
    passing = []
    for seed in range(8):
        guests = recall.forced_story(np.random.default_rng(seed), gaps).guests
        called = {int(guests[-1 - gap]) for gap in gaps}
        others = {int(guest) for guest in np.delete(guests, [-1 - gap for gap in gaps])} - {-1}
        assert called.isdisjoint(others)
        assert len(others) <= len(world.GUESTS) - recall.CALLED
        passing.append(len(others))
    assert max(passing) == len(world.GUESTS) - recall.CALLED


def test_stories_differ_by_seed_and_stay_in_one_scene():
    told = [recall.forced_story(np.random.default_rng((7, i)), (8, 3)) for i in range(6)]
    again = recall.forced_story(np.random.default_rng((7, 2)), (8, 3))
    np.testing.assert_array_equal(told[2].guests, again.guests)
    assert len({story.guests.tobytes() for story in told}) == 6
    assert all(len(set(story.scenes)) == 1 for story in told)


# Ways


def test_every_policy_is_a_way_and_every_way_a_memory():
    ways = recall.variants_of("every")
    assert set(selection.SCORES) == {way.get("selection") for way in ways.values()}
    caches = [recall.changed(SMALL, way).cache for way in ways.values()]
    assert len(set(caches)) == len(ways)
    assert recall.variants_of("recency,all-fit") == {
        "recency": recall.VARIANTS["recency"],
        "all-fit": recall.VARIANTS["all-fit"],
    }
    for wrong, remedy in (
        ("recensy", "did you mean recency"),
        ("recency,", "no such way"),
        ("qqqq", "known: .*every"),
    ):
        with pytest.raises(InputError, match=f"^--ways .*{remedy}"):
            recall.variants_of(wrong)


@pytest.mark.parametrize(
    ("way", "chosen", "room"),
    [
        ("affinity", 3, 12),
        ("all-true", 6, 24),
        ("all-fit", 6, 12),
        ("affinity-shared-late", 3, 12),
    ],
)
def test_a_fitted_row_has_the_room_of_the_best(way, chosen, room):
    exp = recall.changed(SMALL, recall.VARIANTS[way])
    layout = layouts.layout(exp.cache, layouts.begin(20))
    assert int(layout.num_selected) == chosen
    assert float(layout.recent_position - layout.mid_position) == room
    assert (exp.dit, exp.compressor, exp.cache.capacity) == (
        SMALL.dit,
        SMALL.compressor,
        SMALL.cache.capacity,
    )


# Figures


@pytest.mark.parametrize(
    ("way", "held", "level"), [("affinity", 6, 0.5), ("affinity", 2, 1.0), ("all-fit", 6, 1.0)]
)
def test_figures_count_the_last_layer_beside_blind_choices(way, held, level):
    looked = np.array([[True] * 5, [True] * 5, [True, False, False, True, False]])
    right = np.array([False, True, False, False, True])
    found = [(looked[:, :3], right[:3]), (looked[:, 3:], right[3:])]
    rows = recall.figures(recall.changed(SMALL, recall.VARIANTS[way]), held, found)
    block = rows["block found, last layer"]
    mark = rows["mark recalled"]
    assert (block["chance"], block["value"][0], block["n"]) == (level, 2 / 5, 5)
    assert (mark["chance"], mark["value"][0], mark["n"]) == (1 / 16, 2 / 5, 5)
    assert block["value"][1] < 2 / 5 < block["value"][2]


# The study


def test_one_history_serves_every_gap_and_way(model, monkeypatch):
    histories = []
    asked = []

    def history(model, told, *, seed, videos):
        histories.append((told, seed, list(videos)))
        return len(histories)

    def answers(model, way, state, told, gap):
        stories = [story.guests.tobytes() for story in told]
        asked.append((gap, way["selection"], state, stories))
        return np.ones((2, len(told)), bool), np.zeros(len(told), bool)

    monkeypatch.setattr(recall, "history", history)
    monkeypatch.setattr(recall, "answers", answers)
    ways = recall.variants_of("recency,affinity,paper_sum")
    result = recall.forced(model, ways, gaps=(9, 2), videos=5, sampling=Sampling(7, 3))
    assert [len(told) for told, *_ in histories] == [3, 2]
    assert [who for _, *who in histories] == [[7, [0, 1, 2]], [7, [3, 4]]]
    for state in (1, 2):
        mine = [each for each in asked if each[2] == state]
        assert {each[:2] for each in mine} == {(gap, way) for gap in (9, 2) for way in ways}
        assert len({str(each[3:]) for each in mine}) == 1
    assert list(result["sections"]) == [f"gap of {gap} blocks, 6 in the archive" for gap in (9, 2)]
    assert all(row["n"] == 5 for rows in result["sections"].values() for row in rows.values())


@pytest.fixture(scope="module")
def study(model):
    ways = {name: recall.VARIANTS[name] for name in ("recency", "all-fit")}
    return recall.forced(model, ways, gaps=GAPS, videos=2, sampling=Sampling(7, 2))


def test_blocks_are_found_where_a_way_looks(study):
    """The newest three reach back 4 blocks behind one recent block, all of them further; random weights recall none."""
    assert (study["mode"], study["videos"], study["seed"]) == ("forced", 2, 7)
    near, far = (study["sections"][f"gap of {gap} blocks, 4 in the archive"] for gap in GAPS)
    found = "block found, last layer"
    assert near[f"recency: {found}"]["value"][0] == 1
    assert far[f"recency: {found}"]["value"][0] == 0
    assert near[f"all-fit: {found}"]["value"][0] == far[f"all-fit: {found}"]["value"][0] == 1
    assert near[f"recency: {found}"]["chance"] == pytest.approx(3 / 4)
    assert {row["chance"] for name, row in near.items() if "mark" in name} == {1 / 16}
    assert all(name in stage_figures.table(study) for name in near)


@pytest.fixture(scope="module")
def told():
    return [recall.forced_story(np.random.default_rng((7, i)), GAPS) for i in range(2)]


@pytest.fixture(scope="module")
def state(model, told):
    return recall.history(model, told, seed=7, videos=range(2))


def test_a_history_answers_as_often_as_it_is_asked(model, told, state):
    assert int(state.memory.num_blocks) == recall.OPENING + max(GAPS)
    before = jax.tree.map(np.array, state)
    for _ in range(2):
        looked, right = recall.answers(model, recall.VARIANTS["recency"], state, told, GAPS[0])
        assert looked.shape == (2, 2)
        assert looked.all()
        assert right.shape == (2,)
    jax.tree.map(np.testing.assert_array_equal, state, before)


HALF = ["dtypes.cache=bfloat16", "dtypes.compute=bfloat16"]
HOST = ["cache.archive=host", "cache.scope=shared", "cache.timing=late"]


@pytest.mark.parametrize(
    "overrides",
    [[], [*HALF, *HOST], ["cache.rope_adjustment=incremental"]],
    ids=["default", "bfloat16 host", "incremental"],
)
def test_the_last_block_is_the_one_that_follows_the_true_frames(model, told, overrides):
    """Bit for bit: `play` makes it in place, the study behind a copy of the memory."""
    model = recall.with_variant(model.with_settings(overrides), recall.VARIANTS["recency"])
    state = recall.history(model, told, seed=7, videos=range(2))
    last = len(told[0].guests) - 1
    prompts = [[captions.caption(story, block) for block in range(last + 1)] for story in told]
    texts, which = stage_figures.read_texts(model, prompts)
    frames, ids = recall.last_block(model, state, stage_figures.text_of(texts, which[:, last]))
    wanted, (chosen,) = stage_figures.play(
        model,
        prompts,
        seeds=[7, 7],
        videos=range(2),
        truth=np.stack([world.render(story) for story in told]),
        first=last,
    )
    np.testing.assert_array_equal(ids, chosen)
    np.testing.assert_array_equal(frames, wanted)


@pytest.mark.parametrize("way", ["paper", "recency"])
def test_a_history_keeps_the_queries_of_recent_blocks_if_any_way_asks_them(model, told, way):
    ways = [recall.VARIANTS[name] for name in ("affinity", way)]
    state = recall.history(recall._asking(model, ways), told, seed=7, videos=range(2))
    spec = recall.changed(SMALL, recall.VARIANTS[way]).memory
    copied = recall.copied(spec, state.memory)
    for layer, copy in zip(state.memory.layers, copied.layers, strict=True):
        assert layer.queries.shape[1] == (way == "paper")
        assert (np.abs(layer.queries) > 0).all()
        np.testing.assert_array_equal(copy.queries, layer.queries)


def test_a_way_finds_frames_at_its_own_positions(model, told, state, monkeypatch):
    """A first layer's keys depend on no choice: a history of the way's own has the same ones, and where they are."""
    exp = recall.changed(SMALL, recall.VARIANTS["all-true"])
    monkeypatch.setitem(recall.VARIANTS, "recency", recall.VARIANTS["all-true"])
    own = recall.history(model, told, seed=7, videos=range(2))
    wanted = tiny.committed(exp, own.memory)
    found = tiny.committed(exp, recall.copied(exp.memory, state.memory))
    np.testing.assert_allclose(found.k[0], wanted.k[0], atol=1e-5)
    np.testing.assert_allclose(found.v[0], wanted.v[0], atol=1e-5)
    assert abs(tiny.committed(exp, state.memory).k[0] - wanted.k[0]).max() > 1e-2


@pytest.mark.parametrize("gaps", [(), (1,), (8, 8), (2, 3, 4, 5, 6), (0, 9)])
def test_gaps_that_cannot_be_compared_are_refused(model, gaps):
    with pytest.raises(InputError, match=r"gaps=\(.*must be one to 4 different numbers above 1"):
        recall.forced(model, recall.variants_of("recency"), gaps=gaps, videos=2)


def test_other_models_and_no_videos_are_refused(model):
    other = dataclasses.replace(
        model, experiment=dataclasses.replace(SMALL, latent=(10, 8), name="wide")
    )
    with pytest.raises(InputError, match="'wide' draws no stage videos"):
        recall.forced(other, recall.variants_of("recency"))
    with pytest.raises(InputError, match="0 videos"):
        recall.forced(model, recall.variants_of("recency"), gaps=(2,), videos=0)
    forgetful = model.with_settings(["cache.top=0"])
    with pytest.raises(InputError, match=r"cache.top=0 attends to no packed block.* set it to 1"):
        recall.forced(forgetful, recall.variants_of("recency"), gaps=(2,), videos=1)
