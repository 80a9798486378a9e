"""Every invariant holds in honest runs of every memory, is caught when broken once, and the figures count right."""

import dataclasses
import itertools
import re

import diaries
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from packforcing_jax.config import CHOICES, PROFILES
from packforcing_jax.memory import layout as layouts
from packforcing_jax.sampling import inspect_trace, trace

MEMORIES = {
    **{
        rule: dataclasses.replace(diaries.SMALL, rope_adjustment=rule)
        for rule in CHOICES["cache.rope_adjustment"]
    },
    "fit": dataclasses.replace(diaries.SMALL, span="fit", max_position=19),
    "fit, none": dataclasses.replace(
        diaries.SMALL, span="fit", max_position=19, rope_adjustment="none"
    ),
    "fit, no room": dataclasses.replace(diaries.SMALL, span="fit", max_position=13),
    "all": dataclasses.replace(diaries.SMALL, selection="all"),
    "shared": dataclasses.replace(diaries.SMALL, scope="shared"),
    "two recent, no sink": dataclasses.replace(diaries.SMALL, sink=0, recent=6),
    "no recent": dataclasses.replace(diaries.SMALL, recent=0),
    "sharp only": dataclasses.replace(diaries.SMALL, sink=4, recent=5, top=0),
    **PROFILES,
}


def run(path, cfg=diaries.SMALL, edit=lambda blocks: None, **how):
    """The trace of a run whose blocks `edit` may have changed before they were written."""
    blocks = list(diaries.finished(cfg, **how))
    edit(blocks)
    with trace.Writer(path, diaries.head(cfg, how.get("layers", diaries.LAYERS))) as writer:
        for block in blocks:
            writer.write(block)
    return trace.read(path)


@pytest.mark.parametrize("name", MEMORIES)
def test_an_honest_run_has_no_problems(tmp_path, name):
    assert inspect_trace.problems(run(tmp_path / "a", MEMORIES[name], blocks=24)) == []


@pytest.mark.parametrize("name", MEMORIES)
def test_the_memory_plans_what_the_invariants_ask_for(name):
    cfg = MEMORIES[name]
    plan = jax.vmap(lambda block: layouts.layout(cfg, layouts.begin(block)))
    seen = jax.device_get(jax.jit(plan)(jnp.arange(24)))
    for block in range(24):
        layout = {
            name: float(getattr(seen, name)[block]) for name in trace.LAYOUT if name != "block"
        }
        ids = np.sort(seen.ids[block][seen.ids[block] >= 0])
        assert ids.tolist() == list(inspect_trace.visible(cfg, block))
        found = trace.Block(
            block, prompt="", latent="", sink_sum=0, layout=layout | {"block": cfg.block}, layers=()
        )
        assert list(inspect_trace._layout(cfg, None, found)) == []


def change(name, number, value):
    """Sets `name` of block `number`; `value` may be a function of what was there."""

    def edit(blocks):
        old = getattr(blocks[number], name)
        setattr(blocks[number], name, value(old) if callable(value) else value)

    return edit


def put(name, layer, rank, value):
    """Sets one entry of an array of block 12."""

    def edit(blocks):
        getattr(blocks[12], name)[layer, rank] = value

    return edit


def lay(**places):
    def edit(blocks):
        blocks[12].layout.update(places)

    return edit


def exchange(name):
    def edit(blocks):
        array = getattr(blocks[12], name)
        array[1, [0, 1]] = array[1, [1, 0]]

    return edit


def drop(blocks):
    """Takes the last packed block from one layer of block 12."""
    blocks[12].block_ids[2, 3] = -1


def chosen(*ids):
    """Layer 1 of block 12, which may recall 4 of 4 .. 10, recalls these."""

    def edit(blocks):
        blocks[12].block_ids[1] = ids

    return edit


WHERE = "Block 12, layer 1: "
BROKEN = {
    "a block is missing": (lambda blocks: blocks.pop(7), ["Block 8 stands where block 7 was due."]),
    "a block comes twice": (
        lambda blocks: blocks.insert(7, blocks[6]),
        ["Block 6 stands where block 7 was due."],
    ),
    "the start is missing": (
        lambda blocks: blocks.pop(0),
        ["Block 1 stands where block 0 was due."],
    ),
    "the sink is written": (
        change("sink_sum", 12, 77),
        [r"Block 12: .* to 77\.", r"Block 13: .* from 77 to \d+\."],
    ),
    "the full sink is written next": (change("sink_sum", 1, 77), [r"Block 2: .* from 77"]),
    "the sink moves": (
        lay(sink_position=3),
        [
            "the place of the sink is 3, but 0",
            "behind the packed row, is 18, but 21",
            *["begins at .*, but .* was due"] * 12,
        ],
    ),
    "a sink frame is lost": (
        lay(sink=5),
        [
            "number of frames of the sink is 5, but 6",
            "is 18, but 17",
            *["begins at .*, but .* was due"] * 12,
        ],
    ),
    "a recent frame is lost": (
        lay(recent=2),
        ["recent blocks is 2, but 3", "behind the recent frames, is 21, but 20"],
    ),
    "recent frames overlap": (
        lay(recent_position=16),
        ["recent frames, is 21, but 19", "packed row, is 16, but 18"],
    ),
    "the block overlaps": (
        lay(current_position=20.5),
        ["behind the recent frames, is 20.5, but 21"],
    ),
    "a short block": (lay(block=2), ["frames of the block is 2, but 3"]),
    "the row is uncounted": (
        lay(num_selected=3),
        ["packed blocks is 3, but 4", "packed row, is 18, but 15"],
    ),
    "the row is squeezed": (
        lay(step=2.5),
        [
            "span of a packed block is 2.5, but 3",
            "packed row, is 18, but 16",
            *[f"begins at {at}, but {due} was" for at, due in ((9, 8.5), (12, 11), (15, 13.5))] * 3,
        ],
    ),
    "a place is unknown": (lay(current_position=np.nan), ["is nan, but 21"]),
    "a gap in the row": (
        put("positions", 1, 2, 12.1),
        [WHERE + r"packed block \d+ begins at 12\.1\d*, but 12 was due\."],
    ),
    "a place is infinite": (
        put("positions", 1, 2, np.inf),
        [WHERE + r"packed block \d+ begins at nan"],
    ),
    "a score is infinite": (
        put("scores", 1, 2, np.inf),
        [WHERE + r"packed block \d+ has a score that is not finite"],
    ),
    "not in time order": (chosen(4, 8, 7, 9), [WHERE + "packed block 7 came behind 8"]),
    "one block twice": (chosen(4, 7, 7, 9), [WHERE + "packed block 7 came twice"]),
    "a sink block": (
        chosen(1, 5, 7, 9),
        [WHERE + "packed block 1 was recalled, but only 4 to 10 could be"],
    ),
    "too old a block": (
        chosen(3, 5, 7, 9),
        [WHERE + "packed block 3 was recalled, but only 4 to 10 could be"],
    ),
    "a recent block": (
        chosen(4, 5, 7, 11),
        [WHERE + "packed block 11 was recalled, but only 4 to 10 could be"],
    ),
    "a block to come": (
        chosen(4, 5, 7, 12),
        [WHERE + "packed block 12 was recalled, but only 4 to 10 could be"],
    ),
    "one block too few": (
        drop,
        ["Block 12, layer 2: 3 packed blocks were recalled, but 4 were due"],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_invariant_is_caught_where_it_is_broken_once(tmp_path, name):
    edit, sentences = BROKEN[name]
    found = inspect_trace.problems(run(tmp_path / "a", edit=edit, blocks=16))
    assert len(found) == len(sentences)
    for sentence in sentences:
        assert any(re.search(sentence, each) for each in found), (sentence, found)


@pytest.mark.parametrize(
    ("name", "edit", "sentence"),
    [
        (
            "incremental",
            lay(sink_position=0.0, recent_position=18.0, current_position=21.0),
            "true frame, is 21, but 36",
        ),
        ("sink_only", exchange("positions"), "begins at"),
        ("none", put("positions", 1, 0, 6.0), "begins at 6, but"),
        ("none", lay(sink_position=15), "the place of the sink is 15, but 0"),
        ("fit", lay(step=3.0), "span of a packed block is 3, but 1.75"),
        ("fit", lay(step=1.0), "span of a packed block is 1, but 1.75"),
        ("shared", chosen(4, 5, 6, 7), r"layer 1: recalled \[4, 5, 6, 7\], but layer 0 recalled"),
        ("all", drop, "layer 2: 6 packed blocks were recalled, but 7 were due"),
    ],
)
def test_each_rule_of_the_memory_has_its_own(tmp_path, name, edit, sentence):
    found = inspect_trace.problems(run(tmp_path / "a", MEMORIES[name], edit, blocks=16))
    assert any(re.search(sentence, each) for each in found), found


def test_ages_must_be_what_the_numbers_say(tmp_path):
    found = run(tmp_path / "a", blocks=9)
    found.blocks[8].layers[2].ages[1] += 1
    assert len(inspect_trace.problems(found)) == 1
    assert re.search(
        r"Block 8, layer 2: packed block \d is said to be \d blocks old, but is \d\.",
        inspect_trace.problems(found)[0],
    )


def test_float32_places_far_out_are_no_problem_and_a_real_shift_there_is_one(tmp_path):
    cfg = dataclasses.replace(diaries.SMALL, rope_adjustment="incremental")
    for first, shift, count in (
        (99, 0.0, 0),
        (99, 0.02, 3),
        (99_999, 0.0, 0),
        (99_999, 0.03, 0),
        (99_999, 1.0, 3),
    ):
        (last,) = diaries.finished(cfg, first + 1, first=first)
        last.positions[:, 2] += np.float32(shift)
        with trace.Writer(tmp_path / "a", diaries.head(cfg)) as writer:
            writer.write(last)
        assert (
            len(inspect_trace.problems(trace.read(tmp_path / "a"))) == count + 1
        )  # the blocks before are missing


def choices(*overrides, blocks=40):
    """Replaces what every layer recalls: layer i of each block takes the ids that sets[i] gives for it."""

    def edit(run):
        for block in run:
            for layer, ids in enumerate(overrides):
                valid = block.block_ids[layer] >= 0
                block.block_ids[layer, valid] = (
                    ids(block.index)[-valid.sum() :] if valid.any() else []
                )

    return edit


def test_figures_of_a_layer_are_those_counted_by_hand(tmp_path):
    cfg = dataclasses.replace(diaries.SMALL, capacity=50)
    newest = lambda block: [block - 5, block - 4, block - 3, block - 2]  # noqa: E731
    oldest = lambda block: [2, 3, 4, 5]  # noqa: E731
    found = run(tmp_path / "a", cfg, choices(newest, oldest), blocks=26, layers=2)
    first, second, random = inspect_trace.rows(found)
    full = range(7, 26)  # blocks that recall 4; those before see 1, 2 and 3
    early = [2, 2, 3, 2, 3, 4]  # ages at blocks 4, 5, 6: [2], [3, 2], [4, 3, 2]
    assert (
        first["recalled"]
        == second["recalled"]
        == random["recalled"]
        == pytest.approx((4 * 19 + 6) / 22)
    )
    assert first["mean_age"] == pytest.approx((sum(early) + 14 * 19) / 82)
    assert (first["median_age"], first["oldest"], first["old_share"]) == (3, 5, 0)
    assert (first["distinct"], second["distinct"]) == (22, 4)
    assert first["change"] == pytest.approx(2 / 5)  # 3 of 5 in common
    assert second["change"] == 0
    ages = [block - id for block in full for id in (2, 3, 4, 5)]
    assert second["old_share"] == pytest.approx(sum(age > 16 for age in ages) / 82)
    assert second["oldest"] == 23
    scores = [block.layers[1].scores for block in found.blocks[4:]]
    assert second["best"] == pytest.approx(np.mean([max(each) for each in scores]))
    assert second["last"] == pytest.approx(np.mean([min(each) for each in scores]))


def test_chance_is_what_random_choices_come_to(tmp_path):
    cfg = dataclasses.replace(diaries.SMALL, capacity=30)
    *layers, random = inspect_trace.rows(run(tmp_path / "a", cfg, blocks=150, layers=24))
    for name, within in (
        ("mean_age", 0.2),
        ("median_age", 1.1),
        ("old_share", 0.02),
        ("change", 0.02),
    ):
        assert np.mean([row[name] for row in layers]) == pytest.approx(random[name], abs=within), (
            name
        )
    assert random["oldest"] == 31


def test_chance_of_change_is_the_known_one():
    cfg = dataclasses.replace(PROFILES["paper"], capacity=500)
    for visible, known in ((24, 0.50), (32, 0.66), (48, 0.80), (112, 0.92)):
        assert len(inspect_trace.visible(cfg, visible + 3)) == visible
        chance = inspect_trace.jaccard_at_random(cfg, visible + 3, visible + 3)
        assert chance == pytest.approx(known, abs=0.01)


@pytest.mark.parametrize(("capacity", "blocks"), [(500, (6, 7)), (4, (12, 13)), (4, (12, 15))])
def test_chance_of_change_is_the_mean_over_all_pairs_of_choices(capacity, blocks):
    cfg = dataclasses.replace(diaries.SMALL, top=3, capacity=capacity)
    pairs = [
        [np.array(ids) for ids in itertools.combinations(inspect_trace.visible(cfg, block), 3)]
        for block in blocks
    ]
    distances = [inspect_trace.jaccard_distance(*pair) for pair in itertools.product(*pairs)]
    common = [len(np.intersect1d(*pair)) for pair in itertools.product(*pairs)]
    assert len(set(distances)) > 1
    assert inspect_trace.jaccard_at_random(cfg, *blocks) == pytest.approx(np.mean(distances))
    shares = np.bincount(common, minlength=4) / len(common)
    assert inspect_trace.in_common_at_random(cfg, *blocks) == pytest.approx(list(shares))


def test_ages_by_range_add_up_and_move_with_the_run(tmp_path):
    oldest = lambda block: [2, 3, 4, 5]  # noqa: E731
    cfg = dataclasses.replace(diaries.SMALL, capacity=50)
    found = inspect_trace.by_age(run(tmp_path / "a", cfg, choices(oldest), blocks=40, layers=1))
    names, shares = zip(*found)
    assert names == ("0-6", "7-13", "14-20", "21-27", "28-33", "34-39")
    np.testing.assert_allclose(np.sum(shares, axis=1), 1)
    assert [int(np.argmax(share)) for share in shares] == [
        0,
        1,
        2,
        3,
        3,
        4,
    ]  # ages 4, 5-8, 9-16, 17-32, ..., 33-64


@pytest.mark.parametrize("name", ["paper", "no-mid", "fit", "shared"])
@pytest.mark.parametrize("blocks", [1, 3, 33])
def test_the_table_fits_a_terminal(tmp_path, name, blocks):
    text = inspect_trace.table(run(tmp_path / "a", MEMORIES[name], blocks=blocks, layers=5))
    assert max(map(len, text.splitlines())) <= 80
    rows = [line.split()[0] for line in text.splitlines() if re.match(r" *(\d|random) ", line)]
    assert rows == [*"01234", "random"]
    assert "nan" not in text
    assert f"stage: {blocks} blocks, 5 layers" in text


def test_the_map_shows_who_recalled_what(tmp_path):
    cfg = dataclasses.replace(diaries.SMALL, capacity=7)
    found = run(tmp_path / "a", cfg, blocks=23, layers=2)
    image = inspect_trace.cells(found)
    scale = 720 // 23
    assert (image.shape, image.dtype) == ((23 * scale, 23 * scale, 3), np.uint8)
    cells = image[scale // 2 :: scale, scale // 2 :: scale]
    np.testing.assert_array_equal(cells.repeat(scale, 0).repeat(scale, 1), image)
    none, _, _, both = inspect_trace.RAMP
    for block in found.blocks:
        overrides = [set(layer.ids.tolist()) for layer in block.layers]
        seen = inspect_trace.visible(cfg, block.index)
        for id in range(23):
            colour = tuple(cells[block.index, id].tolist())
            count = sum(id in each for each in overrides)
            if count or id in seen:
                assert (colour == none, colour == both) == (count == 0, count == 2)
            elif id < block.index:
                assert colour == (
                    inspect_trace.FULL_RES
                    if id < 2 or id == block.index - 1
                    else inspect_trace.GONE
                )
            else:
                assert colour == (inspect_trace.NOW if id == block.index else inspect_trace.GONE)


def test_the_map_of_a_long_run_shrinks_and_loses_no_choice(tmp_path, monkeypatch):
    monkeypatch.setattr(inspect_trace, "MOST", 25)
    found = run(tmp_path / "a", blocks=61, layers=1)
    image = inspect_trace.cells(found)
    scale = 720 // 21
    assert image.shape == (21 * scale, 21 * scale, 3)  # three blocks to a cell
    cells = image[::scale, ::scale]
    for block in found.blocks:
        for id in block.layers[0].ids.tolist():
            if id // 3 != block.index // 3:
                assert tuple(cells[block.index // 3, id // 3].tolist()) == inspect_trace.RAMP[-1]


@pytest.mark.parametrize("blocks", [1, 16, 61, 400])
def test_the_map_stands_in_a_frame_that_names_its_axes_and_colours(tmp_path, blocks):
    found = run(tmp_path / "a", blocks=blocks, layers=1)
    inner = inspect_trace.cells(found)
    image = inspect_trace.heat_map(found)
    left = inspect_trace.LEFT
    top = inspect_trace.TOP
    side = len(inner)
    np.testing.assert_array_equal(image[top : top + side, left : left + side], inner)
    written = (image != np.array(inspect_trace.PAPER)).any(axis=-1)
    assert not written[[0, -1]].any()  # nothing is cut off at an edge
    assert not written[:, [0, -1]].any()
    assert written[top : top + side, :30].any()  # the title of the rows
    assert written[top + side + 25 :, left : left + side].any()  # and of the columns
    legend = {tuple(pixel) for pixel in image[:, left + side :].reshape(-1, 3).tolist()}
    colours = {
        inspect_trace.FULL_RES,
        inspect_trace.NOW,
        inspect_trace.GONE,
        *inspect_trace.RAMP[::3],
    }
    assert colours <= legend


@pytest.mark.parametrize(
    ("count", "side", "step"), [(1, 720, 1), (16, 720, 1), (61, 720, 5), (400, 400, 50)]
)
def test_axes_number_round_blocks_that_do_not_touch(count, side, step):
    assert inspect_trace._tick_step(count, side) == step


def test_a_broken_trace_is_still_shown(tmp_path):
    def edit(blocks):
        blocks[12].block_ids[1] = [0, 900, 900, 2**40]
        blocks[14].index = 2000
        blocks[15].index = 3

    found = run(tmp_path / "a", edit=edit, blocks=16)
    assert inspect_trace.cells(found).shape == (720, 720, 3)
    assert inspect_trace.heat_map(found).dtype == np.uint8
    assert "random" in inspect_trace.table(found)
    assert len(inspect_trace.problems(found)) > 6
