"""What a measurement ran on: device, caches, threads, versions, commit, clocks. Published peaks: ditscale.peaks."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ditscale

PEERS = ("liger-kernel", "quack-kernels", "apex", "flash-attn", "xformers", "transformer-engine")
_GPU_STATE = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
_GPU_THROTTLING = (
    "clocks_event_reasons.active",
    "clocks_throttle_reasons.active",
)  # as newer and older drivers call it


def version_of(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def versions() -> dict[str, str]:
    """Versions that a speed depends on; peers only where they are installed."""
    import numpy
    import scipy
    import torch

    found: dict[str, str | None] = {
        "ditscale": ditscale.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "triton": version_of("triton"),
        "compiler": _first_line(["g++", "--version"]),
        **{name: version_of(name) for name in PEERS},
    }
    return {name: value for name, value in found.items() if value is not None}


@functools.cache
def commit() -> dict[str, Any]:
    """The checkout's commit and whether files differ from it; of an installed package, its version and dirty None.

    ``DITSCALE_COMMIT`` stands in where git or its folder is not there, as on a machine that a checkout was copied to.
    """
    here = Path(__file__).resolve().parent
    name = _first_line(["git", "-C", str(here), "rev-parse", "HEAD"])
    if name is None:
        return {"commit": os.environ.get("DITSCALE_COMMIT", f"installed {ditscale.__version__}"), "dirty": None}
    # Rows that are being written must not make the measured code count as changed.
    rest = [
        "--porcelain",
        "--untracked-files=no",
        "--",
        ":/",
        ":(top,exclude)bench/results",
        ":(top,exclude)README.md",
    ]
    return {"commit": name, "dirty": bool(_output(["git", "-C", str(here), "status", *rest]))}


def processor() -> str:
    """The processor's name with its family and model: virtual machines often hide the product's name."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()

    def field(name: str) -> str:
        found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.M)
        return found[1].strip() if found else "?"

    return f"{field('model name')} (family {field('cpu family')}, model {field('model')})"


@functools.cache
def cache_bytes() -> dict[str, int]:
    """Sizes of the data caches of core 0 as the system states them, by level; empty where it states none."""
    sizes: dict[str, int] = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            if (folder / "type").read_text().strip() == "Instruction":
                continue
            number, unit = re.match(r"(\d+)([KMG]?)", (folder / "size").read_text().strip()).groups()  # type: ignore[union-attr]
            level = (folder / "level").read_text().strip()
        except (OSError, AttributeError):
            continue
        sizes[f"L{level}"] = int(number) * {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[unit]
    return sizes


def last_level_cache(device: str) -> int:
    """Bytes of the last cache before memory: of the GPU's L2, or of the processor; 32 MiB where none is stated."""
    if device == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
    return max(cache_bytes().values(), default=32 << 20)


def core_caches() -> int:
    """Bytes of the second-level caches of the cores in use, 1 MiB a core where none is stated."""
    import torch

    return cache_bytes().get("L2", 1 << 20) * torch.get_num_threads()


def rotation_bytes(device: str) -> int:
    """What buffers that take turns must fill together so that none is found in a cache when its turn comes.

    Three times the last-level cache, on a processor at most 512 MiB: the several hundred MB that a virtual machine states belong
    to all cores of its host, and copies are as slow beyond 128 MB as at 3 GB there (ceilings of both sizes stand in the rows).
    """
    wanted = 3 * last_level_cache(device)
    return wanted if device == "cuda" else min(wanted, 512 << 20)


def machine(device: str) -> dict[str, Any]:
    """Facts that stand in every row measured on ``device`` ("cpu" or "cuda")."""
    import torch

    from ditscale.kernels.library import cpu_isa

    facts: dict[str, Any] = {
        "type": device,
        "name": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "pinned_to": _cores,
        "instruction_set": cpu_isa(),
        "cache_bytes": cache_bytes(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    if device == "cuda":
        p = torch.cuda.get_device_properties(torch.cuda.current_device())
        facts |= {
            "name": p.name,
            "processor": processor(),
            "capability": f"sm_{p.major}{p.minor}",
            "memory_bytes": p.total_memory,
            "cache_bytes": {"L2": p.L2_cache_size},
            "multiprocessors": p.multi_processor_count,
            "driver": _nvidia_smi("driver_version"),
        }
    return facts


def state(device: str) -> dict[str, Any]:
    """Clock, load, power and temperature now; what the system does not tell is left out."""
    found: dict[str, Any] = {"load_average": round(os.getloadavg()[0], 2)}
    if device == "cuda":
        # One query fails as a whole where a name in it is unknown.
        for names in (*((*_GPU_STATE, last) for last in _GPU_THROTTLING), _GPU_STATE):
            values = (_nvidia_smi(",".join(names)) or "").split(", ")
            if len(values) == len(names):
                return found | dict(zip(names, values, strict=True))
        return found
    try:
        clocks = [float(c) for c in re.findall(r"^cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text(), re.M)]
        found["clock_mhz"] = round(max(clocks)) if clocks else None
    except OSError:
        pass
    for zone in sorted(Path("/sys/class/thermal").glob("thermal_zone*/temp"))[:1]:
        with contextlib.suppress(OSError, ValueError):
            found["temperature_c"] = int(zone.read_text()) / 1000
    return found


_cores: list[int] | None = None  # that pin() chose, before OpenMP bound this thread to the first of them


def pin(threads: int | None) -> int:
    """Use ``threads`` threads, each bound to a core of its own, and no other cores; returns how many.

    Where torch is loaded already its threads are only counted, not bound: OpenMP reads the places once, when it starts.

    Args:
        threads: how many. Default: all cores this process may use.

    Raises:
        InputError: fewer than one, or more than there are cores.
    """
    global _cores
    from ditscale.errors import InputError

    usable = _cores or _affinity()
    count = len(usable) if threads is None else threads
    if not 1 <= count <= len(usable):
        raise InputError(f"--threads: expected 1 to {len(usable)}, the cores this process may use, got {count}")
    if "torch" not in sys.modules and hasattr(os, "sched_setaffinity"):
        _cores = usable[:count]
        os.sched_setaffinity(0, set(_cores))
        os.environ.update(OMP_PROC_BIND="true", OMP_PLACES="cores")
    import torch

    torch.set_num_threads(count)
    return count


def touch_memory() -> None:
    """Write 4 GiB of the heap once, or a sixth of the memory that there is if that is less, so that cases meet no new memory.

    A virtual machine may have to ask its host for every page that it touches first: on one, new memory was written at 0.5 GB/s,
    old at 26. What is freed stays with the process where ``keep_memory`` has been called.
    """
    import torch

    torch.empty(min(4 << 30, _memory() // 6), dtype=torch.uint8).fill_(0)


def _memory(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """The machine's memory in bytes, or a container's limit if that is less."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(whole, int(limit.read_text()))
    except (OSError, ValueError):  # no such limit, or "max"
        return whole


def _affinity() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def slug(facts: dict[str, Any]) -> str:
    """A file name for a device's results, such as ``amd-epyc-family-26-model-2-2-threads``."""
    threads = f" {facts['threads']} threads" if facts["type"] == "cpu" else ""
    return re.sub(r"[^a-z0-9]+", "-", f"{facts['name']}{threads}".lower()).strip("-")


def _nvidia_smi(query: str) -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    return _first_line(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _first_line(command: list[str]) -> str | None:
    text = (_output(command) or "").strip()
    return text.splitlines()[0] if text else None
