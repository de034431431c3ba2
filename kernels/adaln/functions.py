"""The autograd functions of the adaLN family: what is kept for backward, and the operators that each pass calls.

``run`` is a backend's name or its operators; ``options`` are the first of eps, scale_base and rms, as the operators take
them. Nothing but x and scale (for the gated residual x_new, branch, gate and scale) is kept, and with ``keep`` the
statistics: 8 bytes a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditscale.kernels.adaln import reference
from ditscale.kernels.autograd import differentiable, eager_apply, wants_graph
from ditscale.kernels.dispatch import operators

Options = tuple[Any, ...]


def _norm(x: Tensor, shift: Tensor, scale: Tensor, options: Options) -> Tensor:
    given = dict(zip(("eps", "scale_base", "rms"), options, strict=False))
    return reference.layernorm_modulate_ref(x, shift, scale, **given)


def _norm_backward(x: Tensor, scale: Tensor, dy: Tensor, options: Options) -> tuple[Tensor, ...]:
    """dx, dshift and dscale as plain PyTorch. The value of shift has no part in any of them: zeros stand for it."""
    return differentiable(
        lambda x, shift, scale: _norm(x, shift, scale, options), (x, torch.zeros_like(scale), scale), dy
    )


class LayernormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Any, keep: bool, x: Tensor, shift: Tensor, scale: Tensor, options: Options) -> Tensor:
        ctx.call = run, options
        if isinstance(run, str):
            run = operators(run)
        if keep:
            y, stats = run.layernorm_modulate_fwd(x, shift, scale, *options)
            ctx.save_for_backward(x, scale, stats)
        else:
            y = run.layernorm_modulate_infer(x, shift, scale, *options)
            ctx.save_for_backward(x, scale)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (run, options), (x, scale, *kept) = ctx.call, ctx.saved_tensors
        if wants_graph():
            dx, dshift, dscale = _norm_backward(x, scale, dy, options)
        else:
            stats = kept[0] if kept else None
            dx, dshift, dscale = operators(run).layernorm_modulate_bwd(dy, x, scale, stats, *options)
        return None, None, dx, dshift, dscale, None


class GateResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Any, x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(branch, gate)
        ctx.run = run
        return operators(run).gate_residual_fwd(x, branch, gate)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        dbranch, dgate = _residual_backward(ctx.run, dout, *ctx.saved_tensors)
        return None, dout, dbranch, dgate


def _residual_backward(run: Any, dout: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, ...]:
    if wants_graph():
        zero = torch.zeros_like(dout)
        return differentiable(lambda *own: reference.gate_residual_ref(zero, *own), (branch, gate), dout)
    return operators(run).gate_residual_bwd(dout, branch, gate)


class GateResidualLayernormModulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        run: Any,
        keep: bool,
        x: Tensor,
        branch: Tensor,
        gate: Tensor,
        shift: Tensor,
        scale: Tensor,
        options: Options,
    ) -> tuple[Tensor, Tensor]:
        ctx.call = run, options
        if isinstance(run, str):
            run = operators(run)
        if keep:
            x_new, y, stats = run.gate_residual_layernorm_modulate_fwd(x, branch, gate, shift, scale, *options)
            ctx.save_for_backward(x_new, branch, gate, scale, stats)
        else:
            x_new, y = run.gate_residual_layernorm_modulate_infer(x, branch, gate, shift, scale, *options)
            ctx.save_for_backward(x_new, branch, gate, scale)
        ctx.set_materialize_grads(False)
        return x_new, y

    @staticmethod
    def backward(ctx: Any, dx_new: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        (run, options), (x_new, branch, gate, scale, *kept) = ctx.call, ctx.saved_tensors
        dx, dshift, dscale = dx_new, None, None
        if dy is None:  # only the residual stream was used
            if dx_new is None:
                return (None,) * 8
            dbranch, dgate = _residual_backward(run, dx_new, branch, gate)
        elif wants_graph():
            dx, dshift, dscale = _norm_backward(x_new, scale, dy, options)
            dx = dx if dx_new is None else dx + dx_new
            dbranch, dgate = _residual_backward(run, dx, branch, gate)
        else:
            stats = kept[0] if kept else None
            dx, dbranch, dgate, dshift, dscale = operators(run).gate_residual_layernorm_modulate_bwd(
                dy, dx_new, x_new, branch, gate, scale, stats, *options
            )
        return None, None, dx, dbranch, dgate, dshift, dscale, None


layernorm_modulate_eager = eager_apply(LayernormModulate)
gate_residual_eager = eager_apply(GateResidual)
gate_residual_layernorm_modulate_eager = eager_apply(GateResidualLayernormModulate)
