"""What a fit returns: parameters with intervals, predictions, replicates, certificates, and their JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ditscale.errors import InputError
from ditscale.scaling import engine, intervals, resampling
from ditscale.scaling.components import Components, components, evenness
from ditscale.scaling.engine import Array
from ditscale.scaling.intervals import Interval, Quantity
from ditscale.scaling.jsonable import plain
from ditscale.scaling.laws import Law, TermLaw
from ditscale.scaling.losses import Loss, robust_sigma
from ditscale.scaling.more_laws import law_by_name

# A saved fit carries its points up to this many, so that intervals can be made from the file alone.
_SAVED_POINTS = 5000
# How a warning begins that says so.
NOT_IDENTIFIABLE = "not identifiable"


@dataclass(frozen=True)
class Prediction:
    """A predicted value with two 95 % intervals.

    Attributes:
        value: the law's value, a number or an array.
        interval: where the law itself lies (``mean`` interval), lower and upper.
        new_run: where one new run would land: the law's interval plus the noise of a run.
        level: nominal coverage.
        method: how the intervals were made.
        beyond: how far past the fitted range, as a factor per input (1 inside it), for scalar inputs.
    """

    value: Any
    interval: list[Any]
    new_run: list[Any]
    level: float
    method: str
    beyond: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return plain(self.__dict__)


@dataclass
class LawFit:
    """A law fitted to points.

    Attributes:
        law: the law.
        theta: internal parameters at the optimum [p] (see ``laws.py``).
        centre: logarithm of the inputs at which coefficients are centred.
        inputs, target, weights: the points.
        groups: budget index of each point, or None.
        loss: the loss that was minimised, its scale set.
        asked_loss: its name as asked for.
        space: "log" or "raw" residuals.
        objective: the weighted sum of losses at the optimum.
        certificate: decrement, kkt, iterations: what convergence rests on.
        converged: whether the certificate holds.
        starts, starts_agreeing: how many starts were polished, and how many reached this optimum (1e-8
            relative).
        at_bounds: names of parameters at a bound.
        warnings: what a reader must know, one sentence each.
        seconds: wall time of the fit.
        seed, draws: of bootstraps; None for as many as the points allow, 1000 up to 40,000 of them.
        interval_method: see ``intervals.py``.
        least_noise: spread of one observation that no interval claims to be smaller, in the fit's residuals.
    """

    law: Law
    theta: Array
    centre: dict[str, float]
    inputs: dict[str, Array]
    target: Array
    weights: Array
    groups: NDArray[np.int64] | None
    loss: Loss
    asked_loss: str
    space: str
    objective: float
    certificate: dict[str, float]
    converged: bool
    starts: int
    starts_agreeing: int
    at_bounds: list[str]
    warnings: list[str]
    seconds: float
    seed: int = 0
    draws: int | None = None
    interval_method: str = "auto"
    least_noise: float = 0.0

    @property
    def n(self) -> int:
        """Number of points."""
        return len(self.target)

    @cached_property
    def params(self) -> dict[str, float]:
        """The law's parameters by name, at full precision."""
        return {k: float(v[0]) for k, v in self.law.export(self.theta[None, :], self.centre).items()}

    @property
    def identifiable(self) -> bool:
        """Whether the runs determine every parameter: none at a bound, no direction in which nothing changes."""
        return not self.at_bounds and not any(w.startswith(NOT_IDENTIFIABLE) for w in self.warnings)

    @cached_property
    def intervals(self) -> dict[str, list[float]]:
        """95 % intervals of the parameters by name."""
        return {name: self.interval(name).ends for name in self.law.names}

    @cached_property
    def _model(self) -> engine.Model:
        return self.law.model({k: np.log(v) for k, v in self.inputs.items()}, self.centre)

    @cached_property
    def fitted(self) -> Array:
        """The law's values at the points [n]."""
        return self._model.value(self.theta[None, :])[0]

    @cached_property
    def residuals(self) -> Array:
        """Residuals [n] in the fit's space."""
        return np.log(self.fitted) - np.log(self.target) if self.space == "log" else self.fitted - self.target

    @cached_property
    def r2(self) -> float:
        """Share of the target's variance that the law explains, in the fit's space."""
        goal = np.log(self.target) if self.space == "log" else self.target
        spread = float(np.average((goal - np.average(goal, weights=self.weights)) ** 2, weights=self.weights))
        left = float(np.average(self.residuals**2, weights=self.weights))
        # Of equal values rounding alone differs, and explaining that is nothing.
        rounding = 1e-14 * float(np.abs(goal).max() if self.space == "raw" else 1.0 + np.abs(goal).max())
        return 1.0 - left / spread if spread > rounding**2 else float("nan")

    @cached_property
    def explains_by_chance(self) -> float:
        """p-value of the F test that the law explains no more than chance would; 1 where it cannot be tested."""
        free, left = len(self.theta) - 1, self.n - len(self.theta)
        if left < 1 or not self.r2 > 0:
            return 1.0
        if self.r2 >= 1:
            return 0.0
        return float(stats.f.sf(self.r2 / (1 - self.r2) * left / free, free, left))

    @cached_property
    def share_inside(self) -> float | None:
        """Share of points within the loss's knee: near 0, a Huber fit is a least-absolute-deviation fit but in name."""
        if self.loss.kind not in ("huber", "envelope") or self.asked_loss == "l1":
            return None
        return float(np.mean(np.abs(self.residuals) <= (self.loss.scale or 0.0)))

    @cached_property
    def jacobian(self) -> Array:
        """Derivatives of the residuals with respect to the internal parameters [n, p]."""
        with np.errstate(all="ignore"):
            f, jacobian = self._model.value_and_jacobian(self.theta[None, :])
            j = jacobian[0] / f[0] if self.space == "log" else jacobian[0]
        # At the edge of the range of floats a derivative may not be a number; it then tells nothing.
        return np.nan_to_num(j, nan=0.0, posinf=0.0, neginf=0.0).T

    @cached_property
    def _errors(self) -> Array:
        """psi(r) / mean psi': the errors that a robust fit averages (the residuals themselves for least squares)."""
        r = self.residuals
        if self.loss.kind == "mse":
            return r
        slope = self.loss.psi(r)
        bend = float(np.average(self.loss.curvature(r), weights=self.weights))
        if self.loss.kind in ("huber", "envelope"):
            # With few points inside a sharp knee their share is a poor estimate of the density there: a wider window.
            knee = self.loss.scale or 0.0
            sigma = robust_sigma(r, free_parameters=len(self.theta))
            window = max(knee, sigma * (self.n ** (-1 / 5)))
            bend = float(np.mean(np.abs(r) <= window)) * (knee / window if window > 0 else 1.0)
        if bend <= 0:
            return r
        share = min(float(np.mean(self.loss.curvature(r) > 0)), 1.0)
        # Huber's correction for the parameters that were fitted (Huber & Ronchetti 2009, section 7.6).
        correction = 1.0 + len(self.theta) / self.n * (1.0 - share) / share if share > 0.5 else 1.0
        return slope / bend * correction

    def components_for(self, method: str) -> Components:
        """Variance components as a method sees them: with budgets for "components" and "case-t", else runs alone."""
        if method not in self._parts:
            # A parameter at its bound keeps its error: the data would have it beyond, not exactly there.
            groups = self.groups if method in ("components", "case-t") else None
            self._parts[method] = components(
                self.jacobian, self._errors, groups, weights=self.weights, least=self.least_noise**2
            )
        return self._parts[method]

    @cached_property
    def _parts(self) -> dict[str, Components]:
        return {}

    @property
    def components(self) -> Components:
        """Run noise and budget shock (see ``intervals.py``)."""
        return self.components_for("components")

    @cached_property
    def budget_spreads(self) -> tuple[Array, float] | None:
        """Spread of the (weighted) residuals budget by budget, and the p-value that all are one; None without budgets."""
        return None if self.groups is None else evenness(self.residuals * np.sqrt(self.weights), self.groups)

    @property
    def uneven(self) -> bool:
        """Whether the noise of runs differs between 4 or more budgets, beyond chance."""
        found = self.budget_spreads
        return found is not None and len(found[0]) >= 4 and found[1] < intervals.UNEVEN

    @property
    def bounds(self) -> tuple[Array, Array]:
        """Bounds of the internal parameters."""
        model = self.bounded_model()
        return model.lower, model.upper

    @cached_property
    def _problem(self) -> engine.Problem:
        goal = np.log(self.target) if self.space == "log" else self.target
        return engine.Problem(self._model, goal, self.loss, self.weights, self.space)

    def objective_at(self, theta: Array) -> float:
        """The objective at other internal parameters."""
        return float(self._problem.objective(theta[None, :], slice(None))[0])

    def gradient_at(self, theta: Array) -> Array:
        """Its gradient."""
        return self._problem.derivatives(theta[None, :], slice(None))[0][0]

    @property
    def objective_scale(self) -> float:
        """What twice a drop of the objective is measured in: mean psi² over mean psi', n - p for n."""
        r = self.residuals
        psi = float((self.weights * self.loss.psi(r) ** 2).sum()) / max(self.n - len(self.theta), 1)
        bend = float(np.average(self.loss.curvature(r), weights=self.weights))
        return 0.5 * psi / bend if bend > 0 and psi > 0 else 1e-300

    @cached_property
    def _se(self) -> Array:
        return np.sqrt(np.maximum(np.diag(self.components.covariance), 0.0))

    def gradient(self, quantity: Quantity) -> Array:
        """Gradient of a quantity with respect to the internal parameters, at the optimum."""
        with np.errstate(all="ignore"):
            return intervals.gradient_of(quantity, self.theta, self._se)

    def interval(self, name: str, *, method: str | None = None, level: float = 0.95) -> Interval:
        """The interval of one parameter by its name.

        A coefficient's is built on its logarithm, a floor's on the logarithm of how far it lies below the lowest fitted
        value. It ends where the law's own bound stands: no floor and no exponent of a falling law lies below 0. A
        parameter that no run determines has no end.
        """
        if name not in self.law.names:
            raise InputError(f"name: expected one of {', '.join(self.law.names)}, got {name!r}")

        def value(theta: Array) -> Array:
            return self.law.export(theta, self.centre)[name]

        if isinstance(self.law, TermLaw) and name == self.law.floor:
            lowest = float(self.fitted.min())
            gap = self.interval_of(lambda th: lowest - value(th), log=True, method=method, level=level)
            got = dataclasses.replace(gap, value=self.params[name], low=lowest - gap.high, high=lowest - gap.low)
        else:
            got = self.interval_of(value, log=name in self.law.positive, method=method, level=level)
        least = 0.0 if name in self.law.not_negative else float("-inf")
        return dataclasses.replace(got, low=max(got.low, least), high=max(got.high, least))

    def interval_of(
        self,
        quantity: Quantity,
        *,
        log: bool = False,
        method: str | None = None,
        level: float = 0.95,
        new_run: bool | float = False,
    ) -> Interval:
        """The interval of any quantity of the internal parameters; see
        :func:`ditscale.scaling.intervals.interval_of`.
        """
        return intervals.interval_of(
            self, quantity, log=log, method=method or self.interval_method, level=level, new_run=new_run
        )

    def predict(self, *, level: float = 0.95, method: str | None = None, **inputs: Any) -> Prediction:
        """Predict at inputs (numbers or arrays), with the interval of the law and that of a new run.

        Raises:
            InputError: an input of the law is missing or not positive.
        """
        logs = self.law._logs(inputs)
        shape = np.broadcast_shapes(*(v.shape for v in logs.values()))
        flat = {k: np.broadcast_to(v, shape).ravel() for k, v in logs.items()}
        value = self.law.model(flat, self.centre).value(self.theta[None, :])[0]
        ends: list[list[Interval]] = [[], []]
        for i in range(len(value)):
            model = self.law.model({k: v[i : i + 1] for k, v in flat.items()}, self.centre)
            for new_run in (False, True):
                ends[new_run].append(
                    self.interval_of(
                        lambda th, m=model: m.value(th)[:, 0],  # type: ignore[misc]
                        log=self.space == "log",
                        method=method,
                        level=level,
                        new_run=new_run,
                    )
                )
        beyond = {}
        if shape == ():
            for k, v in flat.items():
                low, high = float(self.inputs[k].min()), float(self.inputs[k].max())
                x = float(np.exp(v[0]))
                beyond[k] = max(x / high, low / x, 1.0)
        return Prediction(
            value=value.reshape(shape) if shape else float(value[0]),
            interval=_pair(ends[0], shape),
            new_run=_pair(ends[1], shape),
            level=level,
            method=ends[0][0].method,
            beyond=beyond,
        )

    # Replicates

    @cached_property
    def _replicates(self) -> dict[Any, Array]:
        return {}

    def bootstrap(self, kind: str = "case", draws: int | None = None, seed: int | None = None) -> Array:
        """Refit to resampled data: internal parameters [draws, p].

        Args:
            kind: "case" resamples runs, "cluster" whole budgets, "wild" flips the signs of residuals at
                random.
            draws: how many. Default: the fit's, else 1000 (fewer above 40,000 points).
            seed: of the generator. Default: the fit's.
        """
        seed = self.seed if seed is None else seed
        draws = draws or self.draws or resampling.default_draws(self.n)
        key = (kind, draws, seed)
        if key not in self._replicates:
            self._replicates[key] = resampling.bootstrap(self, kind, draws, seed)
        return self._replicates[key]

    def jackknife(self) -> Array:
        """Refit without one budget at a time (one point at a time where there are no budgets) [G, p]."""
        if "jackknife" not in self._replicates:
            self._replicates["jackknife"] = resampling.jackknife(self)
        return self._replicates["jackknife"]

    def bounded_model(self) -> engine.Model:
        """The law at the points, its terms kept within a finite range of the data."""
        model = self._model
        if hasattr(model, "bound_coefficients"):
            model.bound_coefficients(self.target)
        return model

    def export_replicates(self, theta: Array) -> dict[str, Array]:
        """Public parameters of replicates."""
        return self.law.export(theta, self.centre)

    # Output

    @np.errstate(all="ignore")  # what is not finite is written as null
    def to_json(self) -> dict[str, Any]:
        """Everything needed to read and replay the fit, as plain values."""
        content = {
            "law": self.law.name,
            "formula": self.law.formula,
            "source": self.law.source,
            "n": self.n,
            "params": dict(self.params),
            "intervals": self.intervals,
            "objective": self.objective,
            "loss_fn": self.asked_loss,
            "loss_used": self.loss.name,
            "space": self.space,
            "r2": self.r2,
            "run_noise": float(np.sqrt(self.components.run)),
            "budget_shock": float(np.sqrt(self.components.budget)),
            "share_inside": self.share_inside,
            "converged": self.converged,
            "certificate": self.certificate,
            "starts": self.starts,
            "starts_agreeing": self.starts_agreeing,
            "at_bounds": self.at_bounds,
            "identifiable": self.identifiable,
            "warnings": self.warnings,
            "seconds": {"fit": self.seconds},
            "saved": self._saved(),
        }
        return plain(content)

    def _saved(self) -> dict[str, Any]:
        """What :meth:`from_json` needs beside the summary."""
        few = self.n <= _SAVED_POINTS
        return {
            "theta": self.theta.tolist(),
            "loss": dataclasses.asdict(self.loss),
            "centre": self.centre,
            "floor": self.law.floor if isinstance(self.law, TermLaw) and isinstance(self.law.floor, float) else None,
            "interval_method": self.interval_method,
            "least_noise": self.least_noise,
            "seed": self.seed,
            "draws": self.draws,
            "inputs": {k: v.tolist() for k, v in self.inputs.items()} if few else None,
            "target": self.target.tolist() if few else None,
            "weights": self.weights.tolist() if few else None,
            "groups": self.groups.tolist() if few and self.groups is not None else None,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> LawFit:
        """Rebuild a fit from :meth:`to_json`, points and all, without fitting again.

        Raises:
            InputError: the record is no saved fit, or its points were too many to be saved.
        """
        try:
            saved = record["saved"]
            law = law_by_name(record["law"], saved["floor"])
            if saved["inputs"] is None:
                raise InputError("law: expected a fit saved with its points, got one of too many points; fit it again")
            loss = Loss(**saved["loss"])
            return cls(
                law=law,
                theta=np.array(saved["theta"], dtype=float),
                centre=dict(saved["centre"]),
                inputs={k: np.array(v, dtype=float) for k, v in saved["inputs"].items()},
                target=np.array(saved["target"], dtype=float),
                weights=np.array(saved["weights"], dtype=float),
                groups=None if saved["groups"] is None else np.array(saved["groups"], dtype=np.int64),
                loss=loss,
                asked_loss=record["loss_fn"],
                space=record["space"],
                objective=float(record["objective"]),
                certificate=dict(record["certificate"]),
                converged=bool(record["converged"]),
                starts=int(record["starts"]),
                starts_agreeing=int(record["starts_agreeing"]),
                at_bounds=list(record["at_bounds"]),
                warnings=list(record["warnings"]),
                seconds=float(record.get("seconds", {}).get("fit", 0.0)),  # a study leaves times out
                seed=int(saved["seed"]),
                draws=saved.get("draws"),  # files of earlier versions have none
                interval_method=saved["interval_method"],
                least_noise=float(saved["least_noise"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"law: expected a fit saved by ditscale, got a record without {error}") from None

    def summary(self) -> str:
        """A readable table."""
        lines = [
            f"{self.law.name}: {self.law.formula}",
            f"  {self.n} points, loss {self.loss.name} in {self.space} space, objective {self.objective:.12g} (sum)",
            f"  {'converged' if self.converged else 'NOT CONVERGED'}: could still fall by "
            f"{self.certificate['decrement']:.1e} of itself; {self.starts_agreeing} of {self.starts} starts "
            f"agree",
            f"  {'':14s}{'estimate':>16s}   95 % interval",
        ]
        for name in self.law.names:
            low, high = self.intervals[name]
            lines.append(f"  {name:14s}{self.params[name]:16.8g}   [{low:.6g}, {high:.6g}]")
        lines += [f"  warning: {w}" for w in self.warnings]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.summary()


def _pair(ends: list[Interval], shape: tuple[int, ...]) -> list[Any]:
    low, high = np.array([e.low for e in ends]), np.array([e.high for e in ends])
    return [low.reshape(shape), high.reshape(shape)] if shape else [float(low[0]), float(high[0])]
