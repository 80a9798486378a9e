"""Self-Forcing trained with SiD: as with DMD, blocks of 3 latent frames in four steps, a window of 21."""

from packforcing_jax.config import HALF, CacheConfig, Experiment, SampleConfig
from packforcing_jax.config.cards import Card

experiment = Experiment(
    name="self_forcing_sid",
    cache=CacheConfig(
        block=3, sink=0, recent=18, top=0, capacity=0, rope_adjustment="none", max_position=21
    ),
    sample=SampleConfig(steps=(1000, 750, 500, 250), shift=5.0),
    dtypes=HALF,
    latent=(60, 104),
    fps=16,
    clip=21,
    method="self-forcing",
    card="self-forcing-sid",
)

card = Card(
    experiment,
    what="Self-Forcing (SiD): causal 1.3B in four steps, blocks of 3 frames",
    repository="gdhe17/Self-Forcing",
    licence="cc-by-nc-sa-4.0",  # says its model card; the code is Apache-2.0
    size=5.68e9,
    files=("checkpoints/self_forcing_sid.pt",),
    network="generator_ema",
)
