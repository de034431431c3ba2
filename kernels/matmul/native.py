"""``ditscale::product`` of the native library, on the CPU: loads and describes it."""

from __future__ import annotations

from ditscale.kernels.library import missing_reason
from ditscale.kernels.matmul import shapes
from ditscale.kernels.register import describe

if missing_reason("cpu") is None:
    describe("ditscale", shapes.OPERATORS)
