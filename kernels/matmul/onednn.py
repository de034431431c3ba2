"""``ditscale_onednn::product``: float32 products by oneDNN, which PyTorch carries but asks for half precision only.

For float32 it asks MKL, which names no AVX-512 (MKL_VERBOSE=1) on AMD's processors that have it: on two cores of a Zen 5 EPYC it
makes 217 GFLOP/s, oneDNN 392 (docs/kernels.md).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ditscale.kernels.library import missing_reason
from ditscale.kernels.matmul import shapes
from ditscale.kernels.register import define

# So do products of two transposed operands, which oneDNN copies first, where the result (a weight's gradient) is small.
SMALLEST_OF_TRANSPOSED = 1 << 15
# The longer a sum, the further oneDNN's error is from MKL's: at 1,536 terms twice it (r.m.s.), in pieces of 384 1.4 times.
LONGEST_SUM = 384
# MKL makes sums of few rows or columns in lanes: with 3 columns oneDNN errs 2.5 times as much at 384 terms, in pieces of 64 1.1.
FEW, SHORT_SUM = 16, 64


@functools.cache
def missing(device_type: str) -> str | None:
    """Why there is no oneDNN for tensors of this device; None where there is."""
    if device_type != "cpu":
        return f"it serves CPU tensors, not {device_type}"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this PyTorch is built without oneDNN"
    return None


def product(x: Tensor, weight: Tensor, bias: Tensor | None, always: bool) -> Tensor:
    """``x weight^T + bias`` of float32 matrices [M, K] and [N, K], as a new [M, N].

    ``always`` by oneDNN, however small, or by MKL or our own library where that is faster.
    """
    rows, inner = x.shape
    outputs = weight.shape[0]
    little = rows * inner * outputs < shapes.SMALLEST
    small = little or (x.stride(1) != 1 and weight.stride(1) != 1 and rows * outputs < SMALLEST_OF_TRANSPOSED)
    if little and not always and missing_reason("cpu") is None:
        own: Tensor = torch.ops.ditscale.product(x, weight, bias, False)  # ours or MKL's
        return own
    if (small and not always) or rows * inner * outputs == 0:
        return torch.nn.functional.linear(x, weight, bias)
    bias = bias.contiguous() if bias is not None else None  # PyTorch's call takes every bias for dense
    pieces = -(-inner // (SHORT_SUM if min(rows, outputs) < FEW else LONGEST_SUM))
    step = -(-inner // (64 * pieces)) * 64  # whole vectors
    linear = torch.ops.mkldnn._linear_pointwise
    out = linear.default(x[:, :step], _dense(weight[:, :step]), bias, "none", [], "")
    for i in range(step, inner, step):
        out = linear.binary(x[:, i : i + step], out, _dense(weight[:, i : i + step]), None, "add")
    return out


def _dense(weight: Tensor) -> Tensor:
    """The weight, or a copy where it is neither dense nor a dense one's transpose: oneDNN has no fast code for others."""
    return weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()


if missing("cpu") is None:
    define("ditscale_onednn", shapes.OPERATORS, {"product": product}, "CPU")
