"""Attention inside PyTorch: gradcheck, opcheck, compile, transforms, autocast, checkpointing, FLOPs, dispatch."""

from __future__ import annotations

import pytest
import torch
from attention_cases import backend, make  # noqa: F401 (backend is a fixture)
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ditscale import kernels
from ditscale.kernels import library
from ditscale.kernels.attn import choice, cost
from ditscale.kernels.attn.reference import attention_ref

needs_library = pytest.mark.skipif(library.missing_reason("cpu") is not None, reason="libditscale_cpu is missing")


@pytest.mark.parametrize("lengths", [None, [2, 0]], ids=["all", "lengths"])
def test_gradients_of_the_reference(lengths):
    q = torch.randn(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 1, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    n = None if lengths is None else torch.tensor(lengths)

    def f(q, k, v):
        return attention_ref(q, k, v, scale=0.6, lengths=n)

    assert torch.autograd.gradcheck(f, (q, k, v), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (q, k, v))


@needs_library
@pytest.mark.parametrize("lengths", [None, [5, 0]], ids=["all", "lengths"])
def test_opcheck(lengths):
    from ditscale.kernels.attn.op import _ops

    native = _ops("cpu")
    n = None if lengths is None else torch.tensor(lengths)
    tests = ("test_schema", "test_faketensor") + (
        ("test_aot_dispatch_dynamic",) if lengths else ()
    )  # the slow one once
    qkv = torch.randn(2, 7, 3, 2, 8)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    for save in (True, False):
        torch.library.opcheck(native.attention_fwd.default, (q, k, v, n, 0.3, save), test_utils=tests[: 2 + save])
        torch.library.opcheck(native.attention_qkv_fwd.default, (qkv, n, 0.3, save), test_utils=tests[: 2 + save])
    out, stats = native.attention_fwd(q, k, v, n, 0.3, True)
    dout = torch.randn(2, 2, 7, 8)
    torch.library.opcheck(native.attention_bwd.default, (dout, q, k, v, out, stats, n, 0.3), test_utils=tests)
    out, stats = native.attention_qkv_fwd(qkv, n, 0.3, True)
    torch.library.opcheck(
        native.attention_qkv_bwd.default, (torch.randn(2, 7, 16), qkv, out, stats, n, 0.3), test_utils=tests
    )


@needs_library
@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
def test_compiles_without_a_break(packed):
    def f(x):
        qkv = x.view(2, -1, 3, 2, 8)
        if packed:
            return kernels.attention_qkv(qkv)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return kernels.attention(q, k, v).transpose(1, 2).reshape(2, -1, 16)

    g = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for T in (64, 70):
        x = torch.randn(2, T, 48, requires_grad=True)
        w = torch.randn(2, T, 16)
        want, got = f(x), g(x)
        assert torch.equal(got, want)
        assert torch.equal(*(torch.autograd.grad(y, x, w)[0] for y in (got, want)))


def test_forward_mode_and_transforms_are_right(backend):
    q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))
    t = torch.randn_like(q)

    def f(q):
        return kernels.attention(q, k, v, backend=backend)

    h = 1e-3
    slope = (f(q + h * t).double() - f(q - h * t).double()) / (2 * h)
    _, tangent = torch.func.jvp(f, (q,), (t,))
    torch.testing.assert_close(tangent.double(), slope, rtol=1e-2, atol=1e-3)
    with torch.autograd.forward_ad.dual_level():
        dual = f(torch.autograd.forward_ad.make_dual(q, t))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)
    one = torch.func.vmap(lambda q, k, v: kernels.attention(q[None], k[None], v[None], backend=backend)[0])(q, k, v)
    torch.testing.assert_close(one, kernels.attention(q, k, v, backend="reference"))
    torch.func.grad(lambda q: f(q).sum())(q)


def test_second_derivatives(backend):
    # A gradient penalty whose outer gradient would silently miss attention if backward were opaque.
    qkv = torch.randn(1, 9, 3, 2, 8)
    found = {}
    for which in (backend, "packed", "plain"):
        x = qkv.clone().requires_grad_()
        if which == "packed":
            out = kernels.attention_qkv(x, backend=backend)
        else:
            q, k, v = x.permute(2, 0, 3, 1, 4)
            out = kernels.attention(q, k, v, backend="reference" if which == "plain" else backend)
        (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        (found[which],) = torch.autograd.grad(g.square().sum(), x)
    for which in (backend, "packed"):
        torch.testing.assert_close(found[which], found["plain"], rtol=1e-4, atol=1e-5)


def test_autocast(backend):
    call = make(2, 2, 9, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = kernels.attention(call.q, call.k, call.v, backend=backend)
        packed = kernels.attention_qkv(torch.randn(2, 9, 3, 2, 8), backend=backend)
    assert out.dtype == packed.dtype == torch.bfloat16
    want = kernels.attention(*(t.bfloat16() for t in (call.q, call.k, call.v)), backend=backend)
    assert torch.equal(out, want)


def test_checkpointing_changes_no_bit(backend):
    call = make(2, 2, 70, 8)
    want = call.run(backend)
    leaves = [t.detach().requires_grad_() for t in (call.q, call.k, call.v)]
    out = checkpoint(lambda *a: kernels.attention(*a, backend=backend), *leaves, use_reentrant=False)
    for name, g in zip(("dq", "dk", "dv"), torch.autograd.grad(out, leaves, call.dout), strict=True):
        assert torch.equal(g, want[name]), name


@needs_library
def test_flops_are_counted_as_the_ledger_does():
    B, H, T, K = 2, 3, 64, 8
    qkv = torch.randn(B, T, 3, H, K, requires_grad=True)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    for f in (lambda: kernels.attention(q, k, v, backend="cpu"), lambda: kernels.attention_qkv(qkv, backend="cpu")):
        with FlopCounterMode(display=False) as counter:
            out = f()
        assert counter.get_total_flops() == cost.attention_flops_forward(B, H, T, T, K) == 4 * B * H * T * T * K
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == cost.attention_flops_backward(B, H, T, T, K) == 8 * B * H * T * T * K


@needs_library
def test_auto_takes_what_measured_faster():
    from ditscale.kernels.attn.op import _choose

    assert _choose("auto", torch.zeros(1), 64, 8) == "cpu"
    assert _choose("auto", torch.zeros(1), 1, 72) == "sdpa"
    assert _choose("cpu", torch.zeros(1), 1, 72) == "cpu"  # a name is taken at its word
    assert choice.cpu_pays(1, 8)
    assert not choice.cpu_pays(2, 64)
    assert _choose("auto", torch.zeros(1, dtype=torch.float64), 64, 8) in ("sdpa", "reference")


def test_sdpa_with_lengths_and_groups():
    call = make(3, 4, 9, 8, S=11, H_kv=2, lengths=[0, 4, 11])
    want = kernels.attention(call.q, call.k, call.v, lengths=call.lengths, backend="reference")
    got = kernels.attention(call.q, call.k, call.v, lengths=call.lengths, backend="sdpa")
    torch.testing.assert_close(got, want)
