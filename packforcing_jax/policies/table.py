"""A policy is given by its name, looked up in one table, or as the value itself."""

from collections.abc import Mapping
from typing import TypeVar

from packforcing_jax.errors import nearest, require

Policy = TypeVar("Policy")


def named(table: Mapping[str, Policy], choice: "str | Policy", setting: str) -> Policy:
    """The policy that `choice` names in `table`, or `choice` itself; `setting` is what an `InputError` names."""
    if not isinstance(choice, str):
        return choice
    require(
        choice in table,
        f"{setting}={choice!r} is unknown; {nearest(choice, table)} Your own needs its --config FILE.",
    )
    return table[choice]
