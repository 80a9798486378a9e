"""Infinite-Forcing: a sink of 1 and a window of 6 latent frames in all, positions counted in the window."""

from packforcing_jax.config import HALF, CacheConfig, Experiment, SampleConfig
from packforcing_jax.config.cards import Card

experiment = Experiment(
    name="infinite_forcing",
    cache=CacheConfig(
        block=3, sink=1, recent=2, top=0, capacity=0, rope_adjustment="sink", max_position=21
    ),
    sample=SampleConfig(steps=(1000, 750, 500, 250), shift=5.0),
    dtypes=HALF,
    latent=(60, 104),
    fps=16,
    clip=21,
    method="infinite-forcing",
    card="infinite-forcing",
)

# The README's command has --use_ema but names no file, and the loader falls back to `generator`.
card = Card(
    experiment,
    what="Infinite-Forcing: causal 1.3B for long videos, a sink of one frame",
    repository="SOTAMak1r/Infinite-Forcing",
    files=("*.pt",),
    also=(("johnrobinsn/Infinite-Forcing", "ema_model.pt"),),
    network="generator_ema",
    licence="apache-2.0",
    unsettled="that is its code's; the model card of the weights was not read, so read it",
    unconfirmed=("its network generator_ema", "the name of its file"),
)
