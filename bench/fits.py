"""The scaling engine beside the usual way to fit a loss surface: scipy's L-BFGS-B from a grid of starts (arXiv:2203.15556).

Both minimise the same objective, the sum of Huber losses (knee 1e-3) of log residuals of ``E + A / N^alpha + B / D^beta``. What
each reached stands in its row: a faster fit that ends higher has not won.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import huber, logsumexp

from ditscale.bench.rows import Row
from ditscale.bench.timing import measure

if TYPE_CHECKING:
    from ditscale.bench.runner import Session

Array = NDArray[np.float64]
KNEE = 1e-3
# A thinning of the published 4,500 starts, which take scipy minutes: (a, b, e, alpha, beta), where A = exp(a) and so on.
GRID = tuple(itertools.product((0.0, 10.0, 20.0), (0.0, 10.0, 20.0), (-1.0, 0.0, 1.0), (0.3, 0.8), (0.3, 0.8)))


def table(runs: int, seed: int = 0) -> tuple[Array, Array, Array]:
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


def scipy_fit(n: Array, d: Array, loss: Array, starts: Any, weights: Array | None = None) -> tuple[float, Array]:
    """The least objective that L-BFGS-B reaches from the starts, with exact gradients, and where."""
    w = np.ones(len(n)) if weights is None else weights
    data = (np.log(n), np.log(d), np.log(loss), w)
    best: tuple[float, Array] = (np.inf, np.zeros(5))
    for start in starts:
        # scipy's default tolerance on the objective is absolute below 1, and this objective is about 0.1: it would stop early.
        found = minimize(
            objective, np.asarray(start), args=data, jac=True, method="L-BFGS-B",
            options={"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-10},
        )  # fmt: skip
        if found.fun < best[0]:
            best = float(found.fun), found.x
    return best


def fit_rows(session: Session) -> Iterator[Row]:
    """Fits of small and large tables, and a bootstrap."""
    grid = GRID[30::36] if session.tiny else GRID
    for runs in (40,) if session.tiny else (40, 250):
        n, d, loss = table(runs)
        yield from _one(session, f"surface/{runs} runs", _fits(n, d, loss, grid))
    n, d, loss = table(40)
    draws = 2 if session.tiny else 200
    yield from _one(session, f"bootstrap/40 runs/{draws} draws", _bootstraps(n, d, loss, draws, grid))


def _fits(n: Array, d: Array, loss: Array, grid: Any) -> dict[str, Callable[[int], float]]:
    from ditscale.scaling.fit import fit_law
    from ditscale.scaling.surface import surface_law

    law = surface_law("surface")
    return {
        "ours": lambda _: fit_law(law, {"params": n, "data": d}, loss, loss_fn=f"huber:{KNEE}").objective,
        "scipy": lambda _: scipy_fit(n, d, loss, grid)[0],
    }


def _bootstraps(n: Array, d: Array, loss: Array, draws: int, grid: Any) -> dict[str, Callable[[int], float]]:
    """Refits of resampled runs, each from the optimum of the whole; the mean objective is what is compared."""
    from ditscale.scaling import engine
    from ditscale.scaling.fit import fit_law
    from ditscale.scaling.surface import surface_law

    law = surface_law("surface")
    counts = np.random.default_rng(1).multinomial(len(n), np.full(len(n), 1 / len(n)), size=draws).astype(float)
    whole = fit_law(law, {"params": n, "data": d}, loss, loss_fn=f"huber:{KNEE}")
    start = scipy_fit(n, d, loss, grid)[1]

    def ours(_: int) -> float:
        model = law.model({"params": np.log(n), "data": np.log(d)}, whole.centre)
        starts = np.broadcast_to(whole.theta, (draws, len(whole.theta))).copy()
        return float(engine.minimise(model, loss, whole.loss, starts, weights=counts).objective.mean())

    def scipys(_: int) -> float:
        return float(np.mean([scipy_fit(n, d, loss, [start], weights=w)[0] for w in counts]))

    return {"ours": ours, "scipy": scipys}


def _one(session: Session, name: str, ways: dict[str, Callable[[int], float]]) -> Iterator[Row]:
    reached = {provider: way(0) for provider, way in ways.items()}
    timings = measure(ways, sets=1, device="cpu", protocol=session.protocol)
    least = min(reached.values())
    for provider, timing in timings.items():
        row = session.measured_row("fit", name, name.split("/")[0], provider, timing, timings)
        yield row | {"objective": reached[provider], "above_best": reached[provider] / least - 1}
