"""The ledger and the operators of ``ditscale.kernels`` give the same numbers: one statement of each formula,
in cost.py.
"""

from __future__ import annotations

from typing import Any

import pytest

from ditscale.dit import DiTConfig
from ditscale.dit import elementwise as ew
from ditscale.dit.flops import FlopReport, count
from ditscale.kernels.adaln import cost as adaln
from ditscale.kernels.attn import cost as attn
from ditscale.kernels.gelu import cost as gelu
from ditscale.kernels.rotary import cost as rotary

B, T, D, H, F, L = 3, 16, 12, 2, 40, 2
K = D // H
SMALL: dict[str, Any] = {
    "image_size": 8, "latent_factor": 1, "width": D, "depth": L, "heads": H, "mlp_hidden": F,
    "num_classes": 3,
}  # fmt: skip


def everything(**changes: Any) -> FlopReport:
    return count(DiTConfig(**{**SMALL, **changes}), batch=B, convention="all", dtype_bytes=4)


def each(report: FlopReport, name: str) -> tuple[int, int]:
    line = report.line(name)
    return line.forward, line.backward


def times(n: int, forward: int, backward: int) -> tuple[int, int]:
    return n * forward, n * backward


MODULATED = adaln.layernorm_modulate_flops_forward(B, T, D), adaln.layernorm_modulate_flops_backward(B, T, D)
GATED = adaln.gate_residual_flops_forward(B, T, D), adaln.gate_residual_flops_backward(B, T, D)


def test_modulation_lines_are_the_adaln_operators() -> None:
    report = everything()
    assert each(report, "blocks.attn.norm") == each(report, "blocks.mlp.norm") == times(L, *MODULATED)
    assert each(report, "final.norm") == MODULATED
    # The stream's two gradients meet once for each branch.
    assert each(report, "blocks.attn.residual") == times(L, GATED[0], GATED[1] + B * T * D)


def test_a_residual_and_the_norm_after_it_are_the_fused_operator() -> None:
    report = everything()
    forward = report.line("blocks.attn.residual").forward + report.line("blocks.mlp.norm").forward
    backward = report.line("blocks.attn.residual").backward + report.line("blocks.mlp.norm").backward
    assert forward == L * adaln.gate_residual_layernorm_modulate_flops_forward(B, T, D)
    assert backward == L * adaln.gate_residual_layernorm_modulate_flops_backward(B, T, D)


def test_gelu_line_is_the_bias_gelu_operator() -> None:
    report = everything()
    one = gelu.bias_gelu_flops_forward(B * T, F), gelu.bias_gelu_flops_backward(B * T, F)
    assert each(report, "blocks.mlp.gelu") == times(L, *one)
    # The first layer's bias is in it; the second's is by itself.
    assert each(report, "blocks.mlp.bias") == (L * B * T * D, L * B * T * D)


def test_attention_lines_are_the_attention_operator() -> None:
    report, spent = everything(), count(DiTConfig(**SMALL), batch=B, convention="hardware", dtype_bytes=4)
    lines = [report.line(f"blocks.attn.{part}") for part in ("scores", "values")]
    assert sum(line.forward for line in lines) == L * attn.attention_flops_forward(B, H, T, T, K)
    assert sum(line.backward for line in lines) == L * attn.attention_flops_backward(B, H, T, T, K)
    assert report.line("blocks.attn.softmax").forward == L * attn.attention_softmax_flops_forward(B, H, T, T)
    assert sum(line.bytes_forward for line in lines) == L * attn.attention_bytes_forward(B, H, T, T, K, 4)
    assert sum(line.bytes_backward for line in lines) == L * attn.attention_bytes_backward(B, H, T, T, K, 4)
    again = attn.attention_flops_backward_hardware(B, H, T, T, K) - attn.attention_flops_backward(B, H, T, T, K)
    assert spent.recompute == spent.line("blocks.attn.scores").recompute == L * again


def test_qk_norm_and_rope_lines_are_their_operator() -> None:
    report = everything(qk_norm="head", rope=True)
    forward = report.line("blocks.attn.qk_norm").forward + report.line("blocks.attn.rope").forward
    assert forward == L * rotary.qk_norm_rope_flops_forward(B, H, T, K, True, True)


def test_table_agrees_with_the_operators() -> None:
    """A norm and a modulation by the table are the adaLN operator, which adds ``1 + scale`` for every
    element.
    """
    rows = B * T
    norm = ew.layer_norm(rows, D, affine=False)
    assert (norm[0] + 3 * rows * D, norm[1] + 5 * rows * D) == MODULATED
    plain = ew.gelu(rows * F)
    fused = gelu.bias_gelu_flops_forward(rows, F), gelu.bias_gelu_flops_backward(rows, F)
    assert fused == (plain[0] + rows * F, plain[1] + 2 * rows * F)  # the bias is added again on the way back
    norms = 2 * ew.rms_norm(B * H * T, K, weighted=True)[0]
    assert rotary.qk_norm_rope_flops_forward(B, H, T, K, True, False) == norms
    assert rotary.qk_norm_rope_flops_forward(B, H, T, K, True, True) == norms + 2 * ew.rotate(B * H * T * K)[0]


def test_bytes_of_a_product_are_its_operands() -> None:
    line = everything().line("blocks.attn.proj")
    numbers = B * T * 2 * D + D * D
    assert line.bytes_forward == L * (numbers + D) * 4  # and the bias
    # The gradients of weight, bias and input: each product reads two operands and writes a third.
    assert line.bytes_backward == L * (2 * numbers + D) * 4
    first = everything().line("patch_embed")
    patch = 4 * 2 * 2
    assert first.bytes_backward == first.bytes_forward == (B * T * (patch + D) + patch * D + D) * 4


@pytest.mark.parametrize(
    ("changes", "name", "numbers"),
    [
        ({}, "blocks.attn.norm", L * B * T * D),
        ({}, "blocks.attn.residual", L * B * T * D),
        ({}, "blocks.mlp.gelu", L * B * T * F),
        ({"mlp": "swiglu"}, "blocks.mlp.swiglu", L * B * T * F),
        ({"qk_norm": "width"}, "blocks.attn.qk_norm", 2 * L * B * T * D),
        ({"modulation": "none", "context": "cross-attention"}, "blocks.attn.norm", L * B * T * D),
    ],
)
def test_bytes_of_elementwise_lines(changes: dict[str, Any], name: str, numbers: int) -> None:
    line = everything(**changes).line(name)
    assert line.bytes_forward == line.bytes_backward == numbers * 4
