"""The page's main figure: the law, the prediction and what came; and how any figure draws a law."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ditscale.scaling.figure_style import LIGHT, NARROW, WIDE, canvas, flops_axis, halo, loss_axis, ramp
from ditscale.scaling.study_view import LawView, StudyView

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Height of the drawing inside the axes of the wide figure, about.
_PANEL_POINTS = 295


def size_words(view: StudyView) -> str:
    """What N counts."""
    return "parameters per token" if view.size == "params_per_token" else "parameters"


def all_sizes(view: StudyView) -> list[float]:
    return sorted({view.size_of(c.record) for c in view.curves} | {view.size_of(r) for r in view.runs})


def budget_colours(view: StudyView) -> dict[float, str]:
    return {budget: pair[0] for budget, pair in zip(view.budgets, ramp("budget", len(view.budgets)), strict=True)}


def size_colours(view: StudyView) -> dict[float, str]:
    sizes = all_sizes(view)
    return {size: pair[0] for size, pair in zip(sizes, ramp("size", len(sizes)), strict=True)}


def reach(view: StudyView) -> tuple[float, float]:
    """The budgets that figures over C show."""
    budgets = [*view.budgets]
    for given in (view.prediction, view.outcome):
        if given:
            budgets.append(float(given["budget"]))
    target = view.study.get("target_budget")
    if target:
        budgets.append(float(target))
    return min(budgets) / 1.6, max(budgets) * 1.9


def law_line(law: LawView, low: float, high: float) -> tuple[Any, Any, Any, Any]:
    """Budgets, law and its ends (None without a band) between two budgets."""
    if law.band is not None:
        keep = (law.band.budget >= low * 0.999) & (law.band.budget <= high * 1.001)
        if keep.sum() >= 2:
            return law.band.budget[keep], law.band.value[keep], law.band.low[keep], law.band.high[keep]
    budget = np.geomspace(low, high, 64)
    return budget, law(budget), None, None


def draw_law(ax: Axes, view: StudyView, law: LawView) -> None:
    """The law: solid where it was fitted, dashed beyond, on its band; the fitted range as a pale ground."""
    assert view.laws is not None
    low, high = reach(view)
    budget, value, least, most = law_line(law, low, high)
    if least is not None:
        ax.fill_between(budget, least, most, color=LIGHT["law"], alpha=0.16, linewidth=0, zorder=1.5)
    ends = view.laws.fitted_range or (min(view.budgets), max(view.budgets))
    ax.axvspan(*ends, color=LIGHT["fitted"], zorder=0, linewidth=0)
    inside = np.geomspace(*ends, 40)
    on_line = np.exp(np.interp(np.log(inside), np.log(budget), np.log(value)))
    ax.plot(budget, value, color=LIGHT["law"], linewidth=1.3, linestyle=(0, (4, 2.6)), zorder=2.4)
    ax.plot(inside, on_line, color=LIGHT["law"], linewidth=1.9, zorder=2.5)
    ax.set_xlim(low, high)


def range_label(ax: Axes, view: StudyView) -> None:
    assert view.laws is not None
    ends = view.laws.fitted_range or (min(view.budgets), max(view.budgets))
    ax.annotate(
        "fitted range",
        (math.sqrt(ends[0] * ends[1]), 0.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 6),
        textcoords="offset points",
        ha="center",
        color=LIGHT["muted"],
        fontsize=8.5,
    )


# The law, the prediction and what came


def law_figure(view: StudyView, narrow: bool) -> Figure:
    assert view.laws is not None and view.laws.loss is not None
    compared = bool(view.prediction) and not narrow
    if compared:
        figure, panels = canvas(WIDE, 5.0, ncols=2, width_ratios=(3.7, 1))
        ax = panels[0]
    else:
        figure, ax = canvas(*((NARROW, 4.3) if narrow else (WIDE, 5.0)))
    law = view.laws.loss
    low, high = reach(view)
    tint = budget_colours(view)
    for run in view.fitted:
        ax.plot(
            run["flops"],
            run["loss"],
            "o",
            ms=4.2,
            mfc=tint[float(run["budget"])],
            mec="none",
            alpha=0.55,
            zorder=2,
        )
    draw_law(ax, view, law)
    for best in view.laws.optima:
        ax.plot(
            best.budget,
            best.loss,
            "D",
            ms=6.2,
            mfc=tint.get(best.budget, LIGHT["law"]),
            mec=LIGHT["card"],
            mew=1.0,
            zorder=4,
        )
    budget, value, least, _ = law_line(law, low, high)
    losses = [float(run["loss"]) for run in view.runs] + list(np.atleast_1d(value))
    if least is not None:
        losses += list(least)
    bottom, top = min(losses), max(float(run["loss"]) for run in view.runs)
    # Far off its optimum a run says nothing about the law; the worst of them may leave the picture.
    top = min(top, 2.2 * max(best.loss for best in view.laws.optima)) if view.laws.optima else top
    if view.prediction:
        bottom = min(bottom, float(view.prediction["interval_95"][0]))
    flops_axis(ax)
    loss_axis(ax, bottom * (bottom / top) ** 0.06, top * (top / bottom) ** 0.05)
    range_label(ax, view)
    _law_legend(ax, view, law, narrow)
    if view.prediction:
        _draw_prediction(ax, view, size=8.5)
    if compared:
        _draw_comparison(panels[1], view)
    return figure


def _law_legend(ax: Axes, view: StudyView, law: LawView, narrow: bool) -> None:
    """What the marks are, in the corner that a falling law leaves empty; the law's name beside it."""
    ax.annotate(
        "dots: runs\ndiamonds: lowest points" if narrow else "dots: runs; diamonds: lowest points",
        (0.985, 0.97),
        xycoords="axes fraction",
        ha="right",
        va="top",
        fontsize=9,
        linespacing=1.3,
        color=LIGHT["muted"],
    )
    budget, value, least, most = law_line(law, *reach(view))
    at = math.exp(0.62 * math.log(budget[-1]) + 0.38 * math.log(max(view.budgets)))
    height = float(np.interp(math.log(at), np.log(budget), value if least is None else least))
    words = "the law, extrapolated" if least is None else "the law and its 95 % band\nfor a new run"
    words = words.replace(" and its", "\nand its") if narrow else words
    # Below the band, or above it where the axis is too near: three lines in a narrow figure are a sixth of its height.
    bottom, top = (math.log(end) for end in ax.get_ylim())
    above = math.log(height) - bottom < (0.2 if narrow else 0.125) * (top - bottom)
    if above and most is not None:
        height = float(np.interp(math.log(at), np.log(budget), most))
    halo(
        ax.annotate(
            words,
            (at, height),
            xytext=(0, 14) if above else (-10, -12),
            textcoords="offset points",
            ha="center" if above else "right",
            va="bottom" if above else "top",
            color=LIGHT["law"],
            fontsize=9,
            linespacing=1.3,
        )
    )


def _draw_prediction(ax: Axes, view: StudyView, *, size: float, x: float | None = None, spread: float = 1.0) -> None:
    """The prediction with its interval, and the measured point where there is one."""
    assert view.prediction is not None
    at = float(view.prediction["budget"]) if x is None else x
    value, (low, high) = float(view.prediction["loss"]), map(float, view.prediction["interval_95"])
    ax.errorbar(
        at / spread,
        value,
        yerr=[[value - low], [high - value]],
        fmt="o",
        ms=size,
        mfc=LIGHT["card"],
        mec=LIGHT["law"],
        mew=1.8,
        ecolor=LIGHT["law"],
        elinewidth=1.8,
        capsize=4.5,
        capthick=1.8,
        zorder=5,
    )
    if view.outcome:
        ax.plot(
            at * spread,
            float(view.outcome["measured_loss"]),
            "*",
            ms=1.75 * size,
            mfc=LIGHT["measured"],
            mec=LIGHT["card"],
            mew=0.8,
            zorder=6,
        )


def _draw_comparison(panel: Axes, view: StudyView) -> None:
    """Predicted and measured on a scale at which they can be told apart."""
    assert view.prediction is not None
    value, (low, high) = float(view.prediction["loss"]), map(float, view.prediction["interval_95"])
    measured = float(view.outcome["measured_loss"]) if view.outcome else None
    ends = [low, high, value if measured is None else measured]
    room = 0.16 * (max(ends) - min(ends))
    panel.set_xlim(0, 1)
    panel.set_ylim(min(ends) - room, max(ends) + room)
    panel.set_xticks([])
    panel.grid(axis="x", visible=False)
    panel.set_title("prediction, closer", fontweight="normal", fontsize=9, color=LIGHT["muted"])
    panel.axhspan(low, high, color=LIGHT["law"], alpha=0.10, linewidth=0)
    _draw_prediction(panel, view, size=9.5, x=0.2, spread=1.0 if measured is None else 1.25)
    # Two labels at one height would lie on each other: each gives way by half of what is missing.
    apart = 0.0
    if measured is not None:
        gap = (measured - value) / (panel.get_ylim()[1] - panel.get_ylim()[0])
        apart = max(0.0, 0.12 - abs(gap)) * 0.5 * _PANEL_POINTS * (1 if gap >= 0 else -1)
    _label(panel, f"predicted\n{value:.4f}", value, -apart, LIGHT["law"])
    if measured is not None:
        _label(panel, f"measured\n{measured:.4f}", measured, apart, LIGHT["measured"])
    else:
        _label(panel, "not measured yet", value, -30, LIGHT["muted"])


def _label(panel: Axes, words: str, height: float, lift: float, colour: str) -> None:
    panel.annotate(
        words,
        (0.34, height),
        xytext=(4, lift),
        textcoords="offset points",
        va="center",
        fontsize=9,
        linespacing=1.3,
        color=colour,
    )
