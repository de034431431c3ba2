"""Attention inside PyTorch: gradcheck, opcheck, compile, transforms, autocast, checkpointing, FLOPs, dispatch."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from attention_cases import make
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ditscale import kernels
from ditscale.kernels import library
from ditscale.kernels.attn import choice, cost
from ditscale.kernels.attn.reference import attention_ref

needs_library = pytest.mark.skipif(library.missing_reason("cpu") is not None, reason="libditscale_cpu is missing")
auto_is_ours = pytest.mark.skipif(library.cpu_isa() in (None, "portable"), reason="auto is PyTorch's attention here")


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
@pytest.mark.parametrize("kind", ["plain", "lengths", "packed"])
def test_opcheck(kind):
    from ditscale.kernels.attn import native as _native  # noqa: F401 (describes the operators)

    native = torch.ops.ditscale
    n = torch.tensor([5], dtype=torch.int32) if kind == "lengths" else None
    cu = torch.tensor([0, 3, 6], dtype=torch.int32) if kind == "packed" else None
    bias = torch.randn(1, 2, 7) if kind != "plain" else None
    # The slow check once, where every argument is there.
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")[: 3 if kind == "packed" else 2]
    qkv = torch.randn(1, 7, 3, 2, 8)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    apart, packed = (bias, n, cu, cu, 7, 7, 0.3), (bias, n, cu, 7, 0.3)
    for save in (True, False):
        torch.library.opcheck(native.attention_fwd.default, (q, k, v, *apart, save), test_utils=tests[: 2 + save])
        torch.library.opcheck(native.attention_qkv_fwd.default, (qkv, *packed, save), test_utils=tests[: 2 + save])
    grad = bias is not None
    out, stats = native.attention_fwd(q, k, v, *apart, True)
    dout = torch.randn(1, 2, 7, 8)
    torch.library.opcheck(native.attention_bwd.default, (dout, q, k, v, out, stats, *apart, grad), test_utils=tests)
    out, stats = native.attention_qkv_fwd(qkv, *packed, True)
    arguments = (torch.randn(1, 7, 16), qkv, out, stats, *packed, grad)
    torch.library.opcheck(native.attention_qkv_bwd.default, arguments, test_utils=tests)


@needs_library
def test_statistics_hold_the_log_sum_exp():
    # What shapes.py promises to whoever reads them.
    call = make(2, 2, 70, 16, lengths=[33, 0])
    lengths = call.lengths.to(torch.int32)
    _, stats = torch.ops.ditscale.attention_fwd(call.q, call.k, call.v, None, lengths, None, None, 70, 70, 0.25, True)
    scores = 0.25 * (call.q[0] @ call.k[0, :, :33].transpose(-1, -2)).double()
    found = stats[0, 0].double() - math.log(2) * stats[1, 0].double().log2()
    torch.testing.assert_close(found, scores.logsumexp(-1), rtol=1e-6, atol=1e-6)
    assert not stats[:, 1].any()
    ends = torch.tensor([0, 30, 50], dtype=torch.int32)
    packed = (t[:1] for t in (call.q, call.k, call.v))
    _, stats = torch.ops.ditscale.attention_fwd(*packed, None, None, ends, ends, 30, 30, 0.25, True)
    assert stats[1, :, :, :50].all() and not stats[:, :, :, 50:].any()  # rows of no sequence


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


CU = torch.tensor([0, 4, 9], dtype=torch.int32)
COMPILED = {
    "packed sequences": lambda q, b: kernels.attention(q, q * 1, q * 2, cu_seqlens=CU, max_seqlen=5),
    "packed on both sides": lambda q, b: kernels.attention(q, q * 1, q * 2, cu_seqlens=CU, cu_seqlens_k=CU),
    "packed in one": lambda q, b: kernels.attention_qkv(q.view(1, 9, 3, 2, 2), cu_seqlens=CU),
    "lengths": lambda q, b: kernels.attention(q, q * 1, q * 2, lengths=torch.tensor([4])),
    "a bias": lambda q, b: kernels.attention(q, q * 1, q * 2, key_bias=b),
    "a tensor thrice": lambda q, b: kernels.attention(q, q, q),
}


@needs_library
@pytest.mark.parametrize("kind", COMPILED)
def test_every_kind_of_call_compiles_with_gradients(kind):
    q, b = torch.randn(1, 2, 9, 6, requires_grad=True), torch.randn(9, requires_grad=True)
    f = COMPILED[kind]
    torch._dynamo.reset()
    out = [g(q, b) for g in (f, torch.compile(f, fullgraph=True, backend="aot_eager"))]
    assert torch.equal(*out)
    leaves = (q, b) if kind == "a bias" else (q,)
    for want, got in zip(*(torch.autograd.grad(o.square().sum(), leaves) for o in out), strict=True):
        torch.testing.assert_close(got, want)


def test_sdpa_compiles_for_any_number_of_heads():
    def f(q):
        return kernels.attention(q, q * 1, q * 1, backend="sdpa")

    g = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
    for H in (2, 3):
        q = torch.randn(1, H, 1, 16)
        assert torch.equal(g(q), f(q))


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


@needs_library
@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
def test_forward_mode_inside_and_around_compile(packed):
    qkv, tangent = torch.randn(1, 5, 3, 2, 4), torch.randn(1, 5, 3, 2, 4)

    def f(x):
        return kernels.attention_qkv(x) if packed else kernels.attention(*x.permute(2, 0, 3, 1, 4))

    def lines(x):
        q, k, v = x.permute(2, 0, 3, 1, 4)
        out = torch.softmax(q @ k.transpose(-1, -2) * 0.5, -1) @ v
        return out.transpose(1, 2).flatten(2) if packed else out

    _, want = torch.func.jvp(lines, (qkv.double(),), (tangent.double(),))
    inside = torch.compile(lambda x, t: torch.func.jvp(f, (x,), (t,))[1], fullgraph=True, backend="aot_eager")
    g = torch.compile(f, backend="aot_eager")
    g(qkv)  # what has been compiled for plain tensors must not serve dual ones
    assert inside(qkv, tangent).abs().max() > 0.1

    def dual():
        with torch.autograd.forward_ad.dual_level():
            out = g(torch.autograd.forward_ad.make_dual(qkv, tangent))
            return torch.autograd.forward_ad.unpack_dual(out).tangent

    for run, may_refuse in (
        (lambda: inside(qkv, tangent), False),
        (lambda: torch.func.jvp(g, (qkv,), (tangent,))[1], True),
        (dual, True),
    ):
        try:
            got = run()
        except Exception as error:
            assert may_refuse and str(error)
        else:
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


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
@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_flops_of_packed_sequences_are_counted_one_by_one(fake):
    H, K, ends = 2, 8, [0, 10, 10, 40, 60]
    cu = torch.tensor(ends, dtype=torch.int32)
    qkv = torch.randn(1, 64, 3, H, K)
    mode = FakeTensorMode() if fake else contextlib.nullcontext()
    # Of a traced call the lengths are not known, only the longest one that the caller named.
    pairs = 4 * 30 * 30 if fake else 10 * 10 + 30 * 30 + 20 * 20
    with mode:
        if fake:
            qkv, cu = mode.from_tensor(qkv), mode.from_tensor(cu)
        qkv.requires_grad_()
        with FlopCounterMode(display=False) as counter:
            out = kernels.attention_qkv(qkv, cu_seqlens=cu, max_seqlen=30, backend="cpu")
        assert counter.get_total_flops() == 4 * H * K * pairs
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 8 * H * K * pairs


@auto_is_ours
def test_auto_takes_what_measured_faster():
    from ditscale.kernels.attn.op import _choose

    def chosen(
        backend: str, T: int, K: int, dtype: torch.dtype = torch.float32, *, S: int | None = None, alone: bool = True
    ) -> str:
        q, k = torch.zeros(1, 1, T, K, dtype=dtype), torch.zeros(1, 1, S or T, K, dtype=dtype)
        return _choose(backend, q, k, alone=alone)

    assert chosen("auto", 64, 8) == "cpu"
    assert chosen("auto", 1, 72) == "sdpa"
    assert chosen("auto", 1, 72, alone=False) == "cpu"  # biases and gradients are not PyTorch's strong side
    assert chosen("cpu", 1, 72) == "cpu"  # a name is taken at its word
    assert chosen("auto", 16, 64) == "cpu"
    assert chosen("auto", 16, 64, S=256) == "sdpa"  # few queries before many keys
    assert chosen("auto", 48, 64, S=256) == "cpu"
    assert choice.cpu_pays(1, 1, 8)
    assert not choice.cpu_pays(1, 1024, 8)
    assert not choice.cpu_pays(2, 2, 64)
    assert chosen("auto", 64, 8, torch.float64) in ("sdpa", "reference")


def test_auto_is_pytorchs_where_the_library_has_no_vectors(monkeypatch):
    for isa, first in (("avx2", "cpu"), ("portable", "sdpa")):
        monkeypatch.setattr(library, "cpu_isa", lambda isa=isa: isa)
        assert choice.order("cpu")[0] == first


def test_sdpa_does_not_round_a_bias_to_half_precision_on_a_cpu():
    call = make(2, 2, 64, 64, torch.bfloat16, key_bias="sample")
    call.key_bias = 20 * call.key_bias
    exact = kernels.attention(
        *(t.double() for t in (call.q, call.k, call.v)), key_bias=call.key_bias, backend="reference"
    )
    assert (call.run("sdpa")["out"] - exact).abs().max() < 0.02


def test_autocast_does_not_round_a_bias(backend):
    call = make(2, 2, 9, 16, torch.bfloat16)
    bias = 20 + torch.randn(9)
    wide = [t.float() for t in (call.q, call.k, call.v)]
    for which in (backend, "sdpa"):
        want = kernels.attention(call.q, call.k, call.v, key_bias=bias, backend=which)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(kernels.attention(*wide, key_bias=bias, backend=which), want)


def test_sdpa_with_lengths_and_groups():
    call = make(3, 4, 9, 8, S=11, H_kv=2, lengths=[0, 4, 11])
    want = kernels.attention(call.q, call.k, call.v, lengths=call.lengths, backend="reference")
    got = kernels.attention(call.q, call.k, call.v, lengths=call.lengths, backend="sdpa")
    torch.testing.assert_close(got, want)


def test_sdpa_with_a_bias_and_packed_sequences():
    calls = [
        make(2, 4, 9, 8, S=11, H_kv=2, lengths=[4, 11], key_bias="head"),
        make(2, 2, 9, 8, key_bias="mask"),
        make(1, 2, 20, 8, cu=([0, 7, 7, 19], [0, 7, 7, 19]), key_bias="shared"),
    ]
    calls[1].key_bias[1] = False
    for call in calls:
        got, want = call.run("sdpa"), call.run("reference")
        for name in call.names:
            torch.testing.assert_close(got[name], want[name], msg=lambda m, n=name: f"{n}: {m}")
