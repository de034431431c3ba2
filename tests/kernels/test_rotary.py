"""QK-norm and rotary embedding: values and gradients against float64, tables, NaN, equal bits, PyTorch's machinery."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from cases import DTYPES, NAME
from oracles import judge_draws, wide
from torch.utils.flop_counter import FlopCounterMode

from ditscale import kernels
from ditscale.errors import InputError
from ditscale.kernels import library
from ditscale.kernels.rotary import cost
from ditscale.kernels.rotary.reference import norm_rope_ref
from ditscale.kernels.rotary.tables import rotary_table

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=NAME.get)
needs_library = pytest.mark.skipif(library.missing_reason("cpu") is not None, reason="libditscale_cpu is missing")


# (B, H, T, K) and why it is here.
SHAPES = {
    "one": (1, 1, 1, 2),  # a single pair
    "demo": (2, 3, 16, 8),  # half a head is four numbers
    "dit-s": (2, 2, 9, 64),
    "dit-xl": (1, 2, 7, 72),  # half a head, 36, is no whole number of vectors
    "odd-half": (2, 1, 5, 26),  # halves of 13
    "many-tokens": (2, 2, 300, 16),  # the weight's gradient is summed in chunks
    "video": (1, 3, 5, 128),  # heads that no step of four divides
}


def exact(x, w, cos, sin, dout, norm, interleaved, eps):
    """Float64 in numpy, gradients by hand: y = R(n w), n = normalised x."""
    K = x.shape[-1]
    mean = x.mean(-1, keepdims=True) if norm == "layer" else 0.0
    rstd = 1.0 if norm == "none" else 1 / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps)
    n = (x - mean) * rstd
    scaled = n if w is None else n * w
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, K // 2), slice(K // 2, None))

    def turn(a, c, s):
        b = np.empty_like(a)
        b[..., first] = a[..., first] * c - a[..., second] * s
        b[..., second] = a[..., second] * c + a[..., first] * s
        return b

    y, g = scaled, dout
    if cos is not None:
        c, s = (t[:, None] if t.ndim == 3 else t for t in (cos, sin))
        y, g = turn(scaled, c, s), turn(dout, c, -s)
    dw = None if w is None else (g * n).sum((0, 1, 2))
    g = g if w is None else g * w
    dx = g
    if norm != "none":
        dx = g - n * (g * n).mean(-1, keepdims=True)
        if norm == "layer":
            dx = dx - g.mean(-1, keepdims=True)
        dx = dx * rstd
    return {"y": y, "dx": dx, "dw": dw}, float(np.abs(g * rstd).max(initial=0.0))


def run(which, x, w, cos, sin, dout, norm, interleaved, eps=1e-6):
    leaves = [t.detach().requires_grad_() for t in (x, w) if t is not None]
    weight = leaves[1] if w is not None else None
    if which == "plain":  # a model's lines, every step at the dtype
        a = leaves[0]
        if norm == "layer":
            a = torch.nn.functional.layer_norm(a, a.shape[-1:], weight, None, eps)
        elif norm == "rms":
            a = torch.nn.functional.rms_norm(a, a.shape[-1:], weight, eps)
        elif weight is not None:
            a = a * weight
        y = norm_rope_ref(a, None, cos, sin, norm="none", interleaved=interleaved)
    else:
        y, _ = kernels.qk_norm_rope(
            leaves[0], leaves[0], weight, None, cos, sin, eps=eps, norm=norm, interleaved=interleaved, backend=which
        )
    found = torch.autograd.grad(y, leaves, dout)
    return {"y": y, "dx": found[0], "dw": found[1] if w is not None else None}


@dtypes
@pytest.mark.parametrize("rotated", ["plain", "halves", "pairs", "per-sample"])
@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_values_and_gradients(backend, shape, norm, rotated, dtype):
    B, H, T, K = shape
    results = []
    for draw in range(6 if T < 100 else 2):
        x = torch.randn(B, T, 3, H, K, dtype=torch.float64).to(dtype).permute(2, 0, 3, 1, 4)[draw % 3]
        dout = torch.randn(B, H, T, K, dtype=torch.float64).to(dtype)
        w = None if draw % 2 and rotated != "plain" else torch.randn(K).to(dtype)
        cos = sin = None
        if rotated != "plain":
            angles = torch.randn((B, T, K // 2) if rotated == "per-sample" else (T, K // 2))
            cos, sin = angles.cos(), angles.sin()
        arguments = (x, w, cos, sin, dout, norm, rotated == "pairs")
        want, terms = exact(*(wide(t) for t in arguments[:5]), norm, rotated == "pairs", 1e-6)
        results.append((run(backend, *arguments), want, run("plain", *arguments), terms))
    for name in ("y", "dx", "dw"):
        draws = [(g[name], e[name], p[name], t) for g, e, p, t in results if e[name] is not None]
        for got, *_ in draws:
            assert got.dtype == dtype
        judge_draws(name, draws)


@pytest.mark.parametrize("width", [26, 66, 72])
def test_constant_rows_are_centred_to_zeros(backend, width):
    """A sum of equal numbers is seldom their multiple: what is left of the mean would be divided by sqrt(eps)."""
    x = torch.tensor([123.456, 45678.9, -7.7]).view(1, 1, 3, 1).repeat(1, 2, 1, width)
    for interleaved in (False, True):
        angles = torch.zeros(3, width // 2)
        q, _ = kernels.qk_norm_rope(
            x, x, None, None, angles.cos(), angles.sin(), norm="layer", interleaved=interleaved, backend=backend
        )
        assert not q.any()


@pytest.mark.native
def test_the_weights_gradient_over_many_tokens(native):
    """A chunk of the sum has 1,024 rows here: added in turn they lost more than twice what PyTorch's sums lose."""
    x, dout, angles = torch.randn(1, 16, 4096, 64), torch.randn(1, 16, 4096, 64), torch.randn(4096, 32)
    arguments = (x, torch.randn(64), angles.cos(), angles.sin(), dout, "rms", False)
    want, terms = exact(*(wide(t) for t in arguments[:5]), "rms", False, 1e-6)
    judge_draws("dw", [(run("cpu", *arguments)["dw"], want["dw"], run("plain", *arguments)["dw"], terms)])


COUNT = 60


@pytest.mark.parametrize("seed", range(COUNT))
def test_random_calls(request, backend, seed):
    if ("triton" in request.node.name or "emulated" in request.node.name) and seed >= COUNT // 4:
        pytest.skip("interpreted backends run a quarter of the seeds")
    rng = random.Random(seed)
    torch.manual_seed(seed)
    B, H, T = rng.randint(1, 3), rng.choice([1, 2, 3, 5, 7]), rng.choice([1, 2, 7, 13, 31, 97, 257])
    if "triton" in request.node.name:  # its interpreter runs program after program
        H, T = min(H, 3), min(T, 31)
    rotated = rng.choice(["plain", "halves", "halves", "pairs", "per-sample"])
    K = rng.choice([2, 8, 12, 24, 26, 40, 64, 72, 80, 96, 128, 144])
    K = rng.choice([1, 3, 13, 57, K]) if rotated == "plain" else K
    dtype, norm, where = rng.choice(DTYPES), rng.choice(["rms", "layer", "none"]), rng.randint(0, 3)
    # Sizes whose results every dtype holds; rows of zeros beside others.
    size, eps, weighted, zeros = (
        10 ** rng.uniform(-3, 3),
        rng.choice([1e-6, 1e-3]),
        rng.random() < 0.7,
        rng.random() < 0.3,
    )
    results = []
    for _ in range(2 if K * T * H * B > 500 else 8):
        x = (size * torch.randn(B, T, 3, H, K, dtype=torch.float64)).to(dtype)
        if zeros:
            x[:, 0] = 0
        dout = torch.randn(B, T, H, K, dtype=torch.float64).to(dtype)
        if where == 0:  # rows at addresses that no wide access can take
            pad = torch.full((B, T, 3, H, K + 3), float("nan"), dtype=dtype)
            pad[..., 1 : K + 1] = x
            x = pad[..., 1 : K + 1]
        elif where == 1:  # a gradient whose last dimension is not dense
            dout = dout.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
        x, dout = x.permute(2, 0, 3, 1, 4)[1], dout.transpose(1, 2)
        w = torch.randn(K).to(dtype) if weighted else None
        angles = torch.randn((B, T, K // 2) if rotated == "per-sample" else (T, K // 2))
        cos, sin = (None, None) if rotated == "plain" else (angles.cos(), angles.sin())
        arguments = (x, w, cos, sin, dout, norm, rotated == "pairs", eps)
        want, terms = exact(*(wide(t) for t in arguments[:5]), *arguments[5:])
        results.append((run(backend, *arguments), want, run("plain", *arguments), terms))
    for name in ("y", "dx", "dw"):
        draws = [(g[name], e[name], p[name], t) for g, e, p, t in results if e[name] is not None]
        if draws:
            judge_draws(name, draws)


def test_wide_accesses_are_aligned_and_threads_do_not_race(emulated_operators, shim_counts):
    # What a GPU would fault on or answer differently from run to run, which the host does not notice by itself.
    for dtype in DTYPES:
        for K, pairs in ((64, False), (72, False), (72, True), (128, True), (26, False)):
            x = torch.randn(1, 5, 3, 3, K).to(dtype).permute(2, 0, 3, 1, 4)[1]
            cos, sin = rotary_table((5,), K)
            arguments = (x, torch.randn(K), cos, sin, 1e-6, 1, pairs)
            y = emulated_operators.qk_norm_rope_fwd(*arguments)
            one = emulated_operators.qk_norm_rope_bwd(y, *arguments)
            shim_counts(backwards=True)
            two = emulated_operators.qk_norm_rope_bwd(y, *arguments)
            assert shim_counts()[:3] == [0, 0, 0], (dtype, K)
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_two_heads_of_keys_and_other_strides(backend):
    q, k = torch.randn(2, 4, 9, 24), torch.randn(2, 24, 2, 9).permute(0, 2, 3, 1)  # width not contiguous
    cos, sin = rotary_table((3, 3), 24)
    got = kernels.qk_norm_rope(q, k, None, None, cos, sin, backend=backend)
    for a, b in zip(got, (q, k), strict=True):
        torch.testing.assert_close(a, norm_rope_ref(b, None, cos, sin))


def test_nan_stays_in_its_row(backend):
    x = torch.randn(2, 3, 9, 24)
    x[1, 2, 4, 7] = float("nan")
    x.requires_grad_()
    cos, sin = rotary_table((9,), 24)
    y, _ = kernels.qk_norm_rope(x, x, None, None, cos, sin, backend=backend)
    (dx,) = torch.autograd.grad(y.sum(), x)
    hit = torch.zeros(2, 3, 9, dtype=torch.bool)
    hit[1, 2, 4] = True
    for t in (y, dx):
        assert torch.equal(t.isnan().all(-1), hit)
        assert torch.equal(t.isnan().any(-1), hit)


@needs_library
@pytest.mark.parametrize("w", [torch.linspace(-1, 1, 24), None], ids=["weighted", "plain"])
def test_equal_bits_for_any_thread_count(w):
    x = torch.randn(2, 3, 300, 24)
    dout = torch.randn(2, 3, 300, 24)
    first = run("cpu", x, w, None, None, dout, "rms", False)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for name, value in run("cpu", x, w, None, None, dout, "rms", False).items():
                assert value is None or torch.equal(value, first[name]), (name, count)
    finally:
        torch.set_num_threads(threads)


@needs_library
@pytest.mark.parametrize(
    ("dtype", "H", "K", "interleaved"),
    [
        (torch.float32, 4, 64, False),  # rows of whole cache lines
        (torch.float32, 4, 72, False),  # of half ones
        (torch.float32, 3, 20, True),  # of quarters
        (torch.bfloat16, 4, 72, True),
        (torch.float16, 2, 40, False),
        (torch.float32, 3, 10, False),  # of none: written as usual
    ],
    ids=str,
)
def test_large_results_are_the_same_as_small_ones(dtype, H, K, interleaved):
    """Calls larger than the caches write past them (csrc/cpu/past_caches.h)."""
    T = (17 << 20) // (2 * H * K * dtype.itemsize)
    x, dout = torch.randn(1, T, 3, H, K).to(dtype)[:, :, 1].transpose(1, 2), torch.randn(1, H, T, K).to(dtype)
    w, angles = torch.randn(K).to(dtype), torch.randn(T, K // 2)
    cos, sin = angles.cos(), angles.sin()
    whole = run("cpu", x, w, cos, sin, dout, "rms", interleaved)
    for at in range(0, T, T // 4):
        some = slice(at, at + 33)
        part = run("cpu", x[:, :, some], w, cos[some], sin[some], dout[:, :, some], "rms", interleaved)
        for name in ("y", "dx"):
            assert torch.equal(whole[name][:, :, some], part[name])


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 0, 5, 8), (2, 2, 0, 8)])
def test_empty(backend, shape):
    x, w = torch.zeros(shape, requires_grad=True), torch.ones(8, requires_grad=True)
    q, k = kernels.qk_norm_rope(x, x, w, w, backend=backend)
    assert q.shape == k.shape == shape
    assert not torch.autograd.grad(q.sum(), w)[0].any()


def test_gradients_of_the_reference():
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, dtype=torch.float64, requires_grad=True)
    angles = torch.randn(3, 2, dtype=torch.float64)

    def f(x, w):
        return norm_rope_ref(x, w, angles.cos(), angles.sin(), norm="layer")

    assert torch.autograd.gradcheck(f, (x, w), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (x, w))


@needs_library
def test_opcheck_and_compile():
    from ditscale.kernels.rotary import native  # noqa: F401 (describes the operators)

    op = torch.ops.ditscale
    x, w = torch.randn(2, 5, 3, 8).transpose(1, 2), torch.randn(8)
    cos, sin = rotary_table((5,), 8)
    tests = ("test_schema", "test_faketensor")
    for weight, c, s in ((w, cos, sin), (None, None, None)):
        torch.library.opcheck(op.qk_norm_rope_fwd.default, (x, weight, c, s, 1e-6, 1, False), test_utils=tests)
        torch.library.opcheck(op.qk_norm_rope_.default, (x, weight, c, s, 1e-6, 1, False), test_utils=tests)
        torch.library.opcheck(op.qk_norm_rope_bwd.default, (x, x, weight, c, s, 1e-6, 1, False), test_utils=tests)

    def f(x, w):
        return kernels.qk_norm_rope(x, x, w, None, cos, sin)[0]

    g = torch.compile(f, fullgraph=True, backend="aot_eager")
    leaves = [t.detach().requires_grad_() for t in (x, w)]
    dout = torch.randn(2, 3, 5, 8)
    want, got = f(*leaves), g(*leaves)
    assert torch.equal(want, got)
    for a, b in zip(*(torch.autograd.grad(y, leaves, dout) for y in (want, got)), strict=True):
        assert torch.equal(a, b)


def test_forward_mode_and_second_derivatives(backend):
    x, t = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    cos, sin = rotary_table((5,), 8)

    def f(x, which=backend):
        return kernels.qk_norm_rope(x, x, None, None, cos, sin, backend=which)[0]

    _, tangent = torch.func.jvp(f, (x,), (t,))
    torch.testing.assert_close(tangent, torch.func.jvp(lambda x: f(x, "reference"), (x,), (t,))[1])
    assert tangent.abs().max() > 0.1
    found = []
    for which in (backend, "reference"):
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(f(leaf, which).square().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), leaf)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@needs_library
def test_flops_are_counted():
    B, H, T, K = 2, 3, 5, 8
    x, w = torch.randn(B, H, T, K, requires_grad=True), torch.ones(K)
    cos, sin = rotary_table((T,), K)
    with FlopCounterMode(display=False) as counter:
        q, k = kernels.qk_norm_rope(x, x, w, w, cos, sin, backend="cpu")
    assert counter.get_total_flops() == cost.qk_norm_rope_flops_forward(B, H, T, K)
    with FlopCounterMode(display=False) as counter:
        (q.sum() + k.sum()).backward()
    assert counter.get_total_flops() == cost.qk_norm_rope_flops_backward(B, H, T, K)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_weight": torch.ones(3)}, "q_weight: expected"),
        ({"cos": torch.ones(5, 4)}, "cos, sin: expected both"),
        ({"cos": torch.ones(5, 3), "sin": torch.ones(5, 3)}, r"cos: expected \[T, K / 2\] = \[5, 4\]"),
        ({"norm": "batch"}, "norm: expected 'rms', 'layer' or 'none'"),
    ],
)
def test_mistakes_are_named(change, message):
    x = torch.randn(2, 3, 5, 8)
    with pytest.raises(InputError, match=message):
        kernels.qk_norm_rope(x, x, **change)


def test_tables_of_three_axes():
    cos, sin = rotary_table((2, 3, 4), 12, text_tokens=5, theta=100.0)
    assert cos.shape == sin.shape == (29, 6)
    assert torch.equal(cos[:5], torch.ones(5, 6))  # text is not turned
    assert not sin[:5].any()
    # Token (1, 2, 3): two pairs an axis, frequencies 1 and 100^(-1/2).
    angles = torch.tensor([1, 0.1, 2, 0.2, 3, 0.3])
    torch.testing.assert_close(cos[-1], angles.cos())
    torch.testing.assert_close(sin[-1], angles.sin())


def test_scores_depend_on_the_distance_alone(backend):
    # What a rotary embedding is for: shifting every position of an axis changes no score.
    q, k = (
        torch.randn(1, 1, 1, 16, dtype=torch.float32).expand(1, 1, 20, 16),
        torch.randn(1, 1, 1, 16).expand(1, 1, 20, 16),
    )
    cos, sin = rotary_table((4, 5), 16)
    a, b = kernels.qk_norm_rope(q, k, None, None, cos, sin, norm="none", backend=backend)
    s = (a @ b.transpose(-1, -2))[0, 0].view(4, 5, 4, 5)
    torch.testing.assert_close(s[0, 0, 1, 2], s[2, 1, 3, 3])
    torch.testing.assert_close(s[1, 3, 0, 1], s[3, 4, 2, 2])


def test_widths_and_scales_of_a_table():
    cos, _ = rotary_table((4, 4), 8, widths=(8, 0), scales=(0.5, 1.0))
    assert torch.equal(cos[0], cos[3])  # the second axis has no width
    one, _ = rotary_table((4,), 8, scales=(0.5,))
    assert torch.equal(cos[::4], one)
    for bad in ({"widths": (3, 5)}, {"widths": (4, 2)}, {"scales": (1.0,)}, {"text_tokens": -1}, {"theta": 0.0}):
        with pytest.raises(InputError):
            rotary_table((4, 4), 8, **bad)
    for number in (float("nan"), float("inf")):  # the tables would be NaN without a word
        for bad in ({"scales": (1.0, number)}, {"theta": number}):
            with pytest.raises(InputError, match="finite"):
                rotary_table((4, 4), 8, **bad)
    for sizes, K in (((0, 3), 8), ((1, 2, 3, 4), 8), ((4,), 7), ((4, 4), 2), ((2, 4, 4), 4)):
        with pytest.raises(InputError):
            rotary_table(sizes, K)
