"""How a model is trained, as frozen values."""

from dataclasses import dataclass

from packforcing_jax.errors import require


@dataclass(frozen=True)
class TrainConfig:
    """Teacher forcing through the packed memory.

    Each step draws one sink size (frames) from `sinks` and, with chance `gap_share`, moves everything before the
    recent block up to `gap` frames further back, so that long packed timelines lie inside the trained range.
    """

    steps: int = 6000
    batch: int = 8
    shift: float = 6.0  # noise levels: uniform draws warped towards noise
    sinks: tuple[int, ...] = (0, 0, 0, 4, 8)
    gap: float = 64.0
    gap_share: float = 0.5
    matrix_rate: float = 4e-3  # Muon, times 0.2 sqrt(larger side)
    rate: float = 3e-3  # Adam, everything that is not a matrix
    decay: float = 0.01
    warmup: int = 50
    cooldown: float = 0.4  # last share of the steps, down to 2 % of the rate
    ema: float = 0.995
    matching: float = 0.02  # weight of the loss that the last layer's affinity finds the blocks called back
    save_every: int = 250

    def __post_init__(self):
        for name in ("steps", "batch", "save_every"):
            value = getattr(self, name)
            require(value > 0, f"train.{name}={value} must be at least 1.")
