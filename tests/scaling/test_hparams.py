"""Hyper-parameter laws from cells of runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from law_helpers import CELL_DATA as DATA
from law_helpers import CELL_SIZES as SIZES
from law_helpers import cells as _cells

from ditscale.errors import InputError
from ditscale.scaling import RunTable, fit_hparams, plan
from ditscale.scaling.cells import NEAR_OPTIMAL
from ditscale.scaling.hparams import _regress
from ditscale.scaling.laws import SURFACE


def test_exact_recovery() -> None:
    fit = fit_hparams(_cells())
    assert fit.params["lr_coefficient"] == pytest.approx(1.8, rel=1e-6)
    assert fit.params["lr_params_exponent"] == pytest.approx(-0.71, abs=1e-8)
    assert fit.params["lr_data_exponent"] == pytest.approx(0.31, abs=1e-8)
    assert fit.params["batch_coefficient"] == pytest.approx(0.58, rel=1e-6)
    assert fit.params["batch_params_exponent"] == pytest.approx(0.0, abs=1e-8)
    cell = fit.cells[0]
    # The band: 0.25 % more loss at exp(+-sqrt(log(1.0025)/0.004)) of the best learning rate.
    half = np.sqrt(np.log1p(NEAR_OPTIMAL) / 0.004)
    assert cell.band == pytest.approx((np.exp(-half), np.exp(half)), rel=1e-6)
    assert cell.runs == 25 and cell.inside


def test_intervals_of_cells_hold_and_row_scatter_would_not() -> None:
    held = []
    for seed in range(60):
        fit = fit_hparams(_cells(noise=0.002, wander=0.05, seed=seed), bootstrap=200, seed=seed)
        ends = fit.intervals["lr"]
        held += [ends["params_exponent"][0] <= -0.71 <= ends["params_exponent"][1]]
        held += [ends["data_exponent"][0] <= 0.31 <= ends["data_exponent"][1]]
    assert 0.90 <= np.mean(held) <= 1.0


def test_prediction_carries_the_cells_own_scatter() -> None:
    fit = fit_hparams(_cells(noise=0.002, wander=0.05, seed=1))
    p = fit.predict(params=1e9, data=5e9)["lr"]
    assert p["interval"][0] < 1.8 * 1e9**-0.71 * 5e9**0.31 < p["interval"][1]
    assert np.log(p["interval"][1] / p["value"]) > 2 * 0.03


def test_cells_at_the_edge_are_left_out() -> None:
    table = _cells(noise=1e-4, shift=0.3)  # 0.075 to 1.2 of the best learning rate
    best = 1.8 * table.params**-0.71 * table.data**0.31
    cut = (table.params == SIZES[0]) & (table.column("lr") > 0.7 * best)
    fit = fit_hparams(table.take(~cut))
    assert sum(not c.inside for c in fit.cells) == len(DATA)
    assert any("not inside the grid" in w for w in fit.warnings)
    assert fit.params["lr_params_exponent"] == pytest.approx(-0.71, abs=0.02)


def test_whole_steps_of_unlike_batches_are_one_cell() -> None:
    table = _cells()
    batch = table.data / 200 * np.tile(np.repeat([0.5, 0.7, 1.0, 1.4, 2.0], 5), len(SIZES) * len(DATA))
    images = np.round(table.data / batch) * batch  # 100 to 400 whole steps: up to 0.4 % off
    fit = fit_hparams(RunTable.from_columns({**table.columns, "images": images}))
    assert [c.runs for c in fit.cells] == [25] * (len(SIZES) * len(DATA))


def test_learning_rate_alone() -> None:
    fit = fit_hparams(_cells(batches=False))
    assert set(fit.laws) == {"lr"}
    assert fit.params["lr_data_exponent"] == pytest.approx(0.31, abs=1e-8)


def test_a_fixed_size_has_no_exponent() -> None:
    table = _cells(noise=1e-4)
    fit = fit_hparams(table.take(table.params == SIZES[0]), bootstrap=300)
    assert fit.fixed == ["params"]
    assert "lr_params_exponent" not in fit.params


def test_too_few_cells() -> None:
    table = _cells()
    with pytest.raises(InputError, match="at least 3 cells"):
        fit_hparams(table.take((table.params == SIZES[0]) & (table.data < 1e9)))


def test_the_plan_reads_a_saved_fit(tmp_path: Path) -> None:
    fit = fit_hparams(_cells())
    path = tmp_path / "hparams.json"
    path.write_text(json.dumps(fit.to_json()))
    p, q = (plan("liang2024", budget=1e20, hparams=h) for h in (fit, str(path)))
    # The cells counted images: the law is asked in images, and the batch comes back in images.
    assert p.lr == pytest.approx(1.8 * p.params**-0.71 * p.images**0.31, rel=1e-6)
    assert p.batch_tokens == pytest.approx(256 * 0.58 * p.images**0.57, rel=1e-6)
    assert q.lr == pytest.approx(p.lr, rel=1e-12)


def test_tuned_runs_carry_a_surface_and_intervals_reach_the_plan(tmp_path: Path) -> None:
    table = _cells(noise=0.001, wander=0.05, seed=2)
    truth = {"A": 40.0, "B": 60.0, "alpha": 0.3, "beta": 0.25, "E": 0.2}
    base = SURFACE.predict(truth, params=table.params, data=table.data)
    columns = {**table.columns, "loss": table.loss / 0.5 * base, "flops": 6 * 64 * table.params * table.data}
    fit = fit_hparams(RunTable.from_columns(columns))
    assert fit.surface is not None
    # The losses at the cells' optima: those of the law, without what bad hyper-parameters add.
    for name in ("alpha", "beta"):
        low, high = fit.surface.intervals[name]
        assert low < truth[name] < high
    path = tmp_path / "hparams.json"
    path.write_text(json.dumps(fit.to_json(), allow_nan=False))
    plans = [plan(str(path), budget=1e20, hparams=h, configure=False) for h in (fit, str(path))]
    for p in plans:
        assert p.loss == pytest.approx(fit.surface.optimum(1e20)["loss"].value, rel=1e-9)
        low, high = p.intervals["lr"]
        assert low < p.lr < high and high / low > np.exp(4 * 0.03)  # the cells' own scatter is 0.05
        assert p.intervals["batch_tokens"][0] < p.batch_tokens < p.intervals["batch_tokens"][1]
    assert plans[0].intervals == plans[1].intervals
    path.write_text(json.dumps({"kind": "hparams", "laws": {"lr": {}}}))
    with pytest.raises(InputError, match="hparams: expected .* to hold"):
        plan("liang2024", budget=1e20, hparams=str(path))


def test_a_cell_without_an_error_of_its_own_counts_as_the_worst_of_the_others() -> None:
    cells = fit_hparams(_cells(noise=0.002, wander=0.05, seed=1), bootstrap=40).cells
    worst = max((c.covariance for c in cells[1:]), key=lambda covariance: covariance[0][0])
    laws = [
        _regress([replace(cells[0], covariance=own), *cells[1:]], "lr", [], 40, 0).law
        for own in (np.full((2, 2), np.nan), worst, np.zeros((2, 2)))
    ]
    unknown, as_worst, as_exact = ([law.coefficient, *law.exponents.values()] for law in laws)
    np.testing.assert_allclose(unknown, as_worst, rtol=1e-12)
    assert not np.allclose(unknown, as_exact, rtol=1e-6), "weights of this cell move the law"
