"""Bias and tanh GELU in plain PyTorch: the oracle, and what runs where no kernel does."""

from __future__ import annotations

import torch
from torch import Tensor


def bias_gelu_ref(x: Tensor, bias: Tensor) -> Tensor:
    """``gelu(x + bias)``, tanh form; x [..., F], bias [F]; float32 inside (float64 for float64), one rounding."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.nn.functional.gelu(x.to(wide) + bias.to(wide), approximate="tanh").to(x.dtype)
