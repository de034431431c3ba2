"""Figures of saved fits: from the JSON alone, every one, the same bytes each time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from law_helpers import study

from ditscale.errors import InputError
from ditscale.scaling import RunTable, backtest, fit_figures, fit_isoflop, fit_surface
from ditscale.scaling.fit_figures import draw_files, draw_fit

DIFFUSION = {"E": 0.2, "A": 40.0, "B": 60.0, "alpha": 0.40, "beta": 0.38}


@pytest.fixture(scope="module")
def runs():  # type: ignore[no-untyped-def]
    return study(DIFFUSION, budgets=np.geomspace(1e11, 3e12, 5), sizes=6, cost=384.0, noise=0.01, seed=1)


def _saved(result: object) -> dict[str, object]:
    return json.loads(json.dumps(result.to_json(), allow_nan=False))  # type: ignore[attr-defined, no-any-return]


def test_an_isoflop_fit_draws_its_curves_and_the_surface_beside(runs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    record = _saved(fit_isoflop(runs))
    figures = draw_fit(record)
    assert set(figures) == {"isoflop", "optima", "residuals", "exponents", "floor"}
    # Points, minima and the surface's optima stand where the record has them.
    points = [line.get_xydata() for line in figures["isoflop"].axes[0].lines if line.get_marker() == "o"]
    assert sorted(float(x) for p in points for x in p[:, 0]) == pytest.approx(sorted(runs.params))
    minima = [line.get_xdata()[0] for line in figures["isoflop"].axes[0].lines if line.get_marker() == "D"]
    assert minima == pytest.approx([best["params"] for best in record["optima"]])  # type: ignore[attr-defined]
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(record))
    first = [p.read_bytes() for p in draw_files(path, tmp_path / "a")]
    assert first == [p.read_bytes() for p in draw_files(path, tmp_path / "b")]
    assert all(content.startswith(b"<?xml") for content in first)


def test_axes_say_which_parameters_they_count(runs) -> None:  # type: ignore[no-untyped-def]
    columns = {"params": runs.params * 3.0, "params_per_token": runs.params}
    table = RunTable.from_columns({**runs.columns, **columns}, params="params_per_token")
    figures = draw_fit({**_saved(fit_isoflop(table)), "surface": None})
    assert figures["isoflop"].axes[0].get_xlabel() == "parameters per token N"
    assert figures["optima"].axes[0].get_ylabel() == "best parameters per token"
    assert fit_figures._residuals(fit_surface(table)).axes[0].get_xlabel() == "parameters per token N"
    figures = draw_fit({**_saved(fit_isoflop(runs)), "surface": None})
    assert figures["isoflop"].axes[0].get_xlabel() == "parameters N"


def test_the_floors_profile_has_its_foot_at_the_fit(runs) -> None:  # type: ignore[no-untyped-def]
    fit = fit_surface(runs, loss_fn="mse")
    line = draw_fit(_saved(fit))["floor"].axes[0].lines[0]
    x, y = line.get_xdata(), line.get_ydata()
    assert x[int(np.argmin(y))] == pytest.approx(fit.params["E"], rel=1e-9) and y.min() < 1e-3
    # Where the curve crosses 1.96 the likelihood-ratio interval ends, but for t against the normal.
    ends = fit.interval("E", method="profile")
    right = np.interp(1.96, y[x > fit.params["E"]], x[x > fit.params["E"]])
    assert right - fit.params["E"] == pytest.approx(ends.high - fit.params["E"], rel=0.12)


def test_a_backtest_draws_its_errors(runs, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    board = backtest(runs, laws=["surface", "power"])
    lines = {line.get_label(): line for line in draw_fit(_saved(board))["backtest"].axes[0].lines}
    assert set(lines) == {"surface", "power"}
    assert lines["power"].get_ydata() == pytest.approx([100 * r["rms_error"] for r in board.by_distance("power")])


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    with pytest.raises(InputError, match="source: expected the JSON of a surface fit"):
        draw_files(path, tmp_path)
    path.write_text("[1]")
    with pytest.raises(InputError, match="expected the JSON of a fit, got list"):
        draw_files(path, tmp_path)
    with pytest.raises(InputError, match="kind: expected svg or png"):
        draw_files(path, tmp_path, kind="gif")


def test_a_surface_without_a_best_size_is_drawn_without_it(runs) -> None:  # type: ignore[no-untyped-def]
    same = RunTable.from_columns({**runs.columns, "loss": np.full(len(runs), 0.5)})
    fit = fit_isoflop(same, bootstrap=0)
    assert fit.surface is not None and not fit.surface.has_optimum(3e12)
    figure = fit_figures._optima(_saved(fit), fit.surface)
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["isoFLOP minima"]
    fit_figures._isoflop(_saved(fit), fit.surface)
