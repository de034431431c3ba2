"""Finds and loads the two native libraries, and knows why one is missing."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

LIB = Path(__file__).parent.parent / "lib"


def _folder() -> Path:
    # The room is reached through the package's link, so its parent is the package; a checkout resolves to the same place.
    return LIB if LIB.is_dir() else Path(__file__).resolve().parent.parent / "ditscale" / "lib"


def path_of(name: str) -> Path:
    """Where the library ``name`` ("cpu" or "cuda") stands if it was built."""
    return _folder() / f"libditscale_{name}.so"


@functools.cache
def missing_reason(name: str) -> str | None:
    """Load the library ``name`` ("cpu" or "cuda") once; None where that worked, else the reason in one line."""
    path = path_of(name)
    if not path.is_file():
        return f"libditscale_{name} was not built (no {path.name} in the package)"
    if name == "cuda":
        if torch.version.cuda is None:
            return "this torch has no CUDA"
        if missing_reason("cpu"):
            return "libditscale_cpu, which declares the operators, is missing"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {' '.join(str(error).split())}"
    return None


def cpu_isa() -> str | None:
    """The instruction set the CPU library runs with ("avx512", "avx2" or "portable"); None without the library."""
    if missing_reason("cpu"):
        return None
    function = ctypes.CDLL(str(path_of("cpu"))).ditscale_cpu_isa
    function.restype = ctypes.c_char_p
    name: bytes = function()
    return name.decode()
