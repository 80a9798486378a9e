"""Files of prompts: what a line may say, what it must not, and what counts as finished."""

import json

import pytest

from packforcing_jax.errors import InputError
from packforcing_jax.sampling import prompt_files


def read(tmp_path, text, name="lines.jsonl"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return prompt_files.read(tmp_path / name)


def test_text_files_hold_a_prompt_per_line(tmp_path):
    found = read(tmp_path, '# heading\n a red disc \n\n{"prompt": 3}\n', "lines.txt")
    assert [job.entries for job in found] == [
        ((0, "a red disc", ""),),
        ((0, '{"prompt": 3}', ""),),
    ]
    assert [job.source.rpartition(",")[2] for job in found] == [" line 2", " line 4"]


def test_json_lines_hold_settings(tmp_path):
    line = {
        "timeline": [[0, "a"], [7, "b: c"]],
        "seconds": 2.5,
        "seed": 4,
        "memory": "paper",
        "set": ["cache.top=3"],
    }
    (job,) = read(tmp_path, json.dumps(line))
    assert job.entries == ((0, "a", ""), (7, "b: c", ""))
    assert (job.seconds, job.seed, job.memory, job.overrides, job.blocks) == (
        2.5,
        4,
        "paper",
        ("cache.top=3",),
        None,
    )


WRONG = {
    "not JSON": ("a red disc", "line 1 is not JSON"),
    "cut off": ('{"prompt": "a"', "not JSON"),
    "deep": ("[" * 100_000, "not JSON"),
    "a list": ("[1]", "not a table"),
    "unknown key": ('{"promt": "a"}', "'promt' is unknown; did you mean prompt"),
    "neither": ('{"seed": 3}', "either prompt or timeline"),
    "both": ('{"prompt": "a", "timeline": [[0, "a"]]}', "either prompt or timeline"),
    "empty prompt": ('{"prompt": "  "}', "prompt is empty"),
    "prompt of a number": ('{"prompt": 3}', "prompt=3 is of the wrong kind"),
    "pairs of three": ('{"timeline": [[0, "a", 1]]}', r"list of \[block, prompt\]"),
    "late start": ('{"timeline": [[2, "a"]]}', "must be for block 0"),
    "empty timeline": ('{"timeline": []}', "names no prompt"),
    "fraction of a block": ('{"timeline": [[0.5, "a"]]}', r"list of \[block, prompt\]"),
    "two lengths": ('{"prompt": "a", "blocks": 3, "seconds": 3}', "exclude each other"),
    "no blocks": ('{"prompt": "a", "blocks": 0}', "blocks=0"),
    "blocks of true": ('{"prompt": "a", "blocks": true}', "blocks=True is of the wrong kind"),
    "endless": ('{"prompt": "a", "seconds": Infinity}', "seconds=inf"),
    "NaN": ('{"prompt": "a", "seconds": NaN}', "seconds=nan"),
    "negative seed": ('{"prompt": "a", "seed": -1}', "seed=-1"),
    "unknown memory": ('{"prompt": "a", "memory": "big"}', "memory='big'"),
    "name with a path": ('{"prompt": "a", "name": "../x"}', "name='../x'"),
    "hidden name": ('{"prompt": "a", "name": ".x"}', "name='.x'"),
    "set of a number": ('{"prompt": "a", "set": [3]}', "set="),
    "nothing": ("\n\n", "holds no prompt"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_lines_are_one_sentence_that_names_them(tmp_path, case):
    text, named = WRONG[case]
    with pytest.raises(InputError, match=named) as raised:
        read(tmp_path, text)
    assert "lines.jsonl" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    for name in ("binary.txt", "nowhere.txt", "."):
        with pytest.raises(InputError, match="cannot be read"):
            prompt_files.read(tmp_path / name)


def test_names_come_from_prompts_and_never_meet(tmp_path):
    lines = ["A red disc!", "a RED disc", "x" * 90, "…"]
    found = prompt_files.named(read(tmp_path, "\n".join(lines), "lines.txt"))
    assert [job.name for job in found] == ["a-red-disc", "a-red-disc-2", "x" * 48, "video"]
    twice = read(tmp_path, '{"prompt": "a", "name": "n"}\n{"prompt": "b", "name": "n"}\n')
    with pytest.raises(InputError, match="line 2: name='n' was used above"):
        prompt_files.named(twice)


def test_a_key_changes_with_everything_it_is_made_of():
    keys = {
        prompt_files.key(seed=1, prompts=[(0, "a")]),
        prompt_files.key(seed=2, prompts=[(0, "a")]),
        prompt_files.key(seed=1, prompts=[(0, "b")]),
    }
    assert len(keys) == 3
    assert prompt_files.key(a=1, b=2) == prompt_files.key(b=2, a=1)


def test_the_ledger_trusts_only_files_that_are_as_they_were(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"12345")
    prompt_files.Ledger(tmp_path).add("k", tmp_path / "v.mp4")
    assert prompt_files.Ledger(tmp_path).holds("k")
    assert not prompt_files.Ledger(tmp_path).holds("other")
    with (tmp_path / prompt_files.FINISHED).open("ab") as file:
        file.write(b'{"key": "half')
    prompt_files.Ledger(tmp_path).add("second", tmp_path / "v.mp4")
    assert prompt_files.Ledger(tmp_path).holds("k")
    assert prompt_files.Ledger(tmp_path).holds("second")
    (tmp_path / "v.mp4").write_bytes(b"1234")
    assert not prompt_files.Ledger(tmp_path).holds("k")


def test_a_list_of_finished_videos_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / prompt_files.FINISHED).mkdir()
    with pytest.raises(InputError, match=r"finished\.jsonl is a folder"):
        prompt_files.Ledger(tmp_path)
