"""The reference without a bound: every frame at full size, at its true number, as Self-Forcing would keep them.

Its memory grows with the length that is asked for, and so does each block's time.
"""

import dataclasses

from packforcing_jax.methods.self_forcing import SELF_FORCING

FULL = dataclasses.replace(
    SELF_FORCING, name="full", source="the memory of SELF_FORCING without a bound", unbounded=True
)
