"""FLOPs and bytes of attention: integers in, integers out, no torch.

FLOP = one addition or one multiplication; a multiply-add is 2. What is called model FLOPs are the matrix products that the
mathematics needs, as the ledger of a model counts them; the softmax apart. Kernels make the scores a second time in the
backward pass instead of keeping them: only ``attention_flops_backward_hardware`` counts that.
"""

from __future__ import annotations


def attention_flops_forward(B: int, H: int, T_q: int, T_k: int, K: int) -> int:
    """Scores and weighted sum: 2 matrix products."""
    return 4 * B * H * T_q * T_k * K


def attention_flops_backward(B: int, H: int, T_q: int, T_k: int, K: int) -> int:
    """Gradients of weights, values, queries and keys: 4 matrix products."""
    return 8 * B * H * T_q * T_k * K


def attention_flops_backward_hardware(B: int, H: int, T_q: int, T_k: int, K: int) -> int:
    """The same and the scores again: 5 matrix products."""
    return 10 * B * H * T_q * T_k * K


def attention_flops_backward_two_passes(B: int, H: int, T_q: int, T_k: int, K: int) -> int:
    """What the GPU kernels make: one pass for queries and one for keys, each with scores and gradients of weights of its own:
    7 matrix products, so that no sum needs atomics."""
    return 14 * B * H * T_q * T_k * K


def attention_softmax_flops_forward(B: int, H: int, T_q: int, T_k: int) -> int:
    """Per score: scale, maximum, subtract, exponential, sum; one division a row is left out."""
    return 5 * B * H * T_q * T_k


def attention_softmax_flops_backward(B: int, H: int, T_q: int, T_k: int) -> int:
    """Per score: product, sum and difference with the row's, product, scale. Weights made again are not counted."""
    return 5 * B * H * T_q * T_k


def attention_bytes_forward(B: int, H: int, T_q: int, T_k: int, K: int, size: int, save_stats: bool = True) -> int:
    """Read q, k, v, write the output; for backward, two float32 numbers a row."""
    return 2 * B * H * (T_q + T_k) * K * size + (8 * B * H * T_q if save_stats else 0)


def attention_bytes_backward(B: int, H: int, T_q: int, T_k: int, K: int, size: int) -> int:
    """Read q, k, v, the output, its gradient and the statistics; write three gradients."""
    return 4 * B * H * (T_q + T_k) * K * size + 8 * B * H * T_q


def attention_bytes_saved(B: int, H: int, T_q: int, K: int, size: int) -> int:
    """Kept for backward besides the inputs: the output and the statistics."""
    return B * H * T_q * (K * size + 8)
