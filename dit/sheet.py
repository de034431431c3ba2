"""The sheet that a walk through a model writes its ledger on: lines, parameters, and what is done again. No
torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from ditscale.dit.ledger import LedgerLine, ParamCount
from ditscale.errors import InputError

_BLOCKS = ("block", "fused-block")


class Sheet:
    """Lines that add up under their names, in the order in which each was first written.

    Args:
        elementwise: keep the lines of elementwise work too (convention ``all``).
        size: bytes of an element.
    """

    def __init__(self, *, elementwise: bool, size: int) -> None:
        self.elementwise = elementwise
        self.size = size
        self._sums: dict[str, list[int]] = {}
        self._labels: dict[str, tuple[str, str]] = {}
        self._unrepeated: dict[str, int] = {}
        self._unrepeated_fused: dict[str, int] = {}
        self._kernel_repeats: dict[str, int] = {}
        self._params = {"token": 0, "context": 0, "sample": 0, "embedding": 0}
        self._idle = self._body = 0

    def add(
        self,
        name: str,
        operation: str,
        formula: str,
        forward: int,
        backward: int,
        bytes_forward: int = 0,
        bytes_backward: int = 0,
    ) -> None:
        """Add to the line ``name``, which comes into being with its first sum."""
        sums = self._sums.get(name)
        if sums is None:
            self._sums[name] = [forward, backward, bytes_forward, bytes_backward]
            self._labels[name] = (operation, formula)
        else:
            sums[0] += forward
            sums[1] += backward
            sums[2] += bytes_forward
            sums[3] += bytes_backward

    def light(self, name: str, operation: str, formula: str, cost: tuple[int, int], numbers: int = 0) -> None:
        """Elementwise work; ``numbers`` that move each way, 0 where it rides on a neighbour's traffic."""
        if self.elementwise:
            moved = numbers * self.size
            self.add(name, operation, formula, *cost, moved, moved)

    def linear(
        self,
        name: str,
        times: int,
        rows: int,
        fan_in: int,
        fan_out: int,
        formula: str,
        who: str,
        *,
        input_grad: bool = True,
        bias: bool = True,
        bias_counted: bool = True,
        copies: int = 1,
    ) -> None:
        """``times`` layers of ``rows`` each; ``copies`` weights in each layer (experts) share the rows.

        Args:
            who: what the parameters work for: "token", "context" or "sample".
            input_grad: the backward pass needs the input's gradient.
            bias_counted: False where another line has the bias's additions.
        """
        weights = copies * fan_in * fan_out
        biases = copies * fan_out if bias else 0
        forward = 2 * times * rows * fan_in * fan_out
        # A product reads two operands and writes the third. Backward: the weight's gradient, then the
        # input's.
        moved = times * (rows * (fan_in + fan_out) + weights) * self.size
        with_bias = moved + times * biases * self.size
        moved_back = with_bias + moved if input_grad else with_bias
        backward = 2 * forward if input_grad else forward
        self.add(name, "matmul", formula, forward, backward, with_bias, moved_back)
        self._params[who] += times * (weights + biases)
        if self.elementwise and bias and bias_counted:
            outputs = times * rows * fan_out
            self.add(f"{name.rpartition('.')[0] or name}.bias", "elementwise", "1 an output", outputs, outputs)

    def parameters(self, who: str, number: int) -> None:
        """Parameters that belong to no linear layer; ``who`` may be "embedding" too."""
        self._params[who] += number

    def body(self, weights: int, idle: int = 0) -> None:
        """Weights of the blocks' products that work for an image token, and parameters that do not work for
        it.
        """
        self._body += weights
        self._idle += idle

    def skip(self, name: str, flops: int, *, fused: bool = False) -> None:
        """Forward work of a line that repeating its block leaves out; ``fused``: only where another adds its last branch."""
        for sums in (self._unrepeated_fused,) if fused else (self._unrepeated, self._unrepeated_fused):
            sums[name] = sums.get(name, 0) + flops

    def kernel_repeats(self, name: str, repeated: int) -> None:
        """Forward work of a line that a fused kernel does again in its backward pass."""
        self._kernel_repeats[name] = self._kernel_repeats.get(name, 0) + repeated

    def lines(self, recompute: str | Sequence[str], *, hardware: bool) -> tuple[LedgerLine, ...]:
        """The ledger, with the column of repeated work filled in.

        Args:
            recompute: "none", "block", "fused-block", "attention", or names of lines.
            hardware: add what fused kernels do again.
        """
        chosen = self._chosen(recompute)
        left_out = self._unrepeated_fused if recompute == "fused-block" else self._unrepeated
        out = []
        for name, (forward, backward, bytes_forward, bytes_backward) in self._sums.items():
            again = 0
            if name in chosen:
                again = forward - (left_out.get(name, 0) if recompute in _BLOCKS else 0)
            if hardware:
                again += self._kernel_repeats.get(name, 0)
            operation, formula = self._labels[name]
            out.append(LedgerLine(name, operation, formula, forward, backward, again, bytes_forward, bytes_backward))
        return tuple(out)

    def _chosen(self, recompute: str | Sequence[str]) -> set[str]:
        if recompute == "none":
            return set()
        if recompute == "fused-block" and self.elementwise:
            raise InputError("recompute: expected none, block, attention or names of lines under all, got fused-block")
        if recompute in _BLOCKS:
            return {name for name in self._sums if name.startswith(("blocks.", "single."))}
        if recompute == "attention":
            return {name for name in self._sums if name.endswith((".scores", ".values", ".softmax"))}
        if isinstance(recompute, str):
            raise InputError(
                f"recompute: expected none, block, fused-block, attention or names of lines, got {recompute!r}"
            )
        for name in recompute:
            if name not in self._sums:
                raise InputError(f"recompute: expected names of lines, got {name!r}")
        return set(recompute)

    @property
    def params(self) -> ParamCount:
        """Parameters by how often they work."""
        by = self._params
        total = sum(by.values())
        return ParamCount(
            total, by["token"], by["sample"], by["embedding"], by["context"], total - self._idle, self._body
        )
