"""How a store of fixed size forgets: the slot that each item is written to, and the item that lies in each slot.

The only home of ring arithmetic. Items are counted 0, 1, 2, ... in the order in which they are written: latent frames
in the ring of recent frames, packed blocks in the archive.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from packforcing_jax.errors import require

HISTORY = 4  # a rule is checked over so many times the size of its store


@dataclass(frozen=True)
class Eviction:
    """A rule by which a store forgets.

    `slot_of(item, size)`: the slot of a store of `size` that an item is written to, negative where it is not kept.
    `ids_in(written, size)`: the item in each slot [size] once items 0..written-1 went in, negative where none is.
    Both are arithmetic on integers that jax may trace; a slot holds the item that was written to it last.
    """

    name: str
    slot_of: Callable[[Any, int], Any]
    ids_in: Callable[[Any, int], Any]


def _oldest_slot(item: Any, size: int) -> Any:
    return item % max(size, 1)


def _newest_ids(written: Any, size: int) -> Any:
    following = written % max(
        size, 1
    )  # the slot that is written next; behind it lie items of the round before
    slots = np.arange(size)
    return written - following + slots - size * (slots >= following)


FIFO = Eviction("fifo", slot_of=_oldest_slot, ids_in=_newest_ids)  # the oldest goes first
EVICTIONS = {FIFO.name: FIFO}


def check(rule: Eviction, size: int) -> None:
    """Raises `InputError` unless the two halves of `rule` agree, item by item, for a store of `size`."""
    in_slots = np.full(size, -1)
    for item in range(HISTORY * size):
        slot = int(rule.slot_of(item, size))
        require(
            slot < size,
            f"cache.eviction={rule.name!r} writes item {item} to slot {slot} of {size}; correct it.",
        )
        if slot >= 0:
            in_slots[slot] = item
        said = np.maximum(np.asarray(rule.ids_in(item + 1, size)), -1)
        require(
            said.shape == in_slots.shape and bool((said == in_slots).all()),
            f"cache.eviction={rule.name!r}: after {item + 1} items ids_in says {said.tolist()}, but slot_of wrote "
            f"{in_slots.tolist()}; make them agree.",
        )
