"""Intervals hold as often as they say, and each method is what its name says."""

from __future__ import annotations

import numpy as np
import pytest
from law_helpers import study
from scipy import stats

from ditscale.errors import InputError
from ditscale.scaling import RunTable, fit_law, fit_power, fit_surface, resampling
from ditscale.scaling.components import Spread, components
from ditscale.scaling.coverage import SCENARIOS, coverage_table
from ditscale.scaling.laws import POWER


@pytest.mark.parametrize("scenario", [SCENARIOS[0], SCENARIOS[2]], ids=["no shock", "shock"])
def test_nominal_95_covers_92_to_98(scenario) -> None:  # type: ignore[no-untyped-def]
    # 35 runs in 5 budgets, targets at 100x. One standard error of a perfect 95 % is 1.5 % with 200 studies, and the
    # bounds are not widened for it; docs/coverage.md holds the same with thousands of studies and every method.
    table = coverage_table(draws=200, seed=10_000, scenarios=(scenario,), methods=("default",))
    row = table.rows[0]
    for quantity in ("a", "N_opt", "loss", "new run"):
        assert 0.92 <= row[quantity] <= 0.98, (quantity, row[quantity])


def test_ignoring_the_shock_would_fail_that_test() -> None:
    table = coverage_table(draws=60, seed=2, scenarios=(SCENARIOS[2],), methods=("delta",))
    assert all(row["loss"] < 0.85 for row in table.rows)


def test_coverage_table_is_written_down() -> None:
    table = coverage_table(draws=10, scenarios=(SCENARIOS[0],), methods=("default", "isoflop cubic", "forecast auto"))
    text = table.to_markdown()
    assert "ditscale coverage --draws 10" in text and text.count("\n| 35 runs") == 3
    with pytest.raises(InputError, match="draws: expected a whole number of at least 10"):
        coverage_table(draws=1)


def test_variance_components_are_recovered() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), 6)
    design = np.column_stack([np.ones(240), np.repeat(np.linspace(-1, 1, 40), 6), rng.standard_normal(240)])
    run, budget = [], []
    for _ in range(200):
        errors = 0.3 * rng.standard_normal(240) + 0.5 * rng.standard_normal(40)[groups]
        parts = components(design, errors, groups)
        run.append(parts.run)
        budget.append(parts.budget)
    assert np.mean(run) == pytest.approx(0.09, rel=0.02)
    # The mean over what is possible: an inverse chi-square of the 38 shocks that a fit of the design leaves to see.
    assert np.mean(budget) == pytest.approx(0.25 * 38 / 36, rel=0.05)


def test_the_ratio_of_shock_to_noise_is_weighed_by_its_exact_likelihood() -> None:
    # The same posterior from the density of all residuals, by a matrix of every error's covariance and no algebra.
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(4), [3, 4, 5, 4])
    design = np.column_stack([np.ones(16), np.repeat([0.0, 1.0, 2.0, 3.0], [3, 4, 5, 4]), rng.standard_normal(16)])
    errors = 0.2 * rng.standard_normal(16) + 0.3 * rng.standard_normal(4)[groups]
    parts = components(design, errors, groups)
    basis = np.linalg.svd(design)[0][:, 3:]  # what a fit of the design leaves to see
    seen = basis.T @ errors
    shared = (groups[:, None] == groups[None, :]).astype(float)
    log_density = []
    for ratio in parts.ratios:
        covariance = basis.T @ (np.eye(16) + ratio * shared) @ basis
        square = float(seen @ np.linalg.solve(covariance, seen))
        # The scale of the noise is unknown: integrated over its logarithm.
        log_density.append(-0.5 * np.linalg.slogdet(covariance)[1] - 0.5 * 13 * np.log(square))
    posterior = np.exp(np.array(log_density) - max(log_density))
    prior = parts.weights / posterior
    assert prior[0] / prior.sum() == pytest.approx(0.5, rel=1e-9)
    step = np.sqrt(parts.ratios[1:])
    expected = step / (1 + (step / 2) ** 2)  # half-Cauchy with scale 2, in equal steps of the logarithm
    assert np.allclose(prior[1:] / prior[1:].sum(), expected / expected.sum(), rtol=1e-9)


def test_a_spread_is_the_mixture_it_says() -> None:
    rng = np.random.default_rng(4)
    spread = Spread(np.array([1.0, 3.0]), np.array([0.7, 0.3]), 9.0)
    draws = np.where(rng.random(400_000) < 0.7, 1.0, 3.0) * rng.standard_t(9.0, 400_000)
    for level in (0.5, 0.95):
        assert np.mean(np.abs(draws) <= spread.reach(level)) == pytest.approx(level, abs=0.003)
    se, dof = spread.student()
    assert se * stats.t.ppf(0.975, dof) == pytest.approx(spread.reach(0.95), rel=1e-6)
    assert se * stats.t.ppf(0.84135, dof) == pytest.approx(spread.reach(0.6827), rel=1e-3)
    plain = Spread(np.array([2.0]), np.ones(1), 5.0)
    assert plain.student() == pytest.approx((2.0, 5.0))


def test_between_budget_quantities_have_few_degrees_and_within_many() -> None:
    fit = fit_surface(study(noise=0.005, shock=0.01, seed=4))
    assert fit.fit.components.budget > fit.fit.components.run
    assert fit.optimum(1e21)["loss"].dof < 8  # 5 budgets, 3 parameters along compute
    assert fit.interval("a").dof > 15  # decided within budgets
    assert fit.interval("a", method="jackknife").dof == 4


def test_a_shock_widens_the_loss_and_hardly_the_exponent() -> None:
    widths = {}
    for shock in (0.0, 0.01):
        fits = [fit_surface(study(noise=0.005, shock=shock, seed=s)) for s in range(20)]
        losses = [np.log(np.divide(*reversed(f.optimum(1e21)["loss"].ends))) for f in fits]
        exponents = [float(np.ptp(f.interval("a").ends)) for f in fits]
        widths[shock] = np.median(losses), np.median(exponents)
    assert widths[0.01][0] > 2.5 * widths[0.0][0]
    assert widths[0.01][1] < 1.2 * widths[0.0][1]


def test_weights_stand_for_the_noise_of_runs() -> None:
    # Runs of a tenth of the noise, said by their weights: as good as all runs of that noise and equal weights.
    rng = np.random.default_rng(8)
    x = np.geomspace(1, 1e3, 40)
    noise = np.where(np.arange(40) % 2, 0.02, 0.2)
    held = []
    for _ in range(200):
        fit = fit_power(x, 2.0 * x**-0.4 * np.exp(noise * rng.standard_normal(40)), weights=noise**-2)
        low, high = fit.intervals["exponent"]
        held.append(low <= -0.4 <= high)
    assert 0.92 <= np.mean(held) <= 0.98
    assert high - low < 0.02


def test_a_form_that_does_not_fit_is_no_shock() -> None:
    # One direction of shocks is all but absorbed by the parameters: a bend of the law itself shows there, and would pass
    # for shocks of many times their size.
    groups = np.repeat(np.arange(5), 6)
    place = np.repeat(np.linspace(-1, 1, 5), 6)
    rng = np.random.default_rng(5)
    size = rng.uniform(-1, 1, 30)
    bend = place**2 - np.mean(place**2)
    absorbed = bend + 0.1 * size  # a parameter that moves budgets as a bend does, nearly
    design = np.column_stack([np.ones(30), place, size, absorbed])
    budgets = []
    for _ in range(50):
        errors = 0.01 * rng.standard_normal(30) + 0.06 * size
        errors += 0.05 * (rng.uniform(-1, 1, 30) * bend)
        budgets.append(np.sqrt(components(design, errors, groups).budget))
    assert np.median(budgets) < 0.05


def test_noise_that_differs_between_budgets_calls_for_the_jackknife() -> None:
    rng = np.random.default_rng(2)
    table = study()
    place = np.log(table.budgets / 1e18) / np.log(10)
    uneven = table.loss * np.exp(0.01 * 4.0**-place * rng.standard_normal(len(table)))
    fit = fit_surface(RunTable.from_columns({**table.columns, "loss": uneven}))
    assert fit.fit.uneven and fit.interval("a").method == "jackknife"
    assert any(w.startswith("the noise of runs differs between budgets (") for w in fit.warnings)
    assert fit.interval("a", method="components").method == "components"
    # Weights of 1/variance make the noise even, and the intervals narrow.
    weighed = fit_surface(RunTable.from_columns({**table.columns, "loss": uneven}), weights=16.0**place)
    assert not weighed.fit.uneven and weighed.interval("a").method == "components"
    assert np.ptp(weighed.interval("a").ends) < 0.6 * np.ptp(fit.interval("a").ends)
    # Even noise is rarely called uneven, and one wild run does not make a budget noisy.
    calm = sum(fit_surface(study(noise=0.005, seed=s)).fit.uneven for s in range(40))
    assert calm <= 5
    wild = study(noise=0.005, seed=1)
    loss = np.array(wild.loss)
    loss[3] *= 1.1
    assert not fit_surface(RunTable.from_columns({**wild.columns, "loss": loss})).fit.uneven


def test_resampling_does_not_depend_on_how_many_draws_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = fit_surface(study(noise=0.005, seed=3)).fit
    for kind in resampling.KINDS:
        whole = resampling.bootstrap(fit, kind, 23, 5)
        with monkeypatch.context() as patch:
            patch.setattr(resampling, "_AT_ONCE", 4 * fit.n)
            assert np.allclose(resampling.bootstrap(fit, kind, 23, 5), whole, rtol=1e-6, atol=1e-9)
    assert [resampling.default_draws(n) for n in (35, 40_000, 80_000, 10**7)] == [1000, 1000, 500, 100]
    x = np.geomspace(1, 1e3, 2500)
    power = fit_power(x, 2.0 * x**-0.4 * np.exp(0.1 * np.random.default_rng(0).standard_normal(2500)))
    with pytest.raises(InputError, match="expected at most 2,000 runs for a jackknife"):
        power.interval("exponent", method="jackknife")


def test_delta_is_the_text_book_interval() -> None:
    rng = np.random.default_rng(1)
    x = np.geomspace(1, 100, 12)
    y = 2.0 * x**-0.4 * np.exp(0.1 * rng.standard_normal(12))
    fit = fit_law(POWER, {"x": x}, y, loss_fn="mse")
    design = np.column_stack([np.log(x), np.ones(12)])
    c, rss, *_ = np.linalg.lstsq(design, np.log(y), rcond=None)
    covariance = rss[0] / 10 * np.linalg.inv(design.T @ design)
    got = fit.interval("exponent", method="delta")
    assert got.se == pytest.approx(np.sqrt(covariance[0, 0]), rel=1e-6)
    assert got.high - got.value == pytest.approx(stats.t.ppf(0.975, 10) * got.se, rel=1e-9)
    # A mean interval at x0, and that of a new observation.
    row = np.array([np.log(1000.0), 1.0])
    se = np.sqrt(row @ covariance @ row)
    p = fit.predict(x=1000.0)
    assert np.log(p.interval[1] / p.value) == pytest.approx(stats.t.ppf(0.975, 10) * se, rel=1e-5)
    new = np.sqrt(se**2 + rss[0] / 10)
    assert np.log(p.new_run[1] / p.value) == pytest.approx(stats.t.ppf(0.975, 10) * new, rel=1e-5)


def test_profile_of_a_linear_law_is_the_delta_interval() -> None:
    rng = np.random.default_rng(2)
    x = np.geomspace(1, 100, 12)
    fit = fit_power(x, 2.0 * x**-0.4 * np.exp(0.1 * rng.standard_normal(12)))
    delta, profile = (fit.interval("exponent", method=m) for m in ("delta", "profile"))
    assert profile.low == pytest.approx(delta.low, rel=1e-3)
    assert profile.high == pytest.approx(delta.high, rel=1e-3)


def test_profile_of_the_floor_is_lopsided_and_holds_the_truth() -> None:
    fit = fit_surface(study(noise=0.005, seed=6), loss_fn="mse")
    got = fit.interval("E", method="profile")
    assert got.low < 1.69 < got.high
    assert got.value - got.low > 1.1 * (got.high - got.value)  # less is known downwards


@pytest.mark.parametrize("method", ["case", "cluster", "wild", "case-t", "jackknife"])
def test_resampling_is_seeded_and_of_the_right_size(method: str) -> None:
    table = study(noise=0.005, seed=3)
    first, again = (fit_surface(table).interval("a", method=method) for _ in range(2))
    assert first == again
    reference = fit_surface(table).interval("a", method="delta")
    assert 0.3 < (first.high - first.low) / (reference.high - reference.low) < 3


def test_many_runs_are_resampled_by_default() -> None:
    fit = fit_surface(study(noise=0.005, sizes=20, budgets=np.geomspace(1e17, 1e19, 6)))
    assert fit.interval("a").method == "case-t"
    assert fit_surface(study(noise=0.005)).interval("a").method == "components"


def test_unknown_methods_and_levels_are_refused() -> None:
    fit = fit_surface(study(noise=0.005))
    with pytest.raises(InputError, match="intervals: expected one of auto"):
        fit.interval("a", method="bca")
    with pytest.raises(InputError, match="level"):
        fit.interval("a", level=95)
    with pytest.raises(InputError, match="name: expected one of A, B"):
        fit.interval("gamma")
    wide, narrow = (fit.interval("a", level=x) for x in (0.99, 0.5))
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize("kind", ["case", "cluster", "wild"])
def test_bootstraps_draw_alike_whatever_the_order_of_rows(kind: str) -> None:
    table = study(noise=0.01)
    shuffled = table.take(np.random.default_rng(1).permutation(len(table)))
    draws = [fit_surface(t).fit.bootstrap(kind, 20) for t in (table, shuffled)]
    assert draws[1] == pytest.approx(draws[0], rel=1e-5)
