"""Sums of power terms as the engine sees them: values and derivatives on centred logarithms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ditscale.scaling.engine import Array

if TYPE_CHECKING:
    from ditscale.scaling.laws import TermLaw

_EXPONENT_BOUND = 10.0
_LOG_COEFFICIENT_SPAN = 40.0
_OUTER_BOUNDS = (0.02, 8.0)


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
        """Keep every term within a vast but finite range of the data, so that a vanishing one is seen at its bound."""
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
