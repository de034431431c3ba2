"""FLOPs and bytes of the adaLN family: integers in, integers out, no torch.

FLOP = one addition or one multiplication; division, square root and comparison count one each. R = B * T rows of width D;
``size`` is the bytes of an element of x, ``modulation_size`` of shift, scale and gate. Bytes are compulsory traffic:
every tensor once, each way. Kernels may read a row a second time from a cache; that is not counted. ``*_bytes_saved`` is all
that the graph holds for backward; of a view such as a chunk its own numbers, though it keeps the whole storage alive.
"""

from __future__ import annotations


def _rows_of_modulation(B: int, T: int, mode: str) -> int:
    return {"shared": 1, "per_sample": B, "per_token": B * T}[mode]


def layernorm_modulate_flops_forward(B: int, T: int, D: int) -> int:
    """Per element: mean 1, centring 1, square and sum 2, normalise 1, base + scale 1, modulate 2; 4 per row."""
    return B * T * (8 * D + 4)


def layernorm_modulate_flops_backward(B: int, T: int, D: int) -> int:
    """Per element: normalised 2, base + scale 1, g 1, two sums 3, dx 5, dshift 1, dscale 2; 2 per row."""
    return B * T * (15 * D + 2)


def gate_residual_flops_forward(B: int, T: int, D: int) -> int:
    """One multiply-add an element."""
    return 2 * B * T * D


def gate_residual_flops_backward(B: int, T: int, D: int) -> int:
    """dbranch 1, dgate 2 an element; dx is the incoming gradient itself."""
    return 3 * B * T * D


def gate_residual_layernorm_modulate_flops_forward(B: int, T: int, D: int) -> int:
    """The sum of its parts."""
    return gate_residual_flops_forward(B, T, D) + layernorm_modulate_flops_forward(B, T, D)


def gate_residual_layernorm_modulate_flops_backward(B: int, T: int, D: int) -> int:
    """The sum of its parts, and one addition where the two gradients of x meet."""
    return gate_residual_flops_backward(B, T, D) + layernorm_modulate_flops_backward(B, T, D) + B * T * D


def layernorm_modulate_bytes_forward(
    B: int, T: int, D: int, size: int, modulation_size: int, mode: str = "per_sample", save_stats: bool = True
) -> int:
    """Read x, shift, scale; write y and the statistics (mean and 1 / std, float32)."""
    m = _rows_of_modulation(B, T, mode) * D * modulation_size
    return 2 * B * T * D * size + 2 * m + (8 * B * T if save_stats else 0)


def layernorm_modulate_bytes_backward(
    B: int, T: int, D: int, size: int, modulation_size: int, mode: str = "per_sample", save_stats: bool = True
) -> int:
    """Read dy, x, scale and the statistics; write dx, dshift, dscale."""
    m = _rows_of_modulation(B, T, mode) * D * modulation_size
    return 3 * B * T * D * size + 3 * m + (8 * B * T if save_stats else 0)


def layernorm_modulate_bytes_saved(
    B: int, T: int, D: int, size: int, modulation_size: int, mode: str = "per_sample", save_stats: bool = True
) -> int:
    """Kept for backward: x and scale, which are inputs, and the statistics."""
    m = _rows_of_modulation(B, T, mode) * D * modulation_size
    return B * T * D * size + m + (8 * B * T if save_stats else 0)


def gate_residual_bytes_forward(
    B: int, T: int, D: int, size: int, modulation_size: int, mode: str = "per_sample"
) -> int:
    """Read x, branch, gate; write the sum."""
    return 3 * B * T * D * size + _rows_of_modulation(B, T, mode) * D * modulation_size


def gate_residual_bytes_backward(
    B: int, T: int, D: int, size: int, modulation_size: int, mode: str = "per_sample"
) -> int:
    """Read dout, branch, gate; write dbranch, dgate."""
    return 3 * B * T * D * size + 2 * _rows_of_modulation(B, T, mode) * D * modulation_size


def gate_residual_bytes_saved(B: int, T: int, D: int, size: int, modulation_size: int, mode: str = "per_sample") -> int:
    """Kept for backward: branch and gate, which are inputs. x is not needed."""
    return B * T * D * size + _rows_of_modulation(B, T, mode) * D * modulation_size


def gate_residual_layernorm_modulate_bytes_forward(
    B: int, T: int, D: int, size: int, modulation_size: int, mode: str = "per_sample", save_stats: bool = True
) -> int:
    """Read x, branch, gate, shift, scale; write x_new, y and the statistics."""
    m = _rows_of_modulation(B, T, mode) * D * modulation_size
    return 4 * B * T * D * size + 3 * m + (8 * B * T if save_stats else 0)


def gate_residual_layernorm_modulate_bytes_backward(
    B: int, T: int, D: int, size: int, modulation_size: int, mode: str = "per_sample", save_stats: bool = True
) -> int:
    """Read dy, dx_new, x_new, branch, gate, scale and the statistics; write dx, dbranch, dgate, dshift, dscale."""
    m = _rows_of_modulation(B, T, mode) * D * modulation_size
    return 6 * B * T * D * size + 5 * m + (8 * B * T if save_stats else 0)


def gate_residual_layernorm_modulate_bytes_saved(
    B: int, T: int, D: int, size: int, modulation_size: int, mode: str = "per_sample", save_stats: bool = True
) -> int:
    """Kept for backward: branch, gate and scale, which are inputs, x_new, an output, and the statistics. x is not needed."""
    m = _rows_of_modulation(B, T, mode) * D * modulation_size
    return 2 * B * T * D * size + 2 * m + (8 * B * T if save_stats else 0)
