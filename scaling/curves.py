"""One isoFLOP curve: loss against size at one budget, its minimum, and how well the runs place it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from ditscale.scaling.engine import Array
from ditscale.scaling.jsonable import plain

_CURVATURE_T = 2.0


@dataclass(frozen=True)
class Vertex:
    """The minimum of one budget's curve.

    Attributes:
        budget: nominal compute.
        params, data, loss: at the minimum.
        se_log_params, se_log_data, se_loss: standard errors from the curves' residuals (pooled over budgets),
            or NaN.
        dof: degrees of freedom of that pooled spread.
        bracketed: whether the minimum lies between the least and the greatest size, with runs on both sides.
        curvature, curvature_t: second derivative in log N at the minimum, and that over its standard error.
        runs: how many runs the curve has.
        centre_offset: centre of the grid over the minimum, as a factor.
        width: greatest over least size, as a factor.
        coefficients: the curve's polynomial in log(N / centre), highest power first.
        centre: the size at which the polynomial is centred.
        space: whether the polynomial is of the "raw" loss or of its "log".
    """

    budget: float
    params: float
    data: float
    loss: float
    se_log_params: float
    se_log_data: float
    se_loss: float
    dof: int
    bracketed: bool
    curvature: float
    curvature_t: float
    runs: int
    centre_offset: float
    width: float
    coefficients: tuple[float, ...]
    centre: float
    space: str = "raw"

    def curve(self, params: Any) -> Array:
        """The fitted loss at other sizes of the same budget."""
        at = np.log(np.asarray(params, dtype=float) / self.centre)
        value = np.asarray(np.polyval(self.coefficients, at), dtype=float)
        return np.exp(value) if self.space == "log" else value

    def intervals(self) -> dict[str, list[float]]:
        """95 % intervals of params, data and loss from the scatter of runs around the curves; empty without any."""
        if self.dof < 1 or not np.isfinite(self.se_log_params):
            return {}
        t = float(stats.t.ppf(0.975, self.dof))
        return {
            "params": [self.params * float(np.exp(k * t * self.se_log_params)) for k in (-1, 1)],
            "data": [self.data * float(np.exp(k * t * self.se_log_data)) for k in (-1, 1)],
            "loss": [self.loss + k * t * self.se_loss for k in (-1, 1)],
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        ends = self.intervals()
        content = {
            "budget": self.budget,
            "params": self.params,
            "params_interval": ends.get("params"),
            "tokens": self.data,
            "data": self.data,
            "data_interval": ends.get("data"),
            "loss": self.loss,
            "loss_interval": ends.get("loss"),
            "bracketed": self.bracketed,
            "se_log_params": self.se_log_params,
            "curvature": self.curvature,
            "curvature_t": self.curvature_t,
            "runs": self.runs,
            "centre_offset": self.centre_offset,
            "width": self.width,
            "coefficients": list(self.coefficients),
            "centre": self.centre,
            "space": self.space,
        }
        return plain(content)


class Curve:
    """One budget's runs with their polynomial in centred log N."""

    def __init__(self, params: Array, data: Array, loss: Array, degree: int, space: str) -> None:
        self.params, self.data = params, data
        self.x = np.log(params)
        # The middle of the range, so that replicated sizes do not move the centre of the grid.
        self.middle = 0.5 * (self.x.min() + self.x.max())
        self.y = np.log(loss) if space == "log" else loss
        self.degree = degree
        self.design = np.vander(self.x - self.middle, degree + 1)
        self.solver = np.linalg.pinv(self.design)
        self.coefficients = self.solver @ self.y
        self.residuals = self.y - self.design @ self.coefficients
        self.dof = len(self.x) - degree - 1
        slope, self.data_middle = np.polyfit(self.x - self.middle, np.log(data), 1)
        self.data_slope = float(slope)

    def minimum(self, coefficients: Array) -> tuple[Array, Array]:
        """Place (centred log N) and second derivative of the minima of many polynomials [S, degree + 1]."""
        c = np.atleast_2d(coefficients)
        with np.errstate(all="ignore"):
            if self.degree == 2:
                return -c[:, 1] / (2 * c[:, 0]), 2 * c[:, 0]
            # Of a cubic's two stationary points the minimum has slope of the derivative +sqrt(disc).
            disc = np.sqrt(c[:, 1] ** 2 - 3 * c[:, 0] * c[:, 2])
            # The form without cancellation, which turns into the parabola's vertex as the cubic term vanishes.
            return -c[:, 2] / (c[:, 1] + disc), 2 * disc

    def data_at(self, place: Array) -> Array:
        return np.exp(self.data_middle + self.data_slope * place)


def pooled_sigma(curves: Sequence[Curve]) -> float:
    dof = sum(c.dof for c in curves)
    if dof <= 0:
        return float("nan")
    return float(np.sqrt(sum(float(c.residuals @ c.residuals) for c in curves) / dof))


def find_vertex(
    curve: Curve, curves: Sequence[Curve], budget: float, sigma: float, space: str, warnings: list[str]
) -> Vertex:
    place, bend = (float(v[0]) for v in curve.minimum(curve.coefficients))
    low, high = curve.x.min() - curve.middle, curve.x.max() - curve.middle
    if not (np.isfinite(place) and bend > 0):
        i = int(np.argmin(curve.y))
        warnings.append(
            f"budget {budget:.3g}: the curve has no minimum (it does not bend upwards); widen the grid of sizes"
        )
        place, bend, has = float(curve.x[i] - curve.middle), 0.0, False
    else:
        has = True
    inside = bool(has and low < place < high)
    value = float(np.polyval(curve.coefficients, place))
    step = 1e-4
    up = curve.minimum(curve.coefficients + step * sigma * np.eye(curve.degree + 1))[0] if np.isfinite(sigma) else None
    se, se_data, se_loss, t = (float("nan"),) * 4
    dof = sum(c.dof for c in curves)
    if up is not None and sigma > 0 and has:
        down = curve.minimum(curve.coefficients - step * sigma * np.eye(curve.degree + 1))[0]
        gradient = (up - down) / (2 * step * sigma)
        covariance = sigma**2 * curve.solver @ curve.solver.T
        se = float(np.sqrt(gradient @ covariance @ gradient))
        se_data = abs(curve.data_slope) * se
        at = np.vander([place], curve.degree + 1)[0]
        # To first order the minimum's height does not depend on its place.
        se_loss = float(np.sqrt(at @ covariance @ at)) * (float(np.exp(value)) if space == "log" else 1.0)
        t = bend / (2 * float(np.sqrt(covariance[-3, -3])))
        if t < _CURVATURE_T:
            warnings.append(f"budget {budget:.3g}: the curvature is only {t:.1f} standard errors from flat")
            inside = False
    if has and not inside and not (low < place < high):
        side = "above" if place >= high else "below"
        warnings.append(f"budget {budget:.3g}: the minimum lies {side} every size that was run; it is not bracketed")
    return Vertex(
        budget=budget,
        params=float(np.exp(curve.middle + place)),
        data=float(curve.data_at(np.array([place]))[0]),
        loss=float(np.exp(value)) if space == "log" else value,
        se_log_params=se,
        se_log_data=se_data,
        se_loss=se_loss,
        dof=dof,
        bracketed=inside,
        curvature=bend,
        curvature_t=t,
        runs=len(curve.x),
        centre_offset=float(np.exp(-place)),
        width=float(np.exp(high - low)),
        coefficients=tuple(float(c) for c in curve.coefficients),
        centre=float(np.exp(curve.middle)),
        space=space,
    )
