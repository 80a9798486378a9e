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
    merging,
    networks,
    passed_over,
    quantised,
    recognition,
    rules,
    sources,
    wan_dit,
    writing,
)
from packforcing_jax.convert.contents import LORA, Contents, Ignored
from packforcing_jax.convert.quantised import Quantised
from packforcing_jax.convert.recognition import Recognised
from packforcing_jax.convert.sources import Inputs
from packforcing_jax.convert.strength import Otherwise

from packforcing_jax.config import DTYPES, Experiment, cards, loading
from packforcing_jax.errors import require
from packforcing_jax.io import identity, model_folder
from packforcing_jax.networks.tokenizer import Tokenizer

TEMPLATE = "wan_t2v_1_3b"
KINDS = (*networks.KINDS, LORA)


@dataclass(frozen=True)
class Request:
    """What to convert into which folder.

    `card` None: as the file's name says. `config` None: the settings of the card, else of a model folder among the
    sources, else of Wan2.1 1.3B.
    """

    sources: tuple[Path, ...]
    out: Path
    card: str | None = None
    config: str | None = None
    overrides: tuple[str, ...] = ()
    network: str | None = None
    prefix: str | None = None
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
    inputs = sources.gather(list(request.sources), request.prefix)
    notes = list(inputs.notes)
    recognised = recognition.recognise(inputs, _wish(request), notes)
    tensors = contents.sort(inputs, recognised.network, request.kind)
    taken = _taken(inputs, tensors)
    _require_lora(request, recognised, tensors, taken, notes)
    exp = _experiment(request, recognised, inputs, tensors=tensors, taken=taken, notes=notes)
    jobs = _jobs(request, recognised, tensors, taken=taken, exp=exp, notes=notes)
    tensors.ignored += [
        Ignored(tensor.name, tensor.origin, f"not behind --prefix {request.prefix}", "", tensor)
        for tensor in inputs.unmeant
    ]
    notes += _remarks(recognised, tensors, jobs)
    tokenizer = _tokenizer(request, inputs, exp, notes)
    _require_fit(jobs, tensors.wrong, watch)
    with model_folder.replacing(request.out) as fresh:
        entries = list(
            watch(writing.carry_out(jobs, fresh, tensors.wrong), sum(job.count for job in jobs))
        )
        _raise(tensors.wrong)
        notes += _zeros(entries)
        if tokenizer is not None:
            shutil.copyfile(tokenizer, fresh / model_folder.TOKENIZER)
        texts = {
            model_folder.CONFIG: model_folder.experiment_to_json(exp),
            model_folder.CARD: _card(exp, inputs, jobs),
            model_folder.MANIFEST: manifest.text(
                inputs,
                entries,
                tensors.ignored,
                origin={"card": exp.card, "method": exp.method, "network": recognised.network},
                notes=notes,
                record=identity.record(fresh),
            ),
        }
        for name, text in texts.items():
            (fresh / name).write_text(text, encoding="utf-8")
    return Done(
        request.out, _rows(jobs, entries, tensors.ignored), tuple(tensors.ignored), tuple(notes)
    )


def _zeros(entries: Sequence[writing.Entry]) -> list[str]:
    """A line that names the tensors of zeros alone, which a download that broke off leaves in a file of full length."""
    zero = [entry.tensor.name for entry in entries if entry.zero]
    more = f" and {len(zero) - rules.SHOWN} more" if len(zero) > rules.SHOWN else ""
    return [
        f"{len(zero)} of {len(entries)} tensors are all zero ({', '.join(zero[: rules.SHOWN])}{more}): check that the "
        "download is complete, unless the network was saved so"
    ] * bool(zero)


def _rows(
    jobs: Sequence[writing.Job], entries: Sequence[writing.Entry], ignored: Sequence[Ignored]
) -> tuple[manifest.Row, ...]:
    used = Counter(entry.part for entry in entries)
    left = Counter(each.part for each in ignored)
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
    for path in request.sources:
        source = path.resolve()
        apart = not source.is_relative_to(out) and not (
            source.is_dir() and out.is_relative_to(source)
        )
        require(
            apart,
            f"--out {request.out} and the source {path} lie in each other; choose another --out.",
        )


# What comes along from model folders


def _taken(inputs: Inputs, tensors: Contents) -> dict[str, model_folder.Opened]:
    """The model folder of each part that no other source holds; parts that one does hold are noted as ignored."""
    taken: dict[str, model_folder.Opened] = {}
    for part in model_folder.PARTS:
        having = [model for model in inputs.folders if part in model.parts]
        if part in tensors.networks:
            reason = f"this network is taken from {', '.join(group.origin for group in tensors.groups[part])}"
            tensors.ignored += [
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


# Settings


def _wish(request: Request) -> recognition.Wish:
    """What the user says of the sources."""
    return recognition.Wish(
        request.card, request.network, request.kind, settled=request.config is not None
    )


def _experiment(
    request: Request,
    recognised: Recognised,
    inputs: Inputs,
    *,
    tensors: Contents,
    taken: Mapping[str, model_folder.Opened],
    notes: list[str],
) -> Experiment:
    """What the folder says of itself, named after it."""
    template = _template(request, recognised, inputs, taken, notes)
    template = replace(template, name=request.out.resolve().name)
    exp = experiments.describe(tensors, taken, template, overrides=request.overrides, notes=notes)
    overridden = {each.partition("=")[0].strip() for each in request.overrides}
    if "dit" in tensors.networks or "dit" in taken:
        wan_dit.require_text_alone(exp.dit, recognised.file or "the transformer")
    if request.config is None and overridden.isdisjoint({"dit.dim", "dit.layers"}):
        recognition.check_sizes(recognised, exp.dit, notes)
    return exp


def _template(
    request: Request,
    recognised: Recognised,
    inputs: Inputs,
    taken: Mapping[str, model_folder.Opened],
    notes: list[str],
) -> Experiment:
    """The settings to begin with: of a config, else of the card, else of a model folder, else of Wan2.1 1.3B."""
    card = recognised.card
    if request.config is not None:
        exp = loading.load_experiment(request.config)
        if card is not None and exp != card.experiment:
            notes.append(
                f"the settings are those of --config {request.config}, not of card {card.name}"
            )
        return replace(exp, card=card.name) if card else exp
    if card is not None:
        return card.experiment
    if "dit" in taken:
        return taken["dit"].experiment
    # the settings of a folder that has another checkpoint's card are that checkpoint's
    own = [model.experiment for model in inputs.folders if not model.experiment.card]
    exp = own[0] if own else loading.load_experiment(TEMPLATE)
    if recognised.file is not None:
        sample = exp.sample
        notes.append(
            f"nothing says which published checkpoint {recognised.file} is: its settings are those of "
            f"{'the model folder ' + exp.name if own else 'config ' + TEMPLATE} (steps "
            f"{' '.join(map(str, sample.steps))}, shift {sample.shift:g}, blocks of {exp.cache.block}); give "
            "--card NAME if it is one (`packforcing download --list` has them), else --config or --set"
        )
    return exp


def _require_lora(
    request: Request,
    recognised: Recognised,
    tensors: Contents,
    taken: Mapping[str, model_folder.Opened],
    notes: list[str],
) -> None:
    """Raises `InputError` if a card's LoRA is not among the sources, unless a config asks for the base alone."""
    card = recognised.card
    merged = card is not None and "dit" in taken and taken["dit"].experiment.card == card.name
    if card is None or card.lora is None or tensors.adapters or merged:
        return
    require(
        request.config is not None,
        f"card {card.name} is {' and '.join(card.files)} with the LoRA {card.lora.file}, which is not among the "
        f"sources; give it too, or --config {card.experiment.name} to convert the network alone.",
    )
    notes.append(
        f"the LoRA of card {card.name} is not among the sources: the network alone is converted"
    )


def _remarks(recognised: Recognised, tensors: Contents, jobs: Sequence[writing.Job]) -> list[str]:
    """What has to be known of a card, of numbers of 8 bits, and of what was left out for want of a place."""
    card = recognised.card
    remarks = []
    for reason in dict.fromkeys(why for _, why in contents.EXTRAS.values()):
        left = [each.name for each in tensors.ignored if each.reason == reason]
        if left:
            remarks.append(
                f"{', '.join(left[: passed_over.SHOWN])} left out ({len(left)} in all): {reason}"
            )
    tables = Counter(each.table for each in tensors.ignored if each.table)
    if tables:
        told = ", ".join(f"{table} ({count} tensors)" for table, count in tables.items())
        remarks.append(f"left out, as not of the network that is taken: {told}")
    for job in jobs:
        small = [each for each in job.tensors.values() if isinstance(each, Quantised)]
        stored = ", ".join(sorted({job.dtype or each.dtype.name for each in small}))
        if small:
            remarks.append(
                f"{len(small)} tensors of {job.part} are fp8 ({sum(each.scale is not None for each in small)} with a "
                f"scale): stored as {stored}, as the numbers that they stand for"
            )
    if card is not None and card.unconfirmed:
        remarks.append(f"not confirmed of card {card.name}: {'; '.join(card.unconfirmed)}")
    if card is not None and card.samples:
        remarks.append(f"card {card.name} cannot be sampled block by block: {card.samples}")
    return remarks


def _jobs(
    request: Request,
    recognised: Recognised,
    tensors: Contents,
    *,
    taken: Mapping[str, model_folder.Opened],
    exp: Experiment,
    notes: list[str],
) -> list[writing.Job]:
    """What is written for each part, in the order of the parts."""
    files = ", ".join(each.origin for each in tensors.adapters)
    require(
        not tensors.adapters or "dit" in tensors.networks or "dit" in taken,
        f"a LoRA ({files}) was given without the network it adds to; give the base checkpoint as well, or a model "
        "folder that holds it.",
    )
    asked = f" that --kind {request.kind} asks for" if request.kind else ""
    require(
        bool(tensors.networks or taken), f"the sources hold no weights{asked}; give a checkpoint."
    )
    jobs = []
    for part in model_folder.PARTS:
        adapters = tensors.adapters if part == "dit" else []
        if part in tensors.networks or (adapters and part in taken):
            base = tensors.networks.get(part) or exporting.originals(
                taken[part], part, tensors.wrong
            )
            otherwise = Otherwise(request.lora_alpha, recognised.card)
            added = merging.additions(adapters, base, otherwise, tensors.wrong, notes)
            jobs.append(
                writing.job(part, base, exp, tensors.wrong, added=added, dtype=request.dtype)
            )
        elif part in taken and networks.wanted(part, exp):
            jobs.append(writing.taking(part, taken[part], exp, tensors.wrong, request.dtype))
        elif part in taken:
            tensors.ignored += [
                Ignored(tensor.name, tensor.origin, "the settings ask for none", part, tensor)
                for tensor in taken[part].part(part).values()
            ]
    return jobs


def _require_fit(
    jobs: Sequence[writing.Job], wrong: rules.Mismatches, watch: exporting.Watch
) -> None:
    """Raises one `InputError` if something does not fit, after a look for values that are no numbers as well."""
    if any(wrong.values()):
        steps: Iterable[str] = (name for job in jobs for name in writing.check(job, wrong))
        for _ in watch(steps, sum(job.count for job in jobs)):
            pass
    _raise(wrong)


REMEDIES = {  # for what does not fit, where it is not the network itself
    rules.NOT_FINITE: "fetch the file again, as its numbers are damaged",
    rules.MIXED: "say with --dtype in which number format to store them",
    lora.NO_WEIGHT: "give a LoRA that was trained on this network, or its base checkpoint",
    lora.HALF: "fetch the LoRA again",
    lora.OTHER_SHAPE: "give a LoRA that was trained on a network of this size",
    **dict.fromkeys(quantised.COMPLAINTS, quantised.REMEDY),
}


def _raise(wrong: rules.Mismatches) -> None:
    kinds = {kind for kind, each in wrong.items() if each}
    remedies = dict.fromkeys(REMEDIES[kind] for kind in kinds if kind in REMEDIES)
    if kinds - REMEDIES.keys():
        remedies["give each network once, whole and of one size"] = None
    rules.raise_all(wrong, "the sources do not make a model", ", and ".join(remedies))


# Files of text


def _tokenizer(request: Request, inputs: Inputs, exp: Experiment, notes: list[str]) -> Path | None:
    """The tokenizer to be copied, which must be one; without any, how to add it is noted."""
    path = request.tokenizer or next(iter(inputs.tokenizers), None)
    if path is None:
        notes.append("no tokenizer.json was found; add the text encoder's with --tokenizer FILE")
        return None
    Tokenizer.from_file(path, exp.text.max_words)
    inputs.files.setdefault(model_folder.TOKENIZER, path)
    return path


def _card(exp: Experiment, inputs: Inputs, jobs: Sequence[writing.Job]) -> str:
    """A few lines for people who find the folder."""
    parts = "\n".join(f"- `{model_folder.weights_file(job.part)}`" for job in jobs)
    files = "\n".join(f"- {name}" for name in inputs.files)
    return "\n\n".join(
        [
            f"# {exp.name}",
            "A model folder of packforcing-jax, made by `packforcing convert`.",
            parts,
            "out of",
            files,
            f"`{model_folder.MANIFEST}` says what became of every tensor. {_terms(exp)}\n",
        ]
    )


def _terms(exp: Experiment) -> str:
    """What is known of the licence of the weights."""
    card = cards.cards().get(exp.card)
    if card is None:
        return "The licence of those files applies."
    known = f"licence {card.licence or 'not recorded'}" + (
        f" ({card.unsettled})" if card.unsettled else ""
    )
    return f"The transformer is card {card.name} of {card.repository}, {known}."
