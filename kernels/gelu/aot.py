"""Launches of bias + GELU for the ahead-of-time tables."""

from __future__ import annotations

from ditscale.kernels.aot import SIZE, Dims, Launch, Work
from ditscale.kernels.gelu import cost


def launches() -> list[Launch]:
    """The hidden layer of DiT-XL at 8192 tokens, every dtype: the tile does not depend on the width."""
    return [_launch(passes, dtype) for passes in ("forward", "backward") for dtype in SIZE]


def _launch(passes: str, dtype: str) -> Launch:
    def call(dims: Dims, dtype: str) -> object:
        import torch

        from ditscale.kernels.gelu import triton_kernels as kernels

        kind = getattr(torch, dtype)
        x, dy = (torch.empty(dims["R"], dims["F"], dtype=kind) for _ in range(2))
        bias = torch.empty(dims["F"], dtype=kind)
        return kernels.bias_gelu_fwd(x, bias) if passes == "forward" else kernels.bias_gelu_bwd(dy, x, bias)

    def work(dims: Dims, dtype: str) -> Work:
        size = SIZE[dtype]
        moved = getattr(cost, f"bias_gelu_bytes_{passes}")(dims["R"], dims["F"], size, size)
        return Work(moved, getattr(cost, f"bias_gelu_flops_{passes}")(dims["R"], dims["F"]))

    return Launch("bias_gelu", passes, dtype, (("R", 8192), ("F", 4608)), call, work)
