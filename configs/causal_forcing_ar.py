"""What Causal-Forcing's training starts from: autoregressive diffusion in many steps, blocks of 3 latent frames."""

import dataclasses

from packforcing_jax.configs.causal_forcing_chunkwise import experiment as chunkwise

from packforcing_jax.config.cards import Card

experiment = dataclasses.replace(chunkwise, name="causal_forcing_ar", card="causal-forcing-ar")

# `framewise/` has a file of the same name with blocks of 1; it is another checkpoint without a card.
card = Card(
    experiment,
    what="Causal-Forcing: autoregressive diffusion in many steps, blocks of 3 frames; not for sampling",
    repository="zhuhz22/Causal-Forcing",
    licence="apache-2.0",
    files=("chunkwise/ar_diffusion.pt",),
    network="generator",
    samples="it is an initialisation that training starts from; convert causal-forcing-chunkwise to sample",
    unconfirmed=("its network generator",),
)
