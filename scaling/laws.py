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

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditscale.errors import InputError
from ditscale.scaling.engine import Array, Model

_EXPONENT_BOUND = 10.0
_LOG_COEFFICIENT_SPAN = 40.0
_OUTER_BOUNDS = (0.02, 8.0)


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
    """

    name: str
    names: tuple[str, ...]
    inputs: tuple[str, ...]
    formula: str
    source: str
    target: str = "loss"

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

    def __post_init__(self) -> None:
        coefficients = [t.coefficient for t in self.terms]
        exponents = [e for t in self.terms for e in t.exponents.values() if isinstance(e, str)]
        tail = [self.floor] if isinstance(self.floor, str) else []
        tail += [self.outer] if self.outer else []
        object.__setattr__(self, "names", tuple(dict.fromkeys([*coefficients, *exponents, *tail])))
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
        for name in (self.floor, self.outer):
            if isinstance(name, str):
                theta[name] = values[name]
        return np.stack(np.broadcast_arrays(*(theta[n] for n in self.names)), axis=-1)

    def starts(
        self,
        logs: Mapping[str, Array],
        target: Array,
        weights: Array,
        count: int,
        centre: Mapping[str, float],
    ) -> Array:
        """Variable projection: a grid over exponents, coefficients and floor by non-negative least
        squares.
        """
        return _projected_starts(self, logs, target, weights, count)


class TermModel:
    """:class:`TermLaw` on centred logarithms: ``floor + exp(k * logsumexp_k((b_k + sign * sum e x) / k))``.

    Internal parameters: ``b`` (the logarithm of each term to the outer power, at the centre), exponents times
    the outer power, floor, outer power. With an outer power of 1 that is the plain sum of terms.
    """

    def __init__(self, law: TermLaw, logs: Mapping[str, Array], centre: Mapping[str, float]) -> None:
        self.law = law
        index = {name: i for i, name in enumerate(law.names)}
        self._x = {x: np.asarray(logs[x], dtype=float) - centre.get(x, 0.0) for x in law.inputs}
        self._points = next(iter(self._x.values())).shape[0]
        self._outer = index[law.outer] if law.outer else None
        self._floor = index[law.floor] if isinstance(law.floor, str) else None
        self._fixed_floor = law.floor if isinstance(law.floor, float) else 0.0
        # (parameter, derivative of the term's exponent) of every term; fixed exponents are an offset.
        self._columns: list[list[tuple[int, Array | float]]] = []
        self._offsets: list[Array | float] = []
        for term in law.terms:
            columns: dict[int, Array | float] = {index[term.coefficient]: 1.0}
            offset: Array | float = 0.0
            for x, e in term.exponents.items():
                if isinstance(e, str):
                    columns[index[e]] = columns.get(index[e], 0.0) + law.sign * self._x[x]
                else:
                    offset = offset + law.sign * e * self._x[x]
            self._columns.append(list(columns.items()))
            self._offsets.append(offset)
        p = len(law.names)
        self.lower, self.upper = np.full(p, -np.inf), np.full(p, np.inf)
        for name in law.exponent_names:
            self.lower[index[name]] = 0.0 if law.sign < 0 else -_EXPONENT_BOUND
            self.upper[index[name]] = _EXPONENT_BOUND
        if self._floor is not None:
            self.lower[self._floor] = 0.0
        if self._outer is not None:
            self.lower[self._outer], self.upper[self._outer] = _OUTER_BOUNDS

    def bound_coefficients(self, target: Array) -> None:
        """Keep every term within a vast but finite range of the data, so that a vanishing one is seen at its
        bound.
        """
        middle = float(np.median(np.log(target)))
        for columns in self._columns:
            self.lower[columns[0][0]] = middle - _LOG_COEFFICIENT_SPAN
            self.upper[columns[0][0]] = middle + _LOG_COEFFICIENT_SPAN

    def _log_terms(self, theta: Array) -> list[Array]:
        outer = None if self._outer is None else theta[:, self._outer, None]
        theta = np.clip(theta, -1e150, 1e150)
        logs = []
        for columns, offset in zip(self._columns, self._offsets, strict=True):
            value: Any = 0.0
            for i, x in columns:
                value = value + theta[:, i, None] * x
            if outer is not None:
                value = value / outer
            value = value + offset
            logs.append(np.broadcast_to(value, (len(theta), self._points)))
        return logs

    def value(self, theta: Array) -> Array:
        """Predictions [S, n]."""
        floor = self._fixed_floor if self._floor is None else theta[:, self._floor, None]
        logs = self._log_terms(theta)
        with np.errstate(over="ignore"):
            if self._outer is None:
                total = np.exp(logs[0])
                for log in logs[1:]:
                    total += np.exp(log)
                total += floor
                return total
            return floor + np.exp(theta[:, self._outer, None] * _logsumexp(logs))

    def value_and_jacobian(self, theta: Array) -> tuple[Array, Array]:
        """Predictions [S, n] and derivatives [S, p, n]."""
        floor = self._fixed_floor if self._floor is None else theta[:, self._floor, None]
        logs = self._log_terms(theta)
        jacobian = np.zeros((len(theta), theta.shape[1], self._points))
        with np.errstate(over="ignore", invalid="ignore"):
            if self._outer is None:
                parts = [np.exp(log) for log in logs]
                total = sum(parts[1:], parts[0])
            else:
                outer = theta[:, self._outer, None]
                lse = _logsumexp(logs)
                total = np.exp(outer * lse)
                parts = [total * np.exp(log - lse) for log in logs]
                mean = sum(np.exp(log - lse) * np.where(np.isfinite(log), log, 0.0) for log in logs)
                # Fixed exponents lie inside the bracket, so they do not scale with the outer power.
                inner = sum(np.exp(log - lse) * offset for log, offset in zip(logs, self._offsets, strict=True))
                jacobian[:, self._outer] = total * (lse - mean + inner)
        for part, columns in zip(parts, self._columns, strict=True):
            for i, x in columns:
                jacobian[:, i] += part * x
        if self._floor is not None:
            jacobian[:, self._floor] = 1.0
        return floor + total, jacobian


def _logsumexp(logs: Sequence[Array]) -> Array:
    top = logs[0]
    for log in logs[1:]:
        top = np.maximum(top, log)
    return top + np.log(sum(np.exp(log - top) for log in logs))


def _projected_starts(law: TermLaw, logs: Mapping[str, Array], target: Array, weights: Array, count: int) -> Array:
    """Variable projection (Golub & Pereyra 1973): for given exponents the rest is a small linear problem.

    The linear problem is weighted by 1/y², so that its residuals are the relative ones of a fit in log space.
    """
    k = len(law.exponent_names)
    if k:
        side = {1: 64, 2: 26, 3: 10}.get(k, 6)
        positive = np.geomspace(0.02, 2.5, side)
        values = positive if law.sign < 0 else np.concatenate([-positive[::-1], positive])
        steps = np.array(list(itertools.product(range(len(values)), repeat=k)))
        exponents = values[steps]
    else:
        steps, exponents = np.zeros((1, 0), dtype=int), np.zeros((1, 0))
    outers = (0.25, 0.4, 0.7, 1.0) if law.outer else (1.0,)
    floors = (0.0, 0.4, 0.7, 0.9) if law.outer and isinstance(law.floor, str) else (0.0,)

    found_theta, found_score, found_cell = [], [], []
    for outer, share in itertools.product(outers, floors):
        fixed = share * float(target.min()) if law.outer else float(law.floor) if isinstance(law.floor, float) else 0.0
        if not np.all(target > fixed):
            raise InputError(f"floor: expected a value below every measured one ({target.min():.6g}), got {fixed:g}")
        goal = (target - fixed) ** (1.0 / outer)
        w = weights * (1.0 / goal * (target - fixed) * outer / target) ** 2
        columns = []
        position = {name: i for i, name in enumerate(law.exponent_names)}
        for term in law.terms:
            z: Any = 0.0
            for x, e in term.exponents.items():
                value = exponents[:, position[e], None] if isinstance(e, str) else np.full((len(exponents), 1), e)
                z = z + law.sign * value * logs[x]
            columns.append(np.exp(np.clip(np.broadcast_to(z, (len(exponents), len(target))), -300, 300)))
        floated = isinstance(law.floor, str) and not law.outer
        if floated:
            columns.append(np.ones_like(columns[0]))
        coefficient, score = _non_negative(np.stack(columns, axis=1), goal, w)
        theta = np.empty((len(exponents), len(law.names)))
        terms = len(law.terms)
        floor_log = np.log(np.abs(goal).max()) - 30.0
        with np.errstate(divide="ignore"):
            theta[:, :terms] = outer * np.maximum(np.log(coefficient[:, :terms]), floor_log)
        theta[:, terms : terms + k] = outer * exponents
        if isinstance(law.floor, str):
            theta[:, law.names.index(law.floor)] = coefficient[:, terms] if floated else fixed
        if law.outer:
            theta[:, law.names.index(law.outer)] = outer
        found_theta.append(theta)
        found_score.append(score)
        found_cell.append(np.column_stack([steps, np.full(len(steps), 2 * len(found_cell))]))
    return _spread(np.concatenate(found_theta), np.concatenate(found_score), np.concatenate(found_cell), count)


def _non_negative(columns: Array, goal: Array, weights: Array) -> tuple[Array, Array]:
    """Weighted least squares with coefficients >= 0 for S small designs [S, K, n]: the best feasible support
    wins.
    """
    s, k, _ = columns.shape
    weighted = columns * weights
    gram = np.matmul(weighted, columns.transpose(0, 2, 1))
    right = np.matmul(weighted, goal)
    total = float((weights * goal * goal).sum())
    root = np.sqrt(np.maximum(np.einsum("skk->sk", gram), 1e-300))
    gram = gram / root[:, :, None] / root[:, None, :]
    right = right / root
    best = np.full(s, np.inf)
    answer = np.zeros((s, k))
    for size in range(1, k + 1):
        for support in itertools.combinations(range(k), size):
            pick = np.array(support)
            sub = gram[:, pick[:, None], pick[None, :]] + 1e-13 * np.eye(size)
            try:
                c = np.linalg.solve(sub, right[:, pick][:, :, None])[:, :, 0]
            except np.linalg.LinAlgError:
                continue
            score = total - (c * right[:, pick]).sum(1)
            wins = (c > 0).all(1) & (score < best)
            best[wins] = score[wins]
            answer[wins] = 0.0
            answer[np.ix_(wins, pick)] = c[wins]
    return answer / root, best


def _spread(theta: Array, score: Array, cell: NDArray[np.int64], count: int) -> Array:
    """The best starts, the first ones at least two grid steps apart so that they probe different basins."""
    order = np.argsort(score, kind="stable")
    order = order[np.isfinite(score[order])]
    chosen: list[int] = []
    if count <= 32:
        for i in order[:4000]:
            if all(np.abs(cell[i] - cell[j]).max() >= 2 for j in chosen):
                chosen.append(int(i))
                if len(chosen) == count:
                    break
    else:
        chosen = [int(i) for i in order[:count]]
    return theta[chosen]


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
