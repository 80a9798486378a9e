"""Self-Forcing trained with DMD: blocks of 3 latent frames in four steps, a rolling window of 21 frames."""

from packforcing_jax.config import HALF, CacheConfig, Experiment, SampleConfig
from packforcing_jax.config.cards import Card

experiment = Experiment(
    name="self_forcing_dmd",
    cache=CacheConfig(
        block=3, sink=0, recent=18, top=0, capacity=0, rope_adjustment="none", max_position=21
    ),
    sample=SampleConfig(steps=(1000, 750, 500, 250), shift=5.0),
    dtypes=HALF,
    latent=(60, 104),
    fps=16,
    clip=21,
    method="self-forcing",
    card="self-forcing-dmd",
)

# The authors' command for this file has --use_ema. Whether `generator` lies beside it is unchecked.
card = Card(
    experiment,
    what="Self-Forcing (DMD): causal 1.3B in four steps, blocks of 3 frames",
    repository="gdhe17/Self-Forcing",
    licence="cc-by-nc-sa-4.0",  # says its model card; the code is Apache-2.0
    size=5.68e9,
    files=("checkpoints/self_forcing_dmd.pt",),
    network="generator_ema",
    also=(
        ("wlsaidhi/SFWan2.1-T2V-1.3B-Diffusers", "transformer/diffusion_pytorch_model*"),
        ("gueraf/Self-Forcing-diffusers", "transformer/diffusion_pytorch_model*"),
    ),
)
