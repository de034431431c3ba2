"""The attention operators of the native libraries, ``ditscale::*`` on CPU and CUDA: loads and describes them."""

from __future__ import annotations

from ditscale.kernels.attn import shapes
from ditscale.kernels.library import missing_reason
from ditscale.kernels.register import describe

AVAILABLE = missing_reason("cpu") is None
if AVAILABLE:
    describe("ditscale", shapes.OPERATORS)
