"""What torch must know of ``bias_gelu`` without running it: schemas, shapes of results, FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ditscale.kernels.gelu import cost
from ditscale.kernels.register import Operator


def _check(x: Tensor, bias: Tensor, dy: Tensor | None = None) -> None:
    """Refuse what the native operators refuse: torch may send a call here for one tensor without data among others."""
    if bias.device != x.device or (dy is not None and dy.device != x.device):
        raise RuntimeError("expected all tensors on the device of x")
    if not 1 <= x.dim() <= 3:
        raise RuntimeError("x: expected one to three dimensions")
    if bias.dim() != 1 or bias.shape[0] != x.shape[-1]:
        raise RuntimeError("bias: expected [F]")
    if dy is not None and (dy.dim() != x.dim() or dy.shape != x.shape):
        raise RuntimeError("dy: expected the shape of x")


def fake_bias_gelu_fwd(x: Tensor, bias: Tensor) -> Tensor:
    """Shape of ``bias_gelu_fwd``."""
    _check(x, bias)
    return x.new_empty(x.shape)


def fake_bias_gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes of ``bias_gelu_bwd``."""
    _check(x, bias, dy)
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
