"""PackForcing as AshadowZ reproduced it: convolutions alone compress, and every pass of every layer chooses anew.

A block leaves the two recent ones for an archive of 16, first in, first out, and the best 16 of these are attended: all
of them, unless `cache.top` is smaller (its README shows 16 and 1). A block's score is the mean product of one current
query in eight, at least 32, with its keys, in the first half of the heads, at their true positions. Sink and packed
blocks stand before the recent ones without a hole. `cache.registry="shared"` is the code as released, whose commits see
another list of blocks in all layers but the first.

Its packed blocks are the model's: those of a checkpoint of its own come from its own compressor
(`config.networks.UNOFFICIAL_COMPRESSOR`).
"""

from packforcing_jax.methods.method import Method

PACKFORCING_UNOFFICIAL = Method(
    "packforcing-unofficial",
    "AshadowZ/PackForcing-Unofficial 3f4302e",
    sink=9,
    window=18,
    settings={
        "top": 16,
        "capacity": 16,
        "selection": "query_score",
        "timing": "every",
        "min_queries": 32,
        "recent_queries": False,
    },
)
