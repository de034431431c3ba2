"""Compiles csrc/ into the two libraries of the package, against torch's stable ABI and without importing torch.

The compile needs torch's headers and the name of one of its libraries, nothing of its C++ symbols, so one result serves
every torch from TARGET on. Files are written under a temporary name and renamed, so that a process that has the old
library open goes on with it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
TARGET = "0x020a000000000000"  # torch 2.10: the oldest whose C shim has parallel_for
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={TARGET}", "-Wall", "-Wno-maybe-uninitialized"]
X86_UNITS = {
    "cpu/adaln_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "cpu/adaln_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"],
}
CPU_UNITS: dict[str, list[str]] = {
    "bindings/schemas.cpp": [],
    "cpu/adaln.cpp": [],
    "cpu/adaln_portable.cpp": [],
    "cpu/isa.cpp": [],
    **(X86_UNITS if platform.machine() in ("x86_64", "AMD64") else {}),
}


def say(message: str) -> None:
    print(f"ditscale: {message}", file=sys.stderr, flush=True)


def find_torch() -> Path | None:
    """The folder of the torch to build against: importable, or in the environment that an isolated build is for."""
    spec = importlib.util.find_spec("torch")
    found = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    found += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("purelib", "platlib")]
    for folder in found:
        if (folder / "include/torch/csrc/stable/library.h").is_file():
            return folder
    return None


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    if done.stderr.strip():
        sys.stderr.write(done.stderr)


def _run_all(commands: list[list[str]]) -> None:
    jobs = int(os.environ.get("MAX_JOBS", 0)) or min(4, os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(_run, commands))


def build_cpu(torch: Path, out: Path) -> None:
    """Compile libditscale_cpu.so into `out`."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    with tempfile.TemporaryDirectory() as folder:
        objects, commands = [], []
        for unit, flags in CPU_UNITS.items():
            objects.append(str(Path(folder) / (unit.replace("/", "_") + ".o")))
            source = str(CSRC / unit)
            commands.append([*compiler, *COMMON, *flags, *extra, f"-I{torch}/include", "-c", source, "-o", objects[-1]])
        _run_all(commands)
        _link([*compiler, "-shared", *objects, f"-L{torch}/lib", "-ltorch_cpu"], out / "libditscale_cpu.so")


def _link(command: list[str], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        _run([*command, "-o", str(temporary)])
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def build_all(out: Path) -> list[Path]:
    """Compile what can be compiled here into `out`; returns the libraries. Says in one line what is left out and why."""
    torch = find_torch()
    if sys.platform != "linux":
        say(f"no native libraries on {sys.platform}; the reference backend serves every operator")
        return []
    if torch is None:
        raise RuntimeError("building ditscale needs torch >= 2.10 for its headers: install torch first, or build with isolation")
    out.mkdir(parents=True, exist_ok=True)
    build_cpu(torch, out)
    return sorted(out.glob("libditscale_*.so"))
