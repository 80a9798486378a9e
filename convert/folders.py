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
    recognition,
    rules,
    sources,
    wan_dit,
    writing,
)
from packforcing_jax.convert.contents import LORA, Contents, Ignored
from packforcing_jax.convert.recognition import Recognised
from packforcing_jax.convert.sources import Inputs

from packforcing_jax.config import DTYPES, Experiment, cards, loading
from packforcing_jax.errors import require
from packforcing_jax.io import model_folder
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
    inputs = sources.gather(list(request.sources))
    notes = list(inputs.notes)
    recognised = recognition.recognise(inputs, _wish(request), notes)
    tensors = contents.sort(inputs, recognised.network, request.kind)
    taken = _taken(inputs, tensors)
    _require_lora(request, recognised, tensors, taken, notes)
    exp = _experiment(request, recognised, inputs, tensors=tensors, taken=taken, notes=notes)
    jobs = _jobs(request, recognised, tensors, taken=taken, exp=exp, notes=notes)
    notes += _remarks(recognised, tensors)
    tokenizer = _tokenizer(request, inputs, exp, notes)
    _require_fit(jobs, tensors.wrong, watch)
    with model_folder.replacing(request.out) as fresh:
        entries = list(
            watch(writing.carry_out(jobs, fresh, tensors.wrong), sum(job.count for job in jobs))
        )
        _raise(tensors.wrong)
        texts = {
            model_folder.CONFIG: model_folder.experiment_to_json(exp),
            model_folder.CARD: _card(exp, inputs, jobs),
            model_folder.MANIFEST: manifest.text(
                inputs,
                entries,
                tensors.ignored,
                origin={"card": exp.card, "method": exp.method, "network": recognised.network},
                notes=notes,
            ),
        }
        for name, text in texts.items():
            (fresh / name).write_text(text, encoding="utf-8")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, fresh / model_folder.TOKENIZER)
    return Done(
        request.out, _rows(jobs, entries, tensors.ignored), tuple(tensors.ignored), tuple(notes)
    )


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


def _remarks(recognised: Recognised, tensors: Contents) -> list[str]:
    """What has to be known of a card, and of what was left out for want of a place."""
    card = recognised.card
    remarks = []
    if any(each.reason == wan_dit.OTHER_COMPRESSOR for each in tensors.ignored):
        remarks.append(f"pack_compressor is left out: it is the {wan_dit.OTHER_COMPRESSOR}")
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
    require(
        not tensors.adapters or "dit" in tensors.networks or "dit" in taken,
        "a LoRA was given without the network it adds to; give the base checkpoint as well.",
    )
    require(bool(tensors.networks or taken), "the sources hold no weights; give a checkpoint.")
    jobs = []
    lora_of_card = recognised.card.lora if recognised.card else None
    scale = lora_of_card.scale if lora_of_card else 1.0
    for part in model_folder.PARTS:
        adapters = tensors.adapters if part == "dit" else {}
        if part in tensors.networks or (adapters and part in taken):
            base = tensors.networks.get(part) or exporting.originals(
                taken[part], part, tensors.wrong
            )
            alpha = _alpha(request, tensors, notes)
            added = lora.additions(adapters, base, alpha, tensors.wrong, scale)
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


def _alpha(request: Request, tensors: Contents, notes: list[str]) -> float | None:
    """How strong a LoRA is: as its file says, else as the user says."""
    note = f"--lora-alpha {request.lora_alpha} is not used: the LoRA itself says {tensors.alpha}"
    if (
        tensors.alpha is not None
        and request.lora_alpha not in (None, tensors.alpha)
        and note not in notes
    ):
        notes.append(note)
    return request.lora_alpha if tensors.alpha is None else tensors.alpha


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
