"""Laws: formula, gradients, both ways between public and internal parameters, recovery from their own
data.
"""

from __future__ import annotations

import numpy as np
import pytest

from ditscale.errors import InputError
from ditscale.scaling import fit_law
from ditscale.scaling.laws import Law, TermLaw, power_with_floor
from ditscale.scaling.more_laws import BY_NAME, REPETITION, effective_data

_RNG = np.random.default_rng(7)
_N, _D = 10 ** _RNG.uniform(7, 10, 60), 10 ** _RNG.uniform(9, 11.5, 60)
_EXTRA = {
    "granularity": 2.0 ** _RNG.integers(0, 5, 60),
    "density": 2.0 ** -_RNG.integers(0, 5, 60),
    "unique": _D / _RNG.choice([1, 2, 4, 10, 40], 60),
    "x": _N,
}
# The truth of each law: coefficients as found in the papers named in its source, or of their order.
TRUTHS: dict[str, dict[str, float]] = {
    "surface": {"A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28, "E": 1.69},
    "surface-tied": {"A": 521.0, "B": 1488.0, "alpha": 0.353, "E": 1.87},
    "surface-floorless": {"A": 40.0, "B": 60.0, "alpha": 0.2, "beta": 0.25},
    "skaling": {"A": 500.0, "B": 900.0, "alpha": 0.4, "beta": 0.45, "E": 1.6, "k": 0.4},
    "kaplan": {"A": 8.8e13**0.8, "B": 5.4e13, "alpha": 0.8, "k": 0.095},
    "moe": {"A": 200.0, "G": 300.0, "B": 600.0, "alpha": 0.32, "gamma": 0.6, "beta": 0.33, "E": 1.5},
    "moe-density": {"A": 300.0, "B": 600.0, "alpha": 0.32, "delta": 0.2, "beta": 0.33, "E": 1.5},
    "repetition": {
        "A": 521.0,
        "B": 1488.0,
        "alpha": 0.353,
        "beta": 0.353,
        "E": 1.87,
        "R_D": 15.39,
        "R_N": 5.31,
    },
    "farseer": {
        "a1": -0.1,
        "b1": -1.2,
        "a": 0.12,
        "a2": 0.2,
        "b2": 0.1,
        "b": 0.1,
        "a3": 0.4,
        "b3": 0.3,
        "g": -0.2,
    },
    "video": {"A": 4.0, "B": 9.0, "alpha": 0.2, "beta": 0.25, "E": 0.46},
    "masked-reconstruction": {"a": 4.0, "alpha": 0.266, "c": 1.444},
    "power": {"coefficient": 2.3943, "exponent": -0.0273},
    "power-floor": {"coefficient": 30.0, "exponent": -0.266, "floor": 1.444},
    "hyper": {"coefficient": 1.7973, "params_exponent": -0.71292, "data_exponent": 0.30749},
}


def _inputs(law: Law) -> dict[str, np.ndarray]:
    return {k: {"params": _N, "data": _D, **_EXTRA}[k] for k in law.inputs}


def test_every_law_has_a_truth_here() -> None:
    assert set(TRUTHS) == set(BY_NAME)


@pytest.mark.parametrize("name", TRUTHS)
def test_recovery_from_its_own_values(name: str) -> None:
    law = BY_NAME[name]
    y = law.predict(TRUTHS[name], **_inputs(law))
    fit = fit_law(law, _inputs(law), y, starts=16)
    assert fit.converged
    for key, value in TRUTHS[name].items():
        assert fit.params[key] == pytest.approx(value, rel=1e-6), key
    assert np.allclose(law.predict(fit.params, **_inputs(law)), y, rtol=1e-9)


@pytest.mark.parametrize("name", TRUTHS)
def test_model_and_its_jacobian_agree(name: str) -> None:
    law = BY_NAME[name]
    logs = {k: np.log(v) for k, v in _inputs(law).items()}
    centre = {k: float(v.mean()) for k, v in logs.items()}
    theta = law.bring_in(TRUTHS[name], centre)
    model = law.model(logs, centre)
    value, jacobian = model.value_and_jacobian(theta)
    assert np.allclose(value, law.predict(TRUTHS[name], **_inputs(law)), rtol=1e-10)
    assert np.allclose(value, model.value(theta), rtol=1e-14)
    for i in range(theta.shape[1]):
        h = 1e-5 * max(1.0, abs(theta[0, i]))
        up, down = theta.copy(), theta.copy()
        up[0, i] += h
        down[0, i] -= h
        numeric = (model.value(up) - model.value(down))[0] / (2 * h)
        assert np.allclose(jacobian[0, i], numeric, rtol=1e-6, atol=1e-9), law.names[i]
    back = law.export(theta, centre)
    for key, value in TRUTHS[name].items():
        assert back[key][0] == pytest.approx(value, rel=1e-10)


def test_gradient_of_the_surface_is_the_closed_form() -> None:
    law, p = BY_NAME["surface"], TRUTHS["surface"]
    got = dict(zip(law.names, law.gradient(p, params=_N, data=_D), strict=True))
    assert np.allclose(got["E"], 1.0)
    assert np.allclose(got["A"], _N ** -p["alpha"])
    assert np.allclose(got["alpha"], -p["A"] * np.log(_N) * _N ** -p["alpha"], rtol=1e-8)
    assert np.allclose(got["beta"], -p["B"] * np.log(_D) * _D ** -p["beta"], rtol=1e-8)


def test_a_fixed_exponent_under_an_outer_power() -> None:
    # Kaplan's B/D has exponent 1 inside the bracket: it must not be scaled by the outer power.
    law = BY_NAME["kaplan"]
    assert isinstance(law, TermLaw)
    p = TRUTHS["kaplan"]
    expected = (p["A"] / _N ** p["alpha"] + p["B"] / _D) ** p["k"]
    assert np.allclose(law.predict(p, params=_N, data=_D), expected, rtol=1e-12)


def test_repeated_data_is_worth_less_and_tends_to_a_limit() -> None:
    assert effective_data(1e9, 1e9) == pytest.approx(1e9)
    assert effective_data(4e9, 1e9) == pytest.approx(1e9 * (1 + 15.39 * -np.expm1(-3 / 15.39)))
    assert effective_data(1e15, 1e9) == pytest.approx(1e9 * 16.39, rel=1e-6)
    once = REPETITION.predict(TRUTHS["repetition"], params=1e8, data=1e10, unique=1e10)
    assert once < REPETITION.predict(TRUTHS["repetition"], params=1e8, data=1e10, unique=1e9)


def test_what_a_law_refuses() -> None:
    law = BY_NAME["surface"]
    with pytest.raises(InputError, match="missing beta"):
        law.predict({"A": 1, "B": 1, "alpha": 1, "E": 0}, params=1.0, data=1.0)
    with pytest.raises(InputError, match=r"data: expected positive numbers, got \[-1\.0\]"):
        law.predict(TRUTHS["surface"], params=1.0, data=-1.0)
    with pytest.raises(InputError, match="data: law surface needs params, data"):
        law.predict(TRUTHS["surface"], params=1.0)
    assert power_with_floor(0.5).predict({"coefficient": 2.0, "exponent": -1.0}, x=4.0) == pytest.approx(1.0)
