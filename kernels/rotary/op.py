"""The public ``qk_norm_rope``: checks, choice of a backend and autograd."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch._C._autograd import CreationMeta, _get_creation_meta

from ditscale.errors import BackendUnavailable, InputError
from ditscale.kernels import dispatch
from ditscale.kernels.autograd import differentiable, wants_graph
from ditscale.kernels.dispatch import Backend, operators
from ditscale.kernels.rotary import cost, reference
from ditscale.kernels.rotary import native as _native  # noqa: F401 (loads and describes ditscale::*)

HeadNorm = Literal["rms", "layer", "none"]


def _gradients(ctx: Any, saved: tuple[Any, ...], dout: Tensor) -> tuple[Tensor | None, ...]:
    """Of each argument of either function's ``forward``, by the backend that made its result. ``saved`` are the context's, which
    under checkpointing may be asked for once only."""
    x, weight, cos, sin = saved
    norm = cost.NORMS.index(ctx.norm)
    dx, dw = operators(ctx.backend).qk_norm_rope_bwd(dout, x, weight, cos, sin, ctx.eps, norm, ctx.interleaved)
    return None, dx, None if weight is None else dw, None, None, None, None, None


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        weight: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        eps: float,
        norm: str,
        interleaved: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.backend, ctx.eps, ctx.norm, ctx.interleaved = backend, eps, norm, interleaved
        return operators(backend).qk_norm_rope_fwd(x, weight, cos, sin, eps, cost.NORMS.index(norm), interleaved)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, cos, sin = ctx.saved_tensors
        if wants_graph():

            def plain(x: Tensor, weight: Tensor | None = None) -> Tensor:
                return _plain(x, weight, cos, sin, ctx.eps, ctx.norm, ctx.interleaved)

            dx, *dw = differentiable(plain, (x,) if weight is None else (x, weight), dout)
            return None, dx, dw[0] if dw else None, None, None, None, None, None
        return _gradients(ctx, (x, weight, cos, sin), dout)


class _NormRopeInPlace(torch.autograd.Function):
    """Writes x. Backward needs it as it was: a copy, dense, which is the memory that a result of its own would have taken."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        weight: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        eps: float,
        norm: str,
        interleaved: bool,
    ) -> Tensor:
        ctx.save_for_backward(x.clone(memory_format=torch.preserve_format), weight, cos, sin)
        ctx.backend, ctx.eps, ctx.norm, ctx.interleaved = backend, eps, norm, interleaved
        operators(backend).qk_norm_rope_(x, weight, cos, sin, eps, cost.NORMS.index(norm), interleaved)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        if wants_graph():  # the copy is of no graph: a second derivative would miss what lies before x
            raise InputError(
                "inplace: expected False for second derivatives (create_graph=True, forward mode), got True"
            )
        return _gradients(ctx, ctx.saved_tensors, dout)


def _plain(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    norm: str,
    interleaved: bool,
) -> Tensor:
    return reference.norm_rope_ref(x, weight, cos, sin, eps=eps, norm=norm, interleaved=interleaved)


def _out_of_place(chosen: str, x: Tensor, weight: Tensor | None, *rest: Any) -> Tensor:
    cos, sin, eps, norm, interleaved = rest
    if chosen == "reference":
        return _plain(x, weight, *rest)
    if torch.is_grad_enabled() and (x.requires_grad or (weight is not None and weight.requires_grad)):
        out: Tensor = _NormRope.apply(chosen, x, weight, *rest)
    else:
        out = operators(chosen).qk_norm_rope_fwd(x, weight, cos, sin, eps, cost.NORMS.index(norm), interleaved)
    return out


def _in_place(chosen: str, x: Tensor, weight: Tensor | None, *rest: Any) -> Tensor:
    cos, sin, eps, norm, interleaved = rest
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, cos, sin))
    traced = torch.compiler.is_compiling() or dispatch.in_transform()
    if chosen == "reference" or traced or x.stride(3) != 1:
        # Through a result of its own. Backward keeps what it was made from, which must not be what is written then.
        return x.copy_(_out_of_place(chosen, x.clone() if grad or traced else x, weight, *rest))
    if grad:
        written: Tensor = _NormRopeInPlace.apply(chosen, x, weight, *rest)
        return written
    operators(chosen).qk_norm_rope_(x, weight, cos, sin, eps, cost.NORMS.index(norm), interleaved)
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)
    return x


def _check_in_place(
    q: Tensor, k: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None
) -> None:
    """What would otherwise be found out after the memory was written, or not at all."""
    traced = torch.compiler.is_compiling() or dispatch.in_transform()
    for name, x, weight in (("q", q, q_weight), ("k", k, k_weight)):
        if not traced and x.is_inference() and not torch.is_inference_mode_enabled():
            raise InputError(f"{name}: expected a tensor that may be written, got one of inference mode outside of it")
        if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
            raise InputError(f"{name}: expected memory for every number to write in place, got an expanded tensor")
        if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, cos, sin))):
            continue
        if x.is_leaf and x.requires_grad:
            raise InputError(
                f"{name}: expected a result of other operators to write in place, got a leaf with a gradient"
            )
        if traced or not x._is_view():
            continue
        if x._base is not None and x._base.is_leaf and x._base.requires_grad:
            raise InputError(f"{name}: expected a result of other operators to write in place, got a view of a leaf")
        if _get_creation_meta(x) != CreationMeta.DEFAULT:
            raise InputError(
                f"{name}: expected a view that autograd lets be written in place, such as qkv[:, :, 0].transpose(1, 2), got "
                "one of several results of a function (unbind, chunk, split) or one made without gradients"
            )
    if q is k or (not traced and q.numel() and k.numel() and q.data_ptr() == k.data_ptr()):
        raise InputError("q, k: expected memory of their own to write in place, got the same twice")


def _check(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
) -> None:
    for name, t in (("q", q), ("k", k)):
        dispatch.check_precision(name, t)
        if t.dim() != 4 or t.shape[3] < 1:
            raise InputError(f"{name}: expected [B, H, T, K] with K >= 1, got shape {list(t.shape)}")
    K = q.shape[-1]
    if k.shape[-1] != K or k.device != q.device:
        raise InputError(f"k: expected width {K} on {q.device} as q, got {k.shape[-1]} on {k.device}")
    if norm not in cost.NORMS:
        raise InputError(f"norm: expected 'rms', 'layer' or 'none', got {norm!r}")
    for name, w in (("q_weight", q_weight), ("k_weight", k_weight)):
        dispatch.check_vector(name, w, K, q.device)
    if (cos is None) != (sin is None):
        raise InputError("cos, sin: expected both or neither, got one")
    if cos is None or sin is None:
        return
    if K % 2:
        raise InputError(f"q: expected an even head width K for a rotation, got {K}")
    B, T = q.shape[0], q.shape[2]
    if k.shape[2] != T or k.shape[0] != B:
        raise InputError(f"k: expected the {B} samples of {T} tokens of q for a rotation, got {list(k.shape)}")
    for name, t in (("cos", cos), ("sin", sin)):
        dispatch.check_float(name, t)
        if t.device != q.device:
            raise InputError(f"{name}: expected a tensor on {q.device} as q, got one on {t.device}")
        # (Looking for a shape in a tuple of them, torch.compile takes symbols for unequal that it could make equal.)
        if t.shape != ((T, K // 2) if t.dim() == 2 else (B, T, K // 2)) or t.shape != cos.shape:
            raise InputError(f"{name}: expected [T, K / 2] = [{T}, {K // 2}] or [B, T, K / 2], got {list(t.shape)}")


def _table(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    eps: float = 1e-6,
    norm: HeadNorm = "rms",
    interleaved: bool = False,
    inplace: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Norm of queries and keys over the width of a head, then rotary position embedding.

    Args:
        q: [B, H, T, K]; k: [B, H_kv, T, K]; float32, bfloat16 or float16 (float64, and k of another dtype than q, on the
            reference); any strides, only a last dimension that is not contiguous is copied. Without a rotation k may have
            another number of tokens.
        q_weight, k_weight: [K], the norm's weight, in any dtype. Default: none.
        cos, sin: [T, K / 2] or [B, T, K / 2], given together: cosines and sines of the angles, as
            ``ditscale.kernels.rotary.tables.rotary_table`` makes them (text tokens have angle 0). Default: no rotation.
        eps: added to the mean square (variance). Default: 1e-6.
        norm: "rms", "layer" (with weight and no bias) or "none". Default: "rms".
        interleaved: rotate the pairs (0, 1), (2, 3), ...; False pairs i with i + K / 2. Default: False.
        inplace: write the results into q and k, such as ``qkv[:, :, 0].transpose(1, 2)`` of one projection [B, T, 3, H, K], and
            return these: ``attention_qkv`` then takes the buffer as it is. Where gradients are recorded backward keeps a copy
            of what was there, so memory is saved in inference only; no second derivatives then. Default: False.
        backend: "auto", "cpu" (C++, CPU tensors), "cuda" (C++), "triton" (GPUs) or "reference". Default: "auto".

    Returns:
        (q, k), the shapes and dtypes of the inputs; from our kernels views of memory laid out [B, T, H, K] unless in place.

    Raises:
        InputError: a shape or dtype is not as above, or q or k cannot be written in place (says why).
        BackendUnavailable: the backend was named and cannot run here (says why).

    Numerics: float32 inside, one rounding. The gradients of the weights are sums in an order fixed by the shape: two runs are
    equal to the bit, for any number of threads. No statistics are kept: backward makes them again. Gradients of cos and sin,
    second derivatives, forward mode and torch.func transforms: the reference.
    Cost: ``ditscale.kernels.rotary.cost.norm_rope_*``.
    Source: QK-norm arXiv:2010.04245, arXiv:2302.05442; RoPE arXiv:2104.09864.
    """
    _check(q, k, q_weight, k_weight, cos, sin, norm)
    dispatch.check_number("eps", eps, least=0.0)
    # With dynamic=True Dynamo makes a symbol of a default, too, and fails where a second function takes it: here it is a number.
    eps = float(eps)
    if not isinstance(interleaved, bool):
        raise InputError(f"interleaved: expected true or false, got {interleaved!r}")
    if not isinstance(inplace, bool):
        raise InputError(f"inplace: expected true or false, got {inplace!r}")
    if inplace:
        _check_in_place(q, k, q_weight, k_weight, cos, sin)
    chosen = dispatch.choose("qk_norm_rope", backend, q)
    if chosen != "reference" and backend != "auto" and k.dtype != q.dtype:
        raise BackendUnavailable(
            f"backend {backend!r} cannot run qk_norm_rope here: it takes q and k of one dtype, got {q.dtype} and {k.dtype}"
        )
    if any(t is not None and t.requires_grad for t in (cos, sin)) or k.dtype != q.dtype:
        chosen = "reference"
    if chosen != "reference":
        cos, sin, q_weight, k_weight = (_table(t) for t in (cos, sin, q_weight, k_weight))
    call = _in_place if inplace else _out_of_place
    rest = (cos, sin, eps, norm, interleaved)
    return call(chosen, q, q_weight, *rest), call(chosen, k, k_weight, *rest)
