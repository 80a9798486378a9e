"""What clients may say, over sockets and in request bodies: JSON objects of known fields, read strictly.

Everything else is refused in one sentence that names the field, its value and what to give.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from packforcing_jax.config.choices import AT_PROMPT_CHANGE
from packforcing_jax.errors import InputError, nearest, require, shown
from packforcing_jax.live.limits import DRIFT, LONGEST_TEXT

MOST_BLOCKS = 10**7
LONGEST_REF = 100
LONGEST_NAME = 100

Ref = str | int | None
Body = TypeVar("Body")


# Over a socket


@dataclass(frozen=True)
class Have:
    """The client has taken block `block` and all before it."""

    block: int
    ref: Ref = None


@dataclass(frozen=True)
class Prompt:
    """Another prompt from block `at` on, or from the next one; `policy`: what it does to the memory."""

    text: str
    at: int | None = None
    policy: str | None = None
    ref: Ref = None


@dataclass(frozen=True)
class Pause:
    """No block after the one in progress, until `Resume`."""

    ref: Ref = None


@dataclass(frozen=True)
class Resume:
    """Goes on after `Pause`."""

    ref: Ref = None


@dataclass(frozen=True)
class Rewind:
    """Block `to` is the next one to be made; it and all behind it are forgotten."""

    to: int
    ref: Ref = None


Message = Have | Prompt | Pause | Resume | Rewind
MESSAGES: Mapping[str, type[Message]] = {
    "have": Have,
    "prompt": Prompt,
    "pause": Pause,
    "resume": Resume,
    "rewind": Rewind,
}


# In a request


@dataclass(frozen=True)
class NewSession:
    """A session to begin; `run`: it goes on while nobody watches."""

    prompt: str
    seed: int = 0
    memory: str | None = None
    method: str | None = None
    run: bool = False
    drift: str | None = None


@dataclass(frozen=True)
class Fork:
    """Another session that shares the blocks before `at`; without it, all there are."""

    at: int | None = None


@dataclass(frozen=True)
class NewVideo:
    """A whole video to make."""

    prompt: str
    seconds: float
    seed: int = 0


# Reading


class Check(NamedTuple):
    """Whether a value may stand in a field, and the words for what may."""

    holds: Callable[[Any], bool]
    words: str


def _whole(least: int, most: int) -> Check:
    return Check(
        lambda value: type(value) is int and least <= value <= most,
        f"a whole number from {least} to {most:,}",
    )


def _text(most: int) -> Check:
    return Check(
        lambda value: isinstance(value, str) and 0 < len(value) <= most,
        f"a text of 1 to {most:,} characters",
    )


def _one_of(names: tuple[str, ...]) -> Check:
    return Check(lambda value: value in names, f"one of {', '.join(names)}")


_BLOCK = _whole(0, MOST_BLOCKS)
_REF = Check(
    lambda value: (
        (isinstance(value, str) and len(value) <= LONGEST_REF)
        or (type(value) is int and abs(value) < 2**53)
    ),
    f"a text of at most {LONGEST_REF} characters or a whole number below 2^53",
)
CHECKS: Mapping[str, Check] = {
    "block": _BLOCK,
    "at": _BLOCK,
    "to": _BLOCK,
    "text": _text(LONGEST_TEXT),
    "prompt": _text(LONGEST_TEXT),
    "memory": _text(LONGEST_NAME),
    "method": _text(LONGEST_NAME),
    "policy": _one_of(AT_PROMPT_CHANGE),
    "drift": _one_of(DRIFT),
    "seed": _whole(0, 2**32 - 1),
    "run": Check(lambda value: isinstance(value, bool), "true or false"),
    "seconds": Check(
        lambda value: type(value) in (int, float) and 0 < value < 1e9, "a number above 0"
    ),
    "ref": _REF,
}


def message(text: str | bytes) -> Message:
    """The message of a client; raises `InputError`."""
    fields = _object(text, "a message")
    kind = fields.pop("type", None)
    require(
        isinstance(kind, str) and kind in MESSAGES,
        f"message type {shown(kind)} is unknown; "
        + nearest(kind if isinstance(kind, str) else "", MESSAGES),
    )
    return _built(MESSAGES[str(kind)], fields, f"a {kind} message")


def ref_of(text: str | bytes) -> Ref:
    """The `ref` of a message that may be wrong otherwise, None where it has none."""
    try:
        ref = _object(text, "a message").get("ref")
    except InputError:
        return None
    return ref if _REF.holds(ref) else None


def body(kind: type[Body], content: bytes) -> Body:
    """A request's body as `kind`, for which an empty one may do; raises `InputError`."""
    return _built(kind, _object(content, "a body") if content else {}, "the body")


def _built(kind: type[Body], fields: Mapping[str, Any], what: str) -> Body:
    known = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for name, value in fields.items():
        require(name in known, f"{what} has no field {shown(name)}; {nearest(name, known)}")
        optional = known[name].default is None
        require(
            (optional and value is None) or CHECKS[name].holds(value),
            f"{name}={shown(value, 60)} is not {CHECKS[name].words}; give such a one"
            + (" or leave it out." if known[name].default is not dataclasses.MISSING else "."),
        )
    missing = [
        name
        for name, field in known.items()
        if field.default is dataclasses.MISSING and name not in fields
    ]
    require(not missing, f"{what} lacks {', '.join(missing)}; give {_example(missing)}.")
    return kind(**fields)


def _example(missing: list[str]) -> str:
    return " and ".join(f'"{name}": {CHECKS[name].words}' for name in missing)


def _object(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object; bytes that are no text, numbers JSON does not have, and depth without end are refused."""
    try:
        value = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{what} of {len(text):,} characters is not JSON ({_why(error)}); send one object, such as "
            '{"type": "pause"}.'
        ) from error
    require(
        isinstance(value, dict),
        f"{what} is {shown(value, 60)}, and must be a JSON object; send one, such as "
        '{"type": "pause"}.',
    )
    return value


class _NoNumberError(ValueError):
    """A word that Python's reader takes for a number."""


def _no_number(word: str) -> Any:
    raise _NoNumberError(f"{word} is no number")


def _why(error: Exception) -> str:
    match error:
        case json.JSONDecodeError():
            return f"{error.msg} at character {error.pos}"
        case _NoNumberError():
            return str(error)
        case RecursionError():
            return "it is nested too deeply"
        case UnicodeDecodeError():
            return "it is not UTF-8"
    return "a number cannot be read"
