"""Two thousand random histories: whatever a block sees, where and how, is what the slow memory shows."""

import collections

import histories
import numpy as np
import pytest
import slow_memory

from packforcing_jax.config import CacheConfig
from packforcing_jax.memory import layout as layouts

CONFIGURATIONS = 16
RUNS = 9
VIDEOS = 15
ADJUSTMENTS = ("sink", "incremental", "sink", "sink_only", "incremental", "sink", "none")
SELECTIONS = ("affinity", "random", "paper_sum", "affinity", "recency", "all")


def drawn(number):
    """An experiment: any sizes without packed blocks, whole blocks with them; policies in turn, the rest by chance."""
    rng = np.random.default_rng(number)
    pick = lambda *values: values[rng.integers(len(values))]  # noqa: E731
    adjustment = ADJUSTMENTS[number % len(ADJUSTMENTS)]
    selection = SELECTIONS[number % len(SELECTIONS)]
    block = int(rng.integers(1, 5))
    top = pick(0, 1, 2, 2, 3, 3)
    unit = block if top else 1
    cfg = CacheConfig(
        block=block,
        top=top,
        capacity=top + pick(0, 1, 2, 4) if top else 0,
        sink=unit * pick(0, 1, 1, 2),
        recent=unit * pick(0, 1, 1, 2),
        rope_adjustment=adjustment,
        selection=selection,
        span="true" if adjustment == "incremental" else pick("true", "fit"),
        max_position=pick(9, 13, 22),
        key_multiple=pick(1, 8),
        score_pool=pick((1, 1, 1), (min(block, 2), 2, 1), (1, 1, 2)),
    )
    return histories.experiment(cfg, positions=pick("stretched", "native"))


def events_of(rng, blocks):
    """Before which blocks there is a cut or a flush, in every other run."""
    numbers = rng.permutation(np.arange(1, blocks))[: rng.integers(1, 4)]
    return {int(number): str(rng.choice(["cut", "flush"])) for number in numbers}


def told(exp, rng, blocks):
    return slow_memory.tell(exp, rng, blocks=blocks, layers=2, videos=VIDEOS)


def test_two_thousand_histories_are_seen_as_the_slow_memory_shows(capsys):
    """Each configuration is compiled once; many videos share a run, for every video chooses for itself."""
    tally = collections.Counter()
    count = 0
    for number in range(CONFIGURATIONS):
        exp = drawn(number)
        rng = np.random.default_rng((7, number))
        stacked = number % 2 == 1
        step = histories.stepper(exp, stacked=stacked)
        for run in range(RUNS):
            gap = float(run % 3 == 1) * rng.uniform(0, 30)
            story = told(exp, rng, rng.integers(5, 15))
            events = events_of(rng, len(story.q)) if run % 3 == 2 else None
            try:
                happened = histories.check_history(
                    exp, story, step, gap, stacked=stacked, events=events
                )
            except AssertionError as error:
                error.add_note(
                    f"configuration {number}, run {run}, gap {gap}, {events}: {exp.cache}"
                )
                raise
            tally = tally + happened
            count = count + VIDEOS
        assert step._cache_size() == 1
    assert count >= 2000
    assert {name: n for name, n in tally.items() if n >= 100}.keys() == {
        "dropped inside",
        "seen again",
        "past capacity",
        "squeezed",
        "gap",
        "cut",
        "flush",
    }
    with capsys.disabled():
        print(f"\n{count} histories, 0 failures; {dict(tally)}")


@pytest.mark.parametrize(
    ("adjustment", "changes"),
    [
        ("sink", {}),
        ("incremental", {"recent": 6, "score_heads": 1.0}),
        ("sink_only", {"recent": 6, "query_stride": 1, "recent_queries": False}),
        ("none", {"sink": 0}),
    ],
)
def test_recent_blocks_ask_through_every_history(adjustment, changes):
    """The paper's score, before and behind cuts and flushes, and with the past moved back."""
    sizes = {"block": 3, "sink": 3, "recent": 3, "top": 2, "capacity": 4, "query_stride": 5}
    cfg = CacheConfig(
        **sizes | {"rope_adjustment": adjustment, "score_pool": (3, 1, 2)} | changes,
        selection="paper",
    )
    exp = histories.experiment(cfg)
    step = histories.stepper(exp)
    for run in range(3):
        rng = np.random.default_rng((8, run))
        events = {4: "flush", 9: "cut"} if run == 2 else None
        tally = histories.check_history(
            exp, told(exp, rng, 14), step, 7.0 * (run == 1), events=events
        )
        assert tally["dropped inside"] > 0 or events


@pytest.mark.parametrize("adjustment", ["sink", "incremental", "sink_only", "none"])
def test_nothing_moves_until_something_is_dropped(adjustment):
    """With room for every block, true frame numbers are the packed timeline."""
    cfg = CacheConfig(
        block=3,
        sink=3,
        recent=6,
        top=7,
        capacity=7,
        rope_adjustment=adjustment,
        score_pool=(3, 1, 2),
    )
    for blocks in range(11):
        seen = slow_memory.visible(cfg, blocks)
        layout = layouts.layout(cfg, layouts.begin(blocks))
        assert (layout.sink_position, layout.recent_position, layout.current_position) == (
            0,
            len(seen.sink) + 3 * seen.count,
            3 * blocks,
        )
        begin = slow_memory.begins(cfg, seen, np.asarray(seen.archive, int))
        np.testing.assert_array_equal(begin, 3 * np.asarray(seen.archive))
        assert layout.num_selected == len(seen.archive) == max(0, blocks - 3)
