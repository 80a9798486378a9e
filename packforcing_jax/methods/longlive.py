"""LongLive (arXiv 2509.22622): a sink and a short window, whose keys are computed again at a new prompt.

Keys stand at true frame numbers; LongLive-Infinity puts them at their index in the cache instead, so that no position
grows. At a prompt switch the frames of the cache are read again under the new text, without a mask. Once more frames
exist than the window holds, the sink keeps its old keys (`global_sink`, as released); with `keeps_sink=False` the
oldest frames of the window become the sink.
"""

import dataclasses

from packforcing_jax.methods.method import Method

LONGLIVE = Method(
    "longlive",
    "arXiv 2509.22622; NVlabs/LongLive v1.0 e52d9ef",
    sink=3,
    window=12,
    settings={"rope_adjustment": "none"},
    at_prompt_change="recache",
)
LONGLIVE_INFINITY = dataclasses.replace(
    LONGLIVE, name="longlive-infinity", settings={"rope_adjustment": "sink"}
)
