"""Hyper-parameter laws: the best learning rate and batch, how flat the loss is there, how both move.

Runs come in cells: one cell is one (N, D) trained with several learning rates and batches. A quadratic in
(log lr, log batch) gives each cell's optimum with its covariance; the optima are then regressed on log N and log D,
weighted by what is known of them. Intervals resample whole cells, because runs of a cell share their size, data and
luck. The losses at the cells' optima carry the surface L(N, D) of tuned runs: the procedure of Yin et al.
(arXiv:2411.17470), who found that fixed, untuned values move N_opt by 40 %.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ditscale.errors import InputError
from ditscale.scaling.cells import NEAR_OPTIMAL, Cell, fit_cell
from ditscale.scaling.checks import need_draws
from ditscale.scaling.engine import Array
from ditscale.scaling.jsonable import plain
from ditscale.scaling.registry import Power
from ditscale.scaling.runs import RunTable, cluster_budgets
from ditscale.scaling.surface import SurfaceFit, fit_surface

# Sizes, and amounts of data, that differ by less than this share are one cell's: whole steps of unlike batches do not come
# to the same number of images.
_ONE_SIZE, _ONE_LENGTH = 0.001, 0.02


@dataclass(frozen=True)
class Optimum:
    """One hyper-parameter's best value as a power law of N and D, and how well it is known.

    Attributes:
        law: Power of params and data.
        covariance: of (log coefficient, exponents in the law's order), by the bootstrap of cells.
        spread: scatter of the cells' optima around the law, on the logarithm.
        dof: degrees of freedom of both.
    """

    law: Power
    covariance: Array
    spread: float
    dof: int

    def intervals(self) -> dict[str, list[float]]:
        """95 % intervals of "coefficient" and of the exponents."""
        reach = float(stats.t.ppf(0.975, self.dof)) * np.sqrt(np.diag(self.covariance))
        centre = [float(np.log(self.law.coefficient)), *self.law.exponents.values()]
        names = ["coefficient", *(f"{x}_exponent" for x in self.law.exponents)]
        ends = {n: [float(c - r), float(c + r)] for n, c, r in zip(names, centre, reach, strict=True)}
        ends["coefficient"] = [float(np.exp(e)) for e in ends["coefficient"]]
        return ends

    def at(self, *, params: float, data: float) -> dict[str, Any]:
        """The best value at another (N, D), with a 95 % interval for that cell's own optimum."""
        value = float(self.law(params=params, data=data))
        logs = {"params": np.log(params), "data": np.log(data)}
        row = np.array([1.0, *(logs[x] for x in self.law.exponents)])
        se = float(np.sqrt(self.spread**2 + row @ self.covariance @ row))
        half = float(stats.t.ppf(0.975, self.dof)) * se
        return {"value": value, "interval": [float(value * np.exp(-half)), float(value * np.exp(half))]}

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return plain(
            {
                "coefficient": self.law.coefficient,
                "exponents": dict(self.law.exponents),
                "unit": self.law.unit,
                "formula": self.law.formula,
                "covariance": self.covariance,
                "spread": self.spread,
                "dof": self.dof,
            }
        )


@dataclass
class HparamsFit:
    """lr_opt(N, D) and B_opt(N, D) as power laws.

    Attributes:
        cells: the optima.
        optima: "lr" and, where it was varied, "batch".
        data_unit: of D: "images" or "tokens".
        fixed: inputs that did not vary and so have no exponent.
        warnings: what a reader must know.
    """

    cells: list[Cell]
    optima: dict[str, Optimum]
    data_unit: str
    fixed: list[str]
    warnings: list[str] = field(default_factory=list)

    @cached_property
    def surface(self) -> SurfaceFit | None:
        """L(N, D) of tuned runs, from the losses at the cells' optima; None where they are too few."""
        cells = [c for c in self.cells if c.inside]
        columns: dict[str, Any] = {
            "params": [c.params for c in cells],
            self.data_unit: [c.data for c in cells],
            "loss": [c.loss for c in cells],
        }
        if all(c.flops is not None for c in cells):
            columns["flops"] = [c.flops for c in cells]
        try:
            return fit_surface(RunTable.from_columns(columns, source="cells at their best hyper-parameters"))
        except InputError:
            return None

    @property
    def laws(self) -> dict[str, Power]:
        """The power laws by name."""
        return {name: optimum.law for name, optimum in self.optima.items()}

    @property
    def intervals(self) -> dict[str, dict[str, list[float]]]:
        """Law -> parameter -> 95 % interval."""
        return {name: optimum.intervals() for name, optimum in self.optima.items()}

    @property
    def params(self) -> dict[str, float]:
        """Coefficients and exponents by name, such as "lr_coefficient" and "lr_params_exponent"."""
        out = {}
        for name, law in self.laws.items():
            out[f"{name}_coefficient"] = law.coefficient
            out.update({f"{name}_{x}_exponent": e for x, e in law.exponents.items()})
        return out

    def predict(self, *, params: float, data: float) -> dict[str, Any]:
        """Best learning rate and batch at another (N, D), with a 95 % interval for that cell's own optimum."""
        return {name: optimum.at(params=params, data=data) for name, optimum in self.optima.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``plan --hparams FILE`` reads them back, and ``plan --law FILE`` the surface."""
        content = {
            "kind": "hparams",
            "params": self.params,
            "intervals": self.intervals,
            "laws": {name: optimum.to_json() for name, optimum in self.optima.items()},
            "cells": [c.__dict__ for c in self.cells],
            "near_optimal": NEAR_OPTIMAL,
            "data_unit": self.data_unit,
            "fixed": self.fixed,
            "surface": self.surface.to_json() if self.surface else None,
            "warnings": self.warnings,
        }
        return plain(content)

    def summary(self) -> str:
        """A readable table."""
        lines = [f"hyper-parameters: {len(self.cells)} cells, D in {self.data_unit}"]
        lines.append(
            f"  {'N':>12s}{'D':>12s}{'lr':>12s}{'batch':>10s}{'loss':>10s}   lr band (+{100 * NEAR_OPTIMAL:g} % loss)"
        )
        for c in self.cells:
            batch = f"{c.batch:10.4g}" if c.batch else f"{'-':>10s}"
            lines.append(
                f"  {c.params:12.4g}{c.data:12.4g}{c.lr:12.4g}{batch}{c.loss:10.5g}   "
                f"{c.band[0]:.2f}x to {c.band[1]:.2f}x{'' if c.inside else '   NOT INSIDE THE GRID'}"
            )
        for name, optimum in self.optima.items():
            lines.append(f"  {name} = {optimum.law.formula}")
            lines += [f"    {k:22s}[{v[0]:.4g}, {v[1]:.4g}]" for k, v in optimum.intervals().items()]
        if self.surface:
            lines.append(f"  tuned runs: {self.surface.fit.law.formula}")
            lines.append("    " + ", ".join(f"{k} {v:.5g}" for k, v in self.surface.params.items()))
        lines += [f"  warning: {w}" for w in self.warnings]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()


def fit_hparams(
    table: RunTable | str | Path,
    *,
    lr: str = "lr",
    batch: str | None = "batch",
    bootstrap: int = 1000,
    seed: int = 0,
    **columns: Any,
) -> HparamsFit:
    """Fit lr_opt(N, D) and B_opt(N, D) from cells of runs.

    Runs are of one cell where their sizes differ by less than 0.1 % and their data by less than 2 %.

    Args:
        table: runs with params, images or tokens, loss, lr and batch; or a file of them.
        lr: column of peak learning rates.
        batch: column of batch sizes; None where it was not varied.
        bootstrap: draws of cells. Default: 1000.
        seed: of the bootstrap.

    Returns:
        HparamsFit.

    Raises:
        InputError: fewer than 3 cells whose minimum lies inside their grid, or cells too small for a
            quadratic.
    """
    need_draws(bootstrap, seed)
    runs = table if isinstance(table, RunTable) else RunTable.read(table, **columns)
    n, d, loss, rates = runs.params, runs.data, runs.loss, runs.column(lr)
    batches = runs.column(batch) if batch and batch in runs.columns else None
    keys = np.column_stack([cluster_budgets(x, tolerance=t) for x, t in ((n, _ONE_SIZE), (d, _ONE_LENGTH))])
    which = np.unique(keys, axis=0, return_inverse=True)[1].ravel()
    masks = [which == k for k in range(which.max() + 1)]
    # What counts is variation within cells: a batch that only follows D says nothing about the best one.
    varied = batches if batches is not None and any(len(np.unique(batches[m])) > 1 for m in masks) else None
    warnings: list[str] = []
    cells: list[Cell] = []
    for mask in masks:
        cell = fit_cell(n[mask], d[mask], rates[mask], None if varied is None else varied[mask], loss[mask])
        where = f"cell N {n[mask][0]:.4g}, D {d[mask][0]:.4g}"
        if cell is None:
            warnings.append(f"{where}: {int(mask.sum())} runs are too few for a quadratic; left out")
            continue
        if runs.has("flops"):
            cell = dataclasses.replace(cell, flops=float(np.exp(np.log(runs.flops[mask]).mean())))
        cells.append(cell)
        if not cell.inside:
            warnings.append(f"{where}: its optimum is not inside the grid; left out")
    used = [c for c in cells if c.inside]
    if len(used) < 3:
        raise InputError(
            f"lr: expected at least 3 cells (N, D) with their best learning rate inside the grid, got {len(used)}; "
            "add learning rates on the side where the loss still falls"
        )
    fixed = [x for x in ("params", "data") if np.ptp(np.log([getattr(c, x) for c in used])) < 1e-3]
    warnings += [f"{x} does not vary over the cells: its exponent is not determined, and left out" for x in fixed]
    names = ("lr",) if varied is None else ("lr", "batch")
    optima = {name: _regress(used, name, fixed, bootstrap, seed) for name in names}
    return HparamsFit(cells, optima, runs.data_unit, fixed, warnings)


def _known(variances: list[float]) -> Array:
    """Variances of the cells' optima. A cell of no more runs than coefficients has none: it counts as the worst of the others."""
    own = np.array(variances)
    known = np.isfinite(own)
    return np.where(known, own, own[known].max(initial=0.0))


def _regress(cells: list[Cell], name: str, fixed: list[str], draws: int, seed: int) -> Optimum:
    """Weighted log-linear regression of one optimum on log N and log D, with a cell bootstrap."""
    index = ("lr", "batch").index(name)
    y = np.log([getattr(c, name) for c in cells])
    own = _known([c.covariance[index][index] for c in cells])
    free = [x for x in ("params", "data") if x not in fixed]
    inputs = {x: np.log([getattr(c, x) for c in cells]) for x in free}
    if len(free) == 2 and abs(np.corrcoef(inputs["params"], inputs["data"])[0, 1]) > 0.999:
        raise InputError(
            "params: expected N and D to vary apart over the cells, got all cells on one line of log N and log D"
        )
    if len(cells) < len(free) + 2:
        raise InputError(
            f"lr: expected at least {len(free) + 2} usable cells for exponents of {free}, got {len(cells)}"
        )
    means = np.array([inputs[x].mean() for x in free])
    design = np.column_stack([np.ones(len(y)), *(inputs[x] - m for x, m in zip(free, means, strict=True))])

    def solve(rows: Any, extra: float) -> Array:
        root = np.sqrt(1.0 / (own[rows] + extra))
        answer: Array = np.linalg.lstsq(design[rows] * root[:, None], y[rows] * root, rcond=None)[0]
        return answer

    # Optima scatter by more than their own error (the law is only a law): one round gives that extra variance.
    everyone = np.arange(len(y))
    dof = len(y) - design.shape[1]
    left = y - design @ solve(everyone, 1e-4)
    extra = max(float(left @ left) / dof - float(own.mean()), 1e-6)
    estimate = solve(everyone, extra)
    left = y - design @ estimate
    rng = np.random.default_rng(seed)
    replicates = []
    for _ in range(draws):
        rows = rng.integers(0, len(y), len(y))
        if np.linalg.matrix_rank(design[rows]) == design.shape[1]:
            replicates.append(solve(rows, extra))
    if len(replicates) < max(draws // 2, 20):
        raise InputError(
            f"bootstrap: expected at least 40 draws of cells that vary in N and D, got {len(replicates)} of {draws}"
        )
    # From the middle of the cells, where they were fitted, to N = D = 1, where coefficients are quoted.
    move = np.eye(1 + len(free))
    move[0, 1:] = -means
    estimate = move @ estimate
    # The bootstrap's variance lacks the degrees of freedom of the fit; t makes up for few cells.
    covariance = move @ np.cov(np.array(replicates).T, ddof=1).reshape(move.shape) @ move.T * (len(y) / dof)
    law = Power(
        float(np.exp(estimate[0])),
        {x: float(e) for x, e in zip(free, estimate[1:], strict=True)},
        "peak learning rate" if name == "lr" else "images or sequences a step",
        17,
    )
    return Optimum(law, covariance, float(np.sqrt(float(left @ left) / dof)), dof)
