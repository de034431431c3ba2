"""Norm of heads and rotary embedding in Triton, both passes: ``ditscale_triton::qk_norm_rope_*``. Grammar: see kernels/adaln.

A row is one head of one token; it is held as its two halves (or as the first and second numbers of its pairs), so that both
numbers that are turned with each other lie in one thread.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ditscale.kernels.adaln.triton_kernels import add_chunks, cut_rows, dense
from ditscale.kernels.dispatch import interpreting
from ditscale.kernels.register import define, heads_like
from ditscale.kernels.rotary import shapes

_BYTES = 4096  # of a tensor in a step, over 128 threads


@triton.jit
def _read(ptr, m_rows, K: tl.constexpr, PAIRS: tl.constexpr, BH: tl.constexpr):
    """Both parts [BR, BH] of rows that start at ptr [BR], as float32; zeros beyond K. Memory is read in the order it lies in."""
    if PAIRS:
        o_k = tl.arange(0, 2 * BH)
        b = tl.load(ptr[:, None] + o_k[None, :], mask=m_rows[:, None] & (o_k < K)[None, :], other=0.0).to(tl.float32)
        b_1, b_2 = tl.split(tl.reshape(b, [ptr.shape[0], BH, 2]))
    else:
        HALF: tl.constexpr = K - K // 2
        o_h = tl.arange(0, BH)
        b_1 = tl.load(ptr[:, None] + o_h[None, :], mask=m_rows[:, None] & (o_h < HALF)[None, :], other=0.0).to(
            tl.float32
        )
        b_2 = tl.load(
            ptr[:, None] + (HALF + o_h)[None, :], mask=m_rows[:, None] & (o_h < K // 2)[None, :], other=0.0
        ).to(tl.float32)
    return b_1, b_2


@triton.jit
def _write(ptr, b_1, b_2, m_rows, K: tl.constexpr, PAIRS: tl.constexpr, BH: tl.constexpr):
    """The inverse of ``_read``, to the dtype of ptr."""
    if PAIRS:
        o_k = tl.arange(0, 2 * BH)
        b = tl.reshape(tl.join(b_1, b_2), [ptr.shape[0], 2 * BH])
        tl.store(ptr[:, None] + o_k[None, :], b.to(ptr.dtype.element_ty), mask=m_rows[:, None] & (o_k < K)[None, :])
    else:
        HALF: tl.constexpr = K - K // 2
        o_h = tl.arange(0, BH)
        tl.store(
            ptr[:, None] + o_h[None, :], b_1.to(ptr.dtype.element_ty), mask=m_rows[:, None] & (o_h < HALF)[None, :]
        )
        tl.store(
            ptr[:, None] + (HALF + o_h)[None, :], b_2.to(ptr.dtype.element_ty),
            mask=m_rows[:, None] & (o_h < K // 2)[None, :],
        )  # fmt: skip


@triton.jit
def _norm_rope_kernel(
    # Tensors
    x_ptr, dout_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, partial_ptr,
    # Strides: those of tables in elements, the others in UNIT elements
    stride_x_b, stride_x_h, stride_x_t, stride_dout_b, stride_dout_h, stride_dout_t, stride_table_b,
    # Scalars
    H, T, rows, chunk, eps,
    # Constexprs
    K: tl.constexpr, NORM: tl.constexpr, WEIGHT: tl.constexpr, TURN: tl.constexpr, PAIRS: tl.constexpr,
    BACKWARD: tl.constexpr, UNIT: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """out = R(w n), n the normalised row and R the rotation; backward: its gradient, and a chunk's part of dw = sum R'(dout) n.

    With g = w R'(dout): dx = (g - mean(g) - n mean(g n)) / std, without mean(g) for the rms norm.
    """
    i = tl.program_id(0).to(tl.int64)
    first = i * chunk
    last = tl.minimum(first + chunk, rows)
    o_r = tl.arange(0, BR)
    o_h = tl.arange(0, BH)
    one = tl.zeros([1], tl.int64)
    if WEIGHT:
        b_w1, b_w2 = _read(weight_ptr + one, one == 0, K, PAIRS, BH)
    b_dw1 = tl.zeros([1, BH], tl.float32)
    b_dw2 = tl.zeros([1, BH], tl.float32)
    for start in range(first, last, BR):
        row = start + o_r
        m = row < last
        token = row // H
        i_h, i_b, i_t = row % H, token // T, token % T
        b_x1, b_x2 = _read(x_ptr + (i_b * stride_x_b + i_h * stride_x_h + i_t * stride_x_t) * UNIT, m, K, PAIRS, BH)
        rstd = tl.full([BR, 1], 1.0, tl.float32)
        if NORM == 2:
            HALF: tl.constexpr = K - K // 2
            # What the first sum leaves of the mean is taken too, so that a constant row is centred to zeros.
            for _ in tl.static_range(2):
                mean = ((tl.sum(b_x1, 1) + tl.sum(b_x2, 1)) / K)[:, None]
                b_x1 = tl.where((o_h < HALF)[None, :], b_x1 - mean, 0.0)
                b_x2 = tl.where((o_h < K // 2)[None, :], b_x2 - mean, 0.0)
        if NORM > 0:
            square = (tl.sum(b_x1 * b_x1, 1) + tl.sum(b_x2 * b_x2, 1)) / K
            rstd = (1.0 / tl.sqrt(square + eps))[:, None]
        b_n1, b_n2 = b_x1 * rstd, b_x2 * rstd
        if TURN:
            angle = (i_b * stride_table_b + i_t * (K // 2))[:, None] + o_h[None, :]
            m_angle = m[:, None] & (o_h < K // 2)[None, :]
            b_c = tl.load(cos_ptr + angle, mask=m_angle, other=0.0)
            b_s = tl.load(sin_ptr + angle, mask=m_angle, other=0.0)
        if BACKWARD:
            at = dout_ptr + (i_b * stride_dout_b + i_h * stride_dout_h + i_t * stride_dout_t) * UNIT
            b_g1, b_g2 = _read(at, m, K, PAIRS, BH)
            if TURN:
                b_g1, b_g2 = b_g1 * b_c + b_g2 * b_s, b_g2 * b_c - b_g1 * b_s
            if WEIGHT:
                b_dw1 += tl.sum(tl.where(m[:, None], b_g1 * b_n1, 0.0), 0)[None, :]
                b_dw2 += tl.sum(tl.where(m[:, None], b_g2 * b_n2, 0.0), 0)[None, :]
                b_g1, b_g2 = b_g1 * b_w1, b_g2 * b_w2
            if NORM > 0:
                along = ((tl.sum(b_g1 * b_n1, 1) + tl.sum(b_g2 * b_n2, 1)) / K)[:, None]
                b_1, b_2 = b_g1 - b_n1 * along, b_g2 - b_n2 * along
                if NORM == 2:
                    mean_g = ((tl.sum(b_g1, 1) + tl.sum(b_g2, 1)) / K)[:, None]
                    b_1, b_2 = b_1 - mean_g, b_2 - mean_g
                b_1, b_2 = b_1 * rstd, b_2 * rstd
            else:
                b_1, b_2 = b_g1, b_g2
        else:
            if WEIGHT:
                b_n1, b_n2 = b_n1 * b_w1, b_n2 * b_w2
            b_1, b_2 = b_n1, b_n2
            if TURN:
                b_1, b_2 = b_n1 * b_c - b_n2 * b_s, b_n2 * b_c + b_n1 * b_s
        _write(out_ptr + row * K, b_1, b_2, m, K, PAIRS, BH)
    if BACKWARD and WEIGHT:
        _write(partial_ptr + i * K + one, b_dw1, b_dw2, one == 0, K, PAIRS, BH)


def _unit(*tensors: Tensor) -> int:
    """8 where every row starts at a multiple of 8 elements, which strides such as 72 do not show to the compiler; else 1."""
    return 8 if all(stride % 8 == 0 for t in tensors for stride in t.stride()[:3]) else 1


def _launch(
    x: Tensor,
    dout: Tensor | None,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    norm: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    x = dense(x)
    grad = x if dout is None else dense(dout)
    B, H, T, K = x.shape
    out = heads_like(x)
    pairs = interleaved and cos is not None
    rows, BH = B * T * H, max(triton.next_power_of_2(K - K // 2), 2)
    BR = min(max(_BYTES // (2 * BH * x.element_size()), 1), 32)
    chunk, chunks = BR, triton.cdiv(rows, BR)
    if dout is not None and weight is not None:
        _, _, chunk, chunks = cut_rows(1, 1, rows, BR)
    sums = dout is not None and weight is not None
    make = torch.empty if rows else torch.zeros
    partial = make((1, chunks, 1, K) if sums else (0,), dtype=torch.float32, device=x.device)
    if rows and K:
        unit = _unit(x, grad)
        tables: Any = (x, x) if cos is None else (cos, sin)
        _norm_rope_kernel[(chunks,)](
            x, grad, x if weight is None else weight, *tables, out, partial,
            *(stride // unit for t in (x, grad) for stride in t.stride()[:3]),
            T * (K // 2) if cos is not None and cos.dim() == 3 else 0,
            H, T, rows, chunk, eps,
            K=K, NORM=norm, WEIGHT=weight is not None, TURN=cos is not None, PAIRS=pairs, BACKWARD=dout is not None,
            UNIT=unit, BR=BR, BH=BH,
        )  # fmt: skip
    return out, partial


def qk_norm_rope_fwd(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, norm: int, interleaved: bool
) -> Tensor:
    """``ditscale_triton::qk_norm_rope_fwd``."""
    return _launch(x, None, weight, cos, sin, eps, norm, interleaved)[0]


def qk_norm_rope_(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, norm: int, interleaved: bool
) -> None:
    """``ditscale_triton::qk_norm_rope_``: in place, through a dense result that is copied."""
    x.copy_(_launch(x, None, weight, cos, sin, eps, norm, interleaved)[0])


def qk_norm_rope_bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    norm: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """``ditscale_triton::qk_norm_rope_bwd``."""
    dx, partial = _launch(x, dout, weight, cos, sin, eps, norm, interleaved)
    dweight = torch.empty(0 if weight is None else x.shape[3], dtype=torch.float32, device=x.device)
    return dx, dweight if weight is None else add_chunks(partial, 0, dweight)


define(
    "ditscale_triton",
    shapes.OPERATORS,
    {"qk_norm_rope_fwd": qk_norm_rope_fwd, "qk_norm_rope_": qk_norm_rope_, "qk_norm_rope_bwd": qk_norm_rope_bwd},
    "CPU" if interpreting() else "CUDA",
)
