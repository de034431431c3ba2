"""What a plan may trade: size against loss, training against inference, and what it costs to be wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import optimize

from ditscale.errors import InputError
from ditscale.scaling.allocation import Allocation, Estimate

if TYPE_CHECKING:
    from ditscale.scaling.planner import Plan

_FLATNESS = 0.01
_FAR = 1e4
# The most compute that a loss is sought at.
_MOST = 1e40


def compute_for(law: Allocation, target: float) -> float:
    """Least compute that reaches a loss."""

    def gap(log_c: float) -> float:
        best = law.optimum(float(np.exp(log_c)))
        if "loss" not in best:
            raise InputError(f"target-loss: law {law.name} predicts no loss; give --budget")
        return best["loss"].value - target

    low, high = np.log(1e3), np.log(_MOST)
    if gap(high) > 0:
        raise InputError(
            f"target-loss: expected a loss above what the law gives at {_MOST:g} FLOPs ({gap(high) + target:.4g}), got "
            f"{target:g}"
        )
    if gap(low) < 0:
        raise InputError(f"target-loss: expected a loss below what an untrained model has, got {target:g}")
    return float(np.exp(optimize.brentq(gap, low, high, xtol=1e-12)))


def _loss_along(law: Allocation, log_n: Any, budget: float) -> Any:
    n = np.exp(np.asarray(log_n, dtype=float))
    return law.loss_at(n, law.data_for(n, budget))  # type: ignore[misc]


def flatness(out: Plan, law: Allocation) -> None:
    """How far N may leave the optimum, at the same compute, for 1 % more loss."""
    if law.loss_at is None or law.data_for is None:
        return
    middle = np.log(out.params)
    limit = float(_loss_along(law, middle, out.budget)) * (1.0 + _FLATNESS)
    ends = {}
    for name, side in (("smaller", -1.0), ("larger", 1.0)):
        far = middle + side * np.log(_FAR)
        if float(_loss_along(law, far, out.budget)) <= limit:
            ends[name] = float(np.exp(far - middle))
            continue
        edge = optimize.brentq(lambda x: float(_loss_along(law, x, out.budget)) - limit, *sorted((middle, far)))
        ends[name] = float(np.exp(edge - middle))
    out.flatness = {**ends, "loss_increase": _FLATNESS}


def cost_of_being_wrong(out: Plan, law: Allocation, params: Estimate) -> None:
    """Train at either end of N_opt's interval: what loss comes of it, and what compute reaches that at best."""
    if law.loss_at is None or law.data_for is None or params.interval is None:
        return
    base = float(_loss_along(law, np.log(params.value), out.budget))
    rows = {}
    for name, n in (("low", params.interval[0]), ("high", params.interval[1])):
        if not (np.isfinite(n) and n > 0):
            return
        loss = float(_loss_along(law, np.log(n), out.budget))
        if not np.isfinite(loss) or loss < base:
            return
        try:
            reached = compute_for(law, loss)
        except InputError:
            return
        rows[name] = {
            "params": n,
            "loss": loss,
            "wasted_compute": float(max(0.0, 1.0 - reached / out.budget)),
        }
    out.wrong = rows


def with_inference(out: Plan, law: Allocation, forward_units: float) -> None:
    """Least training plus inference compute at the plan's loss (Sardana et al., arXiv:2401.00448).

    A forward pass costs a third of a training pass, so inference costs ``cost(N, 1) / 3`` for each unit of
    data.
    """
    if law.loss_at is None or law.cost is None or out.loss is None or out.data is None:
        out.warnings.append("inference left out: this law has no surface to trade size against data")
        return
    cost, loss_at, goal = law.cost, law.loss_at, float(law.loss_at(out.params, out.data))

    def data_at(log_n: float) -> float:
        n = float(np.exp(log_n))
        low, high = np.log(out.data) - 25.0, np.log(out.data) + 60.0  # type: ignore[arg-type]
        gap = lambda x: float(loss_at(n, np.exp(x))) - goal  # noqa: E731
        if gap(high) > 0:
            return float("inf")
        return float(np.exp(optimize.brentq(gap, low, high, xtol=1e-12)))

    def total(log_n: float) -> float:
        d = data_at(log_n)
        return (
            float(cost(np.exp(log_n), d) + forward_units * cost(np.exp(log_n), 1.0) / 3.0) if np.isfinite(d) else np.inf
        )

    grid = np.log(out.params) + np.linspace(-np.log(300.0), np.log(1.5), 120)
    values = np.array([total(x) for x in grid])
    i = int(np.argmin(values))
    low, high = grid[max(i - 1, 0)], grid[min(i + 1, len(grid) - 1)]
    found = optimize.minimize_scalar(total, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    n, d = float(np.exp(found.x)), data_at(float(found.x))
    plain_total = float(cost(out.params, out.data) + forward_units * cost(out.params, 1.0) / 3.0)
    out.inference = {
        "params": n,
        "data": d,
        "train_flops": float(cost(n, d)),
        "total_flops": float(found.fun),
        "saving": plain_total / float(found.fun),
    }
