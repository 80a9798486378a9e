"""How strong a LoRA is: what its files say of it, and what holds where they say nothing."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from packforcing_jax.config.cards import Card
from packforcing_jax.errors import InputError

ALPHAS = ("lora_alpha", "alpha", "network_alpha", "ss_network_alpha")  # a strength beside tensors
CERTAIN = ("lora_alpha", "network_alpha")  # those that mean nothing else, wherever they stand
DEEPEST = 4  # tables inside each other that are searched for one
RANKS = ("r", "rank", "lora_rank", "ss_network_dim")
HEADER = "lora_adapter_metadata"  # a text in safetensors headers: JSON such as {"transformer.lora_alpha": 16}
UNREAD = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern")  # settings that change the sum
LARGEST = 1e9  # alpha or rank
DAMAGED = 1 << 20  # characters of a header's text beyond which it is no strength
MERGE = "merge it into its base with the tool that trained it, and convert the merged checkpoint"


@dataclass(frozen=True)
class Strength:
    """What a LoRA's own file says of it: its alpha, its rank, where that stands, and other alphas that it says too."""

    alpha: float | None = None
    rank: float | None = None
    where: str = ""
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Otherwise:
    """What says how strong a LoRA is where its files do not: the user's alpha, else the card of the checkpoint."""

    alpha: float | None = None
    card: Card | None = None


def scale(said: Strength, otherwise: Otherwise) -> Callable[[int], float]:
    """What the product of two factors of a rank is multiplied with where no alpha is beside them; by default 1."""
    alpha = said.alpha if said.alpha is not None else otherwise.alpha
    of_card = otherwise.card.lora if otherwise.card else None
    if alpha is None:
        return lambda rank: of_card.scale if of_card else 1.0
    return lambda rank: alpha / rank


def read(
    content: object, adapter: Mapping[str, object], header: Mapping[str, str], origin: str
) -> Strength:
    """What is said beside the tensors: in the file's own table, in adapter_config.json, in a safetensors header.

    The first of these that says an alpha holds. Raises `InputError` for settings that change how the sum is made.
    """
    own = content if isinstance(content, dict) else {}
    peft = _of_transformer(header.get(HEADER))
    for table in (adapter, peft):
        for key in UNREAD:
            if table.get(key):
                raise InputError(f"{origin}: {key} of the LoRA is not supported; {MERGE}.")
    places = (
        (own, f"{origin} itself"),
        (_inside(own), f"{origin} itself"),
        (adapter, "adapter_config.json"),
        (peft, f"the header of {origin}"),
        (header, f"the header of {origin}"),
    )
    said = [
        Strength(alpha, _number(table, RANKS, origin), where)
        for table, where in places
        if (alpha := _number(table, ALPHAS, origin)) is not None
    ]
    if not said:
        return Strength()
    others = tuple(f"{each.alpha:g}" for each in said if each.alpha != said[0].alpha)
    return replace(said[0], others=others)


def _inside(table: Mapping[object, object], depth: int = 0) -> dict[str, object]:
    """What tables inside a file's table say of a strength, by the names that nothing else has."""
    found: dict[str, object] = {}
    for value in table.values() if depth < DEEPEST else ():
        if isinstance(value, dict):
            found |= _inside(value, depth + 1)
            found |= {key: value[key] for key in (*CERTAIN, *RANKS) if key in value}
    return found if not found.keys().isdisjoint(CERTAIN) else {}


def _of_transformer(text: str | None) -> Mapping[str, object]:
    """The settings of the transformer in a header's JSON, whose keys say which network each is about."""
    try:
        table = json.loads(text) if text and len(text) < DAMAGED else {}
    except (ValueError, RecursionError):
        return {}
    if not isinstance(table, dict):
        return {}
    fronts = {key.rpartition(".")[0] for key in table if isinstance(key, str)}
    about = next((each for each in ("transformer", "", "unet") if each in fronts), None)
    about = next(iter(fronts)) if about is None and len(fronts) == 1 else about
    return {
        key.rpartition(".")[2]: value
        for key, value in table.items()
        if key.rpartition(".")[0] == about
    }


def _number(table: Mapping[str, object], keys: Sequence[str], origin: str) -> float | None:
    """The first of these entries that is a number, or a text of one."""
    for key in keys:
        value = table.get(key)
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                continue  # such as "None"
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not abs(value) < LARGEST:  # nor if it is no number
                raise InputError(
                    f"{origin}: {key} of the LoRA is no number that can be; correct it."
                )
            return float(value)
    return None
