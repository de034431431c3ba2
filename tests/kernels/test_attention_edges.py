"""Empty dimensions, NaN and infinity, memory layouts, equal bits, far addresses, users' mistakes."""

from __future__ import annotations

import resource

import pytest
import torch
from attention_cases import make
from cases import DTYPES, NAME

from ditscale import kernels
from ditscale.errors import BackendUnavailable, InputError
from ditscale.kernels import library

needs_library = pytest.mark.skipif(library.missing_reason("cpu") is not None, reason="libditscale_cpu is missing")
auto_is_ours = pytest.mark.skipif(library.cpu_isa() in (None, "portable"), reason="auto is PyTorch's attention here")


@pytest.mark.parametrize("B,H,T,S", [(0, 2, 5, 5), (2, 0, 5, 5), (2, 2, 0, 5), (2, 2, 5, 0)])
def test_empty(backend, B, H, T, S):
    q = torch.randn(B, H, T, 8, requires_grad=True)
    k, v = (torch.randn(B, H, S, 8, requires_grad=True) for _ in range(2))
    out = kernels.attention(q, k, v, backend=backend)
    assert out.shape == q.shape
    assert not out.any()  # no keys: zeros
    for g, leaf in zip(torch.autograd.grad(out.sum(), (q, k, v)), (q, k, v), strict=True):
        assert g.shape == leaf.shape
        assert not g.any()


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # the maximum in Triton's interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=NAME.get)
def test_nan_of_a_query_stays_in_its_row(backend, dtype):
    call = make(2, 2, 70, 24, dtype)
    call.q = call.q.clone()
    call.q[1, 0, 65, 3] = float("nan")
    got = call.run(backend)
    hit = torch.zeros(2, 2, 70, dtype=torch.bool)
    hit[1, 0, 65] = True
    for name in ("out", "dq"):
        assert torch.equal(got[name].isnan().all(-1), hit), name
        assert torch.equal(got[name].isnan().any(-1), hit), name
    head = torch.tensor([[False, False], [True, False]])  # every key of that head met that query
    for name in ("dk", "dv"):
        assert torch.equal(got[name].isnan().any(-1).any(-1), head), name


@pytest.mark.parametrize("where", ["k", "v"])
def test_nan_of_a_key_or_value_reaches_every_query_of_its_head(backend, where):
    call = make(2, 2, 70, 24)
    setattr(call, where, getattr(call, where).clone())
    getattr(call, where)[1, 0, 65, 3] = float("nan")
    out = call.run(backend)["out"]
    head = torch.tensor([[False, False], [True, False]])
    assert torch.equal(out.isnan().any(-1).all(-1), head)
    assert torch.equal(out.isnan().any(-1).any(-1), head)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_keys_beyond_the_lengths_are_never_read(backend, poison):
    call = make(3, 2, 70, 24, lengths=[5, 64, 0])
    want = call.run(backend)
    call.k, call.v = call.k.clone(), call.v.clone()
    for b, n in enumerate([5, 64, 0]):
        call.k[b, :, n:] = poison
        call.v[b, :, n:] = poison
    got = call.run(backend)
    for name in call.names:
        assert torch.equal(got[name], want[name]), name


def test_keys_outside_the_sequences_are_never_read(backend):
    call = make(1, 2, 20, 8, cu=([0, 7, 15], [0, 7, 15]))
    want = call.run(backend)
    for name in ("q", "k", "v"):
        setattr(call, name, getattr(call, name).clone())
        getattr(call, name)[:, :, 15:] = float("nan")
    got = call.run(backend)
    for name in call.names:
        assert torch.equal(got[name][:, :, :15], want[name][:, :, :15]), name
        assert not got[name][:, :, 15:].any() or backend == "reference", name


def test_a_row_of_minus_infinity_is_zero():
    q, v = torch.full((1, 1, 3, 4), 1.0), torch.randn(1, 1, 5, 4)
    k = torch.full((1, 1, 5, 4), float("-inf"))
    assert not kernels.attention(q, k, v, backend="cpu").any()
    k[0, 0, 2] = 0.0  # one key that counts takes all the weight
    torch.testing.assert_close(kernels.attention(q, k, v, backend="cpu"), v[:, :, 2:3].expand(1, 1, 3, 4))


def test_the_next_projection_reads_the_output_in_place():
    q, k, v = torch.randn(2, 64, 3, 3, 8).permute(2, 0, 3, 1, 4)
    out = kernels.attention(q, k, v, backend="cpu")
    flat = out.transpose(1, 2).reshape(2, 64, 24)
    assert flat.data_ptr() == out.data_ptr()
    assert flat.is_contiguous()


def test_the_packed_gradient_is_one_tensor():
    qkv = torch.randn(2, 64, 3, 3, 8, requires_grad=True)
    kernels.attention_qkv(qkv, backend="cpu").sum().backward()
    assert qkv.grad.is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=NAME.get)
@pytest.mark.parametrize("shape", [(4, 3, 64, 8), (1, 2, 600, 24)], ids=["heads", "pieces"])
def test_equal_bits_from_run_to_run_and_for_any_thread_count(backend, shape, dtype):
    call = make(*shape, dtype)
    first = call.run(backend)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3) if backend != "reference" else (threads,):
            torch.set_num_threads(count)
            for name, value in call.run(backend).items():
                assert torch.equal(value, first[name]), (name, count)
    finally:
        torch.set_num_threads(threads)


def test_a_sample_does_not_depend_on_its_batch():
    # Blocks follow from T and S alone, so a batch of eight gives each sample the bits that it has alone.
    call = make(8, 3, 70, 24)
    whole = kernels.attention(call.q, call.k, call.v, backend="cpu")
    for b in (0, 7):
        alone = kernels.attention(*(t[b : b + 1] for t in (call.q, call.k, call.v)), backend="cpu")
        assert torch.equal(alone[0], whole[b])


def test_offsets_beyond_31_bits():
    far = 2**31 + 8
    try:
        store = torch.empty(far + 64, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    x = store.as_strided((2, 1, 4, 16), (far, 16, 16, 1))
    x.copy_(torch.randn(2, 1, 4, 16))
    got = kernels.attention(x, x, x, backend="cpu")
    dense = x.clone()
    assert torch.equal(got, kernels.attention(dense, dense, dense, backend="cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(q=a["q"][0]), "q: expected [B, H, T, K]"),
        (lambda a: a.update(k=a["k"][..., :3]), "k, v: expected [B, H, S, K]"),
        (lambda a: a.update(v=a["v"][:, :, :3]), "k, v: expected [B, H, S, K]"),
        (lambda a: a.update(k=a["k"][:, :2], v=a["v"][:, :2]), "k: expected a number of heads that divides"),
        (lambda a: a.update(k=a["k"].double()), "k: expected torch.float32"),
        (lambda a: a.update(q=a["q"].int()), "q: expected a floating-point tensor"),
        (lambda a: a.update(lengths=torch.ones(2)), "lengths: expected a vector of integers"),
        (lambda a: a.update(lengths=torch.ones(3, dtype=torch.int64)), "lengths: expected 2 integers"),
        (lambda a: a.update(key_bias=torch.ones(3, 5)), "key_bias: expected [5], [2, 5] or [2, 3, 5]"),
        (lambda a: a.update(key_bias=torch.ones(5, dtype=torch.int64)), "key_bias: expected floating-point or bool"),
        (lambda a: a.update(max_seqlen=3), "max_seqlen: expected together with cu_seqlens"),
        (lambda a: a.update(cu_seqlens=torch.tensor([0, 5])), "q: expected packed sequences as one sample"),
        (lambda a: a.update(backend="cudnn"), "backend: expected one of"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {n: torch.randn(2, 3, 5, 8) for n in ("q", "k", "v")}
    change(arguments)
    with pytest.raises(InputError, match=message.replace("[", r"\[")) as caught:
        kernels.attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
    assert "\n" not in str(caught.value)


def test_mistakes_of_the_packed_call_are_named():
    with pytest.raises(InputError, match="qkv: expected"):
        kernels.attention_qkv(torch.randn(2, 3, 5, 8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cu_seqlens": torch.tensor([0, 9]), "lengths": torch.tensor([9])},
            "lengths: expected none beside cu_seqlens",
        ),
        ({"cu_seqlens": torch.tensor([0.0, 9.0])}, "cu_seqlens: expected a vector of integers"),
        ({"cu_seqlens": torch.tensor([0, 9]), "cu_seqlens_k": torch.tensor([0])}, "cu_seqlens_k: expected 2 integers"),
        ({"cu_seqlens": torch.tensor([0, 9]), "max_seqlen": 10}, "max_seqlen: expected an integer from 0 to 9, got 10"),
        (
            {"cu_seqlens": torch.tensor([0, 9]), "max_seqlen": 2.5},
            "max_seqlen: expected an integer from 0 to 9, got 2.5",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 9]), "max_seqlen": "a"},
            "max_seqlen: expected an integer from 0 to 9, got 'a'",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 2, 9]), "max_seqlen": 6},
            "max_seqlen: expected at least the 7 tokens of the longest sequence, got 6",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 9]), "cu_seqlens_k": torch.tensor([0, 9]), "max_seqlen_k": 0},
            "max_seqlen_k: expected at least the 9 tokens",
        ),
        ({"cu_seqlens": torch.tensor([0, 9]), "max_seqlen_k": 9}, "max_seqlen_k: expected together with cu_seqlens_k"),
    ],
)
def test_mistakes_of_packed_calls_are_named(change, message):
    q = torch.randn(1, 2, 9, 8)
    with pytest.raises(InputError, match=message):
        kernels.attention(q, q, q, **change)
    with pytest.raises(InputError, match="cu_seqlens_k: expected where k has another number"):
        kernels.attention(q, q[:, :, :5], q[:, :, :5], cu_seqlens=torch.tensor([0, 9]))


@pytest.mark.parametrize("called", ["auto", "reference", "sdpa", "cpu"])
@pytest.mark.parametrize(
    "ends", [[1, 9], [0, 5, 4, 9], [0, 10], [-5, 9], [0, 2**32 + 9], [0, 2**31 - 1, -(2**31), 9]], ids=str
)
def test_ends_out_of_order_are_refused(ends, called):
    q = torch.randn(1, 2, 9, 8)
    with pytest.raises(
        InputError, match="cu_seqlens: expected positions that start at 0 and never fall, at most 9, got"
    ):
        kernels.attention(q, q, q, cu_seqlens=torch.tensor(ends), backend=called)


@needs_library
def test_the_library_refuses_ends_that_wrap_around():
    q = torch.randn(1, 2, 9, 8)
    cu = torch.tensor([0, 2**31 - 1, -(2**31), -1, 9], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="cu_q: expected positions that start at 0"):
        torch.ops.ditscale.attention_fwd(q, q, q, None, None, cu, cu, 9, 9, 1.0, False)


@needs_library
@pytest.mark.parametrize("hidden", [64, 100, 160])
def test_the_least_float_as_a_mask(hidden):
    """As masks of padding have it, over whole blocks of keys, or all: those have equal weights then, as PyTorch's have."""
    q, k, v = (torch.randn(2, 2, 160, 64, requires_grad=True) for _ in range(3))
    bias = torch.zeros(2, 160)
    bias[1, :hidden] = torch.finfo(torch.float32).min
    out, want = (kernels.attention(q, k, v, key_bias=bias, backend=b) for b in ("cpu", "reference"))
    assert (out - want).abs().max() < 1e-5
    for got, exact in zip(*(torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (out, want)), strict=True):
        assert (got - exact).abs().max() < 1e-4


@pytest.mark.parametrize("mask", [torch.finfo(torch.float32).min, -2.5e38, torch.finfo(torch.float32).max])
def test_a_mask_of_every_key_that_counts(mask):
    """In units of log 2 it is infinite: a kernel that keeps scores in those would give zeros, or NaN."""
    pytest.importorskip("triton")
    q, k, v = (torch.randn(3, 2, 5, 8, requires_grad=True) for _ in range(3))
    bias = torch.zeros(3, 5)
    bias[1], bias[1, 3:], bias[2, :4] = mask, 0.0, float("-inf")
    options = {"key_bias": bias.requires_grad_(), "lengths": torch.tensor([5, 3, 4])}
    out, want = (kernels.attention(q, k, v, **options, backend=b) for b in ("triton", "reference"))
    assert (out - want).abs().max() < 1e-5
    inputs = (q, k, v, bias)
    for got, exact in zip(*(torch.autograd.grad(o.square().sum(), inputs) for o in (out, want)), strict=True):
        assert (got - exact).abs().max() < 1e-4


@pytest.mark.parametrize("score", [-50.0, -88.7, -89.0, -1e4])
def test_low_scores_behind_keys_that_are_left_out(backend, score):
    """The first block of keys has no weight at all, so that nothing of it may be brought over to the second."""
    q, k, v = (0.01 * torch.randn(1, 1, n, 64) for n in (9, 96, 96))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    bias = torch.full((1, 96), score)
    bias[:, :64] = float("-inf")
    found = []
    for b in (backend, "reference"):
        out = kernels.attention(q, k, v, key_bias=bias, backend=b)
        found.append((out, *torch.autograd.grad(out.sum(), leaves)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


@needs_library
@pytest.mark.parametrize("bias", [0.0, 1e30, -3e10, -1e12], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e9, 1e20])
def test_weights_add_up_for_scores_of_any_size(size, bias):
    """A product with log2(e) would round by more than one here."""
    q, k = size * torch.randn(2, 2, 70, 64), torch.randn(2, 2, 70, 64)
    for count in (1, 70):
        key_bias = torch.zeros(2, 70)
        key_bias[:, :count] = bias
        out = kernels.attention(q, k, torch.ones_like(k), key_bias=key_bias, backend="cpu")
        assert (out - 1).abs().max() < 1e-5


def test_no_head_of_queries():
    q, k = torch.randn(2, 0, 4, 8, requires_grad=True), torch.randn(2, 2, 4, 8, requires_grad=True)
    out = kernels.attention(q, k, k)
    dq, dk = torch.autograd.grad(out.sum(), (q, k), allow_unused=True, materialize_grads=True)
    assert out.shape == (2, 0, 4, 8) and not dk.any()


def test_a_scale_that_would_get_no_gradient_is_refused():
    qkv, scale = torch.randn(1, 5, 3, 1, 8), torch.tensor(0.5, requires_grad=True)
    q = qkv[:, :, 0].transpose(1, 2)
    for call in (lambda: kernels.attention(q, q, q, scale=scale), lambda: kernels.attention_qkv(qkv, scale=scale)):
        with pytest.raises(InputError, match="scale: expected a number, got a tensor that requires a gradient"):
            call()
        with torch.no_grad():
            assert call().isfinite().all()


def test_scales_beyond_float32_are_refused_and_tiny_ones_keep_the_gradient_of_a_bias():
    q = torch.randn(1, 1, 5, 8)
    with pytest.raises(InputError, match="scale: expected a float32 number, got 1e"):
        kernels.attention(q, q, q, scale=1e39)
    for scale in (1e-46, 1e-40):
        bias = torch.randn(5, requires_grad=True)
        (got,) = torch.autograd.grad(kernels.attention(q, q, q, scale=scale, key_bias=bias).square().sum(), bias)
        wide = q.double()
        out = kernels.attention(wide, wide, wide, scale=scale, key_bias=bias.double(), backend="reference")
        (want,) = torch.autograd.grad(out.square().sum(), bias)
        assert torch.allclose(got, want, atol=1e-6) and got.any()


@needs_library
def test_the_gradient_of_a_bias_over_many_packed_sequences_needs_little_memory():
    """A long sequence beside 40,000 of one token: rows as long as the longest for each of these were 655 MB."""
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), torch.arange(4096, 44097)])
    qkv, bias = torch.randn(1, 44096, 3, 1, 4), torch.zeros(44096, requires_grad=True)
    out = kernels.attention_qkv(qkv, cu_seqlens=ends, key_bias=bias, backend="cpu")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (got,) = torch.autograd.grad(out.square().sum(), bias)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
    assert got[:4096].any() and not got[4096:].any()  # one key has all the weight, whatever its bias


def test_a_scale_that_is_zero_in_float32(backend):
    # Seventy keys: the last block is filled up with keys of no weight, whose scores no factor may make NaN.
    q, k, v = (torch.randn(1, 1, n, 8) for n in (5, 70, 70))
    out = kernels.attention(q, k, v, scale=1e-46, backend=backend)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(out))


@auto_is_ours
@pytest.mark.parametrize("T", [1, 2, 3])
def test_one_query_is_as_right_as_many(T):
    """Where PyTorch's kernel would be the faster one, too: biases, lengths and gradients are ours."""
    q, k, v = torch.randn(2, 3, T, 64), torch.randn(2, 3, 9, 64), torch.randn(2, 3, 9, 64)
    bias = torch.zeros(2, 9)
    bias[0, 4] = float("nan")
    out = kernels.attention(q, k, v, key_bias=bias)
    assert out[0].isnan().all() and out[1].isfinite().all()
    q.requires_grad_()
    (grad,) = torch.autograd.grad(kernels.attention(q, k, v).square().sum(), q, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), q)[0].isfinite().all()


def test_a_length_out_of_range_is_refused():
    q = torch.randn(2, 3, 5, 8)
    for bad in (-1, 6):
        for backend in ("cpu", "reference"):
            with pytest.raises(InputError, match=f"lengths: expected integers from 0 to 5, got {bad}"):
                kernels.attention(q, q, q, lengths=torch.tensor([5, bad]), backend=backend)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.uint16, torch.uint32, torch.uint64], ids=str)
def test_lengths_of_any_kind_of_integer(kind):
    q, lengths = torch.randn(2, 3, 5, 8), torch.tensor([2, 5])
    assert torch.equal(
        kernels.attention(q, q, q, lengths=lengths.to(kind)), kernels.attention(q, q, q, lengths=lengths)
    )
    with pytest.raises(InputError, match="lengths: expected integers from 0 to 5, got 6"):
        kernels.attention(q, q, q, lengths=torch.tensor([5, 6]).to(kind))


def test_a_backend_that_cannot_run_says_why():
    q = torch.randn(1, 1, 4, 8, dtype=torch.float64)
    with pytest.raises(BackendUnavailable, match="float64"):
        kernels.attention(q, q, q, backend="cpu")
