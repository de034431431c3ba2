"""FLOPs and bytes of QK-norm + RoPE: integers in, integers out, no torch. FLOP = one addition or one multiplication."""

from __future__ import annotations


def qk_norm_rope_flops_forward(B: int, H: int, T: int, K: int, weighted: bool = True, rotary: bool = True) -> int:
    """Both q and k. Per element: square and sum 2, normalise 1, weight 1, rotation 3; 3 a row."""
    return 2 * B * H * T * (K * (3 + weighted + 3 * rotary) + 3)


def qk_norm_rope_bytes_forward(B: int, H: int, T: int, K: int, size: int) -> int:
    """Read and write q and k."""
    return 4 * B * H * T * K * size
