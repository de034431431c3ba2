"""The part of a study's page about its laws: how they are found, what they say, and the budget slider."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from ditscale.scaling.figure_law import size_words
from ditscale.scaling.numbers_text import power_of_ten
from ditscale.scaling.study_view import Band, LawView, StudyView

# Exponents of N_opt, D_opt and loss of the in-context DiT in "Scaling Laws for Diffusion Transformers".
PUBLISHED = {"params": 0.5681, "data": 0.4319, "loss": -0.0273}
_PUBLISHED_NAME = "Liang et al. 2024 (arXiv 2410.08184)"


def how_it_works(view: StudyView, figures: dict[str, str]) -> str:
    """What an isoFLOP study is, with its curves."""
    if not any(figures.get(name) for name in ("isoflop", "optima")):
        return ""
    explain = """
<div class="explain">
<p><b>One budget, several sizes.</b> A fixed amount of compute buys a small model that sees many images, or a
large one that sees few. Too small a model cannot learn more; too large a one has not seen enough. In between
lies the best.</p>
<p><b>An isoFLOP parabola.</b> Iso-FLOP means equal compute. Plot the loss of such runs against their size on
a logarithmic axis and they lie on a bowl. Its lowest point is the best size for that budget.</p>
<p><b>From bowls to a law.</b> More compute moves the lowest point to the right and down, along straight lines
in logarithms. Those lines can be carried on to budgets that nobody has spent yet.</p>
</div>"""
    return (
        f'<section id="isoflop"><h2>How the law is found</h2>{explain}{figures.get("isoflop", "")}'
        f"{figures.get('optima', '')}{laws_table(view)}</section>"
    )


def laws_table(view: StudyView) -> str:
    """The fitted power laws, with intervals, beside the published exponents."""
    if not view.laws:
        return ""
    unit = view.laws.data_unit
    rows = []
    listed: Sequence[tuple[str, str, LawView | None]] = (
        ("params", f"best size, N ({size_words(view)})", view.laws.params),
        ("data", f"best number of {unit}, D", view.laws.data),
        ("loss", "loss at the best size, L", view.laws.loss),
    )
    for key, name, law in listed:
        if law is None:
            continue
        ends = law.intervals.get("exponent")
        interval = f"{ends[0]:.3f} to {ends[1]:.3f}".replace("-", "−") if ends else "not given"
        rows.append(
            f'<tr><th scope="row">{escape(name)}</th><td>{formula(key, law)}</td>'
            f"<td>{law.exponent:.3f}</td><td>{interval}</td><td>{PUBLISHED[key]:.4f}</td></tr>".replace(">-", ">−")
        )
    if not rows:
        return ""
    names = ("at compute C", "fitted", "exponent", "95 % interval", "published")
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    warnings = "".join(f"<li>{escape(w)}</li>" for w in view.laws.warnings)
    return (
        f'<h3>The laws</h3><div class="scroll"><table class="plain"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        f'<p class="small muted">Published: exponents of {_PUBLISHED_NAME}, on text to image, '
        "10¹⁷ to 6 × 10¹⁸ FLOPs. Its D counts tokens, its C is 6ND, and its loss law has no floor, which "
        "makes a loss exponent smaller: read it as a neighbour, not as a target.</p>"
        + (f'<h3>What the fit warns of</h3><ul class="notes">{warnings}</ul>' if warnings else "")
        + _scoreboard(view)
    )


def formula(key: str, law: LawView) -> str:
    """A law in one line of HTML."""
    letter = {"params": "N", "data": "D", "loss": "L"}[key]
    floor = f"{law.floor:.4f} + " if law.floor else ""
    size = law.coefficient
    number = f"{size:.4g}" if 1e-3 <= size < 1e4 else power_of_ten(size, 3)
    return f"{letter} = {floor}{number} · C<sup>{law.exponent:.3f}</sup>"


def _scoreboard(view: StudyView) -> str:
    assert view.laws is not None
    rows = []
    for row in view.laws.scoreboard:
        name = escape(str(row.get("law", "")))
        weight = view.laws.weights.get(str(row.get("law")))
        if not row.get("trials"):
            rows.append(
                f'<tr><th scope="row">{name}</th><td colspan="4">not scored: '
                f"{escape(str(row.get('skipped')))}</td></tr>"
            )
            continue
        cells = [
            f"{100 * weight:.0f} %" if weight else "0 %",
            f"{100 * float(row['rms_error']):.2f} %" if row.get("rms_error") is not None else "",
            f"{100 * float(row['worst_error']):.2f} %" if row.get("worst_error") is not None else "",
            f"{row['trials']}",
        ]
        rows.append(f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    if not rows:
        return ""
    heads = "".join(f'<th scope="col">{h}</th>' for h in ("law", "weight", "rms error", "worst error", "trials"))
    return (
        "<details><summary>How the predicting law was chosen</summary>"
        f'<p class="small">{escape(view.laws.chosen or "")}. Every candidate was fitted to the smaller '
        "budgets and "
        "scored on a larger one that it had not seen.</p>"
        '<div class="scroll"><table '
        f'class="plain"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div></details>'
    )


def ask_section(view: StudyView) -> str:
    """The slider: a budget in, the best run and its loss out."""
    data = laws_data(view)
    if data is None:
        return ""
    low, high = (math.log10(v) for v in data["slider"])
    start = math.log10(float(view.prediction["budget"])) if view.prediction else math.log10(data["fitted"][1])
    start = min(max(start, low), high)
    marks = [(b, power_of_ten(b)) for b in view.budgets]
    if view.prediction:
        budget = float(view.prediction["budget"])
        marks.append((budget, f"{power_of_ten(budget)} (predicted)"))
    buttons = "".join(
        f'<button type="button" data-budget="{b!r}">{escape(words)}</button>'
        for b, words in marks
        if low - 1e-9 <= math.log10(b) <= high + 1e-9
    )
    unit = view.laws.data_unit if view.laws else "images"
    answers = [("answer-params", f"{size_words(view)} N")] if data["params"] else []
    answers += [("answer-data", f"training {unit} D")] if data["data"] else []
    answers.append(("answer-loss", "validation loss L"))
    if data["flops_per_second"]:
        answers.append(("answer-time", "time on this study's machine"))
    listed = "".join(
        f'<div><dt>{escape(words)}</dt><dd id="{key}"><span></span><small></small></dd></div>' for key, words in answers
    )
    bands = {"loss": ("the loss", "band"), "params": ("the size", "params_band"), "data": (f"the {unit}", "data_band")}
    without = [words for law, (words, band) in bands.items() if data[law] and not data[band]]
    none = f" There is no interval of {escape(' or '.join(without))}." if without else ""
    return (
        '<section id="ask"><h2>Ask the law</h2>'
        "<p>Move the budget. The page answers with the size to train, the images to show it, and the loss "
        f"to expect, each with its 95 % interval.{none}</p>"
        '<div class="card ask"><div><label for="budget">Training budget</label><div class="budget"><output '
        f'id="budget-out" for="budget"></output></div><input type="range" id="budget" min="{low:.6f}" '
        f'max="{high:.6f}" step="any" value="{start:.6f}"><div class="marks">{buttons}</div><dl '
        f'class="answers" aria-live="polite">{listed}</dl><p id="beyond" aria-live="polite"><span '
        'class="verdict"></span><span></span></p></div><svg id="ask-chart" viewBox="0 0 560 380" role="img" '
        'aria-label="The law over compute, with a mark at the chosen budget"></svg></div></section>'
    )


def laws_data(view: StudyView) -> dict[str, Any] | None:
    """What the slider computes with; None without a loss law."""
    laws = view.laws
    if laws is None or laws.loss is None or not (laws.fitted_range or view.budgets):
        return None
    fitted = list(laws.fitted_range or (min(view.budgets), max(view.budgets)))
    band = laws.loss.band
    target = float(view.study.get("target_budget") or fitted[1] * 10)
    ends = [float(band.budget[0]), float(band.budget[-1])] if band else [fitted[0] / 2, 2 * target]
    rates = [float(r["flops_per_second"]) for r in view.runs if r.get("flops_per_second")]
    last = (view.predicted or {}).get("flops_per_second")
    rate = float(last) if last else statistics.median(rates) if rates else None
    return {
        "params": _power(laws.params),
        "data": _power(laws.data),
        "loss": _power(laws.loss),
        "band": _grid(band),
        "params_band": _grid(laws.params.band if laws.params else None),
        "data_band": _grid(laws.data.band if laws.data else None),
        "fitted": fitted,
        "slider": ends,
        "flops_per_second": rate,
        "outcome": {"budget": float(view.outcome["budget"]), "loss": float(view.outcome["measured_loss"])}
        if view.outcome and view.outcome.get("budget")
        else None,
    }


def _power(law: LawView | None) -> dict[str, float] | None:
    return {"coefficient": law.coefficient, "exponent": law.exponent, "floor": law.floor} if law else None


def _grid(band: Band | None) -> dict[str, list[float]] | None:
    if band is None:
        return None
    columns = {"log10_budget": np.log10(band.budget), "value": band.value, "low": band.low, "high": band.high}
    return {name: [float(f"{v:.8g}") for v in column] for name, column in columns.items()}
