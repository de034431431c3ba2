"""Laws beyond the plain surface: mixtures of experts, repeated data, Farseer, hyper-parameters.

The first ones are sums of power terms again (``TermLaw``); Farseer and repeated data have their own models.
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
VIDEO = TermLaw(
    name="video",
    terms=(Term("A", {"params": "alpha"}), Term("B", {"data": "beta"})),
    floor="E",
    formula="L(T, N) = E + A/N^alpha + B/T^beta, at the best batch and learning rate of each (N, T)",
    source="Yin et al., arXiv:2411.17470: the surface of runs tuned by B_opt(N, T) and lr_opt(N, T); its constants are "
    "not public",
)
MASKED = TermLaw(
    name="masked-reconstruction",
    terms=(Term("a", {"params": "alpha"}),),
    floor="c",
    formula="L = a*P^-alpha + c",
    source="Kendiukhov, arXiv:2602.15253: validation error of masked reconstruction against size",
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
    positive: tuple[str, ...] = ("A", "B", "R_D", "R_N")
    not_negative: tuple[str, ...] = ("alpha", "beta", "E")

    def model(self, logs: Mapping[str, Array], centre: Mapping[str, float]) -> Model:
        """See :meth:`Law.model`."""
        return _RepetitionModel(logs, centre)

    def export(self, theta: Array, centre: Mapping[str, float]) -> dict[str, Array]:
        """See :meth:`Law.export`."""
        base = SURFACE.export(theta[:, :5], centre)
        return {**base, "R_D": np.exp(theta[:, 5]), "R_N": np.exp(theta[:, 6])}

    def bring_in(self, params: Mapping[str, Any], centre: Mapping[str, float]) -> Array:
        """See :meth:`Law.bring_in`."""
        tail = np.log(np.stack([np.atleast_1d(np.asarray(params[k], dtype=float)) for k in ("R_D", "R_N")], axis=1))
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
        # D is not centred: its slope depends on N, so another unit of D would change the second term's form.
        n0 = _billions(centre)
        out = {}
        for k, (slope, level, power) in enumerate(_FARSEER_GROUPS):
            s, c, e = (theta[:, 3 * k + i] for i in range(3))
            e = np.where(np.abs(e) < 1e-12, 1e-12, e)
            out.update({slope: s / e * np.exp(-e * n0), level: c - s / e, power: e})
        return {name: out[name] for name in self.names}

    def bring_in(self, params: Mapping[str, Any], centre: Mapping[str, float]) -> Array:
        """See :meth:`Law.bring_in`."""
        n0 = _billions(centre)
        columns = []
        for slope, level, power in _FARSEER_GROUPS:
            s, c, e = (np.atleast_1d(np.asarray(params[k], dtype=float)) for k in (slope, level, power))
            here = s * np.exp(e * n0)
            columns += [here * e, c + here, e]
        return np.stack(columns, axis=1)

    def starts(
        self,
        logs: Mapping[str, Array],
        target: Array,
        weights: Array,
        count: int,
        centre: Mapping[str, float],
    ) -> Array:
        """The plain surface's starts: its N-term and floor to second order, B and beta constant in N."""
        base = SURFACE.starts(logs, target, weights, max(2, count // 4), centre)
        d0 = centre["data"] - np.log(1e9)
        out = []
        for a_log, b_log, alpha, beta, floor in base:
            a_term = float(np.exp(a_log))
            share = a_term / (a_term + floor)
            first = [-alpha * share, np.log(a_term + floor), -alpha * max(1.0 - share, 0.05)]
            slope = max(beta, 1e-3)
            for p, q in ((0.15, 0.15), (0.15, -0.15), (-0.15, 0.15), (-0.15, -0.15)):
                out.append([0.0, np.log(slope), p, 0.0, b_log + slope * d0, q, *first])
        return np.array(out[:count])


# Names of (slope, level, power) in the three exp(slope * N^power + level), in the order of the law's names.
_FARSEER_GROUPS = (("a1", "b1", "a"), ("a2", "b2", "b"), ("a3", "b3", "g"))


def _billions(centre: Mapping[str, float]) -> float:
    return centre.get("params", float(np.log(1e9))) - float(np.log(1e9))


class _FarseerModel:
    """``exp(u3) + exp(u2 - exp(u1) d)`` with ``u = slope * (e^(power n) - 1)/power + level``.

    n is the centred log N and d is log(D/1e9). That is Farseer's ``slope' N^power + level'`` in a form that stays
    bounded as the power goes to 0.
    """

    def __init__(self, logs: Mapping[str, Array], centre: Mapping[str, float]) -> None:
        self._n = np.asarray(logs["params"], dtype=float) - centre.get("params", np.log(1e9))
        self._d = np.asarray(logs["data"], dtype=float) - np.log(1e9)
        self.lower, self.upper = np.full(9, -np.inf), np.full(9, np.inf)
        for i in (2, 5, 8):
            self.lower[i], self.upper[i] = -3.0, 3.0

    def value(self, theta: Array) -> Array:
        """Predictions [S, n]."""
        first, second, _, _ = self._terms(theta)
        return first + second

    def value_and_jacobian(self, theta: Array) -> tuple[Array, Array]:
        """Predictions [S, n] and derivatives [S, p, n]."""
        first, second, slope, shapes = self._terms(theta)
        columns = []
        with np.errstate(all="ignore"):
            outer = (-self._d * second * slope, second, first)
            for k in range(3):
                s, e = theta[:, 3 * k, None], theta[:, 3 * k + 2, None]
                x = e * self._n
                # d/de of (e^(e n) - 1)/e, by its series where the quotient would cancel.
                exact = (self._n * np.exp(x) - shapes[k]) / np.where(np.abs(e) < 1e-6, 1.0, e)
                bend = np.where(np.abs(x) < 1e-4, self._n**2 * (0.5 + x / 3.0), exact)
                columns += [outer[k] * shapes[k], outer[k], outer[k] * s * bend]
        return first + second, np.stack(columns, axis=1)

    def _terms(self, theta: Array) -> tuple[Array, Array, Array, list[Array]]:
        shapes, exponents = [], []
        with np.errstate(all="ignore"):
            for k in range(3):
                s, c, e = (theta[:, 3 * k + i, None] for i in range(3))
                small = np.abs(e) < 1e-9
                shape = np.where(small, self._n, np.expm1(e * self._n) / np.where(small, 1.0, e))
                shapes.append(shape)
                exponents.append(s * shape + c)
            slope = np.exp(exponents[0])
            return np.exp(exponents[2]), np.exp(exponents[1] - slope * self._d), slope, shapes


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
        VIDEO,
    )
}
BY_NAME: dict[str, Law] = {**SURFACE_LAWS, **{law.name: law for law in (POWER, POWER_FLOOR, MASKED, HYPER)}}


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
