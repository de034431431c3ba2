"""What the runner works with: a case turned into candidates that can be checked and timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditscale.bench.cases import Case
from ditscale.bench.devices import rotation_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Results = dict[str, Tensor]
# Buffer sets for one case: never more memory than this, on any device.
_MOST_BYTES = 4 << 30


@dataclass
class Candidate:
    """One provider of a case.

    Attributes:
        call: does the work once on a buffer set.
        results: outputs and gradients on buffer set 0, for the check.
        auto: whether it is what ``backend="auto"`` takes here.
        note: what a reader must know beside the figure.
    """

    call: Callable[[int], Any]
    results: Callable[[], Results]
    auto: bool = False
    note: str = ""


@dataclass
class Subject:
    """A case on a device.

    Attributes:
        sets: buffer sets.
        set_bytes: bytes that one call reads and writes of its own (inputs, results and their gradients).
        build: makes each provider, in the order in which they are shown; may raise, with the reason.
        exact: the results in float64.
        yardstick: the provider whose error at the same dtype is the allowance: plain PyTorch.
        copies: whether a copy of as many bytes is timed beside it.
        graphs: whether a GPU is given the calls as a captured graph.
        apart: whether providers are made, timed and dropped one after the other, for want of memory for all at once.
    """

    case: Case
    sets: int
    set_bytes: int
    build: dict[str, Callable[[], Candidate]]
    exact: Callable[[], Results]
    yardstick: str = "eager"
    copies: bool = False
    graphs: bool = True
    apart: bool = False


def buffer_sets(case: Case, set_bytes: int, device: str, most: int) -> int:
    """How many sets so that all together are beyond the caches (:func:`rotation_bytes`); 1 for a resident case."""
    if case.cache == "resident":
        return 1
    wanted = math.ceil(rotation_bytes(device) / max(1, set_bytes)) + 1
    return max(2, min(wanted, most, _MOST_BYTES // max(1, set_bytes)))


def fresh_compile(function: Callable[..., Any], *, keeps_graph: bool = False) -> Callable[..., Any]:
    """``torch.compile`` of a function for this shape alone.

    The compiler's memory of other shapes is dropped first: with it, the ninth shape of a function would quietly run
    uncompiled, and shapes would be treated as unknown from the second on.

    Args:
        function: what is compiled at its first call.
        keeps_graph: its backward pass will run more than once on the same saved tensors. Default: False.
    """
    torch.compiler.reset()
    # Buffers that a first backward pass may overwrite. PyTorch asks when it compiles and again at every backward pass, so the
    # answer stands until the next function comes.
    torch._functorch.config.donated_buffer = not keeps_graph
    return torch.compile(function, dynamic=False, fullgraph=True)


def generator(seed: int, device: str) -> torch.Generator:
    """Random numbers of their own for every buffer set. (CUDA's default generator gives none after a capture that failed.)"""
    return torch.Generator(device).manual_seed(seed)
