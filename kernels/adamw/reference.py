"""A step of AdamW in plain PyTorch: the oracle, and what runs where no kernel does."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def adamw_average_ref_(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    average: Tensor | None,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip: float,
    decay: float,
) -> None:
    """One step, in the dtype of the tensors."""
    gradient = gradient * clip
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = second.sqrt().div_((1 - beta2**step) ** 0.5).add_(eps)
    weight.mul_(1 - lr * weight_decay).addcdiv_(first, denominator, value=-lr / (1 - beta1**step))
    if average is not None:
        average.lerp_(weight, 1 - decay)
