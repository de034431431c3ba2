"""How a head is cut in columns, and the tiles of the Triton kernels: a frozen table, so that no call ever tunes.

The tiles were chosen without a GPU, from what the compiler makes of each (``ditscale bench attention --aot``): none that spills;
of the others the one that keeps most warps on a multiprocessor and reads shared memory least for each product. They have not
been run on a GPU yet, and nothing is claimed for their speed.

No tile is read through a tensor descriptor (TMA), on purpose, until a GPU says otherwise. Below sm_90 a descriptor is only
another way to write the same loads. From sm_90 on it saves the address arithmetic of a tile, and costs: one made on the host
is encoded anew for every tensor of every call, microseconds beside forward passes that last tens of them at T = 256; one made
on the device needs memory of the launch's own from an allocator that the user must set. ``lengths`` and packed sequences end
inside a tensor, where a descriptor would read on, so keys that do not count need the masks they have now; and rows must begin
on 16 bytes, which makes the pointer kernel stay for the rest. What decides: times of fwd, dq and dkv on sm_90 and sm_100 at
T = 256, 1,024 and 4,096, K = 64, 72 and 128, pointers beside descriptors in one run, host time of a call included.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class Tile(NamedTuple):
    """BM queries and BN keys a step, warps of a program, stages of the pipeline of copies."""

    BM: int
    BN: int
    warps: int
    stages: int


# Architecture -> kernel -> (widest head, tile), narrow ones first. Up to 64 columns accumulators leave room for the larger
# tile; 72 to 96 are DiT-XL's and its neighbours, in two parts; beyond 128 heads are right, not tuned.
_AMPERE: Final = {
    # mma.sync: 64 keys a step save rescaling where registers allow it, 8 warps share what is read of keys and values.
    "fwd": ((80, Tile(128, 64, 8, 2)), (128, Tile(128, 32, 8, 2)), (256, Tile(64, 32, 8, 2))),
    # Three products share the registers: 32 keys a step, 8 warps that share them.
    "dq": ((128, Tile(128, 32, 8, 2)), (256, Tile(64, 16, 8, 2))),
    # Four products, two of them accumulators of full width: 32 queries a step.
    "dkv": ((64, Tile(32, 128, 8, 2)), (96, Tile(16, 64, 8, 2)), (128, Tile(32, 64, 8, 2)), (256, Tile(16, 32, 8, 2))),
}
_TILES: Final[dict[int, dict[str, tuple[tuple[int, Tile], ...]]]] = {
    80: _AMPERE,
    # 86 and 89 have 100 KiB of shared memory and 48 warps: the same tiles fit at least once, with no fewer warps.
    86: _AMPERE,
    89: _AMPERE,
    # wgmma takes 64 rows of four warps at once, from shared memory: two groups of them, and tiles of 64 keys. A third stage where
    # two programs still fit.
    90: {
        "fwd": ((64, Tile(128, 64, 8, 3)), (128, Tile(128, 64, 8, 2)), (256, Tile(128, 32, 8, 2))),
        "dq": ((128, Tile(128, 64, 8, 2)), (256, Tile(64, 32, 8, 2))),
        "dkv": ((128, Tile(32, 128, 8, 2)), (256, Tile(16, 64, 8, 2))),
    },
    # tcgen05 keeps accumulators outside the registers, but weights pass through them: the tiles of Hopper, and for the two
    # accumulators of dkv fewer keys from 72 columns on, which else spill.
    100: {
        "fwd": ((128, Tile(128, 64, 8, 2)), (256, Tile(128, 32, 8, 2))),
        "dq": ((128, Tile(128, 64, 8, 2)), (256, Tile(64, 32, 8, 2))),
        "dkv": ((64, Tile(32, 128, 8, 2)), (128, Tile(32, 64, 8, 2)), (256, Tile(16, 64, 8, 2))),
    },
    # mma.sync as on Ampere.
    120: _AMPERE,
}  # fmt: skip
# float32 is multiplied without tensor cores, in IEEE arithmetic: every thread holds its own part of a tile, and larger ones
# spill.
_FLOAT32: Final = {
    "fwd": ((128, Tile(32, 32, 4, 2)), (256, Tile(16, 16, 4, 2))),
    "dq": ((128, Tile(32, 16, 4, 2)), (256, Tile(16, 16, 4, 2))),
    "dkv": ((64, Tile(32, 32, 8, 2)), (256, Tile(16, 16, 4, 2))),
}


# The interpreter pays by the instruction, whatever the size of a tile.
INTERPRETER: Final = 0
_INTERPRETED: Final = Tile(64, 64, 4, 2)


def columns(K: int) -> tuple[int, int]:
    """(D1, D2): the powers of two, at least 16, that a head of K columns is read as; D2 = 0 where one holds it.

    A product needs powers of two, and 16 along the summed dimension: 72 = 64 + 8 is 64 + 16, not 128.
    """
    D1 = max(1 << (K.bit_length() - 1), 16)
    if D1 >= K:
        return D1, 0
    D2 = max(16, 1 << (K - D1 - 1).bit_length())
    return (2 * D1, 0) if D2 >= D1 else (D1, D2)


def tile(kernel: str, K: int, size: int, arch: int) -> Tile:
    """The tile of ``kernel`` ("fwd", "dq" or "dkv") for heads of K columns of ``size`` bytes a number.

    ``arch``: compute capability times ten, where one that is not in the table takes the next lower one; or ``INTERPRETER``.
    """
    if arch == INTERPRETER:
        return _INTERPRETED
    known = max((a for a in _TILES if a <= arch), default=80)
    table = _FLOAT32 if size == 4 else _TILES[known]
    return next(chosen for widest, chosen in table[kernel] if widest >= K)
