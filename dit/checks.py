"""What a user gave, checked one way everywhere. No torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from ditscale.errors import InputError

_MOST_FLOAT32 = (2 - 2**-23) * 2.0**127


def is_number(value: Any) -> bool:
    """Whether this is a finite number that a float can hold; true and false are none."""
    return not isinstance(value, bool) and isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def is_whole(value: Any, least: int, most: int | None = None) -> bool:
    """Whether this is a whole number within the bounds; true and false are none."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and least <= value and (most is None or value <= most)


def need_whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raise InputError unless :func:`is_whole`."""
    if not is_whole(value, least, most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most:,}"
        raise InputError(f"{name}: expected a whole number {bounds}, got {value!r}")


def need_number(name: str, value: Any, *, above: float | None = None, least: float | None = None) -> None:
    """Raise InputError unless ``value`` is a number that float32 can hold, within the bounds."""
    good = is_number(value) and abs(value) <= _MOST_FLOAT32
    if above is not None:
        if not (good and value > above):
            raise InputError(f"{name}: expected a number above {above:g}, got {value!r}")
    elif least is not None:
        if not (good and value >= least):
            raise InputError(f"{name}: expected a number of at least {least:g}, got {value!r}")
    elif not good:
        raise InputError(f"{name}: expected a number, got {value!r}")


def need_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise InputError unless the value is one of some texts."""
    if value not in choices:
        raise InputError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def need_flag(name: str, value: Any) -> None:
    """Raise InputError unless the value is true or false."""
    if not isinstance(value, bool):
        raise InputError(f"{name}: expected true or false, got {value!r}")
