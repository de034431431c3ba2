"""The kernels on a GPU, in what no emulation shows: streams, graphs, memory, devices, compiling. Values: bench/gpu_stages.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ditscale import kernels
from ditscale.kernels import selfcheck
from ditscale.kernels.dispatch import unavailable_reason

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    missing = unavailable_reason("layernorm_modulate", request.param, "cuda")
    if missing:
        pytest.skip(missing)
    return str(request.param)


def calls(
    backend: str, dtype: torch.dtype, device: str = "cuda"
) -> dict[str, tuple[Callable[..., object], list[Tensor]]]:
    """Every operator on DiT-S's sizes, modulation as views of one projection."""
    B, T, D, H = 4, 256, 384, 6
    x, branch = (torch.randn(B, T, D, device=device, dtype=dtype) for _ in range(2))
    shift, scale, gate = torch.randn(B, 3 * D, device=device, dtype=dtype).chunk(3, dim=1)
    q, k, v = torch.randn(B, T, 3, H, D // H, device=device, dtype=dtype).permute(2, 0, 3, 1, 4)
    named = {"backend": backend}
    return {
        "layernorm_modulate": (lambda *a: kernels.layernorm_modulate(*a, **named), [x, shift, scale]),
        "gate_residual": (lambda *a: kernels.gate_residual(*a, **named), [x, branch, gate]),
        "gate_residual_layernorm_modulate": (
            lambda *a: kernels.gate_residual_layernorm_modulate(*a, **named),
            [x, branch, gate, shift, scale],
        ),
        "bias_gelu": (lambda *a: kernels.bias_gelu(*a, **named), [x, shift[0]]),
        "qk_norm_rope": (lambda *a: kernels.qk_norm_rope(*a, **named), [q, k]),
        "attention": (lambda *a: kernels.attention(*a, **named), [q, k, v]),
    }


OPERATORS = [
    "layernorm_modulate",
    "gate_residual",
    "gate_residual_layernorm_modulate",
    "bias_gelu",
    "qk_norm_rope",
    "attention",
]
operators = pytest.mark.parametrize("op", OPERATORS)


def both_passes(function: Callable[..., object], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of the sum of their squares."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    outputs = list(out) if isinstance(out, tuple) else [out]
    return [*outputs, *torch.autograd.grad(sum(o.float().square().sum() for o in outputs), leaves)]


@operators
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_self_check_passes(backend: str, op: str, dtype: torch.dtype) -> None:
    assert selfcheck.compare(op, backend, dtype, "cuda") is None


@operators
def test_equal_bits_from_run_to_run(backend: str, op: str) -> None:
    function, inputs = calls(backend, torch.bfloat16)[op]
    for first, second in zip(both_passes(function, inputs), both_passes(function, inputs), strict=True):
        assert torch.equal(first, second)


@operators
def test_a_call_waits_for_its_own_stream(backend: str, op: str) -> None:
    """What a kernel reads is made on a side stream, behind work that keeps that stream busy."""
    function, inputs = calls(backend, torch.float32)[op]
    want = both_passes(function, inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = [torch.zeros_like(t) for t in inputs]
        busy = torch.randn(4096, 4096, device="cuda")
        for _ in range(20):
            busy = busy @ busy / 4096
        for empty, t in zip(late, inputs, strict=True):
            empty.copy_(t)
        got = both_passes(function, late)
    stream.synchronize()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@operators
def test_a_forward_pass_is_captured_and_replayed(backend: str, op: str) -> None:
    function, inputs = calls(backend, torch.bfloat16)[op]
    with torch.no_grad():
        function(*inputs)  # loads and checks what a capture may not
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = function(*inputs)
        for t in inputs:
            t.copy_(torch.randn_like(t))
        graph.replay()
        outputs = out if isinstance(out, tuple) else (out,)
        again = function(*inputs)
        for a, b in zip(outputs, again if isinstance(again, tuple) else (again,), strict=True):
            assert torch.equal(a, b)


@operators
def test_a_backward_pass_is_captured_as_benchmarks_do(backend: str, op: str) -> None:
    from ditscale.bench.cases import operator_case
    from ditscale.bench.operators import operator_subject
    from ditscale.bench.timing import _capture

    case = operator_case(op, "backward", "bfloat16", 2, 64, 384, 6)
    for name in ("eager", f"ours-{backend}"):
        candidate = operator_subject(case, "cuda", 2).build[name]()
        want = candidate.call(1)
        graph = _capture(candidate.call, 2)
        for t in graph.kept[1]:
            t.zero_()
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(graph.kept[1], want, strict=True):
            torch.testing.assert_close(a, b)


@operators
def test_compiled_whole(backend: str, op: str) -> None:
    function, inputs = calls(backend, torch.bfloat16)[op]
    compiled = torch.compile(function, fullgraph=True)
    for a, b in zip(both_passes(compiled, inputs), both_passes(function, inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("op", OPERATORS[:3])
def test_backward_needs_little_more_than_its_results(backend: str, op: str) -> None:
    function, small = calls(backend, torch.bfloat16)[op]
    x, branch = (torch.randn(8, 1024, 1152, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    table = torch.randn(8, 3 * 1152, device="cuda", dtype=torch.bfloat16).chunk(3, dim=1)
    inputs = [x, *([branch] if op != "layernorm_modulate" else []), *table][: len(small)]
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    outputs = list(out) if isinstance(out, tuple) else [out]
    cotangents = [torch.randn_like(o) for o in outputs]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(outputs, leaves, cotangents)
    kept = sum(g.untyped_storage().nbytes() for g in {g.data_ptr(): g for g in grads}.values())
    assert torch.cuda.max_memory_allocated() - before - kept <= x.numel() * x.element_size() / 8 + 2**20


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@operators
def test_tensors_of_another_device_than_the_current_one(backend: str, op: str) -> None:
    function, inputs = calls(backend, torch.float32, "cuda:1")[op]
    elsewhere = both_passes(function, inputs)
    assert torch.cuda.current_device() == 0
    here = both_passes(function, [t.to("cuda:0") for t in inputs])
    for a, b in zip(elsewhere, here, strict=True):
        assert a.device == torch.device("cuda:1")
        torch.testing.assert_close(a.to("cuda:0"), b, rtol=1e-5, atol=1e-5)
