"""Rolling Forcing (arXiv 2509.25161): blocks denoised together in a rolling window, each cleaner than the one behind.

A window of one block for each denoising step takes all of them a step further and finishes the first, which is then
committed. It sees the sink, moved to stand before the recent frames (sec. 3.2), and as many recent frames as make the
whole 21: 3 with five steps, 6 with the four of Causal-Forcing's long model, more while the window runs empty at the
end of a video. While it fills up at the beginning it sees nothing but itself. A commit sees the newest 21 frames at
their true numbers.
"""

from packforcing_jax.methods.method import Method

ROLLING_FORCING = Method(
    "rolling-forcing",
    "arXiv 2509.25161; TencentARC/RollingForcing a1477d0",
    sink=3,
    window=21,
    settings={"rope_adjustment": "sink_only"},
    joint=True,
)
