"""What a study's finished runs say: its laws, and the prediction of the run that comes next."""

from __future__ import annotations

from typing import Any

import numpy as np

from ditscale.errors import InputError
from ditscale.scaling.cost import CostLaw
from ditscale.scaling.forecast import Forecaster
from ditscale.scaling.isoflop import fit_isoflop
from ditscale.scaling.power import PowerFit
from ditscale.scaling.runs import RunTable
from ditscale.scaling.study import PlannedRun, Study, plan_run

# The size that laws are written in: parameters that work once per token. adaLN and embedding weights work once an
# image or are looked up; counting them would tilt a law over sizes at which they are most of a model.
SIZE = "params_per_token"
_BAND_POINTS = 48


def study_table(study: Study) -> RunTable:
    """The fitted runs of a study; runs that diverged are left out.

    Raises:
        InputError: fewer than three runs left at a budget.
    """
    records = [record for record in study.fitted_records() if record["status"] == "finished"]
    for budget in study.config.budgets:
        left = sum(record["budget"] == budget for record in records)
        if left < 3:
            raise InputError(f"{study.folder}: expected at least 3 finished runs at {budget:.4g} FLOPs, got {left}")
    return RunTable.from_records(records, params=SIZE)


def fit_laws(study: Study) -> dict[str, Any]:
    """Fit everything that the page and the planner need; the same runs give the same values to the bit.

    Returns:
        Plain values: "isoflop", "surface", "N_opt", "D_opt", "loss" (each law with its band over budgets), "forecast"
        (how the predicting law was chosen) and "fitted_range".
    """
    runs = study_table(study)
    iso = fit_isoflop(runs)
    forecaster = Forecaster(runs)
    target = float(study.config.target)
    budgets = np.geomspace(0.5 * min(study.config.budgets), 2.0 * target, _BAND_POINTS)
    band = forecaster.band(budgets)
    params = float(iso.n_law.predict(target).value)
    images = float(CostLaw.measured(runs.params, runs.data, runs.flops).data(target, params))
    predicted = forecaster.forecast(params, images, target)
    laws = {
        "size": SIZE,
        "data_unit": runs.data_unit,
        "flop_convention": study.plan["flop_convention"],
        "fitted_range": [min(study.config.budgets), max(study.config.budgets)],
        "isoflop": iso.to_json(),
        "surface": iso.surface.to_json() if iso.surface is not None else None,
        "N_opt": _law(iso.n_law, budgets),
        "D_opt": _law(iso.d_law, budgets),
        "loss": {
            **_loss_law(iso.loss_law_floor or iso.loss_law),
            "band": _finite({k: band[k] for k in ("budget", "value", "low", "high")}),
        },
        "chosen": f"{predicted.chosen}: {predicted.rule}",
        "weights": predicted.weights,
        "backtest": predicted.backtest.to_json() if predicted.backtest else None,
        "warnings": [*iso.warnings, *predicted.warnings],
    }
    return _without_times(laws)


def _without_times(value: Any) -> Any:
    """A copy without how long the fits took: the prediction carries the hash of these laws, whenever they are fitted."""
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key != "seconds"}
    if isinstance(value, list):
        return [_without_times(item) for item in value]
    return value


def choose_and_predict(study: Study) -> tuple[PlannedRun, dict[str, Any]]:
    """The run to make at the target budget, and what its loss will be.

    The size is the study's nearest to N_opt(C) of the isoFLOP law; the loss and its interval come from the laws that
    held-out budgets chose.
    """
    runs = study_table(study)
    wanted = float(fit_isoflop(runs).n_law.predict(float(study.config.target)).value)
    target = plan_run(study.config, study.config.nearest(wanted), study.config.target, "prediction")
    forecast = Forecaster(runs).forecast(float(target.params_per_token), float(target.images), float(target.flops))
    if not np.isfinite(forecast.interval_95).all():
        raise InputError(
            f"budgets: expected enough of them to bound the loss at {study.config.target:.4g} FLOPs, got "
            f"{len(study.config.budgets)}, which leave its interval without an end"
        )
    return target, {
        "loss": forecast.value,
        "interval_95": forecast.interval_95,
        "law": forecast.chosen,
        "weights": forecast.weights,
        "rule": forecast.rule,
        "wanted_params_per_token": wanted,
        "extrapolation_factor": forecast.flops / max(study.config.budgets),
    }


def _law(law: PowerFit, budgets: Any) -> dict[str, Any]:
    prediction = law.predict(budgets)
    low, high = prediction.interval
    band = {"budget": budgets, "value": prediction.value, "low": low, "high": high}
    return {
        "coefficient": law.coefficient,
        "exponent": law.exponent,
        "intervals": law.intervals,
        "band": _finite(band),
    }


def _finite(band: dict[str, Any]) -> dict[str, list[float]]:
    """A band without the points at which an interval has no end: few budgets leave it none, far beyond them."""
    columns = {name: np.atleast_1d(np.asarray(values, dtype=float)) for name, values in band.items()}
    keep = np.all([np.isfinite(column) for column in columns.values()], axis=0)
    return {name: column[keep].tolist() for name, column in columns.items()}


def _loss_law(law: PowerFit) -> dict[str, Any]:
    return {
        "coefficient": law.coefficient,
        "exponent": law.exponent,
        "floor": law.floor,
        "intervals": law.intervals,
    }
