"""The table of published peaks: names, sources, and that everybody uses this one."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest

from ditscale.errors import InputError
from ditscale.peaks import DEVICES, find_device, find_peak
from ditscale.scaling.gpus import peak_flops

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("h100-pcie", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"), ("h100", "H100 SXM"), ("NVIDIA GH200 480GB", None),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB SXM"), ("NVIDIA A100-SXM4-40GB", "A100 40 GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80 GB PCIe"), ("NVIDIA A100-PCIE-40GB", "A100 40 GB"),
        ("a100", "A100 80 GB SXM"), ("NVIDIA A10", "A10"), ("NVIDIA A10G", None), ("NVIDIA A40", "A40"),
        ("NVIDIA L4", "L4"), ("NVIDIA L40", None), ("NVIDIA L40S", "L40S"), ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"), ("NVIDIA GB200", "GB200"), ("Tesla V100-SXM2-16GB", "V100 SXM2"),
        ("Tesla V100-PCIE-16GB", "V100 PCIe"), ("Tesla V100S-PCIE-32GB", "V100S"), ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"), ("NVIDIA GeForce RTX 3090 Ti", None),
        ("rtx4090", "RTX 4090"), ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("AMD Instinct MI300X OAM", "MI300X"), ("AMD Instinct MI250X", "MI250X"),
        ("TPU v5 lite", "TPU v5e"), ("TPU v5e", "TPU v5e"), ("TPU v5", "TPU v5p"), ("TPU v6 lite", "TPU v6e"),
        ("TPU v4", "TPU v4"), ("Intel(R) Xeon(R)", None), ("cpu", None), (None, None),
    ],
)  # fmt: skip
def test_devices_by_the_names_they_give(name: str | None, device: str | None) -> None:
    found = find_device(name)
    assert (None if found is None else found.name) == device


def test_every_figure_has_its_source() -> None:
    for device in DEVICES:
        assert find_device(device.name) is device  # no pattern takes another's name
        assert device.source.startswith("https://") or any(
            word in device.source for word in ("data sheet", "white paper", "brochure")
        )
        for dtype, tera in device.tera.items():
            assert dtype in ("bfloat16", "float16", "tf32", "float32", "float8")
            peak = find_peak(device.name, dtype)
            assert peak == (device.name, dtype, round(tera * 1e12), device.source)
        # A unit is slipped easily: every device stands between 5 TFLOP/s and 10 PFLOP/s, 0.2 and 10 TB/s.
        assert all(5 <= tera <= 10_000 for tera in device.tera.values())
        assert device.bandwidth is None or 2e11 <= device.bandwidth <= 1e13
        rates = [device.tera.get(dtype, math.nan) for dtype in ("float8", "bfloat16", "tf32", "float32")]
        known = [rate for rate in rates if not math.isnan(rate)]
        assert known == sorted(known, reverse=True)


def test_dtypes_go_by_several_names_and_unknown_ones_give_none() -> None:
    h100 = find_peak("h100")
    assert h100 is not None and h100.flops == 989_400_000_000_000
    assert find_peak("h100", "bf16") == find_peak("h100", "torch.bfloat16") == h100
    assert find_peak("a100", "float8") is None and find_peak("Tesla T4") is None
    assert find_peak("abacus 3000") is None and find_peak(None) is None


def test_the_planner_takes_the_same_figures() -> None:
    assert peak_flops("H100") == 989.4e12 and peak_flops("rtx4090") == 165.2e12
    assert peak_flops("t4") == 65e12  # has no bfloat16
    with pytest.raises(InputError, match="gpu: expected one of .*H100 SXM.*, got 'abacus'"):
        peak_flops("abacus")


def test_no_room_has_a_table_of_its_own() -> None:
    """Numbers of a vendor's size, in code: 1e13 and above with a device's name in the same statement."""
    names = ("a100", "h100", "mi300", "4090")
    for room in ("kernels", "dit", "scaling", "bench"):
        for path in (ROOT / "ditscale" / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Dict):
                    text = ast.unparse(node).lower()
                    numbers = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
                    large = any(isinstance(n, (int, float)) and n >= 5e11 for n in numbers)
                    assert not (large and any(name in text for name in names)), path
