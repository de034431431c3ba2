"""The public adaLN functions: checks, choice of a backend and autograd. The arithmetic is elsewhere in this folder."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ditscale.errors import InputError
from ditscale.kernels import dispatch
from ditscale.kernels.adaln import native as _native  # noqa: F401 (loads and describes ditscale::*)
from ditscale.kernels.adaln import reference
from ditscale.kernels.dispatch import Backend

Norm = Literal["layer", "rms"]


def _ops(backend: str) -> Any:
    """The operators of a backend; both namespaces have the same names and schemas."""
    return torch.ops.ditscale_triton if backend == "triton" else torch.ops.ditscale


class _LayernormModulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        eps: float,
        scale_base: float,
        rms: bool,
        save_stats: bool,
    ) -> Tensor:
        y, stats = _ops(backend).layernorm_modulate_fwd(x, shift, scale, eps, scale_base, rms, save_stats)
        ctx.save_for_backward(x, scale, stats)
        ctx.backend, ctx.options = backend, (eps, scale_base, rms)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, stats = ctx.saved_tensors
        dx, dshift, dscale = _ops(ctx.backend).layernorm_modulate_bwd(dy, x, scale, stats, *ctx.options)
        return None, dx, dshift, dscale, None, None, None, None


class _GateResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(branch, gate)
        ctx.backend = backend
        return _ops(backend).gate_residual_fwd(x, branch, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dbranch, dgate = _ops(ctx.backend).gate_residual_bwd(dout, *ctx.saved_tensors)
        return None, dout, dbranch, dgate


class _GateResidualLayernormModulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        x: Tensor,
        branch: Tensor,
        gate: Tensor,
        shift: Tensor,
        scale: Tensor,
        eps: float,
        scale_base: float,
        rms: bool,
        save_stats: bool,
    ) -> tuple[Tensor, Tensor]:
        x_new, y, stats = _ops(backend).gate_residual_layernorm_modulate_fwd(
            x, branch, gate, shift, scale, eps, scale_base, rms, save_stats
        )
        ctx.save_for_backward(x_new, branch, gate, scale, stats)
        ctx.backend, ctx.options = backend, (eps, scale_base, rms)
        ctx.set_materialize_grads(False)
        return x_new, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_new: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        x_new, branch, gate, scale, stats = ctx.saved_tensors
        if dy is None:  # only the residual stream was used
            if dx_new is None:
                return (None,) * 10
            dbranch, dgate = _ops(ctx.backend).gate_residual_bwd(dx_new, branch, gate)
            return None, dx_new, dbranch, dgate, None, None, None, None, None, None
        dx, dbranch, dgate, dshift, dscale = _ops(ctx.backend).gate_residual_layernorm_modulate_bwd(
            dy, dx_new, x_new, branch, gate, scale, stats, *ctx.options
        )
        return None, dx, dbranch, dgate, dshift, dscale, None, None, None, None


def _check_rows(x: Tensor) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        dispatch.check_float("x", x)
    if x.dim() != 3 or x.size(2) < 1:
        raise InputError(f"x: expected [B, T, D] with D >= 1, got shape {list(x.shape)}")


def _like_x(name: str, t: Tensor, x: Tensor) -> Tensor:
    if not isinstance(t, Tensor):
        dispatch.check_float(name, t)
    if t.shape != x.shape or t.device != x.device:
        raise InputError(
            f"{name}: expected the shape and device of x, {list(x.shape)} on {x.device}, "
            f"got {list(t.shape)} on {t.device}"
        )
    return t if t.dtype == x.dtype else t.to(x.dtype)


def _modulations(x: Tensor, names: tuple[str, ...], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Check shift, scale and gate and bring those of one call to one rank and dtype; as they are where nothing differs."""
    # The common call, in as few Python steps as there can be: a small call lasts three microseconds in all.
    first = given[0]
    shape, dtype, device = first.shape, first.dtype, x.device
    B, T, D = x.shape
    if (shape == (B, D) or shape == (D,) or shape == (B, T, D)) and (dtype is x.dtype or dtype is torch.float32):
        for m in given:
            if m.device != device or (m is not first and (m.shape != shape or m.dtype is not dtype)):
                break
        else:
            return given
    return _brought_together(x, names, given)


def _brought_together(x: Tensor, names: tuple[str, ...], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    B, T, D = x.shape
    out: list[Tensor] = []
    rank, same_dtype = 0, given[0].dtype == x.dtype or given[0].dtype == torch.float32
    for name, m in zip(names, given, strict=True):
        dispatch.check_float(name, m)
        if m.dim() == 3 and m.shape[1] == 1 and T != 1:  # [B, 1, D] is what some models keep
            m = m.squeeze(1)
        if m.shape != (D,) and m.shape != (B, D) and m.shape != (B, T, D):
            raise InputError(f"{name}: expected [{D}], [{B}, {D}] or [{B}, {T}, {D}] beside x, got {list(m.shape)}")
        if m.device != x.device:
            raise InputError(f"{name}: expected a tensor on {x.device} as x, got one on {m.device}")
        same_dtype = same_dtype and m.dtype == given[0].dtype
        rank = max(rank, m.dim())
        out.append(m)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for i, m in enumerate(out):
        if not same_dtype:
            m = m.to(wide)
        if m.dim() < rank:
            m = m.unsqueeze(1) if rank == 3 and m.dim() == 2 else m
            m = m.expand((B, D) if rank == 2 else (B, T, D))
        out[i] = m
    return tuple(out)


def _affine(
    shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, D: int
) -> tuple[Tensor, Tensor, float]:
    """Fold LayerNorm's own weight and bias into the modulation: u = n w + b, y = u (1 + scale) + shift.

    Done in float32 on tensors of the modulation's size, so the kernels need not know, and autograd gives dweight and dbias.
    The last result is what the kernel adds to scale; with a weight it is 0, so that a small weight loses no digits.
    """
    if weight is None and bias is None:
        return shift, scale, 1.0
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (not t.is_floating_point() or t.shape != (D,)):
            raise InputError(f"{name}: expected a floating-point [{D}], got {list(t.shape)}")
    wide = torch.float64 if torch.float64 in (shift.dtype, scale.dtype) else torch.float32
    factor = 1.0 + scale.to(wide)
    shift = shift.to(wide)
    if bias is not None:
        shift = bias.to(wide) * factor + shift
    if weight is not None:
        factor = factor * weight.to(wide)
    return shift, factor, 0.0


def _wants_grad(*tensors: Tensor) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t.requires_grad:
                return True
    return False


def _rms(norm: str) -> bool:
    if norm not in ("layer", "rms"):
        raise InputError(f"norm: expected 'layer' or 'rms', got {norm!r}")
    return norm == "rms"


def layernorm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Norm = "layer",
    recompute_stats: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Normalise each token and apply its sample's shift and scale.

    ``y[b, t] = (LN(x[b, t]) * weight + bias) * (1 + scale[b]) + shift[b]``, the variance biased (divided by D).

    Args:
        x: [B, T, D], float32, bfloat16 or float16 (float64 on the reference); any batch and token strides; a last dimension
            that is not contiguous is copied.
        shift, scale: [B, D] (chunks of one [B, 6 D] tensor are read in place), [B, T, D], [B, 1, D] or [D]; the dtype of x or
            float32, anything else is converted to float32.
        eps: added to the variance, in units of x squared. Default: 1e-6, as DiT.
        weight, bias: [D], LayerNorm's own affine map. Default: none, as DiT.
        norm: "layer", or "rms" for x / sqrt(mean(x^2) + eps). Default: "layer".
        recompute_stats: keep no statistics for backward (8 bytes a row) and compute them again. Default: False.
        backend: "auto", "reference", "cpu", "triton" or "cuda". Default: "auto".

    Returns:
        [B, T, D], contiguous, the dtype of x.

    Raises:
        InputError: a shape, dtype or device is not as above.
        BackendUnavailable: the backend was named and cannot run here (says why).

    Numerics: statistics, 1 + scale and all sums in float32, one rounding at the end. The backward pass sums over tokens in an
    order fixed by the shape: two runs are equal to the bit. Second derivatives and torch.func transforms: the reference.
    Cost: ``ditscale.kernels.adaln.cost.layernorm_modulate_*``.
    Source: Peebles & Xie, arXiv:2212.09748, section 3.2; LayerNorm arXiv:1607.06450; RMS norm arXiv:1910.07467.
    """
    _check_rows(x)
    rms = _rms(norm)
    shift, scale = _modulations(x, ("shift", "scale"), (shift, scale))
    base = 1.0
    if weight is not None or bias is not None:
        shift, scale, base = _affine(shift, scale, weight, bias, x.shape[2])
    chosen = dispatch.choose("layernorm_modulate", backend, x)
    if chosen == "reference":
        return reference.layernorm_modulate_ref(x, shift, scale, eps=eps, scale_base=base, rms=rms)
    if _wants_grad(x, shift, scale):
        return _LayernormModulate.apply(chosen, x, shift, scale, eps, base, rms, not recompute_stats)
    return _ops(chosen).layernorm_modulate_infer(x, shift, scale, eps, base, rms)


def gate_residual(x: Tensor, branch: Tensor, gate: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Add a gated branch to the residual stream: ``x + gate * branch``.

    Args:
        x: [B, T, D], the residual stream; dtypes and strides as in ``layernorm_modulate``.
        branch: [B, T, D], what attention or the mlp gave; converted to the dtype of x where it differs.
        gate: [B, D], [B, T, D], [B, 1, D] or [D], the dtype of x or float32.
        backend: "auto", "reference", "cpu", "triton" or "cuda". Default: "auto".

    Returns:
        [B, T, D], contiguous, the dtype of x.

    Raises:
        InputError, BackendUnavailable: as ``layernorm_modulate``.

    Numerics: float32, one rounding. dgate is a float32 sum over tokens in a fixed order.
    Cost: ``ditscale.kernels.adaln.cost.gate_residual_*``.
    """
    _check_rows(x)
    branch = _like_x("branch", branch, x)
    (gate,) = _modulations(x, ("gate",), (gate,))
    chosen = dispatch.choose("gate_residual", backend, x)
    if chosen == "reference":
        return reference.gate_residual_ref(x, branch, gate)
    if _wants_grad(x, branch, gate):
        return _GateResidual.apply(chosen, x, branch, gate)
    return _ops(chosen).gate_residual_fwd(x, branch, gate)


def gate_residual_layernorm_modulate(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Norm = "layer",
    recompute_stats: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """``x_new = x + gate * branch`` and ``y = layernorm_modulate(x_new, shift, scale)`` in one pass over memory.

    Args:
        x, branch, gate: as ``gate_residual``.
        shift, scale, eps, weight, bias, norm, recompute_stats, backend: as ``layernorm_modulate``.

    Returns:
        (x_new, y), both [B, T, D], contiguous, the dtype of x. The norm sees x_new as it is stored, after rounding.

    Raises:
        InputError, BackendUnavailable: as ``layernorm_modulate``.

    Numerics: as ``layernorm_modulate``. Backward is one pass that gives dx, dbranch, dgate, dshift and dscale.
    Cost: ``ditscale.kernels.adaln.cost.gate_residual_layernorm_modulate_*``.
    """
    _check_rows(x)
    rms = _rms(norm)
    branch = _like_x("branch", branch, x)
    base = 1.0
    if weight is not None or bias is not None:
        shift, scale = _modulations(x, ("shift", "scale"), (shift, scale))
        shift, scale, base = _affine(shift, scale, weight, bias, x.shape[2])
    gate, shift, scale = _modulations(x, ("gate", "shift", "scale"), (gate, shift, scale))
    chosen = dispatch.choose("gate_residual_layernorm_modulate", backend, x)
    if chosen == "reference":
        return reference.gate_residual_layernorm_modulate_ref(
            x, branch, gate, shift, scale, eps=eps, scale_base=base, rms=rms
        )
    if _wants_grad(x, branch, gate, shift, scale):
        return _GateResidualLayernormModulate.apply(
            chosen, x, branch, gate, shift, scale, eps, base, rms, not recompute_stats
        )
    return _ops(chosen).gate_residual_layernorm_modulate_fwd(x, branch, gate, shift, scale, eps, base, rms, False)[:2]
