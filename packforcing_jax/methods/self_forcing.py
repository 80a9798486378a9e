"""Self-Forcing (arXiv 2506.08009): the newest frames, at their true numbers.

`SELF_FORCING_SHORT` is its plain cache: one clip of the trained length, every block behind all earlier ones, and no
block beyond it. Causal-Forcing (arXiv 2602.02214) samples by the same code; a step list of its own for the first
generated block is `sample.first_steps`.
"""

import dataclasses

from packforcing_jax.methods.method import Method

SELF_FORCING = Method(
    "self-forcing",
    "arXiv 2506.08009; guandeh17/Self-Forcing 33593df",
    window=21,
    settings={"rope_adjustment": "none"},
)
SELF_FORCING_SHORT = dataclasses.replace(SELF_FORCING, name="self-forcing-short", one_clip=True)
CAUSAL_FORCING = dataclasses.replace(
    SELF_FORCING,
    name="causal-forcing",
    source="arXiv 2602.02214; thu-ml/Causal-Forcing 1fc7bbc",
)
