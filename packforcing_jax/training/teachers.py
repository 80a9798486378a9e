"""A frozen teacher: its sizes, which may not be the generator's, whether the two fit, and where its parameters lie."""

import dataclasses

import jax

from packforcing_jax import pytrees
from packforcing_jax.config import DiTConfig, Experiment, TrainConfig, decode
from packforcing_jax.errors import require
from packforcing_jax.io import model_folder
from packforcing_jax.training import batches, objectives
from packforcing_jax.training.batches import Flat

# What a teacher reads and gives in the generator's place
COMMON = ("in_channels", "out_channels", "patch", "text_dim", "text_len")


def sizes(exp: Experiment, train: TrainConfig) -> DiTConfig:
    """The sizes of the teacher's transformer."""
    return train.teacher or exp.dit


def sized(exp: Experiment, train: TrainConfig) -> TrainConfig:
    """`train` with the sizes of the teacher that lies in `train.teacher_from`; None where they are the generator's.

    Raises `InputError` for a teacher that does not fit. No weights are read.
    """
    if not objectives.of(train).teacher:
        return train
    held = model_folder.opened(train.teacher_from, decode.classes_in(exp)).experiment
    require(
        train.teacher in (None, held.dit),
        f"train.teacher_from={train.teacher_from} holds a transformer of {_spelt(held.dit)}, and train.teacher asks "
        f"for {_spelt(sizes(exp, train))}; name another folder, or leave train.teacher out.",
    )
    require(
        held.sample.prediction == exp.sample.prediction,
        f"the teacher in {train.teacher_from} predicts {held.sample.prediction}, and {exp.name} "
        f"{exp.sample.prediction} (sample.prediction); name a teacher that predicts the same.",
    )
    own = dataclasses.replace(train, teacher=None if held.dit == exp.dit else held.dit)
    require_fits(exp, own)
    require(
        own.teacher is None or objectives.of(train).critic is None or bool(train.critic_from),
        f"the teacher has {_spelt(held.dit)} and {exp.name} {_spelt(exp.dit)}, so the critic cannot start as the "
        "teacher; name a model folder of the generator's sizes in train.critic_from.",
    )
    return own


def require_fits(exp: Experiment, train: TrainConfig) -> None:
    """Raises `InputError` unless a teacher of the sizes in `train` can be asked about the generator's clips."""
    if train.teacher is None:
        return
    objective = objectives.of(train)
    for name in COMMON:
        given, wanted = getattr(train.teacher, name), getattr(exp.dit, name)
        require(
            given == wanted,
            f"the teacher's dit.{name}={given} differs from {exp.name}'s {wanted}, and both read the same clips and "
            "text; name a teacher that has the same.",
        )
    require(
        "compressor" not in objective.teacher,
        f"train.objective={objective.name!r} asks a teacher that looks back through the generator's memory, so it "
        f"needs the generator's sizes, and this one has {_spelt(train.teacher)}; name another teacher.",
    )


def critic_folder(train: TrainConfig) -> str:
    """The model folder that the critic starts as."""
    return train.critic_from or train.teacher_from


def shapes(exp: Experiment, train: TrainConfig) -> Flat:
    """Shapes of the parameters of the teacher that the objective asks, by path; none where it asks none."""
    parts = tuple(f"{part}/" for part in objectives.of(train).teacher)
    own = dataclasses.replace(exp, dit=sizes(exp, train)) if parts else exp
    model = jax.eval_shape(lambda: batches.new_model(own, jax.random.key(0), reads=False))
    return {path: leaf for path, leaf in pytrees.flatten(model).items() if path.startswith(parts)}


def _spelt(cfg: DiTConfig) -> str:
    """What tells transformers apart at sight."""
    return f"{cfg.dim} channels in {cfg.layers} layers"
