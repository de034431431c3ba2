"""``adamw_average_``: checks, and the kernel where it serves."""

from __future__ import annotations

import torch
from torch import Tensor

from ditscale.errors import InputError
from ditscale.kernels.adamw.native import AVAILABLE
from ditscale.kernels.adamw.reference import adamw_average_ref_


def serves(*tensors: Tensor) -> bool:
    """Whether the kernel takes tensors: float32 without gaps on a CPU, and the library is here."""
    return AVAILABLE and all(
        t.device.type == "cpu"
        and t.dtype == torch.float32
        and t.is_contiguous()
        and type(t) in (Tensor, torch.nn.Parameter)
        for t in tensors
    )


@torch.no_grad()
def adamw_average_(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    average: Tensor | None = None,
    *,
    step: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    decay: float = 0.0,
) -> None:
    """A step of AdamW with a clipped gradient, and of a moving average of the weights, in one pass and in place.

    With g = ``clip`` gradient: first = beta1 first + (1 - beta1) g; second = beta2 second + (1 - beta2) g^2;
    weight = (1 - lr weight_decay) weight - lr (first / (1 - beta1^step)) / (sqrt(second / (1 - beta2^step)) + eps);
    average = decay average + (1 - decay) weight.

    Args:
        weight, first, second: of one shape and floating-point dtype, changed in place. The kernel serves float32 without gaps
            on a CPU; anything else takes plain PyTorch's steps.
        gradient: the same shape; any strides. It stays as it is.
        average: the same shape, changed in place. Default: None, no average.
        step: steps taken with this one, at least 1.
        lr, beta1, beta2, eps, weight_decay: AdamW's. Default: 0.9, 0.95, 1e-8 and 0.0.
        clip: what the gradient is multiplied by. Default: 1.0.
        decay: of the average. Default: 0.0.

    Raises:
        InputError: tensors of several shapes, or a step below 1.

    Numerics: float32, scalars rounded once; the same bits for any number of threads.
    Cost: ``ditscale.kernels.adamw.cost``.
    Source: Loshchilov & Hutter, arXiv:1711.05101, algorithm 2, with PyTorch's place of eps.
    """
    named = {"gradient": gradient, "first": first, "second": second}
    written = [weight, first, second]
    if average is not None:
        named["average"] = average
        written.append(average)
    for name, tensor in named.items():
        if tensor.shape != weight.shape:
            raise InputError(f"{name}: expected the shape of weight, {list(weight.shape)}, got {list(tensor.shape)}")
    if step < 1:
        raise InputError(f"step: expected at least 1, got {step!r}")
    if serves(*written) and gradient.device.type == "cpu" and gradient.dtype == torch.float32:
        torch.ops.ditscale.adamw_average_(
            weight, gradient, first, second, average, step, lr, beta1, beta2, eps, weight_decay, clip, decay
        )
        if not torch.compiler.is_compiling():  # whose graphs know what is written
            torch.autograd.graph.increment_version(written)
    else:
        adamw_average_ref_(
            weight, gradient, first, second, average,
            step=step, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, clip=clip, decay=decay,
        )  # fmt: skip
