"""Refits to resampled data: bootstraps of runs, budgets and residuals, and the delete-one jackknife."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ditscale.errors import InputError
from ditscale.scaling import engine
from ditscale.scaling.engine import Array

if TYPE_CHECKING:
    from ditscale.scaling.results import LawFit

KINDS = ("case", "cluster", "wild")
# Draws times points held at once, and refitted by default.
_AT_ONCE = 4_000_000
_ENOUGH = 40_000_000
_LEAST_DRAWS, _MOST_DRAWS = 100, 1000
# Leaving out one run at a time refits as often as there are runs.
_MOST_SINGLES = 2000


def default_draws(points: int) -> int:
    """How many draws a bootstrap makes where none were asked for: 1000, fewer above 40,000 points, never below 100."""
    return min(_MOST_DRAWS, max(_LEAST_DRAWS, _ENOUGH // points))


def bootstrap(fit: LawFit, kind: str, draws: int, seed: int) -> Array:
    """Internal parameters [draws, p] refitted to resampled data; see :meth:`LawFit.bootstrap`."""
    if kind not in KINDS:
        raise InputError(f"bootstrap: expected case, cluster or wild, got {kind!r}")
    groups = _budgets(fit) if kind == "cluster" else None
    rng = np.random.default_rng(seed)
    some = max(1, _AT_ONCE // fit.n)
    parts = [_refit(fit, *_resample(fit, kind, groups, rng, min(some, draws - done))) for done in range(0, draws, some)]
    return np.concatenate(parts)


def jackknife(fit: LawFit) -> Array:
    """Refits without one budget at a time, one run at a time where there are no budgets [G, p]."""
    if fit.groups is None and fit.n > _MOST_SINGLES:
        raise InputError(
            f"intervals: expected at most {_MOST_SINGLES:,} runs for a jackknife without budgets, got {fit.n}"
        )
    groups = np.arange(fit.n) if fit.groups is None else fit.groups
    count = int(groups.max()) + 1
    return _refit(fit, (groups[None, :] != np.arange(count)[:, None]) * fit.weights, fit.target)


def _resample(
    fit: LawFit, kind: str, groups: NDArray[np.int64] | None, rng: np.random.Generator, draws: int
) -> tuple[Array, Array]:
    """Weights and targets of some draws, [draws, n] each or the fit's own."""
    if kind == "wild":
        signs = rng.choice([-1.0, 1.0], size=(draws, fit.n))[:, _places(fit)]
        moved = signs * fit.residuals * np.sqrt(fit.n / max(fit.n - len(fit.theta), 1))
        fitted = fit.fitted
        target = fitted * np.exp(moved) if fit.space == "log" else np.maximum(fitted + moved, 1e-300)
        return np.broadcast_to(fit.weights, (draws, fit.n)), target
    count = fit.n if groups is None else int(groups.max()) + 1
    counts = rng.multinomial(count, np.full(count, 1 / count), size=draws)
    return counts[:, _places(fit) if groups is None else groups] * fit.weights, fit.target


def _places(fit: LawFit) -> NDArray[np.int64]:
    """Every point's place in an order that is the points' own, so that rows in another order have the same draws."""
    groups = np.zeros(fit.n) if fit.groups is None else fit.groups
    order = np.lexsort((fit.weights, fit.target, *reversed(fit.inputs.values()), groups))
    return np.argsort(order)


def _refit(fit: LawFit, weights: Array, target: Array) -> Array:
    start = np.repeat(fit.theta[None, :], len(weights), axis=0)
    return engine.minimise(fit.bounded_model(), target, fit.loss, start, weights=weights, space=fit.space).theta


def _budgets(fit: LawFit) -> NDArray[np.int64]:
    if fit.groups is None:
        raise InputError("budget: expected a column of budgets for a cluster bootstrap, got none")
    return fit.groups
