"""Outputs and gradients of the adaLN family against float64, on every backend, by the twice-PyTorch rule."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, FEW, NAME, SHAPES, make, modulation
from oracles import gate_residual, judge, wide

from ditscale import kernels
from ditscale.kernels.adaln import op

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=NAME.get)
fusion = pytest.mark.parametrize("fused", [False, True], ids=["norm", "residual+norm"])
few_shapes = pytest.mark.parametrize("shape", [SHAPES[k] for k in FEW], ids=FEW)


@dtypes
@fusion
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_values_and_gradients(backend, shape, fused, dtype):
    make(shape, dtype, fused=fused).check(backend)


@pytest.mark.parametrize("mode", ["shared", "per_token"])
@dtypes
@fusion
@few_shapes
def test_shared_and_per_token_modulation(backend, shape, fused, dtype, mode):
    make(shape, dtype, fused=fused, mode=mode).check(backend)


@dtypes
@fusion
@few_shapes
def test_rms_norm(backend, shape, fused, dtype):
    make(shape, dtype, fused=fused, rms=True).check(backend)


@fusion
@few_shapes
@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
def test_affine_weight_and_bias(backend, shape, fused, rms):
    make(shape, fused=fused, affine=True, rms=rms).check(backend)


@fusion
@pytest.mark.parametrize(
    ("dtype", "D"),
    [(torch.float32, 16384), (torch.bfloat16, 16384), (torch.float16, 3072), (torch.float32, 4099)],
    ids=["fp32-16384", "bf16-16384", "fp16-3072", "fp32-4099"],
)
def test_wide_rows(backend, fused, dtype, D):
    # The widest that is promised, a model's, and one that no vector divides.
    make((1, 3, D), dtype, fused=fused).check(backend)


def test_a_wide_row_that_begins_unlike_its_rest(backend):
    def begun(x):  # a deviation about the first numbers has few digits of the variance
        return (1 + 1e-3 * x).index_fill(-1, torch.arange(16), 0.0)

    make((1, 3, 4096), fused=False, fill=begun).check(backend)


@pytest.mark.native
@pytest.mark.parametrize("mode", ["shared", "per_sample"])
def test_sums_over_many_tokens_are_as_exact_as_pytorchs(native, mode):
    # Tens of thousands of rows added to one float32 each in turn lost four times as much.
    make((1, 70_000, 16), mode=mode).check("cpu")


@pytest.mark.native
def test_a_last_row_that_is_a_sum_of_its_own(native):
    make((1, 65, 16), torch.bfloat16).check("cpu")  # one chunk, of which 64 rows are added one by one


@pytest.mark.native
def test_gated_sums_over_many_tokens(native):
    make((200, 1024, 8)).check("cpu")  # so many samples that each is one chunk


def test_small_weight_keeps_its_digits(backend):
    # A weight of 1e-4 folded as (w (1 + s)) - 1 would lose four digits.
    call = make(SHAPES["two-chunks"], affine=True)
    call.weight = call.weight * 1e-4
    call.bias = call.bias * 1e-4
    call.shift = call.shift * 1e-4
    call.check(backend)


@few_shapes
@dtypes
def test_recomputed_statistics_change_nothing(backend, shape, dtype, monkeypatch):
    monkeypatch.setattr(op, "KEEP_FROM", 0)  # small calls would keep none
    call = make(shape, dtype)
    kept, again = call.run(backend), call.run(backend, recompute_stats=True)
    for name in kept:
        # Same rows, same arithmetic: only where float32 statistics are kept could they differ, and they are not rounded.
        torch.testing.assert_close(again[name], kept[name], rtol=0, atol=0, msg=name)


@few_shapes
def test_without_gradient_of_the_stream(backend, shape):
    make(shape, stream_gradient=False).check(backend)


def test_only_the_stream_is_used(backend):
    call = make(SHAPES["two-chunks"])
    x, branch, gate = (t.detach().requires_grad_() for t in (call.x, call.branch, call.gate))
    x_new, _ = kernels.gate_residual_layernorm_modulate(x, branch, gate, call.shift, call.scale, backend=backend)
    got = torch.autograd.grad(x_new, (x, branch, gate), call.dy)
    want = gate_residual(wide(call.x), wide(call.branch), wide(call.gate), wide(call.dy))
    for g, name in zip(got, ("dx", "dbranch", "dgate"), strict=True):
        torch.testing.assert_close(g.double(), torch.from_numpy(want[name]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["per_sample", "shared", "per_token"])
@dtypes
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_gate_residual(backend, shape, dtype, mode):
    B, T, D = shape
    x, branch, dout = (torch.randn(B, T, D, dtype=torch.float64).to(dtype) for _ in range(3))
    gate = modulation(B, T, D, mode, 3, dtype)[1]
    exact = gate_residual(wide(x), wide(branch), wide(gate), wide(dout))
    results = []
    for which in (backend, "plain"):
        leaves = [t.detach().requires_grad_() for t in (x, branch, gate)]
        if which == "plain":
            out = leaves[0] + (leaves[2].unsqueeze(1) if mode == "per_sample" else leaves[2]) * leaves[1]
        else:
            out = kernels.gate_residual(*leaves, backend=which)
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    for name, got, plain in zip(("out", "dx", "dbranch", "dgate"), *results, strict=True):
        assert got.dtype == dtype
        judge(name, got, exact[name], plain)
