"""Finds and loads the two native libraries, and knows why one is missing."""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path

import torch

OLDEST_TORCH = (2, 10)  # whose C shim the libraries are compiled against
# The room is reached through the package's link: a checkout and an installed package resolve to the same places.
_HERE = Path(__file__).resolve().parent.parent


def _folder() -> Path:
    beside = Path(__file__).parent.parent / "lib"
    return beside if beside.is_dir() else _HERE / "ditscale" / "lib"


def path_of(name: str) -> Path:
    """Where the library ``name`` ("cpu" or "cuda") stands if it was built."""
    return _folder() / f"libditscale_{name}.so"


@functools.cache
def missing_reason(name: str) -> str | None:
    """Load the library ``name`` ("cpu" or "cuda") once; None where that worked, else the reason in one line."""
    path = path_of(name)
    reason = _before_loading(name, path)
    if reason is None:
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            reason = f"{path.name} does not load: {' '.join(str(error).split())}"
    return reason


def _before_loading(name: str, path: Path) -> str | None:
    """What can be known to go wrong: an operator that cannot be registered ends the process instead of raising."""
    if not path.is_file():
        return f"libditscale_{name} was not built (no {path.name} in the package)"
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found and tuple(map(int, found.groups())) < OLDEST_TORCH:
        return f"{path.name} needs torch {'.'.join(map(str, OLDEST_TORCH))} or newer, this is {torch.__version__}"
    if name == "cuda":
        if torch.version.cuda is None:
            return "this torch has no CUDA"
        if missing_reason("cpu"):
            return "libditscale_cpu, which declares the operators, is missing"
        return None
    if str(path) not in torch.ops.loaded_libraries and any(
        op.startswith("ditscale::") for op in torch._C._dispatch_get_all_op_names()
    ):
        return "another library has defined operators named ditscale::* in this process"
    return _stale_reason(path, _HERE / "csrc" / "bindings" / "schemas.cpp")


def _stale_reason(library: Path, schemas: Path) -> str | None:
    """Whether the library of a checkout declares the operators of its sources: a compiled schema is in it as text."""
    if not schemas.is_file():
        return None  # an installed package: library and Python come from one build
    built = library.read_bytes()
    for definition in re.findall(r'm\.def\(((?:\s*"[^"]*")+)', schemas.read_text()):
        schema = "".join(re.findall(r'"([^"]*)"', definition))
        if schema.encode() not in built:
            name = schema.partition("(")[0]
            return f"{library.name} was built from other sources ({name} is not the same): python setup.py build_native"
    return None


def cpu_isa() -> str | None:
    """The instruction set the CPU library runs with ("avx512", "avx2" or "portable"); None without the library."""
    if missing_reason("cpu"):
        return None
    function = ctypes.CDLL(str(path_of("cpu"))).ditscale_cpu_isa
    function.restype = ctypes.c_char_p
    name: bytes = function()
    return name.decode()
