"""CausVid in three steps that are timesteps as they stand: 21 latent frames, then a restart with 3 of them."""

from packforcing_jax.config import HALF, CacheConfig, Experiment, SampleConfig
from packforcing_jax.config.cards import Card

experiment = Experiment(
    name="causvid_3step",
    cache=CacheConfig(
        block=3,
        sink=0,
        recent=18,
        top=0,
        capacity=0,
        overlap=3,
        rope_adjustment="none",
        max_position=21,
    ),
    sample=SampleConfig(steps=(1000, 757, 522), shift=8.0, warp=False),
    dtypes=HALF,
    latent=(60, 104),
    fps=16,
    clip=21,
    method="causvid",
    card="causvid-3step",
)

# 757 and 522 lie on the grid of 50 steps at shift 8, so warping them would shift twice.
card = Card(
    experiment,
    what="CausVid: causal 1.3B in three steps, blocks of 3 frames",
    repository="tianweiy/CausVid",
    network="generator",
    licence="cc-by-nc-sa-4.0",  # of the code; a stored copy of the model card says cc-by-nc-4.0
    files=("autoregressive_checkpoint/model.pt",),
)
