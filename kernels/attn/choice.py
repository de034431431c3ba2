"""Which backend ``auto`` takes for a call of attention: what measured fastest for its class of shapes, else the safe one.

The kernels of the CPU library keep queries in the lanes of vectors, so a call with few queries leaves many lanes idle, and
before many keys PyTorch's kernel is the faster one: it serves where nothing but its values is wanted, and every call where
the library has no vectors (``order``); it has no second derivatives. Everywhere else ours measured faster in every class
(docs/attention.md).
"""

from __future__ import annotations

from typing import Final

from ditscale.kernels import library

# CPU: (widest head, most keys, fewest queries a sequence from which the C++ kernel is at least as fast as SDPA); the first line
# that holds a call counts. Float32, torch 2.13, one thread of a shared machine, interleaved medians of the forward time of SDPA
# over ours. AMD EPYC (family 26, AVX-512), S = T = 1, 2, 4: K = 8: 1.6, 2.6, 3.4; K = 64: 0.62, 1.06, 1.6; K = 72: 0.59, 1.00,
# 1.6. AMD EPYC (family 25, AVX2), K = 64: S = T = 3, 16, 48: 1.32, 1.27, 1.08; S = 256, T = 1, 16, 33, 48: 0.27, 0.83, 0.85,
# 1.14; S = 1,024: 0.78, 1.01, 0.93, 1.08; K = 8: S = T = 1: 1.19; S = 1,024, T = 1, 2, 3: 0.65, 0.89, 1.33.
_ANY: Final = 1 << 30
CPU_FEWEST_QUERIES: Final = ((8, 64, 1), (8, _ANY, 3), (_ANY, 63, 3), (_ANY, _ANY, 48))


# Columns of the widest head that the GPU kernels take: accumulators of wider ones do not fit the registers.
WIDEST_HEAD: Final = {"cuda": 128, "triton": 256}


def order(device_type: str) -> tuple[str, ...]:
    """The backends that ``auto`` tries on a device of this type. On GPUs none of ours has been measured yet: PyTorch's own.

    The portable build of the C++ kernel, which is what a processor without AVX2 gets, takes up to three times as long as SDPA.
    """
    return ("cpu", "sdpa") if device_type == "cpu" and library.cpu_isa() != "portable" else ("sdpa",)


def cpu_pays(T: int, S: int, K: int) -> bool:
    """True where the CPU library's attention measured at least as fast as SDPA for T queries and S keys of width K."""
    for widest, most_keys, fewest in CPU_FEWEST_QUERIES:
        if widest >= K and most_keys >= S:
            return fewest <= T
    return False
