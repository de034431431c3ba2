"""Power laws of one variable, with and without a floor: L(C), N_opt(C), D_opt(C), FID(C)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ditscale.errors import InputError
from ditscale.scaling.fit import fit_law
from ditscale.scaling.intervals import Interval
from ditscale.scaling.laws import POWER, POWER_FLOOR, power_with_floor
from ditscale.scaling.losses import Loss
from ditscale.scaling.results import LawFit, Prediction
from ditscale.scaling.runs import RunTable


class PowerFit:
    """``y = floor + coefficient * x ** exponent``.

    Attributes:
        fit: the law's fit.
        floor_mode: "none", "free", or the given number.
    """

    def __init__(self, fit: LawFit, floor_mode: str | float) -> None:
        self.fit = fit
        self.floor_mode = floor_mode

    @property
    def params(self) -> dict[str, float]:
        """coefficient, exponent, floor."""
        floor = self.floor_mode if isinstance(self.floor_mode, float) else 0.0
        return {"floor": floor, **self.fit.params}

    @property
    def coefficient(self) -> float:
        """Value of the power term at x = 1."""
        return self.fit.params["coefficient"]

    @property
    def exponent(self) -> float:
        """Signed exponent: negative where y falls with x."""
        return self.fit.params["exponent"]

    @property
    def floor(self) -> float:
        """What y never falls below; 0 without a floor."""
        return self.params["floor"]

    @property
    def intervals(self) -> dict[str, list[float]]:
        """95 % intervals by name."""
        return self.fit.intervals

    def interval(self, name: str, *, method: str | None = None, level: float = 0.95) -> Interval:
        """The interval of a parameter."""
        return self.fit.interval(name, method=method, level=level)

    @property
    def converged(self) -> bool:
        """Whether the certificate of the fit holds."""
        return self.fit.converged

    @property
    def warnings(self) -> list[str]:
        """What a reader must know."""
        return self.fit.warnings

    @property
    def r2(self) -> float:
        """Share of variance explained, in the fit's space."""
        return self.fit.r2

    def predict(self, x: Any, *, level: float = 0.95, method: str | None = None) -> Prediction:
        """Predict at x (a number or an array), with the interval of the law and that of a new observation."""
        return self.fit.predict(x=x, level=level, method=method)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> PowerFit:
        """Rebuild from :meth:`to_json`."""
        return cls(LawFit.from_json(record), record["floor_mode"])

    def to_json(self) -> dict[str, Any]:
        """The contract's keys of ``ditscale fit power --json`` and everything else of the fit."""
        return {**self.fit.to_json(), **self.params, "params": self.params, "floor_mode": self.floor_mode}

    def summary(self) -> str:
        """A readable table."""
        return f"{self.fit.summary()}\n  R² {self.r2:.4f}"

    def __str__(self) -> str:
        return self.summary()


def fit_power(
    x: Any,
    y: Any = None,
    *,
    floor: str | float = "none",
    loss_fn: str | Loss = "mse",
    space: str = "log",
    weights: Any = None,
    groups: Any = None,
    starts: int = 8,
    seed: int = 0,
    interval_method: str = "auto",
    least_noise: float = 0.0,
    x_column: str | None = None,
    y_column: str | None = None,
) -> PowerFit:
    """Fit ``y = floor + coefficient * x ** exponent``.

    Args:
        x: positive values [n]; or a RunTable or a path, with ``x_column`` and ``y_column``.
        y: positive values [n].
        floor: "none", "free" (fitted, at least 0), or a number from outside, such as an estimate of the
            optimal diffusion loss. A floor makes the exponent larger in size: never compare exponents across
            floors.
        loss_fn: default least squares, which few points call for; "huber:auto" against outliers.
        space: "log" or "raw" residuals.
        weights: of the points, such as 1/variance.
        groups: labels of points that share errors.
        starts, seed, interval_method, least_noise: see :func:`ditscale.scaling.fit.fit_law`.

    Returns:
        PowerFit. "No scaling in this range" (an interval of the exponent that holds 0) is a valid answer, and
        warned of.

    Raises:
        InputError: fewer than 2 different x (3 with a free floor), a floor not below every y, values that are not positive.
    """
    if isinstance(x, (RunTable, str, Path)):
        table = x if isinstance(x, RunTable) else RunTable.read(x)
        x, y = table.column(x_column or "flops"), table.column(y_column or "loss")
    mode = floor_mode(floor)
    law = power_with_floor(mode) if isinstance(mode, float) else POWER_FLOOR if mode == "free" else POWER
    if y is None:
        raise InputError("y: expected numbers, got none")
    values = np.asarray(x, dtype=float)
    needed = 3 if mode == "free" else 2
    levels = len(np.unique(values[np.isfinite(values)]))
    if levels < needed:
        raise InputError(f"x: expected at least {needed} different values for this law, got {levels}")
    fit = fit_law(
        law,
        {"x": values},
        y,
        weights=weights,
        groups=groups,
        loss_fn=loss_fn,
        space=space,
        starts=starts,
        seed=seed,
        interval_method=interval_method,
        least_noise=least_noise,
    )
    _flatness(fit)
    return PowerFit(fit, mode)


def floor_mode(floor: str | float) -> str | float:
    """Read a floor option: "none", "free" or a number of at least 0."""
    if floor in ("none", "free"):
        return str(floor)
    try:
        value = float(floor)
    except (TypeError, ValueError):
        value = float("nan")
    if not (np.isfinite(value) and value >= 0):
        raise InputError(f"floor: expected none, free or a number of at least 0, got {floor!r}")
    return value


def _flatness(fit: LawFit) -> None:
    """Say so where the data show no scaling, or a floor that they cannot tell from none."""
    if np.isnan(fit.r2):
        fit.warnings.append("no scaling in this range: all values are the same")
        return
    if fit.n <= len(fit.theta):
        return
    low, high = fit.intervals["exponent"]
    if low <= 0 <= high:
        holds = f"the exponent's interval [{low:.3g}, {high:.3g}] holds 0 (R² {fit.r2:.3f})"
        # Beside a free floor the exponent may be open where the fall itself is plain.
        clear = fit.explains_by_chance < 0.05
        fit.warnings.append(
            f"the exponent is not determined beside a free floor: {holds}"
            if clear
            else f"no scaling in this range: {holds}"
        )
    if "floor" in fit.law.names and "floor" not in fit.at_bounds and fit.intervals["floor"][0] <= 0:
        fit.warnings.append("the floor cannot be told from none: extrapolate with and without it")
