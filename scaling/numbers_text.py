"""Numbers as people read them: 2 × 10¹², 490k, 12.4 min."""

from __future__ import annotations

import math

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_PREFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def power_of_ten(value: float, digits: int = 2) -> str:
    """``2 × 10¹²``; ``10¹²`` where the mantissa is one."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    exponent = math.floor(math.log10(abs(value)))
    mantissa = f"{value / 10**exponent:.{digits - 1}f}"
    if float(mantissa) >= 10:
        mantissa, exponent = f"{value / 10 ** (exponent + 1):.{digits - 1}f}", exponent + 1
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    ten = "10" + str(exponent).translate(_SUPERSCRIPT)
    return ten if mantissa == "1" else f"{mantissa} × {ten}"


def raised(exponent: float, digits: int = 3) -> str:
    """An exponent as superscript characters: ``⁰·⁵⁶²``."""
    return f"{exponent:.{digits}f}".translate(_SUPERSCRIPT).replace(".", "·")


def short(value: float, digits: int = 3) -> str:
    """``490k``, ``1.2M``, ``32``: for counts of parameters and images."""
    for scale, letter in _PREFIXES:
        if abs(value) >= scale * (1 - 0.5 * 10**-digits):
            return _significant(value / scale, digits) + letter
    return _significant(value, digits)


def _significant(value: float, digits: int) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def factor(value: float) -> str:
    """``0.52``, ``10``, ``1,000``: how many times, in three digits and without an exponent."""
    return _significant(value, 3) if abs(value) < 999.5 else f"{float(f'{value:.3g}'):,.0f}"


def duration(seconds: float) -> str:
    """``48 s``, ``12.4 min``, ``3.2 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def percent(share: float, digits: int = 2) -> str:
    """Signed, with a true minus and no break before the sign: ``+1.21 %``, ``−0.40 %``."""
    return f"{100 * share:+.{digits}f}\u00a0%".replace("-", "−")
