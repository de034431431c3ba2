"""The operators inside what a training script puts around them: each works, or raises with a reason; never a wrong number."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import make, rows
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from ditscale import kernels
from ditscale.kernels.adaln import cost, reference
from ditscale.kernels.gelu import cost as gelu_cost

B, T, D = 2, 33, 24


def block(x, branch, table, backend):
    shift, scale, gate = table.chunk(3, dim=-1)
    x, y = kernels.gate_residual_layernorm_modulate(x, branch, gate, shift, scale, backend=backend)
    y = kernels.layernorm_modulate(y, shift, scale, backend=backend)
    return kernels.gate_residual(x, y, gate, backend=backend)


def plain_block(x, branch, table):
    shift, scale, gate = (rows(t) for t in table.chunk(3, dim=-1))
    x = x + gate * branch
    y = F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale) + shift
    y = F.layer_norm(y, (x.shape[-1],), eps=1e-6) * (1 + scale) + shift
    return x + gate * y


def inputs(batch: int = B, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(*s, dtype=dtype).requires_grad_() for s in ((batch, T, D), (batch, T, D), (batch, 3 * D))]


def close(got, want, tolerance: float = 2e-5):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def gradients(f, leaves):
    out = f(*leaves)
    weight = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).reshape(out.shape).to(out.dtype)
    return (out, *torch.autograd.grad(out, leaves, weight))


def exact(f, leaves):
    return gradients(f, [t.detach().double().requires_grad_() for t in leaves])


class TestReference:
    """The oracle of the kernels, in float64."""

    def test_gradcheck_and_gradgradcheck(self):
        leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 5), (2, 3, 5), (2, 15))]

        def f(x, branch, table):
            return block(x, branch, table, "reference")

        assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, leaves)

    def test_gradcheck_rms_and_affine(self):
        x, shift, scale, w, b = (
            torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 5), (5,), (2, 3, 5), (5,), (5,))
        )

        def f(*a):
            return kernels.layernorm_modulate(a[0], a[1], a[2], weight=a[3], bias=a[4], norm="rms", backend="auto")

        assert torch.autograd.gradcheck(f, (x, shift, scale, w, b))

    def test_gelu(self):
        x, b = (
            torch.randn(3, 5, dtype=torch.float64, requires_grad=True),
            torch.randn(5, dtype=torch.float64, requires_grad=True),
        )
        assert torch.autograd.gradcheck(lambda *a: kernels.bias_gelu(*a), (x, b))
        assert torch.autograd.gradgradcheck(lambda *a: kernels.bias_gelu(*a), (x, b))


@pytest.mark.native
class TestOperators:
    """The registered operators themselves."""

    @pytest.mark.parametrize("stride", ["dense", "strided"])
    def test_opcheck(self, native, stride):
        call = make((2, 5, 8))
        x, branch, dy = (
            (t if stride == "dense" else torch.randn(2, 5, 20)[..., 3:11].copy_(t))
            for t in (call.x, call.branch, call.dy)
        )
        ops = torch.ops.ditscale
        utilities = ("test_schema", "test_faketensor")
        stats = ops.layernorm_modulate_fwd(x, call.shift, call.scale, 1e-6, 1.0, False, True)[1]
        checks = [
            (ops.layernorm_modulate_fwd, (x, call.shift, call.scale, 1e-6, 1.0, False, True)),
            (ops.layernorm_modulate_fwd, (x, call.shift, call.scale, 1e-6, 1.0, True, False)),
            (ops.layernorm_modulate_bwd, (dy, x, call.scale, stats, 1e-6, 1.0, False)),
            (ops.gate_residual_fwd, (x, branch, call.gate)),
            (ops.gate_residual_bwd, (dy, branch, call.gate)),
            (
                ops.gate_residual_layernorm_modulate_fwd,
                (x, branch, call.gate, call.shift, call.scale, 1e-6, 1.0, False, True),
            ),
            (
                ops.gate_residual_layernorm_modulate_bwd,
                (dy, None, x, branch, call.gate, call.scale, stats, 1e-6, 1.0, False),
            ),
            (ops.bias_gelu_fwd, (x, call.shift[0])),
            (ops.bias_gelu_bwd, (dy, x, call.shift[0])),
        ]
        for op, args in checks:
            torch.library.opcheck(op.default, args, test_utils=utilities)

    def test_schemas_of_both_backends_agree(self, native):
        from ditscale.kernels.adaln import native as module

        for name, fake in module.FAKES.items():
            schema = getattr(torch.ops.ditscale, name).default._schema
            assert [a.name for a in schema.arguments] == list(fake.__annotations__)[:-1], name

    def test_a_direct_call_is_checked(self, native):
        x = torch.randn(2, 3, 8)
        with pytest.raises(RuntimeError, match="scale: expected"):
            torch.ops.ditscale.layernorm_modulate_fwd(x, torch.zeros(7), torch.zeros(7), 1e-6, 1.0, False, True)


@pytest.mark.native
class TestCompile:
    @pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
    def test_fullgraph_forward_and_backward(self, native, compiler):
        leaves = inputs()
        f = torch.compile(lambda *a: block(*a, "auto"), fullgraph=True, backend=compiler)
        close(gradients(f, leaves), exact(plain_block, leaves))

    def test_dynamic_batch_compiles_once(self, native):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        f = torch.compile(lambda *a: block(*a, "auto"), fullgraph=True, dynamic=True, backend=counter)
        for batch in (2, 3, 5):
            leaves = inputs(batch)
            close(gradients(f, leaves), exact(plain_block, leaves))
            # (Dynamo calls the compiler twice for the one frame: it starts over to make eps a constant.)
            if batch == 2:
                first = counter.frame_count
        assert counter.frame_count == first

    def test_no_recompile_for_the_same_shapes(self, native):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        f = torch.compile(lambda *a: block(*a, "auto"), fullgraph=True, backend=counter)
        for _ in range(3):
            f(*inputs())
        assert counter.frame_count == 1

    def test_the_kernel_is_in_the_graph(self, native):
        torch._dynamo.reset()
        names = []

        def spy(graph, example):
            names.extend(str(n.target) for n in graph.graph.nodes)
            return graph

        with torch.no_grad():
            torch.compile(lambda *a: block(*a, "auto"), fullgraph=True, backend=spy)(*inputs())
        assert any("ditscale.gate_residual_layernorm_modulate_fwd" in n for n in names), names

    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    def test_chained_norms_sharing_one_table_at_batch_one(self, native, compiled):
        # pytorch/pytorch#193061: Inductor of 2.10 gave wrong gradients for exactly this, without a word.
        leaves = [torch.randn(1, 64, 32).requires_grad_(), torch.randn(1, 6, 32).requires_grad_()]

        def ours(x, table):
            for k in range(0, 6, 2):
                x = x + kernels.layernorm_modulate(x, table[:, k], table[:, k + 1], backend="auto")
            return x

        def lines(x, table):
            for k in range(0, 6, 2):
                n = F.layer_norm(x, (x.shape[-1],), eps=1e-6)
                x = x + n * (1 + table[:, k + 1].unsqueeze(1)) + table[:, k].unsqueeze(1)
            return x

        f = torch.compile(ours, fullgraph=True) if compiled else ours
        close(gradients(f, leaves), exact(lines, leaves))

    def test_jvp_in_a_compiled_function_is_not_zero(self, native):
        leaves = [t.detach() for t in inputs()]
        tangents = [torch.randn_like(t) for t in leaves]

        def f(*a):
            return torch.func.jvp(lambda *b: block(*b, "auto"), tuple(a), tuple(tangents))

        want = torch.func.jvp(plain_block, tuple(t.double() for t in leaves), tuple(t.double() for t in tangents))
        close(torch.compile(f, backend="aot_eager", fullgraph=True)(*leaves), want)


class TestTransforms:
    def test_forward_mode(self, backend):
        leaves = [t.detach() for t in inputs()]
        tangents = [torch.randn_like(t) for t in leaves]
        want = torch.func.jvp(plain_block, tuple(t.double() for t in leaves), tuple(t.double() for t in tangents))
        got = torch.func.jvp(lambda *a: block(*a, backend), tuple(leaves), tuple(tangents))
        assert got[1].abs().max() > 0.1
        close(got, want)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(p, t) for p, t in zip(leaves, tangents, strict=True)]
            out = forward_ad.unpack_dual(block(*duals, backend))
            close((out.primal, out.tangent), want)

    def test_backward_through_the_tangent(self, backend):
        # What MeanFlow trains on: the gradient of a loss on a forward-mode derivative.
        leaves = inputs()
        tangents = [torch.randn_like(t) for t in leaves]

        def loss(f, args, duals):
            _, tangent = torch.func.jvp(f, tuple(args), tuple(duals))
            return torch.autograd.grad(tangent.square().sum(), args)

        doubles = [t.detach().double().requires_grad_() for t in leaves]
        want = loss(plain_block, doubles, [t.double() for t in tangents])
        close(loss(lambda *a: block(*a, backend), leaves, tangents), want, 2e-3)

    def test_func_grad_and_vmap(self, backend):
        leaves = [t.detach() for t in inputs()]

        def ours(x, branch, table):
            return block(x, branch, table, backend).square().sum()

        def lines(x, branch, table):
            return plain_block(x, branch, table).square().sum()

        want = torch.func.grad(lines, argnums=(0, 1, 2))(*(t.double() for t in leaves))
        close(torch.func.grad(ours, argnums=(0, 1, 2))(*leaves), want, 1e-4)
        many = [torch.stack([t, 2 * t, -t]) for t in leaves]
        got = torch.func.vmap(lambda *a: block(*a, backend))(*many)
        close(got, torch.stack([plain_block(*(t[i].double() for t in many)) for i in range(3)]), 1e-4)
        each = torch.func.vmap(torch.func.grad(ours))(*many)
        close(
            each,
            torch.stack([torch.func.grad(lines)(*(t[i].double() for t in many)) for i in range(3)]),
            1e-4,
        )

    def test_second_derivatives_of_a_kernel_are_refused(self, native):
        x = torch.randn(2, 3, 8, requires_grad=True)
        y = kernels.layernorm_modulate(x, torch.zeros(8), torch.ones(8), backend="cpu")
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice|once_differentiable"):
            dx.sum().backward()


class TestTraining:
    def test_autocast_keeps_the_stream(self, backend):
        x = torch.randn(B, T, D, requires_grad=True)
        layer, modulate = torch.nn.Linear(D, D), torch.nn.Linear(D, 3 * D)
        c = torch.randn(B, D)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            table = modulate(c)
            assert table.dtype == torch.bfloat16
            shift, scale, gate = table.chunk(3, dim=1)
            branch = layer(kernels.layernorm_modulate(x, shift, scale, backend=backend))
            out, y = kernels.gate_residual_layernorm_modulate(x, branch, gate, shift, scale, backend=backend)
        assert out.dtype == y.dtype == torch.float32
        want = x + gate.float().unsqueeze(1) * branch.float()
        close((out,), (want,))
        (out.square().sum() + y.square().sum()).backward()
        for p in (x, *layer.parameters(), *modulate.parameters()):
            assert p.grad is not None and p.grad.abs().max() > 0

    def test_checkpointing(self, backend):
        leaves = inputs()
        f = lambda *a: checkpoint(block, *a, backend, use_reentrant=False)  # noqa: E731
        close(gradients(f, leaves), exact(plain_block, leaves))

    def test_gradients_add_up_over_two_uses(self, backend):
        leaves = inputs()

        def twice(x, branch, table):
            return block(block(x, branch, table, backend), branch, table, backend)

        def lines(x, branch, table):
            return plain_block(plain_block(x, branch, table), branch, table)

        close(gradients(twice, leaves), exact(lines, leaves), 1e-4)

    def test_inputs_are_left_alone(self, backend):
        leaves = inputs()
        before = [t.detach().clone() for t in leaves]
        gradients(lambda *a: block(*a, backend), leaves)
        assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))

    def test_frozen_inputs_get_no_gradient(self, backend):
        x, branch, table = inputs()
        table.requires_grad_(False)
        block(x, branch, table, backend).sum().backward()
        assert table.grad is None
        assert x.grad is not None
        with torch.no_grad():
            assert not block(x, branch, table, backend).requires_grad
        with torch.inference_mode():
            block(x, branch, table, backend)

    def test_a_module_under_data_parallel(self, backend):
        # One process is enough to send gradients through the hooks of DDP.
        import tempfile

        import torch.distributed as dist

        class Block(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.table = torch.nn.Parameter(torch.randn(1, 3 * D))
                self.layer = torch.nn.Linear(D, D)

            def forward(self, x):
                return block(x, self.layer(x), self.table.expand(x.shape[0], -1), backend)

        model = Block()
        x = torch.randn(B, T, D)
        want = gradients(lambda *p: model(x), list(model.parameters()))
        with tempfile.NamedTemporaryFile() as store:
            dist.init_process_group("gloo", init_method=f"file://{store.name}", rank=0, world_size=1)
            try:
                wrapped = torch.nn.parallel.DistributedDataParallel(model)
                got = gradients(lambda *p: wrapped(x), list(model.parameters()))
            finally:
                dist.destroy_process_group()
        close(got, want)


@pytest.mark.native
class TestFlopCounter:
    def test_counts_what_cost_says(self, native):
        from torch.utils.flop_counter import FlopCounterMode

        x, branch, table = inputs()
        shift, scale, gate = table.chunk(3, dim=1)
        calls = [
            (lambda: kernels.layernorm_modulate(x, shift, scale, backend="cpu"), cost, "layernorm_modulate"),
            (lambda: kernels.gate_residual(x, branch, gate, backend="cpu"), cost, "gate_residual"),
            (
                lambda: kernels.gate_residual_layernorm_modulate(x, branch, gate, shift, scale, backend="cpu")[1],
                cost,
                "gate_residual_layernorm_modulate",
            ),
        ]
        for f, module, name in calls:
            with FlopCounterMode(display=False) as counter:
                out = f()
            assert counter.get_total_flops() == getattr(module, f"{name}_flops_forward")(B, T, D), name
            with FlopCounterMode(display=False) as counter:
                out.sum().backward()
            assert counter.get_total_flops() == getattr(module, f"{name}_flops_backward")(B, T, D), name
        with FlopCounterMode(display=False) as counter:
            kernels.bias_gelu(x, shift[0].detach(), backend="cpu").sum().backward()
        want = gelu_cost.bias_gelu_flops_forward(B * T, D) + gelu_cost.bias_gelu_flops_backward(B * T, D)
        assert counter.get_total_flops() == want


def test_meta_tensors_take_the_reference():
    x = torch.empty(2, 3, 8, device="meta")
    y = kernels.layernorm_modulate(x, torch.empty(2, 8, device="meta"), torch.empty(2, 8, device="meta"))
    assert y.shape == x.shape and y.is_meta


def test_reference_is_plain_torch():
    # The oracle must not lean on what it judges.
    import inspect

    source = inspect.getsource(reference)
    assert "native" not in source and "torch.ops" not in source and "triton" not in source
