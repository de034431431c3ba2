"""Derivatives of every kind: forward mode, second derivatives, torch.func, vmap; eager and compiled, on every backend.

An opaque operator has zero tangents without a word in all of these; each test therefore compares with float64 and asks for
numbers that are not zero.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import block, block_inputs, close, plain_block, plain_norm, rows
from torch.autograd import forward_ad

from ditscale import kernels


def tangents_of(leaves):
    return [torch.randn_like(t) for t in leaves]


def doubles(tensors):
    return tuple(t.detach().double() for t in tensors)


class TestForwardMode:
    def test_jvp_and_dual_numbers(self, backend):
        leaves = [t.detach() for t in block_inputs()]
        tangents = tangents_of(leaves)
        want = torch.func.jvp(plain_block, doubles(leaves), doubles(tangents))
        got = torch.func.jvp(lambda *a: block(*a, backend), tuple(leaves), tuple(tangents))
        assert got[1].abs().max() > 0.1
        close(got, want)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(p, t) for p, t in zip(leaves, tangents, strict=True)]
            out = forward_ad.unpack_dual(block(*duals, backend))
            close((out.primal, out.tangent), want)

    def test_backward_through_the_tangent(self, backend):
        # What MeanFlow trains on: the gradient of a loss on a forward-mode derivative.
        leaves = block_inputs()
        tangents = tangents_of(leaves)

        def loss(f, args, duals):
            _, tangent = torch.func.jvp(f, tuple(args), tuple(duals))
            return torch.autograd.grad(tangent.square().sum(), args)

        want = loss(plain_block, [t.requires_grad_() for t in doubles(leaves)], doubles(tangents))
        close(loss(lambda *a: block(*a, backend), leaves, tangents), want, 2e-3)

    def test_gelu(self, backend):
        x, b, t = torch.randn(3, 8), torch.randn(8), torch.randn(3, 8)
        got = torch.func.jvp(lambda a: kernels.bias_gelu(a, b, backend=backend), (x,), (t,))[1]
        want = torch.func.jvp(lambda a: F.gelu(a + b.double(), approximate="tanh"), (x.double(),), (t.double(),))[1]
        assert got.abs().max() > 0.1
        close((got,), (want,))


class TestFunc:
    def test_grad_and_vmap(self, backend):
        leaves = [t.detach() for t in block_inputs()]

        def ours(*a):
            return block(*a, backend).square().sum()

        def lines(*a):
            return plain_block(*a).square().sum()

        want = torch.func.grad(lines, argnums=(0, 1, 2, 3))(*doubles(leaves))
        close(torch.func.grad(ours, argnums=(0, 1, 2, 3))(*leaves), want, 1e-4)
        many = [torch.stack([t, 2 * t, -t]) for t in leaves]
        each = list(zip(*(doubles(t) for t in many), strict=True))
        got = torch.func.vmap(lambda *a: block(*a, backend))(*many)
        close(got, torch.stack([plain_block(*one) for one in each]), 1e-4)
        got = torch.func.vmap(torch.func.grad(ours))(*many)
        close(got, torch.stack([torch.func.grad(lines)(*one) for one in each]), 1e-4)


class TestSecondDerivatives:
    """A backward pass that is to be differentiated is made of plain PyTorch: right on every backend."""

    @staticmethod
    def twice(f, leaves):
        """Gradients of a function of the gradients, and the gradients themselves."""
        first = torch.autograd.grad(f(*leaves).square().sum(), leaves, create_graph=True)
        penalty = sum((k + 1) * g.square().sum() for k, g in enumerate(first))
        return (*first, *torch.autograd.grad(penalty, leaves))

    def compare(self, ours, lines, leaves, tolerance=2e-3):
        got = self.twice(ours, leaves)
        want = self.twice(lines, [t.detach().double().requires_grad_() for t in leaves])
        for g, w in zip(got, want, strict=True):
            scale = w.detach().abs().max().item()
            assert scale > 0
            close((g / scale,), (w / scale,), tolerance)

    def test_block(self, backend):
        leaves = [t.detach().mul(0.5).requires_grad_() for t in block_inputs()]
        self.compare(lambda *a: block(*a, backend), plain_block, leaves)

    @pytest.mark.parametrize("lead", [(), (2, 1), (2, 5)], ids=["shared", "kept-dim", "per_token"])
    def test_norm_with_other_modulations(self, backend, lead):
        leaves = [torch.randn(*s).requires_grad_() for s in ((2, 5, 8), (*lead, 8), (*lead, 8))]

        def lines(x, shift, scale):
            return F.layer_norm(x, (8,), eps=1e-5) * (1 + scale) + shift

        self.compare(lambda *a: kernels.layernorm_modulate(*a, eps=1e-5, backend=backend), lines, leaves)

    def test_one_tensor_in_two_places(self, backend):
        leaves = [torch.randn(2, 5, 8).requires_grad_(), torch.randn(2, 8).requires_grad_()]

        def ours(x, m):
            x_new, y = kernels.gate_residual_layernorm_modulate(x, x, m, m, m, backend=backend)
            return y + kernels.gate_residual(x_new, x_new, m, backend=backend)

        def lines(x, m):
            m = rows(m)
            x_new = x + m * x
            return F.layer_norm(x_new, (8,), eps=1e-6) * (1 + m) + m + x_new + m * x_new

        self.compare(ours, lines, leaves)

    def test_third_derivatives(self, backend):
        def thrice(f, args):
            ones = [torch.ones_like(t) for t in args]
            first = torch.autograd.grad(f(*args).pow(3).sum(), args, create_graph=True)
            second = torch.autograd.grad(first, args, ones, create_graph=True)
            return torch.autograd.grad(second, args, ones)

        leaves = [torch.randn(*s).requires_grad_() for s in ((2, 5, 8), (2, 1, 8), (2, 1, 8))]
        exact = [t.detach().double().requires_grad_() for t in leaves]
        want = thrice(lambda x, shift, scale: plain_norm(x) * (1 + scale) + shift, exact)
        close(thrice(lambda *a: kernels.layernorm_modulate(*a, backend=backend), leaves), want, 1e-3)

    def test_gelu(self, backend):
        leaves = [torch.randn(6, 8).requires_grad_(), torch.randn(8).requires_grad_()]
        self.compare(
            lambda *a: kernels.bias_gelu(*a, backend=backend), lambda x, b: F.gelu(x + b, approximate="tanh"), leaves
        )

    def test_recomputed_statistics_and_an_unused_norm(self, backend):
        leaves = [t.detach().mul(0.5).requires_grad_() for t in block_inputs()[:3]]

        def ours(x, branch, table):
            shift, scale, gate = table.chunk(3, dim=1)
            x_new, _ = kernels.gate_residual_layernorm_modulate(x, branch, gate, shift, scale, backend=backend)
            return kernels.layernorm_modulate(x_new, shift, scale, recompute_stats=True, backend=backend)

        def lines(x, branch, table):
            shift, scale, gate = (rows(t) for t in table.chunk(3, dim=1))
            return F.layer_norm(x + gate * branch, (x.shape[-1],), eps=1e-6) * (1 + scale) + shift

        self.compare(ours, lines, leaves)


@pytest.mark.native
class TestCompiled:
    """The same inside torch.compile, where custom operators lose their tangents without a word."""

    def compiled(self, f):
        return torch.compile(f, backend="aot_eager", fullgraph=True)

    def test_jvp_inside(self, native):
        leaves = [t.detach() for t in block_inputs()]
        tangents = tangents_of(leaves)

        def f(*a):
            return torch.func.jvp(lambda *b: block(*b, "auto"), tuple(a), tuple(tangents))

        got = self.compiled(f)(*leaves)
        assert got[1].abs().max() > 0.1
        close(got, torch.func.jvp(plain_block, doubles(leaves), doubles(tangents)))

    def test_grad_and_vmap_inside(self, native):
        leaves = [t.detach() for t in block_inputs()]

        def ours(*a):
            return torch.func.grad(lambda *b: block(*b, "auto").square().sum(), argnums=(0, 1, 2, 3))(*a)

        want = torch.func.grad(lambda *b: plain_block(*b).square().sum(), argnums=(0, 1, 2, 3))(*doubles(leaves))
        close(self.compiled(ours)(*leaves), want, 1e-4)
        many = [torch.stack([t, -t]) for t in leaves]
        got = self.compiled(lambda *a: torch.func.vmap(lambda *b: block(*b, "auto"))(*a))(*many)
        each = zip(*(doubles(t) for t in many), strict=True)
        close(got, torch.stack([plain_block(*one) for one in each]), 1e-4)

    def test_forward_mode_around_a_compiled_function(self, native):
        # Right or refused; what has been compiled before for plain tensors must not be used for dual ones.
        leaves = [t.detach() for t in block_inputs()]
        tangents = tangents_of(leaves)
        want = torch.func.jvp(plain_block, doubles(leaves), doubles(tangents))
        f = torch.compile(lambda *a: block(*a, "auto"), backend="aot_eager")
        close((f(*leaves),), want[:1])

        def dual():
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(p, t) for p, t in zip(leaves, tangents, strict=True)]
                out = forward_ad.unpack_dual(f(*duals))
                return out.primal, torch.zeros(()) if out.tangent is None else out.tangent

        for run in (lambda: torch.func.jvp(f, tuple(leaves), tuple(tangents)), dual):
            try:
                got = run()
            except Exception as error:
                assert str(error)
            else:
                close(got, want)

    def test_second_derivatives_of_a_compiled_function_are_refused(self, native):
        x = torch.randn(2, 3, 8, requires_grad=True)
        f = torch.compile(
            lambda a: kernels.layernorm_modulate(a, torch.zeros(8), torch.ones(8)), backend="aot_eager", fullgraph=True
        )
        (dx,) = torch.autograd.grad(f(x).pow(3).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="double backward"):
            dx.square().sum().backward()
