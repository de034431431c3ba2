"""Empty and single dimensions, NaN and infinity, strided modulation without a copy, addresses beyond 2^31, equal bits."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import DTYPES, NAME, make

from ditscale import kernels
from ditscale.kernels import dispatch


@pytest.mark.parametrize("mode", ["per_sample", "shared", "per_token"])
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (0, 0, 8)], ids=["no-sample", "no-token", "neither"])
def test_empty(backend, shape, mode):
    call = make(shape, mode=mode)
    got = call.run(backend)
    for name, leaf in call.leaves.items():
        assert got[f"d{name}"].shape == leaf.shape
        assert not got[f"d{name}"].any(), name  # a sum over nothing is zero, not what memory held
    assert got["y"].shape == shape
    x = torch.zeros(shape, requires_grad=True)
    kernels.gate_residual(x, x, torch.ones(shape[2]), backend=backend).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAME.get)
def test_nan_stays_in_its_rows(backend, dtype, bad):
    call = make((3, 40, 24), dtype)
    call.x = call.x.clone()
    call.x[1, 7, 5] = bad
    got = call.run(backend)
    hit = torch.zeros(3, 40, dtype=torch.bool)
    hit[1, 7] = True
    assert torch.equal(got["y"].isnan().all(-1), hit)
    assert torch.equal(got["y"].isnan().any(-1), hit)
    assert torch.equal((~got["x_new"].isfinite()).any(-1), hit)
    assert torch.equal((~got["dx"].isfinite()).any(-1), hit)
    # Sums over tokens are those of the sample that holds the row.
    for name in ("dscale", "dgate"):
        assert torch.equal((~got[name].isfinite()).any(-1), torch.tensor([False, True, False])), name


def test_rows_of_modulation_are_read_in_place():
    from ditscale.kernels.adaln.op import _modulations

    table = torch.randn(2, 6 * 8)
    x = torch.randn(2, 3, 8)
    parts = table.chunk(6, dim=1)[:3]
    assert [t.data_ptr() for t in _modulations(x, ("a", "b", "c"), parts)] == [t.data_ptr() for t in parts]


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=NAME.get)
@pytest.mark.parametrize("dtype", DTYPES, ids=NAME.get)
def test_modulation_at_any_address_is_read_by_accesses_that_are_aligned(emulated_operators, shim_counts, dtype, kind):
    ops = emulated_operators
    x, branch, dy = (torch.randn(2, 9, 24).to(dtype) for _ in range(3))
    for lead in ((2,), (2, 9)):
        table = torch.randn(*lead, 81).to(kind)
        results = []
        for first in (0, 1, 2, 4):  # the same numbers, 16 bytes apart, 2, 4 and 8
            moved = torch.empty(*lead, 96).to(kind)
            moved[..., first : first + 81] = table
            shift, scale, gate = moved[..., first : first + 72].chunk(3, dim=-1)
            new, y, stats = ops.gate_residual_layernorm_modulate_fwd(x, branch, gate, shift, scale)
            grads = ops.gate_residual_layernorm_modulate_bwd(dy, x, new, branch, gate, scale, stats)
            of_gate = ops.gate_residual_bwd(dy, branch, gate)
            gelu = ops.bias_gelu_bwd(dy, x, shift.reshape(-1, 24)[1])
            results.append((new, y, *grads, ops.gate_residual_fwd(x, branch, gate), *of_gate, *gelu))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), lead
    races, conflicts, misaligned, _ = shim_counts()
    assert (races, conflicts, misaligned) == (0, 0, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAME.get)
@pytest.mark.parametrize("lies", ["address", "rows", "samples"])
def test_one_tensor_that_is_not_aligned_is_enough(backend, lies, dtype):
    """Each input in turn begins at an odd address, or has rows or samples an odd number of elements apart."""
    B, T, D = 2, 4, 24

    strides = {"address": (T * D, D, 1), "rows": (8 * T * (D + 1), D + 1, 1), "samples": (T * D + 1, D, 1)}[lies]

    def moved(t):
        room = torch.zeros(1 + B * 8 * T * (D + 1), dtype=t.dtype)[int(lies == "address") :]
        return room.as_strided(t.shape, strides if t.dim() == 3 else (D + (lies != "address"), 1)).copy_(t)

    x, branch, dy, dnew = (torch.randn(B, T, D).to(dtype) for _ in range(4))
    vectors, tokens = torch.randn(3, B, D).to(dtype), torch.randn(3, B, T, D).to(dtype)

    def results(x, branch, dy, dnew, gate, shift, scale):
        leaves = [t.detach().requires_grad_() for t in (x, branch, gate, shift, scale)]
        x, branch, gate, shift, scale = leaves
        new, y = kernels.gate_residual_layernorm_modulate(x, branch, gate, shift, scale, backend=backend)
        grads = torch.autograd.grad((new, y), leaves, (dnew, dy))
        out = kernels.gate_residual(x, branch, gate, backend=backend)
        activated = kernels.bias_gelu(x[0], shift.reshape(-1, D)[0], backend=backend)
        return new, y, *grads, out, *torch.autograd.grad(out, leaves[:3], dy), *torch.autograd.grad(activated, x, dy[0])

    tolerance = 2e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for modulation in (vectors, tokens):
        given = [x, branch, dy, dnew, *modulation]
        want = results(*given)
        for place, tensor in enumerate(given):
            got = results(*given[:place], moved(tensor), *given[place + 1 :])
            assert all((a - b).abs().max() <= tolerance * b.abs().max() for a, b in zip(got, want, strict=True)), place


def test_mixed_ranks_of_modulation(backend):
    x = torch.randn(2, 5, 8)
    shift, scale = torch.randn(8), torch.randn(2, 8)
    want = kernels.layernorm_modulate(x, shift.expand(2, 8), scale, backend="reference")
    torch.testing.assert_close(kernels.layernorm_modulate(x, shift, scale, backend=backend), want)
    per_token = torch.randn(2, 5, 8)
    want = kernels.layernorm_modulate(x, shift.expand(2, 5, 8), per_token, backend="reference")
    torch.testing.assert_close(kernels.layernorm_modulate(x, shift, per_token, backend=backend), want)
    one = scale.unsqueeze(1)  # [B, 1, D]
    want = kernels.layernorm_modulate(x, shift.expand(2, 8), scale, backend="reference")
    torch.testing.assert_close(kernels.layernorm_modulate(x, shift, one, backend=backend), want)


def test_results_of_permuted_rows_are_contiguous(backend):
    x, m = torch.randn(5, 2, 8).transpose(0, 1), torch.randn(8)
    results = [
        kernels.layernorm_modulate(x, m, x, norm="rms", backend=backend),
        kernels.gate_residual(x, x, m, backend=backend),
        *kernels.gate_residual_layernorm_modulate(x, x, m, m, m, backend=backend),
        kernels.bias_gelu(x, m, backend=backend),
    ]
    assert all(t.is_contiguous() for t in results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAME.get)
def test_float32_modulation_of_half_rows(backend, dtype):
    call = make((2, 70, 24), dtype)
    for name in ("shift", "scale", "gate"):
        setattr(call, name, getattr(call, name).float())
    got, want = call.run(backend), call.oracle().run()
    for name in want:
        assert got[name].dtype == (torch.float32 if name in ("dshift", "dscale", "dgate") else dtype), name
        torch.testing.assert_close(got[name].double(), torch.from_numpy(want[name]), rtol=2e-2, atol=2e-2)


def test_a_branch_of_another_dtype(backend):
    x, branch, gate = torch.randn(2, 5, 8), torch.randn(2, 5, 8).bfloat16(), torch.randn(2, 8).bfloat16()
    out = kernels.gate_residual(x, branch, gate, backend=backend)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, x + gate.float().unsqueeze(1) * branch.float())


class TestOffsetsBeyond31Bits:
    """Rows of every input lie 2^30 numbers apart in one storage that nothing touches in between, so that the third is beyond
    2^31. A stride fits 31 bits: a kernel that multiplies it with a row's number before it widens goes astray."""

    FAR = 2**30 + 8
    SAMPLES, TOKENS = (3, 1, 16), (1, 3, 16)

    @pytest.fixture
    def apart(self):
        """A function that puts a bfloat16 tensor's rows far apart, each tensor behind the one before."""
        try:
            # The system gives pages where they are written.
            store = torch.empty(2 * self.FAR + 4096, dtype=torch.bfloat16)
        except RuntimeError as error:
            pytest.skip(f"no address space: {error}")
        used = 0

        def place(t):
            nonlocal used
            strides = [16, 1] if t.dim() == 2 else [16, 16, 1]
            strides[next(d for d, size in enumerate(t.shape) if size == 3)] = self.FAR
            view = store.as_strided(t.shape, strides, used)
            used += 16
            return view.copy_(t)

        return place

    @pytest.mark.parametrize("fused", [False, True], ids=["norm", "residual+norm"])
    @pytest.mark.parametrize(
        ("shape", "mode"), [(SAMPLES, "per_sample"), (TOKENS, "per_token")], ids=["samples", "tokens"]
    )
    def test_norm(self, backend, apart, shape, mode, fused):
        call = make(shape, torch.bfloat16, mode=mode, fused=fused)
        for name in ("x", "branch", "gate", "shift", "scale", "dy", "dx_new"):
            if getattr(call, name) is not None:
                setattr(call, name, apart(getattr(call, name)))
        call.check(backend)

    @pytest.mark.parametrize(("shape", "lead"), [(SAMPLES, (3,)), (TOKENS, (1, 3))], ids=["samples", "tokens"])
    def test_gate_residual(self, backend, apart, shape, lead):
        x, branch, dout = (torch.randn(shape).bfloat16() for _ in range(3))
        gate = torch.randn(*lead, 16).bfloat16()
        near, far = (x, branch, gate, dout), tuple(apart(t) for t in (x, branch, gate, dout))

        def run(x, branch, gate, dout, backend):
            leaves = [t.detach().requires_grad_() for t in (x, branch, gate)]
            out = kernels.gate_residual(*leaves, backend=backend)
            return (out, *torch.autograd.grad(out, leaves, dout))

        torch.testing.assert_close(run(*far, backend), run(*near, "reference"))

    def test_bias_gelu(self, backend, apart):
        x, dy, bias = torch.randn(3, 16).bfloat16(), torch.randn(3, 16).bfloat16(), torch.randn(16).bfloat16()

        def run(x, dy, backend):
            leaves = [t.detach().requires_grad_() for t in (x, bias)]
            y = kernels.bias_gelu(*leaves, backend=backend)
            return (y, *torch.autograd.grad(y, leaves, dy))

        torch.testing.assert_close(run(apart(x), apart(dy), backend), run(x, dy, "reference"))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAME.get)
def test_equal_bits_from_run_to_run_and_for_any_thread_count(backend, dtype):
    call = make((2, 100, 40) if backend == "triton" else (3, 150, 40), dtype)  # two chunks a sample, or more
    first = call.run(backend)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for name, value in call.run(backend).items():
                assert torch.equal(value, first[name]), (name, count)
    finally:
        torch.set_num_threads(threads)


# What conftest.py makes faster, and what a user has who asks for the interpreter.
INTERPRETED = """
import sys, torch
from ditscale import kernels
torch.manual_seed(0)
x, m = torch.randn(2, 5, 24, requires_grad=True), torch.randn(2, 24)
y, *grads = (out := kernels.layernorm_modulate(x, m, m, backend="triton")), *torch.autograd.grad(out.sum(), x)
torch.save([y.detach(), *grads], sys.argv[1])
"""


def test_a_hastened_interpreter_gives_the_bits_of_tritons_own(tmp_path):
    pytest.importorskip("triton")
    if not dispatch.interpreting():
        pytest.skip("Triton's interpreter is off: set TRITON_INTERPRET=1")
    hasten = "from ditscale.kernels.interpreter import hasten; hasten()\n"
    found = []
    for name, first in (("own", ""), ("hastened", hasten)):
        subprocess.run([sys.executable, "-c", first + INTERPRETED, str(tmp_path / name)], check=True)
        found.append(torch.load(tmp_path / name, weights_only=True))
    for own, hastened in zip(*found, strict=True):
        assert torch.equal(own, hastened)


@pytest.mark.parametrize("tasks", [128, 1024], ids=["cpu", "gpu"])
def test_chunks_are_cut_by_the_rule_that_is_stated(tasks):
    """csrc/common/adaln_args.h, restated: equal on every backend, and no partial sums beyond an eighth of x."""
    pytest.importorskip("triton")
    from ditscale.kernels.adaln.triton_kernels import cut_rows

    def chunks(rows: int, segments: int, least: int) -> int:
        count = max(rows // max(-(-rows * segments // tasks), least), 1)
        return -(-rows // -(-rows // count))

    for size, sums in itertools.product((2, 4), (1, 2, 3)):
        for T, B in itertools.product((*range(1, 300), 1024, 4096), (1, 2, 32)):
            n = cut_rows(2, B, T, sums * 32 // size, tasks)[3]
            assert n == chunks(T, B, sums * 32 // size)
            assert n == 1 or n * sums * 4 * 8 <= T * size, (size, sums, T, B)


def peak_allocation(function):
    """Most bytes that torch held at a time for ``function``, whose results are kept until the end."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        kept = function()
    nodes, changes = list(profiler.profiler.kineto_results.experimental_event_tree()), []
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.tag == torch._C._profiler._EventType.Allocation:
            changes.append((node.start_time_ns, node.extra_fields.alloc_size))
    return np.cumsum([size for _, size in sorted(changes)]).max(), kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=NAME.get)
@pytest.mark.parametrize("B,T,D,mode", [(6, 16, 64, "per_sample"), (2, 99, 64, "per_sample"), (3, 50, 64, "shared")])
def test_backward_needs_an_eighth_of_x_beyond_its_results(backend, B, T, D, mode, dtype):
    if backend == "reference":
        pytest.skip("plain PyTorch has temporaries")
    x, branch, dx_new, dy = (torch.randn(B, T, D).to(dtype) for _ in range(4))
    lead = (B,) if mode == "per_sample" else ()
    mods = [m.to(dtype) for m in torch.randn(3, *lead, D)]
    leaves = [t.requires_grad_() for t in (x, branch, *mods)]
    outputs = kernels.gate_residual_layernorm_modulate(*leaves, backend=backend)
    gate_out = kernels.gate_residual(x, branch, mods[0], backend=backend)
    for outs, needed in ((outputs, leaves), ((gate_out,), leaves[:3])):
        cotangents = (dx_new, dy)[: len(outs)]
        torch.autograd.grad(outs, needed, cotangents, retain_graph=True)  # what is made once is made
        peak, grads = peak_allocation(lambda o=outs, n=needed, c=cotangents: torch.autograd.grad(o, n, c))
        results = sum({g.data_ptr(): g.nbytes for g in grads}.values())
        # An allocation is rounded up to whole cache lines.
        assert peak - results <= x.numel() * x.element_size() / 8 + 1024


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=NAME.get)
def test_results_of_16_bits_are_rounded_as_pytorch_rounds(native, dtype):
    every = torch.arange(65536).to(torch.int16).view(dtype).reshape(1, 64, 1024)
    for factor in (1.0, 1.5, 0.5, 1.25 * 2**-10, 2.0**-20, 300.0):  # ties, and what leaves the range at either end
        got = kernels.gate_residual(torch.zeros_like(every), every, torch.full((1024,), factor), backend="cpu")
        torch.testing.assert_close(got, (every.float() * factor).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.native
@pytest.mark.parametrize(
    "dtype, D, kind",
    [
        (torch.float32, 384, {}),
        (torch.bfloat16, 384, {}),
        (torch.float16, 384, {}),
        (torch.bfloat16, 416, {"mode": "per_token"}),  # a modulation for each row, while two rows are worked on
        (torch.float32, 400, {"mode": "per_token", "fused": False, "rms": True}),
        (torch.float32, 384, {"rms": True, "fused": False}),
        (torch.float32, 388, {}),  # rows that are no whole lines: written as usual
    ],
    ids=str,
)
def test_results_written_past_the_caches_have_the_same_bits(native, dtype, D, kind):
    """A call of more than 16 MiB stores its results another way; each sample's rows are those that it has in a small call."""
    big = make((44, 128, D), dtype, **kind)
    some = slice(40, 42)
    parts = {f.name: getattr(big, f.name) for f in dataclasses.fields(big)}
    small = dataclasses.replace(big, **{n: t[some] for n, t in parts.items() if isinstance(t, torch.Tensor)})
    got, want = big.run("cpu"), small.run("cpu")
    sums = (
        set() if kind.get("mode") == "per_token" else {"dshift", "dscale", "dgate"}
    )  # over tokens, cut by the number of all
    for name in set(want) - sums:
        assert torch.equal(got[name][some], want[name]), name
