"""How a block is denoised, and in which number formats."""

from dataclasses import dataclass

from packforcing_jax.config import limits
from packforcing_jax.config.choices import require_choices
from packforcing_jax.errors import require

WAN_NEGATIVE_PROMPT = (  # Wan-Video/Wan2.1 9737cba, wan/configs/shared_config.py (Apache-2.0)
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


def evenly_spaced(count: int) -> tuple[int, ...]:
    """So many nominal steps from 1000 downwards, at equal distances."""
    require(0 < count <= 1000, f"{count} denoising steps are none or too many; give 1 to 1000.")
    return tuple(1000 - 1000 * i // count for i in range(count))


@dataclass(frozen=True)
class SampleConfig:
    """How a block is denoised: nominal `steps` warped by `shift` (Self-Forcing), re-noised after each but the last.

    `first_steps` are those of the first generated block, if they are others (Causal-Forcing++). Without `warp` the
    steps are timesteps as they stand (CausVid). Warped timesteps are computed in float32 throughout as in the
    original, or, `exact_timesteps`, rounded once, which changes their last bit.

    Where all frames of a clip are denoised together, only the number of steps counts, and the prediction is led away
    from that under `negative_prompt` by `guidance`, 1 for none. An empty negative prompt is no text: states of zero.
    """

    steps: tuple[int, ...] = (1000, 750, 500, 250)
    first_steps: tuple[int, ...] = ()
    shift: float = 5.0
    warp: bool = True
    exact_timesteps: bool = False
    prediction: str = "velocity"  # what the network returns: velocity or clean
    guidance: float = 1.0
    negative_prompt: str = ""

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
