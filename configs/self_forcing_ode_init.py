"""What Self-Forcing's training starts from: causal attention learnt from trajectories of the teacher."""

from packforcing_jax.config import HALF, CacheConfig, Experiment, SampleConfig
from packforcing_jax.config.cards import Card

experiment = Experiment(
    name="self_forcing_ode_init",
    cache=CacheConfig(
        block=3, sink=0, recent=18, top=0, capacity=0, rope_adjustment="none", max_position=21
    ),
    sample=SampleConfig(steps=(1000, 750, 500, 250), shift=5.0),
    dtypes=HALF,
    latent=(60, 104),
    fps=16,
    clip=21,
    method="self-forcing",
    card="self-forcing-ode-init",
)

# `generator` is what the authors' trainer loads; their samples come from what it trains.
card = Card(
    experiment,
    what="Self-Forcing: what its training starts from, blocks of 3 frames; not for sampling",
    repository="gdhe17/Self-Forcing",
    licence="cc-by-nc-sa-4.0",  # says its model card; the code is Apache-2.0
    size=5.68e9,
    files=("checkpoints/ode_init.pt",),
    network="generator",
    samples="it is an initialisation that training starts from; convert self-forcing-dmd to sample",
)
