"""FLOPs and bytes of QK-norm + RoPE: integers in, integers out, no torch. FLOP = one addition or one multiplication.

``norm_rope_*`` count one tensor of B * H * T rows of width K, ``qk_norm_rope_*`` queries and keys alike. Division and square
root count one each.
"""

from __future__ import annotations

NORMS = ("none", "rms", "layer")  # by the number that the operators take


def norm_rope_flops_forward(
    B: int, H: int, T: int, K: int, norm: str = "rms", weighted: bool = True, rotary: bool = True
) -> int:
    """Per element: rms norm: square and sum 2, normalise 1 (layer: mean 1 and centring 1 more); weight 1; rotation 3.

    Per row: 3 for the mean square, its root and reciprocal (layer: 1 more).
    """
    element = {"none": 0, "rms": 3, "layer": 5}[norm] + weighted + 3 * rotary
    return B * H * T * (K * element + {"none": 0, "rms": 3, "layer": 4}[norm])


def norm_rope_flops_backward(
    B: int, H: int, T: int, K: int, norm: str = "rms", weighted: bool = True, rotary: bool = True
) -> int:
    """Per element: rotation back 3; weight 1 and its gradient 2; rms norm: its sum 2, dx 3 (layer: mean and centring 2 more).

    Per row: 1 a mean. The normalised row made again is not counted.
    """
    element = {"none": 0, "rms": 5, "layer": 7}[norm] + 3 * weighted + 3 * rotary
    return B * H * T * (K * element + {"none": 0, "rms": 1, "layer": 2}[norm])


def norm_rope_bytes_forward(B: int, H: int, T: int, K: int, size: int) -> int:
    """Read and write the rows; the tables and weights, shared by heads or samples, are left out."""
    return 2 * B * H * T * K * size


def norm_rope_bytes_backward(B: int, H: int, T: int, K: int, size: int) -> int:
    """Read the rows and the gradient, write the gradient of the rows."""
    return 3 * B * H * T * K * size


def qk_norm_rope_flops_forward(B: int, H: int, T: int, K: int, weighted: bool = True, rotary: bool = True) -> int:
    """Both q and k, with rms norm."""
    return 2 * norm_rope_flops_forward(B, H, T, K, "rms", weighted, rotary)


def qk_norm_rope_flops_backward(B: int, H: int, T: int, K: int, weighted: bool = True, rotary: bool = True) -> int:
    """Both q and k, with rms norm."""
    return 2 * norm_rope_flops_backward(B, H, T, K, "rms", weighted, rotary)


def qk_norm_rope_bytes_forward(B: int, H: int, T: int, K: int, size: int) -> int:
    """Read and write q and k."""
    return 2 * norm_rope_bytes_forward(B, H, T, K, size)


def qk_norm_rope_bytes_backward(B: int, H: int, T: int, K: int, size: int) -> int:
    """Read q, k and their gradients, write two gradients."""
    return 2 * norm_rope_bytes_backward(B, H, T, K, size)
