"""Turns `--config FILE` and `--set a.b=value` into an `Experiment`, and refuses what it does not know by name."""

import ast
import dataclasses
import pathlib
import re
import runpy
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeAlias

import ml_collections

from packforcing_jax import configs
from packforcing_jax.config.experiment import Experiment
from packforcing_jax.errors import InputError, nearest

CONFIGS = pathlib.Path(next(iter(configs.__path__)))  # outside the checkout too
STAGE = re.compile(r"[\w-]+")  # the name of a stage, and of its folder
Recipe: TypeAlias = tuple[tuple[str, Experiment], ...]  # stages of training in order, by name


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


def _names_of(path: pathlib.Path) -> dict[str, Any]:
    """What a Python file defines at module level."""
    try:
        return runpy.run_path(str(path))
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"config {path} does not run ({type(error).__name__}: {error}); correct that file."
        ) from error


def _experiment_in(found: dict[str, Any], path: pathlib.Path) -> Experiment:
    experiment = found.get("experiment")
    if not isinstance(experiment, Experiment):
        raise InputError(
            f"config {path} defines no `experiment = Experiment(...)` at module level; add it."
        )
    return experiment


def read(path: pathlib.Path) -> Experiment:
    """The module-level `experiment` of a Python file."""
    return _experiment_in(_names_of(path), path)


def read_recipe(path: pathlib.Path) -> Recipe:
    """The module-level `recipe` of a Python file: its stages in order; without one a single nameless stage."""
    found = _names_of(path)
    if "recipe" not in found:
        return (("", _experiment_in(found, path)),)
    recipe, hint = found["recipe"], tuple[tuple[str, Experiment], ...]
    if not recipe or not fits(recipe, hint) or not all(STAGE.fullmatch(name) for name, _ in recipe):
        raise InputError(
            f"config {path}: `recipe` must be a tuple of (name, Experiment), each name a word of "
            "letters, digits, - and _; correct that file."
        )
    if len(dict(recipe)) < len(recipe):
        raise InputError(f"config {path}: two stages of `recipe` have the same name; rename one.")
    return recipe


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the annotated type `hint` (whole numbers are floats too, truth values are no numbers)."""
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return any(fits(value, each) for each in arguments)
    if typing.get_origin(hint) is tuple:
        each = (
            arguments[:1] * len(value)
            if isinstance(value, tuple) and arguments[-1] is ...
            else arguments
        )
        return isinstance(value, tuple) and len(value) == len(each) and all(map(fits, value, each))
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float)) if hint is float else isinstance(value, hint)


def spell(hint: Any) -> str:
    """The annotated type as a person would write it."""
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def parse(text: str, hint: Any, key: str) -> Any:
    """`text` as a Python literal if it is one, else as a string, of type `hint`."""
    try:
        literal = _frozen(ast.literal_eval(text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        literal = text
    for value in (literal, text):
        if fits(value, hint):
            return value
    raise InputError(f"--set {key}={text}: {key} must be {spell(hint)}; give such a value.")


def _step(group: Any, prefix: str, name: str) -> Any:
    """The field `name` of a dataclass; raises `InputError` naming the nearest field."""
    known = {field.name for field in dataclasses.fields(group)}
    if name not in known:
        hint = nearest(prefix + name, {prefix + each for each in known})
        raise InputError(f"--set {prefix}{name}: unknown key; {hint}")
    return getattr(group, name)


def _owner(experiment: Experiment, key: str) -> Any:
    """The dataclass whose field `key` (as in `cache.top`) is; raises `InputError` unless it is a single value."""
    *outer, last = key.split(".")
    group, prefix = experiment, ""
    for name in outer:
        group, prefix = _step(group, prefix, name), f"{prefix}{name}."
        if not dataclasses.is_dataclass(group):
            raise InputError(
                f"--set {key}: {prefix[:-1]} is a single value, not a group; set {prefix[:-1]} itself."
            )
    value = _step(group, prefix, last)
    if dataclasses.is_dataclass(value):
        inside = ", ".join(f"{key}.{field.name}" for field in dataclasses.fields(value))
        raise InputError(f"--set {key}: {key} is a group; set one of {inside}.")
    return group


def _rebuild(template: Any, values: Any) -> Any:
    """`template` with `values`, groups inside first, so that each group checks itself once, when complete."""
    changes = {}
    for field in dataclasses.fields(template):
        old = getattr(template, field.name)
        changes[field.name] = (
            _rebuild(old, values[field.name])
            if dataclasses.is_dataclass(old)
            else values[field.name]
        )
    return dataclasses.replace(template, **changes)


def override(experiment: Experiment, sets: Sequence[str]) -> Experiment:
    """`experiment` with every `a.b=value` of `sets` applied together; combinations are checked only at the end."""
    values = ml_collections.ConfigDict(dataclasses.asdict(experiment), type_safe=False)
    for each in sets:
        key, equals, text = (part.strip() for part in each.partition("="))
        if not equals:
            raise InputError(f"--set {each} has no value; write it as --set {each}=VALUE.")
        hints = typing.get_type_hints(type(_owner(experiment, key)))
        values.update_from_flattened_dict({key: parse(text, hints[key.rpartition(".")[2]], key)})
    return _rebuild(experiment, values)


def load_experiment(config: str | pathlib.Path, sets: Sequence[str] = ()) -> Experiment:
    """The experiment of a file or a name in `configs/`, with `a.b=value` overrides."""
    return override(read(find(config)), sets)


def load_recipe(config: str | pathlib.Path, sets: Sequence[str] = ()) -> Recipe:
    """The stages of a file or a name in `configs/`; `a.b=value` changes every stage, `STAGE:a.b=value` only one."""
    recipe = read_recipe(find(config))
    addressed = [_address(each, [name for name, _ in recipe]) for each in sets]
    return tuple(
        (
            name,
            override(
                experiment, [setting for stage, setting in addressed if stage in (None, name)]
            ),
        )
        for name, experiment in recipe
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
