"""ditscale: fast kernels, exact compute accounting and scaling laws for diffusion transformers.

Four rooms, each useful alone: ``ditscale.kernels``, ``ditscale.dit``, ``ditscale.scaling`` and ``ditscale.bench``.
Importing this package imports none of them, and neither torch nor triton.
"""

from __future__ import annotations

import importlib
from typing import Any

from ditscale.errors import BackendUnavailable, InputError

__version__ = "0.1.0"
__all__ = ["BackendUnavailable", "InputError", "__version__", "bench", "dit", "kernels", "scaling"]

_ROOMS = ("bench", "dit", "kernels", "scaling")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"ditscale.{name}")
    raise AttributeError(f"module 'ditscale' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
