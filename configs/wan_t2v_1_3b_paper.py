"""Wan2.1 T2V-1.3B at 480x832 with the memory of the paper (blocks of 4, sink 8, recent 4, top 16)."""

from packforcing_jax.config import HALF, PROFILES, Experiment

experiment = Experiment(
    name="wan_t2v_1_3b_paper",
    cache=PROFILES["paper"],
    dtypes=HALF,
    latent=(60, 104),
    fps=16,
    clip=20,
)
