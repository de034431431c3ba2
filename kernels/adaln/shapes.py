"""What torch must know of the adaLN operators without running them: schemas, shapes of results, FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ditscale.kernels.adaln import cost
from ditscale.kernels.register import Operator


def _dense(t: Tensor) -> Tensor:
    return t.new_empty(t.shape)


def _stats(x: Tensor) -> Tensor:
    return x.new_empty((2, x.shape[0], x.shape[1]), dtype=torch.float32)


def _check(x: Tensor, rows: Sequence[Tensor | None], modulation: Sequence[Tensor], stats: Tensor | None = None) -> None:
    """Refuse what the native operators refuse: a wrong call must fail without data too.

    Raises:
        RuntimeError: not all on one device, ``rows`` not [B, T, D] as x, or ``modulation`` not all of one fitting shape.
    """
    if any(t is not None and t.device != x.device for t in (*rows, *modulation, stats)):
        raise RuntimeError("expected all tensors on the device of x")
    if x.dim() != 3 or x.shape[2] < 1:
        raise RuntimeError("x: expected [B, T, D] with D >= 1")
    B, T, D = x.shape
    if any(t is not None and not _is(t, (B, T, D)) for t in rows):
        raise RuntimeError("expected all rows of the shape of x")
    first = modulation[0]
    if not any(_is(first, s) for s in ((D,), (B, D), (B, T, D), (B, 1, D))):
        raise RuntimeError("modulation: expected [D], [B, D] or [B, T, D]")
    if not all(_is(m, tuple(first.shape)) for m in modulation):
        raise RuntimeError("modulation: expected one shape")


def _is(t: Tensor, shape: tuple[int, ...]) -> bool:
    """(Tuples are compared from the front: of another rank, a compiled graph would hold that two sizes differ.)"""
    return t.dim() == len(shape) and t.shape == shape


def fake_layernorm_modulate_fwd(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, scale_base: float = 1.0, rms: bool = False
) -> tuple[Tensor, Tensor]:
    """Shapes of ``layernorm_modulate_fwd``."""
    _check(x, (), (shift, scale))
    return _dense(x), _stats(x)


def fake_layernorm_modulate_infer(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, scale_base: float = 1.0, rms: bool = False
) -> Tensor:
    """Shape of ``layernorm_modulate_infer``."""
    _check(x, (), (shift, scale))
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
    _check(x, (dy,), (scale,), stats)
    return _dense(x), _dense(scale), _dense(scale)


def fake_gate_residual_fwd(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Shape of ``gate_residual_fwd``."""
    _check(x, (branch,), (gate,))
    return _dense(x)


def fake_gate_residual_bwd(dout: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes of ``gate_residual_bwd``."""
    _check(dout, (branch,), (gate,))
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
    _check(x, (branch,), (gate, shift, scale))
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
    _check(x, (branch,), (gate, shift, scale))
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
    _check(x_new, (dy, dx_new, branch), (gate, scale), stats)
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
