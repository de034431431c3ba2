"""The loss surface: exact recovery, honest words about what the runs cannot determine, and the budget's
split.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from law_helpers import CHINCHILLA, optimum, study

from ditscale.errors import InputError
from ditscale.scaling import RunTable, fit_surface, suggest_runs
from ditscale.scaling.laws import SURFACE
from ditscale.scaling.surface import SurfaceFit


@pytest.mark.parametrize(
    "design",
    [
        {},
        {"width": 16.0},  # wide
        {"off_centre": 3.0},
        {"drift": 0.25},  # drifts by a factor of 2.7 over the study
        {"off_centre": 0.2, "width": 8.0, "drift": -0.3},
    ],
    ids=["centred", "wide", "off-centre", "drifting", "all"],
)
def test_noise_free_designs_are_recovered(design: dict[str, float]) -> None:
    fit = fit_surface(study(**design))
    assert fit.converged
    for name, value in CHINCHILLA.items():
        assert fit.params[name] == pytest.approx(value, rel=1e-8)
    # D_opt at 1e24 to 1e-4 %: the bias of the parabola is of the order of 1 to 6 % on these grids.
    assert fit.optimum(1e24)["data"].value == pytest.approx(optimum(CHINCHILLA, 1e24)[1], rel=1e-6)
    assert fit.params["a"] == pytest.approx(0.451613, abs=1e-6)
    assert fit.params["b"] == pytest.approx(0.548387, abs=1e-6)
    assert fit.optimum(1e24)["data"].value == pytest.approx(4.035835e12, rel=1e-6)


@pytest.mark.parametrize("digits", [5, 6, 7, 8, 11, 12, 13, 14])
def test_a_clean_table_with_rounded_numbers_is_fitted_to_its_digits(digits: int) -> None:
    exact = study(budgets=np.geomspace(1e17, 1e19, 3), sizes=6)
    rounded = {name: [float(f"{v:.{digits}g}") for v in column] for name, column in exact.columns.items()}
    fit = fit_surface(RunTable.from_columns(rounded))
    assert fit.converged and fit.warnings == []
    assert fit.params["alpha"] == pytest.approx(0.34, abs=10.0 ** (1 - digits) * 10)


def test_the_design_of_variable_projection_is_recovered() -> None:
    # The README of vpnls: 8 budgets 1e17..1e22 of 16 points each, recovered to 1e-6 % (arXiv:2603.22339).
    fit = fit_surface(study(budgets=np.geomspace(1e17, 1e22, 8), sizes=16, width=16.0))
    for name, value in CHINCHILLA.items():
        assert fit.params[name] == pytest.approx(value, rel=1e-8)


@pytest.mark.parametrize("law", ["surface", "surface-tied", "surface-floorless", "skaling", "kaplan", "farseer"])
def test_every_law_says_whether_it_converged(law: str) -> None:
    fit = fit_surface(study(noise=0.005), law=law)
    assert set(fit.intervals) >= {"a", "b"}
    assert fit.converged or any("not converged" in w for w in fit.warnings)
    best = fit.optimum(1e20)
    assert best["params"].low < best["params"].value < best["params"].high


def test_a_new_run_scatters_in_the_unit_of_the_loss_where_residuals_are_raw() -> None:
    table = study({**CHINCHILLA, "E": 0.12, "A": 30.0, "B": 40.0}, noise=0.003, seed=1)
    logs = fit_surface(table, loss_fn="mse").optimum(1e20)["new_run"]
    for unit in (1.0, 1000.0):
        fit = fit_surface(
            RunTable.from_columns({**table.columns, "loss": unit * table.loss}), loss_fn="mse", space="raw"
        )
        run = fit.optimum(1e20)["new_run"]
        assert run.high - run.low == pytest.approx(unit * (logs.high - logs.low), rel=0.3)
        best = fit.optimum(1e20)
        told = fit.predict(params=best["params"].value, data=best["data"].value)
        assert told.new_run == pytest.approx(run.ends, rel=1e-3)
        after = suggest_runs(fit, target=1e20, spend=1e19, count=2).runs[-1]["se_after"]
        assert after == pytest.approx(
            suggest_runs(fit_surface(table, loss_fn="mse"), target=1e20, spend=1e19, count=2).runs[-1]["se_after"],
            rel=0.3,
        )


def test_search_finds_the_closed_form() -> None:
    fit = fit_surface(study(noise=0.003))
    theta = np.repeat(fit.fit.theta[None, :], 5, axis=0) * (1 + 0.01 * np.arange(5)[:, None])
    closed = fit.log_optimum(theta, 1e21)[0]
    assert fit.cost is not None
    searched = fit._search(theta, np.log(1e21 / fit.cost.coefficient), fit.cost.exponent)
    assert np.allclose(closed, searched, atol=1e-5)


def test_a_form_that_falls_without_end_far_away_has_its_best_size_at_the_runs() -> None:
    # N^3 in an exponent: a million times beyond these runs this fit's loss falls for ever, and no size there is the best.
    fit = fit_surface(study(noise=0.003, seed=0, budgets=np.geomspace(1e18, 1e20, 5)), law="farseer")
    a = fit.interval("a")
    assert 0.42 < a.low < 0.451613 < a.high < 0.52
    # Where nothing turns, nothing is the best.
    falling = fit.fit.theta.copy()
    falling[[0, 1, 2, 3, 4, 5]] = [0.0, -9.0, 1.0, -0.01, 0.0, 1.0]
    assert np.isnan(fit._search(falling[None, :], np.log(1e20 / 6), 1.0)).all()


def test_cost_is_measured_not_six() -> None:
    # A share of the compute that does not grow with N, as in small DiTs: C = 50 N^0.9 D.
    rng = np.random.default_rng(0)
    n, d = 10 ** rng.uniform(6, 8, 40), 10 ** rng.uniform(6, 8, 40)
    loss = SURFACE.predict(CHINCHILLA, params=n, data=d)
    table = RunTable.from_columns({"params": n, "images": d, "flops": 50 * n**0.9 * d, "loss": loss})
    fit = fit_surface(table)
    assert fit.data_unit == "images"
    assert fit.cost is not None and fit.cost.source == "measured"
    assert fit.cost.coefficient == pytest.approx(50, rel=1e-9)
    assert fit.cost.exponent == pytest.approx(0.9, rel=1e-9)
    best = fit.optimum(1e15)
    nn = best["params"].value * np.exp(np.linspace(-0.5, 0.5, 2001))
    along = SURFACE.predict(CHINCHILLA, params=nn, data=1e15 / (50 * nn**0.9))
    assert best["params"].value == pytest.approx(nn[np.argmin(along)], rel=1e-3)
    assert best["loss"].value == pytest.approx(along.min(), rel=1e-9)


def test_runs_on_one_ray_are_not_identifiable() -> None:
    n = np.geomspace(1e7, 1e9, 12)
    table = RunTable.from_columns(
        {
            "params": n,
            "tokens": 20 * n,
            "flops": 120 * n**2,
            "loss": SURFACE.predict(CHINCHILLA, params=n, data=20 * n),
        }
    )
    fit = fit_surface(table)
    assert any("one line of log N against log D" in w for w in fit.warnings)


def test_too_few_sizes_is_an_error() -> None:
    table = study()
    two = np.isin(np.argsort(np.argsort(table.params)) % 7, [0, 1])
    few = table.take(np.flatnonzero(two)[:2])
    with pytest.raises(InputError, match="params: expected at least 3 different values"):
        fit_surface(few)


def test_a_term_that_the_data_do_not_show_is_said_to_be_at_its_bound() -> None:
    rng = np.random.default_rng(1)
    n, d = 10 ** rng.uniform(7, 9, 40), 10 ** rng.uniform(9, 11, 40)
    loss = 40.0 / n**0.2 * np.exp(0.01 * rng.standard_normal(40))  # no floor, no D
    fit = fit_surface(RunTable.from_columns({"params": n, "tokens": d, "flops": 6 * n * d, "loss": loss}))
    assert any("bound" in w or "not identifiable" in w for w in fit.warnings)


def test_saved_and_read_back_without_a_new_fit() -> None:
    fit = fit_surface(study(noise=0.005, shock=0.003))
    record = json.loads(json.dumps(fit.to_json(), allow_nan=False))
    again = SurfaceFit.from_json(record)
    assert again.params == fit.params
    assert again.optimum(1e21)["loss"] == fit.optimum(1e21)["loss"]
    with pytest.raises(InputError, match="expected a fit saved by ditscale"):
        SurfaceFit.from_json({"law": "surface"})


def test_a_saved_bootstrap_has_the_draws_it_had() -> None:
    fit = fit_surface(study(noise=0.005), bootstrap=150, seed=3, interval_method="case")
    assert SurfaceFit.from_json(json.loads(json.dumps(fit.to_json()))).intervals == fit.intervals


def test_repeated_data_through_an_extra_column() -> None:
    table = study(noise=0.001)
    columns = {**table.columns, "seen": np.asarray(table.data) / 4}
    fit = fit_surface(RunTable.from_columns(columns), law="repetition", inputs={"unique": "seen"}, starts=2)
    assert "R_D" in fit.params and not fit.allocates
    for name in ("A", "B", "R_D", "R_N"):  # coefficients lie above 0, and so do the ends of their intervals
        low, high = fit.intervals[name]
        assert 0 <= low <= fit.params[name] <= high
    with pytest.raises(InputError, match="no split of compute alone"):
        fit.optimum(1e20)
    with pytest.raises(InputError, match="input: expected one of unique"):
        fit_surface(table, law="repetition", inputs={"uniq": "seen"})


def test_prediction_intervals_nest() -> None:
    fit = fit_surface(study(noise=0.005))
    p = fit.predict(params=1e9, tokens=1e11)
    assert p.new_run[0] < p.interval[0] < p.value < p.interval[1] < p.new_run[1]
    assert p.beyond["data"] > 1
    many = fit.predict(params=np.array([1e8, 1e9]), tokens=np.array([1e10, 1e11]))
    assert many.value[1] == pytest.approx(p.value)
    assert many.interval[0][1] == pytest.approx(p.interval[0])
    with pytest.raises(InputError, match="this law counts tokens"):
        fit.predict(params=1e9, images=1e9)


def test_what_the_runs_do_not_tell_has_no_end() -> None:
    rng = np.random.default_rng(1)
    n, d = 10 ** rng.uniform(7, 9, 40), 10 ** rng.uniform(9, 11, 40)
    loss = 40.0 / n**0.2 * np.exp(0.01 * rng.standard_normal(40))  # data do not matter in this range
    fit = fit_surface(RunTable.from_columns({"params": n, "tokens": d, "flops": 6 * n * d, "loss": loss}))
    assert not fit.fit.identifiable and fit.to_json()["identifiable"] is False
    assert fit.intervals["beta"] == [0.0, np.inf] and fit.intervals["a"] == [-np.inf, np.inf]
    # A floor of 0 lies at its bound, and is not known exactly for that.
    assert fit.params["E"] == 0 and 0.01 < fit.intervals["E"][1] < loss.min()
    # Inside the data the loss is known all the same.
    p = fit.predict(params=1e8, tokens=1e10)
    assert np.log(p.interval[1] / p.interval[0]) < 0.02
    low, high = fit.intervals["alpha"]
    assert low < 0.2 < high and high - low < 0.05


def test_a_ray_tells_its_own_losses_and_no_split() -> None:
    n = np.geomspace(1e7, 1e9, 20)
    loss = SURFACE.predict(CHINCHILLA, params=n, data=20 * n) * np.exp(
        0.002 * np.random.default_rng(0).standard_normal(20)
    )
    fit = fit_surface(RunTable.from_columns({"params": n, "tokens": 20 * n, "flops": 120 * n**2, "loss": loss}))
    assert not fit.fit.identifiable and any("one line of log N" in w for w in fit.warnings)
    assert fit.optimum(1e18)["params"].high > 20 * fit.optimum(1e18)["params"].low
    p = fit.predict(params=1e8, tokens=2e9)
    assert np.log(p.interval[1] / p.interval[0]) < 0.01


def test_one_budget_is_refused_and_two_are_doubted() -> None:
    table = study(noise=0.004)
    with pytest.raises(InputError, match="budget: expected runs of at least 2 different budgets"):
        fit_surface(table.take(table.budgets == 1e17))
    fit = fit_surface(table.take(np.isin(table.budgets, np.unique(table.budgets)[[0, 4]])))
    assert any(w.startswith("2 budgets: an error that all runs of one share cannot be seen") for w in fit.warnings)


def test_losses_that_do_not_scale_are_said_to_be_flat() -> None:
    table = study()
    rng = np.random.default_rng(3)
    flat = 0.5 * np.exp(0.02 * rng.standard_normal(len(table)))
    fit = fit_surface(RunTable.from_columns({**table.columns, "loss": flat}))
    assert any("no scaling in this range" in w for w in fit.warnings)
    assert not any("no scaling" in w for w in fit_surface(study(noise=0.01)).warnings)


def test_a_floor_lies_below_the_losses_with_all_its_interval() -> None:
    for seed in range(5):
        fit = fit_surface(study({**CHINCHILLA, "E": 0.3}, noise=0.03, seed=seed))
        low, high = fit.intervals["E"]
        assert 0 <= low <= fit.params["E"] <= high < float(np.min(fit.fit.target)) * 1.1
