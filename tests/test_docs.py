"""What a machine can check of the documentation: commands parse, settings and files exist, links lead somewhere.

The commands that need neither a GPU nor weights and take less than a minute also run (`make docs-test`).
"""

import ast
import dataclasses
import glob
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from packforcing_jax.cli import main
from packforcing_jax.config import CacheConfig, loading
from packforcing_jax.config.choices import RENAMED
from packforcing_jax.config.decode import groups_in, hints_of, is_group
from packforcing_jax.config.experiment import Experiment
from packforcing_jax.config.training import TrainConfig
from packforcing_jax.errors import InputError
from packforcing_jax.io import hub
from packforcing_jax.sampling import pipeline

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(r"# file: (\S+)\n")  # the first line of a block that is a file of its own
KEY = re.compile(r"(?:cache|compressor|sample|dtypes|train)(?:\.[a-z_]+)+")
REPOSITORY = re.compile(
    r"(?:packforcing_jax|tests|benchmarks|examples|launch|configs|convert|docs)/"
)
TARGET = re.compile(r"^([a-z][\w-]*(?: [a-z][\w-]*)*):(?!=)", re.MULTILINE)
LAUNCHERS = {"launch/single_gpu.sh": [], "launch/local_processes.sh": ["train"]}
LONGEST = 120
README_LINES = 150

# Commands that parse and do not run here, by how they begin, and why.
NEEDS_WEIGHTS = "needs weights"
NEEDS_GPU = "needs a GPU"
NEEDS_NETWORK = "needs a network"
NEEDS_VIDEO = "needs a video"
TAKES_LONG = "takes longer than a minute"
INSTALLS = "installs, builds or deletes"
SKIPPED = {
    "make ": INSTALLS,
    "packforcing bench": TAKES_LONG,
    "packforcing compare examples/compare_paper_toy": NEEDS_WEIGHTS,
    "packforcing compare examples/compare_stage.json --out": TAKES_LONG,
    "packforcing convert": NEEDS_WEIGHTS,
    "packforcing download self": NEEDS_NETWORK,
    "packforcing download wan": NEEDS_NETWORK,
    "packforcing evaluate --mode attention": TAKES_LONG,
    "packforcing evaluate --mode forced": TAKES_LONG,
    "packforcing evaluate --mode rollout": TAKES_LONG,
    "packforcing evaluate --mode teacher --videos 64": TAKES_LONG,
    "packforcing evaluate --run": NEEDS_WEIGHTS,
    "packforcing evaluate --weights": TAKES_LONG,
    "packforcing evaluate clips": NEEDS_WEIGHTS,
    "packforcing evaluate out/": NEEDS_VIDEO,
    "packforcing evaluate videos": NEEDS_VIDEO,
    "packforcing plan --compile": TAKES_LONG,
    "packforcing prepare": NEEDS_WEIGHTS,
    "packforcing sample --weights models": NEEDS_GPU,
    "packforcing serve": "goes on until it is ended",
    "packforcing train --config stage": TAKES_LONG,
    "packforcing train --config wan": NEEDS_GPU,
    "packforcing verify tests/golden/*": TAKES_LONG,
}
SKIPPED_WHOLE = {"packforcing evaluate --mode teacher": TAKES_LONG}


class Command(NamedTuple):
    """A command of a page: its words without the program, and the line as it is written."""

    page: str
    line: str
    words: list[str]

    def __str__(self) -> str:
        return f"{self.page}: {self.line}"


def name_of(page):
    return str(page.relative_to(ROOT))


def fences(page, *languages):
    """(language, text) of the fenced blocks of a page, without their indent."""
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    for indent, language, body in found:
        if language in languages:
            yield language, "".join(line.removeprefix(indent) for line in body.splitlines(True))


def prose(page):
    """The text of a page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def lines_of(text):
    """Commands of a shell block: continued lines joined."""
    return [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]


def split(line):
    """Words of a command without comment, program path and variables in front."""
    words = shlex.split(line, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


def commands(page, program):
    """The fenced and the inline commands of a page that start a program."""
    text = [line for _, body in fences(page, "", "sh", "bash") for line in lines_of(body)]
    for line in (*text, *INLINE.findall(prose(page))):
        if program in line and (words := split(line)) and words[0].endswith(program):
            yield Command(name_of(page), " ".join(line.partition("  #")[0].split()), words[1:])


PACKFORCING = [each for page in PAGES for each in commands(page, "packforcing") if each.words]
MAKE = [each for page in PAGES for each in commands(page, "make") if each.words]
PYTHON = [
    pytest.param(body, id=f"{name_of(page)}-{number}")
    for page in PAGES
    for number, (_, body) in enumerate(fences(page, "python"))
]


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with what commands of the pages find in a checkout, and the files that the pages define."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("examples", "tests", "configs", "packforcing_jax", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    for page in PAGES:
        for _, body in fences(page, "python"):
            if named := FILE.match(body):
                (folder / named[1]).write_text(body, encoding="utf-8")
    return folder


# Commands


def check_settings(verb, arguments):
    """Raises `InputError` for a config, a memory profile or a `--set` key that does not exist."""
    overrides = list(getattr(arguments, "overrides", []) or [])
    if not hasattr(arguments, "overrides"):
        return
    if verb == "train":
        for stage in loading.load_recipe(arguments.config or "stage", overrides):
            assert arguments.stage is None or stage.name
        return
    weights = getattr(arguments, "weights", None)
    converted = weights is not None and not (ROOT / weights).exists()
    config = arguments.config or ("wan_t2v_1_3b" if converted else "stage")
    trains = verb == "prepare" or getattr(arguments, "devices", None) is not None
    training = [each for each in overrides if trains and loading.of_training(each)]
    kept = [each for each in overrides if each not in training]
    loading.load_stage(config, training)
    pipeline.with_overrides(
        loading.load_experiment(config), getattr(arguments, "memory", None), kept
    )


@pytest.mark.parametrize("command", PACKFORCING, ids=str)
def test_a_command_is_one_that_the_program_takes(command, room, monkeypatch):
    monkeypatch.chdir(room)
    verb, *rest = command.words
    if verb in ("--help", "VERB"):
        return
    assert verb in main.VERBS, f"no verb {verb!r}"
    if not rest:  # a verb that is only named
        return
    parser, _ = main.parser_of(verb)
    if rest == ["--help"]:
        return
    parser.refuse_unknown_flags(rest)
    arguments = parser.parse_args(rest)
    placeholders = {"FILE", "NAME", "DIR"}
    if getattr(arguments, "config", None) in placeholders or "a.b=value" in rest:
        return
    check_settings(verb, arguments)
    if verb == "download" and arguments.name is not None:
        hub.find(arguments.name)
    for path in getattr(arguments, "files", []) or []:
        assert glob.glob(str(ROOT / path)), f"{path} does not exist"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("sample --blcoks 4", "no flag --blcoks"),
        ("sample --config nothing", "no experiment 'nothing'"),
        ("sample --set cache.tpo=8", "unknown key"),
        ("train --set train.distil.low=3", "is called train.distil.min_timestep now"),
        ("plan --memory none", "memory profile 'none'"),
        ("download self-forcign", "self-forcing"),
    ],
)
def test_a_wrong_command_would_be_found(words, said, room, monkeypatch):
    wrong = Command("", words, words.split())
    with pytest.raises(InputError, match=re.escape(said)):
        test_a_command_is_one_that_the_program_takes(wrong, room, monkeypatch)


@pytest.mark.parametrize("command", MAKE, ids=str)
def test_a_make_target_exists(command):
    targets = set(" ".join(TARGET.findall((ROOT / "Makefile").read_text())).split())
    assert {word for word in command.words if "=" not in word} <= targets


def test_launchers_and_programs_that_pages_name_exist(room, monkeypatch):
    for page in PAGES:
        for launcher, before in LAUNCHERS.items():
            for command in commands(page, launcher):
                words = before + command.words
                test_a_command_is_one_that_the_program_takes(
                    command._replace(words=words), room, monkeypatch
                )
        text = page.read_text(encoding="utf-8")
        for module in re.findall(r"python -m ((?:benchmarks|docs)[\w.]+)", text):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), (page, module)
        for path in re.findall(r"pytest (?:-m \w+ )?(tests/\S+\.py)", text):
            assert (ROOT / path).is_file(), (page, path)


# Python


@pytest.mark.parametrize("body", PYTHON)
def test_a_python_block_compiles_and_its_imports_resolve(body):
    module = ast.parse(body)
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            for each in node.names:
                importlib.import_module(each.name)
        if isinstance(node, ast.ImportFrom):
            found = importlib.import_module(str(node.module))
            for each in node.names:
                if not hasattr(found, each.name):
                    importlib.import_module(f"{node.module}.{each.name}")


# Links, files, settings, form


def anchors(page):
    """The names by which headings of a page are reached."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    for link in LINK.findall(prose(page)):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_of_the_repository_that_a_page_names_exist(page):
    for word in INLINE.findall(prose(page)):
        if REPOSITORY.match(word) and not set(word) & set(" *<>") and "..." not in word:
            assert (ROOT / word).exists(), word


def known(key):
    """Whether a dotted key is a setting, or a group of them."""
    group, *names = key.split(".")
    hint = TrainConfig if group == "train" else hints_of(Experiment)[group]
    for name in names:
        inside = [hint] if is_group(hint) else groups_in(hint)
        hints = [hints_of(each)[name] for each in inside if name in hints_of(each)]
        if not hints:
            return False
        hint = hints[0]
    return True


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_settings_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    assert not [old for old in RENAMED if re.search(rf"{re.escape(old)}\b", text)]
    for word in INLINE.findall(prose(page)):
        if (found := KEY.fullmatch(word.partition("=")[0])) and not word.endswith(".py"):
            assert known(found[0]), word


def test_every_setting_of_the_memory_is_explained():
    text = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    table = text[text.index("## Every setting") :]
    for field in dataclasses.fields(CacheConfig):
        assert f"| `{field.name}` |" in table, field.name


def test_all_public_weights_are_listed(capsys):
    assert main.main(["download", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["sources"]
    text = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    for source in listed:
        assert f"| `{source['name']}` | `{source['repository']}` |" in text, source["name"]


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_are_short_and_hold_whole_code_spans_outside_tables(page):
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        assert len(line) <= LONGEST or line.startswith("|"), f"{name_of(page)}:{number}"
    for line in prose(page).splitlines():
        assert line.count("`") % 2 == 0, line


def test_the_readme_is_short():
    assert len(PAGES[0].read_text(encoding="utf-8").splitlines()) <= README_LINES


# Run


def reason_to_skip(line):
    """Why a command does not run here, if so."""
    if line in SKIPPED_WHOLE:
        return SKIPPED_WHOLE[line]
    return next((why for begin, why in SKIPPED.items() if line.startswith(begin)), None)


def runnable(page):
    """The shell lines of a page that run, in order: its commands, and the files that they read being written."""
    for _, body in fences(page, "", "sh", "bash"):
        for line in lines_of(body):
            written = " ".join(line.partition("  #")[0].split())
            writes = line.startswith("printf ")
            if writes or (line.startswith("packforcing ") and reason_to_skip(written) is None):
                yield line


def test_every_reason_to_skip_is_used():
    lines = [each.line for each in (*PACKFORCING, *MAKE)]
    for begin in SKIPPED:
        assert any(line.startswith(begin) for line in lines), begin
    assert set(SKIPPED_WHOLE) <= set(lines)


@pytest.mark.docs
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_cheap_commands_of_a_page_run(page, room):
    bin_ = Path(sys.executable).parent
    path = f"{bin_}:/usr/local/bin:/usr/bin:/bin"
    for line in runnable(page):
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=room,
            env={"PATH": path, "HOME": str(room), "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.docs
@pytest.mark.parametrize("body", PYTHON)
def test_a_python_block_runs(body, room):
    done = subprocess.run(
        [sys.executable, "-c", body], cwd=room, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
