"""What is trained, and how: an experiment with the settings of its training beside it."""

from dataclasses import dataclass

from packforcing_jax.config.experiment import Experiment
from packforcing_jax.config.training import TrainConfig


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe: its name, which is that of its folder too, a model, and how it is trained."""

    name: str
    experiment: Experiment
    train: TrainConfig
