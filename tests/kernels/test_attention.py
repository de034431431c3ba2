"""Outputs and gradients of attention against float64, by the twice-PyTorch rule, on every backend and instruction set."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch
from attention_cases import AttentionCall, check, make
from cases import DTYPES, NAME

from ditscale import kernels
from ditscale.kernels.attn import cost

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=NAME.get)

# (B, H, T, K) and why it is here.
SHAPES = {
    "one-of-each": (1, 1, 1, 1),  # weight 1: the gradients of scores cancel
    "demo": (4, 3, 64, 8),  # one block of queries and keys; half a vector of 16
    "head-16": (2, 2, 64, 16),
    "head-24": (2, 2, 70, 24),  # a vector and a half; a second block of 6
    "small-model": (2, 2, 64, 32),
    "dit-s": (1, 2, 129, 64),  # three blocks, the last of a single query and key
    "dit-xl": (1, 2, 65, 72),
    "head-80": (1, 1, 48, 80),
    "head-96": (1, 1, 33, 96),
    "head-128": (1, 1, 100, 128),
    "odd": (2, 3, 13, 7),  # nothing aligned: widths are padded
    "prime-blocks": (1, 2, 257, 20),
}


@dtypes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_values_and_gradients(backend, shape, dtype):
    check([make(*shape, dtype) for _ in range(2 if shape[2] > 16 else 8)], backend)


def test_thousands_of_queries_and_keys(native):
    # Both long at once, a prime past a power of two: every block loop ends in the middle of a block, and pieces are summed.
    check([make(1, 1, 4097, 8), make(1, 1, 4097, 8, lengths=[0])], "cpu")


@dtypes
@pytest.mark.parametrize("T,S", [(1, 70), (70, 1), (33, 200), (200, 33), (4097, 67), (67, 4097)])
def test_cross_attention(backend, T, S, dtype):
    # The errors of a row have its softmax's in common: with a few rows the largest is a matter of luck.
    B, H, draws = (1, 1, 1) if T * S > 100_000 else (2, 2, 24 if T == 1 else 3)
    check([make(B, H, T, 24, dtype, S=S) for _ in range(draws)], backend)


@pytest.mark.parametrize("H,H_kv,T", [(4, 2, 40), (3, 1, 150), (8, 1, 70)])
def test_grouped_queries(backend, H, H_kv, T):
    # (8, 1, 70) has 16 blocks of queries for one head of keys: its sums are made in pieces.
    check([make(1, H, T, 16, H_kv=H_kv)], backend)


@dtypes
def test_lengths(backend, dtype):
    # None, one, part of a block, exactly a block, more than one block, all.
    check([make(6, 2, 70, 24, dtype, lengths=[0, 1, 33, 64, 66, 70]) for _ in range(2)], backend)


@dtypes
@pytest.mark.parametrize("key_bias", ["shared", "sample", "head", "mask"])
def test_key_bias(backend, key_bias, dtype):
    check([make(2, 4, 40, 16, dtype, S=70, H_kv=2, key_bias=key_bias) for _ in range(4)], backend)


def test_key_bias_of_any_stride(backend):
    call = make(2, 4, 40, 16, S=70, H_kv=2, key_bias="head")
    want = call.run(backend)
    call.key_bias = torch.stack([call.key_bias, torch.full_like(call.key_bias, 9.0)], -1)[..., 0]
    for name, value in call.run(backend).items():
        assert torch.equal(value, want[name]), name


def test_key_bias_beside_lengths(backend):
    check([make(3, 2, 40, 16, S=70, lengths=[0, 33, 70], key_bias="sample") for _ in range(2)], backend)


def test_key_bias_of_many_blocks(backend):
    # Sixteen blocks of queries for one head of keys: the bias's gradient is added over pieces, too.
    check([make(1, 8, 70, 16, H_kv=1, key_bias="head") for _ in range(2)], backend)


def test_keys_masked_in_front(backend):
    # Whole tiles without a weight before the first key that counts, and a sample without any.
    call = make(3, 2, 40, 16, S=200, key_bias="sample")
    call.key_bias[0, ..., :130] = -torch.inf
    check([call], backend)
    call.key_bias[1] = -torch.inf
    got = call.run(backend)
    for name in ("out", "dq", "dk", "dv"):
        assert got[name].isfinite().all() and not got[name][1].any(), name


@dtypes
def test_packed_sequences(backend, dtype):
    # Empty ones, of one token, of a block exactly, of more than a block; a rest that belongs to none.
    ends = [0, 0, 1, 65, 140, 150]
    check([make(1, 4, 153, 16, dtype, H_kv=2, cu=(ends, ends)) for _ in range(2)], backend)


def test_packed_sequences_across(backend):
    # Queries without keys, keys without queries.
    check([make(1, 2, 150, 16, S=90, cu=([0, 70, 71, 71, 140], [0, 0, 30, 60, 88]), key_bias="head")], backend)


def test_sums_made_in_pieces(backend):
    # Four heads, 1,030 queries: the backward pass is cut into four pieces a head, whose sums are added in their order.
    check([make(1, 4, 1030, 8)], backend)


def test_nearly_equal_weights(backend):
    check([make(2, 2, 70, 24, size=1e-3) for _ in range(4)], backend)


@pytest.mark.parametrize("size", [5.0, 30.0])
def test_peaked_weights(backend, size):
    # Scores of thousands, exponents far below the smallest number. Here the error is that of the few rows whose two largest
    # scores nearly tie, a matter of luck for PyTorch too: so it is held against what one rounding of the largest score does.
    call = make(2, 2, 70, 24, size=size)
    got, exact = call.run(backend), call.oracle()
    score = float((call.q @ call.k.transpose(-1, -2)).abs().max()) * 24**-0.5
    rounding = 2 * torch.finfo(torch.float32).eps * score
    for name, seen in (("out", call.v), ("dv", call.dout)):
        error = float((got[name].detach().double() - torch.from_numpy(exact[name])).abs().max())
        assert error <= rounding * float(seen.abs().max()), name
    for name in ("dq", "dk"):
        assert got[name].isfinite().all(), name


def test_negative_and_zero_scale(backend):
    for scale in (-0.7, 0.0):
        calls = [make(2, 2, 70, 16) for _ in range(6)]
        for call in calls:
            call.scale = scale
        check(calls, backend)


# Every width that a CUDA kernel is compiled for, by a head that takes it (float32 has none for 72), and how many products of
# the instruction make one. Whole blocks, three or more tiles in every walk: a buffer is filled again while warps work.
COMPILED = [(torch.bfloat16, K, K, 1) for K in (64, 72, 80, 96, 128)]
COMPILED += [(torch.float16, 72, 72, 1), (torch.float32, 72, 80, 3), (torch.float32, 128, 128, 3)]


@pytest.mark.parametrize("dtype,K,columns,products", COMPILED, ids=lambda value: NAME.get(value, value))
def test_cuda_kernels_neither_race_nor_wait_for_banks_nor_multiply_padding(
    emulated_operators, shim_counts, dtype, K, columns, products
):
    T, S = (64, 96) if dtype == torch.float32 else (96, 192)
    q, k, v = (torch.randn(1, n, 1, K).to(dtype).transpose(1, 2) for n in (T, S, S))
    options = (None, None, None, None, T, S, K**-0.5)
    results = []
    for backwards in (False, True):
        shim_counts(backwards)
        out, stats = emulated_operators.attention_fwd(q, k, v, *options, True)
        forward = shim_counts(backwards)
        grads = emulated_operators.attention_bwd(out, q, k, v, out, stats, *options, False)
        backward = shim_counts()
        assert forward[:3] == backward[:3] == [0, 0, 0]
        assert 2 * forward[3] == products * cost.attention_flops_forward(1, 1, T, S, columns)
        assert 2 * backward[3] == products * cost.attention_flops_backward_two_passes(1, 1, T, S, columns)
        results.append((out, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def restride(t: torch.Tensor, how: int) -> torch.Tensor:
    """The same values under other strides: inside NaN, other orders of memory, a broken last dimension, expanded."""
    if how == 0:
        room = torch.full((*t.shape[:-1], t.shape[-1] + 3), float("nan"), dtype=t.dtype)
        room[..., 1 : 1 + t.shape[-1]] = t
        return room[..., 1 : 1 + t.shape[-1]]
    if how == 1:
        return t.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    if how == 2:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == 3:
        return t[:1].expand(t.shape)
    if how == 4:
        return t.contiguous()
    return t


@pytest.mark.parametrize("seed", range(40))
def test_random_calls(backend, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    B, T, S = rng.randint(1, 3), rng.choice([1, 2, 7, 16, 31, 63, 64, 65, 130]), rng.choice([None, 1, 5, 64, 97])
    H_kv = rng.randint(1, 2)
    H = H_kv * rng.choice([1, 1, 2])
    K = rng.choice([1, 2, 5, 8, 15, 16, 17, 24, 40, 64, 72])
    keys = T if S is None else S
    lengths = [rng.randint(0, keys) for _ in range(B)] if rng.random() < 0.4 else None
    dtype = rng.choice(DTYPES)
    size = 10 ** rng.uniform(-2, 0.15)  # scores of deviation 2 at most: see test_peaked_weights
    how = [rng.randint(0, 6) for _ in range(4)]
    calls = []
    for _ in range(max(4, 96 // (B * H * T))):  # of a few rows the largest error is a matter of luck
        call = make(B, H, T, K, dtype, S=S, H_kv=H_kv, size=size, lengths=lengths)
        parts = [restride(t, h) for t, h in zip((call.q, call.k, call.v, call.dout), how, strict=True)]
        calls.append(AttentionCall(*parts, call.lengths, call.scale))
    check(calls, backend)


@dtypes
@pytest.mark.parametrize("shape", [(2, 64, 3, 8), (1, 70, 2, 13)], ids=["demo", "odd"])
def test_packed_is_the_same_to_the_bit(backend, shape, dtype):
    B, T, H, K = shape
    packed = torch.randn(B, T, 3, H, K).to(dtype).requires_grad_()
    lengths = torch.tensor([T // 2] * B)
    out = kernels.attention_qkv(packed, lengths=lengths, backend=backend)
    dout = torch.randn(B, T, H * K).to(dtype)
    (got,) = torch.autograd.grad(out, packed, dout)
    parts = [t.detach().requires_grad_() for t in packed.permute(2, 0, 3, 1, 4)]
    apart = kernels.attention(*parts, lengths=lengths, backend=backend)
    assert torch.equal(out, apart.transpose(1, 2).flatten(2))
    want = torch.autograd.grad(apart, parts, dout.view(B, T, H, K).transpose(1, 2))
    assert torch.equal(got, torch.stack(want).permute(1, 3, 0, 2, 4))


def test_lesser_instruction_sets(lesser_isa):
    chosen = ("dit-xl and fp32", "demo and fp32", "odd", "head-24 and bf16", "lengths and fp16", "peaked")
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", __file__]
    select = " or ".join(f"({c})" for c in chosen)
    done = subprocess.run(
        [*command, "-k", f"cpu and ({select})"],
        env={**os.environ, "DITSCALE_CPU_ISA": lesser_isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
