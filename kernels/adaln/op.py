"""The public adaLN functions: checks, choice of a backend and conversions. The arithmetic is elsewhere in this folder."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ditscale.errors import InputError
from ditscale.kernels import dispatch
from ditscale.kernels.adaln import functions, reference
from ditscale.kernels.adaln import native as _native  # noqa: F401 (loads and describes ditscale::*)
from ditscale.kernels.dispatch import Backend, operators

Norm = Literal["layer", "rms"]

# Calls of fewer numbers keep no statistics for backward: to compute them again costs less than to make one more tensor.
KEEP_FROM = 16384


def _check_rows(x: Tensor) -> None:
    dispatch.check_float("x", x)
    if x.dim() != 3 or x.size(2) < 1:
        raise InputError(f"x: expected [B, T, D] with D >= 1, got shape {list(x.shape)}")


def _like_x(name: str, t: Tensor, x: Tensor) -> Tensor:
    dispatch.check_float(name, t)
    if t.shape != x.shape or t.device != x.device:
        raise InputError(
            f"{name}: expected the shape and device of x, {list(x.shape)} on {x.device}, "
            f"got {list(t.shape)} on {t.device}"
        )
    return t if t.dtype == x.dtype else t.to(x.dtype)


def _modulations(x: Tensor, names: tuple[str, ...], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Check shift, scale and gate and bring those of one call to one rank and dtype; as they are where nothing differs.

    To one rank as views, without a copy; but a kernel then writes every gradient in that rank, and autograd sums it.
    """
    B, T, D = x.shape
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, m in zip(names, given, strict=True):
        dispatch.check_float(name, m)
        # (Tuples are compared from the front: of another rank, a compiled graph would hold that B is not D.)
        if not any(m.dim() == len(s) and m.shape == s for s in ((D,), (B, D), (B, 1, D), (B, T, D))):
            raise InputError(f"{name}: expected [{D}], [{B}, {D}] or [{B}, {T}, {D}] beside x, got {list(m.shape)}")
        if m.device != x.device:
            raise InputError(f"{name}: expected a tensor on {x.device} as x, got one on {m.device}")
    first = given[0]
    if any(m.dtype != first.dtype for m in given) or first.dtype not in (x.dtype, torch.float32):
        given = tuple(m.to(wide) for m in given)
    if any(m.dim() != first.dim() or m.shape != first.shape for m in given):  # (ranks first: as above)
        shape = torch.broadcast_shapes(*(m.shape if m.dim() != 2 else (B, 1, D) for m in given))
        given = tuple(_rows(m).expand(shape) for m in given)
    return given


def _rows(m: Tensor) -> Tensor:
    return m.unsqueeze(1) if m.dim() == 2 else m


def _affine(
    shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None, D: int
) -> tuple[Tensor, Tensor, float]:
    """Fold LayerNorm's own weight and bias into the modulation: u = n w + b, y = u (1 + scale) + shift.

    Done in float32 on tensors of the modulation's size, so the kernels need not know, and autograd gives dweight and dbias.
    The last result is what the kernel adds to scale; with a weight it is 0, so that a small weight loses no digits.
    """
    for name, t in (("weight", weight), ("bias", bias)):
        dispatch.check_vector(name, t, D, scale.device)
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


def _keeps(x: Tensor, recompute_stats: bool) -> bool:
    """Whether statistics are kept. (A compiler would make one graph for small calls and one for large ones.)"""
    return not recompute_stats and (torch.compiler.is_compiling() or x.numel() >= KEEP_FROM)


def _eps_option(eps: float) -> functions.Options:
    """As the operators take it: nothing where it is their default, which need not be looked at either."""
    if eps == 1e-6:
        return ()
    dispatch.check_number("eps", eps, least=0.0)
    return (eps,)


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
            float32, anything else is converted to float32. One per token beside one that is not: the gradient of the latter
            takes a [B, T, D] before it is summed.
        eps: added to the variance, in units of x squared. Default: 1e-6, as DiT.
        weight, bias: [D], LayerNorm's own affine map, folded into shift and scale in float32 (per token: [B, T, D] of it).
            Default: none, as DiT.
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
    if weight is None and bias is None and norm == "layer":
        try:
            run = dispatch.quick("layernorm_modulate", backend, x)
            if run is not None:
                options = _eps_option(eps)
                if torch.is_grad_enabled() and (x.requires_grad or shift.requires_grad or scale.requires_grad):
                    keep = not recompute_stats and x.numel() >= KEEP_FROM
                    return functions.layernorm_modulate_eager(run, keep, x, shift, scale, options)
                return run.layernorm_modulate_infer(x, shift, scale, *options)
        except (AttributeError, RuntimeError, TypeError):
            pass  # inputs that have to be converted first, or a mistake: what follows knows which
    _check_rows(x)
    rms = _rms(norm)
    dispatch.check_number("eps", eps, least=0.0)
    # With dynamic=True Dynamo makes a symbol of it, and fails where a second call takes it: here it is a number.
    eps = float(eps)
    shift, scale = _modulations(x, ("shift", "scale"), (shift, scale))
    base = 1.0
    if weight is not None or bias is not None:
        shift, scale, base = _affine(shift, scale, weight, bias, x.shape[2])
    chosen = dispatch.choose("layernorm_modulate", backend, x)
    if chosen == "reference":
        return reference.layernorm_modulate_ref(x, shift, scale, eps=eps, scale_base=base, rms=rms)
    if _wants_grad(x, shift, scale):
        keep = _keeps(x, recompute_stats)
        return functions.LayernormModulate.apply(chosen, keep, x, shift, scale, (eps, base, rms))
    return operators(chosen).layernorm_modulate_infer(x, shift, scale, eps, base, rms)


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
    try:
        run = dispatch.quick("gate_residual", backend, x)
        if run is not None and branch.dtype is x.dtype:
            if torch.is_grad_enabled() and (x.requires_grad or branch.requires_grad or gate.requires_grad):
                return functions.gate_residual_eager(run, x, branch, gate)
            return run.gate_residual_fwd(x, branch, gate)
    except (AttributeError, RuntimeError, TypeError):
        pass  # as in layernorm_modulate
    _check_rows(x)
    branch = _like_x("branch", branch, x)
    (gate,) = _modulations(x, ("gate",), (gate,))
    chosen = dispatch.choose("gate_residual", backend, x)
    if chosen == "reference":
        return reference.gate_residual_ref(x, branch, gate)
    if _wants_grad(x, branch, gate):
        return functions.GateResidual.apply(chosen, x, branch, gate)
    return operators(chosen).gate_residual_fwd(x, branch, gate)


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
    if weight is None and bias is None and norm == "layer":
        try:
            run = dispatch.quick("gate_residual_layernorm_modulate", backend, x)
            if run is not None and branch.dtype is x.dtype:
                options = _eps_option(eps)
                if torch.is_grad_enabled() and (  # (written out: a loop over five tensors takes half a microsecond)
                    x.requires_grad
                    or branch.requires_grad
                    or gate.requires_grad
                    or shift.requires_grad
                    or scale.requires_grad
                ):
                    keep = not recompute_stats and x.numel() >= KEEP_FROM
                    return functions.gate_residual_layernorm_modulate_eager(
                        run, keep, x, branch, gate, shift, scale, options
                    )
                return run.gate_residual_layernorm_modulate_infer(x, branch, gate, shift, scale, *options)
        except (AttributeError, RuntimeError, TypeError):
            pass  # as in layernorm_modulate
    _check_rows(x)
    rms = _rms(norm)
    dispatch.check_number("eps", eps, least=0.0)
    eps = float(eps)  # see layernorm_modulate
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
    options = (eps, base, rms)
    if _wants_grad(x, branch, gate, shift, scale):
        keep = _keeps(x, recompute_stats)
        return functions.GateResidualLayernormModulate.apply(chosen, keep, x, branch, gate, shift, scale, options)
    return operators(chosen).gate_residual_layernorm_modulate_infer(x, branch, gate, shift, scale, *options)
