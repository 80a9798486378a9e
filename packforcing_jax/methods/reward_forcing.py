"""Reward Forcing: frames that leave the window are averaged into the sink.

Keys stand at their index in the cache. Before a block is made, the frames that
leave for it, as many as the sink has, are mixed into the sink's keys (without positions) and values:
sink <- alpha sink + (1 - alpha) frame, alpha = `sink_average`.
"""

from packforcing_jax.methods.method import Method

REWARD_FORCING = Method(
    "reward-forcing",
    "JaydenLyh/Reward-Forcing 4317f5a",
    sink=3,
    window=9,
    settings={"rope_adjustment": "sink", "sink_average": 0.999},
)
