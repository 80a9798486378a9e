"""Deep Forcing (arXiv 2512.05081): a long sink, and between it and recent frames the tokens that queries take part in.

A window that the next block would take beyond 21 frames is compressed to a budget of 16: ten of the sink, the newest
four whole, the current block among them, and the best of all tokens between them, two frames' worth, each layer for
itself. What was chosen may be chosen again, seven times in all. The sink is moved along with the blocks, chosen tokens
stay where they were. `DEEP_SINK` is the sink alone, without a choice: what leaves the window is forgotten.
"""

import dataclasses

from packforcing_jax.methods.method import Method

DEEP_FORCING = Method(
    "deep-forcing",
    "arXiv 2512.05081; AshadowZ/PackForcing-Unofficial 3f4302e",
    sink=10,
    window=21,
    settings={
        "rope_adjustment": "sink_only",
        "budget": 16,
        "budget_recent": 4,
        "reuse_limit": 7,
    },
)
DEEP_SINK = dataclasses.replace(
    DEEP_FORCING,
    name="deep-sink",
    settings={"rope_adjustment": "sink_only", "budget": 21, "budget_recent": 11},
)
