"""The public ``attention`` and ``attention_qkv``: checks, choice of a backend and autograd."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ditscale.errors import InputError
from ditscale.kernels import dispatch
from ditscale.kernels.attn import choice, reference
from ditscale.kernels.library import missing_reason

AttentionBackend = Literal["auto", "reference", "cpu", "triton", "cuda", "sdpa", "flash_attn", "xformers"]

if missing_reason("cpu") is None:
    from ditscale.kernels.attn import native as _native  # noqa: F401 (shapes and FLOPs of the loaded operators)


def _ops(backend: str) -> Any:
    """The operators of a backend; both namespaces have the same names and schemas."""
    return torch.ops.ditscale_triton if backend == "triton" else torch.ops.ditscale


def _wants_graph() -> bool:
    """True in a backward pass that will be differentiated itself (create_graph): it must be made of plain PyTorch."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _differentiable(out: Tensor, inputs: tuple[Tensor, ...], dout: Tensor) -> list[Tensor | None]:
    used = [t for t in inputs if t.requires_grad]
    found = iter(torch.autograd.grad(out, used, dout, create_graph=True))
    return [next(found) if t.requires_grad else None for t in inputs]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float
    ) -> Tensor:
        out, stats = _ops(backend).attention_fwd(q, k, v, lengths, scale, True)
        ctx.save_for_backward(q, k, v, out, stats, lengths)
        ctx.backend, ctx.scale = backend, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, stats, lengths = ctx.saved_tensors
        if _wants_graph():
            plain = reference.attention_ref(q, k, v, scale=ctx.scale, lengths=lengths)
            return (None, *_differentiable(plain, (q, k, v), dout), None, None)
        dq, dk, dv = _ops(ctx.backend).attention_bwd(dout, q, k, v, out, stats, lengths, ctx.scale)
        return None, dq, dk, dv, None, None


class _AttentionQkv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, qkv: Tensor, lengths: Tensor | None, scale: float) -> Tensor:
        out, stats = _ops(backend).attention_qkv_fwd(qkv, lengths, scale, True)
        ctx.save_for_backward(qkv, out, stats, lengths)
        ctx.backend, ctx.scale = backend, scale
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, stats, lengths = ctx.saved_tensors
        if _wants_graph():
            plain = _merged(reference.attention_ref(*_parts(qkv), scale=ctx.scale, lengths=lengths))
            return None, *_differentiable(plain, (qkv,), dout), None, None
        return None, _ops(ctx.backend).attention_qkv_bwd(dout, qkv, out, stats, lengths, ctx.scale), None, None


def _parts(qkv: Tensor) -> tuple[Tensor, ...]:
    """[B, T, 3, H, K] as three [B, H, T, K]."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def _merged(out: Tensor) -> Tensor:
    """[B, H, T, K] as [B, T, H * K]."""
    return out.transpose(1, 2).flatten(2)


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        dispatch.check_float(name, t)
        if t.dim() != 4 or t.shape[3] < 1:
            raise InputError(f"{name}: expected [B, H, T, K] with K >= 1, got shape {list(t.shape)}")
        if t.dtype != q.dtype or t.device != q.device:
            raise InputError(f"{name}: expected {q.dtype} on {q.device} as q, got {t.dtype} on {t.device}")
    B, H, _, K = q.shape
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != K:
        raise InputError(
            f"k, v: expected [B, H, S, K] to go with q {list(q.shape)}, got {list(k.shape)} and {list(v.shape)}"
        )
    if k.shape[1] != H and (k.shape[1] < 1 or H % k.shape[1]):
        raise InputError(f"k: expected a number of heads that divides the {H} of q, got {k.shape[1]}")


def _check_lengths(lengths: Tensor | None, B: int, device: torch.device) -> Tensor | None:
    if lengths is None:
        return None
    if lengths.shape != (B,) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise InputError(f"lengths: expected {B} integers, one a sample, got {list(lengths.shape)} {lengths.dtype}")
    return lengths.to(device=device, dtype=torch.int64).contiguous()


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast the dtype that it gives to matrix products, as torch's own attention does."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # torch knows no autocast of meta
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def _choose(backend: str, x: Tensor, T: int, K: int) -> str:
    chosen = dispatch.choose("attention", backend, x)
    if chosen == "cpu" and backend == "auto" and not choice.cpu_pays(T, K):
        return "sdpa"
    return chosen


def _sdpa(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float) -> Tensor:
    grouped = k.shape[1] != q.shape[1]
    if lengths is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    valid = torch.arange(k.shape[2], device=q.device) < lengths.view(-1, 1, 1, 1)
    empty = (lengths == 0).view(-1, 1, 1, 1)
    # Rows without a key would be NaN: they look at every key and are set to zero afterwards.
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=valid | empty, scale=scale, enable_gqa=grouped)
    return torch.where(empty, torch.zeros((), dtype=out.dtype, device=out.device), out)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    lengths: Tensor | None = None,
    backend: AttentionBackend = "auto",
) -> Tensor:
    """Attention of every query to every key, not causal: ``softmax(scale q k^T) v``.

    Args:
        q: [B, H, T, K], float32, bfloat16 or float16 (float64: "reference" and "sdpa"). Any strides; only a last dimension
            that is not contiguous is copied.
        k, v: [B, H_kv, S, K] of the same dtype. H_kv divides H: head h of q looks at head h // (H / H_kv) of k.
        scale: factor of the scores. Default: 1 / sqrt(K).
        lengths: [B] integers from 0 to S: how many keys of each sample count. Those beyond are never read; a sample with 0
            gives zeros, and gradients of zero. Default: all.
        backend: "auto", "cpu" (C++, CPU tensors), "sdpa" (PyTorch's scaled_dot_product_attention) or "reference". Default:
            "auto": on CPU tensors "cpu" (for one or two queries "sdpa", see choice.py), else "sdpa".

    Returns:
        [B, H, T, K], the dtype of q; from "cpu" a view of memory laid out [B, T, H, K], so that
        ``out.transpose(1, 2).reshape(B, T, H * K)`` copies nothing.

    Raises:
        InputError: a shape, dtype or device is not as above.
        BackendUnavailable: the backend was named and cannot run here (says why).

    Numerics ("cpu"): float32 throughout, one rounding at the end; the softmax runs online over blocks of 64 keys; its
    exponential has a relative error below 1e-7. All sums in an order fixed by the shape: two runs are equal to the bit, for
    any number of threads. A row with a NaN in its scores is NaN; a row whose every score is -infinity is zero. Second
    derivatives, forward mode and torch.func transforms: the reference. Under autocast, in the dtype of autocast.
    Cost: ``ditscale.kernels.attn.cost.attention_*``.
    Source: arXiv:1706.03762, section 3.2.1; online softmax arXiv:1805.02867; backward arXiv:2205.14135, appendix B.
    """
    q, k, v = _autocast(q, k, v)
    _check_heads(q, k, v)
    lengths = _check_lengths(lengths, q.shape[0], q.device)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    chosen = _choose(backend, q, q.shape[2], q.shape[3])
    if chosen == "reference":
        return reference.attention_ref(q, k, v, scale=scale, lengths=lengths)
    if chosen == "sdpa":
        return _sdpa(q, k, v, lengths, scale)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Attention.apply(chosen, q, k, v, lengths, scale)
    return _ops(chosen).attention_fwd(q, k, v, lengths, scale, False)[0]


def attention_qkv(
    qkv: Tensor, *, scale: float | None = None, lengths: Tensor | None = None, backend: AttentionBackend = "auto"
) -> Tensor:
    """Self-attention straight from one projection to the next: ``attention`` of the three parts of ``qkv``.

    The gradient is one tensor of the shape of ``qkv``: autograd has no three parts to put together again.

    Args:
        qkv: [B, T, 3, H, K], as a linear layer of width 3 H K gives it, seen through ``view``; strides and dtypes as q of
            ``attention``.
        scale, lengths, backend: as ``attention``.

    Returns:
        [B, T, H * K], the dtype of qkv, contiguous from "cpu".

    Raises:
        InputError, BackendUnavailable: as ``attention``.

    Numerics and cost: as ``attention``, to the bit.
    """
    (qkv,) = _autocast(qkv)
    dispatch.check_float("qkv", qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3 or qkv.shape[4] < 1:
        raise InputError(f"qkv: expected [B, T, 3, H, K] with K >= 1, got shape {list(qkv.shape)}")
    lengths = _check_lengths(lengths, qkv.shape[0], qkv.device)
    scale = qkv.shape[4] ** -0.5 if scale is None else float(scale)
    chosen = _choose(backend, qkv, qkv.shape[1], qkv.shape[4])
    if chosen in ("reference", "sdpa"):
        q, k, v = _parts(qkv)
        if chosen == "reference":
            return _merged(reference.attention_ref(q, k, v, scale=scale, lengths=lengths))
        return _merged(_sdpa(q, k, v, lengths, scale))
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _AttentionQkv.apply(chosen, qkv, lengths, scale)
    return _ops(chosen).attention_qkv_fwd(qkv, lengths, scale, False)[0]
