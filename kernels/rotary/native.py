"""``ditscale::qk_norm_rope_*`` of the native libraries, their shapes for tracing and their FLOPs for torch's counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ditscale.kernels.rotary import cost


def _heads(like: Tensor) -> Tensor:
    """[B, H, T, K] over memory laid out [B, T, H, K]."""
    B, H, T, K = like.shape
    return like.new_empty((B, T, H, K)).transpose(1, 2)


def fake_qk_norm_rope_fwd(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, norm: int, interleaved: bool
) -> Tensor:
    """Shape of ``qk_norm_rope_fwd``."""
    return _heads(x)


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
    """Shapes of ``qk_norm_rope_bwd``."""
    return _heads(x), x.new_empty((0,) if weight is None else weight.shape, dtype=torch.float32)


FAKES: dict[str, Callable[..., Any]] = {
    "qk_norm_rope_fwd": fake_qk_norm_rope_fwd,
    "qk_norm_rope_bwd": fake_qk_norm_rope_bwd,
}
for _name, _fake in FAKES.items():
    torch.library.register_fake(f"ditscale::{_name}", _fake)


def _flops(count: Callable[..., int], skip: int) -> Callable[..., int]:
    """A formula for the counter, from the shapes of an operator's arguments; ``skip``: those in front of x."""

    def formula(*shapes: Any, **_: object) -> int:
        B, H, T, K = shapes[skip]
        weight, cos, _sin, _eps, norm = shapes[skip + 1 : skip + 6]
        return count(B, H, T, K, cost.NORMS[norm], weight is not None, cos is not None)

    return formula


register_flop_formula(torch.ops.ditscale.qk_norm_rope_fwd)(_flops(cost.norm_rope_flops_forward, 0))
register_flop_formula(torch.ops.ditscale.qk_norm_rope_bwd)(_flops(cost.norm_rope_flops_backward, 1))
