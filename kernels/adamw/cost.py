"""FLOPs and bytes of a step of AdamW: integers in, integers out, no torch.

FLOP = one addition, multiplication, division or square root.
"""

from __future__ import annotations


def adamw_flops(count: int, *, average: bool) -> int:
    """Of ``count`` weights: clipping 1, first moment 3, second 4, the step 7, the average 3."""
    return (18 if average else 15) * count


def adamw_bytes(count: int, *, average: bool) -> int:
    """Read gradient, weight and moments, write weight and moments, all float32; read and write the average."""
    return (9 if average else 7) * 4 * count
