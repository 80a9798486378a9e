"""Causal-Forcing++ frame by frame in two steps; the first generated frame takes four."""

from packforcing_jax.config import HALF, CacheConfig, Experiment, SampleConfig
from packforcing_jax.config.cards import Card

experiment = Experiment(
    name="causal_forcing_2step",
    cache=CacheConfig(
        block=1, sink=0, recent=20, top=0, capacity=0, rope_adjustment="none", max_position=21
    ),
    sample=SampleConfig(steps=(1000, 500), first_steps=(1000, 750, 500, 250), shift=5.0),
    dtypes=HALF,
    latent=(60, 104),
    fps=16,
    clip=21,
    method="causal-forcing",
    card="causal-forcing-2step",
)

# The first list holds for the first *generated* block, also behind a conditioning image.
card = Card(
    experiment,
    what="Causal-Forcing++: causal 1.3B in two steps, frame by frame",
    repository="zhuhz22/Causal-Forcing",
    licence="apache-2.0",
    files=("causal-forcing++/framewise-2step.pt",),
    network="generator_ema",
)
