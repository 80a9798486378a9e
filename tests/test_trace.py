"""A trace holds what was recalled, survives kills and full disks, and goes on where it stopped."""

import contextlib
import dataclasses
import hashlib
import json
import resource
import signal

import diaries
import numpy as np
import pytest

from packforcing_jax.errors import InputError, MachineError
from packforcing_jax.sampling import trace


@pytest.fixture
def path(tmp_path):
    return diaries.write(tmp_path / "run.jsonl", blocks=12)


def test_what_comes_back_is_what_was_recalled(path):
    found = trace.read(path)
    assert found.cache == diaries.SMALL
    assert (found.header["experiment"], found.header["seed"], found.note) == ("stage", 5, "")
    blocks = list(diaries.finished(blocks=12))
    assert [block.index for block in found.blocks] == list(range(12))
    for block, true in zip(found.blocks, blocks):
        assert (block.prompt, block.sink_sum, block.layout) == (
            true.prompt,
            true.sink_sum,
            true.layout,
        )
        assert block.latent == hashlib.sha256(true.latent.tobytes()).hexdigest()
        for number, layer in enumerate(block.layers):
            valid = true.block_ids[number] >= 0
            np.testing.assert_array_equal(layer.ids, true.block_ids[number][valid])
            np.testing.assert_array_equal(layer.scores.astype("f4"), true.scores[number][valid])
            np.testing.assert_array_equal(
                layer.positions.astype("f4"), true.positions[number][valid]
            )
            np.testing.assert_array_equal(layer.ages, true.index - true.block_ids[number][valid])
    assert [len(block.layers[1].ids) for block in found.blocks] == [
        0,
        0,
        0,
        0,
        1,
        2,
        3,
        4,
        4,
        4,
        4,
        4,
    ]


def test_values_that_are_not_finite_never_reach_the_file(tmp_path):
    *_, block = diaries.finished(blocks=9)
    block.scores[1, 2] = np.nan
    block.scores[2, 0] = np.inf
    block.positions[0, 1] = -np.inf
    block.layout["step"] = np.nan
    with trace.Writer(tmp_path / "a", diaries.head()) as writer:
        writer.write(block)
    text = (tmp_path / "a").read_text()
    assert not {"NaN", "Infinity"} & set(
        text.replace(",", " ").replace("[", " ").replace("]", " ").split()
    )
    layers = trace.read(tmp_path / "a").blocks[0].layers
    assert [np.isnan(layers[row].scores).tolist() for row in (1, 2)] == [[0, 0, 1, 0], [1, 0, 0, 0]]
    assert np.isnan(layers[0].positions).tolist() == [0, 1, 0, 0]


def test_a_memory_that_packs_nothing_leaves_empty_layers(tmp_path):
    cfg = dataclasses.replace(diaries.SMALL, sink=4, recent=5, top=0, capacity=0)
    found = trace.read(diaries.write(tmp_path / "a", cfg, blocks=5))
    assert all(len(layer.ids) == 0 for block in found.blocks for layer in block.layers)


def test_each_line_is_on_disk_when_write_returns_and_position_is_behind_it(tmp_path):
    file = tmp_path / "new folder" / "a"
    with trace.Writer(file, diaries.head()) as writer:
        assert (writer.position, file.exists(), file.parent.exists()) == (0, False, False)
        for count, block in enumerate(diaries.finished(blocks=6), start=1):
            writer.write(block)
            assert writer.position == writer.sync() == file.stat().st_size
            assert len(trace.read(file).blocks) == count
    assert len(file.read_text().splitlines()) == 7


def test_without_a_block_there_is_no_file_and_an_old_one_stays(tmp_path, path):
    before = path.read_bytes()
    for file in (tmp_path / "none", path):
        with trace.Writer(file, diaries.head()):
            pass
    assert not (tmp_path / "none").exists()
    assert path.read_bytes() == before


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_a_run_that_goes_on_writes_the_file_of_an_unbroken_one(tmp_path, path, cut):
    whole = path.read_bytes()
    again = tmp_path / "again"
    blocks = list(diaries.finished(blocks=12))
    with trace.Writer(again, diaries.head()) as writer:
        positions = [writer.write(block) or writer.position for block in blocks]
    again.write_bytes(whole + b'{"block": 12, "pro')
    with trace.Writer(again, diaries.head(), position=positions[cut - 1]) as writer:
        assert writer.position == positions[cut - 1]
        for block in blocks[cut:]:
            writer.write(block)
    assert again.read_bytes() == whole


def test_only_the_file_of_the_same_run_is_continued(tmp_path, path):
    size = path.stat().st_size
    before = path.read_bytes()
    other = diaries.head(dataclasses.replace(diaries.SMALL, top=3))
    cases = [
        (path, diaries.head(), size + 1, f"has {size} bytes"),
        (path, diaries.head(), size - 1, "no line that"),
        (path, other, size, "cache="),
        (path, diaries.head() | {"seed": 6}, size, "seed=5, here 6"),
        (path, diaries.head(), -1, "negative"),
        (tmp_path / "none", diaries.head(), 7, "has 0 bytes"),
    ]
    for file, head, position, said in cases:
        with pytest.raises(InputError, match=said):
            trace.Writer(file, head, position=position)
    trace.Writer(path, diaries.head() | {"prompts": ["others", "later"]}, position=size).close()
    assert path.read_bytes() == before


def test_places_that_cannot_hold_a_trace_are_refused_before_the_run(tmp_path, path):
    assert trace.check_writable(tmp_path / "not" / "yet" / "a") is None
    for file, said in (
        (tmp_path, "is a folder"),
        (path / "a", "which is a file"),
        ("/proc/a", "not writable"),
    ):
        with pytest.raises(InputError, match=said):
            trace.Writer(file, diaries.head())
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@contextlib.contextmanager
def room_for(size):
    """No file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_keeps_the_lines_before(tmp_path, path):
    file = tmp_path / "full"
    blocks = list(diaries.finished(blocks=12))
    lines = path.read_bytes().splitlines(keepends=True)
    room = sum(map(len, lines[:9])) + 40  # the header, eight blocks and a bit
    writer = trace.Writer(file, diaries.head())
    with room_for(room):
        for block in blocks[:8]:
            writer.write(block)
        with pytest.raises(
            MachineError, match="full failed .File too large.; what it holds is kept"
        ):
            writer.write(blocks[8])
    assert file.read_bytes() == b"".join(lines[:9])
    writer.write(blocks[8])
    writer.close()
    assert file.read_bytes() == b"".join(lines[:10])


def test_a_disk_that_is_full_from_the_start_leaves_nothing(tmp_path):
    with (
        room_for(100),
        pytest.raises(MachineError, match="is kept"),
        trace.Writer(tmp_path / "a", diaries.head()) as writer,
    ):
        writer.write(next(diaries.finished()))
    assert list(tmp_path.iterdir()) == []


def test_a_last_line_that_was_cut_off_is_left_out_with_a_note(path):
    data = path.read_bytes()
    last = data.rindex(b"\n", 0, -1) + 1
    for end, blocks in ((len(data) - 1, 12), (len(data) - 2, 11), (last + 1, 11), (last, 11)):
        path.write_bytes(data[:end])
        found = trace.read(path)
        assert len(found.blocks) == blocks
        assert found.note == (
            "line 13 was cut off and is left out" if end in (len(data) - 2, last + 1) else ""
        )


def edited(path, number, edit):
    """Line `number` of the file changed by `edit`, a function of its JSON."""
    lines = path.read_text().splitlines()
    found = json.loads(lines[number - 1])
    edit(found)
    lines[number - 1] = json.dumps(found)
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("number", "edit", "said"),
    [
        (1, lambda line: line.update(trace=3), "is version 3, but 2 is read here"),
        (1, lambda line: line.pop("trace"), "has no 'trace'"),
        (1, lambda line: line.update(layers=0), "has 0 layers"),
        (1, lambda line: line["cache"].pop("top"), "differ from this version's in top"),
        (1, lambda line: line["cache"].update(size=3), "differ from this version's in size"),
        (1, lambda line: line["cache"].update(top=True), "'top' is no int"),
        (1, lambda line: line["cache"].update(span="wide"), "cache.span='wide' is unknown"),
        (1, lambda line: line["cache"].update(score_pool=4), "'score_pool' is no list"),
        (4, lambda line: line.pop("sink_sum"), "has no 'sink_sum'"),
        (4, lambda line: line.update(block="3"), "'block' is no int"),
        (4, lambda line: line.update(block=-1), "is of block -1"),
        (4, lambda line: line["layers"].pop(), "has 2 layers instead of 3"),
        (
            4,
            lambda line: line["layout"].pop("recent_position"),
            "its layout has no recent_position",
        ),
        (
            4,
            lambda line: line["layout"].update(step="3"),
            "'step' holds something that is no number",
        ),
        (
            9,
            lambda line: line["layers"][1]["ids"].pop(),
            "ids, scores, ages, positions differ in length",
        ),
        (
            9,
            lambda line: line["layers"][1].update(ids=[1, 2, 3, 0.5]),
            "'ids' holds something that is no number",
        ),
        (9, lambda line: line["layers"][1].update(ids=[1, 2, 3, 10**30]), "too large"),
        (9, lambda line: line["layers"][1].update(positions=[1, 2, 3, float("nan")]), "holds NaN"),
        (9, lambda line: line.update(layers=[3, 4, 5]), "is no JSON object"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(path, number, edit, said):
    edited(path, number, edit)
    with pytest.raises(InputError) as failure:
        trace.read(path)
    assert f"line {number}: " in str(failure.value)
    assert said in str(failure.value)
    assert str(failure.value).endswith("give a file written by sample --trace.")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "line 1: is not JSON"),
        (b"\n", "line 1: is not JSON"),
        (b'{"trace": 2, "exp', "line 1: is not JSON"),
        (b"\x00\x00\x00 ftypisom\n\xff\xfe", "line 1: is not JSON"),
        (b"[" * 100000 + b"\n", "line 1: is not JSON"),
        (b"3\n", "line 1: is no JSON object"),
        (json.dumps(diaries.head()).encode() + b"\n", "holds no finished block"),
        (json.dumps(diaries.head()).encode() + b"\n\n", "line 2: is not JSON"),
        (json.dumps(diaries.head()).encode() + b"\n[1, 2]\n", "line 2: is no JSON object"),
    ],
)
def test_files_that_are_no_trace_are_refused(tmp_path, data, said):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(InputError, match=said):
        trace.read(tmp_path / "a")
    for missing in (tmp_path, tmp_path / "b"):
        with pytest.raises(InputError, match="is no file"):
            trace.read(missing)
