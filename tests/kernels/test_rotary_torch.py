"""QK-norm + RoPE inside PyTorch: in place, transforms, compile, autocast, checkpointing, FLOPs, self-check."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, NAME
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ditscale import kernels
from ditscale.errors import BackendUnavailable, InputError
from ditscale.kernels import dispatch, library, selfcheck
from ditscale.kernels.rotary import cost
from ditscale.kernels.rotary.reference import norm_rope_ref
from ditscale.kernels.rotary.tables import rotary_table

needs_library = pytest.mark.skipif(library.missing_reason("cpu") is not None, reason="libditscale_cpu is missing")

B, T, H, K = 2, 6, 3, 8
TABLE = rotary_table((2, 3), K)
KINDS = {
    "rms-halves": {"norm": "rms"},
    "layer-pairs": {"norm": "layer", "interleaved": True},
    "unturned": {"norm": "rms", "cos": None, "sin": None},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def options(kind):
    return {"cos": TABLE[0], "sin": TABLE[1], **KINDS[kind]}


def projection(dtype=torch.float32):
    return torch.randn(B, T, 3, H, K, dtype=torch.float64).to(dtype)


def parts(qkv):
    return [qkv[:, :, i].transpose(1, 2) for i in range(2)]


def plain(qkv, qw, kw, kind):
    """Queries and keys by the reference, whatever the dtype."""
    o = options(kind)
    cos, sin = (None if t is None else t.to(qkv.dtype) for t in (o.pop("cos"), o.pop("sin")))
    q, k = parts(qkv)
    return norm_rope_ref(q, qw, cos, sin, **o), norm_rope_ref(k, kw, cos, sin, **o)


def through(qkv, qw, kw, kind, backend, inplace=False):
    """A projection through the operator and on as one buffer, as attention_qkv reads it."""
    y = 1.5 * qkv
    q, k = parts(y)
    new = kernels.qk_norm_rope(q, k, qw, kw, **options(kind), inplace=inplace, backend=backend)
    if inplace:
        assert new[0] is q and new[1] is k
        return y
    return torch.stack([t.transpose(1, 2) for t in new] + [y[:, :, 2]], dim=2)


class TestInPlace:
    @pytest.mark.parametrize("dtype", DTYPES, ids=NAME.get)
    @kinds
    def test_values_and_gradients_are_those_out_of_place(self, backend, kind, dtype):
        leaves = [t.requires_grad_() for t in (projection(dtype), torch.randn(K), torch.randn(K))]
        dout, found = projection(dtype), []
        for inplace in (True, False):
            out = through(*leaves, kind, backend, inplace)
            found.append((out, *torch.autograd.grad(out, leaves, dout)))
        for got, want in zip(*found, strict=True):
            if backend == "reference":  # whose sums follow the layout of the gradient
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            else:
                assert torch.equal(got, want)

    def test_a_gradient_of_the_tables_alone(self, backend):
        # Backward reads the rows as they were, which the results are written over.
        qkv, table, found = projection(), [t.clone().requires_grad_() for t in TABLE], []
        for inplace in (True, False):
            q, k = kernels.qk_norm_rope(
                *parts(qkv * 1), None, None, *table, inplace=inplace, norm="none", backend=backend
            )
            found.append(torch.autograd.grad(q.sum() + k.square().sum(), table))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want)

    @kinds
    def test_without_gradients_the_buffer_is_written_and_nothing_else(self, backend, kind):
        qkv = projection()
        want = [t.clone() for t in kernels.qk_norm_rope(*parts(qkv), **options(kind), backend=backend)]
        before, version, address = qkv.clone(), qkv._version, qkv.data_ptr()
        q, k = parts(qkv)
        out = kernels.qk_norm_rope(q, k, **options(kind), inplace=True, backend=backend)
        assert out[0] is q and out[1] is k
        assert qkv.data_ptr() == address and torch.equal(qkv[:, :, 2], before[:, :, 2])
        for got, expected in zip(parts(qkv), want, strict=True):
            assert torch.equal(got, expected)
        assert qkv._version > version

    def test_in_inference_mode(self, backend):
        with torch.inference_mode():
            qkv = projection()
            want = kernels.qk_norm_rope(*parts(qkv), **options("rms-halves"), backend=backend)[1]
            kernels.qk_norm_rope(*parts(qkv), **options("rms-halves"), inplace=True, backend=backend)
            assert torch.equal(parts(qkv)[1], want)

    def test_autograd_notices_that_the_buffer_was_written(self, backend):
        leaf = projection().requires_grad_()
        y = 1.5 * leaf
        loss = y.square().sum()  # needs y as it was
        kernels.qk_norm_rope(*parts(y), inplace=True, backend=backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_rows_that_are_not_dense(self, backend):
        x = torch.randn(B, H, K, T).transpose(2, 3)
        y = torch.randn(B, H, T, K)
        want = kernels.qk_norm_rope(x, y, **options("rms-halves"), backend=backend)
        kernels.qk_norm_rope(x, y, **options("rms-halves"), inplace=True, backend=backend)
        torch.testing.assert_close((x, y), want)

    def test_into_attention(self, backend):
        qkv = projection()
        q, k = kernels.qk_norm_rope(*parts(qkv), **options("rms-halves"), backend="reference")
        want = kernels.attention(q, k, qkv[:, :, 2].transpose(1, 2), backend="reference").transpose(1, 2).flatten(2)
        kernels.qk_norm_rope(*parts(qkv), **options("rms-halves"), inplace=True, backend=backend)
        torch.testing.assert_close(kernels.attention_qkv(qkv, backend="reference"), want)

    @needs_library
    def test_compiled_whole(self):
        def f(qkv, qw, kw):
            return through(qkv, qw, kw, "rms-halves", "auto", True)

        leaves = [t.requires_grad_() for t in (projection(), torch.randn(K), torch.randn(K))]
        g = torch.compile(f, fullgraph=True, backend="aot_eager")
        want, got = f(*leaves), g(*leaves)
        assert torch.equal(got, want)
        dout = projection()
        for a, b in zip(*(torch.autograd.grad(y, leaves, dout) for y in (got, want)), strict=True):
            assert torch.equal(a, b)
        with torch.no_grad():
            assert torch.equal(g(*leaves), want)

    def test_second_derivatives_are_refused(self):
        leaf = projection().requires_grad_()
        out = through(leaf, None, None, "rms-halves", "cpu" if library.missing_reason("cpu") is None else "auto", True)
        with pytest.raises(InputError, match="inplace: expected False for second derivatives"):
            torch.autograd.grad(out.square().sum(), leaf, create_graph=True)

    def test_what_cannot_be_written_is_named_before_anything_is(self, backend):
        leaf = projection().requires_grad_()
        whole = 1.5 * leaf
        q, k = parts(whole)
        one = torch.randn(1, 1, 1, K).expand(B, H, T, K)
        apart = [t.transpose(1, 2) for t in (1.5 * leaf).unbind(2)[:2]]
        alone = torch.randn(B, H, T, K, requires_grad=True)
        of_leaf = parts(leaf)
        for bad, message in (
            ((q, q), "q, k: expected memory of their own"),
            ((q, parts(whole)[0]), "q, k: expected memory of their own"),
            ((one, k), "q: expected memory for every number"),
            (apart, "q: expected a view that autograd lets be written"),
            ((alone, k), "q: expected a result of other operators to write in place, got a leaf"),
            (of_leaf, "q: expected a result of other operators to write in place, got a view of a leaf"),
        ):
            copies = [t.detach().clone() for t in bad]
            with pytest.raises(InputError, match=message):
                kernels.qk_norm_rope(*bad, inplace=True, backend=backend)
            for a, b in zip(bad, copies, strict=True):
                assert torch.equal(a, b)
        with torch.no_grad():  # where nothing is recorded a part of several may be written
            kernels.qk_norm_rope(*apart, inplace=True, backend=backend)


class TestTransforms:
    @kinds
    def test_forward_mode(self, backend, kind):
        leaves = (projection(), torch.randn(K), torch.randn(K))
        tangents = tuple(torch.randn_like(t) for t in leaves)
        doubles = [tuple(t.double() for t in ts) for ts in (leaves, tangents)]
        _, want = torch.func.jvp(lambda *a: plain(1.5 * a[0], *a[1:], kind), *doubles)

        def f(*a):
            return kernels.qk_norm_rope(*parts(1.5 * a[0]), *a[1:], **options(kind), backend=backend)

        _, got = torch.func.jvp(f, leaves, tangents)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(*pair) for pair in zip(leaves, tangents, strict=True)]
            dual = [forward_ad.unpack_dual(t).tangent for t in f(*duals)]
        for a, b, c in zip(got, dual, want, strict=True):
            assert a.abs().max() > 0.1
            torch.testing.assert_close(a.double(), c, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(b.double(), c, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("inplace", [False, True], ids=["out", "in-place"])
    def test_grad_and_vmap(self, backend, inplace):
        leaves = (projection(), torch.randn(K), torch.randn(K))
        weight = projection()

        def loss(f):
            return lambda *a: (f(*a) * weight.to(a[0].dtype)).sum()

        ours = loss(lambda *a: through(*a, "rms-halves", backend, inplace))

        def lines(*a):
            q, k = plain(1.5 * a[0], *a[1:], "rms-halves")
            return torch.stack([q.transpose(1, 2), k.transpose(1, 2), 1.5 * a[0][:, :, 2]], dim=2)

        want = torch.func.grad(loss(lines), argnums=(0, 1, 2))(*(t.double() for t in leaves))
        for a, b in zip(torch.func.grad(ours, argnums=(0, 1, 2))(*leaves), want, strict=True):
            assert a.abs().max() > 0.1
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
        many = [torch.stack([t, -2 * t]) for t in leaves]
        each = [lines(*(t[i] for t in many)) for i in range(2)]
        got = torch.func.vmap(lambda *a: through(*a, "rms-halves", backend, inplace))(*many)
        torch.testing.assert_close(got, torch.stack(each), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inplace", [False, True], ids=["out", "in-place"])
def test_checkpointing_changes_no_bit(backend, inplace):
    leaves = [t.requires_grad_() for t in (projection(), torch.randn(K), torch.randn(K))]
    dout, found = projection(), []
    for wrap in (False, True):
        arguments = (*leaves, "rms-halves", backend, inplace)
        out = checkpoint(through, *arguments, use_reentrant=False) if wrap else through(*arguments)
        found.append((out, *torch.autograd.grad(out, leaves, dout)))
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


def test_autocast_leaves_the_dtype_and_computes_in_float32(backend):
    # The norm belongs to what autocast keeps in float32; a projection arrives in bfloat16 and leaves so.
    qkv, w = projection(torch.bfloat16), torch.randn(K, requires_grad=True)
    want = kernels.qk_norm_rope(*parts(qkv), w, w, **options("rms-halves"), backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = kernels.qk_norm_rope(*parts(qkv), w, w, **options("rms-halves"), backend=backend)
        x = projection()
        wide = kernels.qk_norm_rope(*parts(x), w, w, **options("rms-halves"), backend=backend)
    assert got[0].dtype == torch.bfloat16 and wide[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    (gradient,) = torch.autograd.grad(got[0].float().sum(), w)
    assert gradient.dtype == torch.float32 and gradient.abs().max() > 0


@needs_library
def test_compiles_whole_with_a_batch_of_any_size():
    w = torch.randn(K, requires_grad=True)

    def f(qkv):
        return torch.stack(kernels.qk_norm_rope(*parts(qkv), w, w, *TABLE))

    g = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for batch in (2, 3, 5):
        x = torch.randn(batch, T, 3, H, K, requires_grad=True)
        want, got = f(x), g(x)
        assert torch.equal(got, want)
        dout = torch.randn_like(want)
        for a, b in zip(*(torch.autograd.grad(y, (x, w), dout) for y in (got, want)), strict=True):
            assert torch.equal(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1


@needs_library
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
def test_compiles_with_symbols_for_sizes_and_a_table_of_known_size(per_sample):
    def f(x):
        tables = (t.expand(B, T, K // 2) if per_sample else t for t in rotary_table((2, 3), K))
        return torch.stack(kernels.qk_norm_rope(x, x * 1, None, None, *tables))

    x = torch.randn(B, H, T, K)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)(x), f(x))


def right_or_refused(run, want):
    """Zeros without a word are what opaque operators give to forward mode."""
    try:
        got = run()
    except Exception as error:
        assert str(error)
    else:
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@needs_library
def test_forward_mode_inside_and_around_compile():
    qkv, tangent = projection(), projection()

    def f(x):
        return kernels.qk_norm_rope(*parts(x), None, None, *TABLE)[0]

    _, want = torch.func.jvp(lambda x: plain(x, None, None, "rms-halves")[0], (qkv.double(),), (tangent.double(),))
    inside = torch.compile(lambda x, t: torch.func.jvp(f, (x,), (t,))[1], fullgraph=True, backend="aot_eager")
    got = inside(qkv, tangent)
    assert got.abs().max() > 0.1
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    g = torch.compile(f, backend="aot_eager")
    g(qkv)  # what has been compiled for plain tensors must not serve dual ones
    right_or_refused(lambda: torch.func.jvp(g, (qkv,), (tangent,))[1], want)
    with forward_ad.dual_level():
        right_or_refused(lambda: forward_ad.unpack_dual(g(forward_ad.make_dual(qkv, tangent))).tangent, want)


@pytest.mark.parametrize("inplace", [False, True], ids=["out", "in-place"])
@pytest.mark.parametrize("kind", ["rms-halves", "layer-pairs", "unturned"])
def test_flops_are_those_of_cost(backend, kind, inplace):
    if backend == "reference":
        pytest.skip("plain PyTorch: its elementwise work is not counted")
    if backend == "cpu" and dispatch._eager.get("cpu") is not None and "emulated" in str(dispatch._eager["cpu"]):
        pytest.skip("formulas are registered for the operators that users call")
    leaf = projection().requires_grad_()
    y, w = 1.5 * leaf, torch.ones(K)
    o = options(kind)
    with FlopCounterMode(display=False) as counter:
        q, k = kernels.qk_norm_rope(*parts(y), w, w, **o, inplace=inplace, backend=backend)
    arguments = (B, H, T, K, o["norm"], True, o["cos"] is not None)
    assert counter.get_total_flops() == 2 * cost.norm_rope_flops_forward(*arguments)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(q.sum() + k.sum(), leaf)
    assert counter.get_total_flops() == 2 * cost.norm_rope_flops_backward(*arguments)


def test_two_runs_are_equal_to_the_bit(backend):
    # Enough tokens for several chunks of the weight's gradient, in every backend.
    leaves = [t.requires_grad_() for t in (torch.randn(2, 257, 3, 3, 16), torch.randn(16), torch.randn(16))]
    cos, sin = rotary_table((257,), 16)
    runs = []
    for _ in range(2):
        q, k = kernels.qk_norm_rope(*parts(leaves[0]), *leaves[1:], cos, sin, backend=backend)
        runs.append(torch.autograd.grad(q.sum() + k.square().sum(), leaves))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_every_backend_is_tried_in_order_after_its_self_check(monkeypatch, tmp_path):
    monkeypatch.setenv("DITSCALE_CACHE", str(tmp_path))
    monkeypatch.setattr(dispatch, "unavailable_reason", lambda *_: None)
    asked = []

    def failure(op, backend, dtype, device, index):
        asked.append((op, backend, device))
        return None if backend == "triton" else "wrong"

    monkeypatch.setattr(selfcheck, "failure", failure)
    assert dispatch._auto("qk_norm_rope", "cuda", torch.bfloat16, None) == "triton"
    assert asked == [("qk_norm_rope", b, "cuda") for b in ("cpu", "cuda", "triton")]


@needs_library
@pytest.mark.parametrize("break_it", ["halves", "pairs"])
def test_the_self_check_sees_a_wrong_rotation(monkeypatch, break_it):
    # A kernel that is right but for one kind of pairs must not pass.
    real = torch.ops.ditscale

    class Wrong:
        def __getattr__(self, name):
            def call(*a):
                if name == "qk_norm_rope_fwd" and a[2] is not None and a[-1] == (break_it == "pairs"):
                    a = (*a[:3], -a[3], *a[4:])
                return getattr(real, name)(*a)

            return call

    assert selfcheck.compare("qk_norm_rope", "cpu", torch.float32, "cpu") is None
    monkeypatch.setitem(dispatch._eager, "cpu", Wrong())
    assert "is off by" in selfcheck.compare("qk_norm_rope", "cpu", torch.float32, "cpu")


@needs_library
def test_dtypes_that_no_kernel_takes_are_refused_by_name_or_taken_by_the_reference():
    q = torch.randn(1, 2, 3, 8)
    half = q.bfloat16()
    with pytest.raises(BackendUnavailable, match="'cpu' cannot run qk_norm_rope here: it takes q and k of one dtype"):
        kernels.qk_norm_rope(q, half, backend="cpu")
    got, want = (kernels.qk_norm_rope(q, half, backend=b) for b in ("auto", "reference"))
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))
    eight = q.to(torch.float8_e4m3fn)
    for name, pair in (("q", (eight, eight)), ("k", (q, eight))):
        with pytest.raises(InputError, match=f"^{name}: expected float32, bfloat16, float16 or float64, got float8"):
            kernels.qk_norm_rope(*pair)


def test_rotated_heads_may_be_written_in_place(backend):
    x = torch.randn(2, 2, 5, 8, requires_grad=True)

    def heads():
        return kernels.qk_norm_rope(x * 1, x * 2, backend=backend)

    q, k = heads()
    q *= 0.5
    k += 1
    (got,) = torch.autograd.grad(q.sum() + k.sum(), x)
    (want,) = torch.autograd.grad(0.5 * heads()[0].sum() + heads()[1].sum(), x)
    assert torch.allclose(got, want, atol=1e-6)
