"""How often the intervals hold: simulated studies with a known truth, for every method (``ditscale
coverage``).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import ditscale
from ditscale.errors import InputError
from ditscale.scaling.forecast import Forecaster
from ditscale.scaling.isoflop import fit_isoflop
from ditscale.scaling.jsonable import plain
from ditscale.scaling.laws import SURFACE
from ditscale.scaling.runs import RunTable
from ditscale.scaling.surface import fit_surface

QUANTITIES = ("a", "N_opt", "loss", "new run")
METHODS = (
    "components",
    "delta",
    "jackknife",
    "case",
    "cluster",
    "isoflop parabola",
    "isoflop cubic",
    "forecast auto",
)
# Bootstraps of the simulations: enough for a 95 % interval, few enough for thousands of studies.
_BOOTSTRAP = 200


@dataclass(frozen=True)
class Scenario:
    """A kind of study.

    Attributes:
        name: for the table.
        surface: E, A, B, alpha, beta of the truth.
        budgets: compute of the isoFLOP curves.
        sizes: runs a curve, spread evenly in log N over ``width`` either side of the optimum.
        width: see ``sizes``.
        cost: FLOPs of one parameter and one unit of data.
        noise: relative spread of a run.
        shock: relative spread that all runs of a budget share.
        beyond: extrapolation, as a factor of the greatest budget.
    """

    name: str
    surface: dict[str, float]
    budgets: tuple[float, ...]
    sizes: int
    width: float
    cost: float
    noise: float
    shock: float
    beyond: float

    def optimum(self, flops: float) -> tuple[float, float, float]:
        """N, D and loss of the compute-optimal run."""
        s = self.surface
        a = s["beta"] / (s["alpha"] + s["beta"])
        g = (s["alpha"] * s["A"] / (s["beta"] * s["B"])) ** (1 / (s["alpha"] + s["beta"]))
        n = g * (flops / self.cost) ** a
        d = flops / (self.cost * n)
        return n, d, float(SURFACE.predict(s, params=n, data=d))

    def simulate(self, seed: int) -> RunTable:
        """One study."""
        rng = np.random.default_rng(seed)
        records = []
        for budget in self.budgets:
            shared = self.shock * rng.standard_normal()
            for n in self.optimum(budget)[0] * np.geomspace(1 / self.width, self.width, self.sizes):
                d = budget / (self.cost * n)
                loss = SURFACE.predict(self.surface, params=n, data=d) * np.exp(
                    shared + self.noise * rng.standard_normal()
                )
                records.append({"params": n, "tokens": d, "flops": budget, "loss": float(loss), "budget": budget})
        return RunTable.from_records(records)


_CHINCHILLA = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
_DIFFUSION = {"E": 0.2, "A": 40.0, "B": 60.0, "alpha": 0.40, "beta": 0.38}
_FIVE = tuple(float(c) for c in np.geomspace(1e17, 1e19, 5))
_FOUR = tuple(float(c) for c in np.geomspace(1e11, 3e12, 4))
SCENARIOS = (
    Scenario("35 runs in 5 budgets, noise 0.5 %", _CHINCHILLA, _FIVE, 7, 4.0, 6.0, 0.005, 0.0, 100.0),
    Scenario("the same, shock 0.25 % a budget", _CHINCHILLA, _FIVE, 7, 4.0, 6.0, 0.005, 0.0025, 100.0),
    Scenario("the same, shock 0.5 % a budget", _CHINCHILLA, _FIVE, 7, 4.0, 6.0, 0.005, 0.005, 100.0),
    Scenario(
        "24 runs in 4 budgets, noise 1 %, shock 0.5 %, to 10x",
        _DIFFUSION,
        _FOUR,
        6,
        4.0,
        384.0,
        0.01,
        0.005,
        10.0,
    ),
)


@dataclass
class CoverageTable:
    """Shares of 95 % intervals that held the truth.

    Attributes:
        rows: scenario, method, studies, and the coverage of each quantity (None where a method has no such
            interval).
        draws, seed: of the simulation.
        seconds: it took.
    """

    rows: list[dict[str, Any]]
    draws: int
    seed: int
    seconds: float
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return plain(self.__dict__)

    def to_markdown(self) -> str:
        """The committed table."""
        error = 100 * np.sqrt(0.95 * 0.05 / self.draws)
        lines = [
            "# How often the 95 % intervals hold",
            "",
            f"Made by `ditscale coverage --draws {self.draws} --seed {self.seed} --out docs/coverage.md` "
            f"(ditscale {ditscale.__version__}, numpy {np.__version__}, {self.seconds:.0f} s).",
            f"Each figure is the share, in per cent, of simulated studies whose 95 % interval held the "
            f"truth: {self.draws} studies "
            f"a row unless said otherwise,",
            f"so that a perfect 95 shows as 95 ± {error:.1f} (one standard error). `a` is the exponent of "
            f"N_opt; N_opt, the loss "
            "there and one new run",
            "stand at 100 times the largest budget (10 times in the last study). `components` is the "
            "default of under 100 runs.",
            "",
            "| study | method | a | N_opt | loss | new run |",
            "|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            cells = ["-" if row[q] is None else f"{100 * row[q]:.1f}" for q in QUANTITIES]
            few = "" if row["studies"] == self.draws else f" ({row['studies']} studies)"
            lines.append(f"| {row['scenario']} | {row['method']}{few} | {' | '.join(cells)} |")
        lines += [
            "",
            "What it says: a shock that all runs of a budget share hardly moves the split of compute (`a`, "
            "N_opt) but ruins the",
            "loss of methods that do not know of it (`delta`, `case`, `isoflop` lines do not look at runs "
            "one by one). Resampling",
            "whole budgets (`cluster`) is too narrow with five of them. The jackknife with t(G-1) holds its "
            "level and pays in width.",
            "The parabola misses by its bias, not by its noise: its intervals cannot know of it.",
            "",
        ]
        return "\n".join(lines)

    def summary(self) -> str:
        """A readable table."""
        lines = [f"{'study':54s}{'method':18s}" + "".join(f"{q:>9s}" for q in QUANTITIES)]
        for row in self.rows:
            cells = "".join(f"{'-' if row[q] is None else format(row[q], '.3f'):>9s}" for q in QUANTITIES)
            lines.append(f"{row['scenario']:54s}{row['method']:18s}{cells}")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()


def coverage_table(
    *,
    draws: int = 1000,
    seed: int = 0,
    scenarios: tuple[Scenario, ...] = SCENARIOS,
    methods: tuple[str, ...] = METHODS,
) -> CoverageTable:
    """Measure coverage.

    Args:
        draws: simulated studies for each scenario (a fifth of it for "forecast auto", which fits many laws).
        seed: first seed; study i of a scenario uses ``seed + i``.
        scenarios, methods: which. Default: all.

    Raises:
        InputError: fewer than 10 draws, or an unknown method.
    """
    if draws < 10:
        raise InputError(f"draws: expected at least 10, got {draws}")
    for method in methods:
        if method not in METHODS:
            raise InputError(f"methods: expected some of {', '.join(METHODS)}, got {method!r}")
    begun = time.perf_counter()
    rows = []
    for scenario in scenarios:
        hits: dict[str, dict[str, list[bool]]] = {m: {q: [] for q in QUANTITIES} for m in methods}
        for i in range(draws):
            _study(scenario, seed + i, hits, forecast="forecast auto" in methods and i % 5 == 0)
        for method in methods:
            held = hits[method]
            rows.append(
                {
                    "scenario": scenario.name,
                    "method": method,
                    "studies": max(len(v) for v in held.values()),
                    **{q: float(np.mean(v)) if v else None for q, v in held.items()},
                }
            )
    return CoverageTable(rows, draws, seed, time.perf_counter() - begun)


def _study(scenario: Scenario, seed: int, hits: dict[str, dict[str, list[bool]]], *, forecast: bool) -> None:
    target = scenario.budgets[-1] * scenario.beyond
    n, d, loss = scenario.optimum(target)
    a = scenario.surface["beta"] / (scenario.surface["alpha"] + scenario.surface["beta"])
    rng = np.random.default_rng(10**9 + seed)
    new = loss * float(np.exp(scenario.noise * rng.standard_normal() + scenario.shock * rng.standard_normal()))
    truth = {"a": a, "N_opt": n, "loss": loss, "new run": new}
    runs = scenario.simulate(seed)

    def note(method: str, **ends: Any) -> None:
        for key, (low, high) in ends.items():
            quantity = key.replace("_run", " run")
            hits[method][quantity].append(bool(low <= truth[quantity] <= high))

    surface = fit_surface(runs)
    surface.fit.draws = _BOOTSTRAP
    for method in hits:
        if method.startswith("isoflop"):
            iso = fit_isoflop(runs, vertex=method.split()[1], bootstrap=_BOOTSTRAP, seed=seed, with_surface=False)
            p = iso.predict(target, floor=True)
            note(
                method,
                a=iso.intervals["N_exponent"],
                N_opt=p["params"].interval,
                loss=p["loss"].interval,
            )
        elif method == "forecast auto":
            if forecast:
                f = Forecaster(runs).forecast(n, d, target)
                note(method, loss=f.mean_interval_95, new_run=f.interval_95)
        else:
            best = surface.optimum(target, method=method)
            note(
                method,
                a=surface.interval("a", method=method).ends,
                N_opt=best["params"].ends,
                loss=best["loss"].ends,
                new_run=best["new_run"].ends,
            )
