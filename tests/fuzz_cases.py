"""Wrong commands, files and folders, each made of a right one by a few changes: the same number, the same case.

A maker is a function of a random generator and of what valid runs left. A `Case` holds all that a case is: the words
of a command, and every file below the folder in which it runs.
"""

import argparse
import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import tiny

from packforcing_jax.cli import field_flags, main
from packforcing_jax.config import PROFILES, decode
from packforcing_jax.config.choices import AT_PROMPT_CHANGE


class Special(NamedTuple):
    """What lies in the place of a file: a `folder`, a `pipe`, or a `link` to `target`."""

    kind: str
    target: str = ""


Item: TypeAlias = bytes | Special
Tree: TypeAlias = Mapping[str, Item]  # by path, slashes between


class Case(NamedTuple):
    """The words behind `packforcing`, and what lies in the folder it runs in."""

    words: tuple[str, ...]
    items: Tree = {}


class Bases(NamedTuple):
    """What valid runs with the toy model left, each as a tree of its own."""

    model: Tree
    state: Tree  # of two blocks, with their video
    videos: Tree  # a folder of two finished ones
    data: Tree  # of prompts
    checkpoint: Tree  # of a trainer
    trace: Tree
    baseline: Tree
    reference: Tree  # numbers that `verify` reads


PROMPT = "a red disc"
CONFIG = b"import tiny\n\nexperiment = tiny.EXP\n"
MODEL = ("--weights", "model")
SAMPLE = ("sample", *MODEL, "--blocks", "1", "--prompt", PROMPT)
RESUMED = (*SAMPLE, "--state", "state", "--every", "1", "--out", "out/video.mp4")
TO_FOLDER = ("convert", "model", "--out", "made")
PREPARE = ("prepare", "p.txt", *MODEL, "--out", "data")
VIDEOS = ("sample", "--prompts", "p.txt", *MODEL, "--blocks", "1", "--out", "videos")
BENCH = ("bench", *MODEL, "--repeats", "1", "--warmup", "0", "--part", "store")

# Bad values. None of them is a length, a count or a size that takes minutes: it is out of range or small.

DIGITS = (
    *("0", "-0", "-1", "1", "3", "1.5", "-1e400", "1e400", "1e-400", "nan", "NaN", "inf"),
    *(
        "Infinity",
        "-Infinity",
        "0x10",
        "1_0",
        "٣",
        "²",
        "+2",
        " 2",
        "1,2",
        "2147483648",
        "4294967296",
    ),
    *("9223372036854775808", "1" + "0" * 30, "9" * 5000, "-" + "9" * 5000),
)
WHOLE = (
    *("0", "-1", "-0", "2147483648", "4294967296", "-4294967296", "9223372036854775808", "0_0"),
    *("1" + "0" * 30, "1" + "0" * 4000),
)
FRACTIONS = (
    "0",
    "-0.0",
    "-1",
    "nan",
    "-inf",
    "inf",
    "1e400",
    "1e30",
    "-1e30",
    "1e-400",
    "9" * 5000,
)
TEXTS = (
    *(
        "",
        " ",
        "\t",
        "\n",
        "a\nb",
        "\r",
        "\u2028",
        "\x85",
        "\ufeff",
        "\x1b[2J",
        "\x7f",
        "\udcff",
        "\ud800",
    ),
    *(
        "x" * 300,
        "é" * 200,
        "🎈" * 70,
        "🎈 👩‍🚀",
        "a'b\"c",
        "$(true)",
        "%s %d",
        "{0}",
        "\\",
        "*",
        "?",
    ),
    *(
        "-",
        "--",
        "---",
        "-x",
        "=",
        "a=b",
        ",",
        ";",
        "#",
        "@x",
        "~",
        "None",
        "True",
        "null",
        "[]",
        "{}",
    ),
    *(
        "(1,",
        "((1,1,1),)",
        "0or 1",
        "'\\d'",
        "[" * 3000,
        "(" * 300 + ")" * 300,
        "lambda: 1",
        "1if 1else 2",
    ),
)
PLACES = (
    *(
        ".",
        "..",
        "/",
        "//",
        "/dev/null",
        "/dev/full",
        "/proc/nothing/x",
        "/sys/x",
        "/dev/null/x",
        "model",
    ),
    *(
        "model/config.json",
        "pipe",
        "loop",
        "loop/x",
        "folder",
        "folder/x",
        "file",
        "file/x",
        "file/x/y",
    ),
    *(
        "nothing",
        "nothing/x",
        "x" * 255,
        "x" * 256,
        "/".join(["x" * 200] * 30),
        "é" * 127,
        "a b",
        "-x",
    ),
    *(
        "x.mp4",
        "x.png",
        "new/x.mp4",
        "new/deep/x",
        ".x",
        "x/",
        "x\n",
        "🎈.mp4",
        "\udcff.mp4",
        "x.MP4",
    ),
)
AROUND: Tree = {  # lies beside what every case is about
    "pipe": Special("pipe"),
    "loop": Special("link", "loop"),
    "folder": Special("folder"),
    "file": b"text\n",
}
INSERTED = (
    *(
        b"\0",
        b"\0" * 9,
        b"\xff\xfe",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\r",
        b"\r\n",
        b"\n\n",
    ),
    *(
        "\u2028".encode(),
        "\x85".encode(),
        b"\x0c",
        b"\x1b[2J",
        b"\x1a",
        b"{",
        b"[" * 5000,
        b"]",
        b'"',
    ),
    *(
        b"\\",
        b"\\u0000",
        b"\\ud800",
        b"#",
        b":",
        b"=",
        b"9" * 5000,
        b"x" * 70_000,
        "🎈".encode() * 80,
    ),
)


def bad(rng: random.Random) -> str:
    """A value of any sort."""
    return rng.choice(rng.choice((DIGITS, TEXTS, PLACES)))


# Changes of files


def _bytes(rng: random.Random, data: bytes) -> bytes:
    """A file after one fault of a disk, an editor or a download."""
    at, to = sorted(rng.randint(0, len(data)) for _ in range(2))
    if rng.random() < 0.5:  # the beginning of a file says most
        at, to = min(at, rng.randint(0, 200)), min(to, at + rng.randint(0, 40))
        to = max(at, to)
    match rng.randrange(7):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + data[to:]
        case 2:
            return data[:to] + data[at:]
        case 3:
            return (
                data[:at]
                + bytes(each ^ 1 << rng.randrange(8) for each in data[at : at + 1])
                + data[at + 1 :]
            )
        case 4:
            return data[:at] + rng.randbytes(to - at) + data[to:]
        case 5:
            return data[:at] + rng.choice(INSERTED) + data[at:]
        case _:
            return rng.choice(
                (b"", b"\n", b"\xef\xbb\xbf", data[::-1], data * 2, b"\0" * len(data))
            )


def _lines(rng: random.Random, data: bytes) -> bytes:
    """A text after a slip with its lines, or with one of its words."""
    lines = data.split(b"\n")
    at, to = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(6):
        case 0:
            lines.insert(to, lines[at])
        case 1:
            lines[at], lines[to] = lines[to], lines[at]
        case 2:
            del lines[at]
        case 3:
            lines = [line + b"\r" for line in lines]
        case 4:
            lines.insert(at, rng.choice(INSERTED))
        case _:
            words = re.split(rb"(\W+)", lines[at])
            words[rng.randrange(len(words))] = _written(bad(rng))
            lines[at] = b"".join(words)
    return b"\n".join(lines)


def _written(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


RAW = "@raw@"  # stands in JSON where no value of Python can
KEYS = ("", "x", "kind", "name", "__class__", "blocks", "set", "Prompt", "é", "\u2028", "x" * 300)


def _json(rng: random.Random, data: bytes) -> bytes:
    """A JSON text with one value, key or table other than it was."""
    whole = json.loads(data)
    held = list(_tables(whole))
    table = rng.choice(held)
    keys = list(table) if isinstance(table, dict) else list(range(len(table)))
    key = rng.choice(keys) if keys else None
    raw = rng.choice((*DIGITS, "true", "null", "[" * 5000, "{", '"x', '"\\ud800"', '{"a":1,"a":2}'))
    match rng.randrange(6):
        case 0 if key is not None:
            del table[key]
        case 1 if isinstance(table, dict):
            table[rng.choice(KEYS)] = table[key] if key is not None else RAW
        case 2 if isinstance(table, dict) and key is not None:
            table[rng.choice(KEYS)] = table.pop(key)
        case 3 if key is not None:
            table[key] = rng.choice(
                (
                    [table[key]],
                    {"x": table[key]},
                    [],
                    {},
                    None,
                    True,
                    -table[key] if isinstance(table[key], (int, float)) else 1.5,
                )
            )
        case 4 if key is not None:
            table[key] = bad(rng)
        case _:
            if key is not None:
                table[key] = RAW
    return json.dumps(whole).encode().replace(f'"{RAW}"'.encode(), _written(raw))


def _tables(value: object) -> list:
    """Every table and list in a value."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] * isinstance(value, (dict, list)) + [
        found for each in inside for found in _tables(each)
    ]


def _header(rng: random.Random, data: bytes) -> bytes:
    """A safetensors file with another header, its length as it has to be or not."""
    end = 8 + int.from_bytes(data[:8], "little")
    change = rng.choice((_json, _json, _bytes))
    header = change(rng, data[8:end])
    length = len(header) if rng.random() < 0.8 else rng.choice((0, 1, 2**31, 2**63 - 1, len(data)))
    return length.to_bytes(8, "little") + header + data[end:]


def changed(rng: random.Random, name: str, data: bytes) -> bytes:
    """The file `name` after one change that goes with what it is."""
    of_kind = {".json": _json, ".safetensors": _header, ".txt": _lines, ".jsonl": _of_json_lines}
    own = of_kind.get(name[name.rfind(".") :], _bytes)
    try:
        return (own if rng.random() < 0.7 else _bytes)(rng, data)
    except (ValueError, RecursionError, IndexError):  # an earlier change left none of its kind
        return _bytes(rng, data)


def _of_json_lines(rng: random.Random, data: bytes) -> bytes:
    lines = [line for line in data.split(b"\n") if line]
    at = rng.randrange(len(lines))
    lines[at] = _json(rng, lines[at])
    return b"\n".join(lines) + b"\n"


SPECIALS = (
    Special("folder"),
    Special("pipe"),
    Special("link", "loop"),
    Special("link", "/dev/null"),
    Special("link", "/dev/full"),
    Special("link", "nothing"),
    Special("link", ".."),
)


def damaged(
    rng: random.Random, tree: Tree, among: Callable[[str], bool] = lambda name: True
) -> Tree:
    """A tree of files of which one or two are changed, gone, swapped, renamed, or no files any more."""
    out = dict(tree)
    for _ in range(rng.choice((1, 1, 1, 2))):
        names = sorted(
            name for name, item in out.items() if isinstance(item, bytes) and among(name)
        )
        if not names:
            break
        name, other = rng.choice(names), rng.choice(names)
        match rng.randrange(12):
            case 0:
                del out[name]
            case 1:
                out[name] = b""
            case 2:
                out[name], out[other] = out[other], out[name]
            case 3:
                out[
                    f"{name.rpartition('/')[0]}/{rng.choice(('x', '.x', '0', '9' * 30, 'README'))}"
                ] = out.pop(name)
            case 4:
                out[name] = rng.choice(SPECIALS)
            case 5:
                inside = f"{name.rpartition('/')[0]}/"
                out = {each: item for each, item in out.items() if not each.startswith(inside)}
            case _:
                out[name] = changed(rng, name, out[name])  # type: ignore[arg-type]
    return out


# Kinds of cases

TOGETHER: Mapping[str, tuple[tuple[str, ...], ...]] = {  # valid commands of each verb
    "sample": (
        SAMPLE,
        RESUMED,
        (*SAMPLE, "--out", "x.mp4", "--sheet", "x.png", "--trace", "x.jsonl"),
    ),
    "convert": (
        TO_FOLDER,
        ("convert", "student.pt", "--out", "made", "--set", "dit.heads=3"),
        ("convert", "model", "--to-torch", "made.safetensors"),
    ),
    "prepare": (PREPARE,),
    "plan": (("plan", "--config", "toy.py", "--blocks", "3"),),
    "layout": (
        ("layout", "--config", "toy.py"),
        ("layout", "--config", "stage", "--method", "longlive", "--picture", "x.png"),
    ),
    "inspect": (("inspect", "t.jsonl", "--no-map"), ("inspect", "t.jsonl")),
    "verify": (("verify", "reference.safetensors"),),
    "bench": (BENCH,),
    "evaluate": (
        ("evaluate", *MODEL, "--videos", "1", "--blocks", "1"),
        ("evaluate", "videos", "--out", "figures"),
    ),
    "train": (("train", "--config", "toy.py", "--steps", "0", "--out", "run"),),
    "download": (("download", "--list"), ("download", "nothing")),
    "doctor": (("doctor",),),
}
WEIGHTS = {
    "doctor": 1,
    "bench": 3,
    "download": 3,
    "verify": 4,
    "evaluate": 5,
    "train": 6,
    "inspect": 6,
}
STAY = (  # without them a command would take minutes, so they only change
    "--weights",
    "--blocks",
    "--out",
    "--steps",
    "--repeats",
    "--warmup",
    "--part",
    "--videos",
)
NO_SETTINGS = ("doctor", "download", "inspect", "verify")
UNKNOWN = (
    "--x",
    "-x",
    "--PROMPT",
    "--pro",
    "--prompt-",
    "—prompt",
    "--no-json",
    "-1",
    "--é",
    "--set=",
    "-",
)


def _settings() -> tuple[str, ...]:
    return tuple(decode._keys(tiny.EXP, ""))


def _flags(verb: str) -> list[argparse.Action]:
    """What stands behind each flag of a verb."""
    return [each for each in main.parser_of(verb)[0]._actions if each.option_strings]


def _value(rng: random.Random, flag: argparse.Action) -> list[str]:
    """A bad value for a flag that takes one, mostly of the right type."""
    if flag.nargs == 0:
        return []
    if rng.random() < 0.2:
        return [bad(rng)]
    if flag.choices is not None and rng.random() < 0.7:
        return [rng.choice(sorted(flag.choices))]
    return [rng.choice({int: WHOLE, float: FRACTIONS}.get(flag.type, PLACES + TEXTS))]  # type: ignore[arg-type]


def _reworded(rng: random.Random, words: Sequence[str]) -> list[str]:
    """A command after one slip."""
    out = list(words)
    verb = out[0]
    at = rng.randrange(1, len(out)) if len(out) > 1 else 0
    stays = out[at] in STAY or out[at - 1] in STAY
    match rng.randrange(16):
        case 0 if at and not stays:
            del out[at]
        case 1 if at:
            out.insert(rng.randint(1, len(out)), out[at])
        case 2:
            out += [f"--{rng.choice(sorted(field_flags.INSTEAD))}", bad(rng)]
        case 3:
            out.insert(rng.randint(1, len(out)), rng.choice(UNKNOWN))
        case 4 if at and out[at].startswith("--"):
            out[at] = out[at][: rng.randint(2, len(out[at]))] + rng.choice(
                ("", "x", "=", "=x", "-")
            )
        case 5 | 6 if at and not out[at].startswith("--"):
            out[at] = bad(rng)
        case 7 | 8 | 9 | 10 if verb not in NO_SETTINGS:
            out += ["--set", f"{rng.choice(_settings())}={bad(rng)}"]
        case _:
            flag = rng.choice(_flags(verb))
            out += [rng.choice(flag.option_strings), *_value(rng, flag)]
    return out


def command_line(rng: random.Random, bases: Bases) -> Case:
    """A command of any verb after one slip or two."""
    verbs = list(TOGETHER)
    verb = rng.choices(verbs, [WEIGHTS.get(each, 12) for each in verbs])[0]
    words = list(rng.choice(TOGETHER[verb]))
    for _ in range(rng.choice((1, 1, 1, 2))):
        words = _reworded(rng, words)
    if rng.random() < 0.04:
        words = [
            rng.choice((*TEXTS, verb[:-1], verb.upper(), "help", "-h", "--version")),
            *words[1:],
        ]
    words = [word.replace("\0", "") for word in words]  # which no command line can hold
    return Case(tuple(words), {**AROUND, **_beside(verb, bases)})


def _beside(verb: str, bases: Bases) -> Tree:
    """The files that valid commands of a verb read."""
    own: Mapping[str, Tree] = {
        "convert": bases.checkpoint,
        "inspect": bases.trace,
        "verify": bases.reference,
        "bench": bases.baseline,
        "evaluate": bases.videos,
    }
    texts = {"toy.py": CONFIG, "p.txt": b"a red disc\na green disc\n"}
    return {**texts, **bases.model, **own.get(verb, {})}


JOBS: tuple[Mapping[str, object], ...] = (
    {"prompt": PROMPT},
    {"prompt": "a green disc", "name": "green", "seed": 3},
    {"prompt": PROMPT, "blocks": 1, "set": ["sample.shift=3.0"]},
    {"timeline": [[0, PROMPT], [1, "a green disc"]], "blocks": 2, "memory": "paper"},
    {"prompt": "a blue disc walks", "seconds": 0.5},
)


def prompt_file(rng: random.Random, bases: Bases) -> Case:
    """A file of prompts, as text or as JSON lines, after one change or two."""
    suffix = rng.choice((".txt", ".jsonl", ".jsonl", ".jsonl"))
    if suffix == ".txt":
        data = b"# two\n\na red disc\na green disc walks\n"
    else:
        jobs = rng.sample(JOBS, rng.randint(1, 2))
        data = "".join(json.dumps(job) + "\n" for job in jobs).encode()
    name = f"p{suffix}"
    for _ in range(rng.choice((1, 1, 1, 2))):
        data = changed(rng, name, data) if data else b""
    tree: Tree = {**AROUND, name: data}
    if rng.random() < 0.08:
        tree = {**AROUND, name: rng.choice(SPECIALS)}
    if rng.random() < 0.15:
        words = ("prepare", name, *MODEL, "--out", "data", "--kind", "prompts")
    else:
        words = ("sample", "--prompts", name, *MODEL, "--blocks", "1", "--out", "videos")
    return Case(words, {**bases.model, **tree})


def timeline(rng: random.Random, bases: Bases) -> Case:
    """A timeline of three entries after one change or two."""
    starts = sorted(rng.sample(range(1, 6), 2))
    marks = [rng.choice(("", "", f" {rng.choice(AT_PROMPT_CHANGE)}")) for _ in starts]
    entries = [f"{at}{mark}: a green disc" for at, mark in zip(starts, marks)]
    data = "\n".join(["# a story", f"0: {PROMPT}", *entries, ""]).encode()
    if rng.random() < 0.95:
        for _ in range(rng.choice((1, 1, 2, 3))):
            data = changed(rng, "t.txt", data) if data else b""
    item: Item = rng.choice(SPECIALS) if rng.random() < 0.06 else data
    words = ["sample", *MODEL, "--timeline", "t.txt", "--blocks", rng.choice(("1", "1", "1", "2"))]
    if rng.random() < 0.04:
        words += ["--memory", rng.choice((*PROFILES, bad(rng)))]
    if rng.random() < 0.1:
        words += rng.choice(
            (["--trace", "x.jsonl"], ["--state", "s"], ["--sheet", "x.png"], ["--oracle"])
        )
    return Case(tuple(words), {**AROUND, **bases.model, "t.txt": item})


def settings(rng: random.Random, bases: Bases) -> Case:
    """JSON that holds settings: of a model folder, of a baseline, of a trace."""
    words, tree, name = rng.choice(
        (
            (TO_FOLDER, bases.model, "model/config.json"),
            (TO_FOLDER, bases.model, "model/config.json"),
            (SAMPLE, bases.model, "model/config.json"),
            (
                ("convert", "model", "--to-torch", "made.safetensors"),
                bases.model,
                "model/config.json",
            ),
            (PREPARE, bases.model, "model/config.json"),
            (
                (*BENCH, "--gate", "baseline.json"),
                {**bases.model, **bases.baseline},
                "baseline.json",
            ),
            (("inspect", "t.jsonl", "--no-map"), bases.trace, "t.jsonl"),
            (("inspect", "t.jsonl"), bases.trace, "t.jsonl"),
        )
    )
    data = tree[name]
    assert isinstance(data, bytes)
    for _ in range(rng.choice((1, 1, 1, 2))):
        data = changed(rng, name, data) if data else b""
    return Case(words, {**AROUND, "p.txt": b"a red disc\n", **tree, name: data})


def state_folder(rng: random.Random, bases: Bases) -> Case:
    """A run's state, a folder of videos or a data set that something happened to, and the command that goes on."""
    to = lambda blocks: (*RESUMED, "--blocks", blocks)  # noqa: E731
    words, tree, inside = rng.choice(
        (
            (to("2"), bases.state, "state/"),
            (to("2"), bases.state, ""),
            (to("3"), bases.state, "state/"),
            (VIDEOS, bases.videos, "videos/"),
            (PREPARE, bases.data, "data/"),
            (PREPARE, bases.data, "data/"),
        )
    )
    around = {**AROUND, **bases.model, "p.txt": b"a red disc\na green disc\n"}
    return Case(words, {**around, **damaged(rng, tree, lambda name: name.startswith(inside))})


def model_folder(rng: random.Random, bases: Bases) -> Case:
    """A model folder, a trainer's checkpoint or a file of reference numbers that something happened to."""
    words, tree = rng.choice(
        (
            (SAMPLE, bases.model),
            (SAMPLE, bases.model),
            (TO_FOLDER, bases.model),
            (("convert", "model", "--to-torch", "made.safetensors"), bases.model),
            (PREPARE, bases.model),
            (("convert", "student.pt", "--out", "made", "--set", "dit.heads=3"), bases.checkpoint),
            (("verify", "reference.safetensors"), bases.reference),
        )
    )
    return Case(words, {**AROUND, "p.txt": b"a red disc\n", **damaged(rng, tree)})


KINDS: Mapping[str, Callable[[random.Random, Bases], Case]] = {
    "command line": command_line,
    "prompt file": prompt_file,
    "timeline": timeline,
    "settings": settings,
    "state folder": state_folder,
    "model folder": model_folder,
}


def made(kind: str, seed: int, number: int, bases: Bases) -> Case:
    """Case `number` of a kind: of two calls with the same arguments both give the same."""
    return KINDS[kind](random.Random(f"{seed} {kind} {number}"), bases)
