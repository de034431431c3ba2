"""What single operators cost: ditscale's own, and torch's fused attention in all its forms."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ditscale.dit.flops import trace
from ditscale.dit.torch_costs import all_formulas, matmul_formulas, own_operators
from ditscale.errors import InputError
from ditscale.kernels.adaln import cost as adaln
from ditscale.kernels.adamw import cost as adamw
from ditscale.kernels.adamw import native as _native  # noqa: F401 (describes its operator)
from ditscale.kernels.attn import cost as attn
from ditscale.kernels.gelu import cost as gelu
from ditscale.kernels.library import missing_reason
from ditscale.kernels.matmul import cost as matmul
from ditscale.kernels.rotary import cost as rotary

native = pytest.mark.skipif(missing_reason("cpu") is not None, reason="the compiled library is not here")

SCHEMAS = Path(__file__).resolve().parents[2] / "csrc" / "bindings" / "schemas.cpp"
B, T, S, D, H, G, K, N = 2, 5, 7, 12, 6, 3, 4, 10

# Shapes of the operators' tensors by family and name; what is not here is left out (None).
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "adaln": {
        **dict.fromkeys(("x", "branch", "dy", "dout", "x_new", "dx_new"), (B, T, D)),
        **dict.fromkeys(("shift", "scale", "gate"), (B, D)),
        "stats": (2, B, T),
    },
    "product": {"x": (B * T, D), "weight": (N, D), "bias": (N,)},
    "adamw_average": dict.fromkeys(("weight", "gradient", "first", "second", "average"), (D, N)),
    "bias_gelu": {"x": (B * T, N), "dy": (B * T, N), "bias": (N,)},
    "qk_norm_rope": {"x": (B, H, T, K), "dout": (B, H, T, K), "weight": (K,), "cos": (T, K // 2), "sin": (T, K // 2)},
    "attention": {
        **dict.fromkeys(("q", "out", "dout"), (B, H, T, K)),
        **dict.fromkeys(("k", "v"), (B, G, S, K)),
        "stats": (2, B, H, T),
    },
    "attention_qkv": {
        "qkv": (B, T, 3, H, K),
        **dict.fromkeys(("out", "dout"), (B, T, H * K)),
        "stats": (2, B, H, T),
    },
}
SIZES = {"attention": (B, H, T, S, K), "attention_qkv": (B, H, T, T, K)}
# Per family: what an operator costs under `all`, by the formulas of its cost.py.
EVERYTHING: dict[str, Callable[[str], int]] = {
    "product": lambda way: matmul.linear_flops_forward(B * T, D, N) + B * T * N,  # its bias is added
    "adamw_average": lambda way: adamw.adamw_flops(D * N, average=True),
    "bias_gelu": lambda way: getattr(gelu, f"bias_gelu_flops_{way}")(B * T, N),
    "qk_norm_rope": lambda way: getattr(rotary, f"norm_rope_flops_{way}")(B, H, T, K, "rms", True, True),
    **{
        family: lambda way, sizes=sizes: (
            getattr(attn, f"attention_flops_{way}")(*sizes)
            + getattr(attn, f"attention_softmax_flops_{way}")(*sizes[:4])
        )
        for family, sizes in SIZES.items()
    },
    **{
        family: lambda way, family=family: getattr(adaln, f"{family}_flops_{way}")(B, T, D)
        for family in ("layernorm_modulate", "gate_residual", "gate_residual_layernorm_modulate")
    },
}


def operators() -> list[str]:
    """Names in the bindings' source, so that one that is added without a cost is noticed."""
    return re.findall(r'm\.def\(\s*"(\w+)\(', SCHEMAS.read_text(encoding="utf-8"))


def family_of(name: str) -> str:
    return name.rpartition("_")[0] or name


def arguments(packet: Any, family: str) -> list[Any]:
    """Something for each argument of its schema: meta tensors of the family's shapes, plain numbers."""
    shapes = SHAPES.get(family, SHAPES["adaln"])
    given: list[Any] = []
    for argument in packet.default._schema.arguments:
        kind = str(argument.type).removeprefix("Optional[").removesuffix("]")
        if kind == "Tensor":
            shape = shapes.get(argument.name)
            given.append(None if shape is None else torch.empty(shape, device="meta"))
        else:
            given.append({"float": 0.5, "int": 1, "bool": argument.name == "save_stats"}[kind])
    return given


class Once(nn.Module):
    """One call of an operator, on meta tensors."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        super().__init__()
        self.call, self.args = call, args

    def forward(self) -> Any:
        return self.call(*self.args)


def namespaces() -> list[str]:
    if importlib.util.find_spec("triton") is None:
        return ["ditscale"]
    for family in ("adaln", "attn", "gelu", "rotary"):
        if importlib.util.find_spec(f"ditscale.kernels.{family}.triton_kernels") is not None:
            importlib.import_module(f"ditscale.kernels.{family}.triton_kernels")
    return ["ditscale", "ditscale_triton"]


@native
@pytest.mark.parametrize("name", operators())
def test_own_operators_cost_what_their_cost_py_says(name: str) -> None:
    found = 0
    for namespace in namespaces():
        packet = getattr(getattr(torch.ops, namespace), name, None)
        if packet is None:  # no kernel of that kind in Triton
            continue
        found += 1
        family = family_of(name)
        way = "backward" if name.endswith("_bwd") else "forward"
        model = Once(packet, *arguments(packet, family))
        sizes = SIZES.get(family)
        products = 0 if sizes is None else getattr(attn, f"attention_flops_{way}")(*sizes)
        if family == "product":
            products = matmul.linear_flops_forward(B * T, D, N)
        spent = products
        if sizes is not None and way == "backward":
            spent = attn.attention_flops_backward_hardware(*sizes)
        assert trace(model, backward=False).forward == products
        assert trace(model, backward=False, convention="hardware").forward == spent
        assert trace(model, backward=False, convention="all").forward == EVERYTHING[family](way)
    assert found


@native
def test_an_operator_of_ours_without_a_decision_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new operator that registered a cost, but of which nobody said whether it multiplies matrices."""
    packet = torch.ops.ditscale.bias_gelu_fwd
    assert own_operators()[packet] == "bias_gelu"
    monkeypatch.setattr("ditscale.dit.torch_costs._OWN_LIGHT", ())
    with pytest.raises(InputError, match=r"ditscale\.bias_gelu_fwd \(1\)"):
        trace(Once(packet, *arguments(packet, "bias_gelu")), backward=False)


@native
def test_a_counter_over_a_real_run_with_our_kernels() -> None:
    """``matmul_formulas`` makes torch's counter count products only, where our kernels run as where they do not."""
    from ditscale.kernels import attention, layernorm_modulate

    x = torch.zeros(1, 64, 32, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=matmul_formulas()) as counter:
        y = layernorm_modulate(x, torch.zeros(1, 32), torch.zeros(1, 32), backend="cpu")
        q = y.unflatten(-1, (2, 16)).transpose(1, 2)
        attention(q, q, q, backend="cpu").sum().backward()
    assert counter.get_total_flops() == 12 * 2 * 64 * 64 * 16


class Attends(nn.Module):
    """Attention of one parameter to itself, of a shape given."""

    def __init__(self, call: Callable[[Tensor], Any], *shape: int) -> None:
        super().__init__()
        self.call, self.weight = call, nn.Parameter(torch.zeros(*shape))

    def forward(self) -> Any:
        return self.call(self.weight)


aten = torch.ops.aten
PACKED = torch.tensor([0, 3, 8], dtype=torch.int32)


@pytest.mark.parametrize(
    ("call", "shape"),
    [
        (lambda w: aten._scaled_dot_product_flash_attention(w, w, w)[0], (B, H, T, K)),
        (lambda w: aten._scaled_dot_product_efficient_attention(w, w, w, None, True)[0], (B, H, T, K)),
        (lambda w: aten._scaled_dot_product_flash_attention_for_cpu(w, w, w)[0], (B, H, T, K)),
        # Below them tokens stand before heads, which torch's counter overlooks.
        (lambda w: aten._flash_attention_forward(w, w, w, None, None, T, T, 0.0, False, False)[0], (B, T, H, K)),
        (
            lambda w: aten._efficient_attention_forward(w, w, w, None, None, None, None, None, 0.0, 0, True)[0],
            (B, T, H, K),
        ),
    ],
    ids=["sdpa flash", "sdpa efficient", "sdpa cpu", "flash", "efficient"],
)
def test_fused_attention(call: Callable[[Tensor], Any], shape: tuple[int, ...]) -> None:
    scores = B * H * T * T
    once, model = 4 * scores * K, Attends(call, *shape)
    assert (trace(model).forward, trace(model).backward) == (once, 2 * once)
    hardware = trace(model, convention="hardware")
    assert (hardware.forward, hardware.backward) == (once, 2 * once + once // 2)
    # Under `all` five operations a score, and the three gradients of one parameter meet.
    everything = trace(model, convention="all")
    assert everything.forward == once + 5 * scores
    assert everything.backward == 2 * once + 5 * scores + 2 * B * H * T * K


def test_values_of_another_width() -> None:
    q, v = torch.empty(B, H, T, K, device="meta"), torch.empty(B, H, S, 3, device="meta")
    k, dout = torch.empty(B, H, S, K, device="meta"), torch.empty(B, H, T, 3, device="meta")
    scores, rest = B * H * T * S, (None,) * 9
    backward = aten._scaled_dot_product_efficient_attention_backward
    assert matmul_formulas()[aten._scaled_dot_product_efficient_attention](q, k, v) == 2 * scores * (K + 3)
    assert matmul_formulas()[backward](dout, q, k, v, *rest) == 4 * scores * (K + 3)
    assert matmul_formulas(hardware=True)[backward](dout, q, k, v, *rest) == 4 * scores * (K + 3) + 2 * scores * K


def test_packed_sequences_cost_the_sum_of_squares() -> None:
    q = torch.empty(8, H, K, device="meta")
    pairs, other = 3 * 3 + 5 * 5, torch.tensor([0, 1, 5])
    forward, backward = aten._flash_attention_forward, aten._flash_attention_backward
    table, spent, everything = matmul_formulas(), matmul_formulas(hardware=True), all_formulas()
    assert table[forward](q, q, q, PACKED, PACKED, 5, 5) == 4 * H * pairs * K
    assert table[forward](q, q, q, PACKED, other, 5, 5) == 4 * H * (3 * 1 + 5 * 4) * K
    assert table[backward](q, q, q, q, q, None, PACKED, PACKED, 5, 5) == 8 * H * pairs * K
    assert spent[backward](q, q, q, q, q, None, PACKED, PACKED, 5, 5) == 10 * H * pairs * K
    assert everything[forward](q, q, q, PACKED, PACKED, 5, 5) == (4 * K + 5) * H * pairs
    row = q[None]
    assert table[aten._efficient_attention_forward](row, row, row, None, PACKED, PACKED) == 4 * H * pairs * K


def test_packed_sequences_of_unknown_lengths_are_errors() -> None:
    """On the meta device nobody knows how long they are; torch's counter takes all for the longest."""
    starts = PACKED.to("meta")
    model = Attends(
        lambda w: aten._flash_attention_forward(w, w, w, starts, starts, 5, 5, 0.0, False, False)[0], 8, H, K
    )
    with pytest.raises(InputError, match="packed sequences of unknown lengths"):
        trace(model, backward=False)


def test_variable_length_attention_of_torch() -> None:
    varlen = importlib.import_module("torch.nn.attention.varlen")
    q = torch.empty(8, H, K, device="meta")
    table = matmul_formulas()
    ops = torch.ops.torch_attn
    assert table[ops._varlen_attn](q, q, q, PACKED, None, 5, 5) == 4 * H * (9 + 25) * K
    assert table[ops._varlen_attn_backward](q, q, q, q, q, None, PACKED, PACKED, 5, 5) == 8 * H * (9 + 25) * K
    starts = PACKED.to("meta")
    model = Attends(lambda w: varlen.varlen_attn(w, w, w, starts, starts, 5, 5), 8, H, K)
    with pytest.raises(InputError, match="packed sequences of unknown lengths"):
        trace(model, backward=False)


def test_recurrent_layers() -> None:
    """Torch runs them as products and gates, and in place."""
    b, t, d, h = 2, 5, 8, 16
    for kind, gates in ((nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)):
        report = trace(kind(d, h, batch_first=True), torch.zeros(b, t, d), loss=lambda out: out[0].sum())
        once = 2 * b * t * gates * h * (d + h)
        assert report.forward == once
        # Nobody needs the gradients of the inputs and of the first state.
        assert report.backward == once + 2 * b * (t - 1) * gates * h * h


def test_attention_with_groups_and_masks_counts_every_pair() -> None:
    def grouped(w: Tensor) -> Tensor:
        mask = torch.empty(T, T, dtype=torch.bool, device=w.device)
        return F.scaled_dot_product_attention(w, w[:, :G], w[:, :G], attn_mask=mask, enable_gqa=True)

    report = trace(Attends(grouped, B, H, T, K))
    assert (report.forward, report.backward) == (4 * B * H * T * T * K, 8 * B * H * T * T * K)
