"""Peak dense 16-bit throughput of accelerators, to turn FLOPs into hours. Each with its source."""

from __future__ import annotations

from ditscale.errors import InputError

# Dense (no sparsity), bfloat16 with float32 accumulation, FLOP/s at 2 per multiply-add.
PEAKS: dict[str, tuple[float, str]] = {
    "a100": (312e12, "NVIDIA A100 data sheet, bfloat16 tensor core, dense"),
    "h100": (989.4e12, "NVIDIA H100 SXM5 data sheet: 1,979 with sparsity, half of it dense"),
    "h100-pcie": (756.5e12, "NVIDIA H100 PCIe data sheet: 1,513 with sparsity, half of it dense"),
    "h200": (989.4e12, "NVIDIA H200 SXM data sheet: 1,979 with sparsity, half of it dense"),
    "b200": (2250e12, "NVIDIA HGX B200 data sheet: 4,500 with sparsity per GPU, half of it dense"),
    "rtx4090": (165.2e12, "NVIDIA Ada architecture paper, float16 with float32 accumulation, dense"),
    "mi300x": (1307.4e12, "AMD Instinct MI300X data sheet, bfloat16, dense"),
}
# Without a measurement: what well-kept transformer training reaches on these machines, and DiTs not always.
ASSUMED_MFU = 0.4


def peak_flops(gpu: str) -> float:
    """Peak FLOP/s of an accelerator by name.

    Raises:
        InputError: unknown; lists those known.
    """
    key = gpu.lower()
    if key not in PEAKS:
        raise InputError(f"gpu: expected one of {', '.join(PEAKS)}, got {gpu!r}; or give --flops-per-second")
    return PEAKS[key][0]
