"""Attention in plain PyTorch: the oracle. Materialises the [T, S] weights; differentiable to any order and forward."""

from __future__ import annotations

import torch
from torch import Tensor


def same_sequence(cu_q: Tensor, cu_k: Tensor, T: int, S: int) -> Tensor:
    """[T, S] bool: whether a query and a key belong to the same one of the packed sequences."""
    # Which sequence a row belongs to: the number of sequences that end at or before it. Rows behind the last belong to none.
    of_query = torch.searchsorted(cu_q[1:], torch.arange(T, device=cu_q.device, dtype=cu_q.dtype), right=True)
    of_key = torch.searchsorted(cu_k[1:], torch.arange(S, device=cu_k.device, dtype=cu_k.dtype), right=True)
    return (of_query[:, None] == of_key) & (of_query < cu_q.shape[0] - 1)[:, None]


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    key_bias: Tensor | None = None,
    lengths: Tensor | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
) -> Tensor:
    """``softmax(scale q k^T + key_bias) v`` over the keys that count; q [B, H, T, K]; k, v [B, H_kv, S, K].

    Args as the operator's (shapes.py). float32 inside (float64 for float64), one rounding; under autocast too.
    """
    # Autocast would make the products below half precision (torch knows no autocast of the meta device).
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
        with torch.autocast(q.device.type, enabled=False):
            return attention_ref(q, k, v, scale=scale, key_bias=key_bias, lengths=lengths, cu_q=cu_q, cu_k=cu_k)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    T, S = q.shape[2], k.shape[2]
    k, v = k.to(wide), v.to(wide)
    valid = None
    if lengths is not None:
        valid = torch.arange(S, device=q.device) < lengths.view(-1, 1, 1, 1)
    elif cu_q is not None and cu_k is not None:
        valid = same_sequence(cu_q, cu_k, T, S)
    if valid is not None:
        # Keys that count for nobody, and queries that no key counts for, may hold anything, NaN too: they are replaced, not
        # multiplied by zero.
        counts = valid.any(-2).unsqueeze(-1)
        q = torch.where(valid.any(-1, keepdim=True), q, 0.0)
        k, v = torch.where(counts, k, 0.0), torch.where(counts, v, 0.0)
    if k.shape[1] != q.shape[1]:  # each head of keys serves a run of neighbouring heads of queries
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    s = (q.to(wide) * scale) @ k.transpose(-1, -2)
    if key_bias is not None:
        s = s + key_bias.to(wide).unsqueeze(2)
    if valid is not None:
        s = torch.where(valid, s, float("-inf"))
    if valid is not None or key_bias is not None:
        # A row that attends to nothing gives zeros, not the NaN of a softmax over -infinity.
        nothing = (s == float("-inf")).all(-1, keepdim=True)
        p = torch.where(nothing, 0.0, torch.softmax(torch.where(nothing, 0.0, s), dim=-1))
    else:
        p = torch.softmax(s, dim=-1)
    return (p @ v).to(q.dtype)
