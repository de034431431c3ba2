"""One engine for every law: batched Levenberg-Marquardt with certificates, all starts and replicates at once.

Why not scipy: its L-BFGS-B stops when the objective changes by less than ``ftol * max(|f|, 1)``. A sum
of Huber losses with a knee of 1e-3 is about 1e-3, so that test is absolute, stops early, and reports success.
Here a fit has converged only when the Newton decrement (how much lower the objective could still go) is
negligible against the objective itself. Everything is relative, so sums, means and units give the same
parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ditscale.scaling.losses import Loss

Array = NDArray[np.float64]
Rows: TypeAlias = "NDArray[np.int64] | slice"

# A batch is worked through in pieces whose Jacobian (pieces x parameters x points) stays in the cache.
_CHUNK_NUMBERS = 120_000
_TINY = 1e-300


class Model(Protocol):
    """A law at given inputs, as the engine sees it: S parameter vectors in, S curves of n points out."""

    lower: Array
    upper: Array

    def value(self, theta: Array) -> Array:
        """Predictions [S, n], all positive, for parameters [S, p]."""

    def value_and_jacobian(self, theta: Array) -> tuple[Array, Array]:
        """Predictions [S, n] and their derivatives [S, p, n]."""


@dataclass(frozen=True)
class Solution:
    """What the engine found for each of S problems.

    Attributes:
        theta: parameters [S, p].
        objective: weighted sum of losses [S].
        converged: whether the certificate holds [S].
        decrement: how much lower the objective could still go by its own quadratic model, relative to it [S].
        kkt: largest scaled gradient component, relative to the objective's curvature [S].
        at_bound: -1 at the lower bound, +1 at the upper, 0 inside [S, p].
        iterations: steps tried [S].
    """

    theta: Array
    objective: Array
    converged: NDArray[np.bool_]
    decrement: Array
    kkt: Array
    at_bound: NDArray[np.int8]
    iterations: NDArray[np.int64]

    def take(self, index: NDArray[np.int64]) -> Solution:
        """The solutions of some problems."""
        return Solution(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def minimise(
    model: Model,
    target: Array,
    loss: Loss,
    start: Array,
    *,
    weights: Array | None = None,
    space: str = "log",
    max_steps: int = 300,
    tolerance: float = 1e-13,
) -> Solution:
    """Minimise the weighted sum of losses from every start, independently.

    Args:
        model: the law at the points.
        target: measured values, positive, [n], or [S, n] where every problem has its own.
        loss: which loss, its scale set.
        start: [S, p].
        weights: [S, n] or [n], non-negative; a bootstrap replicate is a row of counts. Default: ones.
        space: "log" or "raw" residuals.
        max_steps: steps tried for each problem. Default: 300.
        tolerance: Newton decrement, relative to the objective, below which a problem has converged.

    Returns:
        Solution, in the order of the starts.
    """
    start = np.atleast_2d(np.asarray(start, dtype=float))
    n = target.shape[-1]
    goal = np.log(target) if space == "log" else target
    if weights is not None and weights.ndim == 1:
        weights = np.broadcast_to(weights, (len(start), n))
    size = max(1, _CHUNK_NUMBERS // (n * start.shape[1]))
    parts = []
    for first in range(0, len(start), size):
        rows = slice(first, first + size)
        piece = Problem(
            model,
            goal[rows] if goal.ndim == 2 else goal,
            loss,
            None if weights is None else weights[rows],
            space,
        )
        parts.append(_solve(piece, start[rows], max_steps, tolerance))
    return Solution(*(np.concatenate([getattr(p, name) for p in parts]) for name in Solution.__dataclass_fields__))


def descend(
    model: Model,
    target: Array,
    loss: Loss,
    start: Array,
    *,
    sigma: float,
    weights: Array | None = None,
    space: str = "log",
) -> tuple[Solution, Loss]:
    """:func:`minimise` for losses with a sharp knee: it comes down in steps of three from the residuals' spread.

    Least absolute deviations ("l1") has no curvature at all, and a Huber loss whose knee is far below the residuals
    has almost none: its optimum passes exactly through p points. Following the optimum as the knee sharpens finds it.

    Returns:
        The solution and the loss that it minimises: for "l1" a Huber loss whose knee is 1e-8 spreads.
    """
    sharp = loss
    if loss.kind == "l1":
        sharp = Loss("huber", max(1e-8 * sigma, 1e-15))
    if sharp.kind in ("huber", "envelope") and sharp.scale is not None:
        knee = sigma
        while knee > 6.0 * sharp.scale:
            start = minimise(model, target, sharp.with_scale(knee), start, weights=weights, space=space).theta
            knee /= 3.0
    return minimise(model, target, sharp, start, weights=weights, space=space), sharp


@dataclass(frozen=True)
class Problem:
    """A law at points with its loss: the objective and its derivatives for many parameter vectors at once."""

    model: Model
    goal: Array
    loss: Loss
    weights: Array | None
    space: str

    def _goal(self, index: Rows) -> Array:
        return self.goal if self.goal.ndim == 1 else self.goal[index]

    def _weights(self, index: Rows) -> Array | None:
        return self.weights if self.weights is None or self.weights.ndim == 1 else self.weights[index]

    def objective(self, theta: Array, index: Rows) -> Array:
        """The weighted sum of losses [S]; ``index`` picks rows of goal and weights where each problem has its own."""
        f = self.model.value(theta)
        with np.errstate(all="ignore"):
            r = (np.log(f) if self.space == "log" else f) - self._goal(index)
            cost = self.loss.rho(r)
            weights = self._weights(index)
            total = cost.sum(-1) if weights is None else (cost * weights).sum(-1)
        return np.where(np.isfinite(total), total, np.inf)

    def derivatives(self, theta: Array, index: Rows) -> tuple[Array, Array, Array]:
        """Gradient [S, p], generalised Hessian [S, p, p] and the diagonal that scales the damping [S, p]."""
        f, jacobian = self.model.value_and_jacobian(theta)
        with np.errstate(all="ignore"):
            if self.space == "log":
                jacobian = jacobian / f[:, None, :]
                f = np.log(f)
            r = f - self._goal(index)
            slope, bend = self.loss.psi(r), self.loss.curvature(r)
            # Points beyond a knee have no curvature of their own, yet the damping must know how the fit moves them.
            scale = np.maximum(bend, np.abs(slope) / np.maximum(np.abs(r), _TINY))
        weights = self._weights(index)
        if weights is not None:
            slope, bend, scale = slope * weights, bend * weights, scale * weights
        gradient = np.matmul(jacobian, slope[:, :, None])[:, :, 0]
        hessian = np.matmul(jacobian * bend[:, None, :], jacobian.transpose(0, 2, 1))
        diagonal = np.einsum("spn,spn,sn->sp", jacobian, jacobian, scale)
        return gradient, hessian, diagonal

    def floor(self, index: Rows, count: int) -> Array:
        """The objective that rounding alone leaves on a perfect fit; below it nothing can be told apart."""
        weights = self._weights(index)
        eps = self._eps(index)
        cost = self.loss.rho(np.broadcast_to(eps, (count, eps.shape[-1])))
        return cost.sum(-1) if weights is None else (cost * weights).sum(-1)

    def rounding(self, theta: Array, index: Rows) -> Array:
        """By how much rounding of the residuals may move the objective [S]."""
        f = self.model.value(theta)
        with np.errstate(all="ignore"):
            r = (np.log(f) if self.space == "log" else f) - self._goal(index)
            moved = np.abs(self.loss.psi(r)) * self._eps(index)
        weights = self._weights(index)
        total: Array = moved.sum(-1) if weights is None else (moved * weights).sum(-1)
        return total

    def _eps(self, index: Rows) -> Array:
        """Rounding of the residuals."""
        return 4e-16 * (1.0 + np.abs(self._goal(index)))


@np.errstate(all="ignore")  # a step may leave the range of floats; its objective is then infinite, and it is refused
def _solve(problem: Problem, start: Array, max_steps: int, tolerance: float) -> Solution:
    lower, upper = problem.model.lower, problem.model.upper
    count, p = start.shape
    everyone = slice(None)
    theta = np.clip(start, lower, upper)
    objective = problem.objective(theta, everyone)
    gradient, hessian, diagonal = problem.derivatives(theta, everyone)
    damping = np.full(count, 1e-3)
    floor = problem.floor(everyone, count)
    live = np.isfinite(objective)
    steps = np.zeros(count, dtype=np.int64)
    eye = np.eye(p)

    for _ in range(max_steps):
        index = np.flatnonzero(live)
        if index.size == 0:
            break
        steps[index] += 1
        g, h, d = gradient[index], hessian[index], diagonal[index]
        here = theta[index]
        pinned = ((here <= lower) & (g > 0)) | ((here >= upper) & (g < 0))
        g = np.where(pinned, 0.0, g)
        d = np.where(pinned, 1.0, np.maximum(d, _TINY))
        free = ~pinned
        h = h * free[:, :, None] * free[:, None, :]
        root = np.sqrt(d)
        scaled = h / root[:, :, None] / root[:, None, :] + damping[index, None, None] * eye
        step = -_solve_spd(scaled, g / root) / root
        trial = np.clip(here + step, lower, upper)
        step = trial - here
        predicted = -(np.einsum("sp,sp->s", g, step) + 0.5 * np.einsum("sp,spq,sq->s", step, h, step))
        value = problem.objective(trial, index)
        actual = objective[index] - value
        scale_now = np.maximum(objective[index], floor[index])
        better = actual > 0
        # Near the optimum the change drowns in rounding: a predicted change below it is as good as made.
        resolved = (np.abs(predicted) <= 1e-15 * scale_now) | (objective[index] <= floor[index])
        ratio = actual / np.maximum(predicted, _TINY)

        moved = index[better]
        theta[moved] = trial[better]
        objective[moved] = value[better]
        if moved.size:
            gradient[moved], hessian[moved], diagonal[moved] = problem.derivatives(theta[moved], moved)
        factor = np.where(better, np.where(ratio > 0.5, 0.1, np.where(ratio > 0.1, 1.0, 4.0)), 8.0)
        damping[index] = np.clip(damping[index] * factor, 1e-14, 1e16)
        stuck = ~better & (damping[index] >= 1e12)
        small = better & (actual <= tolerance * 1e-2 * scale_now) & (damping[index] <= 1e-3)
        live[index[stuck | resolved | small]] = False

    decrement, kkt, at_bound = _certificate(theta, objective, gradient, hessian, diagonal, lower, upper, floor)
    # At the rounding floor nothing is left to gain, and the gradient is noise.
    settled = (decrement <= np.sqrt(tolerance) * 1e-3) & (kkt <= 1e-4)
    left = np.flatnonzero(np.isfinite(objective) & ~settled)
    if left.size:
        # Nor is anything to gain that rounding hides: on points that lie on the law to ten digits it hides much.
        hidden = problem.rounding(theta[left], left) / np.maximum(objective[left], floor[left])
        settled[left] = (decrement[left] <= np.sqrt(tolerance) * 1e-3 + hidden) & (kkt[left] <= 1e-4 + hidden)
    converged = np.isfinite(objective) & (settled | (objective <= floor))
    return Solution(theta, objective, converged, decrement, kkt, at_bound, steps)


def _certificate(
    theta: Array,
    objective: Array,
    gradient: Array,
    hessian: Array,
    diagonal: Array,
    lower: Array,
    upper: Array,
    floor: Array,
) -> tuple[Array, Array, NDArray[np.int8]]:
    at_bound = (np.where(theta >= upper, 1, 0) - np.where(theta <= lower, 1, 0)).astype(np.int8)
    pinned = ((at_bound < 0) & (gradient > 0)) | ((at_bound > 0) & (gradient < 0))
    g = np.where(pinned, 0.0, gradient)
    d = np.where(pinned, 1.0, np.maximum(diagonal, _TINY))
    root = np.sqrt(d)
    free = ~pinned
    scaled = hessian * free[:, :, None] * free[:, None, :] / root[:, :, None] / root[:, None, :]
    direction = g / root
    p = theta.shape[1]
    # The ridge keeps a direction that no point determines from blowing a rounding error up.
    newton = _solve_spd(scaled + 1e-9 * np.eye(p), direction)
    reference = np.maximum(objective, floor) + _TINY
    decrement = 0.5 * np.einsum("sp,sp->s", direction, newton) / reference
    kkt = np.abs(direction).max(-1) / np.sqrt(reference)
    return np.abs(decrement), kkt, at_bound


def _solve_spd(matrix: Array, vector: Array) -> Array:
    """Solve a batch of small damped systems; a singular one gets the smallest-norm answer."""
    try:
        return np.asarray(np.linalg.solve(matrix, vector[:, :, None])[:, :, 0], dtype=float)
    except np.linalg.LinAlgError:
        return np.asarray(np.einsum("spq,sq->sp", np.linalg.pinv(matrix, hermitian=True), vector), dtype=float)
