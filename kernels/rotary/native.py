"""``qk_norm_rope`` of the native libraries, ``ditscale::*`` on CPU and CUDA: loads and describes them."""

from __future__ import annotations

from ditscale.kernels.library import missing_reason
from ditscale.kernels.register import describe
from ditscale.kernels.rotary import shapes

if missing_reason("cpu") is None:
    describe("ditscale", shapes.OPERATORS)
