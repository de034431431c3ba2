"""Laws beyond the plain surface: mixtures of experts, repeated data, Farseer, hyper-parameters.

The first ones are sums of power terms again (``TermLaw``); Farseer and repeated data have models of their
own, with
derivatives by central differences: they have seven to nine parameters, and are fitted to hundreds of runs at
    most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ditscale.errors import InputError
from ditscale.scaling.engine import Array, Model
from ditscale.scaling.laws import (
    KAPLAN,
    POWER,
    POWER_FLOOR,
    SKALING,
    SURFACE,
    SURFACE_FLOORLESS,
    SURFACE_TIED,
    Law,
    Term,
    TermLaw,
    power_with_floor,
)

# Muennighoff et al., arXiv:2305.16264: what repeated tokens and excess parameters are worth decays with these
# constants.
REPETITION_DATA = 15.39
REPETITION_PARAMS = 5.31

MOE = TermLaw(
    name="moe",
    terms=(
        Term("A", {"params": "alpha"}),
        Term("G", {"params": "alpha", "granularity": "gamma"}),
        Term("B", {"data": "beta"}),
    ),
    floor="E",
    formula="L = E + (A + G/granularity^gamma)/N_active^alpha + B/D^beta",
    source="Krajewski et al., arXiv:2402.07871; N counts active parameters",
)
MOE_DENSITY = TermLaw(
    name="moe-density",
    terms=(Term("A", {"params": "alpha", "density": "delta"}), Term("B", {"data": "beta"})),
    floor="E",
    formula="L = E + A/(N_total^alpha * density^delta) + B/D^beta, density = active/total parameters",
    source="the surface with a power of sparsity; fits of this kind explain 99 % in sample and 68 % held out "
    "(Abnar et al., arXiv:2501.12370): backtest it",
)
HYPER = TermLaw(
    name="hyper",
    terms=(Term("coefficient", {"params": "params_exponent", "data": "data_exponent"}),),
    sign=1,
    formula="y = coefficient * N^params_exponent * D^data_exponent",
    source="Yin et al., arXiv:2411.17470 (B_opt, lr_opt of video DiTs); Step Law, arXiv:2503.04715",
    target="hyper-parameter",
)


class NumericModel:
    """A model whose derivatives are central differences of its own values."""

    lower: Array
    upper: Array

    def value(self, theta: Array) -> Array:
        """Predictions [S, n]."""
        raise NotImplementedError

    def value_and_jacobian(self, theta: Array) -> tuple[Array, Array]:
        """Predictions [S, n] and derivatives [S, p, n]."""
        value = self.value(theta)
        jacobian = np.empty((len(theta), theta.shape[1], value.shape[1]))
        for i in range(theta.shape[1]):
            h = 1e-5 * np.maximum(np.abs(theta[:, i]), 1e-2)
            up, down = theta.copy(), theta.copy()
            up[:, i] += h
            down[:, i] -= h
            jacobian[:, i] = (self.value(up) - self.value(down)) / (2 * h[:, None])
        return value, jacobian


@dataclass(frozen=True)
class Repetition(Law):
    """The surface on effective data and parameters: a repeated image is worth less each time.

    ``D' = U + U R_D (1 - exp(-(D/U - 1)/R_D))`` with U unique data, and ``N'`` alike with ``U_N = min(N,
    N_opt(U))``, the size for which U would be compute-optimal.
    """

    name: str = "repetition"
    names: tuple[str, ...] = ("A", "B", "alpha", "beta", "E", "R_D", "R_N")
    inputs: tuple[str, ...] = ("params", "data", "unique")
    formula: str = "L = E + A/N'^alpha + B/D'^beta with N', D' discounted for repetition"
    source: str = "Muennighoff et al. 2023, arXiv:2305.16264 (there R_D 15.39, R_N 5.31)"
    target: str = "loss"

    def model(self, logs: Mapping[str, Array], centre: Mapping[str, float]) -> Model:
        """See :meth:`Law.model`."""
        return _RepetitionModel(logs, centre)

    def export(self, theta: Array, centre: Mapping[str, float]) -> dict[str, Array]:
        """See :meth:`Law.export`."""
        base = SURFACE.export(theta[:, :5], centre)
        return {**base, "R_D": np.exp(theta[:, 5]), "R_N": np.exp(theta[:, 6])}

    def bring_in(self, params: Mapping[str, Any], centre: Mapping[str, float]) -> Array:
        """See :meth:`Law.bring_in`."""
        tail = np.log(
            np.stack([np.atleast_1d(np.asarray(params[k], dtype=float)) for k in ("R_D", "R_N")], axis=1)
        )
        return np.concatenate([SURFACE.bring_in(params, centre), tail], axis=1)

    def starts(
        self,
        logs: Mapping[str, Array],
        target: Array,
        weights: Array,
        count: int,
        centre: Mapping[str, float],
    ) -> Array:
        """The plain surface's starts, with the published discounts."""
        base = SURFACE.starts(logs, target, weights, count, centre)
        tail = np.log([REPETITION_DATA, REPETITION_PARAMS])
        return np.concatenate([base, np.broadcast_to(tail, (len(base), 2))], axis=1)


class _RepetitionModel(NumericModel):
    def __init__(self, logs: Mapping[str, Array], centre: Mapping[str, float]) -> None:
        self._n = np.asarray(logs["params"], dtype=float) - centre.get("params", 0.0)
        self._d = np.asarray(logs["data"], dtype=float) - centre.get("data", 0.0)
        unique = np.minimum(np.asarray(logs["unique"], dtype=float), np.asarray(logs["data"], dtype=float))
        self._u = unique - centre.get("data", 0.0)
        self.lower = np.array([-np.inf, -np.inf, 0.0, 0.0, 0.0, np.log(0.05), np.log(0.05)])
        self.upper = np.array([np.inf, np.inf, 10.0, 10.0, np.inf, np.log(1e4), np.log(1e4)])

    def value(self, theta: Array) -> Array:
        a, b, alpha, beta, floor, log_rd, log_rn = (theta[:, i, None] for i in range(7))
        with np.errstate(all="ignore"):
            data = _discounted(self._d, self._u, np.exp(log_rd))
            # On the compute-optimal path alpha A N^-alpha = beta B D^-beta, whatever a run costs in N * D.
            matched = (np.log(alpha) + a - np.log(beta) - b + beta * self._u) / np.maximum(alpha, 1e-9)
            base = np.minimum(self._n, np.where(np.isfinite(matched), matched, self._n))
            params = _discounted(self._n, base, np.exp(log_rn))
            return np.exp(a - alpha * params) + np.exp(b - beta * data) + floor


def _discounted(log_total: Array, log_base: Array, half: Array) -> Array:
    """Logarithm of ``U + U R (1 - exp(-(total/U - 1)/R))``."""
    repeats = np.expm1(np.maximum(log_total - log_base, 0.0))
    return log_base + np.log1p(half * -np.expm1(-repeats / half))


def effective_data(data: float, unique: float, *, half: float = REPETITION_DATA) -> float:
    """What D images are worth when only ``unique`` of them differ, in images seen once (arXiv:2305.16264,
    equation 5).

    Args:
        data: images (or tokens) trained on.
        unique: how many of them differ.
        half: R*_D, the repeats after which more are worth 1/e. Default: 15.39, of language models.
    """
    return float(np.exp(_discounted(np.log(data), np.log(min(unique, data)), np.array(half))))


@dataclass(frozen=True)
class Farseer(Law):
    """``L = exp(a3 N^g + b3) + exp(a2 N^b + b2) D^(-exp(a1 N^a + b1))``, N and D in units of ``1e9``."""

    name: str = "farseer"
    names: tuple[str, ...] = ("a1", "b1", "a", "a2", "b2", "b", "a3", "b3", "g")
    inputs: tuple[str, ...] = ("params", "data")
    formula: str = "L = exp(a3 N^g + b3) + exp(a2 N^b + b2) D^(-exp(a1 N^a + b1)), N and D in billions"
    source: str = "Farseer, arXiv:2506.10972"
    target: str = "loss"

    def model(self, logs: Mapping[str, Array], centre: Mapping[str, float]) -> Model:
        """See :meth:`Law.model`."""
        return _FarseerModel(logs, centre)

    def export(self, theta: Array, centre: Mapping[str, float]) -> dict[str, Array]:
        """See :meth:`Law.export`."""
        # D is not centred: its slope depends on N, so another unit of D would change the form of the second
        # term.
        n0 = centre.get("params", np.log(1e9)) - np.log(1e9)
        a1, b1, a, a2, b2, b, a3, b3, g = (theta[:, i] for i in range(9))
        scale = {"a1": a1 * np.exp(-a * n0), "a2": a2 * np.exp(-b * n0), "a3": a3 * np.exp(-g * n0)}
        return {**scale, "b1": b1, "a": a, "b2": b2, "b": b, "b3": b3, "g": g}

    def bring_in(self, params: Mapping[str, Any], centre: Mapping[str, float]) -> Array:
        """See :meth:`Law.bring_in`."""
        n0 = centre.get("params", np.log(1e9)) - np.log(1e9)
        v = {k: np.atleast_1d(np.asarray(params[k], dtype=float)) for k in self.names}
        return np.stack(
            [
                v["a1"] * np.exp(v["a"] * n0), v["b1"], v["a"],
                v["a2"] * np.exp(v["b"] * n0), v["b2"], v["b"],
                v["a3"] * np.exp(v["g"] * n0), v["b3"], v["g"],
            ],
            axis=1,
        )  # fmt: skip

    def starts(
        self,
        logs: Mapping[str, Array],
        target: Array,
        weights: Array,
        count: int,
        centre: Mapping[str, float],
    ) -> Array:
        """From the plain surface's starts: the floor and N-term become exp(a3 N^g + b3) to second order, B
        and beta constant.
        """
        base = SURFACE.starts(logs, target, weights, max(2, count // 4), centre)
        out = []
        d0 = centre["data"] - np.log(1e9)
        for a_log, b_log, alpha, beta, floor in base:
            a_term = float(np.exp(a_log))
            share = a_term / (a_term + floor)
            g = -alpha * max(1.0 - share, 0.05)
            a3 = -alpha * share / g
            b3 = np.log(a_term + floor) - a3
            for power in (0.15, -0.15):
                for tilt in (0.05, -0.05):
                    b1 = np.log(max(beta, 1e-3)) - tilt
                    b2 = b_log + np.exp(b1 + tilt) * d0 - tilt
                    out.append([tilt, b1, power, tilt, b2, power, a3, b3, g])
        return np.array(out[:count])


class _FarseerModel(NumericModel):
    def __init__(self, logs: Mapping[str, Array], centre: Mapping[str, float]) -> None:
        self._n = np.asarray(logs["params"], dtype=float) - centre.get("params", np.log(1e9))
        self._d = np.asarray(logs["data"], dtype=float) - np.log(1e9)
        self.lower, self.upper = np.full(9, -np.inf), np.full(9, np.inf)
        for i in (2, 5, 8):
            self.lower[i], self.upper[i] = -3.0, 3.0

    def value(self, theta: Array) -> Array:
        a1, b1, a, a2, b2, b, a3, b3, g = (theta[:, i, None] for i in range(9))
        with np.errstate(all="ignore"):
            slope = np.exp(a1 * np.exp(a * self._n) + b1)
            return np.exp(a3 * np.exp(g * self._n) + b3) + np.exp(
                a2 * np.exp(b * self._n) + b2 - slope * self._d
            )


REPETITION = Repetition()
FARSEER = Farseer()

# Laws of a run's loss, by the name that the command line takes; the two-input ones also allocate budgets.
SURFACE_LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        SURFACE,
        SURFACE_TIED,
        SURFACE_FLOORLESS,
        SKALING,
        KAPLAN,
        FARSEER,
        MOE,
        MOE_DENSITY,
        REPETITION,
    )
}
BY_NAME: dict[str, Law] = {**SURFACE_LAWS, **{law.name: law for law in (POWER, POWER_FLOOR, HYPER)}}


def law_by_name(name: str, floor: float | None = None) -> Law:
    """A law by its name; ``floor`` where the floor was given from outside.

    Raises:
        InputError: none of that name.
    """
    if floor is not None:
        return power_with_floor(floor)
    if name not in BY_NAME:
        raise InputError(f"law: expected one of {', '.join(BY_NAME)}, got {name!r}")
    return BY_NAME[name]
