"""Wan2.1 T2V-1.3B at 480x832, with public Self-Forcing or Causal-Forcing weights (blocks of 3 latent frames)."""

from packforcing_jax.config import HALF, PROFILES, Experiment

experiment = Experiment(
    name="wan_t2v_1_3b",
    cache=PROFILES["published"],
    dtypes=HALF,
    latent=(60, 104),
    fps=16,
    clip=21,
)
