"""The operators in what a training script puts around them: each works, or raises with a reason; never a wrong number."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import parallel_training
import pytest
import torch
import torch.nn.functional as F
from cases import B, D, T, block, block_inputs, close, exact, gradients, plain_block, rows
from torch.utils.checkpoint import checkpoint

from ditscale import kernels
from ditscale.kernels import dispatch, selfcheck


def test_autocast_keeps_the_stream(backend):
    x, bias = torch.randn(B, T, D, requires_grad=True), torch.randn(D, requires_grad=True)
    layer, modulate = torch.nn.Linear(D, D), torch.nn.Linear(D, 3 * D)
    c = torch.randn(B, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        shift, scale, gate = modulate(c).chunk(3, dim=1)
        linear = layer(kernels.layernorm_modulate(x, shift, scale, backend=backend))
        branch = kernels.bias_gelu(linear, bias, backend=backend)  # a layer's half rows and a float32 parameter
        out, y = kernels.gate_residual_layernorm_modulate(x, branch, gate, shift, scale, backend=backend)
        end = kernels.gate_residual(out, y, gate, backend=backend)
    assert gate.dtype == linear.dtype == branch.dtype == torch.bfloat16
    assert out.dtype == y.dtype == end.dtype == torch.float32
    close((branch,), (F.gelu(linear.double() + bias.double(), approximate="tanh"),), 1e-2)
    shift, scale, gate = (rows(t.double()) for t in (shift, scale, gate))
    want = x + gate * branch
    want_y = F.layer_norm(want, (D,), eps=1e-6) * (1 + scale) + shift
    close((out, y, end), (want, want_y, want + gate * want_y))
    end.square().sum().backward()
    for p in (x, bias, *layer.parameters(), *modulate.parameters()):
        assert p.grad is not None and p.grad.abs().max() > 0


def test_checkpointing(backend):
    leaves = block_inputs()
    f = lambda *a: checkpoint(block, *a, backend, use_reentrant=False)  # noqa: E731
    close(gradients(f, leaves), exact(plain_block, leaves))


@pytest.mark.native
def test_the_first_call_of_all_inside_a_checkpoint(native, monkeypatch, tmp_path):
    # It is checked against the reference on the way; what it saves must be what the second run saves.
    monkeypatch.setenv("DITSCALE_CACHE", str(tmp_path))
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(dispatch, "_quick", {})
    selfcheck.failure.cache_clear()
    leaves = block_inputs()
    f = lambda *a: checkpoint(block, *a, "auto", use_reentrant=False)  # noqa: E731
    close(gradients(f, leaves), exact(plain_block, leaves))
    assert dispatch._quick


@pytest.mark.native
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "made-again"])
def test_selective_checkpointing_of_inputs_that_are_converted(native, keep):
    """It counts the calls of an operator: none may be tried that the kernel refuses."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(context, operator, *args, **options):
        kept = keep and "ditscale" in str(operator)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def two(x, shift, scale):
        y = kernels.gate_residual(x, x * 0.5, scale.double(), backend="cpu")
        return kernels.layernorm_modulate(y, shift, scale, backend="cpu") * 2

    contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
    inputs = [torch.randn(*s, requires_grad=True) for s in ((B, T, D), (B, D), (D,))]
    again = checkpoint(two, *inputs, use_reentrant=False, context_fn=contexts)
    found, want = (torch.autograd.grad(y.square().sum(), inputs) for y in (again, two(*inputs)))
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.native
def test_checkpointing_that_keeps_the_kernels_results(native):
    # Selective checkpointing: a policy names the operators whose results are kept, so those run once.
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    ran = []

    def policy(ctx, op, *args, **kwargs):
        ran.append(str(op))
        return CheckpointPolicy.MUST_SAVE if "ditscale" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    leaves = block_inputs()

    def f(*a):
        contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
        return checkpoint(block, *a, "cpu", use_reentrant=False, context_fn=contexts)

    close(gradients(f, leaves), exact(plain_block, leaves))
    assert "ditscale.gate_residual_layernorm_modulate_infer.default" in ran


def test_checkpointing_of_a_first_call(backend, monkeypatch):
    # Half modulation beside a float32 stream, as autocast has it: what was kept must be what the second call keeps.
    monkeypatch.setattr(dispatch, "_chosen", {})
    monkeypatch.setattr(dispatch, "_quick", {})
    x, branch, table, bias = (t.detach() for t in block_inputs())
    leaves = [x, branch, table.bfloat16(), bias.bfloat16()]
    leaves = [t.requires_grad_() for t in leaves]
    out = checkpoint(block, *leaves, backend, use_reentrant=False)
    got = torch.autograd.grad(out.sum(), leaves)  # raises where the two calls differ
    want = torch.autograd.grad(block(*leaves, backend).sum(), leaves)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_gradients_add_up_over_two_uses(backend):
    leaves = block_inputs()

    def twice(x, *rest):
        return block(block(x, *rest, backend), *rest, backend)

    def lines(x, *rest):
        return plain_block(plain_block(x, *rest), *rest)

    close(gradients(twice, leaves), exact(lines, leaves), 1e-4)


def test_inputs_are_left_alone(backend):
    leaves = block_inputs()
    before = [t.detach().clone() for t in leaves]
    gradients(lambda *a: block(*a, backend), leaves)
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))


def test_a_change_before_backward_is_noticed(backend):
    _, branch, *_ = leaves = block_inputs()
    out = block(*leaves, backend)
    with torch.no_grad():
        branch.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_frozen_inputs_get_no_gradient(backend):
    x, branch, table, bias = leaves = block_inputs()
    table.requires_grad_(False)
    block(*leaves, backend).sum().backward()
    assert table.grad is None
    assert x.grad is not None and branch.grad is not None and bias.grad is not None
    with torch.no_grad():
        assert not block(*leaves, backend).requires_grad
    with torch.inference_mode():
        block(*leaves, backend)


def test_two_processes_under_ddp_and_fsdp2(tmp_path):
    script = str(Path(parallel_training.__file__))
    command = [sys.executable, "-P", script]
    arguments = (str(tmp_path / "store"), str(tmp_path / "out"))
    pair = [
        subprocess.Popen([*command, str(rank), *arguments], stderr=subprocess.PIPE, text=True)
        for rank in range(parallel_training.PROCESSES)
    ]
    for process in pair:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors[-2000:]
    x, c = (t.double() for t in parallel_training.data())
    want = parallel_training.gradients(parallel_training.Block().double(), x, c, plain=True)
    for rank in range(parallel_training.PROCESSES):
        found = torch.load(tmp_path / f"out.{rank}")
        for name, tolerance in (("ddp", 2e-5), ("fsdp2", 2e-5), ("fsdp2 bfloat16", 3e-2)):
            assert found[name].keys() == want.keys()
            for parameter, value in want.items():
                top = value.abs().max()
                assert top > 0
                close((found[name][parameter] / top,), (value / top,), tolerance)
