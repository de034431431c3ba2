"""Intervals that keep their promise: what is uncertain about a fitted quantity, and by how much.

Runs at one budget share more than their compute (a schedule, a batch size, a lucky order of the data), so
their errors may have a common part. The default interval is a delta interval with two variance components,
run noise and budget shock, estimated from the residuals by the method of moments, and Student's t with
Satterthwaite's degrees of freedom: few budgets give few degrees. ``docs/coverage.md`` holds the coverage of
every method, and the command that measures it.
The default ("auto"), by what the runs can tell:

=========================
======================================================================================= runs
    method =========================
    =======================================================================================
under 100, 3+ budgets      "components": run noise and budget shock
under 100, no budgets      "delta": run noise alone, t with n - p degrees
100 and more               "case-t": standard error of the case bootstrap, plus the budget shock where there
are budgets =========================
=======================================================================================
Beside them stand the delete-one-budget "jackknife" with t(G-1), the bootstraps "case" (runs), "cluster"
(budgets; too narrow under about 10 of them), "wild" (residuals), and the "profile" likelihood.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from ditscale.errors import InputError
from ditscale.scaling.engine import Array

if TYPE_CHECKING:
    from ditscale.scaling.results import LawFit

Quantity = Callable[[Array], Array]
METHODS = ("auto", "components", "delta", "case-t", "jackknife", "case", "cluster", "wild", "profile")
# From this many runs on, resampling them shows unequal noise and uneven density better than one common
# variance.
MANY_RUNS = 100
# Below this many points of one budget beyond its own mean, a budget shock cannot be told from run noise.
_MIN_WITHIN_DOF = 3
_MAX_COMPONENT_POINTS = 4000


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval.

    Attributes:
        value: the estimate.
        low, high: the interval's ends.
        se: standard error, on the logarithm where the quantity is positive.
        dof: degrees of freedom of the t quantile, or inf.
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


@dataclass(frozen=True)
class Components:
    """Variance components of a fit, in the fit's residuals.

    Attributes:
        run: variance of one run around its budget.
        budget: variance that all runs of a budget share; 0 where none could be seen.
        dof_run: degrees of freedom of ``run``.
        dof_total: degrees of freedom of all residuals, n - p.
        shared: how many budgets' worth of shared error the fit leaves visible (trace of the projected budget
            design).
        shared_squared: trace of that projected design squared.
        leverage: [n, p], the linear map from errors to internal parameters, transposed.
        groups: the group of each point [n], or None.
    """

    run: float
    budget: float
    dof_run: float
    dof_total: float
    shared: float
    shared_squared: float
    leverage: Array
    groups: NDArray[np.int64] | None

    @property
    def covariance(self) -> Array:
        """Covariance of the internal parameters [p, p]."""
        return self.variance_of(np.eye(self.leverage.shape[1]))

    def variance_of(self, gradient: Array) -> Array:
        """Covariance of linear functions of the internal parameters, gradients [q, p]."""
        c = self.leverage @ np.atleast_2d(gradient).T
        return self.run * (c.T @ c) + self._shock_of(c)

    def _shock_of(self, c: Array) -> Array:
        if self.groups is None or self.budget == 0:
            return np.zeros((c.shape[1], c.shape[1]))
        z = _group_sums(c, self.groups)
        return self.budget * (z.T @ z)

    def shock_of(self, gradient: Array) -> float:
        """The part of ``variance_of`` that the budget shock makes, for one gradient [p]."""
        return float(self._shock_of(self.leverage @ gradient[:, None])[0, 0])

    def degrees(self, gradient: Array, *, extra_run: float = 0.0, extra_budget: float = 0.0) -> float:
        """Satterthwaite's degrees of freedom of ``variance_of(gradient) + extra_run*run +
        extra_budget*budget``.
        """
        c = self.leverage @ gradient
        a = float(c @ c) + extra_run
        if self.groups is None:
            return self.dof_total
        b = float((_group_sums(c, self.groups) ** 2).sum()) + extra_budget
        if self.shared <= 0:
            return self.dof_total
        f2 = b / self.shared
        f1 = (a - f2 * self.dof_total) / self.dof_run
        run, budget = self.run, self.budget
        spread = 2.0 * (
            f1**2 * run**2 * self.dof_run
            + 2.0 * f1 * f2 * run**2 * self.dof_run
            + f2**2 * (run**2 * self.dof_total + 2.0 * run * budget * self.shared + budget**2 * self.shared_squared)
        )
        mean = a * run + b * budget
        if spread <= 0 or mean <= 0:
            return self.dof_total
        degrees = 2.0 * mean**2 / spread
        if budget == 0:
            # No shock was seen, but few budgets could have hidden one. All residuals' degrees would forget
            # that, the components' alone overstate it: their geometric mean held its level in simulation
            # (docs/coverage.md).
            degrees = np.sqrt(degrees * self.dof_total)
        return float(np.clip(degrees, 1.0, self.dof_total))


def components(jacobian: Array, errors: Array, groups: NDArray[np.int64] | None) -> Components:
    """Estimate run noise and budget shock by the method of moments from a linearised fit.

    Args:
        jacobian: [n, p] derivatives of the residuals.
        errors: [n] residuals (for a robust loss, psi(r) / mean psi').
        groups: budget index of each point [n], or None for independent points.
    """
    n, p = jacobian.shape
    u, s, vt = np.linalg.svd(jacobian, full_matrices=False)
    good = s > s[0] * 1e-9 if s.size else s > 0
    rank = int(good.sum())
    leverage = u[:, good] @ (vt[good] / s[good, None])
    left = errors - u[:, good] @ (u[:, good].T @ errors)
    dof = max(n - rank, 0)
    total = float(left @ left)
    plain = total / dof if dof else float("nan")
    alone = Components(plain, 0.0, float(dof), float(dof), 0.0, 0.0, leverage, None)
    if groups is None or n > _MAX_COMPONENT_POINTS or dof < 2:
        return alone
    count = int(groups.max()) + 1
    z = np.zeros((n, count))
    z[np.arange(n), groups] = 1.0
    mz = z - u[:, good] @ (u[:, good].T @ z)
    q, sz, _ = np.linalg.svd(mz, full_matrices=False)
    q = q[:, sz > 1e-7 * np.sqrt(n)]
    within_left = left - q @ (q.T @ left)
    dof_within = dof - q.shape[1]
    if dof_within < _MIN_WITHIN_DOF or count < 3 or q.shape[1] == 0:
        return alone
    run = float(within_left @ within_left) / dof_within
    k = z.T @ mz
    shared = float(np.trace(k))
    budget = max((total - run * dof) / shared, 0.0)
    if budget == 0.0:
        run = plain
    return Components(run, budget, float(dof_within), float(dof), shared, float((k * k).sum()), leverage, groups)


def _group_sums(values: Array, groups: NDArray[np.int64]) -> Array:
    sums = np.zeros((int(groups.max()) + 1, *values.shape[1:]))
    np.add.at(sums, groups, values)
    return sums


def gradient_of(quantity: Quantity, theta: Array, scale: Array) -> Array:
    """Numerical gradient of a quantity by central differences, steps in each parameter's own standard
    error.
    """
    p = len(theta)
    h = np.where(scale > 0, 1e-4 * np.minimum(scale, 1e3), 1e-6)
    h = np.maximum(h, 1e-9 * np.maximum(np.abs(theta), 1e-3))
    points = np.concatenate([theta + np.diag(h), theta - np.diag(h)])
    values = quantity(points)
    return (values[:p] - values[p:]) / (2.0 * h)


def t_interval(value: float, se: float, dof: float, *, log: bool, level: float, method: str) -> Interval:
    """A symmetric t interval, on the logarithm where ``log`` (``se`` is then the logarithm's)."""
    reach = float(stats.t.ppf(0.5 + level / 2, dof) * se) if np.isfinite(se) and dof > 0 else float("inf")
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
        method: one of ``METHODS``; see the module's table for "auto".
        level: nominal coverage. Default: 0.95.
        new_run: add the noise of one new run at a new budget (for predicted losses on the fit's own scale); a
            number is the share of a run's variance, such as 0.2 for the mean of five runs of one budget.
    """
    if method not in METHODS:
        raise InputError(f"intervals: expected one of {', '.join(METHODS)}, got {method!r}")
    if not 0 < level < 1:
        raise InputError(f"level: expected a number between 0 and 1, got {level!r}")

    def on_scale(theta: Array) -> Array:
        with np.errstate(all="ignore"):
            values = quantity(theta)
            return np.log(values) if log else values

    with np.errstate(all="ignore"):
        value = float(quantity(fit.theta[None, :])[0])
    if method == "auto":
        method = "case-t" if fit.n >= MANY_RUNS else "components"
    parts = fit.components_for(method)
    share = float(new_run)
    run_noise = share * parts.run + parts.budget if share else 0.0

    if method in ("components", "delta", "case-t"):
        gradient = fit.gradient(on_scale)
        if method == "case-t":
            values = on_scale(fit.bootstrap("case"))
            # Half the middle 68 %: a resample that lost the runs that determine a parameter must not set its
            # spread.
            low, high = np.nanquantile(values, [0.1587, 0.8413])
            variance = (0.5 * (high - low)) ** 2 + parts.shock_of(gradient)
        else:
            variance = float(parts.variance_of(gradient)[0, 0])
        dof = parts.degrees(gradient, extra_run=share, extra_budget=1.0 if share else 0.0)
        name = "delta" if method == "components" and parts.groups is None else method
        return t_interval(value, float(np.sqrt(variance + run_noise)), dof, log=log, level=level, method=name)
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
