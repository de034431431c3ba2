"""Hyper-parameter laws: the best learning rate and batch, how flat the loss is there, how both move.

Runs come in cells: one cell is one (N, D) trained with several learning rates and batches.
A quadratic in (log lr, log batch) gives each cell's optimum with its covariance; the optima are then
regressed on log N and log D, weighted by what is known of them. Intervals resample whole cells, because runs
of a cell share their size, data and luck (row bootstraps understate: facts of the Step Law refit in
docs/fitting.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from ditscale.errors import InputError
from ditscale.scaling.engine import Array
from ditscale.scaling.jsonable import load, plain
from ditscale.scaling.registry import PUBLISHED, Power, published
from ditscale.scaling.runs import RunTable

# "Near-optimal" in DeepSeek LLM (arXiv:2401.02954) and Step Law (arXiv:2503.04715).
NEAR_OPTIMAL = 0.0025


@dataclass(frozen=True)
class Cell:
    """The best learning rate and batch of one (N, D).

    Attributes:
        params, data: of the cell.
        lr, batch: at the minimum; batch None where it was not varied.
        loss: at the minimum.
        covariance: of (log lr, log batch) at the minimum, from the scatter of the runs.
        band: factor on the learning rate, down and up, that costs ``NEAR_OPTIMAL`` more loss at the best
            batch.
        batch_band: the same for the batch, or None.
        inside: whether the minimum lies within the runs' grid and the surface bends upwards all round.
        runs: how many.
    """

    params: float
    data: float
    lr: float
    batch: float | None
    loss: float
    covariance: tuple[tuple[float, ...], ...]
    band: tuple[float, float]
    batch_band: tuple[float, float] | None
    inside: bool
    runs: int


@dataclass
class HparamsFit:
    """lr_opt(N, D) and B_opt(N, D) as power laws.

    Attributes:
        cells: the optima.
        laws: "lr" and, where it was varied, "batch": Power of params and data.
        intervals: law -> parameter -> 95 % interval, by a bootstrap of whole cells scaled to t.
        spread: law -> scatter of the cells' optima around it, on the logarithm.
        replicates: law -> bootstrap draws of (log coefficient, exponents).
        data_unit: of D: "images" or "tokens".
        fixed: inputs that did not vary and so have no exponent.
        warnings: what a reader must know.
    """

    cells: list[Cell]
    laws: dict[str, Power]
    intervals: dict[str, dict[str, list[float]]]
    spread: dict[str, float]
    data_unit: str
    fixed: list[str]
    replicates: dict[str, Array] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def params(self) -> dict[str, float]:
        """Coefficients and exponents by name, such as "lr_coefficient" and "lr_params_exponent"."""
        out = {}
        for name, law in self.laws.items():
            out[f"{name}_coefficient"] = law.coefficient
            out.update({f"{name}_{x}_exponent": e for x, e in law.exponents.items()})
        return out

    @property
    def converged(self) -> bool:
        """Always: the regressions are linear."""
        return True

    def predict(self, *, params: float, data: float) -> dict[str, Any]:
        """Best learning rate and batch at another (N, D), with a 95 % interval for that cell's own
        optimum.
        """
        out: dict[str, Any] = {}
        used = sum(c.inside for c in self.cells)
        at = {"params": np.log(params), "data": np.log(data)}
        for name, law in self.laws.items():
            value = float(law(params=params, data=data))
            dof = max(used - 1 - len(law.exponents), 1)
            row = np.array([1.0, *(at[k] for k in law.exponents)])
            line = self.replicates[name] @ row
            se = np.sqrt(self.spread[name] ** 2 + line.var(ddof=1) * used / dof)
            half = float(stats.t.ppf(0.975, dof) * se)
            out[name] = {
                "value": value,
                "interval": [float(value * np.exp(-half)), float(value * np.exp(half))],
            }
        return out

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``plan --hparams FILE`` reads them back."""
        content = {
            "kind": "hparams",
            "params": self.params,
            "intervals": self.intervals,
            "spread": self.spread,
            "laws": {
                k: {"coefficient": v.coefficient, "exponents": dict(v.exponents), "formula": v.formula}
                for k, v in self.laws.items()
            },
            "cells": [c.__dict__ for c in self.cells],
            "data_unit": self.data_unit,
            "fixed": self.fixed,
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
        for name, law in self.laws.items():
            lines.append(f"  {name} = {law.formula}")
            lines += [f"    {k:22s}[{v[0]:.4g}, {v[1]:.4g}]" for k, v in self.intervals[name].items()]
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
    runs = table if isinstance(table, RunTable) else RunTable.read(table, pool=True, **columns)
    n, d, loss, rates = runs.params, runs.data, runs.loss, runs.column(lr)
    batches = runs.column(batch) if batch and batch in runs.columns else None
    keys = np.column_stack([np.round(np.log(n), 3), np.round(np.log(d), 3)])
    _, which = np.unique(keys, axis=0, return_inverse=True)
    which = which.ravel()
    warnings: list[str] = []
    # What counts is variation within cells: a batch that only follows D says nothing about the best one.
    vary_batch = batches is not None and any(len(np.unique(batches[which == k])) > 1 for k in range(which.max() + 1))
    cells = []
    for k in range(which.max() + 1):
        mask = which == k
        cell = _cell(
            n[mask],
            d[mask],
            rates[mask],
            batches[mask] if vary_batch and batches is not None else None,
            loss[mask],
        )
        if cell is None:
            warnings.append(
                f"cell N {n[mask][0]:.4g}, D {d[mask][0]:.4g}: {int(mask.sum())} runs are too few for a "
                f"quadratic; left out"
            )
        else:
            cells.append(cell)
            if not cell.inside:
                warnings.append(
                    f"cell N {cell.params:.4g}, D {cell.data:.4g}: its optimum is not inside the grid; left out"
                )
    used = [c for c in cells if c.inside]
    if len(used) < 3:
        raise InputError(
            f"lr: expected at least 3 cells (N, D) with their best learning rate inside the grid, got "
            f"{len(used)}; "
            "add learning rates on the side where the loss still falls"
        )
    laws: dict[str, Power] = {}
    intervals: dict[str, dict[str, list[float]]] = {}
    spread: dict[str, float] = {}
    replicates: dict[str, Array] = {}
    fixed: list[str] = []
    for name, index in (("lr", 0), ("batch", 1)) if vary_batch else (("lr", 0),):
        laws[name], intervals[name], spread[name], replicates[name], fixed = _regress(
            used, name, index, bootstrap, seed
        )
    for x in fixed:
        warnings.append(f"{x} does not vary over the cells: its exponent is not determined, and left out")
    return HparamsFit(cells, laws, intervals, spread, runs.data_unit, fixed, replicates, warnings)


def _cell(n: Array, d: Array, rates: Array, batches: Array | None, loss: Array) -> Cell | None:
    """A quadratic of log loss in (log lr, log batch), its minimum, and how well the runs place it."""
    x = np.log(rates)[:, None] if batches is None else np.column_stack([np.log(rates), np.log(batches)])
    dims = x.shape[1]
    if dims == 2 and len(np.unique(x[:, 1])) < 3:
        return None
    centre = x.mean(0)
    z = x - centre
    columns = [np.ones(len(z)), *z.T, *(z.T**2)]
    if dims == 2:
        columns.append(z[:, 0] * z[:, 1])
    design = np.column_stack(columns)
    if len(loss) < design.shape[1] or np.linalg.matrix_rank(design) < design.shape[1]:
        return None
    y = np.log(loss)
    solver = np.linalg.pinv(design)
    c = solver @ y
    left = y - design @ c
    dof = len(y) - design.shape[1]

    def place(c: Array) -> tuple[Array, Array]:
        hessian = np.zeros((dims, dims))
        np.fill_diagonal(hessian, 2.0 * c[1 + dims : 1 + 2 * dims])
        if dims == 2:
            hessian[0, 1] = hessian[1, 0] = c[5]
        minimum: Array = -np.linalg.solve(hessian, c[1 : 1 + dims])
        return minimum, hessian

    try:
        best, hessian = place(c)
    except np.linalg.LinAlgError:
        return None
    bends = bool(np.all(np.linalg.eigvalsh(hessian) > 0))
    inside = bends and bool(np.all((best > z.min(0)) & (best < z.max(0))))
    variance = float(left @ left) / dof if dof > 0 else float("nan")
    gradient = np.column_stack([(place(c + h)[0] - place(c - h)[0]) / 2e-6 for h in 1e-6 * np.eye(len(c))])
    covariance = variance * gradient @ (solver @ solver.T) @ gradient.T

    def band(i: int) -> tuple[float, float]:
        half = float(np.sqrt(2.0 * np.log1p(NEAR_OPTIMAL) / hessian[i, i])) if hessian[i, i] > 0 else float("inf")
        return float(np.exp(-half)), float(np.exp(half))

    value = float(c[0] + c[1 : 1 + dims] @ best + 0.5 * best @ hessian @ best)
    with np.errstate(over="ignore"):
        at = np.exp(best + centre)
    return Cell(
        params=float(np.exp(np.log(n).mean())),
        data=float(np.exp(np.log(d).mean())),
        lr=float(at[0]),
        batch=float(at[1]) if dims == 2 else None,
        loss=float(np.exp(value)),
        covariance=tuple(tuple(float(v) for v in row) for row in covariance),
        band=band(0),
        batch_band=band(1) if dims == 2 else None,
        inside=inside,
        runs=len(loss),
    )


def _regress(
    cells: list[Cell], name: str, index: int, draws: int, seed: int
) -> tuple[Power, dict[str, list[float]], float, Array, list[str]]:
    """Weighted log-linear regression of one optimum on log N and log D, with a cell bootstrap."""
    y = np.log([c.lr if index == 0 else c.batch or np.nan for c in cells])
    own = np.array([c.covariance[index][index] for c in cells])
    inputs = {"params": np.log([c.params for c in cells]), "data": np.log([c.data for c in cells])}
    fixed = [k for k, v in inputs.items() if np.ptp(v) < 1e-3]
    free = [k for k in inputs if k not in fixed]
    if len(free) == 2 and abs(np.corrcoef(inputs["params"], inputs["data"])[0, 1]) > 0.999:
        raise InputError(
            "params: expected N and D to vary apart over the cells, got all cells on one line of log N and log D"
        )
    if len(cells) < len(free) + 2:
        raise InputError(
            f"lr: expected at least {len(free) + 2} usable cells for exponents of {free}, got {len(cells)}"
        )
    means = {k: float(inputs[k].mean()) for k in free}
    design = np.column_stack([np.ones(len(y)), *(inputs[k] - means[k] for k in free)])

    def solve(rows: Any, extra: float) -> Array:
        w = 1.0 / (np.nan_to_num(own[rows], nan=0.0) + extra)
        root = np.sqrt(w)
        answer: Array = np.linalg.lstsq(design[rows] * root[:, None], y[rows] * root, rcond=None)[0]
        return answer

    # Optima scatter by more than their own error (the law is only a law): one round gives that extra
    # variance.
    everyone = np.arange(len(y))
    c = solve(everyone, 1e-4)
    left = y - design @ c
    dof = len(y) - design.shape[1]
    extra = max(float(left @ left) / dof - float(np.nanmean(np.nan_to_num(own))), 1e-6)
    c = solve(everyone, extra)
    left = y - design @ c
    rng = np.random.default_rng(seed)
    replicates = []
    for _ in range(draws):
        rows = rng.integers(0, len(y), len(y))
        if np.linalg.matrix_rank(design[rows]) == design.shape[1]:
            replicates.append(solve(rows, extra))
    names = ["coefficient", *(f"{k}_exponent" for k in free)]
    shift = np.array([means[k] for k in free])
    if len(replicates) < max(draws // 2, 20):
        raise InputError(
            f"bootstrap: expected at least 40 draws of cells that vary in N and D, got {len(replicates)} of {draws}"
        )
    r = np.array([*replicates, c])
    r[:, 0] -= r[:, 1:] @ shift
    estimate, r = r[-1], r[:-1]
    # The bootstrap's variance lacks the degrees of freedom of the fit; t makes up for few cells.
    reach = float(stats.t.ppf(0.975, dof)) * r.std(axis=0, ddof=1) * np.sqrt(len(y) / dof)
    low, high = estimate - reach, estimate + reach
    ends = {parameter: [float(low[i]), float(high[i])] for i, parameter in enumerate(names)}
    ends["coefficient"] = [float(np.exp(low[0])), float(np.exp(high[0]))]
    law = Power(
        float(np.exp(estimate[0])),
        {k: float(estimate[1 + i]) for i, k in enumerate(free)},
        "peak learning rate" if name == "lr" else "images or sequences a step",
        17,
    )
    return law, ends, float(np.sqrt(float(left @ left) / dof)), r, fixed


@dataclass(frozen=True)
class HyperLaw:
    """Batch (in tokens) and learning rate for a plan: functions of (params, tokens, images, flops), or
    None.
    """

    batch_tokens: Any
    lr: Any


def hyper_law(spec: Any) -> HyperLaw:
    """Read hyper-parameter laws: a published name, a HparamsFit, or the file of one (``fit hparams --json``).

    Raises:
        InputError: none of these.
    """
    if isinstance(spec, HparamsFit):
        return _from_powers(spec.laws, spec.data_unit)
    if str(spec) in PUBLISHED:
        law = published(str(spec))
        powers = {k: law.laws[k] for k in ("lr", "batch_tokens") if k in law.laws}
        if not powers:
            raise InputError(f"hparams: law {law.name} has no batch or learning rate")
        return HyperLaw(
            _of_tokens(powers["batch_tokens"]) if "batch_tokens" in powers else None,
            _of_tokens(powers["lr"]) if "lr" in powers else None,
        )
    path = Path(str(spec))
    if not path.is_file():
        raise InputError(
            f"hparams: expected a published law or a file of `ditscale fit hparams --json`, got {str(spec)!r}"
        )
    record = load(path)
    if not isinstance(record, Mapping) or record.get("kind") != "hparams":
        raise InputError(f"hparams: expected {path} to hold `ditscale fit hparams --json`, got something else")
    laws = {k: Power(v["coefficient"], v["exponents"], k, 17) for k, v in record["laws"].items()}
    return _from_powers(laws, record["data_unit"])


def _of_tokens(law: Power) -> Any:
    return lambda n, tokens, images, flops: float(law(params=n, tokens=tokens, flops=flops))


def _from_powers(laws: Mapping[str, Power], unit: str) -> HyperLaw:
    def of(law: Power | None, *, as_batch: bool) -> Any:
        if law is None:
            return None

        def value(n: float, tokens: float, images: float, flops: float) -> float:
            got = float(law(params=n, data=tokens if unit == "tokens" else images))
            return got * tokens / images if as_batch else got

        return value

    return HyperLaw(of(laws.get("batch"), as_batch=True), of(laws.get("lr"), as_batch=False))
