"""Published peaks of accelerators, each with its source: the one table for the meter, the planner and the benchmarks.

Arithmetic is dense (no sparsity) with float32 accumulation where a device has several rates; a multiply-add is 2. One
device is one chip, module or (MI250X) one of two dies. Where a data sheet prints figures with sparsity only, half of
them is meant. A figure that no vendor's document was found for is not here: an unknown device gives None, not a guess.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

_TERA = 10**12
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "float8"}


class Peak(NamedTuple):
    """A device's published peak arithmetic.

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


class Device(NamedTuple):
    """What a vendor states of a device.

    Attributes:
        name: its name here.
        pattern: regular expression that the names it goes by contain; lower case, blanks for dashes.
        source: the vendor's document.
        tera: TFLOP/s by dtype.
        bandwidth: of its memory, bytes a second; None where not stated.
    """

    name: str
    pattern: str
    source: str
    tera: dict[str, float]
    bandwidth: int | None = None


def _tensor(sixteen: float, **others: float) -> dict[str, float]:
    """bfloat16 and float16 run at one rate."""
    return {"bfloat16": sixteen, "float16": sixteen, **others}


_A100 = _tensor(312, tf32=156, float32=19.5)
_A100_SHEET = "NVIDIA A100 data sheet, nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
_H100_PAGE = "https://www.nvidia.com/en-us/data-center/h100/"
_V100_SHEET = "NVIDIA V100 data sheet, volta-v100-datasheet-update-us-1165301-r5.pdf"
_BLACKWELL = "NVIDIA Blackwell data sheet, https://nvdam.widen.net/s/wwnsxrhm2w/blackwell-datasheet-3384703"
_TPU = "https://cloud.google.com/tpu/docs/"

# The first pattern that a name contains wins, so variants stand before their family.
DEVICES: Final[tuple[Device, ...]] = (
    Device("H100 PCIe", "h100.*pcie", _H100_PAGE, _tensor(756.5, float32=51), 2 * _TERA),
    Device("H100 NVL", "h100.*nvl", _H100_PAGE, _tensor(835.5)),
    Device(
        "H100 SXM",
        r"\bh100\b",
        f"NVIDIA H100 architecture white paper; bandwidth {_H100_PAGE}",
        _tensor(989.4, tf32=494.7, float32=66.9, float8=1978.9),
        3_350 * 10**9,
    ),
    Device("H200", r"\bh200\b", "https://www.nvidia.com/en-us/data-center/h200/", _tensor(989.5), 4_800 * 10**9),
    Device("GB200", r"\bgb200\b", _BLACKWELL, _tensor(2500, float8=5000), 8 * _TERA),
    Device("B200", r"\bb200\b", _BLACKWELL, _tensor(2250, float8=4500), 8 * _TERA),
    Device("A100 40 GB", r"\ba100\b.*40 ?gb", _A100_SHEET, _A100, 1_555 * 10**9),
    Device("A100 80 GB PCIe", r"\ba100\b.*pcie", _A100_SHEET, _A100, 1_935 * 10**9),
    Device("A100 80 GB SXM", r"\ba100\b", _A100_SHEET, _A100, 2_039 * 10**9),
    Device("A40", r"\ba40\b", "NVIDIA A40 data sheet, nvidia-a40-datasheet.pdf", _tensor(149.7), 696 * 10**9),
    Device("A10", r"\ba10\b", "NVIDIA A10 data sheet, a10-datasheet.pdf", _tensor(125, float32=31.2), 600 * 10**9),
    Device(
        "L40S",
        r"\bl40s\b",
        "NVIDIA L40S data sheet, https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413",
        _tensor(362, tf32=183, float8=733),
        864 * 10**9,
    ),
    Device(
        "L4",
        r"\bl4\b",
        "NVIDIA L4 data sheet, https://resources.nvidia.com/en-us-gpu-resources/l4-tensor-datasheet",
        _tensor(121, tf32=60, float32=30.3, float8=242.5),
    ),
    Device("V100S", r"\bv100s\b", _V100_SHEET, {"float16": 130, "float32": 16.4}),
    Device("V100 PCIe", r"\bv100\b.*pcie", _V100_SHEET, {"float16": 112, "float32": 14}),
    Device("V100 SXM2", r"\bv100\b", _V100_SHEET, {"float16": 125, "float32": 15.7}),
    Device(
        "T4", r"\bt4\b", "NVIDIA T4 data sheet, t4-tensor-core-datasheet-951643.pdf", {"float16": 65, "float32": 8.1}
    ),
    Device(
        "RTX 5090",
        r"\brtx ?5090\b",
        "NVIDIA RTX Blackwell architecture white paper, table 3",
        _tensor(209.5, float8=419),
        1_792 * 10**9,
    ),
    Device(
        "RTX 4090",
        r"\brtx ?4090\b",
        "NVIDIA Ada architecture white paper, appendix A",
        _tensor(165.2, float32=82.6, float8=330.3),
        1_008 * 10**9,
    ),
    Device(
        "RTX 3090",
        r"\brtx ?3090\b(?! ti)",
        "NVIDIA Ampere GA102 architecture white paper, appendix A",
        _tensor(71, float32=35.6),
        936 * 10**9,
    ),
    Device(
        "MI300X",
        r"\bmi300x\b",
        "AMD Instinct MI300X data sheet, amd-instinct-mi300x-data-sheet.pdf",
        _tensor(1307.4, tf32=653.7, float32=163.4, float8=2614.9),
        5_300 * 10**9,
    ),
    Device(
        "MI300A",
        r"\bmi300a\b",
        "AMD Instinct MI300A data sheet, amd-instinct-mi300a-data-sheet.pdf",
        _tensor(980.6, tf32=490.3, float32=122.6, float8=1961.2),
        5_300 * 10**9,
    ),
    Device(
        "MI325X",
        r"\bmi325x\b",
        "AMD Instinct MI325X data sheet, instinct-mi325x-datasheet.pdf",
        _tensor(1307.4),
        6 * _TERA,
    ),
    Device(
        "MI350X",
        r"\bmi350x\b",
        "AMD Instinct MI350X brochure, amd-instinct-mi350x-gpu-brochure.pdf",
        _tensor(2309.6, float32=144.2, float8=4614),
        8 * _TERA,
    ),
    Device(
        "MI250X",
        r"\bmi250x\b",
        "https://www.amd.com/en/products/accelerators/instinct/mi200/mi250x.html, one of two dies",
        _tensor(191.5),
    ),
    Device("TPU v4", r"\btpu ?v4\b", f"{_TPU}v4", {"bfloat16": 275}, 1_200 * 10**9),
    Device("TPU v5e", r"\btpu ?v5 ?(e|lite)", f"{_TPU}v5e", {"bfloat16": 197}, 819 * 10**9),
    Device("TPU v5p", r"\btpu ?v5p?\b", f"{_TPU}v5p", {"bfloat16": 459}, 2_765 * 10**9),
    Device("TPU v6e", r"\btpu ?v6 ?(e|lite)", f"{_TPU}v6e", {"bfloat16": 918}, 1_638 * 10**9),
)


def find_device(name: str | None) -> Device | None:
    """The device that goes by this name, such as ``torch.cuda.get_device_name()`` or "h100"; None where unknown.

    A bare "h100" or "a100" is the SXM module, the latter with 80 GB.
    """
    if name is None:
        return None
    # Names join their parts with dashes and underscores as well as blanks.
    plain = re.sub(r"[-_]+", " ", name.lower())
    return next((device for device in DEVICES if re.search(device.pattern, plain)), None)


def find_peak(name: str | None, dtype: str = "bfloat16") -> Peak | None:
    """The published peak of a device by its name (see :func:`find_device`).

    Args:
        name: of the device; None gives None.
        dtype: "bfloat16" (or "bf16", or ``str(torch.bfloat16)``), "float16", "tf32", "float32" or "float8". Default:
            "bfloat16".

    Returns:
        Peak, or None where the device or its figure for that dtype is not in the table.
    """
    device = find_device(name)
    dtype = dtype.removeprefix("torch.")
    dtype = _SHORT.get(dtype, dtype)
    if device is None or dtype not in device.tera:
        return None
    return Peak(device.name, dtype, round(device.tera[dtype] * _TERA), device.source)
