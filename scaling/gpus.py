"""Peak dense 16-bit throughput of accelerators, to turn FLOPs into hours."""

from __future__ import annotations

from ditscale.errors import InputError
from ditscale.peaks import DEVICES, find_peak

# Without a measurement: what well-kept transformer training reaches on these machines, and DiTs not always.
ASSUMED_MFU = 0.4


def peak_flops(gpu: str) -> float:
    """Peak FLOP/s of an accelerator by name: dense bfloat16, or float16 where it has no bfloat16.

    Raises:
        InputError: unknown; lists those known.
    """
    peak = find_peak(gpu) or find_peak(gpu, "float16")
    if peak is None:
        known = ", ".join(device.name for device in DEVICES)
        raise InputError(f"gpu: expected one of {known}, got {gpu!r}")
    return float(peak.flops)
