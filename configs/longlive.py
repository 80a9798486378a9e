"""LongLive: base and LoRA, a sink of 3 and a window of 12 latent frames in all, re-cached when the prompt switches."""

from packforcing_jax.config import HALF, CacheConfig, Experiment, SampleConfig
from packforcing_jax.config.cards import Card, Lora

experiment = Experiment(
    name="longlive",
    cache=CacheConfig(
        block=3, sink=3, recent=6, top=0, capacity=0, rope_adjustment="none", max_position=21
    ),
    sample=SampleConfig(steps=(1000, 750, 500, 250), shift=5.0),
    dtypes=HALF,
    latent=(60, 104),
    fps=16,
    clip=21,
    method="longlive",
    card="longlive",
)

# The authors' config says `use_ema: false` and merges the LoRA (rank 256, alpha 256) into every linear layer.
card = Card(
    experiment,
    what="LongLive: causal 1.3B for long videos with prompts that switch, with its LoRA",
    repository="Efficient-Large-Model/LongLive-1.3B",
    files=("models/longlive_base.pt",),
    lora=Lora("models/lora.pt", rank=256, alpha=256.0),
    network="generator",
    licence=None,
    unsettled="its README says apache-2.0 since 2025-11, a stored copy of its model card cc-by-nc-sa-4.0",
)
