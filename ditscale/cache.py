"""Where things are kept that can be made again: verdicts on kernels, statistics of reference images."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """``$DITSCALE_CACHE``, or ditscale's folder in the user's cache; None for a user without a home. It may not exist."""
    home = os.environ.get("DITSCALE_CACHE")
    if home:
        return Path(home)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ditscale"
    except RuntimeError:
        return None


def cached_path(kind: str, name: str) -> Path | None:
    """Where a file of a kind is kept; None where there is no cache."""
    folder = cache_folder()
    return None if folder is None else folder / kind / name
