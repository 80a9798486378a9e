"""Prepared data: what is put is read, an interruption costs and repeats nothing, and damage has a name."""

import json
import os
import resource
import shutil

import ml_dtypes
import numpy as np
import pytest

from packforcing_jax.data import records
from packforcing_jax.errors import InputError, MachineError
from packforcing_jax.io import atomic

ABOUT = {"clip": 5, "latent": (3, 2)}


def example(number, words=None):
    """One whose content tells which it is."""
    rng = np.random.default_rng(number)
    return {
        "latent": rng.normal(size=(5, 3, 2, 7)).astype(np.float16),
        "states": rng.normal(size=(words or 2 + number % 3, 6)).astype(ml_dtypes.bfloat16),
        "prompt": np.frombuffer(f"clip {number}".encode(), np.uint8),
    }


def writer(folder, examples=3, **changes):
    return records.Writer(
        folder, **{"kind": "videos", "about": ABOUT, "examples": examples} | changes
    )


def write(folder, count, left_out=(), stop=None, **changes):
    """`folder` with examples up to `count`, those that it has already not put again; ends with `stop` if given."""
    with writer(folder, **changes) as out:
        for number in range(out.taken, count):
            out.put(None if number in left_out else example(number))
        if stop:
            raise stop
    return folder


def prompts(folder):
    held = records.opened(folder)
    return [bytes(held[at]["prompt"]).decode() for at in range(len(held))]


def all_of(count):
    return [f"clip {number}" for number in range(count)]


def test_what_is_put_is_read_bit_for_bit_in_any_order(tmp_path):
    held = records.opened(write(tmp_path / "set", 8))
    assert len(held) == 8
    assert [shard.examples for shard in held.notes.shards] == [3, 3, 2]
    for number in (7, 0, 5, 3):
        for name, value in example(number).items():
            read = held[number][name]
            assert read.dtype == value.dtype
            assert read.tobytes() == value.tobytes()
            assert read.shape == value.shape


def test_the_folder_says_what_it_is(tmp_path):
    said = json.loads((write(tmp_path / "set", 4) / records.COMPLETE).read_text())
    assert said["kind"] == "videos"
    assert said["examples"] == 4
    assert said["about"] == {"clip": 5, "latent": [3, 2]}
    assert said["fields"]["latent"] == {"dtype": "float16", "shape": [5, 3, 2, 7]}
    assert said["fields"]["states"] == {"dtype": "bfloat16", "shape": [None, 6]}


def test_a_new_file_begins_when_one_is_large_enough(tmp_path):
    size = len(records.packed(example(0, words=4)))
    with writer(tmp_path / "set", examples=100, size=2 * size - 1) as out:
        for _ in range(5):
            out.put(example(0, words=4))
    assert [shard.examples for shard in out.notes.shards] == [2, 2, 1]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 7])
def test_ctrl_c_keeps_every_example_and_repeats_none(tmp_path, count):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "set", count, stop=KeyboardInterrupt)
    with pytest.raises(InputError, match="unfinished; run the `prepare` command"):
        records.opened(tmp_path / "set")
    assert writer(tmp_path / "set").taken == count
    assert prompts(write(tmp_path / "set", 8)) == all_of(8)


@pytest.mark.parametrize("at", [3, 4, 5])
def test_an_interruption_between_an_example_and_its_count_repeats_none(tmp_path, monkeypatch, at):
    append = records.Writer._append

    def interrupted(out, record):
        append(out, record)
        if out.taken == at:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(records.Writer, "_append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "set", 8, left_out=(1,))
    assert writer(tmp_path / "set").taken == at + 1
    assert prompts(write(tmp_path / "set", 8)) == [
        f"clip {number}" for number in (0, 2, 3, 4, 5, 6, 7)
    ]


@pytest.mark.parametrize(("module", "name"), [(atomic, "sync"), (records, "_count")])
def test_an_interruption_while_a_file_is_finished_loses_none(tmp_path, monkeypatch, module, name):
    calls = []

    def interrupted(path, real=getattr(module, name)):
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "set", 14)
    assert prompts(write(tmp_path / "set", 14)) == all_of(14)


def test_a_kill_costs_only_the_open_file(tmp_path):
    folder = tmp_path / "killed"
    with writer(tmp_path / "set") as out:
        for number in range(7):
            out.put(example(number))
        shutil.copytree(tmp_path / "set", folder)
    assert (folder / "part-00002.array_record").exists()
    assert writer(folder).taken == 6
    assert prompts(write(folder, 8)) == all_of(8)


def test_items_left_out_are_not_asked_for_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "set", 6, left_out=(0, 4), stop=KeyboardInterrupt)
    assert prompts(write(tmp_path / "set", 8)) == [
        f"clip {number}" for number in (1, 2, 3, 5, 6, 7)
    ]


def test_a_full_disk_keeps_the_files_before(tmp_path):
    folder = tmp_path / "set"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(KeyboardInterrupt):
        write(folder, 4, stop=KeyboardInterrupt)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (100_000, limits[1])
    )  # a file of records takes 128 KiB at least
    try:
        with pytest.raises(
            MachineError, match="part-00002.* 4 examples in other files are kept: free space"
        ):
            write(folder, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert prompts(write(folder, 8)) == all_of(8)


def test_a_finished_set_stays_as_it_is(tmp_path):
    write(tmp_path / "set", 4)
    with writer(tmp_path / "set") as out:
        assert out.complete
        assert out.taken == 4
    assert prompts(tmp_path / "set") == all_of(4)


def test_one_writer_at_a_time(tmp_path):
    with (
        writer(tmp_path / "set"),
        pytest.raises(InputError, match="written by another process"),
        writer(tmp_path / "set"),
    ):
        pass


def stranger(folder):
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    return folder


def begun_otherwise(folder):
    with pytest.raises(KeyboardInterrupt):
        write(folder, 1, about=ABOUT | {"clip": 9}, stop=KeyboardInterrupt)
    return folder


def under_a_file(folder):
    folder.write_text("")
    return folder / "set"


REFUSED = {
    "another's folder": (stranger, r"holds other files \(thesis.txt\)"),
    "other settings": (begun_otherwise, "clip=9, not 5"),
    "another kind": (lambda folder: write(folder, 1, kind="prompts"), "kind=prompts, not videos"),
    "below a file": (under_a_file, "which is a file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_of_something_else_is_left_alone(tmp_path, case):
    make, named = REFUSED[case]
    folder = make(tmp_path / "set")
    with pytest.raises(InputError, match=named):
        writer(folder)


def test_a_beginning_without_an_example_binds_nobody(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "set", 0, kind="prompts", stop=KeyboardInterrupt)
    assert prompts(write(tmp_path / "set", 2)) == all_of(2)


def test_an_example_of_another_form_is_refused(tmp_path):
    with writer(tmp_path / "set") as out:
        out.put(example(0))
        with pytest.raises(
            InputError, match=r"item 2 gives latent float16\[4, .*latent float16\[5, 3, 2, 7\]"
        ):
            out.put(example(1) | {"latent": np.zeros((4, 3, 2, 7), np.float16)})


def flip(path, needle):
    content = bytearray(path.read_bytes())
    content[content.index(needle) + 3] ^= 1
    path.write_bytes(content)


def rewrite(path, name, value):
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))


def other_fields(folder):
    said = json.loads((folder / records.COMPLETE).read_text())["fields"]
    rewrite(
        folder / records.COMPLETE,
        "fields",
        said | {"latent": {"dtype": "float16", "shape": [5, 3, 7, 2]}},
    )


FIRST = "part-00000.array_record"
DAMAGE = {
    "missing file": (lambda folder: (folder / FIRST).unlink(), f"{FIRST} is missing"),
    "cut file": (
        lambda folder: os.truncate(folder / FIRST, 70_000),
        f"{FIRST} has 70000 bytes instead of",
    ),
    "blank file": (
        lambda folder: (folder / FIRST).write_bytes(bytes((folder / FIRST).stat().st_size)),
        f"{FIRST} is damaged",
    ),
    "another file": (
        lambda folder: (folder / FIRST).write_bytes(
            (folder / "part-00002.array_record").read_bytes()
        ),
        f"{FIRST} holds 2 examples instead of 3",
    ),
    "damaged first record": (
        lambda folder: flip(folder / "part-00001.array_record", b"clip 3"),
        "part-00001.array_record, record 0, is damaged",
    ),
    "other form": (
        other_fields,
        r"record 0, holds latent float16\[5, 3, 2, 7\].* says latent float16\[5, 3, 7, 2\]",
    ),
    "no notes": (lambda folder: (folder / records.COMPLETE).unlink(), "is no prepared data set"),
    "cut notes": (
        lambda folder: os.truncate(folder / records.COMPLETE, 40),
        "dataset.json is damaged",
    ),
    "other format": (
        lambda folder: rewrite(folder / records.COMPLETE, "format", "x 9"),
        "is of format 'x 9'",
    ),
    "notes of a list": (
        lambda folder: (folder / records.COMPLETE).write_text("[]"),
        "dataset.json is damaged",
    ),
    "counts that are none": (
        lambda folder: rewrite(
            folder / records.COMPLETE, "shards", [{"file": FIRST, "examples": 3, "bytes": [9]}]
        ),
        r"has counts \(3, \[9\]\)",
    ),
    "a file elsewhere": (
        lambda folder: rewrite(
            folder / records.COMPLETE, "shards", [{"file": "../x", "examples": 3, "bytes": 9}]
        ),
        "'../x' is no name of a file",
    ),
    "empty": (lambda folder: rewrite(folder / records.COMPLETE, "shards", []), "holds no example"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_before_the_first_step(tmp_path, case):
    damage, named = DAMAGE[case]
    damage(write(tmp_path / "set", 8))
    with pytest.raises(InputError, match=named) as raised:
        records.opened(tmp_path / "set")
    assert "\n" not in str(raised.value)


def test_a_damaged_record_further_back_is_named_when_it_is_read(tmp_path):
    flip(write(tmp_path / "set", 8) / "part-00001.array_record", b"clip 5")
    held = records.opened(tmp_path / "set")
    with pytest.raises(
        InputError, match="part-00001.array_record, record 2, is damaged .*prepare the data again"
    ):
        held[5]
    assert bytes(held[4]["prompt"]) == b"clip 4"


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="is no prepared data set"):
        records.opened(tmp_path / "nowhere")
    with pytest.raises(IndexError):
        records.opened(write(tmp_path / "set", 2))[2]
