"""Bias and tanh GELU in Triton, forward and backward: ``ditscale_triton::bias_gelu_*``. Grammar: kernels/adaln."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ditscale.kernels.adaln.triton_kernels import add_chunks, cut_rows
from ditscale.kernels.dispatch import interpreting
from ditscale.kernels.gelu import shapes
from ditscale.kernels.register import define


@triton.jit
def _bias_gelu_kernel(
    # Tensors
    x_ptr, dy_ptr, bias_ptr, out_ptr, partial_ptr,
    # Scalars
    stride_x, stride_dy, rows, F, chunk, blocks_f,
    # Constexprs
    BACKWARD: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """gelu(z) = z sigmoid(v), v = 2 sqrt(2 / pi) (z + 0.044715 z^3), of a chunk of rows; backward: its derivative.

    sigmoid(v) and 1 - sigmoid(v) come from exp(-|v|), so that the smaller one is not what a subtraction leaves. Beyond 20
    they are 0 and 1 in float32: the clamp keeps z^3 from overflowing.
    """
    i = tl.program_id(0).to(tl.int64)
    part = i // blocks_f
    o_f = (i % blocks_f) * BF + tl.arange(0, BF)
    m_f = o_f < F
    first = part * chunk
    last = tl.minimum(first + chunk, rows)
    b_bias = tl.load(bias_ptr + o_f, mask=m_f, other=0.0).to(tl.float32)[None, :]
    b_sum = tl.zeros([BF], tl.float32)
    A: tl.constexpr = 1.59576912160573071
    AB: tl.constexpr = 1.59576912160573071 * 0.044715
    for start in range(first, last, BT):
        row = (start + tl.arange(0, BT)).to(tl.int64)
        m = (row < last)[:, None] & m_f[None, :]
        b_z = tl.load(x_ptr + row[:, None] * stride_x + o_f[None, :], mask=m, other=0.0).to(tl.float32) + b_bias
        b_q = tl.where(b_z > 20.0, 20.0, tl.where(b_z < -20.0, -20.0, b_z))
        b_v = b_q * (A + AB * b_q * b_q)
        b_e = tl.exp(-tl.abs(b_v))
        b_large = 1.0 / (1.0 + b_e)
        b_small = b_e * b_large
        b_gate = tl.where(b_v > 0.0, b_large, b_small)
        if BACKWARD:
            b_dy = tl.load(dy_ptr + row[:, None] * stride_dy + o_f[None, :], mask=m, other=0.0).to(tl.float32)
            b_out = b_dy * (b_gate + b_q * (b_large * b_small) * (A + 3.0 * AB * b_q * b_q))
            b_sum += tl.sum(tl.where(m, b_out, 0.0), 0)
        else:
            b_out = tl.where(b_z > b_q, b_z, b_q) * b_gate
        tl.store(out_ptr + row[:, None] * F + o_f[None, :], b_out.to(out_ptr.dtype.element_ty), mask=m)
    if BACKWARD:
        tl.store(partial_ptr + part * F + o_f, b_sum, mask=m_f)


def _rows(t: Tensor) -> Tensor:
    """[..., F] as rows with a dense last dimension."""
    flat = t if t.dim() == 2 else t.reshape(-1, t.shape[-1])
    return flat if flat.shape[1] <= 1 or flat.stride(1) == 1 else flat.contiguous()


def _launch(x: Tensor, dy: Tensor | None, bias: Tensor) -> tuple[Tensor, Tensor]:
    flat, bias = _rows(x), bias.contiguous()
    grad = flat if dy is None else _rows(dy)
    rows, F = flat.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _, _, chunk, chunks = cut_rows(1, 1, rows, 8 if dy is None else 32 // x.element_size())
    make = torch.empty if rows else torch.zeros
    partial = make((0 if dy is None else 1, chunks, 1, F), dtype=torch.float32, device=x.device)
    blocks_f = triton.cdiv(F, 512)
    if rows:
        _bias_gelu_kernel[(chunks * blocks_f,)](
            flat, grad, bias, out, partial, flat.stride(0), grad.stride(0), rows, F, chunk, blocks_f,
            BACKWARD=dy is not None, BT=4, BF=512,
        )  # fmt: skip
    return out, partial


def bias_gelu_fwd(x: Tensor, bias: Tensor) -> Tensor:
    """``ditscale_triton::bias_gelu_fwd``."""
    return _launch(x, None, bias)[0]


def bias_gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """``ditscale_triton::bias_gelu_bwd``."""
    dx, partial = _launch(x, dy, bias)
    return dx, add_chunks(partial, 0, torch.empty(bias.shape, dtype=bias.dtype, device=bias.device))


define(
    "ditscale_triton",
    shapes.OPERATORS,
    {"bias_gelu_fwd": bias_gelu_fwd, "bias_gelu_bwd": bias_gelu_bwd},
    "CPU" if interpreting() else "CUDA",
)
