"""Power laws: with and without floor, flat data, few points."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from law_helpers import study
from scipy import stats

from ditscale.errors import InputError
from ditscale.scaling import RunTable, fit_power, plan
from ditscale.scaling.power import PowerFit
from ditscale.scaling.quality import QualityFit, fit_quality, fit_quality_of_runs

# The seven sizes of arXiv:2602.15253, whose data-rich sweep gives alpha 0.266, c 1.444, and whose
# data-limited one is flat.
SIZES = np.array([534, 9937, 133e3, 859e3, 19.2e6, 101e6, 341e6])


def _points_of(a: float, alpha: float, c: float, r2: float, seed: int) -> np.ndarray:
    """Losses at SIZES of which this law is the least-squares fit, with this R².

    The paper prints its fits but not its seven losses, so they are made: residuals at a right angle to the law's derivatives
    leave it the optimum, and their size sets R². The coefficient a is not printed either.
    """
    term = SIZES**-alpha
    directions = np.linalg.qr(np.column_stack([term, -a * np.log(SIZES) * term, np.ones(7)]))[0]
    residuals = np.random.default_rng(seed).standard_normal(7)
    residuals -= directions @ (directions.T @ residuals)
    spread = float(((a * term - a * term.mean()) ** 2).sum())
    residuals *= np.sqrt(spread * (1 / r2 - 1) / (residuals @ residuals))
    return np.asarray(a * term + c + residuals)


def test_masked_reconstruction_with_its_floor() -> None:
    fit = fit_power(SIZES, 4.0 * SIZES**-0.266 + 1.444, floor="free")
    assert fit.converged
    assert fit.exponent == pytest.approx(-0.266, abs=1e-6)
    assert fit.floor == pytest.approx(1.444, abs=1e-6)
    for seed in range(3):
        fit = fit_power(SIZES, _points_of(4.0, 0.266, 1.444, 0.858, seed), floor="free", space="raw")
        assert fit.converged and fit.r2 == pytest.approx(0.858, abs=1e-9)
        assert (-fit.exponent, fit.floor) == pytest.approx((0.266, 1.444), abs=1e-6)
        # The fall is plain (F test), the exponent beside a free floor is not: no "no scaling" here.
        assert fit.fit.explains_by_chance < 0.05
        assert any("not determined beside a free floor" in w for w in fit.warnings)
        assert not any("no scaling" in w for w in fit.warnings)


def test_the_flat_published_fit_is_called_flat() -> None:
    # Of such noise the published row is one stationary point among several; this seed's best is that row.
    fit = fit_power(SIZES, _points_of(0.3, 0.009, 0.113, 0.017, 1), floor="free", space="raw")
    assert fit.converged and fit.r2 == pytest.approx(0.017, abs=1e-6)
    assert (-fit.exponent, fit.floor) == pytest.approx((0.009, 0.113), abs=1e-4)
    assert any("no scaling in this range" in w for w in fit.warnings)


def test_a_flat_fit_is_an_answer() -> None:
    loss = 0.113 + 0.3 * SIZES**-0.009 * np.exp(0.12 * np.random.default_rng(0).standard_normal(len(SIZES)))
    fit = fit_power(SIZES, loss)
    assert fit.r2 < 0.3
    assert any("no scaling in this range" in w for w in fit.warnings)


def test_line_in_logs_is_least_squares() -> None:
    rng = np.random.default_rng(3)
    x = np.geomspace(1, 1e4, 9)
    y = 3.0 * x**0.42 * np.exp(0.05 * rng.standard_normal(9))
    fit = fit_power(x, y)
    slope, intercept = np.polyfit(np.log(x), np.log(y), 1)
    assert fit.exponent == pytest.approx(slope, rel=1e-9)
    assert fit.coefficient == pytest.approx(np.exp(intercept), rel=1e-9)
    # The interval is the text-book one: t with n - 2 degrees of freedom.
    left = np.log(y) - intercept - slope * np.log(x)
    se = np.sqrt(left @ left / 7 / ((np.log(x) - np.log(x).mean()) ** 2).sum())
    assert fit.intervals["exponent"][1] - slope == pytest.approx(2.364624 * se, rel=1e-4)


def test_a_floor_makes_the_exponent_larger() -> None:
    x = np.geomspace(1e17, 1e20, 8)
    y = 0.2 + 50 * x**-0.12
    exponents = [fit_power(x, y, floor=f).exponent for f in ("none", 0.1, 0.2, "free")]
    assert exponents[0] > exponents[1] > exponents[2]
    assert exponents[2] == pytest.approx(-0.12, rel=1e-6)
    assert exponents[3] == pytest.approx(-0.12, rel=1e-4)


def test_a_floor_that_is_not_there_ends_at_its_bound_or_is_said_to_be_unclear() -> None:
    rng = np.random.default_rng(5)
    x = np.geomspace(1, 1e3, 10)
    fit = fit_power(x, 5 * x**-0.3 * np.exp(0.02 * rng.standard_normal(10)), floor="free")
    assert any("floor" in w for w in fit.warnings)


def test_two_points_fit_exactly_and_say_so() -> None:
    fit = fit_power([1.0, 10.0], [1.0, 2.0])
    assert fit.exponent == pytest.approx(np.log10(2))
    assert any("as many parameters as points" in w for w in fit.warnings)


@pytest.mark.parametrize(
    ("x", "y", "floor", "message"),
    [
        ([1, 2, 3], [1, 2, -3], "none", "loss: expected positive numbers, got -3 at position 3"),
        ([1, 2, 3], [1, 2], "none", "x: expected 2 values"),
        ([1, 1, 1], [1, 2, 3], "none", "x: expected at least 2 different values"),
        ([1, 2, 3], [1, 2, 3], 1.5, r"floor: expected a value below every measured one \(1\), got 1.5"),
        ([1, 2, 3], [1, 2, 3], "deep", "floor: expected none, free or a number"),
        ([1, 2], [1, 2], "free", "x: expected at least 3"),
        ([1, np.nan, 3], [1, 2, 3], "none", "x: expected positive numbers, got nan"),
    ],
)
def test_mistakes(x: list[float], y: list[float], floor: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_power(x, y, floor=floor)  # type: ignore[arg-type]


def test_saved_and_read_back() -> None:
    fit = fit_power([1, 2, 4, 8, 16], [9, 7, 5.6, 4.4, 3.4], floor=0.5)
    again = PowerFit.from_json(fit.to_json())
    assert again.params == fit.params
    assert again.predict(32).new_run == fit.predict(32).new_run


def test_quality_names_its_features_and_keeps_the_seed_noise() -> None:
    x = np.geomspace(1e18, 1e20, 6)
    exact = 2.2566e6 * x**-0.234
    fit = fit_quality(x, exact, feature_network="clip-vit-l/14")
    assert fit.params["exponent"] == pytest.approx(-0.234, rel=1e-6)
    low, high = fit.predict(1e21).new_run
    # The points lie on the law exactly, yet a new seed moves FID by 1 %: t(4) 0.975 is 2.776.
    assert 2.77 * 0.01 <= np.log(high / low) / 2 < 2 * 2.77 * 0.01
    with pytest.raises(InputError, match="feature-network"):
        fit_quality(x, exact, feature_network="")
    assert fit_quality(x, exact, feature_network="inception-v3", samples=5000).warnings


def test_a_quality_laws_parameters_know_of_the_seed_noise_too() -> None:
    x = np.geomspace(1e18, 1e20, 6)
    fit = fit_quality(x, 1e3 * x**-0.001, feature_network="inception-v3")
    reach = stats.t.ppf(0.975, 4) * 0.01 / np.linalg.norm(np.log(x) - np.log(x).mean())
    assert fit.intervals["exponent"] == pytest.approx([-0.001 - reach, -0.001 + reach], rel=1e-4)
    assert any("holds 0" in w for w in fit.warnings)
    assert QualityFit.from_json(fit.to_json()).intervals == fit.intervals


def _evaluated(folder: Path, *, noise: float = 0.0, **changes: object) -> Path:
    """A study folder whose runs were evaluated: records with the keys that `ditscale evaluate --samples` writes."""
    rng = np.random.default_rng(1)
    table = study(budgets=np.geomspace(1e17, 1e19, 6))
    for i, (n, d, c, loss, budget) in enumerate(
        zip(table.params, table.data, table.flops, table.loss, table.budgets, strict=True)
    ):
        best = n == table.params[table.budgets == budget][3]  # the middle size is the optimal one
        record = {"run_id": f"r{i}", "role": "fit", "status": "finished", "params": n, "images": d, "flops": c}
        record |= {"loss": loss, "budget": budget}
        if i != 1:  # a run that was not evaluated
            distance = 2.2566e6 * c**-0.234 * np.exp(noise * rng.standard_normal()) * (1.0 if best else 1.3)
            record |= {"frechet_distance": distance, "frechet_distance_real": 2.0, "precision": 0.5, "recall": 0.4}
            record |= {"feature_network": "ditscale-scenes-v1", "feature_network_sha256": "ab", "quality_samples": 2000}
            record |= {
                "reference_images": 10000,
                "reference_data": "emoji-scenes/train",
                "neighbours": 3,
                "decoder_sha256": "ab",
                "guidance": 1.0,
            }
            record |= {"guidance_interval": [0.0, 1.0], "sampler": "heun", "sampler_steps": 25, "quality_seed": 0}
        if i == 2:
            record |= changes
        (folder / "runs" / f"r{i}").mkdir(parents=True)
        (folder / "runs" / f"r{i}" / "run.json").write_text(json.dumps(record))
    return folder


def test_quality_of_a_studys_runs_end_to_end(tmp_path: Path) -> None:
    runs = RunTable.read(_evaluated(tmp_path / "study"))
    fit = fit_quality_of_runs(runs, optimal=True)
    assert (fit.metric, fit.feature_network, fit.samples) == ("frechet_distance", "ditscale-scenes-v1", 2000)
    assert fit.power.fit.n == 6  # one a budget, chosen by its loss
    assert fit.params["exponent"] == pytest.approx(-0.234, rel=1e-6)
    assert any("kept 41 of 42 runs: those with frechet_distance" in note for note in fit.notes)
    assert "ditscale-scenes-v1 features, 2000 samples" in fit.summary() and "seeds differ by that" in fit.summary()
    assert any("2000 samples" in w for w in fit.warnings)
    # Every run counts where the path is not asked for: then the sizes' own differences are noise.
    assert fit_quality_of_runs(runs).power.fit.n == 41
    # Exact values, yet a new seed moves the distance: the interval of one new measurement is never narrower, file or not.
    path = tmp_path / "fid.json"
    path.write_text(json.dumps(fit.to_json(), allow_nan=False))
    for law in (fit, path):
        p = plan("liang2024", budget=1e20, quality=law)
        assert p.quality["frechet_distance"] == pytest.approx(2.2566e6 * 1e20**-0.234, rel=1e-6)
        assert p.feature_network == "ditscale-scenes-v1"
        low, high = p.intervals["frechet_distance"]
        assert 2.77 * 0.01 <= np.log(high / low) / 2 < 2 * 2.77 * 0.01
        assert "on ditscale-scenes-v1 features" in p.summary() and p.fid != p.quality["frechet_distance"]
    (tmp_path / "other.json").write_text(json.dumps(fit_power([1, 2, 4], [4, 3, 2]).to_json()))
    with pytest.raises(InputError, match="quality: expected a fit saved by"):
        plan("liang2024", budget=1e20, quality=tmp_path / "other.json")


def test_a_best_run_that_was_not_measured_is_said_to_be_missing() -> None:
    table = study(budgets=np.geomspace(1e17, 1e19, 4))
    whole = {**table.columns, "fid": (10 * table.loss).tolist(), "feature_network": ["x"] * len(table)}
    assert fit_quality_of_runs(RunTable.from_columns(whole), metric="fid", optimal=True).warnings == []
    some = {**whole, "fid": [v if i in (3, 10, 14, 21) else None for i, v in enumerate(whole["fid"])]}
    fit = fit_quality_of_runs(RunTable.from_columns(some), metric="fid", optimal=True)
    assert any("at 2 of 4 budgets the run of least loss has no fid" in w for w in fit.warnings)


def test_quality_measured_in_two_ways_is_not_pooled(tmp_path: Path) -> None:
    for name, value in (
        ("quality_samples", 500),
        ("guidance", 2.0),
        ("guidance_interval", [0.3, 0.8]),
        ("decoder_sha256", "cd"),
        ("neighbours", 5),
        ("feature_network_sha256", "cd"),
    ):
        runs = RunTable.read(_evaluated(tmp_path / name, **{name: value}))
        with pytest.raises(InputError, match=f"{name}: expected one value over all runs"):
            fit_quality_of_runs(runs)
        assert fit_quality_of_runs(runs, pool=True).feature_network == "ditscale-scenes-v1"
    runs = RunTable.read(_evaluated(tmp_path / "plain"))
    with pytest.raises(
        InputError, match="feature-network: expected 'ditscale-scenes-v1', as the runs say, got 'inception-v3'"
    ):
        fit_quality_of_runs(runs, feature_network="inception-v3")
    with pytest.raises(InputError, match="fid: expected a column of that name"):
        fit_quality_of_runs(runs, metric="fid")


def test_a_table_s_loss_against_its_flops_is_the_default() -> None:
    flops = np.geomspace(1e15, 1e18, 6)
    columns = {"flops": flops, "params": flops**0.5, "loss": 3 * flops**-0.05, "fid": 9 * flops**-0.2}
    by_default = fit_power(RunTable.from_columns(columns))
    assert by_default.params == fit_power(flops, columns["loss"]).params
