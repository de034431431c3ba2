"""Muon: momentum whose matrices are made orthogonal before each step (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

``buffer = momentum * buffer + gradient``; the update of a matrix [out, in] is
``- rate * sqrt(max(1, out / in)) * orthogonal(gradient + momentum * buffer)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Coefficients of the quintic iteration, tuned by the author for the steepest slope at zero; singular values end in
# about 0.7 to 1.2, not at 1.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5


def orthogonal(matrices: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Matrices with the same singular vectors, and singular values near 1 (five Newton-Schulz steps).

    Args:
        matrices: [..., out, in].
        dtype: of the products. bfloat16 is enough, and the fast choice on a GPU. Default: float32.

    Returns:
        The shape of ``matrices``, in float32.
    """
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return (x.mT if tall else x).float()


@torch.no_grad()
def momentum_ahead(gradients: Sequence[Tensor], buffers: Sequence[Tensor], momentum: float) -> list[Tensor]:
    """Move the momentum on in place; return the gradients one momentum step ahead (Nesterov), likewise shaped."""
    torch._foreach_mul_(list(buffers), momentum)
    torch._foreach_add_(list(buffers), list(gradients))
    return list(torch._foreach_add(list(gradients), list(buffers), alpha=momentum))


@torch.no_grad()
def orthogonal_steps(matrices: Sequence[Tensor], *, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The orthogonal matrices of some [..., out, in], times ``sqrt(max(1, out / in))``; float32.

    Those of one shape are worked out together: a model has as many of each as it has blocks.
    """
    steps = list(matrices)
    by_shape: dict[torch.Size, list[int]] = {}
    for i, matrix in enumerate(matrices):
        by_shape.setdefault(matrix.shape, []).append(i)
    for shape, places in by_shape.items():
        found = orthogonal(torch.stack([matrices[i] for i in places]), dtype=dtype)
        found = found * max(1.0, shape[-2] / shape[-1]) ** 0.5
        for i, step in zip(places, found, strict=True):
            steps[i] = step
    return steps
