"""The loss of a run that has not been made: which law to trust is settled beforehand, on held-out compute."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize, stats

from ditscale.errors import InputError
from ditscale.scaling.candidates import POWER_CANDIDATES, Fitted, eligible, fit_candidate
from ditscale.scaling.checks import need_positive
from ditscale.scaling.cost import CostLaw
from ditscale.scaling.holdout import Backtest, backtest
from ditscale.scaling.isoflop import IsoflopFit, fit_isoflop
from ditscale.scaling.jsonable import plain
from ditscale.scaling.losses import Loss
from ditscale.scaling.runs import RunTable
from ditscale.scaling.surface import as_table, fit_surface

# Laws below this weight do not move an average by anything that a reader could see.
_LEAST_WEIGHT = 1e-3
# A law of compute alone is one of the best size: of a size that costs more loss than this share by the curves, it is silent.
_OFF_BEST = 0.02
# Sizes so many times further from the best than any run's go without saying: the best is an estimate itself.
_BEYOND = 1.25
# More than any run will ever have of anything; beyond it float64 has no room for the laws.
_MOST = 1e60
# Compute this many times off what size and data cost is another run's; the cost law itself is off by far less.
_AT_ODDS = 2.0


@dataclass
class Forecast:
    """A predicted loss.

    Attributes:
        value: the predicted loss.
        interval_95: where one new run lands in 95 of 100 cases: law, choice of law, run noise and budget
            shock.
        mean_interval_95: where the law lies, without the noise of the run.
        chosen: the law of greatest weight.
        weights: of the laws that were averaged.
        by_law: each law's own prediction and interval of a new run.
        backtest: the scoreboard that the weights come from, or None where a law was named.
        params, data, flops: of the run.
        data_unit: "images" or "tokens".
        extrapolation: flops over the greatest fitted compute.
        widened: factor by which the backtest's errors widened the interval (1: not at all).
        rule: how law and interval were chosen, in words.
        warnings: what a reader must know.
    """

    value: float
    interval_95: list[float]
    mean_interval_95: list[float]
    chosen: str
    weights: dict[str, float]
    by_law: dict[str, dict[str, Any]]
    backtest: Backtest | None
    params: float
    data: float
    flops: float
    data_unit: str
    extrapolation: float
    widened: float
    rule: str
    warnings: list[str] = field(default_factory=list)

    @property
    def scoreboard(self) -> list[dict[str, Any]]:
        """The backtest's rows, best law first."""
        return self.backtest.scoreboard if self.backtest else []

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        out = {k: v for k, v in self.__dict__.items() if k != "backtest"}
        return plain({**out, "loss": self.value, "law": self.chosen, "backtest": self.backtest})

    def summary(self) -> str:
        """A readable table."""
        low, high = self.interval_95
        lines = [
            f"predicted loss {self.value:.5g}, 95 % interval of a new run [{low:.5g}, {high:.5g}]",
            f"  N {self.params:.4g}, D {self.data:.4g} {self.data_unit}, C {self.flops:.4g} FLOPs, "
            f"{self.extrapolation:.1f}x the largest fitted",
            f"  {self.rule}",
        ]
        for name, row in self.by_law.items():
            weight = self.weights.get(name, 0.0)
            lines.append(
                f"  {name:18s}{row['value']:10.5g}  [{row['interval'][0]:.5g}, {row['interval'][1]:.5g}]  "
                f"weight {weight:.2f}"
            )
        lines += [f"  warning: {w}" for w in self.warnings]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()


def predict_loss(
    table: RunTable | str | Path,
    *,
    params: float | None = None,
    images: float | None = None,
    tokens: float | None = None,
    data: float | None = None,
    flops: float | None = None,
    law: str = "auto",
    laws: Sequence[str] | None = None,
    loss_fn: str | Loss = "huber:auto",
) -> Forecast:
    """Predict the loss of a new run, with an interval for that run.

    With ``law="auto"`` every candidate is scored on budgets that it did not see (an expanding window over the
    budgets); the prediction is the average of the candidates, weighted by the product of their held-out
    predictive densities. Its 95 % interval holds the uncertainty of each law, their disagreement, and the
    noise of the run; where held-out errors were larger than the laws' own intervals said, it is widened by
    that factor. Laws of compute alone ("power", "power-floor") are of the best size at that compute: where the isoFLOP
    curves make the run's size cost over 2 % of loss they have no say, and a warning says so. Another says where the size lies
    further from the best than that of any run: how the loss rises there is what a law's form says, and no held-out run tests it.

    Args:
        table: runs with params, images or tokens, flops, loss and budgets; or a file or folder of them.
        params: size of the new run.
        images, tokens, data: its training data (one of them, in the table's unit).
        flops: its compute. Of params, data and flops two suffice: the third comes from the runs' own cost
            law; a third that is given may not contradict it.
        law: "auto", or a candidate by name.
        laws: candidates for "auto". Default: all of them.
        loss_fn: of the surface fits.

    Returns:
        Forecast.

    Raises:
        InputError: too few budgets or runs, a missing column, an unknown law, or compute that is over 2 times off what size
            and data cost.
    """
    runs = as_table(table, {})
    run = _new_run(runs, params, images if runs.data_unit == "images" else tokens, data, flops)
    return Forecaster(runs, law=law, laws=laws, loss_fn=loss_fn).forecast(*run)


class Forecaster:
    """Laws fitted, scored and weighted once, to predict many runs; see :func:`predict_loss`."""

    def __init__(
        self,
        runs: RunTable,
        *,
        law: str = "auto",
        laws: Sequence[str] | None = None,
        loss_fn: str | Loss = "huber:auto",
    ) -> None:
        self.runs = runs
        self.board: Backtest | None = None
        self.warnings: list[str] = []
        names = eligible(laws if law == "auto" else [law])
        if law == "auto":
            levels = len(np.unique(runs.budgets))
            if levels >= 4:
                self.board = backtest(runs, laws=names, loss_fn=loss_fn)
                weights = self.board.weights()
                self.warnings += self.board.warnings
                self.rule = (
                    f"laws averaged by their held-out predictive density over {len(self.board.held_out)} budgets"
                )
            else:
                weights, names = {"surface": 1.0}, ("surface",)
                self.rule = f"{levels} budgets: too few to hold one out; the surface, untested"
                self.warnings.append(self.rule)
        else:
            weights = {law: 1.0}
            self.rule = f"the law was named: {law}"
        self.fitted: dict[str, Fitted] = {}
        for name in names:
            try:
                self.fitted[name] = fit_candidate(name, runs, loss_fn=loss_fn)
            except InputError:
                if self.board is None:
                    raise
        self._scores = {k: v for k, v in weights.items() if k in self.fitted}
        self.weights = _shares(self._scores)
        if not self.weights:
            raise InputError("law: expected at least one law that could be fitted and scored, got none")

    def forecast(self, params: float, data: float, flops: float) -> Forecast:
        """Predict one run."""
        result = self._by_those_who_know(params, data, flops)
        with contextlib.suppress(InputError):  # of runs without curves, which know no best size
            best = self._isoflop.n_law
            ratios = self.runs.params / best.predict(self.runs.flops).value
            ratio, least, greatest = params / float(best.predict(flops).value), ratios.min(), ratios.max()
            if not least / _BEYOND <= ratio <= greatest * _BEYOND:
                result.warnings.append(
                    f"size {params:.4g} is {ratio:.3g}x the best at {flops:.4g} FLOPs, and the runs' sizes are {least:.3g}x to "
                    f"{greatest:.3g}x: how the loss rises beyond is the laws' forms alone, the intervals may be too narrow"
                )
        return result

    def _by_those_who_know(self, params: float, data: float, flops: float) -> Forecast:
        lines = [k for k in self.fitted if k in POWER_CANDIDATES]
        ratio = self._off_best(params, flops) if lines else None
        if ratio is None:
            return self._forecast(params, data, flops, self.weights)
        others = _shares({k: v for k, v in self._scores.items() if k not in lines})
        names = ", ".join(lines)
        result = self._forecast(params, data, flops, others or self.weights, leave_out=lines if others else ())
        result.warnings.append(
            f"size {params:.4g} is {ratio:.3g}x the best at {flops:.4g} FLOPs, and laws of compute alone ({names}) speak of "
            "the best only: " + ("left out" if others else "the loss will be higher")
        )
        return result

    def _off_best(self, params: float, flops: float) -> float | None:
        """The size over the best one, where the isoFLOP curves make it cost more loss than ``_OFF_BEST``."""
        ratio = params / float(self._isoflop.n_law.predict(flops).value)
        bends = [v.curvature / (1.0 if v.space == "log" else v.loss) for v in self._isoflop.vertices if v.curvature > 0]
        return ratio if 0.5 * float(np.median(bends)) * np.log(ratio) ** 2 > _OFF_BEST else None

    @cached_property
    def _isoflop(self) -> IsoflopFit:
        return fit_isoflop(self.runs, bootstrap=0, with_surface=False)

    def _forecast(
        self, params: float, data: float, flops: float, weights: dict[str, float], leave_out: Sequence[str] = ()
    ) -> Forecast:
        predictions = {}
        for name, fitted in self.fitted.items():
            if name in leave_out:
                continue
            # A law whose prediction the runs do not determine here has no say.
            with contextlib.suppress(InputError):
                predictions[name] = fitted.predict(params, data, flops, 1.0)
        known = {k: w for k, w in weights.items() if k in predictions}
        if not known:
            raise InputError(
                f"flops: expected a run whose loss the laws determine, got N {params:.4g}, D {data:.4g}: "
                "the runs leave it open"
            )
        total = sum(known.values())
        weighted = [(w / total, predictions[k]) for k, w in known.items()]
        widened = _widening(self.board, weights)
        return Forecast(
            value=float(np.exp(sum(w * p.centre for w, p in weighted))),
            interval_95=_mixture([(w, p.centre, p.scale * widened, p.dof) for w, p in weighted]),
            mean_interval_95=_mixture([(w, p.centre, p.mean_scale, p.mean_dof) for w, p in weighted]),
            chosen=next(iter(weights)),
            weights=weights,
            by_law={
                k: {
                    "value": float(np.exp(p.centre)),
                    "interval": _mixture([(1.0, p.centre, p.scale, p.dof)]),
                    "dof": p.dof,
                }
                for k, p in predictions.items()
            },
            backtest=self.board,
            params=params,
            data=data,
            flops=flops,
            data_unit=self.runs.data_unit,
            extrapolation=flops / float(self.runs.flops.max()),
            widened=widened,
            rule=self.rule,
            warnings=list(self.warnings),
        )

    def band(self, flops: Any) -> dict[str, Any]:
        """The forecast along the compute-optimal path, for figures.

        Args:
            flops: budgets.

        Returns:
            Lists "budget", "value", "low", "high" (of a new run), and the path's "params" and "data".
        """
        surface = fit_surface(self.runs)
        rows = []
        for c in np.atleast_1d(np.asarray(flops, dtype=float)):
            best = surface.optimum(float(c))
            rows.append(self._forecast(best["params"].value, best["data"].value, float(c), self.weights))
        return {
            "budget": [r.flops for r in rows],
            "params": [r.params for r in rows],
            "data": [r.data for r in rows],
            "value": [r.value for r in rows],
            "low": [r.interval_95[0] for r in rows],
            "high": [r.interval_95[1] for r in rows],
        }


def _new_run(
    runs: RunTable, params: float | None, mine: float | None, data: float | None, flops: float | None
) -> tuple[float, float, float]:
    d = mine if mine is not None else data
    cost = CostLaw.measured(runs.params, runs.data, runs.flops)
    given = {"params": params, runs.data_unit: d, "flops": flops}
    for name, value in given.items():
        if value is not None and need_positive(name, value) > _MOST:
            raise InputError(f"{name}: expected a number that a run can have, got {value!r}")
    if sum(v is not None for v in given.values()) < 2:
        raise InputError(f"params: expected two of params, {runs.data_unit} and flops of the new run")
    if params is not None and d is not None and flops is not None:
        costs = float(cost.flops(params, d))
        if not costs / _AT_ODDS <= flops <= costs * _AT_ODDS:
            raise InputError(
                f"flops: expected about {costs:.4g}, what N {params:.4g} and D {d:.4g} cost by the runs' own cost law, got "
                f"{flops:.4g}; two of the three are enough"
            )
    if flops is None:
        flops = cost.flops(params, d)
    elif d is None:
        d = cost.data(flops, params)
    elif params is None:
        params = (flops / (cost.coefficient * d)) ** (1.0 / cost.exponent)
    return float(params), float(d), float(flops)  # type: ignore[arg-type]


def _shares(scores: dict[str, float]) -> dict[str, float]:
    """Weights that sum to 1, largest first, without those too small to matter."""
    total = sum(scores.values())
    kept = {k: v for k, v in sorted(scores.items(), key=lambda kv: -kv[1]) if v > 0 and v >= _LEAST_WEIGHT * total}
    return {k: v / sum(kept.values()) for k, v in kept.items()}


def _widening(board: Backtest | None, weights: dict[str, float]) -> float:
    """How much larger the held-out errors were than the laws' own scales said; never below 1."""
    if board is None:
        return 1.0
    rows = {r["law"]: r["spread"] for r in board.scoreboard if r["trials"]}
    square = sum(w * rows[k] ** 2 for k, w in weights.items())
    return float(max(1.0, np.sqrt(square)))


def _mixture(parts: list[tuple[float, float, float, float]], level: float = 0.95) -> list[float]:
    """Ends of the central interval of a mixture of t distributions on the logarithm, as losses."""
    parts = [(w, m, max(s, 1e-15), max(dof, 1.0)) for w, m, s, dof in parts]
    centres, scales = np.array([p[1] for p in parts]), np.array([p[2] for p in parts])

    def below(x: float) -> float:
        return float(sum(w * stats.t.cdf((x - m) / s, dof) for w, m, s, dof in parts))

    ends: list[float] = []
    for q in (0.5 - level / 2, 0.5 + level / 2):
        reach = np.array([abs(stats.t.ppf(q, p[3])) for p in parts])
        low, high = float((centres - reach * scales).min()), float((centres + reach * scales).max())
        pad = 1e-9 + 1e-6 * (high - low)
        root = optimize.brentq(lambda x, q=q: below(x) - q, low - pad, high + pad, xtol=1e-13)
        ends.append(float(np.exp(root)))
    return ends
