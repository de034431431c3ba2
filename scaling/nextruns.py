"""Which runs to make next: those that narrow an interval most for their compute.

A run at (N, D) adds ``j j' / variance`` to what is known of the law's parameters, with j the derivative of its log loss:
optimal design, linearised at the fit. Runs of one budget share that budget's shock, so a second run at a budget says less
about compute than a first run at a new one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ditscale.errors import InputError
from ditscale.scaling.engine import Array
from ditscale.scaling.jsonable import plain
from ditscale.scaling.surface import SurfaceFit

QUANTITIES = ("loss", "params")
_SIZES = np.geomspace(1 / 4, 4, 7)


@dataclass
class NextRuns:
    """Suggested runs, in the order in which to make them.

    Attributes:
        quantity, target: what shall become better known ("loss" or "params" of the optimum), and at which compute.
        runs: params, data, flops, se_after (standard error of the quantity's logarithm once it is made), gain (by how much
            it shrinks, as a share).
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
        return plain(self.__dict__)  # type: ignore[no-any-return]

    def summary(self) -> str:
        """A readable table."""
        lines = [
            f"next runs for the {self.quantity} at {self.target:.4g} FLOPs (standard error now {100 * self.se_before:.3g} %)",
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
    per_compute: bool = True,
) -> NextRuns:
    """Suggest the runs that shrink an interval most.

    Args:
        fit: the surface so far, with compute.
        target: compute at which the quantity matters.
        spend: FLOPs to spend on all suggested runs together.
        quantity: "loss" or "params" of the compute-optimal run at ``target``.
        count: at most so many runs. Default: 4.
        per_compute: choose by gain per FLOP (True) or by gain alone (False). Default: True.

    Returns:
        NextRuns; fewer than ``count`` where the compute is spent.

    Raises:
        InputError: an unknown quantity, values that are not positive, or a fit that allocates nothing.
    """
    if quantity not in QUANTITIES:
        raise InputError(f"quantity: expected loss or params, got {quantity!r}")
    for name, value in (("target", target), ("spend", spend), ("count", count)):
        if not (np.isfinite(value) and value > 0):
            raise InputError(f"{name}: expected a positive number, got {value!r}")
    if fit.cost is None or fit.flops_range is None or not fit.allocates:
        raise InputError("law: expected a surface of N and D fitted with measured compute")
    cost, law = fit.cost, fit.fit
    parts = law.components
    covariance = parts.covariance
    base = float(np.trace(covariance)) / max(len(law.theta), 1)
    known = np.linalg.pinv(covariance + 1e-12 * max(base, 1e-12) * np.eye(len(covariance)), hermitian=True)
    which: Callable[[Array], Array] = lambda th: fit.log_optimum(th, target)[2 if quantity == "loss" else 0]  # noqa: E731
    gradient = law.gradient(which)
    noise, shock = max(parts.run, 1e-12), parts.budget

    lowest = fit.flops_range[0]
    budgets = np.geomspace(lowest, min(spend, target), 16) if spend > lowest else np.array([spend])
    candidates = []
    for c in budgets:
        best = float(np.exp(fit.log_optimum(law.theta[None, :], float(c))[0][0]))
        for n in best * _SIZES:
            d = float(cost.data(c, n))
            model = law.law.model({"params": np.log([n]), "data": np.log([d])}, law.centre)
            f, j = model.value_and_jacobian(law.theta[None, :])
            candidates.append((float(n), d, float(c), j[0, :, 0] / f[0, 0]))

    before = float(np.sqrt(gradient @ np.linalg.solve(known, gradient)))
    at_budget: dict[float, int] = {}
    chosen: list[dict[str, float]] = []
    left, now = float(spend), before
    while len(chosen) < count:
        inverse = np.linalg.inv(known)
        best_score, pick = 0.0, None
        for n, d, c, j in candidates:
            if c > left:
                continue
            # A budget's shock is shared: its later runs carry little of it anew.
            variance = noise + shock / (1 + at_budget.get(c, 0))
            v = inverse @ j
            after = float(gradient @ inverse @ gradient - (gradient @ v) ** 2 / (variance + j @ v))
            gain = 1.0 - np.sqrt(max(after, 0.0)) / now
            score = gain / c if per_compute else gain
            if score > best_score:
                best_score, pick = score, (n, d, c, j, variance, float(np.sqrt(max(after, 0.0))))
        if pick is None:
            break
        n, d, c, j, variance, after_se = pick
        known = known + np.outer(j, j) / variance
        at_budget[c] = at_budget.get(c, 0) + 1
        left -= c
        chosen.append({"params": n, "data": d, "flops": c, "se_after": after_se, "gain": 1.0 - after_se / now})
        now = after_se
    if not chosen:
        raise InputError(f"spend: expected enough for one run of {lowest:.4g} FLOPs, got {spend:.4g}")
    return NextRuns(quantity, float(target), chosen, before, fit.data_unit)
