"""Text files that people write, line by line, under one set of rules about encoding and line ends."""

from pathlib import Path

from packforcing_jax.errors import InputError


def read(path: str | Path, what: str, remedy: str) -> list[str]:
    """The lines of a UTF-8 file, which end at line feeds, or carriage returns and line feeds, alone.

    A byte order mark at the start is skipped. Other characters that end lines elsewhere, such as U+2028 or a form
    feed, stay where they are. `what` names the file in an `InputError`, `remedy` ends it. A pipe or a device, which
    may never end, is refused.
    """
    found = Path(path)
    try:
        if found.exists() and not (found.is_file() or found.is_dir()):
            raise ValueError("it is a pipe or a device")
        text = found.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{what} cannot be read ({error}); {remedy}.") from error
    return [line.removesuffix("\r") for line in text.split("\n")]
