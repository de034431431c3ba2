"""What autograd and the compiler make of calls: inputs that depend on each other, tangents of cotangents, any size."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from ditscale import kernels

X = torch.randn(2, 2, 5, 8)
ROWS, MODULATION = torch.randn(2, 5, 8), torch.randn(2, 8)


def _projection(x):
    return x.permute(0, 2, 1, 3).unsqueeze(2).expand(2, 5, 3, 2, 8)


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """What is tested is around the operators, and the same for all that are ours."""
    if request.param == "cpu":
        request.getfixturevalue("native")
    return request.param


# Functions of one tensor whose operator has it more than once, in itself or by way of another input.
DEPENDENT = {
    "attention of itself": lambda x, backend: kernels.attention(x, x, x, backend=backend),
    "attention, one made of the other": lambda x, backend: kernels.attention(x, x * 0.5, x + 1, backend=backend),
    "attention_qkv, a bias made of it": lambda x, backend: kernels.attention_qkv(
        _projection(x), key_bias=x[..., 0].sum(1), backend=backend
    ),
    "qk_norm_rope, a weight made of it": lambda x, backend: kernels.qk_norm_rope(
        x, x, x.mean((0, 1, 2)), backend=backend
    )[0],
    "layernorm_modulate": lambda x, backend: kernels.layernorm_modulate(
        x[0], x[0, :, 0], x[0].mean(1), backend=backend
    ),
    "bias_gelu": lambda x, backend: kernels.bias_gelu(x[0], x[0, 0, 0], backend=backend),
    "linear": lambda x, backend: kernels.linear(x, x[0, 0]),
}


@pytest.mark.parametrize("name", DEPENDENT)
def test_gradients_with_a_graph_are_those_without(backend, name):
    x = X.clone().requires_grad_()

    def loss():
        return DEPENDENT[name](x, backend).square().sum()

    (plain,) = torch.autograd.grad(loss(), x)
    (graphed,) = torch.autograd.grad(loss(), x, create_graph=True)
    assert graphed.requires_grad
    assert torch.allclose(plain, graphed, rtol=1e-4, atol=1e-4)


OPERATORS = {
    "layernorm_modulate": lambda x, backend: kernels.layernorm_modulate(x, MODULATION, MODULATION, backend=backend),
    "gate_residual": lambda x, backend: kernels.gate_residual(x, x, MODULATION, backend=backend),
    "bias_gelu": lambda x, backend: kernels.bias_gelu(x, MODULATION[0], backend=backend),
    "attention": lambda x, backend: kernels.attention(*(x.unsqueeze(1),) * 3, backend=backend),
    "qk_norm_rope": lambda x, backend: kernels.qk_norm_rope(*(x.unsqueeze(1),) * 2, backend=backend)[0],
}


@pytest.mark.parametrize("name", OPERATORS)
def test_tangents_of_a_cotangent_are_not_lost(backend, name):
    x = ROWS.clone().requires_grad_()
    y = OPERATORS[name](x, backend)
    dy, tangent = torch.randn(2, *y.shape).unbind()
    with forward_ad.dual_level():
        (dx,) = torch.autograd.grad(y, x, forward_ad.make_dual(dy, tangent))
        got = forward_ad.unpack_dual(dx)
        assert got.tangent is not None and not got.primal.requires_grad
    (want,) = torch.autograd.grad(OPERATORS[name](x, backend), x, tangent)  # backward is linear in the cotangent
    assert torch.allclose(got.tangent, want, atol=1e-5)


def test_nan_has_a_gradient_of_nan(backend):
    x = torch.tensor([[float("nan"), 1.0]], requires_grad=True)
    (dx,) = torch.autograd.grad(kernels.bias_gelu(x, torch.zeros(2), backend=backend).sum(), x)
    assert dx[0, 0].isnan() and dx[0, 1].isfinite()


@pytest.mark.parametrize("name", OPERATORS)
def test_one_graph_for_all_numbers_of_tokens(name):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: OPERATORS[name](x, "auto"), backend=counter, fullgraph=True, dynamic=True)
    for T in (5, 6, 9, 17):
        x = torch.randn(2, T, 8)
        assert torch.allclose(compiled(x), OPERATORS[name](x, "auto"), atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("shift", ["of the sample", "of the model"])
def test_an_exported_batch_is_free(shift):
    class Norm(torch.nn.Module):
        def forward(self, x, m):
            return kernels.layernorm_modulate(x, m if shift == "of the sample" else torch.ones(8), m)

    batch = torch.export.Dim("batch")
    shapes = {"x": {0: batch}, "m": {0: batch}}
    program = torch.export.export(Norm(), (ROWS, MODULATION), dynamic_shapes=shapes, strict=False)
    x, m = torch.randn(8, 5, 8), torch.randn(8, 8)
    assert torch.allclose(program.module()(x, m), Norm()(x, m), atol=1e-6)
