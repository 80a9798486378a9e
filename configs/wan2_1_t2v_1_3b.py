"""Wan2.1 T2V-1.3B as published: bidirectional, 50 steps of UniPC over all frames of a clip."""

from packforcing_jax.config import (
    HALF,
    PROFILES,
    WAN_NEGATIVE_PROMPT,
    Experiment,
    SampleConfig,
    evenly_spaced,
)
from packforcing_jax.config.cards import Card

experiment = Experiment(
    name="wan2_1_t2v_1_3b",
    cache=PROFILES["published"],
    sample=SampleConfig(
        steps=evenly_spaced(50), shift=5.0, guidance=5.0, negative_prompt=WAN_NEGATIVE_PROMPT
    ),
    dtypes=HALF,
    latent=(60, 104),
    fps=16,
    clip=21,
    method="bidirectional",
    card="wan2.1-t2v-1.3b",
)

# Its authors guide with 5 to 6, and shift by 3 to 5 at 480p.
card = Card(
    experiment,
    what="Wan2.1 1.3B as published: all parts, bidirectional",
    repository="Wan-AI/Wan2.1-T2V-1.3B",
    files=("config.json", "diffusion_pytorch_model.safetensors"),
    also=(("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "transformer/diffusion_pytorch_model*"),),
    network="",
    licence="apache-2.0",
    size=5.68e9,
    samples="it is bidirectional and denoises all frames of a clip together, as method bidirectional does; for "
    "longer videos convert a causal checkpoint such as self-forcing-dmd",
)
