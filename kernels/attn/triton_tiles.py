"""Parts of the attention kernels: tiles of a head, their products, and what a sample's sequence and biases are.

The grammar is that of triton_kernels.py. A head of width K is read as D1 + D2 columns, both powers of two: 72 is 64 + 16, so
that its products cost those of 80 columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(
    ptr, stride, count, K: tl.constexpr, FIRST: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, EVEN: tl.constexpr
):
    """Columns FIRST to FIRST + BD of BR rows; zeros beyond column K and, unless EVEN, from row ``count`` on."""
    o_r = tl.arange(0, BR)
    o_d = FIRST + tl.arange(0, BD)
    p = ptr + o_r[:, None] * stride + o_d[None, :]
    if FIRST + BD > K:
        m = (o_d < K)[None, :]
        if not EVEN:
            m = m & (o_r < count)[:, None]
        return tl.load(p, mask=m, other=0.0)
    elif EVEN:
        return tl.load(p)
    else:
        return tl.load(p, mask=(o_r < count)[:, None], other=0.0)


@triton.jit
def load_head(
    ptr, stride, count, K: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BR: tl.constexpr, EVEN: tl.constexpr
):
    """BR rows of a head, as its first D1 columns and the other D2; without those, the first twice."""
    b_1 = load_rows(ptr, stride, count, K, 0, D1, BR, EVEN)
    if D2 > 0:
        return b_1, load_rows(ptr, stride, count, K, D1, D2, BR, EVEN)
    else:
        return b_1, b_1


@triton.jit
def zeros(D1: tl.constexpr, D2: tl.constexpr, BR: tl.constexpr):
    return tl.zeros([BR, D1], tl.float32), tl.zeros([BR, D2 if D2 > 0 else 1], tl.float32)


@triton.jit
def rounded(b, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """float32 as ``dtype``, to the nearest. UPCAST (the interpreter, which cuts bfloat16 off): rounded in its bits."""
    if UPCAST:
        bits = b.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        b = bits.to(tl.float32, bitcast=True)
    return b.to(dtype)


@triton.jit
def store_rows(
    ptr, stride, count, b,
    K: tl.constexpr, FIRST: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    o_r = tl.arange(0, BR)
    o_d = FIRST + tl.arange(0, BD)
    m = (o_r < count)[:, None] & (o_d < K)[None, :]
    tl.store(ptr + o_r[:, None] * stride + o_d[None, :], rounded(b, ptr.dtype.element_ty, UPCAST), mask=m)


@triton.jit
def store_head(
    ptr, stride, count, b_1, b_2,
    K: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BR: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    store_rows(ptr, stride, count, b_1, K, 0, D1, BR, UPCAST)
    if D2 > 0:
        store_rows(ptr, stride, count, b_2, K, D1, D2, BR, UPCAST)


@triton.jit
def dot(a, b, acc, UPCAST: tl.constexpr):
    """acc + a b in float32. UPCAST: the interpreter's product of bfloat16 is wrong, that of the same numbers in float32 right."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def products(a_1, a_2, b_1, b_2, RA: tl.constexpr, RB: tl.constexpr, D2: tl.constexpr, UPCAST: tl.constexpr):
    """Products of RA rows with RB rows, [RA, RB]."""
    b = dot(a_1, b_1.T, tl.zeros([RA, RB], tl.float32), UPCAST)
    if D2 > 0:
        b = dot(a_2, b_2.T, b, UPCAST)
    return b


@triton.jit
def add_weighted(acc_1, acc_2, b_w, b_1, b_2, D2: tl.constexpr, UPCAST: tl.constexpr):
    """Adds the rows ``b`` weighted by ``b_w``, rounded to the rows' type."""
    b_w = rounded(b_w, b_1.dtype, UPCAST)
    acc_1 = dot(b_w, b_1, acc_1, UPCAST)
    if D2 > 0:
        acc_2 = dot(b_w, b_2, acc_2, UPCAST)
    return acc_1, acc_2


@triton.jit
def sequence(cu_ptr, i_b, rows, PACKED: tl.constexpr):
    """First row and number of rows of a sample: all of its own, or its part of a packed batch."""
    if PACKED:
        first = tl.minimum(tl.maximum(tl.load(cu_ptr + i_b), 0), rows)
        last = tl.minimum(tl.maximum(tl.load(cu_ptr + i_b + 1), first), rows)
        return first.to(tl.int64), last - first
    else:
        return i_b * 0, rows


@triton.jit
def counted(lengths_ptr, i_b, rows, LENGTHS: tl.constexpr):
    """How many keys of a sample count."""
    if LENGTHS:
        return tl.minimum(tl.maximum(tl.load(lengths_ptr + i_b), 0), rows)
    else:
        return rows


@triton.jit
def load_bias(ptr, stride, count, BN: tl.constexpr):
    o_n = tl.arange(0, BN)
    return tl.load(ptr + o_n * stride, mask=o_n < count, other=0.0) * LOG2E


@triton.jit
def weights(b_s, b_origin, b_factor, c, SCALED: tl.constexpr, FACTOR: tl.constexpr):
    """Weights from scores and statistics, which are broadcast to them."""
    if SCALED:
        b_p = tl.exp2(b_s - b_origin)
    else:
        b_p = tl.exp2(b_s * c - b_origin)
    if FACTOR:
        b_p = b_p * b_factor
    return b_p
