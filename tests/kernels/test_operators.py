"""The registered operators of every family and namespace: declared alike, checked when called, counted as cost.py does."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from types import ModuleType

import pytest
import torch
from cases import B, D, T, block_inputs, make

from ditscale import kernels
from ditscale.kernels.adaln import cost
from ditscale.kernels.adaln import shapes as adaln_shapes
from ditscale.kernels.gelu import cost as gelu_cost
from ditscale.kernels.gelu import shapes as gelu_shapes


def modules(name: str) -> list[ModuleType]:
    """kernels/*/NAME.py of every family that has one."""
    found = [
        f"ditscale.kernels.{family.name}.{name}" for family in pkgutil.iter_modules(kernels.__path__) if family.ispkg
    ]
    return [importlib.import_module(path) for path in found if importlib.util.find_spec(path)]


DECLARED = {name: operator for shapes in modules("shapes") for name, operator in shapes.OPERATORS.items()}

# Operators without kernels in Triton and CUDA.
CPU_ONLY = {"product", "adamw_average_"}


def registered(namespace: str) -> dict[str, torch._C.FunctionSchema]:
    """Every operator of a namespace that torch knows, whoever defined it."""
    modules("native")  # every family's, also of operators without a public function
    found = torch._C._dispatch_get_all_op_names()
    names = [n.split("::")[1] for n in found if n.startswith(f"{namespace}::")]
    return {n: getattr(getattr(torch.ops, namespace), n).default._schema for n in names}


@pytest.fixture(params=["ditscale", "ditscale_triton", "ditscale_emulated"])
def namespace(request):
    if request.param == "ditscale":
        request.getfixturevalue("native")
    elif request.param == "ditscale_triton":
        pytest.importorskip("triton")
        modules("triton_kernels")
    else:
        request.getfixturevalue("emulated_operators")
    return request.param


def test_python_declares_what_every_library_declares(namespace):
    found = registered(namespace)
    for name, operator in DECLARED.items():
        if name in CPU_ONLY and namespace != "ditscale":
            continue
        declared = torch._C.parse_schema(f"{namespace}::{name}{operator.schema}")
        assert str(found[name]) == str(declared), name


@pytest.mark.parametrize("space", ["ditscale", "ditscale_triton"])
def test_every_operator_has_a_fake_with_its_arguments(native, space):
    if space == "ditscale_triton":
        pytest.importorskip("triton")
        modules("triton_kernels")
    found = registered(space)
    assert set(found) == set(DECLARED) - (CPU_ONLY if space == "ditscale_triton" else set())
    for name, schema in found.items():
        assert torch._library.simple_registry.singleton.find(f"{space}::{name}").fake_impl.kernel is not None, name
        parameters = inspect.signature(DECLARED[name].fake).parameters
        assert list(parameters) == [a.name for a in schema.arguments], name
        for a in schema.arguments:
            want = a.default_value if a.has_default_value() else inspect.Parameter.empty
            assert parameters[a.name].default == want, (name, a.name)


@pytest.mark.native
@pytest.mark.parametrize("stride", ["dense", "strided", "permuted"])
def test_opcheck(native, stride):
    call = make((2, 5, 8))

    def laid_out(t):
        if stride == "dense":
            return t
        if stride == "strided":
            return torch.randn(2, 5, 20)[..., 3:11].copy_(t)
        return t.permute(2, 0, 1).contiguous().permute(1, 2, 0)  # the last dimension is not the dense one

    x, branch, dy = map(laid_out, (call.x, call.branch, call.dy))
    ops = torch.ops.ditscale
    stats = ops.layernorm_modulate_fwd(x, call.shift, call.scale)[1]
    fused = (x, branch, call.gate, call.shift, call.scale)
    three = [m.unsqueeze(1) for m in (call.gate, call.shift, call.scale)]  # [B, 1, D]
    checks = {
        ops.layernorm_modulate_fwd: [(x, call.shift, call.scale), (x, call.shift, call.scale, 1e-5, 0.0, True)],
        ops.layernorm_modulate_infer: [(x, call.shift, call.scale), (x, *three[1:], 1e-5, 0.0, True)],
        ops.layernorm_modulate_bwd: [(dy, x, call.scale, stats), (dy, x, three[2], None, 1e-5, 0.0, True)],
        ops.gate_residual_fwd: [(x, branch, call.gate), (x, branch, three[0])],
        ops.gate_residual_bwd: [(dy, branch, call.gate), (dy, branch, three[0])],
        ops.gate_residual_layernorm_modulate_fwd: [fused, (x, branch, *three, 1e-5, 0.0, True)],
        ops.gate_residual_layernorm_modulate_infer: [fused, (x, branch, *three)],
        ops.gate_residual_layernorm_modulate_bwd: [
            (dy, None, x, branch, call.gate, call.scale, stats),
            (dy, dy, x, branch, three[0], three[2], None, 1e-5, 0.0, True),
        ],
        ops.bias_gelu_fwd: [(x, call.shift[0])],
        ops.bias_gelu_bwd: [(dy, x, call.shift[0])],
    }
    # Those of attention and of rotations: test_attention_torch.py, test_rotary.py.
    assert {op.default._schema.name.split("::")[1] for op in checks} == {
        *adaln_shapes.OPERATORS,
        *gelu_shapes.OPERATORS,
    }
    for op, calls in checks.items():
        for args in calls:
            torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.native
class TestDirectCalls:
    """Torch chooses a kernel by any one argument; the kernel must look at the others itself."""

    X, M = torch.randn(2, 3, 8), torch.randn(2, 8)
    WRONG = {
        "scale-width": (lambda o, x, m: o.layernorm_modulate_fwd(x, m[:, :7], m[:, :7]), "scale: expected"),
        "scale-dtype": (lambda o, x, m: o.layernorm_modulate_infer(x, m, m.bfloat16()), "shift: expected the shape"),
        "shift-rank": (lambda o, x, m: o.layernorm_modulate_infer(x, m[0], m), "shift: expected the shape"),
        "x-rank": (lambda o, x, m: o.layernorm_modulate_infer(x[0], m, m), "x: expected"),
        "x-width": (lambda o, x, m: o.layernorm_modulate_infer(x[..., :0], m[:, :0], m[:, :0]), "x: expected"),
        "x-dtype": (lambda o, x, m: o.layernorm_modulate_infer(x.double(), m, m), "x: expected float32"),
        "branch-dtype": (lambda o, x, m: o.gate_residual_fwd(x, x.bfloat16(), m), "branch: expected"),
        "branch-shape": (lambda o, x, m: o.gate_residual_bwd(x, x[:, :2], m), "branch: expected"),
        "dy-shape": (lambda o, x, m: o.layernorm_modulate_bwd(x[:, :2], x, m), "dy: expected"),
        "stats": (lambda o, x, m: o.layernorm_modulate_bwd(x, x, m, m), "stats: expected"),
        "bias": (lambda o, x, m: o.bias_gelu_fwd(x, m), "bias: expected"),
        "gelu-dy": (lambda o, x, m: o.bias_gelu_bwd(x[0], x, m[0]), "dy: expected"),
        # A tensor without data sends the call to the fakes.
        "device": (lambda o, x, m: o.layernorm_modulate_infer(x, m.to("meta"), m.to("meta")), "on the device of x"),
        "gelu-device": (lambda o, x, m: o.bias_gelu_fwd(x, m[0].to("meta")), "on the device of x"),
        "gelu-dy-device": (lambda o, x, m: o.bias_gelu_bwd(x.to("meta"), x, m[0]), "on the device of x"),
    }

    @pytest.mark.parametrize("name", WRONG)
    def test_a_wrong_call_raises(self, native, name):
        call, words = self.WRONG[name]
        kernels.layernorm_modulate  # noqa: B018 (loads the library)
        with pytest.raises(RuntimeError, match=words):
            call(torch.ops.ditscale, self.X, self.M)


@pytest.mark.native
def test_the_flop_counter_counts_what_cost_says(native):
    from torch.utils.flop_counter import FlopCounterMode

    x, branch, table, bias = block_inputs()
    shift, scale, gate = table.chunk(3, dim=1)
    calls = {
        "layernorm_modulate": lambda: kernels.layernorm_modulate(x, shift, scale, backend="cpu"),
        "gate_residual": lambda: kernels.gate_residual(x, branch, gate, backend="cpu"),
        "gate_residual_layernorm_modulate": lambda: kernels.gate_residual_layernorm_modulate(
            x, branch, gate, shift, scale, backend="cpu"
        )[1],
    }
    for name, f in calls.items():
        for context in (torch.no_grad(), torch.enable_grad()):
            with context, FlopCounterMode(display=False) as counter:
                out = f()
            assert counter.get_total_flops() == getattr(cost, f"{name}_flops_forward")(B, T, D), name
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == getattr(cost, f"{name}_flops_backward")(B, T, D), name
    with FlopCounterMode(display=False) as counter:
        kernels.bias_gelu(x, bias, backend="cpu").sum().backward()
    want = gelu_cost.bias_gelu_flops_forward(B * T, D) + gelu_cost.bias_gelu_flops_backward(B * T, D)
    assert counter.get_total_flops() == want


@pytest.mark.native
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("mode", ["per_sample", "shared", "per_token"])
def test_what_is_kept_for_backward_is_what_cost_says(native, recompute, mode):
    B, T, D = 2, 700, 24  # not a small call: those keep no statistics
    call = make((B, T, D), torch.bfloat16, mode=mode)
    call.gate, call.shift, call.scale = (m.float() for m in (call.gate, call.shift, call.scale))
    v = {name: t.detach().requires_grad_() for name, t in call.leaves.items()}
    norm = {"recompute_stats": recompute, "backend": "cpu"}

    def kept(f):
        found = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
            f()
        return sum(t.nbytes for t in found)

    modulation, stream, sizes = (v["shift"], v["scale"]), (v["x"], v["branch"], v["gate"]), (B, T, D, 2, 4, mode)
    found = kept(lambda: kernels.layernorm_modulate(v["x"], *modulation, **norm))
    assert found == cost.layernorm_modulate_bytes_saved(*sizes, not recompute)
    found = kept(lambda: kernels.gate_residual(*stream, backend="cpu"))
    assert found == cost.gate_residual_bytes_saved(*sizes)
    found = kept(lambda: kernels.gate_residual_layernorm_modulate(*stream, *modulation, **norm))
    assert found == cost.gate_residual_layernorm_modulate_bytes_saved(*sizes, not recompute)
    found = kept(lambda: kernels.bias_gelu(v["x"], torch.randn(D), backend="cpu"))
    assert found == gelu_cost.bias_gelu_bytes_saved(B * T, D, 2, 4)


def test_meta_tensors_take_the_reference():
    x = torch.empty(2, 3, 8, device="meta")
    y = kernels.layernorm_modulate(x, torch.empty(2, 8, device="meta"), torch.empty(2, 8, device="meta"))
    assert y.shape == x.shape and y.is_meta
