"""What runs here, what does not, and why: the facts behind ``ditscale doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

import torch

import ditscale
from ditscale.kernels import dispatch, library, selfcheck


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor()


def _devices() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {"type": "cpu", "name": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            found.append(
                {
                    "type": "cuda",
                    "index": index,
                    "name": p.name,
                    "capability": f"sm_{p.major}{p.minor}",
                    "memory_bytes": p.total_memory,
                }
            )
    return found


def report(*, check: bool = False) -> dict[str, Any]:
    """Everything ``ditscale doctor --json`` prints; with ``check`` every available kernel is compared with the reference."""
    libraries = {}
    for name in ("cpu", "cuda"):
        reason = library.missing_reason(name)
        libraries[f"libditscale_{name}"] = {
            "available": reason is None,
            "reason": reason,
            "built": library.path_of(name).is_file(),
            "path": str(library.path_of(name)) if library.path_of(name).is_file() else None,
        }
    libraries["libditscale_cpu"]["instruction_set"] = library.cpu_isa()
    devices = _devices()
    operators: dict[str, dict[str, Any]] = {}
    checks: list[dict[str, Any]] = []
    types = list(dict.fromkeys(d["type"] for d in devices))
    for op, backends in dispatch.BACKENDS.items():
        rows: dict[str, Any] = {"reference": {"available": True, "reason": None}}
        for backend in backends:
            device = "cpu" if backend in ("cpu", "sdpa", "onednn") or types == ["cpu"] else "cuda"
            reason = dispatch.unavailable_reason(op, backend, device)
            rows[backend] = {"available": reason is None, "reason": reason}
            if check and reason is None and backend not in dispatch.LIBRARIES:
                for dtype in dispatch.dtypes_of(op, backend) or ():
                    wrong = selfcheck.check(op, backend, dtype, device, again=True)
                    checks.append(
                        {
                            "operator": op,
                            "backend": backend,
                            "dtype": str(dtype).removeprefix("torch."),
                            "device": device,
                            "passed": wrong is None,
                            "reason": wrong,
                        }
                    )
        operators[op] = rows
    result: dict[str, Any] = {
        "ditscale": ditscale.__version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "triton": _version("triton"),
        "peers": {name: _version(name.replace("_", "-")) for name in ("flash_attn", "xformers")},
        "libraries": libraries,
        "devices": devices,
        "operators": operators,
    }
    if check:
        result["checks"] = checks
    return result
