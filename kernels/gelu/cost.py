"""FLOPs and bytes of bias + GELU: integers in, integers out, no torch.

FLOP = one addition or one multiplication; the exponential and the division count one each.
"""

from __future__ import annotations


def bias_gelu_flops_forward(rows: int, F: int) -> int:
    """Per element: bias 1, polynomial 4, sigmoid 3, product 1."""
    return 9 * rows * F


def bias_gelu_flops_backward(rows: int, F: int) -> int:
    """Per element: bias 1, polynomial 4, sigmoid 3, slope 8, product 1, dbias 1."""
    return 18 * rows * F


def bias_gelu_bytes_forward(rows: int, F: int, size: int, bias_size: int) -> int:
    """Read x and bias, write y."""
    return 2 * rows * F * size + F * bias_size


def bias_gelu_bytes_backward(rows: int, F: int, size: int, bias_size: int) -> int:
    """Read dy, x and bias, write dx and dbias."""
    return 3 * rows * F * size + 2 * F * bias_size


def bias_gelu_bytes_saved(rows: int, F: int, size: int, bias_size: int) -> int:
    """Kept for backward: x and bias, which are inputs."""
    return rows * F * size + F * bias_size
