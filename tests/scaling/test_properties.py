"""Properties that hold for any input (hypothesis): no crash but InputError, no false claim of convergence."""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ditscale.errors import InputError
from ditscale.scaling import RunTable, backtest, fit_hparams, fit_isoflop, fit_power, fit_surface, plan
from ditscale.scaling.laws import SURFACE
from ditscale.scaling.trackers import has_records, unpack
from ditscale.scaling.where import evaluate

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
POSITIVE = st.floats(min_value=1e-6, max_value=1e30, allow_nan=False, allow_infinity=False)
ANY = st.one_of(st.floats(), st.integers(-5, 10**30), st.text(max_size=5), st.none(), st.booleans())


@given(st.text(max_size=300))
@QUICK
def test_any_text_as_a_table(text: str) -> None:
    with TemporaryDirectory() as folder:
        for name in ("x.csv", "x.jsonl", "x.json"):
            path = Path(folder) / name
            path.write_text(text, encoding="utf-8", errors="replace")
            try:
                fit_surface(path)
            except InputError as error:
                assert str(error) and "\n" not in " ".join(str(error).split("\n")[:1])


@given(st.binary(max_size=300))
@QUICK
def test_any_bytes_as_a_table(data: bytes) -> None:
    with TemporaryDirectory() as folder:
        for name, head in (("x.csv", b""), ("x.jsonl", b""), ("x.parquet", b""), ("x.db", b"SQLite format 3\0")):
            path = Path(folder) / name
            path.write_bytes(head + data)
            with pytest.raises(InputError):
                fit_isoflop(path)


@given(st.lists(st.text(alphabet="{}[]'\":, abn1.e-\\\n", max_size=20), min_size=1, max_size=4))
@QUICK
def test_any_text_in_a_trackers_cells(texts: list[str]) -> None:
    columns = {"config": [f"{{{text}}}" for text in texts], "loss": [1.0] * len(texts)}
    if has_records(columns):
        with contextlib.suppress(InputError):
            assert len(unpack(columns, list(range(len(texts))), "x")) == len(texts)


@given(
    st.lists(
        st.fixed_dictionaries(dict.fromkeys(("params", "tokens", "flops", "loss", "budget"), ANY)),
        max_size=12,
    )
)
@QUICK
def test_any_records(records: list[dict[str, Any]]) -> None:
    for act in (fit_surface, fit_isoflop, backtest, fit_hparams):
        try:
            act(RunTable.from_records(records))
        except InputError as error:
            assert "\n" not in str(error)


@given(
    arrays(float, st.tuples(st.integers(5, 25), st.just(3)), elements=POSITIVE),
    st.sampled_from(["surface", "surface-tied", "skaling", "kaplan", "farseer"]),
    st.sampled_from(["huber:auto", "huber:1e-3", "l1", "mse", "student-t", "envelope"]),
    st.sampled_from(["log", "raw"]),
)
@QUICK
def test_any_positive_numbers(values: np.ndarray, law: str, loss: str, space: str) -> None:
    n, d, y = values.T
    table = RunTable.from_columns({"params": n, "tokens": d, "flops": n * d, "loss": y})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            fit = fit_surface(table, law=law, loss_fn=loss, space=space, starts=3)
        except InputError:
            return
        record = json.dumps(fit.to_json(), allow_nan=False)
    # A claim of convergence is backed by the certificate.
    if fit.converged:
        floor = len(y) * 1e-26
        assert fit.fit.certificate["decrement"] < 1e-9 or fit.fit.objective < floor * max(1.0, y.max() ** 2)
    else:
        assert any("not converged" in w for w in fit.warnings)
    assert record


@given(
    st.floats(0.15, 0.6),
    st.floats(0.15, 0.6),
    st.floats(0.0, 3.0),
    st.floats(0.2, 5.0),
    st.integers(0, 10**6),
)
@QUICK
def test_noise_free_surfaces_are_recovered(alpha: float, beta: float, floor: float, ratio: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, d = 10 ** rng.uniform(6, 9, 40), 10 ** rng.uniform(8, 11, 40)
    truth = {
        "A": ratio * 10 ** (7.5 * alpha),
        "B": 10 ** (9.5 * beta),
        "alpha": alpha,
        "beta": beta,
        "E": floor,
    }
    loss = SURFACE.predict(truth, params=n, data=d)
    fit = fit_surface(RunTable.from_columns({"params": n, "tokens": d, "flops": 6 * n * d, "loss": loss}))
    assert fit.converged
    for name in ("alpha", "beta"):
        assert fit.params[name] == pytest.approx(truth[name], rel=1e-6)
    assert fit.params["E"] == pytest.approx(floor, abs=1e-6)


@given(
    arrays(float, st.integers(4, 15), elements=st.floats(1e-3, 1e3)),
    st.floats(1e-6, 1e6),
    st.floats(1e-6, 1e6),
    st.randoms(use_true_random=False),
)
@QUICK
def test_power_laws_do_not_care_about_units_or_order(y: np.ndarray, sx: float, sy: float, random: Any) -> None:
    x = np.geomspace(1.0, 100.0, len(y))
    base = fit_power(x, y, loss_fn="mse")
    order = np.array(random.sample(range(len(y)), len(y)))
    moved = fit_power(sx * x[order], sy * y[order], loss_fn="mse")
    assert moved.exponent == pytest.approx(base.exponent, abs=1e-7)
    assert math.log(moved.coefficient) == pytest.approx(
        math.log(sy * base.coefficient) - base.exponent * math.log(sx), abs=1e-5
    )


@given(st.floats(1e3, 1e30), st.sampled_from(["liang2024", "besiroglu2024", "llama3", "yin2024-video"]))
@QUICK
def test_any_budget_gives_a_plan_or_one_line(budget: float, law: str) -> None:
    try:
        p = plan(law, budget=budget)
    except InputError as error:
        assert "\n" not in str(error)
        return
    assert p.params > 0
    json.dumps(p.to_json(), allow_nan=False)
    if p.configuration:
        assert p.configuration["images"] * p.configuration["train_flops_per_image"] <= budget


@given(st.text(alphabet="ab<>=!()+-*/.'\"`0123456789 andortx[]{}:,\\\n", max_size=40))
@QUICK
def test_any_where_expression(text: str) -> None:
    columns = {"a": np.array([1.0, 2.0]), "b": np.array(["x", "y"], dtype=object)}
    try:
        mask = evaluate(text, columns, 2)
    except InputError:
        return
    assert mask.shape == (2,) and mask.dtype == bool
