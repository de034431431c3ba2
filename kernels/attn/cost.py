"""FLOPs and bytes of attention: integers in, integers out, no torch.

FLOP = one addition or one multiplication; a multiply-add is 2. The two matrix products; the softmax apart.
"""

from __future__ import annotations


def attention_flops_forward(B: int, H: int, T_q: int, T_k: int, K: int) -> int:
    """Scores and weighted sum: 2 matrix products."""
    return 4 * B * H * T_q * T_k * K


def attention_flops_backward(B: int, H: int, T_q: int, T_k: int, K: int) -> int:
    """Scores again, dp, dv, dq, dk: 5 matrix products."""
    return 10 * B * H * T_q * T_k * K


def attention_softmax_flops_forward(B: int, H: int, T_q: int, T_k: int) -> int:
    """Per score: scale, maximum, subtract, exponential, sum; one division a row is left out."""
    return 5 * B * H * T_q * T_k


def attention_bytes_forward(B: int, H: int, T_q: int, T_k: int, K: int, size: int) -> int:
    """Read q, k, v, write the output; the log-sum-exp of each row in float32."""
    return 2 * B * H * (T_q + T_k) * K * size + 4 * B * H * T_q
