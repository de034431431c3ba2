"""bias_gelu against float64 on every backend: values, gradients, large arguments, strides, empty input, equal bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, NAME
from oracles import bias_gelu, judge, wide

from ditscale import kernels

# (rows.., F): one number; nothing aligned; several chunks of rows, a tail; a DiT-S mlp's width.
SHAPES = ((1,), (3, 7), (2, 45, 20), (70, 1536))


def run(x, bias, dy, backend):
    x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    if backend == "plain":
        y = F.gelu(x + bias, approximate="tanh")
    else:
        y = kernels.bias_gelu(x, bias, backend=backend)
    return (y, *torch.autograd.grad(y, (x, bias), dy))


@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAME.get)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, shape, dtype, size):
    x, dy = ((s * torch.randn(shape, dtype=torch.float64)).to(dtype) for s in (size, 1.0))
    bias = torch.randn(shape[-1], dtype=torch.float64).to(dtype)
    exact = bias_gelu(wide(x), wide(bias), wide(dy))
    got, plain = run(x, bias, dy, backend), run(x, bias, dy, "plain")
    for name, a, b in zip(("y", "dx", "dbias"), got, plain, strict=True):
        judge(name, a, exact[name], b)


def test_far_out_arguments(backend):
    # z^3 and the exponential leave float32 here; the function and its slope are z or 0, 1 or 0.
    x = torch.tensor([[-3e38, -1e20, -1e4, -100.0, 0.0, 100.0, 1e4, 1e20]])
    y, dx, _ = run(x, torch.zeros(8), torch.ones(1, 8), backend)
    torch.testing.assert_close(y, x.clamp_min(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dx, torch.tensor([[0.0, 0, 0, 0, 0.5, 1, 1, 1]]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAME.get)
def test_strided_rows_and_broadcast_gradient(backend, dtype):
    store = torch.full((9, 40), float("nan"), dtype=dtype)
    x = store[:, 3:35]
    x.copy_(torch.randn(9, 32))
    bias = torch.randn(32).to(dtype)
    leaf = x.detach().requires_grad_()
    kernels.bias_gelu(leaf, bias, backend=backend).sum().backward()  # an expanded gradient, all strides zero
    want = bias_gelu(wide(x), wide(bias), torch.ones(9, 32).double().numpy())["dx"]
    torch.testing.assert_close(leaf.grad.double(), torch.from_numpy(want), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("how", ["every-other", "one-for-all"])
def test_a_bias_of_any_stride(backend, how):
    x, dy = torch.randn(2, 9, 40), torch.randn(2, 9, 40)
    bias = torch.randn(80)[::2] if how == "every-other" else torch.randn(1).expand(40)
    exact = bias_gelu(wide(x), wide(bias), wide(dy))
    for name, a, b in zip(("y", "dx", "dbias"), run(x, bias, dy, backend), run(x, bias, dy, "plain"), strict=True):
        judge(name, a, exact[name], b)


def test_empty_and_equal_bits(backend):
    bias = torch.randn(8, requires_grad=True)
    kernels.bias_gelu(torch.randn(0, 8), bias, backend=backend).sum().backward()
    assert not bias.grad.any()
    for shape in ((0,), (2, 3, 0)):
        x, none = torch.randn(shape, requires_grad=True), torch.randn(0, requires_grad=True)
        for _ in range(2):  # the second one on the short way
            y = kernels.bias_gelu(x, none, backend=backend)
            y.sum().backward()
            assert y.shape == x.grad.shape == shape and none.grad.shape == (0,)
    x, b, dy = torch.randn(300, 24), torch.randn(24), torch.randn(300, 24)
    first, again = run(x, b, dy, backend), run(x, b, dy, backend)
    assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))


def test_float32_bias_of_half_rows(backend):
    x, b = torch.randn(5, 8).bfloat16(), torch.randn(8)
    y, dx, db = run(x, b, torch.ones(5, 8).bfloat16(), backend)
    assert (y.dtype, dx.dtype, db.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


def test_forward_mode(backend):
    x, b, t = torch.randn(3, 8), torch.randn(8), torch.randn(3, 8)
    got = torch.func.jvp(lambda a: kernels.bias_gelu(a, b, backend=backend), (x,), (t,))[1]
    want = torch.func.jvp(lambda a: F.gelu(a + b.double(), approximate="tanh"), (x.double(),), (t.double(),))[1]
    assert got.abs().max() > 0.1
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
