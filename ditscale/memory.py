"""What the C library does with memory that tensors on the CPU give back."""

from __future__ import annotations

import ctypes
import os

_SWITCHES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def _decided() -> bool:
    """Whether the user has told glibc what to keep."""
    return any(name in os.environ for name in _SWITCHES) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")


def keep_memory(*, override: bool = False) -> bool:
    """Let the C library keep what is freed, whatever its size; whether it does.

    glibc maps each block of more than 32 MiB anew at every call and gives the heap's end back as soon as it is free; the system
    then zeroes every page again. With activations of that size this took a fifth of a training step (docs/kernels.md), and ten
    times what a fused kernel took (docs/benchmarks.md). A GPU's allocator keeps its memory, too. From then on the process
    stays as large as it ever was.

    Args:
        override: do it even where the environment (``MALLOC_MMAP_*``, ``MALLOC_TRIM_THRESHOLD_``, ``GLIBC_TUNABLES``) has
            decided. Default: False.

    Returns:
        False where the C library has no such switch, and where the environment has decided.
    """
    if _decided() and not override:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    maps, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD
    return bool(mallopt(maps, 0) and mallopt(trim_threshold, 2**31 - 1))
