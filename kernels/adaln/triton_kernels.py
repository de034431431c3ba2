"""The adaLN family in Triton, for GPUs from sm_80 on and, for tests, its interpreter on the CPU.

The operators ``ditscale_triton::*`` have the names and schemas of the native ones. Grammar of the kernels: ``i_`` program
index, ``o_`` offsets, ``m_`` masks, ``b_`` values in registers; BT rows of BD columns a step. Mathematics and reduction
scheme: docs/kernels.md.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ditscale.kernels.adaln import shapes
from ditscale.kernels.dispatch import interpreting
from ditscale.kernels.register import define

TASKS = 1024  # most parts that the rows of a backward pass are cut into


@triton.jit
def _moments(b_x, m, D, eps, RMS: tl.constexpr):
    """Mean and 1 / std of rows [BT, BD]; what the second pass finds left of the mean corrects it."""
    if RMS:
        mean = tl.zeros([b_x.shape[0]], tl.float32)
        variance = tl.sum(b_x * b_x, 1) / D
    else:
        mean = tl.sum(b_x, 1) / D
        b_c = tl.where(m, b_x - mean[:, None], 0.0)
        rest = tl.sum(b_c, 1) / D
        variance = tl.sum(b_c * b_c, 1) / D - rest * rest
        mean += rest
    # Not maximum(variance, 0): that would swallow a NaN.
    return mean, 1.0 / tl.sqrt(tl.where(variance < 0.0, 0.0, variance) + eps)


@triton.jit
def _modulation(ptr, stride_b, stride_t, i_b, o_t, o_d, m, PER_TOKEN: tl.constexpr, D):
    """A modulation as float32: [1, BD] where the rows of a sample share it, else [BT, BD]."""
    if PER_TOKEN:
        return tl.load(ptr + i_b * stride_b + o_t[:, None] * stride_t + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    else:
        return tl.load(ptr + i_b * stride_b + o_d[None, :], mask=(o_d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _adaln_fwd_kernel(
    # Tensors
    x_ptr, branch_ptr, gate_ptr, shift_ptr, scale_ptr, x_new_ptr, y_ptr, mean_ptr, rstd_ptr,
    # Strides, in elements
    stride_x_b, stride_x_t, stride_branch_b, stride_branch_t, stride_gate_b, stride_gate_t,
    stride_shift_b, stride_shift_t, stride_scale_b, stride_scale_t,
    # Scalars
    T, D, blocks_t, eps, scale_base,
    # Constexprs
    HAS_BRANCH: tl.constexpr, PER_TOKEN: tl.constexpr, RMS: tl.constexpr, SAVE: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    i_b = i // blocks_t
    o_t = (i % blocks_t) * BT + tl.arange(0, BT)
    o_d = tl.arange(0, BD)
    m_t = o_t < T
    m = m_t[:, None] & (o_d < D)[None, :]
    row = i_b * T + o_t
    at = row[:, None] * D + o_d[None, :]
    b_x = tl.load(x_ptr + i_b * stride_x_b + o_t[:, None] * stride_x_t + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        p_branch = branch_ptr + i_b * stride_branch_b + o_t[:, None] * stride_branch_t + o_d[None, :]
        b_branch = tl.load(p_branch, mask=m, other=0.0).to(tl.float32)
        b_gate = _modulation(gate_ptr, stride_gate_b, stride_gate_t, i_b, o_t, o_d, m, PER_TOKEN, D)
        b_new = (b_x + b_gate * b_branch).to(x_new_ptr.dtype.element_ty)
        tl.store(x_new_ptr + at, b_new, mask=m)
        b_x = tl.where(m, b_new.to(tl.float32), 0.0)  # the norm sees what is stored
    mean, rstd = _moments(b_x, m, D, eps, RMS)
    if SAVE:
        tl.store(mean_ptr + row, mean, mask=m_t)
        tl.store(rstd_ptr + row, rstd, mask=m_t)
    b_shift = _modulation(shift_ptr, stride_shift_b, stride_shift_t, i_b, o_t, o_d, m, PER_TOKEN, D)
    b_scale = _modulation(scale_ptr, stride_scale_b, stride_scale_t, i_b, o_t, o_d, m, PER_TOKEN, D)
    b_y = (b_x - mean[:, None]) * rstd[:, None] * (scale_base + b_scale) + b_shift
    tl.store(y_ptr + at, b_y.to(y_ptr.dtype.element_ty), mask=m)


@triton.jit
def _adaln_bwd_kernel(
    # Tensors
    dy_ptr, dresidual_ptr, x_ptr, branch_ptr, gate_ptr, scale_ptr, mean_ptr, rstd_ptr,
    dx_ptr, dbranch_ptr, dshift_ptr, dscale_ptr, dgate_ptr, partial_ptr,
    # Strides, in elements
    stride_dy_b, stride_dy_t, stride_dresidual_b, stride_dresidual_t, stride_x_b, stride_x_t,
    stride_branch_b, stride_branch_t, stride_gate_b, stride_gate_t, stride_scale_b, stride_scale_t,
    # Scalars
    T, D, segment_rows, chunk, chunks, eps, scale_base,
    # Constexprs
    HAS_BRANCH: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_STATS: tl.constexpr, PER_TOKEN: tl.constexpr,
    DIRECT: tl.constexpr, RMS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    segment = i // chunks
    first = (i % chunks) * chunk
    last = tl.minimum(first + chunk, segment_rows)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    b_s0 = tl.zeros([BD], tl.float32)
    b_s1 = tl.zeros([BD], tl.float32)
    b_s2 = tl.zeros([BD], tl.float32)
    for start in range(first, last, BT):
        o_r = start + tl.arange(0, BT)
        m_r = o_r < last
        row = segment * segment_rows + o_r
        o_b = (row // T)[:, None]
        o_t = (row % T)[:, None]
        m = m_r[:, None] & m_d[None, :]
        at = row[:, None] * D + o_d[None, :]
        b_x = tl.load(x_ptr + o_b * stride_x_b + o_t * stride_x_t + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        b_dy = tl.load(dy_ptr + o_b * stride_dy_b + o_t * stride_dy_t + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        # Strides of shared modulation are zero: a tile of it is one row, read from the cache.
        p_scale = scale_ptr + o_b * stride_scale_b + o_t * stride_scale_t + o_d[None, :]
        b_factor = scale_base + tl.load(p_scale, mask=m, other=0.0).to(tl.float32)
        if HAS_STATS:
            rstd = tl.load(rstd_ptr + row, mask=m_r, other=0.0)
            mean = tl.load(mean_ptr + row, mask=m_r, other=0.0)
        else:
            mean, rstd = _moments(b_x, m, D, eps, RMS)
        b_n = tl.where(m, (b_x - mean[:, None]) * rstd[:, None], 0.0)
        b_g = b_dy * b_factor
        c2 = tl.sum(b_g * b_n, 1) / D
        b_dx = b_g - b_n * c2[:, None]
        if not RMS:
            b_dx -= (tl.sum(tl.where(m, b_g, 0.0), 1) / D)[:, None]
        b_dx = b_dx * rstd[:, None]
        if HAS_RESIDUAL:
            p_residual = dresidual_ptr + o_b * stride_dresidual_b + o_t * stride_dresidual_t + o_d[None, :]
            b_dx += tl.load(p_residual, mask=m, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, b_dx.to(dx_ptr.dtype.element_ty), mask=m)
        b_dscale = b_dy * b_n
        if HAS_BRANCH:
            p_branch = branch_ptr + o_b * stride_branch_b + o_t * stride_branch_t + o_d[None, :]
            b_branch = tl.load(p_branch, mask=m, other=0.0).to(tl.float32)
            p_gate = gate_ptr + o_b * stride_gate_b + o_t * stride_gate_t + o_d[None, :]
            b_gate = tl.load(p_gate, mask=m, other=0.0).to(tl.float32)
            tl.store(dbranch_ptr + at, (b_dx * b_gate).to(dbranch_ptr.dtype.element_ty), mask=m)
            b_dgate = b_dx * b_branch
            if PER_TOKEN:
                tl.store(dgate_ptr + at, b_dgate.to(dgate_ptr.dtype.element_ty), mask=m)
            else:
                b_s2 += tl.sum(tl.where(m, b_dgate, 0.0), 0)
        if PER_TOKEN:
            tl.store(dshift_ptr + at, b_dy.to(dshift_ptr.dtype.element_ty), mask=m)
            tl.store(dscale_ptr + at, b_dscale.to(dscale_ptr.dtype.element_ty), mask=m)
        else:
            b_s0 += tl.sum(b_dy, 0)
            b_s1 += tl.sum(b_dscale, 0)
    if DIRECT:  # a segment is one chunk: its sums are the results
        out = segment * D + o_d
        tl.store(dshift_ptr + out, b_s0.to(dshift_ptr.dtype.element_ty), mask=m_d)
        tl.store(dscale_ptr + out, b_s1.to(dscale_ptr.dtype.element_ty), mask=m_d)
        if HAS_BRANCH:
            tl.store(dgate_ptr + out, b_s2.to(dgate_ptr.dtype.element_ty), mask=m_d)
    elif not PER_TOKEN:
        SUMS: tl.constexpr = 3 if HAS_BRANCH else 2
        out = partial_ptr + i * SUMS * D + o_d
        tl.store(out, b_s0, mask=m_d)
        tl.store(out + D, b_s1, mask=m_d)
        if HAS_BRANCH:
            tl.store(out + 2 * D, b_s2, mask=m_d)


@triton.jit
def _gate_residual_kernel(
    # Tensors
    x_ptr, branch_ptr, gate_ptr, out_ptr, dgate_ptr, partial_ptr,
    # Strides, in elements
    stride_x_b, stride_x_t, stride_branch_b, stride_branch_t, stride_gate_b, stride_gate_t,
    # Scalars
    T, D, segment_rows, chunk, chunks, blocks_d,
    # Constexprs
    BACKWARD: tl.constexpr, PER_TOKEN: tl.constexpr, DIRECT: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    part = i // blocks_d
    o_d = (i % blocks_d) * BD + tl.arange(0, BD)
    m_d = o_d < D
    segment = part // chunks
    first = (part % chunks) * chunk
    last = tl.minimum(first + chunk, segment_rows)
    b_s = tl.zeros([BD], tl.float32)
    for start in range(first, last, BT):
        o_r = start + tl.arange(0, BT)
        row = segment * segment_rows + o_r
        o_b = (row // T)[:, None]
        o_t = (row % T)[:, None]
        m = (o_r < last)[:, None] & m_d[None, :]
        at = row[:, None] * D + o_d[None, :]
        b_x = tl.load(x_ptr + o_b * stride_x_b + o_t * stride_x_t + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        p_branch = branch_ptr + o_b * stride_branch_b + o_t * stride_branch_t + o_d[None, :]
        b_branch = tl.load(p_branch, mask=m, other=0.0).to(tl.float32)
        p_gate = gate_ptr + o_b * stride_gate_b + o_t * stride_gate_t + o_d[None, :]
        b_gate = tl.load(p_gate, mask=m, other=0.0).to(tl.float32)
        if BACKWARD:
            b_out = b_x * b_gate
            b_dgate = b_x * b_branch
            if PER_TOKEN:
                tl.store(dgate_ptr + at, b_dgate.to(dgate_ptr.dtype.element_ty), mask=m)
            else:
                b_s += tl.sum(b_dgate, 0)
        else:
            b_out = b_x + b_gate * b_branch
        tl.store(out_ptr + at, b_out.to(out_ptr.dtype.element_ty), mask=m)
    if DIRECT:
        tl.store(dgate_ptr + part * D + o_d, b_s.to(dgate_ptr.dtype.element_ty), mask=m_d)
    elif BACKWARD and not PER_TOKEN:
        tl.store(partial_ptr + part * D + o_d, b_s, mask=m_d)


@triton.jit
def _add_chunks_kernel(partial_ptr, out_ptr, chunks, D, step, stride_segment, blocks_d, BD: tl.constexpr):
    """out[segment] = the partial sums of its chunks, in their order, in float64."""
    i = tl.program_id(0).to(tl.int64)
    segment = i // blocks_d
    o_d = (i % blocks_d) * BD + tl.arange(0, BD)
    m_d = o_d < D
    b_total = tl.zeros([BD], tl.float64)
    for c in range(chunks):
        b_total += tl.load(partial_ptr + segment * stride_segment + c * step + o_d, mask=m_d, other=0.0).to(tl.float64)
    tl.store(out_ptr + segment * D + o_d, b_total.to(tl.float32).to(out_ptr.dtype.element_ty), mask=m_d)


def cut_rows(mode: int, B: int, T: int, min_rows: int, tasks: int = TASKS) -> tuple[int, int, int, int]:
    """(segments, rows, chunk, chunks): the rule of csrc/common/adaln_args.h, which follows from the shape alone."""
    segments, rows = (1, B * T) if mode == 1 else (B, T)
    chunk = max(-(-B * T // tasks), min_rows)
    chunks = max(rows // chunk, 1)
    chunk = max(-(-rows // chunks), 1)
    return segments, rows, chunk, -(-rows // chunk) if rows else 1


def add_chunks(partial: Tensor, k: int, out: Tensor) -> Tensor:
    """Sum ``k`` of every segment's chunks into ``out``; partial [segments, chunks, sums, D]."""
    segments, chunks, sums, D = partial.shape
    if segments and D:
        blocks_d = triton.cdiv(D, 128)
        _add_chunks_kernel[(segments * blocks_d,)](
            partial[:, :, k], out, chunks, D, sums * D, chunks * sums * D, blocks_d, BD=128
        )
    return out


def tile(D: int, numbers: int) -> tuple[int, int, int]:
    """(BT, BD, warps) of the norm kernels: whole rows, about ``numbers`` a step, what fits the registers without a spill."""
    BD = max(triton.next_power_of_2(D), 16)
    return max(1, min(8, numbers // BD)), BD, 4 if BD <= 2048 else 8 if BD <= 4096 else 16


def _strides(t: Tensor) -> tuple[int, int]:
    """From sample to sample and from token to token; 0 where a modulation has no such dimension, or one of 1."""
    return (t.stride(0) if t.dim() >= 2 else 0), (t.stride(1) if t.dim() == 3 and t.shape[1] > 1 else 0)


def _mode(m: Tensor, T: int) -> int:
    """1: all rows share the modulation, 2: those of a sample, 3: none."""
    return min(m.dim(), 2) if m.dim() < 3 or m.shape[1] != T else 3


def dense(t: Tensor) -> Tensor:
    """``t``, or a copy where its last dimension is not contiguous."""
    return t if t.size(-1) <= 1 or t.stride(-1) == 1 else t.contiguous()


def _forward(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    scale_base: float = 1.0,
    rms: bool = False,
    *,
    save_stats: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, D = x.shape
    x, shift, scale = dense(x), dense(shift), dense(scale)
    branch = x if branch is None else dense(branch)
    fused = gate is not None
    gate = scale if gate is None else dense(gate)
    y = torch.empty((B, T, D), dtype=x.dtype, device=x.device)
    x_new = torch.empty_like(y) if fused else y
    stats = torch.empty((2, B, T) if save_stats else (0,), dtype=torch.float32, device=x.device)
    BT, BD, warps = tile(D, 4096 // (x.element_size() // 2 if fused else 1))
    blocks_t = triton.cdiv(T, BT)
    if B * T:
        mean, rstd = (stats[0], stats[1]) if save_stats else (stats, stats)
        _adaln_fwd_kernel[(B * blocks_t,)](
            x, branch, gate, shift, scale, x_new, y, mean, rstd,
            *_strides(x), *_strides(branch), *_strides(gate), *_strides(shift), *_strides(scale),
            T, D, blocks_t, eps, scale_base,
            HAS_BRANCH=fused, PER_TOKEN=_mode(scale, T) == 3, RMS=rms, SAVE=save_stats, BT=BT, BD=BD, num_warps=warps,
        )  # fmt: skip
    return x_new, y, stats


def _backward(
    dy: Tensor,
    dresidual: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    stats: Tensor | None = None,
    eps: float = 1e-6,
    scale_base: float = 1.0,
    rms: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, T, D = x.shape
    dy, x, scale = dense(dy), dense(x), dense(scale)
    fused, given = gate is not None, dresidual is not None
    branch = x if branch is None else dense(branch)
    gate = scale if gate is None else dense(gate)
    dresidual = dy if dresidual is None else dense(dresidual)
    mode = _mode(scale, T)
    per_token = mode == 3
    dx = torch.empty((B, T, D), dtype=x.dtype, device=x.device)
    dbranch = torch.empty_like(dx) if fused else dx
    dshift, dscale = (torch.empty(scale.shape, dtype=scale.dtype, device=x.device) for _ in range(2))
    dgate = torch.empty_like(dscale) if fused else dscale
    sums = 3 if fused else 2
    segments, rows, chunk, chunks = cut_rows(mode, B, T, sums * 32 // x.element_size())
    direct = chunks == 1 and not per_token and B * T > 0
    # Without rows no program runs, and the sums are zero.
    make = torch.empty if B * T else torch.zeros
    partial = make((0 if per_token or direct else segments, chunks, sums, D), dtype=torch.float32, device=x.device)
    BT, BD, warps = tile(D, 4096 // (x.element_size() if fused or stats is None else 1))
    if B * T:
        mean, rstd = (x, x) if stats is None else (stats[0], stats[1])
        _adaln_bwd_kernel[(segments * chunks,)](
            dy, dresidual, x, branch, gate, scale, mean, rstd, dx, dbranch, dshift, dscale, dgate, partial,
            *_strides(dy), *_strides(dresidual), *_strides(x), *_strides(branch), *_strides(gate), *_strides(scale),
            T, D, rows, chunk, chunks, eps, scale_base,
            HAS_BRANCH=fused, HAS_RESIDUAL=given, HAS_STATS=stats is not None, PER_TOKEN=per_token,
            DIRECT=direct, RMS=rms, BT=BT, BD=BD, num_warps=warps,
        )  # fmt: skip
    if not per_token and not direct:
        add_chunks(partial, 0, dshift)
        add_chunks(partial, 1, dscale)
        if fused:
            add_chunks(partial, 2, dgate)
    return dx, dbranch, dgate, dshift, dscale


def _residual(x: Tensor, branch: Tensor, gate: Tensor, backward: bool) -> tuple[Tensor, Tensor]:
    B, T, D = x.shape
    x, branch, gate = dense(x), dense(branch), dense(gate)
    mode = _mode(gate, T)
    per_token = mode == 3
    out = torch.empty((B, T, D), dtype=x.dtype, device=x.device)
    dgate = torch.empty(gate.shape if backward else (0,), dtype=gate.dtype, device=x.device)
    sums = backward and not per_token
    segments, rows, chunk, chunks = cut_rows(mode if sums else 2, B, T, 32 // x.element_size() if sums else 8)
    direct = chunks == 1 and sums and B * T > 0
    make = torch.empty if B * T else torch.zeros
    partial = make((segments if sums and not direct else 0, chunks, 1, D), dtype=torch.float32, device=x.device)
    blocks_d = triton.cdiv(D, 512)
    if B * T:
        _gate_residual_kernel[(segments * chunks * blocks_d,)](
            x, branch, gate, out, dgate, partial,
            *_strides(x), *_strides(branch), *_strides(gate), T, D, rows, chunk, chunks, blocks_d,
            BACKWARD=backward, PER_TOKEN=per_token, DIRECT=direct, BT=4, BD=512,
        )  # fmt: skip
    if sums and not direct:
        add_chunks(partial, 0, dgate)
    return out, dgate


def layernorm_modulate_fwd(x: Tensor, shift: Tensor, scale: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """``ditscale_triton::layernorm_modulate_fwd``."""
    _, y, stats = _forward(x, None, None, shift, scale, *options)
    return y, stats


def layernorm_modulate_infer(x: Tensor, shift: Tensor, scale: Tensor, *options: Any) -> Tensor:
    """``ditscale_triton::layernorm_modulate_infer``."""
    return _forward(x, None, None, shift, scale, *options, save_stats=False)[1]


def layernorm_modulate_bwd(
    dy: Tensor, x: Tensor, scale: Tensor, stats: Tensor | None = None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """``ditscale_triton::layernorm_modulate_bwd``."""
    dx, _, _, dshift, dscale = _backward(dy, None, x, None, None, scale, stats, *options)
    return dx, dshift, dscale


def gate_residual_layernorm_modulate_infer(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    """``ditscale_triton::gate_residual_layernorm_modulate_infer``."""
    return _forward(x, branch, gate, shift, scale, *options, save_stats=False)[:2]


def gate_residual_fwd(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """``ditscale_triton::gate_residual_fwd``."""
    return _residual(x, branch, gate, False)[0]


def gate_residual_bwd(dout: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """``ditscale_triton::gate_residual_bwd``."""
    return _residual(dout, branch, gate, True)


define(
    "ditscale_triton",
    shapes.OPERATORS,
    {
        "layernorm_modulate_fwd": layernorm_modulate_fwd,
        "layernorm_modulate_infer": layernorm_modulate_infer,
        "layernorm_modulate_bwd": layernorm_modulate_bwd,
        "gate_residual_fwd": gate_residual_fwd,
        "gate_residual_bwd": gate_residual_bwd,
        "gate_residual_layernorm_modulate_fwd": _forward,
        "gate_residual_layernorm_modulate_infer": gate_residual_layernorm_modulate_infer,
        "gate_residual_layernorm_modulate_bwd": _backward,
    },
    "CPU" if interpreting() else "CUDA",
)
