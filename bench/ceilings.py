"""What the device itself can do, measured in the same run: bytes of a copy a second, FLOPs of a matrix product a second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ditscale.bench.cases import Work
from ditscale.bench.devices import last_level_cache
from ditscale.bench.subjects import DTYPES
from ditscale.bench.timing import Protocol, Timing, measure

_COPY_DTYPE = torch.float32


def copy_call(total_bytes: int, sets: int, device: str) -> Any:
    """A call that moves ``total_bytes``: half of it is read and half written, from and to memory that is there already."""
    numbers = max(1, total_bytes // 8)
    sources = [torch.rand(numbers, device=device) for _ in range(sets)]
    targets = [torch.rand(numbers, device=device) for _ in range(sets)]

    def call(place: int) -> None:
        targets[place].copy_(sources[place])

    return call


def matmul_call(n: int, dtype: torch.dtype, device: str) -> Any:
    """A call of one n x n x n product."""
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)
    out = torch.empty_like(a)

    def call(place: int) -> None:
        torch.mm(a, b, out=out)

    return call


def measure_ceilings(device: str, protocol: Protocol, *, tiny: bool = False) -> list[dict[str, Any]]:
    """The ceilings, as dictionaries: ``op`` copy or matmul, its size, ``value`` in bytes/s or FLOP/s, and the timing.

    Copies are measured beyond the last-level cache and at an eighth and a thirty-second of it; products at several sizes per
    dtype. The roof of a dtype is the best of its sizes.
    """
    cache = last_level_cache(device)
    found: list[dict[str, Any]] = []
    sizes = {"rotating": 4 * cache, "resident": cache // 8, "resident small": cache // 32}
    for where, size in sizes.items():
        size = 1 << 16 if tiny else size
        sets = 4 if where == "rotating" else 1
        timing = measure({"copy": copy_call(size, sets, device)}, sets=sets, device=device, protocol=protocol)["copy"]
        found.append(_ceiling("copy", where, size, size // 8 * 8, timing, "float32"))
    for dtype in _dtypes(device):
        for n in (64,) if tiny else _matmul_sizes(device):
            calls = {"matmul": matmul_call(n, DTYPES[dtype], device)}
            timing = measure(calls, sets=1, device=device, protocol=protocol)["matmul"]
            found.append(_ceiling("matmul", "", n, 2 * n**3, timing, dtype))
    return found


def _dtypes(device: str) -> Sequence[str]:
    # Processors without float16 arithmetic emulate it a hundred times slower; nobody's ceiling.
    return ("float32", "bfloat16") if device == "cpu" else ("bfloat16", "float16", "float32")


def _matmul_sizes(device: str) -> Sequence[int]:
    return (768, 1536) if device == "cpu" else (4096, 8192)


def _ceiling(op: str, where: str, size: int, amount: int, timing: Timing, dtype: str) -> dict[str, Any]:
    return {
        "op": op,
        "where": where,
        "size": size,
        "dtype": dtype,
        "value": amount / timing.median_ms * 1e3,
        "timing": timing,
    }


class Roof:
    """The roof over a case: the least time in which the device could do its work."""

    def __init__(self, ceilings: list[dict[str, Any]]) -> None:
        self.bandwidth = max(c["value"] for c in ceilings if c["op"] == "copy" and c["where"] == "rotating")
        self.flop_rate: dict[str, float] = {}
        for c in ceilings:
            if c["op"] == "matmul":
                self.flop_rate[c["dtype"]] = max(self.flop_rate.get(c["dtype"], 0.0), c["value"])

    def ms(self, work: Sequence[Work], dtype: str) -> tuple[float, str]:
        """(milliseconds, "memory" or "compute"): every piece at the slower of its bytes and its products, added up."""
        rate = self.flop_rate.get(dtype) or max(self.flop_rate.values())
        memory = [w.bytes_moved / self.bandwidth for w in work]
        compute = [w.matmul_flops / rate for w in work]
        seconds = sum(map(max, memory, compute))
        bound = "compute" if sum(c for m, c in zip(memory, compute, strict=True) if c > m) > seconds / 2 else "memory"
        return seconds * 1e3, bound
