"""`packforcing prepare`: encodes videos, prompts or LMDB folders once, into a data set that training reads."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packforcing_jax.cli import common, plan
from packforcing_jax.config import TrainConfig, decode
from packforcing_jax.errors import InputError, require

if TYPE_CHECKING:
    from packforcing_jax.config import Experiment
    from packforcing_jax.data import records
    from packforcing_jax.io import model_folder
    from packforcing_jax.training import importing

KINDS = ("lmdb", "videos", "prompts", "trajectories")
GROUP = 64  # prompts that one walk through the text encoder reads
NEEDED = {"vae": "a codec", "text": "a text encoder", "teacher": "a transformer"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `prepare`."""
    parser.add_argument(
        "source",
        metavar="SRC",
        help="a folder of videos with a .txt beside each, JSONL with file and prompt, a file of "
        "prompts, or an LMDB folder",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        required=True,
        help="data set to write; continued if an earlier run did not finish it",
    )
    parser.add_argument(
        "--weights", metavar="DIR", help="model folder whose codec and text encoder are used"
    )
    parser.add_argument("--kind", choices=KINDS, help="what SRC is, where that is not plain")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items")
    parser.add_argument(
        "--timesteps",
        metavar="A,B,...",
        help="of the states of each clip in an LMDB folder, from noise to 0",
    )
    common.add_experiment_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Prints what the data set holds; exit code 0. Items that were left out are named on stderr."""
    common.require_model_folder(args.weights)
    common.require_count("--limit", args.limit, most=10**9)
    times = timesteps(args.timesteps)
    from packforcing_jax.data import records
    from packforcing_jax.io import append_file
    from packforcing_jax.policies import attention
    from packforcing_jax.training import importing, paths

    source = Path(args.source)
    out = Path(args.out)
    kind = args.kind or importing.recognised(source)
    append_file.check_writable(out / records.COMPLETE, "Data set")
    exp, train, model = _model(args)
    items = importing.KINDS[kind].items(source)[: args.limit]
    require(len(items) > 0, f"{source} holds nothing to prepare; give another source.")
    parts = importing.parts_of(exp, model, importing.KINDS[kind].needs, train)
    if kind == "trajectories":
        times = paths.timesteps(exp)
    for need in importing.KINDS[kind].needs:
        require(
            getattr(parts, need) is not None,
            f"preparing {kind} needs {NEEDED[need]}; "
            "give a model folder that has one with --weights.",
        )
    if parts.tokenizer is not None:  # what it does not know is said before anything is written
        for group in _groups(list(dict.fromkeys(item.prompt for item in items))):
            parts.tokenizer.encode(group)
    about = made_with(parts, model) | {"source": importing.digest(items), "timesteps": times}
    if parts.teacher is not None:
        about |= {
            "grid": train.grid,
            "guidance": train.distil.guidance,
            "negative_prompt": train.negative_prompt,
        }
    backend, why = attention.resolve(exp.attention)
    common.start_line("prepare", experiment=exp, dtype=exp.dtypes.vae, attention=backend, why=why)
    with records.Writer(out, kind=kind, about=about) as writer:
        left_out = [] if writer.complete else _write(writer, items, parts, times)
        require(
            writer.complete or writer.examples > 0,
            f"none of the {len(items)} items of {source} could be "
            f"prepared ({left_out[0] if left_out else ''}); give another source.",
        )
    return _tell(args, writer.notes, left_out)


def timesteps(listed: str | None) -> list[float] | None:
    """`1000,937.5,0` as numbers that do not rise."""
    if listed is None:
        return None
    try:
        values = [float(word) for word in listed.split(",")]
    except ValueError as error:
        raise InputError(
            f"--timesteps {listed} is not a list of numbers; write it as 1000,937.5,0."
        ) from error
    falling = all(1000 >= a >= b >= 0 for a, b in itertools.pairwise([1000.0, *values]))
    require(falling, f"--timesteps {listed} must fall from at most 1000 to 0; correct them.")
    return values


def _model(
    args: argparse.Namespace,
) -> tuple[Experiment, TrainConfig, model_folder.Opened | None]:
    """The sizes that are asked for, how a teacher draws, and the model folder that is given."""
    from packforcing_jax.config import Stage, loading
    from packforcing_jax.io import model_folder

    require(
        args.weights is not None or args.config is not None,
        "give --weights MODEL, or --config for the sizes alone (as for an LMDB folder).",
    )
    stage = loading.load_stage(args.config) if args.config is not None else None
    known = decode.classes_in(stage.experiment) if stage is not None else ()
    model = model_folder.opened(args.weights, known) if args.weights is not None else None
    base = stage or Stage("", model.experiment, TrainConfig())  # type: ignore[union-attr]
    adjusted = loading.override_stage(base, args.overrides)
    return adjusted.experiment, adjusted.train, model


def made_with(parts: importing.Parts, model: model_folder.Opened | None) -> dict[str, Any]:
    """What decides the content of examples, besides the source."""
    import hashlib

    from packforcing_jax.io import model_folder, text_encoder

    exp = parts.exp
    path = model.folder / model_folder.weights_file("codec") if model is not None else None
    weights = None
    if path is not None and path.is_file():
        with path.open("rb") as file:
            weights = hashlib.file_digest(file, "sha256").hexdigest()[:32]
    return {
        "config": exp.name,
        "clip": exp.clip,
        "latent": exp.latent,
        "fps": exp.fps,
        "block": exp.cache.block,
        "pool": exp.compressor.pool,
        "codec": dataclasses.asdict(exp.codec),
        "codec_weights": weights,
        "text_encoder": None if parts.text is None else text_encoder.identity(parts.text),
        "words": exp.text.max_words,
    }


def _write(
    writer: records.Writer,
    items: Sequence[importing.Item],
    parts: importing.Parts,
    times: Sequence[float] | None,
) -> list[str]:
    """Puts all items behind those that the writer has; says why some were left out."""
    left = items[writer.taken :]
    if len(left) < len(items):
        print(f"prepare: {writer.taken} of {len(items)} items are done already", file=sys.stderr)
    left_out = []
    for example in common.progress(
        examples(left, parts, times), name="prepare", unit="items", total=len(left)
    ):
        if isinstance(example, str):
            print(f"prepare: left out: {example}.", file=sys.stderr)
            left_out.append(example)
        writer.put(None if isinstance(example, str) else example)
    return left_out


def examples(
    items: Sequence[importing.Item], parts: importing.Parts, times: Sequence[float] | None
) -> Iterator[dict | str]:
    """The example of each item, or why it has none."""
    from packforcing_jax.training import importing

    read = (
        importing.Texts(parts, [item.prompt for item in items]) if parts.text is not None else None
    )
    for group in _groups(items):
        states = read([item.prompt for item in group]) if read else itertools.repeat(None)
        for item, encoded in zip(group, states):
            try:
                made = item.made(parts, encoded)
                importing.require_finite(item, made)
            except importing.LeftOut as why:
                yield str(why)
                continue
            check_timesteps(item, made, times)
            yield (
                made
                | {"prompt": importing.as_bytes(item.prompt)}
                | ({} if encoded is None else {"states": encoded})
            )


def _groups(items: Sequence) -> Iterable[Sequence]:
    return (items[at : at + GROUP] for at in range(0, len(items), GROUP))


def check_timesteps(item: importing.Item, made: dict, times: Sequence[float] | None) -> None:
    """Raises `InputError` unless there is one timestep for each state on the way from noise."""
    states = len(made.get("trajectory", ()))
    described = "are not given" if times is None else f"are {len(times)}"
    require(
        states == len(times or ()),
        f"{item.name} has {states} states from noise to clean, whose timesteps {described}"
        "; say them with --timesteps, as in 1000,937.5,833.3,625,0.",
    )


def _tell(args: argparse.Namespace, notes: records.Notes, left_out: Sequence[str]) -> int:
    """Prints the result."""
    from packforcing_jax.data import records

    size = sum(shard.bytes for shard in notes.shards)
    if args.json:
        fields = {name: dataclasses.asdict(field) for name, field in notes.fields.items()}
        print(
            json.dumps(
                {
                    "out": args.out,
                    "kind": notes.kind,
                    "examples": notes.examples,
                    "bytes": size,
                    "files": len(notes.shards),
                    "left_out": list(left_out),
                    "fields": fields,
                }
            )
        )
    else:
        print(
            f"{notes.examples} examples of {records.spell(notes.fields)}\n"
            f"{len(notes.shards)} files, {plan.spell(size, 'bytes')}\n{args.out}"
        )
    return 0
