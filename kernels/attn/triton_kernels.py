"""Attention in Triton, for GPUs from sm_80 on and, for tests, its interpreter on the CPU.

The operators ``ditscale_triton::attention_*`` have the names, schemas and meaning of shapes.py. Grammar of the kernels: ``i_``
program index, ``o_`` offsets, ``b_`` values in registers, ``p_`` pointers; BM queries and BN keys a step. Scores are kept in
units of log 2. Mathematics, tiling and numerics: docs/attention.md; parts: triton_tiles.py; sizes of tiles: triton_configs.py.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from ditscale.kernels.attn import shapes
from ditscale.kernels.attn.triton_configs import INTERPRETER, columns, tile
from ditscale.kernels.attn.triton_tiles import (
    LOG2E,
    add_weighted,
    counted,
    load_bias,
    load_head,
    products,
    sequence,
    store_head,
    weights,
    zeros,
)
from ditscale.kernels.dispatch import interpreting
from ditscale.kernels.register import define, heads_like

_LEAST_NORMAL: Final = 2.0**-126  # of float32: GPUs may take what is smaller for zero


@triton.jit
def _attention_fwd_kernel(
    # Tensors
    q_ptr, k_ptr, v_ptr, out_ptr, origin_ptr, factor_ptr, bias_ptr, lengths_ptr, cu_q_ptr, cu_k_ptr,
    # Strides of sample, head and token, in units of ALIGN elements; of the bias and the statistics in elements
    stride_q_b, stride_q_h, stride_q_t, stride_k_b, stride_k_h, stride_k_t, stride_v_b, stride_v_h, stride_v_t,
    stride_out_b, stride_out_h, stride_out_t, stride_bias_b, stride_bias_h, stride_bias_s, stride_stats_b, stride_stats_h,
    # Scalars: c = scale log2(e)
    T, S, H, group, blocks, c,
    # Constexprs
    K: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr,
    EVEN: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, LENGTHS: tl.constexpr, PACKED: tl.constexpr,
    SAVE: tl.constexpr, FACTOR: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """BM queries of a head: online softmax over blocks of BN keys."""
    i = tl.program_id(0)
    i_m = (i % blocks) * BM
    i_h = (i // blocks % H).to(tl.int64)
    i_b = (i // blocks // H).to(tl.int64)
    q_first, T = sequence(cu_q_ptr, i_b, T, PACKED)
    if i_m >= T:
        return
    k_first, S = sequence(cu_k_ptr, i_b, S, PACKED)
    keys = counted(lengths_ptr, i_b, S, LENGTHS)
    queries = T - i_m
    q_first += i_m
    p_k = k_ptr + (i_b * stride_k_b + i_h // group * stride_k_h + k_first * stride_k_t) * ALIGN
    p_v = v_ptr + (i_b * stride_v_b + i_h // group * stride_v_h + k_first * stride_v_t) * ALIGN
    p_bias = bias_ptr
    if BIAS:
        p_bias += i_b * stride_bias_b + i_h * stride_bias_h + k_first * stride_bias_s
    p_q = q_ptr + (i_b * stride_q_b + i_h * stride_q_h + q_first * stride_q_t) * ALIGN
    b_q1, b_q2 = load_head(p_q, stride_q_t * ALIGN, queries, K, D1, D2, BM, False)
    b_m = tl.full([BM], float("-inf"), tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_o1, b_o2 = zeros(D1, D2, BM)
    for start in range(0, keys, BN):
        count = keys - start
        b_k1, b_k2 = load_head(p_k, stride_k_t * ALIGN, count, K, D1, D2, BN, EVEN)
        b_s = products(b_q1, b_q2, b_k1, b_k2, BM, BN, D2, UPCAST)
        if SCALED:
            b_s = b_s * c
        if BIAS:
            b_s += load_bias(p_bias, stride_bias_s, count, BN)[None, :]
        if not EVEN:
            b_s = tl.where((tl.arange(0, BN) < count)[None, :], b_s, float("-inf"))
        b_new = tl.max(b_s, 1)
        if not SCALED:
            b_new = b_new * c
        # Kept as rounded after the factor: what earlier weights were measured from is what they are brought over from.
        b_new = tl.maximum(b_m, b_new)
        # A row that has met no key with a weight measures from zero: its weights are exp2(-inf).
        b_origin = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_alpha = tl.exp2(b_m - b_origin)
        b_p = weights(b_s, b_origin[:, None], 1.0, c, SCALED, False)
        b_l = b_l * b_alpha + tl.sum(b_p, 1)
        b_v1, b_v2 = load_head(p_v, stride_v_t * ALIGN, count, K, D1, D2, BN, EVEN)
        b_o1, b_o2 = add_weighted(b_o1 * b_alpha[:, None], b_o2 * b_alpha[:, None], b_p, b_v1, b_v2, D2, UPCAST)
        b_m = b_new
        p_k += BN * stride_k_t * ALIGN
        p_v += BN * stride_v_t * ALIGN
        if BIAS:
            p_bias += BN * stride_bias_s
    b_factor = tl.where(b_l == 0.0, 0.0, 1.0 / b_l)  # no key with a weight: zeros
    p_out = out_ptr + (i_b * stride_out_b + i_h * stride_out_h + q_first * stride_out_t) * ALIGN
    b_o1 = b_o1 * b_factor[:, None]
    b_o2 = b_o2 * b_factor[:, None]
    store_head(p_out, stride_out_t * ALIGN, queries, b_o1, b_o2, K, D1, D2, BM, UPCAST)
    if SAVE:
        if not FACTOR:
            b_m += tl.log2(b_l)
            b_factor = tl.where(b_l == 0.0, 0.0, 1.0)
        b_m = tl.where(b_l == 0.0, 0.0, b_m)
        o_m = tl.arange(0, BM)
        row = i_b * stride_stats_b + i_h * stride_stats_h + q_first + o_m
        tl.store(origin_ptr + row, b_m, mask=o_m < queries)
        tl.store(factor_ptr + row, b_factor, mask=o_m < queries)


@triton.jit
def _attention_dq_kernel(
    # Tensors
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, dq_ptr, origin_ptr, factor_ptr, delta_ptr,
    bias_ptr, lengths_ptr, cu_q_ptr, cu_k_ptr,
    # Strides as above
    stride_q_b, stride_q_h, stride_q_t, stride_k_b, stride_k_h, stride_k_t, stride_v_b, stride_v_h, stride_v_t,
    stride_out_b, stride_out_h, stride_out_t, stride_dout_b, stride_dout_h, stride_dout_t,
    stride_dq_b, stride_dq_h, stride_dq_t, stride_bias_b, stride_bias_h, stride_bias_s, stride_stats_b, stride_stats_h,
    # Scalars
    T, S, H, group, blocks, c, scale,
    # Constexprs
    K: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr,
    EVEN: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, LENGTHS: tl.constexpr, PACKED: tl.constexpr,
    FACTOR: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradient of BM queries; and delta, the sum of out * dout of each row, which the pass over keys needs as well."""
    i = tl.program_id(0)
    i_m = (i % blocks) * BM
    i_h = (i // blocks % H).to(tl.int64)
    i_b = (i // blocks // H).to(tl.int64)
    q_first, T = sequence(cu_q_ptr, i_b, T, PACKED)
    if i_m >= T:
        return
    k_first, S = sequence(cu_k_ptr, i_b, S, PACKED)
    keys = counted(lengths_ptr, i_b, S, LENGTHS)
    queries = T - i_m
    q_first += i_m
    p_out = out_ptr + (i_b * stride_out_b + i_h * stride_out_h + q_first * stride_out_t) * ALIGN
    p_dout = dout_ptr + (i_b * stride_dout_b + i_h * stride_dout_h + q_first * stride_dout_t) * ALIGN
    b_do1, b_do2 = load_head(p_dout, stride_dout_t * ALIGN, queries, K, D1, D2, BM, False)
    b_o1, b_o2 = load_head(p_out, stride_out_t * ALIGN, queries, K, D1, D2, BM, False)
    b_delta = tl.sum(b_do1.to(tl.float32) * b_o1.to(tl.float32), 1)
    if D2 > 0:
        b_delta += tl.sum(b_do2.to(tl.float32) * b_o2.to(tl.float32), 1)
    o_m = tl.arange(0, BM)
    row = i_b * stride_stats_b + i_h * stride_stats_h + q_first + o_m
    tl.store(delta_ptr + row, b_delta, mask=o_m < queries)
    b_origin = tl.load(origin_ptr + row, mask=o_m < queries, other=0.0)
    b_factor = b_origin
    if FACTOR:
        b_factor = tl.load(factor_ptr + row, mask=o_m < queries, other=0.0)
    p_q = q_ptr + (i_b * stride_q_b + i_h * stride_q_h + q_first * stride_q_t) * ALIGN
    p_k = k_ptr + (i_b * stride_k_b + i_h // group * stride_k_h + k_first * stride_k_t) * ALIGN
    p_v = v_ptr + (i_b * stride_v_b + i_h // group * stride_v_h + k_first * stride_v_t) * ALIGN
    p_bias = bias_ptr
    if BIAS:
        p_bias += i_b * stride_bias_b + i_h * stride_bias_h + k_first * stride_bias_s
    b_q1, b_q2 = load_head(p_q, stride_q_t * ALIGN, queries, K, D1, D2, BM, False)
    b_dq1, b_dq2 = zeros(D1, D2, BM)
    for start in range(0, keys, BN):
        count = keys - start
        b_k1, b_k2 = load_head(p_k, stride_k_t * ALIGN, count, K, D1, D2, BN, EVEN)
        b_v1, b_v2 = load_head(p_v, stride_v_t * ALIGN, count, K, D1, D2, BN, EVEN)
        b_s = products(b_q1, b_q2, b_k1, b_k2, BM, BN, D2, UPCAST)
        if SCALED:
            b_s = b_s * c
        if BIAS:
            b_s += load_bias(p_bias, stride_bias_s, count, BN)[None, :]
        if not EVEN:
            b_s = tl.where((tl.arange(0, BN) < count)[None, :], b_s, float("-inf"))
        b_p = weights(b_s, b_origin[:, None], b_factor[:, None], c, SCALED, FACTOR)
        b_dp = products(b_do1, b_do2, b_v1, b_v2, BM, BN, D2, UPCAST)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq1, b_dq2 = add_weighted(b_dq1, b_dq2, b_ds, b_k1, b_k2, D2, UPCAST)
        p_k += BN * stride_k_t * ALIGN
        p_v += BN * stride_v_t * ALIGN
        if BIAS:
            p_bias += BN * stride_bias_s
    p_dq = dq_ptr + (i_b * stride_dq_b + i_h * stride_dq_h + q_first * stride_dq_t) * ALIGN
    store_head(p_dq, stride_dq_t * ALIGN, queries, b_dq1 * scale, b_dq2 * scale, K, D1, D2, BM, UPCAST)


@triton.jit
def _attention_dkv_kernel(
    # Tensors
    q_ptr, k_ptr, v_ptr, dout_ptr, dk_ptr, dv_ptr, dbias_ptr, origin_ptr, factor_ptr, delta_ptr,
    bias_ptr, lengths_ptr, cu_q_ptr, cu_k_ptr,
    # Strides as above
    stride_q_b, stride_q_h, stride_q_t, stride_k_b, stride_k_h, stride_k_t, stride_v_b, stride_v_h, stride_v_t,
    stride_dout_b, stride_dout_h, stride_dout_t, stride_dk_b, stride_dk_h, stride_dk_t, stride_dv_b, stride_dv_h, stride_dv_t,
    stride_bias_b, stride_bias_h, stride_bias_s, stride_dbias_b, stride_dbias_h, stride_stats_b, stride_stats_h,
    # Scalars
    T, S, H_kv, group, blocks, c, scale,
    # Constexprs
    K: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr,
    EVEN: tl.constexpr, SCALED: tl.constexpr, BIAS: tl.constexpr, BIAS_GRAD: tl.constexpr, LENGTHS: tl.constexpr,
    PACKED: tl.constexpr, FACTOR: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradients of BN keys and values: over the queries of every head that looks at them, one head after the other.

    Scores stand transposed, keys down, so that the weights are left factors as they come.
    """
    i = tl.program_id(0)
    i_n = (i % blocks) * BN
    i_h = (i // blocks % H_kv).to(tl.int64)
    i_b = (i // blocks // H_kv).to(tl.int64)
    k_first, S = sequence(cu_k_ptr, i_b, S, PACKED)
    if i_n >= S:
        return
    q_first, T = sequence(cu_q_ptr, i_b, T, PACKED)
    count = counted(lengths_ptr, i_b, S, LENGTHS) - i_n  # keys of this block that count: below one where none does
    queries = T if count > 0 else 0
    k_first += i_n
    p_k = k_ptr + (i_b * stride_k_b + i_h * stride_k_h + k_first * stride_k_t) * ALIGN
    p_v = v_ptr + (i_b * stride_v_b + i_h * stride_v_h + k_first * stride_v_t) * ALIGN
    b_k1, b_k2 = load_head(p_k, stride_k_t * ALIGN, count, K, D1, D2, BN, False)
    b_v1, b_v2 = load_head(p_v, stride_v_t * ALIGN, count, K, D1, D2, BN, False)
    b_dk1, b_dk2 = zeros(D1, D2, BN)
    b_dv1, b_dv2 = zeros(D1, D2, BN)
    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    for g in range(group):
        head = i_h * group + g
        if BIAS:
            p_bias = bias_ptr + i_b * stride_bias_b + head * stride_bias_h + k_first * stride_bias_s
            b_bias = load_bias(p_bias, stride_bias_s, count, BN)
        b_dbias = tl.zeros([BN], tl.float32)
        p_q = q_ptr + (i_b * stride_q_b + head * stride_q_h + q_first * stride_q_t) * ALIGN
        p_dout = dout_ptr + (i_b * stride_dout_b + head * stride_dout_h + q_first * stride_dout_t) * ALIGN
        row = i_b * stride_stats_b + head * stride_stats_h + q_first
        for start in range(0, queries, BM):
            left = queries - start
            b_q1, b_q2 = load_head(p_q, stride_q_t * ALIGN, left, K, D1, D2, BM, EVEN)
            b_do1, b_do2 = load_head(p_dout, stride_dout_t * ALIGN, left, K, D1, D2, BM, EVEN)
            o_row = row + start + o_m
            # From an origin of infinity the weights of rows that do not exist are zero.
            if EVEN:
                b_origin = tl.load(origin_ptr + o_row)
                b_delta = tl.load(delta_ptr + o_row)
            else:
                b_origin = tl.load(origin_ptr + o_row, mask=o_m < left, other=float("inf"))
                b_delta = tl.load(delta_ptr + o_row, mask=o_m < left, other=0.0)
            b_factor = b_origin
            if FACTOR:
                b_factor = tl.load(factor_ptr + o_row, mask=o_m < left, other=0.0)
            b_s = products(b_k1, b_k2, b_q1, b_q2, BN, BM, D2, UPCAST)
            if SCALED:
                b_s = b_s * c
            if BIAS:
                b_s += b_bias[:, None]
            b_p = weights(b_s, b_origin[None, :], b_factor[None, :], c, SCALED, FACTOR)
            b_dv1, b_dv2 = add_weighted(b_dv1, b_dv2, b_p, b_do1, b_do2, D2, UPCAST)
            b_dp = products(b_v1, b_v2, b_do1, b_do2, BN, BM, D2, UPCAST)
            b_ds = b_p * (b_dp - b_delta[None, :])
            if BIAS_GRAD:
                b_dbias += tl.sum(b_ds, 1)
            b_dk1, b_dk2 = add_weighted(b_dk1, b_dk2, b_ds, b_q1, b_q2, D2, UPCAST)
            p_q += BM * stride_q_t * ALIGN
            p_dout += BM * stride_dout_t * ALIGN
        if BIAS_GRAD:
            p_dbias = dbias_ptr + i_b * stride_dbias_b + head * stride_dbias_h + k_first + o_n
            tl.store(p_dbias, tl.where(o_n < count, b_dbias, 0.0), mask=o_n < S - i_n)
    # Keys beyond the length were zeros to the products, which gave them weights: their gradients are zero.
    m = (o_n < count)[:, None]
    p_dk = dk_ptr + (i_b * stride_dk_b + i_h * stride_dk_h + k_first * stride_dk_t) * ALIGN
    p_dv = dv_ptr + (i_b * stride_dv_b + i_h * stride_dv_h + k_first * stride_dv_t) * ALIGN
    b_dk1 = tl.where(m, b_dk1 * scale, 0.0)
    b_dk2 = tl.where(m, b_dk2 * scale, 0.0)
    b_dv1 = tl.where(m, b_dv1, 0.0)
    b_dv2 = tl.where(m, b_dv2, 0.0)
    store_head(p_dk, stride_dk_t * ALIGN, S - i_n, b_dk1, b_dk2, K, D1, D2, BN, UPCAST)
    store_head(p_dv, stride_dv_t * ALIGN, S - i_n, b_dv1, b_dv2, K, D1, D2, BN, UPCAST)


def _dense(t: Tensor) -> Tensor:
    """Rows with stride 1, which lie near enough to each other for 32-bit offsets inside a tile."""
    near = abs(t.stride(2)) < 2**24
    return t if (t.size(-1) <= 1 or t.stride(-1) == 1) and near else t.contiguous()


def _architecture() -> int:
    """Compute capability of the device in use, times ten."""
    return INTERPRETER if interpreting() else int(driver.active.get_current_target().arch)


class _Call:
    """What the three kernels of a call are launched with."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        views: list[Tensor],
        key_bias: Tensor | None,
        lengths: Tensor | None,
        cu: tuple[Tensor, Tensor] | None,
        scale: float,
    ) -> None:
        B, H, T, K = q.shape
        self.T, self.S, self.H, self.H_kv = T, k.shape[2], H, k.shape[1]
        self.K, self.size = K, q.element_size()
        self.group = H // self.H_kv if self.H_kv else 1
        self.samples = B if cu is None else cu[0].shape[0] - 1
        self.cu = (q, q) if cu is None else cu
        self.lengths = q if lengths is None else lengths
        self.bias = q if key_bias is None else key_bias
        self.scale, self.c = scale, scale * LOG2E.value
        aligned = K % 8 == 0 and all(s % 8 == 0 for t in views for s in t.stride()[:3])
        self.align = 8 if aligned else 1
        # A factor that is not positive turns the order of scores around, and one of zero, which a tiny one is in float32, makes
        # NaN of a masked score: then, and to add a bias, scores are scaled before the softmax; else inside it.
        D1, D2 = columns(K)
        self.constants: dict[str, Any] = {
            "K": K, "D1": D1, "D2": D2, "ALIGN": self.align, "SCALED": self.c < _LEAST_NORMAL or key_bias is not None,
            "BIAS": key_bias is not None, "LENGTHS": lengths is not None, "PACKED": cu is not None,
            "FACTOR": q.dtype == torch.float32, "UPCAST": interpreting() and q.dtype == torch.bfloat16,
        }  # fmt: skip
        self.bias_strides = (0, 0, 0) if key_bias is None else self._by_sample(key_bias.stride())
        self.ragged = lengths is not None or cu is not None

    def _by_sample(self, strides: tuple[int, ...]) -> tuple[int, ...]:
        """The samples of a packed batch begin where their rows do."""
        return (0, *strides[1:]) if self.constants["PACKED"] else strides

    def _view(self, t: Tensor) -> tuple[int, ...]:
        return tuple(s // self.align for s in self._by_sample(t.stride()[:3]))

    def launch(
        self, kernel: str, rows: int, heads: int, tensors: list[Tensor], views: list[Tensor], **more: Any
    ) -> None:
        """One program a block of ``rows`` of each of ``heads`` heads."""
        BM, BN, warps, stages = tile(kernel, self.K, self.size, _architecture())
        blocks = triton.cdiv(rows, BN if kernel == "dkv" else BM)
        grid = self.samples * heads * blocks
        if not grid:
            return
        function = {"fwd": _attention_fwd_kernel, "dq": _attention_dq_kernel, "dkv": _attention_dkv_kernel}[kernel]
        even = not self.ragged and (self.T % BM if kernel == "dkv" else self.S % BN) == 0
        extra = self._by_sample((self.H * self.S, self.S)) if kernel == "dkv" else ()
        scalars = [self.c] if kernel == "fwd" else [self.c, self.scale]
        function[(grid,)](
            *tensors, self.bias, self.lengths, *self.cu, *(s for t in views for s in self._view(t)),
            *self.bias_strides, *extra, *self._by_sample((self.H * self.T, self.T)),
            self.T, self.S, heads, self.group, blocks, *scalars,
            BM=BM, BN=BN, EVEN=even, **self.constants, **more, num_warps=warps, num_stages=stages,
        )  # fmt: skip


def _forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, key_bias: Tensor | None, lengths: Tensor | None,
    cu: tuple[Tensor, Tensor] | None, max_q: int, scale: float, save_stats: bool,
) -> Tensor:  # fmt: skip
    """Fills ``out``; the statistics."""
    q, k, v = _dense(q), _dense(k), _dense(v)
    B, H, T, _ = q.shape
    make = torch.empty if cu is None else torch.zeros
    stats = make((2, B, H, T) if save_stats else (0,), dtype=torch.float32, device=q.device)
    origin, factor = (stats[0], stats[1]) if save_stats else (stats, stats)
    call = _Call(q, k, [q, k, v, out], key_bias, lengths, cu, scale)
    call.launch("fwd", T if cu is None else max_q, H, [q, k, v, out, origin, factor], [q, k, v, out], SAVE=save_stats)
    return stats


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, grads: tuple[Tensor, Tensor, Tensor], stats: Tensor,
    key_bias: Tensor | None, lengths: Tensor | None, cu: tuple[Tensor, Tensor] | None, max_q: int, max_k: int,
    scale: float, bias_grad: bool,
) -> Tensor:  # fmt: skip
    """Fills the gradients of q, k and v; that of the biases."""
    dout, q, k, v, out = (_dense(t) for t in (dout, q, k, v, out))
    dq, dk, dv = grads
    B, H, T, _ = q.shape
    S, H_kv = k.shape[2], k.shape[1]
    make = torch.empty if cu is None else torch.zeros
    dbias = make((B, H, S) if bias_grad else (0,), dtype=torch.float32, device=q.device)
    delta = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    call = _Call(q, k, [q, k, v, out, dout, *grads], key_bias, lengths, cu, scale)
    if cu is not None:
        max_q, max_k = min(max_q, T), min(max_k, S)
    call.launch(
        "dq", T if cu is None else max_q, H, [q, k, v, out, dout, dq, stats[0], stats[1], delta],
        [q, k, v, out, dout, dq],
    )  # fmt: skip
    call.launch(
        "dkv", S if cu is None else max_k, H_kv, [q, k, v, dout, dk, dv, dbias, stats[0], stats[1], delta],
        [q, k, v, dout, dk, dv], BIAS_GRAD=bias_grad,
    )  # fmt: skip
    return dbias


def _cu(cu_q: Tensor | None, cu_k: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if cu_q is None or cu_k is None else (cu_q, cu_k)


def _heads(t: Tensor, packed: bool) -> Tensor:
    """Rows of packed batches that belong to no sequence are written by no program: they are zero from the start."""
    heads = heads_like(t)
    return heads.zero_() if packed else heads


def _parts(qkv: Tensor) -> tuple[Tensor, ...]:
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, lengths: Tensor | None, cu_q: Tensor | None,
    cu_k: Tensor | None, max_q: int, max_k: int, scale: float, save_stats: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``ditscale_triton::attention_fwd``."""
    out = _heads(q, cu_q is not None)
    return out, _forward(q, k, v, out, key_bias, lengths, _cu(cu_q, cu_k), max_q, scale, save_stats)


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, key_bias: Tensor | None,
    lengths: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int, scale: float, bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``ditscale_triton::attention_bwd``."""
    packed = cu_q is not None
    grads = _heads(q, packed), _heads(k, packed), _heads(v, packed)
    dbias = _backward(
        dout, q, k, v, out, grads, stats, key_bias, lengths, _cu(cu_q, cu_k), max_q, max_k, scale, bias_grad
    )
    return *grads, dbias


def attention_qkv_fwd(
    qkv: Tensor, key_bias: Tensor | None, lengths: Tensor | None, cu: Tensor | None, max_seqlen: int, scale: float,
    save_stats: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``ditscale_triton::attention_qkv_fwd``."""
    q, k, v = _parts(qkv)
    out, stats = attention_fwd(q, k, v, key_bias, lengths, cu, cu, max_seqlen, max_seqlen, scale, save_stats)
    return out.transpose(1, 2).flatten(2), stats


def attention_qkv_bwd(
    dout: Tensor, qkv: Tensor, out: Tensor, stats: Tensor, key_bias: Tensor | None, lengths: Tensor | None,
    cu: Tensor | None, max_seqlen: int, scale: float, bias_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``ditscale_triton::attention_qkv_bwd``."""
    B, T, _, H, K = qkv.shape
    make = torch.empty if cu is None else torch.zeros  # as in _heads
    dqkv = make((B, T, 3, H, K), dtype=qkv.dtype, device=qkv.device)
    q, k, v = _parts(qkv)
    dq, dk, dv = _parts(dqkv)
    dout, out = (t.contiguous().view(B, T, H, K).transpose(1, 2) for t in (dout, out))
    dbias = _backward(
        dout,
        q,
        k,
        v,
        out,
        (dq, dk, dv),
        stats,
        key_bias,
        lengths,
        _cu(cu, cu),
        max_seqlen,
        max_seqlen,
        scale,
        bias_grad,
    )
    return dqkv, dbias


define(
    "ditscale_triton",
    shapes.OPERATORS,
    {
        "attention_fwd": attention_fwd,
        "attention_bwd": attention_bwd,
        "attention_qkv_fwd": attention_qkv_fwd,
        "attention_qkv_bwd": attention_qkv_bwd,
    },
    "CPU" if interpreting() else "CUDA",
)
