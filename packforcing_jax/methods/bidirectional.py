"""Wan2.1 as published: all frames of a clip are denoised together, and each sees every other; nothing is remembered.

The solver is UniPC, with guidance against a negative prompt. It is the base model's sanity check, and what trajectories
for the first stage of a student come from.
"""

from packforcing_jax.methods.method import Method

BIDIRECTIONAL = Method(
    "bidirectional",
    "arXiv 2503.20314; Wan-Video/Wan2.1 9737cba",
    whole_clip=True,
    steps=50,
)
