"""Infinite-Forcing: one sink frame and a short window, at their index in the cache.

Frames are evicted, not blocks: the sink need not fill one.
"""

from packforcing_jax.methods.method import Method

INFINITE_FORCING = Method(
    "infinite-forcing",
    "SOTAMak1r/Infinite-Forcing b8feaf5",
    sink=1,
    window=6,
    settings={"rope_adjustment": "sink"},
)
