"""Numbers that a user gave, checked one way everywhere."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

from ditscale.errors import InputError

MOST_DRAWS = 100_000


def need_positive(name: str, value: Any, *, of: str = "") -> float:
    """The number as a float.

    Args:
        name: of the argument, as the message says it.
        value: what came.
        of: what the number counts, such as "of FLOPs". Default: nothing.

    Raises:
        InputError: no number, not finite, or not above 0.
    """
    number = _real(value)
    if not 0 < number < math.inf:
        raise InputError(f"{name}: expected a positive number{' ' + of if of else ''}, got {value!r}")
    return number


def need_least(name: str, value: Any, least: float = 0.0) -> float:
    """The number as a float; InputError where it is no finite number of at least ``least``."""
    number = _real(value)
    if not least <= number < math.inf:
        raise InputError(f"{name}: expected a number of at least {least:g}, got {value!r}")
    return number


def need_whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """The whole number; InputError where it is none from ``least`` to ``most``."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most:,}"
        raise InputError(f"{name}: expected a whole number {bounds}, got {value!r}")
    return int(value)


def need_draws(draws: Any, seed: Any) -> None:
    """InputError unless a bootstrap can be drawn so: so many draws, of a generator with this seed."""
    need_whole("bootstrap", draws, 0, MOST_DRAWS)
    need_whole("seed", seed, 0)


def _real(value: Any) -> float:
    """A number as a float, NaN for what is none or too large to be one."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan
