"""Causal-Forcing in blocks of 3 latent frames, four steps, made for 21 frames."""

from packforcing_jax.config import HALF, CacheConfig, Experiment, SampleConfig
from packforcing_jax.config.cards import Card

experiment = Experiment(
    name="causal_forcing_chunkwise",
    cache=CacheConfig(
        block=3, sink=0, recent=18, top=0, capacity=0, rope_adjustment="none", max_position=21
    ),
    sample=SampleConfig(steps=(1000, 750, 500, 250), shift=5.0),
    dtypes=HALF,
    latent=(60, 104),
    fps=16,
    clip=21,
    method="causal-forcing",
    card="causal-forcing-chunkwise",
)

# The authors sample the raw network: their config says `use_ema: false` and their command has no --use_ema
# (threads Rolling-Sink 3 and DummyForcing 2), although the file may hold an average too.
card = Card(
    experiment,
    what="Causal-Forcing: causal 1.3B in four steps, blocks of 3 frames",
    repository="zhuhz22/Causal-Forcing",
    licence="apache-2.0",
    files=("chunkwise/causal_forcing.pt",),
    network="generator",
)
