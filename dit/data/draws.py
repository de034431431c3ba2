"""Random numbers by counter: a function of key and index, never of what was drawn before.

The mixer is SplitMix64's finaliser (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014) on wrapping 64-bit integers, so that results are equal on every machine and every numpy.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_M1, _M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _M1
    x = (x ^ (x >> np.uint64(27))) * _M2
    x ^= x >> np.uint64(31)
    return x


class Draws:
    """A table of uniform 32-bit integers, one row an index and one column a decision.

    key: any text that names the stream (seed, split).
    index: int64 or uint64 [n].
    columns: how many decisions a row needs.
    """

    def __init__(self, key: str, index: NDArray[np.integer], columns: int) -> None:
        salt = np.frombuffer(hashlib.sha256(key.encode()).digest()[:8], dtype="<u8")
        rows = _mix(_mix(index.astype(np.uint64) * _GOLDEN + salt) ^ salt)
        steps = np.arange(1, columns + 1, dtype=np.uint64) * _GOLDEN
        self._table = _mix(rows[:, None] + steps) >> np.uint64(32)
        self._next = 0

    def below(self, limit: NDArray[np.integer] | int) -> NDArray[np.int64]:
        """int64 [n] in 0..limit-1 from the next column; `limit` is one number or one a row.

        A product and a shift instead of a remainder: the bias is under limit / 2**32.
        """
        column = self._table[:, self._next]
        self._next += 1
        product: NDArray[np.uint64] = column * np.asarray(limit).astype(np.uint64)
        value: NDArray[np.int64] = (product >> np.uint64(32)).astype(np.int64)
        return value

    def between(self, low: NDArray[np.integer] | int, high: NDArray[np.integer] | int) -> NDArray[np.int64]:
        """int64 [n] in low..high, both ends included."""
        return low + self.below(np.asarray(high) - low + 1)
