"""What torch must know of the attention operators without running them: schemas, shapes of results, FLOPs.

Every backend implements these four operators, the native libraries as ``ditscale::*``, Triton as ``ditscale_triton::*``:

``attention_fwd(q, k, v, key_bias, lengths, cu_q, cu_k, max_q, max_k, scale, save_stats) -> (out, stats)``
``attention_bwd(dout, q, k, v, out, stats, key_bias, lengths, cu_q, cu_k, max_q, max_k, scale, bias_grad)
-> (dq, dk, dv, dkey_bias)``
``attention_qkv_fwd(qkv, key_bias, lengths, cu, max_seqlen, scale, save_stats) -> (out, stats)``
``attention_qkv_bwd(dout, qkv, out, stats, key_bias, lengths, cu, max_seqlen, scale, bias_grad) -> (dqkv, dkey_bias)``

Arguments, checked and brought to this form by ``op.py``:

* ``q`` [B, H, T, K]; ``k``, ``v`` [B, H_kv, S, K] of its dtype (float32, bfloat16, float16), H_kv divides H and head h looks at
  head h // (H / H_kv) of k. Any strides, those of batch, head and token may be 0 (expanded) and differ between q, k and v;
  only the last one must be 1 where K > 1, and an implementation copies what has another. ``qkv`` [B, T, 3, H, K] likewise.
* ``key_bias`` [B, H, S] float32 or None, any strides: added to the scaled scores of every query, score = scale q.k + bias. At
  -infinity a key has weight zero (its k and v must be finite).
* ``lengths`` [B] int32 or None: only the first ``lengths[b]`` keys of sample b count, and the others are never read (they may
  hold NaN). 0 to S; the CPU refuses other values, a GPU, which cannot ask without waiting, clamps them.
* ``cu_q``, ``cu_k`` [N + 1] int32, both or neither: B = 1 and N sequences lie one behind the other; queries
  cu_q[i] .. cu_q[i + 1] - 1 look at keys cu_k[i] .. cu_k[i + 1] - 1. Sequences may be empty; rows behind the last one belong to
  none. ``max_q``, ``max_k``: upper bounds of the sequences' lengths, for the grid of a launch; T and S where nothing better
  is known; without ``cu_q`` nobody looks at them. Not together with ``lengths``. ``cu``, ``max_seqlen``: the same for both.
* ``scale``: any finite number, negative and zero too (with ``bias_grad``: not zero).

Results:

* ``out`` [B, H, T, K] over memory laid out [B, T, H, K]; of qkv [B, T, H * K], contiguous.
* ``stats`` [2, B, H, T] float32 where ``save_stats``, else [0]: what backward makes the weights again from,
  weight = 2^(log2(e) score - stats[0]) * stats[1]. So log-sum-exp = ln(2) (stats[0] - log2(stats[1])). A row without a key, and
  one whose every score is -infinity, has stats 0, 0. An implementation may keep the log-sum-exp alone (stats[1] = 1); the
  greatest score and the reciprocal of the sum apart lose fewer digits. (The CPU keeps the greatest score itself in stats[0]:
  there weight = 2^(log2(e) (score - stats[0])) * stats[1].)
* ``dq``, ``dk``, ``dv`` as q, k, v, over memory laid out [B, T, H, K]; ``dqkv`` [B, T, 3, H, K] contiguous.
* ``dkey_bias`` [B, H, S] float32, contiguous, the sum over the queries of the gradients of the scores; [0] unless ``bias_grad``.
* Rows without a key and rows that belong to no sequence are zero in ``out`` and ``dq``; keys that do not count are zero in
  ``dk``, ``dv`` and ``dkey_bias``. A row with a NaN in its scores is NaN. Every element is written.
* Two runs are equal to the bit: sums in an order that the shape fixes, no atomics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ditscale.kernels.attn import cost
from ditscale.kernels.register import Operator, heads_like


def _float32(like: Tensor, shape: tuple[int, ...], wanted: bool) -> Tensor:
    return like.new_empty(shape if wanted else (0,), dtype=torch.float32)


def fake_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    lengths: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    save_stats: bool,
) -> tuple[Tensor, Tensor]:
    """Shapes of ``attention_fwd``."""
    return heads_like(q), _float32(q, (2, *q.shape[:3]), save_stats)


def fake_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    key_bias: Tensor | None,
    lengths: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes of ``attention_bwd``."""
    dkey_bias = _float32(q, (q.shape[0], q.shape[1], k.shape[2]), bias_grad)
    return heads_like(q), heads_like(k), heads_like(v), dkey_bias


def fake_attention_qkv_fwd(
    qkv: Tensor,
    key_bias: Tensor | None,
    lengths: Tensor | None,
    cu: Tensor | None,
    max_seqlen: int,
    scale: float,
    save_stats: bool,
) -> tuple[Tensor, Tensor]:
    """Shapes of ``attention_qkv_fwd``."""
    B, T, _, H, K = qkv.shape
    return qkv.new_empty((B, T, H * K)), _float32(qkv, (2, B, H, T), save_stats)


def fake_attention_qkv_bwd(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    stats: Tensor,
    key_bias: Tensor | None,
    lengths: Tensor | None,
    cu: Tensor | None,
    max_seqlen: int,
    scale: float,
    bias_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Shapes of ``attention_qkv_bwd``."""
    B, T, _, H, _ = qkv.shape
    return qkv.new_empty(qkv.shape), _float32(qkv, (B, H, T), bias_grad)


def _sequences(cu: Tensor, bound: int) -> list[int]:
    """Lengths of packed sequences; where only the shape of ``cu`` is known, the bound for each."""
    from torch._subclasses.fake_tensor import FakeTensor

    if isinstance(cu, FakeTensor) or cu.device.type == "meta":
        return [bound] * (cu.shape[0] - 1)
    ends: list[int] = cu.tolist()
    return [b - a for a, b in zip(ends, ends[1:], strict=False)]


# torch's counter takes attention's matrix products as this package's ledger does, and like it counts every key of a sample:
# `lengths` leaves them out of the result, not of the model. Packed sequences are counted one by one.
def _count(
    formula: Callable[..., int],
    B: int,
    H: int,
    T: int,
    S: int,
    K: int,
    packed: tuple[Tensor, Tensor, int, int] | None,
) -> int:
    if packed is None:
        return formula(B, H, T, S, K)
    cu_q, cu_k, max_q, max_k = packed
    pairs = zip(_sequences(cu_q, max_q), _sequences(cu_k, max_k), strict=True)
    return sum(formula(1, H, queries, keys, K) for queries, keys in pairs)


def _flops(skip: int, formula: Callable[..., int]) -> Callable[..., int]:
    """For the operators of three tensors; ``skip``: arguments in front of q, and out and stats behind v."""

    def count(*arguments: Any, out_val: object = None, **_: object) -> int:
        q, k, _v, *rest = arguments[skip:]
        _bias, _lengths, cu_q, cu_k, max_q, max_k = rest[2 * skip :][:6]
        packed = None if cu_q is None else (cu_q, cu_k, max_q, max_k)
        B, H, T, K = q.shape
        return _count(formula, B, H, T, k.shape[2], K, packed)

    return count


def _qkv_flops(skip: int, formula: Callable[..., int]) -> Callable[..., int]:
    def count(*arguments: Any, out_val: object = None, **_: object) -> int:
        qkv, *rest = arguments[skip:]
        _bias, _lengths, cu, bound = rest[2 * skip :][:4]
        B, T, _three, H, K = qkv.shape
        return _count(formula, B, H, T, T, K, None if cu is None else (cu, cu, bound, bound))

    return count


OPERATORS = {
    "attention_fwd": Operator(
        "(Tensor q, Tensor k, Tensor v, Tensor? key_bias, Tensor? lengths, Tensor? cu_q, Tensor? cu_k, int max_q, int max_k, "
        "float scale, bool save_stats) -> (Tensor out, Tensor stats)",
        fake_attention_fwd,
        _flops(0, cost.attention_flops_forward),
        flops_of_tensors=True,
    ),
    "attention_bwd": Operator(
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor stats, Tensor? key_bias, Tensor? lengths, "
        "Tensor? cu_q, Tensor? cu_k, int max_q, int max_k, float scale, bool bias_grad) -> "
        "(Tensor dq, Tensor dk, Tensor dv, Tensor dkey_bias)",
        fake_attention_bwd,
        _flops(1, cost.attention_flops_backward),
        flops_of_tensors=True,
    ),
    "attention_qkv_fwd": Operator(
        "(Tensor qkv, Tensor? key_bias, Tensor? lengths, Tensor? cu, int max_seqlen, float scale, bool save_stats) -> "
        "(Tensor out, Tensor stats)",
        fake_attention_qkv_fwd,
        _qkv_flops(0, cost.attention_flops_forward),
        flops_of_tensors=True,
    ),
    "attention_qkv_bwd": Operator(
        "(Tensor dout, Tensor qkv, Tensor out, Tensor stats, Tensor? key_bias, Tensor? lengths, Tensor? cu, int max_seqlen, "
        "float scale, bool bias_grad) -> (Tensor dqkv, Tensor dkey_bias)",
        fake_attention_qkv_bwd,
        _qkv_flops(1, cost.attention_flops_backward),
        flops_of_tensors=True,
    ),
}
