"""FLOPs and bytes of a linear layer: integers in, integers out, no torch.

FLOP = one addition or one multiplication. Of the products only, as the ledger's convention "matmul" and PyTorch's own formulas
count them: adding the bias, one addition a result, is left out.
"""

from __future__ import annotations


def linear_flops_forward(rows: int, inputs: int, outputs: int) -> int:
    """x W^T."""
    return 2 * rows * inputs * outputs


def linear_flops_backward(rows: int, inputs: int, outputs: int) -> int:
    """dx = dy W and dW = dy^T x."""
    return 4 * rows * inputs * outputs


def linear_bytes_forward(rows: int, inputs: int, outputs: int, size: int) -> int:
    """Read x, W and the bias, write y."""
    return (rows * inputs + inputs * outputs + outputs + rows * outputs) * size


def linear_bytes_backward(rows: int, inputs: int, outputs: int, size: int) -> int:
    """Read dy, x and W, write dx, dW and the bias's gradient. Kept for backward: x and W."""
    return (rows * outputs + 2 * rows * inputs + 2 * inputs * outputs + outputs) * size
