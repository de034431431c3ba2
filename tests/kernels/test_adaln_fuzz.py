"""Random shapes, strides, dtypes and sizes of input, by the twice-PyTorch rule: what no list of cases thought of."""

from __future__ import annotations

import random

import pytest
import torch
from cases import DTYPES, check_all, make
from torch import Tensor

COUNT = 60
WIDE = (384, 1025, 1152, 1536, 3072)  # the widths of models, and one that no vector divides


def restride(t: Tensor, how: int) -> Tensor:
    """The same values under other strides: padded rows, swapped leading dimensions, a broken last dimension, expanded."""
    B, T, D = t.shape
    if how == 0:
        wide = torch.full((B, T, D + 5), float("nan"), dtype=t.dtype)
        wide[..., 3 : 3 + D] = t
        return wide[..., 3 : 3 + D]
    if how == 1:
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if how == 2:
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if how == 3:
        return t[:1].expand(B, T, D)
    return t


@pytest.mark.parametrize("seed", range(COUNT))
def test_random_calls(request, backend, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    if ("triton" in request.node.name or "emulated" in request.node.name) and seed >= COUNT // 4:
        pytest.skip("interpreted backends run a quarter of the seeds")
    shape = (
        rng.randint(1, 5),
        rng.choice([1, 2, 5, 16, 33, 64, 97]),
        rng.choice([1, 2, 7, 8, 16, 31, 72, 96, 129, 250]),
    )
    if seed % 3 == 2:  # of wide rows a few: every width on every backend, and quick
        shape = (rng.randint(1, 2), rng.choice([1, 3, 5, 9]), WIDE[seed // 3 % len(WIDE)])
    if "triton" in request.node.name:  # its interpreter runs program after program
        shape = (min(shape[0], 2), min(shape[1], 33), shape[2])
    if "emulated" in request.node.name:  # thread after thread
        shape = (min(shape[0], 3), shape[1], shape[2])
    dtype = rng.choice(DTYPES)
    size = 10 ** rng.uniform(-4, 4)
    if dtype == torch.float16:
        size = min(size, 1e3)  # float16 ends at 65504: squares are float32, but x + gate * branch must be stored
    how = {
        "fused": rng.random() < 0.6,
        "mode": rng.choice(["per_sample", "per_sample", "shared", "per_token"]),
        "rms": rng.random() < 0.3,
        "stream_gradient": rng.random() < 0.7,
    }
    strides = [rng.randint(0, 5) for _ in range(4)]
    flat = rng.random() < 0.3
    calls = []
    for _ in range(8 if shape[2] < 16 else 2):  # few numbers, many draws: see judge_draws
        call = make(shape, dtype, size=size, **how)
        if flat:
            call.x[:, 0] = size  # a row without variance
            if call.branch is not None:
                call.branch[:, 0] = 0
        for name, stride in zip(("x", "branch", "dy", "dx_new"), strides, strict=True):
            if getattr(call, name) is not None:
                setattr(call, name, restride(getattr(call, name), stride))
        calls.append(call)
    check_all(calls, backend)


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_constant_rows_are_the_shift(backend, size):
    # 0.1 is no binary fraction: a sloppy mean leaves 1e-8, which the reciprocal of sqrt(eps) makes 1e-5.
    call = make((2, 9, 67), fused=False, fill=lambda t: torch.full_like(t, 0.1 * size))
    y = call.run(backend)["y"]
    torch.testing.assert_close(y, call.shift.unsqueeze(1).expand_as(y), rtol=0, atol=2e-7 * max(1.0, size * 1e-2))


def test_rows_far_from_zero(backend):
    # Mean 1e4, deviation 1: E[x^2] - mean^2 in float32 has no digit left.
    make((2, 9, 384), fused=False, fill=lambda t: t + 1e4).check(backend)
