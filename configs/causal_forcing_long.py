"""Causal-Forcing for minutes: a window of 4 blocks at falling noise, as Rolling Forcing, sink 3, recent 6."""

from packforcing_jax.config import HALF, CacheConfig, Experiment, SampleConfig
from packforcing_jax.config.cards import Card

experiment = Experiment(
    name="causal_forcing_long",
    cache=CacheConfig(
        block=3,
        sink=3,
        recent=6,
        top=0,
        capacity=0,
        window=12,
        rope_adjustment="sink_only",
        max_position=21,
    ),
    sample=SampleConfig(steps=(1000, 750, 500, 250), shift=5.0),
    dtypes=HALF,
    latent=(60, 104),
    fps=16,
    clip=21,
    method="rolling-forcing",
    card="causal-forcing-long",
)

card = Card(
    experiment,
    what="Causal-Forcing for minutes: a rolling window of 4 blocks of 3 frames",
    repository="zhuhz22/Causal-Forcing",
    licence="apache-2.0",
    files=("chunkwise/longvideo.pt",),
    network="generator_ema",
    also=(
        (
            "frankleeeee/CausalForcing-Long-Wan2.1-T2V-1.3B-Diffusers",
            "transformer/diffusion_pytorch_model*",
        ),
    ),
)
