"""What the C library does with memory that tensors on the CPU give back."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

LARGE_PAGE = 2 << 20

_SWITCHES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def _decided() -> bool:
    """Whether the user has told glibc what to keep."""
    return any(name in os.environ for name in _SWITCHES) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")


def keep_memory(*, override: bool = False) -> bool:
    """Let the C library keep what is freed, whatever its size, in pages of 2 MiB; whether it does.

    glibc maps each block of more than 32 MiB anew at every call and gives the heap's end back as soon as it is free; the system
    then zeroes every page again. With activations of that size this took a fifth of a training step (docs/kernels.md), and ten
    times what a fused kernel took (docs/benchmarks.md). A GPU's allocator keeps its memory, too. From then on the process
    stays as large as it ever was.

    Activations lie in rows of which a head reads a few hundred bytes each, so that with pages of 4 KiB nearly every row asks
    for a translation of its own. Where the system has large pages to give, addresses for half of the machine's memory are
    reserved for the heap in such pages; memory is taken only as it is touched.

    Args:
        override: do it even where the environment (``MALLOC_MMAP_*``, ``MALLOC_TRIM_THRESHOLD_``, ``GLIBC_TUNABLES``) has
            decided. Default: False.

    Returns:
        False where the C library has no such switch, and where the environment has decided.
    """
    if _decided() and not override:
        return False
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (OSError, AttributeError):  # another C library
        return False
    maps, trim_threshold, never = -4, -1, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD and its value
    kept = bool(mallopt(maps, 0) and mallopt(trim_threshold, never))
    if kept and _large_pages_serve():
        _reserve_large_pages(libc, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    return kept


def _large_pages_serve() -> bool:
    """Whether the system has large pages to give, and addresses that are never used cost nothing."""
    if "MALLOC_PERTURB_" in os.environ or "perturb" in os.environ.get(
        "GLIBC_TUNABLES", ""
    ):  # all that is asked for is written
        return False
    try:
        pages = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        strict = Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    except OSError:
        return False
    import resource

    limits = {resource.getrlimit(limit)[0] for limit in (resource.RLIMIT_AS, resource.RLIMIT_DATA)}
    return "[never]" not in pages and not strict and limits == {resource.RLIM_INFINITY}


def _reserve_large_pages(libc: ctypes.CDLL, size: int) -> None:
    """Grow the heap by ``size`` bytes that nobody has touched yet, to be filled with large pages.

    Asked for at once, since a heap that grows later grows by a mapping of its own, in small pages. A hint: where the system
    refuses, all is as before.
    """
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if not block:
        return
    first = -(-block // LARGE_PAGE) * LARGE_PAGE
    last = (block + size) // LARGE_PAGE * LARGE_PAGE
    advice = 14  # MADV_HUGEPAGE
    libc.madvise(first, last - first, advice)
    libc.free(block)
