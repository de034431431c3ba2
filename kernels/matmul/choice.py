"""Which float32 products linear layers take where none are named: the fastest measured on such a processor (docs/kernels.md)."""

from __future__ import annotations

import functools
import itertools
import platform
import re
from typing import Literal

import torch

from ditscale.kernels.library import cpu_isa
from ditscale.kernels.matmul import onednn


@functools.cache
def fastest(device_type: str) -> Literal["cpu", "onednn"] | None:
    """The backend whose products are faster than PyTorch's own; None where those are as good as any.

    Intel's processors have Intel's MKL, which PyTorch asks. On others MKL names no instructions beyond AVX2 (MKL_VERBOSE=1):
    oneDNN's AVX-512 is faster where vectors of 512 bits are as quick as shorter ones, and where they are not, ours.
    """
    vendor = _vendor()
    if device_type != "cpu" or not torch.backends.mkl.is_available() or "GenuineIntel" in vendor:
        return None
    widest = torch.backends.cpu.get_cpu_capability().startswith("AVX512") and not _halves_long_vectors(vendor)
    if widest and onednn.missing(device_type) is None:
        return "onednn"
    return "cpu" if cpu_isa() in ("avx2", "avx512") else None


def _halves_long_vectors(vendor: str) -> bool:
    """Whether the processor is a Zen 4, which computes vectors of 512 bits half by half (Zens before it have none)."""
    family = re.search(r"[Ff]amily\s*:?\s*(\d+)", vendor)
    return "AuthenticAMD" in vendor and family is not None and int(family[1]) == 25


def _vendor() -> str:
    """Who made the processor, and its family."""
    try:
        with open("/proc/cpuinfo") as file:
            first = itertools.islice(file, 8)
            return "".join(line for line in first if line.startswith(("vendor_id", "cpu family")))
    except OSError:
        return platform.processor()  # on Windows "AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD"
