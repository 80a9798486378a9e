"""A score of one's own: packed blocks are chosen by the best agreement of any query with any of their keys.

packforcing sample --config examples/own_score.py --blocks 40 --trace out/own.trace.jsonl
packforcing inspect out/own.trace.jsonl --config examples/own_score.py
packforcing plan --config examples/own_score.py
"""

import dataclasses

import jax.numpy as jnp
from packforcing_jax.configs.stage import experiment as stage

from packforcing_jax.policies.selection import Score, logits, packed_keys


def best_agreement(inputs):
    """The largest logit of any pooled query with any key of the block: [b, n, q, slot, p] -> [b, slot]."""
    return logits(inputs).max(axis=(1, 2, 4))


score = Score("best_agreement", best_agreement, across_heads=jnp.max, reads=packed_keys)
experiment = dataclasses.replace(
    stage, name="own_score", cache=dataclasses.replace(stage.cache, selection=score)
)
