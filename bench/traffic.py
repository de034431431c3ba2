"""What Triton kernels read and write, counted while they run in Triton's interpreter at small sizes: no GPU, no guess.

    TRITON_INTERPRET=1 python -P -m ditscale.bench.traffic [FAMILY ...]

prints one JSON object a line. ``touched`` counts every byte of memory once for reading and once for writing: what caches of any
size must still move. ``asked`` counts every load and store for itself, each address once within it: what moves where no cache
helps. Beside them stands ``bytes_moved``, what the operator must move by its ``cost.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditscale.bench.aot import families, launches
from ditscale.errors import InputError
from ditscale.kernels.aot import Launch

# Small sizes by letter; the others are part of what a kernel is made for and stay.
_SMALL = {"B": 2, "H": 2, "T": 16, "S": 16, "R": 16}
Array = NDArray[np.uint64]


def small(launch: Launch) -> dict[str, int]:
    """Sizes at which a launch is interpreted: few rows, widths as they are."""
    return {letter: min(size, _SMALL.get(letter, size)) for letter, size in launch.dims}


class _Counter:
    """Stands where the interpreter reads and writes memory, and writes down which."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.asked = 0
        self.seen: dict[str, list[tuple[Array, int]]] = {"load": [], "store": []}  # addresses, and bytes at each

    def load(self, addresses: Array, mask: Any, other: Any, dtype: Any) -> Any:
        self._note("load", addresses, mask, np.dtype(dtype).itemsize)
        return self.memory.load(addresses, mask, other, dtype)

    def store(self, addresses: Array, value: Any, mask: Any) -> Any:
        self._note("store", addresses, mask, value.dtype.itemsize)
        return self.memory.store(addresses, value, mask)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.memory, name)

    def _note(self, way: str, addresses: Array, mask: Any, size: int) -> None:
        used = np.unique(
            np.broadcast_to(addresses, np.broadcast(addresses, mask).shape)[np.broadcast_to(mask, addresses.shape)]
        )
        self.asked += used.size * size
        self.seen[way].append((used, size))

    @property
    def touched(self) -> int:
        """Different bytes read, and different bytes written."""
        return sum(_covered(found) for found in self.seen.values() if found)


def _covered(found: list[tuple[Array, int]]) -> int:
    """Bytes that lie in any of the accesses."""
    first = np.concatenate([addresses for addresses, _ in found])
    end = np.concatenate([addresses + np.uint64(size) for addresses, size in found])
    order = np.argsort(first)
    first, reached = first[order], np.maximum.accumulate(end[order])
    known = np.concatenate([first[:1], reached[:-1]])  # up to here all is counted
    return int((reached - np.maximum(first, known)).sum())


def count(launch: Launch) -> dict[str, Any]:
    """The traffic of a launch at its small sizes.

    Raises:
        InputError: this process does not interpret Triton (TRITON_INTERPRET=1 before it starts).
    """
    from triton.runtime import interpreter

    from ditscale.kernels.dispatch import interpreting
    from ditscale.kernels.interpreter import hasten

    if not interpreting():
        raise InputError("TRITON_INTERPRET: expected 1 for counting traffic, got 0")
    hasten()
    dims = small(launch)
    counter = _Counter(interpreter._interpreter)
    interpreter._interpreter = counter
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")  # the values are whatever memory held
            launch.call(dims, launch.dtype)
    finally:
        interpreter._interpreter = counter.memory
    return {
        "launch": replace(launch, dims=tuple(dims.items())).id,
        "asked": counter.asked,
        "touched": counter.touched,
        "bytes_moved": launch.work(dims, launch.dtype).bytes_moved,
    }


def chosen(family: str) -> list[Launch]:
    """Of each operator, pass and variant the launch of the widest rows in a two-byte dtype: how kernels read does not depend on
    the dtype, and what they add in float32 weighs most there."""
    found: dict[tuple[str, str, str], Launch] = {}
    for launch in launches(family):
        key = (launch.op, launch.passes, launch.variant)
        best = found.get(key)
        if launch.dtype != "bfloat16" and best is not None:
            continue
        if best is None or best.dtype != "bfloat16" or launch.shape.get("D", 0) >= best.shape.get("D", 0):
            found[key] = launch
    return list(found.values())


def in_a_process(names: Sequence[str]) -> list[dict[str, Any]]:
    """What this module prints, from a process that interprets.

    Raises:
        RuntimeError: it failed; says with what.
    """
    command = [sys.executable, "-m", "ditscale.bench.traffic", *names]
    if getattr(sys.flags, "safe_path", False):
        command.insert(1, "-P")
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    if done.returncode:
        raise RuntimeError(f"traffic was not counted: {done.stderr.strip().splitlines()[-1][-300:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def _main(names: Sequence[str]) -> Iterator[str]:
    for family in names or families():
        for launch in chosen(family):
            yield json.dumps(count(launch) | {"family": family})


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        for line in _main(sys.argv[1:]):
            print(line, flush=True)
