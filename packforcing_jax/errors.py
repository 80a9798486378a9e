"""Two kinds of failure a user can meet, and the exit codes they map to (0 done, 1 check failed, 130 interrupted)."""


class InputError(Exception):
    """The request is wrong: one sentence naming the thing, the value and the remedy. Exit code 2."""

    exit_code = 2


class MachineError(Exception):
    """The machine failed (disk full, out of memory, not-a-number latents): finished work is kept. Exit code 3."""

    exit_code = 3


def require(condition: bool, sentence: str) -> None:
    """Raises `InputError(sentence)` unless `condition` holds."""
    if not condition:
        raise InputError(sentence)


def brief(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).splitlines() or [type(error).__name__])[0]
