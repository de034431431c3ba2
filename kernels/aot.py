"""What the ahead-of-time tables compile: launches of operators, as data. No torch, no triton.

Each family with Triton kernels has a module ``aot`` with a function ``launches()``. A launch is said once, as the operator's
own launcher called with tensors that nobody reads: what is compiled is then what a GPU would be given, with the signature,
tiles, warps and stages that the launcher chooses. Beside it may stand ``CUDA_STACK``: (function, template arguments,
architecture) of a CUDA kernel -> bytes of local memory that a thread may use, and why; and ``cuda_flop_efficiency``: how much
of the products of the family's CUDA kernels is of use. A launcher that chooses by device asks Triton's active driver
(``triton.runtime.driver.active.get_current_target()``), which the table sets to each architecture in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

# Compute capabilities that every launch is compiled for.
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}

Dims = Mapping[str, int]


class Work(NamedTuple):
    """What one launch must do, by the family's ``cost.py``.

    Attributes:
        bytes_moved: compulsory traffic of device memory.
        flops: all additions and multiplications.
        matmul_flops: those in matrix products; 0 where there are none.
        issued_flops: of matrix products as the tiles make them, padding and recomputation included; 0 where there are none.
    """

    bytes_moved: int
    flops: int
    matmul_flops: int = 0
    issued_flops: int = 0


@dataclass(frozen=True)
class Launch:
    """One operator call that launches Triton kernels.

    Attributes:
        op: the operator's public name.
        passes: "forward" or "backward".
        dtype: of the tensors, a key of ``SIZE``.
        dims: sizes by letter, in the order in which they are shown.
        call: makes the operator's tensors at these sizes and dtype and calls its launcher. Values are never looked at. Also
            called at other sizes, in Triton's interpreter, to count what the kernels read and write.
        work: bytes and FLOPs at these sizes and dtype.
        variant: what else tells this launch from others ("per_token", "no statistics"); "" for none.
        architectures: compute capabilities to compile for. Default: all.
        stack_bytes: local memory a thread may use; above 0 only with ``why``.
        why: the reason for ``stack_bytes``.
    """

    op: str
    passes: str
    dtype: str
    dims: tuple[tuple[str, int], ...]
    call: Callable[[Dims, str], object]
    work: Callable[[Dims, str], Work]
    variant: str = ""
    architectures: tuple[int, ...] = ARCHITECTURES
    stack_bytes: int = 0
    why: str = ""

    @property
    def shape(self) -> dict[str, int]:
        """Sizes by letter."""
        return dict(self.dims)

    @property
    def id(self) -> str:
        """A name of its own: operator, pass, dtype, sizes, variant."""
        sizes = " ".join(f"{k}{v}" for k, v in self.dims)
        return "/".join(part for part in (self.op, self.passes, self.dtype, sizes, self.variant) if part)
