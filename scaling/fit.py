"""Fitting a law to points. ``fit_surface`` and ``fit_power`` are the two everyday entries; both end here."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from ditscale.errors import InputError
from ditscale.scaling import engine
from ditscale.scaling.checks import need_whole
from ditscale.scaling.engine import Array
from ditscale.scaling.laws import Law
from ditscale.scaling.losses import Loss, parse_loss, robust_sigma
from ditscale.scaling.results import NOT_IDENTIFIABLE, LawFit

SPACES = ("log", "raw")
# Residuals this small against the data are rounding: the points lie on the law, and a robust knee has no meaning.
_NOISE_FREE = 1e-9
# A start whose residuals are this many times those of the least-squares fit is not polished from where it stands.
_FAR = 10.0


@np.errstate(all="ignore")  # data near the edge of the range of floats; what comes of it is checked, not warned of
def fit_law(
    law: Law,
    inputs: Mapping[str, Any],
    target: Any,
    *,
    weights: Any = None,
    groups: Any = None,
    loss_fn: str | Loss = "huber:auto",
    space: str = "log",
    starts: int = 8,
    interval_method: str = "auto",
    seed: int = 0,
    least_noise: float = 0.0,
) -> LawFit:
    """Fit any law to points.

    Args:
        law: the law.
        inputs: positive values by input name, [n] each.
        target: positive measured values [n].
        weights: of the points, at least 0. Default: ones. Only their ratios matter.
        groups: labels of the points' budgets, for intervals. Default: none.
        loss_fn: see :func:`ditscale.scaling.losses.parse_loss`. Default: "huber:auto".
        space: "log" (relative errors) or "raw". Default: "log".
        starts: how many starts of the variable-projection grid to polish. Default: 8.
        interval_method: default of the intervals.
        seed: of bootstraps.
        least_noise: spread of one point, in the fit's residuals, that no interval may claim to be smaller. Default: 0.

    Returns:
        LawFit. An optimum that was not reached is not called converged.

    Raises:
        InputError: sizes differ, a value is not positive, or there are no more points than parameters.
    """
    begun = time.perf_counter()
    loss = parse_loss(loss_fn)
    if space not in SPACES:
        raise InputError(f"space: expected log or raw, got {space!r}")
    need_whole("starts", starts, 1)
    need_whole("seed", seed, 0)
    x, y, w = _points(law, inputs, target, weights)
    labels = None if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1].astype(np.int64)

    logs = {name: np.log(value) for name, value in x.items()}
    centre = {name: float(np.average(value, weights=w)) for name, value in logs.items()}
    centred = {name: value - centre[name] for name, value in logs.items()}
    model = law.model(logs, centre)
    if hasattr(model, "bound_coefficients"):
        model.bound_coefficients(y)
    start = law.starts(centred, y, w, int(starts), centre)
    if not len(start):
        raise _unreachable(law, y)
    plain = engine.minimise(model, y, Loss("mse"), start, weights=w, space=space)
    best = plain.theta[int(plain.objective.argmin())]
    unit = 1.0 if space == "log" else float(np.median(y))
    sigma = _spread(model, best, y, space, len(law.names))
    exact = sigma < _NOISE_FREE * unit
    asked = loss.name
    if loss.needs_scale:
        loss = Loss("mse") if exact else _settle(model, y, loss, best, w, space, sigma)
    if loss.kind == "mse":
        solution, used = plain, loss
    else:
        # Where the points lie many knees away a robust loss hardly bends: least squares brings such a start near.
        far = _spreads(model, start, y, space, len(law.names)) > _FAR * max(sigma, _NOISE_FREE * unit)
        near = np.where(far[:, None], plain.theta, start)
        solution, used = engine.descend(
            model, y, loss, near, sigma=max(sigma, _NOISE_FREE * unit), weights=w, space=space
        )
    index = int(np.argmin(np.where(np.isfinite(solution.objective), solution.objective, np.inf)))
    objective = float(solution.objective[index])
    if not np.isfinite(objective):
        raise _unreachable(law, y)
    agreeing = int((solution.objective <= objective * (1 + 1e-8) + 1e-26 * len(y)).sum())
    bounds = [law.names[i] for i in np.flatnonzero(solution.at_bound[index])]
    fit = LawFit(
        law=law,
        theta=solution.theta[index],
        centre=centre,
        inputs=x,
        target=y,
        weights=w,
        groups=labels,
        loss=used,
        asked_loss=asked,
        space=space,
        objective=objective,
        certificate={
            "decrement": float(solution.decrement[index]),
            "kkt": float(solution.kkt[index]),
            "iterations": int(solution.iterations[index]),
        },
        converged=bool(solution.converged[index]),
        starts=len(start),
        starts_agreeing=agreeing,
        at_bounds=bounds,
        warnings=[],
        seconds=0.0,
        seed=seed,
        interval_method=interval_method,
        least_noise=float(least_noise),
    )
    if asked == "l1":
        fit.objective = float((np.abs(fit.residuals) * w).sum())
    fit.warnings += _health(fit)
    fit.seconds = time.perf_counter() - begun
    return fit


def _points(law: Law, inputs: Mapping[str, Any], target: Any, weights: Any) -> tuple[dict[str, Array], Array, Array]:
    """Inputs, measured values and weights of mean 1, checked."""
    y = _vector("loss", target)
    x = {name: _vector(name, inputs.get(name)) for name in law.inputs}
    for name, value in x.items():
        if len(value) != len(y):
            raise InputError(f"{name}: expected {len(y)} values, as there are losses, got {len(value)}")
    w = np.ones(len(y)) if weights is None else np.asarray(weights, dtype=float)
    if w.shape != y.shape or not np.all(np.isfinite(w) & (w >= 0)) or not w.any():
        raise InputError(f"weights: expected {len(y)} numbers of at least 0, not all 0, got {w.shape}")
    if len(y) < len(law.names):
        raise InputError(
            f"{law.name}: expected at least {len(law.names)} points for parameters {', '.join(law.names)}, got {len(y)}"
        )
    return x, y, w / w.mean()


def _unreachable(law: Law, y: Array) -> InputError:
    return InputError(
        f"{law.name}: expected values that the law can come near, got some from {y.min():.3g} to {y.max():.3g} that it "
        "cannot reach from any start"
    )


def _settle(model: engine.Model, y: Array, loss: Loss, theta: Array, w: Array, space: str, sigma: float) -> Loss:
    """Set a loss's scale from the residuals of its own fit: three rounds bring it to about a percent."""
    for _ in range(3):
        scaled = loss.knee_from(sigma)
        theta = engine.minimise(model, y, scaled, theta, weights=w, space=space).theta[0]
        new = _spread(model, theta, y, space, len(theta))
        if new <= 0 or abs(new / sigma - 1) < 1e-3:
            break
        sigma = new
    return loss.knee_from(sigma)


def _spread(model: engine.Model, theta: Array, y: Array, space: str, p: int) -> float:
    return float(_spreads(model, theta[None, :], y, space, p)[0])


def _spreads(model: engine.Model, theta: Array, y: Array, space: str, p: int) -> Array:
    f = model.value(theta)
    residuals = np.log(f / y) if space == "log" else f - y
    return np.array([robust_sigma(r, free_parameters=p) for r in residuals])


def _health(fit: LawFit) -> list[str]:
    notes = []
    if not fit.converged:
        notes.append(
            f"not converged: the objective could still fall by {fit.certificate['decrement']:.1e} of "
            f"itself; do not use it"
        )
    elif fit.starts >= 4 and fit.starts_agreeing < 2:
        notes.append(f"only 1 of {fit.starts} starts reached this optimum: raise starts, or doubt the form")
    for name in fit.at_bounds:
        notes.append(f"{name} is at its bound ({fit.params[name]:.4g}): the data do not determine it")
    inside = fit.share_inside
    if inside is not None and inside < 0.3 and fit.n > 20:
        notes.append(
            f"{100 * inside:.0f} % of the points lie inside the knee {fit.loss.scale:.1e}: in effect least "
            f"absolute deviations"
        )
    if fit.n == len(fit.theta):
        notes.append("as many parameters as points: the fit is exact and says nothing about its error")
    scaled = fit.jacobian / np.maximum(np.linalg.norm(fit.jacobian, axis=0), 1e-300)
    free = [i for i, name in enumerate(fit.law.names) if name not in fit.at_bounds]
    if free:
        s = np.linalg.svd(scaled[:, free], compute_uv=False)
        if s[-1] < 1e-6 * s[0]:
            notes.append(f"{NOT_IDENTIFIABLE}: a combination of parameters can change without changing the fit")
    return notes


def _vector(name: str, values: Any) -> Array:
    if values is None:
        raise InputError(f"{name}: expected numbers, got none")
    try:
        array = np.atleast_1d(np.asarray(values, dtype=float))
    except (TypeError, ValueError):
        raise InputError(f"{name}: expected numbers, got {type(values).__name__}") from None
    if array.ndim != 1 or array.size == 0:
        raise InputError(f"{name}: expected a list of numbers, got shape {array.shape}")
    bad = np.flatnonzero(~(np.isfinite(array) & (array > 0)))
    if bad.size:
        raise InputError(f"{name}: expected positive numbers, got {array[bad[0]]:g} at position {int(bad[0]) + 1}")
    return array
