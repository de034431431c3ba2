"""What torch must know of the adaLN operators without running them: schemas, shapes of results, FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ditscale.kernels.adaln import cost
from ditscale.kernels.register import Operator


def _dense(t: Tensor) -> Tensor:
    return t.new_empty(t.shape)


def _stats(x: Tensor) -> Tensor:
    return x.new_empty((2, x.shape[0], x.shape[1]), dtype=torch.float32)


def _together(x: Tensor, *others: Tensor | None) -> None:
    if any(t is not None and t.device != x.device for t in others):
        raise RuntimeError("expected all tensors on the device of x")


def fake_layernorm_modulate_fwd(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, scale_base: float = 1.0, rms: bool = False
) -> tuple[Tensor, Tensor]:
    """Shapes of ``layernorm_modulate_fwd``."""
    _together(x, shift, scale)
    return _dense(x), _stats(x)


def fake_layernorm_modulate_infer(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, scale_base: float = 1.0, rms: bool = False
) -> Tensor:
    """Shape of ``layernorm_modulate_infer``."""
    _together(x, shift, scale)
    return _dense(x)


def fake_layernorm_modulate_bwd(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    stats: Tensor | None = None,
    eps: float = 1e-6,
    scale_base: float = 1.0,
    rms: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of ``layernorm_modulate_bwd``."""
    _together(x, dy, scale, stats)
    return _dense(x), _dense(scale), _dense(scale)


def fake_gate_residual_fwd(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Shape of ``gate_residual_fwd``."""
    _together(x, branch, gate)
    return _dense(x)


def fake_gate_residual_bwd(dout: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes of ``gate_residual_bwd``."""
    _together(dout, branch, gate)
    return _dense(branch), _dense(gate)


def fake_gate_residual_layernorm_modulate_fwd(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    scale_base: float = 1.0,
    rms: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of ``gate_residual_layernorm_modulate_fwd``."""
    _together(x, branch, gate, shift, scale)
    return _dense(x), _dense(x), _stats(x)


def fake_gate_residual_layernorm_modulate_infer(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    scale_base: float = 1.0,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """Shapes of ``gate_residual_layernorm_modulate_infer``."""
    _together(x, branch, gate, shift, scale)
    return _dense(x), _dense(x)


def fake_gate_residual_layernorm_modulate_bwd(
    dy: Tensor,
    dx_new: Tensor | None,
    x_new: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    stats: Tensor | None = None,
    eps: float = 1e-6,
    scale_base: float = 1.0,
    rms: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Shapes of ``gate_residual_layernorm_modulate_bwd``."""
    _together(x_new, dy, dx_new, branch, gate, scale, stats)
    return _dense(x_new), _dense(branch), _dense(gate), _dense(scale), _dense(scale)


_OPTIONS = "float eps=1e-06, float scale_base=1., bool rms=False"
_NORM = f"(Tensor x, Tensor shift, Tensor scale, {_OPTIONS}) -> "
_FUSED = f"(Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, {_OPTIONS}) -> "


def _flops(name: str) -> Callable[..., int]:
    op, _, way = name.rpartition("_")
    formula = getattr(cost, f"{op}_flops_{'backward' if way == 'bwd' else 'forward'}")
    return lambda first_shape, *_, **__: int(formula(*first_shape))  # the first argument is always [B, T, D]


_SCHEMAS: list[tuple[Callable[..., Any], str]] = [
    (fake_layernorm_modulate_fwd, _NORM + "(Tensor y, Tensor stats)"),
    (fake_layernorm_modulate_infer, _NORM + "Tensor"),
    (
        fake_layernorm_modulate_bwd,
        f"(Tensor dy, Tensor x, Tensor scale, Tensor? stats=None, {_OPTIONS}) -> "
        "(Tensor dx, Tensor dshift, Tensor dscale)",
    ),
    (fake_gate_residual_fwd, "(Tensor x, Tensor branch, Tensor gate) -> Tensor"),
    (fake_gate_residual_bwd, "(Tensor dout, Tensor branch, Tensor gate) -> (Tensor dbranch, Tensor dgate)"),
    (fake_gate_residual_layernorm_modulate_fwd, _FUSED + "(Tensor x_new, Tensor y, Tensor stats)"),
    (fake_gate_residual_layernorm_modulate_infer, _FUSED + "(Tensor x_new, Tensor y)"),
    (
        fake_gate_residual_layernorm_modulate_bwd,
        "(Tensor dy, Tensor? dx_new, Tensor x_new, Tensor branch, Tensor gate, "
        f"Tensor scale, Tensor? stats=None, {_OPTIONS}) -> "
        "(Tensor dx, Tensor dbranch, Tensor dgate, Tensor dshift, Tensor dscale)",
    ),
]
OPERATORS = {
    name: Operator(schema, fake, _flops(name))
    for fake, schema in _SCHEMAS
    for name in [fake.__name__.removeprefix("fake_")]
}
