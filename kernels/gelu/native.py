"""``ditscale::bias_gelu_*`` of the native libraries, and their shapes for tracing."""

from __future__ import annotations

import torch
from torch import Tensor

bias_gelu_fwd = torch.ops.ditscale.bias_gelu_fwd.default
bias_gelu_bwd = torch.ops.ditscale.bias_gelu_bwd.default


def fake_bias_gelu_fwd(x: Tensor, bias: Tensor) -> Tensor:
    """Shape of ``bias_gelu_fwd``."""
    return x.new_empty(x.shape)


def fake_bias_gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes of ``bias_gelu_bwd``."""
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


torch.library.register_fake("ditscale::bias_gelu_fwd", fake_bias_gelu_fwd)
torch.library.register_fake("ditscale::bias_gelu_bwd", fake_bias_gelu_bwd)
