"""An eviction rule of one's own: the archive keeps its first blocks for good, the rest of it is a ring.

packforcing sample --config examples/own_eviction.py --blocks 40 --trace out/own.trace.jsonl
packforcing inspect out/own.trace.jsonl --config examples/own_eviction.py
packforcing plan --config examples/own_eviction.py
"""

import dataclasses

import jax.numpy as jnp
from packforcing_jax.configs.stage import experiment as stage

from packforcing_jax.policies.eviction import FIFO, Eviction

KEPT = 4  # blocks that are never forgotten


def slot_of(item, size):
    """The first blocks go to the first slots, the others round the rest."""
    return jnp.where(item < KEPT, item, KEPT + FIFO.slot_of(item - KEPT, size - KEPT))


def ids_in(written, size):
    """What lies where once so many blocks were written; negative where nothing does."""
    first = jnp.where(jnp.arange(KEPT) < written, jnp.arange(KEPT), -1)
    ring = FIFO.ids_in(written - KEPT, size - KEPT)
    return jnp.concatenate([first, jnp.where(ring >= 0, ring + KEPT, -1)])


rule = Eviction("keep_first", slot_of=slot_of, ids_in=ids_in)
memory = dataclasses.replace(stage.cache, top=4, capacity=8, eviction=rule)
experiment = dataclasses.replace(stage, name="own_eviction", cache=memory)
