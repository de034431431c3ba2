"""Norm of queries and keys per head and rotary position embedding in plain PyTorch; differentiable to any order."""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def norm_rope_ref(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    eps: float = 1e-6,
    norm: str = "rms",
    interleaved: bool = False,
) -> Tensor:
    """Norm over K ("rms", "layer", "none"), weight [K], rotation by cos, sin [T, K / 2] or [B, T, K / 2]; x [B, H, T, K].

    float32 inside (float64 for float64), one rounding.
    """
    a = _wide(x)
    if norm == "layer":
        a = a - a.mean(-1, keepdim=True)
        a = a - a.mean(-1, keepdim=True)  # what was left of the mean: a constant row is centred to zeros
    if norm != "none":
        a = a * torch.rsqrt(a.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        a = a * _wide(weight)
    if cos is not None and sin is not None:
        c, s = _wide(cos), _wide(sin)
        if cos.dim() == 3:
            c, s = c.unsqueeze(1), s.unsqueeze(1)
        if interleaved:
            first, second = a[..., 0::2], a[..., 1::2]
            a = torch.stack((first * c - second * s, second * c + first * s), dim=-1).flatten(-2)
        else:
            first, second = a.chunk(2, dim=-1)
            a = torch.cat((first * c - second * s, second * c + first * s), dim=-1)
    return a.to(x.dtype)
