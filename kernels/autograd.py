"""What the autograd functions of every operator family share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def wants_graph() -> bool:
    """True in a backward pass that will be differentiated itself (``create_graph``) or whose cotangents have tangents: it must
    be made of plain PyTorch."""
    return (torch.is_grad_enabled() or forward_ad._current_level >= 0) and not torch.compiler.is_compiling()


def differentiable(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], *cotangents: Tensor
) -> tuple[Tensor, ...]:
    """The gradients of ``function`` for every one of its inputs, as plain PyTorch that can be differentiated again.

    Args:
        function: plain PyTorch, of ``inputs``.
        inputs: floating-point; those that belong to a graph are led back to.
        cotangents: the gradients of its results.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Each input as a tensor of its own: where one is given twice, or depends on another, each place has its own gradient.
        own = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in inputs]
        return torch.autograd.grad(function(*own), own, cotangents, create_graph=again)


def eager_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` for eager calls outside of transforms, without what only those need: half its time."""
    inherited: Any = super(torch.autograd.Function, function)
    return inherited.apply
