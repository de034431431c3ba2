"""Which backend ``auto`` takes for a call of attention: what measured fastest for its class of shapes, else the safe one.

The kernels of the CPU library keep queries in the lanes of vectors, so a call with one or two queries leaves most lanes idle
and PyTorch's kernel is the faster one: it serves where nothing but its values is wanted, and every call where the library
has no vectors (``order``); it has no second derivatives. Everywhere else ours measured faster in every class
(docs/attention.md).
"""

from __future__ import annotations

from typing import Final

from ditscale.kernels import library

# CPU: fewest queries a sequence from which the C++ kernel is at least as fast as SDPA, by the widest head it holds for.
# AMD EPYC (Zen 5, AVX-512), one thread of a shared machine, torch 2.13, float32, S = T, interleaved medians: forward time of
# SDPA over ours at T = 1, 2, 4: K = 8: 1.6, 2.6, 3.4; K = 64: 0.62, 1.06, 1.6; K = 72: 0.59, 1.00, 1.6.
CPU_FEWEST_QUERIES: Final = ((8, 1), (1 << 30, 3))


# Columns of the widest head that the GPU kernels take: accumulators of wider ones do not fit the registers.
WIDEST_HEAD: Final = {"cuda": 128, "triton": 256}


def order(device_type: str) -> tuple[str, ...]:
    """The backends that ``auto`` tries on a device of this type. On GPUs none of ours has been measured yet: PyTorch's own.

    The portable build of the C++ kernel, which is what a processor without AVX2 gets, takes up to three times as long as SDPA.
    """
    return ("cpu", "sdpa") if device_type == "cpu" and library.cpu_isa() != "portable" else ("sdpa",)


def cpu_pays(T: int, K: int) -> bool:
    """True where the CPU library's attention measured at least as fast as SDPA for T queries of width K."""
    for widest, fewest in CPU_FEWEST_QUERIES:
        if widest >= K:
            return fewest <= T
    return False
