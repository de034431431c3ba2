"""``ditscale::attention_*`` of the native libraries, their shapes for tracing and their FLOPs for torch's counter."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ditscale.kernels.attn import cost

_ops = torch.ops.ditscale


def _heads(like: Tensor) -> Tensor:
    """[B, H, T, K] over memory laid out [B, T, H, K]."""
    B, H, T, K = like.shape
    return like.new_empty((B, T, H, K)).transpose(1, 2)


def _stats(like: Tensor, shape: tuple[int, ...], save: bool) -> Tensor:
    return like.new_empty((2, *shape) if save else (0,), dtype=torch.float32)


def fake_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, save_stats: bool
) -> tuple[Tensor, Tensor]:
    """Shapes of ``attention_fwd``."""
    return _heads(q), _stats(q, tuple(q.shape[:3]), save_stats)


def fake_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, stats: Tensor, lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of ``attention_bwd``."""
    return _heads(q), _heads(k), _heads(v)


def fake_attention_qkv_fwd(
    qkv: Tensor, lengths: Tensor | None, scale: float, save_stats: bool
) -> tuple[Tensor, Tensor]:
    """Shapes of ``attention_qkv_fwd``."""
    B, T, _, H, K = qkv.shape
    return qkv.new_empty((B, T, H * K)), _stats(qkv, (B, H, T), save_stats)


def fake_attention_qkv_bwd(
    dout: Tensor, qkv: Tensor, out: Tensor, stats: Tensor, lengths: Tensor | None, scale: float
) -> Tensor:
    """Shape of ``attention_qkv_bwd``."""
    return qkv.new_empty(qkv.shape)


FAKES = {
    "attention_fwd": fake_attention_fwd,
    "attention_bwd": fake_attention_bwd,
    "attention_qkv_fwd": fake_attention_qkv_fwd,
    "attention_qkv_bwd": fake_attention_qkv_bwd,
}
for _name, _fake in FAKES.items():
    torch.library.register_fake(f"ditscale::{_name}", _fake)


# torch's counter takes attention's matrix products as this package's ledger does, and like it counts every key: what
# `lengths` leaves out is known only when the call runs.
@register_flop_formula(_ops.attention_fwd)
def _forward_flops(q: list[int], k: list[int], *args: object, out_shape: object = None, **kwargs: object) -> int:
    return cost.attention_flops_forward(q[0], q[1], q[2], k[2], q[3])


@register_flop_formula(_ops.attention_bwd)
def _backward_flops(
    dout: list[int], q: list[int], k: list[int], *args: object, out_shape: object = None, **kwargs: object
) -> int:
    return cost.attention_flops_backward(q[0], q[1], q[2], k[2], q[3])


@register_flop_formula(_ops.attention_qkv_fwd)
def _qkv_forward_flops(qkv: list[int], *args: object, out_shape: object = None, **kwargs: object) -> int:
    B, T, _, H, K = qkv
    return cost.attention_flops_forward(B, H, T, T, K)


@register_flop_formula(_ops.attention_qkv_bwd)
def _qkv_backward_flops(
    dout: list[int], qkv: list[int], *args: object, out_shape: object = None, **kwargs: object
) -> int:
    B, T, _, H, K = qkv
    return cost.attention_flops_backward(B, H, T, T, K)
