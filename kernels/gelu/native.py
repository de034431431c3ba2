"""``ditscale::bias_gelu_*`` of the native libraries, and their shapes for tracing."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ditscale.kernels.gelu import cost



def fake_bias_gelu_fwd(x: Tensor, bias: Tensor) -> Tensor:
    """Shape of ``bias_gelu_fwd``."""
    return x.new_empty(x.shape)


def fake_bias_gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes of ``bias_gelu_bwd``."""
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


torch.library.register_fake("ditscale::bias_gelu_fwd", fake_bias_gelu_fwd)
torch.library.register_fake("ditscale::bias_gelu_bwd", fake_bias_gelu_bwd)


@register_flop_formula(torch.ops.ditscale.bias_gelu_fwd)
def _forward_flops(x_shape: torch.Size, *_: object, **__: object) -> int:
    return cost.bias_gelu_flops_forward(math.prod(x_shape[:-1]), x_shape[-1])


@register_flop_formula(torch.ops.ditscale.bias_gelu_bwd)
def _backward_flops(dy_shape: torch.Size, *_: object, **__: object) -> int:
    return cost.bias_gelu_flops_backward(math.prod(dy_shape[:-1]), dy_shape[-1])
