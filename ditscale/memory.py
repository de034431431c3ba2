"""What the C library does with memory that tensors on the CPU give back."""

from __future__ import annotations

import ctypes
import os

# A user who set one of these has decided.
_DECIDED = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_memory() -> bool:
    """Let the C library keep what is freed, whatever its size; whether it does.

    glibc maps each block of more than 32 MiB anew at every call and gives the heap's end back as soon as it is free; the system
    then zeroes every page again. With activations of that size this took a sixth of a training step (measured), and ten times
    what a fused kernel took. A GPU's allocator keeps its memory, too.

    Returns:
        False where the C library has no such switch, and where the environment (``MALLOC_*``, ``GLIBC_TUNABLES``) has decided.
    """
    if any(name in os.environ for name in _DECIDED):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    maps, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD
    return bool(mallopt(maps, 0) and mallopt(trim_threshold, 2**31 - 1))
