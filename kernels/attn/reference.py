"""Attention in plain PyTorch: the oracle. Materialises the [T, S] weights; differentiable to any order and forward."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_ref(q: Tensor, k: Tensor, v: Tensor, *, scale: float, lengths: Tensor | None = None) -> Tensor:
    """``softmax(scale q k^T) v`` over the first ``lengths[b]`` keys; q [B, H, T, K]; k, v [B, H_kv, S, K].

    float32 inside (float64 for float64), one rounding; under autocast too.
    """
    if q.device.type != "meta" and torch.is_autocast_enabled(
        q.device.type
    ):  # it would make the products below half precision
        with torch.autocast(q.device.type, enabled=False):
            return attention_ref(q, k, v, scale=scale, lengths=lengths)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = k.to(wide), v.to(wide)
    if k.shape[1] != q.shape[1]:  # each head of keys serves a run of neighbouring heads of queries
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    s = (q.to(wide) * scale) @ k.transpose(-1, -2)
    if lengths is None:
        return (torch.softmax(s, dim=-1) @ v).to(q.dtype)
    valid = torch.arange(k.shape[2], device=q.device) < lengths.view(-1, 1, 1, 1)
    # Keys that do not count may hold anything, NaN too: they are replaced, not multiplied by zero. A sample without keys
    # attends to nothing: zeros, not the NaN of an empty softmax.
    some = (lengths > 0).view(-1, 1, 1, 1)
    p = torch.softmax(torch.where(valid, s, torch.where(some, float("-inf"), 0.0)), dim=-1)
    p = torch.where(some, p, 0.0)
    return (p @ torch.where(valid.transpose(-1, -2), v, 0.0)).to(q.dtype)
