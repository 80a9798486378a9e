"""The program `packforcing`: finds the verb, reads its flags, and turns every failure into one sentence and a code."""

import argparse
import importlib
import io
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import packforcing_jax
from packforcing_jax import interrupts, versions
from packforcing_jax.cli import failures, field_flags
from packforcing_jax.errors import InputError, nearest, sentence, shortened, shown
from packforcing_jax.io import compilation_cache


class Verb(NamedTuple):
    """A row of the table of verbs; `checked`: refuse broken pairs of jax and flax before it runs."""

    module: str
    help: str
    example: str
    checked: bool = True


VERBS = {
    "sample": Verb(
        "sample",
        "make a video; with no arguments, with the small model that ships",
        "packforcing sample --out out/demo.mp4",
    ),
    "extend": Verb(
        "extend",
        "make a video longer from its saved state, under the same prompt or another one",
        "packforcing extend out/state --seconds 5",
    ),
    "fork": Verb(
        "fork",
        "make a second state of a saved one, at its newest block or an earlier one",
        "packforcing fork out/state --at 12 --out out/branch",
    ),
    "replay": Verb(
        "replay",
        "make a video again from what stands inside its file, and say whether it is the same",
        "packforcing replay out/demo.mp4",
    ),
    "serve": Verb(
        "serve",
        "live sessions with a page, sockets and an HTTP side, kept on disk",
        "packforcing serve --port 8000",
    ),
    "verify": Verb(
        "verify",
        "compare every part with recorded numbers of the original code",
        "packforcing verify tests/golden/wan_dit_tiny.safetensors",
    ),
    "train": Verb(
        "train",
        "train the small model on clips drawn by the Stage world",
        "packforcing train --config stage --set cache.top=8",
    ),
    "evaluate": Verb(
        "evaluate",
        "measure video files, or a Stage model with the oracle of its world",
        "packforcing evaluate out/demo.mp4 --out out/figures",
    ),
    "compare": Verb(
        "compare",
        "draw the same prompts and noise under several methods, and make one page of it",
        "packforcing compare examples/compare_stage.json --plan",
    ),
    "convert": Verb(
        "convert",
        "make a model folder of public weights, or one file for torch of a model folder",
        "packforcing convert weights/wan2.1-t2v-1.3b --out models/wan2.1-t2v-1.3b",
    ),
    "download": Verb(
        "download", "fetch public weights", "packforcing download --list", checked=False
    ),
    "prepare": Verb(
        "prepare",
        "encode videos, prompts or LMDB folders once, as data for training",
        "packforcing prepare videos --weights models/self-forcing --out data/videos",
    ),
    "plan": Verb(
        "plan",
        "say what a video costs in keys, bytes and operations, allocating nothing",
        "packforcing plan --config wan_t2v_1_3b_paper --seconds 120",
    ),
    "layout": Verb(
        "layout",
        "show whom each block sees under a method, and at which positions",
        "packforcing layout --method longlive --blocks 20",
    ),
    "bench": Verb(
        "bench",
        "time every part of a block against this machine's own ceiling, and against a baseline",
        "packforcing bench --gate",
    ),
    "inspect": Verb(
        "inspect",
        "show what a traced run looked back at, and check what must hold",
        "packforcing inspect out/video.trace.jsonl",
        checked=False,
    ),
    "doctor": Verb(
        "doctor",
        "say what works on this machine, and the remedy for what does not",
        "packforcing doctor --json",
        checked=False,
    ),
}


PLACES = ("DIR", "FILE", "NAME", "PATH", "PNG", "PROFILE")  # metavars of values that are no text


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one `InputError`, naming the nearest known flag."""

    @property
    def verb(self) -> str:
        return self.prog.split()[-1]

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{self.verb}: {shortened(message)}; see {self.prog} --help.")

    def refuse_unknown_flags(self, argv: Sequence[str]) -> None:
        """Raises `InputError` for the first word that looks like a flag and is none (before `--`)."""
        known = self._option_string_actions
        for word in argv[: argv.index("--")] if "--" in argv else argv:
            flag = word.partition("=")[0]
            if re.match(r"--?[a-zA-Z]", word) and " " not in flag and flag not in known:
                here = field_flags.instead(flag)
                raise InputError(
                    f"{self.verb} has no flag {shown(flag)[1:-1]}; "
                    + (f"{here}." if here else nearest(flag, known))
                )

    def refuse_empty_values(self, arguments: argparse.Namespace) -> None:
        """Raises `InputError` for a flag whose path or name is empty: an unset variable is no wish for the default."""
        for each in self._actions:
            if each.metavar in PLACES and getattr(arguments, each.dest, None) == "":
                flag = "/".join(each.option_strings) or each.metavar
                raise InputError(f"{self.verb}: {flag} is empty; give it a value or leave it out.")


def overview() -> str:
    """The text of `packforcing --help`."""
    verbs = "\n".join(f"  {name:<8} {verb.help}" for name, verb in VERBS.items())
    examples = "\n".join(f"  {verb.example}" for verb in VERBS.values())
    return (
        f"packforcing {packforcing_jax.__version__}: minutes of video from a memory that never grows.\n\n"
        f"verbs (each has --help):\n{verbs}\n\nexamples:\n{examples}\n\n"
        "exit codes: 0 done, 1 a check failed, 2 bad input, 3 the machine failed, 130 interrupted"
    )


def parser_of(name: str) -> tuple[Parser, object]:
    """The parser of a verb and its module, which must not import jax before `run`."""
    verb = VERBS[name]
    module = importlib.import_module(f"packforcing_jax.cli.{verb.module}")
    parser = Parser(
        prog=f"packforcing {name}",
        description=f"{verb.help[0].upper()}{verb.help[1:]}.",
        epilog=f"example:\n  {verb.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    if "--json" not in parser._option_string_actions:
        parser.add_argument(
            "--json", action="store_true", help="print the result as JSON on stdout"
        )
    if verb.checked:
        parser.add_argument(
            "--no-compilation-cache",
            action="store_true",
            help="do not keep compiled programs for the next run",
        )
    return parser, module


def run(argv: Sequence[str]) -> int:
    """The exit code of one command; failures are exceptions."""
    if not argv:
        raise InputError(f"give a verb ({', '.join(VERBS)}); packforcing --help shows examples.")
    name, *rest = argv
    if name in ("-h", "--help", "help"):
        print(overview())
        return 0
    if name == "--version":
        print(packforcing_jax.__version__)
        return 0
    if name not in VERBS:
        raise InputError(f"no verb {name!r}; {nearest(name, VERBS)}")
    parser, module = parser_of(name)
    parser.refuse_unknown_flags(rest)
    arguments = parser.parse_args(rest)
    parser.refuse_empty_values(arguments)
    if VERBS[name].checked:
        versions.check()
        if not arguments.no_compilation_cache:
            compilation_cache.use()
    return module.run(arguments)  # type: ignore[attr-defined]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `packforcing WORDS` and returns the exit code; without words, those of the program, which ends with it."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # a console that lacks a character shows its number
            stream.reconfigure(errors="backslashreplace")
    return interrupts.leave(exit_code(words, last=argv is None))


def exit_code(words: Sequence[str], *, last: bool = False) -> int:
    """The exit code of `packforcing WORDS`, failures as one sentence on stderr; `last`: the process ends then."""
    try:
        with interrupts.raised():
            return run(words)
    except SystemExit as done:  # argparse after --help
        return int(done.code or 0)
    except BaseException as error:
        result = failures.outcome(error)
        if result is None:
            raise
        if last:
            interrupts.ignored()  # nothing is left to be stopped
        code = result[0]
        said = sentence(result[1])
        if isinstance(error, BrokenPipeError):
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115  nothing more can be said there, at exit neither
        if "--json" in words:
            print(json.dumps({"error": said}))
        print(f"packforcing: {said}", file=sys.stderr)
        return code
