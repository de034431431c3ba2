"""``ditscale::adamw_average_`` of the native library, on the CPU: loads and describes it."""

from __future__ import annotations

from ditscale.kernels.adamw import shapes
from ditscale.kernels.library import missing_reason
from ditscale.kernels.register import describe

AVAILABLE = missing_reason("cpu") is None
if AVAILABLE:
    describe("ditscale", shapes.OPERATORS)
