"""The part of a study's page about its runs: how they learned, what they draw, the table, the sources."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from ditscale.scaling.figure_law import size_words
from ditscale.scaling.numbers_text import power_of_ten, short
from ditscale.scaling.study_view import Samples, StudyView

# The terms of data that ship with the package.
_LICENCES = {
    "emoji_scenes": (
        "Noto Emoji pictures (Apache-2.0), emoji-data (MIT), Unicode CLDR names (Unicode License v3); the "
        "full texts ship with the package"
    )
}
_CONVENTIONS = {
    "matmul": (
        "one addition or one multiplication is one FLOP, so a multiply-add is two; matrix products and both "
        "products of attention are counted, forward and backward; norms, activations and look-ups are not"
    )
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
            f"guidance {settings['guidance']:g}" if isinstance(settings.get("guidance"), (int, float)) else "",
        )
        if words
    )
    how = f" Sampler: {escape(how)}." if how else ""
    return (
        '<section id="samples"><h2>What the models draw</h2>'
        "<p>The same prompts and the same noise for every model, smallest first, so that only the model "
        f"differs. The prompts are of held-out images that no run was trained on.{how}</p>"
        f'<div class="card sheets">{heads}{"".join(rows)}</div></section>'
    )


def _is_one_row(sheet: Samples) -> bool:
    count = len(sheet.captions)
    return count > 0 and abs(sheet.width / sheet.height - count) < 0.15 * count + 0.5


def _sheet(view: StudyView, sheet: Samples, *, with_captions: bool) -> str:
    record = sheet.record
    size, flops = short(view.size_of(record)), power_of_ten(float(record["flops"]))
    star = record.get("role") == "prediction"
    chip = ' <span class="verdict wait">the predicted run</span>' if star else ""
    source = base64.b64encode(sheet.png).decode()
    what = "; ".join(sheet.captions)
    captions = ""
    if with_captions and sheet.captions:
        captions = f'<span class="small"> {escape(what)}</span>'
    return (
        f'<figure class="sheet"><figcaption><b>{size}</b>{flops} FLOPs<br>loss '
        f"{float(record['loss']):.4f}{chip}{captions}</figcaption>"
        f'<img src="data:image/png;base64,{source}" width="{4 * sheet.width}" height="{4 * sheet.height}" '
        f'alt="{escape(f"Images drawn by the model of {size} {size_words(view)}: {what}")}"></figure>'
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
        f'<a class="button" id="csv" download="runs.csv" href="{_csv_link(everything, columns)}">download '
        'CSV</a></div><div class="table" tabindex="0" role="region" aria-label="Table of runs"><table '
        'id="runs" '
        f'class="sortable"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div></section>'
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
    writer = csv.DictWriter(text, ["run_id", "status", *(n for n in names if n != "run_id")], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(runs)
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(text.getvalue().encode()).decode()


def facts_section(view: StudyView) -> str:
    """All that is needed to do it again."""
    study, first = view.study, (view.runs or [{}])[0]
    config = study.get("config") or {}
    name = first.get("data") or (study.get("training") or {}).get("data")
    licence = _LICENCES.get(str(name).split("/")[0].replace("-", "_"))
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
        ("data", _data_words(name, first.get("data_sha256"), licence)),
        ("validation", escape(_validation(study))),
        ("model", escape(_pairs(study.get("model")))),
        ("training", escape(_pairs(study.get("training")))),
        ("prior of the grid", _prior(study, config)),
        ("law", f'laws.json, SHA-256 <span class="hash">{view.law_sha256}</span>' if view.law_sha256 else ""),
    ]
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{v}</dd>" for k, v in rows if v)
    notes = "".join(f"<li>{escape(note)}</li>" for note in view.notes)
    left_out = f'<h3>Left out of this page</h3><ul class="notes">{notes}</ul>' if notes else ""
    return (
        f'<section id="facts"><h2>Where it comes from</h2>{left_out}'
        f'<div class="card"><dl class="facts">{listed}</dl></div></section>'
    )


def _replay(view: StudyView) -> str:
    command = f"ditscale study run {view.folder.resolve().name}"
    return (
        "Put this study's <code>study.json</code> alone into an empty folder and run it; the same seeds and "
        f"versions train the same models.<pre><code>{escape(command)}</code></pre>"
    )


def _pairs(values: Any) -> str:
    if not isinstance(values, dict):
        return ""
    shown = (
        (str(k).replace("_", " "), v) for k, v in values.items() if v is not None and not isinstance(v, (dict, list))
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
    training = study.get("training") or {}
    images, times = training.get("evaluation_images"), training.get("evaluation_times")
    if not images or not times:
        return ""
    return f"{images} fixed held-out images with fixed noise at {times} fixed times, with averaged weights"


def _prior(study: dict[str, Any], config: dict[str, Any]) -> str:
    prior = study.get("prior") or {}
    if not prior.get("coefficient") or not prior.get("exponent"):
        return ""
    span = f", over a factor of {config['span']:g}" if config.get("span") else ""
    law = f"N = {float(prior['coefficient']):.4g} · C<sup>{float(prior['exponent']):.3g}</sup>"
    return f"sizes stand around {law}{span}"
