"""The sections of a study's page, each a string of HTML; a section with nothing to say is empty."""

from __future__ import annotations

import base64
import csv
import datetime
import io
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from ditscale.scaling.figures import size_words
from ditscale.scaling.numbers_text import duration, percent, power_of_ten, short
from ditscale.scaling.study_view import Band, LawView, Samples, StudyView

# Exponents of N_opt, D_opt and loss of the in-context DiT in "Scaling Laws for Diffusion Transformers".
PUBLISHED = {"params": 0.5681, "data": 0.4319, "loss": -0.0273}
_PUBLISHED_NAME = "Liang et al. 2024 (arXiv 2410.08184)"
# The terms of data that ship with the package; other data name theirs in study.json.
_LICENCES = {
    "emoji_scenes": "Noto Emoji pictures (Apache-2.0), emoji-data (MIT), Unicode CLDR names (Unicode License v3); "
    "the full texts ship with the package"
}
_CONVENTIONS = {
    "matmul": "one addition or one multiplication is one FLOP, so a multiply-add is two; matrix products and both "
    "products of attention are counted, forward and backward; norms, activations and look-ups are not"
}

# Heading, field of a record, kind, format.
_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("role", "role", "text"),
    ("budget", "budget", "power"),
    ("N per token", "params_per_token", "count"),
    ("N total", "params", "count"),
    ("width", "width", "plain"),
    ("depth", "depth", "plain"),
    ("images", "images", "count"),
    ("steps", "steps", "count"),
    ("batch", "batch", "plain"),
    ("lr", "lr", "rate"),
    ("FLOPs", "flops", "power3"),
    ("loss", "loss", "loss"),
    ("seconds", "seconds", "seconds"),
    ("GFLOP/s", "flops_per_second", "giga"),
    ("seed", "seed", "plain"),
    ("run", "run_id", "text"),
)


def title(view: StudyView) -> str:
    """The page's title, with the result first."""
    name = str(view.study.get("name") or view.folder.name)
    if view.outcome:
        return f"Predicted {view.outcome['predicted_loss']:.4f}, measured {view.outcome['measured_loss']:.4f}: {name}"
    return f"{name}: scaling study"


def hero(view: StudyView, figure: str) -> str:
    """The law, the prediction made in advance, what came of it, and the main figure."""
    head, lead = _headline(view)
    parts = [
        f'<p class="eyebrow">Scaling study: {escape(str(view.study.get("name") or view.folder.name))}</p>',
        f"<h1>{head}</h1>",
        f'<p class="lead">{lead}</p>',
        _tiles(view),
        figure,
        _steps(view),
    ]
    return f'<section class="hero" id="result" aria-label="Result">{"".join(parts)}</section>'


def _headline(view: StudyView) -> tuple[str, str]:
    trained, planned = len(view.fitted), max(view.planned, len(view.fitted))
    target = view.prediction["budget"] if view.prediction else view.study.get("target_budget")
    if view.outcome and view.prediction:
        outcome = view.outcome
        head = (
            f'<span>Predicted <span class="cool">{outcome["predicted_loss"]:.4f}</span> before training.</span> '
            f'<span>Measured <span class="hot">{outcome["measured_loss"]:.4f}</span>.</span>'
        )
        inside = bool(outcome.get("inside_interval"))
        words = "inside its 95 % interval" if inside else "outside its 95 % interval"
        error = float(outcome["relative_error"])
        lead = (
            f"{trained} small diffusion transformers gave a law of training compute. It was carried "
            f"{_factor(outcome)}, written down, and only then put to the test: the measured loss is "
            f"{abs(100 * error):.2f} % {'above' if error >= 0 else 'below'} the prediction, "
            f'<span class="verdict {"good" if inside else "bad"}">{words}</span>.'
        )
        return head, lead
    if view.prediction:
        low, high = view.prediction["interval_95"]
        return (
            f'Predicted: a loss of <span class="cool">{view.prediction["loss"]:.4f}</span> at '
            f"{power_of_ten(float(view.prediction['budget']))} FLOPs",
            f"The prediction, with its 95 % interval of {low:.4f} to {high:.4f}, is written down. The run that tests "
            f'it has not finished: <span class="verdict wait">the measured loss is still to come</span>.',
        )
    then = f" at {power_of_ten(float(target))} FLOPs" if target else ""
    if view.laws:
        return (
            "The law is fitted",
            f"{trained} runs gave the laws below. The prediction{then} and the run that tests it are still to come.",
        )
    share = _share_done(view)
    bar = f'<progress max="1" value="{share:.4f}" aria-label="Share of the grid\'s FLOPs that is spent"></progress>'
    return (
        f"{trained} of {planned} runs are finished",
        f"The grid is still training: {100 * share:.0f} % of its FLOPs are spent.{bar} The law comes when all its runs "
        f"are there, then a prediction{then}, then the run that tests it. What there is so far stands below.",
    )


def _share_done(view: StudyView) -> float:
    grid = [row for row in view.study.get("grid", []) if isinstance(row, dict)]
    total = sum(float(row.get("flops", 0)) for row in grid)
    ids = {run["run_id"] for run in [*view.runs, *view.diverged]}
    return (
        sum(float(row.get("flops", 0)) for row in grid if row.get("run_id") in ids) / total if total else 0.0
    )


def _factor(outcome: dict[str, Any]) -> str:
    factor = outcome.get("extrapolation_factor")
    return (
        f"to {float(factor):.3g} times the largest fitted budget"
        if factor
        else "past the largest fitted budget"
    )


def _tiles(view: StudyView) -> str:
    tiles: list[tuple[str, str, str]] = []
    if view.outcome:
        outcome = view.outcome
        low, high = outcome["interval_95"]
        inside = bool(outcome.get("inside_interval"))
        tiles.append(
            ("relative error", percent(float(outcome["relative_error"])), "measured against predicted")
        )
        half = (
            max(high - outcome["predicted_loss"], outcome["predicted_loss"] - low) / outcome["predicted_loss"]
        )
        tiles.append(
            (
                "95 % interval",
                f"{low:.4f}–{high:.4f}",
                f"measured {'inside' if inside else 'outside'}; ±{100 * half:.1f} %",
            )
        )
        if outcome.get("extrapolation_factor"):
            tiles.append(
                (
                    "extrapolation",
                    f"{float(outcome['extrapolation_factor']):.3g}×",
                    "the largest fitted budget",
                )
            )
    elif view.prediction:
        low, high = view.prediction["interval_95"]
        tiles.append(("predicted loss", f"{view.prediction['loss']:.4f}", f"95 %: {low:.4f} to {high:.4f}"))
        if view.prediction.get("extrapolation_factor"):
            factor = float(view.prediction["extrapolation_factor"])
            tiles.append(("extrapolation", f"{factor:.3g}×", "the largest fitted budget"))
    if view.prediction:
        size = view.size_of(view.prediction) if view.prediction.get("params") else None
        words = f"{short(float(view.prediction['images']))} images" if view.prediction.get("images") else ""
        if size:
            tiles.append(("the predicted run", short(size), f"{size_words(view)[:-2]}, {words}"))
    spent = float(
        (view.outcome or {}).get("flops_spent")
        or sum(float(r["flops"]) for r in [*view.runs, *view.diverged])
    )
    if spent:
        count = len(view.runs) + len(view.diverged)
        tiles.append(("compute spent", power_of_ten(spent), f"FLOPs in {count} runs"))
    seconds = (view.outcome or {}).get("seconds")
    if seconds:
        tiles.append(("time", duration(float(seconds)), _machine_words(view)))
    if not tiles:
        return ""
    rows = "".join(
        f"<div><dt>{escape(a)}</dt><dd>{escape(b)}<small>{escape(c)}</small></dd></div>" for a, b, c in tiles
    )
    return f'<dl class="tiles">{rows}</dl>'


def _machine_words(view: StudyView) -> str:
    machine = view.study.get("machine") or {}
    cores = machine.get("workers") or machine.get("cores")
    threads = machine.get("threads_per_worker") or machine.get("threads_per_process")
    if not cores:
        return "from start to page"
    return f"{cores} processes" + (f" of {threads} thread{'s' if threads != 1 else ''}" if threads else "")


def _steps(view: StudyView) -> str:
    """Fitted, predicted, trained, compared: with what proves the order."""
    steps: list[tuple[bool, str, str]] = []
    laws, prediction, outcome, run = view.laws, view.prediction, view.outcome, view.predicted
    if laws and laws.loss:
        weights = sorted(laws.weights.items(), key=lambda item: -item[1])
        words = (
            f"weighted by held-out budgets: {', '.join(f'{name} {100 * w:.0f} %' for name, w in weights[:3])}"
        )
        steps.append(
            (True, f"Law fitted to {len(view.fitted)} runs", words if weights else laws.chosen or "")
        )
    else:
        steps.append((False, "Law", "to come when the grid is trained"))
    if prediction:
        steps.append((True, "Prediction written", _hash_words(view)))
    else:
        steps.append((False, "Prediction", "to come when the law is fitted, before its run starts"))
    if run:
        steps.append((True, "Predicted run trained", _order_words(view, run)))
    else:
        steps.append((False, "The predicted run", "to come after the prediction"))
    if outcome:
        words = f"loss {outcome['measured_loss']:.4f} on the same fixed validation images, noise and times as all runs"
        steps.append((True, "Measured", words))
    else:
        steps.append((False, "Measured loss", "to come"))
    items = "".join(
        f'<li{"" if done else " class=todo"}><b>{escape(what)}</b><span class="detail">{detail if "<" in detail else escape(detail)}</span></li>'
        for done, what, detail in steps
    )
    return f'<ol class="steps">{items}</ol>'


def _time_words(stamp: Any) -> str:
    moment = _moment(stamp)
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC") if moment else ""


def _moment(stamp: Any) -> datetime.datetime | None:
    try:
        # Python 3.10 does not read a final Z.
        moment = datetime.datetime.fromisoformat(str(stamp).replace("Z", "+00:00"))
    except ValueError:
        return None
    return moment.astimezone(datetime.timezone.utc) if moment.tzinfo else None


def _hash_words(view: StudyView) -> str:
    assert view.prediction is not None
    promised = view.prediction.get("law_sha256") or view.prediction.get("sha256")
    made = _time_words(view.prediction.get("made_at"))
    if not promised:
        return f"{made}; it names no hash of its law."
    shown = f'{made}, from the law with SHA-256 <span class="hash">{escape(str(promised)[:16])}…</span>'
    if promised == view.law_sha256:
        return f'{shown}; <span class="verdict good">laws.json still has it</span>'
    return f'{shown}; <span class="verdict bad">laws.json in this folder is another</span>'


def _order_words(view: StudyView, run: dict[str, Any]) -> str:
    made, started = _moment((view.prediction or {}).get("made_at")), _moment(run.get("started_at"))
    if not made or not started:
        return "The files do not say which came first."
    begun = f"started {_time_words(run.get('started_at'))}"
    if started >= made:
        gap = duration((started - made).total_seconds())
        return f'{begun}, <span class="verdict good">{gap} after the prediction</span>'
    return f'{begun}, <span class="verdict bad">before the prediction was written</span>'


def how_it_works(view: StudyView, figures: dict[str, str]) -> str:
    """What an isoFLOP study is, with its curves."""
    if not any(figures.get(name) for name in ("isoflop", "optima")):
        return ""
    explain = """
<div class="explain">
<p><b>One budget, several sizes.</b> A fixed amount of compute buys a small model that sees many images, or a large one
that sees few. Too small a model cannot learn more; too large a one has not seen enough. In between lies the best.</p>
<p><b>An isoFLOP parabola.</b> Iso-FLOP means equal compute. Plot the loss of such runs against their size on a
logarithmic axis and they lie on a bowl. Its lowest point is the best size for that budget.</p>
<p><b>From bowls to a law.</b> More compute moves the lowest point to the right and down, along straight lines in
logarithms. Those lines can be carried on to budgets that nobody has spent yet.</p>
</div>"""
    return (
        f'<section id="isoflop"><h2>How the law was found</h2>{explain}{figures.get("isoflop", "")}'
        f"{figures.get('optima', '')}{laws_table(view)}</section>"
    )


def laws_table(view: StudyView) -> str:
    """The fitted power laws, with intervals, beside the published exponents."""
    if not view.laws:
        return ""
    unit = view.laws.data_unit
    rows = []
    listed: Sequence[tuple[str, str, LawView | None]] = (
        ("params", f"best size, N ({size_words(view)[:-2]})", view.laws.params),
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
            f"<td>{law.exponent:.3f}</td><td>{interval}</td><td>{PUBLISHED[key]:.4f}</td></tr>".replace(
                ">-", ">−"
            )
        )
    if not rows:
        return ""
    warnings = "".join(f"<li>{escape(w)}</li>" for w in view.laws.warnings)
    return (
        '<h3>The laws</h3><div class="scroll"><table class="plain"><thead><tr><th scope="col">at compute C</th>'
        '<th scope="col">fitted</th><th scope="col">exponent</th><th scope="col">95 % interval</th>'
        f'<th scope="col">published</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        f'<p class="small muted">Published: exponents of {_PUBLISHED_NAME}, on text-to-image data at 10¹⁷ to 6 × 10¹⁸ '
        "FLOPs. Its D counts tokens, its C is 6ND, and its loss law has no floor, which makes a loss exponent smaller: "
        "read it as a neighbour, not as a target.</p>"
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
                f'<tr><th scope="row">{name}</th><td colspan="4">not scored: {escape(str(row.get("skipped")))}</td></tr>'
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
    heads = "".join(
        f'<th scope="col">{h}</th>' for h in ("law", "weight", "rms error", "worst error", "trials")
    )
    return (
        "<details><summary>How the predicting law was chosen</summary>"
        f'<p class="small">{escape(view.laws.chosen or "")}. Every candidate was fitted to the smaller budgets and '
        "scored on a larger one that it had not seen.</p>"
        f'<div class="scroll"><table class="plain"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div></details>'
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
    answers = [("answer-params", size_words(view))] if data["params"] else []
    answers += [("answer-data", f"training {unit} D")] if data["data"] else []
    answers.append(("answer-loss", "validation loss L"))
    if data["flops_per_second"]:
        answers.append(("answer-time", "time on this study's machine"))
    listed = "".join(
        f'<div><dt>{escape(words)}</dt><dd id="{key}"><span></span><small></small></dd></div>'
        for key, words in answers
    )
    band = "" if data["band"] else " No interval of the loss was saved with this law."
    return (
        '<section id="ask"><h2>Ask the law</h2>'
        "<p>Move the budget. The page answers with the size to train, the images to show it, and the loss to expect, "
        f"each with its 95 % interval.{band}</p>"
        '<div class="card ask"><div><label for="budget">Training budget</label>'
        '<div class="budget"><output id="budget-out" for="budget"></output></div>'
        f'<input type="range" id="budget" min="{low:.6f}" max="{high:.6f}" step="any" value="{start:.6f}">'
        f'<div class="marks">{buttons}</div><dl class="answers" aria-live="polite">{listed}</dl>'
        '<p id="beyond" aria-live="polite"><span class="verdict"></span><span></span></p></div>'
        '<svg id="ask-chart" viewBox="0 0 560 380" role="img" aria-label="The law over compute, with a mark at the '
        'chosen budget"></svg></div></section>'
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


def curves_section(figures: dict[str, str]) -> str:
    """Training itself: loss curves and loss by time."""
    found = [figures[name] for name in ("curves", "timesteps") if figures.get(name)]
    return f'<section id="curves"><h2>How the runs learned</h2>{"".join(found)}</section>' if found else ""


def samples_section(view: StudyView) -> str:
    """The same prompts and noise through models of rising size."""
    if not view.samples:
        return ""
    first = view.samples[0]
    one_row = len({tuple(s.captions) for s in view.samples}) == 1 and _is_one_row(first)
    rows = [_sheet(view, sheet, with_captions=not one_row) for sheet in view.samples]
    heads = ""
    if one_row:
        heads = (
            '<div class="sheet"><span class="muted small">prompt</span><ol class="captions">'
            + "".join(f"<li>{escape(c)}</li>" for c in first.captions)
            + "</ol></div>"
        )
    settings = first.settings
    how = ", ".join(
        words
        for words in (
            str(settings.get("sampler", "")),
            f"{settings['steps']} steps" if settings.get("steps") else "",
            f"guidance {settings['guidance']:g}"
            if isinstance(settings.get("guidance"), (int, float))
            else "",
        )
        if words
    )
    how = f" Sampler: {escape(how)}." if how else ""
    return (
        '<section id="samples"><h2>What the models draw</h2>'
        "<p>The same prompts and the same noise for every model, smallest first, so that only the model differs. "
        f"The prompts are of held-out images that no run was trained on.{how}</p>"
        f'<div class="card sheets">{heads}{"".join(rows)}</div></section>'
    )


def _is_one_row(sheet: Samples) -> bool:
    count = len(sheet.captions)
    return count > 0 and abs(sheet.width / sheet.height - count) < 0.15 * count + 0.5


def _sheet(view: StudyView, sheet: Samples, *, with_captions: bool) -> str:
    record = sheet.record
    size, flops, loss = (
        short(view.size_of(record)),
        power_of_ten(float(record["flops"])),
        float(record["loss"]),
    )
    star = record.get("role") == "prediction"
    chip = ' <span class="verdict wait">the predicted run</span>' if star else ""
    source = base64.b64encode(sheet.png).decode()
    what = "; ".join(sheet.captions)
    captions = ""
    if with_captions and sheet.captions:
        captions = f'<span class="small"> {escape(what)}</span>'
    return (
        f'<figure class="sheet"><figcaption><b>{size}</b>{flops} FLOPs<br>loss {loss:.4f}{chip}{captions}</figcaption>'
        f'<img src="data:image/png;base64,{source}" width="{4 * sheet.width}" height="{4 * sheet.height}" '
        f'alt="{escape(f"Images drawn by the model of {size} {size_words(view)[:-2]}: {what}")}"></figure>'
    )


def runs_section(view: StudyView, budget_colours: Iterable[str]) -> str:
    """Every run, sortable, with a CSV to take away."""
    everything = [*view.runs, *view.diverged]
    if not everything:
        return ""
    columns = [c for c in _COLUMNS if any(r.get(c[1]) is not None for r in everything)]
    swatches = dict(zip(view.budgets, budget_colours, strict=False))
    heads = "".join(
        f'<th scope="col" aria-sort="none" data-kind="{"text" if kind == "text" else "number"}"'
        f'{" class=text" if kind == "text" else ""}><button type="button">{escape(name)}</button></th>'
        for name, _, kind in columns
    )
    body = "".join(_run_row(run, columns, swatches) for run in everything)
    stray = f"; {len(view.diverged)} diverged" if view.diverged else ""
    return (
        '<section id="runs-section"><h2>Every run</h2><div class="bar-row">'
        f"<p>{len(view.runs)} finished runs{stray}. Click a heading to sort.</p>"
        f'<a class="button" id="csv" download="runs.csv" href="{_csv_link(everything, columns)}">download CSV</a></div>'
        '<div class="table" tabindex="0" role="region" aria-label="Table of runs">'
        f'<table id="runs" class="sortable"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div></section>'
    )


def _run_row(run: dict[str, Any], columns: Sequence[tuple[str, str, str]], swatches: dict[float, str]) -> str:
    cells = []
    for _, key, kind in columns:
        value = run.get(key)
        if value is None:
            word = "diverged" if key == "loss" else ""
            cells.append(f'<td data-value="">{word}</td>')
        elif kind == "text":
            cells.append(f'<td class="text" data-value="{escape(str(value))}">{escape(str(value))}</td>')
        elif not isinstance(value, (int, float)):
            cells.append(f'<td data-value="">{escape(str(value))}</td>')
        else:
            mark = ""
            if key == "budget" and float(value) in swatches:
                mark = f'<span class="swatch" style="background:{swatches[float(value)]}"></span>'
            cells.append(f'<td data-value="{float(value)!r}">{mark}{_number(float(value), kind)}</td>')
    kind = ' class="prediction"' if run.get("role") == "prediction" else ""
    return f"<tr{kind}>{''.join(cells)}</tr>"


def _number(value: float, kind: str) -> str:
    if kind == "power":
        return power_of_ten(value)
    if kind == "power3":
        return power_of_ten(value, 3)
    if kind == "count":
        return f"{value:,.0f}"
    if kind == "giga":
        return f"{value / 1e9:.1f}"
    return f"{value:{ {'rate': '.3g', 'loss': '.4f', 'seconds': '.1f'}.get(kind, 'g') }}"


def _csv_link(runs: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str, str]]) -> str:
    text = io.StringIO(newline="")
    names = [key for _, key, _ in columns]
    writer = csv.DictWriter(
        text, ["run_id", "status", *(n for n in names if n != "run_id")], extrasaction="ignore"
    )
    writer.writeheader()
    writer.writerows(runs)
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(text.getvalue().encode()).decode()


def facts_section(view: StudyView) -> str:
    """All that is needed to do it again."""
    study, first = view.study, (view.runs or [{}])[0]
    config = study.get("config") or {}
    data = study.get("data") if isinstance(study.get("data"), dict) else {}
    name = data.get("name") or first.get("data") or (study.get("training") or {}).get("data")
    digest = data.get("sha256") or first.get("data_sha256")
    licence = data.get("licence") or data.get("license") or _LICENCES.get(str(name))
    convention = str(study.get("flop_convention") or first.get("flop_convention") or "")
    seeds = sorted(
        {str(r["seed"]) for r in view.runs if r.get("seed") is not None} | {str(study.get("seed", ""))} - {""}
    )
    rows: list[tuple[str, str]] = [
        ("how to do it again", _replay(view)),
        ("seed", escape(", ".join(seeds))),
        ("versions", escape(_pairs(study.get("versions")))),
        ("machine", escape(_pairs(study.get("machine")))),
        (
            "FLOP convention",
            f"<code>{escape(convention)}</code>: {escape(_CONVENTIONS.get(convention, 'as the ledger counts'))}"
            if convention
            else "",
        ),
        (
            "size N",
            "parameters that work on every token; those that work once an image, and looked-up embeddings, are left out"
            if view.size == "params_per_token"
            else "all trainable parameters",
        ),
        ("data", _data_words(name, digest, licence)),
        ("validation", escape(_validation(study))),
        ("model", escape(_pairs(study.get("model")))),
        ("training", escape(_pairs(study.get("training")))),
        ("prior of the grid", _prior(study, config)),
        ("law", f'laws.json, SHA-256 <span class="hash">{view.law_sha256}</span>' if view.law_sha256 else ""),
    ]
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{v}</dd>" for k, v in rows if v)
    notes = "".join(f"<li>{escape(note)}</li>" for note in view.notes)
    left_out = f'<h3>Left out of this page</h3><ul class="notes">{notes}</ul>' if notes else ""
    return f'<section id="facts"><h2>Where it comes from</h2>{left_out}<div class="card"><dl class="facts">{listed}</dl></div></section>'


def _replay(view: StudyView) -> str:
    command = view.study.get("command") or f"ditscale study run {view.folder.resolve().name}"
    return (
        "Put this study's <code>study.json</code> alone into an empty folder and run it; the same seeds and versions "
        f"train the same models.<pre><code>{escape(str(command))}</code></pre>"
    )


def _pairs(values: Any) -> str:
    if not isinstance(values, dict):
        return ""
    shown = (
        (str(k).replace("_", " "), v)
        for k, v in values.items()
        if v is not None and not isinstance(v, (dict, list))
    )
    words = {True: "yes", False: "no"}
    return ", ".join(
        f"{k} {v:g}" if isinstance(v, float) else f"{k} {words.get(v, v) if isinstance(v, bool) else v}"
        for k, v in shown
    )


def _data_words(name: Any, digest: Any, licence: Any) -> str:
    parts = [escape(str(name))] if name else []
    if digest:
        parts.append(f'SHA-256 <span class="hash">{escape(str(digest))}</span>')
    if licence:
        parts.append(escape(str(licence)))
    return "; ".join(parts)


def _validation(study: dict[str, Any]) -> str:
    training, evaluation = study.get("training") or {}, study.get("evaluation") or {}
    images = evaluation.get("images") or training.get("evaluation_images")
    times = evaluation.get("timesteps") or training.get("evaluation_times")
    count = len(times) if isinstance(times, list) else times
    if not images or not count:
        return ""
    return f"{images} fixed held-out images with fixed noise at {count} fixed times, with averaged weights"


def _prior(study: dict[str, Any], config: dict[str, Any]) -> str:
    prior = study.get("prior") or {}
    if not prior.get("coefficient") or not prior.get("exponent"):
        return ""
    span = f", over a factor of {config['span']:g}" if config.get("span") else ""
    return f"sizes stand around N = {float(prior['coefficient']):.4g} · C<sup>{float(prior['exponent']):.3g}</sup>{span}"


def to_script(value: Any) -> str:
    """JSON that can stand inside a script element."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")
