"""The public ``attention`` and ``attention_qkv``: checks, choice of a backend and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ditscale.errors import BackendUnavailable, InputError
from ditscale.kernels import dispatch
from ditscale.kernels.attn import adapters, choice, reference
from ditscale.kernels.attn import native as _native  # noqa: F401 (loads and describes ditscale::*)
from ditscale.kernels.autograd import differentiable, wants_graph
from ditscale.kernels.dispatch import operators

AttentionBackend = Literal["auto", "reference", "cpu", "triton", "cuda", "sdpa", "flash_attn", "xformers"]
_GREATEST_SCALE: Final = 3e38
# The kernels make the bias's gradient from the scores', which a scale of 0 has taken away and a tiny one drowned.
_LEAST_SCALE: Final = 1e-30
_OWN = ("cpu", "triton", "cuda")  # those with the operators of shapes.py; the others bring their own autograd
_FLOAT32_MAX: Final = torch.finfo(torch.float32).max


def _differentiable(
    function: Callable[..., Tensor], inputs: tuple[Tensor | None, ...], wanted: tuple[bool, ...], dout: Tensor
) -> list[Tensor | None]:
    """``differentiable``, for the inputs that are wanted; the others stay as they are."""

    def plain(*own: Tensor) -> Tensor:
        given = iter(own)
        return function(*(next(given) if want else t for t, want in zip(inputs, wanted, strict=True)))

    used = [t for t, want in zip(inputs, wanted, strict=True) if want and t is not None]
    found = iter(differentiable(plain, used, dout))
    return [next(found) if want else None for want in wanted]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
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
    ) -> Tensor:
        out, stats = operators(backend).attention_fwd(q, k, v, key_bias, lengths, cu_q, cu_k, max_q, max_k, scale, True)
        ctx.save_for_backward(q, k, v, out, stats, key_bias, lengths, cu_q, cu_k)
        ctx.backend, ctx.options = backend, (max_q, max_k, scale)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, stats, key_bias, lengths, cu_q, cu_k = ctx.saved_tensors
        bias_grad = ctx.needs_input_grad[4]
        if wants_graph():

            def plain(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Tensor:
                return reference.attention_ref(
                    q, k, v, scale=ctx.options[2], key_bias=key_bias, lengths=lengths, cu_q=cu_q, cu_k=cu_k
                )

            grads = _differentiable(plain, (q, k, v, key_bias), ctx.needs_input_grad[1:5], dout)
            return (None, *grads, None, None, None, None, None, None)
        dq, dk, dv, dkey_bias = operators(ctx.backend).attention_bwd(
            dout, q, k, v, out, stats, key_bias, lengths, cu_q, cu_k, *ctx.options, bias_grad
        )
        return None, dq, dk, dv, dkey_bias if bias_grad else None, None, None, None, None, None, None


class _AttentionQkv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        qkv: Tensor,
        key_bias: Tensor | None,
        lengths: Tensor | None,
        cu: Tensor | None,
        max_seqlen: int,
        scale: float,
    ) -> Tensor:
        out, stats = operators(backend).attention_qkv_fwd(qkv, key_bias, lengths, cu, max_seqlen, scale, True)
        ctx.save_for_backward(qkv, out, stats, key_bias, lengths, cu)
        ctx.backend, ctx.options = backend, (max_seqlen, scale)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, stats, key_bias, lengths, cu = ctx.saved_tensors
        bias_grad = ctx.needs_input_grad[2]
        if wants_graph():

            def plain(qkv: Tensor, key_bias: Tensor | None) -> Tensor:
                return merged(
                    reference.attention_ref(
                        *parts(qkv), scale=ctx.options[1], key_bias=key_bias, lengths=lengths, cu_q=cu, cu_k=cu
                    )
                )

            grads = _differentiable(plain, (qkv, key_bias), ctx.needs_input_grad[1:3], dout)
            return (None, *grads, None, None, None, None)
        dqkv, dkey_bias = operators(ctx.backend).attention_qkv_bwd(
            dout, qkv, out, stats, key_bias, lengths, cu, *ctx.options, bias_grad
        )
        return None, dqkv, dkey_bias if bias_grad else None, None, None, None, None


def parts(qkv: Tensor) -> tuple[Tensor, ...]:
    """[B, T, 3, H, K] as three [B, H, T, K]."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def merged(out: Tensor) -> Tensor:
    """[B, H, T, K] as [B, T, H * K]."""
    return out.transpose(1, 2).flatten(2)


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        dispatch.check_precision(name, t)
        if t.dim() != 4 or t.shape[3] < 1:
            raise InputError(f"{name}: expected [B, H, T, K] with K >= 1, got shape {list(t.shape)}")
        if t.dtype != q.dtype or t.device != q.device:
            raise InputError(f"{name}: expected {q.dtype} on {q.device} as q, got {t.dtype} on {t.device}")
    B, H, _, K = q.shape
    if k.shape != v.shape or k.shape[0] != B or k.shape[3] != K:
        raise InputError(
            f"k, v: expected [B, H, S, K] to go with q {list(q.shape)}, got {list(k.shape)} and {list(v.shape)}"
        )
    if k.shape[1] != H and (k.shape[1] < 1 or H % k.shape[1]):
        raise InputError(f"k: expected a number of heads that divides the {H} of q, got {k.shape[1]}")


def _integers(name: str, t: Tensor, count: int | None, device: torch.device, most: int | None = None) -> Tensor:
    if not isinstance(t, Tensor) or t.is_floating_point() or t.dtype == torch.bool or t.dim() != 1:
        came = f"{list(t.shape)} {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
        raise InputError(f"{name}: expected a vector of integers, got {came}")
    if count is not None and t.shape[0] != count:
        raise InputError(f"{name}: expected {count} integers, got {t.shape[0]}")
    if most is not None and _legible(t):
        low, high = (int(v) for v in torch.aminmax(t.to(torch.int64)))  # which torch lacks for wide unsigned integers
        if low < 0 or high > most:
            raise InputError(f"{name}: expected integers from 0 to {most}, got {low if low < 0 else high}")
    return t.to(device=device, dtype=torch.int32).contiguous()


def _legible(t: Tensor) -> bool:
    """Whether the values can be looked at; where they cannot, as in a trace or on a GPU, the kernel looks at them itself."""
    plain = type(t) is Tensor and t.is_cpu and not torch.compiler.is_compiling() and not dispatch.in_transform()
    return plain and t.numel() > 0 and torch._C._len_torch_dispatch_stack() == 0


def _positions(name: str, t: Tensor, count: int | None, device: torch.device, rows: int) -> Tensor:
    """``cu_seqlens`` as the kernels take them."""
    ends = _integers(name, t, count, device)
    if _legible(t):
        wide = t.to(torch.int64)
        if wide[0] != 0 or wide[-1] > rows or bool((wide[1:] < wide[:-1]).any()):
            shown = wide.tolist() if wide.numel() <= 8 else f"{wide[:4].tolist()[:-1]} and {wide.numel() - 3} more"
            raise InputError(f"{name}: expected positions that start at 0 and never fall, at most {rows}, got {shown}")
    return ends


def _key_bias(t: Tensor | None, q: Tensor, S: int) -> Tensor | None:
    """The bias of every key in float32 (float64 for float64), from a bias or a mask: [B, H, S], or 1 in the place of B and H."""
    if t is None:
        return None
    B, H = q.shape[:2]
    shapes = {1: (S,), 2: (B, S), 3: (B, H, S)}
    if not isinstance(t, Tensor) or t.device != q.device or t.shape != shapes.get(t.dim()):
        came = f"{list(t.shape)} on {t.device}" if isinstance(t, Tensor) else type(t).__name__
        raise InputError(f"key_bias: expected [{S}], [{B}, {S}] or [{B}, {H}, {S}] on {q.device}, got {came}")
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if t.dtype == torch.bool:
        t = torch.where(t, 0.0, float("-inf"))
    elif not t.is_floating_point():
        raise InputError(f"key_bias: expected floating-point or bool, got {str(t.dtype).removeprefix('torch.')}")
    t = t.to(wide)
    return t.unsqueeze(1) if t.dim() == 2 else t.view(1, 1, S) if t.dim() == 1 else t


def _every_bias(key_bias: Tensor | None, q: Tensor, chosen: str) -> Tensor | None:
    """[B, H, S], as the operators take it."""
    if key_bias is None:
        return None
    if chosen in ("triton", "cuda"):
        # These keep scores in units of log 2, where the least float32 is -infinity and its key left out. What lies beyond
        # is taken off (of infinity a part), as a constant, so that every bias keeps its gradient.
        beyond = F.softshrink(key_bias.detach(), adapters.GREATEST_BIAS)
        key_bias = key_bias - beyond.clamp(adapters.GREATEST_BIAS - _FLOAT32_MAX, _FLOAT32_MAX - adapters.GREATEST_BIAS)
    return key_bias.expand(q.shape[0], q.shape[1], -1)


def _bound(name: str, most: int | None, rows: int, ends: Tensor) -> int:
    """The bound of the sequences' lengths: a launch reads no token behind it, so one that is too small is refused."""
    if most is None:
        return rows
    if isinstance(most, bool) or not isinstance(most, (int, torch.SymInt)) or not 0 <= most <= rows:
        raise InputError(f"{name}: expected an integer from 0 to {rows}, got {most!r}")
    longest = int(ends.to(torch.int64).diff().max()) if ends.shape[0] > 1 and _legible(ends) else 0
    if most < longest:
        raise InputError(f"{name}: expected at least the {longest} tokens of the longest sequence, got {most}")
    return int(most)


def _packed(
    q: Tensor,
    k: Tensor,
    lengths: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen: int | None,
    max_seqlen_k: int | None,
) -> tuple[Tensor | None, Tensor | None, int, int]:
    T, S = q.shape[2], k.shape[2]
    if cu_seqlens is None:
        for name, value in (
            ("cu_seqlens_k", cu_seqlens_k),
            ("max_seqlen", max_seqlen),
            ("max_seqlen_k", max_seqlen_k),
        ):
            if value is not None:
                raise InputError(f"{name}: expected together with cu_seqlens, which is not given")
        return None, None, 0, 0  # (T and S would make constants of them in a compiled graph)
    if lengths is not None:
        raise InputError("lengths: expected none beside cu_seqlens, which says how long each sequence is")
    if q.shape[0] != 1:
        raise InputError(f"q: expected packed sequences as one sample [1, H, T, K], got {list(q.shape)}")
    cu_q = _positions("cu_seqlens", cu_seqlens, None, q.device, T)
    if cu_q.shape[0] < 1:
        raise InputError("cu_seqlens: expected one integer more than there are sequences, got none")
    if cu_seqlens_k is None:
        if S != T:
            raise InputError(f"cu_seqlens_k: expected where k has another number of tokens ({S}) than q ({T})")
        if max_seqlen_k is not None:
            raise InputError("max_seqlen_k: expected together with cu_seqlens_k, which is not given")
        most = _bound("max_seqlen", max_seqlen, T, cu_seqlens)
        return cu_q, cu_q, most, most
    cu_k = _positions("cu_seqlens_k", cu_seqlens_k, cu_q.shape[0], q.device, S)
    most_q = _bound("max_seqlen", max_seqlen, T, cu_seqlens)
    return cu_q, cu_k, most_q, _bound("max_seqlen_k", max_seqlen_k, S, cu_seqlens_k)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast the dtype that it gives to matrix products, as torch's own attention does."""
    if not all(isinstance(t, Tensor) for t in tensors):
        return tensors  # a mistake, which the checks will name
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):  # torch knows no autocast of meta
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def _scale(scale: float | None, K: int) -> float:
    if scale is None:
        return float(K**-0.5)
    if isinstance(scale, Tensor) and scale.requires_grad and torch.is_grad_enabled():
        raise InputError(
            "scale: expected a number, got a tensor that requires a gradient (for a learned temperature multiply q by it)"
        )
    dispatch.check_number("scale", scale)
    if abs(scale) > _GREATEST_SCALE:
        raise InputError(f"scale: expected a float32 number, got {scale!r}")
    return float(scale)


def _choose(backend: str, q: Tensor, k: Tensor, *, alone: bool) -> str:
    """The backend of a call. ``alone``: only values of plain attention are wanted, no bias, lengths, packing or gradients."""
    chosen = dispatch.choose("attention", backend, q)
    widest, K = choice.WIDEST_HEAD.get(chosen), q.shape[3]
    if widest is not None and widest < K:
        if backend == "auto":
            return "sdpa"
        raise BackendUnavailable(
            f"backend {backend!r} cannot run attention here: it takes heads of at most {widest} columns, got {K}"
        )
    if q.shape[1] == 0 and k.shape[1] > 0:
        return "reference"  # no head of queries looks at a head of keys
    if alone and chosen == "cpu" and backend == "auto" and not choice.cpu_pays(q.shape[2], k.shape[2], K):
        return "sdpa"
    return chosen


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    lengths: Tensor | None = None,
    key_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen: int | None = None,
    max_seqlen_k: int | None = None,
    backend: AttentionBackend = "auto",
) -> Tensor:
    """Attention of every query to every key, not causal: ``softmax(scale q k^T + key_bias) v``.

    Args:
        q: [B, H, T, K], float32, bfloat16 or float16 (float64: "reference" and "sdpa"). Any strides; a last dimension that
            is not contiguous is copied, on GPUs also rows that begin on no boundary of 16 bytes (docs/attention.md).
        k, v: [B, H_kv, S, K] of the same dtype. H_kv divides H: head h of q looks at head h // (H / H_kv) of k.
        scale: factor of the scores, a Python number: it has no gradient (for a learned temperature multiply q by it), and of
            a tensor torch.compile(fullgraph=True) cannot read it. Default: 1 / sqrt(K).
        lengths: [B] integers from 0 to S: how many keys of each sample count. Those beyond are never read; a sample with 0
            gives zeros, and gradients of zero. Default: all.
        key_bias: [S], [B, S] or [B, H, S]. Floating point: added to the scaled scores of a key, differentiable; bool: False
            leaves a key out, as a bias of -infinity does (its k and v must be finite all the same). A sample that has no
            key left gives zeros. Default: none.
        cu_seqlens: [N + 1] integers, 0 first and never falling: N sequences lie packed in the one sample (B = 1), sequence i
            at cu_seqlens[i] to cu_seqlens[i + 1] - 1, and each attends to itself alone. Tokens behind the last one give
            zeros. Default: not packed.
        cu_seqlens_k: the same for keys, where they are packed otherwise than queries. Default: cu_seqlens.
        max_seqlen, max_seqlen_k: an upper bound of the lengths of the sequences, for GPUs, which else must take the whole
            sample for one. Too small a one is refused where cu_seqlens lies on the CPU; elsewhere the tokens behind it are
            left out. Default: T, S.
        backend: "auto", "cpu" (C++, CPU tensors), "triton", "cuda", "sdpa" (PyTorch's scaled_dot_product_attention),
            "flash_attn", "xformers" or "reference". Default: "auto": what measured fastest for this kind of call
            (choice.py), where nothing was measured "sdpa".

    Returns:
        [B, H, T, K], the dtype of q; from our own kernels over memory laid out [B, T, H, K], so that
        ``out.transpose(1, 2).reshape(B, T, H * K)`` copies nothing.

    Raises:
        InputError: a shape, dtype or device is not as above.
        BackendUnavailable: the backend was named and cannot run here, or not this call (says why).

    Numerics ("cpu"): float32 throughout, one rounding at the end; the softmax runs online over blocks of keys; its
    exponential has a relative error below 1e-7. All sums in an order fixed by the shape: two runs are equal to the bit, for
    any number of threads. A row with a NaN in its scores is NaN; a row whose every score is -infinity is zero. Forward mode
    and torch.func transforms: the reference; second derivatives ("cpu", "triton", "cuda"): the reference. Other libraries have
    none, and raise: name backend="reference" for them where "auto" is "sdpa" (GPUs, float64, a CPU without AVX2). Under
    autocast, in the dtype of autocast.
    Cost: ``ditscale.kernels.attn.cost.attention_*``.
    Source: arXiv:1706.03762, section 3.2.1; online softmax arXiv:1805.02867; backward arXiv:2205.14135, appendix B.
    """
    q, k, v = _autocast(q, k, v)
    _check_heads(q, k, v)
    if lengths is not None:
        lengths = _integers("lengths", lengths, q.shape[0], q.device, k.shape[2])
    key_bias = _key_bias(key_bias, q, k.shape[2])
    cu_q, cu_k, max_q, max_k = _packed(q, k, lengths, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
    scale = _scale(scale, q.shape[3])
    bias_grad = key_bias is not None and key_bias.requires_grad
    grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad or bias_grad)
    alone = key_bias is None and lengths is None and cu_q is None and not grad
    chosen = _choose(backend, q, k, alone=alone)
    if bias_grad and abs(scale) < _LEAST_SCALE:
        chosen = "reference"
    key_bias = _every_bias(key_bias, q, chosen)
    if chosen == "reference":
        return reference.attention_ref(q, k, v, scale=scale, key_bias=key_bias, lengths=lengths, cu_q=cu_q, cu_k=cu_k)
    if chosen not in _OWN:
        return adapters.CALLS[chosen](q, k, v, key_bias, lengths, cu_q, cu_k, max_q, max_k, scale)
    if grad:
        if torch.compiler.is_compiling():  # Dynamo refuses an autograd function that is given a tensor twice
            k, v, cu_k = k.view_as(k), v.view_as(v), None if cu_k is None else cu_k.view_as(cu_k)
        return _Attention.apply(chosen, q, k, v, key_bias, lengths, cu_q, cu_k, max_q, max_k, scale)
    return operators(chosen).attention_fwd(q, k, v, key_bias, lengths, cu_q, cu_k, max_q, max_k, scale, False)[0]


def attention_qkv(
    qkv: Tensor,
    *,
    scale: float | None = None,
    lengths: Tensor | None = None,
    key_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    backend: AttentionBackend = "auto",
) -> Tensor:
    """Self-attention straight from one projection to the next: ``attention`` of the three parts of ``qkv``.

    The gradient is one tensor of the shape of ``qkv``: autograd has no three parts to put together again.

    Args:
        qkv: [B, T, 3, H, K], as a linear layer of width 3 H K gives it, seen through ``view``; strides and dtypes as q of
            ``attention``.
        scale, lengths, key_bias, cu_seqlens, max_seqlen, backend: as ``attention``.

    Returns:
        [B, T, H * K], the dtype of qkv, contiguous from our own kernels.

    Raises:
        InputError, BackendUnavailable: as ``attention``.

    Numerics and cost: as ``attention``, to the bit.
    """
    (qkv,) = _autocast(qkv)
    dispatch.check_precision("qkv", qkv)
    if qkv.dim() != 5 or qkv.shape[2] != 3 or qkv.shape[4] < 1:
        raise InputError(f"qkv: expected [B, T, 3, H, K] with K >= 1, got shape {list(qkv.shape)}")
    q = qkv.select(2, 0).transpose(1, 2)
    if lengths is not None:
        lengths = _integers("lengths", lengths, q.shape[0], q.device, q.shape[2])
    key_bias = _key_bias(key_bias, q, q.shape[2])
    cu, _, most, _ = _packed(q, q, lengths, cu_seqlens, None, max_seqlen, None)
    scale = _scale(scale, q.shape[3])
    bias_grad = key_bias is not None and key_bias.requires_grad
    grad = torch.is_grad_enabled() and (qkv.requires_grad or bias_grad)
    chosen = _choose(backend, q, q, alone=key_bias is None and lengths is None and cu is None and not grad)
    key_bias = _every_bias(key_bias, q, chosen)
    if chosen not in _OWN or (bias_grad and abs(scale) < _LEAST_SCALE):
        q, k, v = parts(qkv)
        return merged(
            attention(
                q,
                k,
                v,
                scale=scale,
                lengths=lengths,
                key_bias=key_bias,
                cu_seqlens=cu,
                max_seqlen=None if cu is None else most,
                backend=chosen,  # type: ignore[arg-type]
            )
        )
    if grad:
        return _AttentionQkv.apply(chosen, qkv, key_bias, lengths, cu, most, scale)
    return operators(chosen).attention_qkv_fwd(qkv, key_bias, lengths, cu, most, scale, False)[0]
