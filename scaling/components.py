"""What scatters runs around a law: noise of each run, and a shock that all runs of one budget share.

Runs of a budget share more than their compute (a schedule, a batch size, a lucky order of the data), so their errors
may have a common part. Few budgets cannot tell how large it is, and to call it zero because it was not seen is what
makes intervals of extrapolated losses too narrow. So the ratio of shock to noise is averaged over instead of
estimated: every ratio gets its likelihood, given the residuals, times a prior of even odds that there is no shock at
all and else a half-Cauchy distribution with scale 2 (Gelman 2006 for the family). Given the ratio, the error of a
fitted quantity is Student's t; on average it is a mixture of them. How often the resulting intervals hold stands in
``docs/coverage.md``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from ditscale.scaling.engine import Array

_NO_SHOCK = 0.5
_SCALE = 2.0
_RATIOS = np.geomspace(0.02, 2000.0, 72)
# Below this many degrees of freedom within budgets, a shock cannot be told from run noise.
_MIN_WITHIN_DOF = 3
# Least share of a shock, of what the most visible direction shows, that the residuals must show.
_VISIBLE = 0.1
# Points times budgets up to which the shared part is worked out; beyond it runs count as independent.
_MOST_NUMBERS = 20_000_000
# Of Newton's method for a quantile; it takes five.
_MOST_STEPS = 100


@dataclass(frozen=True)
class Spread:
    """Distribution of an error around 0: a mixture of Student t.

    Attributes:
        scales, weights: of the parts [m].
        dof: degrees of freedom of each.
    """

    scales: Array
    weights: Array
    dof: float

    def reach(self, level: float) -> float:
        """Half the width of the central interval that holds ``level`` of it."""
        if self.dof <= 0 or not np.all(np.isfinite(self.scales)):
            return float("inf")
        quantile = float(special.stdtrit(self.dof, 0.5 + level / 2))
        low, high = quantile * float(self.scales.min()), quantile * float(self.scales.max())
        if high - low <= 1e-12 * high:
            return high
        # What lies beyond x falls and is convex: after its first step Newton's method comes from below, passing nothing.
        scales = np.maximum(self.scales, 1e-300)
        x = quantile * float(self.weights @ scales)
        peak = np.exp(special.gammaln((self.dof + 1) / 2) - special.gammaln(self.dof / 2)) / np.sqrt(np.pi * self.dof)
        for _ in range(_MOST_STEPS):
            z = x / scales
            beyond = 2.0 * float(self.weights @ special.stdtr(self.dof, -z)) - (1.0 - level)
            with np.errstate(over="ignore"):  # far beyond a narrow part, whose density there is zero
                density = peak * np.exp(-(self.dof + 1) / 2 * np.log1p(z * z / self.dof)) / scales
            step = beyond / (2.0 * float(self.weights @ density))
            x = min(max(x + step, low), high)
            if abs(step) <= 1e-11 * x:
                break
        return x

    def student(self, wide: float | None = None) -> tuple[float, float]:
        """(scale, dof) of the one t distribution whose central 68.27 % and 95 % are those of the mixture.

        ``wide`` is ``reach(0.95)`` where it is known.
        """
        wide = self.reach(0.95) if wide is None else wide
        if not 0 < wide < np.inf:
            return wide, self.dof
        ratio = wide / self.reach(0.6827)

        def excess(dof: float) -> float:
            return float(special.stdtrit(dof, 0.975) / special.stdtrit(dof, 0.84135)) - ratio

        if excess(1.0) <= 0:
            dof = 1.0
        elif self.dof <= 1 or excess(self.dof) >= 0:
            dof = self.dof
        else:
            dof = float(optimize.brentq(excess, 1.0, self.dof, xtol=1e-6))
        return wide / float(special.stdtrit(dof, 0.975)), dof


@dataclass(frozen=True)
class Components:
    """Variance components of a fit, in the fit's residuals.

    Attributes:
        ratios: squared ratios of shock to run noise that were weighed [m]; one 0 where no shock can be seen.
        weights: how likely each is [m].
        noise: variance of one run around its budget, given each ratio [m].
        dof: degrees of freedom of the residuals that ``noise`` rests on, n - p or a little less.
        leverage: [n, p], the linear map from errors to internal parameters, transposed.
        design: [n, G], how a unit shock of each budget acts on the errors, or None without budgets.
        blind: [k, p], directions of the parameters in which no point moves, such as a vanished term's exponent.
        size: [p], how far a unit of each parameter moves the points.
    """

    ratios: Array
    weights: Array
    noise: Array
    dof: float
    leverage: Array
    design: Array | None
    blind: Array
    size: Array

    @property
    def run(self) -> float:
        """Variance of one run around its budget."""
        return float(self.weights @ self.noise)

    @property
    def budget(self) -> float:
        """Variance that all runs of a budget share."""
        return float(self.weights @ (self.noise * self.ratios))

    @property
    def covariance(self) -> Array:
        """Covariance of the internal parameters [p, p]."""
        total: Array = self.run * (self.leverage.T @ self.leverage)
        if self.design is not None:
            z = self.design.T @ self.leverage
            total = total + self.budget * (z.T @ z)
        return total

    def spread(
        self, gradient: Array, *, extra_run: float = 0.0, extra_budget: float = 0.0, variance: float | None = None
    ) -> Spread:
        """Distribution of the error of a linear function of the internal parameters.

        Args:
            gradient: of the function [p].
            extra_run, extra_budget: variance to add, in units of a run's and of a shock's.
            variance: of the function by run noise, where it was found another way. Default: from the leverage.
        """
        scaled = gradient / self.size
        if np.abs(self.blind @ gradient).max(initial=0.0) > 1e-6 * float(np.linalg.norm(scaled)):
            # It hangs on what the points do not tell.
            return Spread(np.full_like(self.noise, np.inf), self.weights, self.dof)
        c = self.leverage @ gradient
        own = float(c @ c) * self.noise if variance is None else np.full_like(self.noise, variance)
        shared = 0.0 if self.design is None else float(((self.design.T @ c) ** 2).sum())
        total = own + self.noise * (extra_run + self.ratios * (shared + extra_budget))
        return Spread(np.sqrt(total), self.weights, self.dof)


def components(
    jacobian: Array,
    errors: Array,
    groups: NDArray[np.int64] | None,
    *,
    weights: Array | None = None,
    least: float = 0.0,
) -> Components:
    """Weigh the ratios of shock to noise from a linearised fit.

    Args:
        jacobian: [n, p] derivatives of the residuals.
        errors: [n] residuals (for a robust loss, psi(r) / mean psi').
        groups: budget of each point [n] as 0, 1, ..., or None for independent points.
        weights: of the points [n], mean 1: a run's noise has variance inverse to its weight, a shock has not.
        least: variance of a run is not taken to be smaller than this.
    """
    n = len(errors)
    root = np.ones(n) if weights is None else np.sqrt(weights)
    jacobian, errors = jacobian * root[:, None], errors * root
    size = np.linalg.norm(jacobian, axis=0)
    told = size > 1e-12 * size.max(initial=0.0)
    size = np.where(told, size, 1.0)
    u, s, vt = np.linalg.svd(jacobian * told / size, full_matrices=n < len(size))
    good = np.zeros(len(size), dtype=bool)
    good[: len(s)] = s > 1e-9 * s.max(initial=0.0)
    u = u[:, : len(s)][:, good[: len(s)]]
    leverage = u @ (vt[good] / s[good[: len(s)], None]) / size
    blind = vt[~good] / size
    left = errors - u @ (u.T @ errors)
    dof = float(n - good.sum())
    plain = float(left @ left) / dof if dof > 0 else float("nan")
    alone = Components(np.zeros(1), np.ones(1), np.maximum([plain], least), dof, leverage, None, blind, size)
    count = 0 if groups is None else int(groups.max()) + 1
    if groups is None or count < 3 or n * count > _MOST_NUMBERS or not plain > 0:
        return alone
    z = np.zeros((n, count))
    z[np.arange(n), groups] = root
    mz = z - u @ (u.T @ z)
    q, sz, _ = np.linalg.svd(mz, full_matrices=False)
    q = q[:, sz > 1e-7 * np.sqrt(n)]
    if dof - q.shape[1] < _MIN_WITHIN_DOF or q.shape[1] == 0:
        return alone
    # In these coordinates a shock multiplies the variance of the visible shared directions by 1 + eigenvalue * ratio.
    qz = q.T @ z
    eigenvalues, turn = np.linalg.eigh(qz @ qz.T)
    along = (turn.T @ (q.T @ left)) ** 2
    within = max(float(left @ left) - float(along.sum()), 0.0)
    # A direction of shocks that the parameters all but absorb tells of the law's form more than of shocks; it is left out.
    seen = eigenvalues > _VISIBLE * eigenvalues.max()
    eigenvalues, along, dof = eigenvalues[seen], along[seen], dof - float((~seen).sum())
    ratios = np.concatenate([[0.0], _RATIOS**2])
    density = _RATIOS / (1.0 + (_RATIOS / _SCALE) ** 2)  # half-Cauchy on equal steps of the logarithm
    prior = np.concatenate([[_NO_SHOCK], (1.0 - _NO_SHOCK) * density / density.sum()])
    grown = 1.0 + eigenvalues * ratios[:, None]
    squares = within + (along / grown).sum(1)
    log_weight = np.log(prior) - 0.5 * np.log(grown).sum(1) - 0.5 * dof * np.log(np.maximum(squares, 1e-300))
    weights = np.exp(log_weight - log_weight.max())
    return Components(
        ratios=ratios,
        weights=weights / weights.sum(),
        noise=np.maximum(squares / dof, least),
        dof=dof,
        leverage=leverage,
        design=z,
        blind=blind,
        size=size,
    )


def evenness(residuals: Array, groups: NDArray[np.int64]) -> tuple[Array, float]:
    """Spread of each budget's residuals around their median, and the p-value that all budgets have one spread.

    Two tests, of Fligner and Killeen (1976) against any difference and of a trend with the budgets' order, the lesser
    p-value doubled. Both compare ranks of the deviations' sizes, so that one wild run does not pass for a noisy budget.
    """
    members = [residuals[groups == k] for k in range(int(groups.max()) + 1)]
    sizes = np.concatenate([np.abs(r - np.median(r)) for r in members])
    counts = np.array([len(r) for r in members])
    place = np.repeat(np.arange(len(members)), counts)
    spread = np.sqrt(np.bincount(place, sizes**2) / np.maximum(counts - 1, 1))
    scores = special.ndtri(0.5 + stats.rankdata(sizes) / (2.0 * (len(sizes) + 1.0)))
    scores -= scores.mean()
    variance, along = float(scores.var(ddof=1)), place - place.mean()
    if not variance > 0:
        return spread, 1.0
    anyhow = float((np.bincount(place, scores) ** 2 / counts).sum()) / variance
    trend = float(along @ scores) ** 2 / variance / float(along @ along)
    least = min(special.chdtrc(len(counts) - 1, anyhow), special.chdtrc(1, trend))
    return spread, min(1.0, 2.0 * float(least))
