"""A linear layer in plain PyTorch: the oracle, and what runs where its own products are as fast as any."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias``: x [..., K], weight [N, K], bias [N], of one dtype."""
    return torch.nn.functional.linear(x, weight, bias)
