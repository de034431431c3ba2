"""Launches of attention for the ahead-of-time tables: the head widths of DiT and their neighbours, every dtype, every variant."""

from __future__ import annotations

from collections.abc import Collection

from ditscale.kernels.aot import SIZE, Dims, Launch, Work
from ditscale.kernels.attn import cost
from ditscale.kernels.attn.triton_configs import columns

_WIDTHS = (64, 72, 80, 96, 128, 256)
_VARIANTS = ("odd number of tokens", "lengths", "packed", "bias")
# Variant -> bytes of local memory and why: the compiler's choice, a register or two.
_SPILLS = {
    "bias": (16, "a bias keeps a few registers more: on sm_86, 89 and 120 the pass over queries spills four of them")
}
_SPILLS_FLOAT32 = (16, "float32 tiles take all 255 registers: on sm_80, 86 and 89 a pass spills two to four more")
# 128 columns take all 255 registers, too.
_FULL = "a head of 128 takes every register; two to four more are kept in local memory"
_SUMMED = (
    "float32 sums made outside of the tensor cores take four registers more; up to thirteen are kept in local memory"
)
CUDA_STACK = {
    ("attention_forward", "bf16, 128", "100"): (8, _FULL),
    ("attention_forward", "f16, 128", "100"): (8, _FULL),
    ("attention_forward", "float, 128", "80"): (8, _SUMMED),
    ("attention_forward", "float, 128", "90"): (8, _SUMMED),
    ("attention_dkv", "float, 80", "80"): (24, _SUMMED),
    ("attention_dkv", "float, 80", "100"): (8, _SUMMED),
    ("attention_dkv", "float, 128", "80"): (24, _SUMMED),
    ("attention_dkv", "float, 128", "90"): (24, _SUMMED),
    ("attention_dkv", "float, 128", "100"): (8, _SUMMED),
    ("attention_dkv", "float, 128", "120"): (40, _SUMMED),
}

# Head widths of common models, for which the table tells how much of the CUDA kernels' products is of use.
_CUDA_HEADS = (64, 72, 80, 96, 128)


def launches() -> list[Launch]:
    """B = 8, H = 16, T = 256: every width in bfloat16, DiT-XL's in every dtype; its variants in bfloat16."""
    found = []
    for passes in ("forward", "backward"):
        found += [_launch(passes, "bfloat16", K) for K in _WIDTHS]
        found += [_launch(passes, "float16", 72)]
        found += [_launch(passes, "float32", K) for K in (64, 72, 128)]
        found += [_launch(passes, "bfloat16", 72, variant) for variant in _VARIANTS]
    return found


def cuda_flop_efficiency(kernels: Collection[tuple[str, str]]) -> dict[tuple[str, str], dict[int, float]]:
    """Useful over issued FLOPs of matrix products of the CUDA kernels, by width of the heads that each takes.

    Args:
        kernels: (function, template arguments such as "bf16, 72") of all kernels of the library; other families' are passed
            over. A head takes the one with the fewest columns that hold it, and pays for all of them.
    """
    found = {}
    ours = [(function, arguments) for function, arguments in kernels if function.startswith("attention_")]
    for function, arguments in ours:
        storage, columns = _template(arguments)
        alike = [_template(other) for name, other in ours if name == function]
        narrower = max((n for kind, n in alike if kind == storage and n < columns), default=0)
        heads = [K for K in _CUDA_HEADS if narrower < K <= columns]
        found[function, arguments] = {K: _efficiency(function == "attention_forward", K, columns) for K in heads}
    return found


def _template(arguments: str) -> tuple[str, int]:
    storage, _, columns = arguments.partition(", ")
    return storage, int(columns)


def _efficiency(forward: bool, K: int, columns: int) -> float:
    """As of a Triton launch: both passes of backward together, what they make again counts as issued only."""
    sizes = (1, 1, 1, 1)
    if forward:
        return cost.attention_flops_forward(*sizes, K) / cost.attention_flops_forward(*sizes, columns)
    return cost.attention_flops_backward(*sizes, K) / cost.attention_flops_backward_two_passes(*sizes, columns)


def _launch(passes: str, dtype: str, K: int, variant: str = "") -> Launch:
    def call(dims: Dims, dtype: str) -> object:
        return _call(passes, dims, dtype, variant)

    def work(dims: Dims, dtype: str) -> Work:
        return _work(passes, dims, dtype, variant)

    T = 257 if variant == "odd number of tokens" else 256
    dims = (("B", 8), ("H", 16), ("T", T), ("K", K))
    stack_bytes, why = 0, ""
    if passes == "backward":
        stack_bytes, why = _SPILLS_FLOAT32 if dtype == "float32" else _SPILLS.get(variant, (0, ""))
    return Launch("attention", passes, dtype, dims, call, work, variant, stack_bytes=stack_bytes, why=why)


def _work(passes: str, dims: Dims, dtype: str, variant: str) -> Work:
    B, H, T, K = (dims[letter] for letter in "BHTK")
    sizes = (B, H, T, T)
    issued = cost.attention_flops_forward if passes == "forward" else cost.attention_flops_backward_two_passes
    matmul = getattr(cost, f"attention_flops_{passes}")(*sizes, K)
    softmax = getattr(cost, f"attention_softmax_flops_{passes}")(*sizes)
    moved = getattr(cost, f"attention_bytes_{passes}")(*sizes, K, SIZE[dtype])
    if variant == "bias":
        moved += 4 * B * H * T * (1 if passes == "forward" else 2)  # its gradient too
    return Work(moved, matmul + softmax, matmul, issued(*sizes, sum(columns(K))))


def _call(passes: str, dims: Dims, dtype: str, variant: str) -> object:
    import torch

    from ditscale.kernels.attn import triton_kernels as kernels

    B, H, T, K = (dims[letter] for letter in "BHTK")
    kind, packed = getattr(torch, dtype), variant == "packed"
    # Parts of one projection, as a DiT makes them; a packed batch has the samples one behind the other.
    shape = (1, B * T) if packed else (B, T)
    qkv = torch.empty(*shape, 3, H, K, dtype=kind)
    key_bias = torch.empty(B, H, T) if variant == "bias" else None
    lengths = torch.full((B,), T, dtype=torch.int32) if variant == "lengths" else None
    cu = torch.arange(0, B * T + 1, T, dtype=torch.int32) if packed else None
    options = (key_bias, lengths, cu, T, K**-0.5)
    if passes == "forward":
        return kernels.attention_qkv_fwd(qkv, *options, True)
    dout, out = (torch.empty(*shape, H * K, dtype=kind) for _ in range(2))
    stats = torch.empty(2, shape[0], H, shape[1])
    return kernels.attention_qkv_bwd(dout, qkv, out, stats, *options, key_bias is not None)
