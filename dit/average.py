"""Moving averages of the weights: which profile over training, kept as training goes or put together afterwards.

After step s an average becomes ``decay(s) * average + (1 - decay(s)) * weights``. Three rules for the decay:

- "share": ``share * s / (1 + share * s)``, never above 0.9999: a memory of about the last ``share`` of training;
- "fixed": the same decay at every step;
- "power": ``(1 - 1 / s) ** (exponent + 1)`` (Karras et al., arXiv:2312.02696, section 3.1), whose profile at step t is
  ``(s ** (exponent + 1) - (s - 1) ** (exponent + 1)) / t ** (exponent + 1)``, exactly. Its width is the standard
  deviation of that profile over t.

Power averages of two widths, kept at a few moments, give an average of any width at any moment afterwards: the least
squares combination of their profiles (the same paper, section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ditscale.dit.checks import need_choice
from ditscale.errors import InputError

RULES = ("share", "fixed", "power")
_MAX_SHARE_DECAY = 0.9999
# Steps at a time in the sums over training: a matrix of this many rows is small, and a run may have millions.
_ROWS = 65536


@dataclass(frozen=True)
class Profile:
    """A rule for the decay.

    Args:
        rule: "share", "fixed" or "power".
        value: the share of training, above 0 and up to 1; the decay, from 0 to below 1; or the relative width, above 0
            and up to 0.28.

    Raises:
        InputError: an unknown rule, or a value outside of its range.
    """

    rule: str
    value: float

    def __post_init__(self) -> None:
        need_choice("ema", self.rule, RULES)
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            field = {"share": "ema_share", "fixed": "ema_decay", "power": "ema_widths"}[self.rule]
            raise InputError(f"{field}: expected a number, got {self.value!r}")
        if self.rule == "share" and not 0 < self.value <= 1:
            raise InputError(f"ema_share: expected a share above 0 and up to 1, got {self.value!r}")
        if self.rule == "fixed" and not 0 <= self.value < 1:
            raise InputError(f"ema_decay: expected a decay from 0 to below 1, got {self.value!r}")
        if self.rule == "power":
            power_exponent(self.value)

    def decay(self, step: int) -> float:
        """The decay after step ``step``, counted from 1."""
        if self.rule == "share":
            return min(_MAX_SHARE_DECAY, 1 - 1 / (1 + self.value * step))
        if self.rule == "fixed":
            return self.value
        return float((1 - 1 / step) ** (power_exponent(self.value) + 1))


def power_exponent(width: float) -> float:
    """The exponent of the power profile of a relative width.

    The width of exponent g is ``sqrt((g + 1) / ((g + 2) ** 2 * (g + 3)))``; solved as a cubic in g.

    Raises:
        InputError: a width that no exponent of at least 0 has: above 0.2886 (the uniform profile's), or not above 0.
    """
    if not (isinstance(width, (int, float)) and 0 < width <= 12**-0.5 + 1e-12):
        raise InputError(f"ema_widths: expected relative widths above 0 and up to 0.2886, got {width!r}")
    inverse = width**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return max(0.0, float(roots.real.max()))


def power_profile(exponent: float, until: int, steps: NDArray[np.int64]) -> NDArray[np.float64]:
    """The weights that the power average after step ``until`` gives to the given steps: float64, summing to 1 over 1..until."""
    s = np.asarray(steps, dtype=np.float64)
    with np.errstate(divide="ignore"):
        # s**g - (s-1)**g without the cancellation at large s.
        gain = -np.expm1((exponent + 1) * np.log1p(-1 / s))
    inside = (s >= 1) & (s <= until)
    return np.where(inside, gain * (np.minimum(s, until) / until) ** (exponent + 1), 0.0)


class WeightAverage:
    """One moving average of named weights.

    Args:
        weights: by name; the average starts as a copy, in float32.
        profile: the rule for its decay.
        lay: may bring tensors of a dictionary together in memory, in their place there; gives what there is to go over.
            Default: every tensor by itself.

    Attributes:
        weights: the average by name.
        pieces: the same memory, as it was laid.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        profile: Profile,
        *,
        lay: Callable[[dict[str, Tensor]], list[Tensor]] | None = None,
    ) -> None:
        self.profile = profile
        self.weights: dict[str, Tensor] = {name: w.detach().float().clone() for name, w in weights.items()}
        self.pieces = list(self.weights.values()) if lay is None else lay(self.weights)

    @torch.no_grad()
    def update(self, current: Sequence[Tensor], step: int) -> None:
        """Take in the weights after step ``step`` (counted from 1), in the order of the names or as they were laid."""
        torch._foreach_lerp_(self.pieces, list(current), 1 - self.profile.decay(step))


@dataclass(frozen=True)
class Snapshot:
    """Which power average something is: its relative width, and the step after which it was kept."""

    width: float
    step: int


def reconstruction(kept: Sequence[Snapshot], wanted: Snapshot) -> NDArray[np.float64]:
    """The coefficients by which kept averages add up to a wanted one: float64 [n].

    They minimise the squared distance of the profiles over all steps, among those that sum to 1 so that a weight which
    stood still comes out as it is. The profiles are the exact ones of discrete steps.

    Raises:
        InputError: nothing was kept, or the wanted step lies after all that was.
    """
    if not kept or wanted.step > max(k.step for k in kept):
        last = max((k.step for k in kept), default=0)
        raise InputError(f"step: expected one up to the last kept average's, {last}, got {wanted.step}")
    exponents = [power_exponent(s.width) for s in (*kept, wanted)]
    untils = [s.step for s in (*kept, wanted)]
    products = np.zeros((len(untils), len(untils)))
    for start in range(1, max(untils) + 1, _ROWS):
        steps = np.arange(start, min(start + _ROWS, max(untils) + 1))
        rows = np.stack([power_profile(g, until, steps) for g, until in zip(exponents, untils, strict=True)])
        products += rows @ rows.T
    # In units of each profile's own length: their squares range over orders of magnitude, which lstsq would cut off.
    length = np.sqrt(np.diag(products))
    products /= length[:, None] * length[None, :]
    # With the multiplier of the sum as one more unknown.
    system = np.pad(products[:-1, :-1], (0, 1))
    system[-1, :-1] = system[:-1, -1] = 1 / length[:-1]
    found, *_ = np.linalg.lstsq(system, np.append(products[:-1, -1], 1 / length[-1]), rcond=1e-14)
    return np.asarray(found[:-1] * length[-1] / length[:-1])


def snapshot_steps(steps: int, count: int) -> list[int]:
    """The steps after which power averages are kept: ``count`` of them, evenly spaced, the last one included."""
    return sorted({math.ceil(steps * (i + 1) / count) for i in range(count)})
