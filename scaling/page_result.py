"""The top of a study's page: what was predicted, what was measured, and what proves the order."""

from __future__ import annotations

import datetime
from html import escape
from typing import Any

from ditscale.scaling.figure_law import size_words
from ditscale.scaling.numbers_text import duration, factor, percent, power_of_ten, short
from ditscale.scaling.study_view import StudyView


def title(view: StudyView) -> str:
    """The page's title, with the result first."""
    name = str(view.study.get("name") or view.folder.name)
    if view.outcome:
        predicted, measured = view.outcome["predicted_loss"], view.outcome["measured_loss"]
        return f"Predicted {predicted:.4f}, measured {measured:.4f}: {name}"
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
        predicted, measured = outcome["predicted_loss"], outcome["measured_loss"]
        ordered = in_order(view)
        head = (
            f'<span class="line">Predicted <span class="cool">{predicted:.4f}</span>{" before training" * ordered}.</span> '
            f'<span class="line">Measured <span class="hot">{measured:.4f}</span>.</span>'
        )
        inside = bool(outcome.get("inside_interval"))
        words = "inside its 95 % interval" if inside else "outside its 95 % interval"
        error = float(outcome["relative_error"])
        lead = (
            f"{trained} small diffusion transformers gave a law of training compute. It was carried "
            f"{_factor(outcome)}{', written down, and only then put to the test' * ordered}: the measured loss is "
            f"{abs(100 * error):.2f} % {'above' if error >= 0 else 'below'} the prediction, "
            f'<span class="verdict {"good" if inside else "bad"}">{words}</span>.'
        )
        return head, lead
    if view.prediction:
        low, high = view.prediction["interval_95"]
        test = (
            'diverged: <span class="verdict bad">there is no measured loss</span>.'
            if _prediction_diverged(view)
            else 'has not finished: <span class="verdict wait">the measured loss is still to come</span>.'
        )
        return (
            f'Predicted: a loss of <span class="cool">{view.prediction["loss"]:.4f}</span> at '
            f"{power_of_ten(float(view.prediction['budget']))} FLOPs",
            f"The prediction, with its 95 % interval of {low:.4f} to {high:.4f}, is written down. The run "
            f"that tests it {test}",
        )
    then = f" at {power_of_ten(float(target))} FLOPs" if target else ""
    if view.laws:
        return (
            "The law is fitted",
            f"{trained} runs gave the laws below. The prediction{then} and the run that tests it are still to come.",
        )
    share = _share_done(view)
    if share > 0.9999:
        return (
            f"{trained} of {planned} runs gave a loss",
            "The grid is trained; of the others there is no loss, and the law is not fitted yet. What there is stands below.",
        )
    bar = f'<progress max="1" value="{share:.4f}" aria-label="Share of the FLOPs that is spent"></progress>'
    return (
        f"{trained} of {planned} runs are finished",
        f"The grid is still training: {100 * share:.0f} % of its FLOPs are spent.{bar} The law comes when "
        f"all its runs are there, then a prediction{then}, then the run that tests it. What there is so far "
        "stands below.",
    )


def _prediction_diverged(view: StudyView) -> bool:
    return any(run.get("role") == "prediction" for run in view.diverged)


def _share_done(view: StudyView) -> float:
    grid = [row for row in view.study.get("grid", []) if isinstance(row, dict)]
    total = sum(float(row.get("flops", 0)) for row in grid)
    ids = {run["run_id"] for run in [*view.runs, *view.diverged]}
    return sum(float(row.get("flops", 0)) for row in grid if row.get("run_id") in ids) / total if total else 0.0


def _factor(outcome: dict[str, Any]) -> str:
    times = outcome.get("extrapolation_factor")
    return f"to {factor(float(times))} times the largest fitted budget" if times else "past the largest fitted budget"


def _tiles(view: StudyView) -> str:
    tiles: list[tuple[str, str, str]] = []
    if view.outcome:
        outcome = view.outcome
        low, high = outcome["interval_95"]
        inside = bool(outcome.get("inside_interval"))
        tiles.append(("relative error", percent(float(outcome["relative_error"])), "measured against predicted"))
        half = max(high - outcome["predicted_loss"], outcome["predicted_loss"] - low) / outcome["predicted_loss"]
        tiles.append(
            (
                "95 % interval",
                f"{low:.4f}–{high:.4f}",
                f"measured {'inside' if inside else 'outside'}; ±{100 * half:.1f}\u00a0%",
            )
        )
        if outcome.get("extrapolation_factor"):
            tiles.append(
                (
                    "extrapolation",
                    f"{factor(float(outcome['extrapolation_factor']))}×",
                    "the largest fitted budget",
                )
            )
    elif view.prediction:
        low, high = view.prediction["interval_95"]
        tiles.append(("predicted loss", f"{view.prediction['loss']:.4f}", f"95 %: {low:.4f} to {high:.4f}"))
        if view.prediction.get("extrapolation_factor"):
            times = factor(float(view.prediction["extrapolation_factor"]))
            tiles.append(("extrapolation", f"{times}×", "the largest fitted budget"))
    if view.prediction:
        size = view.size_of(view.prediction) if view.prediction.get("params") else None
        words = f"{short(float(view.prediction['images']))} images" if view.prediction.get("images") else ""
        if size:
            tiles.append(("the predicted run", short(size), f"{size_words(view)}, {words}"))
    spent = float(
        (view.outcome or {}).get("flops_spent") or sum(float(r["flops"]) for r in [*view.runs, *view.diverged])
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
    workers, threads = machine.get("workers"), machine.get("threads_per_worker")
    if not workers:
        return "from start to page"
    return f"{workers} processes" + (f" of {threads} thread{'s' if threads != 1 else ''}" if threads else "")


def _steps(view: StudyView) -> str:
    """Fitted, predicted, trained, compared: with what proves the order."""
    steps: list[tuple[bool, str, str]] = []  # (done, what, detail as HTML)
    laws, prediction, outcome, run = view.laws, view.prediction, view.outcome, view.predicted
    if laws and laws.loss:
        weights = sorted(laws.weights.items(), key=lambda item: -item[1])
        shares = ", ".join(f"{name} {100 * weight:.0f}\u00a0%" for name, weight in weights[:3])
        # Of too few budgets none was held out: the law says so itself.
        words = f"weighted by held-out budgets: {shares}" if weights and laws.scoreboard else laws.chosen or ""
        steps.append((True, f"Law fitted to {len(view.fitted)} runs", escape(words)))
    else:
        steps.append((False, "Law", "to come when the grid is trained"))
    if prediction:
        steps.append((True, "Prediction written", _hash_words(view)))
    else:
        steps.append((False, "Prediction", "to come when the law is fitted, before its run starts"))
    if run:
        steps.append((True, "Predicted run trained", _order_words(view, run)))
    elif _prediction_diverged(view):
        steps.append((True, "Predicted run trained", '<span class="verdict bad">its loss diverged</span>'))
    else:
        training = any(c.record.get("role") == "prediction" for c in view.curves)
        steps.append((False, "The predicted run", "is training" if training else "to come after the prediction"))
    if outcome:
        words = f"loss {outcome['measured_loss']:.4f}, on the validation images, noise and times of all runs"
        steps.append((True, "Measured", words))
    else:
        steps.append((False, "Measured loss", "none" if _prediction_diverged(view) else "to come"))
    items = "".join(
        f'<li{"" if done else " class=todo"}><b>{escape(what)}</b><span class="detail">{detail}</span></li>'
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


def in_order(view: StudyView) -> bool:
    """Whether the files show that the prediction was written before its run began."""
    made, started = (
        _moment((content or {}).get(name))
        for content, name in ((view.prediction, "made_at"), (view.predicted, "started_at"))
    )
    return made is not None and started is not None and started >= made


def _order_words(view: StudyView, run: dict[str, Any]) -> str:
    made, started = _moment((view.prediction or {}).get("made_at")), _moment(run.get("started_at"))
    if not made or not started:
        return "The files do not say which came first."
    begun = f"started {_time_words(run.get('started_at'))}"
    if started >= made:
        gap = duration((started - made).total_seconds())
        return f'{begun}, <span class="verdict good">{gap} after the prediction</span>'
    return f'{begun}, <span class="verdict bad">before the prediction was written</span>'
