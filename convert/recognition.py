"""Which published checkpoint a file is: as the user says, else by its folders and name, and by the networks in it."""

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from packforcing_jax.convert import contents, names
from packforcing_jax.convert.sources import Inputs

from packforcing_jax.config import ModelConfig
from packforcing_jax.config.cards import Card, cards, find
from packforcing_jax.errors import require
from packforcing_jax.io.model_folder import SNAPSHOTS

TELLS_NOTHING = re.compile(r"(ema_)?model\.pt|\*\.pt|diffusion_pytorch_model.*")  # names of files
COMMON = ("", "checkpoints", "models", "transformer")  # folders that anything may lie in
SILENCE = (False, False, False)  # no evidence


@dataclass(frozen=True)
class Recognised:
    """What the transformer among the sources is: its card, if it has one, and the entry of its file to take.

    `file` is the transformer's, None if the sources hold none.
    """

    card: Card | None = None
    network: str | None = None
    file: str | None = None


# By folders and name


def by_path(path: Path) -> tuple[Card, ...]:
    """The cards that a file at `path` may belong to, those for which most speaks; none where nothing does."""
    evidence = {name: _evidence(path.absolute(), card) for name, card in cards().items()}
    best = max(evidence.values())
    return tuple(cards()[name] for name, each in evidence.items() if any(best) and each == best)


def _evidence(path: Path, card: Card) -> tuple[bool, bool, bool]:
    """Whether the name of the file, the folder that holds the repository, and the folder in it speak for a card."""
    locations = [(card.repository, file) for file in card.files] + list(card.also)
    return max((_speaks(path, card, *location) for location in locations), default=SILENCE)


def _speaks(path: Path, card: Card, repository: str, file: str) -> tuple[bool, bool, bool]:
    wanted = PurePosixPath(file.lower())
    folders = [part.lower() for part in path.parts[:-1]]
    inner = list(wanted.parts[:-1])
    lies_so = not inner or folders[-len(inner) :] == inner
    other = folders[-1:] != inner[-1:] and folders[-1] in _folders_of(card.repository)
    if not fnmatch.fnmatch(path.name.lower(), wanted.name) or other:
        return SILENCE
    above = folders[: len(folders) - len(inner)] if lies_so else folders
    telling = not TELLS_NOTHING.fullmatch(wanted.name)
    home = _is_home(above, card, repository.lower())
    inside = lies_so and bool(inner) and inner[-1] not in COMMON
    return (telling, home, inside) if telling or home or inside else SILENCE


def _folders_of(repository: str) -> set[str]:
    """The folders that tell the checkpoints of a repository apart."""
    files = [
        file for card in cards().values() if card.repository == repository for file in card.files
    ]
    return {PurePosixPath(file.lower()).parent.name for file in files} - set(COMMON)


def _is_home(folders: Sequence[str], card: Card, repository: str) -> bool:
    """Whether the last folder is a repository's: a clone, a download of ours, or the hub's cache."""
    if folders[-2:-1] == [SNAPSHOTS]:
        return folders[-3] == "models--" + repository.replace("/", "--")
    return folders[-1] in (card.name, repository.rpartition("/")[2])


# By what the files hold


@dataclass(frozen=True)
class Wish:
    """What the user says of the sources; `settled`: their settings come from a config of the user's."""

    card: str | None = None
    network: str | None = None
    kind: str | None = None
    settled: bool = False


def recognise(inputs: Inputs, wish: Wish, notes: list[str]) -> Recognised:
    """What the transformer among `inputs` is and which entry of its file to take; `notes` get what was concluded.

    Raises `InputError` where the user's wish contradicts the file, or where the file holds several networks and
    nothing says which of them is meant.
    """
    wished = None if wish.card is None else find(wish.card)
    transformers = {group.origin: contents.transformers(group) for group in inputs.groups}
    groups = [group for group in inputs.groups if transformers[group.origin]]
    groups = [group for group in groups if group.named] or groups
    if not groups or wish.kind not in (None, "dit"):
        return _without_file(inputs, wished, wish)
    name = " and ".join(group.origin for group in groups)
    entries = tuple(dict.fromkeys(each for group in groups for each in transformers[group.origin]))
    # several files with a transformer are shards, or refused later as one network given twice
    possible = by_path(inputs.files[name]) if len(groups) == 1 else ()
    if wished is not None:
        require(
            not possible or wished in possible,
            f"--card {wished.name} contradicts {name}, which by its name is {_names(possible)}; leave --card out, or "
            "rename the file if it is another.",
        )
        notes.append(f"{name} is taken as card {wished.name}, as --card says")
        return Recognised(wished, _entry(wished, name, entries, wish, notes), name)
    known = _fitting(possible, entries)
    if len(known) == 1:
        notes.append(
            f"{name} is taken as card {known[0].name} by its name{_decided(possible, known[0])}; "
            "--card NAME says otherwise"
        )
        return Recognised(known[0], _entry(known[0], name, entries, wish, notes), name)
    return Recognised(None, _without_card(known, name, entries, wish, notes), name)


def _without_file(inputs: Inputs, wished: Card | None, wish: Wish) -> Recognised:
    """What is known where the transformer comes from a model folder, or where there is none."""
    having = [model for model in inputs.folders if "dit" in model.parts]
    if wished is None:
        return Recognised(None, wish.network)
    require(
        bool(having) and wish.kind in (None, "dit"),
        f"--card {wished.name} is a transformer and the sources hold none; give "
        f"{' or '.join(wished.files) or 'its checkpoint'} too.",
    )
    earlier = having[0].experiment.card
    require(
        earlier in ("", wished.name),
        f"--card {wished.name} contradicts {having[0].folder}, which was made of card {earlier}; leave --card out.",
    )
    return Recognised(wished, wish.network, having[0].folder.name)


def _names(possible: Sequence[Card]) -> str:
    return ", ".join(card.name for card in possible)


def _fitting(possible: Sequence[Card], entries: Sequence[str]) -> Sequence[Card]:
    """Of several cards that a file may be by its name, those whose network it holds, if it holds any."""
    fitting = [card for card in possible if card.network in entries]
    return possible if len(possible) == 1 else fitting or possible


def _decided(possible: Sequence[Card], card: Card) -> str:
    """What decided between cards of the same name."""
    others = [each for each in possible if each is not card]
    return f" and its network {card.network} (not {_names(others)})" if others else ""


def _entry(
    card: Card, name: str, entries: Sequence[str], wish: Wish, notes: list[str]
) -> str | None:
    """The entry of a file to take: as the user says, else the card's; None where there is only one without a name."""
    named = [each for each in entries if each]
    has = f"{name} holds {', '.join(named)}"
    wanted = f"network {card.network}" if card.network else "one network without a name"
    if wish.network is not None:
        if wish.network != card.network:
            notes.append(
                f"network {wish.network} is taken, as --network says; the authors of {card.name} sample {wanted}"
            )
        return wish.network
    if card.network in entries:
        if named:
            why = f", which the authors of {card.name} sample with"
            notes.append(_taken(card.network, named, why))
        return card.network or None
    if not named:
        notes.append(
            f"{name} holds one network without a name, which is taken for the {card.network} of {card.name}"
        )
        return None
    require(
        wish.card is None,
        f"--card {card.name} contradicts {name}: the card is {wanted}, and {has}; give another --card, or "
        f"--network {_preferred(named)} to take that one.",
    )
    require(
        _both(entries) is None,
        f"{has}, and card {card.name}, which it is by its name, is {wanted}; give --card NAME or --network NAME.",
    )
    notes.append(
        _taken(_preferred(named), named, f"; {name} holds no {wanted} as {card.name} does")
    )
    return _preferred(named)


def _taken(network: str, named: Sequence[str], why: str) -> str:
    left = [each for each in named if each != network]
    return f"network {network} is taken{why}" + (f"; left out: {', '.join(left)}" if left else "")


def _preferred(named: Sequence[str]) -> str:
    return next((each for each in names.SAMPLED if each in named), named[0])


def _both(entries: Sequence[str]) -> tuple[str, str] | None:
    """(the raw network, its average over the training) if a file holds both of one."""
    pairs = ((raw, each) for each in entries if (raw := names.raw_of(each)) is not None)
    return next((pair for pair in pairs if pair[0] in entries), None)


def _without_card(
    possible: Sequence[Card], name: str, entries: Sequence[str], wish: Wish, notes: list[str]
) -> str | None:
    """The entry of a file to take that has no certain card; refused where the choice would be a guess."""
    named = [each for each in entries if each]
    require(
        not possible or wish.settled,
        f"{name} may be {_names(possible)} by its name, which are sampled differently; give --card NAME.",
    )
    if wish.network is not None:
        notes.append(_taken(wish.network, named, ", as --network says"))
        return wish.network
    both = _both(entries)
    bare = both is not None and not both[0]
    held = " and ".join(each or "a network without a name" for each in both or ())
    require(
        both is None,
        f"{name} holds both {held}, and its name does not say which one its authors sample with; "
        "give --card NAME (`packforcing download --list` has them) or --network NAME"
        + (f" (model for the one without a name, or {both[1] if both else ''})." if bare else "."),
    )
    sampled = [each for each in named if each in contents.PREFERRED]
    if "" in entries and not sampled:
        if named:
            notes.append(f"the network without a name is taken; left out: {', '.join(named)}")
        return None
    if len(sampled) == 1 or len(named) == 1:
        network = (sampled or named)[0]
        notes.append(_taken(network, named, ""))
        return network
    return None


# By sizes


def check_sizes(recognised: Recognised, dit: ModelConfig, notes: list[str]) -> None:
    """Raises `InputError` if a transformer is as wide as a released one and is not that of its card.

    Other widths are networks of one's own in the form of a card's; that is noted.
    """
    card = recognised.card
    if card is None or recognised.file is None:
        return
    wanted = card.experiment.dit
    if (dit.dim, dit.layers) == (wanted.dim, wanted.layers):
        return
    sizes = (
        f"{recognised.file} is {dit.dim} wide with {dit.layers} layers, "
        f"card {card.name} {wanted.dim} with {wanted.layers}"
    )
    require(
        dit.dim not in {each.experiment.dit.dim for each in cards().values()},
        f"{sizes}; give the --card that it is, or --config FILE.",
    )
    notes.append(f"{sizes}: the sizes are the file's, all else is the card's")
