"""What Causal-Forcing's training starts from: causal consistency distillation, blocks of 3 latent frames."""

from packforcing_jax.config import HALF, CacheConfig, Experiment, SampleConfig
from packforcing_jax.config.cards import Card

experiment = Experiment(
    name="causal_forcing_cd",
    cache=CacheConfig(
        block=3, sink=0, recent=18, top=0, capacity=0, rope_adjustment="none", max_position=21
    ),
    sample=SampleConfig(steps=(1000, 750, 500, 250), shift=5.0),
    dtypes=HALF,
    latent=(60, 104),
    fps=16,
    clip=21,
    method="causal-forcing",
    card="causal-forcing-cd",
)

# `framewise/` has a file of the same name with blocks of 1; it is another checkpoint without a card.
card = Card(
    experiment,
    what="Causal-Forcing: causal consistency distillation, blocks of 3 frames; not for sampling",
    repository="zhuhz22/Causal-Forcing",
    licence="apache-2.0",
    files=("chunkwise/causal_cd.pt",),
    network="generator",
    samples="it is an initialisation that training starts from; convert causal-forcing-chunkwise to sample",
    unconfirmed=("its network generator",),
)
