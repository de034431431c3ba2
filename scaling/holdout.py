"""Backtests: fit on what came before, score on what came after, never on what was fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from ditscale.errors import InputError
from ditscale.scaling.candidates import eligible, fit_candidate
from ditscale.scaling.engine import Array
from ditscale.scaling.jsonable import plain
from ditscale.scaling.isoflop import Vertex, fit_isoflop
from ditscale.scaling.losses import Loss
from ditscale.scaling.runs import RunTable

_MIN_BUDGETS = 3


@dataclass(frozen=True)
class Trial:
    """One prediction of held-out compute.

    Attributes:
        law: which candidate.
        fitted_budgets: how many budgets it had seen.
        budget: the held-out budget.
        distance: that budget over the greatest fitted one.
        predicted, measured: losses.
        log_error: log(predicted / measured).
        scale, dof: of the predictive t distribution that the candidate gave for it.
    """

    law: str
    fitted_budgets: int
    budget: float
    distance: float
    predicted: float
    measured: float
    log_error: float
    scale: float
    dof: float

    @property
    def log_score(self) -> float:
        """Logarithm of the predictive density at what was measured: rewards being right and knowing how right."""
        return float(stats.t.logpdf(self.log_error / self.scale, self.dof) - np.log(self.scale))

    @property
    def inside(self) -> bool:
        """Whether the measured loss lay in the 95 % interval."""
        return bool(abs(self.log_error) <= stats.t.ppf(0.975, self.dof) * self.scale)


@dataclass
class Backtest:
    """A scoreboard of laws on held-out compute.

    Attributes:
        trials: every prediction.
        scoreboard: one row a law, best first: law, score (mean log score), rms_error, worst_error, equivalent_compute
            (the error as a factor of compute), inside (share of 95 % intervals that held), trials, skipped (why not, if so).
        held_out: budgets that were predicted.
        warnings: what a reader must know.
    """

    trials: list[Trial]
    scoreboard: list[dict[str, Any]]
    held_out: list[float]
    warnings: list[str] = field(default_factory=list)

    @property
    def best(self) -> str | None:
        """The law of highest score, None where none could be scored."""
        return next((row["law"] for row in self.scoreboard if row["trials"]), None)

    def weights(self) -> dict[str, float]:
        """Weights for averaging: proportional to the product of held-out predictive densities, one factor a split."""
        rows = [r for r in self.scoreboard if r["trials"]]
        if not rows:
            return {}
        scores = np.array([r["score"] * r["splits"] for r in rows])
        w = np.exp(scores - scores.max())
        return {r["law"]: float(v) for r, v in zip(rows, w / w.sum())}

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        content = {
            "scoreboard": self.scoreboard,
            "best": self.best,
            "weights": self.weights(),
            "held_out": self.held_out,
            "trials": [{**t.__dict__, "log_score": t.log_score, "inside": t.inside} for t in self.trials],
            "warnings": self.warnings,
        }
        return plain(content)  # type: ignore[no-any-return]

    def summary(self) -> str:
        """A readable table."""
        lines = ["backtest: fitted on the lower budgets, scored on the minimum of the higher ones"]
        lines.append(f"  {'law':18s}{'log score':>10s}{'rms error':>11s}{'worst':>9s}{'inside':>8s}  trials")
        for r in self.scoreboard:
            if r["trials"]:
                lines.append(
                    f"  {r['law']:18s}{r['score']:10.2f}{100 * r['rms_error']:10.2f}%{100 * r['worst_error']:8.2f}%"
                    f"{100 * r['inside']:7.0f}%{r['trials']:8d}"
                )
            else:
                lines.append(f"  {r['law']:18s} not scored: {r['skipped']}")
        lines += [f"  warning: {w}" for w in self.warnings]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()


def backtest(
    runs: RunTable,
    *,
    laws: Sequence[str] | None = None,
    loss_fn: str | Loss = "huber:auto",
    min_budgets: int = _MIN_BUDGETS,
) -> Backtest:
    """Score law forms on budgets that they did not see, with an expanding window.

    Fits on the lowest m budgets for m = ``min_budgets`` .. G-1 and predicts the loss at the minimum of every budget
    above. What counts as measured is that budget's isoFLOP minimum (its best run where the minimum is not bracketed), so
    that laws of compute and surfaces answer the same question.

    Args:
        runs: with params, data, flops, loss and budgets.
        laws: candidates. Default: all of them.
        loss_fn: of the surface fits.
        min_budgets: least number of budgets to fit on. Default: 3.

    Returns:
        Backtest.

    Raises:
        InputError: fewer than ``min_budgets`` + 1 budgets.
    """
    names = eligible(laws)
    budgets = runs.budgets
    levels = np.unique(budgets)
    if len(levels) <= min_budgets:
        raise InputError(f"budget: expected at least {min_budgets + 1} budgets for a backtest, got {len(levels)}")
    goals = held_out_goals(runs, budgets, levels[min_budgets:])
    trials: list[Trial] = []
    skipped: dict[str, str] = {}
    for m in range(min_budgets, len(levels)):
        before = runs.take(budgets <= levels[m - 1])
        for name in names:
            try:
                fitted = fit_candidate(name, before, loss_fn=loss_fn)
            except InputError as error:
                skipped.setdefault(name, str(error))
                continue
            for goal in goals[m - min_budgets :]:
                p = fitted.predict(goal.params, goal.data, goal.flops, goal.share)
                trials.append(
                    Trial(
                        law=name,
                        fitted_budgets=m,
                        budget=goal.flops,
                        distance=float(goal.flops / levels[m - 1]),
                        predicted=float(np.exp(p.centre)),
                        measured=goal.loss,
                        log_error=float(p.centre - np.log(goal.loss)),
                        scale=max(p.scale, 1e-12),
                        dof=p.dof,
                    )
                )
    board = [_row(name, [t for t in trials if t.law == name], skipped.get(name), runs) for name in names]
    splits = max((r["splits"] for r in board), default=0)
    for row in board:
        if 0 < row["splits"] < splits:
            # A law that could only be tried on the easier, later splits is not comparable.
            row["skipped"] = skipped.get(row["law"]) or "not fitted on every split"
            row["trials"], row["splits"] = 0, 0
    board.sort(key=lambda r: -r["score"] if r["trials"] else np.inf)
    warnings = []
    if splits == 1:
        warnings.append("one split: a single held-out budget ranks laws weakly")
    return Backtest(trials, board, [float(v) for v in levels[min_budgets:]], warnings)


@dataclass(frozen=True)
class Goal:
    """A held-out budget's measured minimum; ``share`` is its variance in units of a run's."""

    params: float
    data: float
    flops: float
    loss: float
    share: float


def held_out_goals(runs: RunTable, budgets: Array, levels: Array) -> list[Goal]:
    """The measured minimum of each budget."""
    vertices: dict[float, Vertex] = {}
    try:
        vertices = {v.budget: v for v in fit_isoflop(runs, bootstrap=0, with_surface=False).vertices}
    except InputError:
        pass
    goals = []
    for level in levels:
        mask = budgets == level
        flops = float(np.exp(np.log(runs.flops[mask]).mean())) if runs.has("flops") else float(level)
        vertex = vertices.get(float(level))
        if vertex is not None and vertex.bracketed:
            x = np.log(runs.params[mask] / vertex.centre)
            at = np.vander([np.log(vertex.params / vertex.centre)], len(vertex.coefficients))[0]
            solver = np.linalg.pinv(np.vander(x, len(vertex.coefficients)))
            share = float(((at @ solver) ** 2).sum())
            goals.append(Goal(vertex.params, vertex.data, flops, vertex.loss, share))
        else:
            i = np.flatnonzero(mask)[int(np.argmin(runs.loss[mask]))]
            goals.append(Goal(float(runs.params[i]), float(runs.data[i]), flops, float(runs.loss[i]), 1.0))
    return goals


def _row(name: str, trials: list[Trial], skipped: str | None, runs: RunTable) -> dict[str, Any]:
    if not trials:
        return {"law": name, "trials": 0, "splits": 0, "score": None, "skipped": skipped or "no held-out budget"}
    errors = np.array([t.log_error for t in trials])
    # d log L / d log C between the least and the greatest held-out goal turns an error of loss into one of compute.
    slope = _slope(trials, runs)
    by_split = [
        np.mean([t.log_score for t in trials if t.fitted_budgets == m]) for m in sorted({t.fitted_budgets for t in trials})
    ]
    return {
        "law": name,
        "score": float(np.mean(by_split)),
        "rms_error": float(np.sqrt((errors**2).mean())),
        "mean_error": float(errors.mean()),
        "worst_error": float(np.abs(errors).max()),
        "equivalent_compute": float(np.exp(np.sqrt((errors**2).mean()) / slope)) if slope > 0 else float("inf"),
        "inside": float(np.mean([t.inside for t in trials])),
        "spread": float(np.sqrt(np.mean([(t.log_error / t.scale) ** 2 for t in trials]))),
        "trials": len(trials),
        "splits": len(by_split),
        "skipped": None,
    }


def _slope(trials: list[Trial], runs: RunTable) -> float:
    """Fall of log loss per log compute along each budget's best run."""
    budgets = runs.budgets
    levels = np.unique(budgets)
    best = np.array([runs.loss[budgets == level].min() for level in levels])
    return -float(np.polyfit(np.log(levels), np.log(best), 1)[0])
