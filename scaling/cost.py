"""What a run costs in compute, as a function of its size and data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ditscale.scaling.engine import Array


@dataclass(frozen=True)
class CostLaw:
    """What a run costs: ``C = coefficient * N^exponent * D``, as the ledger measured it.

    Attributes:
        coefficient: FLOPs of one unit of data at N = 1.
        exponent: 1 for 6ND; below 1 where a share of the compute does not grow with N.
        rms: root mean square relative error of this form on the runs.
        source: "measured", or the convention it stands for.
    """

    coefficient: float
    exponent: float
    rms: float
    source: str

    @classmethod
    def measured(cls, params: Array, data: Array, flops: Array) -> CostLaw:
        """Least squares of log(C/D) on log N."""
        x, y = np.log(params), np.log(flops / data)
        centre = x.mean()
        spread = float(((x - centre) ** 2).sum())
        slope = float(((x - centre) * y).sum() / spread) if spread > 1e-12 else 1.0
        intercept = float(y.mean() - slope * centre)
        left = y - intercept - slope * x
        return cls(float(np.exp(intercept)), slope, float(np.sqrt((left**2).mean())), "measured")

    def data(self, flops: Any, params: Any) -> Any:
        """How much data a budget pays at a model size."""
        return flops / (self.coefficient * params**self.exponent)

    def flops(self, params: Any, data: Any) -> Any:
        """What a run costs."""
        return self.coefficient * params**self.exponent * data

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "coefficient": self.coefficient,
            "exponent": self.exponent,
            "rms_relative_error": self.rms,
            "source": self.source,
        }
