"""Checkpoints to a model folder: what `packforcing convert` does, from the sources named to the folder in its place."""

import math
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from packforcing_jax.convert import (
    contents,
    experiments,
    exporting,
    lora,
    manifest,
    networks,
    rules,
    sources,
    writing,
)
from packforcing_jax.convert.contents import LORA, Contents, Ignored
from packforcing_jax.convert.sources import Found

from packforcing_jax.config import DTYPES, Experiment, overrides
from packforcing_jax.errors import require
from packforcing_jax.io import model_folder
from packforcing_jax.networks.tokenizer import Tokenizer

TEMPLATE = "wan_t2v_1_3b"
KINDS = (*networks.KINDS, LORA)


@dataclass(frozen=True)
class Request:
    """What to convert into which folder. `config` None: that of a model folder among the sources, else Wan2.1 1.3B."""

    given: tuple[Path, ...]
    out: Path
    config: str | None = None
    sets: tuple[str, ...] = ()
    network: str | None = None
    kind: str | None = None
    dtype: str | None = None
    lora_alpha: float | None = None
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Done:
    """The folder, a line for each part, what was left out and what was assumed."""

    folder: Path
    rows: tuple[manifest.Row, ...]
    ignored: tuple[Ignored, ...]
    notes: tuple[str, ...]


def convert(request: Request, watch: exporting.Watch = lambda steps, count: steps) -> Done:
    """Writes the model folder, complete or not at all; one `InputError` names everything that does not fit."""
    _check_request(request)
    found = sources.gather(list(request.given))
    held = contents.sort(found, request.network, request.kind)
    taken, notes = _taken(found, held), list(found.notes)
    exp = _experiment(request, found, held, taken, notes)
    jobs = _jobs(request, held, taken, exp, notes)
    words = _tokenizer(request, found, exp, notes)
    _require_fit(jobs, held.wrong, watch)
    with model_folder.replacing(request.out) as fresh:
        entries = list(
            watch(writing.carry_out(jobs, fresh, held.wrong), sum(job.count for job in jobs))
        )
        _raise(held.wrong)
        texts = {
            model_folder.CONFIG: model_folder.experiment_to_json(exp),
            model_folder.CARD: _card(exp, found, jobs),
            model_folder.MANIFEST: manifest.text(found, entries, held.ignored, notes),
        }
        for name, text in texts.items():
            (fresh / name).write_text(text, encoding="utf-8")
        if words is not None:
            shutil.copyfile(words, fresh / model_folder.TOKENIZER)
    return Done(request.out, _rows(jobs, entries, held.ignored), tuple(held.ignored), tuple(notes))


def _rows(
    jobs: Sequence[writing.Job], entries: Sequence[writing.Entry], ignored: Sequence[Ignored]
) -> tuple[manifest.Row, ...]:
    used, left = Counter(entry.part for entry in entries), Counter(each.part for each in ignored)
    return tuple(
        manifest.row(job.part, job.forms.values(), tensors=used[job.part], ignored=left[job.part])
        for job in jobs
    )


def _check_request(request: Request) -> None:
    require(
        request.kind in (None, *KINDS),
        f"--kind {request.kind} is unknown; choose one of {', '.join(KINDS)}.",
    )
    require(
        request.dtype in (None, *DTYPES),
        f"--dtype {request.dtype} is unknown; choose one of {', '.join(DTYPES)}.",
    )
    require(
        math.isfinite(request.lora_alpha or 0),
        f"--lora-alpha {request.lora_alpha} is no number; give one.",
    )
    _keep_apart(request)


def _keep_apart(request: Request) -> None:
    """Raises `InputError` if the folder to be written is a source, lies in one or holds one."""
    out = request.out.resolve()
    for given in request.given:
        source = given.resolve()
        apart = not source.is_relative_to(out) and not (
            source.is_dir() and out.is_relative_to(source)
        )
        require(
            apart,
            f"--out {request.out} and the source {given} lie in each other; choose another --out.",
        )


# What comes along from model folders


def _taken(found: Found, held: Contents) -> dict[str, model_folder.Opened]:
    """The model folder of each part that no other source holds; parts that one does hold are noted as ignored."""
    taken: dict[str, model_folder.Opened] = {}
    for part in model_folder.PARTS:
        having = [model for model in found.folders if part in model.parts]
        if part in held.networks:
            reason = f"this network is taken from {', '.join(group.origin for group in held.groups[part])}"
            held.ignored += [
                Ignored(tensor.name, tensor.origin, reason, part, tensor)
                for model in having
                for tensor in model.part(part).values()
            ]
            continue
        require(
            len(having) < 2,
            f"{' and '.join(str(model.folder) for model in having)} all hold the part {part}; "
            "give one of them.",
        )
        if having:
            taken[part] = having[0]
    return taken


def _experiment(
    request: Request,
    found: Found,
    held: Contents,
    taken: Mapping[str, model_folder.Opened],
    notes: list[str],
) -> Experiment:
    """What the folder says of itself, named after it."""
    if request.config is None and found.folders:
        template = taken.get("dit", found.folders[0]).experiment
    else:
        template = overrides.load_experiment(request.config or TEMPLATE)
    template = replace(template, name=request.out.resolve().name)
    return experiments.describe(held, taken, template, sets=request.sets, notes=notes)


def _jobs(
    request: Request,
    held: Contents,
    taken: Mapping[str, model_folder.Opened],
    exp: Experiment,
    notes: list[str],
) -> list[writing.Job]:
    """What is written for each part, in the order of the parts."""
    require(
        not held.adapters or "dit" in held.networks or "dit" in taken,
        "a LoRA was given without the network it adds to; give the base checkpoint as well.",
    )
    require(bool(held.networks or taken), "the sources hold no weights; give a checkpoint.")
    jobs = []
    for part in model_folder.PARTS:
        adapters = held.adapters if part == "dit" else {}
        if part in held.networks or (adapters and part in taken):
            base = held.networks.get(part) or exporting.originals(taken[part], part, held.wrong)
            added = lora.additions(adapters, base, _alpha(request, held, notes), held.wrong)
            jobs.append(writing.job(part, base, exp, held.wrong, added=added, dtype=request.dtype))
        elif part in taken and networks.wanted(part, exp):
            jobs.append(writing.taking(part, taken[part], exp, held.wrong, request.dtype))
        elif part in taken:
            held.ignored += [
                Ignored(tensor.name, tensor.origin, "the settings ask for none", part, tensor)
                for tensor in taken[part].part(part).values()
            ]
    return jobs


def _alpha(request: Request, held: Contents, notes: list[str]) -> float | None:
    """How strong a LoRA is: as its file says, else as the user says."""
    note = f"--lora-alpha {request.lora_alpha} is not used: the LoRA itself says {held.alpha}"
    if (
        held.alpha is not None
        and request.lora_alpha not in (None, held.alpha)
        and note not in notes
    ):
        notes.append(note)
    return request.lora_alpha if held.alpha is None else held.alpha


def _require_fit(
    jobs: Sequence[writing.Job], wrong: rules.Mismatches, watch: exporting.Watch
) -> None:
    """Raises one `InputError` if something does not fit, after a look for values that are no numbers as well."""
    if any(wrong.values()):
        steps: Iterable[str] = (name for job in jobs for name in writing.check(job, wrong))
        for _ in watch(steps, sum(job.count for job in jobs)):
            pass
    _raise(wrong)


def _raise(wrong: rules.Mismatches) -> None:
    rules.raise_all(
        wrong, "the sources do not make a model", "give each network once, whole and of one size"
    )


# Files of text


def _tokenizer(request: Request, found: Found, exp: Experiment, notes: list[str]) -> Path | None:
    """The tokenizer to be copied, which must be one; without any, how to add it is noted."""
    path = request.tokenizer or next(iter(found.tokenizers), None)
    if path is None:
        notes.append("no tokenizer.json was found; add the text encoder's with --tokenizer FILE")
        return None
    Tokenizer.from_file(path, exp.text.max_words)
    found.files.setdefault(model_folder.TOKENIZER, path)
    return path


def _card(exp: Experiment, found: Found, jobs: Sequence[writing.Job]) -> str:
    """A few lines for people who find the folder."""
    parts = "\n".join(f"- `{model_folder.weights_file(job.part)}`" for job in jobs)
    files = "\n".join(f"- {name}" for name in found.files)
    return "\n\n".join(
        [
            f"# {exp.name}",
            "A model folder of packforcing-jax, made by `packforcing convert`.",
            parts,
            "out of",
            files,
            f"`{model_folder.MANIFEST}` says what became of every tensor. The licence of those files applies.\n",
        ]
    )
