"""The loss surface L(N, D): fit it to runs, and read the compute-optimal allocation from it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ditscale.errors import InputError
from ditscale.scaling.checks import need_draws, need_positive
from ditscale.scaling.cost import CostLaw
from ditscale.scaling.engine import Array
from ditscale.scaling.fit import fit_law
from ditscale.scaling.intervals import MANY_RUNS, Interval, Quantity
from ditscale.scaling.jsonable import plain
from ditscale.scaling.laws import Law, TermLaw
from ditscale.scaling.losses import Loss
from ditscale.scaling.more_laws import SURFACE_LAWS
from ditscale.scaling.results import NOT_IDENTIFIABLE, LawFit, Prediction
from ditscale.scaling.runs import RunTable

_MIN_LEVELS = 3
# Runs whose compute differs by less than this factor stand at one budget.
_ONE_BUDGET = 1.3
# A model gives every parameter set at every point; where set i at point i is wanted, this many at a time.
_BLOCK = 32
# The optimum of a law without a closed form is sought within this factor of the fitted sizes' middle, in log N.
_SEARCH = np.log(1e9)


@dataclass
class SurfaceFit:
    """A loss surface with its allocation.

    Attributes:
        fit: the law's fit (parameters, certificate, intervals, bootstraps).
        cost: what a run costs, or None where the table had no compute.
        data_unit: "images" or "tokens": the unit of D.
        source: where the runs came from.
        flops_range: least and greatest compute of the runs, or None.
        bootstrap_draws: how many case-bootstrap draws ``sd`` rests on (0: none asked).
        seconds: wall time of the parts.
        notes: what was done to the table before.
        size: the column that N came from.
    """

    fit: LawFit
    cost: CostLaw | None
    data_unit: str
    source: str
    flops_range: tuple[float, float] | None
    bootstrap_draws: int
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()
    size: str = "params"

    @property
    def params(self) -> dict[str, float]:
        """Parameters of the law, and the exponents a (of N_opt) and b (of D_opt)."""
        if not self.allocates:
            return dict(self.fit.params)
        a, b = self._exponents(self.fit.theta[None, :])
        return {**self.fit.params, "a": float(a[0]), "b": float(b[0])}

    @property
    def allocates(self) -> bool:
        """Whether the law is one of N and D alone, so that a compute budget has one best split."""
        return set(self.fit.law.inputs) == {"params", "data"}

    @property
    def _closed(self) -> bool:
        law = self.fit.law
        return isinstance(law, TermLaw) and len(law.terms) == 2 and self.allocates

    @property
    def intervals(self) -> dict[str, list[float]]:
        """95 % intervals by name."""
        return {name: self.interval(name).ends for name in self.params}

    @property
    def converged(self) -> bool:
        """Whether the certificate of the fit holds."""
        return self.fit.converged

    @property
    def warnings(self) -> list[str]:
        """What a reader must know."""
        return self.fit.warnings

    @property
    def sd(self) -> dict[str, float]:
        """Bootstrap standard deviations by name (empty without a bootstrap)."""
        if not self.bootstrap_draws:
            return {}
        return {k: float(v.std(ddof=1)) for k, v in self.replicates().items()}

    def replicates(self) -> dict[str, Array]:
        """Parameters of the case-bootstrap draws by name."""
        theta = self.fit.bootstrap("case", self.bootstrap_draws)
        values = self.fit.export_replicates(theta)
        if not self.allocates:
            return values
        a, b = self._exponents(theta)
        return {**values, "a": a, "b": b}

    def interval(self, name: str, *, method: str | None = None, level: float = 0.95) -> Interval:
        """The interval of a parameter, or of "a" and "b"."""
        if name in ("a", "b") and self.allocates:
            which = ("a", "b").index(name)
            return self.fit.interval_of(lambda th: self._exponents(th)[which], method=method, level=level)
        return self.fit.interval(name, method=method, level=level)

    def predict(
        self,
        *,
        params: Any,
        data: Any = None,
        images: Any = None,
        tokens: Any = None,
        flops: Any = None,
        level: float = 0.95,
        method: str | None = None,
        **others: Any,
    ) -> Prediction:
        """The loss of runs of given size and data (or of given size and compute, through the cost law).

        ``others`` are the law's other inputs, such as ``unique`` of repeated data.
        """
        d = self._data(data, images, tokens)
        if d is None:
            if flops is None:
                raise InputError(f"{self.data_unit}: expected the training data of the run, got none")
            d = self._need_cost().data(np.asarray(flops, dtype=float), np.asarray(params, dtype=float))
        return self.fit.predict(params=params, data=d, level=level, method=method, **others)

    def _data(self, data: Any, images: Any, tokens: Any) -> Any:
        other = tokens if self.data_unit == "images" else images
        if other is not None:
            raise InputError(
                f"{'tokens' if self.data_unit == 'images' else 'images'}: this law counts {self.data_unit}"
            )
        mine = images if self.data_unit == "images" else tokens
        return mine if mine is not None else data

    def optimum(self, flops: float, *, level: float = 0.95, method: str | None = None) -> dict[str, Interval]:
        """The compute-optimal run at a budget: intervals of params, data, loss, new_run (the loss of one
        run) and ratio D/N.

        Raises:
            InputError: no compute was measured, the law has inputs beside N and D, or it has no best size at all.
        """
        self._need_cost()
        budget = need_positive("budget", flops, of="of FLOPs")
        if not self.allocates:
            raise InputError(
                f"law: {self.fit.law.name} needs {', '.join(self.fit.law.inputs)}: no split of compute alone"
            )
        self.need_optimum(budget)

        def log_of(which: int) -> Quantity:
            return lambda th: np.exp(self.log_optimum(th, budget)[which])

        def of(quantity: Quantity, log: bool = True, new_run: bool = False) -> Interval:
            return self.fit.interval_of(quantity, log=log, method=method, level=level, new_run=new_run)

        # The noise of a run is known on the scale of the residuals.
        log = self.fit.space == "log"

        return {
            "params": of(log_of(0)),
            "data": of(log_of(1)),
            "loss": of(log_of(2), log),
            "new_run": of(log_of(2), log, new_run=True),
            "ratio": of(lambda th: np.exp(self.log_optimum(th, budget)[1] - self.log_optimum(th, budget)[0])),
        }

    def has_optimum(self, flops: float) -> bool:
        """Whether the surface has a best size at a budget: only where its loss falls with both size and data."""
        with np.errstate(all="ignore"):
            best = np.exp(np.concatenate(self.log_optimum(self.fit.theta[None, :], flops)))
        return bool(np.all(np.isfinite(best) & (best > 0)))

    def need_optimum(self, flops: float) -> None:
        """InputError where the surface has no best size at a budget."""
        if not self.has_optimum(flops):
            raise InputError(
                f"loss: expected losses that fall with size and data in {self.source}, got no scaling in this range: the "
                f"surface has no best size at {flops:.4g} FLOPs"
            )

    def _need_cost(self) -> CostLaw:
        if self.cost is None:
            raise InputError("flops: expected a column of measured compute to allocate a budget, got none")
        return self.cost

    def _inner(self, theta: Array) -> tuple[Array, Array, Array, Array]:
        """Logarithms of A and B and the exponents inside the bracket, [S] each."""
        law = self.fit.law
        if not isinstance(law, TermLaw):
            raise RuntimeError(f"law {law.name} has no closed form of its optimum")
        values = law.export(theta, self.fit.centre)

        def exponent(which: int, name: str) -> Array:
            e = law.terms[which].exponents[name]
            return values[e] if isinstance(e, str) else np.full(len(theta), float(e))

        with np.errstate(divide="ignore"):
            first, second = (np.log(values[t.coefficient]) for t in law.terms)
        return first, second, exponent(0, "params"), exponent(1, "data")

    def _exponents(self, theta: Array) -> tuple[Array, Array]:
        p = self.cost.exponent if self.cost else 1.0
        if self._closed:
            _, _, alpha, beta = self._inner(theta)
            with np.errstate(divide="ignore", invalid="ignore"):
                a = beta / (alpha + p * beta)
        else:
            # Without one exponent: the local one at the middle of the runs.
            n, d = (float(np.exp(self.fit.centre[k])) for k in ("params", "data"))
            c = self.cost.flops(n, d) if self.cost else n * d
            a = (self.log_optimum(theta, c * 1.1)[0] - self.log_optimum(theta, c / 1.1)[0]) / (2 * np.log(1.1))
        return a, 1.0 - p * a

    def log_optimum(self, theta: Array, flops: float) -> tuple[Array, Array, Array]:
        """Logarithms of N_opt, D_opt and the loss there.

        Setting the derivative of A N^-alpha + B D^-beta along k N^p D = C to zero gives
        N^(alpha + p beta) = (alpha A / (p beta B)) (C/k)^beta; other laws are searched along the same line.
        """
        cost = self.cost or CostLaw(1.0, 1.0, 0.0, "N*D")
        c = np.log(flops / cost.coefficient)
        if self._closed:
            log_a, log_b, alpha, beta = self._inner(theta)
            with np.errstate(all="ignore"):
                ratio = np.log(alpha) + log_a - np.log(cost.exponent * beta) - log_b
                log_n = (ratio + beta * c) / (alpha + cost.exponent * beta)
        else:
            log_n = self._search(theta, c, cost.exponent)
        log_d = c - cost.exponent * log_n
        return log_n, log_d, self._log_loss(theta, log_n, log_d)

    def _log_loss(self, theta: Array, log_n: Array, log_d: Array) -> Array:
        """Loss of parameter set i at point i."""
        out = np.empty(len(theta))
        for first in range(0, len(theta), _BLOCK):
            rows = slice(first, first + _BLOCK)
            model = self.fit.law.model({"params": log_n[rows], "data": log_d[rows]}, self.fit.centre)
            with np.errstate(all="ignore"):
                out[rows] = np.log(np.diagonal(model.value(theta[rows])))
        return out

    def _search(self, theta: Array, c: float, p: float) -> Array:
        """Golden-section search for the best log N along ``p log N + log D = c``, for all parameter sets at once.

        NaN where the loss has no minimum within ``_SEARCH`` of the runs.
        """
        middle = self.fit.centre["params"]
        grid = np.linspace(middle - _SEARCH, middle + _SEARCH, 241)
        values = np.stack([self._log_loss(theta, np.full(len(theta), g), np.full(len(theta), c - p * g)) for g in grid])
        values = np.where(np.isfinite(values), values, np.inf)
        # Least among the valleys: a form that falls without end far from the runs (farseer) has no best size there.
        valley = (values[1:-1] < values[:-2]) & (values[1:-1] < values[2:])
        i = 1 + np.argmin(np.where(valley, values[1:-1], np.inf), axis=0)
        low, high = grid[i - 1], grid[i + 1]
        golden = (np.sqrt(5.0) - 1.0) / 2.0
        for _ in range(40):
            left, right = high - golden * (high - low), low + golden * (high - low)
            better = self._log_loss(theta, left, c - p * left) < self._log_loss(theta, right, c - p * right)
            low, high = np.where(better, low, left), np.where(better, right, high)
        best: Array = np.where(valley.any(axis=0), 0.5 * (low + high), np.nan)
        return best

    @np.errstate(all="ignore")  # what is not finite is written as null
    def to_json(self) -> dict[str, Any]:
        """The contract's keys of ``ditscale fit surface --json`` and everything else of the fit."""
        base = self.fit.to_json()
        content = {
            **base,
            **self.params,
            "params": self.params,
            "intervals": self.intervals,
            "sd": self.sd,
            "bootstrap": self.bootstrap_draws,
            "data_unit": self.data_unit,
            "size": self.size,
            "cost": self.cost.to_json() if self.cost else None,
            "flops_range": list(self.flops_range) if self.flops_range else None,
            "source_file": self.source,
            "notes": list(self.notes),
            "seconds": self.seconds,
        }
        return plain(content)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> SurfaceFit:
        """Rebuild from :meth:`to_json`, without fitting again.

        Raises:
            InputError: the record is no saved surface.
        """
        fit = LawFit.from_json(record)
        cost = record.get("cost")
        span = record.get("flops_range")
        return cls(
            fit=fit,
            cost=CostLaw(cost["coefficient"], cost["exponent"], cost["rms_relative_error"], cost["source"])
            if cost
            else None,
            data_unit=record["data_unit"],
            source=record["source_file"],
            flops_range=(span[0], span[1]) if span else None,
            bootstrap_draws=0,
            seconds=dict(record.get("seconds", {})),
            notes=tuple(record.get("notes", ())),
            size=record.get("size", "params"),
        )

    def summary(self) -> str:
        """A readable table."""
        lines = [self.fit.summary(), f"  D in {self.data_unit}; runs from {self.source}"]
        for name in ("a", "b") if self.allocates else ():
            low, high = self.interval(name).ends
            lines.append(f"  {name:14s}{self.params[name]:16.8g}   [{low:.6g}, {high:.6g}]")
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()


def fit_surface(
    table: RunTable | str | Path,
    *,
    law: str | Law = "surface",
    loss_fn: str | Loss = "huber:auto",
    space: str = "log",
    starts: int = 8,
    bootstrap: int = 0,
    seed: int = 0,
    interval_method: str = "auto",
    weights: Any = None,
    inputs: Mapping[str, str] | None = None,
    **columns: Any,
) -> SurfaceFit:
    """Fit a loss surface L(N, D) to runs.

    Args:
        table: runs, or a file or study folder to read (``columns`` then go to :meth:`RunTable.read`).
        law: "surface" (E + A/N^alpha + B/D^beta), "surface-tied", "surface-floorless", "skaling", "kaplan", "farseer",
            "video", or one with more inputs: "moe", "moe-density", "repetition".
        loss_fn: "huber:1e-3" with ``space="log"`` is Chinchilla's; the default's knee is 1.345 robust spreads.
        space: "log" or "raw" residuals.
        starts: starts of the variable-projection grid that are polished. Default: 8.
        bootstrap: case-bootstrap draws for ``sd``; with 100 runs or more their percentiles are then the intervals.
            Default: 0.
        seed: of the bootstrap.
        interval_method: see :mod:`ditscale.scaling.intervals`.
        weights: of the runs. Default: equal.
        inputs: columns of the law's other inputs by name, such as ``{"unique": "unique_images"}``. Default: a column
            of the input's own name.

    Returns:
        SurfaceFit.

    Raises:
        InputError: fewer than 3 sizes or 3 amounts of data, runs at one budget only, or fewer runs than parameters.
    """
    begun = time.perf_counter()
    runs = as_table(table, columns)
    form = surface_law(law)
    need_draws(bootstrap, seed)
    if bootstrap and interval_method == "auto" and len(runs) >= MANY_RUNS:
        interval_method = "case"
    n, d, loss = runs.params, runs.data, runs.loss
    for name, values in (("params", n), (runs.data_unit, d)):
        levels = len(np.unique(np.round(np.log(values), 6)))
        if levels < _MIN_LEVELS:
            raise InputError(
                f"{name}: expected at least {_MIN_LEVELS} different values to fit a surface, got {levels} "
                f"in {len(runs)} runs"
            )
    spends = runs.column("flops" if runs.has("flops") else "budget") if _has_budgets(runs) else None
    if spends is not None and spends.max() < _ONE_BUDGET * spends.min():
        raise InputError(
            f"budget: expected runs of at least 2 different budgets to fit a surface, got all at about {spends.max():.4g} FLOPs"
        )
    fit = fit_law(
        form,
        {"params": n, "data": d, **_other_inputs(runs, form, inputs or {})},
        loss,
        weights=weights,
        groups=_budget_groups(runs),
        loss_fn=loss_fn,
        space=space,
        starts=starts,
        interval_method=interval_method,
        seed=seed,
    )
    if "tokens (C/6N)" in runs.roles.values():
        cost: CostLaw | None = CostLaw(6.0, 1.0, 0.0, "6ND")
    else:
        cost = CostLaw.measured(n, d, runs.flops) if runs.has("flops") else None
    _warn(fit, runs, cost)
    result = SurfaceFit(
        fit=fit,
        cost=cost,
        data_unit=runs.data_unit,
        source=runs.source,
        flops_range=(float(runs.flops.min()), float(runs.flops.max())) if runs.has("flops") else None,
        bootstrap_draws=int(bootstrap),
        seconds={"fit": time.perf_counter() - begun, "bootstrap": 0.0},
        notes=runs.notes,
        size=runs.roles["params"],
    )
    if bootstrap:
        begun = time.perf_counter()
        fit.draws = int(bootstrap)
        fit.bootstrap("case")
        result.seconds["bootstrap"] = time.perf_counter() - begun
    return result


def _warn(fit: LawFit, runs: RunTable, cost: CostLaw | None) -> None:
    """Say what the runs leave open."""
    if fit.groups is None and _has_budgets(runs) and len(np.unique(runs.budgets)) == 2:
        fit.warnings.append(
            "2 budgets: an error that all runs of one share cannot be seen; intervals assume there is none"
        )
    if np.isnan(fit.r2):
        fit.warnings.append("no scaling in this range: all losses are the same")
    elif fit.n > len(fit.theta) and fit.r2 >= 0 and fit.explains_by_chance > 0.05:
        fit.warnings.append(
            f"no scaling in this range: the surface explains {100 * fit.r2:.0f} % of the losses' spread"
        )
    if fit.uneven and fit.budget_spreads is not None and fit.interval_method == "auto" and fit.n < MANY_RUNS:
        spreads = fit.budget_spreads[0]
        each = ", ".join(f"{100 * s:.2g} %" if fit.space == "log" else f"{s:.3g}" for s in spreads)
        fit.warnings.append(
            f"the noise of runs differs between budgets ({each}, rising budgets): intervals are the jackknife's; weights "
            "of 1/variance would narrow them"
        )
    if abs(float(np.corrcoef(np.log(runs.params), np.log(runs.data))[0, 1])) > 0.999:
        fit.warnings.append(
            f"{NOT_IDENTIFIABLE}: all runs lie on one line of log N against log D; vary N at fixed compute"
        )
    if cost and cost.rms > 0.1:
        fit.warnings.append(
            f"compute is {100 * cost.rms:.0f} % (rms) off k*N^p*D: allocations from this law are that rough"
        )


def _other_inputs(runs: RunTable, law: Law, columns: Mapping[str, str]) -> dict[str, Array]:
    others = [name for name in law.inputs if name not in ("params", "data")]
    for name in columns:
        if name not in others:
            raise InputError(f"input: expected one of {', '.join(others) or 'none'} for law {law.name}, got {name!r}")
    for name in others:
        if name not in columns and name not in runs.columns:
            have = ", ".join(runs.columns)
            raise InputError(
                f"{name}: expected a column of that name in {runs.source} for law {law.name}, got columns {have}; name "
                f"another with --input {name}=COLUMN"
            )
    return {name: runs.column(columns.get(name, name)) for name in others}


def surface_law(law: str | Law) -> Law:
    """A surface by its name."""
    if isinstance(law, Law):
        return law
    if law not in SURFACE_LAWS:
        raise InputError(f"law: expected one of {', '.join(SURFACE_LAWS)}, got {law!r}")
    return SURFACE_LAWS[law]


def as_table(table: RunTable | str | Path, columns: dict[str, Any]) -> RunTable:
    """A run table, read where a path came."""
    if isinstance(table, RunTable):
        if columns:
            raise InputError(f"{next(iter(columns))}: expected column options only with a path")
        return table
    return RunTable.read(table, **columns)


def _has_budgets(runs: RunTable) -> bool:
    return runs.has("budget") or runs.has("flops")


def _budget_groups(runs: RunTable) -> Array | None:
    """Budgets as groups where runs really come in a few budgets with several runs each."""
    if not _has_budgets(runs):
        return None
    budgets = runs.budgets
    count = len(np.unique(budgets))
    return budgets if 3 <= count <= len(runs) / 2 else None
