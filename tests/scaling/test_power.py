"""Power laws: with and without floor, flat data, few points."""

from __future__ import annotations

import numpy as np
import pytest

from ditscale.errors import InputError
from ditscale.scaling import fit_power
from ditscale.scaling.power import PowerFit
from ditscale.scaling.quality import fit_quality

# The seven sizes of arXiv:2602.15253, whose data-rich sweep gives alpha 0.266, c 1.444, and whose
# data-limited one is flat.
SIZES = np.array([534, 9937, 133e3, 859e3, 19.2e6, 101e6, 341e6])


def test_masked_reconstruction_with_its_floor() -> None:
    loss = 4.0 * SIZES**-0.266 + 1.444
    fit = fit_power(SIZES, loss, floor="free")
    assert fit.converged
    assert fit.exponent == pytest.approx(-0.266, abs=1e-6)
    assert fit.floor == pytest.approx(1.444, abs=1e-6)
    noisy = loss * np.exp(0.09 * np.random.default_rng(7).standard_normal(len(SIZES)))
    rough = fit_power(SIZES, noisy, floor="free")
    assert 0.75 < rough.r2 < 0.97  # the paper's fit has 0.858
    low, high = rough.intervals["exponent"]
    assert low < -0.266 < high


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
