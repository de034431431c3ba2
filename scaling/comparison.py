"""Which of two designs or data sets scales better: differences of exponents and of predicted loss, with intervals.

The idea is Liang et al.'s (arXiv:2410.08184, section 4): at fixed data a more efficient model shows a smaller
model exponent and a larger data exponent; at fixed model better data show the reverse; either shows a loss
that falls faster. Two fitted numbers alone say nothing; their difference with its interval does. Losses must
share one convention: two autoencoders or two parametrisations do not compare.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from ditscale.errors import InputError
from ditscale.scaling.allocation import allocation
from ditscale.scaling.checks import need_positive
from ditscale.scaling.intervals import Interval
from ditscale.scaling.isoflop import fit_isoflop
from ditscale.scaling.jsonable import plain
from ditscale.scaling.runs import RunTable, is_empty
from ditscale.scaling.schema import COMPARED_COLUMNS, POOL_COLUMNS
from ditscale.scaling.surface import SurfaceFit, fit_surface
from ditscale.scaling.tradeoffs import compute_for

# A verdict rests on two tests, which share its 5 % (Bonferroni).
_EACH = 0.05 / 2


@dataclass(frozen=True)
class Difference:
    """Second minus first.

    Attributes:
        first, second: the estimates.
        value: their difference (of logarithms, for losses and sizes: a ratio's logarithm).
        low, high: 95 % interval of the difference.
        p: of Welch's test that there is none.
        clear: whether the interval leaves out 0.
    """

    first: float
    second: float
    value: float
    low: float
    high: float
    p: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return bool(self.low > 0 or self.high < 0)


@dataclass
class Comparison:
    """Two designs side by side.

    Attributes:
        names: of the two.
        target: compute at which losses and optima are compared.
        differences: "N_exponent", "D_exponent", "L_exponent" (of isoFLOP minima), "log_loss" (at the target,
            both trained optimally), "log_params" (N_opt at the target).
        equivalent_compute: how many times the target's compute the first needs for the second's loss; None
            where its law cannot reach it.
        verdict: in words. It speaks of the loss and of N_exponent, each at p < 0.025: of designs that are alike, about 5 %
            are told apart.
        warnings: what a reader must know.
    """

    names: tuple[str, str]
    target: float
    differences: dict[str, Difference]
    equivalent_compute: float | None
    verdict: str
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        content = {
            "names": list(self.names),
            "target": self.target,
            "differences": {k: {**v.__dict__, "clear": v.clear} for k, v in self.differences.items()},
            "equivalent_compute": self.equivalent_compute,
            "verdict": self.verdict,
            "warnings": self.warnings,
        }
        return plain(content)

    def summary(self) -> str:
        """A readable table."""
        a, b = self.names
        lines = [
            f"{b} minus {a}, at {self.target:.4g} FLOPs",
            f"  {'':14s}{a[:12]:>12s}{b[:12]:>12s}{'difference':>13s}   95 %",
        ]
        for k, d in self.differences.items():
            mark = "" if d.clear else "   (holds 0)"
            lines.append(f"  {k:14s}{d.first:12.5g}{d.second:12.5g}{d.value:13.4g}   [{d.low:.4g}, {d.high:.4g}]{mark}")
        if self.equivalent_compute:
            lines.append(f"  {a} needs {self.equivalent_compute:.3g}x the compute for the loss of {b} at the target")
        lines.append(f"  {self.verdict}")
        lines += [f"  warning: {w}" for w in self.warnings]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()


def compare(
    first: RunTable,
    second: RunTable,
    *,
    target: float | None = None,
    names: tuple[str, str] = ("first", "second"),
    law: str = "surface",
    pool: bool = False,
) -> Comparison:
    """Compare how two designs or data sets scale.

    Args:
        first, second: their runs, with budgets; fitted apart.
        target: compute at which losses are compared. Default: the largest of both.
        names: for the output.
        law: the surface to fit.
        pool: accept different loss conventions or schedules. Default: False.

    Returns:
        Comparison. Intervals of differences are Welch's: both variances, degrees of freedom by Satterthwaite.

    Raises:
        InputError: the tables differ in a convention, count different data units, hold no compute, or cannot be fitted.
    """
    warnings = [] if pool else _same_conventions(first, second, names)
    if first.data_unit != second.data_unit:
        raise InputError(f"data: expected both designs in one unit, got {first.data_unit} and {second.data_unit}")
    for table in (first, second):
        table.column("flops")  # a comparison is at a compute; says which columns there are
    fits = [fit_surface(t, law=law) for t in (first, second)]
    for name, fit in zip(names, fits, strict=True):
        if not fit.converged:
            raise InputError(f"{name}: the fit did not converge; compare nothing with it")
    if target is not None:
        need_positive("target", target, of="of FLOPs")
    else:
        target = float(max(t.flops.max() for t in (first, second)))
    lines = [fit_isoflop(t, with_surface=False).loss_law for t in (first, second)]
    best = [f.optimum(target) for f in fits]
    differences = {
        "N_exponent": _difference(*(f.interval("a") for f in fits)),
        "D_exponent": _difference(*(f.interval("b") for f in fits)),
        "L_exponent": _difference(*(line.interval("exponent") for line in lines)),
        "log_loss": _difference(*(b["loss"] for b in best), log=True),
        "log_params": _difference(*(b["params"] for b in best), log=True),
    }
    warnings += [f"{n}: {w}" for n, f in zip(names, fits, strict=True) for w in f.warnings]
    exponents = [differences[k] for k in ("N_exponent", "D_exponent")]
    if differences["log_loss"].clear and not any(d.clear for d in exponents):
        warnings.append(
            "only the level differs, not the exponents: a change that multiplies the worth of parameters or data "
            "moves intercepts alone, and is no less an improvement"
        )
    return Comparison(
        names=names,
        target=float(target),
        differences=differences,
        equivalent_compute=_equivalent(fits[0], best[1]["loss"].value, float(target)),
        verdict=_verdict(differences, names),
        warnings=warnings,
    )


def _same_conventions(first: RunTable, second: RunTable, names: tuple[str, str]) -> list[str]:
    """Warnings, of conventions that a comparison cannot help to differ; InputError for those that it can."""
    unlike = {}
    for column in POOL_COLUMNS:
        if column in first.columns and column in second.columns:
            values = [_labels(table, column) for table in (first, second)]
            if all(values) and values[0] != values[1]:
                unlike[column] = values
    other_data = unlike.keys() & (set(COMPARED_COLUMNS) - {"architecture"})
    own_images = bool(other_data) and unlike.pop("evaluation", None) is not None
    for column, values in unlike.items():
        if column not in COMPARED_COLUMNS:
            came = " and ".join(f"{sorted(v)[0]!r} ({n})" for v, n in zip(values, names, strict=True))
            raise InputError(
                f"{column}: expected one value in both designs, got {came}; compare on purpose with --pool"
            )
    return ["each loss is measured on validation images of its own data"] if own_images else []


def _labels(table: RunTable, column: str) -> set[str]:
    """The values of a column, where there are any."""
    return {str(value) for value in table.columns[column].tolist() if not is_empty(value)}


def _difference(a: Interval, b: Interval, *, log: bool = False) -> Difference:
    first, second = (float(np.log(v.value)) if log else v.value for v in (a, b))
    variance = a.se**2 + b.se**2
    if not np.isfinite(variance):  # the runs of one leave it open, as two budgets leave a line
        return Difference(a.value, b.value, second - first, -np.inf, np.inf, 1.0)
    dof = variance**2 / (a.se**4 / max(a.dof, 1.0) + b.se**4 / max(b.dof, 1.0)) if variance > 0 else 1.0
    reach = float(stats.t.ppf(0.975, dof)) * float(np.sqrt(variance))
    value = second - first
    with np.errstate(divide="ignore", invalid="ignore"):  # no variance, and perhaps no difference
        p = float(np.nan_to_num(2 * stats.t.sf(np.abs(value) / np.sqrt(variance), dof), nan=1.0))
    return Difference(a.value, b.value, value, value - reach, value + reach, p)


def _equivalent(fit: SurfaceFit, loss: float, target: float) -> float | None:
    try:
        return compute_for(allocation(fit), loss) / target
    except InputError:
        return None


def _verdict(differences: dict[str, Difference], names: tuple[str, str]) -> str:
    loss, n = differences["log_loss"], differences["N_exponent"]
    seen = [d.p < _EACH for d in (loss, n)]
    if not any(seen):
        return "no clear difference: more runs, or a wider range of compute, would be needed"
    parts = []
    if seen[0]:
        better = names[1] if loss.value < 0 else names[0]
        parts.append(f"{better} reaches the lower loss at the target ({100 * abs(np.expm1(loss.value)):.2g} %)")
    if seen[1]:
        smaller = names[1] if n.value < 0 else names[0]
        parts.append(
            f"{smaller} has the smaller model exponent: at equal data the mark of a more efficient model, at equal "
            "models that of worse data"
        )
    return "; ".join(parts)
