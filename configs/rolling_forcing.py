"""Rolling Forcing: a window of 5 blocks at falling noise, sink 3, recent 3 latent frames."""

from packforcing_jax.config import HALF, CacheConfig, Experiment, SampleConfig
from packforcing_jax.config.cards import Card

experiment = Experiment(
    name="rolling_forcing",
    cache=CacheConfig(
        block=3,
        sink=3,
        recent=3,
        top=0,
        capacity=0,
        window=15,
        rope_adjustment="sink_only",
        max_position=21,
    ),
    sample=SampleConfig(steps=(1000, 800, 600, 400, 200), shift=5.0),
    dtypes=HALF,
    latent=(60, 104),
    fps=16,
    clip=21,
    method="rolling-forcing",
    card="rolling-forcing",
)

card = Card(
    experiment,
    what="Rolling Forcing: causal 1.3B that denoises a rolling window of 5 blocks of 3 frames",
    repository="TencentARC/RollingForcing",
    files=("checkpoints/rolling_forcing_dmd.pt",),
    network="generator_ema",
    licence="academic use only",
    unsettled="its repository says academic use only, a stored copy of its model card mit: take it that "
    "other use is not allowed",
)
