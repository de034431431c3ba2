"""What the device itself can do, measured in the same run: bytes of a copy a second, FLOPs of a matrix product a second."""

from __future__ import annotations

import timeit
from collections.abc import Sequence
from typing import Any

import torch

from ditscale.bench.cases import Work
from ditscale.bench.devices import core_caches, last_level_cache, rotation_bytes
from ditscale.bench.subjects import DTYPES, generator
from ditscale.bench.timing import Protocol, Timing, measure
from ditscale.kernels import dispatch, linear

_PROBE = 256  # a product of this size took 0.26 ms on two cores of an EPYC without AVX-512, emulated 25


def copy_call(total_bytes: int, sets: int, device: str) -> Any:
    """A call that moves ``total_bytes``: half of it is read and half written, from and to memory that is there already."""
    numbers = max(1, total_bytes // 8)
    g = generator(0, device)
    sources = [torch.rand(numbers, generator=g, device=device) for _ in range(sets)]
    targets = [torch.rand(numbers, generator=g, device=device) for _ in range(sets)]

    def call(place: int) -> None:
        targets[place].copy_(sources[place])

    return call


def matmul_call(n: int, dtype: torch.dtype, device: str) -> Any:
    """A call of one n x n x n product."""
    g = generator(0, device)
    a, b = (torch.randn(n, n, generator=g, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)

    def call(place: int) -> None:
        torch.mm(a, b, out=out)

    return call


def linear_call(n: int, backend: Any) -> Any:
    """The same by a backend of linear layers, in float32 on a processor."""
    a, b = torch.randn(n, n), torch.randn(n, n)

    def call(place: int) -> None:
        linear(a, b, backend=backend)

    return call


def measure_ceilings(device: str, protocol: Protocol, *, tiny: bool = False) -> list[dict[str, Any]]:
    """The ceilings, as dictionaries: ``op`` copy or matmul, its size, ``value`` in bytes/s or FLOP/s, and the timing.

    Copies are measured in the caches, beyond them, and of four times as much, which shows that beyond is beyond. Products are
    measured at several sizes per dtype, and by what linear layers take too where that is not PyTorch's own; the roof of a dtype
    is the best of all. A dtype whose products are emulated has no ceiling of its own: that of float32 stands over it.
    """
    found: list[dict[str, Any]] = []
    for where, size, sets in _copies(device, tiny):
        timing = measure({"copy": copy_call(size, sets, device)}, sets=sets, device=device, protocol=protocol)["copy"]
        found.append(_ceiling("copy", where, size, size // 8 * 8, timing, "float32"))
    for dtype in _dtypes(device):
        if dtype != "float32" and device == "cpu" and _emulated(DTYPES[dtype]):
            continue
        for n in (64,) if tiny else _matmul_sizes(device):
            calls = {"": matmul_call(n, DTYPES[dtype], device)}
            fastest = dispatch.resolve("linear", "auto", device, torch.float32)
            if dtype == "float32" and fastest != "reference":
                calls[fastest] = linear_call(n, fastest)
            for by, call in calls.items():
                timing = measure({by: call}, sets=1, device=device, protocol=protocol)[by]
                found.append(_ceiling("matmul", by, n, 2 * n**3, timing, dtype))
    return found


def _copies(device: str, tiny: bool) -> list[tuple[str, int, int]]:
    """(where, bytes read and written, buffer sets)."""
    if tiny:
        return [("resident", 1 << 16, 1), ("rotating", 1 << 16, 4)]
    beyond = rotation_bytes(device)
    if device == "cuda":
        cache = last_level_cache(device)
        return [("resident", cache // 4, 1), ("rotating", beyond // 3, 4), ("large", 4 * beyond, 1)]
    cache = core_caches()
    return [
        ("resident", cache // 2, 1),
        ("resident", 4 * cache, 1),
        ("rotating", beyond // 4, 5),
        ("large", 4 * beyond, 1),
    ]


def _dtypes(device: str) -> Sequence[str]:
    return ("float32", "bfloat16") if device == "cpu" else ("bfloat16", "float16", "float32")


def _emulated(dtype: torch.dtype) -> bool:
    """Whether the processor has no arithmetic for products of ``dtype``: then they take far longer than float32's (a
    hundred times, on an EPYC without AVX-512), and to measure large ones would take minutes."""

    def seconds(dtype: torch.dtype) -> float:
        call = matmul_call(_PROBE, dtype, "cpu")
        return min(timeit.repeat(lambda: call(0), number=1, repeat=5))

    return seconds(dtype) > 5 * seconds(torch.float32)


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
    """The roof over a case: the least time in which the device could do its work beyond the caches."""

    def __init__(self, ceilings: list[dict[str, Any]]) -> None:
        self.bandwidth = max(c["value"] for c in ceilings if c["op"] == "copy" and c["where"] in ("rotating", "large"))
        self.flop_rate: dict[str, float] = {}
        for c in ceilings:
            if c["op"] == "matmul":
                self.flop_rate[c["dtype"]] = max(self.flop_rate.get(c["dtype"], 0.0), c["value"])

    def ms(self, work: Sequence[Work], dtype: str, *, copied: float = 0.0) -> tuple[float, str]:
        """(milliseconds, "memory" or "compute"): every piece at the slower of its bytes and its products, added up.

        ``copied``: bytes/s of a copy in the same rounds. Where it is faster than the one that the session began with, as on a
        machine that others had slowed down then, it is the roof.
        """
        rate = self.flop_rate.get(dtype) or max(self.flop_rate.values())
        bandwidth = max(self.bandwidth, copied)
        memory = [w.bytes_moved / bandwidth for w in work]
        compute = [w.matmul_flops / rate for w in work]
        seconds = sum(map(max, memory, compute))
        bound = "compute" if sum(c for m, c in zip(memory, compute, strict=True) if c > m) > seconds / 2 else "memory"
        return seconds * 1e3, bound
