"""What the tests of scaling laws share: the public tables (where they are) and simulated studies with a
known truth.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ditscale.scaling.laws import SURFACE
from ditscale.scaling.runs import RunTable

CHINCHILLA = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}


def lawdata(name: str) -> Path:
    """A public table; the test skips where the folder is absent (its licences keep it out of the project)."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "lawdata"
    folder = Path(os.environ.get("DITSCALE_LAWDATA", beside))
    path = folder / name
    if not path.is_file():
        pytest.skip(f"{name} is not there: set DITSCALE_LAWDATA to the folder of the public scaling-law tables")
    return path


def epoch_table(*, drop_highest: int = 5) -> RunTable:
    """The points of Hoffmann et al. 2022, figure 4, as digitised by Besiroglu et al. (arXiv:2404.10102)."""
    return RunTable.read(
        lawdata("epoch_chinchilla_svg_extracted_data.csv"),
        params="Model Size",
        flops="Training FLOP",
        loss="loss",
        tokens_from_6nd=True,
        drop_highest=drop_highest,
    )


def optimum(surface: dict[str, float], flops: float, cost: float = 6.0) -> tuple[float, float, float]:
    """N, D and loss of the compute-optimal run, by the closed form of Hoffmann et al., equation 4."""
    alpha, beta = surface["alpha"], surface["beta"]
    g = (alpha * surface["A"] / (beta * surface["B"])) ** (1 / (alpha + beta))
    n = g * (flops / cost) ** (beta / (alpha + beta))
    d = flops / cost / n
    return n, d, surface["E"] + surface["A"] / n**alpha + surface["B"] / d**beta


def study(
    surface: dict[str, float] = CHINCHILLA,
    *,
    budgets: Any = None,
    sizes: int = 7,
    width: float = 4.0,
    noise: float = 0.0,
    shock: float = 0.0,
    seed: int = 0,
    off_centre: float = 1.0,
    drift: float = 0.0,
    cost: float = 6.0,
    **columns: Any,
) -> RunTable:
    """An isoFLOP study whose truth is known; ``drift`` moves the grid's centre by that log factor a
    budget.
    """
    rng = np.random.default_rng(seed)
    records = []
    for i, budget in enumerate(np.geomspace(1e17, 1e19, 5) if budgets is None else budgets):
        shared = shock * rng.standard_normal()
        centre = optimum(surface, budget, cost)[0] * off_centre * np.exp(drift * i)
        for n in centre * np.geomspace(1 / width, width, sizes):
            d = budget / (cost * n)
            loss = float(SURFACE.predict(surface, params=n, data=d)) * np.exp(shared + noise * rng.standard_normal())
            records.append({"params": n, "tokens": d, "flops": budget, "loss": loss, "budget": budget, **columns})
    return RunTable.from_records(records)


CELL_SIZES, CELL_DATA = (1e7, 3e7, 1e8, 3e8), (1e8, 4e8, 1.6e9)
_FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


def cells(
    *, noise: float = 0.0, wander: float = 0.0, seed: int = 0, shift: float = 1.2, batches: bool = True
) -> RunTable:
    """Cells whose truth is lr = 1.8 N^-0.71 D^0.31 and batch = 0.58 D^0.57; ``wander`` moves a cell's own
    optimum.
    """
    rng = np.random.default_rng(seed)
    records = []
    for n in CELL_SIZES:
        for d in CELL_DATA:
            lr = 1.8 * n**-0.71 * d**0.31 * np.exp(wander * rng.standard_normal())
            batch = 0.58 * d**0.57
            for x in np.log(_FACTORS) + np.log(shift):
                for y in np.log(_FACTORS) if batches else (0.0,):
                    loss = 0.5 * np.exp(0.004 * x**2 + 0.003 * y**2 + 0.002 * x * y + noise * rng.standard_normal())
                    records.append(
                        {
                            "params": n,
                            "images": d,
                            "lr": lr * np.exp(x),
                            "batch": batch * np.exp(y),
                            "loss": loss,
                        }
                    )
    return RunTable.from_records(records)
