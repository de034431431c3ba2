"""The scaling engine beside the usual ways to fit a loss surface, on one table and one objective.

The table is the public one of Besiroglu et al. (arXiv:2404.10102) where it is there (``DITSCALE_LAWDATA``), else made-up runs
of its kind; rows say which. The objective is the sum of Huber losses (knee 1e-3) of log residuals of
``E + A / N^alpha + B / D^beta``. What each way reached stands in its row: a faster fit that ends higher has not won.

Peers: scipy's L-BFGS-B with exact gradients and tolerances tight enough for an objective of 1e-3, and the ``chinchilla``
package (``pip install chinchilla==0.2.0``) with the grid of its README. A peer that is not installed gets a row that says so.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import huber, logsumexp

from ditscale.bench.rows import Row
from ditscale.bench.timing import Timing, measure

if TYPE_CHECKING:
    from ditscale.bench.runner import Session

Array = NDArray[np.float64]
KNEE = 1e-3
# Bounds of the published grid of starts: (a, b, e, alpha, beta), where A = exp(a) and so on (arXiv:2203.15556).
STARTS = ((0.0, 25.0), (0.0, 25.0), (-1.0, 1.0), (0.0, 2.0), (0.0, 2.0))
# The grid of the README of chinchilla 0.2.0: five values each, 3,125 starts.
README_GRID = {"E": (1.0, 2.0), "a": (1.0, 10.0), "b": (1.0, 10.0), "alpha": (0.1, 0.7), "beta": (0.1, 0.7)}
Table = tuple[Array, Array, Array]


def public_table() -> tuple[Table, str]:
    """(N, D, loss) of 240 runs, and what they are."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "lawdata"
    path = Path(os.environ.get("DITSCALE_LAWDATA", beside)) / "epoch_chinchilla_svg_extracted_data.csv"
    if not path.is_file():
        return made_up_table(240), "made-up runs: DITSCALE_LAWDATA is not set"
    from ditscale.scaling.runs import RunTable

    runs = RunTable.read(
        path, params="Model Size", flops="Training FLOP", loss="loss", tokens_from_6nd=True, drop_highest=5
    )
    return (runs.params, runs.data, runs.loss), "points of arXiv:2404.10102, the 5 highest losses dropped"


def made_up_table(runs: int, seed: int = 0) -> Table:
    """(N, D, loss) of made-up runs: constants of the order of the published ones, noise of 0.5 %."""
    rng = np.random.default_rng(seed)
    n = np.exp(rng.uniform(np.log(4e7), np.log(1e10), runs))
    d = np.exp(rng.uniform(np.log(1e9), np.log(5e11), runs))
    loss = 1.8 + 480.0 / n**0.35 + 2100.0 / d**0.37
    return n, d, loss * np.exp(0.005 * rng.standard_normal(runs))


def objective(theta: Array, log_n: Array, log_d: Array, log_loss: Array, weights: Array) -> tuple[float, Array]:
    """The sum and its gradient in (a, b, e, alpha, beta)."""
    a, b, e, alpha, beta = theta
    terms = np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)])
    predicted = logsumexp(terms, axis=0)
    residual = predicted - log_loss
    share = np.exp(terms - predicted)
    slope = np.clip(residual, -KNEE, KNEE) * weights
    gradient = np.array(
        [
            (slope * share[0]).sum(),
            (slope * share[1]).sum(),
            (slope * share[2]).sum(),
            -(slope * share[0] * log_n).sum(),
            -(slope * share[1] * log_d).sum(),
        ]
    )
    return float((huber(KNEE, residual) * weights).sum()), gradient


def scipy_fit(table: Table, starts: Any, weights: Array | None = None) -> tuple[float, Array]:
    """The least objective that L-BFGS-B reaches from the starts, with exact gradients, and where."""
    n, d, loss = table
    data = (np.log(n), np.log(d), np.log(loss), np.ones(len(n)) if weights is None else weights)
    best: tuple[float, Array] = (np.inf, np.zeros(5))
    for start in starts:
        # scipy's default tolerance is absolute below an objective of 1, and this one is 1e-3: it would stop early.
        with np.errstate(all="ignore"):
            found = minimize(
                objective, np.asarray(start), args=data, jac=True, method="L-BFGS-B",
                options={"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-12},
            )  # fmt: skip
        if found.fun < best[0]:
            best = float(found.fun), found.x
    return best


def chinchilla_fit(table: Table, points: int) -> float:
    """The objective that the chinchilla package reaches from ``points`` ** 5 starts, in this process alone."""
    pandas, peer = importlib.import_module("pandas"), importlib.import_module("chinchilla")
    log_huber = importlib.import_module("chinchilla._metrics").log_huber

    n, d, loss = table
    with tempfile.TemporaryDirectory() as folder:
        pandas.DataFrame({"C": 6 * n * d, "N": n, "D": d, "loss": loss}).to_csv(Path(folder) / "df.csv", index=False)
        grid = {name: np.linspace(low, high, points) for name, (low, high) in README_GRID.items()}
        fit = peer.Chinchilla(folder, param_grid=grid, loss_fn=functools.partial(log_huber, delta=KNEE), log_level=50)
        fit.visualizer.optim = lambda *args, **kwargs: None  # its plot is no part of a fit
        fit.fit(parallel=False)
        theta = np.array([np.log(float(fit.A)), np.log(float(fit.B)), np.log(float(fit.E)), fit.alpha, fit.beta], float)
    return objective(theta, np.log(n), np.log(d), np.log(loss), np.ones(len(n)))[0]


def fit_rows(session: Session) -> Iterator[Row]:
    """A point fit, a fit from many starts, and a bootstrap."""
    table, source = (made_up_table(40), "made-up runs") if session.tiny else public_table()
    runs = len(table[0])
    starts, draws = (3, 2) if session.tiny else (500, 1000)
    # The grid of chinchilla's README takes minutes: only where there is no hurry.
    grids = (1,) if session.tiny else (3, 5) if session.deadline == float("inf") else (3,)
    yield from _one(session, f"surface/{runs} runs", source, *_point(table, grids))
    yield from _one(session, f"starts/{runs} runs/{starts} starts", source, *_many_starts(table, starts))
    yield from _one(session, f"bootstrap/{runs} runs/{draws} draws", source, *_bootstrap(table, draws))


# What a way reached: the objective, and the rest of its row.
Reached = tuple[float, dict[str, Any]]
Way = Callable[[int], Reached]
# Ways by provider: those timed in rounds, and those that are timed once.
Ways = tuple[dict[str, Way], dict[str, Way]]


def _our_fit(table: Table, **options: Any) -> Reached:
    from ditscale.scaling.fit import fit_law
    from ditscale.scaling.surface import surface_law

    n, d, loss = table
    fit = fit_law(surface_law("surface"), {"params": n, "data": d}, loss, loss_fn=f"huber:{KNEE}", **options)
    return fit.objective, {"converged": fit.converged, "starts": fit.starts, "agreeing": fit.starts_agreeing}


def _point(table: Table, grids: tuple[int, ...]) -> Ways:
    grid = list(itertools.product(*(np.linspace(low, high, 1 if grids == (1,) else 2) + 0.3 for low, high in STARTS)))

    slow: dict[str, Way] = {}
    for points in grids:
        slow[f"chinchilla, {points**5} starts"] = lambda _, p=points: (chinchilla_fit(table, p), {"starts": p**5})  # type: ignore[misc]
    return {
        "ours": lambda _: _our_fit(table),
        "scipy": lambda _: (scipy_fit(table, grid)[0], {"starts": len(grid)}),
    }, slow


def _many_starts(table: Table, count: int) -> Ways:
    low, high = np.array(STARTS).T
    scattered = np.random.default_rng(0).uniform(low, high, size=(count, 5))

    def scipys(_: int) -> Reached:
        return scipy_fit(table, scattered)[0], {"starts": count}

    return {"ours": lambda _: _our_fit(table, starts=count)}, {"scipy": scipys}


def _bootstrap(table: Table, draws: int) -> Ways:
    """Refits of resampled runs, each from the optimum of the whole; the mean objective is what is compared."""
    from ditscale.scaling import engine
    from ditscale.scaling.fit import fit_law
    from ditscale.scaling.surface import surface_law

    n, d, loss = table
    law = surface_law("surface")
    counts = np.random.default_rng(1).multinomial(len(n), np.full(len(n), 1 / len(n)), size=draws).astype(float)
    whole = fit_law(law, {"params": n, "data": d}, loss, loss_fn=f"huber:{KNEE}")
    model = law.model({"params": np.log(n), "data": np.log(d)}, whole.centre)
    start = np.array([np.log(whole.params["A"]), np.log(whole.params["B"]), np.log(whole.params["E"]), 0.0, 0.0])
    start[3:] = whole.params["alpha"], whole.params["beta"]

    def ours(_: int) -> Reached:
        starts = np.broadcast_to(whole.theta, (draws, len(whole.theta))).copy()
        found = engine.minimise(model, loss, whole.loss, starts, weights=counts)
        return float(found.objective.mean()), {"converged": bool(found.converged.all()), "draws": draws}

    def scipys(_: int) -> Reached:
        return float(np.mean([scipy_fit(table, [start], weights=w)[0] for w in counts])), {"draws": draws}

    return {"ours": ours}, {"scipy": scipys}


def _one(session: Session, name: str, source: str, quick: dict[str, Way], slow: dict[str, Way]) -> Iterator[Row]:
    """Rows of one case: quick ways timed in rounds, slow ones once."""
    op = name.split("/")[0]
    if session.late:
        yield session.skipped_row("fit", name, op)
        return
    timings = measure(dict(quick), sets=1, device="cpu", protocol=session.protocol)
    reached = {provider: way(0) for provider, way in quick.items()}
    missing: list[Row] = []
    for provider, way in slow.items():
        package = provider.split(",")[0]
        if not session.wants(provider, "ours") or importlib.util.find_spec(package) is None:
            reason = f"{package} is not installed, or was not asked for"
            missing.append(session.unavailable_row("fit", name, op, provider, reason))
            continue
        if session.late:
            missing.append(session.skipped_row("fit", name, op, provider))
            continue
        begun = time.perf_counter()
        reached[provider] = way(0)
        timings[provider] = Timing((1e3 * (time.perf_counter() - begun),), 1)
    least = min(value for value, _ in reached.values())
    for provider, timing in timings.items():
        compared = {k: t for k, t in timings.items() if len(t.samples_ms) == len(timing.samples_ms) or k == provider}
        row = session.measured_row("fit", name, op, provider, timing, compared)
        value, more = reached[provider]
        if provider == "ours" and "scipy" in timings and "scipy" not in row["speedup_over"]:
            ratio = timings["scipy"].median_ms / timing.median_ms  # one sample of the slow one
            row["speedup_over"]["scipy"] = {"median": ratio, "p20": ratio, "p80": ratio}
        yield row | {"objective": value, "above_best": value / least - 1, "data": source, **more}
    yield from missing
