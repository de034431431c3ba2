"""The isoFLOP method (Chinchilla's approach 2): loss against size at every budget, minima, lines.

It needs no form for the surface, and pays for that: its vertex is biased where the curve is
lopsided, and the bias grows with the width of the grid and drifts with its centre (arXiv:2603.22339). So
every result carries bracket and curvature checks, warns of grids that invite the bias, and stands beside the
surface fit with a flag where the two disagree.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ditscale.errors import InputError
from ditscale.scaling.checks import need_draws
from ditscale.scaling.curves import Curve, Vertex, find_vertex, pooled_sigma
from ditscale.scaling.engine import Array
from ditscale.scaling.intervals import Interval, t_interval
from ditscale.scaling.jsonable import plain
from ditscale.scaling.power import PowerFit, fit_power
from ditscale.scaling.results import Prediction
from ditscale.scaling.runs import RunTable
from ditscale.scaling.surface import SurfaceFit, as_table, fit_surface

VERTICES = ("parabola", "cubic")
# A grid wider than this factor on either side of its centre moves the vertex by more than a few percent on surfaces
# with unequal exponents; one further off centre than this shifts it alike (arXiv:2603.22339, table 1).
_WIDE = 12.0
_OFF_CENTRE = 2.0
_DRIFT = 0.08


@dataclass
class IsoflopFit:
    """Minima at every budget and the power laws through them.

    Attributes:
        vertices: one a budget, rising.
        used: which vertices the power laws rest on (those bracketed, unless there are too few).
        n_law, d_law: N_opt(C) and D_opt(C).
        loss_law: L(C), a pure power.
        loss_law_floor: L(C) with a free floor, or None with fewer than 4 budgets.
        surface: the surface fit on the same runs, or None where it could not be fitted.
        vertex: "parabola" or "cubic".
        data_unit: "images" or "tokens".
        source: where the runs came from.
        bootstrap: draws of exponents and log-coefficients by name.
        run_noise: relative spread of runs around their curves.
        size: the column that N came from.
        warnings: what a reader must know.
        notes: what was done to the table before.
    """

    vertices: list[Vertex]
    used: list[int]
    n_law: PowerFit
    d_law: PowerFit
    loss_law: PowerFit
    loss_law_floor: PowerFit | None
    surface: SurfaceFit | None
    vertex: str
    data_unit: str
    source: str
    bootstrap: dict[str, Array]
    run_noise: float = 0.0
    size: str = "params"
    warnings: list[str] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    @property
    def params(self) -> dict[str, float]:
        """Exponents and coefficients of N_opt(C), D_opt(C) and L(C)."""
        return {f"{k}_{what}": getattr(law, what) for k, law, what in self._parts}

    @property
    def intervals(self) -> dict[str, list[float]]:
        """95 % intervals by name."""
        return {f"{k}_{what}": self._interval(law, k, what).ends for k, law, what in self._parts}

    @property
    def _parts(self) -> list[tuple[str, PowerFit, str]]:
        laws = (("N", self.n_law), ("D", self.d_law), ("L", self.loss_law))
        return [(k, law, what) for k, law in laws for what in ("exponent", "coefficient")]

    def _interval(self, law: PowerFit, prefix: str, what: str) -> Interval:
        """The wider of two: the line's own t interval (scatter of the minima) and the run-level bootstrap (their error)."""
        line = law.interval(what)
        draws = self.bootstrap.get(f"{prefix}_{what}")
        if draws is None:
            return line
        se, dof = float(draws.std(ddof=1)), float(max(self.vertices[0].dof, 1))
        runs = t_interval(line.value, se, dof, log=what == "coefficient", level=line.level, method="run bootstrap")
        return runs if np.isfinite(se) and runs.high - runs.low > line.high - line.low else line

    @property
    def converged(self) -> bool:
        """Whether every fitted line converged."""
        return all(law.converged for law in (self.n_law, self.d_law, self.loss_law))

    def predict(self, flops: Any, *, floor: bool = False, level: float = 0.95) -> dict[str, Prediction]:
        """N_opt, D_opt and the loss at other budgets: predictions of "params", "data" and "loss".

        Intervals are the wider of the line's and the run-level bootstrap's, except for the loss with a floor. ``new_run`` of
        the loss is of one run, of params and data of a new budget's minimum.
        """
        loss = self.loss_law_floor if floor and self.loss_law_floor is not None else self.loss_law
        out = {}
        for name, prefix, law in (
            ("params", "N", self.n_law),
            ("data", "D", self.d_law),
            ("loss", "L", loss),
        ):
            p = law.predict(flops, level=level)
            noise = self.run_noise if name == "loss" else 0.0
            p = dataclasses.replace(p, new_run=of_one_run(law, p, noise))
            slope = self.bootstrap.get(f"{prefix}_exponent")
            if slope is not None and not (name == "loss" and floor):
                lines = self.bootstrap[f"{prefix}_coefficient"][:, None] + slope[:, None] * np.log(np.atleast_1d(flops))
                t = float(stats.t.ppf(0.5 + level / 2, max(self.vertices[0].dof, 1)))
                spread = lines.std(axis=0, ddof=1).reshape(np.shape(flops))
                p = dataclasses.replace(
                    p,
                    interval=_at_least(p.interval, p.value, t * spread),
                    new_run=_at_least(p.new_run, p.value, t * np.hypot(spread, noise)),
                )
            out[name] = p
        return out

    def to_json(self) -> dict[str, Any]:
        """The contract's keys of ``ditscale fit isoflop --json`` and everything else of the fit."""
        content = {
            **self.params,
            "params": self.params,
            "intervals": self.intervals,
            "optima": [v.to_json() for v in self.vertices],
            "used": self.used,
            "vertex": self.vertex,
            "data_unit": self.data_unit,
            "converged": self.converged,
            "N_opt": self.n_law.to_json(),
            "D_opt": self.d_law.to_json(),
            "loss": self.loss_law.to_json(),
            "loss_floor": self.loss_law_floor.to_json() if self.loss_law_floor else None,
            "surface": self.surface.to_json() if self.surface else None,
            "source_file": self.source,
            "size": self.size,
            "run_noise": self.run_noise,
            "warnings": self.warnings,
            "notes": list(self.notes),
        }
        return plain(content)

    def summary(self) -> str:
        """A readable table."""
        lines = [f"isoFLOP, {self.vertex} in log N; D in {self.data_unit}; runs from {self.source}"]
        lines.append(f"  {'budget':>12s}{'N_opt':>14s}{'D_opt':>14s}{'loss':>12s}  runs  bracketed")
        for v in self.vertices:
            lines.append(
                f"  {v.budget:12.4g}{v.params:14.5g}{v.data:14.5g}{v.loss:12.6g}{v.runs:6d}  "
                f"{'yes' if v.bracketed else 'NO'}"
            )
        intervals = self.intervals
        for name, value in self.params.items():
            low, high = intervals[name]
            lines.append(f"  {name:14s}{value:16.8g}   [{low:.6g}, {high:.6g}]")
        lines += [f"  warning: {w}" for w in self.warnings]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()


@np.errstate(all="ignore")  # an interval may be infinite
def of_one_run(law: PowerFit, p: Prediction, noise: float) -> list[Any]:
    """Where a prediction of a line through minima puts one run: minima scatter less than the runs that they stand for.

    Args:
        law: the line.
        p: its prediction, whose ``new_run`` is of a new minimum.
        noise: relative spread of a run.
    """
    reach = 0.5 * np.log(np.divide(p.new_run[1], p.new_run[0]))
    t = float(stats.t.ppf(0.5 + p.level / 2, max(law.fit.n - len(law.fit.theta), 1)))
    return _at_least(p.new_run, p.value, np.hypot(reach, t * noise))


def _at_least(ends: list[Any], value: Any, reach: Any) -> list[Any]:
    """An interval, widened to reach so far to both sides on the logarithm."""
    low, high = np.minimum(ends[0], value * np.exp(-reach)), np.maximum(ends[1], value * np.exp(reach))
    return [low, high] if np.shape(value) else [float(low), float(high)]


@np.errstate(all="ignore")  # losses near the edge of the range of floats; what comes of them is checked, not warned of
def fit_isoflop(
    table: RunTable | str | Path,
    *,
    vertex: str = "parabola",
    space: str = "raw",
    bootstrap: int = 1000,
    seed: int = 0,
    with_surface: bool = True,
    **columns: Any,
) -> IsoflopFit:
    """Fit isoFLOP curves and the power laws through their minima.

    Args:
        table: runs, or a file or study folder to read (``columns`` then go to :meth:`RunTable.read`).
        vertex: "parabola" (as published) or "cubic" (less biased on lopsided curves; needs 5 sizes at a
            budget).
        space: whether the curve is of the "raw" loss, as published, or of its "log".
        bootstrap: draws of the run-level bootstrap of the curves' residuals. Default: 1000; 0 for none.
        seed: of the bootstrap.
        with_surface: fit the surface beside it and warn where the two disagree. Default: True.

    Returns:
        IsoflopFit.

    Raises:
        InputError: fewer than 2 budgets, or fewer than 3 sizes at one.
    """
    runs = as_table(table, columns)
    if vertex not in VERTICES:
        raise InputError(f"vertex: expected parabola or cubic, got {vertex!r}")
    if space not in ("raw", "log"):
        raise InputError(f"space: expected raw or log, got {space!r}")
    need_draws(bootstrap, seed)
    degree = 2 if vertex == "parabola" else 3
    n, d, loss, budgets = runs.params, runs.data, runs.loss, runs.budgets
    # The bootstrap's draws belong to places, so that rows in another order would have other intervals.
    order = np.lexsort((loss, d, n))
    n, d, loss, budgets = n[order], d[order], loss[order], budgets[order]
    levels = np.unique(budgets)
    if len(levels) < 2:
        raise InputError(f"budget: expected at least 2 different budgets for a law of compute, got {len(levels)}")
    curves = []
    for level in levels:
        mask = budgets == level
        sizes = len(np.unique(n[mask]))
        if sizes < degree + 1:
            raise InputError(
                f"params: expected at least {degree + 1} different sizes at budget {level:.6g} for a "
                f"{vertex}, got {sizes}"
            )
        curves.append(Curve(n[mask], d[mask], loss[mask], degree, space))
    sigma = pooled_sigma(curves)
    warnings: list[str] = []
    vertices = [
        find_vertex(c, curves, float(level), sigma, space, warnings) for c, level in zip(curves, levels, strict=True)
    ]
    used = [i for i, v in enumerate(vertices) if v.bracketed]
    if len(used) < 2:
        good = [i for i, v in enumerate(vertices) if v.curvature > 0]
        if len(good) < 2:
            raise InputError(
                f"loss: expected curves with a minimum at 2 budgets at least, got {len(good)}; add sizes on both sides"
            )
        warnings.append("fewer than 2 budgets bracket their minimum: the laws rest on extrapolated minima")
        used = good
    elif len(used) < len(vertices):
        out = ", ".join(f"{v.budget:.3g}" for v in vertices if not v.bracketed)
        warnings.append(f"left out of the laws, minimum not bracketed: budget {out}")
    minima = [vertices[i] for i in used]
    spent, lowest = [v.budget for v in minima], [v.loss for v in minima]
    loss_law = fit_power(spent, lowest)
    _grid_warnings(minima, warnings)
    result = IsoflopFit(
        vertices=vertices,
        used=used,
        n_law=fit_power(spent, [v.params for v in minima]),
        d_law=fit_power(spent, [v.data for v in minima]),
        loss_law=loss_law,
        loss_law_floor=fit_power(spent, lowest, floor="free") if len(used) >= 4 else None,
        surface=_beside(runs, with_surface),
        vertex=vertex,
        data_unit=runs.data_unit,
        source=runs.source,
        bootstrap=_bootstrap(curves, levels, used, sigma, space, bootstrap, seed),
        run_noise=float(np.nan_to_num(sigma)) / (1.0 if space == "log" else float(np.median(loss))),
        size=runs.roles["params"],
        warnings=warnings,
        notes=runs.notes,
    )
    _disagreement(result)
    warnings += [f"L(C): {w}" for w in loss_law.warnings if w.startswith("no scaling")]
    if len(used) == 2:
        warnings.append("2 budgets: the laws pass through both exactly, and nothing tests their form")
    return result


def _bootstrap(
    curves: list[Curve], levels: Array, used: list[int], sigma: float, space: str, draws: int, seed: int
) -> dict[str, Array]:
    """Resample the curves' residuals (pooled, scaled for the parameters they cost), refit curves and lines."""
    if draws <= 0 or not np.isfinite(sigma) or len(used) < 2:
        return {}
    rng = np.random.default_rng(seed)
    pool = np.concatenate(
        [curves[i].residuals * np.sqrt(len(curves[i].x) / curves[i].dof) for i in used if curves[i].dof > 0]
    )
    if not len(pool):
        return {}
    columns = []
    for i in used:
        c = curves[i]
        fitted = c.design @ c.coefficients
        y = fitted + rng.choice(pool, size=(draws, len(c.x)))
        coefficients = y @ c.solver.T
        place, bend = c.minimum(coefficients)
        place = np.where((bend > 0) & (np.abs(place) < np.ptp(c.x)), place, np.nan)
        value = np.zeros(draws)
        for column in coefficients.T:  # Horner's rule, every draw at its own minimum
            value = value * place + column
        loss = value if space == "log" else np.log(np.maximum(value, 1e-300))
        columns.append((c.middle + place, np.log(c.data_at(place)), loss))
    x = np.log(levels[used])
    design = np.column_stack([x, np.ones_like(x)])
    solver = np.linalg.pinv(design)
    out = {}
    for prefix, k in (("N", 0), ("D", 1), ("L", 2)):
        y = np.stack([c[k] for c in columns], axis=1)
        lines = y[np.isfinite(y).all(1)] @ solver.T
        if len(lines) >= draws // 2:
            out[f"{prefix}_exponent"], out[f"{prefix}_coefficient"] = lines[:, 0], lines[:, 1]
    return out


def _grid_warnings(vertices: list[Vertex], warnings: list[str]) -> None:
    wide = [v for v in vertices if np.sqrt(v.width) > _WIDE]
    if wide:
        warnings.append(
            f"the grid is wide ({wide[0].width:.3g}x from least to greatest size at budget {wide[0].budget:.3g}): a "
            "lopsided curve moves the vertex; trust the surface fit for coefficients"
        )
    offsets = np.log([v.centre_offset for v in vertices])
    far = int(np.argmax(np.abs(offsets)))
    if abs(offsets[far]) > np.log(_OFF_CENTRE):
        v = vertices[far]
        warnings.append(
            f"the grid is off centre ({v.centre_offset:.2g}x its minimum at budget {v.budget:.3g}): "
            "the vertex is biased towards the grid's centre"
        )
    if len(vertices) >= 3:
        x = np.log([v.budget for v in vertices])
        slope = float(np.polyfit(x, offsets, 1)[0])
        if abs(slope) > _DRIFT and abs(slope) * np.ptp(x) > np.log(1.5):
            warnings.append(
                f"the grid's centre drifts against the minimum (C^{slope:+.2f}): the exponents themselves are biased"
            )


def _beside(runs: RunTable, wanted: bool) -> SurfaceFit | None:
    if not wanted or not runs.has("flops") and not runs.has("budget"):
        return None
    if not runs.has("flops"):
        runs = RunTable(runs.columns, {**runs.roles, "flops": runs.roles["budget"]}, runs.source, runs.rows, runs.notes)
    try:
        return fit_surface(runs)
    except InputError:
        return None


def _disagreement(result: IsoflopFit) -> None:
    surface = result.surface
    if surface is None or not surface.converged or surface.cost is None:
        return
    top = max(v.budget for v in result.vertices)
    for factor in (1.0, 100.0):
        c = top * factor
        mine = result.n_law.predict(c).value
        if not surface.has_optimum(c):
            result.warnings.append(f"no scaling in this range by the surface: it has no best size at {c:.3g} FLOPs")
            return
        theirs = surface.optimum(c)["params"]
        gap = mine / theirs.value
        if np.isfinite(gap) and abs(np.log(gap)) > np.log(1.15):
            result.warnings.append(
                f"curves and surface disagree: N_opt at {c:.3g} FLOPs is {mine:.4g} by the {result.vertex}, "
                f"{theirs.value:.4g} by the surface ({gap:.2f}x)"
            )
            return
