"""The public ``linear``: checks, choice of a backend and autograd."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ditscale.errors import InputError
from ditscale.kernels import dispatch
from ditscale.kernels.autograd import differentiable, eager_apply, wants_graph
from ditscale.kernels.dispatch import operators
from ditscale.kernels.matmul import native as _native  # noqa: F401 (loads and describes ditscale::product)
from ditscale.kernels.matmul import onednn as _onednn  # noqa: F401 (defines ditscale_onednn::product)
from ditscale.kernels.matmul import shapes
from ditscale.kernels.matmul.reference import linear_ref


class Linear(torch.autograd.Function):
    """[rows, N]: a view of it made in here is one that autograd lets nobody write in place."""

    @staticmethod
    def forward(ctx: Any, run: Any, always: bool, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.run, ctx.always = run, always
        out: Tensor = operators(run).product(_rows(x), weight, bias, always)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, _, want_x, want_weight, want_bias = ctx.needs_input_grad
        dbias = dy.sum(0) if want_bias else None
        if wants_graph():
            return None, None, *differentiable(_rows_ref, (x, weight), dy), dbias
        product, always = operators(ctx.run).product, ctx.always
        dx = product(dy, weight.t(), None, always).view(x.shape) if want_x else None
        dweight = product(dy.t(), _rows(x).t(), None, always) if want_weight else None
        return None, None, dx, dweight, dbias


_linear_eager = eager_apply(Linear)


def _rows_ref(x: Tensor, weight: Tensor) -> Tensor:
    return linear_ref(_rows(x), weight)


def _rows(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.flatten(0, -2) if t.dim() > 2 else t.unsqueeze(0)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: Literal["auto", "reference", "cpu", "onednn"] = "auto",
) -> Tensor:
    """``x W^T + bias``, as ``torch.nn.functional.linear``, by the fastest float32 products there are on this processor.

    Args:
        x: [..., K] of one dimension or more; any strides.
        weight: [N, K], the dtype of x; any strides.
        bias: [N], the dtype of x. Default: None.
        backend: "auto", "reference" (PyTorch's own products: MKL on a CPU, cuBLAS on a GPU), "cpu" (ours) or "onednn" (both
            float32 on a CPU). Default: "auto": for float32 on processors that are not Intel's "cpu" with AVX2, "onednn" with
            AVX-512 that is faster than AVX2 (Zen 5), of which MKL makes no use there; else "reference", and for small layers.

    Returns:
        [..., N], the dtype of x (under autocast the dtype that PyTorch's own linear layer has).

    Raises:
        InputError: shapes, dtypes or devices that do not belong together.
        BackendUnavailable: "cpu" or "onednn" was named and cannot run here (says why).

    Numerics: float32 sums of at most 384 terms, added up; dbias is PyTorch's sum. Kept for backward: x and W.
    Small: fewer than 6 Mi multiply-adds by a weight of fewer than 128 Ki numbers.
    "cpu" makes a packed copy of the weight (for dW: of x), of at most 32 MiB or 384 terms of every sum at a time, in memory that
    the calling thread keeps for the next call.
    PyTorch's own products serve under autocast, in ``torch.func`` transforms, for subclasses of tensors such as DTensor, and in
    backward passes that are differentiated again.
    Cost: ``ditscale.kernels.matmul.cost``.
    """
    _check(x, weight, bias)
    always = backend != "auto"
    if not always and _is_small(x, weight):
        return linear_ref(x, weight, bias)
    chosen = dispatch.quick("linear", backend, x) or dispatch.choose("linear", backend, x)
    own = all(type(t) in (Tensor, torch.nn.Parameter) for t in (x, weight))
    if chosen == "reference" or not own or torch.is_autocast_enabled(x.device.type):
        return linear_ref(x, weight, bias)
    if not torch.is_grad_enabled() or not (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        y = operators(chosen).product(_rows(x), weight, bias, always)
    else:
        apply = Linear.apply if isinstance(chosen, str) else _linear_eager
        y = apply(chosen, always, x, weight, bias)
    out: Tensor = y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])
    return out


def _is_small(x: Tensor, weight: Tensor) -> bool:
    """Whether others than PyTorch have no use. While compiling: where that is known for every size that the graph serves, and its
    own layer is then what the compiler works on."""
    if weight.numel() >= shapes.LARGE_WEIGHT:
        return False
    small = x.numel() * weight.shape[0] < shapes.SMALLEST
    if not torch.compiler.is_compiling():
        return small
    # Here, for it takes a second that eager users need not pay.
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(small)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    dispatch.check_float("x", x)
    dispatch.check_float("weight", weight)
    if x.dim() < 1 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise InputError(
            f"x, weight: expected [..., K] and [N, K], got shapes {list(x.shape)} and {list(weight.shape)}"
        )
    if bias is not None:
        dispatch.check_float("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise InputError(f"bias: expected [{weight.shape[0]}], got {list(bias.shape)}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None or (t.device == x.device and t.dtype == x.dtype):
            continue
        if t.device != x.device or not torch.is_autocast_enabled(x.device.type):  # which converts them
            raise InputError(f"{name}: expected {x.dtype} on {x.device} as x, got {t.dtype} on {t.device}")
