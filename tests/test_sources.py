"""Batches: the same whatever the number of processes, endless, resumed where they were, refused before the first."""

import dataclasses
import itertools
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from packforcing_jax.configs import stage

from packforcing_jax import config
from packforcing_jax.config import DataConfig
from packforcing_jax.data import records, sources
from packforcing_jax.errors import InputError

BLOCKS = 5  # of a clip of the tiny experiment
LATENT = (15, 8, 4, 12)


def encode(texts):
    """Ids that tell the text: its length, and its number if it ends in one."""
    ids = np.array(
        [
            [len(text), int(text.split()[-1])] if text[-1].isdigit() else [len(text), -1]
            for text in texts
        ]
    )
    return ids, np.ones_like(ids)


def reading(kind, path="", limit=0, exp=tiny.EXP):
    """What a run with such data gives to `sources.batches`."""
    return exp, DataConfig(kind=kind, path=str(path), limit=limit)


def example(number, **left_out):
    rng = np.random.default_rng(number)
    found = {
        "latent": rng.normal(size=LATENT).astype(np.float16),
        "trajectory": rng.normal(size=(3, *LATENT)).astype(np.float16),
        "low_res": rng.normal(size=(BLOCKS, *sources.low_res_shape(tiny.EXP))).astype(np.float16),
        "states": rng.normal(size=(3 + number % 4, 10)).astype(ml_dtypes.bfloat16),
        "prompt": np.frombuffer(f"clip {number}".encode(), np.uint8),
    }
    return {name: value for name, value in found.items() if name not in left_out}


def prepared(folder, count=7, make=example):
    with records.Writer(folder, kind="videos", about={}, examples=3) as out:
        for number in range(count):
            out.put(make(number))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    path = tmp_path_factory.mktemp("lines") / "prompts.txt"
    path.write_text("\n".join(f"a clip {number}" for number in range(7)))
    return path


def take(read, count, share=sources.Share(4), seed=3, **options):
    return list(
        itertools.islice(sources.batches(*read, share, seed=seed, encode=encode, **options), count)
    )


def numbers(raw):
    """Which prompts a batch holds."""
    return raw["ids"][:, 0, 1].tolist()


def test_records_come_as_they_were_prepared_with_states_padded(folder):
    (raw,) = take(reading("records", folder), 1)
    known = {each["latent"].tobytes(): each for each in map(example, range(7))}
    assert {name: value.shape for name, value in raw.items()} == {
        "latent": (4, *LATENT),
        "trajectory": (4, 3, *LATENT),
        "low_res": (4, BLOCKS, 2, 4, 4, 12),
        "states": (4, 16, 10),
    }
    for row in range(4):
        whole = known[raw["latent"][row].tobytes()]
        words = len(whole["states"])
        assert np.array_equal(raw["trajectory"][row], whole["trajectory"])
        assert np.array_equal(raw["low_res"][row], whole["low_res"])
        assert np.array_equal(raw["states"][row, :words], whole["states"])
        assert words < 16
        assert not raw["states"][row, words:].any()
    assert raw["states"].dtype == ml_dtypes.bfloat16


def test_every_example_once_in_each_epoch_each_time_in_another_order(lines):
    seen = list(itertools.chain(*map(numbers, take(reading("prompts", lines), 7))))
    epochs = [tuple(seen[at : at + 7]) for at in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) == 4
    again = list(itertools.chain(*map(numbers, take(reading("prompts", lines), 7, seed=4))))
    assert again != seen
    assert epochs[1] != tuple(again[:7]), "an epoch of one seed is the one before of the next seed"


@pytest.mark.parametrize("kind", ["prompts", "records", "stage"])
def test_batches_do_not_depend_on_the_number_of_processes(kind, folder, lines):
    read = {
        "prompts": reading("prompts", lines),
        "records": reading("records", folder),
        "stage": reading("stage", exp=stage.experiment),
    }[kind]
    name = "ids" if kind == "prompts" else "video" if kind == "stage" else "latent"
    whole = [raw[name] for raw in take(read, 2, sources.Share(6))]
    for processes in (2, 3):
        parts = [
            [raw[name] for raw in take(read, 2, sources.Share(6, p, processes))]
            for p in range(processes)
        ]
        for step in range(2):
            assert np.array_equal(np.concatenate([part[step] for part in parts]), whole[step])


def test_a_process_reads_only_its_own_rows(folder, monkeypatch):
    asked = []
    read = records.Records.__getitem__
    share = sources.Share(6, process=1, processes=3)
    held = sources.batches(*reading("records", folder), share, seed=3)
    monkeypatch.setattr(
        records.Records, "__getitem__", lambda self, at: asked.append(at) or read(self, at)
    )
    next(held)
    assert len(asked) <= 2 * (1 + 5), "two rows of the batch given out, and of those read ahead"


def test_it_goes_on_where_it_was_with_any_number_of_processes(lines):
    read = reading("prompts", lines)
    going = sources.batches(*read, sources.Share(6), seed=3, encode=encode)
    whole = [numbers(next(going)) for _ in range(3)]
    position = json.loads(json.dumps(going.get_state()))
    whole += [numbers(next(going)) for _ in range(2)]
    for process in range(2):
        share = sources.Share(6, process, processes=2)
        half = sources.batches(*read, share, seed=3, encode=encode)
        half.set_state(position)
        assert [numbers(next(half)) for _ in range(2)] == [
            row[3 * process : 3 * process + 3] for row in whole[3:]
        ]


def test_the_first_few_again_and_again(lines):
    seen = list(itertools.chain(*map(numbers, take(reading("prompts", lines, limit=3), 3))))
    assert set(seen) == {0, 1, 2}
    assert all(sorted(seen[at : at + 3]) == [0, 1, 2] for at in range(0, 12, 3))
    assert [numbers(raw) for raw in take(reading("prompts", lines, limit=1), 2)] == [[0] * 4] * 2


def test_the_stage_draws_new_clips_or_the_first_few_again():
    read = reading("stage", exp=stage.experiment)
    first, second = take(read, 2, sources.Share(3))
    assert set(first) == set(sources.STAGE)
    assert first["video"].shape == (3, 20, 32, 32, 3)
    assert len({clip.tobytes() for clip in (*first["video"], *second["video"])}) == 6
    few, more = take(reading("stage", limit=3, exp=stage.experiment), 2, sources.Share(3))
    for raw in (few, more):
        assert {clip.tobytes() for clip in raw["video"]} == {
            clip.tobytes() for clip in first["video"]
        }


def test_a_prompt_holds_for_every_block_and_a_timeline_from_its_blocks_on(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a clip 0"}\n{"timeline": [[0, "a clip 1"], [3, "another clip 2"]]}\n'
    )
    rows = [
        row for raw in take(reading("prompts", path), 1, sources.Share(2)) for row in raw["ids"]
    ]
    assert sorted(row[:, 1].tolist() for row in rows) == [[0] * 5, [1, 1, 1, 2, 2]]
    assert sorted(row[-1, 0] for row in rows) == [len("a clip 0"), len("another clip 2")]


def test_prompts_of_records_without_states_are_tokenised(tmp_path):
    folder = prepared(tmp_path / "set", make=lambda number: example(number, states=True))
    raw, *_ = take(reading("records", folder), 1, needs=("latent", "ids"))
    known = {example(number)["latent"].tobytes(): number for number in range(7)}
    assert raw["ids"].shape == (4, BLOCKS, 2)
    assert numbers(raw) == [known[latent.tobytes()] for latent in raw["latent"]]
    assert "have to be tokenised" in refused(reading("records", folder), encode=None)


def test_states_longer_than_the_config_reads_are_refused(folder):
    short = dataclasses.replace(tiny.EXP, text=dataclasses.replace(tiny.EXP.text, max_words=5))
    with pytest.raises(InputError, match="states of 6 words, but text.max_words=5"):
        take(reading("records", folder, exp=short), 4)


def test_a_damaged_record_stops_with_its_name(tmp_path):
    path = prepared(tmp_path / "set") / "part-00001.array_record"
    content = bytearray(path.read_bytes())
    content[content.index(b"clip 5")] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="part-00001.array_record, record 2, is damaged"):
        take(reading("records", tmp_path / "set"), 3)


def refused(read, **options):
    with pytest.raises(InputError) as raised:
        sources.batches(*read, sources.Share(4), **{"seed": 3, "encode": encode} | options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def of_size(**changes):
    return dataclasses.replace(tiny.EXP, **changes)


WRONG_SIZES = {
    "frames": (of_size(clip=12), r"latent float16\[15, 8, 4, 12\], but clip=12"),
    "rows": (of_size(latent=(12, 4)), r"latent=\(12, 4\).* need \[15, 12, 4, 12\]"),
    "channels": (
        of_size(
            codec=config.SpaceToDepthConfig(4),
            dit=dataclasses.replace(tiny.EXP.dit, in_channels=48, out_channels=48),
        ),
        r"need \[15, 8, 4, 48\]",
    ),
    "text": (
        of_size(
            text=dataclasses.replace(tiny.EXP.text, dim=14),
            dit=dataclasses.replace(tiny.EXP.dit, text_dim=14),
        ),
        r"states bfloat16\[\*, 10\].* text.dim=14",
    ),
    "blocks": (
        of_size(clip=18),
        r"low_res float16\[5, 2, 4, 4, 12\].*cache.block=3.* need \[6, 2, 4, 4, 12\]",
    ),
}


@pytest.mark.parametrize("case", WRONG_SIZES)
def test_records_of_other_sizes_are_refused(case, tmp_path):
    exp, named = WRONG_SIZES[case]
    only = {"text": ["states"], "blocks": ["low_res", "states"]}.get(case, ["latent", "states"])
    folder = prepared(
        tmp_path / "set", 1, make=lambda number: {name: example(number)[name] for name in only}
    )
    with pytest.raises(InputError, match=named):
        sources.batches(*reading("records", folder, exp=exp), sources.Share(4), seed=3)


def test_wrong_requests_are_refused_before_the_first_batch(folder, lines, tmp_path):
    (tmp_path / "empty.txt").write_text("\n# nothing\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be divided among 3 processes"):
        sources.Share(4, processes=3)
    assert "holds no prompt" in refused(reading("prompts", tmp_path / "empty.txt"))
    assert "cannot be read" in refused(reading("prompts", tmp_path / "binary.txt"))
    assert "does not exist" in refused(reading("prompts", tmp_path / "none.txt"))
    assert "name it in train.source.path" in refused(reading("prompts"))
    assert "is no prepared data set" in refused(reading("records", lines.parent))
    assert "limit=8 exceeds the 7 examples" in refused(reading("records", folder, limit=8))
    assert "limit=-1 is negative" in refused(reading("prompts", lines, limit=-1))
    assert "needs latent" in refused(reading("prompts", lines), needs=("latent",))
    assert "but this objective needs called" in refused(
        reading("records", folder), needs=("latent", "called")
    )
    assert "have to be tokenised" in refused(reading("prompts", lines), encode=None)
    assert "use the config `stage`" in refused(reading("stage"))


def test_rows_of_a_process_become_shards_of_one_array():
    mesh = jax.make_mesh((2, 1), ("data", "fsdp"))
    raw = {
        "latent": np.arange(24, dtype=np.float16).reshape(4, 3, 2),
        "ids": np.arange(4, dtype=np.int32),
    }
    placed = sources.global_batch(mesh, raw)
    for name, value in raw.items():
        assert placed[name].dtype == value.dtype
        assert np.array_equal(placed[name], value)
        assert [shard.data.shape[0] for shard in placed[name].addressable_shards] == [2, 2]


def test_a_kind_that_does_not_exist_names_the_nearest(lines):
    assert "train.source.kind='prompt' is unknown; did you mean prompts?" in refused(
        reading("prompt", lines)
    )


def test_the_form_of_low_latents_is_the_codecs():
    assert tiny.low_res(1).shape[2:] == sources.low_res_shape(tiny.EXP)
