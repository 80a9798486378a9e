"""Reward Forcing: a sink of 3, into which what leaves is averaged, and a window of 9 latent frames in all."""

from packforcing_jax.config import HALF, CacheConfig, Experiment, SampleConfig
from packforcing_jax.config.cards import Card

experiment = Experiment(
    name="reward_forcing",
    cache=CacheConfig(
        block=3, sink=3, recent=3, top=0, capacity=0, rope_adjustment="sink", max_position=21
    ),
    sample=SampleConfig(steps=(1000, 750, 500, 250), shift=5.0),
    dtypes=HALF,
    latent=(60, 104),
    fps=16,
    clip=21,
    method="reward-forcing",
    card="reward-forcing",
)

# The README's command samples `rewardforcing.pt` with --use_ema; no file was opened.
card = Card(
    experiment,
    what="Reward Forcing: causal 1.3B for long videos, a sink that averages",
    repository="JaydenLu666/Reward-Forcing-T2V-1.3B",
    files=("rewardforcing.pt",),
    also=(("JaydenLyh/Reward-Forcing", "rewardforcing.pt"),),
    network="generator_ema",
    licence=None,
    unsettled="its code is apache-2.0, of the weights nothing is recorded here; read the model card",
    unconfirmed=("its network generator_ema",),
)
