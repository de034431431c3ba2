"""The adaLN operators of the native libraries: ``ditscale::*`` on CPU and CUDA, and their shapes for tracing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ditscale.kernels.adaln import cost


_ops = torch.ops.ditscale


def _dense(t: Tensor) -> Tensor:
    return t.new_empty(t.shape)


def _stats(x: Tensor, save: bool) -> Tensor:
    shape = (2, x.shape[0], x.shape[1]) if save else (0,)
    return x.new_empty(shape, dtype=torch.float32)


def fake_layernorm_modulate_fwd(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, scale_base: float, rms: bool, save_stats: bool
) -> tuple[Tensor, Tensor]:
    """Shapes of ``layernorm_modulate_fwd``."""
    return _dense(x), _stats(x, save_stats)


def fake_layernorm_modulate_bwd(
    dy: Tensor, x: Tensor, scale: Tensor, stats: Tensor, eps: float, scale_base: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of ``layernorm_modulate_bwd``."""
    return _dense(x), _dense(scale), _dense(scale)


def fake_gate_residual_fwd(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Shape of ``gate_residual_fwd``."""
    return _dense(x)


def fake_gate_residual_bwd(dout: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes of ``gate_residual_bwd``."""
    return _dense(branch), _dense(gate)


def fake_gate_residual_layernorm_modulate_fwd(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    scale_base: float,
    rms: bool,
    save_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of ``gate_residual_layernorm_modulate_fwd``."""
    return _dense(x), _dense(x), _stats(x, save_stats)


def fake_gate_residual_layernorm_modulate_bwd(
    dy: Tensor,
    dx_new: Tensor | None,
    x_new: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    stats: Tensor,
    eps: float,
    scale_base: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Shapes of ``gate_residual_layernorm_modulate_bwd``."""
    return _dense(x_new), _dense(branch), _dense(gate), _dense(scale), _dense(scale)


FAKES = {
    "layernorm_modulate_fwd": fake_layernorm_modulate_fwd,
    "layernorm_modulate_bwd": fake_layernorm_modulate_bwd,
    "gate_residual_fwd": fake_gate_residual_fwd,
    "gate_residual_bwd": fake_gate_residual_bwd,
    "gate_residual_layernorm_modulate_fwd": fake_gate_residual_layernorm_modulate_fwd,
    "gate_residual_layernorm_modulate_bwd": fake_gate_residual_layernorm_modulate_bwd,
}
for _name, _fake in FAKES.items():
    torch.library.register_fake(f"ditscale::{_name}", _fake)


def _forward_flops(name: str) -> Callable[..., int]:
    return lambda x_shape, *_, **__: getattr(cost, f"{name}_flops_forward")(*x_shape)


def _backward_flops(name: str) -> Callable[..., int]:
    return lambda dy_shape, *_, **__: getattr(cost, f"{name}_flops_backward")(*dy_shape)


for _name in ("layernorm_modulate", "gate_residual", "gate_residual_layernorm_modulate"):
    register_flop_formula(getattr(_ops, f"{_name}_fwd"))(_forward_flops(_name))
    register_flop_formula(getattr(_ops, f"{_name}_bwd"))(_backward_flops(_name))
