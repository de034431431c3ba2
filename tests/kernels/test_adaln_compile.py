"""The operators under torch.compile: one graph, no recompilation, the kernel in it, and right numbers."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from cases import B, D, T, block, block_inputs, close, exact, gradients, plain_block, rows

from ditscale import kernels

pytestmark = pytest.mark.native


@pytest.fixture(autouse=True)
def _fresh(native):
    torch._dynamo.reset()


def compiled(f, compiler="aot_eager", **options):
    return torch.compile(f, fullgraph=True, backend=compiler, **options)


def test_forward_and_backward():
    leaves = block_inputs()
    close(gradients(compiled(lambda *a: block(*a, "auto")), leaves), exact(plain_block, leaves))


def test_forward_and_backward_through_inductor():
    # No line of plain PyTorch beside them: Inductor has nothing to compile, and its calls of the operators are what is tested.
    leaves = [torch.randn(*s).requires_grad_() for s in ((B, T, D), (B, T, D), (B, D), (B, D), (B, D), (D,))]

    def f(x, branch, gate, shift, scale, bias):
        x, y = kernels.gate_residual_layernorm_modulate(x, branch, gate, shift, scale)
        return kernels.gate_residual(x, kernels.bias_gelu(y, bias), gate)

    def lines(x, branch, gate, shift, scale, bias):
        gate = rows(gate)
        x = x + gate * branch
        y = F.layer_norm(x, (D,), eps=1e-6) * (1 + rows(scale)) + rows(shift)
        return x + gate * F.gelu(y + bias, approximate="tanh")

    close(gradients(compiled(f, "inductor"), leaves), exact(lines, leaves))


def test_dynamic_batch_compiles_once():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    f = compiled(lambda *a: block(*a, "auto"), counter, dynamic=True)
    for batch in (2, 3, 5):
        leaves = block_inputs(batch)
        close(gradients(f, leaves), exact(plain_block, leaves))
        if batch == 2:
            first = counter.frame_count
    assert counter.frame_count == first


def test_calls_one_after_the_other_share_their_symbols():
    # With every size a symbol Dynamo made one of eps as well, and the second call of an operator failed.
    def f(x, branch, gate, shift, scale):
        x, y = kernels.gate_residual_layernorm_modulate(x, branch, gate, shift, scale)
        x, y = kernels.gate_residual_layernorm_modulate(x, y, gate, shift, scale)
        return x, kernels.layernorm_modulate(kernels.layernorm_modulate(y, shift, scale), shift, scale)

    inputs = [torch.randn(*s) for s in ((B, T, D), (B, T, D), (B, D), (B, D), (B, D))]
    leaves = [t.requires_grad_() for t in inputs]
    torch.testing.assert_close(compiled(f, dynamic=True)(*leaves), f(*leaves))


def test_no_recompile_for_the_same_shapes():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    f = compiled(lambda *a: block(*a, "auto"), counter)
    for _ in range(3):
        f(*block_inputs())
    assert counter.frame_count == 1


@pytest.mark.parametrize("grad", [False, True], ids=["infer", "train"])
def test_the_kernel_is_in_the_graph(grad):
    names = []

    def spy(graph, example):
        names.extend(str(n.target) for m in graph.modules() if hasattr(m, "graph") for n in m.graph.nodes)
        return graph

    with torch.set_grad_enabled(grad):
        compiled(lambda *a: block(*a, "auto"), spy)(*block_inputs())
    kind = "fwd" if grad else "infer"
    for op in ("gate_residual_layernorm_modulate", "layernorm_modulate"):
        assert any(f"ditscale.{op}_{kind}" in n for n in names), names
    for op in ("gate_residual_fwd", "bias_gelu_fwd"):
        assert any(f"ditscale.{op}" in n for n in names), names


def test_every_option_in_one_graph():
    leaves = [torch.randn(*s).requires_grad_() for s in ((B, T, D), (D,), (B, 1, D), (D,), (D,))]

    def ours(x, shift, scale, w, b):
        y = kernels.layernorm_modulate(x, shift, scale, weight=w, bias=b, eps=1e-3)
        return kernels.layernorm_modulate(y, shift, scale, norm="rms", recompute_stats=True)

    def lines(x, shift, scale, w, b):
        y = F.layer_norm(x, (D,), w, b, eps=1e-3) * (1 + scale) + shift
        return F.rms_norm(y, (D,), eps=1e-6) * (1 + scale) + shift

    close(gradients(compiled(ours), leaves), exact(lines, leaves))


def test_autocast():
    layer = torch.nn.Linear(D, 3 * D)
    x, branch, c, bias = (torch.randn(*s) for s in ((B, T, D), (B, T, D), (B, D), (D,)))

    def f(x, branch, c, bias):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return block(x, branch, layer(c), bias, "auto")

    got, want = compiled(f)(x, branch, c, bias), f(x, branch, c, bias)
    assert got.dtype == torch.float32
    close((got,), (want,))


def normed(x, table, k):
    return F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + rows(table[:, k + 1])) + rows(table[:, k])


class TestChainedNormsSharingOneTableAtBatchOne:
    """pytorch/pytorch#193061: Inductor of 2.10 gave wrong gradients for exactly this, without a word."""

    @staticmethod
    def check(how, ours, lines):
        leaves = [torch.randn(1, 64, 32).requires_grad_(), torch.randn(1, 6, 32).requires_grad_()]
        f = compiled(ours, "inductor") if how == "compiled" else ours
        close(gradients(f, leaves), exact(lines, leaves), 1e-4)

    @pytest.mark.parametrize("how", ["eager", "compiled"])
    def test_norms(self, how):
        def ours(x, table):
            for k in range(0, 6, 2):
                x = x + kernels.layernorm_modulate(x, table[:, k], table[:, k + 1], backend="auto")
            return x

        def lines(x, table):
            for k in range(0, 6, 2):
                x = x + normed(x, table, k)
            return x

        self.check(how, ours, lines)

    @pytest.mark.parametrize("how", ["eager", "compiled"])
    def test_residuals_and_norms(self, how):
        def ours(x, table):
            y = kernels.layernorm_modulate(x, table[:, 2], table[:, 3])
            for k in range(0, 4, 2):
                x, y = kernels.gate_residual_layernorm_modulate(x, y, table[:, 5], table[:, k], table[:, k + 1])
            return kernels.gate_residual(x, y, table[:, 4])

        def lines(x, table):
            y = normed(x, table, 2)
            for k in range(0, 4, 2):
                x = x + rows(table[:, 5]) * y
                y = normed(x, table, k)
            return x + rows(table[:, 4]) * y

        self.check(how, ours, lines)
