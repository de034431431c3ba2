"""Launches of the adaLN family for the ahead-of-time tables: the widths of DiT-S, B, L and XL, every dtype, every variant."""

from __future__ import annotations

from typing import Any

from ditscale.kernels.adaln import cost
from ditscale.kernels.aot import SIZE, Dims, Launch, Work

_WIDTHS = (384, 768, 1024, 1152)
_FUSED = "gate_residual_layernorm_modulate"


def launches() -> list[Launch]:
    """B = 32, T = 256, every width and dtype; the variants at the width of DiT-XL in bfloat16."""
    found = []
    for op in ("layernorm_modulate", "gate_residual", _FUSED):
        for passes in ("forward", "backward"):
            found += [_launch(op, passes, dtype, D) for dtype in SIZE for D in _WIDTHS]
            found.append(_launch(op, passes, "bfloat16", 1152, "per_token"))
    found.append(_launch("layernorm_modulate", "forward", "bfloat16", 1152, "no statistics"))
    return found


def _launch(op: str, passes: str, dtype: str, D: int, variant: str = "") -> Launch:
    mode = "per_token" if variant == "per_token" else "per_sample"

    def call(dims: Dims, dtype: str) -> object:
        return _call(op, passes, dims, dtype, mode, variant != "no statistics")

    def work(dims: Dims, dtype: str) -> Work:
        B, T, D, size = dims["B"], dims["T"], dims["D"], SIZE[dtype]
        more: dict[str, Any] = {} if op == "gate_residual" else {"save_stats": variant != "no statistics"}
        moved = getattr(cost, f"{op}_bytes_{passes}")(B, T, D, size, size, mode, **more)
        return Work(moved, getattr(cost, f"{op}_flops_{passes}")(B, T, D))

    dims = (("B", 32), ("T", 256), ("D", D))
    return Launch(op, passes, dtype, dims, call, work, variant)


def _call(op: str, passes: str, dims: Dims, dtype: str, mode: str, stats: bool) -> object:
    import torch

    from ditscale.kernels.adaln import triton_kernels as kernels

    B, T, D = dims["B"], dims["T"], dims["D"]
    kind = getattr(torch, dtype)

    def rows() -> torch.Tensor:
        return torch.empty(B, T, D, dtype=kind)

    # As a DiT makes them: chunks of one tensor, so that rows are 6 D apart.
    shape = (B, T, 6 * D) if mode == "per_token" else (B, 6 * D)
    shift, scale, gate = torch.empty(shape, dtype=kind).chunk(6, dim=-1)[:3]
    kept = torch.empty(2, B, T)
    options = (1e-6, 1.0, False)
    if op == "gate_residual":
        function = kernels.gate_residual_fwd if passes == "forward" else kernels.gate_residual_bwd
        return function(rows(), rows(), gate)
    if op == "layernorm_modulate":
        if passes == "forward":
            return kernels._forward(rows(), None, None, shift, scale, *options, save_stats=stats)
        return kernels._backward(rows(), None, rows(), None, None, scale, kept, *options)
    if passes == "forward":
        return kernels._forward(rows(), rows(), gate, shift, scale, *options, save_stats=stats)
    return kernels._backward(rows(), rows(), rows(), rows(), gate, scale, kept, *options)
