"""Backtests: fit on what came before, score on what came after, never on what was fitted."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from ditscale.errors import InputError
from ditscale.scaling.candidates import POWER_CANDIDATES, eligible, fit_candidate
from ditscale.scaling.curves import Vertex
from ditscale.scaling.engine import Array
from ditscale.scaling.isoflop import fit_isoflop
from ditscale.scaling.jsonable import plain
from ditscale.scaling.losses import Loss
from ditscale.scaling.runs import RunTable, cluster_budgets

_MIN_LEVELS = 3
AXES = ("budget", "params", "data")


@dataclass(frozen=True)
class Trial:
    """One prediction of what was held out.

    Attributes:
        law: which candidate.
        split: which split it belongs to, counted from 1.
        params, data, flops: of the held-out run (or minimum).
        distance: its place on the axis over the greatest fitted one.
        predicted, measured: losses.
        log_error: log(predicted / measured).
        scale, dof: of the predictive t distribution that the candidate gave for it.
    """

    law: str
    split: int
    params: float
    data: float
    flops: float
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
        scoreboard: one row a law, best first: law, score (mean log score), rms_error, mean_error, worst_error,
            equivalent_compute (the error as a factor of compute), inside (share of 95 % intervals that held), spread
            (rms of errors over the scales that the law gave for them), p_value (of a paired t test that its absolute
            errors are no larger than the best law's), trials, splits, skipped (why not, if so).
        axis: what was held out: "budget", "params" or "data".
        held_out: the held-out places on that axis.
        warnings: what a reader must know.
    """

    trials: list[Trial]
    scoreboard: list[dict[str, Any]]
    held_out: list[float]
    axis: str = "budget"
    warnings: list[str] = field(default_factory=list)

    def by_distance(self, law: str) -> list[dict[str, float]]:
        """Error against distance: for each distance, the number of trials and the root mean square error."""
        mine = [t for t in self.trials if t.law == law]
        rows = []
        for d in sorted({float(f"{t.distance:.2g}") for t in mine}):
            e = np.array([t.log_error for t in mine if float(f"{t.distance:.2g}") == d])
            rows.append({"distance": d, "trials": float(len(e)), "rms_error": float(np.sqrt((e**2).mean()))})
        return rows

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
        return {r["law"]: float(v) for r, v in zip(rows, w / w.sum(), strict=True)}

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        content = {
            "scoreboard": self.scoreboard,
            "best": self.best,
            "weights": self.weights(),
            "axis": self.axis,
            "held_out": self.held_out,
            "by_distance": {r["law"]: self.by_distance(r["law"]) for r in self.scoreboard if r["trials"]},
            "trials": [{**t.__dict__, "log_score": t.log_score, "inside": t.inside} for t in self.trials],
            "warnings": self.warnings,
        }
        return plain(content)

    def summary(self) -> str:
        """A readable table."""
        what = "the minimum of the higher ones" if self.axis == "budget" else "every run above"
        lines = [f"backtest by {self.axis}: fitted on the lower part, scored on {what}"]
        lines.append(f"  {'law':18s}{'log score':>10s}{'rms error':>11s}{'worst':>9s}{'inside':>8s}  trials")
        for r in self.scoreboard:
            if r["trials"]:
                lines.append(
                    f"  "
                    f"{r['law']:18s}{r['score']:10.2f}"
                    f"{100 * r['rms_error']:10.2f}%{100 * r['worst_error']:8.2f}%"
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
    axis: str = "budget",
    laws: Sequence[str] | None = None,
    loss_fn: str | Loss = "huber:auto",
    min_levels: int = _MIN_LEVELS,
) -> Backtest:
    """Score law forms on what they did not see, with an expanding window.

    By "budget": fits on the lowest m budgets for m = ``min_levels`` .. G-1 and predicts the loss at the
    minimum of every budget above. What counts as measured is that budget's isoFLOP minimum (its best run
    where the minimum is not bracketed), so that laws of compute and surfaces answer the same question. By
    "params" or "data": fits on the smaller models (the shorter runs), three windows, and predicts every run
    above; only surfaces can answer.

    Args:
        runs: with params, data, flops, loss and budgets.
        axis: "budget", "params" (largest models held out) or "data" (longest runs held out).
        laws: candidates. Default: all that can answer.
        loss_fn: of the surface fits.
        min_levels: least number of budgets (sizes, lengths) to fit on. Default: 3.

    Returns:
        Backtest.

    Raises:
        InputError: fewer than ``min_levels`` + 1 levels on the axis, or none of the laws could be fitted.
    """
    if axis not in AXES:
        raise InputError(f"by: expected one of {', '.join(AXES)}, got {axis!r}")
    names = eligible(laws)
    if axis != "budget":
        names = tuple(n for n in names if n not in POWER_CANDIDATES)
    place, splits = _splits(runs, axis, min_levels)
    goals = _goals(runs, axis, place, splits[0])
    trials: list[Trial] = []
    skipped: dict[str, str] = {}
    for number, top in enumerate(splits, 1):
        before = runs.take(place <= top)
        for name in names:
            try:
                fitted = fit_candidate(name, before, loss_fn=loss_fn)
            except InputError as error:
                skipped.setdefault(name, str(error))
                continue
            for at, goal in goals:
                if at <= top:
                    continue
                try:
                    p = fitted.predict(goal.params, goal.data, goal.flops, goal.share)
                except InputError as error:
                    skipped.setdefault(name, str(error))
                    break
                trials.append(
                    Trial(
                        law=name,
                        split=number,
                        params=goal.params,
                        data=goal.data,
                        flops=goal.flops,
                        distance=float(at / top),
                        predicted=float(np.exp(p.centre)),
                        measured=goal.loss,
                        log_error=float(p.centre - np.log(goal.loss)),
                        scale=max(p.scale, 1e-12),
                        dof=p.dof,
                    )
                )
    slope = _slope(runs)
    board = [_row(name, [t for t in trials if t.law == name], skipped.get(name), slope) for name in names]
    most = max((r["splits"] for r in board), default=0)
    every = max((r["trials"] for r in board), default=0)
    for row in board:
        if 0 < row["trials"] < every:
            # A law that could only be tried on the easier, later splits is not comparable.
            row["skipped"] = skipped.get(row["law"]) or "not tried on everything held out"
            row["trials"], row["splits"] = 0, 0
    board.sort(key=lambda r: -r["score"] if r["trials"] else np.inf)
    _paired_tests(board, trials)
    warnings = []
    if most == 1:
        warnings.append("one split: a single held-out level ranks laws weakly")
    return Backtest(trials, board, sorted({float(at) for at, _ in goals}), axis, warnings)


def _splits(runs: RunTable, axis: str, least: int) -> tuple[Array, list[float]]:
    """Every run's place on the axis, and the greatest place of each fitted window."""
    place = runs.budgets if axis == "budget" else cluster_budgets(runs.params if axis == "params" else runs.data)
    levels = np.unique(place)
    if len(levels) <= least:
        raise InputError(f"{axis}: expected at least {least + 1} different levels for a backtest, got {len(levels)}")
    if axis == "budget":
        return place, [float(v) for v in levels[least - 1 : -1]]
    tops = sorted({max(least, round(share * len(levels))) for share in (0.5, 0.65, 0.8)})
    return place, [float(levels[t - 1]) for t in tops if t < len(levels)]


def _goals(runs: RunTable, axis: str, place: Array, first: float) -> list[tuple[float, Goal]]:
    levels = np.unique(place)
    if axis == "budget":
        above = levels[levels > first]
        return list(zip((float(v) for v in above), held_out_goals(runs, place, above), strict=True))
    flops = runs.flops if runs.has("flops") else runs.budgets
    return [
        (
            float(place[i]),
            Goal(float(runs.params[i]), float(runs.data[i]), float(flops[i]), float(runs.loss[i]), 1.0),
        )
        for i in np.flatnonzero(place > first)
    ]


def _paired_tests(board: list[dict[str, Any]], trials: list[Trial]) -> None:
    """A one-sided paired t test of every law's absolute errors against the best law's, on the same held-out points."""
    scored = [r for r in board if r["trials"]]
    if not scored:
        return
    errors = {
        r["law"]: {(t.split, t.params, t.data): abs(t.log_error) for t in trials if t.law == r["law"]} for r in scored
    }
    best = errors[scored[0]["law"]]
    for row in scored:
        shared = [k for k in errors[row["law"]] if k in best]
        gaps = np.array([errors[row["law"]][k] - best[k] for k in shared])
        sure = len(gaps) >= 3 and gaps.std() > 0
        row["p_value"] = float(stats.ttest_1samp(gaps, 0.0, alternative="greater").pvalue) if sure else None


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
    # Without curves at every budget, each budget's best run stands for its minimum.
    with contextlib.suppress(InputError):
        vertices = {v.budget: v for v in fit_isoflop(runs, bootstrap=0, with_surface=False).vertices}
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


def _row(name: str, trials: list[Trial], skipped: str | None, slope: float) -> dict[str, Any]:
    if not trials:
        return {
            "law": name,
            "trials": 0,
            "splits": 0,
            "score": None,
            "skipped": skipped or "nothing held out",
        }
    errors = np.array([t.log_error for t in trials])
    rms = float(np.sqrt((errors**2).mean()))
    by_split = [np.mean([t.log_score for t in trials if t.split == m]) for m in sorted({t.split for t in trials})]
    return {
        "law": name,
        "score": float(np.mean(by_split)),
        "rms_error": rms,
        "mean_error": float(errors.mean()),
        "worst_error": float(np.abs(errors).max()),
        "equivalent_compute": float(np.exp(rms / slope)) if slope > 0 else None,
        "inside": float(np.mean([t.inside for t in trials])),
        "spread": float(np.sqrt(np.mean([(t.log_error / t.scale) ** 2 for t in trials]))),
        "trials": len(trials),
        "splits": len(by_split),
        "skipped": None,
    }


def _slope(runs: RunTable) -> float:
    """Fall of log loss per log compute along each budget's best run: it turns an error of loss into one of compute."""
    budgets = runs.budgets
    levels = np.unique(budgets)
    if len(levels) < 2:
        return 0.0
    best = np.array([runs.loss[budgets == level].min() for level in levels])
    return -float(np.polyfit(np.log(levels), np.log(best), 1)[0])
