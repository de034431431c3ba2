"""The laws: small classes that predict, differentiate and say where they come from.

A law works on named positive inputs (``params``, ``data``, ``flops``, ...) and named parameters (``A``,
``alpha``, ...). For a fit it turns itself into a model on centred logarithms: coefficients are taken at the
middle of the data instead of at one parameter and one image, which removes most of the correlation between a
coefficient and its exponent.

Most laws are sums of power terms, possibly raised to a power, plus a floor:
``y = E + (sum_k c_k * prod_j x_j^-e_kj)^k``. :class:`TermLaw` is that family; the others stand in
``more_laws.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ditscale.errors import InputError
from ditscale.scaling.engine import Array, Model
from ditscale.scaling.starts import projected_starts
from ditscale.scaling.term_model import TermModel


@dataclass(frozen=True)
class Term:
    """One power term ``coefficient * prod(input ** (sign * exponent))``.

    Attributes:
        coefficient: its name.
        exponents: input name -> exponent name (the same name twice ties two exponents) or a fixed number.
    """

    coefficient: str
    exponents: Mapping[str, str | float]


class Law:
    """What every law offers. Subclasses set the attributes and the methods that raise here.

    Attributes:
        name: short name, as the command line takes it.
        names: parameter names, in order.
        inputs: input names, in order.
        formula: the law in plain text.
        source: paper or origin.
        target: what it predicts ("loss", "fid", ...).
        positive: parameters that are always above 0, whose intervals are built on their logarithm.
        not_negative: other parameters that are never below 0.
    """

    name: str
    names: tuple[str, ...]
    inputs: tuple[str, ...]
    formula: str
    source: str
    target: str = "loss"
    positive: tuple[str, ...] = ()
    not_negative: tuple[str, ...] = ()

    def predict(self, params: Mapping[str, float], /, **inputs: Any) -> Array:
        """The law's value at positive inputs (numbers or arrays that broadcast)."""
        logs = self._logs(inputs)
        theta = self.bring_in({k: np.atleast_1d(float(v)) for k, v in self._checked(params).items()}, {})
        shape = np.broadcast_shapes(*(v.shape for v in logs.values()))
        flat = {k: np.broadcast_to(v, shape).ravel() for k, v in logs.items()}
        return self.model(flat, {}).value(theta)[0].reshape(shape)

    def gradient(self, params: Mapping[str, float], /, **inputs: Any) -> Array:
        """Derivatives with respect to the parameters, [len(names), points]."""
        values = self._checked(params)
        columns = []
        for name in self.names:
            # Fourth-order central differences in each parameter's own scale: exact to about 1e-11 relative.
            h = 1e-3 * max(abs(values[name]), 1e-3)
            parts = [self.predict({**values, name: values[name] + k * h}, **inputs) for k in (-2, -1, 1, 2)]
            columns.append((parts[0] - 8 * parts[1] + 8 * parts[2] - parts[3]) / (12 * h))
        return np.stack(columns)

    def model(self, logs: Mapping[str, Array], centre: Mapping[str, float]) -> Model:
        """The engine's view of the law at points given by natural logarithms of the inputs."""
        raise NotImplementedError

    def starts(
        self,
        logs: Mapping[str, Array],
        target: Array,
        weights: Array,
        count: int,
        centre: Mapping[str, float],
    ) -> Array:
        """Internal starting points [<= count, p], best first; ``logs`` are centred at ``centre``."""
        raise NotImplementedError

    def export(self, theta: Array, centre: Mapping[str, float]) -> dict[str, Array]:
        """Public parameters (arrays over S) from internal ones [S, p]."""
        raise NotImplementedError

    def bring_in(self, params: Mapping[str, Any], centre: Mapping[str, float]) -> Array:
        """Internal parameters [S, p] from public ones."""
        raise NotImplementedError

    def _checked(self, params: Mapping[str, float]) -> dict[str, float]:
        missing = [n for n in self.names if n not in params]
        if missing:
            raise InputError(f"params: law {self.name} needs {', '.join(self.names)}, missing {', '.join(missing)}")
        return {n: float(params[n]) for n in self.names}

    def _logs(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        logs = {}
        for name in self.inputs:
            if inputs.get(name) is None:
                raise InputError(f"{name}: law {self.name} needs {', '.join(self.inputs)}, got none for {name}")
            value = np.asarray(inputs[name], dtype=float)
            if not np.all(np.isfinite(value) & (value > 0)):
                raise InputError(f"{name}: expected positive numbers, got {np.ravel(value)[:3].tolist()}")
            logs[name] = np.log(value)
        return logs


@dataclass(frozen=True)
class TermLaw(Law):
    """``y = floor + (sum of power terms) ** outer``.

    Attributes:
        terms: the power terms.
        floor: name of a fitted floor (>= 0), a fixed number, or None for none.
        outer: name of a fitted outer power, or None for 1.
        sign: +1 where exponents are as written (``x ** e``), -1 where the law divides by ``x ** e``.
    """

    name: str
    terms: tuple[Term, ...]
    formula: str
    source: str
    floor: str | float | None = None
    outer: str | None = None
    sign: int = -1
    target: str = "loss"
    names: tuple[str, ...] = field(init=False)
    inputs: tuple[str, ...] = field(init=False)
    positive: tuple[str, ...] = field(init=False)
    not_negative: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        coefficients = [t.coefficient for t in self.terms]
        exponents = [e for t in self.terms for e in t.exponents.values() if isinstance(e, str)]
        tail = [self.floor] if isinstance(self.floor, str) else []
        tail += [self.outer] if self.outer else []
        object.__setattr__(self, "names", tuple(dict.fromkeys([*coefficients, *exponents, *tail])))
        object.__setattr__(self, "positive", tuple(coefficients))
        object.__setattr__(self, "not_negative", tuple(tail + (exponents if self.sign < 0 else [])))
        object.__setattr__(self, "inputs", tuple(dict.fromkeys(x for t in self.terms for x in t.exponents)))

    @property
    def exponent_names(self) -> tuple[str, ...]:
        """The fitted exponents, in order."""
        free = len(self.terms), len(self.names) - isinstance(self.floor, str) - bool(self.outer)
        return self.names[free[0] : free[1]]

    def model(self, logs: Mapping[str, Array], centre: Mapping[str, float]) -> TermModel:
        """See :meth:`Law.model`."""
        return TermModel(self, logs, centre)

    def export(self, theta: Array, centre: Mapping[str, float]) -> dict[str, Array]:
        """See :meth:`Law.export`."""
        column = {name: theta[:, i] for i, name in enumerate(self.names)}
        outer = column[self.outer] if self.outer else 1.0
        out: dict[str, Array] = {}
        for term in self.terms:
            shift: Any = 0.0
            for x, e in term.exponents.items():
                exponent = column[e] if isinstance(e, str) else e * outer
                shift = shift + self.sign * exponent * centre.get(x, 0.0)
            with np.errstate(over="ignore"):
                out[term.coefficient] = np.exp((column[term.coefficient] - shift) / outer)
        for name in self.exponent_names:
            out[name] = column[name] / outer
        if isinstance(self.floor, str):
            out[self.floor] = column[self.floor]
        if self.outer:
            out[self.outer] = column[self.outer]
        return {name: out[name] for name in self.names}

    def bring_in(self, params: Mapping[str, Any], centre: Mapping[str, float]) -> Array:
        """See :meth:`Law.bring_in`."""
        values = {n: np.atleast_1d(np.asarray(params[n], dtype=float)) for n in self.names}
        outer = values[self.outer] if self.outer else 1.0
        theta = {}
        for term in self.terms:
            shift: Any = 0.0
            for x, e in term.exponents.items():
                shift = shift + self.sign * (values[e] if isinstance(e, str) else e) * centre.get(x, 0.0)
            with np.errstate(divide="ignore"):
                theta[term.coefficient] = np.maximum(np.log(values[term.coefficient]), -1e4) + shift
            theta[term.coefficient] = theta[term.coefficient] * outer
        for name in self.exponent_names:
            theta[name] = values[name] * outer
        for tail in (self.floor, self.outer):
            if isinstance(tail, str):
                theta[tail] = values[tail]
        return np.stack(np.broadcast_arrays(*(theta[n] for n in self.names)), axis=-1)

    def starts(
        self,
        logs: Mapping[str, Array],
        target: Array,
        weights: Array,
        count: int,
        centre: Mapping[str, float],
    ) -> Array:
        """Variable projection: a grid over exponents, coefficients and floor by non-negative least squares."""
        return projected_starts(self, logs, target, weights, count)


SURFACE = TermLaw(
    name="surface",
    terms=(Term("A", {"params": "alpha"}), Term("B", {"data": "beta"})),
    floor="E",
    formula="L = E + A/N^alpha + B/D^beta",
    source="Hoffmann et al. 2022, arXiv:2203.15556, approach 3",
)
SURFACE_TIED = TermLaw(
    name="surface-tied",
    terms=(Term("A", {"params": "alpha"}), Term("B", {"data": "alpha"})),
    floor="E",
    formula="L = E + A/N^alpha + B/D^alpha",
    source="the surface of arXiv:2203.15556 with one exponent (arXiv:2305.16264 fits it so)",
)
SURFACE_FLOORLESS = TermLaw(
    name="surface-floorless",
    terms=(Term("A", {"params": "alpha"}), Term("B", {"data": "beta"})),
    formula="L = A/N^alpha + B/D^beta",
    source="the surface of arXiv:2203.15556 without its irreducible loss",
)
SKALING = TermLaw(
    name="skaling",
    terms=(Term("A", {"params": "alpha"}), Term("B", {"data": "beta"})),
    floor="E",
    outer="k",
    formula="L = (A/N^alpha + B/D^beta)^k + E",
    source="Skaling, arXiv:2608.07222",
)
KAPLAN = TermLaw(
    name="kaplan",
    terms=(Term("A", {"params": "alpha"}), Term("B", {"data": 1.0})),
    outer="k",
    formula="L = (A/N^alpha + B/D)^k; Kaplan's alpha_D = k, alpha_N = k*alpha, N_c = A^(1/alpha), D_c = B",
    source="Kaplan et al. 2020, arXiv:2001.08361, equation 1.5",
)
POWER = TermLaw(
    name="power",
    terms=(Term("coefficient", {"x": "exponent"}),),
    sign=1,
    formula="y = coefficient * x^exponent",
    source="Liang et al., arXiv:2410.08184, for L(C), N_opt(C) and D_opt(C)",
    target="y",
)
POWER_FLOOR = TermLaw(
    name="power-floor",
    terms=(Term("coefficient", {"x": "exponent"}),),
    sign=1,
    floor="floor",
    formula="y = floor + coefficient * x^exponent",
    source="Henighan et al. 2020, arXiv:2010.14701; a*P^-alpha + c of arXiv:2602.15253",
    target="y",
)


def power_with_floor(floor: float) -> TermLaw:
    """``y = floor + coefficient * x^exponent`` with a floor that is given from outside."""
    return TermLaw(
        name="power-given-floor",
        terms=(Term("coefficient", {"x": "exponent"}),),
        sign=1,
        floor=float(floor),
        formula=f"y = {floor:g} + coefficient * x^exponent",
        source="the floor is the caller's",
        target="y",
    )
