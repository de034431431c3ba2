"""Launches of QK-norm + RoPE for the ahead-of-time tables: head widths of DiT, every dtype, every kind of rotation and norm."""

from __future__ import annotations

from typing import Any

from ditscale.kernels.aot import SIZE, Dims, Launch, Work
from ditscale.kernels.rotary import cost

_WIDTHS = (64, 72, 128)


def launches() -> list[Launch]:
    """Queries of B = 8, H = 16, T = 256, parts of one projection: every width and dtype; the variants at DiT-XL's in bfloat16."""
    found = []
    for passes in ("forward", "backward"):
        found += [_launch(passes, dtype, K) for dtype in SIZE for K in _WIDTHS]
        found += [_launch(passes, "bfloat16", 72, variant) for variant in ("pairs", "layer", "no rotation")]
    return found


def _launch(passes: str, dtype: str, K: int, variant: str = "") -> Launch:
    norm, rotary = "layer" if variant == "layer" else "rms", variant != "no rotation"

    def call(dims: Dims, dtype: str) -> object:
        import torch

        from ditscale.kernels.rotary import triton_kernels as kernels

        B, H, T, K = (dims[letter] for letter in "BHTK")
        kind = getattr(torch, dtype)
        x = torch.empty(B, T, 3, H, K, dtype=kind).permute(2, 0, 3, 1, 4)[0]
        tables = [torch.empty(T, K // 2) if rotary else None for _ in range(2)]
        arguments: tuple[Any, ...] = (x, torch.empty(K), *tables, 1e-6, cost.NORMS.index(norm), variant == "pairs")
        if passes == "forward":
            return kernels.qk_norm_rope_fwd(*arguments)
        return kernels.qk_norm_rope_bwd(torch.empty(B, T, H, K, dtype=kind).transpose(1, 2), *arguments)

    def work(dims: Dims, dtype: str) -> Work:
        sizes = tuple(dims[letter] for letter in "BHTK")
        moved = getattr(cost, f"norm_rope_bytes_{passes}")(*sizes, SIZE[dtype])
        return Work(moved, getattr(cost, f"norm_rope_flops_{passes}")(*sizes, norm, True, rotary))

    return Launch(
        "qk_norm_rope", passes, dtype, (("B", 8), ("H", 16), ("T", 256), ("K", K)), call, work, variant
    )  # fmt: skip
