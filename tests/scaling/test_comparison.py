"""Comparisons of designs, and suggestions of next runs."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from law_helpers import CHINCHILLA, study

from ditscale.errors import InputError
from ditscale.scaling import RunTable, compare, fit_surface, suggest_runs
from ditscale.scaling.comparison import _verdict


def test_a_better_design_is_seen_and_a_lucky_one_is_not() -> None:
    base = study(noise=0.004, seed=1)
    better = study({**CHINCHILLA, "A": 300.0}, noise=0.004, seed=2)
    c = compare(base, better, target=1e21, names=("plain", "better"))
    assert c.differences["log_loss"].clear and c.differences["log_loss"].value < 0
    assert c.equivalent_compute is not None and c.equivalent_compute > 1.5
    assert "better reaches the lower loss" in c.verdict
    # Multiplying the worth of a parameter moves intercepts, not exponents: said, so that nobody reads it as
    # "no gain".
    assert any("only the level differs" in w for w in c.warnings)
    same = compare(study(noise=0.004, seed=0), study(noise=0.004, seed=1000))
    assert not any(d.clear for d in same.differences.values())
    assert "no clear difference" in same.verdict
    json.dumps(c.to_json(), allow_nan=False)


def test_a_line_through_two_budgets_leaves_the_difference_open() -> None:
    d = compare(study(noise=0.004), study(noise=0.004, seed=1, budgets=[1e17, 1e18])).differences["L_exponent"]
    assert (d.low, d.high) == (-np.inf, np.inf) and not d.clear


@pytest.mark.parametrize("options", [{}, {"target": 1e20}])
def test_runs_without_compute_do_not_compare(options: dict[str, float]) -> None:
    tables = [study(noise=0.004), study(noise=0.004, seed=1)]
    tables[1] = RunTable.from_columns({k: v for k, v in tables[1].columns.items() if k != "flops"})
    with pytest.raises(InputError, match="^flops: expected a column of that name"):
        compare(*tables, **options)


def test_a_target_is_called_so() -> None:
    with pytest.raises(InputError, match="^target: expected a positive number of FLOPs, got -5"):
        compare(study(noise=0.004), study(noise=0.004, seed=1), target=-5.0)


def test_a_change_of_exponent_is_seen() -> None:
    c = compare(study(noise=0.002, seed=1), study({**CHINCHILLA, "alpha": 0.40, "A": 1300.0}, noise=0.002, seed=2))
    d = c.differences["N_exponent"]
    assert d.low < 0.28 / 0.68 - 0.28 / 0.62 < d.high and d.clear


def test_differences_of_equals_hold_zero_as_often_as_they_say() -> None:
    clear = 0
    for seed in range(20):
        a, b = (study(noise=0.005, shock=0.003, seed=s) for s in (seed, 500 + seed))
        clear += compare(a, b, target=1e21).differences["log_loss"].clear
    assert clear <= 3  # 5 % nominal: a chance of 1 in 60


def test_a_verdict_of_two_tests_errs_no_oftener_than_one() -> None:
    # By simulation 3 of 80 comparisons of equals are told apart, and 9 where each test has its own 5 %.
    tables = study(noise=0.004, seed=5010), study(noise=0.004, seed=5011)
    c = compare(*tables, target=1e21)
    assert all(d.clear == (d.p < 0.05) for d in c.differences.values())
    n, loss = (replace(c.differences[k], value=-0.1) for k in ("N_exponent", "log_loss"))
    for p, named in ((0.03, False), (0.02, True)):
        assert (
            "lower loss" in _verdict({"N_exponent": replace(n, p=0.9), "log_loss": replace(loss, p=p)}, c.names)
        ) == named
        assert (
            "exponent" in _verdict({"N_exponent": replace(n, p=p), "log_loss": replace(loss, p=0.9)}, c.names)
        ) == named


def test_unlike_conventions_do_not_compare() -> None:
    a, b = study(loss_kind="velocity_mse"), study(loss_kind="epsilon_mse")
    with pytest.raises(InputError, match="loss_kind: expected one value in both designs"):
        compare(a, b)
    assert compare(a, b, pool=True).names == ("first", "second")
    images = RunTable.from_columns({**{k: v for k, v in a.columns.items() if k != "tokens"}, "images": a.data})
    with pytest.raises(InputError, match="expected both designs in one unit"):
        compare(a, images)
    # Data sets may differ: that is what a data comparison compares.
    compare(study(data="laion"), study(data="imagenet"))
    own = compare(study(data="laion", evaluation="128x8-a"), study(data="imagenet", evaluation="128x8-b"))
    assert own.warnings[0] == "each loss is measured on validation images of its own data"
    with pytest.raises(InputError, match="evaluation: expected one value in both designs"):
        compare(study(data="laion", evaluation="128x8-a"), study(data="laion", evaluation="128x8-b"))
    compare(study(evaluation=""), study(evaluation="128x8-b"))  # records of before say nothing


@pytest.mark.parametrize("quantity", ["loss", "params"])
def test_suggested_runs_shrink_the_error_as_they_say(quantity: str) -> None:
    table = study(noise=0.005, seed=3)
    fit = fit_surface(table, loss_fn="mse")
    advice = suggest_runs(fit, target=1e21, spend=1e20, quantity=quantity, count=4)
    assert sum(r["flops"] for r in advice.runs) <= 1e20 * (1 + 1e-9)
    steps = [advice.se_before, *(r["se_after"] for r in advice.runs)]
    assert all(b < a for a, b in zip(steps, steps[1:], strict=False))
    # Make the runs (with the fitted law as the truth, several times): the refit is that much surer.
    errors = []
    rng = np.random.default_rng(0)
    for _ in range(20):
        extra = [
            {
                "params": r["params"],
                "tokens": r["data"],
                "flops": r["flops"],
                "budget": r["flops"],
                "loss": fit.predict(params=r["params"], tokens=r["data"]).value
                * np.exp(np.sqrt(fit.fit.components.run) * rng.standard_normal()),
            }
            for r in advice.runs
        ]
        rows = [dict(zip(table.columns, v, strict=True)) for v in zip(*table.columns.values(), strict=True)]
        again = fit_surface(RunTable.from_records([*rows, *extra]), loss_fn="mse")
        errors.append(again.optimum(1e21, method="delta")[quantity].se)
    assert np.mean(errors) == pytest.approx(steps[-1], rel=0.25)


def test_better_than_spending_it_at_the_old_budgets() -> None:
    fit = fit_surface(study(noise=0.005, shock=0.003, seed=3))
    near = suggest_runs(fit, target=1e21, spend=4e17, count=4).runs[-1]["se_after"]
    far = suggest_runs(fit, target=1e21, spend=1e20, count=4).runs[-1]["se_after"]
    assert far < near


def test_suggestion_mistakes() -> None:
    fit = fit_surface(study(noise=0.005))
    with pytest.raises(InputError, match="quantity: expected loss or params"):
        suggest_runs(fit, target=1e21, spend=1e20, quantity="fame")
    with pytest.raises(InputError, match="spend: expected a positive number"):
        suggest_runs(fit, target=1e21, spend=0)
