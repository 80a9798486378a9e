"""Text, captions, databases and configs as people really have them: read as they are meant, or refused by name."""

import json
import subprocess
import sys

import numpy as np
import pytest

from packforcing_jax.cli import main
from packforcing_jax.config import loading
from packforcing_jax.data import lmdb_files
from packforcing_jax.errors import InputError
from packforcing_jax.io import lines
from packforcing_jax.sampling import prompt_files, timelines
from packforcing_jax.training import importing

ENDS = ("\u2028", "\u2029", "\x85", "\x0c", "\x0b", "\x1c", "\x1d", "\x1e", "\r")


def written(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def prompts(path):
    return [job.entries[0].prompt for job in prompt_files.read(path)]


@pytest.mark.parametrize("end", ENDS, ids=repr)
def test_lines_end_at_line_feeds_alone(tmp_path, end):
    one = f"a red{end}disc"
    text = written(tmp_path / "p.txt", f"{one}\r\nlime\n")
    assert prompts(text) == [one, "lime"]
    if end not in "\r\x0b\x0c\x1c\x1d\x1e":
        table = written(tmp_path / "p.jsonl", f'{{"prompt": "{one}"}}\n')
        assert prompts(table) == [one]
    story = written(tmp_path / "story.txt", f"0: {one}\n3: lime\n")
    assert [entry.prompt for entry in timelines.read(story)] == [one, "lime"]


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "story.txt"])
def test_a_byte_order_mark_is_skipped(tmp_path, name):
    text = {"p.txt": "# c\nlime", "p.jsonl": '{"prompt": "lime"}', "story.txt": "0: lime"}[name]
    path = written(tmp_path / name, text, "utf-8-sig")
    assert lines.read(path, "it", "x")[0][0] in "#{0"
    read = timelines.read(path)[0].prompt if name == "story.txt" else prompts(path)[0]
    assert read == "lime"


@pytest.mark.parametrize("name", ["P.TXT", "p.Txt", "p.JSONL", "p.JsonL"])
def test_the_case_of_a_suffix_does_not_matter(tmp_path, name):
    text = "lime" if "txt" in name.lower() else '{"prompt": "lime"}'
    assert prompts(written(tmp_path / name, text)) == ["lime"]


@pytest.mark.parametrize(
    "name", ["p.json", "p.csv", "p.parquet", "p.yaml", "p.md", "p", "p.jsonl.bak", ".txt"]
)
def test_prompts_of_another_format_are_refused_by_name(tmp_path, name):
    path = written(tmp_path / name, '{"prompt": "lime"}')
    with pytest.raises(InputError, match=r"ends in .*give a \.txt .* or a \.jsonl") as raised:
        prompt_files.read(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_prompts_of_another_encoding_are_refused_by_name(tmp_path, encoding):
    path = written(tmp_path / "p.txt", "café", encoding)
    with pytest.raises(InputError, match=f"{path} cannot be read .*codec can't decode"):
        prompt_files.read(path)


NAMES = {
    "two unnamed and one named as the second": ["a b", "a b", ("c", "a-b-2")],
    "named first": [("c", "a-b"), "a b", "a b"],
    "other case": [("c", "A-B"), "a b"],
    "many": ["a b"] * 4 + [("c", "a-b-3"), ("d", "a-b-4")],
    "composed and not": [("c", "caf\u00e9"), "cafe\u0301"],
}


@pytest.mark.parametrize("case", NAMES)
def test_no_two_videos_of_a_file_have_one_name(tmp_path, case):
    tables = [
        {"prompt": one} if isinstance(one, str) else {"prompt": one[0], "name": one[1]}
        for one in NAMES[case]
    ]
    path = written(tmp_path / "p.jsonl", "\n".join(map(json.dumps, tables)))
    jobs = prompt_files.named(prompt_files.read(path))
    assert len({prompt_files._folded(job.name) for job in jobs}) == len(jobs)
    for job, table in zip(jobs, tables, strict=True):
        assert job.name == table.get("name", job.name)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"name": "n" * 201}, "has 201 bytes; give a name of at most 200"),
        ({"name": "é" * 101}, "has 202 bytes"),
        ({"blocks": 10**30}, r"is not a length; give 1 to 10,000,000"),
        ({"seed": 10**400}, "is not in 0 to"),
        ({"seconds": 10**400}, "is not a length"),
        ({"timeline": [[0, "a"], [10**400, "b"], [3, "c"]]}, "do not rise"),
        ({"timeline": [[0, "a"], [3, " "]]}, "is empty"),
        ({"name": "N"}, "name='N' was used above"),
    ],
)
def test_every_line_is_looked_at_before_anything_is_drawn(tmp_path, line, said):
    table = line if "timeline" in line else {"prompt": "a"} | line
    first = json.dumps({"prompt": "fine", "name": "n"})
    path = written(tmp_path / "p.jsonl", f"{first}\n{json.dumps(table)}")
    with pytest.raises(InputError, match=said) as raised:
        prompt_files.named(prompt_files.read(path))
    assert "line 2" in str(raised.value)
    assert len(str(raised.value)) < 400 + len(str(path))


def test_a_number_of_thousands_of_digits_is_no_json(tmp_path):
    path = written(tmp_path / "p.jsonl", f'{{"prompt": "a", "seed": {"9" * 5000}}}')
    with pytest.raises(InputError, match="line 1 is not JSON"):
        prompt_files.read(path)
    path = written(tmp_path / "story.txt", f"{'9' * 5000}: a")
    with pytest.raises(InputError, match="line 1: .* is not `BLOCK: prompt`") as raised:
        timelines.read(path)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    "line",
    [
        b'{"key": 3}',
        b'{"key": "k", "file": 3, "bytes": 5}',
        b'{"key": "k", "file": "../v.mp4", "bytes": 5}',
        b'{"key": "k", "file": "v.mp4", "bytes": "5"}',
        b'{"key": "k", "file": "' + b"n" * 300 + b'", "bytes": 5}',
        b'{"key": "k", "file": "a\\u0000b", "bytes": 5}',
        b"[" * 100_000,
        b"\xff\xfe",
        b"3",
        b"null",
    ],
    ids=lambda line: line[:30].decode(errors="replace"),
)
def test_a_tampered_ledger_vouches_for_nothing(tmp_path, line):
    folder = tmp_path / "videos"
    folder.mkdir()
    (tmp_path / "v.mp4").write_bytes(b"12345")
    (folder / "w.mp4").write_bytes(b"12345")
    (folder / prompt_files.FINISHED).write_bytes(line + b"\n")
    assert not prompt_files.Ledger(folder).holds("k")
    prompt_files.Ledger(folder).add("w", folder / "w.mp4")
    assert prompt_files.Ledger(folder).holds("w")


# Captions and databases


def test_a_caption_that_is_not_utf8_is_refused_by_name(tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"")
    caption = written(tmp_path / "x.txt", "café", "latin-1")
    with pytest.raises(InputError, match=f"caption {caption} cannot be read .*say in UTF-8"):
        importing.KINDS["videos"].items(tmp_path)
    written(caption, "\ufeffcafé\n")
    assert importing.KINDS["videos"].items(tmp_path)[0].prompt == "café"


def test_every_missing_caption_is_counted_and_the_first_are_named(tmp_path):
    for number in range(40):
        (tmp_path / f"{number:02}.mp4").write_bytes(b"")
    written(tmp_path / "00.txt", "a film")
    with pytest.raises(InputError, match=r"39 of 40 videos have no caption .*01\.mp4.*34 more"):
        importing.KINDS["videos"].items(tmp_path)


@pytest.fixture
def database(tmp_path):
    """An LMDB folder of one clip, by the prompt as bytes and one value of its latents."""
    lmdb = pytest.importorskip("lmdb")

    def make(prompt=b"a film", value=1.0):
        latents = np.full((1, 3, 12, 8, 4), value, np.float16)
        with (
            lmdb.open(str(tmp_path / "db"), map_size=2**24) as opened,
            opened.begin(write=True) as put,
        ):
            put.put(b"latents_shape", " ".join(map(str, latents.shape)).encode())
            put.put(b"prompts_0_data", prompt)
            put.put(b"latents_0_data", latents.tobytes())
        return tmp_path / "db"

    return make


def test_a_prompt_in_a_database_that_is_not_utf8_is_refused_by_name(database):
    with pytest.raises(InputError, match="prompts_0_data is not UTF-8"):
        importing.KINDS["lmdb"].items(database("café".encode("latin-1")))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.5, 0.9])
def test_a_database_that_was_cut_off_is_refused_before_it_is_mapped(database, share):
    """In a process of its own: what maps it would end with SIGBUS."""
    folder = database()
    lmdb_files.require_whole(folder)
    file = folder / lmdb_files.FILE
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(InputError, match="fetch it again"):
        importing.KINDS["lmdb"].items(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_latents_that_are_not_finite_are_left_out_by_name(value):
    item = importing.Item("clip 7", "a film", lambda parts, text: {})
    with pytest.raises(importing.LeftOut, match="clip 7: 24 of 24 values of latent are not finite"):
        importing.require_finite(item, {"latent": np.full((2, 3, 4), value, np.float16)})
    importing.require_finite(
        item, {"latent": np.ones(3, np.float16), "prompt": np.ones(3, np.uint8)}
    )


def test_a_video_that_decodes_with_errors_is_left_out(tmp_path):
    from packforcing_jax.io import video

    path = tmp_path / "v.mp4"
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), np.uint8)
    with video.Writer(path, fps=8, size=(64, 64), settings={}) as writer:
        writer.write(noise)
    assert len(importing.frames_of(path, count=40, fps=8, size=(64, 64))) == 40
    content = bytearray(path.read_bytes())
    middle = (
        content.index(b"mdat") + 2000
    )  # in the first fragment, long enough for forty frames of noise
    for at in range(middle, middle + 20_000, 50):
        content[at] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(importing.LeftOut, match=r"v\.mp4 is damaged: ffmpeg told of \d+ errors"):
        importing.frames_of(path, count=40, fps=8, size=(64, 64))


# Configs


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("import sys; sys.exit('no such luck')", "SystemExit: no such luck"),
        ("raise SystemExit", "SystemExit"),
        ("raise BaseException('own')", "BaseException: own"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("class Own(BaseException): pass\nraise Own('a\\nb')", "Own: a"),
        ("def f(): f()\nf()", "RecursionError"),
        ("raise MemoryError", "MemoryError"),
        ("raise ValueError('x' * 5000)", "ValueError: xxx"),
        ("(" * 500, "SyntaxError|MemoryError"),
        ("a = 'x\0'", "does not run"),
    ],
)
def test_a_config_that_defines_no_experiment_is_bad_input_however_it_ends(
    tmp_path, capsys, source, said
):
    path = written(tmp_path / "own.py", source)
    with pytest.raises(InputError, match=f"does not run.*({said})?"):
        loading.load_experiment(path)
    assert main.main(["plan", "--config", str(path)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert len(err) < 500 + len(str(path))


def test_a_config_that_ends_the_interpreter_does_so_with_code_2(tmp_path):
    path = written(tmp_path / "own.py", "import sys\nsys.exit(0)")
    program = f"from packforcing_jax.cli import main; raise SystemExit(main.main(['plan', '--config', {str(path)!r}]))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
