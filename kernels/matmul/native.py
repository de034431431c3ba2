"""``ditscale::product`` of the native library, on the CPU: loads and describes it; where it is faster than PyTorch's own."""

from __future__ import annotations

import functools

import torch

from ditscale.kernels.library import cpu_isa, missing_reason
from ditscale.kernels.matmul import shapes
from ditscale.kernels.matmul.onednn import made_by_intel
from ditscale.kernels.register import describe

AVAILABLE = missing_reason("cpu") is None
if AVAILABLE:
    describe("ditscale", shapes.OPERATORS)


@functools.cache
def preferred(device_type: str) -> bool:
    """Whether its products are faster than PyTorch's own: with AVX2 on a processor that is not Intel's, whose MKL they are."""
    return (
        device_type == "cpu"
        and AVAILABLE
        and torch.backends.mkl.is_available()
        and cpu_isa() == "avx2"
        and not made_by_intel()
    )
