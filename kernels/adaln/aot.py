"""Launches of the adaLN family for the ahead-of-time tables: the widths of DiTs, every dtype, every variant."""

from __future__ import annotations

from typing import Any

from ditscale.kernels.adaln import cost
from ditscale.kernels.aot import ARCHITECTURES, SIZE, Dims, Launch, Work

_WIDTHS = (384, 768, 1024, 1152)
_FUSED = "gate_residual_layernorm_modulate"
_NORMS = ("layernorm_modulate", _FUSED)
_FEW = (80, 90, 120)  # what differs from width to width differs little between neighbours


def launches() -> list[Launch]:
    """B = 32, T = 256: DiT-S to DiT-XL in every dtype for every architecture; wider models and variants in bfloat16."""
    found = []
    for op in ("gate_residual", *_NORMS):
        for passes in ("forward", "backward"):
            found += [_launch(op, passes, dtype, D) for dtype in SIZE for D in _WIDTHS]
            found.append(_launch(op, passes, "bfloat16", 1152, "per_token"))
    for op in ("gate_residual", _FUSED):
        found.append(_launch(op, "backward", "bfloat16", 1152, "short samples", T=16, architectures=_FEW))
    found.append(_launch("layernorm_modulate", "forward", "bfloat16", 1152, "no statistics"))
    for op in _NORMS:
        for passes in ("forward", "backward"):
            found += [_launch(op, passes, "bfloat16", D, architectures=_FEW) for D in (1536, 2240, 3072)]
    # The fused operator's kernels are the other's with more in them.
    for passes in ("forward", "backward"):
        for variant in ("shared", "float32 modulation", "rms"):
            found.append(_launch(_FUSED, passes, "bfloat16", 1152, variant, architectures=_FEW))
    for dtype in ("float32", "bfloat16"):
        found.append(_launch(_FUSED, "backward", dtype, 1152, "no statistics", architectures=_FEW))
    # It has the larger tile, so the more to lose where the statistics are made again.
    found.append(_launch("layernorm_modulate", "backward", "float32", 1152, "no statistics", architectures=_FEW))
    return found


def _launch(
    op: str,
    passes: str,
    dtype: str,
    D: int,
    variant: str = "",
    *,
    T: int = 256,
    architectures: tuple[int, ...] = ARCHITECTURES,
) -> Launch:
    mode = variant if variant in ("per_token", "shared") else "per_sample"

    def call(dims: Dims, dtype: str) -> object:
        return _call(op, passes, dims, dtype, mode, variant)

    def work(dims: Dims, dtype: str) -> Work:
        B, T, D, size = dims["B"], dims["T"], dims["D"], SIZE[dtype]
        more: dict[str, Any] = {} if op == "gate_residual" else {"save_stats": variant != "no statistics"}
        modulation = 4 if variant == "float32 modulation" else size
        moved = getattr(cost, f"{op}_bytes_{passes}")(B, T, D, size, modulation, mode, **more)
        return Work(moved, getattr(cost, f"{op}_flops_{passes}")(B, T, D))

    dims = (("B", 32), ("T", T), ("D", D))
    return Launch(op, passes, dtype, dims, call, work, variant, architectures)


def _call(op: str, passes: str, dims: Dims, dtype: str, mode: str, variant: str) -> object:
    import torch

    from ditscale.kernels.adaln import triton_kernels as kernels

    B, T, D = dims["B"], dims["T"], dims["D"]
    kind = getattr(torch, dtype)

    def rows() -> torch.Tensor:
        return torch.empty(B, T, D, dtype=kind)

    # As a DiT makes them: chunks of one tensor, so that rows are 6 D apart.
    shape = {"per_token": (B, T, 6 * D), "per_sample": (B, 6 * D), "shared": (6 * D,)}[mode]
    modulation = torch.float32 if variant == "float32 modulation" else kind
    shift, scale, gate = torch.empty(shape, dtype=modulation).chunk(6, dim=-1)[:3]
    stats = variant != "no statistics"
    kept = torch.empty(2, B, T) if stats else None
    options = (1e-6, 1.0, variant == "rms")
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
