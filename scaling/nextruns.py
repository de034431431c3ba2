"""Which runs to make next: those that narrow an interval most for their compute.

A run at (N, D) measures ``j . theta + shock + noise``, with j the derivative of its residual: optimal design,
linearised at the fit. Suggested runs of one budget share its shock, so a second run there says less about
compute than a first elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ditscale.errors import InputError
from ditscale.scaling.checks import need_positive
from ditscale.scaling.engine import Array
from ditscale.scaling.jsonable import plain
from ditscale.scaling.surface import SurfaceFit

QUANTITIES = ("loss", "params")
_SIZES = np.geomspace(1 / 4, 4, 7)
# A run with less than this share of the least size or data of those made is not suggested: the law is not known there, and
# there need be no such model, nor a whole batch.
_LEAST = 0.1


@dataclass
class NextRuns:
    """Suggested runs, in the order in which to make them.

    Attributes:
        quantity, target: what shall become better known ("loss" or "params" of the optimum), and at which
            compute.
        runs: params, data, flops, se_after (standard error of the quantity's logarithm once it is made), gain
            (by how much it shrinks, as a share).
        se_before: standard error now.
        data_unit: of "data".
    """

    quantity: str
    target: float
    runs: list[dict[str, float]]
    se_before: float
    data_unit: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return plain(self.__dict__)

    def summary(self) -> str:
        """A readable table."""
        lines = [
            f"next runs for the {self.quantity} at {self.target:.4g} FLOPs (standard error now "
            f"{100 * self.se_before:.3g} %)",
            f"  {'FLOPs':>12s}{'N':>12s}{'D (' + self.data_unit + ')':>18s}{'error after':>14s}",
        ]
        for r in self.runs:
            lines.append(f"  {r['flops']:12.4g}{r['params']:12.4g}{r['data']:18.4g}{100 * r['se_after']:13.3g}%")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()


def suggest_runs(
    fit: SurfaceFit,
    *,
    target: float,
    spend: float,
    quantity: str = "loss",
    count: int = 4,
) -> NextRuns:
    """Suggest the runs that shrink an interval most.

    Args:
        fit: the surface so far, with compute.
        target: compute at which the quantity matters.
        spend: FLOPs to spend on all suggested runs together.
        quantity: "loss" or "params" of the compute-optimal run at ``target``.
        count: at most so many runs. Default: 4.

    Returns:
        NextRuns: chosen one after the other, each the one that shrinks the error most within an even share of
            what is left.

    Raises:
        InputError: an unknown quantity, values that are not positive, or a fit that allocates nothing.
    """
    if quantity not in QUANTITIES:
        raise InputError(f"quantity: expected loss or params, got {quantity!r}")
    for name, value in (("target", target), ("spend", spend), ("count", count)):
        need_positive(name, value)
    if fit.cost is None or fit.flops_range is None or not fit.allocates:
        raise InputError("law: expected a surface of N and D fitted with measured compute")
    fit.need_optimum(target)
    law = fit.fit
    parts = law.components
    which: Callable[[Array], Array] = lambda th: fit.log_optimum(th, target)[2 if quantity == "loss" else 0]  # noqa: E731
    budgets = np.geomspace(min(fit.flops_range[0], spend / count), min(spend, target), 16)
    least = [_LEAST * float(law.inputs[name].min()) for name in ("params", "data")]
    candidates = [
        (float(c), k, n, d, j)
        for k, c in enumerate(budgets)
        for n, d, j in (_run_at(fit, float(c), size) for size in _SIZES)
        if n >= least[0] and d >= least[1]
    ]

    # What is known: the law's parameters, and one unknown shock for each candidate budget.
    p = len(law.theta)
    known = np.zeros((p + len(budgets), p + len(budgets)))
    known[:p, :p] = parts.covariance
    known[np.arange(p, len(known)), np.arange(p, len(known))] = parts.budget
    gradient = np.concatenate([law.gradient(which), np.zeros(len(budgets))])
    before = now = float(np.sqrt(gradient @ known @ gradient))
    chosen: list[dict[str, float]] = []
    left = float(spend)
    while len(chosen) < count:
        # An even share of what is left, so that one dear run does not starve the others; a saving passes on.
        allowance = left / (count - len(chosen)) * (1 + 1e-9)
        best: tuple[float, Any] = (0.0, None)
        for c, k, n, d, j in candidates:
            if c > allowance:
                continue
            row = np.concatenate([j, np.zeros(len(budgets))])
            row[p + k] = 1.0
            v = known @ row
            drop = float(gradient @ v) ** 2 / (max(parts.run, 1e-12) + float(row @ v))
            if drop > best[0]:
                best = (drop, (c, n, d, row, v))
        if best[1] is None:
            break
        c, n, d, row, v = best[1]
        known = known - np.outer(v, v) / (max(parts.run, 1e-12) + row @ v)
        after = float(np.sqrt(max(gradient @ known @ gradient, 0.0)))
        left -= c
        chosen.append(
            {
                "params": n,
                "data": d,
                "flops": c,
                "se_after": after,
                "gain": 1.0 - after / now if now > 0 else 0.0,
            }
        )
        now = after
    if not chosen:
        raise InputError(
            f"spend: expected enough for a run of a tenth of the least size and data so far that teaches something at "
            f"{target:.4g} FLOPs, got {spend:.4g}"
        )
    return NextRuns(quantity, float(target), chosen, before, fit.data_unit)


def _run_at(fit: SurfaceFit, flops: float, size: float) -> tuple[float, float, Array]:
    """A run of a budget at ``size`` times its best model: params, data and the derivative of its residual."""
    law = fit.fit
    n = size * float(np.exp(fit.log_optimum(law.theta[None, :], flops)[0][0]))
    d = float(fit.cost.data(flops, n)) if fit.cost else 0.0
    model = law.law.model({"params": np.log([n]), "data": np.log([d])}, law.centre)
    f, j = model.value_and_jacobian(law.theta[None, :])
    return n, d, j[0, :, 0] / (f[0, 0] if law.space == "log" else 1.0)
