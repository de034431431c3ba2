"""What a fit minimises: losses by name, each with one meaning.

A residual is ``r = log(predicted) - log(measured)`` in log space and ``predicted - measured`` in raw space.
The objective is the weighted SUM of ``rho(r)`` over the points, never the mean; the fitted parameters do not
depend on that choice.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ditscale.errors import InputError

Array = NDArray[np.float64]

KINDS = ("huber", "l1", "mse", "student-t", "envelope")
# The spread of a normal sample is 1.4826 times its median absolute deviation, and a Huber loss with its knee
# at 1.345 spreads keeps 95 % of the efficiency of least squares on normal noise (Huber 1964).
MAD_TO_SIGMA = 1.4826
HUBER_KNEE = 1.345


@dataclass(frozen=True)
class Loss:
    """One loss, ready to be evaluated on an array of residuals of any shape.

    Attributes:
        kind: "huber" (r²/2 inside ``scale``, linear outside), "l1" (|r|), "mse" (r²), "student-t" (heavy
            tails with ``shape`` degrees of freedom), "envelope" (Huber; a prediction above the data costs
            ``shape`` times one below).
        scale: the knee of huber and envelope, the spread of student-t; None means "from the residuals".
        shape: see ``kind``.
    """

    kind: str
    scale: float | None = None
    shape: float = 1.0

    @property
    def name(self) -> str:
        """The spelling that :func:`parse_loss` reads back."""
        parts = [self.kind]
        if self.kind in ("student-t", "envelope"):
            parts.append(f"{self.shape:g}")
        if self.kind in ("huber", "student-t", "envelope"):
            parts.append("auto" if self.scale is None else f"{self.scale:g}")
        return ":".join(parts)

    @property
    def needs_scale(self) -> bool:
        """Whether the scale must be set from residuals before the loss can be evaluated."""
        return self.scale is None and self.kind in ("huber", "student-t", "envelope")

    def with_scale(self, scale: float) -> Loss:
        """The same loss at a given knee or spread."""
        return dataclasses.replace(self, scale=float(scale))

    def knee_from(self, sigma: float) -> Loss:
        """The same loss with its scale set for residuals of spread ``sigma``."""
        return self.with_scale(sigma * (1.0 if self.kind == "student-t" else HUBER_KNEE))

    def rho(self, r: Array) -> Array:
        """The loss of each residual."""
        if self.kind == "mse":
            return r * r
        size = np.abs(r)
        if self.kind == "l1":
            return size
        if self.kind == "student-t":
            s2 = self._scale**2
            return 0.5 * (self.shape + 1.0) * s2 * np.log1p(r * r / (self.shape * s2))
        d = self._scale
        inner = np.minimum(size, d)
        cost = inner * (size - 0.5 * inner)
        return cost * np.where(r > 0, self.shape, 1.0) if self.kind == "envelope" else cost

    def psi(self, r: Array) -> Array:
        """The derivative of ``rho``."""
        if self.kind == "mse":
            return 2.0 * r
        if self.kind == "l1":
            return np.sign(r)
        if self.kind == "student-t":
            return (self.shape + 1.0) * r / (self.shape + (r / self._scale) ** 2)
        clipped = np.clip(r, -self._scale, self._scale)
        return clipped * np.where(r > 0, self.shape, 1.0) if self.kind == "envelope" else clipped

    def curvature(self, r: Array) -> Array:
        """A non-negative second derivative of ``rho`` (a member of the generalised one at a knee)."""
        if self.kind == "mse":
            return np.full_like(r, 2.0)
        if self.kind == "l1":
            return np.zeros_like(r)
        if self.kind == "student-t":
            # The true one turns negative in the tails; the ratio psi/r majorises and keeps the step a descent.
            return (self.shape + 1.0) / (self.shape + (r / self._scale) ** 2)
        inside = (np.abs(r) <= self._scale).astype(r.dtype)
        return inside * np.where(r > 0, self.shape, 1.0) if self.kind == "envelope" else inside

    @property
    def _scale(self) -> float:
        if self.scale is None:
            raise RuntimeError(f"loss {self.kind} was evaluated before its scale was set")
        return self.scale


def parse_loss(text: str | Loss) -> Loss:
    """Read a loss from its name: ``huber:1e-3``, ``huber:auto``, ``l1``, ``mse``, ``student-t:4``,
    ``envelope:10``.

    A second number of ``student-t`` and ``envelope`` is their scale, such as ``student-t:4:0.01``; without it
    the scale comes from the residuals, as with ``huber:auto`` (1.345 robust spreads).

    Raises:
        InputError: an unknown name, or a number that is not positive.
    """
    if isinstance(text, Loss):
        return text
    kind, *rest = str(text).split(":")
    expected = "huber:DELTA, huber:auto, l1, mse, student-t:DOF or envelope:RATIO"
    if kind not in KINDS or len(rest) > (2 if kind in ("student-t", "envelope") else 1 if kind == "huber" else 0):
        raise InputError(f"loss-fn: expected {expected}, got {text!r}")

    def number(value: str) -> float:
        try:
            result = float(value)
        except ValueError:
            result = float("nan")
        if not (np.isfinite(result) and result > 0):
            raise InputError(f"loss-fn: expected a positive number after {kind}:, got {value!r}")
        return result

    if kind in ("l1", "mse"):
        return Loss(kind)
    if kind == "huber":
        return Loss(kind, None if not rest or rest[0] == "auto" else number(rest[0]))
    default = {"student-t": 4.0, "envelope": 10.0}[kind]
    shape = number(rest[0]) if rest else default
    scale = None if len(rest) < 2 or rest[1] == "auto" else number(rest[1])
    return Loss(kind, scale, shape)


def robust_sigma(residuals: Array, *, free_parameters: int = 0) -> float:
    """The spread of residuals by their median size, widened for the parameters that were fitted to them."""
    n = residuals.size
    return float(MAD_TO_SIGMA * np.median(np.abs(residuals)) * np.sqrt(n / max(n - free_parameters, 1)))
