"""The adaLN family in plain PyTorch: the oracle of every kernel, and what runs where no kernel does.

Statistics, ``scale_base + scale`` and all products are float32 (float64 for float64 inputs); results are rounded once, to
the dtype of ``x``. Everything is differentiable, to any order and in forward mode.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _rows(m: Tensor) -> Tensor:
    """[D] and [B, T, D] broadcast against [B, T, D] as they are; [B, D] needs its token dimension."""
    return m.unsqueeze(1) if m.dim() == 2 else m


def _norm(x: Tensor, eps: float, rms: bool) -> Tensor:
    width = (x.shape[-1],)
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _plain_norm(x, eps, rms)
    if rms:
        return F.rms_norm(x, width, eps=eps)
    if x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        y: Tensor = _LayerNorm.apply(x, eps)
        return y
    return F.layer_norm(x, width, eps=eps)


def _plain_norm(x: Tensor, eps: float, rms: bool = False) -> Tensor:
    """Line by line. PyTorch's own layer norm takes its statistics for constants where a tangent, or a second derivative, is
    differentiated: numbers that are wrong without a word (torch 2.13)."""
    if not rms:
        x = x - x.mean(-1, keepdim=True)
        x = x - x.mean(-1, keepdim=True)  # what was left of the mean: a constant row is centred to zeros
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


class _LayerNorm(torch.autograd.Function):
    """PyTorch's layer norm and its gradient, with derivatives of that gradient to any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        y, mean, rstd = torch.native_layer_norm(x, (x.shape[-1],), None, None, eps)
        ctx.save_for_backward(x, mean, rstd)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd = ctx.saved_tensors
        again = torch.is_grad_enabled()
        if again or forward_ad._current_level >= 0:
            with torch.enable_grad():
                own = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
                return *torch.autograd.grad(_plain_norm(own, ctx.eps), own, dy, create_graph=again), None
        width, wanted = (x.shape[-1],), (True, False, False)
        dx: Tensor = torch.ops.aten.native_layer_norm_backward(dy, x, width, mean, rstd, None, None, wanted)[0]
        return dx, None


def layernorm_modulate_ref(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, scale_base: float = 1.0, rms: bool = False
) -> Tensor:
    """``norm(x) * (scale_base + scale) + shift``; x [B, T, D], shift and scale [D], [B, D] or [B, T, D]."""
    y = _norm(_wide(x), eps, rms) * (scale_base + _wide(_rows(scale))) + _wide(_rows(shift))
    return y.to(x.dtype).contiguous()  # as the kernels' results; of permuted rows PyTorch makes permuted ones


def gate_residual_ref(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """``x + gate * branch``; x and branch [B, T, D], gate [D], [B, D] or [B, T, D]."""
    return (_wide(x) + _wide(_rows(gate)) * _wide(branch)).to(x.dtype).contiguous()


def gate_residual_layernorm_modulate_ref(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = 1e-6,
    scale_base: float = 1.0,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """The gated residual, and the norm and modulation of what it gives (as stored, so after rounding)."""
    x_new = gate_residual_ref(x, branch, gate)
    return x_new, layernorm_modulate_ref(x_new, shift, scale, eps=eps, scale_base=scale_base, rms=rms)
