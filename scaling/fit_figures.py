"""Figures of saved fits: every one is drawn from the JSON of a fit, without its data file and without a display."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ditscale.errors import InputError
from ditscale.scaling.figure_style import (
    LIGHT,
    WIDE,
    canvas,
    count_axis,
    flops_axis,
    halo,
    loss_axis,
    ramp,
    save,
    style,
)
from ditscale.scaling.fit import fit_law
from ditscale.scaling.holdout import backtest
from ditscale.scaling.isoflop import fit_isoflop
from ditscale.scaling.jsonable import load
from ditscale.scaling.laws import TermLaw
from ditscale.scaling.numbers_text import power_of_ten
from ditscale.scaling.power import PowerFit
from ditscale.scaling.runs import RunTable
from ditscale.scaling.surface import SurfaceFit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
# How far beyond the largest budget the lines of optima are drawn.
_BEYOND = 100.0
_FOREST = ("components", "delta", "jackknife", "case", "wild", "cluster", "profile")


def draw_fit(record: Record) -> dict[str, Figure]:
    """Draw what a saved result has data for.

    Args:
        record: the JSON of ``ditscale fit surface|isoflop``, of ``ditscale backtest``, or of a study's laws.

    Returns:
        Name ("isoflop", "optima", "residuals", "floor", "exponents", "backtest") -> figure.

    Raises:
        InputError: the record is none of these.
    """
    board = record if "scoreboard" in record and "trials" in record else record.get("backtest")
    curves = record if "optima" in record else record.get("isoflop")
    nested = curves.get("surface") if isinstance(curves, Mapping) else None
    saved = record if "saved" in record and "cost" in record else record.get("surface") or nested
    surface = SurfaceFit.from_json(saved) if isinstance(saved, Mapping) else None
    painters: dict[str, Callable[[], Figure]] = {}
    if surface is not None:
        painters["residuals"] = lambda: _residuals(surface)
        if surface.allocates and np.isfinite(surface.params["a"]):
            painters["exponents"] = lambda: _exponents(surface, curves)
        if isinstance(surface.fit.law, TermLaw) and isinstance(surface.fit.law.floor, str):
            painters["floor"] = lambda: _floor(surface)
    if isinstance(curves, Mapping):
        painters["isoflop"] = lambda: _isoflop(curves, surface)
        painters["optima"] = lambda: _optima(curves, surface)
    if isinstance(board, Mapping):
        painters["backtest"] = lambda: _backtest(board)
    if not painters:
        raise InputError("source: expected the JSON of a surface fit, an isoFLOP fit, a backtest or a study's laws")
    with style():
        return {name: paint() for name, paint in sorted(painters.items())}


def draw_files(source: str | Path, out: str | Path, *, kind: str = "svg", **options: Any) -> list[Path]:
    """Draw a saved result, a study's folder, or a table of runs into files.

    Args:
        source: the JSON file; a study's folder, whose laws.json is drawn; or runs, which are fitted and backtested first.
        out: folder for the figures, made where it is not there.
        kind: "svg" or "png". Default: "svg".
        options: of a table of runs, see :meth:`ditscale.scaling.runs.RunTable.read`.

    Raises:
        InputError: the source is neither, the kind is unknown, or the folder cannot be written.
    """
    if kind not in ("svg", "png"):
        raise InputError(f"kind: expected svg or png, got {kind!r}")
    path = Path(source)
    laws = path / "laws.json" if path.is_dir() else path
    if laws.suffix == ".json" and laws.is_file():
        record = load(laws)
        if not isinstance(record, Mapping):
            raise InputError(f"{laws}: expected the JSON of a fit, got {type(record).__name__}")
        for name, given in options.items():
            if given not in (None, False):
                raise InputError(
                    f"{name.replace('_', '-')}: expected it with a table of runs, got it with {laws}, which is fitted already"
                )
    else:
        record = _fitted(RunTable.read(path, **options))
    folder = Path(out)
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in draw_fit(record).items():
            written.append(folder / f"{name}.{kind}")
            written[-1].write_bytes(save(figure, kind, dpi=110))
    except OSError as error:
        raise InputError(f"out: expected a folder to write to, got {folder} ({error.strerror or error})") from None
    return written


def _fitted(runs: RunTable) -> Record:
    """Everything that can be drawn of runs: their curves, the surface, and a backtest where there are budgets enough."""
    record = {"isoflop": fit_isoflop(runs).to_json()}
    with contextlib.suppress(InputError):
        record["backtest"] = backtest(runs).to_json()
    return record


def _budget_of(surface: SurfaceFit) -> tuple[NDArray[np.int64], list[str]]:
    """Index of each run's budget, and the budgets' colours."""
    groups = surface.fit.groups
    index = np.zeros(surface.fit.n, dtype=np.int64) if groups is None else groups
    return index, [light for light, _ in ramp("budget", int(index.max()) + 1)]


def _size_words(column: str | None) -> str:
    return "parameters per token" if column == "params_per_token" else "parameters"


def _isoflop(curves: Record, surface: SurfaceFit | None) -> Figure:
    figure, ax = canvas(WIDE, 5.0)
    optima = curves["optima"]
    tints = [light for light, _ in ramp("budget", len(optima))]
    heights: list[float] = []
    if surface is not None:
        n, loss = surface.fit.inputs["params"], surface.fit.target
        index, _ = _budget_of(surface)
        if len(np.unique(index)) == len(optima):
            for k, tint in enumerate(tints):
                ax.plot(n[index == k], loss[index == k], "o", ms=5.5, mfc=tint, mec=LIGHT["card"], mew=0.8, zorder=3)
            heights += loss.tolist()
    for best, tint in zip(optima, tints, strict=True):
        half = np.sqrt(best["width"]) * 1.12
        size = np.geomspace(best["centre"] / half, best["centre"] * half, 120)
        curve = np.polyval(best["coefficients"], np.log(size / best["centre"]))
        curve = np.exp(curve) if best.get("space") == "log" else curve
        ax.plot(size, curve, color=tint, zorder=2.4)
        ax.plot(best["params"], best["loss"], "D", ms=7.5, mfc=LIGHT["card"], mec=tint, mew=1.8, zorder=4)
        heights += [float(curve.min())]
        if surface is not None and surface.cost is not None:
            data = surface.cost.data(np.full_like(size, best["budget"]), size)
            slice_ = surface.fit.law.predict(surface.fit.params, params=size, data=data)
            ax.plot(size, slice_, color=tint, linewidth=1.1, linestyle=(0, (4, 2)), zorder=2.3)
        if surface is not None and _allocates(surface, best["budget"]):
            size_opt = surface.optimum(best["budget"])
            ax.plot(size_opt["params"].value, size_opt["loss"].value, "^", ms=7, mfc=tint, mec=LIGHT["card"], zorder=4)
        end = (float(size[-1]), float(curve[-1]))
        text = f"{power_of_ten(best['budget'])} FLOPs"
        halo(ax.annotate(text, end, xytext=(6, 0), textcoords="offset points", fontsize=9, va="center"))
    ends = [best["centre"] * best["width"] ** power for best in optima for power in (-0.5, 0.5)]
    ax.set_xlim(min(ends) / 1.3, max(ends) * 3)
    count_axis(ax, "x", f"{_size_words(curves.get('size'))} N")
    loss_axis(ax, min(heights) * 0.97, max(heights) * 1.02, "loss")
    ax.set_title("solid: a parabola a budget, minimum ◇; dashed: the surface, minimum △")
    return figure


def _allocates(surface: SurfaceFit, flops: float) -> bool:
    return surface.cost is not None and surface.allocates and surface.has_optimum(flops)


def _optima(curves: Record, surface: SurfaceFit | None) -> Figure:
    figure, panels = canvas(WIDE, 4.3, ncols=2)
    budgets = np.array([best["budget"] for best in curves["optima"]])
    reach = np.geomspace(budgets.min() / 1.5, budgets.max() * _BEYOND, 40)
    spends = surface is not None and all(_allocates(surface, float(c)) for c in (reach[0], reach[-1]))
    along = [surface.optimum(float(c)) for c in reach] if spends and surface is not None else []
    for ax, key, name, unit in (
        (panels[0], "N_opt", "params", _size_words(curves.get("size"))),
        (panels[1], "D_opt", "data", curves["data_unit"]),
    ):
        line = PowerFit.from_json(curves[key]).predict(reach)
        ax.fill_between(reach, *line.interval, color=LIGHT["law"], alpha=0.16, linewidth=0)
        ax.plot(reach, line.value, color=LIGHT["law"], label="isoFLOP minima")
        ax.plot(budgets, [best[name] for best in curves["optima"]], "D", ms=6, mfc=LIGHT["card"], mec=LIGHT["law"])
        if along:
            best = [optimum[name] for optimum in along]
            low, high = np.array([b.ends for b in best]).T
            ax.fill_between(reach, low, high, color=LIGHT["measured"], alpha=0.16, linewidth=0)
            ax.plot(reach, [b.value for b in best], color=LIGHT["measured"], linestyle=(0, (4, 2)), label="surface")
        ax.axvspan(budgets.max(), reach[-1], color=LIGHT["fitted"], zorder=0)
        flops_axis(ax)
        count_axis(ax, "y", f"best {unit}")
        ax.legend(frameon=False, loc="upper left", fontsize=9)
    panels[0].set_title("N_opt(C), 95 % bands; grey: beyond the runs")
    panels[1].set_title("D_opt(C)")
    return figure


def _residuals(surface: SurfaceFit) -> Figure:
    figure, panels = canvas(WIDE, 3.8, ncols=2, sharey=True)
    residuals = 100 * np.expm1(-surface.fit.residuals) if surface.fit.space == "log" else -surface.fit.residuals
    index, tints = _budget_of(surface)
    for ax, name in zip(panels, ("params", "data"), strict=True):
        for k, tint in enumerate(tints):
            some = index == k
            ax.plot(surface.fit.inputs[name][some], residuals[some], "o", ms=5, mfc=tint, mec=LIGHT["card"], mew=0.7)
        ax.axhline(0, color=LIGHT["edge"], linewidth=0.9)
        ax.set_xscale("log")
        count_axis(ax, "x", f"{_size_words(surface.size)} N" if name == "params" else f"{surface.data_unit} D")
    panels[0].set_ylabel("measured over fitted loss" + (" (%)" if surface.fit.space == "log" else ""))
    panels[0].set_title("residuals, coloured by budget")
    return figure


def _exponents(surface: SurfaceFit, curves: Any) -> Figure:
    """The exponent of N_opt by every route and interval."""
    rows: list[tuple[str, float, list[float], str]] = []
    if isinstance(curves, Mapping):
        name = f"isoFLOP {curves['vertex']}"
        rows.append((name, curves["N_exponent"], curves["intervals"]["N_exponent"], LIGHT["law"]))
    for method in _FOREST:
        if method == "cluster" and surface.fit.groups is None:
            continue
        got = surface.interval("a", method=method)
        rows.append((f"surface, {method}", got.value, got.ends, LIGHT["measured"]))
    figure, ax = canvas(WIDE, 0.9 + 0.36 * len(rows))
    for place, (label, value, ends, tint) in enumerate(reversed(rows)):
        low, high = (value if end is None else float(end) for end in ends)
        ax.plot([low, high], [place] * 2, color=tint, linewidth=2.2, solid_capstyle="butt")
        ax.plot(value, place, "o", ms=6, mfc=tint, mec=LIGHT["card"])
        ax.annotate(label, (0.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=9.5)
    reaches = [abs(float(e) - rows[-1][1]) for row in rows for e in row[2] if e is not None and np.isfinite(e)]
    span = max(reaches, default=0.0) or 1.0
    ax.set_xlim(rows[-1][1] - 1.9 * span, rows[-1][1] + 1.1 * span)
    ax.set_yticks([])
    ax.set_ylim(-0.6, len(rows) - 0.4)
    ax.set_xlabel("exponent a of N_opt(C), 95 % intervals")
    return figure


def _floor(surface: SurfaceFit) -> Figure:
    """How well the irreducible loss is known: everything else refitted at each value of it."""
    fit = surface.fit
    assert isinstance(fit.law, TermLaw) and isinstance(fit.law.floor, str)
    name = fit.law.floor
    highest = 0.999 * float(fit.target.min())  # no law reaches a loss below its floor
    best = min(fit.params[name], highest)
    se = fit.interval(name, method="delta").se
    below, above = max(best - 5 * se, 0.0), min(best + 4 * se, highest)
    values = np.unique(np.concatenate([np.linspace(below, best, 20), np.linspace(best, above, 20)]))
    base, unit = fit.objective_at(fit.theta), fit.objective_scale
    scores, exponents = [], []
    for value in values:
        given = dataclasses.replace(fit.law, floor=float(value), name=f"{fit.law.name}-given-floor")
        other = fit_law(given, fit.inputs, fit.target, weights=fit.weights, loss_fn=fit.loss, space=fit.space, starts=4)
        scores.append(np.sqrt(max((other.objective - base) / unit, 0.0)))
        exponents.append(other.params[given.exponent_names[0]])
    figure, panels = canvas(WIDE, 3.8, ncols=2)
    panels[0].plot(values, scores, color=LIGHT["law"])
    panels[0].axhline(1.96, color=LIGHT["edge"], linewidth=0.9)
    panels[0].annotate(
        "95 %", (1, 1.96), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=LIGHT["muted"], fontsize=9
    )
    panels[0].set_ylim(0, 5)
    panels[0].set_ylabel("distance from the best fit (standard errors)")
    panels[0].set_title(f"profile of the floor {name}")
    panels[1].plot(values, exponents, color=LIGHT["measured"])
    panels[1].set_ylabel(f"exponent {fit.law.exponent_names[0]}")
    panels[1].set_title("and the exponent that goes with it")
    for ax in panels:
        ax.axvline(best, color=LIGHT["ink"], linewidth=0.9, linestyle=(0, (1.2, 2.4)))
        ax.set_xlabel(f"irreducible loss {name}, held fixed")
    return figure


def _backtest(board: Record) -> Figure:
    figure, ax = canvas(WIDE, 4.2)
    shown = [row["law"] for row in board["scoreboard"] if row["trials"]]
    distances = sorted({round(t["distance"], 2) for t in board["trials"]})
    for law, tint in zip(shown, _tints(len(shown)), strict=True):
        mine = [t for t in board["trials"] if t["law"] == law]
        at = sorted({round(t["distance"], 2) for t in mine})
        rms = [100 * np.sqrt(np.mean([t["log_error"] ** 2 for t in mine if round(t["distance"], 2) == x])) for x in at]
        ax.plot(at, rms, "-o", ms=5.5, color=tint, mec=LIGHT["card"], label=law)
    ax.set_xscale("log")
    ax.set_xlabel(f"distance: held-out over greatest fitted {board['axis']}")
    if len(distances) <= 8:
        ax.set_xticks(distances, [f"{d:g}x" for d in distances])
        ax.set_xticks([], minor=True)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("error of the predicted loss (rms, %)")
    ax.set_title("backtest: fitted on the lower part, scored above it")
    ax.legend(frameon=False, fontsize=9, ncols=2)
    return figure


def _tints(count: int) -> list[str]:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [str(to_hex(colormaps["tab10"](i % 10))) for i in range(count)]
