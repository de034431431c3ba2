"""A study's page: one HTML file that holds everything and asks the network for nothing."""

from __future__ import annotations

import json
import os
import re
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from ditscale import __version__
from ditscale.errors import InputError
from ditscale.scaling import page_laws, page_result, page_runs
from ditscale.scaling.figure_style import inline_svg, save
from ditscale.scaling.figures import colours, draw_figures
from ditscale.scaling.study_view import StudyView, read_study

# What a screen reader says of a figure.
_LABELS = {
    "law": "Validation loss against training compute: runs, the fitted law with its band, and the predicted run",
    "isoflop": "IsoFLOP curves: validation loss against model size, one curve for each budget",
    "optima": "Best model size and best number of training images against compute, with their power laws",
    "curves": "Loss during training against compute for every run, coloured by model size",
    "timesteps": "Validation loss at each diffusion time for the best run of every budget",
}
_NAV = (
    ("result", "Result"),
    ("isoflop", "The law"),
    ("ask", "Ask the law"),
    ("curves", "Training"),
    ("samples", "Samples"),
    ("runs-section", "Runs"),
    ("facts", "Sources"),
)


def write_report(study_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write a study's page and its figures.

    The page says what is there: a study that still trains gets a page of its runs so far and of what is to
    come. Figures are also written for use elsewhere, as ``figures/<name>.svg`` and, the main one,
    ``figures/law.png``, beside the page.

    Args:
        study_dir: a study's folder (``study.json`` and what the study has written since).
        out: the page. Default: ``report.html`` in the study's folder.

    Returns:
        The page's path.

    Raises:
        InputError: no study's folder; a damaged study, law, prediction, outcome or run record (each is
            named, and a page that is already there stays as it was); or a place that cannot be written.
    """
    view = read_study(study_dir)
    page = Path(out) if out is not None else view.folder / "report.html"
    if page.is_dir():
        raise InputError(f"{page}: expected the page's file name, got a folder")
    folder = page.parent / "figures"
    try:
        folder.mkdir(parents=True, exist_ok=True)  # before the drawing, which takes seconds
    except OSError as error:
        raise _unwritable(error, page) from error
    figures = draw_figures(view)
    files = {f"{name}.svg": save(figure, "svg") for name, figure in figures.items()}
    if "law" in figures:
        files["law.png"] = save(figures["law"], "png")
    palette = colours(view)
    narrow = draw_figures(view, narrow=True)
    drawings = {
        name: (
            inline_svg(figure, name, _LABELS[name], palette),
            inline_svg(narrow[name], f"{name}-narrow", _LABELS[name], palette),
        )
        for name, figure in figures.items()
    }
    html = build_page(view, drawings)
    try:
        for name, content in files.items():
            _replace(folder / name, content)
        _replace(page, html.encode())
    except OSError as error:
        raise _unwritable(error, page) from error
    return page


def _unwritable(error: OSError, page: Path) -> InputError:
    return InputError(f"{error.filename or page}: expected a place to write the page to, got {error.strerror}")


def build_page(view: StudyView, drawings: dict[str, tuple[str, str]]) -> str:
    """The page's HTML, from a study and its figures, each drawn for a wide screen and for a narrow one."""
    figures = {name: _figure(view, name, *pair) for name, pair in drawings.items()}
    palette = colours(view)
    swatches = [f"var(--fig-budget-{i})" for i in range(len(view.budgets))]
    sections = {
        "result": page_result.hero(view, figures.get("law", "")),
        "isoflop": page_laws.how_it_works(view, figures),
        "ask": page_laws.ask_section(view),
        "curves": page_runs.curves_section(figures),
        "samples": page_runs.samples_section(view),
        "runs-section": page_runs.runs_section(view, swatches),
        "facts": page_runs.facts_section(view),
    }
    nav = "".join(f'<a href="#{key}">{words}</a>' for key, words in _NAV if sections[key])
    values = {
        "version": __version__,
        "title": escape(page_result.title(view)),
        "description": "A scaling law for diffusion transformers, a prediction made in advance, and its test",
        "css": _asset("page.css"),
        "figure_css": _figure_css(palette),
        "nav": nav,
        "main": "\n".join(text for text in sections.values() if text),
        "footer": f"Written by ditscale {__version__}. This file holds everything it shows and needs no network.",
        "laws_json": _to_script(page_laws.laws_data(view)),
        "js": _asset("page.js"),
    }
    # In one pass, so that no value is searched for the names of others.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match.group(1)], _asset("page.html"))


def _figure(view: StudyView, name: str, wide: str, narrow: str) -> str:
    return (
        f'<figure class="card" id="figure-{name}"><div class="on-wide">{wide}</div>'
        f'<div class="on-narrow">{narrow}</div><figcaption>{_caption(view, name)}</figcaption></figure>'
    )


def _caption(view: StudyView, name: str) -> str:
    """What a figure shows, as HTML; only what is in it."""
    if name == "law":
        text = (
            "<b>The law and its test.</b> Dots are runs, diamonds the lowest point of each budget. The line "
            "is the law: solid where it was fitted, dashed where it is carried on, with the band in which a "
            "new run should land in 95 of 100 cases."
        )
        if view.prediction:
            text += " The open circle is the prediction"
            if view.predicted is None or page_result.in_order(view):
                text += ", written before its run began"
            text += "; the star is what that run measured." if view.outcome else "."
        return text
    if name == "isoflop":
        text = (
            "<b>One bowl for each budget.</b> Every dot is a trained model; dots of one colour spent the same compute."
        )
        if view.laws and view.laws.optima:
            text += (
                " Diamonds mark the lowest points, the pale bar behind each is its 95 % interval, and the "
                "dotted line is the law through them."
            )
        return text
    if name == "optima":
        text = (
            "<b>Two straight lines.</b> The lowest points of the bowls, with their 95 % intervals, on "
            "logarithmic axes. The exponents say how a tenfold budget is best shared between a larger model "
            "and more images."
        )
        return text + (" The star is the run that was predicted." if view.prediction else "")
    if name == "curves":
        return (
            "<b>Every run from start to end.</b> Lines are the smoothed training loss, coloured by size; "
            "dots are the validation loss at the end, with averaged weights. Where two lines cross, the "
            "larger model overtakes the smaller one."
        )
    return (
        "<b>Where compute helps.</b> The best run of each budget, its loss split by how much noise the "
        "image carried. The law is about the mean over these times."
    )


def _figure_css(palette: dict[str, tuple[str, str]]) -> str:
    light, dark = ("".join(f"--fig-{name}:{pair[i]};" for name, pair in palette.items()) for i in (0, 1))
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme: dark){{:root{{{dark}}}}}"


def _to_script(value: Any) -> str:
    """JSON that can stand inside a script element."""
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return (resources.files("ditscale.scaling") / "page" / name).read_text(encoding="utf-8")


def _replace(path: Path, content: bytes) -> None:
    """Write so that a reader sees the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
