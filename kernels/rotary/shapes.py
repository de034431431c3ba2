"""What torch must know of ``qk_norm_rope`` without running it: schemas, shapes of results, FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ditscale.kernels.register import Operator, heads_like
from ditscale.kernels.rotary import cost


def fake_qk_norm_rope_fwd(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, norm: int, interleaved: bool
) -> Tensor:
    """Shape of ``qk_norm_rope_fwd``."""
    return heads_like(x)


def fake_qk_norm_rope_(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, norm: int, interleaved: bool
) -> None:
    """``qk_norm_rope_`` writes x and returns nothing."""


def fake_qk_norm_rope_bwd(
    dout: Tensor,
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    norm: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Shapes of ``qk_norm_rope_bwd``: dx, and dweight float32 ([0] where there is no weight)."""
    return heads_like(x), x.new_empty((0,) if weight is None else weight.shape, dtype=torch.float32)


def _flops(count: Callable[..., int], skip: int) -> Callable[..., int]:
    """A formula for the counter, from the shapes of an operator's arguments; ``skip``: those in front of x."""

    def formula(*shapes: Any, **_: object) -> int:
        B, H, T, K = shapes[skip]
        weight, cos, _sin, _eps, norm = shapes[skip + 1 : skip + 6]
        return count(B, H, T, K, cost.NORMS[norm], weight is not None, cos is not None)

    return formula


_OPTIONS = "Tensor? weight, Tensor? cos, Tensor? sin, float eps, int norm, bool interleaved"
OPERATORS = {
    "qk_norm_rope_fwd": Operator(
        f"(Tensor x, {_OPTIONS}) -> Tensor", fake_qk_norm_rope_fwd, _flops(cost.norm_rope_flops_forward, 0)
    ),
    "qk_norm_rope_": Operator(
        f"(Tensor(a!) x, {_OPTIONS}) -> ()", fake_qk_norm_rope_, _flops(cost.norm_rope_flops_forward, 0)
    ),
    "qk_norm_rope_bwd": Operator(
        f"(Tensor dout, Tensor x, {_OPTIONS}) -> (Tensor dx, Tensor dweight)",
        fake_qk_norm_rope_bwd,
        _flops(cost.norm_rope_flops_backward, 1),
    ),
}
