"""Linear layers: values and gradients against float64, strides, what serves when, PyTorch's machinery, mistakes."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import judge_draws, wide
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ditscale.errors import BackendUnavailable, InputError
from ditscale.kernels import dispatch, linear
from ditscale.kernels.matmul import choice, cost, onednn

# Backends other than PyTorch's own products.
OURS = ("cpu", "onednn")


def or_skip(backend):
    reason = dispatch.unavailable_reason("linear", backend, "cpu")
    if reason:
        pytest.skip(reason)
    return backend


@pytest.fixture(params=OURS)
def ours(request):
    """A backend other than PyTorch's own."""
    return or_skip(request.param)


def product_of(backend):
    return {"cpu": torch.ops.ditscale, "onednn": torch.ops.ditscale_onednn}[backend].product


# (rows, K, N) and why it is here.
SHAPES = {
    "one": (1, 1, 1),
    "vector": (1, 72, 40),  # no whole number of vectors
    "demo": (64, 48, 144),
    "sums-of-384": (33, 384, 20),
    "sums-of-385": (33, 385, 20),  # two pieces, the second of one
    "long-sums": (40, 1152, 96),
    "many-rows": (1500, 24, 32),  # the weight's gradient is a sum of pieces
    "fast": (512, 256, 64),  # above shapes.SMALLEST
    "few-rows": (5, 387, 371),  # of a large weight: neither side a whole number of vectors
    "few-long-sums": (48, 1664, 80),
    "edges": (301, 390, 51),  # tiles that are cut off at both sides, two pieces of a sum, two blocks of rows
}


def exact(x, weight, bias, dy):
    """Float64 in numpy, gradients by hand."""
    y = x @ weight.T
    rows_x, rows_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    found = {"y": y if bias is None else y + bias, "dx": dy @ weight, "dw": rows_dy.T @ rows_x}
    return found | ({} if bias is None else {"db": rows_dy.sum(0)})


def run(function, x, weight, bias, dy):
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = function(*leaves)
    grads = torch.autograd.grad(y, leaves, dy)
    return dict(zip(("y", "dx", "dw", "db"), (y, *grads), strict=False))


def by(backend):
    return lambda *leaves: linear(*leaves, backend=backend)


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("backend", [*OURS, "auto", "reference"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_values_and_gradients(shape, backend, biased):
    if backend in OURS:
        or_skip(backend)
    rows, K, N = shape
    results = []
    for draw in range(4):
        lead = (rows,) if draw % 2 else (1, rows)
        x, weight, dy = torch.randn(*lead, K), torch.randn(N, K), torch.randn(*lead, N)
        arguments = (x, weight, torch.randn(N) if biased else None, dy)
        want = exact(*(wide(t) for t in arguments))
        results.append((run(by(backend), *arguments), want, run(F.linear, *arguments)))
    for name in results[0][1]:
        judge_draws(name, [(got[name], want[name], plain[name], 0.0) for got, want, plain in results])


def test_a_single_vector(ours):
    x, weight, bias = torch.randn(72, requires_grad=True), torch.randn(5, 72), torch.randn(5)
    y = linear(x, weight, bias, backend=ours)
    torch.testing.assert_close(y, F.linear(x, weight, bias))
    (dx,) = torch.autograd.grad(y.sum(), x)  # from an expanded gradient
    torch.testing.assert_close(dx, weight.sum(0))


@pytest.mark.parametrize("shape", [(100, 3, 384), (100, 8, 384), (400, 3, 191), (2, 400, 384), (3, 400, 384)], ids=str)
def test_sums_of_few_rows_or_columns_are_as_exact_as_pytorchs(shape, ours):
    rows, N, K = shape
    squares = [0.0, 0.0]
    for _ in range(16):
        x, weight = torch.randn(rows, K), torch.randn(N, K)
        exact = x.double() @ weight.double().T
        for i, y in enumerate((linear(x, weight, backend=ours), F.linear(x, weight))):
            squares[i] += (y - exact).square().sum().item()
    assert squares[0] <= 1.7**2 * squares[1]  # r.m.s., with no floor


def strided(rng, rows, columns):
    """A [rows, columns] view with strides of one of the kinds that models make."""
    kind = rng.randrange(7)
    if kind == 0:
        return torch.randn(rows, columns)
    if kind == 1:
        return torch.randn(columns, rows).t()
    if kind == 2:
        return torch.randn(rows, columns + rng.randint(1, 70))[:, :columns]
    if kind == 3:
        return torch.randn(2 * rows, columns)[::2]
    if kind == 4:
        return torch.randn(1, columns).expand(rows, columns)
    if kind == 5:
        return torch.randn(rows, 2 * columns)[:, ::2]
    return torch.randn(rows * columns + 1)[1:].view(rows, columns)  # not on a vector's boundary


@pytest.mark.parametrize("seed", range(60))
def test_random_strides(seed, ours):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    rows, K, N = (rng.choice([1, 2, 3, 7, 16, 33, 64, 100]) for _ in range(3))
    if seed % 3 == 0:
        K = rng.choice([400, 777, 1000])
    if ours == "cpu" and seed % 3 == 1:  # few rows by a large weight
        rows, K, N = rng.choice([1, 2, 7, 48]), *rng.choice([(1301, 101), (390, 337), (64, 2049)])
    size = 10 ** rng.uniform(-3, 3)
    kinds, results = rng.getstate(), []
    for _ in range(4):
        rng.setstate(kinds)
        x, weight, dy = strided(rng, rows, K) * size, strided(rng, N, K), strided(rng, rows, N)
        bias = torch.randn(2 * N)[::2] if rng.random() < 0.7 else None
        want = exact(*(wide(t) for t in (x, weight, bias, dy)))
        results.append((run(by(ours), x, weight, bias, dy), want, run(F.linear, x, weight, bias, dy)))
    for name in results[0][1]:
        assert results[0][0][name].is_contiguous()
        judge_draws(name, [(got[name], want[name], plain[name], 0.0) for got, want, plain in results])


def test_strides_for_which_onednn_has_no_fast_code_are_copied(monkeypatch):
    """Its reference code takes a thousand times as long."""
    or_skip("onednn")
    given = []
    fast = torch.ops.mkldnn._linear_pointwise

    class Watch:
        @staticmethod
        def default(x, weight, *rest):
            given.append(weight)
            return fast.default(x, weight, *rest)

        @staticmethod
        def binary(x, other, weight, *rest):
            given.append(weight)
            return fast.binary(x, other, weight, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", Watch)
    for weight in (torch.randn(16, 1000), torch.randn(16, 1000)[:, :900], torch.randn(900, 32)[:, :16].t()):
        onednn.product(torch.randn(16, weight.shape[1]), weight, None, True)
    assert len(given) == 9
    assert all(w.is_contiguous() or w.t().is_contiguous() for w in given)


def test_of_few_multiply_adds_onednn_asks_the_library(monkeypatch):
    """Which takes those of few rows by a large weight; what MKL is better at for another reason stays MKL's."""
    or_skip("onednn"), or_skip("cpu")
    assert _pytorchs(lambda: onednn.product(torch.randn(2, 400), torch.randn(400, 400), None, False)) is False
    tall = torch.randn(4000, 200).t(), torch.randn(4000, 60).t()  # 48 million, a result of 12,000
    assert _pytorchs(lambda: onednn.product(*tall, None, False)) is True


def _pytorchs(call):
    """Whether PyTorch's own linear layer is asked."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        call()
    return any(event.name == "aten::linear" for event in seen.events())


def test_nan_stays_in_its_row(ours):
    x, weight = torch.randn(9, 40), torch.randn(16, 40)
    x[4, 7] = float("nan")
    y = linear(x, weight, backend=ours)
    assert torch.equal(y.isnan().all(1), y.isnan().any(1))
    assert y.isnan().any(1).nonzero().tolist() == [[4]]


@pytest.mark.parametrize("shape", [(0, 8, 4), (3, 0, 4), (3, 8, 0)])
def test_empty(shape, ours):
    rows, K, N = shape
    leaves = [t.requires_grad_() for t in (torch.zeros(rows, K), torch.zeros(N, K), torch.ones(N))]
    y = linear(*leaves, backend=ours)
    assert torch.equal(y, F.linear(*leaves))
    for got, want in zip(*(torch.autograd.grad(f.sum(), leaves) for f in (y, F.linear(*leaves))), strict=True):
        assert torch.equal(got, want)


def test_the_result_may_be_written_in_place(ours):
    x, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(4, 8)
    y = linear(x, weight, backend=ours)
    y.view(2, 3, 2, 2)[:, :, 0].transpose(1, 2).mul_(3.0)  # as qk_norm_rope(inplace=True) writes a part of a projection
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, (weight * torch.tensor([3.0, 3.0, 1.0, 1.0])[:, None]).sum(0).expand(2, 3, 8))


def test_frozen_parts_have_no_gradient(ours):
    x, weight, bias = torch.randn(600, 96), torch.randn(128, 96, requires_grad=True), torch.randn(128)
    y = linear(x, weight, bias, backend=ours)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(weight.grad, x.sum(0).expand(128, 96), atol=1e-3, rtol=1e-4)
    assert x.grad is None
    assert not linear(x, weight.detach(), bias, backend=ours).requires_grad


def resolved(monkeypatch, *, vendor, capability, isa):
    monkeypatch.setattr(choice, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(choice, "cpu_isa", lambda: isa)
    monkeypatch.setattr(dispatch, "_chosen", {})
    choice.fastest.cache_clear()
    try:
        return [dispatch.resolve("linear", "auto", "cpu", dtype) for dtype in (torch.float32, torch.bfloat16)]
    finally:
        choice.fastest.cache_clear()


AMD = "vendor_id\t: AuthenticAMD\ncpu family\t: {}\n"
INTEL = "vendor_id\t: GenuineIntel\ncpu family\t: 6\n"


@pytest.mark.parametrize(
    ("vendor", "capability", "isa", "taken"),
    [
        (AMD.format(26), "AVX512", "avx512", "onednn"),  # MKL makes no use of its AVX-512
        (AMD.format(25), "AVX512", "avx512", "cpu"),  # which is no faster there than AVX2
        ("AMD64 Family 25 Model 17 Stepping 1, AuthenticAMD", "AVX512", "avx512", "cpu"),
        (AMD.format(25), "AVX2", "avx2", "cpu"),
        (AMD.format(23), "AVX2", "avx2", "cpu"),
        (AMD.format(23), "DEFAULT", "portable", "reference"),
        (AMD.format(25), "AVX2", None, "reference"),  # no library
        (INTEL, "AVX512", "avx512", "reference"),
        (INTEL, "AVX2", "avx2", "reference"),
    ],
)
def test_auto_takes_what_is_fastest_on_a_processor(monkeypatch, vendor, capability, isa, taken):
    or_skip(taken)
    chosen = resolved(monkeypatch, vendor=vendor, capability=capability, isa=isa)
    assert chosen == [taken, "reference"]  # of half precision PyTorch's own


@pytest.fixture
def everywhere(monkeypatch, ours):
    """``auto`` takes this backend, whatever the processor."""
    monkeypatch.setattr(choice, "fastest", lambda device_type: ours if device_type == "cpu" else None)
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(dispatch, "_quick", {})
    return ours


def layer(rows=1100):
    return torch.randn(rows, 96, requires_grad=True), torch.randn(80, 96, requires_grad=True), torch.randn(80)


def test_auto_leaves_small_layers_to_pytorch(everywhere):
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(str(function))
            return function(*args, **(kwargs or {}))

    x, weight, bias = layer()
    calls = [((x[:600], weight, bias), 0), ((x, weight, bias), 1)]
    calls.append(((torch.randn(2, 400), torch.randn(400, 400), None), 1))  # its time is that of reading the weight
    for arguments, times in calls:
        called = []
        with Watch():
            linear(*arguments)
        assert called.count(str(product_of(everywhere).default)) == times


def test_opcheck(ours):
    for x, weight, bias in ((torch.randn(9, 5), torch.randn(7, 5), torch.randn(7)), (*layer()[:2], None)):
        for always in (True, False):
            torch.library.opcheck(product_of(ours).default, (x.detach(), weight.detach(), bias, always))


def test_compiles_whole_with_a_batch_of_any_size(everywhere):
    x, weight, bias = layer()
    compiled = torch.compile(linear, fullgraph=True)
    for rows in (1100, 700, 3):  # the last is small
        part = x.detach()[:rows].clone().requires_grad_()
        torch._dynamo.mark_dynamic(part, 0)
        found = [f(part, weight, bias) for f in (compiled, F.linear)]
        grads = [torch.autograd.grad(y.square().sum(), (part, weight)) for y in found]
        for got, want in zip((found[0], *grads[0]), (found[1], *grads[1]), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-2)


@pytest.mark.parametrize(("rows", "dynamic", "times"), [(600, False, 0), (1100, False, 1), (600, True, 1)])
def test_small_layers_of_one_size_compile_as_pytorchs(everywhere, rows, dynamic, times):
    """The compiler fuses what stands around them; a graph of any size has the operator, which looks at the size itself."""

    def keep(graph, inputs):
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    found = []
    x, weight, bias = (t.detach() for t in layer(rows))
    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, dynamic=dynamic, backend=keep)
    assert torch.equal(compiled(x, weight, bias), linear(x, weight, bias))
    assert found.count(str(product_of(everywhere)).removeprefix("torch.ops.")) == times


def test_autocast_is_pytorchs(everywhere):
    x, weight, bias = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x, weight, bias)
        assert torch.equal(y, F.linear(x, weight, bias))
        assert y.dtype == torch.bfloat16
        assert linear(x.bfloat16(), weight, bias).dtype == torch.bfloat16  # what the layer before gives


def test_transforms_and_second_derivatives(everywhere):
    x, weight, bias = layer()
    tangent = torch.randn_like(x)
    _, found = torch.func.jvp(lambda x: linear(x, weight, bias), (x.detach(),), (tangent,))
    torch.testing.assert_close(found, F.linear(tangent, weight))
    many = torch.func.vmap(lambda x: linear(x, weight, bias))(x.detach().view(11, 100, 96))
    torch.testing.assert_close(many.flatten(0, 1), F.linear(x, weight, bias))
    second = []
    for f in (linear, F.linear):
        (dx,) = torch.autograd.grad(f(x, weight, bias).pow(3).sum(), x, create_graph=True)
        second.append(torch.autograd.grad(dx.square().sum(), weight)[0])
    torch.testing.assert_close(*second, rtol=1e-3, atol=1e-3 * float(second[1].abs().max()))
    assert second[0].abs().max() > 0


def test_checkpointing_changes_no_bit(everywhere):
    grads = []
    for again in (False, True):
        torch.manual_seed(0)
        x, weight, bias = layer()
        y = (
            torch.utils.checkpoint.checkpoint(linear, x, weight, bias, use_reentrant=False)
            if again
            else linear(x, weight, bias)
        )
        grads.append(torch.autograd.grad(y.square().sum(), (x, weight)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_flops_are_those_of_cost(everywhere):
    x, weight, bias = layer()
    with FlopCounterMode(display=False) as counter:
        y = linear(x, weight, bias)
    assert counter.get_total_flops() == cost.linear_flops_forward(1100, 96, 80)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == cost.linear_flops_backward(1100, 96, 80)
    assert cost.linear_bytes_forward(2, 3, 5, 4) == 4 * (6 + 15 + 5 + 10)
    assert cost.linear_bytes_backward(2, 3, 5, 4) == 4 * (10 + 6 + 15 + 6 + 15 + 5)


def test_subclasses_of_tensors_are_pytorchs(everywhere):
    class Marked(torch.Tensor):
        pass

    x, weight, bias = layer()
    assert type(linear(x, weight.detach().as_subclass(Marked), bias)) is Marked


def test_float64_and_half_precision_are_pytorchs(everywhere):
    for dtype in (torch.float64, torch.bfloat16):
        x, weight, bias = (t.detach().to(dtype) for t in layer())
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
        with pytest.raises(BackendUnavailable, match=f"takes float32, not {str(dtype)[6:]}"):
            linear(x, weight, bias, backend=everywhere)


@pytest.mark.native
class TestOwnProducts:
    """What is said of ``ditscale::product`` beyond its values."""

    @pytest.mark.parametrize("turned", [False, True], ids=["dense", "turned"])
    @pytest.mark.parametrize(
        "sides",
        [(700, 500, 130), (60, 800, 900), (130, 3, 2000), (5, 800, 900)],
        ids=["rows", "columns", "flat", "few"],
    )
    def test_any_number_of_threads_gives_the_same_bits(self, native, sides, turned):
        rows, K, N = sides
        x, weight, bias = torch.randn(rows, K), torch.randn(N, K), torch.randn(N)
        weight = weight.t().contiguous().t() if turned else weight
        before = torch.get_num_threads()
        found = []
        try:
            for threads in (1, 2, 3, 9):  # 9: three parts of the columns for three of the rows
                torch.set_num_threads(threads)
                found.append(product_of("cpu")(x, weight, bias, True))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(found[0], other) for other in found[1:])

    @pytest.mark.parametrize("sides", [(50, 4099, 2100), (130, 21001, 40)], ids=["8.6 of 8.4 million", "many sums"])
    def test_more_than_is_packed_at_a_time(self, native, sides):
        rows, K, N = sides
        x, weight, bias = torch.randn(rows, K), torch.randn(N, K), torch.randn(N)
        y, want = product_of("cpu")(x, weight, bias, True), F.linear(x.double(), weight.double(), bias.double())
        torch.testing.assert_close(y.double(), want, rtol=1e-4, atol=5e-3)

    @pytest.mark.parametrize(
        ("sides", "ours"),
        {
            "flat": ((60, 600, 600), False),
            "thin": ((600, 600, 20), False),
            "small": ((130, 200, 200), False),
            "few rows": ((48, 400, 400), True),
            "49 rows": ((49, 400, 300), False),
            "few rows, a small weight": ((9, 300, 400), False),
            "short sums": ((400, 48, 400), True),
            "sums of 49": ((400, 49, 300), False),
        }.values(),
    )
    def test_what_is_not_worth_it_is_pytorchs(self, native, sides, ours):
        rows, K, N = sides
        x, weight, bias = torch.randn(rows, K), torch.randn(N, K), torch.randn(N)
        for always in (False, True):
            asked = _pytorchs(lambda always=always: product_of("cpu")(x, weight, bias, always))
            assert asked != (ours or always)

    def test_sums_of_few_rows_are_short(self, native):
        """PyTorch makes them in lanes; in turn, 384 terms at a time, they erred nearly twice as much."""
        errors = {}
        for name, product in (("ours", product_of("cpu")), ("plain", lambda x, w, *_: F.linear(x, w))):
            torch.manual_seed(0)
            left, weight = (
                torch.randn(64, 2, 768)[..., ::2],
                torch.randn(400, 384),
            )  # rows that are neither packed nor dense
            found = (
                torch.stack([product(x, weight, None, True) for x in left]).double()
                - left.double() @ weight.double().t()
            )
            errors[name] = float(found.square().mean().sqrt())
        assert errors["ours"] < 1.4 * errors["plain"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x": torch.zeros(8)}, "x, weight: expected"),
            ({"weight": torch.zeros(4, 7)}, "x, weight: expected"),
            ({"x": torch.zeros(3, 8).double()}, "x: expected float32"),
            ({"weight": torch.zeros(4, 8).bfloat16()}, "weight: expected float32"),
            ({"bias": torch.zeros(1, 4)}, r"bias: expected \[N\]"),
            ({"bias": torch.zeros(4).double()}, "bias: expected float32"),
        ],
    )
    def test_direct_calls_are_looked_at(self, native, change, message):
        given = {"x": torch.zeros(3, 8), "weight": torch.zeros(4, 8), "bias": torch.zeros(4)} | change
        with pytest.raises(RuntimeError, match=message):
            product_of("cpu")(*given.values(), True)

    def test_lesser_instruction_sets(self, lesser_isa):
        which = "cpu and values_and_gradients or any_number_of_threads"
        command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", __file__]
        env = {**os.environ, "DITSCALE_CPU_ISA": lesser_isa}
        done = subprocess.run([*command, "-k", which], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:]
        assert "skipped" not in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 5)}, r"x, weight: expected \[..., K\] and \[N, K\], got shapes \[3, 5\] and \[4, 8\]"),
        ({"x": torch.tensor(1.0)}, "x, weight"),
        ({"x": [1.0]}, "x: expected a tensor, got list"),
        ({"x": torch.zeros(3, 8, dtype=torch.int64)}, "x: expected a floating-point tensor, got int64"),
        ({"weight": torch.zeros(8)}, "x, weight"),
        ({"weight": torch.zeros(4, 8).double()}, "weight: expected torch.float32 on cpu as x, got torch.float64"),
        ({"bias": torch.zeros(3)}, r"bias: expected \[4\], got \[3\]"),
        ({"bias": torch.zeros(4).bfloat16()}, "bias: expected torch.float32"),
        ({"backend": "mkl"}, "backend: expected one of auto, reference, cpu, onednn, got 'mkl'"),
    ],
)
def test_mistakes_are_named(change, message):
    arguments = {"x": torch.zeros(3, 8), "weight": torch.zeros(4, 8), "bias": torch.zeros(4)} | change
    with pytest.raises(InputError, match=message):
        linear(**arguments)


def test_the_reference_differentiates():
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (5, 4), (5,))]
    assert torch.autograd.gradcheck(linear, leaves)
    assert torch.autograd.gradgradcheck(linear, leaves)
    assert np.isfinite(linear(*leaves).detach().numpy()).all()
