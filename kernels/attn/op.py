"""The public ``attention``: checks and choice of a backend."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ditscale.errors import InputError
from ditscale.kernels import dispatch
from ditscale.kernels.attn import reference

AttentionBackend = Literal["auto", "reference", "cpu", "triton", "cuda", "sdpa", "flash_attn", "xformers"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    lengths: Tensor | None = None,
    backend: AttentionBackend = "auto",
) -> Tensor:
    """Attention of every query to every key, not causal.

    Args:
        q: [B, H, T, K]; k, v: [B, H, S, K]; strided views welcome.
        scale: factor of the scores. Default: 1 / sqrt(K).
        lengths: [B] integers, how many keys of each sample count; a sample with 0 gives zeros. Default: all.
        backend: "auto", "sdpa" (PyTorch's scaled_dot_product_attention) or "reference". Default: "auto", which is sdpa.

    Returns:
        [B, H, T, K], the dtype of q.

    Raises:
        InputError: a shape is not as above.
        BackendUnavailable: the backend was named and cannot run here (says why).

    Source: arXiv:1706.03762, section 3.2.1.
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        dispatch.check_float(name, t)
        if t.dim() != 4:
            raise InputError(f"{name}: expected [B, H, T, K], got shape {list(t.shape)}")
    if k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise InputError(
            f"k, v: expected [B, H, S, K] to go with q {list(q.shape)}, got {list(k.shape)} and {list(v.shape)}"
        )
    if lengths is not None and (lengths.shape != (q.shape[0],) or lengths.is_floating_point()):
        raise InputError(f"lengths: expected {q.shape[0]} integers, one a sample, got {list(lengths.shape)} {lengths.dtype}")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    chosen = dispatch.choose("attention", backend, q)
    if chosen == "reference":
        return reference.attention_ref(q, k, v, scale=scale, lengths=lengths)
    if lengths is None:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    valid = torch.arange(k.shape[2], device=q.device) < lengths.view(-1, 1, 1, 1)
    empty = (lengths == 0).view(-1, 1, 1, 1)
    # Rows without a key would be NaN: they look at every key and are set to zero afterwards.
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=valid | empty, scale=scale)
    return torch.where(empty, torch.zeros((), dtype=out.dtype, device=out.device), out)
