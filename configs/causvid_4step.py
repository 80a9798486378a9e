"""CausVid in four warped steps at shift 8: the baseline that others compare with."""

import dataclasses

from packforcing_jax.configs import causvid_3step

from packforcing_jax.config import SampleConfig
from packforcing_jax.config.cards import Card

experiment = dataclasses.replace(
    causvid_3step.experiment,
    name="causvid_4step",
    sample=SampleConfig(steps=(1000, 750, 500, 250), shift=8.0),
    card="causvid-4step",
)

# Thread Causal-Forcing 18: comparisons that say CausVid mean this file, with shift 8 and not 5.
card = Card(
    experiment,
    what="CausVid: causal 1.3B in four steps, blocks of 3 frames",
    repository="tianweiy/CausVid",
    network="generator",
    licence="cc-by-nc-sa-4.0",  # of the code; a stored copy of the model card says cc-by-nc-4.0
    files=("autoregressive_checkpoint_warp_4step_cfg2/model.pt",),
)
