"""The public ``bias_gelu``: checks, choice of a backend and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditscale.errors import InputError
from ditscale.kernels import dispatch
from ditscale.kernels.autograd import differentiable, eager_apply, wants_graph
from ditscale.kernels.dispatch import Backend, operators
from ditscale.kernels.gelu import native as _native  # noqa: F401 (loads and describes ditscale::*)
from ditscale.kernels.gelu import reference


class BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.run = run
        return operators(run).bias_gelu_fwd(x, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if wants_graph():
            return None, *differentiable(reference.bias_gelu_ref, ctx.saved_tensors, dy)
        return None, *operators(ctx.run).bias_gelu_bwd(dy, *ctx.saved_tensors)


_bias_gelu_eager = eager_apply(BiasGelu)


def bias_gelu(x: Tensor, bias: Tensor, *, backend: Backend = "auto") -> Tensor:
    """``gelu(x + bias)`` in one pass, the tanh form of GELU.

    Args:
        x: [..., F] of one to three dimensions, float32, bfloat16 or float16 (float64 on the reference): a matmul's result.
        bias: [F], the dtype of x or float32; anything else is converted to float32.
        backend: "auto", "reference", "cpu", "triton" or "cuda". Default: "auto".

    Returns:
        The shape and dtype of x, contiguous.

    Raises:
        InputError: a shape, dtype or device is not as above.
        BackendUnavailable: the backend was named and cannot run here (says why).

    Numerics: float32 inside, one rounding; dbias is a float32 sum over rows in a fixed order. Kept for backward: x.
    Cost: ``ditscale.kernels.gelu.cost``.
    Source: Hendrycks & Gimpel, arXiv:1606.08415: 0.5 z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))).
    """
    try:
        run = dispatch.quick("bias_gelu", backend, x)
        if run is not None:
            if torch.is_grad_enabled() and (x.requires_grad or bias.requires_grad):
                return _bias_gelu_eager(run, x, bias)
            return run.bias_gelu_fwd(x, bias)
    except (AttributeError, RuntimeError, TypeError):
        pass  # inputs that have to be converted first, or a mistake: what follows knows which
    dispatch.check_float("x", x)
    dispatch.check_float("bias", bias)
    if not 1 <= x.dim() <= 3:
        raise InputError(f"x: expected [..., F] of one to three dimensions, got shape {list(x.shape)}")
    if bias.dim() != 1 or bias.shape[0] != x.shape[-1] or bias.device != x.device:
        raise InputError(f"bias: expected [{x.shape[-1]}] on {x.device} as x, got {list(bias.shape)} on {bias.device}")
    if bias.dtype != x.dtype and bias.dtype != torch.float32:
        bias = bias.to(torch.float32)
    chosen = dispatch.choose("bias_gelu", backend, x)
    if chosen == "reference" or x.shape[-1] == 0:  # (a GPU is not sent for nothing)
        return reference.bias_gelu_ref(x, bias)
    if torch.is_grad_enabled() and (x.requires_grad or bias.requires_grad):
        return BiasGelu.apply(chosen, x, bias)
    return operators(chosen).bias_gelu_fwd(x, bias)
