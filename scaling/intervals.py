"""Intervals that keep their promise: what is uncertain about a fitted quantity, and by how much.

The default ("auto") follows what the runs can tell:

- under 100 runs in 3 or more budgets, "components": run noise and budget shock (see ``components.py``);
- the same, where the noise of 4 or more budgets differs beyond chance (``components.evenness``, 5 %), "jackknife": leave
  one budget out at a time, t with G - 1 degrees, which assumes no common noise;
- under 100 runs without budgets, "delta": run noise alone, t with n - p degrees of freedom;
- 100 runs and more, "case-t": the spread of the case bootstrap, plus the budget shock where there are budgets.

Beside them stand the bootstraps "case" (runs), "cluster" (budgets; too narrow under about 10 of them) and "wild"
(residuals), and the "profile" likelihood. ``docs/coverage.md`` holds the coverage of every method, and the command that
measures it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import optimize, stats

from ditscale.errors import InputError
from ditscale.scaling.components import Spread
from ditscale.scaling.engine import Array

if TYPE_CHECKING:
    from ditscale.scaling.results import LawFit

Quantity = Callable[[Array], Array]
METHODS = ("auto", "components", "delta", "case-t", "jackknife", "case", "cluster", "wild", "profile")
# From this many runs on, resampling them shows unequal noise and uneven density better than one common variance.
MANY_RUNS = 100
UNEVEN = 0.05


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    Attributes:
        value: the estimate.
        low, high: the interval's ends.
        se: standard error, on the logarithm where the interval was built there.
        dof: degrees of freedom of the t distribution that ``se`` goes with, or inf.
        method: how it was made.
        level: nominal coverage.
    """

    value: float
    low: float
    high: float
    se: float
    dof: float
    method: str
    level: float = 0.95

    @property
    def ends(self) -> list[float]:
        """``[low, high]``."""
        return [self.low, self.high]


def gradient_of(quantity: Quantity, theta: Array, scale: Array) -> Array:
    """Numerical gradient of a quantity by central differences, steps in each parameter's own standard error."""
    p = len(theta)
    h = np.where(scale > 0, 1e-4 * np.minimum(scale, 1e3), 1e-6)
    h = np.maximum(h, 1e-9 * np.maximum(np.abs(theta), 1e-3))
    points = np.concatenate([theta + np.diag(h), theta - np.diag(h)])
    values = quantity(points)
    return (values[:p] - values[p:]) / (2.0 * h)


def spread_interval(value: float, spread: Spread, *, log: bool, level: float, method: str) -> Interval:
    """A symmetric interval from the distribution of the error (on the logarithm where ``log``)."""
    reach = spread.reach(level)
    se, dof = spread.student(reach if level == 0.95 else None)
    return _around(value, reach, se, dof, log=log, level=level, method=method)


def t_interval(value: float, se: float, dof: float, *, log: bool, level: float, method: str) -> Interval:
    """A symmetric t interval, on the logarithm where ``log`` (``se`` is then the logarithm's)."""
    reach = float(stats.t.ppf(0.5 + level / 2, dof) * se) if np.isfinite(se) and dof > 0 else float("inf")
    return _around(value, reach, se, dof, log=log, level=level, method=method)


def _around(value: float, reach: float, se: float, dof: float, *, log: bool, level: float, method: str) -> Interval:
    if log:
        with np.errstate(over="ignore"):
            return Interval(value, value * float(np.exp(-reach)), value * float(np.exp(reach)), se, dof, method, level)
    return Interval(value, value - reach, value + reach, se, dof, method, level)


@np.errstate(all="ignore")  # an interval may be infinite, and says so by being it
def interval_of(
    fit: LawFit,
    quantity: Quantity,
    *,
    log: bool = False,
    method: str = "auto",
    level: float = 0.95,
    new_run: bool | float = False,
) -> Interval:
    """The interval of any quantity of a fit's internal parameters.

    Args:
        fit: the fit.
        quantity: internal parameters [S, p] -> values [S].
        log: whether to build the interval on the logarithm (positive quantities).
        method: one of ``METHODS``; what "auto" takes stands at the top of this module.
        level: nominal coverage. Default: 0.95.
        new_run: add the noise of one new run at a new budget (for predicted losses on the fit's own scale); a
            number is the share of a run's variance, such as 0.2 for the mean of five runs of one budget.
    """
    if method not in METHODS:
        raise InputError(f"intervals: expected one of {', '.join(METHODS)}, got {method!r}")
    if not 0 < level < 1:
        raise InputError(f"level: expected a number between 0 and 1, got {level!r}")

    def on_scale(theta: Array) -> Array:
        values = quantity(theta)
        return np.log(values) if log else values

    value = float(quantity(fit.theta[None, :])[0])
    if method == "auto":
        method = "case-t" if fit.n >= MANY_RUNS else "jackknife" if fit.uneven else "components"
    parts = fit.components_for(method)
    share = float(new_run)
    run_noise = share * parts.run + parts.budget if share else 0.0

    if method in ("components", "delta", "case-t"):
        gradient = fit.gradient(on_scale)
        variance = None
        if method == "case-t":
            values = on_scale(fit.bootstrap("case"))
            # Half the middle 68 %: a resample that lost the runs that determine a parameter must not set its spread.
            low, high = np.nanquantile(values, [0.1587, 0.8413])
            variance = float(0.5 * (high - low)) ** 2
        spread = parts.spread(gradient, extra_run=share, extra_budget=1.0 if share else 0.0, variance=variance)
        name = "delta" if method == "components" and parts.design is None else method
        return spread_interval(value, spread, log=log, level=level, method=name)
    if method == "jackknife":
        replicates = fit.jackknife()
        values = on_scale(replicates)
        g = len(values)
        se = float(np.sqrt((g - 1) / g * ((values - values.mean()) ** 2).sum() + run_noise))
        return t_interval(value, se, g - 1, log=log, level=level, method=method)
    if method == "profile":
        return profile_interval(fit, on_scale, value, log=log, level=level)
    values = on_scale(fit.bootstrap(method))
    if new_run:
        values = values + np.sqrt(run_noise) * np.random.default_rng(fit.seed + 1).standard_normal(len(values))
    values = values[np.isfinite(values)]
    low, high = np.quantile(values, [0.5 - level / 2, 0.5 + level / 2])
    if log:
        low, high = np.exp(low), np.exp(high)
    return Interval(value, float(low), float(high), float(values.std(ddof=1)), float("inf"), method, level)


def profile_interval(fit: LawFit, quantity: Quantity, value: float, *, log: bool, level: float) -> Interval:
    """The values of a quantity that a likelihood-ratio test does not reject, all other parameters refitted.

    The test compares ``2 (objective(value) - objective) * mean psi' / mean psi²`` with the squared t quantile
    of n - p degrees; for least squares that is the F test. Runs count as independent: it knows no budget
    shock.
    """
    theta, scale = fit.theta, np.maximum(np.sqrt(np.diag(fit.components_for("delta").covariance)), 1e-12)
    dof = fit.n - len(theta)
    if dof < 1:
        return Interval(value, float("-inf"), float("inf"), float("nan"), 0.0, "profile", level)
    limit = float(stats.t.ppf(0.5 + level / 2, dof))
    unit = fit.objective_scale
    base = fit.objective_at(theta)
    here = float(quantity(theta[None, :])[0])
    gradient = fit.gradient(quantity) * scale
    reach = float(np.linalg.norm(gradient)) or 1e-12
    lower, upper = (fit.bounds[0] - theta) / scale, (fit.bounds[1] - theta) / scale
    start = np.zeros_like(theta)

    def root(target: float) -> float:
        """Signed root of the test statistic with the quantity held at ``target``."""
        found = optimize.minimize(
            lambda u: (fit.objective_at(theta + u * scale) - base) / unit,
            np.clip(start + gradient * (target - here) / reach**2, lower, upper),
            jac=lambda u: fit.gradient_at(theta + u * scale) * scale / unit,
            bounds=list(zip(lower, upper, strict=True)),
            constraints={
                "type": "eq",
                "fun": lambda u: (float(quantity((theta + u * scale)[None, :])[0]) - target) / reach,
            },
            method="SLSQP",
            options={"maxiter": 300, "ftol": 1e-10},
        )
        return float(np.sqrt(max(found.fun, 0.0)))

    def end(side: float) -> float:
        """Where the signed root reaches the limit, doubling the step until it does."""
        step, inside = reach * limit, 0.0
        for _ in range(12):
            if root(here + side * step) > limit:
                found = optimize.brentq(lambda d: root(here + side * d) - limit, inside, step, rtol=1e-4)
                return here + side * float(found)
            inside, step = step, 2.0 * step
        return side * float("inf")

    ends = [end(-1.0), end(1.0)]
    low, high = (float(np.exp(e)) for e in ends) if log else (float(e) for e in ends)
    return Interval(value, low, high, reach, float(dof), "profile", level)
