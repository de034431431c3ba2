"""How often the intervals hold: simulated studies with a known truth, for every method (``ditscale coverage``)."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy

import ditscale
from ditscale.errors import InputError
from ditscale.scaling.checks import need_whole
from ditscale.scaling.forecast import Forecaster
from ditscale.scaling.isoflop import fit_isoflop
from ditscale.scaling.jsonable import plain
from ditscale.scaling.laws import SURFACE
from ditscale.scaling.runs import RunTable
from ditscale.scaling.surface import fit_surface

QUANTITIES = ("a", "N_opt", "loss", "new run")
# Method -> every how many studies it is tried: what refits hundreds of times is tried on fewer.
METHODS = {
    "default": 1,
    "delta": 1,
    "jackknife": 1,
    "case": 5,
    "wild": 5,
    "cluster": 5,
    "isoflop parabola": 5,
    "isoflop cubic": 5,
    "profile": 20,
    "forecast auto": 20,
}
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
        falling: noise of the lowest budget over that of the highest; their middle is ``noise``.
        tails: degrees of freedom of Student's t of the noise, of the same spread; None for normal.
        outlier: how far off, relative, one run of the study is.
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
    falling: float = 1.0
    tails: float | None = None
    outlier: float = 0.0

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
        spreads = self.noise * self.falling ** np.linspace(0.5, -0.5, len(self.budgets))
        for budget, spread in zip(self.budgets, spreads, strict=True):
            shared = self.shock * rng.standard_normal()
            params = self.optimum(budget)[0] * np.geomspace(1 / self.width, self.width, self.sizes)
            tokens = budget / (self.cost * params)
            losses = SURFACE.predict(self.surface, params=params, data=tokens)
            for n, d, loss in zip(params, tokens, losses, strict=True):
                seen = float(loss) * float(np.exp(shared + spread * self._draw(rng)))
                records.append({"params": n, "tokens": d, "flops": budget, "loss": seen, "budget": budget})
        if self.outlier:
            records[int(rng.integers(len(records)))]["loss"] *= 1.0 + self.outlier
        return RunTable.from_records(records)

    def new_run(self, seed: int) -> float:
        """The loss of a run at the target, with its own noise and shock."""
        rng = np.random.default_rng(10**9 + seed)
        error = self.noise * self.falling**-0.5 * self._draw(rng) + self.shock * rng.standard_normal()
        return self.optimum(self.budgets[-1] * self.beyond)[2] * float(np.exp(error))

    def _draw(self, rng: np.random.Generator) -> float:
        if self.tails is None:
            return float(rng.standard_normal())
        return float(rng.standard_t(self.tails)) * float(np.sqrt(1.0 - 2.0 / self.tails))


_FIVE = tuple(float(c) for c in np.geomspace(1e17, 1e19, 5))
_FOUR = tuple(float(c) for c in np.geomspace(1e11, 3e12, 4))
_PLAIN = Scenario(
    name="35 runs in 5 budgets, noise 0.5 %",
    surface={"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28},
    budgets=_FIVE,
    sizes=7,
    width=4.0,
    cost=6.0,
    noise=0.005,
    shock=0.0,
    beyond=100.0,
)
SCENARIOS = (
    _PLAIN,
    replace(_PLAIN, name="the same, shock 0.25 % a budget", shock=0.0025),
    replace(_PLAIN, name="the same, shock 0.5 % a budget", shock=0.005),
    replace(_PLAIN, name="noise falling threefold with compute", falling=3.0),
    replace(_PLAIN, name="heavy tails: noise is t with 3 degrees", tails=3.0),
    replace(_PLAIN, name="one run 5 % off", outlier=0.05),
    Scenario(
        name="24 runs in 4 budgets, noise 1 %, shock 0.5 %, to 10x",
        surface={"E": 0.2, "A": 40.0, "B": 60.0, "alpha": 0.40, "beta": 0.38},
        budgets=_FOUR,
        sizes=6,
        width=4.0,
        cost=384.0,
        noise=0.01,
        shock=0.005,
        beyond=10.0,
    ),
)


_READING = """\
What it says:

- A shock that all runs of a budget share hardly moves the split of compute (`a`, N_opt) but ruins the loss of methods
  that do not know of it: `delta`, `case`, `wild` and `profile` take runs for independent.
- Resampling whole budgets (`cluster`) is far too narrow with five of them. The jackknife with t(G-1) holds its level and
  pays in width.
- `isoflop` lines look at minima only. The parabola misses N_opt by its bias, of which its intervals cannot know; the
  cubic is noisier and less biased.
- `forecast auto` is what `ditscale predict` says: laws averaged by their held-out scores. Without a shock it errs on the
  wide side (above 95): it holds the laws' disagreement besides each law's own error, and held-out errors may widen it but never
  narrow it, for the two or three budgets that can be held out cannot vouch for less. With a shock it needs that width.
"""


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

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return plain(self.__dict__)

    def to_markdown(self) -> str:
        """The committed table."""
        error = 100 * np.sqrt(0.95 * 0.05 / self.draws)
        default = [row[q] for row in self.rows if row["method"] == "default" for q in QUANTITIES]
        found = (
            f"; its figures here lie between {100 * min(default):.1f} and {100 * max(default):.1f}" if default else ""
        )
        lines = [
            "# How often the 95 % intervals hold",
            "",
            f"Made by `ditscale coverage --draws {self.draws} --seed {self.seed} --out docs/coverage.md` "
            f"(ditscale {ditscale.__version__}, numpy {np.__version__}, scipy {scipy.__version__}).",
            "",
            f"Each figure is the share, in per cent, of simulated studies whose 95 % interval held the truth: {self.draws:,} "
            "studies unless",
            f"said otherwise, so that a perfect 95 shows as 95 ± {error:.1f} (one standard error). `a` is the exponent of "
            "N_opt(C); N_opt, the",
            "loss there and one new run stand at 100 times the largest budget (10 times in the last study). `default` is what "
            "is given where",
            f"no method is asked for{found}.",
            "",
            "| study | method | a | N_opt | loss | new run |",
            "|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            cells = ["-" if row[q] is None else f"{100 * row[q]:.1f}" for q in QUANTITIES]
            few = "" if row["studies"] == self.draws else f" ({row['studies']} studies)"
            lines.append(f"| {row['scenario']} | {row['method']}{few} | {' | '.join(cells)} |")
        return "\n".join([*lines, "", _READING])

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
    methods: tuple[str, ...] = tuple(METHODS),
) -> CoverageTable:
    """Measure coverage.

    Args:
        draws: simulated studies for each scenario; what refits often is tried on every fifth or twentieth of them.
        seed: first seed; study i of a scenario uses ``seed + i``.
        scenarios, methods: which. Default: all.

    Raises:
        InputError: fewer than 10 draws, or an unknown method.
    """
    need_whole("draws", draws, 10)
    need_whole("seed", seed, 0)
    for method in methods:
        if method not in METHODS:
            raise InputError(f"methods: expected some of {', '.join(METHODS)}, got {method!r}")
    begun = time.perf_counter()
    rows = []
    for scenario in scenarios:
        hits: dict[str, dict[str, list[bool]]] = {m: {q: [] for q in QUANTITIES} for m in methods}
        for i in range(draws):
            _study(scenario, seed + i, hits, [m for m in methods if i % METHODS[m] == 0])
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


def _study(scenario: Scenario, seed: int, hits: dict[str, dict[str, list[bool]]], methods: list[str]) -> None:
    target = scenario.budgets[-1] * scenario.beyond
    n, d, loss = scenario.optimum(target)
    a = scenario.surface["beta"] / (scenario.surface["alpha"] + scenario.surface["beta"])
    truth = {"a": a, "N_opt": n, "loss": loss, "new run": scenario.new_run(seed)}
    runs = scenario.simulate(seed)

    def note(method: str, ends: dict[str, list[float]]) -> None:
        for quantity, (low, high) in ends.items():
            hits[method][quantity].append(bool(low <= truth[quantity] <= high))

    surface = fit_surface(runs)
    surface.fit.draws = _BOOTSTRAP
    for method in methods:
        if method.startswith("isoflop"):
            iso = fit_isoflop(runs, vertex=method.split()[1], bootstrap=_BOOTSTRAP, seed=seed, with_surface=False)
            p = iso.predict(target, floor=True)
            exponent = iso.intervals["N_exponent"]
            note(method, {"a": exponent, "N_opt": p["params"].interval, "loss": p["loss"].interval})
        elif method == "forecast auto":
            f = Forecaster(runs).forecast(n, d, target)
            note(method, {"loss": f.mean_interval_95, "new run": f.interval_95})
        else:
            asked = "auto" if method == "default" else method
            best = surface.optimum(target, method=asked)
            ends = {"N_opt": best["params"].ends, "loss": best["loss"].ends}
            if method != "profile":  # the profile is of the law, not of a run
                ends["new run"] = best["new_run"].ends
            note(method, {"a": surface.interval("a", method=asked).ends, **ends})
