"""The additions of all LoRA among the sources to one network, and what is told of how strong each is."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from packforcing_jax.convert import lora, rules, strength
from packforcing_jax.convert.lora import Addition, Lora, LowRank, Module, Term
from packforcing_jax.convert.strength import Otherwise

from packforcing_jax.io.safetensors_io import Tensor


def additions(
    loras: Sequence[Lora],
    base: Mapping[str, Tensor],
    otherwise: Otherwise,
    wrong: rules.Mismatches,
    notes: list[str],
) -> dict[str, Addition]:
    """What all of them add, by the original name of the weight; how strong each is goes to `notes`."""
    terms: dict[str, list[Term]] = defaultdict(list)
    for each in loras:
        modules = lora.modules(each, base, wrong)
        own = lora.terms(modules, base, strength.scale(each.strength, otherwise), wrong)
        notes += _told(each, modules, own, otherwise)
        for weight, added in own.items():
            terms[weight] += added
    return {weight: Addition(tuple(added)) for weight, added in terms.items()}


def _told(
    added: Lora,
    modules: Mapping[str, Module],
    terms: Mapping[str, Sequence[Term]],
    otherwise: Otherwise,
) -> list[str]:
    """How strong a LoRA is and who says so: lines for the user and for the manifest."""
    own = [sides for sides in modules.values() if "alpha" in sides]
    silent = [sides for sides in modules.values() if "down" in sides and "alpha" not in sides]
    low = [term for each in terms.values() for term in each if isinstance(term, LowRank)]
    scales = sorted({term.scale for term in low})
    ranks = sorted({term.down.shape[0] for term in low})
    said = added.strength
    spread = (
        f"{scales[0]:g}" + (f" to {scales[-1]:g}" if len(scales) > 1 else "") if scales else "1"
    )
    head = f"LoRA {added.origin} adds to {len(terms)} weights at {spread}"
    lines = []
    if own and not silent:
        lines.append(f"{head}: alpha / rank, of which alpha stands beside each of them")
    elif silent and said.alpha is not None:
        lines.append(f"{head}: alpha {said.alpha:g}, as {said.where} says, over its rank")
    elif silent and otherwise.alpha is not None:
        lines.append(f"{head}: alpha {otherwise.alpha:g}, as --lora-alpha says, over its rank")
    elif silent and otherwise.card is not None and otherwise.card.lora is not None:
        lines.append(f"{head}: as card {otherwise.card.name} says, since no file does")
    elif silent:
        lines.append(
            f"{head}: no file says how strong it is, so alpha = rank is assumed; give --lora-alpha A if not"
        )
    elif terms:
        lines.append(head)
    stated = said.alpha if silent else "an alpha for each weight" if own else None
    if stated is not None and otherwise.alpha not in (None, stated):
        lines.append(f"--lora-alpha {otherwise.alpha} is not used: the LoRA itself says {stated}")
    if silent and said.rank is not None and said.rank not in ranks:
        lines.append(
            f"{said.where} says rank {said.rank:g} and the tensors of {added.origin} have "
            f"{', '.join(map(str, ranks))}: theirs is used"
        )
    if silent and said.others:
        lines.append(f"{added.origin} also says alpha {', '.join(said.others)}, which is not used")
    if 0.0 in scales:
        lines.append(
            f"alpha of LoRA {added.origin} is 0 where it adds at 0: nothing is added there"
        )
    return lines
