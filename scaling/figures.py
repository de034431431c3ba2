"""The page's figures, drawn from a study's folder without a display."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ditscale.scaling.figure_law import (
    all_sizes,
    budget_colours,
    draw_law,
    law_figure,
    law_line,
    range_label,
    reach,
    size_colours,
    size_words,
)
from ditscale.scaling.figure_style import (
    INK,
    LIGHT,
    NARROW,
    WIDE,
    canvas,
    count_axis,
    flops_axis,
    halo,
    loss_axis,
    ramp,
    style,
)
from ditscale.scaling.numbers_text import power_of_ten, raised, short
from ditscale.scaling.study_view import Curve, LawView, Optimum, StudyView

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def colours(view: StudyView) -> dict[str, tuple[str, str]]:
    """Every colour that the study's figures use, by name: (light, dark)."""
    named = dict(INK)
    for kind, count in (("budget", len(view.budgets)), ("size", len(all_sizes(view)))):
        named |= {f"{kind}-{i}": pair for i, pair in enumerate(ramp(kind, count))}
    return named


def draw_figures(view: StudyView, *, narrow: bool = False) -> dict[str, Figure]:
    """Draw what the folder has data for.

    Args:
        view: the study.
        narrow: draw for a small screen. Default: False.

    Returns:
        Name ("law", "isoflop", "optima", "curves", "timesteps") -> figure; a figure without data is left out.
    """
    painters: dict[str, tuple[Callable[[StudyView], bool], Callable[[StudyView, bool], Figure]]] = {
        "law": (lambda v: bool(v.laws and v.laws.loss and v.runs), law_figure),
        "isoflop": (lambda v: len(v.fitted) >= 3 and bool(v.budgets), _isoflop_figure),
        "optima": (
            lambda v: bool(v.laws and v.laws.params and v.laws.data and v.laws.optima),
            _optima_figure,
        ),
        "curves": (lambda v: bool(v.curves), _curves_figure),
        "timesteps": (lambda v: len(_timestep_runs(v)) >= 2, _timesteps_figure),
    }
    figures = {}
    with style():
        for name, (has_data, paint) in painters.items():
            if has_data(view):
                figure = paint(view, narrow)
                # Laid out once: each of the files that a figure is saved to would do it again.
                figure.draw_without_rendering()
                figure.set_layout_engine("none")
                figures[name] = figure
    return figures


# isoFLOP curves


def _isoflop_figure(view: StudyView, narrow: bool) -> Figure:
    figure, ax = canvas(*((NARROW, 4.4) if narrow else (WIDE, 5.2)))
    tint = budget_colours(view)
    optima = {best.budget: best for best in view.laws.optima} if view.laws else {}
    for budget in view.budgets:
        end = _draw_curve(ax, view, budget, optima.get(budget), tint[budget])
        halo(
            ax.annotate(
                power_of_ten(budget) + ("" if narrow else " FLOPs"),
                end,
                xytext=(7, 3),
                textcoords="offset points",
                color=LIGHT["ink"],
                fontsize=9.5,
                weight="bold",
                va="center",
                annotation_clip=False,
            )
        )
    if view.laws and view.laws.params and view.laws.loss and optima:
        path = np.geomspace(min(view.budgets), max(view.budgets), 60)
        ax.plot(
            view.laws.params(path),
            view.laws.loss(path),
            color=LIGHT["ink"],
            linewidth=1.1,
            linestyle=(0, (1.2, 2.4)),
            zorder=2.1,
        )
    bracketed = [best for best in optima.values() if best.bracketed]
    if bracketed:
        first = min(bracketed, key=lambda best: best.budget)
        ax.annotate(
            "best size" if narrow else "best size at this budget",
            (first.params, first.loss),
            xytext=(26, -30) if narrow else (-14, -34),
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=LIGHT["muted"],
            arrowprops={"arrowstyle": "-", "color": LIGHT["muted"], "linewidth": 0.8, "shrinkB": 7},
        )
    sizes = [view.size_of(r) for r in view.fitted]
    ax.set_xlim(min(sizes) / 1.35, max(sizes) * (3.0 if narrow else 2.4))
    count_axis(ax, "x", f"{size_words(view)} N")
    heights = [float(r["loss"]) for r in view.fitted]
    low, high = min(heights), max(heights)
    loss_axis(ax, low * (low / high) ** 0.07, high * (high / low) ** 0.05)
    return figure


def _draw_curve(ax: Axes, view: StudyView, budget: float, best: Optimum | None, tint: str) -> tuple[float, float]:
    """One budget's runs with their curve and its minimum; returns where the line ends."""
    runs = sorted((r for r in view.fitted if float(r["budget"]) == budget), key=view.size_of)
    n = np.array([view.size_of(r) for r in runs])
    loss = np.array([float(r["loss"]) for r in runs])
    ax.plot(n, loss, "o", ms=6, mfc=tint, mec=LIGHT["card"], mew=0.9, zorder=3)
    if best is None or not best.coefficients:
        ax.plot(n, loss, color=tint, linewidth=1.0, alpha=0.6, zorder=2)
        return n[-1], loss[-1]
    line = np.geomspace(n.min() / 1.12, n.max() * 1.12, 100)
    curve = best.curve(line)
    ax.plot(line, curve, color=tint, zorder=2.5)
    if best.bracketed:  # a curve that has no minimum between its runs shows no best size
        if best.params_interval:
            ax.plot(best.params_interval, [best.loss] * 2, color=tint, linewidth=4.5, alpha=0.28, zorder=2.2)
        ax.plot(best.params, best.loss, "D", ms=8, mfc=LIGHT["card"], mec=tint, mew=1.9, zorder=4)
    return float(line[-1]), float(curve[-1])


# N_opt and D_opt


def _optima_figure(view: StudyView, narrow: bool) -> Figure:
    assert view.laws is not None and view.laws.params is not None and view.laws.data is not None
    figure, panels = canvas(NARROW, 7.2, nrows=2) if narrow else canvas(WIDE, 4.5, ncols=2)
    unit = view.laws.data_unit
    target = view.predicted or view.prediction
    rows: Sequence[tuple[Any, LawView, str, str, str, str]] = (
        (panels[0], view.laws.params, "N", "params", f"{size_words(view)} N", "Best size at a budget"),
        (panels[1], view.laws.data, "D", "data", f"training {unit} D", f"Best number of {unit} at a budget"),
    )
    for ax, law, letter, key, label, title in rows:
        draw_law(ax, view, law)
        _draw_optima(ax, view, view.laws.optima, key)
        if target:
            made = view.size_of(target) if key == "params" else target.get(unit)
            if made:
                _draw_made(ax, float(target["budget"]), float(made))
        flops_axis(ax, "compute C (FLOPs)")
        count_axis(ax, "y", label)
        ends = law.intervals.get("exponent")
        note = f"{letter} ∝ C{raised(law.exponent)}" + (f"\n95 %: {ends[0]:.3f} to {ends[1]:.3f}" if ends else "")
        ax.annotate(
            note,
            (0.04, 0.96),
            xycoords="axes fraction",
            va="top",
            fontsize=9.5,
            color=LIGHT["law"],
            linespacing=1.45,
        )
        ax.set_title(title)
        range_label(ax, view)
    return figure


def _draw_optima(ax: Axes, view: StudyView, optima: Sequence[Optimum], key: str) -> None:
    """Each budget's "params" or "data" at its minimum, hollow where the runs do not bracket it."""
    tint = budget_colours(view)
    for best in optima:
        value, ends = getattr(best, key), getattr(best, f"{key}_interval")
        colour = tint.get(best.budget, LIGHT["law"])
        if ends:
            ax.plot([best.budget] * 2, ends, color=colour, linewidth=1.7, zorder=3)
        face, edge = (colour, LIGHT["card"]) if best.bracketed else (LIGHT["card"], colour)
        ax.plot(best.budget, value, "D", ms=6.5, mfc=face, mec=edge, mew=1, zorder=4)


def _draw_made(ax: Axes, budget: float, made: float) -> None:
    """The size or data that the predicted run was given."""
    ax.plot(budget, made, "*", ms=13, mfc=LIGHT["measured"], mec=LIGHT["card"], mew=0.8, zorder=5)
    halo(
        ax.annotate(
            f"predicted run\n{short(made)}",
            (budget, made),
            xytext=(-12, 4),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=8.8,
            color=LIGHT["measured"],
            linespacing=1.3,
        )
    )


# Loss curves


def _curves_figure(view: StudyView, narrow: bool) -> Figure:
    figure, ax = canvas(*((NARROW, 4.6) if narrow else (WIDE, 5.2)))
    tint = size_colours(view)
    # Small models first, so that the long runs of large ones lie on top.
    for curve in sorted(view.curves, key=lambda c: view.size_of(c.record)):
        x, y = _thinned(curve)
        colour = tint[view.size_of(curve.record)]
        ax.plot(
            x,
            y,
            color=colour,
            linewidth=1.15 if curve.finished else 0.9,
            alpha=0.9 if curve.finished else 0.5,
            zorder=2,
        )
    for run in view.runs:
        star = run.get("role") == "prediction"
        ax.plot(
            run["flops"],
            run["loss"],
            "*" if star else "o",
            ms=14 if star else 5.4,
            mfc=LIGHT["measured"] if star else tint[view.size_of(run)],
            mec=LIGHT["card"],
            mew=0.9,
            zorder=5 if star else 4,
        )
    lowest = [float(r["loss"]) for r in view.runs] + [float(np.min(c.loss)) for c in view.curves]
    low = min(lowest)
    # A fresh model's loss says nothing; the first decade of the descent is enough.
    high = min(float(np.median([np.max(c.loss) for c in view.curves])), 8 * low)
    entered = [float(c.flops[np.argmax(c.loss <= high)]) for c in view.curves if np.min(c.loss) <= high]
    ax.set_xlim(float(np.percentile(entered, 10)) / 1.1, max(float(c.flops[-1]) for c in view.curves) * 1.9)
    if view.laws and view.laws.loss and view.budgets:
        budget, value, *_ = law_line(view.laws.loss, *reach(view))
        ax.plot(budget, value, color=LIGHT["ink"], linewidth=1.1, linestyle=(0, (1.2, 2.4)), zorder=3)
        halo(
            ax.annotate(
                "the law",
                (budget[len(budget) // 2], value[len(budget) // 2]),
                xytext=(-4, -9),
                textcoords="offset points",
                ha="right",
                va="top",
                fontsize=9,
                color=LIGHT["ink"],
            )
        )
    flops_axis(ax, "training compute so far (FLOPs)")
    loss_axis(ax, low * (low / high) ** 0.06, high * 1.04, "loss (lines: training, dots: validation)")
    _size_key(ax, view, tint, (0.5, 0.91, 0.47, 0.032) if narrow else (0.66, 0.90, 0.32, 0.032))
    return figure


def _thinned(curve: Curve, points: int = 110) -> tuple[Any, Any]:
    """Points at even distances on a logarithmic axis: what the eye can tell, in a tenth of the bytes."""
    if len(curve.flops) <= points:
        return curve.flops, curve.loss
    wanted = np.geomspace(curve.flops[0], curve.flops[-1], points)
    index = np.unique(np.searchsorted(curve.flops, wanted).clip(0, len(curve.flops) - 1))
    return curve.flops[index], curve.loss[index]


def _size_key(ax: Axes, view: StudyView, tint: dict[float, str], place: tuple[float, float, float, float]) -> None:
    """A strip of the sizes' colours with the smallest, the middle and the largest named."""
    sizes = sorted(tint)
    strip = ax.inset_axes(place)
    strip.set_xlim(0, len(sizes))
    strip.set_ylim(0, 1)
    strip.bar(np.arange(len(sizes)) + 0.5, 1.0, width=1.0, color=[tint[s] for s in sizes], linewidth=0)
    strip.grid(visible=False)
    strip.set_yticks([])
    for spine in strip.spines.values():
        spine.set_visible(False)
    named = sorted({0, len(sizes) // 2, len(sizes) - 1})
    strip.set_xticks([i + 0.5 for i in named], [short(sizes[i], 2) for i in named])
    strip.tick_params(length=0, labelsize=8.8, pad=3)
    strip.set_title(f"{size_words(view)} N", fontsize=8.8, fontweight="normal", color=LIGHT["muted"], pad=4)


# Loss by time


def _timestep_runs(view: StudyView) -> list[dict[str, Any]]:
    """The run nearest to each budget's optimum, and the predicted run."""
    usable = [r for r in view.fitted if r.get("loss_by_timestep") and r.get("timesteps")]
    best = []
    for budget in view.budgets:
        runs = [r for r in usable if float(r["budget"]) == budget]
        if runs:
            best.append(min(runs, key=lambda r: float(r["loss"])))
    last = view.predicted
    if last and last.get("loss_by_timestep") and last.get("timesteps"):
        best.append(last)
    return best


def _timesteps_figure(view: StudyView, narrow: bool) -> Figure:
    figure, ax = canvas(*((NARROW, 4.0) if narrow else (WIDE, 4.4)))
    tint = budget_colours(view)
    values: list[float] = []
    labels: list[tuple[float, float, str]] = []
    for run in _timestep_runs(view):
        star = run.get("role") == "prediction"
        colour = LIGHT["measured"] if star else tint[float(run["budget"])]
        t, loss = np.asarray(run["timesteps"], float), np.asarray(run["loss_by_timestep"], float)
        values += list(loss)
        ax.plot(
            t,
            loss,
            "-o",
            color=colour,
            ms=5,
            mec=LIGHT["card"],
            mew=0.8,
            linewidth=2.0 if star else 1.5,
            zorder=4 if star else 3,
        )
        labels.append(
            (float(loss[-1]), float(t[-1]), power_of_ten(float(run["budget"])) + ("" if narrow else " FLOPs"))
        )
    low, high = min(values), max(values)
    loss_axis(ax, low / 1.12, high * 1.12)
    ax.set_xlim(-0.02, 1.2 if narrow else 1.13)
    ax.set_xticks(np.linspace(0, 1, 6))
    ax.set_xlabel("time t (0: clean image, 1: pure noise)")
    _spread_labels(ax, labels)
    return figure


def _spread_labels(ax: Axes, labels: list[tuple[float, float, str]]) -> None:
    """Labels at line ends (y, x, text), moved apart where they would touch; y is logarithmic."""
    low, high = (math.log(v) for v in ax.get_ylim())
    least = 0.052 * (high - low)
    place = -math.inf
    for y, x, text in sorted(labels):
        place = max(math.log(y), place + least)
        halo(
            ax.annotate(
                text,
                (x, math.exp(place)),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                color=LIGHT["ink"],
                fontsize=9,
            )
        )
