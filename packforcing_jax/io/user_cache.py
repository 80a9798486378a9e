"""Where files lie that can be made again: below XDG_CACHE_HOME, or below .cache in the user's home."""

import os
from pathlib import Path


def folder(*parts: str) -> Path:
    """A folder of the user's cache, which need not be there; `RuntimeError` where the user has no home."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "packforcing", *parts)
