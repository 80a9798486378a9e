"""Settings as plain data and back, from JSON and from dotted `a.b=value`, under one set of rules about types.

A field is annotated with a plain type, a tuple, `X | None`, a dataclass (a group of settings), a union of dataclasses
(plain data then say which one under "kind"), or `str | Policy`, where a policy is a frozen dataclass with a `name`.
Plain data hold a policy's name; the table that knows the policies looks the name up. From Python and from config
files, a policy may also be given as a value.
"""

import ast
import dataclasses
import functools
import json
import types
import typing
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import ml_collections

from packforcing_jax.config.choices import GONE, RENAMED
from packforcing_jax.errors import InputError, brief, nearest, require, shortened

Settings = TypeVar("Settings")
Hint: TypeAlias = Any  # what an annotation evaluates to: a class, a union, tuple[int, ...]
KIND = "kind"  # the key that says of which class a group is, where its field does not say so


# What annotations say


def options(hint: Hint) -> tuple[Hint, ...]:
    """The members of a union, or the type alone."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def takes_name(hint: Hint) -> bool:
    """Whether a field of this type holds a text, or a policy that has a name."""
    return str in options(hint)


def groups_in(hint: Hint) -> list[type]:
    """The dataclasses whose fields are settings of their own at a field of this type."""
    return [] if takes_name(hint) else [each for each in options(hint) if is_group(each)]


def is_group(value: object) -> bool:
    return dataclasses.is_dataclass(value)


def spell(hint: Hint) -> str:
    """The annotated type as a person would write it."""
    if takes_name(hint):
        hint = functools.reduce(
            lambda a, b: a | b, filter(lambda x: not is_group(x), options(hint))
        )
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


@functools.cache
def hints_of(group: type) -> Mapping[str, Hint]:
    """The annotated types of a dataclass's fields, by name."""
    try:
        hints = typing.get_type_hints(group)
    except NameError as error:
        raise InputError(
            f"the annotations of {group.__name__} do not resolve ({error}); "
            "import what they name where the class is defined."
        ) from error
    return {field.name: hints[field.name] for field in dataclasses.fields(group)}


def kind_of(group: type) -> str:
    """The name of a group's class in plain data: its own `tag`, else the name of the class."""
    return group.__dict__.get("tag", group.__name__)


# The rules about types


def as_type(value: object, hint: Hint) -> Any:
    """`value` as the annotated type; raises `TypeError` if it is none.

    A whole number is a float too; a truth value is no number.
    """
    for each in options(hint):
        try:
            return _as_one(value, each)
        except (TypeError, OverflowError):
            continue
    raise TypeError


def _as_one(value: object, hint: Hint) -> Any:
    if typing.get_origin(hint) is tuple:
        hints = typing.get_args(hint)
        if not isinstance(value, tuple):
            raise TypeError
        if hints[-1] is ...:
            hints = hints[:1] * len(value)
        if len(hints) != len(value):
            raise TypeError
        return tuple(map(as_type, value, hints))
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise TypeError
    return value


def _frozen(value: object) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _taken(values: Iterable[object], hint: Hint, key: str, setting: str) -> Any:
    """The first of `values` that is of the annotated type; `setting` is what the user wrote."""
    for value in values:
        try:
            return as_type(_frozen(value), hint)
        except TypeError:
            continue
    raise InputError(f"{shortened(setting)}: {key} must be {spell(hint)}; give such a value.")


def _require_known(
    key: str, where: str, known: Collection[str], setting: str, elsewhere: Collection[str] = ()
) -> None:
    """Raises `InputError` naming the nearest unless the group at `where` has the field `key`.

    `elsewhere` are the keys of all groups, one of which may have been meant.
    """
    if key not in known:
        setting = shortened(setting)
        now = RENAMED.get(where + key)
        require(now is None, f"{setting}: the key is called {now} now; rename it.")
        gone = GONE.get(where + key)
        require(gone is None, f"{setting}: the key is gone: {gone}")
        meant = [each for each in elsewhere if each.rpartition(".")[2] == key]
        if meant:
            raise InputError(f"{setting}: unknown key; did you mean {' or '.join(meant)}?")
        hint = nearest(where + key, {where + each for each in known})
        raise InputError(f"{setting}: unknown key; {hint}")


# Plain data


def encode(value: object, hint: Hint = None) -> Any:
    """The settings `value` of a field annotated `hint` (None: of its own class) as plain data for JSON."""
    if takes_name(hint):
        return getattr(value, "name", value)
    if not is_group(value):
        return list(map(encode, value)) if isinstance(value, tuple) else value
    hints = hints_of(type(value))
    names_kind = hint is not None and groups_in(hint) != [type(value)]
    return ({KIND: kind_of(type(value))} if names_kind else {}) | {
        name: encode(getattr(value, name), each) for name, each in hints.items()
    }


def to_json(settings: object) -> str:
    """Settings as JSON text."""
    return json.dumps(encode(settings), indent=2) + "\n"


def from_json(
    group: type[Settings],
    text: str,
    source: str,
    *,
    known: Sequence[type] = (),
    gone: Mapping[str, str] | None = None,
) -> Settings:
    """The settings of `to_json`; `source` names the text in `InputError`s.

    `known` are classes of groups beside those that the annotations name; `gone` are keys of earlier versions, each
    with what to do about it.
    """
    try:
        data = json.loads(text)
        for key, remedy in (gone or {}).items():
            require(not isinstance(data, dict) or key not in data, remedy)
        return _group([group], data, "", known)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{source} is not JSON (line {error.lineno}: {error.msg}); fetch the file again."
        ) from error
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    except (
        ValueError,
        RecursionError,
    ) as error:  # a number of thousands of digits, tables in tables
        raise InputError(
            f"{source} cannot be read as JSON ({brief(error)}); fetch the file again."
        ) from error


def _decoded(hint: Hint, data: object, key: str, known: Sequence[type]) -> Any:
    """The field `key`, annotated `hint`, of plain data."""
    groups = groups_in(hint)
    if groups and not (data is None and types.NoneType in options(hint)):
        return _group(groups, data, key, known)
    return _taken([data], hint, key, f"{key}={data!r}")


def _group(groups: Sequence[type], data: object, where: str, known: Sequence[type]) -> Any:
    """One of `groups` from a table; of which class it is, the table says where that is not plain."""
    table = data if isinstance(data, dict) else {}
    kind = groups[0]
    if len(groups) > 1 or (KIND in table and KIND not in hints_of(kind)):
        kinds = {kind_of(each): each for each in (*known, *groups)}
        name: Any = table.get(KIND) if table else data
        require(
            isinstance(name, str) and name in kinds,
            f"{where}.{KIND}={name!r} is unknown; choose one of {', '.join(map(kind_of, groups))}, "
            "or give --config FILE of the file that defines it.",
        )
        kind = kinds[name]
        table = {key: item for key, item in table.items() if key != KIND}
    else:
        require(
            isinstance(data, dict),
            f"{where or 'the file'}={data!r} is not a table of settings; correct it.",
        )
    hints = hints_of(kind)
    inside = f"{where}." if where else ""
    for key in table:
        _require_known(key, inside, hints, inside + key)
    needed = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name not in table
    ]
    require(not needed, f"{inside}{', '.join(needed)} is missing; add it.")
    return kind(
        **{key: _decoded(hints[key], item, inside + key, known) for key, item in table.items()}
    )


def classes_in(settings: object) -> tuple[type, ...]:
    """The classes of all groups in `settings`."""
    classes = {type(settings): None}
    for name, hint in hints_of(type(settings)).items():
        value = getattr(settings, name)
        if is_group(value) and not takes_name(hint):
            classes |= dict.fromkeys(classes_in(value))
    return tuple(classes)


# Dotted overrides


def parse(text: str, hint: Hint, key: str) -> Any:
    """`text` as a Python literal if it is one, else as a string, of type `hint`."""
    try:
        with warnings.catch_warnings():  # of what merely looks like Python, such as 1if
            warnings.simplefilter("ignore")
            literal = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        literal = text
    return _taken([literal, text], hint, key, f"--set {key}={text}")


def override(
    settings: Settings, overrides: Sequence[str], *, inside: str = "", beside: Sequence[str] = ()
) -> Settings:
    """`settings` with every `a.b=value` of `overrides` applied together; combinations are checked only at the end.

    `inside` begins every key, such as `train.`, and names no field. `beside` are names that other settings have, which
    an unknown key may be nearest to.
    """
    values = ml_collections.ConfigDict(_tree(settings), type_safe=False)
    for each in overrides:
        key, equals, text = (part.strip() for part in each.partition("="))
        if not equals:
            raise InputError(f"--set {each} has no value; write it as --set {each}=VALUE.")
        path = key.removeprefix(inside)
        hint = _hint_at(settings, path, inside, beside)
        values.update_from_flattened_dict({path: parse(text, hint, key)})
    return _rebuilt(settings, values)


def _inner(group: object) -> dict[str, Any]:
    """The groups inside a group, by field."""
    values = {
        name: getattr(group, name)
        for name, hint in hints_of(type(group)).items()
        if not takes_name(hint)
    }
    return {name: value for name, value in values.items() if is_group(value)}


def _tree(group: object) -> dict[str, Any]:
    """A group as nested tables of its values."""
    inner = _inner(group)
    return {
        name: _tree(inner[name]) if name in inner else getattr(group, name)
        for name in hints_of(type(group))
    }


def _keys(group: object, where: str) -> list[str]:
    """The dotted keys of all single values in a group."""
    inner = _inner(group)
    return [
        key
        for name in hints_of(type(group))
        for key in (_keys(inner[name], f"{where}{name}.") if name in inner else [where + name])
    ]


def _hint_at(settings: object, path: str, inside: str, beside: Sequence[str]) -> Hint:
    """The type of the single value at a dotted path; raises `InputError` if there is none."""
    every = _keys(settings, inside)
    *outer, last = path.split(".")
    group = settings
    where = inside
    key = inside + path
    for name in outer:
        known = (*hints_of(type(group)), *(beside if group is settings else ()))
        _require_known(name, where, known, f"--set {where}{name}")
        if name not in _inner(group):
            raise InputError(
                f"--set {key}: {where}{name} is a single value, not a group; set {where}{name} itself."
            )
        group = getattr(group, name)
        where = f"{where}{name}."
    known = (*hints_of(type(group)), *(beside if group is settings else ()))
    _require_known(last, where, known, f"--set {where}{last}", every)
    if last in _inner(group):
        fields = ", ".join(f"{key}.{name}" for name in hints_of(type(getattr(group, last))))
        raise InputError(f"--set {key}: {key} is a group; set one of {fields}.")
    return hints_of(type(group))[last]


def _rebuilt(template: Settings, values: ml_collections.ConfigDict) -> Settings:
    """`template` with `values`, groups inside first, so that each group checks itself once, when complete."""
    inner = _inner(template)
    changes = {
        name: _rebuilt(inner[name], cast(Any, values[name])) if name in inner else values[name]
        for name in hints_of(type(template))
    }
    return dataclasses.replace(cast(Any, template), **changes)
