"""Law forms that compete to extrapolate: each fits runs, and gives a predictive distribution for a new one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ditscale.errors import InputError
from ditscale.scaling.isoflop import IsoflopFit, fit_isoflop
from ditscale.scaling.losses import Loss
from ditscale.scaling.more_laws import SURFACE_LAWS
from ditscale.scaling.runs import RunTable
from ditscale.scaling.surface import SurfaceFit, fit_surface

POWER_CANDIDATES = ("power", "power-floor")
SURFACE_CANDIDATES = ("surface", "surface-tied", "surface-floorless", "skaling")
CANDIDATES = POWER_CANDIDATES + SURFACE_CANDIDATES
# A new run is given by its size, data and compute: of the surfaces, those of N and D alone.
_KNOWN = POWER_CANDIDATES + tuple(name for name, law in SURFACE_LAWS.items() if set(law.inputs) == {"params", "data"})


@dataclass(frozen=True)
class Predictive:
    """A Student-t distribution of a logarithm of a loss.

    Attributes:
        centre: logarithm of the predicted loss.
        scale: of the t distribution.
        dof: degrees of freedom.
        mean_scale, mean_dof: the same for where the law lies, without the noise of a run.
    """

    centre: float
    scale: float
    dof: float
    mean_scale: float
    mean_dof: float


@dataclass(frozen=True)
class Fitted:
    """A candidate after its fit.

    Attributes:
        name: of the candidate.
        predict: (params, data, flops, share of a run's variance) -> Predictive; an InputError where the runs do not
            determine it.
    """

    name: str
    predict: Callable[[float, float, float, float], Predictive]


def fit_candidate(name: str, runs: RunTable, *, loss_fn: str | Loss = "huber:auto") -> Fitted:
    """Fit one candidate to runs that carry params, data, flops and loss.

    Raises:
        InputError: an unknown name, or too few runs or budgets to leave a degree of freedom.
    """
    if name in POWER_CANDIDATES:
        return _power(name, fit_isoflop(runs, bootstrap=0, with_surface=False))
    if name in _KNOWN:
        return _surface(fit_surface(runs, law=name, loss_fn=loss_fn))
    raise _unknown(name)


def _surface(surface: SurfaceFit) -> Fitted:
    fit = surface.fit
    if fit.n <= len(fit.theta) + 1:
        raise InputError(f"{fit.law.name}: expected more than {len(fit.theta) + 1} runs, got {fit.n}")
    if not fit.converged:
        raise InputError(f"{fit.law.name}: the fit did not converge")

    def predict(params: float, data: float, flops: float, share: float) -> Predictive:
        logs = {"params": np.log([params]), "data": np.log([data])}
        model = fit.law.model(logs, fit.centre)
        mean = fit.interval_of(lambda th: model.value(th)[:, 0], log=True)
        run = fit.interval_of(lambda th: model.value(th)[:, 0], log=True, new_run=share)
        if not np.isfinite(run.se):
            raise InputError(f"{fit.law.name}: the runs do not determine its loss at N {params:.4g}, D {data:.4g}")
        return Predictive(float(np.log(mean.value)), run.se, run.dof, mean.se, mean.dof)

    return Fitted(fit.law.name, predict)


def _power(name: str, iso: IsoflopFit) -> Fitted:
    law = iso.loss_law if name == "power" else iso.loss_law_floor
    if law is None or law.fit.n <= len(law.fit.theta):
        raise InputError(f"{name}: expected more budgets than parameters to judge its error")
    if not law.converged:
        raise InputError(f"{name}: the fit did not converge")
    run_variance = iso.run_noise**2

    def predict(params: float, data: float, flops: float, share: float) -> Predictive:
        model = law.fit.law.model({"x": np.log([flops])}, law.fit.centre)
        mean = law.fit.interval_of(lambda th: model.value(th)[:, 0], log=True)
        # The line's own scatter is that of minima; a single run adds its own noise.
        scatter = law.fit.components.run + share * run_variance
        return Predictive(float(np.log(mean.value)), float(np.sqrt(mean.se**2 + scatter)), mean.dof, mean.se, mean.dof)

    return Fitted(name, predict)


def eligible(names: Sequence[str] | None) -> tuple[str, ...]:
    """Candidates by name, all of them where none are named."""
    chosen = tuple(names) if names else CANDIDATES
    for name in chosen:
        if name not in _KNOWN:
            raise _unknown(name)
    return chosen


def _unknown(name: str) -> InputError:
    return InputError(f"law: expected one of {', '.join(_KNOWN)}, got {name!r}")
