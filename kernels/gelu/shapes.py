"""What torch must know of ``bias_gelu`` without running it: schemas, shapes of results, FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ditscale.kernels.gelu import cost
from ditscale.kernels.register import Operator


def fake_bias_gelu_fwd(x: Tensor, bias: Tensor) -> Tensor:
    """Shape of ``bias_gelu_fwd``."""
    return x.new_empty(x.shape)


def fake_bias_gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes of ``bias_gelu_bwd``."""
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


def _flops(formula: Callable[[int, int], int]) -> Callable[..., int]:
    return lambda shape, *_, **__: formula(math.prod(shape[:-1]), shape[-1])


OPERATORS = {
    "bias_gelu_fwd": Operator(
        "(Tensor x, Tensor bias) -> Tensor", fake_bias_gelu_fwd, _flops(cost.bias_gelu_flops_forward)
    ),
    "bias_gelu_bwd": Operator(
        "(Tensor dy, Tensor x, Tensor bias) -> (Tensor dx, Tensor dbias)",
        fake_bias_gelu_bwd,
        _flops(cost.bias_gelu_flops_backward),
    ),
}
