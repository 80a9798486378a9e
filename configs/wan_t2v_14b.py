"""Wan2.1 T2V-14B at 480x832: the teacher of distillation, with the memory of the public causal weights."""

from packforcing_jax.config import HALF, PROFILES, DiTConfig, Experiment

experiment = Experiment(
    name="wan_t2v_14b",
    dit=DiTConfig(dim=5120, ffn_dim=13824, heads=40, layers=40),
    cache=PROFILES["published"],
    dtypes=HALF,
    latent=(60, 104),
    fps=16,
    clip=21,
)
