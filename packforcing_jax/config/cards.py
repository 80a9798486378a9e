"""Published checkpoints: where each lies, which network its authors sample with, and the settings it was made for."""

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass

from packforcing_jax import configs
from packforcing_jax.config import loading
from packforcing_jax.config.experiment import Experiment
from packforcing_jax.errors import nearest, require


@dataclass(frozen=True)
class Lora:
    """The LoRA that belongs to a checkpoint; `alpha` holds where its own file names none."""

    file: str
    rank: int
    alpha: float

    @property
    def scale(self) -> float:
        """What its product is multiplied with."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Card:
    """A published checkpoint: the module-level `card` of a file in `configs/`, beside the `experiment` it was made for.

    `files` are the transformer's in `repository` (`*`: any letters), none if no file is published. `network` is the
    entry of the file that the authors' own commands sample with, "" where the file is the state dict itself.
    """

    experiment: Experiment
    what: str
    repository: str
    files: tuple[str, ...]
    network: str
    licence: str | None  # of the weights; None: not recorded here
    unsettled: str = ""  # why whoever uses the weights has to read the licence
    size: float | None = None  # about how many bytes `files` have; None: not recorded
    lora: Lora | None = None
    also: tuple[tuple[str, str], ...] = ()  # (repository, file) of the same weights elsewhere
    samples: str = ""  # why it cannot be sampled block by block
    unconfirmed: tuple[str, ...] = ()  # what is assumed of it

    @property
    def name(self) -> str:
        return self.experiment.card

    @property
    def method(self) -> str:
        """By which the past is stored and attended to."""
        return self.experiment.method


@functools.cache
def cards() -> Mapping[str, Card]:
    """Every card in `configs/` by its name."""
    modules = [importlib.import_module(f"{configs.__name__}.{name}") for name in loading.names()]
    published = [
        card for module in modules if isinstance(card := getattr(module, "card", None), Card)
    ]
    return {card.name: card for card in published}


def find(name: str) -> Card:
    """The card of that name; `InputError` names the nearest one."""
    require(name in cards(), f"no card {name!r}; {nearest(name, cards())}")
    return cards()[name]


def require_samples(name: str) -> None:
    """Raises `InputError` with the reason if the checkpoint of a card cannot be sampled block by block.

    Nothing is known of weights without a card, or with one of another version.
    """
    reason = cards()[name].samples if name in cards() else ""
    require(not reason, f"card {name} cannot be sampled block by block: {reason}.")
