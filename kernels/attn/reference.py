"""Attention in plain PyTorch: the oracle. Materialises the [T, T] weights."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_ref(q: Tensor, k: Tensor, v: Tensor, *, scale: float, lengths: Tensor | None = None) -> Tensor:
    """``softmax(scale q k^T) v`` over the first ``lengths[b]`` keys; float32 inside (float64 for float64), one rounding."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    s = (q.to(wide) * scale) @ k.to(wide).transpose(-1, -2)
    if lengths is None:
        return (torch.softmax(s, dim=-1) @ v.to(wide)).to(q.dtype)
    valid = torch.arange(k.shape[2], device=q.device) < lengths.view(-1, 1, 1, 1)
    p = torch.softmax(s.masked_fill(~valid, float("-inf")), dim=-1)
    # A sample without keys attends to nothing: zeros, not the NaN of an empty softmax.
    p = torch.where(lengths.view(-1, 1, 1, 1) > 0, p, 0.0)
    v = torch.where(valid.transpose(-1, -2), v.to(wide), 0.0)
    return (p @ v).to(q.dtype)
