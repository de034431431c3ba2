"""Scaling laws: read runs, fit laws with honest intervals, test the extrapolation, plan a budget.

Names are loaded when first used; numpy and scipy only.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "RunTable": "runs",
    "fit_surface": "surface",
    "fit_power": "power",
    "fit_isoflop": "isoflop",
    "fit_law": "fit",
    "plan": "planner",
    "published": "registry",
    "predict_loss": "forecast",
    "Forecaster": "forecast",
    "compare": "comparison",
    "suggest_runs": "nextruns",
    "fit_hparams": "hparams",
    "fit_quality": "quality",
    "backtest": "holdout",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"ditscale.scaling.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'ditscale.scaling' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
