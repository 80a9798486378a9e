"""Finds the experiments and recipes of `--config FILE` and changes them by `--set a.b=value`."""

import pathlib
import re
import runpy
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from packforcing_jax import configs
from packforcing_jax.config import decode
from packforcing_jax.config.experiment import Experiment
from packforcing_jax.config.recipe import Stage
from packforcing_jax.config.training import TrainConfig
from packforcing_jax.errors import InputError, brief, nearest, shortened

CONFIGS = pathlib.Path(next(iter(configs.__path__)))  # outside the checkout too
STAGE = re.compile(r"[\w-]+")  # the name of a stage, and of its folder
TRAIN = "train"  # what keys of training begin with
Recipe: TypeAlias = tuple[Stage, ...]  # stages of training in order


def names() -> list[str]:
    """The experiments that can be given by name."""
    return sorted(path.stem for path in CONFIGS.glob("*.py") if not path.stem.startswith("_"))


def find(config: str | pathlib.Path) -> pathlib.Path:
    """The file of an experiment given by path or by the name of a file in `configs/`."""
    path = pathlib.Path(config)
    if path.is_file():
        return path
    if path.name == str(config) and path.stem in names():
        return CONFIGS / f"{path.stem}.py"
    hint = nearest(path.stem, names())
    raise InputError(
        f"no experiment {str(config)!r}: neither a file nor a name in configs/; {hint}"
    )


# Files


def _names_of(path: pathlib.Path) -> dict[str, Any]:
    """What a Python file defines at module level."""
    try:
        return runpy.run_path(str(path))
    except (InputError, KeyboardInterrupt):
        raise
    except BaseException as error:  # such as sys.exit: a config defines an experiment and ends
        raise InputError(
            f"config {path} does not run ({type(error).__name__}: {shortened(brief(error))}); correct that file."
        ) from error


def _stage_in(namespace: Mapping[str, object], path: pathlib.Path) -> Stage:
    experiment = namespace.get("experiment")
    train = namespace.get(TRAIN, TrainConfig())
    if not isinstance(experiment, Experiment):
        raise InputError(
            f"config {path} defines no `experiment = Experiment(...)` at module level; add it."
        )
    if not isinstance(train, TrainConfig):
        raise InputError(f"config {path}: `train` must be a TrainConfig; correct that file.")
    return Stage("", experiment, train)


def read(path: pathlib.Path) -> Stage:
    """The module-level `experiment` of a Python file with its `train`, as a stage without a name."""
    return _stage_in(_names_of(path), path)


def read_recipe(path: pathlib.Path) -> Recipe:
    """The module-level `recipe` of a Python file: its stages in order; without one a single nameless stage."""
    namespace = _names_of(path)
    if "recipe" not in namespace:
        return (_stage_in(namespace, path),)
    recipe = namespace["recipe"]
    fits = isinstance(recipe, tuple) and len(recipe) > 0 and all(map(_fits, recipe))
    if not fits:
        raise InputError(
            f"config {path}: `recipe` must be a tuple of Stage(name, experiment, train), each name a word of "
            "letters, digits, - and _; correct that file."
        )
    if len({stage.name for stage in recipe}) < len(recipe):
        raise InputError(f"config {path}: two stages of `recipe` have the same name; rename one.")
    return recipe


def _fits(stage: object) -> bool:
    """Whether a value is a stage with a name and settings of the right classes."""
    return (
        isinstance(stage, Stage)
        and isinstance(stage.name, str)
        and STAGE.fullmatch(stage.name) is not None
        and isinstance(stage.experiment, Experiment)
        and isinstance(stage.train, TrainConfig)
    )


# Changes


def of_training(setting: str) -> bool:
    """Whether `a.b=value` is about training."""
    return setting.partition("=")[0].strip().partition(".")[0] == TRAIN


def override(experiment: Experiment, overrides: Sequence[str]) -> Experiment:
    """`experiment` with every `a.b=value` of `overrides`; raises `InputError` for one that is about training."""
    for each in filter(of_training, overrides):
        raise InputError(
            f"--set {each}: {TRAIN}.* are settings of `packforcing train`, which this command does not read; "
            "leave it out."
        )
    return decode.override(experiment, overrides)


def override_stage(stage: Stage, overrides: Sequence[str]) -> Stage:
    """`stage` with every `a.b=value` of `overrides`, where `train.` begins the keys of its training."""
    for each in overrides:
        if each.partition("=")[0].strip() == TRAIN:
            fields = ", ".join(f"{TRAIN}.{name}" for name in decode.hints_of(TrainConfig))
            raise InputError(f"--set {TRAIN}: {TRAIN} is a group; set one of {fields}.")
    own = [each for each in overrides if of_training(each)]
    return Stage(
        stage.name,
        decode.override(
            stage.experiment, [each for each in overrides if not of_training(each)], beside=(TRAIN,)
        ),
        decode.override(stage.train, own, inside=f"{TRAIN}."),
    )


def load_experiment(config: str | pathlib.Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a file or a name in `configs/`, with `a.b=value` overrides."""
    return override(read(find(config)).experiment, overrides)


def load_stage(config: str | pathlib.Path, overrides: Sequence[str] = ()) -> Stage:
    """The same with the file's module-level `train`, whose keys begin with `train.`."""
    return override_stage(read(find(config)), overrides)


def load_recipe(config: str | pathlib.Path, overrides: Sequence[str] = ()) -> Recipe:
    """The stages of a file or a name in `configs/`; `a.b=value` changes every stage, `STAGE:a.b=value` only one."""
    recipe = read_recipe(find(config))
    addressed = [_address(each, [stage.name for stage in recipe]) for each in overrides]
    return tuple(
        override_stage(stage, [each for name, each in addressed if name in (None, stage.name)])
        for stage in recipe
    )


def _address(setting: str, stages: Sequence[str]) -> tuple[str | None, str]:
    """(stage that a setting is for, None for all; the setting without it)."""
    key, equals, text = setting.partition("=")
    stage, colon, key = key.rpartition(":")
    if not colon:
        return None, setting
    if stage.strip() not in stages or not stage.strip():
        raise InputError(
            f"--set {setting}: no stage {stage.strip()!r} in this recipe; "
            f"{nearest(stage.strip(), filter(None, stages))}"
        )
    return stage.strip(), f"{key}{equals}{text}"
