"""One-Forcing: frame by frame in one step."""

from packforcing_jax.config import HALF, CacheConfig, Experiment, SampleConfig
from packforcing_jax.config.cards import Card

experiment = Experiment(
    name="one_forcing",
    cache=CacheConfig(
        block=1, sink=0, recent=20, top=0, capacity=0, rope_adjustment="none", max_position=21
    ),
    sample=SampleConfig(steps=(1000,), shift=5.0),
    dtypes=HALF,
    latent=(60, 104),
    fps=16,
    clip=21,
    method="causal-forcing",
    card="one-forcing",
)

# Trained with one step everywhere (config.yaml). The README's command has no --use_ema, and its script
# scripts/infer.sh gives the first frame four steps: --set sample.first_steps=(1000,750,500,250).
card = Card(
    experiment,
    what="One-Forcing: causal 1.3B in one step, frame by frame",
    repository="JiaqiFeng/OneForcing",
    files=("checkpoints/one_forcing.pt",),
    network="generator",
    licence=None,
    unsettled="its code is apache-2.0, of the weights nothing is recorded here; read the model card",
    unconfirmed=(
        "its network generator",
        "its context of 21 frames",
        "the steps of the first frame (its authors' script takes 1000 750 500 250)",
    ),
)
