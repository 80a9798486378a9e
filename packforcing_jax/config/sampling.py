"""How a block is denoised, and in which number formats."""

from dataclasses import dataclass

from packforcing_jax.config import limits
from packforcing_jax.config.choices import require_choices
from packforcing_jax.errors import require


@dataclass(frozen=True)
class SampleConfig:
    """How a block is denoised: nominal `steps` warped by `shift` (Self-Forcing), re-noised after each but the last.

    `first_steps` are those of the first generated block, if they are others (Causal-Forcing++). Without `warp` the
    steps are timesteps as they stand (CausVid). Warped timesteps are computed in float32 throughout as in the
    original, or, `exact_timesteps`, rounded once, which changes their last bit.
    """

    steps: tuple[int, ...] = (1000, 750, 500, 250)
    first_steps: tuple[int, ...] = ()
    shift: float = 5.0
    warp: bool = True
    exact_timesteps: bool = False
    prediction: str = "velocity"  # what the network returns: velocity or clean

    def __post_init__(self):
        limits.require_within(limits.SAMPLE, "sample", self)
        require(len(self.steps) > 0, "sample.steps=() holds no step; give one or more.")
        for name in ("steps", "first_steps"):
            steps = getattr(self, name)
            require(
                all(a > b for a, b in zip(steps, steps[1:])),
                f"sample.{name}={steps} must fall from step to step; reorder it.",
            )
        require_choices("sample", self)


@dataclass(frozen=True)
class DtypeConfig:
    """Number formats: weights as stored, what is computed with them, stored keys and values, codec, text encoder.

    Norms, softmax, rotary angles and time embeddings are computed in float32 whatever stands here.
    """

    params: str = "float32"
    compute: str = "float32"
    cache: str = "float32"
    vae: str = "float32"
    text: str = "float32"

    def __post_init__(self):
        require_choices("dtypes", self)


HALF = DtypeConfig(*(["bfloat16"] * 5))  # as Self-Forcing samples
