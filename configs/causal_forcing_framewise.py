"""Causal-Forcing frame by frame, four steps, made for 21 frames."""

from packforcing_jax.config import HALF, CacheConfig, Experiment, SampleConfig
from packforcing_jax.config.cards import Card

experiment = Experiment(
    name="causal_forcing_framewise",
    cache=CacheConfig(
        block=1, sink=0, recent=20, top=0, capacity=0, rope_adjustment="none", max_position=21
    ),
    sample=SampleConfig(steps=(1000, 750, 500, 250), shift=5.0),
    dtypes=HALF,
    latent=(60, 104),
    fps=16,
    clip=21,
    method="causal-forcing",
    card="causal-forcing-framewise",
)

# The authors' command for this file has --use_ema, unlike that of the chunk-wise one.
card = Card(
    experiment,
    what="Causal-Forcing: causal 1.3B in four steps, frame by frame",
    repository="zhuhz22/Causal-Forcing",
    licence="apache-2.0",
    files=("framewise/causal_forcing.pt",),
    network="generator_ema",
)
