"""Peak arithmetic of accelerators, dense (no sparsity), one device (one chip, one GCD), with the source of
each. No torch.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_TERA = 10**12


class Peak(NamedTuple):
    """A device's published peak.

    Attributes:
        device: its name here.
        dtype: "bfloat16", "float16", "tf32", "float32" or "float8".
        flops: FLOPs a second, dense; a multiply-add is 2.
        source: the vendor's document.
    """

    device: str
    dtype: str
    flops: int
    source: str


class _Device(NamedTuple):
    pattern: str
    source: str
    tera: dict[str, float]


def _tensor(
    bfloat16: float, tf32: float | None = None, float32: float | None = None, float8: float | None = None
) -> dict[str, float]:
    given = {"bfloat16": bfloat16, "float16": bfloat16, "tf32": tf32, "float32": float32, "float8": float8}
    return {dtype: value for dtype, value in given.items() if value is not None}


# The first pattern that matches a device's name wins, so variants stand before their family. Where a data
# sheet prints figures with sparsity only, half of them is meant.
_DEVICES: dict[str, _Device] = {
    "H100 PCIe": _Device(r"h100.*pcie", "NVIDIA H100 data sheet", _tensor(756.5, 378, 51, 1513)),
    "H100 NVL": _Device(r"h100.*nvl", "NVIDIA H100 NVL data sheet", _tensor(835, 418, 60, 1671)),
    "H100 SXM": _Device(r"\bg?h100\b", "NVIDIA H100 architecture white paper", _tensor(989.4, 494.7, 66.9, 1978.9)),
    "H200 SXM": _Device(r"\b(gh200|h200)\b", "NVIDIA H200 data sheet", _tensor(989.4, 494.7, 66.9, 1978.9)),
    "H20": _Device(r"\bh20\b", "NVIDIA H20 data sheet", _tensor(148, 74, 44, 296)),
    "GB200": _Device(r"\bgb200\b", "NVIDIA GB200 NVL72 data sheet", _tensor(2500, 1250, 80, 5000)),
    "B200": _Device(r"\bb200\b", "NVIDIA HGX B200 data sheet", _tensor(2250, 1120, 75, 4500)),
    "A100": _Device(r"\ba100\b", "NVIDIA A100 data sheet", _tensor(312, 156, 19.5)),
    "A40": _Device(r"\ba40\b", "NVIDIA A40 data sheet", _tensor(149.7, 74.8, 37.4)),
    "A10": _Device(r"\ba10\b", "NVIDIA A10 data sheet", _tensor(125, 62.5, 31.2)),
    "L40S": _Device(r"\bl40s\b", "NVIDIA L40S data sheet", _tensor(362, 183, 91.6, 733)),
    "L40": _Device(r"\bl40\b", "NVIDIA L40 data sheet", _tensor(181, 90.5, 90.5, 362)),
    "L4": _Device(r"\bl4\b", "NVIDIA L4 data sheet", _tensor(121, 60, 30.3, 242)),
    "V100": _Device(r"\bv100\b", "NVIDIA V100 data sheet (SXM2)", {"float16": 125, "float32": 15.7}),
    "T4": _Device(r"\bt4\b", "NVIDIA T4 data sheet", {"float16": 65, "float32": 8.1}),
    "RTX 5090": _Device(
        r"rtx 5090",
        "NVIDIA RTX Blackwell white paper, float32 accumulation",
        _tensor(209.5, 104.8, 104.8, 419),
    ),
    "RTX 4090": _Device(r"rtx 4090", "NVIDIA Ada white paper, float32 accumulation", _tensor(165.2, 82.6, 82.6, 330.3)),
    "RTX 3090": _Device(
        r"rtx 3090(?! ti)", "NVIDIA Ampere GA102 white paper, float32 accumulation", _tensor(71, 35.6, 35.6)
    ),
    "MI300X": _Device(r"\bmi300x\b", "AMD Instinct MI300X data sheet", _tensor(1307.4, 653.7, 163.4, 2614.9)),
    "MI325X": _Device(r"\bmi325x\b", "AMD Instinct MI325X data sheet", _tensor(1307.4, 653.7, 163.4, 2614.9)),
    "MI250X": _Device(
        r"\bmi250x\b",
        "AMD Instinct MI250X data sheet, one of two dies",
        {"bfloat16": 191.5, "float16": 191.5, "float32": 23.95},
    ),
    "TPU v4": _Device(r"tpu ?v4\b", "Google Cloud documentation, TPU v4", {"bfloat16": 275}),
    "TPU v5e": _Device(r"tpu ?v5 ?(e|lite)\b", "Google Cloud documentation, TPU v5e", {"bfloat16": 197}),
    "TPU v5p": _Device(r"tpu ?v5p?\b", "Google Cloud documentation, TPU v5p", {"bfloat16": 459}),
    "TPU v6e": _Device(r"tpu ?v6 ?(e|lite)\b", "Google Cloud documentation, TPU v6e", {"bfloat16": 918}),
}
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "float8"}


def find_peak(device: str | None, dtype: str = "bfloat16") -> Peak | None:
    """The published peak of a device by its name, such as ``torch.cuda.get_device_name()`` or "h100".

    Args:
        device: the name; None gives None.
        dtype: "bfloat16" (or "bf16"), "float16", "tf32", "float32" or "float8". Default: "bfloat16".

    Returns:
        Peak, or None where the device or its figure for that dtype is not in the table: a guess would be
            worse.
    """
    if device is None:
        return None
    dtype = dtype.removeprefix("torch.")
    dtype = _SHORT.get(dtype, dtype)
    # Names join their parts with dashes and underscores as well as blanks.
    name = re.sub(r"[-_]+", " ", device.lower())
    for label, entry in _DEVICES.items():
        if re.search(entry.pattern, name):
            tera = entry.tera.get(dtype)
            return None if tera is None else Peak(label, dtype, round(tera * _TERA), entry.source)
    return None


def all_peaks() -> list[Peak]:
    """The whole table."""
    return [
        Peak(label, dtype, round(tera * _TERA), entry.source)
        for label, entry in _DEVICES.items()
        for dtype, tera in entry.tera.items()
    ]
